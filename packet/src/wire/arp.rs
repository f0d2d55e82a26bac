//! ARP for IPv4 over Ethernet (RFC 826), with announcements and probes (RFC 5227).

use std::fmt;
use std::net::Ipv4Addr;

use super::ethernet::{self, BROADCAST, EtherType, Mac};
use super::{Malformed, bytes};

/// Length of a packet for IPv4 over Ethernet.
pub const LEN: usize = 28;
/// Length of an untagged frame that holds one. Drivers pad it to what their medium asks for.
pub const FRAME_LEN: usize = ethernet::HEADER_LEN + LEN;

mod field {
    pub const HARDWARE: usize = 0;
    pub const PROTOCOL: usize = 2;
    pub const HARDWARE_LEN: usize = 4;
    pub const PROTOCOL_LEN: usize = 5;
    pub const OPERATION: usize = 6;
    pub const SENDER_MAC: usize = 8;
    pub const SENDER_IP: usize = 14;
    pub const TARGET_MAC: usize = 18;
    pub const TARGET_IP: usize = 24;
}

const HARDWARE_ETHERNET: u16 = 1;

/// A view of a packet for IPv4 over Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`, which may hold padding after the packet.
    ///
    /// # Errors
    /// `Truncated`; `BadField` when it is not for IPv4 over Ethernet.
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        let data = buffer.as_ref();
        if data.len() < LEN {
            return Err(Malformed::Truncated);
        }
        if bytes::u16(data, field::HARDWARE) != HARDWARE_ETHERNET
            || bytes::u16(data, field::PROTOCOL) != EtherType::IPV4.0
            || bytes::u8(data, field::HARDWARE_LEN) != 6
            || bytes::u8(data, field::PROTOCOL_LEN) != 4
        {
            return Err(Malformed::BadField);
        }
        Ok(Packet { buffer })
    }

    /// Operation number.
    pub fn operation(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::OPERATION)
    }

    /// Sender's hardware address.
    pub fn sender_mac(&self) -> Mac {
        bytes::array(self.buffer.as_ref(), field::SENDER_MAC)
    }

    /// Sender's protocol address.
    pub fn sender_ip(&self) -> Ipv4Addr {
        Ipv4Addr::from(bytes::array::<4>(self.buffer.as_ref(), field::SENDER_IP))
    }

    /// Target's hardware address; not meaningful in a request.
    pub fn target_mac(&self) -> Mac {
        bytes::array(self.buffer.as_ref(), field::TARGET_MAC)
    }

    /// Target's protocol address.
    pub fn target_ip(&self) -> Ipv4Addr {
        Ipv4Addr::from(bytes::array::<4>(self.buffer.as_ref(), field::TARGET_IP))
    }
}

/// Operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Who has the target address?
    Request,
    /// The sender has the sender address.
    Reply,
}

/// An ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Repr {
    /// Operation.
    pub operation: Operation,
    /// Sender's hardware address.
    pub sender_mac: Mac,
    /// Sender's protocol address; unspecified in a probe (RFC 5227 §2.1.1).
    pub sender_ip: Ipv4Addr,
    /// Target's hardware address; zero in a request.
    pub target_mac: Mac,
    /// Target's protocol address.
    pub target_ip: Ipv4Addr,
}

impl Repr {
    /// Reads `data`, the payload of an ARP frame.
    ///
    /// # Errors
    /// As [`Packet::new_checked`]; `BadField` for operations other than request and reply.
    pub fn parse(data: &[u8]) -> Result<Repr, Malformed> {
        let packet = Packet::new_checked(data)?;
        let operation = match packet.operation() {
            1 => Operation::Request,
            2 => Operation::Reply,
            _ => return Err(Malformed::BadField),
        };
        Ok(Repr {
            operation,
            sender_mac: packet.sender_mac(),
            sender_ip: packet.sender_ip(),
            target_mac: packet.target_mac(),
            target_ip: packet.target_ip(),
        })
    }

    /// Whether it says that the sender has the sender address, about which nobody asked it (RFC 5227 §1.1, §3).
    pub fn is_announcement(&self) -> bool {
        self.sender_ip == self.target_ip
    }

    /// Whether it asks if anybody has the target address before the sender takes it (RFC 5227 §2.1.1).
    pub fn is_probe(&self) -> bool {
        self.operation == Operation::Request && self.sender_ip.is_unspecified()
    }

    /// The address that the sender claims as its own: none in a probe.
    pub fn claimed(&self) -> Option<Ipv4Addr> {
        (!self.sender_ip.is_unspecified()).then_some(self.sender_ip)
    }

    /// The reply to this request on behalf of the target address, which `mac` answers for. None to a reply.
    pub fn reply(&self, mac: Mac) -> Option<Repr> {
        (self.operation == Operation::Request).then_some(Repr {
            operation: Operation::Reply,
            sender_mac: mac,
            sender_ip: self.target_ip,
            target_mac: self.sender_mac,
            target_ip: self.sender_ip,
        })
    }

    /// Length in bytes.
    pub fn buffer_len(&self) -> usize {
        LEN
    }

    /// Writes the packet at the start of `buffer`, which must hold [`LEN`] bytes.
    pub fn emit(&self, buffer: &mut [u8]) {
        let operation = match self.operation {
            Operation::Request => 1,
            Operation::Reply => 2,
        };
        bytes::put_u16(buffer, field::HARDWARE, HARDWARE_ETHERNET);
        bytes::put_u16(buffer, field::PROTOCOL, EtherType::IPV4.0);
        bytes::put_u8(buffer, field::HARDWARE_LEN, 6);
        bytes::put_u8(buffer, field::PROTOCOL_LEN, 4);
        bytes::put_u16(buffer, field::OPERATION, operation);
        bytes::put(buffer, field::SENDER_MAC, self.sender_mac);
        bytes::put(buffer, field::SENDER_IP, self.sender_ip.octets());
        bytes::put(buffer, field::TARGET_MAC, self.target_mac);
        bytes::put(buffer, field::TARGET_IP, self.target_ip.octets());
    }

    /// The untagged frame from `src` to `dst`.
    pub fn frame(&self, dst: Mac, src: Mac) -> [u8; FRAME_LEN] {
        let mut frame = [0; FRAME_LEN];
        ethernet::emit(&mut frame, dst, src, EtherType::ARP);
        self.emit(bytes::range_mut(&mut frame, ethernet::HEADER_LEN, FRAME_LEN));
        frame
    }

    /// An announcement in the request form: sender and target are `address` (RFC 5227 §2.3). To be broadcast.
    pub fn announcement(address: Ipv4Addr, mac: Mac) -> Repr {
        Repr {
            operation: Operation::Request,
            sender_mac: mac,
            sender_ip: address,
            target_mac: [0; 6],
            target_ip: address,
        }
    }

    /// An announcement in the reply form, for hosts that learn from replies only; the target's hardware address is the
    /// new one (RFC 5944 §4.6). To be broadcast.
    pub fn unsolicited_reply(address: Ipv4Addr, mac: Mac) -> Repr {
        Repr { operation: Operation::Reply, target_mac: mac, ..Repr::announcement(address, mac) }
    }

    /// A question for `target`; from no address it is a probe, which leaves no trace in anybody's cache (RFC 5227
    /// §2.1.1). To be broadcast.
    pub fn request(target: Ipv4Addr, sender: Option<Ipv4Addr>, mac: Mac) -> Repr {
        Repr {
            operation: Operation::Request,
            sender_mac: mac,
            sender_ip: sender.unwrap_or(Ipv4Addr::UNSPECIFIED),
            target_mac: [0; 6],
            target_ip: target,
        }
    }

    /// Where announcements and requests go.
    pub const TO_ALL: Mac = BROADCAST;
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.operation {
            Operation::Request => write!(f, "ARP who-has {} tell {}", self.target_ip, self.sender_ip),
            Operation::Reply => write!(f, "ARP {} is-at {}", self.sender_ip, ethernet::show(self.sender_mac)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: [u8; FRAME_LEN] = [
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0, 0, 0, 0, 0x0a, 0x08, 0x06, // Ethernet
        0, 1, 8, 0, 6, 4, 0, 1, // for IPv4 over Ethernet, request
        0x02, 0, 0, 0, 0, 0x0a, 192, 0, 2, 10, // sender
        0, 0, 0, 0, 0, 0, 192, 0, 2, 100, // target
    ];
    const ASKER: Mac = [0x02, 0, 0, 0, 0, 0x0a];
    const OURS: Mac = [0x02, 0, 0, 0, 0, 0x01];

    #[test]
    fn a_request_is_read_and_written() {
        let repr = Repr::parse(&REQUEST[14..]).unwrap();
        assert_eq!(repr.to_string(), "ARP who-has 192.0.2.100 tell 192.0.2.10");
        assert_eq!(repr.frame(BROADCAST, ASKER), REQUEST);
        let mut poisoned = [0xa5; LEN];
        repr.emit(&mut poisoned);
        assert_eq!(poisoned, REQUEST[14..]);
    }

    #[test]
    fn the_reply_goes_to_the_asker() {
        let reply = Repr::parse(&REQUEST[14..]).unwrap().reply(OURS).unwrap();
        assert_eq!(reply.to_string(), "ARP 192.0.2.100 is-at 02:00:00:00:00:01");
        assert_eq!((reply.target_mac, reply.target_ip), (ASKER, Ipv4Addr::new(192, 0, 2, 10)));
        assert_eq!(reply.reply(OURS), None);
    }

    #[test]
    fn announcements_and_probes_are_told_apart() {
        let vip = Ipv4Addr::new(192, 0, 2, 100);
        for repr in [Repr::announcement(vip, OURS), Repr::unsolicited_reply(vip, OURS)] {
            assert!(repr.is_announcement() && !repr.is_probe());
            assert_eq!(repr.claimed(), Some(vip));
        }
        let probe = Repr::request(vip, None, OURS);
        assert!(probe.is_probe() && !probe.is_announcement());
        assert_eq!(probe.claimed(), None);
    }

    #[test]
    fn what_is_not_for_ipv4_over_ethernet_is_refused() {
        for at in [1, 3, 4, 5, 7] {
            let mut packet = REQUEST[14..].to_vec();
            packet[at] = 9;
            assert_eq!(Repr::parse(&packet), Err(Malformed::BadField), "byte {at}");
        }
        assert_eq!(Repr::parse(&REQUEST[14..41]), Err(Malformed::Truncated));
    }
}
