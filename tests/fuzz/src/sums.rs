//! Whether the checksums of a frame are right: recomputed whole, by none of the code that updates them.

use std::net::IpAddr;

use komainu_packet::engine::Offload;
use komainu_packet::wire::dissect::{Fragment, IpInfo, Net, Transport, dissect};

/// Whether the L4 checksum of `frame` is right: complete, or partial where `offload` says so. None when it can't be told: not IP, a fragment,
/// another protocol, UDP without a checksum over IPv4, offload metadata that points elsewhere.
pub fn right(frame: &[u8], offload: &Offload) -> Option<bool> {
    let Net::Ip(ip) = dissect(frame).ok()?.net else { return None };
    if ip.fragment != Fragment::Whole {
        return None;
    }
    let field_at = ip.checksum_at()?;
    let field = u16::from_be_bytes([frame[field_at], frame[field_at + 1]]);
    if offload.needs_csum {
        let start = usize::from(offload.csum_start);
        if start != ip.l4 || start + usize::from(offload.csum_offset) != field_at {
            return None;
        }
        return Some(fold(pseudo(&ip)) == field);
    }
    if matches!(ip.transport, Transport::Udp { .. }) {
        let len = usize::from(u16::from_be_bytes([frame[ip.l4 + 4], frame[ip.l4 + 5]]));
        // A datagram shorter than its packet is legal and has its own length in the pseudo-header; nobody sends that.
        if len != ip.l4_len() || (field == 0 && !ip.is_v6()) {
            return None;
        }
        if field == 0 {
            return Some(false);
        }
    }
    let mut sum = if matches!(ip.transport, Transport::Icmp { .. }) { 0 } else { pseudo(&ip) };
    sum += words(&frame[ip.l4..ip.end]);
    Some(fold(sum) == 0xffff)
}

fn pseudo(ip: &IpInfo) -> u64 {
    let address = |a: IpAddr| match a {
        IpAddr::V4(a) => words(&a.octets()),
        IpAddr::V6(a) => words(&a.octets()),
    };
    address(ip.src) + address(ip.dst) + u64::from(ip.proto) + ip.l4_len() as u64
}

fn words(data: &[u8]) -> u64 {
    data.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
