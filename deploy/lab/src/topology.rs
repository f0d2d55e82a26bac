//! What a lab consists of, as plain data, and the standard one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A switch, its hosts and what they know.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// Names of the segments: one switch each. At most 8 characters.
    pub segments: Vec<String>,
    /// Names of cables without a switch, each between exactly two hosts, which name it as their segment. Nothing can be cut
    /// or unplugged there; for benchmarks, in which a switch would be the slowest part.
    pub cables: Vec<String>,
    /// Hosts: one network namespace each.
    pub hosts: Vec<HostSpec>,
}

/// A host.
#[derive(Clone, Debug, Default)]
pub struct HostSpec {
    /// Unique name, at most 6 characters.
    pub name: String,
    /// Whether its kernel forwards between its interfaces.
    pub forwards: bool,
    /// Its interfaces, named `eth0`, `eth1`, … unless they have a name.
    pub links: Vec<LinkSpec>,
    /// Routes beyond the connected ones.
    pub routes: Vec<RouteSpec>,
    /// Addresses on `lo`, which are kept silent in ARP and ND (what a `dsr` backend needs).
    pub loopback: Vec<IpAddr>,
}

/// An interface of a host, plugged into a segment.
#[derive(Clone, Debug)]
pub struct LinkSpec {
    /// Segment.
    pub segment: String,
    /// Interface name inside the host.
    pub interface: String,
    /// Addresses with prefix length.
    pub addresses: Vec<(IpAddr, u8)>,
    /// MTU when not 1500.
    pub mtu: Option<u32>,
}

/// A route.
#[derive(Clone, Copy, Debug)]
pub struct RouteSpec {
    /// Destination and prefix length.
    pub to: (IpAddr, u8),
    /// Gateway.
    pub via: IpAddr,
}

impl RouteSpec {
    /// The default route of the gateway's family.
    pub fn default_via(via: IpAddr) -> RouteSpec {
        let to = match via {
            IpAddr::V4(_) => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
            IpAddr::V6(_) => (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
        };
        RouteSpec { to, via }
    }
}

/// Segment of the VIPs and their clients.
pub const SERVICE: &str = "service";
/// Segment between the nodes.
pub const CLUSTER: &str = "cluster";
/// Segment of the `nat-transparent` backends.
pub const INSIDE: &str = "inside";
/// Segment of the clients behind a router.
pub const FAR: &str = "far";

/// The addresses of the standard topology. Every lab has namespaces of its own, so labs that run side by side share
/// them without meeting. All are documentation or private ranges (RFC 5737, RFC 3849, RFC 1918, RFC 4193).
pub mod addr {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    }

    const fn v6(prefix: [u16; 4], host: u16) -> IpAddr {
        let [a, b, c, d] = prefix;
        IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, host))
    }

    /// Prefix lengths on every segment: IPv4, IPv6.
    pub const PREFIX: (u8, u8) = (24, 64);

    /// Both addresses of host number `host` on the service segment: `192.0.2.host`, `2001:db8::host`.
    pub const fn service(host: u8) -> [IpAddr; 2] {
        [v4(192, 0, 2, host), v6([0x2001, 0xdb8, 0, 0], host as u16)]
    }

    /// Both addresses on the cluster segment: `198.51.100.host`, `2001:db8:0:c::host`.
    pub const fn cluster(host: u8) -> [IpAddr; 2] {
        [v4(198, 51, 100, host), v6([0x2001, 0xdb8, 0, 0xc], host as u16)]
    }

    /// Both addresses on the inside segment: `10.20.0.host`, `fd00:20::host`.
    pub const fn inside(host: u8) -> [IpAddr; 2] {
        [v4(10, 20, 0, host), v6([0xfd00, 0x20, 0, 0], host as u16)]
    }

    /// Both addresses on the far segment: `203.0.113.host`, `2001:db8:0:f::host`.
    pub const fn far(host: u8) -> [IpAddr; 2] {
        [v4(203, 0, 113, host), v6([0x2001, 0xdb8, 0, 0xf], host as u16)]
    }

    /// Host number of the router on every segment it is on.
    pub const ROUTER: u8 = 1;
    /// Host number of the wire listener.
    pub const WATCH: u8 = 9;
    /// Host number of the client.
    pub const CLIENT: u8 = 10;
    /// Host number of the first backend; the others follow.
    pub const FIRST_BACKEND: u8 = 11;
    /// Host number of the first VIP; others may follow.
    pub const VIP: u8 = 100;
    /// Host number of the first SNAT address.
    pub const SNAT: u8 = 150;

    /// Host number of node `id` on the service, cluster and inside segments.
    pub const fn node(id: u8) -> u8 {
        1 + id
    }
}

/// Sizes of the standard topology.
#[derive(Clone, Copy, Debug)]
pub struct Standard {
    /// Backends `be1`… on the service segment (0..=20).
    pub service_backends: u8,
    /// Backends `bi1`… on the inside segment, whose default route is the inside VIP (0..=20).
    pub inside_backends: u8,
    /// Whether the router and the client behind it exist.
    pub far: bool,
    /// Balancers `lb1`… (1..=3).
    pub balancers: u8,
    /// Whether there is a witness.
    pub witness: bool,
}

impl Default for Standard {
    fn default() -> Self {
        Standard { service_backends: 3, inside_backends: 0, far: false, balancers: 2, witness: true }
    }
}

impl From<Standard> for Topology {
    fn from(sizes: Standard) -> Topology {
        sizes.topology()
    }
}

impl Topology {
    /// The host called `name`, for a change before the lab is built.
    ///
    /// # Panics
    /// When there is none: a mistake in the story.
    pub fn host_mut(&mut self, name: &str) -> &mut HostSpec {
        self.hosts.iter_mut().find(|h| h.name == name).unwrap_or_else(|| panic!("no host \"{name}\""))
    }
}

impl Standard {
    /// The topology: `client` and `watch` on the service segment, balancers on all of them, the witness on the cluster
    /// segment only. Backends on the service segment hold the first VIP on `lo`, so that they can serve `dsr`.
    pub fn topology(&self) -> Topology {
        let mut t = Topology { segments: vec![SERVICE.into(), CLUSTER.into()], ..Topology::default() };
        if self.inside_backends > 0 {
            t.segments.push(INSIDE.into());
        }
        let to_far: Vec<RouteSpec> = if self.far {
            t.segments.push(FAR.into());
            t.hosts.push(HostSpec {
                name: "router".into(),
                forwards: true,
                links: vec![
                    link(SERVICE, 0, addr::service(addr::ROUTER)),
                    link(FAR, 1, addr::far(addr::ROUTER)),
                ],
                ..HostSpec::default()
            });
            t.hosts.push(HostSpec {
                name: "far".into(),
                links: vec![link(FAR, 0, addr::far(addr::CLIENT))],
                routes: addr::far(addr::ROUTER).map(RouteSpec::default_via).to_vec(),
                ..HostSpec::default()
            });
            addr::service(addr::ROUTER).map(RouteSpec::default_via).to_vec()
        } else {
            Vec::new()
        };
        for (name, number) in [("client", addr::CLIENT), ("watch", addr::WATCH)] {
            t.hosts.push(HostSpec {
                name: name.into(),
                links: vec![link(SERVICE, 0, addr::service(number))],
                routes: to_far.clone(),
                ..HostSpec::default()
            });
        }
        for id in 1..=self.balancers {
            let number = addr::node(id);
            let mut links =
                vec![link(SERVICE, 0, addr::service(number)), link(CLUSTER, 2, addr::cluster(number))];
            if self.inside_backends > 0 {
                links.push(link(INSIDE, 1, addr::inside(number)));
            }
            t.hosts.push(HostSpec {
                name: format!("lb{id}"),
                links,
                routes: to_far.clone(),
                ..HostSpec::default()
            });
        }
        if self.witness {
            let number = addr::node(self.balancers + 1);
            t.hosts.push(HostSpec {
                name: "wit".into(),
                links: vec![link(CLUSTER, 2, addr::cluster(number))],
                ..HostSpec::default()
            });
        }
        for i in 0..self.service_backends {
            t.hosts.push(HostSpec {
                name: format!("be{}", i + 1),
                links: vec![link(SERVICE, 0, addr::service(addr::FIRST_BACKEND + i))],
                routes: to_far.clone(),
                loopback: addr::service(addr::VIP).to_vec(),
                ..HostSpec::default()
            });
        }
        for i in 0..self.inside_backends {
            t.hosts.push(HostSpec {
                name: format!("bi{}", i + 1),
                links: vec![link(INSIDE, 0, addr::inside(addr::FIRST_BACKEND + i))],
                routes: addr::inside(addr::VIP).map(RouteSpec::default_via).to_vec(),
                ..HostSpec::default()
            });
        }
        t
    }
}

/// Interface `eth{number}` on `segment` with both addresses.
pub fn link(segment: &str, number: u8, [v4, v6]: [IpAddr; 2]) -> LinkSpec {
    LinkSpec {
        segment: segment.to_owned(),
        interface: format!("eth{number}"),
        addresses: vec![(v4, addr::PREFIX.0), (v6, addr::PREFIX.1)],
        mtu: None,
    }
}
