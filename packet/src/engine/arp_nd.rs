//! ARP (RFC 826, RFC 5227) and neighbour discovery (RFC 4861) for the addresses of the plan, under the lease.
//!
//! Requests, probes and solicitations, multicast or unicast, are answered; a solicitation from the unspecified address (duplicate
//! address detection, RFC 4862 §5.4.3) by an advertisement to all nodes, which makes the other side give the address up. A message by
//! which somebody else claims an address that we hold the lease for is reported, so that the lane announces it again.

use std::net::IpAddr;

use crate::drops::Reason;
use crate::neighbour::Mac;
use crate::wire::{Dissected, IpInfo, arp, bytes, ethernet, icmpv6, ndp, proto};

use super::core::{Core, Cx, Stop};
use super::counters::Event;
use super::frame::{Port, Verdict};
use super::{Claim, MAX_CLAIMS};

/// Whether an ICMPv6 type belongs to neighbour discovery (RFC 4861 §4).
pub(crate) fn is_discovery(kind: u8) -> bool {
    (icmpv6::kind::ROUTER_SOLICITATION..=icmpv6::kind::REDIRECT).contains(&kind)
}

impl Core {
    /// An ARP frame.
    pub(crate) fn arp(
        &mut self,
        cx: &Cx<'_>,
        frame: &[u8],
        d: &Dissected,
        own: Mac,
    ) -> Result<Verdict, Stop> {
        let Ok(message) = arp::Repr::parse(bytes::range(frame, d.l3, usize::MAX)) else {
            return Err(Stop::NotOurs);
        };
        if self.is_own_mac(message.sender_mac) {
            return Err(Stop::NotOurs);
        }
        if let Some(claimed) = message.claimed()
            && let Some(owned) = cx.tables.owned(claimed.into())
        {
            return self.claimed(cx, owned.group, claimed.into(), message.sender_mac);
        }
        let target = IpAddr::from(message.target_ip);
        let (Some(reply), Some(group)) = (message.reply(own), self.answered_here(cx, target)) else {
            return Err(Stop::NotOurs);
        };
        let fence = cx.may_answer(group)?;
        if !ethernet::is_unicast(message.sender_mac) {
            return Err(Reason::BadField.into());
        }
        self.begin_reply(frame, d.l3, message.sender_mac, own);
        let at = self.reply.len();
        self.reply.resize(at + reply.buffer_len(), 0);
        reply.emit(bytes::range_mut(&mut self.reply, at, usize::MAX));
        self.tally.event(Event::ArpAnswered);
        Ok(Verdict::Reply { port: cx.port_in, fence })
    }

    /// A message of neighbour discovery.
    pub(crate) fn discovery(
        &mut self,
        cx: &Cx<'_>,
        frame: &[u8],
        d: &Dissected,
        ip: &IpInfo,
        own: Mac,
    ) -> Result<Verdict, Stop> {
        let message = match ndp::Repr::parse(frame, ip) {
            Ok(Some(message)) => message,
            // Routers' business.
            Ok(None) => return Err(Stop::NotOurs),
            Err(malformed) => {
                let target = IpAddr::from(bytes::array::<16>(bytes::range(frame, ip.l4, ip.end), 8));
                let ours = cx.tables.owned(target).is_some();
                return Err(if ours { malformed.into() } else { Stop::NotOurs });
            }
        };
        if self.is_own_mac(d.src) {
            return Err(Stop::NotOurs);
        }
        let (src, _) = ip.v6().ok_or(Stop::NotOurs)?;
        match message {
            ndp::Repr::Advertisement { target, target_mac, .. } => {
                let mac = target_mac.unwrap_or(d.src);
                match cx.tables.owned(target.into()) {
                    Some(owned) if !self.is_own_mac(mac) => self.claimed(cx, owned.group, target.into(), mac),
                    _ => Err(Stop::NotOurs),
                }
            }
            ndp::Repr::Solicitation { target, source_mac } => {
                let group = self.answered_here(cx, target.into()).ok_or(Stop::NotOurs)?;
                let fence = cx.may_answer(group)?;
                let (answer, dst) = message.answer(src, own, false).ok_or(Stop::NotOurs)?;
                let dst_mac = match source_mac {
                    _ if dst.is_multicast() => ndp::multicast_mac(dst),
                    Some(mac) if ethernet::is_unicast(mac) => mac,
                    _ => d.src,
                };
                self.begin_reply(frame, d.l3, dst_mac, own);
                let (from, to) = (IpAddr::V6(target), IpAddr::V6(dst));
                let data = self.add_packet(from, to, proto::ICMPV6, ndp::HOP_LIMIT, answer.buffer_len());
                answer.emit(data, target, dst);
                self.tally.event(Event::NdAnswered);
                Ok(Verdict::Reply { port: cx.port_in, fence })
            }
        }
    }

    /// Somebody else claims an address of ours. Without the lease it is simply another node's.
    fn claimed(&mut self, cx: &Cx<'_>, group: u32, address: IpAddr, mac: Mac) -> Result<Verdict, Stop> {
        if cx.may_answer(group).is_err() {
            return Err(Stop::NotOurs);
        }
        let known = self.claims.iter().any(|c| c.address == address);
        if !known && self.claims.len() < MAX_CLAIMS {
            self.claims.push_back(Claim { group, address, mac, port: cx.port_in });
        }
        self.tally.event(Event::ForeignClaim);
        Ok(Verdict::NotOurs)
    }

    /// Group of an address that is answered for on the port that the frame came by.
    fn answered_here(&self, cx: &Cx<'_>, address: IpAddr) -> Option<u32> {
        let owned = cx.tables.owned(address)?;
        let port = self.answering_port(owned, address);
        port.is_none_or(|p| p == cx.port_in).then_some(owned.group)
    }

    /// Port that an address is answered for on; `None`: every port.
    pub(crate) fn answering_port(&self, owned: &crate::tables::Owned, address: IpAddr) -> Option<Port> {
        let addresses = |port: Port| self.ports[port as usize].as_ref().map(|p| p.addresses.as_slice());
        owned.port(address, addresses(Port::Inside), addresses(Port::Service).unwrap_or(&[]))
    }

    fn is_own_mac(&self, mac: Mac) -> bool {
        self.ports.iter().flatten().any(|p| p.mac == mac)
    }
}
