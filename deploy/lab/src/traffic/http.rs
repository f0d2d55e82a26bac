//! HTTP clients.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pattern;
use crate::host::Host;

/// Failures kept in words; the rest is only counted.
const MAX_FAILURES_KEPT: usize = 32;
/// Bytes of a server's complaint that are read.
const MAX_WORDS: u64 = 1024;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// The server's name, from `X-Backend`.
    pub backend: String,
    /// Body.
    pub body: Vec<u8>,
}

/// Asks `target` for `path` on a new connection, from the calling thread's namespace. The body is kept in memory.
///
/// # Errors
/// Connection refused, reset or timed out, or an answer that is not HTTP.
pub fn get(target: SocketAddr, path: &str, timeout: Duration) -> io::Result<Response> {
    let (mut stream, head, mut body) = ask(target, path, timeout)?;
    let length = head.length as usize;
    while body.len() < length {
        let mut buf = [0; 16 * 1024];
        match stream.read(&mut buf)? {
            0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "body cut short")),
            n => body.extend_from_slice(&buf[..n]),
        }
    }
    Ok(Response { status: head.status, backend: head.backend, body })
}

/// Downloads `length` bytes of the pattern through `target` and checks every one. Returns how long it took.
///
/// # Errors
/// As [`get`], and `InvalidData` at the first byte that is not what it must be.
pub fn download(target: SocketAddr, length: u64, timeout: Duration) -> io::Result<Duration> {
    let start = Instant::now();
    let (mut stream, head, first) = ask(target, &format!("/bytes/{length}"), timeout)?;
    if head.status != 200 || head.length != length {
        return Err(io::Error::other(format!("status {}, {} bytes announced", head.status, head.length)));
    }
    let wrong =
        |at: u64| io::Error::new(io::ErrorKind::InvalidData, format!("byte {at} is not the one sent"));
    if let Some(at) = pattern::mismatch(0, &first) {
        return Err(wrong(at));
    }
    let mut done = first.len() as u64;
    let mut buf = vec![0; 256 * 1024];
    while done < length {
        if start.elapsed() > timeout {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{done} of {length} bytes in {timeout:?}"),
            ));
        }
        let n = stream.read(&mut buf)?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{done} of {length} bytes")));
        }
        if let Some(at) = pattern::mismatch(done, &buf[..n]) {
            return Err(wrong(at));
        }
        done += n as u64;
    }
    if done > length {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{done} bytes instead of {length}")));
    }
    Ok(start.elapsed())
}

/// Uploads `length` bytes of the pattern to `target`, which checks every one ([`super::server`]). Returns how long it took.
///
/// # Errors
/// As [`get`], and `InvalidData` with the server's words when what arrived is not what was sent.
pub fn upload(target: SocketAddr, length: u64, timeout: Duration) -> io::Result<Duration> {
    let start = Instant::now();
    let mut stream = connect(target, timeout)?;
    write!(
        stream,
        "PUT /bytes HTTP/1.1\r\nHost: lab\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    let mut sent = 0;
    while sent < length {
        if start.elapsed() > timeout {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{sent} of {length} bytes in {timeout:?}"),
            ));
        }
        let chunk = pattern::at(sent, (length - sent).min(64 * 1024));
        stream.write_all(chunk)?;
        sent += chunk.len() as u64;
    }
    let (head, mut said) = read_head(&mut stream)?;
    if head.status != 200 {
        stream.take(MAX_WORDS).read_to_end(&mut said)?;
        let said = String::from_utf8_lossy(&said).into_owned();
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("status {}: {said}", head.status)));
    }
    Ok(start.elapsed())
}

struct Head {
    status: u16,
    backend: String,
    length: u64,
}

fn ask(target: SocketAddr, path: &str, timeout: Duration) -> io::Result<(TcpStream, Head, Vec<u8>)> {
    let mut stream = connect(target, timeout)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")?;
    let (head, body) = read_head(&mut stream)?;
    Ok((stream, head, body))
}

fn connect(target: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The head of an answer, and what came of the body with it.
fn read_head(stream: &mut TcpStream) -> io::Result<(Head, Vec<u8>)> {
    let mut data = Vec::new();
    loop {
        if let Some(at) = data.windows(4).position(|w| w == b"\r\n\r\n") {
            let body = data.split_off(at + 4);
            return Ok((parse_head(&String::from_utf8_lossy(&data))?, body));
        }
        let mut buf = [0; 4096];
        match stream.read(&mut buf)? {
            0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before the answer's head")),
            n => data.extend_from_slice(&buf[..n]),
        }
    }
}

fn parse_head(text: &str) -> io::Result<Head> {
    let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("not an HTTP answer: {text:.80}"));
    let mut lines = text.lines();
    let status =
        lines.next().and_then(|l| l.split(' ').nth(1)).and_then(|s| s.parse().ok()).ok_or_else(bad)?;
    let mut head = Head { status, backend: String::new(), length: 0 };
    for (key, value) in lines.filter_map(|l| l.split_once(": ")) {
        match key.to_ascii_lowercase().as_str() {
            "x-backend" => value.clone_into(&mut head.backend),
            "content-length" => head.length = value.parse().map_err(|_| bad())?,
            _ => {}
        }
    }
    Ok(head)
}

/// Who answered how often.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Answers with status 200 by backend.
    pub per_backend: BTreeMap<String, u64>,
    /// Requests that failed.
    pub failed: u64,
    /// The first failures, in words.
    pub failures: Vec<String>,
    /// Longest time between two successes (or from the start to the first).
    pub longest_pause: Duration,
}

impl Tally {
    /// Requests answered.
    pub fn answered(&self) -> u64 {
        self.per_backend.values().sum()
    }

    /// Requests answered by `backend`.
    pub fn of(&self, backend: &str) -> u64 {
        self.per_backend.get(backend).copied().unwrap_or_default()
    }

    fn add(&mut self, result: io::Result<Response>) -> bool {
        match result {
            Ok(r) if r.status == 200 => {
                *self.per_backend.entry(r.backend).or_default() += 1;
                return true;
            }
            Ok(r) => self.fail(format!("status {}", r.status)),
            Err(e) => self.fail(e.to_string()),
        }
        false
    }

    fn fail(&mut self, why: String) {
        self.failed += 1;
        if self.failures.len() < MAX_FAILURES_KEPT {
            self.failures.push(why);
        }
    }
}

/// Sends `count` requests for `/` one after the other, a new connection each.
pub fn requests(host: &Host, target: SocketAddr, count: u32, timeout: Duration) -> Tally {
    host.run(|| {
        let mut tally = Tally::default();
        for _ in 0..count {
            tally.add(get(target, "/", timeout));
        }
        tally
    })
}

/// A client that makes one request after the other until it is stopped.
#[derive(Debug)]
pub struct RequestLoop {
    stop: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
    thread: Option<JoinHandle<()>>,
}

impl RequestLoop {
    /// Starts it: a new connection every `interval` at most, each given up after `timeout`.
    pub fn start(host: &Host, target: SocketAddr, interval: Duration, timeout: Duration) -> RequestLoop {
        let stop = Arc::new(AtomicBool::new(false));
        let tally = Arc::new(Mutex::new(Tally::default()));
        let (stop_seen, shared) = (stop.clone(), tally.clone());
        let thread = host.spawn("requests", move || {
            let mut last_success = Instant::now();
            while !stop_seen.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let result = get(target, "/", timeout);
                let mut tally = shared.lock().unwrap_or_else(PoisonError::into_inner);
                if tally.add(result) {
                    tally.longest_pause = tally.longest_pause.max(last_success.elapsed());
                    last_success = Instant::now();
                }
                drop(tally);
                std::thread::sleep(interval.saturating_sub(begun.elapsed()));
            }
        });
        RequestLoop { stop, tally, thread: Some(thread) }
    }

    /// What it has counted since the last call of this method, or the start.
    pub fn take(&self) -> Tally {
        std::mem::take(&mut *self.tally.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Stops it; what it counted since the last [`RequestLoop::take`].
    pub fn stop(mut self) -> Tally {
        self.halt();
        self.take()
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for RequestLoop {
    fn drop(&mut self) {
        self.halt();
    }
}
