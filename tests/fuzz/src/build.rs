//! The fuzzer's choices, made into plans and frames that get far. Addresses and ports come from small sets, so that flows meet again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use arbitrary::Arbitrary;
use etherparse::PacketBuilder;
use komainu_packet::engine::{Gso, Offload, Port};
use komainu_packet::neighbour::Mac;
use komainu_packet::plan::*;
use komainu_packet::wire::{arp, ndp};

/// Services of one plan.
const MOST_SERVICES: usize = 4;
/// Backends of one service.
const MOST_BACKENDS: usize = 4;
/// Changes to a frame that was built right.
const MOST_SPOILS: usize = 4;

pub const SERVICE_MAC: Mac = [2, 0, 0, 0, 0, 0xaa];
pub const INSIDE_MAC: Mac = [2, 0, 0, 0, 0, 0xbb];
pub const OTHER_MAC: Mac = [2, 0, 0, 0, 0, 1];

/// A side that packets come from or go to.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    Client(u8),
    Vip(bool),
    /// Of the second group or the first; which.
    Snat(bool, u8),
    InsideVip,
    Backend(u8),
    Host,
    Any(u16),
    Multicast,
    Broadcast,
}

impl Place {
    pub fn address(self, v6: bool) -> IpAddr {
        let (net, host) = match self {
            Place::Client(n) => (9, u16::from(n % 8) + 1),
            Place::Vip(second) => (1, 100 + u16::from(second)),
            Place::Snat(second, n) => (1, 110 + u16::from(second) + u16::from(n % SECOND_SNATS)),
            Place::InsideVip => (2, 100),
            Place::Backend(n) => (2, u16::from(n % 6) + 10),
            Place::Host => (1, 2),
            Place::Any(n) => ((n >> 8) % 4, n & 0xff),
            Place::Multicast if v6 => return IpAddr::V6(ndp::ALL_NODES),
            Place::Multicast => return IpAddr::V4(Ipv4Addr::new(224, 0, 0, 1)),
            Place::Broadcast if v6 => return IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            Place::Broadcast => return IpAddr::V4(Ipv4Addr::BROADCAST),
        };
        if v6 {
            IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, net, 0, 0, 0, host))
        } else {
            IpAddr::V4(Ipv4Addr::new(10, 0, net as u8, host as u8))
        }
    }
}

/// A few ports, and seldom any.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum PortNumber {
    Service(bool),
    Backend(bool),
    Client(u8),
    Any(u16),
}

impl PortNumber {
    pub fn number(self) -> u16 {
        match self {
            PortNumber::Service(second) => 80 + u16::from(second),
            PortNumber::Backend(second) => 8080 + u16::from(second),
            PortNumber::Client(n) => 40_000 + u16::from(n),
            PortNumber::Any(n) => n,
        }
    }
}

#[derive(Arbitrary, Clone, Debug)]
pub struct BackendSpec {
    pub place: u8,
    pub second_port: bool,
    pub weight: u8,
    pub base_weight: u8,
    pub alive: bool,
}

#[derive(Arbitrary, Clone, Debug)]
pub struct ServiceSpec {
    pub id: u8,
    pub second_vip: bool,
    pub v6: bool,
    pub second_port: bool,
    pub udp: bool,
    pub mode: u8,
    pub scheduler: u8,
    pub dead_backend: u8,
    pub track_udp: bool,
    pub consult_all_slots: bool,
    pub backends: Vec<BackendSpec>,
}

/// SNAT addresses of each family that the second group has: more than are tried for a flow.
const SECOND_SNATS: u8 = 6;

/// Two groups: 1 holds what is numbered first, 2 the rest.
pub const GROUPS: [u32; 2] = [1, 2];

pub fn plan(revision: u64, services: &[ServiceSpec]) -> Plan {
    let both = |place: Place| vec![place.address(false), place.address(true)];
    let group = |second: bool| GroupPlan {
        id: GROUPS[usize::from(second)],
        name: format!("g{}", u8::from(second)),
        vips: both(Place::Vip(second)),
        inside_vips: if second { vec![] } else { both(Place::InsideVip) },
        snat: (0..if second { SECOND_SNATS } else { 1 }).flat_map(|n| both(Place::Snat(second, n))).collect(),
    };
    Plan {
        revision,
        groups: vec![group(false), group(true)],
        services: services.iter().take(MOST_SERVICES).map(service).collect(),
    }
}

fn service(spec: &ServiceSpec) -> ServicePlan {
    let mode = [Mode::Nat, Mode::Dsr, Mode::NatTransparent][usize::from(spec.mode % 3)];
    let port = 80 + u16::from(spec.second_port);
    let backend = |(n, b): (usize, &BackendSpec)| BackendPlan {
        id: n as u32 + 1,
        name: format!("be{n}"),
        address: Place::Backend(b.place).address(spec.v6),
        port: if mode == Mode::Dsr { port } else { 8080 + u16::from(b.second_port) },
        weight: u32::from(b.weight % 4),
        base_weight: u32::from(b.base_weight % 4),
        alive: b.alive,
    };
    ServicePlan {
        id: u32::from(spec.id % 8),
        name: "s".to_owned(),
        group: GROUPS[usize::from(spec.second_vip)],
        vip: Place::Vip(spec.second_vip).address(spec.v6),
        port,
        protocol: if spec.udp { Protocol::Udp } else { Protocol::Tcp },
        mode,
        scheduler: [Scheduler::Maglev, Scheduler::SourceIp, Scheduler::RoundRobin, Scheduler::LeastConn]
            [usize::from(spec.scheduler % 4)],
        dead_backend: [DeadBackend::Reset, DeadBackend::Rehash, DeadBackend::Keep]
            [usize::from(spec.dead_backend % 3)],
        track_udp: spec.track_udp,
        tcp_idle: Duration::from_secs(60),
        udp_idle: Duration::from_secs(10),
        backends: spec.backends.iter().take(MOST_BACKENDS).enumerate().map(backend).collect(),
        consult_all_slots: spec.consult_all_slots,
    }
}

/// What an engine starts with: every mode in both families.
pub fn first_plan() -> Plan {
    let mut services = Vec::new();
    for (n, (mode, udp)) in [(0, false), (1, false), (2, false), (0, true)].into_iter().enumerate() {
        for v6 in [false, true] {
            let backend = |place, weight, base_weight| BackendSpec {
                place: place + 2 * n as u8,
                second_port: udp,
                weight,
                base_weight,
                alive: true,
            };
            services.push(service(&ServiceSpec {
                id: services.len() as u8,
                second_vip: mode == 1,
                v6,
                second_port: mode == 2,
                udp,
                mode,
                scheduler: 0,
                dead_backend: 0,
                track_udp: true,
                consult_all_slots: false,
                backends: vec![backend(0, 1, 1), backend(1, 1, 0)],
            }));
        }
    }
    Plan { services, ..plan(1, &[]) }
}

#[derive(Arbitrary, Clone, Debug)]
pub enum Body {
    Tcp {
        flags: u8,
        payload: u8,
    },
    Udp {
        payload: u8,
    },
    Echo {
        reply: bool,
    },
    /// An ICMP error about a packet.
    Error {
        kind: u8,
        code: u8,
        mtu: u16,
        quoted: Box<IpSpec>,
        cut: u8,
    },
    /// Some protocol.
    Other {
        proto: u8,
        payload: u8,
    },
}

#[derive(Arbitrary, Clone, Debug)]
pub struct IpSpec {
    pub v6: bool,
    pub src: Place,
    pub dst: Place,
    pub src_port: PortNumber,
    pub dst_port: PortNumber,
    pub ttl: u8,
    pub body: Body,
    /// Identification, offset in units of 8, more: IPv4 only.
    pub fragment: Option<(u16, u8, bool)>,
}

#[derive(Arbitrary, Clone, Debug)]
pub enum Payload {
    Ip(IpSpec),
    ArpRequest { target: Place, sender: Place },
    ArpReply { target: Place, sender: Place },
    Solicitation { target: Place, src: Place },
    Advertisement { target: Place, solicited: bool },
    Raw(Vec<u8>),
}

#[derive(Arbitrary, Clone, Debug)]
pub enum Checksums {
    /// As they should be.
    Complete,
    /// The L4 field holds the pseudo-header's sum.
    Partial { gso: u8, gso_size: u16 },
    /// Metadata of the fuzzer's own.
    Any { needs_csum: bool, start: u8, offset: u8, gso: u8, gso_size: u16 },
}

#[derive(Arbitrary, Clone, Debug)]
pub struct FrameSpec {
    pub inside: bool,
    /// To our MAC, mostly.
    pub to: u8,
    pub vlan: Option<u16>,
    pub payload: Payload,
    pub checksums: Checksums,
    pub spoils: Vec<(u8, u8)>,
    pub cut: Option<u8>,
}

impl FrameSpec {
    pub fn port(&self) -> Port {
        if self.inside { Port::Inside } else { Port::Service }
    }

    /// The frame and its offload metadata.
    pub fn build(&self) -> (Vec<u8>, Offload) {
        let own = if self.inside { INSIDE_MAC } else { SERVICE_MAC };
        let to = match self.to {
            0..200 => own,
            200..220 => [0xff; 6],
            220..240 => [0x33, 0x33, 0, 0, 0, 1],
            _ => OTHER_MAC,
        };
        let mut frame = self.payload.frame(to);
        let offload = self.offload(&mut frame);
        if let Some(tci) = self.vlan
            && frame.len() >= 14
        {
            let [a, b] = tci.to_be_bytes();
            frame.splice(12..12, [0x81, 0x00, a, b]);
        }
        for &(at, value) in self.spoils.iter().take(MOST_SPOILS) {
            if let Some(byte) = frame.get_mut(usize::from(at)) {
                *byte = value;
            }
        }
        frame.truncate(self.cut.map_or(usize::MAX, usize::from));
        (frame, offload)
    }

    fn offload(&self, frame: &mut [u8]) -> Offload {
        let kind = |n: u8| [Gso::None, Gso::TcpV4, Gso::TcpV6, Gso::UdpL4][usize::from(n % 4)];
        match self.checksums {
            Checksums::Complete => Offload::default(),
            Checksums::Partial { gso, gso_size } => partial(frame, kind(gso), gso_size).unwrap_or_default(),
            Checksums::Any { needs_csum, start, offset, gso, gso_size } => Offload {
                needs_csum,
                csum_start: u16::from(start),
                csum_offset: u16::from(offset),
                gso: kind(gso),
                gso_size,
                hdr_len: 0,
            },
        }
    }
}

/// Makes the L4 checksum of an untagged TCP or UDP frame a partial one.
fn partial(frame: &mut [u8], gso: Gso, gso_size: u16) -> Option<Offload> {
    use komainu_packet::checksum::Sum;
    use komainu_packet::wire::{Net, dissect};
    let Net::Ip(ip) = dissect(frame).ok()?.net else { return None };
    ip.ports()?;
    let at = ip.checksum_at()?;
    let sum = Sum::pseudo_header(ip.src, ip.dst, ip.proto, ip.l4_len() as u32).fold();
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    let (start, offset) = (ip.l4 as u16, (at - ip.l4) as u16);
    let gso_size = if gso == Gso::None { 0 } else { gso_size };
    Some(Offload { needs_csum: true, csum_start: start, csum_offset: offset, gso, gso_size, hdr_len: 0 })
}

impl Payload {
    fn frame(&self, to: Mac) -> Vec<u8> {
        let v4 = |place: &Place| match place.address(false) {
            IpAddr::V4(a) => a,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        let v6 = |place: &Place| match place.address(true) {
            IpAddr::V6(a) => a,
            IpAddr::V4(_) => Ipv6Addr::UNSPECIFIED,
        };
        match self {
            Payload::Ip(spec) => {
                let ethertype = if spec.v6 { [0x86, 0xdd] } else { [0x08, 0x00] };
                [&to[..], &OTHER_MAC, &ethertype, &spec.packet()].concat()
            }
            Payload::ArpRequest { target, sender } => {
                arp::Repr::request(v4(target), Some(v4(sender)), OTHER_MAC).frame(to, OTHER_MAC).to_vec()
            }
            Payload::ArpReply { target, sender } => {
                let mut repr = arp::Repr::unsolicited_reply(v4(sender), OTHER_MAC);
                repr.target_ip = v4(target);
                repr.frame(to, OTHER_MAC).to_vec()
            }
            Payload::Solicitation { target, src } => {
                let (target, src) = (v6(target), v6(src));
                let source_mac = (!src.is_unspecified()).then_some(OTHER_MAC);
                let dst = ndp::solicited_node(target);
                ndp::Repr::Solicitation { target, source_mac }.frame(
                    ndp::multicast_mac(dst),
                    OTHER_MAC,
                    src,
                    dst,
                )
            }
            Payload::Advertisement { target, solicited } => {
                let target = v6(target);
                let repr = ndp::Repr::Advertisement {
                    target,
                    router: false,
                    solicited: *solicited,
                    overrides: true,
                    target_mac: Some(OTHER_MAC),
                };
                repr.frame(to, OTHER_MAC, target, ndp::ALL_NODES)
            }
            Payload::Raw(bytes) => bytes.clone(),
        }
    }
}

impl IpSpec {
    fn packet(&self) -> Vec<u8> {
        self.packet_at(0)
    }

    fn packet_at(&self, depth: u8) -> Vec<u8> {
        let (src, dst) = (self.src.address(self.v6), self.dst.address(self.v6));
        let (src_port, dst_port) = (self.src_port.number(), self.dst_port.number());
        let ip = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => PacketBuilder::ipv4(src.octets(), dst.octets(), self.ttl),
            (IpAddr::V6(src), IpAddr::V6(dst)) => PacketBuilder::ipv6(src.octets(), dst.octets(), self.ttl),
            _ => return Vec::new(),
        };
        let payload = |len: u8| (0..len).collect::<Vec<u8>>();
        let mut packet = Vec::new();
        let done = match &self.body {
            Body::Tcp { flags, payload: len } => {
                let mut tcp = etherparse::TcpHeader::new(src_port, dst_port, 1000, 65_535);
                tcp.fin = flags & 0x01 != 0;
                tcp.syn = flags & 0x02 != 0;
                tcp.rst = flags & 0x04 != 0;
                tcp.ack = flags & 0x10 != 0;
                ip.tcp_header(tcp).write(&mut packet, &payload(*len)).is_ok()
            }
            Body::Udp { payload: len } => {
                ip.udp(src_port, dst_port).write(&mut packet, &payload(*len)).is_ok()
            }
            Body::Echo { reply } => match (self.v6, reply) {
                (false, false) => ip.icmpv4_echo_request(src_port, 1).write(&mut packet, b"woof").is_ok(),
                (false, true) => ip.icmpv4_echo_reply(src_port, 1).write(&mut packet, b"woof").is_ok(),
                (true, false) => ip.icmpv6_echo_request(src_port, 1).write(&mut packet, b"woof").is_ok(),
                (true, true) => ip.icmpv6_echo_reply(src_port, 1).write(&mut packet, b"woof").is_ok(),
            },
            Body::Error { kind, code, mtu, quoted, cut } => {
                // An error about an error about an error serves nobody.
                let mut quote = if depth < 2 { quoted.packet_at(depth + 1) } else { Vec::new() };
                quote.truncate(usize::from(*cut).max(28));
                let [a, b] = mtu.to_be_bytes();
                if self.v6 {
                    let kind = 1 + kind % 4;
                    ip.icmpv6_raw(kind, *code, [0, 0, a, b]).write(&mut packet, &quote).is_ok()
                } else {
                    let kind = [3, 11, 12, 5][usize::from(kind % 4)];
                    ip.icmpv4_raw(kind, *code % 16, [0, 0, a, b]).write(&mut packet, &quote).is_ok()
                }
            }
            // The number is written below: the builder gives up on those of extension headers that it was not given.
            Body::Other { payload: len, .. } => ip.write(&mut packet, 252.into(), &payload(*len)).is_ok(),
        };
        if !done {
            return Vec::new();
        }
        if let Body::Other { proto, .. } = self.body {
            packet[if self.v6 { 6 } else { 9 }] = proto;
        }
        if let (Some((id, offset, more)), false) = (self.fragment, self.v6) {
            let word = u16::from(offset) | if more { 0x2000 } else { 0 };
            packet[4..6].copy_from_slice(&(id % 4).to_be_bytes());
            packet[6..8].copy_from_slice(&word.to_be_bytes());
        }
        if !self.v6
            && let Ok(mut view) = komainu_packet::wire::ipv4::Packet::new_checked(&mut packet[..])
        {
            view.fill_checksum();
        }
        packet
    }
}
