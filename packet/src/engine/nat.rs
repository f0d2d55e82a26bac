//! SNAT bindings, and answers from backends to clients.

use std::net::IpAddr;

use crate::drops::Reason;
use crate::flow::{BackendSide, ClientSide, Direction, Segment};
use crate::hash;
use crate::plan::Protocol;
use crate::tables::{Backend, HASH_SEED, Service, Tables};
use crate::wire::{Dissected, IpInfo};

use super::beside::Reservation;
use super::core::{Core, Cx, IcmpError, Size, Stop, check_offload};
use super::counters::Event;
use super::fragment::Route;
use super::frame::{FrameMut, Verdict};
use super::rewrite::{self, End, Ends};

/// First SNAT port: those below are for servers (RFC 6335 §6).
pub const SNAT_PORT_MIN: u16 = 1024;
/// Last SNAT port.
pub const SNAT_PORT_MAX: u16 = 65_535;
/// First of the upper ports: bound by the engine alone. Those below are bound by a program beside it, too, so there the engine reserves
/// them first (RFC 6335 §6: the upper ones are the dynamic ports).
pub const SNAT_PORT_UPPER: u16 = 49_152;
/// Ports that are tried on one address before the flow is refused. With 95 % of an address's ports to one backend in use,
/// in random places, one new flow in 700 finds 128 taken; the work for a packet stays bounded.
const PROBES: u32 = 128;
/// Addresses that are tried.
const PROBED_ADDRESSES: usize = 4;
/// Flows with a lower port whose backend was not heard yet, beside a program that has all of them: what a flood can make of entries
/// there. At 100 000 new flows a second it is enough for backends that answer within 80 ms; what goes beyond has an upper port.
pub(crate) const MAX_HALF_OPEN: u32 = 8192;

/// SNAT ports of one address: first and number.
type Part = (u16, u32);
const LOWER: Part = (SNAT_PORT_MIN, (SNAT_PORT_UPPER - SNAT_PORT_MIN) as u32);
const UPPER: Part = (SNAT_PORT_UPPER, SNAT_PORT_MAX as u32 - SNAT_PORT_UPPER as u32 + 1);

/// Whether a program beside the engine binds such ports, too.
pub(crate) fn is_lower(snat_port: u16) -> bool {
    snat_port < SNAT_PORT_UPPER
}

/// Names that a flow could have on the backend's side, in the order in which they are tried.
struct Candidates<'a> {
    service: &'a Service,
    backend: &'a Backend,
    hash: u32,
}

impl Candidates<'_> {
    fn of(&self, (start, ports): Part) -> impl Iterator<Item = BackendSide> {
        let Candidates { service, backend, hash } = *self;
        let addresses = service.snat.len();
        let first = hash::scale(hash, addresses as u32 * ports);
        let turns = 0..addresses.min(PROBED_ADDRESSES);
        turns.flat_map(move |turn| {
            let snat = service.snat[((first / ports) as usize + turn) % addresses];
            (0..PROBES).map(move |probe| BackendSide {
                protocol: service.protocol.number(),
                backend: backend.address,
                backend_port: backend.port,
                snat,
                snat_port: start + ((first % ports + probe) % ports) as u16,
            })
        })
    }
}

impl Core {
    /// A free SNAT address and port for a flow: the first free one from a place that follows from client, service and
    /// backend, so that a node that takes over finds nearly always the same. Where there is none, over TCP, a flow whose backend was
    /// never heard makes room: a flood of SYNs takes ports from itself.
    pub(crate) fn bind(
        &mut self,
        tables: &Tables,
        service: &Service,
        backend: u16,
        client_side: &ClientSide,
    ) -> Result<BackendSide, Reason> {
        let backend = &service.backends[usize::from(backend)];
        let ClientSide { client, client_port, .. } = *client_side;
        let hash = hash::snat(HASH_SEED, client, client_port, service.id, backend.id);
        let candidates = Candidates { service, backend, hash };
        let tcp = service.protocol == Protocol::Tcp;
        // A SNAT address that is also a VIP: its services' ports are taken.
        let serves = |c: &BackendSide| tables.service_at(c.snat, c.snat_port, service.protocol).is_some();
        // Beyond the half-open ones that a program may have, over UDP, whose backends need never answer, the lower ones come last.
        let parts: &[Part] = match (self.cache.is_some() && self.half_open >= MAX_HALF_OPEN, tcp) {
            (false, _) => &[LOWER, UPPER],
            (true, true) => &[UPPER],
            (true, false) => &[UPPER, LOWER],
        };
        for part in parts {
            let shared = self.cache.is_some() && is_lower(part.0);
            for candidate in candidates.of(*part) {
                if serves(&candidate) || self.flows.find_answered(&candidate).is_some() {
                    continue;
                }
                match self.cache.as_mut().filter(|_| shared).map(|cache| cache.reserve(&candidate)) {
                    None | Some(Reservation::Made) => return Ok(candidate),
                    Some(Reservation::Taken) => {}
                    Some(Reservation::NoRoom) => break,
                }
            }
        }
        if tcp {
            let half_open = candidates.of(UPPER).find_map(|candidate| {
                let id = self.flows.find_answered(&candidate)?;
                (!self.flows.get(id).is_answered()).then_some((id, candidate))
            });
            if let Some((id, candidate)) = half_open {
                self.forget(id);
                self.tally.event(Event::FlowEvicted);
                return Ok(candidate);
            }
        }
        Err(Reason::NoSnatPort)
    }

    /// A packet to a SNAT address: an answer of a backend, or nothing of ours.
    pub(crate) fn answer_bound(
        &mut self,
        cx: &Cx<'_>,
        frame: &mut FrameMut<'_>,
        d: &Dissected,
        ip: &IpInfo,
        protocol: Protocol,
        segment: Segment,
    ) -> Result<Verdict, Stop> {
        if let Some(owned) = cx.tables.owned(ip.dst) {
            cx.may_forward(owned.group)?;
        }
        let (backend_port, snat_port) = ip.ports().ok_or(Reason::NoBinding)?;
        let key = BackendSide {
            protocol: protocol.number(),
            backend: ip.src,
            backend_port,
            snat: ip.dst,
            snat_port,
        };
        let id = self.flows.find_answered(&key).ok_or(Reason::NoBinding)?;
        let flow = self.flows.get(id);
        let (number, client) = (flow.backend, flow.client_side());
        let index = self.states.service(flow.service()).index.ok_or(Reason::NoService)?;
        let service = &cx.tables.services()[usize::from(index)];
        let ends =
            Ends { src: Some((service.vip, service.port)), dst: Some((client.client, client.client_port)) };
        let verdict =
            self.forward_answer(cx, frame, d, ip, service, number, (client.client, ip.dst), ends)?;
        self.touch(id, segment, Direction::ToClient, service.idle, cx.now);
        Ok(verdict)
    }

    /// A packet from a `nat-transparent` backend to a client.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn answer_transparent(
        &mut self,
        cx: &Cx<'_>,
        frame: &mut FrameMut<'_>,
        d: &Dissected,
        ip: &IpInfo,
        index: u16,
        backend: u16,
        segment: Segment,
    ) -> Result<Verdict, Stop> {
        let service = &cx.tables.services()[usize::from(index)];
        let number = self.states.backend_number(index, backend);
        let ends = Ends { src: Some((service.vip, service.port)), dst: None };
        let verdict =
            self.forward_answer(cx, frame, d, ip, service, number, (ip.dst, service.inside), ends)?;
        // The way back needs no flow; where flows are remembered at all, it still tells when one ends.
        let state = self.states.number(index);
        if self.states.service(state).remembered > 0
            && let Some((_, client_port)) = ip.ports()
            && let Some(id) = self.flows.find(&ClientSide { service: state, client: ip.dst, client_port })
        {
            self.touch(id, segment, Direction::ToClient, service.idle, cx.now);
        }
        Ok(verdict)
    }

    /// What both have in common. `client` is where it goes, `router` who tells the backend when it can't.
    #[allow(clippy::too_many_arguments)]
    fn forward_answer(
        &mut self,
        cx: &Cx<'_>,
        frame: &mut FrameMut<'_>,
        d: &Dissected,
        ip: &IpInfo,
        service: &Service,
        number: u32,
        (client, router): (IpAddr, IpAddr),
        ends: Ends,
    ) -> Result<Verdict, Stop> {
        let fence = cx.may_forward(service.group)?;
        check_offload(frame, ip)?;
        if ip.ttl <= 1 {
            return Err(Stop::Error(fence, router, IcmpError::TtlExceeded));
        }
        let way = self.way(cx, d, client)?;
        let size = Size::of(frame, ip);
        if size.largest > way.mtu as usize {
            return Err(Stop::Error(fence, router, IcmpError::TooBig { mtu: way.mtu }));
        }
        let address = |end: Option<End>| end.map(|e| e.0);
        let life = self.states.backend(number).life;
        self.note_fragment(ip, cx.now, |_| Route::Forward {
            group: service.group,
            backend: (number, life),
            to_backend: false,
            routed: true,
            src: address(ends.src),
            dst: address(ends.dst),
            towards: client,
        });
        rewrite::rewrite(frame.bytes, ip, &frame.offload, ends);
        rewrite::decrement_ttl(frame.bytes, ip);
        self.count(number, life, size, false);
        Ok(self.leave(frame, way, fence))
    }
}
