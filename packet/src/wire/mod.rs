//! Wire formats, one file for each protocol.
//!
//! Each file holds a zero-copy view (`Packet`, `Frame`, …) over any byte buffer with a checking constructor
//! `new_checked`, getters, and setters where the buffer is mutable; for messages that we build ourselves also a compact
//! `Repr` with `parse`, `buffer_len` and `emit`. [`dissect()`] reads a frame once and gives the hot path every offset and
//! field that it decides by.
//!
//! # Why nothing here can panic
//! Input comes from the network, so no byte of it may stop the process. In this module
//! - no slice is indexed: reads go through [`bytes`], whose functions are total (a read past the end gives 0, a write
//!   past the end does nothing), or through `get`, whose `None` becomes a named [`Malformed`] or an empty slice;
//! - offsets are `usize` sums of a few fields of at most 16 bits each and so can't overflow; differences saturate;
//! - walks over options and extension headers advance by at least one byte at each step and are bounded in number.
//!
//! `new_checked` refuses buffers that are too short, so that a 0 for "past the end" never reaches a caller; the fuzz
//! targets in `tests/fuzz` call every getter and setter all the same.
//!
//! # Not supported
//! LLC/SNAP frames, MPLS and more than two VLAN tags (they are no IP frame for us: [`dissect::Net::Other`]); IPv6
//! jumbograms (RFC 2675) and source routing (RFC 5095, RFC 7126), refused by name.

pub mod arp;
pub mod bytes;
pub mod dissect;
pub mod ethernet;
pub mod icmpv4;
pub mod icmpv6;
pub mod ipv4;
pub mod ipv6;
pub mod ndp;
pub mod quoted;
pub mod tcp;
pub mod udp;

mod pretty;
#[cfg(test)]
mod tests;

pub use dissect::{Dissected, Fragment, IpInfo, Net, Transport, dissect};
pub use ethernet::EtherType;
pub use pretty::Pretty;
pub use quoted::Quoted;

/// IANA protocol numbers (<https://www.iana.org/assignments/protocol-numbers>).
pub mod proto {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 no next header.
    pub const NO_NEXT: u8 = 59;
    /// IPv6 destination options.
    pub const DEST_OPTIONS: u8 = 60;
}

/// Why a frame can't be used. Each is a drop reason with a counter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
#[error("{}", self.as_str())]
pub enum Malformed {
    /// Shorter than the headers that it says it has.
    Truncated,
    /// The IP version does not go with the EtherType.
    BadVersion,
    /// A header length below the least or beyond the packet.
    BadHeaderLength,
    /// The IP packet ends before its headers do or after the frame does.
    BadTotalLength,
    /// The IPv4 header checksum is wrong.
    BadHeaderChecksum,
    /// A fragment that reaches beyond 65 535 bytes, or one that is not the last and no multiple of 8 long (RFC 8200
    /// §4.5).
    BadFragment,
    /// A first fragment without the whole L4 header, or one that would overwrite it (RFC 1858, RFC 7112).
    TinyFragment,
    /// More IPv6 extension headers than [`ipv6::MAX_EXTENSIONS`].
    TooManyExtensions,
    /// An IPv4 source route option or an IPv6 routing header with segments left: the destination is not the last one.
    SourceRouted,
    /// An IPv6 jumbogram (RFC 2675).
    Jumbogram,
    /// A UDP length that does not fit the IP packet.
    BadUdpLength,
    /// A field that has one legal value has another (e.g. an ARP hardware type that is not Ethernet).
    BadField,
    /// A checksum of ICMP or NDP is wrong.
    BadChecksum,
}

impl Malformed {
    /// Every reason, in the order of the counters.
    pub const ALL: [Malformed; 13] = [
        Malformed::Truncated,
        Malformed::BadVersion,
        Malformed::BadHeaderLength,
        Malformed::BadTotalLength,
        Malformed::BadHeaderChecksum,
        Malformed::BadFragment,
        Malformed::TinyFragment,
        Malformed::TooManyExtensions,
        Malformed::SourceRouted,
        Malformed::Jumbogram,
        Malformed::BadUdpLength,
        Malformed::BadField,
        Malformed::BadChecksum,
    ];

    /// The name of its drop counter.
    pub fn as_str(self) -> &'static str {
        match self {
            Malformed::Truncated => "truncated",
            Malformed::BadVersion => "bad_version",
            Malformed::BadHeaderLength => "bad_header_length",
            Malformed::BadTotalLength => "bad_total_length",
            Malformed::BadHeaderChecksum => "bad_header_checksum",
            Malformed::BadFragment => "bad_fragment",
            Malformed::TinyFragment => "tiny_fragment",
            Malformed::TooManyExtensions => "too_many_extensions",
            Malformed::SourceRouted => "source_routed",
            Malformed::Jumbogram => "jumbogram",
            Malformed::BadUdpLength => "bad_udp_length",
            Malformed::BadField => "bad_field",
            Malformed::BadChecksum => "bad_checksum",
        }
    }
}
