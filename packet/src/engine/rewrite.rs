//! Rewrites addresses, ports and TTL in place, the checksums with them (RFC 1624).

use std::net::IpAddr;

use crate::checksum::{Delta, L4Sum};
use crate::wire::{Fragment, IpInfo, bytes, ipv4, proto};

use super::frame::Offload;

/// Offset of the source address in an IP header; the destination follows.
fn addresses_at(v6: bool) -> (usize, usize) {
    if v6 { (8, 24) } else { (12, 16) }
}

/// An address and, where the L4 header is there, a port.
pub(crate) type End = (IpAddr, u16);

/// What becomes of a packet's ends. `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ends {
    pub(crate) src: Option<End>,
    pub(crate) dst: Option<End>,
}

/// Writes `address` at `at` and says what that does to a sum.
#[inline]
pub(crate) fn put_address(data: &mut [u8], at: usize, address: IpAddr) -> Delta {
    match address {
        IpAddr::V4(new) => {
            let old = bytes::u32(data, at);
            bytes::put_u32(data, at, new.to_bits());
            Delta::u32(old, new.to_bits())
        }
        IpAddr::V6(new) => {
            let old = u128::from_be_bytes(bytes::array(data, at));
            bytes::put(data, at, new.octets());
            Delta::u128(old, new.to_bits())
        }
    }
}

/// Writes a 16-bit field at `at` and says what that does to a sum.
#[inline]
pub(crate) fn put_u16(data: &mut [u8], at: usize, new: u16) -> Delta {
    let old = bytes::u16(data, at);
    bytes::put_u16(data, at, new);
    Delta::u16(old, new)
}

/// Writes addresses into the IP header at `l3`, and its header checksum (IPv4) with them. Returns what that does to the
/// pseudo-header.
#[inline]
pub(crate) fn put_addresses(
    data: &mut [u8],
    l3: usize,
    v6: bool,
    src: Option<IpAddr>,
    dst: Option<IpAddr>,
) -> Delta {
    let (src_at, dst_at) = addresses_at(v6);
    let mut delta = Delta::NONE;
    if let Some(src) = src {
        delta = delta.and(put_address(data, l3 + src_at, src));
    }
    if let Some(dst) = dst {
        delta = delta.and(put_address(data, l3 + dst_at, dst));
    }
    if !v6 {
        let at = l3 + ipv4::CHECKSUM_AT;
        let sum = delta.apply(bytes::u16(data, at));
        bytes::put_u16(data, at, sum);
    }
    delta
}

/// One hop less. The caller has seen that there is one.
#[inline]
pub(crate) fn decrement_ttl(data: &mut [u8], ip: &IpInfo) {
    set_ttl(data, ip, ip.ttl.saturating_sub(1));
}

/// Writes TTL or hop limit, the header checksum (IPv4) with it.
#[inline]
pub(crate) fn set_ttl(data: &mut [u8], ip: &IpInfo, ttl: u8) {
    if ip.is_v6() {
        bytes::put_u8(data, ip.l3 + 7, ttl);
        return;
    }
    let old = bytes::u16(data, ip.l3 + 8);
    bytes::put_u8(data, ip.l3 + 8, ttl);
    let at = ip.l3 + ipv4::CHECKSUM_AT;
    let sum = Delta::u16(old, bytes::u16(data, ip.l3 + 8)).apply(bytes::u16(data, at));
    bytes::put_u16(data, at, sum);
}

/// Gives a TCP or UDP packet its new ends; of a later fragment, which has no L4 header, only the addresses.
#[inline]
pub(crate) fn rewrite(data: &mut [u8], ip: &IpInfo, offload: &Offload, ends: Ends) {
    let pseudo = put_addresses(data, ip.l3, ip.is_v6(), ends.src.map(|e| e.0), ends.dst.map(|e| e.0));
    if matches!(ip.fragment, Fragment::Later { .. }) {
        return;
    }
    let mut body = Delta::NONE;
    if let Some((_, port)) = ends.src {
        body = body.and(put_u16(data, ip.l4, port));
    }
    if let Some((_, port)) = ends.dst {
        body = body.and(put_u16(data, ip.l4 + 2, port));
    }
    let Some(at) = ip.checksum_at() else { return };
    let kind = if offload.needs_csum { L4Sum::Partial } else { L4Sum::Complete };
    let field = bytes::u16(data, at);
    let sum = match ip.proto {
        proto::UDP => kind.update_udp(field, pseudo, body),
        _ => kind.update(field, pseudo, body),
    };
    bytes::put_u16(data, at, sum);
}
