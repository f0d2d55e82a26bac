//! What the kernel knows about links, addresses, routes and neighbours, as one immutable picture.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Kernel's number of it.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Ethernet address; absent on interfaces that are not Ethernet.
    pub mac: Option<[u8; 6]>,
    /// Whether it is Ethernet (`ARPHRD_ETHER`).
    pub ethernet: bool,
    /// Administratively up.
    pub admin_up: bool,
    /// Has carrier (`IFF_LOWER_UP`) and an operational state that carries traffic.
    pub carrier: bool,
    /// Maximum transmission unit in bytes of layer 3.
    pub mtu: u32,
    /// Largest super-frame that GRO makes, in bytes; 0 where the kernel doesn't say.
    pub gro_max_len: u32,
    /// Whether an XDP program is attached, whoever's it is.
    pub xdp: XdpState,
}

/// Where an XDP program is attached to an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpState {
    /// Nowhere.
    #[default]
    None,
    /// Behind the driver.
    Generic,
    /// In the driver, or in the hardware.
    Native,
}

impl Link {
    /// Administratively up and with carrier.
    pub fn up(&self) -> bool {
        self.admin_up && self.carrier
    }
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// The destination is on the interface's own segment.
    Link {
        /// Interface.
        index: u32,
    },
    /// Through a gateway.
    Gateway {
        /// Interface.
        index: u32,
        /// Gateway's address.
        address: IpAddr,
    },
    /// `unreachable`, `blackhole` or `prohibit`.
    Nowhere,
}

/// A route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination network.
    pub network: IpAddr,
    /// Its prefix length.
    pub prefix_len: u8,
    /// Metric; lower is preferred among routes to the same network.
    pub metric: u32,
    /// Where it leads.
    pub via: Via,
}

/// Routes of the main table, for longest-prefix match.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    v4: Family,
    v6: Family,
    default_gateways: Vec<(u32, u32, IpAddr)>,
}

/// One family's routes: a map for each prefix length that occurs, longest first. A host has few lengths, so a lookup is a
/// handful of hash probes whatever the number of routes.
#[derive(Clone, Debug, Default)]
struct Family {
    by_len: Vec<(u8, Networks)>,
}

/// Routes of one prefix length: metric and way, by the network's bits.
type Networks = HashMap<u128, (u32, Via)>;

impl Routes {
    /// Builds the table. Among routes to the same network the lowest metric wins, the first of equals.
    pub fn new(routes: impl IntoIterator<Item = Route>) -> Routes {
        let mut table = Routes::default();
        for route in routes {
            if route.prefix_len == 0
                && let Via::Gateway { index, address } = route.via
            {
                table.default_gateways.push((route.metric, index, address));
            }
            let (family, bits) = match route.network {
                IpAddr::V4(_) => (&mut table.v4, 32),
                IpAddr::V6(_) => (&mut table.v6, 128),
            };
            if route.prefix_len > bits {
                continue;
            }
            let at = family.by_len.binary_search_by(|(len, _)| route.prefix_len.cmp(len));
            let slot = match at {
                Ok(i) => i,
                Err(i) => {
                    family.by_len.insert(i, (route.prefix_len, Networks::new()));
                    i
                }
            };
            let key = network_bits(route.network, route.prefix_len);
            let entry = family.by_len[slot].1.entry(key).or_insert((route.metric, route.via));
            if route.metric < entry.0 {
                *entry = (route.metric, route.via);
            }
        }
        table.default_gateways.sort_by_key(|(metric, ..)| *metric);
        table
    }

    /// The route for `to`: longest prefix, then lowest metric.
    pub fn lookup(&self, to: IpAddr) -> Option<Via> {
        let family = match to {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        };
        family
            .by_len
            .iter()
            .find_map(|(len, networks)| networks.get(&network_bits(to, *len)))
            .map(|(_, via)| *via)
    }

    /// The routes that are looked up: of each network the preferred one, with its prefix length.
    pub fn iter(&self) -> impl Iterator<Item = (IpAddr, u8, Via)> + '_ {
        let v4 = self.v4.by_len.iter().flat_map(|(len, networks)| {
            let left = 32 - u32::from(*len);
            networks.iter().map(move |(bits, (_, via))| {
                let address = if left == 32 { 0 } else { (*bits as u32) << left };
                (IpAddr::V4(address.into()), *len, *via)
            })
        });
        let v6 = self.v6.by_len.iter().flat_map(|(len, networks)| {
            let left = 128 - u32::from(*len);
            networks.iter().map(move |(bits, (_, via))| {
                let address = if left == 128 { 0 } else { *bits << left };
                (IpAddr::V6(address.into()), *len, *via)
            })
        });
        v4.chain(v6)
    }

    /// Gateways of the default routes that leave through an interface, the preferred one first.
    pub fn default_gateways(&self, index: u32) -> Vec<IpAddr> {
        self.default_gateways.iter().filter(|(_, i, _)| *i == index).map(|(.., a)| *a).collect()
    }
}

/// The first `len` bits of an address, left-aligned within its family's width.
fn network_bits(address: IpAddr, len: u8) -> u128 {
    let (bits, width) = match address {
        IpAddr::V4(a) => (u128::from(a.to_bits()), 32),
        IpAddr::V6(a) => (a.to_bits(), 128),
    };
    if len == 0 { 0 } else { bits >> (width - u32::from(len)) }
}

/// What the kernel knows of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Not confirmed for a while: usable, and the kernel should be asked to confirm it while it is used.
    pub stale: bool,
}

/// Neighbours with a usable address, by interface and address.
pub type Neighbours = HashMap<(u32, IpAddr), Neighbour>;

/// The next hop towards an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// No route, or one that leads nowhere.
    NoRoute,
    /// The kernel doesn't know its Ethernet address yet.
    Unresolved {
        /// Interface it leaves by.
        index: u32,
        /// Neighbour to resolve.
        neighbour: IpAddr,
    },
    /// Known.
    Known {
        /// Interface it leaves by.
        index: u32,
        /// Neighbour that it goes to.
        neighbour: IpAddr,
        /// What is known of it.
        entry: Neighbour,
    },
}

/// Everything, as it was at one moment. Parts that didn't change are shared with the picture before.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Rises with every picture published.
    pub generation: u64,
    /// All links.
    pub links: Arc<Vec<Link>>,
    /// Addresses: interface, address, prefix length.
    pub addresses: Arc<Vec<(u32, IpAddr, u8)>>,
    /// Routes.
    pub routes: Arc<Routes>,
    /// Neighbours.
    pub neighbours: Arc<Neighbours>,
}

impl Snapshot {
    /// The link of that name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|l| l.name == name)
    }

    /// The next hop towards `to`.
    pub fn hop(&self, to: IpAddr) -> Hop {
        let (index, neighbour) = match self.routes.lookup(to) {
            None | Some(Via::Nowhere) => return Hop::NoRoute,
            Some(Via::Link { index }) => (index, to),
            Some(Via::Gateway { index, address }) => (index, address),
        };
        match self.neighbours.get(&(index, neighbour)) {
            Some(entry) => Hop::Known { index, neighbour, entry: *entry },
            None => Hop::Unresolved { index, neighbour },
        }
    }

    /// Addresses with prefix length that the kernel has on an interface.
    pub fn addresses_of(&self, index: u32) -> Vec<(IpAddr, u8)> {
        self.addresses.iter().filter(|(i, ..)| *i == index).map(|(_, a, l)| (*a, *l)).collect()
    }

    /// Gateways of the default routes that leave through the interface, the preferred one first.
    pub fn default_gateways(&self, name: &str) -> Vec<IpAddr> {
        self.link(name).map(|l| self.routes.default_gateways(l.index)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(s: &str) -> IpAddr {
        s.parse().unwrap()
    }

    fn route(network: &str, prefix_len: u8, metric: u32, via: Via) -> Route {
        Route { network: ip(network), prefix_len, metric, via }
    }

    #[test]
    fn the_longest_prefix_wins_over_the_metric() {
        let gw = Via::Gateway { index: 1, address: ip("192.0.2.1") };
        let routes = Routes::new([
            route("0.0.0.0", 0, 1, gw),
            route("10.0.0.0", 8, 1, Via::Link { index: 2 }),
            route("10.1.0.0", 16, 900, Via::Link { index: 3 }),
        ]);
        assert_eq!(routes.lookup(ip("10.1.2.3")), Some(Via::Link { index: 3 }));
        assert_eq!(routes.lookup(ip("10.2.2.3")), Some(Via::Link { index: 2 }));
        assert_eq!(routes.lookup(ip("8.8.8.8")), Some(gw));
        assert_eq!(routes.lookup(ip("2001:db8::1")), None);
    }

    #[test]
    fn the_lowest_metric_wins_and_the_first_of_equals() {
        let routes = Routes::new([
            route("::", 0, 1024, Via::Gateway { index: 2, address: ip("fe80::2") }),
            route("::", 0, 100, Via::Gateway { index: 1, address: ip("fe80::1") }),
            route("::", 0, 100, Via::Gateway { index: 3, address: ip("fe80::3") }),
        ]);
        assert_eq!(routes.lookup(ip("2001:db8::1")), Some(Via::Gateway { index: 1, address: ip("fe80::1") }));
        assert_eq!(routes.default_gateways(2), vec![ip("fe80::2")]);
        assert_eq!(routes.default_gateways(9), Vec::<IpAddr>::new());
    }

    #[test]
    fn the_routes_that_are_listed_are_those_that_are_looked_up() {
        let gw = Via::Gateway { index: 1, address: ip("192.0.2.1") };
        let all = [
            route("0.0.0.0", 0, 1, gw),
            route("10.1.0.0", 16, 9, Via::Link { index: 3 }),
            route("10.1.0.7", 32, 9, Via::Nowhere),
            route("::", 0, 1, Via::Link { index: 2 }),
            route("2001:db8::", 32, 9, Via::Link { index: 3 }),
            route("2001:db8::7", 128, 9, Via::Nowhere),
        ];
        let dearer = route("10.1.0.0", 16, 10, Via::Nowhere);
        let mut listed: Vec<_> = Routes::new(all.into_iter().chain([dearer])).iter().collect();
        let mut given: Vec<_> = all.iter().map(|r| (r.network, r.prefix_len, r.via)).collect();
        listed.sort_by_key(|(network, len, _)| (*network, *len));
        given.sort_by_key(|(network, len, _)| (*network, *len));
        assert_eq!(listed, given);
    }

    #[test]
    fn a_route_that_leads_nowhere_hides_a_shorter_one() {
        let snapshot = Snapshot {
            routes: Arc::new(Routes::new([
                route("0.0.0.0", 0, 0, Via::Link { index: 1 }),
                route("198.51.100.0", 24, 0, Via::Nowhere),
            ])),
            ..Snapshot::default()
        };
        assert_eq!(snapshot.hop(ip("198.51.100.7")), Hop::NoRoute);
        assert_eq!(
            snapshot.hop(ip("198.51.101.7")),
            Hop::Unresolved { index: 1, neighbour: ip("198.51.101.7") }
        );
    }

    proptest! {
        #[test]
        fn lookup_agrees_with_a_linear_search(
            table in prop::collection::vec((any::<u32>(), 0u8..=32, 0u32..4), 0..40),
            to in any::<u32>(),
        ) {
            let routes: Vec<Route> = table.iter().enumerate().map(|(i, (net, len, metric))| Route {
                // Few distinct networks, so that prefixes nest and collide.
                network: IpAddr::V4((net & 0xc0c0_c0c0).into()),
                prefix_len: *len,
                metric: *metric,
                via: Via::Link { index: i as u32 },
            }).collect();
            let to = IpAddr::V4((to & 0xc0c0_c0c0).into());
            let best = routes.iter()
                .filter(|r| network_bits(r.network, r.prefix_len) == network_bits(to, r.prefix_len))
                .min_by_key(|r| (32 - r.prefix_len, r.metric))
                .map(|r| r.via);
            prop_assert_eq!(Routes::new(routes).lookup(to), best);
        }
    }
}
