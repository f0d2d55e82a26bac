//! What the engine keeps for services and backends from plan to plan: counters, numbers of flows, turns of schedulers.
//!
//! A state has a number of its own that flows refer to. It outlives the plan that made it as long as a flow refers to it, so a
//! change of plan touches no flow: a flow whose backend is gone finds that its state stands in no table any more. A service
//! or backend that comes back with another address is another state.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use crate::flow::{ClientSide, Flow, State};
use crate::hash;
use crate::lane::BackendCounters;
use crate::plan::{Mode, Protocol};
use crate::tables::{Backend, HASH_SEED, Service, Tables};

use super::beside::Own;
use super::sketch::Sketch;

/// State of a service.
#[derive(Debug)]
pub(crate) struct ServiceState {
    identity: (u32, IpAddr, u16, Protocol, Mode),
    /// Its place in the tables in force.
    pub(crate) index: Option<u16>,
    /// Flows remembered.
    pub(crate) remembered: u32,
    /// [`Service::has_exceptions`] in the tables in force.
    pub(crate) has_exceptions: bool,
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

    /// Hash of a remembered flow's ends. It stays the same as long as the flow is remembered: what it is made of identifies the
    /// service.
    pub(crate) fn flow_hash(&self, flow: &Flow) -> u32 {
        let ClientSide { service, client, client_port } = flow.client_side();
        let (_, vip, port, protocol, _) = self.services[service as usize].identity;
        hash::flow(HASH_SEED, client, client_port, vip, port, protocol.number())
    }

    /// Id of the service whose state has that number.
    pub(crate) fn service_id(&self, number: u32) -> u32 {
        self.services[number as usize].identity.0
    }

    /// Id of the backend whose state has that number.
    pub(crate) fn backend_id(&self, number: u32) -> u32 {
        self.backends[number as usize].identity.1
    }

    /// Place in the tables in force of the service whose state has that number, if it is there and there is one.
    pub(crate) fn service_in_force(&self, number: u32) -> Option<u16> {
        self.services.get(number as usize)?.index
    }

    /// Address and port of a service's backend whose state has that number, and whether it is in the tables in force; `None`: there is no
    /// such state.
    pub(crate) fn backend_of(&self, service: u32, number: u32) -> Option<(IpAddr, u16, bool)> {
        let state = self.backends.get(number as usize)?;
        let (of, _, address, port) = state.identity;
        (of == service).then_some((address, port, state.index.is_some()))
    }

    /// Addresses and ports that the backend of that id of the service whose state has that number has had and flows still go to.
    /// Looks at all backends.
    pub(crate) fn backends_called(&self, service: u32, id: u32) -> impl Iterator<Item = (IpAddr, u16)> {
        let of_it = self
            .backends
            .iter()
            .filter(move |b| b.flows > 0 && (b.identity.0, b.identity.1) == (service, id));
        of_it.map(|b| (b.identity.2, b.identity.3))
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
            let state = &mut self.services[number as usize];
            (state.index, state.has_exceptions) = (Some(index as u16), service.has_exceptions());
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
        let state = ServiceState { identity, index: None, remembered: 0, has_exceptions: false };
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

    /// One more than the highest number of a backend so far.
    pub(crate) fn backend_numbers_used(&self) -> u32 {
        self.backends.len() as u32
    }

    /// One more than the highest number of a service so far.
    pub(crate) fn service_numbers_used(&self) -> u32 {
        self.services.len() as u32
    }

    /// Counters of the backends in the tables in force. `unremembered` says how many flows there are besides those that are
    /// remembered, and may add to the counters.
    pub(crate) fn counters(
        &self,
        tables: &Tables,
        mut unremembered: impl FnMut(u32, &mut Own<'_>) -> u64,
    ) -> Vec<BackendCounters> {
        let mut counters = Vec::new();
        for (service, (_, numbers)) in tables.services().iter().zip(&self.in_force) {
            for (backend, &number) in service.backends.iter().zip(numbers) {
                let state = self.backend(number);
                let own = BackendCounters {
                    service: service.id,
                    backend: backend.id,
                    packets: state.packets,
                    bytes: state.bytes,
                    return_packets: state.return_packets,
                    return_bytes: state.return_bytes,
                    new_flows: state.new_flows,
                    flows: u64::from(state.flows),
                    active: u64::from(state.open_flows()),
                };
                let mut own = Own { seen: &state.seen, counters: own };
                let unremembered = unremembered(number, &mut own);
                counters.push(BackendCounters { active: own.counters.active + unremembered, ..own.counters });
            }
        }
        counters.sort_by_key(|c| (c.service, c.backend));
        counters
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::plan::{BackendPlan, DeadBackend, GroupPlan, Plan, Scheduler, ServicePlan};

    /// Services with their ports, and of each the backends with the last byte of their addresses.
    type Shape = Vec<(u32, u16, Vec<(u32, u8)>)>;

    fn tables(shape: &Shape) -> Option<Tables> {
        let vip: IpAddr = Ipv4Addr::new(192, 0, 2, 100).into();
        let group =
            GroupPlan { id: 1, name: String::new(), vips: vec![vip], inside_vips: vec![], snat: vec![] };
        let backend = |&(id, host): &(u32, u8)| BackendPlan {
            id,
            name: String::new(),
            address: Ipv4Addr::new(10, 0, 0, host).into(),
            port: 80,
            weight: 0,
            base_weight: 0,
            alive: true,
        };
        let service = |(id, port, backends): &(u32, u16, Vec<(u32, u8)>)| ServicePlan {
            id: *id,
            name: String::new(),
            group: 1,
            vip,
            port: *port,
            protocol: Protocol::Tcp,
            mode: Mode::Dsr,
            scheduler: Scheduler::Maglev,
            dead_backend: DeadBackend::Reset,
            track_udp: false,
            tcp_idle: Duration::from_secs(60),
            udp_idle: Duration::from_secs(60),
            backends: backends.iter().map(|b| BackendPlan { port: *port, ..backend(b) }).collect(),
            consult_all_slots: false,
        };
        let services = shape.iter().map(service).collect();
        Tables::compile(Plan { revision: 1, groups: vec![group], services }, None).ok()
    }

    fn shapes() -> impl Strategy<Value = Vec<(Shape, Vec<prop::sample::Index>)>> {
        let backends =
            prop::collection::btree_map(0u32..4, 1u8..3, 0..4).prop_map(|b| b.into_iter().collect());
        let services = prop::collection::btree_map(0u32..4, (80u16..83, backends), 0..4);
        let shape = services.prop_map(|s| s.into_iter().map(|(id, (port, b))| (id, port, b)).collect());
        let held = prop::collection::vec(any::<prop::sample::Index>(), 0..3);
        prop::collection::vec((shape, held), 1..12)
    }

    proptest! {
        /// What stays in the plan keeps its state, what a flow refers to is given to nobody else, and no two share one.
        #[test]
        fn states_stay_with_what_they_are_the_state_of(shapes in shapes()) {
            let mut states = States::default();
            let mut old = Tables::default();
            let mut last: HashMap<_, u32> = HashMap::new();
            // Numbers of backends that flows refer to, with their identity.
            let mut held: HashMap<u32, (u32, u32, IpAddr, u16)> = HashMap::new();
            for (shape, holds) in shapes {
                let Some(new) = tables(&shape) else { continue };
                states.swap(&old, &new);
                let mut here = HashMap::new();
                for (index, service) in new.services().iter().enumerate() {
                    let index = index as u16;
                    let number = states.number(index);
                    prop_assert_eq!(states.service(number).index, Some(index));
                    for (place, backend) in service.backends.iter().enumerate() {
                        let place = place as u16;
                        let of_backend = states.backend_number(index, place);
                        prop_assert_eq!(states.backend(of_backend).index, Some(place));
                        prop_assert_eq!(
                            states.backend(of_backend).identity,
                            (number, backend.id, backend.address, backend.port)
                        );
                        here.insert((service.id, service.port, backend.id, backend.address), of_backend);
                    }
                }
                let mut numbers: Vec<u32> = here.values().copied().collect();
                numbers.sort_unstable();
                numbers.dedup();
                prop_assert_eq!(numbers.len(), here.len());
                for (identity, number) in &here {
                    if let Some(before) = last.get(identity) {
                        prop_assert_eq!(before, number);
                    }
                }
                for (number, identity) in &held {
                    prop_assert_eq!(&states.backend(*number).identity, identity);
                }
                // Flows come, and one goes.
                for hold in holds {
                    if numbers.is_empty() {
                        break;
                    }
                    let number = numbers[hold.index(numbers.len())];
                    if held.contains_key(&number) {
                        continue;
                    }
                    let identity = states.backend(number).identity;
                    held.insert(number, identity);
                    states.backend_mut(number).flows += 1;
                    states.services[identity.0 as usize].remembered += 1;
                }
                if held.len() > 3 {
                    let number = *held.keys().min().unwrap();
                    let (service, ..) = held.remove(&number).unwrap();
                    states.backend_mut(number).flows -= 1;
                    states.services[service as usize].remembered -= 1;
                }
                (old, last) = (new, here);
            }
        }
    }
}
