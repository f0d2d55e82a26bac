//! Answers that the engine makes itself about frames that it drops: RST (RFC 9293) and ICMP errors (RFC 792, RFC 4443).
//!
//! An answer goes back the way its cause came: to the frame's source MAC, by the same port, with the same VLAN tags.

use std::net::IpAddr;

use crate::drops::Reason;
use crate::neighbour::Mac;
use crate::wire::{
    Dissected, Fragment, IpInfo, Net, Transport, bytes, icmpv4, icmpv6, ipv4, ipv6, proto, tcp,
};

use super::core::{Core, Cx, IcmpError, Stop};
use super::counters::Event;
use super::frame::{Fence, FrameMut, Verdict};

/// TTL and hop limit of what the engine sends itself (RFC 1700's default).
pub(crate) const TTL: u8 = 64;
/// Longest answer: an ICMPv6 error of 1280 bytes behind an Ethernet header with two tags.
pub(crate) const REPLY_CAPACITY: usize = 1280 + 14 + 8;

impl Core {
    /// Begins an answer: Ethernet header from `own` to `dst`, tags and EtherType as in `frame`.
    pub(crate) fn begin_reply(&mut self, frame: &[u8], l3: usize, dst: Mac, own: Mac) {
        self.reply.clear();
        self.reply.extend_from_slice(&dst);
        self.reply.extend_from_slice(&own);
        self.reply.extend_from_slice(bytes::range(frame, 12, l3));
    }

    /// Adds an IP header from `src` to `dst` and `len` zeroed bytes behind it, which are returned.
    pub(crate) fn add_packet(
        &mut self,
        src: IpAddr,
        dst: IpAddr,
        proto: u8,
        ttl: u8,
        len: usize,
    ) -> &mut [u8] {
        let l3 = self.reply.len();
        let header = match src {
            IpAddr::V4(_) => ipv4::MIN_HEADER_LEN,
            IpAddr::V6(_) => ipv6::HEADER_LEN,
        };
        self.reply.resize(l3 + header + len, 0);
        let packet = bytes::range_mut(&mut self.reply, l3, usize::MAX);
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let repr = ipv4::Repr {
                    src,
                    dst,
                    protocol: proto,
                    ttl,
                    tos: 0,
                    dont_fragment: true,
                    payload_len: len,
                };
                repr.emit(packet);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let repr = ipv6::Repr {
                    src,
                    dst,
                    next_header: proto,
                    hop_limit: ttl,
                    traffic_class: 0,
                    payload_len: len,
                };
                repr.emit(packet);
            }
            // Both come from one packet, or from a service and a packet to it.
            _ => {}
        }
        bytes::range_mut(&mut self.reply, l3 + header, usize::MAX)
    }

    /// Answers a TCP segment by an RST.
    pub(crate) fn send_reset(
        &mut self,
        cx: &Cx<'_>,
        frame: &FrameMut<'_>,
        d: &Dissected,
        fence: Fence,
    ) -> Result<Verdict, Stop> {
        let Net::Ip(ip) = &d.net else { return Err(Stop::NotOurs) };
        let segment = tcp::Segment::new_checked(bytes::range(frame.bytes, ip.l4, ip.end))?;
        let Some(reset) = tcp::Repr::reset_for(&segment, segment.payload().len()) else {
            return Err(Reason::DeadBackend.into());
        };
        if !self.answers.take(cx.now) {
            return Err(Reason::AnswerRate.into());
        }
        self.begin_reply(frame.bytes, ip.l3, d.src, d.dst);
        let data = self.add_packet(ip.dst, ip.src, proto::TCP, TTL, reset.buffer_len());
        reset.emit(data, ip.dst, ip.src);
        self.tally.event(Event::ResetSent);
        Ok(Verdict::Reply { port: cx.port_in, fence })
    }

    /// Drops a packet and tells its sender why, where that is allowed (RFC 1122 §3.2.2, RFC 4443 §2.4 (e)) and not too often.
    pub(crate) fn send_error(
        &mut self,
        cx: &Cx<'_>,
        frame: &FrameMut<'_>,
        d: &Dissected,
        fence: Fence,
        from: IpAddr,
        error: IcmpError,
    ) -> Verdict {
        let reason = match error {
            IcmpError::TtlExceeded => Reason::TtlExceeded,
            IcmpError::TooBig { .. } => Reason::TooBig,
        };
        self.tally.drop(reason);
        let Net::Ip(ip) = &d.net else { return Verdict::Drop(reason) };
        if !may_be_told(ip) || from.is_ipv6() != ip.is_v6() || !self.answers.take(cx.now) {
            return Verdict::Drop(reason);
        }
        self.begin_reply(frame.bytes, ip.l3, d.src, d.dst);
        let quoted = bytes::range(frame.bytes, ip.l3, ip.end);
        match (from, ip.src) {
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let (kind, mtu) = match error {
                    IcmpError::TtlExceeded => (icmpv6::kind::TIME_EXCEEDED, 0),
                    IcmpError::TooBig { mtu } => (icmpv6::kind::PACKET_TOO_BIG, mtu),
                };
                let error = icmpv6::Repr::Error { kind, code: 0, mtu, quoted };
                let data = self.add_packet(from, ip.src, proto::ICMPV6, TTL, error.buffer_len());
                error.emit(data, src, dst);
            }
            _ => {
                let (kind, code, mtu) = match error {
                    IcmpError::TtlExceeded => (icmpv4::kind::TIME_EXCEEDED, 0, 0),
                    IcmpError::TooBig { mtu } => {
                        let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
                        (icmpv4::kind::UNREACHABLE, icmpv4::unreachable::FRAGMENTATION_NEEDED, mtu)
                    }
                };
                let error = icmpv4::Repr::Error { kind, code, mtu, quoted };
                let data = self.add_packet(from, ip.src, proto::ICMP, TTL, error.buffer_len());
                error.emit(data);
            }
        }
        self.tally.event(Event::IcmpErrorSent);
        Verdict::Reply { port: cx.port_in, fence }
    }
}

/// Whether a packet may cause an ICMP error: not an ICMP error itself, no later fragment, and from one sender.
fn may_be_told(ip: &IpInfo) -> bool {
    let one = match ip.src {
        IpAddr::V4(a) => !(a.is_multicast() || a.is_broadcast() || a.is_unspecified() || a.is_loopback()),
        IpAddr::V6(a) => !(a.is_multicast() || a.is_unspecified() || a.is_loopback()),
    };
    one && matches!(ip.transport, Transport::Tcp { .. } | Transport::Udp { .. })
        && !matches!(ip.fragment, Fragment::Later { .. })
}
