//! Long-lived TCP connections that keep asking whether they are still alive.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{LabError, Result};
use crate::host::Host;

/// What became of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// The server that greeted it.
    pub backend: String,
    /// Client's address and port.
    pub local: SocketAddr,
    /// Questions answered.
    pub pings: u64,
    /// Longest time that an answer took.
    pub longest: Duration,
    /// Why it ended, when it did before it was told to.
    pub broken: Option<String>,
}

/// Open connections to a TCP echo server. They close when dropped.
#[derive(Debug)]
pub struct Pingers {
    stop: Arc<AtomicBool>,
    all: Vec<(Arc<Mutex<Conversation>>, JoinHandle<()>)>,
}

impl Pingers {
    /// Opens `count` connections from `host` to `target`; each sends 8 bytes every `interval` and waits for them to
    /// come back, at most `timeout`.
    ///
    /// # Errors
    /// A connection is refused or not greeted.
    pub fn start(
        host: &Host,
        target: SocketAddr,
        count: usize,
        interval: Duration,
        timeout: Duration,
    ) -> Result<Pingers> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut pingers = Pingers { stop: stop.clone(), all: Vec::with_capacity(count) };
        for _ in 0..count {
            let (stream, backend) = host
                .run(|| open(target, timeout))
                .map_err(|e| LabError::system(format!("open a connection to {target}"), e))?;
            let local = stream.local_addr().map_err(|e| LabError::system("read an address", e))?;
            let conversation =
                Conversation { backend, local, pings: 0, longest: Duration::ZERO, broken: None };
            let shared = Arc::new(Mutex::new(conversation));
            let (state, stop) = (shared.clone(), stop.clone());
            let thread = host.spawn("pinger", move || talk(stream, &state, &stop, interval));
            pingers.all.push((shared, thread));
        }
        Ok(pingers)
    }

    /// How they are.
    pub fn report(&self) -> Vec<Conversation> {
        self.all.iter().map(|(c, _)| c.lock().unwrap_or_else(PoisonError::into_inner).clone()).collect()
    }

    /// Waits until each connection that is not broken has had `count` more answers, at most `limit`. Whether it had.
    pub fn wait_answered(&self, count: u64, limit: Duration) -> bool {
        let before = self.report();
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            let now = self.report();
            if before.iter().zip(&now).all(|(b, n)| n.broken.is_some() || n.pings >= b.pings + count) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }

    /// Closes them; how they were.
    pub fn stop(mut self) -> Vec<Conversation> {
        let report = self.halt();
        debug_assert!(self.all.is_empty());
        report
    }

    fn halt(&mut self) -> Vec<Conversation> {
        self.stop.store(true, Ordering::Relaxed);
        self.all
            .drain(..)
            .map(|(conversation, thread)| {
                let _ = thread.join();
                conversation.lock().unwrap_or_else(PoisonError::into_inner).clone()
            })
            .collect()
    }
}

impl Drop for Pingers {
    fn drop(&mut self) {
        self.halt();
    }
}

fn open(target: SocketAddr, timeout: Duration) -> io::Result<(TcpStream, String)> {
    let mut stream = TcpStream::connect_timeout(&target, timeout)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    let mut name = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            return Ok((stream, String::from_utf8_lossy(&name).into_owned()));
        }
        name.push(byte[0]);
    }
}

fn talk(mut stream: TcpStream, state: &Mutex<Conversation>, stop: &AtomicBool, interval: Duration) {
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let result = ping(&mut stream, number);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => {
                state.pings += 1;
                state.longest = state.longest.max(asked.elapsed());
            }
            Err(e) => {
                state.broken = Some(format!("{e} after {:?}", asked.elapsed()));
                return;
            }
        }
        drop(state);
        number += 1;
        std::thread::sleep(interval);
    }
}

fn ping(stream: &mut TcpStream, number: u64) -> io::Result<()> {
    let question = number.to_be_bytes();
    stream.write_all(&question)?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    if answer == question { Ok(()) } else { Err(io::Error::other("another answer than the question")) }
}
