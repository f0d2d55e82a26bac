//! The flow table: bounded, two keys, no allocation after it was made except for entries that come for the first time.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use crate::time::BootTime;

use super::index::Index;
use super::state::{Direction, Progress, Segment, State};
use super::wheel::{HasLinks, Links, NONE, Wheel};

/// An address in 16 bytes; IPv4 as IPv4-mapped. Which family it is follows from the service.
fn wide(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

fn narrow(octets: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(octets).to_canonical()
}

/// A flow's name as its client's packets carry it. The service stands for VIP, port and protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientSide {
    /// Number of the service's state in the engine.
    pub service: u32,
    /// Client's address.
    pub client: IpAddr,
    /// Client's port.
    pub client_port: u16,
}

/// A flow's name as its backend's answers carry it (full NAT only).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendSide {
    /// L4 protocol, IANA number.
    pub protocol: u8,
    /// Backend's address.
    pub backend: IpAddr,
    /// Backend's port.
    pub backend_port: u16,
    /// SNAT address.
    pub snat: IpAddr,
    /// SNAT port.
    pub snat_port: u16,
}

/// A flow to remember.
#[derive(Clone, Copy, Debug)]
pub struct NewFlow {
    /// Its name on the client's side.
    pub client_side: ClientSide,
    /// Its name on the backend's side (full NAT).
    pub backend_side: Option<BackendSide>,
    /// Number of the backend's state in the engine.
    pub backend: u32,
    /// The packet that made it known.
    pub first: Segment,
    /// The service's idle time for its protocol.
    pub idle: Duration,
}

/// Names an entry of the table until it is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowId(u32);

/// A remembered flow.
#[derive(Clone, Debug)]
pub struct Flow {
    client: [u8; 16],
    snat: [u8; 16],
    backend_address: [u8; 16],
    last_seen: BootTime,
    service: u32,
    /// Number of the backend's state in the engine.
    pub backend: u32,
    idle_ms: u32,
    client_port: u16,
    snat_port: u16,
    backend_port: u16,
    protocol: u8,
    bound: bool,
    progress: Progress,
    wheel: Links,
    /// Links in the list of unassured flows, oldest first.
    older: u32,
    newer: u32,
    /// See [`Flow::mark`].
    mark: u32,
    /// Others were told of it, and not yet that it has ended.
    told: bool,
    /// See [`Flow::version`].
    version: u8,
}

/// Versions of a flow's state come round again.
const VERSIONS: u8 = 1 << 5;

impl Flow {
    /// Counts the changes of its state, below 32: of two versions the later one is less than half the way round ahead.
    pub fn version(&self) -> u8 {
        self.version
    }

    /// Whether its backend was heard.
    pub fn is_answered(&self) -> bool {
        self.progress.answered
    }

    /// L4 protocol and SNAT port (full NAT).
    pub fn bound_port(&self) -> Option<(u8, u16)> {
        self.bound.then_some((self.protocol, self.snat_port))
    }

    /// By which sending of another node it was taken over from there; 0: it is this node's own.
    pub fn mark(&self) -> u32 {
        self.mark
    }

    /// Whether others were told of it, and not yet that it has ended.
    pub fn is_told(&self) -> bool {
        self.told
    }

    /// Whether its other side was heard ([module documentation](crate::flow::State)).
    pub fn is_assured(&self) -> bool {
        self.progress.assured
    }

    /// All of its state in a byte that means the same to every node.
    pub fn progress_bits(&self) -> u8 {
        self.progress.to_bits()
    }

    /// From now on it is this node's own.
    pub fn own(&mut self) {
        self.mark = 0;
    }

    /// Its name on the client's side.
    pub fn client_side(&self) -> ClientSide {
        ClientSide { service: self.service, client: narrow(self.client), client_port: self.client_port }
    }

    /// Its name on the backend's side (full NAT).
    pub fn backend_side(&self) -> Option<BackendSide> {
        self.bound.then(|| BackendSide {
            protocol: self.protocol,
            backend: narrow(self.backend_address),
            backend_port: self.backend_port,
            snat: narrow(self.snat),
            snat_port: self.snat_port,
        })
    }

    /// Number of the service's state in the engine.
    pub fn service(&self) -> u32 {
        self.service
    }

    /// Its state.
    pub fn state(&self) -> State {
        self.progress.state
    }

    /// Whether a plain segment or datagram changes nothing of it but the time of its last packet.
    pub fn is_steady(&self) -> bool {
        self.progress.is_steady()
    }

    /// Whether a SYN from the client begins a new flow of the same name.
    pub fn reopens(&self) -> bool {
        self.progress.reopens()
    }

    /// When its last packet came.
    pub fn last_seen(&self) -> BootTime {
        self.last_seen
    }

    fn deadline_ns(&self) -> u64 {
        self.last_seen.0.saturating_add(u64::from(self.idle_ms) * 1_000_000)
    }

    fn set_idle(&mut self, idle: Duration) {
        self.idle_ms = u32::try_from(self.progress.state.idle(idle).as_millis()).unwrap_or(u32::MAX);
    }
}

/// What an insertion did.
#[derive(Debug)]
pub struct Inserted {
    /// The new entry.
    pub id: FlowId,
    /// The unassured flow that made room for it.
    pub evicted: Option<Flow>,
}

/// What a packet did to its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touched {
    before: Progress,
    after: Progress,
}

impl Touched {
    /// State before and after.
    #[inline]
    pub fn states(&self) -> (State, State) {
        (self.before.state, self.after.state)
    }

    /// Whether the flow has become steady ([`Flow::is_steady`]) or ceased to be.
    #[inline]
    pub fn changes_steadiness(&self) -> bool {
        self.before != self.after && self.before.is_steady() != self.after.is_steady()
    }

    /// Whether anything has changed but when its last packet came.
    #[inline]
    pub fn changes(&self) -> bool {
        self.before != self.after
    }

    /// Whether its backend was heard for the first time.
    #[inline]
    pub fn answers(&self) -> bool {
        self.after.answered && !self.before.answered
    }

    /// Whether the flow has become assured.
    #[inline]
    pub fn assures(&self) -> bool {
        self.after.assured && !self.before.assured
    }

    /// Whether the flow has ended.
    #[inline]
    pub fn ends(&self) -> bool {
        self.after.state == State::Closed && self.before.state != State::Closed
    }
}

/// The table is full of assured flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the flow table is full of established flows")]
pub struct TableFull;

/// Entries with their free list.
#[derive(Debug, Default)]
struct Entries {
    slots: Vec<Option<Flow>>,
    free: Vec<u32>,
}

impl Entries {
    fn get(&self, entry: u32) -> &Flow {
        self.slots[entry as usize].as_ref().expect("the indexes and lists name living entries only")
    }

    fn get_mut(&mut self, entry: u32) -> &mut Flow {
        self.slots[entry as usize].as_mut().expect("the indexes and lists name living entries only")
    }
}

impl HasLinks for Entries {
    fn links(&mut self, entry: u32) -> &mut Links {
        &mut self.get_mut(entry).wheel
    }
}

/// The flow table.
#[derive(Debug)]
pub struct FlowTable {
    entries: Entries,
    by_client: Index,
    by_backend: Index,
    wheel: Wheel,
    oldest_unassured: u32,
    newest_unassured: u32,
    unassured: usize,
    len: usize,
    max: usize,
    secret: [u64; 3],
}

impl FlowTable {
    /// A table of at most `max` flows. `seed` keys its hashes.
    pub fn new(max: usize, seed: u64) -> FlowTable {
        let max = max.max(1);
        // Three numbers from one by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        FlowTable {
            entries: Entries::default(),
            by_client: Index::new(max),
            by_backend: Index::new(max),
            wheel: Wheel::new(),
            oldest_unassured: NONE,
            newest_unassured: NONE,
            unassured: 0,
            len: 0,
            max,
            secret: [next(), next(), next()],
        }
    }

    /// Flows remembered.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Flows that could still be remembered, if those that are unassured made room.
    pub fn room(&self) -> usize {
        self.max - (self.len - self.unassured)
    }

    /// The flow of that name.
    #[inline]
    pub fn find(&self, key: &ClientSide) -> Option<FlowId> {
        let client = wide(key.client);
        let entries = &self.entries;
        self.by_client
            .find(self.client_hash(&client, key.service, key.client_port), |entry| {
                let flow = entries.get(entry);
                flow.client == client && flow.service == key.service && flow.client_port == key.client_port
            })
            .map(FlowId)
    }

    /// The flow whose backend knows it by that name.
    #[inline]
    pub fn find_answered(&self, key: &BackendSide) -> Option<FlowId> {
        let (backend, snat) = (wide(key.backend), wide(key.snat));
        let ports = (key.protocol, key.backend_port, key.snat_port);
        let entries = &self.entries;
        self.by_backend
            .find(self.backend_hash(&backend, &snat, ports), |entry| {
                let flow = entries.get(entry);
                flow.backend_address == backend
                    && flow.snat == snat
                    && (flow.protocol, flow.backend_port, flow.snat_port) == ports
            })
            .map(FlowId)
    }

    /// An entry.
    ///
    /// # Panics
    /// It has been removed.
    pub fn get(&self, id: FlowId) -> &Flow {
        self.entries.get(id.0)
    }

    /// Remembers a flow whose names are both new. When the table is full, the flow that has been unassured for longest makes
    /// room.
    ///
    /// # Errors
    /// The table is full and every flow in it is assured.
    pub fn insert(&mut self, new: NewFlow, now: BootTime) -> Result<Inserted, TableFull> {
        debug_assert!(self.find(&new.client_side).is_none(), "a flow is remembered once");
        let mut evicted = None;
        if self.len == self.max {
            let oldest = self.oldest_unassured;
            if oldest == NONE {
                return Err(TableFull);
            }
            evicted = Some(self.remove(FlowId(oldest)));
        }
        if self.len == 0 {
            self.wheel.skip_to(now.0);
        }
        let unbound = BackendSide {
            protocol: 0,
            backend: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            backend_port: 0,
            snat: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            snat_port: 0,
        };
        let bound = new.backend_side.unwrap_or(unbound);
        let mut flow = Flow {
            client: wide(new.client_side.client),
            snat: wide(bound.snat),
            backend_address: wide(bound.backend),
            last_seen: now,
            service: new.client_side.service,
            backend: new.backend,
            idle_ms: 0,
            client_port: new.client_side.client_port,
            snat_port: bound.snat_port,
            backend_port: bound.backend_port,
            protocol: bound.protocol,
            bound: new.backend_side.is_some(),
            progress: Progress::new(new.first, new.backend_side.is_some()),
            wheel: Links::UNLINKED,
            older: NONE,
            newer: NONE,
            mark: 0,
            told: false,
            version: 0,
        };
        flow.set_idle(new.idle);
        Ok(Inserted { id: self.place(flow), evicted })
    }

    /// Puts a flow in, for which there is room.
    fn place(&mut self, flow: Flow) -> FlowId {
        let (client_hash, backend_hash) = self.hashes(&flow);
        let (deadline_ns, assured) = (flow.deadline_ns(), flow.progress.assured);
        let entry = match self.entries.free.pop() {
            Some(entry) => {
                self.entries.slots[entry as usize] = Some(flow);
                entry
            }
            None => {
                self.entries.slots.push(Some(flow));
                self.entries.slots.len() as u32 - 1
            }
        };
        self.by_client.insert(client_hash, entry);
        if let Some(hash) = backend_hash {
            self.by_backend.insert(hash, entry);
        }
        self.wheel.schedule(&mut self.entries, entry, deadline_ns);
        if !assured {
            self.push_unassured(entry);
        }
        self.len += 1;
        FlowId(entry)
    }

    /// Takes note of a packet of a flow; returns what it did. `idle` is the service's idle time for its
    /// protocol.
    ///
    /// # Panics
    /// The flow has been removed.
    #[inline]
    pub fn touch(
        &mut self,
        id: FlowId,
        segment: Segment,
        direction: Direction,
        idle: Duration,
        now: BootTime,
    ) -> Touched {
        let mut after = self.entries.get(id.0).progress;
        after.advance(segment, direction);
        self.change(id, after, 1, idle, now)
    }

    /// Puts a flow in another state, so many versions on, because of a packet that came at `now`.
    fn change(
        &mut self,
        id: FlowId,
        after: Progress,
        versions: u8,
        idle: Duration,
        now: BootTime,
    ) -> Touched {
        let flow = self.entries.get_mut(id.0);
        flow.last_seen = flow.last_seen.max(now);
        let before = std::mem::replace(&mut flow.progress, after);
        if before != after {
            flow.version = flow.version.wrapping_add(versions) % VERSIONS;
        }
        flow.set_idle(idle);
        let (due, deadline_ns) = (flow.wheel.due, flow.deadline_ns());
        if before.assured != after.assured {
            if after.assured {
                self.unlink_unassured(id.0);
            } else {
                self.push_unassured(id.0);
            }
        }
        if before.state != after.state && self.wheel.is_late(due, deadline_ns) {
            self.wheel.unlink(&mut self.entries, id.0);
            self.wheel.schedule(&mut self.entries, id.0, deadline_ns);
        }
        Touched { before, after }
    }

    /// Forgets a flow.
    ///
    /// # Panics
    /// It has been removed already.
    pub fn remove(&mut self, id: FlowId) -> Flow {
        self.wheel.unlink(&mut self.entries, id.0);
        self.remove_unscheduled(id.0)
    }

    /// Forgets the next flow that has idled out before `now`. Each flow or tick looked at costs one of `budget`; `None` with
    /// some of it left means that there is none. `seen` is asked before a flow is forgotten: when its last packet passed
    /// elsewhere.
    pub fn expire(
        &mut self,
        now: BootTime,
        budget: &mut usize,
        mut seen: impl FnMut(&mut Flow) -> Option<BootTime>,
    ) -> Option<Flow> {
        if self.len == 0 {
            self.wheel.skip_to(now.0);
            return None;
        }
        while let Some(entry) = self.wheel.pop(&mut self.entries, now.0, budget) {
            let mut deadline_ns = self.entries.get(entry).deadline_ns();
            if deadline_ns <= now.0 {
                let flow = self.entries.get_mut(entry);
                if let Some(seen) = seen(flow) {
                    // A clock read elsewhere may be a moment ahead, and must not keep a flow for ever.
                    flow.last_seen = flow.last_seen.max(seen.min(now));
                }
                deadline_ns = flow.deadline_ns();
            }
            if deadline_ns <= now.0 {
                return Some(self.remove_unscheduled(entry));
            }
            self.wheel.schedule(&mut self.entries, entry, deadline_ns.max(now.0));
        }
        None
    }

    /// When [`Self::expire`] may have something to do next; `None` while the table is empty.
    pub fn next_deadline(&self) -> Option<BootTime> {
        (self.len > 0).then(|| BootTime(self.wheel.deadline_ns()))
    }

    /// Every flow, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.entries.slots.iter().flatten()
    }

    fn remove_unscheduled(&mut self, entry: u32) -> Flow {
        if !self.entries.get(entry).progress.assured {
            self.unlink_unassured(entry);
        }
        let flow = self.entries.slots[entry as usize]
            .take()
            .expect("the indexes and lists name living entries only");
        let (client_hash, backend_hash) = self.hashes(&flow);
        self.by_client.remove(client_hash, entry);
        if let Some(hash) = backend_hash {
            self.by_backend.remove(hash, entry);
        }
        self.entries.free.push(entry);
        self.len -= 1;
        flow
    }

    fn push_unassured(&mut self, entry: u32) {
        self.unassured += 1;
        let older = self.newest_unassured;
        let flow = self.entries.get_mut(entry);
        (flow.older, flow.newer) = (older, NONE);
        self.newest_unassured = entry;
        if older == NONE {
            self.oldest_unassured = entry;
        } else {
            self.entries.get_mut(older).newer = entry;
        }
    }

    fn unlink_unassured(&mut self, entry: u32) {
        self.unassured -= 1;
        let (older, newer) = {
            let flow = self.entries.get(entry);
            (flow.older, flow.newer)
        };
        if older == NONE {
            self.oldest_unassured = newer;
        } else {
            self.entries.get_mut(older).newer = newer;
        }
        if newer == NONE {
            self.newest_unassured = older;
        } else {
            self.entries.get_mut(newer).older = older;
        }
    }

    fn hashes(&self, flow: &Flow) -> (u32, Option<u32>) {
        let ports = (flow.protocol, flow.backend_port, flow.snat_port);
        (
            self.client_hash(&flow.client, flow.service, flow.client_port),
            flow.bound.then(|| self.backend_hash(&flow.backend_address, &flow.snat, ports)),
        )
    }

    #[inline]
    fn client_hash(&self, client: &[u8; 16], service: u32, client_port: u16) -> u32 {
        let [a, b, c] = self.secret;
        let (high, low) = halves(client);
        let rest = u64::from(service) << 16 | u64::from(client_port);
        fold(fold(high ^ a, low ^ b) ^ rest, c) as u32
    }

    #[inline]
    fn backend_hash(
        &self,
        backend: &[u8; 16],
        snat: &[u8; 16],
        (protocol, backend_port, snat_port): (u8, u16, u16),
    ) -> u32 {
        let [a, b, c] = self.secret;
        let (backend_high, backend_low) = halves(backend);
        let (snat_high, snat_low) = halves(snat);
        let ports = u64::from(protocol) << 32 | u64::from(backend_port) << 16 | u64::from(snat_port);
        let hash = fold(backend_high ^ a, backend_low ^ b);
        let hash = fold(snat_high ^ hash ^ b, snat_low ^ c);
        fold(hash ^ ports, a) as u32
    }
}

fn halves(octets: &[u8; 16]) -> (u64, u64) {
    let bits = u128::from_be_bytes(*octets);
    ((bits >> 64) as u64, bits as u64)
}

/// Both halves of the 128-bit product, one over the other: every bit of the result depends on every bit of both.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

mod adopt;
#[cfg(test)]
mod tests;
