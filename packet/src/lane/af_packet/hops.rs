//! The engine's view of the kernel's routes and neighbours.

use std::cell::RefCell;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::Port;
use crate::neighbour::{NextHop, NextHops};
use crate::netlink::{Hop, Snapshot};
use crate::time::BootTime;

/// Answers remembered, so that a frame costs one comparison instead of a longest-prefix match. Direct-mapped: a power of
/// two, of the size of a busy hour's backends and gateways.
const CACHE: usize = 1024;
/// Answers are looked up anew after this time, so that a stale neighbour that is still used is asked for again.
const CACHE_TIME: Duration = Duration::from_secs(1);
/// Stale neighbours noted until [`Hops::take_stale`]. What is lost is noted again within [`CACHE_TIME`].
const MAX_STALE: usize = 256;

/// Next hops out of a snapshot.
#[derive(Debug)]
pub struct Hops {
    snapshot: Arc<Snapshot>,
    ports: [Option<u32>; Port::COUNT],
    cleared_at: BootTime,
    inner: RefCell<Inner>,
}

#[derive(Debug)]
struct Inner {
    cache: Box<[Option<(IpAddr, NextHop)>]>,
    stale: Vec<(u32, IpAddr)>,
}

impl Hops {
    /// A view of `snapshot` through the interfaces numbered `ports`.
    pub fn new(snapshot: Arc<Snapshot>, ports: [Option<u32>; Port::COUNT]) -> Hops {
        let inner = Inner { cache: vec![None; CACHE].into(), stale: Vec::new() };
        Hops { snapshot, ports, cleared_at: BootTime(0), inner: RefCell::new(inner) }
    }

    /// Takes a newer snapshot.
    pub fn update(&mut self, snapshot: Arc<Snapshot>, ports: [Option<u32>; Port::COUNT]) {
        self.snapshot = snapshot;
        self.ports = ports;
        self.inner.get_mut().cache.fill(None);
    }

    /// The snapshot in use.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// Interface number of a port.
    pub fn index(&self, port: Port) -> Option<u32> {
        self.ports[port as usize]
    }

    /// Address of a neighbour on a port's segment, if known.
    pub fn mac(&self, port: Port, next_hop: IpAddr) -> Option<[u8; 6]> {
        let index = self.index(port)?;
        self.snapshot.neighbours.get(&(index, next_hop)).map(|n| n.mac)
    }

    /// Forgets answers that are older than [`CACHE_TIME`].
    pub fn refresh(&mut self, now: BootTime) {
        if now.since(self.cleared_at) >= CACHE_TIME {
            self.cleared_at = now;
            self.inner.get_mut().cache.fill(None);
        }
    }

    /// Neighbours that were used though stale, since the last call: the kernel should confirm them.
    pub fn take_stale(&mut self) -> std::vec::Drain<'_, (u32, IpAddr)> {
        self.inner.get_mut().stale.drain(..)
    }

    fn port_of(&self, index: u32) -> Option<Port> {
        [Port::Service, Port::Inside].into_iter().find(|p| self.index(*p) == Some(index))
    }

    fn find(&self, inner: &mut Inner, destination: IpAddr) -> NextHop {
        match self.snapshot.hop(destination) {
            Hop::NoRoute => NextHop::NoRoute,
            Hop::Unresolved { index, neighbour } => match self.port_of(index) {
                Some(port) => NextHop::Unresolved { port, next_hop: neighbour },
                None => NextHop::NoRoute,
            },
            Hop::Known { index, neighbour, entry } => match self.port_of(index) {
                Some(port) => {
                    if entry.stale && inner.stale.len() < MAX_STALE {
                        inner.stale.push((index, neighbour));
                    }
                    NextHop::Resolved { port, next_hop: neighbour, mac: entry.mac }
                }
                None => NextHop::NoRoute,
            },
        }
    }
}

impl NextHops for Hops {
    fn lookup(&self, destination: IpAddr) -> NextHop {
        let inner = &mut *self.inner.borrow_mut();
        let slot = cache_slot(destination);
        if let Some((address, hop)) = inner.cache[slot]
            && address == destination
        {
            return hop;
        }
        let hop = self.find(inner, destination);
        inner.cache[slot] = Some((destination, hop));
        hop
    }
}

fn cache_slot(address: IpAddr) -> usize {
    let bits = match address {
        IpAddr::V4(a) => u64::from(a.to_bits()),
        IpAddr::V6(a) => {
            let bits = a.to_bits();
            bits as u64 ^ (bits >> 64) as u64
        }
    };
    // Fibonacci hashing (Knuth, TAOCP 3, §6.4): the high bits of the product depend on all bits of the address.
    (bits.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - CACHE.trailing_zeros())) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{Neighbour, Neighbours, Route, Routes, Via};

    fn ip(s: &str) -> IpAddr {
        s.parse().unwrap()
    }

    fn snapshot(neighbours: &[(u32, &str, bool)]) -> Arc<Snapshot> {
        let route = |network, prefix_len, via| Route { network: ip(network), prefix_len, metric: 0, via };
        Arc::new(Snapshot {
            routes: Arc::new(Routes::new([
                route("192.0.2.0", 24, Via::Link { index: 2 }),
                route("10.0.0.0", 8, Via::Link { index: 3 }),
                route("172.16.0.0", 12, Via::Link { index: 99 }),
                route("0.0.0.0", 0, Via::Gateway { index: 2, address: ip("192.0.2.1") }),
            ])),
            neighbours: Arc::new(
                neighbours
                    .iter()
                    .map(|(i, a, stale)| ((*i, ip(a)), Neighbour { mac: [*i as u8; 6], stale: *stale }))
                    .collect::<Neighbours>(),
            ),
            ..Snapshot::default()
        })
    }

    const PORTS: [Option<u32>; 2] = [Some(2), Some(3)];

    #[test]
    fn routes_lead_to_ports_and_never_out_of_a_foreign_interface() {
        let hops = Hops::new(snapshot(&[(3, "10.0.0.5", false)]), PORTS);
        assert_eq!(
            hops.lookup(ip("10.0.0.5")),
            NextHop::Resolved { port: Port::Inside, next_hop: ip("10.0.0.5"), mac: [3; 6] }
        );
        assert_eq!(
            hops.lookup(ip("8.8.8.8")),
            NextHop::Unresolved { port: Port::Service, next_hop: ip("192.0.2.1") }
        );
        assert_eq!(hops.lookup(ip("172.16.0.1")), NextHop::NoRoute);
        assert_eq!(hops.lookup(ip("2001:db8::1")), NextHop::NoRoute);
    }

    #[test]
    fn a_newer_snapshot_is_believed_at_once() {
        let mut hops = Hops::new(snapshot(&[]), PORTS);
        assert!(matches!(hops.lookup(ip("192.0.2.7")), NextHop::Unresolved { .. }));
        hops.update(snapshot(&[(2, "192.0.2.7", false)]), PORTS);
        assert!(matches!(hops.lookup(ip("192.0.2.7")), NextHop::Resolved { .. }));
    }

    #[test]
    fn a_stale_neighbour_in_use_is_noted_once_a_second() {
        let mut hops = Hops::new(snapshot(&[(2, "192.0.2.1", true)]), PORTS);
        for _ in 0..100 {
            hops.lookup(ip("8.8.8.8"));
        }
        assert_eq!(hops.take_stale().collect::<Vec<_>>(), [(2, ip("192.0.2.1"))]);
        hops.refresh(BootTime(2_000_000_000));
        hops.lookup(ip("8.8.8.8"));
        assert_eq!(hops.take_stale().count(), 1);
    }
}
