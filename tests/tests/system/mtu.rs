//! A link with a smaller MTU on the path: every mode that routes lets the ICMP error through to the sender, rewritten, so
//! that the transfer goes on with smaller segments.
//!
//! Every transfer here first fails at its full segment size: the ends have an MTU of 1500 and offer an MSS to match, and
//! only the link between them is narrow. Without the error the connection would hang.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use komainu_lab::cluster::Document;
use komainu_lab::standard::{self, BACKEND_HTTP};
use komainu_lab::topology::{FAR, HostSpec, INSIDE, RouteSpec, SERVICE, Standard, Topology, addr, link};
use komainu_lab::traffic::http::{download, upload};
use komainu_lab::traffic::server::{Listen, Server};
use komainu_lab::{Host, Lab};
use komainu_tests::{Bed, Machine, vip};

use super::traffic::{MODES, WITH_INSIDE_AND_FAR, all_modes, ports};

/// MTU of the narrow link: above the least that IPv6 allows.
const NARROW: u32 = 1300;
/// Long enough for dozens of full segments in flight.
const LENGTH: u64 = 2 << 20;
const LIMIT: Duration = Duration::from_secs(30);

/// How many errors of the kind "this is too large" the kernel of `host` has sent.
fn too_big_sent(host: &Host, family: usize) -> u64 {
    let read = |path: &str| host.run(|| std::fs::read_to_string(path)).unwrap();
    if family == 1 {
        let text = read("/proc/thread-self/net/snmp6");
        let line = text.lines().find_map(|l| l.strip_prefix("Icmp6OutPktTooBigs")).unwrap();
        return line.trim().parse().unwrap();
    }
    let text = read("/proc/thread-self/net/snmp");
    let mut lines = text.lines().filter(|l| l.starts_with("Icmp:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let column = names.split(' ').position(|n| n == "OutDestUnreachs").unwrap();
    values.split(' ').nth(column).unwrap().parse().unwrap()
}

fn a_narrow_link_towards_the_client_is_discovered_in_every_mode() {
    let bed = Bed::start(Machine::Shared, WITH_INSIDE_AND_FAR, all_modes);
    // The router's cable to the client.
    let router = bed.host("router");
    router.set_mtu(FAR, NARROW).unwrap();
    for mode in MODES {
        for family in [0, 1] {
            let at: SocketAddr = (vip(family), ports(mode).0).into();
            let before = too_big_sent(router, family);
            bed.host("far")
                .run(|| download(at, LENGTH, LIMIT))
                .unwrap_or_else(|e| panic!("{mode} to {at} over the narrow link: {e}"));
            assert!(too_big_sent(router, family) > before, "{mode} to {at}: nothing was too large");
        }
    }
}

/// Segments behind routers, of which one stands on the service network and one inside.
const BACK: &str = "back";
const INSIDE_BACK: &str = "iback";
/// Host number of these routers on the balancers' segments.
const BACK_ROUTER: u8 = 200;

fn back(host: u8) -> [IpAddr; 2] {
    [IpAddr::from([10, 30, 0, host]), IpAddr::from([0xfd00, 0x30, 0, 0, 0, 0, 0, host.into()])]
}

fn inside_back(host: u8) -> [IpAddr; 2] {
    [IpAddr::from([10, 40, 0, host]), IpAddr::from([0xfd00, 0x40, 0, 0, 0, 0, 0, host.into()])]
}

/// A backend `far1` behind `rt1` on the service network, and `far2` behind `rt2` on the inside; the routers' links to
/// them are narrow.
fn backends_behind_routers() -> Topology {
    let mut t = Topology::from(Standard { service_backends: 0, inside_backends: 1, ..Standard::default() });
    for (number, own, behind, net, near, routes) in [
        (1, SERVICE, BACK, back as fn(u8) -> [IpAddr; 2], addr::service(BACK_ROUTER), Vec::new()),
        (
            2,
            INSIDE,
            INSIDE_BACK,
            inside_back,
            addr::inside(BACK_ROUTER),
            addr::inside(addr::VIP).map(RouteSpec::default_via).to_vec(),
        ),
    ] {
        t.segments.push(behind.into());
        let mut narrow = link(behind, 1, net(addr::ROUTER));
        narrow.mtu = Some(NARROW);
        t.hosts.push(HostSpec {
            name: format!("rt{number}"),
            forwards: true,
            links: vec![link(own, 0, near), narrow],
            routes,
            ..HostSpec::default()
        });
        t.hosts.push(HostSpec {
            name: format!("far{number}"),
            links: vec![link(behind, 0, net(addr::FIRST_BACKEND))],
            routes: net(addr::ROUTER).map(RouteSpec::default_via).to_vec(),
            ..HostSpec::default()
        });
        for balancer in ["lb1", "lb2"] {
            let [v4, v6] = net(0);
            let to = [(v4, addr::PREFIX.0), (v6, addr::PREFIX.1)];
            let routes = to.into_iter().zip(near).map(|(to, via)| RouteSpec { to, via });
            t.host_mut(balancer).routes.extend(routes);
        }
    }
    t
}

fn a_narrow_link_towards_the_backend_is_discovered_in_every_mode_that_routes() {
    let mut servers = Vec::new();
    let document = |lab: &Lab| {
        let mut document = Document::default().group(standard::group(lab));
        for (mode, host, [v4, v6]) in [
            ("nat", "far1", back(addr::FIRST_BACKEND)),
            ("nat-transparent", "far2", inside_back(addr::FIRST_BACKEND)),
        ] {
            let listens = [v4, v6].map(|ip| Listen::Http((ip, BACKEND_HTTP).into()));
            servers.push(Server::start(lab.host(host), host, &listens).unwrap());
            for (family, ip) in [v4, v6].into_iter().enumerate() {
                let name = format!("{mode}-{family}");
                let port = ports(mode).0;
                let mut service = standard::service(lab, &name, vip(family), port, "tcp", mode, BACKEND_HTTP);
                service.backends = vec![(host.to_owned(), (ip, BACKEND_HTTP).into())];
                document = document.service(service);
            }
        }
        document
    };
    let bed = Bed::start(Machine::Shared, backends_behind_routers(), document);
    // A client remembers the path to the VIP, so each mode has one that doesn't know it yet.
    for (mode, router, client) in [("nat", "rt1", "client"), ("nat-transparent", "rt2", "watch")] {
        for family in [0, 1] {
            let at: SocketAddr = (vip(family), ports(mode).0).into();
            let router = bed.host(router);
            let before = too_big_sent(router, family);
            bed.host(client)
                .run(|| upload(at, LENGTH, LIMIT))
                .unwrap_or_else(|e| panic!("{mode} to {at} over the narrow link: {e}"));
            assert!(too_big_sent(router, family) > before, "{mode} to {at}: nothing was too large");
        }
    }
}

fn a_narrow_link_of_the_balancer_itself_is_told_to_the_client() {
    let only_inside = Standard { service_backends: 0, inside_backends: 2, ..Standard::default() };
    let bed = Bed::start(Machine::Shared, only_inside, |lab| {
        let service = |family: usize| {
            let port = ports("nat-transparent").0;
            let name = format!("http-{family}");
            standard::service(lab, &name, vip(family), port, "tcp", "nat-transparent", BACKEND_HTTP)
        };
        Document::default().group(standard::group(lab)).service(service(0)).service(service(1))
    });
    for balancer in ["lb1", "lb2"] {
        bed.host(balancer).set_mtu(INSIDE, NARROW).unwrap();
    }
    let owner = bed.owner();
    let told = || bed.cluster.status(&owner).unwrap().drops.get("too_big").copied().unwrap_or_default();
    for family in [0, 1] {
        let at: SocketAddr = (vip(family), ports("nat-transparent").0).into();
        let before = told();
        bed.client()
            .run(|| upload(at, LENGTH, LIMIT))
            .unwrap_or_else(|e| panic!("to {at} over the narrow link: {e}"));
        assert!(told() > before, "to {at}: nothing was too large");
    }
}

komainu_tests::system_on_every_lane!(
    a_narrow_link_towards_the_client_is_discovered_in_every_mode,
    a_narrow_link_towards_the_backend_is_discovered_in_every_mode_that_routes,
    a_narrow_link_of_the_balancer_itself_is_told_to_the_client,
);
