//! From the client to the backend, in every mode.

use crate::drops::Reason;
use crate::flow::{ClientSide, FlowId, NewFlow, Segment};
use crate::plan::Mode;
use crate::tables::Tables;
use crate::time::BootTime;
use crate::wire::{Dissected, IpInfo};

use super::core::{Core, Cx, IcmpError, Size, Stop, check_offload};
use super::counters::Event;
use super::fragment::Route;
use super::frame::{FrameMut, Verdict};
use super::kept::patience;
use super::nat::is_lower;
use super::rewrite::{self, Ends};
use super::select::{Chosen, NoChoice, Remember};

impl Core {
    /// A packet of a client to the service at `index`.
    ///
    /// In `dsr` the TTL is not touched: the frame is passed on within its segment, as a bridge does, and not a byte of the IP
    /// packet changes. In the NAT modes it is routed and loses a hop (RFC 1812 §5.3.1), so that a loop between balancers ends.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn forward_request(
        &mut self,
        cx: &Cx<'_>,
        frame: &mut FrameMut<'_>,
        d: &Dissected,
        ip: &IpInfo,
        index: u16,
        client_port: u16,
        segment: Segment,
    ) -> Result<Verdict, Stop> {
        let service = &cx.tables.services()[usize::from(index)];
        let fence = cx.may_forward(service.group)?;
        check_offload(frame, ip)?;
        let routed = service.mode != Mode::Dsr;
        if routed && ip.ttl <= 1 {
            return Err(Stop::Error(fence, ip.dst, IcmpError::TtlExceeded));
        }
        let chosen = match self.choose(cx.tables, index, ip.src, client_port, segment, cx.now) {
            Ok(chosen) => chosen,
            Err(NoChoice::Drop(reason)) => return Err(reason.into()),
            Err(NoChoice::Reset) => return Err(Stop::Reset(fence)),
        };
        let backend = &service.backends[usize::from(chosen.backend)];
        let way = self.way(cx, d, backend.address)?;
        if !routed && way.next_hop != backend.address {
            return Err(Reason::OffLink.into());
        }
        let size = Size::of(frame, ip);
        if size.largest > way.mtu as usize {
            return Err(Stop::Error(fence, ip.dst, IcmpError::TooBig { mtu: way.mtu }));
        }
        let client_side = ClientSide { service: self.states.number(index), client: ip.src, client_port };
        let flow = self.remember(cx.tables, index, &chosen, client_side, segment, cx.now)?;
        let ends = match (service.mode, flow) {
            (Mode::Dsr, _) => Ends::default(),
            (Mode::NatTransparent, _) => Ends { src: None, dst: Some((backend.address, backend.port)) },
            (Mode::Nat, flow) => {
                let bound = flow.and_then(|id| self.flows.get(id).backend_side()).ok_or(Reason::NoBinding)?;
                Ends {
                    src: Some((bound.snat, bound.snat_port)),
                    dst: Some((bound.backend, bound.backend_port)),
                }
            }
        };
        self.note_fragment(ip, cx.now, |core| Route::Forward {
            group: service.group,
            backend: (chosen.number, core.states.backend(chosen.number).life),
            to_backend: true,
            routed,
            src: ends.src.map(|e| e.0),
            dst: ends.dst.map(|e| e.0),
            towards: backend.address,
        });
        if routed {
            rewrite::rewrite(frame.bytes, ip, &frame.offload, ends);
            rewrite::decrement_ttl(frame.bytes, ip);
        }
        let state = self.states.backend_mut(chosen.number);
        state.new_flows += u64::from(chosen.opens);
        if flow.is_none() {
            state.seen.add(chosen.hash, cx.now);
        }
        let life = state.life;
        self.count(chosen.number, life, size, true);
        Ok(self.leave(frame, way, fence))
    }

    /// Remembers the flow of a chosen backend, where that is asked for.
    fn remember(
        &mut self,
        tables: &Tables,
        index: u16,
        chosen: &Chosen,
        client_side: ClientSide,
        segment: Segment,
        now: BootTime,
    ) -> Result<Option<FlowId>, Reason> {
        if chosen.flow.is_some() {
            return Ok(chosen.flow);
        }
        let bound = tables.services()[usize::from(index)].mode == Mode::Nat;
        if chosen.remember == Remember::No && !bound {
            return Ok(None);
        }
        match self.insert(tables, index, chosen, client_side, segment, now) {
            Ok(id) => Ok(Some(id)),
            Err(_) if chosen.remember == Remember::IfRoom && !bound => {
                self.tally.event(Event::FlowNotRemembered);
                Ok(None)
            }
            Err(reason) => Err(reason),
        }
    }

    fn insert(
        &mut self,
        tables: &Tables,
        index: u16,
        chosen: &Chosen,
        client_side: ClientSide,
        segment: Segment,
        now: BootTime,
    ) -> Result<FlowId, Reason> {
        let service = &tables.services()[usize::from(index)];
        if !self.new_flows.take(now) {
            return Err(Reason::FlowRate);
        }
        if self.flows.room() == 0 {
            return Err(Reason::FlowTableFull);
        }
        let backend_side = match service.mode {
            Mode::Nat => Some(self.bind(tables, service, chosen.backend, &client_side)?),
            Mode::Dsr | Mode::NatTransparent => None,
        };
        // As if the program had made it.
        let counts = self.cache.is_some() && backend_side.is_some_and(|side| is_lower(side.snat_port));
        let idle = if counts { service.idle.min(patience(self.half_open)) } else { service.idle };
        let new = NewFlow { client_side, backend_side, backend: chosen.number, first: segment, idle };
        let inserted = self.flows.insert(new, now).map_err(|_| Reason::FlowTableFull)?;
        if let Some(evicted) = &inserted.evicted {
            self.gone(evicted);
            self.tally.event(Event::FlowEvicted);
        }
        self.noted(inserted.id, now);
        Ok(inserted.id)
    }
}
