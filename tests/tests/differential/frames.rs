//! Frames that get far: most belong to a service or to a flow that is remembered; some are spoiled.

use std::net::{IpAddr, SocketAddr};

use arbitrary::{Arbitrary, Unstructured};
use komainu_packet::engine::{Gso, Offload, Port};
use komainu_packet::plan::{Mode, Plan, Protocol};
use komainu_packet::wire::{arp, ndp};

use crate::build::{Body, FrameSpec, INSIDE_MAC, OTHER_MAC, Place, SERVICE_MAC};
use crate::rng::Rng;

/// A frame that comes in.
pub struct Frame {
    pub bytes: Vec<u8>,
    pub port: Port,
    /// Payload of each segment of a super-frame; 0: it is none.
    pub gso_size: u16,
}

impl Frame {
    pub fn offload(&self) -> Offload {
        if self.gso_size == 0 {
            return Offload::default();
        }
        let gso = match (self.bytes[12], self.bytes.get(if self.bytes[12] == 8 { 23 } else { 20 })) {
            (_, Some(17)) => Gso::UdpL4,
            (8, _) => Gso::TcpV4,
            _ => Gso::TcpV6,
        };
        Offload { gso, gso_size: self.gso_size, ..Offload::default() }
    }
}

/// A way from an end to another that was seen to be forwarded, so that its answer may come.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub protocol: Protocol,
    pub from: SocketAddr,
    pub to: SocketAddr,
}

pub fn make(rng: &mut Rng, plan: &Plan, seen: &[Seen], super_frames: bool) -> Frame {
    let mut frame = match rng.weighted(&[50, 30, 4, 5, 4, 7]) {
        0 => request(rng, plan, super_frames),
        1 => answer(rng, plan, seen, super_frames),
        2 => ask_v4(rng),
        3 => ask_v6(rng),
        4 => fragment(rng, plan),
        _ => anything(rng),
    };
    if rng.one_in(12) {
        spoil(rng, &mut frame);
    }
    frame
}

fn own_mac(port: Port) -> [u8; 6] {
    if port == Port::Inside { INSIDE_MAC } else { SERVICE_MAC }
}

fn flags(rng: &mut Rng) -> u8 {
    // ACK, PSH|ACK, SYN, FIN|ACK, RST, SYN|ACK, anything.
    match rng.weighted(&[50, 10, 18, 6, 5, 5, 3]) {
        0 => 0x10,
        1 => 0x18,
        2 => 0x02,
        3 => 0x11,
        4 => 0x04,
        5 => 0x12,
        _ => rng.byte(),
    }
}

fn length(rng: &mut Rng) -> usize {
    match rng.weighted(&[40, 40, 10, 3]) {
        0 => rng.below(30) as usize,
        1 => rng.below(600) as usize,
        2 => 1200 + rng.below(260) as usize,
        _ => 1400 + rng.below(400) as usize,
    }
}

fn ttl(rng: &mut Rng) -> u8 {
    match rng.weighted(&[90, 4, 2]) {
        0 => 64,
        1 => 1 + rng.below(3) as u8,
        _ => rng.byte(),
    }
}

fn request(rng: &mut Rng, plan: &Plan, super_frames: bool) -> Frame {
    if plan.services.is_empty() {
        return anything(rng);
    }
    let service = &plan.services[rng.below(plan.services.len() as u64) as usize];
    let v6 = service.vip.is_ipv6();
    let client = Place::Client(rng.below(3) as u8).address(v6);
    // New flows of full NAT are the program's to make: more clients, and more that begin.
    let bound = service.mode == Mode::Nat && service.protocol == Protocol::Tcp;
    let from = SocketAddr::new(client, 40_000 + rng.below(if bound { 40 } else { 5 }) as u16);
    let flags = if bound && rng.one_in(3) { 0x02 } else { flags(rng) };
    let mut to = SocketAddr::new(service.vip, service.port);
    if rng.one_in(25) {
        to.set_port(rng.of(&[80, 81, 8080, 1024, 22]));
    }
    if rng.one_in(40) {
        to.set_ip(
            rng.of(&[Place::Snat(false, 0), Place::InsideVip, Place::Host, Place::Backend(1)]).address(v6),
        );
    }
    let port = if rng.one_in(20) { Port::Inside } else { Port::Service };
    let protocol = if rng.one_in(30) { other(service.protocol) } else { service.protocol };
    tcp_udp(rng, (protocol, flags), from, to, port, super_frames)
}

fn answer(rng: &mut Rng, plan: &Plan, seen: &[Seen], super_frames: bool) -> Frame {
    let port = if rng.one_in(3) { Port::Service } else { Port::Inside };
    let transparent: Vec<_> = plan.services.iter().filter(|s| s.mode == Mode::NatTransparent).collect();
    if !transparent.is_empty() && rng.one_in(3) {
        let service = transparent[rng.below(transparent.len() as u64) as usize];
        if !service.backends.is_empty() {
            let backend = &service.backends[rng.below(service.backends.len() as u64) as usize];
            let v6 = backend.address.is_ipv6();
            let to = match rng.weighted(&[20, 1, 1, 1]) {
                0 => Place::Client(rng.below(3) as u8).address(v6),
                1 => Place::Any(rng.next() as u16).address(v6),
                2 => Place::Host.address(v6),
                _ => rng.of(&[Place::Multicast, Place::Broadcast]).address(v6),
            };
            let from = SocketAddr::new(backend.address, backend.port);
            let to = SocketAddr::new(to, 40_000 + rng.below(5) as u16);
            let flags = flags(rng);
            return tcp_udp(rng, (service.protocol, flags), from, to, port, super_frames);
        }
    }
    if seen.is_empty() {
        return request(rng, plan, super_frames);
    }
    // The newest more often than those that were forgotten since.
    let back = rng.below(seen.len() as u64).min(rng.below(seen.len() as u64));
    let way = seen[seen.len() - 1 - back as usize];
    let mut from = way.to;
    if rng.one_in(30) {
        from.set_port(from.port() ^ 1);
    }
    let flags = flags(rng);
    tcp_udp(rng, (way.protocol, flags), from, way.from, port, super_frames)
}

fn other(protocol: Protocol) -> Protocol {
    if protocol == Protocol::Tcp { Protocol::Udp } else { Protocol::Tcp }
}

fn tcp_udp(
    rng: &mut Rng,
    (protocol, flags): (Protocol, u8),
    from: SocketAddr,
    to: SocketAddr,
    port: Port,
    super_frames: bool,
) -> Frame {
    let ethernet = etherparse::PacketBuilder::ethernet2(OTHER_MAC, own_mac(port));
    let ttl = ttl(rng);
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), ttl),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), ttl),
        _ => return anything(rng),
    };
    let gso_size = if super_frames && rng.one_in(10) { 100 + rng.below(900) as u16 } else { 0 };
    let len = if gso_size > 0 { rng.below(3000) as usize } else { length(rng) };
    let payload = rng.bytes(len);
    let mut bytes = Vec::with_capacity(len + 90);
    let written = match protocol {
        Protocol::Udp => ip.udp(from.port(), to.port()).write(&mut bytes, &payload),
        Protocol::Tcp => {
            let mut tcp = etherparse::TcpHeader::new(from.port(), to.port(), rng.next() as u32, 65_535);
            if rng.one_in(3) {
                let _ = tcp.set_options(&[etherparse::TcpOptionElement::Timestamp(1, 2)]);
            }
            (tcp.fin, tcp.syn, tcp.rst) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
            (tcp.psh, tcp.ack, tcp.urg) = (flags & 8 != 0, flags & 16 != 0, flags & 32 != 0);
            ip.tcp_header(tcp).write(&mut bytes, &payload)
        }
    };
    written.expect("a vector takes everything");
    if protocol == Protocol::Udp && rng.one_in(8) {
        // Without a checksum: legal in IPv4 only, but the backend's business.
        let at = if from.is_ipv4() { 14 + 20 + 6 } else { 14 + 40 + 6 };
        bytes[at] = 0;
        bytes[at + 1] = 0;
    }
    if rng.one_in(6) {
        // Padding behind the packet.
        let pad = rng.below(30) as usize;
        bytes.extend(rng.bytes(pad));
    }
    Frame { bytes, port, gso_size }
}

fn v4(place: Place) -> std::net::Ipv4Addr {
    match place.address(false) {
        IpAddr::V4(a) => a,
        IpAddr::V6(_) => std::net::Ipv4Addr::UNSPECIFIED,
    }
}

fn v6(place: Place) -> std::net::Ipv6Addr {
    match place.address(true) {
        IpAddr::V6(a) => a,
        IpAddr::V4(_) => std::net::Ipv6Addr::UNSPECIFIED,
    }
}

fn ours(rng: &mut Rng) -> Place {
    let b = rng.one_in(2);
    match rng.weighted(&[4, 3, 2, 1, 1]) {
        0 => Place::Vip(b),
        1 => Place::Snat(b, rng.byte()),
        2 => Place::InsideVip,
        3 => Place::Host,
        _ => Place::Any(rng.next() as u16),
    }
}

fn ask_v4(rng: &mut Rng) -> Frame {
    let port = rng.of(&[Port::Service, Port::Inside]);
    let sender = match rng.weighted(&[8, 1, 1]) {
        0 => Place::Client(rng.byte()),
        1 => Place::Broadcast,
        _ => ours(rng),
    };
    let sender_ip = Some(v4(sender)).filter(|_| !rng.one_in(10));
    let mac = match rng.weighted(&[20, 1, 1]) {
        0 => OTHER_MAC,
        1 => own_mac(port),
        _ => [rng.byte(), 0, 0, 0, 0, 0],
    };
    let to = rng.of(&[arp::Repr::TO_ALL, own_mac(port), own_mac(port), OTHER_MAC]);
    let repr = if rng.one_in(6) {
        let mut repr = arp::Repr::unsolicited_reply(v4(sender), mac);
        repr.target_ip = v4(ours(rng));
        repr
    } else {
        arp::Repr::request(v4(ours(rng)), sender_ip, mac)
    };
    let mut bytes = repr.frame(to, OTHER_MAC).to_vec();
    if rng.one_in(2) {
        bytes.resize(60, 0);
    }
    Frame { bytes, port, gso_size: 0 }
}

fn ask_v6(rng: &mut Rng) -> Frame {
    let port = rng.of(&[Port::Service, Port::Inside]);
    let target = v6(ours(rng));
    let src = match rng.weighted(&[8, 1, 1]) {
        0 => v6(Place::Client(rng.byte())),
        1 => std::net::Ipv6Addr::UNSPECIFIED,
        _ => v6(ours(rng)),
    };
    let mac = match rng.weighted(&[20, 1, 1]) {
        0 => OTHER_MAC,
        1 => own_mac(port),
        _ => [rng.byte(), 0, 0, 0, 0, 0],
    };
    let bytes = if rng.one_in(5) {
        let repr = ndp::Repr::Advertisement {
            target,
            router: rng.one_in(2),
            solicited: rng.one_in(2),
            overrides: true,
            target_mac: Some(mac).filter(|_| !rng.one_in(3)),
        };
        repr.frame(rng.of(&[own_mac(port), [0x33, 0x33, 0, 0, 0, 1]]), mac, src, ndp::ALL_NODES)
    } else {
        let source_mac = Some(mac).filter(|_| !src.is_unspecified() && !rng.one_in(8));
        let group = ndp::solicited_node(target);
        let (to, dst) =
            if rng.one_in(3) { (own_mac(port), target) } else { (ndp::multicast_mac(group), group) };
        ndp::Repr::Solicitation { target, source_mac }.frame(to, mac, src, dst)
    };
    Frame { bytes, port, gso_size: 0 }
}

/// A piece of a packet to a service.
fn fragment(rng: &mut Rng, plan: &Plan) -> Frame {
    let mut frame = request(rng, plan, false);
    frame.gso_size = 0;
    if frame.bytes.len() > 34 && frame.bytes[12..14] == [8, 0] {
        let word = rng.of(&[0x2000u16, 0x2001, 0x0001, 0x0010, 0x8000, 0x4000]);
        frame.bytes[20..22].copy_from_slice(&word.to_be_bytes());
        frame.bytes[18] = 0;
        frame.bytes[19] = rng.below(3) as u8;
        fill_checksum(&mut frame.bytes);
    } else if frame.bytes.len() > 54 {
        // An extension header before what there is.
        let next = frame.bytes[20];
        let kind = rng.of(&[0u8, 43, 44, 60, 59, 50, 135]);
        frame.bytes[20] = kind;
        let piece = rng.of(&[0u16, 1, 8, 9]).to_be_bytes();
        frame.bytes.splice(54..54, [next, 0, piece[0], if kind == 44 { piece[1] } else { 0 }, 0, 0, 0, 1]);
        let len = u16::from_be_bytes([frame.bytes[18], frame.bytes[19]]).saturating_add(8);
        frame.bytes[18..20].copy_from_slice(&len.to_be_bytes());
    }
    frame
}

fn fill_checksum(frame: &mut [u8]) {
    if let Ok(mut view) = komainu_packet::wire::ipv4::Packet::new_checked(&mut frame[14..]) {
        view.fill_checksum();
    }
}

/// What the fuzz targets would send.
fn anything(rng: &mut Rng) -> Frame {
    let random = rng.bytes(200);
    let mut data = Unstructured::new(&random);
    let spec = FrameSpec::arbitrary(&mut data).expect("data that has run out is zeros");
    let mut spec = FrameSpec { to: if rng.one_in(5) { spec.to } else { 0 }, ..spec };
    spec.checksums = crate::build::Checksums::Complete;
    if let crate::build::Payload::Ip(ip) = &mut spec.payload
        && let Body::Error { .. } | Body::Echo { .. } = ip.body
        && rng.one_in(2)
    {
        ip.dst = ours(rng);
    }
    let (bytes, _) = spec.build();
    Frame { bytes, port: spec.port(), gso_size: 0 }
}

fn spoil(rng: &mut Rng, frame: &mut Frame) {
    let len = frame.bytes.len() as u64;
    if len == 0 {
        return;
    }
    match rng.below(7) {
        0 => frame.bytes.truncate(rng.below(len) as usize),
        1 => frame.bytes.truncate(14 + rng.below(80) as usize),
        2 => {
            let tags = 1 + rng.below(3);
            for _ in 0..tags {
                let tci = rng.of(&[[0x00, 0x00], [0xe0, 0x00], [0x00, 0x07]]);
                if frame.bytes.len() >= 14 {
                    frame.bytes.splice(12..12, [0x81, 0x00, tci[0], tci[1]]);
                }
            }
        }
        3 if frame.bytes.len() > 34 && frame.bytes[12..14] == [8, 0] => {
            // Options, right ones.
            let options = rng.of(&[[1u8, 1, 1, 0], [131, 3, 4, 0], [148, 4, 0, 0], [7, 0, 0, 0]]);
            frame.bytes.splice(34..34, options);
            frame.bytes[14] = 0x46;
            let len = u16::from_be_bytes([frame.bytes[16], frame.bytes[17]]).saturating_add(4);
            frame.bytes[16..18].copy_from_slice(&len.to_be_bytes());
            fill_checksum(&mut frame.bytes);
        }
        4 => {
            // In the headers, the checksum made right again.
            let at = rng.below(len.min(74)) as usize;
            frame.bytes[at] = rng.byte();
            if frame.bytes.len() > 34 && frame.bytes[12..14] == [8, 0] {
                fill_checksum(&mut frame.bytes);
            }
        }
        _ => {
            for _ in 0..=rng.below(3) {
                let at = rng.below(len.min(90)) as usize;
                frame.bytes[at] =
                    if rng.one_in(2) { rng.byte() } else { frame.bytes[at] ^ 1 << rng.below(8) };
            }
        }
    }
    if frame.bytes.len() < 60 {
        frame.gso_size = 0;
    }
}
