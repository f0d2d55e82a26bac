//! What a lane needs whose program handles most packets itself: the flows that it may handle, its word on them before one is
//! forgotten, and its counters among the engine's.
//!
//! A flow is *steady* when a plain segment or datagram of either side changes nothing of it but the time of its last packet.
//! Packets of flows that are not, and every SYN, FIN and RST of those that are, remain the engine's: it alone decides about
//! states. Except for *kept* flows ([`FlowCache::keeps`]): those the program makes itself and takes through their states, and the engine
//! follows (`kept`).

use std::time::Duration;

use crate::flow::{BackendSide, ClientSide, Direction, Flow, FlowId, Segment, Touched};
use crate::time::BootTime;

use super::Engine;
use super::core::Core;
use super::nat::is_lower;
use super::sketch::Sketch;
use super::state::States;

/// A lane's own copy of the remembered flows, all calls from the engine's thread.
pub trait FlowCache: Send {
    /// A flow is remembered. `hash` is that of its ends, whatever its service's scheduler goes by. Called before the verdict about
    /// the packet that did it.
    fn remember(&mut self, flow: &Flow, hash: u32);

    /// A remembered flow has become steady or ceased to be ([`Flow::is_steady`]); of a kept one: anything of its state has changed.
    /// Called before the verdict about the packet that did it.
    fn change(&mut self, flow: &Flow);

    /// Whether the program keeps the state of such a flow itself: then it has every such flow, steady or not.
    fn keeps(&self, _flow: &Flow) -> bool {
        false
    }

    /// Takes a name on the backend's side for a flow that is about to be remembered. Asked where the program gives such names
    /// away itself.
    fn reserve(&mut self, _name: &BackendSide) -> Reservation {
        Reservation::Made
    }

    /// Gives a reserved name back.
    fn release(&mut self, _name: &BackendSide) {}

    /// A flow that the program has made is remembered: it has it already.
    fn made(&mut self, flow: &Flow, hash: u32) {
        self.remember(flow, hash);
    }

    /// A flow is forgotten because the program has made another one of the same names: it stays there.
    fn replaced(&mut self, flow: &Flow, hash: u32) {
        self.forget(flow, hash);
    }

    /// A flow that the program has made can't be remembered.
    fn refuse(&mut self, _client: &ClientSide, _backend: &BackendSide) {}

    /// A remembered flow is forgotten.
    fn forget(&mut self, flow: &Flow, hash: u32);

    /// When the last packet of a remembered flow passed without the engine, if one did.
    fn last_seen(&self, flow: &Flow) -> Option<BootTime>;

    /// Whether the service with that number has remembered flows at all. `true` comes before the first
    /// [`FlowCache::remember`] of such a flow, `false` after the last [`FlowCache::forget`].
    fn consult(&mut self, service: u32, consult: bool);
}

/// Whether a name could be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reservation {
    /// It is the engine's.
    Made,
    /// The program has given it to a flow that the engine will learn of.
    Taken,
    /// Nothing can be reserved now.
    NoRoom,
}

/// When the last packet of a flow passed without the engine, where some may have. Also of a kept flow that has ended: the program
/// reckons by the same time when it opens one again, and must not while the engine forgets it.
pub(crate) fn seen_beside(cache: &dyn FlowCache, flow: &Flow) -> Option<BootTime> {
    if flow.is_steady() || cache.keeps(flow) { cache.last_seen(flow) } else { None }
}

/// What passed a backend without the engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Packets sent to the backend; a super-frame counts as its segments.
    pub packets: u64,
    /// Bytes of layer 3 sent to the backend.
    pub bytes: u64,
    /// Packets from the backend to clients.
    pub return_packets: u64,
    /// Bytes of layer 3 from the backend to clients.
    pub return_bytes: u64,
    /// New flows.
    pub new_flows: u64,
    /// Flows that are not remembered, as [`Windows`]; absent while there was none.
    pub seen: Option<Windows>,
}

pub use super::sketch::{REGISTERS, Windows};

fn has_lower_port(flow: &Flow) -> bool {
    flow.bound_port().is_some_and(|(_, port)| is_lower(port))
}

/// Whether it counts towards [`super::nat::MAX_HALF_OPEN`].
pub(super) fn is_half_open(flow: &Flow) -> bool {
    !flow.is_answered() && has_lower_port(flow)
}

impl Core {
    /// Takes note of a packet of a remembered flow.
    #[inline]
    pub(crate) fn touch(
        &mut self,
        id: FlowId,
        segment: Segment,
        direction: Direction,
        idle: Duration,
        now: BootTime,
    ) {
        let touched = self.flows.touch(id, segment, direction, idle, now);
        if let Some(cache) = &mut self.cache
            && touched.changes()
        {
            let flow = self.flows.get(id);
            if touched.changes_steadiness() || cache.keeps(flow) {
                cache.change(flow);
            }
        }
        self.touched(id, &touched);
    }

    /// Counts and tells what a packet did to a flow.
    #[inline]
    pub(super) fn touched(&mut self, id: FlowId, touched: &Touched) {
        let flow = self.flows.get(id);
        let (before, after) = touched.states();
        self.states.moved(flow.backend, before, after);
        if touched.answers() && has_lower_port(flow) {
            self.half_open = self.half_open.saturating_sub(1);
        }
        self.tell_touched(id, touched);
    }

    /// Notes a flow that was just remembered.
    pub(crate) fn noted(&mut self, id: FlowId, now: BootTime) {
        self.learn(id);
        self.tell_noted(id, now);
    }

    /// Notes a flow that was just remembered, and tells nobody.
    pub(crate) fn learn(&mut self, id: FlowId) {
        self.learn_as(id, false);
    }

    /// The same; `made`: the program has made it.
    pub(super) fn learn_as(&mut self, id: FlowId, made: bool) {
        let flow = self.flows.get(id);
        self.states.remembered(flow);
        self.half_open += u32::from(is_half_open(flow));
        if let Some(cache) = &mut self.cache {
            if self.states.service(flow.service()).remembered == 1 {
                cache.consult(flow.service(), true);
            }
            let hash = self.states.flow_hash(flow);
            if made { cache.made(flow, hash) } else { cache.remember(flow, hash) }
        }
    }

    /// Notes a flow that was just forgotten.
    pub(crate) fn gone(&mut self, flow: &Flow) {
        self.tell_gone(flow);
        self.unlearn(flow);
    }

    /// Notes a flow that was just forgotten, and tells nobody.
    pub(crate) fn unlearn(&mut self, flow: &Flow) {
        self.unlearn_as(flow, false);
    }

    /// The same; `replaced`: the program has made another of its names.
    pub(super) fn unlearn_as(&mut self, flow: &Flow, replaced: bool) {
        self.states.forgotten(flow);
        self.half_open = self.half_open.saturating_sub(u32::from(is_half_open(flow)));
        if let Some(cache) = &mut self.cache {
            let hash = self.states.flow_hash(flow);
            if replaced {
                cache.replaced(flow, hash)
            } else {
                cache.forget(flow, hash)
            }
            if self.states.service(flow.service()).remembered == 0 {
                cache.consult(flow.service(), false);
            }
        }
    }

    /// Forgets the next flow that has idled out, the cache's word included. A flow that was taken over from another node does
    /// not age before this node owns its group, which `owns` tells by the service's number, and then has its idle time from
    /// when that was noticed.
    pub(crate) fn expire(
        &mut self,
        now: BootTime,
        budget: &mut usize,
        owns: impl Fn(&States, u32) -> Option<bool>,
    ) -> Option<Flow> {
        let (cache, states) = (&self.cache, &self.states);
        self.flows.expire(now, budget, |flow| {
            if flow.mark() != 0
                && let Some(owned) = owns(states, flow.service())
            {
                if owned {
                    flow.own();
                }
                return Some(now);
            }
            cache.as_ref().and_then(|cache| seen_beside(&**cache, flow))
        })
    }
}

impl Engine {
    /// Tells `cache` of flows from now on. To be called before the first frame.
    pub fn set_cache(&mut self, cache: Box<dyn FlowCache>) {
        self.core.cache = Some(cache);
    }

    /// Number of the state of the service at `index` of the tables in force. It stays the same while the service does, and is
    /// given to another only after a plan without it was put in force and its flows were forgotten.
    pub fn service_number(&self, index: u16) -> u32 {
        self.core.states.number(index)
    }

    /// Number of the state of a backend of the tables in force, which lives as the service's does.
    pub fn backend_number(&self, service: u16, backend: u16) -> u32 {
        self.core.states.backend_number(service, backend)
    }

    /// Tells the lives of a backend's number apart: another one, another backend. Never 0 while it is in use.
    pub fn backend_life(&self, number: u32) -> u32 {
        self.core.states.backend(number).life
    }

    /// Whether flows of the service at `index` are remembered.
    pub fn remembers(&self, index: u16) -> bool {
        self.core.states.service(self.core.states.number(index)).remembered > 0
    }

    /// One more than the highest number of a backend's state so far.
    pub fn backend_numbers(&self) -> u32 {
        self.core.states.backend_numbers_used()
    }

    /// One more than the highest number of a service's state so far.
    pub fn service_numbers(&self) -> u32 {
        self.core.states.service_numbers_used()
    }

    /// [`Engine::counters`] with what passed without the engine; `passed` is asked by number of the backend's state.
    pub fn counters_with(
        &self,
        now: BootTime,
        mut passed: impl FnMut(u32) -> Option<Passed>,
    ) -> crate::lane::Counters {
        let mut counters = self.counters(now);
        counters.backends = self.core.states.counters(&self.tables, |number, own| {
            let Some(passed) = passed(number) else { return own.seen.estimate(now) };
            own.add(&passed);
            own.seen.estimate_with(now, passed.seen.as_ref())
        });
        counters
    }
}

/// What [`super::state::States::counters`] hands out of one backend.
pub(crate) struct Own<'a> {
    pub(crate) seen: &'a Sketch,
    pub(crate) counters: crate::lane::BackendCounters,
}

impl Own<'_> {
    fn add(&mut self, passed: &Passed) {
        self.counters.packets += passed.packets;
        self.counters.bytes += passed.bytes;
        self.counters.return_packets += passed.return_packets;
        self.counters.return_bytes += passed.return_bytes;
        self.counters.new_flows += passed.new_flows;
    }
}
