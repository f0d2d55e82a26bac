//! Every table is bounded, and a flood takes nothing from flows that are established.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::*;
use crate::engine::*;
use crate::plan::*;

fn flood(protocol: Protocol, n: u32) -> Vec<u8> {
    let src = SocketAddr::new(IpAddr::V4(Ipv4Addr::from_bits(0x0b00_0000 + n)), n as u16 | 1024);
    Packet::new(protocol, src, SocketAddr::new(vip(false), 80)).flags(SYN).build()
}

/// 50 flows, seen both ways.
fn establish(world: &mut World, protocol: Protocol) {
    for port in 1..=50 {
        let (_, there) = world.send(&request_from(protocol, false, port).flags(SYN).build()).sent();
        let answer = Packet::new(protocol, there.dst, there.src).inside().flags(SYN_ACK);
        world.send_by(&answer.build(), Port::Inside).sent();
        world.send(&request_from(protocol, false, port).build()).sent();
    }
}

#[test]
fn a_flood_of_new_flows_leaves_established_ones_alone() {
    for protocol in PROTOCOLS {
        let mut world = World::with_limits(vec![service(Mode::Nat, false, protocol, 2)], 200, 1_000_000);
        establish(&mut world, protocol);
        for n in 0..5000 {
            world.send(&flood(protocol, n)).sent();
        }
        assert_eq!(world.counters().flows, 200);
        assert_eq!(world.count("flow_evicted"), 5000 - 150);
        let counted: u64 = world.counters().backends.iter().map(|b| b.flows).sum();
        assert_eq!(counted, 200, "the backends' counts follow");
        let before = world.count("flow_evicted");
        for port in 1..=50 {
            world.send(&request_from(protocol, false, port).build()).sent();
        }
        assert_eq!(world.count("flow_evicted"), before, "they were all still there");
    }
}

#[test]
fn a_table_full_of_established_flows_refuses_new_ones() {
    let mut world = World::with_limits(vec![service(Mode::Nat, false, Protocol::Tcp, 2)], 50, 1_000_000);
    establish(&mut world, Protocol::Tcp);
    assert_eq!(world.send(&flood(Protocol::Tcp, 1)), Outcome::Dropped("flow_table_full"));
}

#[test]
fn udp_that_the_hash_can_serve_goes_on_without_room() {
    let mut service = service(Mode::NatTransparent, false, Protocol::Udp, 2);
    service.track_udp = true;
    let mut world = World::with_limits(vec![service], 1000, 100);
    for n in 0..1000 {
        world.send(&flood(Protocol::Udp, n)).sent();
    }
    assert!(world.counters().flows <= 126);
    assert!(world.count("flow_not_remembered") >= 874);
}

#[test]
fn new_flows_each_second_are_capped() {
    let mut world = World::with_limits(vec![service(Mode::Nat, false, Protocol::Tcp, 2)], 10_000, 100);
    for n in 0..1000 {
        world.send(&flood(Protocol::Tcp, n));
    }
    let refused = world.count("flow_rate");
    assert!((960..=980).contains(&refused), "{refused}");
    world.pass(1);
    world.send(&flood(Protocol::Tcp, 5000)).sent();
}

#[test]
fn snat_ports_run_out_with_a_name_and_come_back() {
    let mut service = service(Mode::Nat, false, Protocol::Udp, 1);
    service.udp_idle = std::time::Duration::from_secs(5);
    let mut world = World::with_limits(vec![service], 100_000, 100_000_000);
    let mut full = 0;
    for n in 0..70_000 {
        match world.send_quietly(&flood(Protocol::Udp, n)) {
            Verdict::Forward { .. } => {}
            verdict => {
                assert_eq!(verdict, Verdict::Drop(crate::drops::Reason::NoSnatPort));
                full += 1;
            }
        }
    }
    let flows = world.counters().flows;
    assert!(flows > 60_000 && flows <= 64_512 && flows + full == 70_000, "{flows} {full}");
    let mut ports: Vec<_> =
        world.engine.flows(&Default::default(), 100_000, world.now).iter().map(|f| f.snat.unwrap()).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len() as u64, flows, "no two flows share one");
    world.pass(6);
    assert_eq!(world.counters().flows, 0);
    world.send(&flood(Protocol::Udp, 1)).sent();
}

#[test]
fn answers_are_limited() {
    let mut service = service(Mode::Dsr, false, Protocol::Tcp, 2);
    service.backends[0].alive = false;
    service.backends[0].weight = 0;
    let mut world = World::new(vec![service]);
    for port in 1..5000 {
        world.send(&request_from(Protocol::Tcp, false, port).build());
    }
    assert_eq!(world.count("reset_sent"), 250);
    assert!(world.count("answer_rate") > 1000);
}
