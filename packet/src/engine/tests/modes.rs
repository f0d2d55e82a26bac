//! Every mode × IPv4, IPv6 × TCP, UDP, both directions.

use super::*;
use crate::engine::*;
use crate::neighbour::NextHop;
use crate::plan::*;
use std::net::SocketAddr;

#[test]
fn dsr_changes_the_macs_and_nothing_else() {
    for v6 in FAMILIES {
        for protocol in PROTOCOLS {
            let mut world = World::new(vec![service(Mode::Dsr, v6, protocol, 3)]);
            let frame = request(protocol, v6).flags(SYN).ttl(1).build();
            let mut sent = frame.clone();
            let verdict = world.process(&mut sent, Offload::default(), Port::Service);
            let Verdict::Forward { port: Port::Service, fence } = verdict else { panic!("{verdict:?}") };
            assert_eq!((fence.group, fence.permission), (GROUP, Permission::Forward));
            assert_eq!(sent[12..], frame[12..]);
            assert_eq!(sent[6..12], OWN_MAC);
            assert_eq!(sent[..5], backend_mac(0)[..5]);
            let backend = u32::from(sent[5]);
            let counters = world.counters();
            let counted = counters.backends.iter().find(|b| b.backend == backend).unwrap();
            assert_eq!((counted.packets, counted.bytes), (1, frame.len() as u64 - 14));
            assert_eq!(counted.new_flows, 1);
            assert_eq!(counters.backends.iter().map(|b| b.packets).sum::<u64>(), 1);
        }
    }
}

#[test]
fn nat_there_and_back() {
    for v6 in FAMILIES {
        for protocol in PROTOCOLS {
            let mut world = World::new(vec![service(Mode::Nat, v6, protocol, 3)]);
            let (port, there) = world.send(&request(protocol, v6).flags(SYN).build()).sent();
            assert_eq!(port, Port::Inside);
            assert_eq!((there.eth_src, there.ttl), (INSIDE_MAC, 63));
            assert_eq!(there.src.ip(), snat(v6));
            assert!(there.src.port() >= SNAT_PORT_MIN);
            let n = u32::from(there.eth_dst[5]);
            assert_eq!(there.dst, SocketAddr::new(backend_address(Mode::Nat, v6, n), 8080));
            assert_eq!(there.payload, b"some payload");

            let answer = Packet::new(protocol, there.dst, there.src).inside().flags(SYN_ACK).len(301);
            let (port, back) = world.send_by(&answer.build(), Port::Inside).sent();
            assert_eq!((port, back.eth_src, back.eth_dst), (Port::Service, OWN_MAC, ROUTER_MAC));
            assert_eq!((back.src, back.dst), (SocketAddr::new(vip(v6), 80), client(v6)));
            assert_eq!((back.ttl, back.payload.len()), (63, 301));

            // The same binding for what follows.
            let (_, again) = world.send(&request(protocol, v6).build()).sent();
            assert_eq!((again.src, again.dst), (there.src, there.dst));

            let counters = world.counters();
            let counted = counters.backends.iter().find(|b| b.backend == n).unwrap();
            assert_eq!((counted.packets, counted.return_packets, counted.new_flows), (2, 1, 1));
            assert_eq!((counted.flows, counted.active, counters.flows), (1, 1, 1));
            let flows = world.engine.flows(&Default::default(), 10, world.now);
            assert_eq!((flows[0].client, flows[0].snat, flows[0].backend), (client(v6), Some(there.src), n));
        }
    }
}

#[test]
fn nat_transparent_there_and_back_without_a_flow() {
    for v6 in FAMILIES {
        for protocol in PROTOCOLS {
            let mut service = service(Mode::NatTransparent, v6, protocol, 3);
            service.track_udp = false;
            let mut world = World::new(vec![service]);
            let (port, there) = world.send(&request(protocol, v6).flags(SYN).build()).sent();
            assert_eq!((port, there.eth_src, there.ttl), (Port::Inside, INSIDE_MAC, 63));
            let n = u32::from(there.eth_dst[5]);
            assert_eq!(there.src, client(v6));
            assert_eq!(there.dst, SocketAddr::new(backend_address(Mode::NatTransparent, v6, n), 8080));

            let answer = Packet::new(protocol, there.dst, client(v6)).inside().flags(SYN_ACK);
            let (port, back) = world.send_by(&answer.build(), Port::Inside).sent();
            assert_eq!((port, back.eth_dst), (Port::Service, ROUTER_MAC));
            assert_eq!((back.src, back.dst, back.ttl), (SocketAddr::new(vip(v6), 80), client(v6), 63));
            assert_eq!(world.counters().flows, 0);
        }
    }
}

#[test]
fn a_transparent_backends_other_packets_and_those_to_the_host_are_the_hosts() {
    let mut world = World::new(vec![service(Mode::NatTransparent, false, Protocol::Tcp, 1)]);
    let backend = SocketAddr::new(backend_address(Mode::NatTransparent, false, 1), 8080);
    let to_host = Packet::new(Protocol::Tcp, backend, "10.0.0.2:5555".parse().unwrap()).inside();
    assert_eq!(world.send_by(&to_host.build(), Port::Inside), Outcome::NotOurs, "a health check's answer");
    let dns = Packet::new(Protocol::Udp, SocketAddr::new(backend.ip(), 4444), "9.9.9.9:53".parse().unwrap())
        .inside();
    assert_eq!(world.send_by(&dns.build(), Port::Inside), Outcome::NotOurs);
}

#[test]
fn without_a_lease_nothing_leaves() {
    for mode in [Mode::Dsr, Mode::Nat, Mode::NatTransparent] {
        for v6 in FAMILIES {
            for protocol in PROTOCOLS {
                let mut world = World::new(vec![service(mode, v6, protocol, 2)]);
                let (_, there) = world.send(&request(protocol, v6).flags(SYN).build()).sent();
                world.lease(true, false);
                let flows = world.counters().flows;
                for flags in [SYN, ACK, RST] {
                    let frame = request_from(protocol, v6, 999).flags(flags).build();
                    assert_eq!(world.send(&frame), Outcome::Dropped("no_lease"));
                }
                if mode != Mode::Dsr {
                    let answer = Packet::new(protocol, there.dst, there.src).inside();
                    assert_eq!(world.send_by(&answer.build(), Port::Inside), Outcome::Dropped("no_lease"));
                }
                assert_eq!(world.counters().flows, flows, "nor is anything remembered");
            }
        }
    }
}

#[test]
fn a_lease_that_ends_while_the_frame_waits_closes_the_fence() {
    let mut world = World::new(vec![service(Mode::Dsr, false, Protocol::Tcp, 1)]);
    let mut frame = request(Protocol::Tcp, false).build();
    let verdict = world.process(&mut frame, Offload::default(), Port::Service);
    let Verdict::Forward { fence, .. } = verdict else { panic!("{verdict:?}") };
    assert!(fence.is_open(&world.leases, world.now));
    world.lease(true, false);
    assert!(!fence.is_open(&world.leases, world.now));
}

#[test]
fn what_is_not_for_us_is_left_alone() {
    let mut world = World::new(vec![service(Mode::Dsr, false, Protocol::Tcp, 1)]);
    let other_mac = Packet { eth_dst: [2, 9, 9, 9, 9, 9], ..request(Protocol::Tcp, false) };
    assert_eq!(world.send(&other_mac.build()), Outcome::NotOurs);
    let host = Packet::new(Protocol::Tcp, client(false), "192.0.2.2:22".parse().unwrap());
    assert_eq!(world.send(&host.build()), Outcome::NotOurs);
    let broadcast = Packet { eth_dst: [0xff; 6], ..request(Protocol::Tcp, false) };
    assert_eq!(world.send(&broadcast.build()), Outcome::Dropped("link_broadcast"));
    let mut port = request(Protocol::Tcp, false);
    port.dst.set_port(81);
    assert_eq!(world.send(&port.build()), Outcome::Dropped("no_service"));
    assert_eq!(world.send(&request(Protocol::Udp, false).build()), Outcome::Dropped("no_service"));
    assert_eq!(world.send(&[0; 10]), Outcome::NotOurs);
}

#[test]
fn an_answer_without_a_binding_is_dropped() {
    let mut world = World::new(vec![service(Mode::Nat, false, Protocol::Tcp, 1)]);
    let backend = SocketAddr::new(backend_address(Mode::Nat, false, 1), 8080);
    let stray = Packet::new(Protocol::Tcp, backend, SocketAddr::new(snat(false), 5000)).inside();
    assert_eq!(world.send_by(&stray.build(), Port::Inside), Outcome::Dropped("no_binding"));
}

#[test]
fn a_neighbour_to_be_asked_for_and_a_route_that_is_missing() {
    let mut world = World::new(vec![service(Mode::Dsr, false, Protocol::Tcp, 1)]);
    let next_hop = backend_address(Mode::Dsr, false, 1);
    world.hops.0.insert(next_hop, NextHop::Unresolved { port: Port::Service, next_hop });
    assert_eq!(world.send(&request(Protocol::Tcp, false).build()), Outcome::Waits(Port::Service, next_hop));
    world.hops.0.insert(next_hop, NextHop::NoRoute);
    assert_eq!(world.send(&request(Protocol::Tcp, false).build()), Outcome::Dropped("no_route"));
    world.hops.0.remove(&next_hop);
    assert_eq!(
        world.send(&request(Protocol::Tcp, false).build()),
        Outcome::Dropped("off_link"),
        "behind the router"
    );
}

#[test]
fn a_hop_is_lost_where_packets_are_routed_and_its_last_is_answered() {
    for v6 in FAMILIES {
        let mut world = World::new(vec![service(Mode::Nat, v6, Protocol::Udp, 1)]);
        let frame = request(Protocol::Udp, v6).ttl(1).build();
        let reply = world.send(&frame).reply();
        assert_eq!((world.count("ttl_exceeded"), world.count("icmp_error_sent")), (1, 1));
        assert_eq!(world.counters().flows, 0);
        assert_eq!((&reply[..6], &reply[6..12]), (&ROUTER_MAC[..], &OWN_MAC[..]));
        let quoted = super::icmp::read_error(&reply);
        assert_eq!((quoted.src, quoted.dst), (vip(v6), client(v6).ip()));
        assert_eq!(quoted.kind, if v6 { 3 } else { 11 });
        assert!(frame[14..].starts_with(&quoted.packet) && quoted.packet.len() >= 28);
    }
}

#[test]
fn a_frame_larger_than_the_next_link_is_told_its_size() {
    for v6 in FAMILIES {
        for mode in [Mode::Dsr, Mode::Nat, Mode::NatTransparent] {
            let mut world = World::new(vec![service(mode, v6, Protocol::Tcp, 1)]);
            for port in [Port::Service, Port::Inside] {
                let small = PortConfig { mtu: 1400, ..world.engine.port(port).unwrap().clone() };
                world.engine.set_port(port, small);
            }
            let head = if v6 { 60 } else { 40 };
            world.send(&request(Protocol::Tcp, v6).len(1400 - head).build()).sent();
            let reply = world.send(&request(Protocol::Tcp, v6).len(1401 - head).build()).reply();
            let error = super::icmp::read_error(&reply);
            assert_eq!(error.mtu, 1400);
            assert_eq!((error.kind, error.code), if v6 { (2, 0) } else { (3, 4) });
            assert_eq!(world.count("too_big"), 1);
        }
    }
}

#[test]
fn a_super_frame_with_a_partial_checksum_goes_whole_and_counts_as_its_segments() {
    for v6 in FAMILIES {
        for mode in [Mode::Nat, Mode::NatTransparent] {
            let mut world = World::new(vec![service(mode, v6, Protocol::Tcp, 1)]);
            world.send(&request(Protocol::Tcp, v6).flags(SYN).build()).sent();
            let before = world.counters().backends[0];
            let mut frame = request(Protocol::Tcp, v6).len(10_000).build();
            let l4 = if v6 { 54 } else { 34 };
            let headers = l4 - 14 + 20;
            // What the kernel leaves there: the sum of the pseudo-header.
            let pseudo = |frame: &[u8]| {
                let (src, dst) = addresses(frame, v6);
                crate::checksum::Sum::pseudo_header(src, dst, 6, 10_020).fold()
            };
            let sum = pseudo(&frame);
            frame[l4 + 16..l4 + 18].copy_from_slice(&sum.to_be_bytes());
            let offload = Offload {
                needs_csum: true,
                csum_start: l4 as u16,
                csum_offset: 16,
                gso: if v6 { Gso::TcpV6 } else { Gso::TcpV4 },
                gso_size: 1430,
                hdr_len: l4 as u16 + 20,
            };
            let verdict = world.process(&mut frame, offload, Port::Service);
            assert!(matches!(verdict, Verdict::Forward { .. }), "{verdict:?}");
            let field = u16::from_be_bytes([frame[l4 + 16], frame[l4 + 17]]);
            assert_eq!(field, pseudo(&frame), "still the pseudo-header's sum, of the new addresses");
            let counted = world.counters().backends[0];
            assert_eq!(counted.packets - before.packets, 7);
            assert_eq!(counted.bytes - before.bytes, 10_000 + 7 * headers as u64);

            // Segments that are too large for the next link can't be sent either.
            let mut frame = request(Protocol::Tcp, v6).len(10_000).build();
            frame[l4 + 16..l4 + 18].copy_from_slice(&sum.to_be_bytes());
            let verdict = world.process(&mut frame, Offload { gso_size: 1500, ..offload }, Port::Service);
            assert!(matches!(verdict, Verdict::Reply { .. }), "{verdict:?}");
            let verdict = world.process(&mut frame, Offload { csum_start: 3, ..offload }, Port::Service);
            assert_eq!(verdict, Verdict::Drop(crate::drops::Reason::BadOffload));
        }
    }
}

fn addresses(frame: &[u8], v6: bool) -> (std::net::IpAddr, std::net::IpAddr) {
    if v6 {
        let at = |i: usize| <[u8; 16]>::try_from(&frame[i..i + 16]).unwrap().into();
        (at(22), at(38))
    } else {
        let at = |i: usize| <[u8; 4]>::try_from(&frame[i..i + 4]).unwrap().into();
        (at(26), at(30))
    }
}

#[test]
fn a_vlan_tag_stays_on_its_port() {
    let mut world = World::new(vec![service(Mode::Dsr, false, Protocol::Tcp, 1)]);
    let untagged = request(Protocol::Tcp, false).build();
    let mut frame = untagged[..12].to_vec();
    frame.extend([0x81, 0, 0, 42]);
    frame.extend(&untagged[12..]);
    let mut sent = frame.clone();
    let verdict = world.process(&mut sent, Offload::default(), Port::Service);
    assert!(matches!(verdict, Verdict::Forward { .. }));
    assert_eq!(sent[12..], frame[12..]);

    let mut world = World::new(vec![service(Mode::Nat, false, Protocol::Tcp, 1)]);
    let verdict = world.process(&mut frame, Offload::default(), Port::Service);
    assert_eq!(verdict, Verdict::Drop(crate::drops::Reason::Vlan));
}

#[test]
fn udp_without_a_checksum_stays_without() {
    let mut world = World::new(vec![service(Mode::Nat, false, Protocol::Udp, 1)]);
    let mut frame = request(Protocol::Udp, false).build();
    frame[40..42].fill(0);
    world.process(&mut frame, Offload::default(), Port::Service);
    assert_eq!(frame[40..42], [0, 0]);
}

#[test]
fn a_wrong_checksum_stays_wrong() {
    let mut world = World::new(vec![service(Mode::Nat, false, Protocol::Tcp, 1)]);
    let right = request(Protocol::Tcp, false).build();
    let mut wrong = right.clone();
    *wrong.last_mut().unwrap() ^= 1;
    let mut expected = right.clone();
    world.process(&mut expected, Offload::default(), Port::Service);
    world.process(&mut wrong, Offload::default(), Port::Service);
    assert_eq!(wrong[50..52], expected[50..52], "no error is repaired on the way");
}
