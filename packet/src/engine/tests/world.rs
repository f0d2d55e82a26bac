//! A balancer with its neighbours, and what the tests need to build and read frames.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};

use crate::engine::*;
use crate::lane::Counters;
use crate::lease::{Lease, LeaseBoard};
use crate::neighbour::{Mac, NextHop, NextHops};
use crate::plan::*;
use crate::time::BootTime;

/// Keeps news of flows.
#[derive(Clone, Debug, Default)]
pub struct Outbox(Arc<Mutex<Vec<FlowNews>>>);

impl FlowOutbox for Outbox {
    fn tell(&mut self, news: FlowNews) {
        self.0.lock().unwrap().push(news);
    }
}

impl Outbox {
    /// What was told since the last time.
    pub fn take(&self) -> Vec<FlowNews> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

pub const OWN_MAC: Mac = [2, 0, 0, 0, 0, 0xaa];
pub const INSIDE_MAC: Mac = [2, 0, 0, 0, 0, 0xbb];
pub const ROUTER_MAC: Mac = [2, 0, 0, 0, 0, 1];
pub const SECOND: u64 = 1_000_000_000;
pub const START: BootTime = BootTime(1000 * SECOND);
pub const GROUP: u32 = 7;
pub const SERVICE: u32 = 70;
pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;
pub const SYN_ACK: u8 = 0x12;
pub const FIN_ACK: u8 = 0x11;
pub const RST: u8 = 0x04;

pub fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

/// Address number `n` of the service network.
pub fn service_net(v6: bool, n: u16) -> IpAddr {
    if v6 { ip(&format!("2001:db8::{n:x}")) } else { ip(&format!("192.0.2.{n}")) }
}

pub fn vip(v6: bool) -> IpAddr {
    service_net(v6, 100)
}

pub fn snat(v6: bool) -> IpAddr {
    service_net(v6, 101)
}

pub fn inside_vip(v6: bool) -> IpAddr {
    if v6 { ip("fd00::1") } else { ip("10.0.0.1") }
}

/// A client behind the router.
pub fn client(v6: bool) -> SocketAddr {
    SocketAddr::new(if v6 { ip("2001:db8:9::7") } else { ip("198.51.100.7") }, 40_000)
}

pub fn backend_mac(n: u32) -> Mac {
    [2, 0, 0, 1, 0, n as u8]
}

/// Backend number `n` of a mode: on the service network for `dsr`, on the inside network otherwise.
pub fn backend_address(mode: Mode, v6: bool, n: u32) -> IpAddr {
    match (mode, v6) {
        (Mode::Dsr, _) => service_net(v6, 10 + n as u16),
        (_, false) => ip(&format!("10.0.0.{}", 10 + n)),
        (_, true) => ip(&format!("fd00::{:x}", 10 + n)),
    }
}

pub fn backend(mode: Mode, v6: bool, n: u32) -> BackendPlan {
    BackendPlan {
        id: n,
        name: format!("be{n}"),
        address: backend_address(mode, v6, n),
        port: if mode == Mode::Dsr { 80 } else { 8080 },
        weight: 1,
        base_weight: 1,
        alive: true,
    }
}

pub fn service(mode: Mode, v6: bool, protocol: Protocol, backends: u32) -> ServicePlan {
    ServicePlan {
        id: SERVICE,
        name: "web".to_owned(),
        group: GROUP,
        vip: vip(v6),
        port: 80,
        protocol,
        mode,
        scheduler: Scheduler::Maglev,
        dead_backend: DeadBackend::Reset,
        track_udp: true,
        tcp_idle: Duration::from_secs(900),
        udp_idle: Duration::from_secs(30),
        backends: (1..=backends).map(|n| backend(mode, v6, n)).collect(),
        consult_all_slots: false,
    }
}

pub fn plan(services: Vec<ServicePlan>) -> Plan {
    let group = GroupPlan {
        id: GROUP,
        name: "g".to_owned(),
        vips: vec![vip(false), vip(true)],
        inside_vips: vec![inside_vip(false), inside_vip(true)],
        snat: vec![snat(false), snat(true)],
    };
    Plan { revision: 1, groups: vec![group], services }
}

/// Neighbours: those that are listed, otherwise everything is behind the router on the service network.
pub struct Hops(pub HashMap<IpAddr, NextHop>);

impl NextHops for Hops {
    fn lookup(&self, destination: IpAddr) -> NextHop {
        let router = service_net(destination.is_ipv6(), 1);
        let default = NextHop::Resolved { port: Port::Service, next_hop: router, mac: ROUTER_MAC };
        self.0.get(&destination).copied().unwrap_or(default)
    }
}

pub struct World {
    pub engine: Engine,
    pub leases: Arc<LeaseBoard>,
    pub hops: Hops,
    pub now: BootTime,
}

impl World {
    pub fn new(services: Vec<ServicePlan>) -> World {
        Self::with_limits(services, 10_000, 1_000_000)
    }

    pub fn with_limits(services: Vec<ServicePlan>, max_flows: usize, new_flows_per_second: u32) -> World {
        let port = |mac, addresses: [&str; 2]| PortConfig {
            mac,
            ifindex: 1,
            mtu: 1500,
            addresses: vec![(ip(addresses[0]), 24), (ip(addresses[1]), 64)],
        };
        let leases = Arc::new(LeaseBoard::new());
        let config = EngineConfig {
            service: port(OWN_MAC, ["192.0.2.2", "2001:db8::2"]),
            inside: Some(port(INSIDE_MAC, ["10.0.0.2", "fd00::2"])),
            max_flows,
            new_flows_per_second,
            seed: 1,
        };
        let mut hops = HashMap::new();
        for n in 1..=30 {
            for v6 in [false, true] {
                let next_hop = backend_address(Mode::Dsr, v6, n);
                hops.insert(
                    next_hop,
                    NextHop::Resolved { port: Port::Service, next_hop, mac: backend_mac(n) },
                );
                let next_hop = backend_address(Mode::Nat, v6, n);
                hops.insert(
                    next_hop,
                    NextHop::Resolved { port: Port::Inside, next_hop, mac: backend_mac(n) },
                );
            }
        }
        let engine = Engine::new(config, Arc::clone(&leases));
        let mut world = World { engine, leases, hops: Hops(hops), now: START };
        world.engine.install(plan(services), START).unwrap();
        world.lease(true, true);
        world
    }

    pub fn lease(&mut self, answer: bool, forward: bool) {
        let until = |may| if may { BootTime(u64::MAX) } else { BootTime(0) };
        let lease = Lease { epoch: 1, answer_until: until(answer), forward_until: until(forward) };
        self.leases.set(GROUP, lease);
    }

    pub fn pass(&mut self, seconds: u64) {
        self.now.0 += seconds * SECOND;
        while self.engine.next_deadline().is_some_and(|t| t <= self.now) {
            self.engine.tick(self.now);
        }
    }

    pub fn counters(&self) -> Counters {
        self.engine.counters(self.now)
    }

    /// A counter of drops or events.
    pub fn count(&self, name: &str) -> u64 {
        let counters = self.counters();
        counters.drops.iter().chain(&counters.events).find(|(n, _)| *n == name).unwrap().1
    }

    /// Processes a frame and checks that it is counted exactly once.
    pub fn process(&mut self, frame: &mut [u8], offload: Offload, port: Port) -> Verdict {
        let before = self.dispositions();
        let mut frame = FrameMut { bytes: frame, offload };
        let verdict = self.engine.process(&mut frame, port, self.now, &self.hops);
        assert_eq!(self.dispositions(), before + 1, "one verdict, one counter: {verdict:?}");
        verdict
    }

    fn dispositions(&self) -> u64 {
        let besides =
            [Event::IcmpErrorSent, Event::AwaitedNeighbour, Event::FlowEvicted, Event::FlowNotRemembered];
        let counters = self.counters();
        let drops: u64 = counters.drops.iter().map(|d| d.1).sum();
        let events = counters.events.iter().filter(|(n, _)| !besides.iter().any(|b| b.as_str() == *n));
        drops + events.map(|e| e.1).sum::<u64>()
    }

    /// Sends a frame by the service network; what leaves is read back.
    pub fn send(&mut self, frame: &[u8]) -> Outcome {
        self.send_by(frame, Port::Service)
    }

    pub fn send_by(&mut self, frame: &[u8], port: Port) -> Outcome {
        let mut frame = frame.to_vec();
        match self.process(&mut frame, Offload::default(), port) {
            Verdict::Forward { port, fence } => {
                assert_eq!(fence.group, GROUP);
                Outcome::Sent(port, Seen::read(&frame))
            }
            Verdict::Reply { port, .. } => Outcome::Reply(port, self.engine.reply().to_vec()),
            Verdict::AwaitNeighbour { port, next_hop, .. } => {
                assert_eq!(frame[..6], [0; 6]);
                Outcome::Waits(port, next_hop)
            }
            Verdict::NotOurs => Outcome::NotOurs,
            Verdict::Drop(reason) => Outcome::Dropped(reason.as_str()),
        }
    }

    /// Number of the backend that a packet of the client is sent to.
    pub fn backend_of(&mut self, frame: &[u8]) -> Option<u32> {
        match self.send(frame) {
            Outcome::Sent(_, seen) => Some(u32::from(seen.eth_dst[5])),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Sent(Port, Seen),
    Reply(Port, Vec<u8>),
    Waits(Port, IpAddr),
    NotOurs,
    Dropped(&'static str),
}

impl Outcome {
    pub fn sent(self) -> (Port, Seen) {
        match self {
            Outcome::Sent(port, seen) => (port, seen),
            other => panic!("not sent: {other:?}"),
        }
    }

    pub fn reply(self) -> Vec<u8> {
        match self {
            Outcome::Reply(_, frame) => frame,
            other => panic!("no reply: {other:?}"),
        }
    }
}

/// A TCP or UDP frame, its checksums proved right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub eth_src: Mac,
    pub eth_dst: Mac,
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub ttl: u8,
    pub payload: Vec<u8>,
}

impl Seen {
    pub fn read(frame: &[u8]) -> Seen {
        let packet = PacketHeaders::from_ethernet_slice(frame).unwrap();
        let Some(etherparse::LinkHeader::Ethernet2(link)) = packet.link else { panic!("no Ethernet") };
        let payload = packet.payload.slice().to_vec();
        let (ports, src, dst, ttl): (_, IpAddr, IpAddr, u8) =
            match (packet.net.unwrap(), packet.transport.unwrap()) {
                (NetHeaders::Ipv4(ip, _), transport) => {
                    assert_eq!(ip.calc_header_checksum(), ip.header_checksum, "IPv4 header checksum");
                    let ports = match transport {
                        TransportHeader::Tcp(tcp) => {
                            assert_eq!(
                                tcp.calc_checksum_ipv4(&ip, &payload).unwrap(),
                                tcp.checksum,
                                "TCP checksum"
                            );
                            (tcp.source_port, tcp.destination_port)
                        }
                        TransportHeader::Udp(udp) => {
                            if udp.checksum != 0 {
                                assert_eq!(
                                    udp.calc_checksum_ipv4(&ip, &payload).unwrap(),
                                    udp.checksum,
                                    "UDP checksum"
                                );
                            }
                            (udp.source_port, udp.destination_port)
                        }
                        other => panic!("{other:?}"),
                    };
                    (ports, ip.source.into(), ip.destination.into(), ip.time_to_live)
                }
                (NetHeaders::Ipv6(ip, _), transport) => {
                    let ports = match transport {
                        TransportHeader::Tcp(tcp) => {
                            assert_eq!(
                                tcp.calc_checksum_ipv6(&ip, &payload).unwrap(),
                                tcp.checksum,
                                "TCP checksum"
                            );
                            (tcp.source_port, tcp.destination_port)
                        }
                        TransportHeader::Udp(udp) => {
                            assert_eq!(
                                udp.calc_checksum_ipv6(&ip, &payload).unwrap(),
                                udp.checksum,
                                "UDP checksum"
                            );
                            (udp.source_port, udp.destination_port)
                        }
                        other => panic!("{other:?}"),
                    };
                    (ports, ip.source.into(), ip.destination.into(), ip.hop_limit)
                }
                other => panic!("{other:?}"),
            };
        Seen {
            eth_src: link.source,
            eth_dst: link.destination,
            src: SocketAddr::new(src, ports.0),
            dst: SocketAddr::new(dst, ports.1),
            ttl,
            payload,
        }
    }
}

/// A frame to be built.
#[derive(Clone, Debug)]
pub struct Packet {
    pub eth_src: Mac,
    pub eth_dst: Mac,
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub protocol: Protocol,
    pub flags: u8,
    pub ttl: u8,
    pub payload: Vec<u8>,
}

impl Packet {
    /// From `src` to `dst`, by the router.
    pub fn new(protocol: Protocol, src: SocketAddr, dst: SocketAddr) -> Packet {
        Packet {
            eth_src: ROUTER_MAC,
            eth_dst: OWN_MAC,
            src,
            dst,
            protocol,
            flags: ACK,
            ttl: 64,
            payload: b"some payload".to_vec(),
        }
    }

    pub fn flags(mut self, flags: u8) -> Packet {
        self.flags = flags;
        self
    }

    pub fn ttl(mut self, ttl: u8) -> Packet {
        self.ttl = ttl;
        self
    }

    pub fn len(mut self, len: usize) -> Packet {
        self.payload = (0..len).map(|i| i as u8).collect();
        self
    }

    /// From the inside network.
    pub fn inside(mut self) -> Packet {
        self.eth_dst = INSIDE_MAC;
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2(self.eth_src, self.eth_dst);
        let ip = match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), self.ttl),
            (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), self.ttl),
            _ => panic!("two families"),
        };
        let mut frame = Vec::new();
        match self.protocol {
            Protocol::Udp => {
                ip.udp(self.src.port(), self.dst.port()).write(&mut frame, &self.payload).unwrap();
            }
            Protocol::Tcp => {
                let mut tcp = ip.tcp(self.src.port(), self.dst.port(), 1_000, 65_535);
                if self.flags & 0x01 != 0 {
                    tcp = tcp.fin();
                }
                if self.flags & 0x02 != 0 {
                    tcp = tcp.syn();
                }
                if self.flags & 0x04 != 0 {
                    tcp = tcp.rst();
                }
                if self.flags & 0x10 != 0 {
                    tcp = tcp.ack(2_000);
                }
                tcp.write(&mut frame, &self.payload).unwrap();
            }
        }
        frame
    }
}

/// A packet of the client to the VIP.
pub fn request(protocol: Protocol, v6: bool) -> Packet {
    Packet::new(protocol, client(v6), SocketAddr::new(vip(v6), 80))
}

/// The same from another port of the client.
pub fn request_from(protocol: Protocol, v6: bool, port: u16) -> Packet {
    let mut packet = request(protocol, v6);
    packet.src.set_port(port);
    packet
}

pub const FAMILIES: [bool; 2] = [false, true];
pub const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

impl World {
    /// Sends a frame by the service network without looking at counters or at what leaves, for tests that send very many.
    pub fn send_quietly(&mut self, frame: &[u8]) -> Verdict {
        let mut frame = frame.to_vec();
        self.engine.process(&mut FrameMut::new(&mut frame), Port::Service, self.now, &self.hops)
    }
}
