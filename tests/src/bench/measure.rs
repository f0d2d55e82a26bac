//! Sender and receiver. What counts is what arrives: every rate is taken at the receiver.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use komainu_lab::Lab;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::sendfile::sendfile64;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::paths::Path;

/// Bytes given to one call that sends or reads: what a file server uses.
const CHUNK: usize = 256 * 1024;
/// Payload of a datagram: with its headers the smallest Ethernet frame.
const DATAGRAM: usize = 18;
/// Receive buffer for datagrams: tens of thousands of them.
const RECEIVE_BUFFER: usize = 64 << 20;
/// Clients that connect at the same time.
const CONNECTORS: usize = 8;
/// Threads that accept.
const ACCEPTORS: usize = 2;
/// How long a single step may take before the path counts as broken.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// One TCP connection, bulk, from client to server.
    TcpBulk,
    /// The same from server to client.
    TcpBulkBack,
    /// One UDP flow of smallest frames, as fast as the client can.
    UdpPackets,
    /// New TCP connections, each with a byte there and back.
    TcpConnections,
}

impl Metric {
    /// All, in the order of the report.
    pub const ALL: [Metric; 4] =
        [Metric::TcpBulk, Metric::TcpBulkBack, Metric::UdpPackets, Metric::TcpConnections];

    /// Name in the results.
    pub fn name(self) -> &'static str {
        match self {
            Metric::TcpBulk => "tcp_bulk",
            Metric::TcpBulkBack => "tcp_bulk_back",
            Metric::UdpPackets => "udp_packets",
            Metric::TcpConnections => "tcp_connections",
        }
    }

    /// Unit of its values.
    pub fn unit(self) -> &'static str {
        match self {
            Metric::TcpBulk | Metric::TcpBulkBack => "Gbit/s",
            Metric::UdpPackets => "packets/s",
            Metric::TcpConnections => "connections/s",
        }
    }

    /// Rounds of it in a run of so many: one connection at a time leaves more to chance than what has many flows.
    pub fn rounds(self, runs: usize) -> usize {
        match self {
            Metric::TcpBulk | Metric::TcpBulkBack => 2 * runs + 1,
            Metric::UdpPackets | Metric::TcpConnections => runs,
        }
    }

    /// Whether `path` carries it.
    pub fn is_carried_by(self, path: &Path) -> bool {
        self != Metric::UdpPackets || !path.tcp_only
    }

    /// Measures once, for `time`.
    ///
    /// # Errors
    /// The path carries nothing, or not everything.
    pub fn measure(self, lab: &Lab, path: &Path, time: Duration) -> Result<f64> {
        match self {
            Metric::TcpBulk => tcp_bulk(lab, path, time, false),
            Metric::TcpBulkBack => tcp_bulk(lab, path, time, true),
            Metric::UdpPackets => udp_packets(lab, path, time),
            Metric::TcpConnections => tcp_connections(lab, path, time),
        }
        .with_context(|| format!("{} through {}", self.name(), path.name))
    }
}

/// `back`: the server sends.
fn tcp_bulk(lab: &Lab, path: &Path, time: Duration, back: bool) -> Result<f64> {
    let listener = lab.host(path.server).run(|| TcpListener::bind(path.listen))?;
    let at_client = lab.host("client").run(|| connect(path.from, path.to))?;
    let (at_server, _) = listener.accept()?;
    let ((sender, from), (mut receiver, to)) = if back {
        ((at_server, path.server), (at_client, "client"))
    } else {
        ((at_client, "client"), (at_server, path.server))
    };
    receiver.set_read_timeout(Some(PATIENCE))?;
    let sink = lab.host(to).spawn("sink", move || -> Result<(u64, Duration)> {
        let mut buffer = vec![0; CHUNK];
        let (mut bytes, mut first, mut last) = (0u64, None, Instant::now());
        loop {
            let n = receiver.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            // The first read starts the clock and is not counted: it waited for the connection.
            match first {
                None => first = Some(Instant::now()),
                Some(_) => bytes += n as u64,
            }
            last = Instant::now();
        }
        Ok((bytes, last - first.context("nothing arrived")?))
    });
    let sent = lab.host(from).run(move || -> Result<()> {
        sender.set_write_timeout(Some(PATIENCE))?;
        // As file servers send: what is measured is to be the way and not the sender's copying.
        let mut file = File::from(memfd_create("bulk", MFdFlags::empty())?);
        file.write_all(&[0x5a; CHUNK])?;
        let end = Instant::now() + time;
        while Instant::now() < end {
            let mut at = 0;
            while at < CHUNK as i64 {
                let rest = CHUNK - at as usize;
                sendfile64(&sender, &file, Some(&mut at), rest)?;
            }
        }
        sender.shutdown(Shutdown::Write)?;
        Ok(())
    });
    let received = sink.join().expect("the receiver does not panic");
    sent?;
    let (bytes, took) = received?;
    Ok(bytes as f64 * 8.0 / took.as_secs_f64() / 1e9)
}

fn udp_packets(lab: &Lab, path: &Path, time: Duration) -> Result<f64> {
    let receiver = lab.host(path.server).run(|| UdpSocket::bind(path.listen))?;
    receiver.set_read_timeout(Some(Duration::from_millis(200)))?;
    // The receiver shares processors with everything else: what arrives while it waits for one must not be lost to it.
    setsockopt(&receiver, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    let sender = lab.host("client").run(|| -> std::io::Result<UdpSocket> {
        let s = UdpSocket::bind((path.from, 0))?;
        s.connect(path.to)?;
        Ok(s)
    })?;
    // One datagram first, so that neighbours are resolved and the flow is known.
    let mut buffer = [0; 64];
    let warm = Instant::now();
    while {
        sender.send(&[0; DATAGRAM])?;
        receiver.recv(&mut buffer).is_err()
    } {
        if warm.elapsed() > PATIENCE {
            bail!("no datagram arrives");
        }
    }
    let counter = lab.host(path.server).spawn("sink", move || -> (u64, Duration) {
        let mut buffer = [0; 64];
        let (mut packets, start) = (0u64, Instant::now());
        let mut last = start;
        while receiver.recv(&mut buffer).is_ok() {
            packets += 1;
            last = Instant::now();
        }
        (packets, last - start)
    });
    lab.host("client").run(|| {
        let end = Instant::now() + time;
        while Instant::now() < end {
            for _ in 0..32 {
                // A full queue is the sender's business, not the path's.
                let _ = sender.send(&[0; DATAGRAM]);
            }
        }
    });
    let (packets, took) = counter.join().expect("the receiver does not panic");
    if packets == 0 {
        bail!("no datagram arrives");
    }
    Ok(packets as f64 / took.as_secs_f64())
}

fn tcp_connections(lab: &Lab, path: &Path, time: Duration) -> Result<f64> {
    let listener = Arc::new(lab.host(path.server).run(|| listen(path.listen))?);
    let stop = Arc::new(AtomicBool::new(false));
    let acceptors: Vec<_> = (0..ACCEPTORS)
        .map(|_| {
            let (listener, stop) = (Arc::clone(&listener), Arc::clone(&stop));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((stream, _)) => answer(stream),
                        Err(e) if e.kind() == ErrorKind::WouldBlock => {
                            thread::sleep(Duration::from_micros(200))
                        }
                        Err(_) => {}
                    }
                }
            })
        })
        .collect();
    let done = Arc::new(AtomicU64::new(0));
    let failed = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let end = start + time;
    let connectors: Vec<_> = (0..CONNECTORS)
        .map(|_| {
            let (from, to) = (path.from, path.to);
            let (done, failed) = (Arc::clone(&done), Arc::clone(&failed));
            lab.host("client").spawn("connect", move || {
                while Instant::now() < end {
                    let n = if exchange(from, to).is_ok() { &done } else { &failed };
                    n.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for thread in connectors {
        thread.join().expect("a connector does not panic");
    }
    let took = start.elapsed();
    stop.store(true, Ordering::Relaxed);
    for thread in acceptors {
        thread.join().expect("an acceptor does not panic");
    }
    let (done, failed) = (done.load(Ordering::Relaxed), failed.load(Ordering::Relaxed));
    if done == 0 || failed > done / 100 {
        bail!("{failed} connections failed and {done} did not");
    }
    Ok(done as f64 / took.as_secs_f64())
}

fn socket(at: SocketAddr) -> std::io::Result<Socket> {
    Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))
}

fn listen(at: SocketAddr) -> std::io::Result<TcpListener> {
    let s = socket(at)?;
    s.set_reuse_address(true)?;
    s.bind(&at.into())?;
    s.listen(1024)?;
    s.set_nonblocking(true)?;
    Ok(s.into())
}

fn connect(from: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let s = socket(to)?;
    s.bind(&SocketAddr::new(from, 0).into())?;
    s.connect_timeout(&to.into(), PATIENCE)?;
    Ok(s.into())
}

/// A byte there and back; ended by a reset, so that the port is free again at once.
fn exchange(from: IpAddr, to: SocketAddr) -> std::io::Result<()> {
    let s = socket(to)?;
    bind_late(&s, from)?;
    s.connect_timeout(&to.into(), PATIENCE)?;
    s.set_linger(Some(Duration::ZERO))?;
    s.set_tcp_nodelay(true)?;
    let mut stream = TcpStream::from(s);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])
}

fn answer(mut stream: TcpStream) {
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let mut byte = [0];
    if stream.read_exact(&mut byte).is_ok() {
        let _ = stream.write_all(&byte);
    }
}

/// Binds to an address without choosing a port yet, so that the port only has to be free for this destination.
fn bind_late(s: &Socket, from: IpAddr) -> std::io::Result<()> {
    setsockopt(s, sockopt::IpBindAddressNoPort, &true)?;
    s.bind(&SocketAddr::new(from, 0).into())
}
