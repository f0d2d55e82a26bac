//! ICMP for IPv4 (RFC 792; next-hop MTU: RFC 1191).

use std::fmt;
use std::net::Ipv4Addr;

use super::{Malformed, bytes, ipv4, proto};
use crate::checksum;

/// Length of the header of every message that we know.
pub const HEADER_LEN: usize = 8;
/// Offset of the checksum.
pub const CHECKSUM_AT: usize = 2;

/// Types (RFC 792 and <https://www.iana.org/assignments/icmp-parameters>).
pub mod kind {
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Source quench (deprecated, RFC 6633).
    pub const SOURCE_QUENCH: u8 = 4;
    /// Redirect.
    pub const REDIRECT: u8 = 5;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 8;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 12;
}

/// Codes of "destination unreachable".
pub mod unreachable {
    /// No route to the network.
    pub const NET: u8 = 0;
    /// The host does not answer.
    pub const HOST: u8 = 1;
    /// The host does not know the protocol.
    pub const PROTOCOL: u8 = 2;
    /// Nobody listens on the port.
    pub const PORT: u8 = 3;
    /// Too big for the next link, and must not be fragmented.
    pub const FRAGMENTATION_NEEDED: u8 = 4;
    /// Forbidden (RFC 1812 §5.2.7.1).
    pub const PROHIBITED: u8 = 13;
}

/// Offset of the next-hop MTU in "fragmentation needed".
pub const MTU_AT: usize = 6;

/// Whether `kind` quotes a packet (RFC 1812 §4.3.2.3).
pub fn is_error(kind: u8) -> bool {
    matches!(
        kind,
        kind::UNREACHABLE
            | kind::SOURCE_QUENCH
            | kind::REDIRECT
            | kind::TIME_EXCEEDED
            | kind::PARAMETER_PROBLEM
    )
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
    pub fn checksum_ok(&self) -> bool {
        checksum::checksum(self.buffer.as_ref()) == 0
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

    /// Next-hop MTU of "fragmentation needed"; 0 from routers older than RFC 1191.
    pub fn mtu(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), MTU_AT)
    }

    /// What follows the header: the data of an echo, the packet that an error quotes.
    pub fn payload(&self) -> &[u8] {
        bytes::range(self.buffer.as_ref(), HEADER_LEN, usize::MAX)
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Message<T> {
    /// Sets type and code, the checksum with them.
    pub fn set_kind(&mut self, kind: u8, code: u8) {
        let old = bytes::u16(self.buffer.as_ref(), 0);
        bytes::put(self.buffer.as_mut(), 0, [kind, code]);
        let sum = checksum::Delta::u16(old, u16::from_be_bytes([kind, code])).apply(self.checksum());
        bytes::put_u16(self.buffer.as_mut(), CHECKSUM_AT, sum);
    }

    /// Computes the checksum anew.
    pub fn fill_checksum(&mut self) {
        bytes::put_u16(self.buffer.as_mut(), CHECKSUM_AT, 0);
        let sum = checksum::checksum(self.buffer.as_ref());
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
        /// Type: [`kind::UNREACHABLE`], [`kind::TIME_EXCEEDED`], …
        kind: u8,
        /// Code.
        code: u8,
        /// Next-hop MTU, with [`unreachable::FRAGMENTATION_NEEDED`]; otherwise 0.
        mtu: u16,
        /// The packet. At most [`MAX_QUOTE`] bytes of it are sent.
        quoted: &'a [u8],
    },
}

/// Bytes of a packet that an error quotes: with its headers the error stays below 576 bytes (RFC 1812 §4.3.2.3).
pub const MAX_QUOTE: usize = 576 - ipv4::MIN_HEADER_LEN - HEADER_LEN;

impl<'a> Repr<'a> {
    /// Reads `data`, an ICMP message that ends where `data` does.
    ///
    /// # Errors
    /// `Truncated`; `BadChecksum`; `BadField` for other types.
    pub fn parse(data: &'a [u8]) -> Result<Repr<'a>, Malformed> {
        let message = Message::new_checked(data)?;
        if !message.checksum_ok() {
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
    pub fn emit(&self, buffer: &mut [u8]) {
        let buffer = bytes::range_mut(buffer, 0, self.buffer_len());
        let (kind, code, first, second) = match *self {
            Repr::Echo { reply, ident, sequence, .. } => {
                (if reply { kind::ECHO_REPLY } else { kind::ECHO_REQUEST }, 0, ident, sequence)
            }
            Repr::Error { kind, code, mtu, .. } => (kind, code, 0, mtu),
        };
        bytes::put(buffer, 0, [kind, code]);
        bytes::put_u16(buffer, 4, first);
        bytes::put_u16(buffer, MTU_AT, second);
        bytes::put_slice(buffer, HEADER_LEN, self.payload());
        Message { buffer }.fill_checksum();
    }

    /// The IPv4 packet from `src` to `dst`.
    pub fn packet(&self, src: Ipv4Addr, dst: Ipv4Addr) -> Vec<u8> {
        let ip = ipv4::Repr {
            src,
            dst,
            protocol: proto::ICMP,
            ttl: 64,
            tos: 0,
            dont_fragment: false,
            payload_len: self.buffer_len(),
        };
        let mut packet = vec![0; ip.buffer_len()];
        ip.emit(&mut packet);
        self.emit(bytes::range_mut(&mut packet, ipv4::MIN_HEADER_LEN, usize::MAX));
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
                write!(f, "ICMP echo {word}, id {ident}, seq {sequence}")
            }
            Repr::Error { kind, code, mtu, .. } => {
                write!(f, "ICMP {}", kind_name(kind))?;
                match (kind, code) {
                    (kind::UNREACHABLE, unreachable::FRAGMENTATION_NEEDED) => {
                        write!(f, ", need to frag (mtu {mtu})")
                    }
                    _ => write!(f, ", code {code}"),
                }
            }
        }
    }
}

/// Name of a type, for display.
pub fn kind_name(kind: u8) -> &'static str {
    match kind {
        kind::ECHO_REPLY => "echo reply",
        kind::UNREACHABLE => "unreachable",
        kind::SOURCE_QUENCH => "source quench",
        kind::REDIRECT => "redirect",
        kind::ECHO_REQUEST => "echo request",
        kind::TIME_EXCEEDED => "time exceeded",
        kind::PARAMETER_PROBLEM => "parameter problem",
        _ => "of another type",
    }
}
