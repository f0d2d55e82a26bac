//! Echo requests, and ICMP errors in every mode and direction.

use std::net::{IpAddr, SocketAddr};

use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};

use super::*;
use crate::engine::*;
use crate::plan::*;

/// An ICMP error, its checksum proved right.
#[derive(Debug)]
pub struct Error {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub kind: u8,
    pub code: u8,
    pub mtu: u32,
    /// The quoted packet.
    pub packet: Vec<u8>,
}

pub fn read_error(frame: &[u8]) -> Error {
    let packet = PacketHeaders::from_ethernet_slice(frame).unwrap();
    let (src, dst, message): (IpAddr, IpAddr, _) = match (packet.net.unwrap(), packet.transport.unwrap()) {
        (NetHeaders::Ipv4(ip, _), TransportHeader::Icmpv4(icmp)) => {
            assert_eq!(ip.calc_header_checksum(), ip.header_checksum);
            let payload = packet.payload.slice();
            assert_eq!(icmp.icmp_type.calc_checksum(payload), icmp.checksum, "ICMP checksum");
            (ip.source.into(), ip.destination.into(), 34)
        }
        (NetHeaders::Ipv6(ip, _), TransportHeader::Icmpv6(icmp)) => {
            let payload = packet.payload.slice();
            let sum = icmp.icmp_type.calc_checksum(ip.source, ip.destination, payload).unwrap();
            assert_eq!(sum, icmp.checksum, "ICMPv6 checksum");
            (ip.source.into(), ip.destination.into(), 54)
        }
        other => panic!("{other:?}"),
    };
    let message = &frame[message..];
    Error {
        src,
        dst,
        kind: message[0],
        code: message[1],
        mtu: u32::from_be_bytes(message[4..8].try_into().unwrap()),
        packet: message[8..].to_vec(),
    }
}

/// "Too big" from `src` to `dst` about `quoted`, an IP packet or its beginning.
fn too_big(src: IpAddr, dst: IpAddr, eth_dst: crate::neighbour::Mac, quoted: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(ROUTER_MAC, eth_dst);
    let mut frame = Vec::new();
    let mtu = 1280u32.to_be_bytes();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let icmp = ethernet.ipv4(src.octets(), dst.octets(), 64).icmpv4_raw(3, 4, mtu);
            icmp.write(&mut frame, quoted).unwrap();
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let icmp = ethernet.ipv6(src.octets(), dst.octets(), 64).icmpv6_raw(2, 0, mtu);
            icmp.write(&mut frame, quoted).unwrap();
        }
        _ => panic!("two families"),
    }
    frame
}

fn router(v6: bool) -> IpAddr {
    if v6 { ip("2001:db8:5::5") } else { ip("203.0.113.5") }
}

/// Ends of a quoted packet; its checksums are checked where it is quoted whole.
fn read_quoted(packet: &[u8], v6: bool, whole: bool) -> (SocketAddr, SocketAddr) {
    if whole {
        let mut frame = vec![0; 12];
        frame.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
        frame.extend(packet);
        let seen = Seen::read(&frame);
        return (seen.src, seen.dst);
    }
    let (src, dst, l4): (IpAddr, IpAddr, usize) = if v6 {
        let at = |i: usize| <[u8; 16]>::try_from(&packet[i..i + 16]).unwrap().into();
        (at(8), at(24), 40)
    } else {
        let at = |i: usize| <[u8; 4]>::try_from(&packet[i..i + 4]).unwrap().into();
        (at(12), at(16), 20)
    };
    let port = |i: usize| u16::from_be_bytes([packet[i], packet[i + 1]]);
    (SocketAddr::new(src, port(l4)), SocketAddr::new(dst, port(l4 + 2)))
}

/// How much of the L4 part is quoted: 8 bytes as RFC 792 asks for, or all.
fn quotes(packet: &[u8], v6: bool) -> [(Vec<u8>, bool); 2] {
    let head = if v6 { 48 } else { 28 };
    [(packet[..head].to_vec(), false), (packet.to_vec(), true)]
}

fn forwarded(world: &mut World, frame: &[u8], port: Port) -> (Port, Vec<u8>) {
    let mut frame = frame.to_vec();
    match world.process(&mut frame, Offload::default(), port) {
        Verdict::Forward { port, .. } => (port, frame),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_error_about_an_answer_reaches_the_backend_that_gave_it() {
    for mode in [Mode::Dsr, Mode::Nat, Mode::NatTransparent] {
        for v6 in FAMILIES {
            for protocol in PROTOCOLS {
                let mut world = World::new(vec![service(mode, v6, protocol, 3)]);
                for port in 3000..3020 {
                    let client = SocketAddr::new(client(v6).ip(), port);
                    let (_, there) = world.send(&request_from(protocol, v6, port).flags(SYN).build()).sent();
                    // What the client's side has seen: an answer from the VIP.
                    let answer = Packet::new(protocol, SocketAddr::new(vip(v6), 80), client).len(100).build();
                    for (quoted, whole) in quotes(&answer[14..], v6) {
                        let error = too_big(router(v6), vip(v6), OWN_MAC, &quoted);
                        let (out, sent) = forwarded(&mut world, &error, Port::Service);
                        assert_eq!(sent[..6], there.eth_dst, "the same backend as the flow");
                        let seen = read_error(&sent);
                        let ends = read_quoted(&seen.packet, v6, whole);
                        assert_eq!(seen.mtu, 1280);
                        match mode {
                            Mode::Dsr => {
                                assert_eq!((out, &sent[12..]), (Port::Service, &error[12..]));
                            }
                            Mode::NatTransparent => {
                                assert_eq!(
                                    (out, seen.src, seen.dst),
                                    (Port::Inside, router(v6), there.dst.ip())
                                );
                                assert_eq!(ends, (there.dst, client));
                            }
                            Mode::Nat => {
                                assert_eq!(
                                    (out, seen.src, seen.dst),
                                    (Port::Inside, snat(v6), there.dst.ip())
                                );
                                assert_eq!(ends, (there.dst, there.src));
                            }
                        }
                    }
                }
                assert_eq!(world.count("icmp_error_forwarded"), 40);
            }
        }
    }
}

#[test]
fn an_error_about_a_forwarded_packet_reaches_the_client() {
    for mode in [Mode::Nat, Mode::NatTransparent] {
        for v6 in FAMILIES {
            for protocol in PROTOCOLS {
                let mut world = World::new(vec![service(mode, v6, protocol, 3)]);
                let mut forwarded_packet = request(protocol, v6).flags(SYN).len(100).build();
                world.process(&mut forwarded_packet, Offload::default(), Port::Service);
                let there = Seen::read(&forwarded_packet);
                for (quoted, whole) in quotes(&forwarded_packet[14..], v6) {
                    let inside_router = backend_address(mode, v6, 20);
                    let error = too_big(inside_router, there.src.ip(), INSIDE_MAC, &quoted);
                    let (out, sent) = forwarded(&mut world, &error, Port::Inside);
                    assert_eq!((out, &sent[..6]), (Port::Service, &ROUTER_MAC[..]));
                    let seen = read_error(&sent);
                    assert_eq!((seen.src, seen.dst, seen.mtu), (vip(v6), client(v6).ip(), 1280));
                    let ends = read_quoted(&seen.packet, v6, whole);
                    assert_eq!(ends, (client(v6), SocketAddr::new(vip(v6), 80)));
                }
            }
        }
    }
}

#[test]
fn an_error_of_nobodys_flow_is_dropped_or_left() {
    for v6 in FAMILIES {
        let mut world = World::new(vec![service(Mode::Nat, v6, Protocol::Tcp, 3)]);
        let answer =
            Packet::new(Protocol::Tcp, SocketAddr::new(vip(v6), 80), client(v6)).build()[14..].to_vec();
        let error = too_big(router(v6), vip(v6), OWN_MAC, &answer);
        assert_eq!(world.send(&error), Outcome::Dropped("icmp_unmatched"), "no binding");
        let error = too_big(router(v6), snat(v6), OWN_MAC, &answer);
        assert_eq!(world.send(&error), Outcome::Dropped("icmp_unmatched"), "not to the quoted source");
        let own = service_net(v6, 2);
        let host = Packet::new(Protocol::Tcp, SocketAddr::new(own, 9), client(v6)).build()[14..].to_vec();
        assert_eq!(world.send(&too_big(router(v6), own, OWN_MAC, &host)), Outcome::NotOurs, "the host's own");

        world.send(&request(Protocol::Tcp, v6).flags(SYN).build()).sent();
        let mut error = too_big(router(v6), vip(v6), OWN_MAC, &answer);
        forwarded(&mut world, &error.clone(), Port::Service);
        world.lease(true, false);
        assert_eq!(world.send(&error), Outcome::Dropped("no_lease"));
        world.lease(true, true);
        *error.last_mut().unwrap() ^= 1;
        assert_eq!(world.send(&error), Outcome::Dropped("bad_checksum"));
    }
}

#[test]
fn an_echo_request_to_the_vip_is_answered_under_the_lease() {
    for v6 in FAMILIES {
        let mut world = World::new(vec![service(Mode::Dsr, v6, Protocol::Tcp, 1)]);
        let data: Vec<u8> = (0..57).collect();
        let ethernet = PacketBuilder::ethernet2(ROUTER_MAC, OWN_MAC);
        let mut frame = Vec::new();
        match (client(v6).ip(), vip(v6)) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet
                .ipv4(src.octets(), dst.octets(), 5)
                .icmpv4_echo_request(7, 9)
                .write(&mut frame, &data)
                .unwrap(),
            (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet
                .ipv6(src.octets(), dst.octets(), 5)
                .icmpv6_echo_request(7, 9)
                .write(&mut frame, &data)
                .unwrap(),
            _ => unreachable!(),
        }
        let (port, reply) = forwarded(&mut world, &frame, Port::Service);
        let seen = read_error(&reply);
        assert_eq!((port, seen.src, seen.dst), (Port::Service, vip(v6), client(v6).ip()));
        assert_eq!((seen.kind, seen.code, seen.mtu), (if v6 { 129 } else { 0 }, 0, 7 << 16 | 9));
        assert_eq!(seen.packet, data);
        assert_eq!((&reply[..6], &reply[6..12]), (&ROUTER_MAC[..], &OWN_MAC[..]));
        assert_eq!(reply[if v6 { 21 } else { 22 }], 64, "a TTL of its own");
        world.lease(true, false);
        assert_eq!(world.send(&frame), Outcome::Dropped("no_lease"));
    }
}
