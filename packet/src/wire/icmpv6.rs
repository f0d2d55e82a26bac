//! ICMP for IPv6 (RFC 4443). Neighbour discovery stands in [`ndp`](super::ndp).

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use super::{Malformed, bytes, ipv6, proto};
use crate::checksum::Sum;

/// Length of the header of echoes and errors.
pub const HEADER_LEN: usize = 8;
/// Offset of the checksum.
pub const CHECKSUM_AT: usize = 2;
/// Offset of the MTU in "packet too big".
pub const MTU_AT: usize = 4;

/// Types (RFC 4443 §2.1).
pub mod kind {
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 1;
    /// Packet too big.
    pub const PACKET_TOO_BIG: u8 = 2;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 3;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 4;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 128;
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 129;
    /// Router solicitation.
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Router advertisement.
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Neighbour solicitation.
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    /// Neighbour advertisement.
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    /// Redirect.
    pub const REDIRECT: u8 = 137;
}

/// Codes of "destination unreachable" (RFC 4443 §3.1).
pub mod unreachable {
    /// No route.
    pub const NO_ROUTE: u8 = 0;
    /// Forbidden.
    pub const PROHIBITED: u8 = 1;
    /// The host does not answer.
    pub const ADDRESS: u8 = 3;
    /// Nobody listens on the port.
    pub const PORT: u8 = 4;
}

/// Whether `kind` quotes a packet: errors are the types below 128 (RFC 4443 §2.1).
pub fn is_error(kind: u8) -> bool {
    kind < 128
}

/// A view of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Message<T> {
    /// A view of `buffer`, which ends where the message does. The checksum is not looked at, see
    /// [`checksum_ok`](Self::checksum_ok).
    ///
    /// # Errors
    /// `Truncated`.
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        if buffer.as_ref().len() < HEADER_LEN { Err(Malformed::Truncated) } else { Ok(Message { buffer }) }
    }

    /// Type.
    pub fn kind(&self) -> u8 {
        bytes::u8(self.buffer.as_ref(), 0)
    }

    /// Code.
    pub fn code(&self) -> u8 {
        bytes::u8(self.buffer.as_ref(), 1)
    }

    /// Checksum.
    pub fn checksum(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), CHECKSUM_AT)
    }

    /// Whether the checksum is right.
    pub fn checksum_ok(&self, src: Ipv6Addr, dst: Ipv6Addr) -> bool {
        self.sum(src, dst) == 0
    }

    /// Whether it quotes a packet.
    pub fn is_error(&self) -> bool {
        is_error(self.kind())
    }

    /// Identifier of an echo.
    pub fn ident(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), 4)
    }

    /// Sequence number of an echo.
    pub fn sequence(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), 6)
    }

    /// MTU of "packet too big".
    pub fn mtu(&self) -> u32 {
        bytes::u32(self.buffer.as_ref(), MTU_AT)
    }

    /// What follows the header: the data of an echo, the packet that an error quotes.
    pub fn payload(&self) -> &[u8] {
        bytes::range(self.buffer.as_ref(), HEADER_LEN, usize::MAX)
    }

    fn sum(&self, src: Ipv6Addr, dst: Ipv6Addr) -> u16 {
        sum(self.buffer.as_ref(), src, dst)
    }
}

/// The checksum over pseudo-header and `message` (RFC 4443 §2.3).
pub(super) fn sum(message: &[u8], src: Ipv6Addr, dst: Ipv6Addr) -> u16 {
    let pseudo = Sum::pseudo_header(IpAddr::V6(src), IpAddr::V6(dst), proto::ICMPV6, message.len() as u32);
    pseudo.bytes(message).checksum()
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Message<T> {
    /// Sets type and code, not the checksum.
    pub fn set_kind(&mut self, kind: u8, code: u8) {
        bytes::put(self.buffer.as_mut(), 0, [kind, code]);
    }

    /// Computes the checksum anew.
    pub fn fill_checksum(&mut self, src: Ipv6Addr, dst: Ipv6Addr) {
        bytes::put_u16(self.buffer.as_mut(), CHECKSUM_AT, 0);
        let sum = self.sum(src, dst);
        bytes::put_u16(self.buffer.as_mut(), CHECKSUM_AT, sum);
    }

    /// What follows the header.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        bytes::range_mut(self.buffer.as_mut(), HEADER_LEN, usize::MAX)
    }
}

/// A message that we build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repr<'a> {
    /// Echo request or reply.
    Echo {
        /// Reply, not request.
        reply: bool,
        /// Identifier.
        ident: u16,
        /// Sequence number.
        sequence: u16,
        /// Data.
        data: &'a [u8],
    },
    /// An error about the packet that `quoted` begins with (its IP header on).
    Error {
        /// Type, below 128.
        kind: u8,
        /// Code.
        code: u8,
        /// MTU with [`kind::PACKET_TOO_BIG`], pointer with [`kind::PARAMETER_PROBLEM`]; otherwise 0.
        mtu: u32,
        /// The packet. At most [`MAX_QUOTE`] bytes of it are sent.
        quoted: &'a [u8],
    },
}

/// Bytes of a packet that an error quotes: with its headers the error is no longer than the least MTU (RFC 4443 §2.4
/// (c)).
pub const MAX_QUOTE: usize = 1280 - ipv6::HEADER_LEN - HEADER_LEN;

impl<'a> Repr<'a> {
    /// Reads `data`, an ICMPv6 message that ends where `data` does.
    ///
    /// # Errors
    /// `Truncated`; `BadChecksum`; `BadField` for other types.
    pub fn parse(data: &'a [u8], src: Ipv6Addr, dst: Ipv6Addr) -> Result<Repr<'a>, Malformed> {
        let message = Message::new_checked(data)?;
        if !message.checksum_ok(src, dst) {
            return Err(Malformed::BadChecksum);
        }
        let payload = bytes::range(data, HEADER_LEN, usize::MAX);
        match message.kind() {
            kind @ (kind::ECHO_REQUEST | kind::ECHO_REPLY) => Ok(Repr::Echo {
                reply: kind == kind::ECHO_REPLY,
                ident: message.ident(),
                sequence: message.sequence(),
                data: payload,
            }),
            kind if is_error(kind) => {
                Ok(Repr::Error { kind, code: message.code(), mtu: message.mtu(), quoted: payload })
            }
            _ => Err(Malformed::BadField),
        }
    }

    /// Length in bytes.
    pub fn buffer_len(&self) -> usize {
        HEADER_LEN + self.payload().len()
    }

    /// Writes the message at the start of `buffer`, which must hold [`buffer_len`](Self::buffer_len) bytes.
    pub fn emit(&self, buffer: &mut [u8], src: Ipv6Addr, dst: Ipv6Addr) {
        let buffer = bytes::range_mut(buffer, 0, self.buffer_len());
        let (kind, code, word) = match *self {
            Repr::Echo { reply, ident, sequence, .. } => {
                let kind = if reply { kind::ECHO_REPLY } else { kind::ECHO_REQUEST };
                (kind, 0, u32::from(ident) << 16 | u32::from(sequence))
            }
            Repr::Error { kind, code, mtu, .. } => (kind, code, mtu),
        };
        bytes::put(buffer, 0, [kind, code]);
        bytes::put_u32(buffer, MTU_AT, word);
        bytes::put_slice(buffer, HEADER_LEN, self.payload());
        Message { buffer }.fill_checksum(src, dst);
    }

    /// The IPv6 packet from `src` to `dst`.
    pub fn packet(&self, src: Ipv6Addr, dst: Ipv6Addr) -> Vec<u8> {
        let ip = ipv6::Repr {
            src,
            dst,
            next_header: proto::ICMPV6,
            hop_limit: 64,
            traffic_class: 0,
            payload_len: self.buffer_len(),
        };
        let mut packet = vec![0; ip.buffer_len()];
        ip.emit(&mut packet);
        self.emit(bytes::range_mut(&mut packet, ipv6::HEADER_LEN, usize::MAX), src, dst);
        packet
    }

    fn payload(&self) -> &'a [u8] {
        match *self {
            Repr::Echo { data, .. } => data,
            Repr::Error { quoted, .. } => bytes::range(quoted, 0, MAX_QUOTE),
        }
    }
}

impl fmt::Display for Repr<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Repr::Echo { reply, ident, sequence, .. } => {
                let word = if reply { "reply" } else { "request" };
                write!(f, "ICMP6 echo {word}, id {ident}, seq {sequence}")
            }
            Repr::Error { kind, code, mtu, .. } => {
                write!(f, "ICMP6 {}", kind_name(kind))?;
                if kind == kind::PACKET_TOO_BIG {
                    write!(f, ", mtu {mtu}")
                } else {
                    write!(f, ", code {code}")
                }
            }
        }
    }
}

/// Name of a type, for display.
pub fn kind_name(kind: u8) -> &'static str {
    match kind {
        kind::UNREACHABLE => "unreachable",
        kind::PACKET_TOO_BIG => "packet too big",
        kind::TIME_EXCEEDED => "time exceeded",
        kind::PARAMETER_PROBLEM => "parameter problem",
        kind::ECHO_REQUEST => "echo request",
        kind::ECHO_REPLY => "echo reply",
        kind::ROUTER_SOLICITATION => "router solicitation",
        kind::ROUTER_ADVERTISEMENT => "router advertisement",
        kind::NEIGHBOUR_SOLICITATION => "neighbour solicitation",
        kind::NEIGHBOUR_ADVERTISEMENT => "neighbour advertisement",
        kind::REDIRECT => "redirect",
        _ => "of another type",
    }
}
