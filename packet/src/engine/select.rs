//! Which backend: the slot rule, remembered flows, schedulers, dead backends ("Backend choice" in `ARCHITECTURE.md`).

use std::net::IpAddr;

use crate::drops::Reason;
use crate::flow::{ClientSide, Direction, FlowId, Segment};
use crate::plan::{DeadBackend, Protocol, Scheduler};
use crate::tables::{Service, Slot, Tables};
use crate::time::BootTime;

use super::core::Core;

/// The backend of a packet from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// Index in the service's list.
    pub(crate) backend: u16,
    /// Number of its state.
    pub(crate) number: u32,
    /// The flow, where it is remembered.
    pub(crate) flow: Option<FlowId>,
    /// Whether to remember it, where it is not.
    pub(crate) remember: Remember,
    /// Whether it is the first packet of a flow.
    pub(crate) opens: bool,
    /// The client's hash.
    pub(crate) hash: u32,
}

/// Whether a flow is to be remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remember {
    /// No.
    No,
    /// If there is room: without it, later packets find the same backend for now.
    IfRoom,
    /// Or else the packet must not be forwarded: later ones would go astray.
    Must,
}

/// Why a packet has no backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoChoice {
    Drop(Reason),
    /// Dropped, and the client gets an RST.
    Reset,
}

impl From<Reason> for NoChoice {
    fn from(reason: Reason) -> NoChoice {
        NoChoice::Drop(reason)
    }
}

impl Core {
    /// Chooses for a packet of `client` to the service at `index`. A remembered flow is touched, or forgotten where the
    /// dead-backend policy says so; nothing is remembered yet.
    pub(crate) fn choose(
        &mut self,
        tables: &Tables,
        index: u16,
        client: IpAddr,
        client_port: u16,
        segment: Segment,
        now: BootTime,
    ) -> Result<Chosen, NoChoice> {
        let service = &tables.services()[usize::from(index)];
        let hash = service.hash(client, client_port);
        let slot = service.slot(hash);
        let number = self.states.number(index);
        let tcp = service.protocol == Protocol::Tcp;
        // Datagrams of an untracked UDP service go where the hash says now, each for itself.
        let consult = service.tracks_all
            || tcp
                && (slot.in_transition()
                    || service.consult_all_slots
                    || self.states.service(number).remembered > 0);
        if !consult {
            let backend = living(service, slot.current).ok_or(Reason::NoBackend);
            return match backend {
                Ok(backend) => {
                    let opens = segment == Segment::Syn;
                    Ok(self.chosen(index, backend, Remember::No, opens, hash))
                }
                // A table that names a dead backend leaves the policy to older flows only.
                Err(reason) => match slot.current {
                    Some(dead) if tcp && segment != Segment::Syn => {
                        self.dead(service, index, slot, dead, segment, hash)
                    }
                    _ => Err(reason.into()),
                },
            };
        }
        let key = ClientSide { service: number, client, client_port };
        if let Some(id) = self.flows.find(&key) {
            match self.remembered(service, index, id, segment, now, hash) {
                Some(Ok(chosen)) => return Ok(chosen),
                Some(Err(no)) => return Err(no),
                None => {}
            }
        }
        if matches!(segment, Segment::Syn | Segment::Udp) {
            return self.open(service, index, slot, hash);
        }
        // Older than what we know.
        let backend = slot.base.or(slot.current).ok_or(Reason::NoBackend)?;
        if service.backends[usize::from(backend)].alive {
            let remember = if service.tracks_all {
                Remember::Must
            } else if slot.in_transition() && segment != Segment::Rst {
                Remember::IfRoom
            } else {
                Remember::No
            };
            return Ok(self.chosen(index, backend, remember, false, hash));
        }
        self.dead(service, index, slot, backend, segment, hash)
    }

    /// For a flow that is remembered. `None`: it has been forgotten and this packet begins anew.
    fn remembered(
        &mut self,
        service: &Service,
        index: u16,
        id: FlowId,
        segment: Segment,
        now: BootTime,
        hash: u32,
    ) -> Option<Result<Chosen, NoChoice>> {
        let flow = self.flows.get(id);
        if segment == Segment::Syn && flow.reopens() {
            self.forget(id);
            return None;
        }
        let number = flow.backend;
        let backend = self.states.backend(number).index;
        let keeps = service.dead_backend == DeadBackend::Keep;
        if let Some(backend) = backend
            && (keeps || service.backends[usize::from(backend)].alive)
        {
            self.touch(id, segment, Direction::ToBackend, service.idle, now);
            let opens = false;
            return Some(Ok(Chosen { backend, number, flow: Some(id), remember: Remember::No, opens, hash }));
        }
        if keeps {
            // Gone from the plan: there is no address to keep to.
            return Some(Err(Reason::DeadBackend.into()));
        }
        self.forget(id);
        match (service.dead_backend, segment) {
            (_, Segment::Syn) => None,
            (DeadBackend::Reset, Segment::Rst | Segment::Udp) => Some(Err(Reason::DeadBackend.into())),
            (DeadBackend::Reset, _) => Some(Err(NoChoice::Reset)),
            (DeadBackend::Rehash, Segment::Udp) => None,
            (DeadBackend::Rehash | DeadBackend::Keep, _) => Some(self.rehash(service, index, hash)),
        }
    }

    /// For the first packet of a flow.
    fn open(&mut self, service: &Service, index: u16, slot: Slot, hash: u32) -> Result<Chosen, NoChoice> {
        let backend = match service.scheduler {
            Scheduler::Maglev | Scheduler::SourceIp => living(service, slot.current),
            Scheduler::RoundRobin => self.next_in_turn(service, index),
            Scheduler::LeastConn => self.least_loaded(service, index),
        };
        let backend = backend.ok_or(Reason::NoBackend)?;
        let remember = if service.tracks_all || slot.in_transition() { Remember::Must } else { Remember::No };
        Ok(self.chosen(index, backend, self.if_derivable(service, slot, remember), true, hash))
    }

    /// A packet of a flow older than what we know, whose backend is dead.
    fn dead(
        &mut self,
        service: &Service,
        index: u16,
        slot: Slot,
        backend: u16,
        segment: Segment,
        hash: u32,
    ) -> Result<Chosen, NoChoice> {
        match service.dead_backend {
            DeadBackend::Reset if segment == Segment::Rst => Err(Reason::DeadBackend.into()),
            DeadBackend::Reset => Err(NoChoice::Reset),
            DeadBackend::Rehash => self.rehash(service, index, hash),
            DeadBackend::Keep => {
                let remember =
                    if service.tracks_all || slot.in_transition() { Remember::Must } else { Remember::No };
                Ok(self.chosen(index, backend, remember, false, hash))
            }
        }
    }

    /// The flow goes to the current backend of its slot.
    fn rehash(&mut self, service: &Service, index: u16, hash: u32) -> Result<Chosen, NoChoice> {
        let slot = service.slot(hash);
        let backend = living(service, slot.current).ok_or(Reason::NoBackend)?;
        let remember = if service.tracks_all || slot.in_transition() { Remember::Must } else { Remember::No };
        Ok(self.chosen(index, backend, remember, false, hash))
    }

    /// A UDP flow that the hash alone leads to the same backend may go unremembered for want of room.
    fn if_derivable(&self, service: &Service, slot: Slot, remember: Remember) -> Remember {
        let hashed = matches!(service.scheduler, Scheduler::Maglev | Scheduler::SourceIp);
        let udp = service.protocol == Protocol::Udp;
        if remember == Remember::Must && udp && hashed && !slot.in_transition() {
            Remember::IfRoom
        } else {
            remember
        }
    }

    fn chosen(&self, index: u16, backend: u16, remember: Remember, opens: bool, hash: u32) -> Chosen {
        let number = self.states.backend_number(index, backend);
        Chosen { backend, number, flow: None, remember, opens, hash }
    }

    /// Smooth weighted round robin: each backend earns its weight, the richest serves and pays what all have earned.
    fn next_in_turn(&mut self, service: &Service, index: u16) -> Option<u16> {
        let mut total = 0;
        let mut best: Option<(i64, u16)> = None;
        for (backend, b) in service.backends.iter().enumerate().filter(|(_, b)| b.weight > 0 && b.alive) {
            let number = self.states.backend_number(index, backend as u16);
            let state = self.states.backend_mut(number);
            state.credit += i64::from(b.weight);
            total += i64::from(b.weight);
            if best.is_none_or(|(credit, _)| state.credit > credit) {
                best = Some((state.credit, backend as u16));
            }
        }
        let (_, backend) = best?;
        let number = self.states.backend_number(index, backend);
        self.states.backend_mut(number).credit -= total;
        Some(backend)
    }

    /// The backend that one flow more burdens least for its weight.
    fn least_loaded(&self, service: &Service, index: u16) -> Option<u16> {
        let mut best: Option<(u64, u64, u16)> = None;
        for (backend, b) in service.backends.iter().enumerate().filter(|(_, b)| b.weight > 0 && b.alive) {
            let number = self.states.backend_number(index, backend as u16);
            let flows = u64::from(self.states.backend(number).open_flows()) + 1;
            let weight = u64::from(b.weight);
            if best.is_none_or(|(f, w, _)| flows * w < f * weight) {
                best = Some((flows, weight, backend as u16));
            }
        }
        best.map(|(.., backend)| backend)
    }

    /// Forgets a flow.
    pub(crate) fn forget(&mut self, id: FlowId) {
        let flow = self.flows.remove(id);
        self.gone(&flow);
    }
}

/// The backend, if new flows may go to it.
fn living(service: &Service, backend: Option<u16>) -> Option<u16> {
    backend.filter(|&b| service.backends[usize::from(b)].alive)
}
