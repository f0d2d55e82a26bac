//! What the engine keeps for services and backends from plan to plan: counters, numbers of flows, turns of schedulers.
//!
//! A state has a number of its own that flows refer to. It outlives the plan that made it as long as a flow refers to it, so a
//! change of plan touches no flow: a flow whose backend is gone finds that its state stands in no table any more. A service
//! or backend that comes back with another address is another state.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use crate::flow::{Flow, State};
use crate::lane::BackendCounters;
use crate::plan::{Mode, Protocol};
use crate::tables::{Backend, Service, Tables};
use crate::time::BootTime;

use super::sketch::Sketch;

/// State of a service.
#[derive(Debug)]
pub(crate) struct ServiceState {
    identity: (u32, IpAddr, u16, Protocol, Mode),
    /// Its place in the tables in force.
    pub(crate) index: Option<u16>,
    /// Flows remembered.
    pub(crate) remembered: u32,
}

/// State of a backend of a service.
#[derive(Debug)]
pub(crate) struct BackendState {
    identity: (u32, u32, IpAddr, u16),
    /// Its place in its service's list in the tables in force.
    pub(crate) index: Option<u16>,
    /// Counts the lives of this number, for references that do not keep it alive.
    pub(crate) life: u32,
    /// Flows remembered.
    pub(crate) flows: u32,
    /// Of them, those that have ended and wait for late segments.
    pub(crate) closed: u32,
    /// Turns that the backend is due (smooth weighted round robin).
    pub(crate) credit: i64,
    pub(crate) seen: Sketch,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    pub(crate) return_packets: u64,
    pub(crate) return_bytes: u64,
    pub(crate) new_flows: u64,
}

impl BackendState {
    /// Flows that are going on.
    pub(crate) fn open_flows(&self) -> u32 {
        self.flows.saturating_sub(self.closed)
    }
}

/// Whether two lists of backends have the same states: the service itself must be the same too.
fn same_backends(a: &Service, b: &Service) -> bool {
    let identity = |b: &Backend| (b.id, b.address, b.port);
    a.backends.iter().map(identity).eq(b.backends.iter().map(identity))
}

/// All states, and which belong to the tables in force.
#[derive(Debug, Default)]
pub(crate) struct States {
    services: Vec<ServiceState>,
    free_services: Vec<u32>,
    backends: Vec<BackendState>,
    free_backends: Vec<u32>,
    /// By place in the tables: the service's state and its backends' states.
    in_force: Vec<(u32, Box<[u32]>)>,
    lives: u32,
}

impl States {
    /// Number of the state of the service at `index` of the tables in force.
    #[inline]
    pub(crate) fn number(&self, index: u16) -> u32 {
        self.in_force[usize::from(index)].0
    }

    /// Number of the state of a backend of the tables in force.
    #[inline]
    pub(crate) fn backend_number(&self, service: u16, backend: u16) -> u32 {
        self.in_force[usize::from(service)].1[usize::from(backend)]
    }

    #[inline]
    pub(crate) fn service(&self, number: u32) -> &ServiceState {
        &self.services[number as usize]
    }

    #[inline]
    pub(crate) fn backend(&self, number: u32) -> &BackendState {
        &self.backends[number as usize]
    }

    #[inline]
    pub(crate) fn backend_mut(&mut self, number: u32) -> &mut BackendState {
        &mut self.backends[number as usize]
    }

    /// A flow is remembered.
    pub(crate) fn remembered(&mut self, flow: &Flow) {
        self.services[flow.service() as usize].remembered += 1;
        let backend = &mut self.backends[flow.backend as usize];
        backend.flows += 1;
        backend.closed += u32::from(flow.state() == State::Closed);
    }

    /// A flow is forgotten.
    pub(crate) fn forgotten(&mut self, flow: &Flow) {
        let service = &mut self.services[flow.service() as usize];
        service.remembered = service.remembered.saturating_sub(1);
        let backend = &mut self.backends[flow.backend as usize];
        backend.flows = backend.flows.saturating_sub(1);
        if flow.state() == State::Closed {
            backend.closed = backend.closed.saturating_sub(1);
        }
    }

    /// A flow of `backend` went from one state to another.
    #[inline]
    pub(crate) fn moved(&mut self, backend: u32, before: State, after: State) {
        if before == after {
            return;
        }
        let backend = &mut self.backends[backend as usize];
        if after == State::Closed {
            backend.closed += 1;
        } else if before == State::Closed {
            backend.closed = backend.closed.saturating_sub(1);
        }
    }

    /// Finds or makes the states of new tables, where `old` are in force. Runs on the packet thread: a service whose backends
    /// did not change costs no look-up for each of them.
    pub(crate) fn swap(&mut self, old: &Tables, tables: &Tables) {
        let before = old.services().iter().zip(std::mem::take(&mut self.in_force));
        let mut before: HashMap<u32, (&Service, Box<[u32]>)> =
            before.map(|(service, (number, backends))| (number, (service, backends))).collect();
        self.services.iter_mut().for_each(|s| s.index = None);
        self.backends.iter_mut().for_each(|b| b.index = None);
        // A freed state keeps its identity until its number is given away; it must not be found by it.
        let free: HashSet<u32> = self.free_services.iter().copied().collect();
        let numbered = self.services.iter().enumerate().map(|(number, s)| (s.identity, number as u32));
        let known: HashMap<_, u32> = numbered.filter(|(_, number)| !free.contains(number)).collect();
        let mut known_backends = None;

        let mut in_force = Vec::with_capacity(tables.services().len());
        for (index, service) in tables.services().iter().enumerate() {
            let identity = (service.id, service.vip, service.port, service.protocol, service.mode);
            let number = known.get(&identity).copied().unwrap_or_else(|| self.new_service(identity));
            self.services[number as usize].index = Some(index as u16);
            let numbers = match before.remove(&number) {
                Some((before, numbers)) if same_backends(before, service) => numbers,
                _ => {
                    let known = known_backends.get_or_insert_with(|| self.known_backends());
                    self.backend_numbers(number, service, known)
                }
            };
            for (index, &number) in numbers.iter().enumerate() {
                self.backends[number as usize].index = Some(index as u16);
            }
            in_force.push((number, numbers));
        }
        self.in_force = in_force;
        self.free_unused();
    }

    fn known_backends(&self) -> HashMap<(u32, u32, IpAddr, u16), u32> {
        let free: HashSet<u32> = self.free_backends.iter().copied().collect();
        let numbered = self.backends.iter().enumerate().map(|(number, b)| (b.identity, number as u32));
        numbered.filter(|(_, number)| !free.contains(number)).collect()
    }

    fn backend_numbers(
        &mut self,
        service_number: u32,
        service: &Service,
        known: &HashMap<(u32, u32, IpAddr, u16), u32>,
    ) -> Box<[u32]> {
        let number = |b: &Backend| {
            let identity = (service_number, b.id, b.address, b.port);
            known.get(&identity).copied().unwrap_or_else(|| self.new_backend(identity))
        };
        service.backends.iter().map(number).collect()
    }

    fn new_service(&mut self, identity: (u32, IpAddr, u16, Protocol, Mode)) -> u32 {
        let state = ServiceState { identity, index: None, remembered: 0 };
        if let Some(number) = self.free_services.pop() {
            self.services[number as usize] = state;
            return number;
        }
        self.services.push(state);
        self.services.len() as u32 - 1
    }

    fn new_backend(&mut self, identity: (u32, u32, IpAddr, u16)) -> u32 {
        self.lives = self.lives.wrapping_add(1);
        let state = BackendState {
            identity,
            index: None,
            life: self.lives,
            flows: 0,
            closed: 0,
            credit: 0,
            seen: Sketch::default(),
            packets: 0,
            bytes: 0,
            return_packets: 0,
            return_bytes: 0,
            new_flows: 0,
        };
        if let Some(number) = self.free_backends.pop() {
            self.backends[number as usize] = state;
            return number;
        }
        self.backends.push(state);
        self.backends.len() as u32 - 1
    }

    /// Frees numbers that neither the tables nor a flow refers to.
    fn free_unused(&mut self) {
        let services =
            self.services.iter().enumerate().filter(|(_, s)| s.index.is_none() && s.remembered == 0);
        self.free_services = services.map(|(number, _)| number as u32).collect();
        let backends = self.backends.iter().enumerate().filter(|(_, b)| b.index.is_none() && b.flows == 0);
        self.free_backends = backends.map(|(number, _)| number as u32).collect();
        for &number in &self.free_backends {
            self.backends[number as usize].life = 0;
        }
    }

    /// Counters of the backends in the tables in force.
    pub(crate) fn counters(&self, tables: &Tables, now: BootTime) -> Vec<BackendCounters> {
        let mut counters = Vec::new();
        for (service, (_, numbers)) in tables.services().iter().zip(&self.in_force) {
            for (backend, &number) in service.backends.iter().zip(numbers) {
                let state = self.backend(number);
                counters.push(BackendCounters {
                    service: service.id,
                    backend: backend.id,
                    packets: state.packets,
                    bytes: state.bytes,
                    return_packets: state.return_packets,
                    return_bytes: state.return_bytes,
                    new_flows: state.new_flows,
                    flows: u64::from(state.flows),
                    active: u64::from(state.open_flows()) + state.seen.estimate(now),
                });
            }
        }
        counters.sort_by_key(|c| (c.service, c.backend));
        counters
    }
}
