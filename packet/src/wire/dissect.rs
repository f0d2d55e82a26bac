//! One pass over a frame: every offset and field that the hot path decides by, or the named reason why the frame can't
//! be used.
//!
//! ```text
//! frame ─ Ethernet ─ ≤ 2 VLAN tags ─┬─ ARP ──────────────────────────────────────────→ Net::Arp
//!                                   ├─ IPv4 ─ options ─────────┐
//!                                   ├─ IPv6 ─ ≤ 8 extensions ──┼─ later fragment ─────→ Transport::None
//!                                   │                          ├─ TCP, UDP, ICMP, ICMPv6
//!                                   │                          └─ anything else ──────→ Transport::Other
//!                                   └─ anything else ────────────────────────────────→ Net::Other
//! ```
//!
//! Checked: that each header lies within the IP packet and the IP packet within the frame, versions, lengths, the IPv4
//! header checksum (RFC 1812 §5.2.2), fragments that reach too far or overlap an L4 header, source routing. Not
//! checked: L4 checksums (the backend does; a partial one can't be).
//!
//! A GSO super-frame is a legal frame here: an IPv4 total length of up to 65 535, or an IPv6 payload of the same. What
//! follows the IP packet in the frame is padding: [`IpInfo::end`] says where it begins.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::ethernet::{self, EtherType, Mac, VlanTags};
use super::{Malformed, bytes, icmpv4, icmpv6, ipv4, ipv6, proto, tcp, udp};

/// What a frame is. Offsets are from the start of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dissected {
    /// Destination MAC.
    pub dst: Mac,
    /// Source MAC.
    pub src: Mac,
    /// VLAN tags inside the frame (not those that the kernel moved into metadata).
    pub vlan: VlanTags,
    /// EtherType behind the tags.
    pub ethertype: EtherType,
    /// Offset of the network layer.
    pub l3: usize,
    /// What the network layer is.
    pub net: Net,
}

/// The network layer of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    /// IPv4 or IPv6.
    Ip(IpInfo),
    /// ARP; for [`arp::Repr::parse`](super::arp::Repr::parse).
    Arp,
    /// Something else: not ours.
    Other,
}

/// An IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpInfo {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of the L4 header; of the payload in a later fragment.
    pub l4: usize,
    /// Offset of the first byte after the IP packet; what follows is padding.
    pub end: usize,
    /// Offset of the IPv6 fragment header; 0 when there is none and in IPv4.
    pub fragment_header: usize,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// Type of service or traffic class (DSCP and ECN).
    pub traffic_class: u8,
    /// L4 protocol, behind the extension headers.
    pub proto: u8,
    /// Whether and which fragment.
    pub fragment: Fragment,
    /// The L4 header.
    pub transport: Transport,
}

impl IpInfo {
    /// Whether this is IPv6.
    pub fn is_v6(&self) -> bool {
        self.dst.is_ipv6()
    }

    /// Length of the IP packet in bytes, headers included.
    pub fn len(&self) -> usize {
        self.end.saturating_sub(self.l3)
    }

    /// Never: an IP packet has a header.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of the L4 header and payload in bytes (of this fragment).
    pub fn l4_len(&self) -> usize {
        self.end.saturating_sub(self.l4)
    }

    /// Source and destination port, when the frame shows them.
    pub fn ports(&self) -> Option<(u16, u16)> {
        match self.transport {
            Transport::Tcp { src_port, dst_port, .. } | Transport::Udp { src_port, dst_port, .. } => {
                Some((src_port, dst_port))
            }
            _ => None,
        }
    }

    /// Source and destination as IPv4 addresses.
    pub fn v4(&self) -> Option<(Ipv4Addr, Ipv4Addr)> {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => Some((src, dst)),
            _ => None,
        }
    }

    /// Source and destination as IPv6 addresses.
    pub fn v6(&self) -> Option<(Ipv6Addr, Ipv6Addr)> {
        match (self.src, self.dst) {
            (IpAddr::V6(src), IpAddr::V6(dst)) => Some((src, dst)),
            _ => None,
        }
    }

    /// Offset of the L4 checksum field, when the frame shows one.
    pub fn checksum_at(&self) -> Option<usize> {
        match self.transport {
            Transport::Tcp { .. } => Some(self.l4 + tcp::CHECKSUM_AT),
            Transport::Udp { .. } => Some(self.l4 + udp::CHECKSUM_AT),
            Transport::Icmp { .. } => Some(self.l4 + icmpv4::CHECKSUM_AT),
            Transport::Icmpv6 { .. } => Some(self.l4 + icmpv6::CHECKSUM_AT),
            Transport::None | Transport::Other => None,
        }
    }
}

/// Whether an IP packet is a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// It is whole (in IPv6 also an atomic fragment, RFC 6946).
    Whole,
    /// The first fragment: it holds the L4 header.
    First {
        /// Identification.
        id: u32,
    },
    /// A later one.
    Later {
        /// Identification.
        id: u32,
        /// Offset of its payload in bytes.
        offset: u16,
        /// Whether it is the last by offset.
        last: bool,
    },
}

impl Fragment {
    /// Identification of the packet that this is a fragment of.
    pub fn id(self) -> Option<u32> {
        match self {
            Fragment::Whole => None,
            Fragment::First { id } | Fragment::Later { id, .. } => Some(id),
        }
    }
}

/// The L4 header of an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP, header whole.
    Tcp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
        /// Flags.
        flags: tcp::Flags,
        /// Length of the header in bytes, 20..=60.
        header_len: usize,
    },
    /// UDP.
    Udp {
        /// Source port.
        src_port: u16,
        /// Destination port.
        dst_port: u16,
    },
    /// ICMP in IPv4.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
    },
    /// ICMP in IPv6.
    Icmpv6 {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
    },
    /// None in this frame: a later fragment.
    None,
    /// Another protocol, ICMP of the other family included.
    Other,
}

/// Reads `frame`, an Ethernet frame without its check sequence.
///
/// # Errors
/// The reason why it can't be used.
#[inline]
pub fn dissect(frame: &[u8]) -> Result<Dissected, Malformed> {
    let ethernet = ethernet::Frame::new_checked(frame)?;
    let (vlan, ethertype, l3) = ethernet.tags()?;
    let net = match ethertype {
        EtherType::IPV4 => Net::Ip(dissect_v4(frame, l3)?),
        EtherType::IPV6 => Net::Ip(dissect_v6(frame, l3)?),
        EtherType::ARP => Net::Arp,
        _ => Net::Other,
    };
    Ok(Dissected { dst: ethernet.dst(), src: ethernet.src(), vlan, ethertype, l3, net })
}

/// Reads the IPv4 packet at `l3`.
#[inline]
fn dissect_v4(frame: &[u8], l3: usize) -> Result<IpInfo, Malformed> {
    let data = bytes::range(frame, l3, usize::MAX);
    let packet = ipv4::Packet::new_checked(data)?;
    let header_len = packet.header_len();
    if !packet.checksum_ok() {
        return Err(Malformed::BadHeaderChecksum);
    }
    if header_len > ipv4::MIN_HEADER_LEN && packet.is_source_routed() {
        return Err(Malformed::SourceRouted);
    }
    let total = usize::from(packet.total_len());
    let fragment = fragment(
        u32::from(packet.ident()),
        packet.fragment_offset(),
        packet.more_fragments(),
        total.saturating_sub(header_len),
        // RFC 791 §2.3 says the same of IPv4, but a fragment of odd length is only useless there, not harmful.
        false,
        usize::from(u16::MAX).saturating_sub(header_len),
    )?;
    let proto = packet.protocol();
    let (l4, end) = (l3 + header_len, l3 + total);
    Ok(IpInfo {
        src: IpAddr::V4(packet.src()),
        dst: IpAddr::V4(packet.dst()),
        l3,
        l4,
        end,
        fragment_header: 0,
        ttl: packet.ttl(),
        traffic_class: packet.tos(),
        proto,
        fragment,
        transport: transport(frame, l4, end, proto, false, fragment)?,
    })
}

/// Reads the IPv6 packet at `l3`.
#[inline]
fn dissect_v6(frame: &[u8], l3: usize) -> Result<IpInfo, Malformed> {
    let data = bytes::range(frame, l3, usize::MAX);
    let packet = ipv6::Packet::new_checked(data)?;
    let end = l3 + ipv6::HEADER_LEN + usize::from(packet.payload_len());
    let walk = ipv6::walk(packet.next_header(), packet.payload())?;
    let l4 = l3 + ipv6::HEADER_LEN + walk.offset;
    let mut kind = Fragment::Whole;
    let mut fragment_header = 0;
    if let Some(header) = walk.fragment {
        fragment_header = l3 + ipv6::HEADER_LEN + header.at;
        kind = fragment(
            header.id,
            header.offset,
            header.more,
            end.saturating_sub(l4),
            true,
            usize::from(u16::MAX),
        )?;
    }
    Ok(IpInfo {
        src: IpAddr::V6(packet.src()),
        dst: IpAddr::V6(packet.dst()),
        l3,
        l4,
        end,
        fragment_header,
        ttl: packet.hop_limit(),
        traffic_class: packet.traffic_class(),
        proto: walk.proto,
        fragment: kind,
        transport: transport(frame, l4, end, walk.proto, true, kind)?,
    })
}

/// Which fragment it is. `len` is that of its payload, `most` that of the whole payload.
fn fragment(
    id: u32,
    offset: u16,
    more: bool,
    len: usize,
    eights: bool,
    most: usize,
) -> Result<Fragment, Malformed> {
    if offset == 0 && !more {
        return Ok(Fragment::Whole);
    }
    if usize::from(offset) + len > most || (eights && more && !len.is_multiple_of(8)) {
        return Err(Malformed::BadFragment);
    }
    Ok(if offset == 0 { Fragment::First { id } } else { Fragment::Later { id, offset, last: !more } })
}

/// The L4 header at `l4` of a packet that ends at `end`.
#[inline]
fn transport(
    frame: &[u8],
    l4: usize,
    end: usize,
    proto: u8,
    v6: bool,
    fragment: Fragment,
) -> Result<Transport, Malformed> {
    if let Fragment::Later { offset, .. } = fragment {
        // RFC 1858 §4.2: the second fragment of a TCP segment must not reach into the fixed header.
        if proto == proto::TCP && usize::from(offset) < tcp::MIN_HEADER_LEN {
            return Err(Malformed::TinyFragment);
        }
        return Ok(Transport::None);
    }
    let data = bytes::range(frame, l4, end);
    let short = if fragment == Fragment::Whole { Malformed::Truncated } else { Malformed::TinyFragment };
    match proto {
        proto::TCP => {
            let segment = tcp::Segment::new_checked(data).map_err(|e| match e {
                Malformed::Truncated => short,
                other => other,
            })?;
            Ok(Transport::Tcp {
                src_port: segment.src_port(),
                dst_port: segment.dst_port(),
                flags: segment.flags(),
                header_len: segment.header_len(),
            })
        }
        proto::UDP => {
            if data.len() < udp::HEADER_LEN {
                return Err(short);
            }
            let datagram = udp::Datagram::new_header(data)?;
            // A super-frame of UDP segments (UDP_SEGMENT) is one datagram as long as its IP packet.
            let len = usize::from(datagram.len());
            if len < udp::HEADER_LEN || (fragment == Fragment::Whole && len > data.len()) {
                return Err(Malformed::BadUdpLength);
            }
            Ok(Transport::Udp { src_port: datagram.src_port(), dst_port: datagram.dst_port() })
        }
        proto::ICMP if !v6 => match data {
            [kind, code, _, _, _, _, _, _, ..] => Ok(Transport::Icmp { kind: *kind, code: *code }),
            _ => Err(short),
        },
        proto::ICMPV6 if v6 => match data {
            // The header proper is 4 bytes long, but no message is defined with fewer than 8.
            [kind, code, _, _, _, _, _, _, ..] => Ok(Transport::Icmpv6 { kind: *kind, code: *code }),
            _ => Err(short),
        },
        _ => Ok(Transport::Other),
    }
}
