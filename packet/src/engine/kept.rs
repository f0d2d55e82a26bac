//! Flows that a program beside the engine makes and takes through their states by itself ([`FlowCache::keeps`](super::FlowCache)), and
//! how the engine follows.
//!
//! The engine gives out how many may be made ([`Engine::may_make`]), learns of each ([`Engine::learn`]), and from then on ages, tells
//! other nodes of, and forgets it like its own. What it learns may be out of date: the plan has changed meanwhile, or its own flow of
//! that name or port was not known to the program. Then what the program did last is what holds, because packets have left by it.

use std::net::IpAddr;
use std::time::Duration;

use crate::flow::{BackendSide, ClientSide, FlowId, NewFlow, SYN_SENT_IDLE, Segment, State};
use crate::plan::Protocol;
use crate::tables::Tables;
use crate::time::BootTime;

use super::Engine;
use super::core::Core;
use super::counters::Event;
use super::nat::MAX_HALF_OPEN;

/// A backend that has not answered in this time has dropped the segment, and the client sends it again (RFC 6298 §2.1: after a
/// second).
const LEAST_PATIENCE: Duration = Duration::from_secs(1);

/// What a program did with a flow that it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The flow's name on the client's side.
    pub client_side: ClientSide,
    /// Number of its backend's state.
    pub backend: u32,
    /// Its SNAT address and port.
    pub snat: (IpAddr, u16),
    /// Whether it was made by this, in the place of another of that name if there was one; otherwise its state has changed.
    pub opened: bool,
    /// Its state ([`crate::flow::Flow::progress_bits`]).
    pub progress: u8,
    /// The version of its state ([`crate::flow::Flow::version`]).
    pub version: u8,
    /// When the packet came.
    pub at: BootTime,
}

impl Kept {
    /// Which a flow is of, as its state tells.
    fn protocol(&self) -> Protocol {
        if State::of_bits(self.progress) == Some(State::Udp) { Protocol::Udp } else { Protocol::Tcp }
    }
}

impl Engine {
    /// Follows what a program did with a flow. To be called before the next frame, in the order in which the program told.
    pub fn learn(&mut self, kept: &Kept, now: BootTime) {
        // A clock read elsewhere may be a moment ahead.
        let at = kept.at.min(now);
        if kept.opened {
            self.core.learn_opened(&self.tables, kept, at, now);
        } else {
            self.core.learn_change(&self.tables, kept, at);
        }
    }

    /// Flows that a program may make from now on, those that [`Engine::learn`] has not yet been told of included.
    pub fn may_make(&mut self, now: BootTime) -> u64 {
        let half_open = u64::from(MAX_HALF_OPEN.saturating_sub(self.core.half_open));
        half_open.min(self.core.flows.room() as u64).min(self.core.new_flows.available(now))
    }
}

/// How long a flow waits for its backend's first answer when there are `half_open` that do. With more than half of
/// [`MAX_HALF_OPEN`] the less the more there are, down to [`LEAST_PATIENCE`], so that those that nobody answers don't keep the program
/// from making others: pf's adaptive timeouts (pf.conf(5), `adaptive.start`).
pub(super) fn patience(half_open: u32) -> Duration {
    const HALF: u32 = MAX_HALF_OPEN / 2;
    let left = MAX_HALF_OPEN.saturating_sub(half_open).min(HALF);
    (SYN_SENT_IDLE * left / HALF).max(LEAST_PATIENCE)
}

impl Core {
    fn learn_opened(&mut self, tables: &Tables, kept: &Kept, at: BootTime, now: BootTime) {
        let Some((backend_side, idle)) = self.kept_name(tables, kept) else { return };
        self.new_flows.spend(now);
        let mut known_there = true;
        if let Some(id) = self.flows.find(&kept.client_side) {
            if self.flows.get(id).backend_side() == Some(backend_side) {
                self.replace(id);
            } else {
                // What is removed there may be the new one's.
                self.forget(id);
                known_there = false;
            }
        }
        if let Some(other) = self.flows.find_answered(&backend_side) {
            self.forget(other);
            known_there = false;
        }
        let new = NewFlow {
            client_side: kept.client_side,
            backend_side: Some(backend_side),
            backend: kept.backend,
            first: if kept.protocol() == Protocol::Udp { Segment::Udp } else { Segment::Syn },
            // The backend's first answer gives it the service's.
            idle: idle.min(patience(self.half_open)),
        };
        let inserted = match self.flows.insert(new, at) {
            Ok(inserted) => inserted,
            Err(_) => return self.refuse(kept, &backend_side),
        };
        if let Some(evicted) = &inserted.evicted {
            self.gone(evicted);
            self.tally.event(Event::FlowEvicted);
        }
        self.flows.set_version(inserted.id, kept.version);
        self.learn_as(inserted.id, known_there);
        self.tell_noted(inserted.id, now);
    }

    fn learn_change(&mut self, tables: &Tables, kept: &Kept, at: BootTime) {
        let Some(id) = self.flows.find(&kept.client_side) else { return };
        let flow = self.flows.get(id);
        if flow.backend_side().map(|b| (b.snat, b.snat_port)) != Some(kept.snat) {
            return;
        }
        // What becomes of a flow whose service is in no plan concerns nobody.
        let Some(index) = self.states.service_in_force(flow.service()) else { return };
        let idle = tables.services()[usize::from(index)].idle;
        if let Some(touched) = self.flows.follow(id, kept.progress, kept.version, idle, at) {
            self.touched(id, &touched);
        }
    }

    /// The flow's name on the backend's side, and its service's idle time. `None`: the plan in force has no such service or backend any
    /// more, and the flow was refused.
    fn kept_name(&mut self, tables: &Tables, kept: &Kept) -> Option<(BackendSide, Duration)> {
        let service = kept.client_side.service;
        let (backend, backend_port, in_force) = self.states.backend_of(service, kept.backend)?;
        let (snat, snat_port) = kept.snat;
        let protocol = kept.protocol().number();
        let name = BackendSide { protocol, backend, backend_port, snat, snat_port };
        match self.states.service_in_force(service).filter(|_| in_force) {
            Some(index) => Some((name, tables.services()[usize::from(index)].idle)),
            None => {
                self.refuse(kept, &name);
                None
            }
        }
    }

    fn refuse(&mut self, kept: &Kept, backend_side: &BackendSide) {
        if let Some(cache) = &mut self.cache {
            cache.refuse(&kept.client_side, backend_side);
        }
    }

    /// Forgets a flow in whose place the program has made another.
    fn replace(&mut self, id: FlowId) {
        let flow = self.flows.remove(id);
        self.tell_gone(&flow);
        self.unlearn_as(&flow, true);
    }
}
