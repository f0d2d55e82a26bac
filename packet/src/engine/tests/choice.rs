//! Slot rule, schedulers, dead backends.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::engine::Port;
use crate::lane::FlowFilter;
use crate::plan::*;

fn world_of(change: impl FnOnce(&mut ServicePlan)) -> World {
    let mut service = service(Mode::Dsr, false, Protocol::Tcp, 4);
    change(&mut service);
    World::new(vec![service])
}

fn install(world: &mut World, service: &ServicePlan) {
    let mut plan = plan(vec![service.clone()]);
    plan.revision = world.engine.tables().revision() + 1;
    world.engine.install(plan, world.now).unwrap();
}

fn syn(port: u16) -> Vec<u8> {
    request_from(Protocol::Tcp, false, port).flags(SYN).build()
}

fn ack(port: u16) -> Vec<u8> {
    request_from(Protocol::Tcp, false, port).build()
}

const PORTS: std::ops::Range<u16> = 10_000..10_200;

#[test]
fn a_settled_service_remembers_nothing_and_spreads() {
    let mut world = world_of(|_| {});
    let mut served = HashMap::new();
    for port in PORTS {
        let backend = world.backend_of(&syn(port)).unwrap();
        assert_eq!(world.backend_of(&ack(port)), Some(backend));
        *served.entry(backend).or_insert(0) += 1;
    }
    assert_eq!(world.counters().flows, 0);
    assert!(served.len() == 4 && served.values().all(|&n| n > 20), "{served:?}");
}

#[test]
fn a_drain_moves_new_flows_only_and_older_ones_outlive_the_transition() {
    let mut service = service(Mode::Dsr, false, Protocol::Tcp, 4);
    let mut world = World::new(vec![service.clone()]);
    let before: HashMap<u16, u32> = PORTS.map(|p| (p, world.backend_of(&syn(p)).unwrap())).collect();

    service.backends[0].weight = 0;
    install(&mut world, &service);
    for port in PORTS {
        assert_eq!(
            world.backend_of(&ack(port)),
            Some(before[&port]),
            "not the first packet after the change"
        );
        let new = world.backend_of(&syn(port + 1000)).unwrap();
        assert_ne!(new, 1, "new flows avoid the drained backend");
        assert_eq!(world.backend_of(&ack(port + 1000)), Some(new), "and stay where they began");
    }
    let drained = world.counters().backends[0];
    assert_eq!(drained.flows, before.values().filter(|&&b| b == 1).count() as u64);
    assert!(world.counters().flows < 2 * 120, "only slots in transition are remembered");

    service.backends[0].base_weight = 0;
    install(&mut world, &service);
    for port in PORTS {
        assert_eq!(world.backend_of(&ack(port)), Some(before[&port]), "after the transition has ended");
    }

    // They go by idle time; then nothing is looked up or remembered any more.
    world.pass(901);
    assert_eq!((world.counters().flows, world.counters().backends[0].active), (0, 0));
    for port in PORTS {
        assert_ne!(world.backend_of(&syn(port)), Some(1));
    }
    assert_eq!(world.counters().flows, 0);
}

#[test]
fn a_backend_in_drain_is_without_flows_when_they_have_ended() {
    let mut service = service(Mode::NatTransparent, false, Protocol::Tcp, 2);
    let mut world = World::new(vec![service.clone()]);
    let ports: Vec<u16> = PORTS.filter(|&p| world.backend_of(&syn(p)) == Some(1)).collect();
    service.backends[0].weight = 0;
    install(&mut world, &service);
    for &port in &ports {
        assert_eq!(world.backend_of(&ack(port)), Some(1));
    }
    assert!(world.counters().backends[0].active >= ports.len() as u64);
    world.pass(10);
    assert_eq!(
        world.counters().backends[0].active,
        ports.len() as u64,
        "remembered ones are counted exactly"
    );
    for &port in &ports {
        world.send(&request_from(Protocol::Tcp, false, port).flags(FIN_ACK).build()).sent();
        let from = SocketAddr::new(backend_address(Mode::NatTransparent, false, 1), 8080);
        let to = SocketAddr::new(client(false).ip(), port);
        let fin = Packet::new(Protocol::Tcp, from, to).inside().flags(FIN_ACK);
        world.send_by(&fin.build(), Port::Inside).sent();
        world.send(&ack(port)).sent();
    }
    assert_eq!(world.counters().backends[0].active, 0, "both sides have said that they are done");
}

#[test]
fn flows_without_state_are_estimated_and_the_estimate_ends() {
    let mut world = world_of(|s| s.backends.truncate(1));
    for port in PORTS {
        world.send(&ack(port)).sent();
    }
    let active = world.counters().backends[0].active;
    assert!((160..240).contains(&active), "{active}");
    world.pass(7);
    assert_eq!(world.counters().backends[0].active, 0);
}

#[test]
fn the_dead_backend_policy() {
    for mode in [Mode::Dsr, Mode::Nat, Mode::NatTransparent] {
        for policy in [DeadBackend::Reset, DeadBackend::Rehash, DeadBackend::Keep] {
            let mut service = service(mode, false, Protocol::Tcp, 2);
            service.dead_backend = policy;
            let mut world = World::new(vec![service.clone()]);
            let port = PORTS.clone().find(|&p| world.backend_of(&syn(p)) == Some(1)).unwrap();
            assert_eq!(world.backend_of(&ack(port)), Some(1));
            service.backends[0].alive = false;
            service.backends[0].weight = 0;
            install(&mut world, &service);
            match policy {
                DeadBackend::Reset => {
                    let reset = world.send(&ack(port)).reply();
                    let seen = Seen::read(&reset);
                    assert_eq!(seen.src, SocketAddr::new(vip(false), 80));
                    assert_eq!(seen.dst, SocketAddr::new(client(false).ip(), port));
                    // RFC 9293 §3.10.7.1: its sequence number is what the segment acknowledged.
                    assert_eq!((reset[47], &reset[38..42]), (RST, &2_000u32.to_be_bytes()[..]));
                    let rst = request_from(Protocol::Tcp, false, port).flags(RST).build();
                    assert_eq!(world.send(&rst), Outcome::Dropped("dead_backend"), "never an RST for an RST");
                }
                DeadBackend::Rehash => assert_eq!(world.backend_of(&ack(port)), Some(2)),
                DeadBackend::Keep => assert_eq!(world.backend_of(&ack(port)), Some(1)),
            }
            assert_eq!(world.backend_of(&syn(port + 5000)), Some(2), "new flows find a living one");
        }
    }
}

#[test]
fn udp_flows_of_a_dead_backend_find_another() {
    let mut service = service(Mode::Nat, false, Protocol::Udp, 2);
    let mut world = World::new(vec![service.clone()]);
    let datagram = |port| request_from(Protocol::Udp, false, port).build();
    let port = PORTS.clone().find(|&p| world.backend_of(&datagram(p)) == Some(1)).unwrap();
    service.backends[0].alive = false;
    service.backends[0].weight = 0;
    install(&mut world, &service);
    assert_eq!(world.send(&datagram(port)), Outcome::Dropped("dead_backend"), "reset: dropped and forgotten");
    assert_eq!(world.backend_of(&datagram(port)), Some(2));
}

#[test]
fn a_service_without_a_backend_says_so() {
    let mut world = world_of(|s| s.backends.clear());
    assert_eq!(world.send(&syn(1)), Outcome::Dropped("no_backend"));
    let mut world = world_of(|s| s.backends.iter_mut().for_each(|b| (b.weight, b.base_weight) = (0, 0)));
    assert_eq!(world.send(&syn(1)), Outcome::Dropped("no_backend"));
}

#[test]
fn round_robin_takes_turns_by_weight_and_remembers() {
    let mut world = world_of(|s| {
        s.scheduler = Scheduler::RoundRobin;
        s.backends[0].weight = 3;
        s.backends[0].base_weight = 3;
        s.backends[3].weight = 0;
        s.backends[3].base_weight = 0;
    });
    let turns: Vec<u32> = (0..10).map(|p| world.backend_of(&syn(p + 1)).unwrap()).collect();
    assert_eq!(turns.iter().filter(|&&b| b == 1).count(), 6);
    assert_eq!(turns.iter().filter(|&&b| b == 2).count(), 2);
    for (port, backend) in (0..10).zip(turns) {
        assert_eq!(world.backend_of(&ack(port + 1)), Some(backend));
    }
}

#[test]
fn least_conn_evens_out() {
    let mut world = world_of(|s| s.scheduler = Scheduler::LeastConn);
    let mut of = HashMap::new();
    for port in 1..=40 {
        of.entry(world.backend_of(&syn(port)).unwrap()).or_insert_with(Vec::new).push(port);
    }
    assert!(of.len() == 4 && of.values().all(|ports| ports.len() == 10), "{of:?}");
    // Backend 2 loses its flows; the next ten go there.
    for &port in &of[&2] {
        world.send(&request_from(Protocol::Tcp, false, port).flags(RST).build());
    }
    for port in 50..60 {
        assert_eq!(world.backend_of(&syn(port)), Some(2));
    }
}

#[test]
fn source_ip_looks_at_the_client_alone() {
    let mut world = world_of(|s| s.scheduler = Scheduler::SourceIp);
    let backend = world.backend_of(&syn(1));
    for port in PORTS {
        assert_eq!(world.backend_of(&syn(port)), backend);
    }
}

#[test]
fn a_syn_after_the_end_begins_a_new_flow() {
    let mut service = service(Mode::Nat, false, Protocol::Tcp, 2);
    let mut world = World::new(vec![service.clone()]);
    let port = PORTS.clone().find(|&p| world.backend_of(&syn(p)) == Some(1)).unwrap();
    world.send(&request_from(Protocol::Tcp, false, port).flags(RST).build());
    service.backends[0].weight = 0;
    install(&mut world, &service);
    assert_eq!(world.backend_of(&syn(port)), Some(2));
}

#[test]
fn a_node_that_takes_over_rebuilds_the_same_bindings() {
    for v6 in FAMILIES {
        let service = service(Mode::Nat, v6, Protocol::Tcp, 4);
        let (mut owner, mut standby) = (World::new(vec![service.clone()]), World::new(vec![service]));
        for port in PORTS {
            let (_, first) = owner.send(&request_from(Protocol::Tcp, v6, port).flags(SYN).build()).sent();
            let (_, then) = standby.send(&request_from(Protocol::Tcp, v6, port).build()).sent();
            assert_eq!((first.src, first.dst), (then.src, then.dst));
        }
    }
}

#[test]
fn a_trace_tells_what_a_packet_would_meet() {
    let mut service = service(Mode::Dsr, false, Protocol::Tcp, 4);
    let mut world = World::new(vec![service.clone()]);
    service.backends[0].weight = 0;
    install(&mut world, &service);
    for port in PORTS {
        let client = SocketAddr::new(client(false).ip(), port);
        let trace = world.engine.trace(SERVICE, client, world.now).unwrap();
        assert!(!trace.remembered && trace.slot.is_some());
        assert_eq!(world.backend_of(&ack(port)), trace.existing, "{}", trace.reason);
        let trace = world.engine.trace(SERVICE, client, world.now).unwrap();
        assert_eq!(trace.remembered, trace.existing != trace.new || trace.existing == Some(1));
    }
    assert!(world.engine.trace(99, client(false), world.now).is_none());
    let filter = FlowFilter { service: Some(SERVICE), backend: Some(1) };
    let flows = world.engine.flows(&filter, 1000, world.now);
    assert!(!flows.is_empty() && flows.iter().all(|f| f.backend == 1 && f.state == "established"));
    assert_eq!(world.engine.flows(&filter, 2, world.now).len(), 2);
}

#[test]
fn counters_survive_a_plan_and_end_with_their_backend() {
    let mut service = service(Mode::Dsr, false, Protocol::Tcp, 2);
    let mut world = World::new(vec![service.clone()]);
    for port in PORTS {
        world.send(&syn(port)).sent();
    }
    let before = world.counters();
    service.backends[1].weight = 5;
    install(&mut world, &service);
    assert_eq!(world.counters().backends[0].packets, before.backends[0].packets);
    service.backends.remove(0);
    install(&mut world, &service);
    assert_eq!(world.counters().backends.len(), 1);
    assert_eq!(world.counters().backends[0].packets, before.backends[1].packets);
}

#[derive(Clone, Debug)]
enum Op {
    Open,
    Packet(usize),
    Weight(usize, u32),
    Kill(usize),
    Revive(usize),
    Add,
    Settle,
    Pass,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        8 => Just(Op::Open),
        8 => (0usize..64).prop_map(Op::Packet),
        3 => (0usize..8, 0u32..4).prop_map(|(b, w)| Op::Weight(b, w)),
        1 => (0usize..8).prop_map(Op::Kill),
        1 => (0usize..8).prop_map(Op::Revive),
        1 => Just(Op::Add),
        2 => Just(Op::Settle),
        1 => Just(Op::Pass),
    ];
    prop::collection::vec(op, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever is changed, a flow stays with its backend while that is alive. The plan follows the rules of replication: the
    /// base weights are those of the last settled state, and a service settles only when every older flow has been seen.
    #[test]
    fn a_flow_never_moves_while_its_backend_is_alive(
        ops in ops(),
        mode in prop::sample::select(vec![Mode::Dsr, Mode::Nat, Mode::NatTransparent]),
        protocol in prop::sample::select(vec![Protocol::Tcp, Protocol::Udp]),
        scheduler in prop::sample::select(vec![Scheduler::Maglev, Scheduler::SourceIp, Scheduler::RoundRobin, Scheduler::LeastConn]),
    ) {
        let mut plan = service(mode, false, protocol, 3);
        plan.scheduler = scheduler;
        plan.tcp_idle = Duration::from_secs(3600);
        plan.udp_idle = Duration::from_secs(3600);
        let mut world = World::new(vec![plan.clone()]);
        let mut flows: HashMap<u16, u32> = HashMap::new();
        let mut next_port = 2000;
        let mut changes = 0;
        for op in ops {
            let mut changed = false;
            match op {
                Op::Open => {
                    next_port += 1;
                    let frame = request_from(protocol, false, next_port).flags(SYN).build();
                    if let Outcome::Sent(_, there) = world.send(&frame) {
                        let backend = u32::from(there.eth_dst[5]);
                        if mode == Mode::Nat {
                            let answer = Packet::new(protocol, there.dst, there.src).inside().flags(SYN_ACK);
                            world.send_by(&answer.build(), Port::Inside).sent();
                        }
                        let ack = request_from(protocol, false, next_port).build();
                        prop_assert_eq!(world.backend_of(&ack), Some(backend));
                        let planned = plan.backends.iter().find(|b| b.id == backend).unwrap();
                        prop_assert!(planned.alive && planned.weight > 0);
                        flows.insert(next_port, backend);
                    }
                }
                Op::Packet(n) => {
                    let mut ports: Vec<u16> = flows.keys().copied().collect();
                    ports.sort_unstable();
                    if let Some(port) = ports.get(n % ports.len().max(1)) {
                        let backend = world.backend_of(&request_from(protocol, false, *port).build());
                        prop_assert_eq!(backend, Some(flows[port]));
                    }
                }
                Op::Weight(n, weight) => {
                    let n = n % plan.backends.len();
                    let b = &mut plan.backends[n];
                    if b.alive && b.weight != weight {
                        b.weight = weight;
                        changed = true;
                    }
                }
                Op::Kill(n) => {
                    let n = n % plan.backends.len();
                    let b = &mut plan.backends[n];
                    if b.alive {
                        (b.alive, b.weight) = (false, 0);
                        flows.retain(|_, backend| *backend != b.id);
                        changed = true;
                    }
                }
                Op::Revive(n) => {
                    let n = n % plan.backends.len();
                    let b = &mut plan.backends[n];
                    if !b.alive {
                        (b.alive, b.weight) = (true, 1);
                        changed = true;
                    }
                }
                Op::Add if plan.backends.len() < 12 => {
                    let id = plan.backends.len() as u32 + 1;
                    plan.backends.push(BackendPlan { base_weight: 0, ..backend(mode, false, id) });
                    changed = true;
                }
                Op::Add => {}
                Op::Settle => {
                    for (port, backend) in &flows {
                        let seen = world.backend_of(&request_from(protocol, false, *port).build());
                        prop_assert_eq!(seen, Some(*backend));
                    }
                    plan.backends.iter_mut().for_each(|b| b.base_weight = b.weight);
                    (changes, plan.consult_all_slots) = (0, false);
                    install(&mut world, &plan);
                }
                Op::Pass => world.pass(20),
            }
            if changed {
                changes += 1;
                plan.consult_all_slots = changes > 1;
                install(&mut world, &plan);
            }
        }
    }
}
