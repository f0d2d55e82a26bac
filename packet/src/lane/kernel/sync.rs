//! Keeps the program as the engine is: ports, plans, ways; and reads what it has counted. All of it on the engine's thread.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::abi::{self, Hop};
use super::attach::Attached;
use super::fill::{Filler, Snapshot};
use super::growing::Growth;
use super::maps::Maps;
use super::news::News;
use super::program::Kernel;
use super::tap::Tap;
use super::ways::Ways;
use crate::drops::Reason;
use crate::engine::{Engine, Event, Passed, Port, PortConfig, Windows};
use crate::lane::af_packet::below::Below;
use crate::lane::af_packet::hops::Hops;
use crate::lane::{Counters, LaneError};
use crate::neighbour::NextHops;
use crate::netlink;
use crate::time::BootTime;

const PORTS: [Port; Port::COUNT] = [Port::Service, Port::Inside];
/// Every backend's way is looked at so often, so that the kernel keeps its neighbour confirmed: nobody else tells it that the
/// entry is used. The kernel itself asks the neighbour at most every 15 to 45 s (`base_reachable_time_ms`).
const ROUND: Duration = Duration::from_secs(1);
/// Backends looked at in one go, some tens of nanoseconds each.
const AT_ONCE: usize = 2000;
/// Stale neighbours that the kernel is asked to confirm in one [`ROUND`] besides backends and routers: clients on the link,
/// while answers to clients pass. A few ARP requests a second.
const CONFIRM_AT_ONCE: usize = 32;

/// Between two looks whether the kernel has done what a larger table of flows waits for.
const GROWTH_NAP: Duration = Duration::from_millis(1);
/// After a failure to enlarge it.
const GROW_AGAIN: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub struct Sync {
    kernel: Kernel,
    maps: Arc<Maps>,
    news: News,
    filler: Filler,
    names: [Option<String>; Port::COUNT],
    taps: [Option<Tap>; Port::COUNT],
    attached: [Option<Attached>; Port::COUNT],
    /// Whether links are used where the kernel has them.
    links: bool,
    /// How it is attached, for `lane_mode`.
    mode: Arc<Mutex<String>>,
    net: netlink::Handle,
    ways: Ways,
    /// Backends of the plan in force: number of the state, address, way as it was written.
    backends: Vec<(u32, IpAddr, Hop)>,
    /// Lives of backends' numbers: another life, other counters.
    lives: HashMap<u32, u32>,
    /// Addresses have changed since the plan was written: what is answered for on which port depends on them.
    again: bool,
    cursor: usize,
    confirmed: usize,
    returned: u64,
    attend_at: BootTime,
    /// How far the table of flows has grown that is being enlarged.
    growth: Growth,
    /// When it may be tried again after it failed.
    grow_after: BootTime,
    /// When it was last looked after.
    grown_at: BootTime,
}

impl Sync {
    /// Nothing is attached before [`Below::follow`].
    pub fn new(
        kernel: Kernel,
        news: News,
        names: [Option<String>; Port::COUNT],
        taps: [Option<Tap>; Port::COUNT],
        links: bool,
        mode: Arc<Mutex<String>>,
        net: netlink::Handle,
    ) -> Sync {
        let maps = Arc::clone(kernel.maps());
        Sync {
            filler: Filler::new(Arc::clone(&maps)),
            ways: Ways::new(Arc::clone(&maps)),
            kernel,
            news,
            names,
            taps,
            attached: [None, None],
            links,
            mode,
            net,
            backends: Vec::new(),
            lives: HashMap::new(),
            again: false,
            cursor: 0,
            confirmed: 0,
            returned: 0,
            attend_at: BootTime(0),
            growth: Growth::None,
            grow_after: BootTime(0),
            grown_at: BootTime(0),
            maps,
        }
    }

    /// Does a piece of what it takes to let the table of flows grow, if it should.
    fn grow(&mut self, now: BootTime) {
        self.grown_at = now;
        let grown = match self.growth {
            Growth::None if now < self.grow_after || !self.maps.should_grow() => return,
            Growth::None => self.maps.begin_growing().map(|()| Growth::Waiting),
            _ => self.maps.proceed_growing(),
        };
        self.growth = grown.unwrap_or_else(|error| {
            tracing::warn!(%error, "the program's table of flows could not be made larger yet: beyond its room connections pass through user space; is the machine short of memory?");
            self.grow_after = now.after(GROW_AGAIN);
            Growth::None
        });
    }

    fn attach(&mut self, port: Port, config: &PortConfig) -> Result<(), String> {
        let p = port as usize;
        if self.attached[p].as_ref().is_some_and(|a| a.ifindex() == config.ifindex) {
            return Ok(());
        }
        // What was on another interface ends before its pin is needed again.
        self.attached[p] = None;
        let Some(name) = &self.names[p] else { return Ok(()) };
        let program = self.kernel.program_fd().map_err(|e| e.to_string())?;
        let attached = Attached::new(self.kernel.hook(), program, name, config.ifindex, self.links)?;
        tracing::info!(
            interface = name,
            hook = self.kernel.hook().as_str(),
            mode = attached.mode(),
            "program attached"
        );
        self.attached[p] = Some(attached);
        Ok(())
    }

    fn tell_mode(&self) {
        let mut modes: Vec<&str> = self.attached.iter().flatten().map(Attached::mode).collect();
        modes.dedup();
        let mode = if modes.is_empty() { "detached".to_owned() } else { modes.join("+") };
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
    }

    fn write_hops(&mut self, hops: &Hops) {
        for (number, address, written) in &mut self.backends {
            let hop = Hop::of(*address, hops.lookup(*address));
            if hop != *written {
                self.maps.set_backend_hop(*number, hop);
                *written = hop;
            }
        }
    }

    fn fill(&mut self, engine: &Engine, hops: &Hops) -> Result<(), super::program::KernelError> {
        let snapshot = Snapshot::of(engine);
        // A number that another backend has now starts to count anew. No program looks at it before the swap.
        for (number, _) in snapshot.backends() {
            let life = engine.backend_life(number);
            if self.lives.insert(number, life) != Some(life) {
                self.maps.reset_backend(number);
            }
        }
        let installed = self.filler.install(&snapshot, &|address| Hop::of(address, hops.lookup(address)))?;
        if installed.without_room > 0 {
            tracing::warn!(
                services = installed.without_room,
                "the program has no room for some services: all of their packets pass through user space"
            );
        }
        self.backends =
            snapshot.backends().map(|(number, a)| (number, a, Hop::of(a, hops.lookup(a)))).collect();
        self.cursor = 0;
        self.again = false;
        Ok(())
    }

    /// Lets the kernel know that neighbours are used which it sees nothing of.
    fn confirm(&mut self, hops: &Hops) {
        let end = (self.cursor + AT_ONCE).min(self.backends.len());
        for (_, address, _) in &self.backends[self.cursor..end] {
            // Looking a stale one up notes it.
            let _ = hops.lookup(*address);
        }
        self.cursor = if end >= self.backends.len() { 0 } else { end };
        if self.cursor != 0 {
            return;
        }
        for gateway in self.ways.gateways() {
            let _ = hops.lookup(*gateway);
        }
        let returned = self.maps.tally().event(Event::Returned);
        if std::mem::replace(&mut self.returned, returned) == returned {
            return;
        }
        let snapshot = hops.snapshot();
        let indices = PORTS.map(|p| hops.index(p));
        let stale =
            snapshot.neighbours.iter().filter(|((index, _), n)| n.stale && indices.contains(&Some(*index)));
        let stale: Vec<_> = stale.map(|(key, _)| *key).collect();
        if stale.is_empty() {
            return;
        }
        for i in 0..CONFIRM_AT_ONCE.min(stale.len()) {
            let (index, address) = stale[(self.confirmed + i) % stale.len()];
            self.net.use_neighbour(index, address);
        }
        self.confirmed = self.confirmed.wrapping_add(CONFIRM_AT_ONCE);
    }
}

impl Below for Sync {
    fn comes_up_by(&self, port: Port) -> Option<u32> {
        self.taps[port as usize].as_ref().map(|tap| tap.index)
    }

    fn follow(&mut self, ports: [Option<&PortConfig>; Port::COUNT]) -> Result<(), String> {
        let mut outcome = Ok(());
        let own = ports.iter().flatten().flat_map(|p| p.addresses.iter().map(|(a, _)| *a));
        if let Err(e) = self.maps.set_host_addresses(own) {
            outcome = Err(format!("tell the program the host's addresses: {e}"));
        }
        self.again = true;
        for port in PORTS {
            let Some(config) = ports[port as usize] else {
                self.maps.clear_port(port);
                self.attached[port as usize] = None;
                continue;
            };
            let up = self.comes_up_by(port).unwrap_or(0);
            self.maps.set_port(port, config.mac, config.ifindex, config.mtu, up);
            if let Err(e) = self.attach(port, config) {
                outcome = Err(e);
            }
        }
        self.tell_mode();
        outcome
    }

    fn install(&mut self, engine: &Engine, hops: &Hops) -> Result<(), LaneError> {
        self.fill(engine, hops).map_err(|e| LaneError::System {
            doing: format!("put the plan at revision {} in force in the kernel", engine.tables().revision()),
            source: std::io::Error::other(e),
        })
    }

    fn learn(&mut self, engine: &mut Engine, now: BootTime) {
        self.news.learn(engine, now);
        if self.growth == Growth::None {
            self.grow(now);
        }
    }

    fn doze(&mut self, now: BootTime) -> Option<Duration> {
        self.news.doze(now)
    }

    fn wakes(&self) -> Option<BorrowedFd<'_>> {
        self.news.wakes()
    }

    fn hops_changed(&mut self, engine: &Engine, hops: &Hops, _now: BootTime) {
        let port_of = |index: u32| PORTS.into_iter().find(|p| hops.index(*p) == Some(index));
        if let Err(error) = self.ways.update(hops.snapshot(), port_of) {
            tracing::warn!(%error, "the program could not be told of the kernel's routes");
        }
        if self.again {
            if let Err(error) = self.fill(engine, hops) {
                tracing::warn!(%error, "the program could not be told of the interfaces' addresses");
            }
        } else {
            self.write_hops(hops);
        }
    }

    fn attend(&mut self, engine: &mut Engine, hops: &Hops, now: BootTime) {
        if self.growth != Growth::None {
            self.grow(now);
        }
        if self.attend_at > now {
            return;
        }
        self.news.grant(engine, now);
        if self.again
            && let Err(error) = self.fill(engine, hops)
        {
            tracing::warn!(%error, "the program could not be told of the interfaces' addresses");
        }
        self.confirm(hops);
        let parts = self.backends.len().div_ceil(AT_ONCE).max(1) as u32;
        self.attend_at = now.after(ROUND / parts);
    }

    fn next_deadline(&self) -> BootTime {
        match self.growth {
            Growth::None => self.attend_at,
            Growth::Waiting => self.attend_at.min(self.grown_at.after(GROWTH_NAP)),
            Growth::Copying => BootTime(0),
        }
    }

    fn counters(&mut self, engine: &Engine, now: BootTime) -> Counters {
        let maps = &self.maps;
        let mut counters = engine.counters_with(now, |number| {
            let traffic = maps.traffic(number);
            let seen = maps.seen(number)?;
            Some(Passed {
                packets: traffic.packets,
                bytes: traffic.bytes,
                return_packets: traffic.return_packets,
                return_bytes: traffic.return_bytes,
                new_flows: traffic.new_flows,
                seen: Some(Windows { window: seen.window, registers: seen.registers }),
            })
        });
        let tally = maps.tally();
        // Both list them in the same order.
        for (counter, reason) in counters.drops.iter_mut().zip(Reason::ALL) {
            counter.1 += tally.drop(*reason);
        }
        for (counter, event) in counters.events.iter_mut().zip(Event::ALL) {
            counter.1 += tally.event(*event);
        }
        counters.events.extend(abi::Up::ALL.iter().map(|up| (up.event(), tally.up(*up))));
        counters
    }
}
