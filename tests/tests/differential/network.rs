//! Where the world's hosts are, as the engine asks for it and as the program is told.

use std::net::IpAddr;

use komainu_packet::engine::{Port, PortConfig};
use komainu_packet::lane::kernel::abi::Hop;
use komainu_packet::lane::kernel::maps::Maps;
use komainu_packet::neighbour::{Mac, NextHop, NextHops};

use crate::build::{INSIDE_MAC, Place, SERVICE_MAC};

/// Backends stand on the inside network, the first two on the service network; one neighbour is unknown; net 3 is nowhere; all
/// others are behind the router.
pub struct Hops;

pub fn mac_of(host: u16) -> Mac {
    [2, 0, 0, 1, 0, host as u8]
}

pub fn router(v6: bool) -> IpAddr {
    Place::Any(0x0101).address(v6)
}

impl NextHops for Hops {
    fn lookup(&self, destination: IpAddr) -> NextHop {
        let (net, host) = match destination {
            IpAddr::V4(a) if a.octets()[..2] == [10, 0] => (a.octets()[2].into(), a.octets()[3].into()),
            IpAddr::V6(a) if a.segments()[..3] == [0xfd00, 0, 0] => {
                let [.., net, b, c, d, host] = a.segments();
                // Addresses of a network that nobody has.
                (net, if (b, c, d) == (0, 0, 0) { host } else { u16::MAX })
            }
            _ => (0, 0),
        };
        let resolved = |port, next_hop| NextHop::Resolved { port, next_hop, mac: mac_of(host) };
        match (net, host) {
            (2, 15 | 256..) => NextHop::Unresolved { port: Port::Inside, next_hop: destination },
            (2, 10 | 11) => resolved(Port::Service, destination),
            (2, _) => resolved(Port::Inside, destination),
            (3, _) => NextHop::NoRoute,
            _ => NextHop::Resolved {
                port: Port::Service,
                next_hop: router(destination.is_ipv6()),
                mac: mac_of(1),
            },
        }
    }
}

pub fn write_ways(maps: &Maps) {
    for v6 in [false, true] {
        let net = |n: u16| Place::Any(n << 8).address(v6);
        let (whole, host, none) = if v6 { (64, 128, "::") } else { (24, 32, "0.0.0.0") };
        let router = Hop::Known { port: Port::Service, mac: mac_of(1), on_link: false };
        maps.put_route(none.parse().unwrap(), 0, router).unwrap();
        maps.put_route(net(2), whole, Hop::OnLink { port: Port::Inside }).unwrap();
        maps.put_route(net(3), whole, Hop::None).unwrap();
        for n in 0..=255 {
            let address = Place::Any(0x0200 | n).address(v6);
            match n {
                10 | 11 => {
                    let way = Hop::Known { port: Port::Service, mac: mac_of(n), on_link: true };
                    maps.put_route(address, host, way).unwrap();
                }
                15 => {}
                _ => maps.put_neighbour(Port::Inside, address, mac_of(n)).unwrap(),
            }
        }
    }
}

pub fn port_config(port: Port, mtu: u32) -> PortConfig {
    let host = |v6| Place::Any(if port == Port::Inside { 0x0202 } else { 0x0102 }).address(v6);
    PortConfig {
        mac: if port == Port::Inside { INSIDE_MAC } else { SERVICE_MAC },
        ifindex: 1 + port as u32,
        mtu,
        addresses: vec![(host(false), 24), (host(true), 64)],
    }
}
