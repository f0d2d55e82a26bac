//! Flows that are shared with other nodes: news of one's own, and those that are taken over.
//!
//! Only what the tables can't tell is remembered, so what is remembered is what another node must be told. News of a flow are
//! two: that it is known (once its other side was heard: a flood of SYNs is no news), and that it is gone (it has ended, or is
//! forgotten). A flow that another node would lead elsewhere is told of with its first packet, too, so that its client has hardly
//! heard of the connection before that node has; of so many a second only, because of floods.
//!
//! Taken-over flows wait in the table like any other, so that a node that becomes the owner has nothing to do; while another node
//! owns the group they don't age, because their packets pass there and it says when they are gone.

use std::net::{IpAddr, SocketAddr};

use crate::flow::{BackendSide, ClientSide, Flow, FlowId, NewFlow, Touched};
use crate::plan::Mode;
use crate::tables::Tables;
use crate::time::BootTime;

use super::Engine;
use super::beside::Reservation;
use super::core::Core;
use super::nat::is_lower;
use super::state::States;

/// What names a flow to every node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowName {
    /// Service id.
    pub service: u32,
    /// Client's address and port.
    pub client: SocketAddr,
}

/// What names a flow of full NAT as its backend knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowBinding {
    /// Service id.
    pub service: u32,
    /// Backend id.
    pub backend: u32,
    /// SNAT address and port.
    pub snat: SocketAddr,
}

/// A remembered flow in terms that every node with the same plan understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowRecord {
    /// Its name.
    pub name: FlowName,
    /// Backend id.
    pub backend: u32,
    /// SNAT address and port (`nat` only).
    pub snat: Option<SocketAddr>,
    /// Its state ([`Flow::progress_bits`]).
    pub progress: u8,
}

/// What happened to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlowNews {
    /// It is remembered, like this; another node would lead its later packets the same way, or nearly always.
    Known(FlowRecord),
    /// It is remembered, like this, in a service whose tables alone lead some flows elsewhere: urgent, for a node that takes over
    /// without knowing it may break it.
    Exception(FlowRecord),
    /// It has ended or is forgotten.
    Gone(FlowName),
    /// The same of a flow of full NAT whose backend is in the plan: on its way to another node this takes fewer bytes.
    Unbound(FlowBinding),
}

impl FlowNews {
    /// Id of the flow's service.
    pub fn service(&self) -> u32 {
        match self {
            FlowNews::Known(record) | FlowNews::Exception(record) => record.name.service,
            FlowNews::Gone(name) => name.service,
            FlowNews::Unbound(binding) => binding.service,
        }
    }
}

/// Where the engine tells news of flows; all calls from the engine's thread. Must not wait.
pub trait FlowOutbox: Send {
    /// Something happened to a flow of this node.
    fn tell(&mut self, news: FlowNews);
}

/// What became of flows of another node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Remembered or forgotten as told.
    pub taken: u32,
    /// Not: this node owns the group and knows better, or the plan in force has no such service, backend or SNAT address.
    pub refused: u32,
    /// Not: the flow table is full.
    pub full: u32,
}

/// Places of the flow table that one [`Engine::shared`] or [`Engine::sweep`] looks at: some tens of microseconds.
pub const SHARE_BUDGET: usize = 1000;

/// Flows a second that are told of before their other side was heard, more than a service in transition has in ordinary times; some
/// 200 KB/s to each standby. A flood of SYNs takes it all, and then others wait for their other side as if this were not.
pub(super) const TOLD_EARLY_PER_SECOND: u32 = 10_000;

enum Adoption {
    Taken,
    Refused,
    Full,
}

impl Core {
    /// Tells others what a packet did to a flow, if it is news.
    #[inline]
    pub(super) fn tell_touched(&mut self, id: FlowId, touched: &Touched) {
        if !(touched.assures() || touched.ends()) {
            return;
        }
        let Some(outbox) = &mut self.outbox else { return };
        let flow = self.flows.get(id);
        if touched.assures() {
            outbox.tell(known(&self.states, flow));
        } else if flow.is_told() {
            outbox.tell(ended(&self.states, flow));
        }
        self.flows.set_told(id, touched.assures());
    }

    /// Tells others of a flow that is remembered in a state in which they should know it.
    pub(super) fn tell_noted(&mut self, id: FlowId, now: BootTime) {
        let Some(outbox) = &mut self.outbox else { return };
        let flow = self.flows.get(id);
        let is_exception = self.states.service(flow.service()).has_exceptions;
        if !flow.is_told() && (flow.is_assured() || is_exception && self.told_early.take(now)) {
            outbox.tell(known(&self.states, flow));
            self.flows.set_told(id, true);
        }
    }

    /// Tells others that a flow is forgotten.
    pub(super) fn tell_gone(&mut self, flow: &Flow) {
        if let Some(outbox) = &mut self.outbox
            && flow.is_told()
        {
            outbox.tell(ended(&self.states, flow));
        }
    }
}

impl Engine {
    /// Tells `outbox` of flows from now on. To be called before the first frame.
    pub fn set_outbox(&mut self, outbox: Box<dyn FlowOutbox>) {
        self.core.outbox = Some(outbox);
    }

    /// Flows of `groups` that others should know, from place `from` of the table on, appended to `into`; bounded work. Where to
    /// go on; `None` at the end.
    pub fn shared(&self, groups: &[u32], from: usize, into: &mut Vec<FlowRecord>) -> Option<usize> {
        let to = from + SHARE_BUDGET;
        let flows = self.core.flows.at(from, to).filter(|(_, flow)| {
            flow.is_told() && self.group_of(flow).is_some_and(|group| groups.contains(&group))
        });
        into.extend(flows.map(|(_, flow)| record(&self.core.states, flow)));
        (to < self.core.flows.places()).then_some(to)
    }

    /// Takes over what another node tells of its flows, under the `mark` of its sending, which is not 0. Where this node has a
    /// lease itself, what it knows stays.
    pub fn adopt(&mut self, news: &[FlowNews], mark: u32, now: BootTime) -> Adopted {
        let mut adopted = Adopted::default();
        for news in news {
            let adoption = match news {
                FlowNews::Known(record) | FlowNews::Exception(record) => self.adopt_one(record, mark, now),
                FlowNews::Gone(name) => self.give_up(name, now),
                FlowNews::Unbound(binding) => self.unbind(binding, now),
            };
            match adoption {
                Adoption::Taken => adopted.taken += 1,
                Adoption::Refused => adopted.refused += 1,
                Adoption::Full => adopted.full += 1,
            }
        }
        adopted
    }

    /// Forgets flows of `groups` that did not come with the sending of that `mark`, from place `from` of the table on, except
    /// where this node has a lease; bounded work. Where to go on; `None` at the end.
    pub fn sweep(&mut self, groups: &[u32], mark: u32, from: usize, now: BootTime) -> Option<usize> {
        let to = from + SHARE_BUDGET;
        let stale = self.core.flows.at(from, to).filter(|(_, flow)| {
            flow.mark() != mark
                && self
                    .group_of(flow)
                    .is_some_and(|group| groups.contains(&group) && !self.may_forward(group, now))
        });
        let stale: Vec<FlowId> = stale.map(|(id, _)| id).collect();
        for id in stale {
            self.drop_adopted(id);
        }
        (to < self.core.flows.places()).then_some(to)
    }

    fn group_of(&self, flow: &Flow) -> Option<u32> {
        group_of(&self.core.states, &self.tables, flow.service())
    }

    fn may_forward(&self, group: u32, now: BootTime) -> bool {
        self.leases.get(group).may_forward(now)
    }

    fn adopt_one(&mut self, record: &FlowRecord, mark: u32, now: BootTime) -> Adoption {
        let Some(index) = self.tables.index_of(record.name.service) else { return Adoption::Refused };
        let service = &self.tables.services()[usize::from(index)];
        let Some(place) = service.backends.iter().position(|b| b.id == record.backend) else {
            return Adoption::Refused;
        };
        let backend = &service.backends[place];
        let client = record.name.client;
        let backend_side = match (service.mode, record.snat) {
            (Mode::Nat, Some(snat)) if service.snat.contains(&snat.ip()) => Some(BackendSide {
                protocol: service.protocol.number(),
                backend: backend.address,
                backend_port: backend.port,
                snat: snat.ip(),
                snat_port: snat.port(),
            }),
            (Mode::Dsr | Mode::NatTransparent, None) => None,
            _ => return Adoption::Refused,
        };
        if client.is_ipv6() != service.vip.is_ipv6() {
            return Adoption::Refused;
        }
        let (protocol, idle) = (service.protocol, service.idle);
        let leased = self.may_forward(service.group, now);
        let core = &mut self.core;
        let new = NewFlow {
            client_side: ClientSide {
                service: core.states.number(index),
                client: client.ip(),
                client_port: client.port(),
            },
            backend_side,
            backend: core.states.backend_number(index, place as u16),
            first: crate::flow::Segment::Tcp,
            idle,
        };
        if let Some(id) = core.flows.find(&new.client_side) {
            if core.flows.get(id).is_like(&new, record.progress) {
                core.flows.set_mark(id, mark);
                return Adoption::Taken;
            }
            // Where both forward for a while, one may have seen a flow's first packet and the other what followed.
            let beginning = !core.flows.get(id).is_assured() && core.flows.get(id).goes_like(&new);
            if leased && !beginning {
                return Adoption::Refused;
            }
            self.drop_adopted(id);
        }
        if let Some(other) = backend_side.and_then(|bound| self.core.flows.find_answered(&bound)) {
            if leased {
                return Adoption::Refused;
            }
            self.drop_adopted(other);
        }
        let core = &mut self.core;
        let shared = backend_side.filter(|bound| is_lower(bound.snat_port));
        if let (Some(bound), Some(cache)) = (&shared, &mut core.cache) {
            match cache.reserve(bound) {
                Reservation::Made => {}
                // The program has just made a flow of it.
                Reservation::Taken => return Adoption::Refused,
                Reservation::NoRoom => return Adoption::Full,
            }
        }
        let inserted = match core.flows.adopt(new, protocol, record.progress, mark, now) {
            Ok(Some(inserted)) => inserted,
            refused => {
                if let (Some(bound), Some(cache)) = (&shared, &mut core.cache) {
                    cache.release(bound);
                }
                return if refused.is_ok() { Adoption::Refused } else { Adoption::Full };
            }
        };
        if let Some(evicted) = &inserted.evicted {
            core.gone(evicted);
            core.tally.event(super::Event::FlowEvicted);
        }
        core.learn(inserted.id);
        if leased {
            // News to the standbys of this node, which may have been sent everything already.
            core.flows.set_told(inserted.id, false);
            core.tell_noted(inserted.id, now);
        }
        Adoption::Taken
    }

    fn give_up(&mut self, name: &FlowName, now: BootTime) -> Adoption {
        let Some(index) = self.told_of(name.service, now) else { return Adoption::Refused };
        let key = ClientSide {
            service: self.core.states.number(index),
            client: name.client.ip(),
            client_port: name.client.port(),
        };
        if let Some(id) = self.core.flows.find(&key) {
            self.drop_adopted(id);
        }
        Adoption::Taken
    }

    fn unbind(&mut self, binding: &FlowBinding, now: BootTime) -> Adoption {
        let Some(index) = self.told_of(binding.service, now) else { return Adoption::Refused };
        let service = &self.tables.services()[usize::from(index)];
        let bound = |backend: IpAddr, backend_port: u16| BackendSide {
            protocol: service.protocol.number(),
            backend,
            backend_port,
            snat: binding.snat.ip(),
            snat_port: binding.snat.port(),
        };
        let core = &self.core;
        let in_force = service.backends.iter().find(|b| b.id == binding.backend);
        let id = in_force.and_then(|b| core.flows.find_answered(&bound(b.address, b.port))).or_else(|| {
            // This node's plan may be newer than the one of whom it is told by: the backend has left it, or moved.
            let earlier = core.states.backends_called(core.states.number(index), binding.backend);
            earlier.filter_map(|(address, port)| core.flows.find_answered(&bound(address, port))).next()
        });
        if let Some(id) = id {
            self.drop_adopted(id);
        }
        Adoption::Taken
    }

    /// Place in the tables of a service of whose flows another node may tell.
    fn told_of(&self, service: u32, now: BootTime) -> Option<u16> {
        let index = self.tables.index_of(service)?;
        let group = self.tables.services()[usize::from(index)].group;
        (!self.may_forward(group, now)).then_some(index)
    }

    /// Forgets a flow that is another node's to tell of.
    fn drop_adopted(&mut self, id: FlowId) {
        let flow = self.core.flows.remove(id);
        self.core.unlearn(&flow);
    }
}

/// VIP group of the service with that number, if it is in the tables in force.
pub(super) fn group_of(states: &States, tables: &Tables, service: u32) -> Option<u32> {
    let index = states.service(service).index?;
    Some(tables.services()[usize::from(index)].group)
}

fn name(states: &States, flow: &Flow) -> FlowName {
    let client = flow.client_side();
    FlowName {
        service: states.service_id(flow.service()),
        client: SocketAddr::new(client.client, client.client_port),
    }
}

fn ended(states: &States, flow: &Flow) -> FlowNews {
    match flow.backend_side() {
        Some(bound) if states.backend(flow.backend).index.is_some() => FlowNews::Unbound(FlowBinding {
            service: states.service_id(flow.service()),
            backend: states.backend_id(flow.backend),
            snat: SocketAddr::new(bound.snat, bound.snat_port),
        }),
        _ => FlowNews::Gone(name(states, flow)),
    }
}

fn known(states: &States, flow: &Flow) -> FlowNews {
    let record = record(states, flow);
    match states.service(flow.service()).has_exceptions {
        true => FlowNews::Exception(record),
        false => FlowNews::Known(record),
    }
}

fn record(states: &States, flow: &Flow) -> FlowRecord {
    FlowRecord {
        name: name(states, flow),
        backend: states.backend_id(flow.backend),
        snat: flow.backend_side().map(|b| SocketAddr::new(b.snat, b.snat_port)),
        progress: flow.progress_bits(),
    }
}
