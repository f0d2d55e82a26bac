//! TCP (RFC 9293): what a load balancer reads of a segment, and the reset that it sends for a dead backend.

use std::fmt;
use std::net::IpAddr;

use super::{Malformed, bytes, proto};
use crate::checksum::Sum;

/// Length of the header without options.
pub const MIN_HEADER_LEN: usize = 20;
/// Offset of the checksum.
pub const CHECKSUM_AT: usize = 16;

mod field {
    pub const SRC_PORT: usize = 0;
    pub const DST_PORT: usize = 2;
    pub const SEQ: usize = 4;
    pub const ACK: usize = 8;
    pub const DATA_OFFSET: usize = 12;
    pub const FLAGS: usize = 13;
    pub const WINDOW: usize = 14;
    pub const URGENT: usize = 18;
}

/// Control bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(pub u8);

impl Flags {
    /// No more data from the sender.
    pub const FIN: Flags = Flags(0x01);
    /// Synchronise sequence numbers.
    pub const SYN: Flags = Flags(0x02);
    /// Reset the connection.
    pub const RST: Flags = Flags(0x04);
    /// Push.
    pub const PSH: Flags = Flags(0x08);
    /// The acknowledgment field means something.
    pub const ACK: Flags = Flags(0x10);
    /// The urgent pointer means something.
    pub const URG: Flags = Flags(0x20);

    /// Whether all of `other` are set.
    pub fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// FIN.
    pub fn fin(self) -> bool {
        self.contains(Flags::FIN)
    }

    /// SYN.
    pub fn syn(self) -> bool {
        self.contains(Flags::SYN)
    }

    /// RST.
    pub fn rst(self) -> bool {
        self.contains(Flags::RST)
    }

    /// ACK.
    pub fn ack(self) -> bool {
        self.contains(Flags::ACK)
    }

    /// The first segment of a connection: SYN without ACK and RST.
    pub fn opens(self) -> bool {
        self.syn() && !self.ack() && !self.rst()
    }
}

impl std::ops::BitOr for Flags {
    type Output = Flags;

    fn bitor(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        // In tcpdump's letters and order.
        for (flag, letter) in [
            (Flags::FIN, "F"),
            (Flags::SYN, "S"),
            (Flags::RST, "R"),
            (Flags::PSH, "P"),
            (Flags::ACK, "."),
            (Flags::URG, "U"),
        ] {
            if self.contains(flag) {
                f.write_str(letter)?;
            }
        }
        f.write_str("]")
    }
}

/// A view of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Segment<T> {
    /// A view of `buffer`, which ends where the segment does.
    ///
    /// # Errors
    /// `Truncated`, `BadHeaderLength`.
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        let len = buffer.as_ref().len();
        if len < MIN_HEADER_LEN {
            return Err(Malformed::Truncated);
        }
        let segment = Segment { buffer };
        if segment.header_len() < MIN_HEADER_LEN || segment.header_len() > len {
            return Err(Malformed::BadHeaderLength);
        }
        Ok(segment)
    }

    fn data(&self) -> &[u8] {
        self.buffer.as_ref()
    }

    /// Source port.
    pub fn src_port(&self) -> u16 {
        bytes::u16(self.data(), field::SRC_PORT)
    }

    /// Destination port.
    pub fn dst_port(&self) -> u16 {
        bytes::u16(self.data(), field::DST_PORT)
    }

    /// Sequence number.
    pub fn seq(&self) -> u32 {
        bytes::u32(self.data(), field::SEQ)
    }

    /// Acknowledgment number; means something when [`Flags::ACK`] is set.
    pub fn ack(&self) -> u32 {
        bytes::u32(self.data(), field::ACK)
    }

    /// Header length in bytes.
    pub fn header_len(&self) -> usize {
        usize::from(bytes::u8(self.data(), field::DATA_OFFSET) >> 4) * 4
    }

    /// Control bits.
    pub fn flags(&self) -> Flags {
        Flags(bytes::u8(self.data(), field::FLAGS))
    }

    /// Window, not scaled.
    pub fn window(&self) -> u16 {
        bytes::u16(self.data(), field::WINDOW)
    }

    /// Checksum.
    pub fn checksum(&self) -> u16 {
        bytes::u16(self.data(), CHECKSUM_AT)
    }

    /// Whether the checksum is right.
    pub fn checksum_ok(&self, src: IpAddr, dst: IpAddr) -> bool {
        self.sum(src, dst) == 0
    }

    /// Options, padding included.
    pub fn options(&self) -> &[u8] {
        bytes::range(self.data(), MIN_HEADER_LEN, self.header_len())
    }

    /// Payload.
    pub fn payload(&self) -> &[u8] {
        bytes::range(self.data(), self.header_len(), usize::MAX)
    }

    fn sum(&self, src: IpAddr, dst: IpAddr) -> u16 {
        let data = self.data();
        Sum::pseudo_header(src, dst, proto::TCP, data.len() as u32).bytes(data).checksum()
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Segment<T> {
    /// Sets the source port, not the checksum.
    pub fn set_src_port(&mut self, port: u16) {
        bytes::put_u16(self.buffer.as_mut(), field::SRC_PORT, port);
    }

    /// Sets the destination port, not the checksum.
    pub fn set_dst_port(&mut self, port: u16) {
        bytes::put_u16(self.buffer.as_mut(), field::DST_PORT, port);
    }

    /// Sets the checksum field as it is.
    pub fn set_checksum(&mut self, checksum: u16) {
        bytes::put_u16(self.buffer.as_mut(), CHECKSUM_AT, checksum);
    }

    /// Computes the checksum anew.
    pub fn fill_checksum(&mut self, src: IpAddr, dst: IpAddr) {
        self.set_checksum(0);
        let sum = self.sum(src, dst);
        self.set_checksum(sum);
    }
}

/// A segment without options and payload: a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgment number.
    pub ack: u32,
    /// Control bits.
    pub flags: Flags,
}

impl Repr {
    /// The reset that answers `segment` on behalf of a host that knows nothing of its connection, `payload_len` bytes
    /// of which follow its header (RFC 9293 §3.10.7.1). None for a segment that is itself a reset.
    pub fn reset_for(segment: &Segment<&[u8]>, payload_len: usize) -> Option<Repr> {
        let flags = segment.flags();
        if flags.rst() {
            return None;
        }
        let (src_port, dst_port) = (segment.dst_port(), segment.src_port());
        if flags.ack() {
            return Some(Repr { src_port, dst_port, seq: segment.ack(), ack: 0, flags: Flags::RST });
        }
        // SEG.LEN counts SYN and FIN too.
        let len =
            (payload_len as u32).wrapping_add(u32::from(flags.syn())).wrapping_add(u32::from(flags.fin()));
        let ack = segment.seq().wrapping_add(len);
        Some(Repr { src_port, dst_port, seq: 0, ack, flags: Flags::RST | Flags::ACK })
    }

    /// Length in bytes.
    pub fn buffer_len(&self) -> usize {
        MIN_HEADER_LEN
    }

    /// Writes the segment at the start of `buffer`, which must hold [`buffer_len`](Self::buffer_len) bytes.
    pub fn emit(&self, buffer: &mut [u8], src: IpAddr, dst: IpAddr) {
        let buffer = bytes::range_mut(buffer, 0, MIN_HEADER_LEN);
        bytes::put_u16(buffer, field::SRC_PORT, self.src_port);
        bytes::put_u16(buffer, field::DST_PORT, self.dst_port);
        bytes::put_u32(buffer, field::SEQ, self.seq);
        bytes::put_u32(buffer, field::ACK, self.ack);
        bytes::put_u8(buffer, field::DATA_OFFSET, (MIN_HEADER_LEN as u8 / 4) << 4);
        bytes::put_u8(buffer, field::FLAGS, self.flags.0);
        bytes::put_u16(buffer, field::WINDOW, 0);
        bytes::put_u16(buffer, field::URGENT, 0);
        Segment { buffer }.fill_checksum(src, dst);
    }
}
