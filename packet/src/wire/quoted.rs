//! The packet that an ICMP error quotes: as much of it as the error carries, read leniently.
//!
//! Quoted packets are cut short, their total length still that of the original, and middleboxes may have spoiled their
//! checksums: so neither is checked. What must be there is what tells the flow: addresses, protocol, ports.

use std::net::IpAddr;

use super::dissect::{Fragment, IpInfo, Transport};
use super::{Malformed, bytes, icmpv4, icmpv6, ipv4, ipv6, proto, tcp, udp};

/// A quoted packet. Offsets are from the start of the frame that quotes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// L4 protocol.
    pub proto: u8,
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of the L4 header.
    pub l4: usize,
    /// Offset of the end of what is quoted.
    pub end: usize,
    /// Source and destination port of TCP and UDP; for an ICMP echo its identifier, twice. None for other protocols.
    pub ports: Option<(u16, u16)>,
    /// Offset of the L4 checksum field, when it is quoted. It is right for the original packet, not for the quoted
    /// part.
    pub checksum_at: Option<usize>,
}

impl Quoted {
    /// Whether it is an IPv6 packet.
    pub fn is_v6(&self) -> bool {
        self.dst.is_ipv6()
    }

    /// Reads the packet that the ICMP error in `frame`, which [`dissect`](super::dissect()) read as `ip`, quotes. `None`
    /// when `ip` is no ICMP error, or a fragment (nobody sends errors in fragments).
    ///
    /// # Errors
    /// The quoted packet is too short to tell its flow, or of another version, or a later fragment (`BadFragment`).
    pub fn parse(frame: &[u8], ip: &IpInfo) -> Result<Option<Quoted>, Malformed> {
        if ip.fragment != Fragment::Whole {
            return Ok(None);
        }
        match ip.transport {
            Transport::Icmp { kind, .. } if icmpv4::is_error(kind) => {
                quoted_v4(frame, ip.l4 + icmpv4::HEADER_LEN, ip.end).map(Some)
            }
            Transport::Icmpv6 { kind, .. } if icmpv6::is_error(kind) => {
                quoted_v6(frame, ip.l4 + icmpv6::HEADER_LEN, ip.end).map(Some)
            }
            _ => Ok(None),
        }
    }
}

fn quoted_v4(frame: &[u8], l3: usize, end: usize) -> Result<Quoted, Malformed> {
    let packet = ipv4::Packet::new_header(bytes::range(frame, l3, end))?;
    if packet.fragment_offset() != 0 {
        return Err(Malformed::BadFragment);
    }
    let (src, dst) = (IpAddr::V4(packet.src()), IpAddr::V4(packet.dst()));
    // Some stacks quote with padding behind a short packet.
    let total = usize::from(packet.total_len()).max(packet.header_len());
    quoted(frame, src, dst, packet.protocol(), l3, l3 + packet.header_len(), end.min(l3 + total))
}

fn quoted_v6(frame: &[u8], l3: usize, end: usize) -> Result<Quoted, Malformed> {
    let packet = ipv6::Packet::new_header(bytes::range(frame, l3, end))?;
    let walk = ipv6::walk(packet.next_header(), packet.payload())?;
    if walk.fragment.is_some_and(|f| f.offset != 0) {
        return Err(Malformed::BadFragment);
    }
    let (src, dst) = (IpAddr::V6(packet.src()), IpAddr::V6(packet.dst()));
    let total = ipv6::HEADER_LEN + usize::from(packet.payload_len());
    quoted(frame, src, dst, walk.proto, l3, l3 + ipv6::HEADER_LEN + walk.offset, end.min(l3 + total))
}

fn quoted(
    frame: &[u8],
    src: IpAddr,
    dst: IpAddr,
    proto: u8,
    l3: usize,
    l4: usize,
    end: usize,
) -> Result<Quoted, Malformed> {
    let data = bytes::range(frame, l4, end);
    let ports = match proto {
        proto::TCP | proto::UDP if data.len() >= 4 => Some((bytes::u16(data, 0), bytes::u16(data, 2))),
        proto::TCP | proto::UDP => return Err(Malformed::Truncated),
        proto::ICMP | proto::ICMPV6 if data.len() >= 8 && is_echo(proto, bytes::u8(data, 0)) => {
            Some((bytes::u16(data, 4), bytes::u16(data, 4)))
        }
        _ => None,
    };
    let checksum = match proto {
        proto::TCP => Some(tcp::CHECKSUM_AT),
        proto::UDP => Some(udp::CHECKSUM_AT),
        proto::ICMP => Some(icmpv4::CHECKSUM_AT),
        proto::ICMPV6 => Some(icmpv6::CHECKSUM_AT),
        _ => None,
    };
    let checksum_at = checksum.filter(|at| data.len() >= at + 2).map(|at| l4 + at);
    Ok(Quoted { src, dst, proto, l3, l4, end, ports, checksum_at })
}

fn is_echo(proto: u8, kind: u8) -> bool {
    match proto {
        proto::ICMP => matches!(kind, icmpv4::kind::ECHO_REQUEST | icmpv4::kind::ECHO_REPLY),
        _ => matches!(kind, icmpv6::kind::ECHO_REQUEST | icmpv6::kind::ECHO_REPLY),
    }
}
