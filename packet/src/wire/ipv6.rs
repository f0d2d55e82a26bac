//! IPv6 and its extension headers (RFC 8200).

use std::net::Ipv6Addr;

use super::{Malformed, bytes, proto};
use crate::checksum::Delta;

/// Length of the header.
pub const HEADER_LEN: usize = 40;
/// Extension headers that are looked behind. RFC 8200 §4.1 knows of six kinds, each once and destination options twice;
/// more serve only to hide the L4 header or to cost time.
pub const MAX_EXTENSIONS: usize = 8;
/// Length of the fragment header.
pub const FRAGMENT_HEADER_LEN: usize = 8;

mod field {
    pub const VERSION_CLASS_FLOW: usize = 0;
    pub const PAYLOAD_LEN: usize = 4;
    pub const NEXT_HEADER: usize = 6;
    pub const HOP_LIMIT: usize = 7;
    pub const SRC: usize = 8;
    pub const DST: usize = 24;
}

/// A view of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`, which may hold padding after the packet.
    ///
    /// # Errors
    /// `Truncated`, `BadVersion`, `BadTotalLength`, `Jumbogram`.
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        let packet = Packet::new_header(buffer)?;
        if packet.payload_len() == 0 && packet.next_header() == proto::HOP_BY_HOP {
            return Err(Malformed::Jumbogram);
        }
        if HEADER_LEN + usize::from(packet.payload_len()) > packet.data().len() {
            return Err(Malformed::BadTotalLength);
        }
        Ok(packet)
    }

    /// A view of `buffer` that holds at least the header, as in a packet that an ICMP error quotes.
    ///
    /// # Errors
    /// `Truncated`, `BadVersion`.
    pub fn new_header(buffer: T) -> Result<Self, Malformed> {
        if buffer.as_ref().len() < HEADER_LEN {
            return Err(Malformed::Truncated);
        }
        let packet = Packet { buffer };
        if packet.version() != 6 { Err(Malformed::BadVersion) } else { Ok(packet) }
    }

    fn data(&self) -> &[u8] {
        self.buffer.as_ref()
    }

    /// Version.
    pub fn version(&self) -> u8 {
        bytes::u8(self.data(), field::VERSION_CLASS_FLOW) >> 4
    }

    /// Traffic class: DSCP and ECN.
    pub fn traffic_class(&self) -> u8 {
        (bytes::u16(self.data(), field::VERSION_CLASS_FLOW) >> 4) as u8
    }

    /// Flow label.
    pub fn flow_label(&self) -> u32 {
        bytes::u32(self.data(), field::VERSION_CLASS_FLOW) & 0x000f_ffff
    }

    /// Length of what follows the header, in bytes.
    pub fn payload_len(&self) -> u16 {
        bytes::u16(self.data(), field::PAYLOAD_LEN)
    }

    /// Kind of what follows the header.
    pub fn next_header(&self) -> u8 {
        bytes::u8(self.data(), field::NEXT_HEADER)
    }

    /// Hop limit.
    pub fn hop_limit(&self) -> u8 {
        bytes::u8(self.data(), field::HOP_LIMIT)
    }

    /// Source.
    pub fn src(&self) -> Ipv6Addr {
        Ipv6Addr::from(bytes::array::<16>(self.data(), field::SRC))
    }

    /// Destination.
    pub fn dst(&self) -> Ipv6Addr {
        Ipv6Addr::from(bytes::array::<16>(self.data(), field::DST))
    }

    /// What follows the header, extension headers included, padding not.
    pub fn payload(&self) -> &[u8] {
        bytes::range(self.data(), HEADER_LEN, HEADER_LEN + usize::from(self.payload_len()))
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Sets the hop limit.
    pub fn set_hop_limit(&mut self, hop_limit: u8) {
        bytes::put_u8(self.buffer.as_mut(), field::HOP_LIMIT, hop_limit);
    }

    /// Sets the source. Returns the change for the L4 checksum.
    pub fn set_src(&mut self, src: Ipv6Addr) -> Delta {
        let delta = Delta::v6(self.src(), src);
        bytes::put(self.buffer.as_mut(), field::SRC, src.octets());
        delta
    }

    /// Sets the destination. Returns the change for the L4 checksum.
    pub fn set_dst(&mut self, dst: Ipv6Addr) -> Delta {
        let delta = Delta::v6(self.dst(), dst);
        bytes::put(self.buffer.as_mut(), field::DST, dst.octets());
        delta
    }

    /// What follows the header, extension headers included, padding not.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        let to = HEADER_LEN + usize::from(self.payload_len());
        bytes::range_mut(self.buffer.as_mut(), HEADER_LEN, to)
    }
}

/// Where the extension headers end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Kind of the first header that is no extension header: the L4 protocol. AH, ESP, and extension headers of kinds
    /// that aren't known count as one: what is behind them is not ours to read.
    pub proto: u8,
    /// Its offset from the end of the IPv6 header. Behind a later fragment's header it is the offset of the payload.
    pub offset: usize,
    /// The fragment header.
    pub fragment: Option<FragmentHeader>,
}

/// A fragment header (RFC 8200 §4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentHeader {
    /// Its offset from the end of the IPv6 header.
    pub at: usize,
    /// Offset of the payload in bytes.
    pub offset: u16,
    /// Whether more fragments follow.
    pub more: bool,
    /// Identification.
    pub id: u32,
}

/// Walks the extension headers of `payload`, whose first is of the kind `next_header`. Ends behind the header of a
/// later fragment: its payload has no headers.
///
/// # Errors
/// `Truncated`, `TooManyExtensions`, `SourceRouted`, `BadField` (hop-by-hop options elsewhere than first), and
/// `TinyFragment` for a first fragment without the whole chain (RFC 7112).
pub fn walk(next_header: u8, payload: &[u8]) -> Result<Walk, Malformed> {
    let mut walk = Walk { proto: next_header, offset: 0, fragment: None };
    for _ in 0..=MAX_EXTENSIONS {
        let known =
            matches!(walk.proto, proto::HOP_BY_HOP | proto::ROUTING | proto::FRAGMENT | proto::DEST_OPTIONS);
        // A second fragment header is left to the host, which drops it.
        if !known || (walk.proto == proto::FRAGMENT && walk.fragment.is_some()) {
            return Ok(walk);
        }
        // RFC 8200 §4.1: only directly behind the IPv6 header.
        if walk.proto == proto::HOP_BY_HOP && walk.offset != 0 {
            return Err(Malformed::BadField);
        }
        let short = if walk.fragment.is_some_and(|f| f.more) {
            Malformed::TinyFragment
        } else {
            Malformed::Truncated
        };
        let header = bytes::range(payload, walk.offset, payload.len());
        let [next, units, ..] = *header else { return Err(short) };
        // The length is in units of 8 bytes, the first not counted; the fragment header has none.
        let is_fragment = walk.proto == proto::FRAGMENT;
        let len = if is_fragment { FRAGMENT_HEADER_LEN } else { 8 + usize::from(units) * 8 };
        if header.len() < len {
            return Err(short);
        }
        if walk.proto == proto::ROUTING && bytes::u8(header, 3) != 0 {
            return Err(Malformed::SourceRouted);
        }
        if is_fragment {
            let word = bytes::u16(header, 2);
            let fragment = FragmentHeader {
                at: walk.offset,
                offset: word & 0xfff8,
                more: word & 1 != 0,
                id: bytes::u32(header, 4),
            };
            walk.fragment = Some(fragment);
            if fragment.offset != 0 {
                return Ok(Walk { proto: next, offset: walk.offset + len, ..walk });
            }
        }
        walk.proto = next;
        walk.offset += len;
    }
    Err(Malformed::TooManyExtensions)
}

/// A header of a packet that we build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Source.
    pub src: Ipv6Addr,
    /// Destination.
    pub dst: Ipv6Addr,
    /// L4 protocol.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Traffic class.
    pub traffic_class: u8,
    /// Length of the payload in bytes, at most 65 535 (beyond that it saturates).
    pub payload_len: usize,
}

impl Repr {
    /// Length of header and payload in bytes.
    pub fn buffer_len(&self) -> usize {
        HEADER_LEN + self.payload_len
    }

    /// Writes the header at the start of `buffer`, which must hold [`HEADER_LEN`] bytes. The flow label is 0.
    pub fn emit(&self, buffer: &mut [u8]) {
        bytes::put_u32(buffer, field::VERSION_CLASS_FLOW, 6 << 28 | u32::from(self.traffic_class) << 20);
        bytes::put_u16(buffer, field::PAYLOAD_LEN, u16::try_from(self.payload_len).unwrap_or(u16::MAX));
        bytes::put_u8(buffer, field::NEXT_HEADER, self.next_header);
        bytes::put_u8(buffer, field::HOP_LIMIT, self.hop_limit);
        bytes::put(buffer, field::SRC, self.src.octets());
        bytes::put(buffer, field::DST, self.dst.octets());
    }
}
