//! ICMP: echo requests are answered here, errors about packets of our flows go on to the end that they concern.
//!
//! | about | comes to | goes to | rewritten |
//! |---|---|---|---|
//! | an answer, `dsr` | VIP | backend (by MAC) | nothing |
//! | an answer, `nat-transparent` | VIP | backend | destination; quoted source |
//! | an answer, `nat` | VIP | backend | source := SNAT, destination; quoted source and destination |
//! | a forwarded packet, `nat` | SNAT | client | source := VIP, destination; quoted source and destination |
//! | a forwarded packet, `nat-transparent` | client | client | source := VIP; quoted destination |
//!
//! In `nat` the source becomes an address that the receiver already talks to: the router's own may be unreachable for it, or
//! filtered there (RFC 3704), and routers behind the VIP are nobody's business in front of it.

use std::net::IpAddr;

use crate::checksum::{Delta, L4Sum};
use crate::drops::Reason;
use crate::flow::{BackendSide, ClientSide};
use crate::plan::{Mode, Protocol};
use crate::wire::{Dissected, IpInfo, Quoted, Transport, bytes, icmpv4, icmpv6, proto};

use super::core::{Core, Cx, Size, Stop, check_offload};
use super::counters::Event;
use super::fragment::Route;
use super::frame::{Fence, FrameMut, Verdict};
use super::rewrite::{self, Ends};

/// Where an ICMP error goes, and what becomes of it.
struct Delivery {
    fence: Fence,
    towards: IpAddr,
    routed: bool,
    src: Option<IpAddr>,
    dst: Option<IpAddr>,
    quoted: Ends,
}

impl Core {
    /// An ICMP message other than neighbour discovery.
    pub(crate) fn icmp(
        &mut self,
        cx: &Cx<'_>,
        frame: &mut FrameMut<'_>,
        d: &Dissected,
        ip: &IpInfo,
        kind: u8,
    ) -> Result<Verdict, Stop> {
        let owned = cx.tables.owned(ip.dst);
        let not_matched = |reason: Reason| if owned.is_some() { Stop::Drop(reason) } else { Stop::NotOurs };
        let deliverable = if ip.is_v6() {
            icmpv6::is_error(kind)
        } else {
            use icmpv4::kind::{PARAMETER_PROBLEM, TIME_EXCEEDED, UNREACHABLE};
            matches!(kind, UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM)
        };
        if deliverable {
            let quoted = match Quoted::parse(frame.bytes, ip) {
                Ok(Some(quoted)) => quoted,
                Ok(None) => return Err(not_matched(Reason::IcmpUnsupported)),
                Err(malformed) => return Err(not_matched(malformed.into())),
            };
            return self.icmp_error(cx, frame, d, ip, &quoted);
        }
        let echo = if ip.is_v6() { icmpv6::kind::ECHO_REQUEST } else { icmpv4::kind::ECHO_REQUEST };
        match owned {
            Some(owned) if kind == echo => {
                let fence = cx.may_forward(owned.group)?;
                self.echo(cx, frame, d, ip, fence)
            }
            Some(owned) => {
                cx.may_forward(owned.group)?;
                Err(Reason::IcmpUnsupported.into())
            }
            None => Err(Stop::NotOurs),
        }
    }

    /// Answers an echo request in place (RFC 792, RFC 4443 §4.2). Fragments are answered one by one: a reply to the first is
    /// the first of the reply, because nothing but type and addresses differs.
    fn echo(
        &mut self,
        cx: &Cx<'_>,
        frame: &mut FrameMut<'_>,
        d: &Dissected,
        ip: &IpInfo,
        fence: Fence,
    ) -> Result<Verdict, Stop> {
        check_offload(frame, ip)?;
        let src_is_one = match ip.src {
            IpAddr::V4(a) => !(a.is_multicast() || a.is_broadcast() || a.is_unspecified()),
            IpAddr::V6(a) => !(a.is_multicast() || a.is_unspecified()),
        };
        if !src_is_one {
            return Err(Reason::IcmpUnsupported.into());
        }
        self.note_fragment(ip, cx.now, |_| Route::Echo { group: fence.group });
        let reply = if ip.is_v6() { icmpv6::kind::ECHO_REPLY } else { icmpv4::kind::ECHO_REPLY };
        let old = bytes::u16(frame.bytes, ip.l4);
        bytes::put_u8(frame.bytes, ip.l4, reply);
        let body = Delta::u16(old, bytes::u16(frame.bytes, ip.l4));
        let kind = if frame.offload.needs_csum { L4Sum::Partial } else { L4Sum::Complete };
        let at = ip.l4 + icmpv4::CHECKSUM_AT;
        let sum = kind.update(bytes::u16(frame.bytes, at), Delta::NONE, body);
        bytes::put_u16(frame.bytes, at, sum);
        self.turn_around(frame.bytes, d, ip);
        self.tally.event(Event::EchoAnswered);
        Ok(Verdict::Forward { port: cx.port_in, fence })
    }

    /// Delivers an ICMP error.
    fn icmp_error(
        &mut self,
        cx: &Cx<'_>,
        frame: &mut FrameMut<'_>,
        d: &Dissected,
        ip: &IpInfo,
        quoted: &Quoted,
    ) -> Result<Verdict, Stop> {
        let delivery = self.delivery(cx, ip, quoted)?;
        // From here on it is ours.
        if frame.offload.needs_csum {
            return Err(Reason::BadOffload.into());
        }
        if !checksum_ok(frame.bytes, ip) {
            return Err(Reason::BadChecksum.into());
        }
        if delivery.routed && ip.ttl <= 1 {
            return Err(Reason::TtlExceeded.into());
        }
        let way = self.way(cx, d, delivery.towards)?;
        if !delivery.routed && way.next_hop != delivery.towards {
            return Err(Reason::OffLink.into());
        }
        if Size::of(frame, ip).largest > way.mtu as usize {
            return Err(Reason::TooBig.into());
        }
        if delivery.routed {
            rewrite_quoted(frame.bytes, quoted, delivery.quoted);
            rewrite::put_addresses(frame.bytes, ip.l3, ip.is_v6(), delivery.src, delivery.dst);
            rewrite::decrement_ttl(frame.bytes, ip);
            // It was right a moment ago, so computing it anew hides no error.
            fill_checksum(frame.bytes, ip, delivery.src.unwrap_or(ip.src), delivery.dst.unwrap_or(ip.dst));
        }
        self.tally.event(Event::IcmpErrorForwarded);
        Ok(self.leave(frame, way, delivery.fence))
    }

    /// Whom an error concerns.
    fn delivery(&self, cx: &Cx<'_>, ip: &IpInfo, quoted: &Quoted) -> Result<Delivery, Stop> {
        let t = cx.tables;
        let owned = t.owned(ip.dst);
        let unmatched = if owned.is_some() { Stop::Drop(Reason::IcmpUnmatched) } else { Stop::NotOurs };
        if let Some(owned) = owned {
            cx.may_forward(owned.group)?;
        }
        // An error goes to the source of the packet that it quotes.
        if quoted.src != ip.dst {
            return Err(unmatched);
        }
        let (Some(protocol), Some((src_port, dst_port))) =
            (Protocol::from_number(quoted.proto), quoted.ports)
        else {
            return Err(unmatched);
        };
        if let Some(index) = t.service_at(quoted.src, src_port, protocol) {
            return self.about_answer(cx, index, (quoted.dst, dst_port));
        }
        if owned.is_some_and(|o| o.snat) {
            let key = BackendSide {
                protocol: quoted.proto,
                backend: quoted.dst,
                backend_port: dst_port,
                snat: quoted.src,
                snat_port: src_port,
            };
            let flow = self.flows.find_answered(&key).map(|id| self.flows.get(id)).ok_or(unmatched)?;
            let index = self.states.service(flow.service()).index.ok_or(unmatched)?;
            let service = &t.services()[usize::from(index)];
            let ClientSide { client, client_port, .. } = flow.client_side();
            return Ok(Delivery {
                fence: cx.may_forward(service.group)?,
                towards: client,
                routed: true,
                src: Some(service.vip),
                dst: Some(client),
                quoted: Ends { src: Some((client, client_port)), dst: Some((service.vip, service.port)) },
            });
        }
        let (index, _) = t.transparent_backend(quoted.dst, dst_port, protocol).ok_or(unmatched)?;
        if owned.is_some() || !self.is_foreign(ip.dst) {
            return Err(unmatched);
        }
        let service = &t.services()[usize::from(index)];
        Ok(Delivery {
            fence: cx.may_forward(service.group)?,
            towards: ip.dst,
            routed: true,
            src: Some(service.vip),
            dst: None,
            quoted: Ends { src: None, dst: Some((service.vip, service.port)) },
        })
    }

    /// An error about an answer from the service at `index` to `client`.
    fn about_answer(&self, cx: &Cx<'_>, index: u16, client: (IpAddr, u16)) -> Result<Delivery, Stop> {
        let service = &cx.tables.services()[usize::from(index)];
        let fence = cx.may_forward(service.group)?;
        let state = self.states.number(index);
        let key = ClientSide { service: state, client: client.0, client_port: client.1 };
        let flow = self.flows.find(&key).map(|id| self.flows.get(id));
        if service.mode == Mode::Nat {
            let bound = flow.and_then(|f| f.backend_side()).ok_or(Reason::IcmpUnmatched)?;
            return Ok(Delivery {
                fence,
                towards: bound.backend,
                routed: true,
                src: Some(bound.snat),
                dst: Some(bound.backend),
                quoted: Ends {
                    src: Some((bound.backend, bound.backend_port)),
                    dst: Some((bound.snat, bound.snat_port)),
                },
            });
        }
        let backend = match flow {
            Some(flow) => self.states.backend(flow.backend).index,
            None => {
                let slot = service.slot(service.hash(client.0, client.1));
                slot.base.or(slot.current)
            }
        };
        let backend = &service.backends[usize::from(backend.ok_or(Reason::NoBackend)?)];
        let routed = service.mode == Mode::NatTransparent;
        let ends = Ends { src: Some((backend.address, backend.port)), dst: None };
        Ok(Delivery {
            fence,
            towards: backend.address,
            routed,
            src: None,
            dst: routed.then_some(backend.address),
            quoted: if routed { ends } else { Ends::default() },
        })
    }
}

/// Gives a quoted packet its other ends, its checksums with them as far as they are quoted.
fn rewrite_quoted(data: &mut [u8], quoted: &Quoted, ends: Ends) {
    let (src, dst) = (ends.src.map(|e| e.0), ends.dst.map(|e| e.0));
    let pseudo = rewrite::put_addresses(data, quoted.l3, quoted.is_v6(), src, dst);
    let mut body = Delta::NONE;
    if let Some((_, port)) = ends.src {
        body = body.and(rewrite::put_u16(data, quoted.l4, port));
    }
    if let Some((_, port)) = ends.dst {
        body = body.and(rewrite::put_u16(data, quoted.l4 + 2, port));
    }
    if let Some(at) = quoted.checksum_at {
        let field = bytes::u16(data, at);
        let sum = match quoted.proto {
            proto::UDP => L4Sum::Complete.update_udp(field, pseudo, body),
            _ => L4Sum::Complete.update(field, pseudo, body),
        };
        bytes::put_u16(data, at, sum);
    }
}

fn checksum_ok(data: &[u8], ip: &IpInfo) -> bool {
    let message = bytes::range(data, ip.l4, ip.end);
    match (ip.transport, ip.v6()) {
        (Transport::Icmpv6 { .. }, Some((src, dst))) => {
            icmpv6::Message::new_checked(message).is_ok_and(|m| m.checksum_ok(src, dst))
        }
        _ => icmpv4::Message::new_checked(message).is_ok_and(|m| m.checksum_ok()),
    }
}

fn fill_checksum(data: &mut [u8], ip: &IpInfo, src: IpAddr, dst: IpAddr) {
    let message = bytes::range_mut(data, ip.l4, ip.end);
    match (src, dst) {
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            if let Ok(mut message) = icmpv6::Message::new_checked(message) {
                message.fill_checksum(src, dst);
            }
        }
        _ => {
            if let Ok(mut message) = icmpv4::Message::new_checked(message) {
                message.fill_checksum();
            }
        }
    }
}
