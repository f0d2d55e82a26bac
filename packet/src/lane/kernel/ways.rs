//! The kernel's routes and neighbours as the program needs them, kept as the snapshots have them.
//!
//! The program has its own copy because `bpf_fib_lookup()` answers for interfaces that forward only, and the host must not
//! forward: it would send a second copy of what is ours. Only differences are written.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::abi::Hop;
use super::maps::Maps;
use crate::engine::Port;
use crate::neighbour::Mac;
use crate::netlink::{Snapshot, Via};

/// Gateways that are kept confirmed.
const MAX_GATEWAYS: usize = 64;

/// What was written.
#[derive(Debug)]
pub struct Ways {
    maps: Arc<Maps>,
    routes: HashMap<(IpAddr, u8), Hop>,
    neighbours: HashMap<(Port, IpAddr), Mac>,
    gateways: Vec<IpAddr>,
    told: bool,
}

impl Ways {
    /// Nothing written yet.
    pub fn new(maps: Arc<Maps>) -> Ways {
        Ways { maps, routes: HashMap::new(), neighbours: HashMap::new(), gateways: Vec::new(), told: false }
    }

    /// Routers that packets to clients may take.
    pub fn gateways(&self) -> &[IpAddr] {
        &self.gateways
    }

    /// Writes what has changed. `port_of` says which port an interface is.
    ///
    /// # Errors
    /// A map could not be written; the next call tries again.
    pub fn update(&mut self, snapshot: &Snapshot, port_of: impl Fn(u32) -> Option<Port>) -> io::Result<()> {
        let known = |index: u32, address: IpAddr| snapshot.neighbours.get(&(index, address)).map(|n| n.mac);
        let mut routes = HashMap::new();
        let mut gateways = Vec::new();
        for (network, prefix_len, via) in snapshot.routes.iter() {
            let hop = match via {
                Via::Nowhere => Hop::None,
                Via::Link { index } => port_of(index).map_or(Hop::None, |port| Hop::OnLink { port }),
                Via::Gateway { index, address } => match port_of(index) {
                    None => Hop::None,
                    Some(port) => {
                        if gateways.len() < MAX_GATEWAYS && !gateways.contains(&address) {
                            gateways.push(address);
                        }
                        let known = known(index, address);
                        known.map_or(Hop::Unknown, |mac| Hop::Known { port, mac, on_link: false })
                    }
                },
            };
            routes.insert((network, prefix_len), hop);
        }
        // Half a table would send packets by a shorter prefix: then none at all, and the engine finds every way.
        let room = self.maps.sizes().routes as usize;
        if routes.len() > room {
            if !std::mem::replace(&mut self.told, true) {
                tracing::warn!(
                    routes = routes.len(),
                    room,
                    "more routes than the program has room for: answers to clients pass through user space"
                );
            }
            let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
            routes = any.into_iter().map(|any| ((any, 0), Hop::Unknown)).collect();
        }
        self.gateways = gateways;

        let mut neighbours = HashMap::new();
        for (&(index, address), entry) in snapshot.neighbours.iter() {
            if let Some(port) = port_of(index) {
                neighbours.insert((port, address), entry.mac);
            }
        }
        self.write_neighbours(neighbours)?;
        self.write_routes(routes)
    }

    fn write_routes(&mut self, routes: HashMap<(IpAddr, u8), Hop>) -> io::Result<()> {
        let maps = &self.maps;
        let gone: Vec<_> = self.routes.keys().filter(|key| !routes.contains_key(*key)).copied().collect();
        // What is gone first where there is little room, otherwise last: no packet misses a way that is still there.
        let crowded = self.routes.len() + routes.len() > maps.sizes().routes as usize;
        let remove = |known: &mut HashMap<_, _>| {
            for (network, len) in &gone {
                maps.remove_route(*network, *len)?;
                known.remove(&(*network, *len));
            }
            Ok::<(), io::Error>(())
        };
        if crowded {
            remove(&mut self.routes)?;
        }
        for ((network, len), hop) in routes {
            if self.routes.get(&(network, len)) != Some(&hop) {
                maps.put_route(network, len, hop)?;
                self.routes.insert((network, len), hop);
            }
        }
        if !crowded {
            remove(&mut self.routes)?;
        }
        Ok(())
    }

    fn write_neighbours(&mut self, neighbours: HashMap<(Port, IpAddr), Mac>) -> io::Result<()> {
        let gone: Vec<_> =
            self.neighbours.keys().filter(|key| !neighbours.contains_key(*key)).copied().collect();
        for key in gone {
            self.maps.remove_neighbour(key.0, key.1)?;
            self.neighbours.remove(&key);
        }
        for (key, mac) in neighbours {
            if self.neighbours.get(&key) == Some(&mac) {
                continue;
            }
            match self.maps.put_neighbour(key.0, key.1, mac) {
                Ok(()) => {
                    self.neighbours.insert(key, mac);
                }
                // Packets to those that found no room go up.
                Err(e) if e.raw_os_error() == Some(libc::E2BIG) => {
                    let _ = self.maps.remove_neighbour(key.0, key.1);
                    self.neighbours.remove(&key);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
