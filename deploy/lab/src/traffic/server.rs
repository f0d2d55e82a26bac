//! A real server: HTTP, TCP echo and UDP echo, each on any number of addresses.
//!
//! HTTP/1.1 with keep-alive: `/` answers with the server's name, `/healthz` with 200 or 503, `/bytes/N` with N bytes of
//! [`pattern`], `/whoami` with name, peer and local address; `PUT /bytes` takes [`pattern`] and answers 400 when a byte is
//! wrong. Every answer carries `X-Backend: name`.
//! TCP echo greets with `name\n`. UDP echo answers with the datagram, followed by the name.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;

use super::pattern;
use crate::error::{LabError, Result};
use crate::host::Host;

/// Longest request head that is read.
const MAX_HEAD: usize = 8 * 1024;
/// Leading bytes of an echoed datagram that are the client's; the name follows.
pub(crate) const ECHO_HEAD: usize = 8;
/// Longest datagram that is echoed.
pub(crate) const MAX_DATAGRAM: usize = 8000;

/// What to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// HTTP.
    Http(SocketAddr),
    /// TCP echo.
    TcpEcho(SocketAddr),
    /// UDP echo. On one address each, never on a wildcard: the answer must come from the address that was asked.
    UdpEcho(SocketAddr),
}

/// What a server has seen since it was first started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerCounts {
    /// TCP connections accepted.
    pub connections: u64,
    /// TCP connections open now.
    pub open: u64,
    /// HTTP requests answered, without `/healthz`.
    pub requests: u64,
    /// Datagrams answered.
    pub datagrams: u64,
}

/// A server in a host. Stops when dropped.
#[derive(Debug)]
pub struct Server {
    host: Host,
    listens: Vec<Listen>,
    shared: Arc<Shared>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    healthy: AtomicBool,
    connections: AtomicU64,
    open: AtomicU64,
    requests: AtomicU64,
    datagrams: AtomicU64,
}

impl Server {
    /// Starts a server called `name` in `host`; it listens on all of `listens` when this returns.
    ///
    /// # Errors
    /// An address can't be listened on.
    pub fn start(host: &Host, name: &str, listens: &[Listen]) -> Result<Server> {
        let shared = Shared {
            name: name.to_owned(),
            healthy: AtomicBool::new(true),
            connections: AtomicU64::new(0),
            open: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            datagrams: AtomicU64::new(0),
        };
        let mut server =
            Server { host: host.clone(), listens: listens.to_vec(), shared: Arc::new(shared), running: None };
        server.restart()?;
        Ok(server)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Closes every socket at once, as the death of a process would. Returns when they are closed.
    pub fn kill(&mut self) {
        if let Some(running) = self.running.take() {
            let _ = running.stop.send(());
            let _ = running.thread.join();
        }
    }

    /// Starts it again after [`Server::kill`]; nothing happens when it runs.
    ///
    /// # Errors
    /// An address can't be listened on.
    pub fn restart(&mut self) -> Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let listens = self.listens.clone();
        let shared = self.shared.clone();
        let thread = self.host.spawn(&shared.name.clone(), move || {
            super::promptly();
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(e) => {
                    let _ = ready.send(Err(LabError::system("start a server's runtime", e)));
                    return;
                }
            };
            runtime.block_on(async {
                let opened = open_all(&listens, &shared).await;
                let failed = opened.is_err();
                let _ = ready.send(opened);
                if !failed {
                    let _ = stopped.await;
                }
            });
            // Dropping the runtime drops every task with its sockets.
            drop(runtime);
            shared.open.store(0, Ordering::Relaxed);
        });
        is_ready.recv().expect("the server's thread answers before it ends")?;
        self.running = Some(Running { stop, thread });
        Ok(())
    }

    /// What `/healthz` answers from now on: 200 or 503.
    pub fn set_healthy(&self, healthy: bool) {
        self.shared.healthy.store(healthy, Ordering::Relaxed);
    }

    /// What it has seen.
    pub fn counts(&self) -> ServerCounts {
        ServerCounts {
            connections: self.shared.connections.load(Ordering::Relaxed),
            open: self.shared.open.load(Ordering::Relaxed),
            requests: self.shared.requests.load(Ordering::Relaxed),
            datagrams: self.shared.datagrams.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn open_all(listens: &[Listen], shared: &Arc<Shared>) -> Result<()> {
    for &listen in listens {
        let refused = |e| LabError::system(format!("{} listens on {listen:?}", shared.name), e);
        match listen {
            Listen::Http(address) => {
                let listener = TcpListener::bind(address).await.map_err(refused)?;
                tokio::spawn(accept(listener, shared.clone(), serve_http));
            }
            Listen::TcpEcho(address) => {
                let listener = TcpListener::bind(address).await.map_err(refused)?;
                tokio::spawn(accept(listener, shared.clone(), serve_echo));
            }
            Listen::UdpEcho(address) => {
                let socket = UdpSocket::bind(address).await.map_err(refused)?;
                tokio::spawn(serve_udp(socket, shared.clone()));
            }
        }
    }
    Ok(())
}

async fn accept<F>(listener: TcpListener, shared: Arc<Shared>, serve: fn(TcpStream, Arc<Shared>) -> F)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    loop {
        // Out of descriptors is the only lasting error, and it passes.
        let Ok((stream, _)) = listener.accept().await else {
            tokio::task::yield_now().await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        shared.connections.fetch_add(1, Ordering::Relaxed);
        shared.open.fetch_add(1, Ordering::Relaxed);
        let shared = shared.clone();
        tokio::spawn(async move {
            // Whatever ends a connection is the client's affair.
            let _ = serve(stream, shared.clone()).await;
            shared.open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

async fn serve_http(mut stream: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    let mut head = Vec::new();
    loop {
        head.clear();
        let mut byte = [0; 1024];
        let end = loop {
            if let Some(at) = head.windows(4).position(|w| w == b"\r\n\r\n") {
                break at;
            }
            let n = stream.read(&mut byte).await?;
            if n == 0 || head.len() > MAX_HEAD {
                return Ok(());
            }
            head.extend_from_slice(&byte[..n]);
        };
        let text = String::from_utf8_lossy(&head[..end]).into_owned();
        let close = text.to_ascii_lowercase().contains("connection: close");
        let path = text.split(' ').nth(1).unwrap_or("/").to_owned();
        if text.starts_with("PUT ") {
            // Whoever uploads makes a connection for it.
            take_upload(&mut stream, &shared, &text, head.split_off(end + 4)).await?;
            return stream.shutdown().await;
        }
        answer_http(&mut stream, &shared, &path, close).await?;
        if close {
            return stream.shutdown().await;
        }
    }
}

async fn take_upload(stream: &mut TcpStream, shared: &Shared, head: &str, first: Vec<u8>) -> io::Result<()> {
    shared.requests.fetch_add(1, Ordering::Relaxed);
    let announced = head.lines().find_map(|l| l.strip_prefix("Content-Length: ")?.parse::<u64>().ok());
    let mut wrong = pattern::mismatch(0, &first);
    let mut done = first.len() as u64;
    let mut buf = vec![0; 64 * 1024];
    while announced.is_some_and(|length| done < length) {
        let n = stream.read(&mut buf).await?;
        if n == 0 {
            return Ok(());
        }
        wrong = wrong.or_else(|| pattern::mismatch(done, &buf[..n]));
        done += n as u64;
    }
    let (status, body) = match (wrong, announced) {
        (None, Some(length)) if length == done => ("200 OK", format!("{done} bytes\n")),
        (Some(at), _) => ("400 Bad Request", format!("byte {at} is not the one sent\n")),
        (None, _) => ("400 Bad Request", format!("{done} bytes, announced were {announced:?}\n")),
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\nX-Backend: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        shared.name,
        body.len()
    );
    stream.write_all(answer.as_bytes()).await
}

async fn answer_http(stream: &mut TcpStream, shared: &Shared, path: &str, close: bool) -> io::Result<()> {
    let name = &shared.name;
    let mut status = "200 OK";
    let mut body = format!("{name}\n");
    let mut pattern_len = None;
    if path == "/healthz" {
        if !shared.healthy.load(Ordering::Relaxed) {
            status = "503 Service Unavailable";
        }
    } else {
        shared.requests.fetch_add(1, Ordering::Relaxed);
        if path == "/whoami" {
            body = format!("{name} {} {}\n", stream.peer_addr()?, stream.local_addr()?);
        } else if let Some(n) = path.strip_prefix("/bytes/") {
            match n.parse::<u64>() {
                Ok(n) => pattern_len = Some(n),
                Err(_) => status = "400 Bad Request",
            }
        } else if path != "/" {
            status = "404 Not Found";
        }
    }
    let length = pattern_len.unwrap_or(body.len() as u64);
    let connection = if close { "close" } else { "keep-alive" };
    let mut answer = format!(
        "HTTP/1.1 {status}\r\nX-Backend: {name}\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n"
    )
    .into_bytes();
    match pattern_len {
        None => {
            answer.extend_from_slice(body.as_bytes());
            stream.write_all(&answer).await
        }
        Some(total) => {
            stream.write_all(&answer).await?;
            let mut sent = 0;
            while sent < total {
                let chunk = pattern::at(sent, (total - sent).min(256 * 1024));
                stream.write_all(chunk).await?;
                sent += chunk.len() as u64;
                // A client that takes everything at once must not keep a health check waiting on this one thread.
                tokio::task::yield_now().await;
            }
            Ok(())
        }
    }
}

async fn serve_echo(mut stream: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    stream.write_all(format!("{}\n", shared.name).as_bytes()).await?;
    let mut buf = [0; 4096];
    loop {
        let n = stream.read(&mut buf).await?;
        if n == 0 {
            return stream.shutdown().await;
        }
        stream.write_all(&buf[..n]).await?;
    }
}

async fn serve_udp(socket: UdpSocket, shared: Arc<Shared>) {
    let mut buf = vec![0; MAX_DATAGRAM];
    loop {
        // An ICMP error about an earlier answer is no reason to stop.
        let Ok((n, from)) = socket.recv_from(&mut buf).await else { continue };
        let mut answer = buf[..n].to_vec();
        answer.extend_from_slice(shared.name.as_bytes());
        if socket.send_to(&answer, from).await.is_ok() {
            shared.datagrams.fetch_add(1, Ordering::Relaxed);
        }
    }
}
