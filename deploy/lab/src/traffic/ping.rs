//! ICMP echo.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// Sends one echo request with `size` bytes of data (0..=65000) from the calling thread's namespace and waits for its
/// reply. How long it took.
///
/// # Errors
/// No reply in time, a reply with other data, or no permission for a raw socket.
pub fn ping(target: IpAddr, number: u16, size: usize, timeout: Duration) -> io::Result<Duration> {
    let (domain, protocol, request, reply) = match target {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, ECHO_REQUEST_V4, ECHO_REPLY_V4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, ECHO_REQUEST_V6, ECHO_REPLY_V6),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    let to: SocketAddr = (target, 0).into();
    socket.connect(&to.into())?;
    let mut message = vec![request, 0, 0, 0, 0x6b, 0x6d];
    message.extend_from_slice(&number.to_be_bytes());
    message.extend((0..size).map(|i| i as u8));
    if target.is_ipv4() {
        // RFC 792: over the message alone. For IPv6 the kernel does it (RFC 3542 §3.1).
        let checksum = checksum(&message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
    }
    let start = Instant::now();
    socket.send(&message)?;
    let mut buf = vec![0; 66_000];
    loop {
        let left = timeout.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no echo reply"));
        }
        socket.set_read_timeout(Some(left))?;
        let n = io::Read::read(&mut &socket, &mut buf)?;
        // An IPv4 raw socket hands over the IP header too (raw(7)).
        let skip = if target.is_ipv4() { usize::from(buf[0] & 0x0f) * 4 } else { 0 };
        let Some(answer) = buf[..n].get(skip..) else { continue };
        if answer.len() < 8 || answer[0] != reply || answer[4..8] != message[4..8] {
            continue;
        }
        if answer[8..] != message[8..] {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the reply holds other data than the request",
            ));
        }
        return Ok(start.elapsed());
    }
}

fn checksum(data: &[u8]) -> u16 {
    let mut sum: u32 = data
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w.get(1).copied().unwrap_or_default()])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
