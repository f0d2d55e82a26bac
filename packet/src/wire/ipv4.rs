//! IPv4 (RFC 791).

use std::net::Ipv4Addr;

use super::{Malformed, bytes};
use crate::checksum::{self, Delta};

/// Length of the header without options.
pub const MIN_HEADER_LEN: usize = 20;
/// Offset of the header checksum.
pub const CHECKSUM_AT: usize = 10;

mod field {
    pub const VERSION_IHL: usize = 0;
    pub const TOS: usize = 1;
    pub const TOTAL_LEN: usize = 2;
    pub const IDENT: usize = 4;
    pub const FLAGS_OFFSET: usize = 6;
    pub const TTL: usize = 8;
    pub const PROTOCOL: usize = 9;
    pub const SRC: usize = 12;
    pub const DST: usize = 16;
}

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;

/// Option kinds that change what the destination field means (RFC 791 §3.1).
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;

/// A view of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`, which may hold padding after the packet.
    ///
    /// # Errors
    /// `Truncated`, `BadVersion`, `BadHeaderLength`, `BadTotalLength`.
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        let packet = Packet::new_header(buffer)?;
        let total = usize::from(packet.total_len());
        if total < packet.header_len() || total > packet.buffer.as_ref().len() {
            return Err(Malformed::BadTotalLength);
        }
        Ok(packet)
    }

    /// A view of `buffer` that holds at least the header, as in a packet that an ICMP error quotes: the total length
    /// may lie beyond the buffer.
    ///
    /// # Errors
    /// `Truncated`, `BadVersion`, `BadHeaderLength`.
    pub fn new_header(buffer: T) -> Result<Self, Malformed> {
        let data = buffer.as_ref();
        if data.len() < MIN_HEADER_LEN {
            return Err(Malformed::Truncated);
        }
        let packet = Packet { buffer };
        if packet.version() != 4 {
            return Err(Malformed::BadVersion);
        }
        if packet.header_len() < MIN_HEADER_LEN || packet.header_len() > packet.buffer.as_ref().len() {
            return Err(Malformed::BadHeaderLength);
        }
        Ok(packet)
    }

    fn data(&self) -> &[u8] {
        self.buffer.as_ref()
    }

    /// Version.
    pub fn version(&self) -> u8 {
        bytes::u8(self.data(), field::VERSION_IHL) >> 4
    }

    /// Header length in bytes.
    pub fn header_len(&self) -> usize {
        usize::from(bytes::u8(self.data(), field::VERSION_IHL) & 0x0f) * 4
    }

    /// Type of service: DSCP and ECN.
    pub fn tos(&self) -> u8 {
        bytes::u8(self.data(), field::TOS)
    }

    /// Length of header and payload in bytes.
    pub fn total_len(&self) -> u16 {
        bytes::u16(self.data(), field::TOTAL_LEN)
    }

    /// Identification.
    pub fn ident(&self) -> u16 {
        bytes::u16(self.data(), field::IDENT)
    }

    /// Whether a router must not fragment it.
    pub fn dont_fragment(&self) -> bool {
        bytes::u16(self.data(), field::FLAGS_OFFSET) & DONT_FRAGMENT != 0
    }

    /// Whether it is a fragment but the last.
    pub fn more_fragments(&self) -> bool {
        bytes::u16(self.data(), field::FLAGS_OFFSET) & MORE_FRAGMENTS != 0
    }

    /// Offset of the fragment's payload in bytes.
    pub fn fragment_offset(&self) -> u16 {
        // 13 bits of units of 8 fill 16 bits.
        bytes::u16(self.data(), field::FLAGS_OFFSET) << 3
    }

    /// Time to live.
    pub fn ttl(&self) -> u8 {
        bytes::u8(self.data(), field::TTL)
    }

    /// L4 protocol.
    pub fn protocol(&self) -> u8 {
        bytes::u8(self.data(), field::PROTOCOL)
    }

    /// Header checksum.
    pub fn checksum(&self) -> u16 {
        bytes::u16(self.data(), CHECKSUM_AT)
    }

    /// Whether the header checksum is right.
    pub fn checksum_ok(&self) -> bool {
        checksum::checksum(bytes::range(self.data(), 0, self.header_len())) == 0
    }

    /// Source.
    pub fn src(&self) -> Ipv4Addr {
        Ipv4Addr::from(bytes::array::<4>(self.data(), field::SRC))
    }

    /// Destination.
    pub fn dst(&self) -> Ipv4Addr {
        Ipv4Addr::from(bytes::array::<4>(self.data(), field::DST))
    }

    /// Options, padding included.
    pub fn options(&self) -> &[u8] {
        bytes::range(self.data(), MIN_HEADER_LEN, self.header_len())
    }

    /// Whether a source route option is there. Options behind a malformed one are not looked at, as hosts do.
    pub fn is_source_routed(&self) -> bool {
        let mut options = self.options();
        loop {
            match *options {
                [LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE, ..] => return true,
                // No operation.
                [1, ref rest @ ..] => options = rest,
                // End of options, or none.
                [] | [0, ..] | [_] => return false,
                [_, len, ..] => match options.get(usize::from(len).max(2)..) {
                    Some(rest) if len >= 2 => options = rest,
                    _ => return false,
                },
            }
        }
    }

    /// Payload, without padding.
    pub fn payload(&self) -> &[u8] {
        bytes::range(self.data(), self.header_len(), usize::from(self.total_len()))
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Sets the type of service, the checksum with it.
    pub fn set_tos(&mut self, tos: u8) {
        let old = bytes::u16(self.data(), field::VERSION_IHL);
        bytes::put_u8(self.buffer.as_mut(), field::TOS, tos);
        self.update(Delta::u16(old, old & 0xff00 | u16::from(tos)));
    }

    /// Sets the time to live, the checksum with it.
    pub fn set_ttl(&mut self, ttl: u8) {
        let old = bytes::u16(self.data(), field::TTL);
        bytes::put_u8(self.buffer.as_mut(), field::TTL, ttl);
        self.update(Delta::u16(old, u16::from(ttl) << 8 | old & 0x00ff));
    }

    /// Sets the source, the header checksum with it. Returns the change for the L4 checksum.
    pub fn set_src(&mut self, src: Ipv4Addr) -> Delta {
        let delta = Delta::v4(self.src(), src);
        bytes::put(self.buffer.as_mut(), field::SRC, src.octets());
        self.update(delta);
        delta
    }

    /// Sets the destination, the header checksum with it. Returns the change for the L4 checksum.
    pub fn set_dst(&mut self, dst: Ipv4Addr) -> Delta {
        let delta = Delta::v4(self.dst(), dst);
        bytes::put(self.buffer.as_mut(), field::DST, dst.octets());
        self.update(delta);
        delta
    }

    /// Computes the header checksum anew.
    pub fn fill_checksum(&mut self) {
        bytes::put_u16(self.buffer.as_mut(), CHECKSUM_AT, 0);
        let sum = checksum::checksum(bytes::range(self.data(), 0, self.header_len()));
        bytes::put_u16(self.buffer.as_mut(), CHECKSUM_AT, sum);
    }

    /// Payload, without padding.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        let (from, to) = (self.header_len(), usize::from(self.total_len()));
        bytes::range_mut(self.buffer.as_mut(), from, to)
    }

    fn update(&mut self, delta: Delta) {
        let sum = delta.apply(self.checksum());
        bytes::put_u16(self.buffer.as_mut(), CHECKSUM_AT, sum);
    }
}

/// A header without options, not a fragment, of a packet that we build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Source.
    pub src: Ipv4Addr,
    /// Destination.
    pub dst: Ipv4Addr,
    /// L4 protocol.
    pub protocol: u8,
    /// Time to live.
    pub ttl: u8,
    /// Type of service.
    pub tos: u8,
    /// Whether routers must not fragment it.
    pub dont_fragment: bool,
    /// Length of the payload in bytes, at most 65 515 (beyond that the total length saturates).
    pub payload_len: usize,
}

impl Repr {
    /// Length of header and payload in bytes.
    pub fn buffer_len(&self) -> usize {
        MIN_HEADER_LEN + self.payload_len
    }

    /// Writes the header at the start of `buffer`, which must hold [`MIN_HEADER_LEN`] bytes. The identification is 0:
    /// of a packet that isn't fragmented it means nothing (RFC 6864 §4.1).
    pub fn emit(&self, buffer: &mut [u8]) {
        let total = u16::try_from(self.buffer_len()).unwrap_or(u16::MAX);
        bytes::put_u8(buffer, field::VERSION_IHL, 0x45);
        bytes::put_u8(buffer, field::TOS, self.tos);
        bytes::put_u16(buffer, field::TOTAL_LEN, total);
        bytes::put_u16(buffer, field::IDENT, 0);
        bytes::put_u16(buffer, field::FLAGS_OFFSET, if self.dont_fragment { DONT_FRAGMENT } else { 0 });
        bytes::put_u8(buffer, field::TTL, self.ttl);
        bytes::put_u8(buffer, field::PROTOCOL, self.protocol);
        bytes::put(buffer, field::SRC, self.src.octets());
        bytes::put(buffer, field::DST, self.dst.octets());
        Packet { buffer }.fill_checksum();
    }
}
