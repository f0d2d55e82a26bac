//! ICMP echo (RFC 792) and ICMPv6 echo (RFC 4443 §4).
//!
//! An unprivileged ping socket where `net.ipv4.ping_group_range` allows it, else a raw one, for which a balancer has the
//! capability anyway. A raw socket sees everybody's echo replies, so a reply must match address, identifier, sequence
//! number and a random payload. On a ping socket the kernel chooses and matches the identifier.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::UdpSocket;
use tokio::time::Instant;

use super::{Took, io_words};

const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
const HEADER_LEN: usize = 8;
/// Random bytes that the reply must bring back.
const TOKEN_LEN: usize = 16;
/// Longest packet that is looked at: IPv4 header with options, ICMP header, token. A longer one isn't ours.
const MAX_REPLY: usize = 60 + HEADER_LEN + TOKEN_LEN;

struct Echo {
    id: u16,
    seq: u16,
    token: [u8; TOKEN_LEN],
}

pub(super) async fn probe(address: IpAddr) -> Result<String, String> {
    let started = Instant::now();
    let echo = Echo { id: rand::random(), seq: rand::random(), token: rand::random() };
    exchange(address, &echo).await.map_err(|e| io_words(&e))?;
    Ok(format!("echo reply in {}", Took::since(started)))
}

async fn exchange(address: IpAddr, echo: &Echo) -> io::Result<()> {
    let (socket, raw) = open(address)?;
    socket.connect(&SockAddr::from(SocketAddr::new(address, 0)))?;
    // To the runtime a datagram socket is a datagram socket: `send`, `recv` and readiness are the same for UDP and ICMP.
    let socket = UdpSocket::from_std(socket.into())?;
    socket.send(&echo.request(address.is_ipv6())).await?;
    loop {
        let mut buffer = [0; MAX_REPLY];
        let len = socket.recv(&mut buffer).await?;
        if echo.answered_by(&buffer[..len], address.is_ipv6(), raw) {
            return Ok(());
        }
    }
}

/// A non-blocking socket, and whether it is a raw one.
fn open(address: IpAddr) -> io::Result<(Socket, bool)> {
    let (domain, protocol) = match address {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let (socket, raw) = match Socket::new(domain, Type::DGRAM, Some(protocol)) {
        Ok(socket) => (socket, false),
        Err(_) => match Socket::new(domain, Type::RAW, Some(protocol)) {
            Ok(socket) => (socket, true),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                return Err(io::Error::new(
                    e.kind(),
                    "this node may not send ICMP: give it CAP_NET_RAW or widen net.ipv4.ping_group_range",
                ));
            }
            Err(e) => return Err(e),
        },
    };
    socket.set_nonblocking(true)?;
    Ok((socket, raw))
}

impl Echo {
    fn request(&self, v6: bool) -> Vec<u8> {
        let mut packet = vec![if v6 { ECHO_REQUEST_V6 } else { ECHO_REQUEST_V4 }, 0, 0, 0];
        packet.extend(self.id.to_be_bytes());
        packet.extend(self.seq.to_be_bytes());
        packet.extend(self.token);
        if !v6 {
            // For ICMPv6 the kernel fills it in, which knows the source address of the pseudo-header (RFC 3542 §3.1).
            let sum = checksum(&packet);
            packet[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        packet
    }

    fn answered_by(&self, packet: &[u8], v6: bool, raw: bool) -> bool {
        let icmp = if raw && !v6 { without_ip_header(packet) } else { Some(packet) };
        let Some((header, payload)) = icmp.and_then(|p| p.split_first_chunk::<HEADER_LEN>()) else {
            return false;
        };
        header[0] == if v6 { ECHO_REPLY_V6 } else { ECHO_REPLY_V4 }
            && (!raw || header[4..6] == self.id.to_be_bytes())
            && header[6..8] == self.seq.to_be_bytes()
            && payload == self.token
    }
}

/// A raw IPv4 socket delivers the IP header too (raw(7)).
fn without_ip_header(packet: &[u8]) -> Option<&[u8]> {
    let header_len = usize::from(packet.first()? & 0x0f) * 4;
    packet.get(header_len..)
}

/// RFC 1071, over an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks_exact(2).map(|b| u32::from(u16::from_be_bytes([b[0], b[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ECHO: Echo = Echo { id: 0x0102, seq: 0x0304, token: [0xaa; TOKEN_LEN] };

    #[test]
    fn the_request_sums_to_zero() {
        let request = ECHO.request(false);
        assert_eq!(&request[..2], &[8, 0]);
        assert_eq!(checksum(&request), 0);
        assert_eq!(ECHO.request(true)[0], 128);
    }

    #[test]
    fn only_our_own_reply_counts() {
        let mut reply = ECHO.request(false);
        assert!(!ECHO.answered_by(&reply, false, false), "our own request, seen on loopback");
        reply[0] = ECHO_REPLY_V4;
        assert!(ECHO.answered_by(&reply, false, false));
        let with_header = [&[0x45u8; 20][..], &reply].concat();
        assert!(ECHO.answered_by(&with_header, false, true));
        for (at, what) in [(4, "identifier"), (7, "sequence number"), (8, "payload")] {
            let mut other = with_header.clone();
            other[20 + at] ^= 1;
            assert!(!ECHO.answered_by(&other, false, true), "{what}");
        }
        for len in 0..with_header.len() {
            assert!(!ECHO.answered_by(&with_header[..len], false, true));
        }
    }
}
