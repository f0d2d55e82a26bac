//! IPv6 neighbour discovery: neighbour solicitation and advertisement (RFC 4861 §4.3, §4.4) with the checks of §7.1 and
//! the link-layer address options of §4.6.1. Other options are passed over.

use std::fmt;
use std::net::Ipv6Addr;

use super::dissect::{IpInfo, Transport};
use super::ethernet::{self, EtherType, Mac};
use super::icmpv6::{self, kind};
use super::{Malformed, bytes, ipv6, proto};

/// Length of a message before its options.
pub const HEADER_LEN: usize = 24;
/// Length of a link-layer address option for Ethernet.
pub const ADDRESS_OPTION_LEN: usize = 8;
/// The hop limit that shows that no router forwarded it (RFC 4861 §7.1).
pub const HOP_LIMIT: u8 = 255;
/// All nodes on the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Options that are looked at. More than a message needs; a packet of 64 KiB could hold eight thousand.
pub const MAX_OPTIONS: usize = 16;

mod field {
    pub const FLAGS: usize = 4;
    pub const TARGET: usize = 8;
}

const FLAG_ROUTER: u8 = 0x80;
const FLAG_SOLICITED: u8 = 0x40;
const FLAG_OVERRIDE: u8 = 0x20;

const OPTION_SOURCE_ADDRESS: u8 = 1;
const OPTION_TARGET_ADDRESS: u8 = 2;

/// A solicitation or an advertisement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Repr {
    /// Who has `target`?
    Solicitation {
        /// The address asked for.
        target: Ipv6Addr,
        /// Hardware address of the asker; absent in a probe (duplicate address detection).
        source_mac: Option<Mac>,
    },
    /// The sender has `target`.
    Advertisement {
        /// The address.
        target: Ipv6Addr,
        /// The sender is a router for its link.
        router: bool,
        /// It answers a solicitation.
        solicited: bool,
        /// It replaces what a cache holds.
        overrides: bool,
        /// Hardware address of the target.
        target_mac: Option<Mac>,
    },
}

impl Repr {
    /// Reads the neighbour discovery message of `frame`, which [`dissect`](super::dissect()) read as `ip`. `None` when it
    /// is no solicitation or advertisement.
    ///
    /// # Errors
    /// Why it must be ignored by RFC 4861 §7.1.1 or §7.1.2.
    pub fn parse(frame: &[u8], ip: &IpInfo) -> Result<Option<Repr>, Malformed> {
        let (Transport::Icmpv6 { kind, .. }, Some((src, dst))) = (ip.transport, ip.v6()) else {
            return Ok(None);
        };
        if kind != kind::NEIGHBOUR_SOLICITATION && kind != kind::NEIGHBOUR_ADVERTISEMENT {
            return Ok(None);
        }
        // RFC 6980 §5: never fragmented.
        if ip.fragment.id().is_some() {
            return Err(Malformed::BadFragment);
        }
        Repr::parse_message(bytes::range(frame, ip.l4, ip.end), src, dst, ip.ttl).map(Some)
    }

    /// Reads `message`, an ICMPv6 message from its type to its end.
    ///
    /// # Errors
    /// Why it must be ignored by RFC 4861 §7.1.1 or §7.1.2; `BadField` also for other types.
    pub fn parse_message(
        message: &[u8],
        src: Ipv6Addr,
        dst: Ipv6Addr,
        hop_limit: u8,
    ) -> Result<Repr, Malformed> {
        if message.len() < HEADER_LEN {
            return Err(Malformed::Truncated);
        }
        if hop_limit != HOP_LIMIT || bytes::u8(message, 1) != 0 {
            return Err(Malformed::BadField);
        }
        if icmpv6::sum(message, src, dst) != 0 {
            return Err(Malformed::BadChecksum);
        }
        let target = Ipv6Addr::from(bytes::array::<16>(message, field::TARGET));
        if target.is_multicast() {
            return Err(Malformed::BadField);
        }
        match bytes::u8(message, 0) {
            kind::NEIGHBOUR_SOLICITATION => {
                let source_mac = address_option(message, OPTION_SOURCE_ADDRESS)?;
                let probe = src.is_unspecified();
                if probe && (source_mac.is_some() || !is_solicited_node(dst)) {
                    return Err(Malformed::BadField);
                }
                Ok(Repr::Solicitation { target, source_mac })
            }
            kind::NEIGHBOUR_ADVERTISEMENT => {
                let flags = bytes::u8(message, field::FLAGS);
                if dst.is_multicast() && flags & FLAG_SOLICITED != 0 {
                    return Err(Malformed::BadField);
                }
                Ok(Repr::Advertisement {
                    target,
                    router: flags & FLAG_ROUTER != 0,
                    solicited: flags & FLAG_SOLICITED != 0,
                    overrides: flags & FLAG_OVERRIDE != 0,
                    target_mac: address_option(message, OPTION_TARGET_ADDRESS)?,
                })
            }
            _ => Err(Malformed::BadField),
        }
    }

    /// The answer to a solicitation from `src`, on behalf of its target, which `mac` answers for, and where it goes:
    /// back to the asker, or to all nodes when that is a probe (RFC 4861 §7.2.4). None to an advertisement.
    pub fn answer(&self, src: Ipv6Addr, mac: Mac, router: bool) -> Option<(Repr, Ipv6Addr)> {
        let Repr::Solicitation { target, .. } = *self else { return None };
        let probe = src.is_unspecified();
        let answer =
            Repr::Advertisement { target, router, solicited: !probe, overrides: true, target_mac: Some(mac) };
        Some((answer, if probe { ALL_NODES } else { src }))
    }

    /// An unsolicited advertisement with override, to all nodes (RFC 4861 §7.2.6).
    pub fn announcement(target: Ipv6Addr, mac: Mac, router: bool) -> Repr {
        Repr::Advertisement { target, router, solicited: false, overrides: true, target_mac: Some(mac) }
    }

    /// Length of the ICMPv6 message in bytes.
    pub fn buffer_len(&self) -> usize {
        HEADER_LEN + if self.option().is_some() { ADDRESS_OPTION_LEN } else { 0 }
    }

    /// Writes the ICMPv6 message at the start of `buffer`, which must hold [`buffer_len`](Self::buffer_len) bytes.
    pub fn emit(&self, buffer: &mut [u8], src: Ipv6Addr, dst: Ipv6Addr) {
        let buffer = bytes::range_mut(buffer, 0, self.buffer_len());
        let (kind, flags, target) = match *self {
            Repr::Solicitation { target, .. } => (kind::NEIGHBOUR_SOLICITATION, 0, target),
            Repr::Advertisement { target, router, solicited, overrides, .. } => {
                let flag = |set: bool, bit: u8| if set { bit } else { 0 };
                let flags = flag(router, FLAG_ROUTER)
                    | flag(solicited, FLAG_SOLICITED)
                    | flag(overrides, FLAG_OVERRIDE);
                (kind::NEIGHBOUR_ADVERTISEMENT, flags, target)
            }
        };
        bytes::put(buffer, 0, [kind, 0, 0, 0, flags, 0, 0, 0]);
        bytes::put(buffer, field::TARGET, target.octets());
        if let Some((option, mac)) = self.option() {
            bytes::put(buffer, HEADER_LEN, [option, 1]);
            bytes::put(buffer, HEADER_LEN + 2, mac);
        }
        let sum = icmpv6::sum(buffer, src, dst);
        bytes::put_u16(buffer, icmpv6::CHECKSUM_AT, sum);
    }

    /// The untagged frame with this message from `src` to `dst`.
    pub fn frame(&self, dst_mac: Mac, src_mac: Mac, src: Ipv6Addr, dst: Ipv6Addr) -> Vec<u8> {
        const L3: usize = ethernet::HEADER_LEN;
        const L4: usize = L3 + ipv6::HEADER_LEN;
        let mut frame = vec![0; L4 + self.buffer_len()];
        ethernet::emit(&mut frame, dst_mac, src_mac, EtherType::IPV6);
        let ip = ipv6::Repr {
            src,
            dst,
            next_header: proto::ICMPV6,
            hop_limit: HOP_LIMIT,
            traffic_class: 0,
            payload_len: self.buffer_len(),
        };
        ip.emit(bytes::range_mut(&mut frame, L3, usize::MAX));
        self.emit(bytes::range_mut(&mut frame, L4, usize::MAX), src, dst);
        frame
    }

    fn option(&self) -> Option<(u8, Mac)> {
        match *self {
            Repr::Solicitation { source_mac, .. } => source_mac.map(|mac| (OPTION_SOURCE_ADDRESS, mac)),
            Repr::Advertisement { target_mac, .. } => target_mac.map(|mac| (OPTION_TARGET_ADDRESS, mac)),
        }
    }
}

/// The multicast group that a solicitation for `target` goes to (RFC 4291 §2.7.1).
pub fn solicited_node(target: Ipv6Addr) -> Ipv6Addr {
    const PREFIX: u128 = 0xff02_0000_0000_0000_0000_0001_ff00_0000;
    Ipv6Addr::from_bits(PREFIX | target.to_bits() & 0x00ff_ffff)
}

fn is_solicited_node(address: Ipv6Addr) -> bool {
    solicited_node(address) == address
}

/// Where a packet for a multicast address goes on the link (RFC 2464 §7).
pub fn multicast_mac(address: Ipv6Addr) -> Mac {
    ethernet::multicast_mac_v6(address)
}

/// The link-layer address in the first option of kind `wanted`. An option of length 0 spoils the message (RFC 4861
/// §4.6), one of another length than Ethernet's is passed over.
fn address_option(message: &[u8], wanted: u8) -> Result<Option<Mac>, Malformed> {
    let mut options = bytes::range(message, HEADER_LEN, usize::MAX);
    let mut found = None;
    for _ in 0..MAX_OPTIONS {
        let [kind, units, ..] = *options else { break };
        let len = usize::from(units) * 8;
        if len == 0 {
            return Err(Malformed::BadHeaderLength);
        }
        let Some(rest) = options.get(len..) else { return Err(Malformed::Truncated) };
        if kind == wanted && len == ADDRESS_OPTION_LEN && found.is_none() {
            found = Some(bytes::array::<6>(options, 2));
        }
        options = rest;
    }
    Ok(found)
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Repr::Solicitation { target, .. } => write!(f, "NDP who-has {target}"),
            Repr::Advertisement { target, router, solicited, overrides, target_mac } => {
                write!(f, "NDP {target}")?;
                if let Some(mac) = target_mac {
                    write!(f, " is-at {}", ethernet::show(mac))?;
                }
                let mut separator = " [";
                for (set, word) in [(router, "router"), (solicited, "solicited"), (overrides, "override")] {
                    if set {
                        write!(f, "{separator}{word}")?;
                        separator = ", ";
                    }
                }
                f.write_str(if separator == ", " { "]" } else { "" })
            }
        }
    }
}
