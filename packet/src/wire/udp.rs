//! UDP (RFC 768).

use std::net::IpAddr;

use super::{Malformed, bytes, proto};
use crate::checksum::{self, Sum};

/// Length of the header.
pub const HEADER_LEN: usize = 8;
/// Offset of the checksum.
pub const CHECKSUM_AT: usize = 6;

mod field {
    pub const SRC_PORT: usize = 0;
    pub const DST_PORT: usize = 2;
    pub const LEN: usize = 4;
}

/// A view of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Datagram<T> {
    /// A view of `buffer`, which may hold more than the datagram.
    ///
    /// # Errors
    /// `Truncated`, `BadUdpLength`.
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        let datagram = Datagram::new_header(buffer)?;
        let len = usize::from(datagram.len());
        if len < HEADER_LEN || len > datagram.buffer.as_ref().len() {
            return Err(Malformed::BadUdpLength);
        }
        Ok(datagram)
    }

    /// A view of `buffer` that holds at least the header, as in a fragment or a quoted packet.
    ///
    /// # Errors
    /// `Truncated`.
    pub fn new_header(buffer: T) -> Result<Self, Malformed> {
        if buffer.as_ref().len() < HEADER_LEN { Err(Malformed::Truncated) } else { Ok(Datagram { buffer }) }
    }

    /// Source port.
    pub fn src_port(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::SRC_PORT)
    }

    /// Destination port.
    pub fn dst_port(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::DST_PORT)
    }

    /// Length of header and payload in bytes, as the header says.
    pub fn len(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::LEN)
    }

    /// Whether there is no payload.
    pub fn is_empty(&self) -> bool {
        usize::from(self.len()) <= HEADER_LEN
    }

    /// Checksum; 0: none.
    pub fn checksum(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), CHECKSUM_AT)
    }

    /// Whether the checksum is right, or absent in IPv4.
    pub fn checksum_ok(&self, src: IpAddr, dst: IpAddr) -> bool {
        if self.checksum() == 0 {
            return src.is_ipv4();
        }
        let data = bytes::range(self.buffer.as_ref(), 0, usize::from(self.len()));
        Sum::pseudo_header(src, dst, proto::UDP, u32::from(self.len())).bytes(data).checksum() == 0
    }

    /// Payload.
    pub fn payload(&self) -> &[u8] {
        bytes::range(self.buffer.as_ref(), HEADER_LEN, usize::from(self.len()))
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Datagram<T> {
    /// Sets the source port, not the checksum.
    pub fn set_src_port(&mut self, port: u16) {
        bytes::put_u16(self.buffer.as_mut(), field::SRC_PORT, port);
    }

    /// Sets the destination port, not the checksum.
    pub fn set_dst_port(&mut self, port: u16) {
        bytes::put_u16(self.buffer.as_mut(), field::DST_PORT, port);
    }

    /// Sets the length.
    pub fn set_len(&mut self, len: u16) {
        bytes::put_u16(self.buffer.as_mut(), field::LEN, len);
    }

    /// Sets the checksum field as it is.
    pub fn set_checksum(&mut self, checksum: u16) {
        bytes::put_u16(self.buffer.as_mut(), CHECKSUM_AT, checksum);
    }

    /// Computes the checksum anew.
    pub fn fill_checksum(&mut self, src: IpAddr, dst: IpAddr) {
        self.set_checksum(0);
        let data = bytes::range(self.buffer.as_ref(), 0, usize::from(self.len()));
        let sum = Sum::pseudo_header(src, dst, proto::UDP, u32::from(self.len())).bytes(data).checksum();
        self.set_checksum(checksum::udp_nonzero(sum));
    }

    /// Payload.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        let to = usize::from(self.len());
        bytes::range_mut(self.buffer.as_mut(), HEADER_LEN, to)
    }
}
