//! The maps of a loaded program, with a name for each thing that is done to them.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use aya::Ebpf;
use aya::maps::Map;

use super::abi::{
    self, BackendCell, Clock, Config, FilterLine, FlowCell, FlowKey, Hop, LeaseCell, NeighbourKey, Plain,
    PortCell, RouteKey, Seen, ServiceCell, Tally, Traffic,
};
use super::growing::Growth;
use super::program::{KernelError, Sizes};
use super::sys::{self, Mapped};
use super::table::FlowTable;
use super::ticks;
use crate::drops::Reason;
use crate::engine::{Event, Port};
use crate::flow::BackendSide;
use crate::neighbour::Mac;

/// What the program is to know of a service's remembered flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// There are none.
    None,
    /// There are some.
    Some {
        /// Whether all of them stand in the table, steady or not: then a packet whose flow isn't there is forwarded by hash, otherwise
        /// it goes up.
        conclusive: bool,
        /// The filter that says of which hashes they are.
        filter: Option<u32>,
    },
}

/// The maps of a loaded program. All calls may come from any thread; two writers of one thing must agree.
#[derive(Debug)]
pub struct Maps {
    sizes: Sizes,
    cpus: u32,
    pub(super) generation: OwnedFd,
    pub(super) slots: OwnedFd,
    flows: FlowTable,
    routes: OwnedFd,
    neighbours: OwnedFd,
    host: OwnedFd,
    config: Arc<Mapped<Config>>,
    backends: Mapped<BackendCell>,
    services: Mapped<ServiceCell>,
    filters: Mapped<FilterLine>,
    leases: Mapped<LeaseCell>,
    leases_fd: OwnedFd,
    traffic: Mapped<Traffic>,
    seen: Mapped<Seen>,
    tally: Arc<Mapped<Tally>>,
}

impl crate::lease::SharedCells for Maps {
    fn cell(&self, index: usize) -> &crate::lease::Cell {
        let words = self.leases.words(index as u32).and_then(|words| words.as_array());
        words.expect("there is a cell for each group, and `LeaseCell` is as long as a cell")
    }
}

impl Maps {
    /// Those that the loader made.
    pub(super) fn new(ebpf: &mut Ebpf, sizes: Sizes, cpus: u32) -> Result<Maps, KernelError> {
        let take = |name: &'static str| -> Result<OwnedFd, KernelError> {
            let map = ebpf.map(name).ok_or_else(|| io::Error::other("the object has no such map"));
            map.and_then(descriptor).map_err(KernelError::map(format!("open the map \"{name}\"")))
        };
        let leases_fd = take("leases")?;
        let config = Arc::new(mapped(&take("config")?, 1)?);
        config.write(0, &first_config(sizes));
        let tally = Arc::new(mapped(&take("tally")?, cpus)?);
        let flows = FlowTable::new(
            take("pool")?,
            take("names")?,
            (sizes.first_flows, sizes.flows),
            Arc::clone(&config),
            Arc::clone(&tally),
            mapped(&take("grants")?, cpus)?,
        );
        Ok(Maps {
            sizes,
            cpus,
            generation: take("generation")?,
            slots: take("slots")?,
            flows: flows.map_err(KernelError::map("make the table of flows"))?,
            routes: take("routes")?,
            neighbours: take("neighbours")?,
            host: take("host")?,
            config,
            backends: mapped(&take("backends")?, sizes.backends)?,
            services: mapped(&take("services")?, sizes.services)?,
            filters: mapped(&take("filters")?, abi::FILTERS * abi::FILTER_LINES)?,
            leases: mapped(&leases_fd, abi::LEASES)?,
            leases_fd,
            traffic: mapped(&take("traffic")?, sizes.backends.saturating_mul(cpus))?,
            seen: mapped(&take("seen")?, sizes.backends)?,
            tally,
        })
    }

    /// Room in the maps.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    // Configuration.

    /// Writes what the program needs to know of an interface; `None`: there is none. `up` (`tc`) is the index of the device to
    /// which frames go up.
    pub fn set_port(&self, port: Port, mac: Mac, ifindex: u32, mtu: u32, up: u32) {
        let cell = PortCell { mac: abi::mac_word(mac), ifindex, up, mtu, reserved: [0; 3] };
        self.write_port(port, cell);
    }

    /// The port is gone: frames that come by its interface pass.
    pub fn clear_port(&self, port: Port) {
        self.write_port(port, PortCell::zeroed());
    }

    fn write_port(&self, port: Port, cell: PortCell) {
        let mut config = self.config.read(0).unwrap_or(Config::zeroed());
        config.ports[port as usize] = cell;
        self.config.write(0, &config);
    }

    /// Tells the program whether every binding of full NAT is in the table, so that it may drop answers to none itself
    /// (`no_binding`).
    pub fn set_bound_complete(&self, complete: bool) {
        self.set_flags(abi::CONFIG_BOUND_COMPLETE, if complete { abi::CONFIG_BOUND_COMPLETE } else { 0 });
    }

    /// Whether answers of nat-transparent services pass through, by family: then ICMP errors to clients go up.
    pub(super) fn set_through(&self, v4: bool, v6: bool) {
        let flag = |on, flag| if on { flag } else { 0 };
        let (v4, v6) = (flag(v4, abi::CONFIG_THROUGH_V4), flag(v6, abi::CONFIG_THROUGH_V6));
        self.set_flags(abi::CONFIG_THROUGH_V4 | abi::CONFIG_THROUGH_V6, v4 | v6);
    }

    fn set_flags(&self, mask: u32, flags: u32) {
        const AT: usize = std::mem::offset_of!(Config, flags);
        const { assert!(AT.is_multiple_of(8), "the lower half of a word") };
        if let Some(word) = self.config.word(0, AT) {
            let change = |word: u64| Some(word & !u64::from(mask) | u64::from(flags));
            // The closure never refuses.
            let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        }
    }

    /// Says whether the next piece of news is to wake who waits for it.
    pub(super) fn set_wake(&self, wake: bool) {
        self.set_flags(abi::CONFIG_WAKE, if wake { abi::CONFIG_WAKE } else { 0 });
    }

    /// Says how many flows a processor may have made since the program was loaded; more than before, or fewer. It makes no more than
    /// there are cells for.
    pub fn set_grant(&self, cpu: u32, most: u64) {
        self.flows.grant(cpu, most);
    }

    /// Processors that the program counts for.
    pub fn cpus(&self) -> u32 {
        self.cpus
    }

    /// Names the table that holds the plan: one word, so that no packet sees two plans.
    pub(super) fn set_plan(&self, word: u64) {
        if let Some(at) = self.config.word(0, std::mem::offset_of!(Config, plan)) {
            at.store(word, Ordering::Release);
        }
    }

    /// Says how old a reading of the clock may be, in nanoseconds, that a lease is compared with; 0: the clock is read for every
    /// packet. What is right for the machine was written when the program was loaded.
    pub fn set_slack(&self, slack: u64) {
        if let Some(word) = self.config.word(0, std::mem::offset_of!(Config, slack)) {
            word.store(slack, Ordering::Release);
        }
    }

    /// Has every processor believe that this was its last reading of the clock, for tests.
    pub fn set_clocks(&self, clock: &Clock) {
        for cpu in 0..self.cpus {
            if let Some(tally) = self.tally.read(cpu) {
                self.tally.write(cpu, &Tally { clock: *clock, ..tally });
            }
        }
    }

    /// The configuration as it stands.
    pub fn config(&self) -> Config {
        self.config.read(0).unwrap_or(Config::zeroed())
    }

    /// Descriptor of the array that the leases stand in.
    pub fn leases_fd(&self) -> &OwnedFd {
        &self.leases_fd
    }

    /// The cells that the leases stand in, see [`crate::lease::LeaseBoard::shared`].
    pub fn leases(&self) -> &Mapped<LeaseCell> {
        &self.leases
    }

    // Backends and services, by the numbers of the engine's states.

    /// Writes a backend; `false` when the map has no place for its number.
    pub fn set_backend(&self, number: u32, cell: &BackendCell) -> bool {
        self.backends.write(number, cell)
    }

    /// A backend as it stands.
    pub fn backend(&self, number: u32) -> Option<BackendCell> {
        self.backends.read(number)
    }

    /// Writes the way to a backend: one word, so that no packet sees half of it.
    pub fn set_backend_hop(&self, number: u32, hop: Hop) {
        if let Some(word) = self.backends.word(number, std::mem::offset_of!(BackendCell, hop)) {
            word.store(hop.word(), Ordering::Release);
        }
    }

    /// Writes a service but for what is remembered of it; `false` when the map has no place for its number.
    pub fn set_service(&self, number: u32, cell: &ServiceCell) -> bool {
        let Some(before) = self.services.read(number) else { return false };
        let memory = before.flags & (abi::SERVICE_CONSULT | abi::SERVICE_CONCLUSIVE);
        let cell = ServiceCell { flags: cell.flags | memory, filter: before.filter, ..*cell };
        self.services.write(number, &cell)
    }

    /// A service as it stands.
    pub fn service(&self, number: u32) -> Option<ServiceCell> {
        self.services.read(number)
    }

    /// Says whether flows of a service are remembered, and where to look.
    pub fn set_memory(&self, service: u32, memory: Memory) {
        let Some(mut cell) = self.services.read(service) else { return };
        cell.flags &= !(abi::SERVICE_CONSULT | abi::SERVICE_CONCLUSIVE);
        let (consult, conclusive, filter) = match memory {
            Memory::None => (0, 0, None),
            Memory::Some { conclusive, filter } => {
                (abi::SERVICE_CONSULT, if conclusive { abi::SERVICE_CONCLUSIVE } else { 0 }, filter)
            }
        };
        cell.flags |= consult | conclusive;
        cell.filter = filter.map_or(0, |number| number + 1);
        self.services.write(service, &cell);
    }

    /// Says whether flows of that hash are among those that `filter` lets be looked for. All others' packets are treated as those
    /// of flows that are not remembered.
    pub fn set_filter(&self, filter: u32, hash: u32, remembered: bool) {
        let line = filter * abi::FILTER_LINES + (hash >> 25);
        let word = self.filters.word(line, (hash >> 22 & 7) as usize * 8);
        let Some(word) = word.filter(|_| filter < abi::FILTERS) else { return };
        let bit = 1 << (hash >> 16 & 63);
        if remembered {
            word.fetch_or(bit, Ordering::SeqCst);
        } else {
            word.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    /// The upper 16 bits of the hashes that `filter` lets be looked for.
    pub fn filter(&self, filter: u32) -> Vec<u16> {
        let lines =
            (0..abi::FILTER_LINES).filter_map(|line| self.filters.read(filter * abi::FILTER_LINES + line));
        let words = lines.flat_map(|line| line.bits);
        let bits = words.flat_map(|word| (0..64).map(move |bit| word >> bit & 1 == 1));
        (0..=u16::MAX).zip(bits).filter(|(_, set)| *set).map(|(hash, _)| hash).collect()
    }

    /// Has `filter` let nothing be looked for.
    pub fn clear_filter(&self, filter: u32) {
        for line in 0..abi::FILTER_LINES {
            self.filters.write(filter * abi::FILTER_LINES + line, &FilterLine::zeroed());
        }
    }

    // Flows.

    /// Writes a flow, with its name on the backend's side if it has one there. Another flow of one of these names is gone.
    ///
    /// # Errors
    /// `E2BIG`, `ENOMEM`: no room; the flow's packets go up, but not where the service is said to be conclusive.
    pub fn put_flow(&self, flow: &FlowCell, answers: Option<&BackendSide>) -> io::Result<()> {
        self.flows.put(flow, answers)
    }

    /// The flow of a client as it stands: `last_seen` is the program's.
    pub fn flow(&self, key: &FlowKey) -> Option<FlowCell> {
        self.flows.get(key)
    }

    /// The flow that a backend's answers are of, or a name that is only taken.
    pub fn answered(&self, name: &BackendSide) -> Option<FlowCell> {
        self.flows.answered(name)
    }

    /// Removes the flow of one of these names, and what has the other; `false` when there was none.
    pub fn remove_flow(&self, key: &FlowKey, answers: Option<&BackendSide>) -> bool {
        self.flows.remove(Some(key), answers)
    }

    /// Takes a name on the backend's side for a flow that is to be written, unless it is taken; whether it was free.
    ///
    /// # Errors
    /// As [`Maps::put_flow`].
    pub fn reserve_name(&self, name: &BackendSide) -> io::Result<bool> {
        self.flows.reserve(name)
    }

    /// Gives a name on the backend's side back; `false` when nobody had it.
    pub fn release_name(&self, name: &BackendSide) -> bool {
        self.flows.remove(None, Some(name))
    }

    /// Counts what there is of flows, one by one: names of clients, names of answers.
    pub fn count_flows(&self) -> (usize, usize) {
        self.flows.count()
    }

    /// Removes every flow, and with them what services remember. No program may be running.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn clear_flows(&self) -> io::Result<()> {
        self.flows.clear()?;
        for number in 0..self.sizes.services {
            self.set_memory(number, Memory::None);
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn table(&self) -> &FlowTable {
        &self.flows
    }

    // The table of flows grows.

    /// Whether it should, so that it has done so before it is full.
    pub fn should_grow(&self) -> bool {
        self.flows.is_short()
    }

    /// Lets it begin to.
    ///
    /// # Errors
    /// As bpf(2); then nothing was begun.
    pub fn begin_growing(&self) -> io::Result<()> {
        self.flows.begin()
    }

    /// Does a piece of it, some tens of microseconds.
    ///
    /// # Errors
    /// As bpf(2); it no longer grows.
    pub fn proceed_growing(&self) -> io::Result<Growth> {
        self.flows.proceed()
    }

    // Ways to clients.

    /// Writes a route: [`Hop::OnLink`] where the network is on a link, [`Hop::Known`] with the router's MAC,
    /// [`Hop::Unknown`] where that is not known, [`Hop::None`] where the route leads nowhere of ours. `prefix_len` is of the
    /// address's own family.
    ///
    /// # Errors
    /// As bpf(2): `ENOSPC` when there are too many.
    pub fn put_route(&self, network: IpAddr, prefix_len: u8, hop: Hop) -> io::Result<()> {
        sys::update(self.routes.as_fd(), &route_key(network, prefix_len), &hop.word(), 0)
    }

    /// Removes a route; `false` when it was not there.
    ///
    /// # Errors
    /// As bpf(2), other than that there is none.
    pub fn remove_route(&self, network: IpAddr, prefix_len: u8) -> io::Result<bool> {
        sys::delete(self.routes.as_fd(), &route_key(network, prefix_len))
    }

    /// Writes the MAC of an address on a link.
    ///
    /// # Errors
    /// As bpf(2): `E2BIG` when there are too many.
    pub fn put_neighbour(&self, port: Port, address: IpAddr, mac: Mac) -> io::Result<()> {
        let key = NeighbourKey { address: abi::wide(address), port: port as u32 };
        let word = Hop::Known { port, mac, on_link: true }.word();
        sys::update(self.neighbours.as_fd(), &key, &word, 0)
    }

    /// Removes an address on a link: packets to it go up. `false` when it was not there.
    ///
    /// # Errors
    /// As bpf(2), other than that there is none.
    pub fn remove_neighbour(&self, port: Port, address: IpAddr) -> io::Result<bool> {
        let key = NeighbourKey { address: abi::wide(address), port: port as u32 };
        sys::delete(self.neighbours.as_fd(), &key)
    }

    /// Says which addresses are the host's own.
    ///
    /// # Errors
    /// As bpf(2): `E2BIG` when there are more than 4096.
    pub fn set_host_addresses(&self, addresses: impl IntoIterator<Item = IpAddr>) -> io::Result<()> {
        let new: std::collections::HashSet<[u8; 16]> = addresses.into_iter().map(abi::wide).collect();
        let mut old = Vec::new();
        let mut at: Option<[u8; 16]> = None;
        while let Some(key) = sys::next_key(self.host.as_fd(), at.as_ref())? {
            old.push(key);
            at = Some(key);
        }
        for key in old.iter().filter(|key| !new.contains(*key)) {
            sys::delete(self.host.as_fd(), key)?;
        }
        for key in &new {
            sys::update(self.host.as_fd(), key, &1u32, 0)?;
        }
        Ok(())
    }

    // Counters.

    /// What passed a backend since its number was last [`Maps::reset_backend`].
    pub fn traffic(&self, number: u32) -> Traffic {
        let mut sum = Traffic::zeroed();
        if number >= self.sizes.backends {
            return sum;
        }
        for cpu in 0..self.cpus {
            let Some(t) = self.traffic.read(cpu * self.sizes.backends + number) else { continue };
            sum.packets += t.packets;
            sum.bytes += t.bytes;
            sum.return_packets += t.return_packets;
            sum.return_bytes += t.return_bytes;
            sum.new_flows += t.new_flows;
        }
        sum
    }

    /// Flows of a backend that are not remembered.
    pub fn seen(&self, number: u32) -> Option<Seen> {
        self.seen.read(number)
    }

    /// Forgets counters and flows seen of a backend, before its number is given to another.
    pub fn reset_backend(&self, number: u32) {
        if number >= self.sizes.backends {
            return;
        }
        for cpu in 0..self.cpus {
            self.traffic.write(cpu * self.sizes.backends + number, &Traffic::zeroed());
        }
        self.seen.write(number, &Seen::zeroed());
    }

    /// What became of frames, of all processors together.
    pub fn tally(&self) -> Tally {
        let mut sum = Tally::zeroed();
        for cpu in 0..self.cpus {
            let Some(t) = self.tally.read(cpu) else { continue };
            // Of the clocks the newest.
            if t.clock.now > sum.clock.now {
                sum.clock = t.clock;
            }
            let add = |to: &mut [u64], from: &[u64]| to.iter_mut().zip(from).for_each(|(to, n)| *to += n);
            add(&mut sum.events, &t.events);
            add(&mut sum.drops, &t.drops);
            add(&mut sum.up, &t.up);
            sum.made += t.made;
            sum.taken += t.taken;
        }
        sum
    }
}

impl Tally {
    /// Frames counted for `event`.
    pub fn event(&self, event: Event) -> u64 {
        self.events[event as usize]
    }

    /// Frames dropped for `reason`.
    pub fn drop(&self, reason: Reason) -> u64 {
        self.drops[reason as usize]
    }

    /// Frames that went up for that reason.
    pub fn up(&self, up: abi::Up) -> u64 {
        self.up[up as usize]
    }
}

fn first_config(sizes: Sizes) -> Config {
    Config { backends: sizes.backends, services: sizes.services, slack: ticks::slack(), ..Config::zeroed() }
}

fn route_key(network: IpAddr, prefix_len: u8) -> RouteKey {
    let bits = u32::from(prefix_len) + if network.is_ipv4() { 96 } else { 0 };
    RouteKey { prefix_len: bits.min(128), address: abi::wide(network) }
}

pub(super) fn mapped<T: Plain>(map: &OwnedFd, entries: u32) -> Result<Mapped<T>, KernelError> {
    Mapped::new(map.as_fd(), entries).map_err(KernelError::map("map an array of the program into memory"))
}

/// A descriptor of the loader's map.
pub(super) fn descriptor(map: &Map) -> io::Result<OwnedFd> {
    let data = match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::ArrayOfMaps(data)
        | Map::ProgramArray(data)
        | Map::RingBuf(data) => data,
        _ => return Err(io::Error::other("a map of another type than the program's source says")),
    };
    data.fd().as_fd().try_clone_to_owned()
}
