//! Flows that are shared: what the owner tells, and what a standby makes of it.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use proptest::prelude::*;

use super::*;
use crate::engine::share::TOLD_EARLY_PER_SECOND;
use crate::engine::{Adopted, FlowBinding, FlowNews, Port, SHARE_BUDGET};
use crate::lane::FlowFilter;
use crate::plan::*;

/// An owner whose news are collected, and a standby with the same plan.
fn pair(services: Vec<ServicePlan>) -> (World, Outbox, World) {
    let outbox = Outbox::default();
    let mut owner = World::new(services.clone());
    owner.engine.set_outbox(Box::new(outbox.clone()));
    let mut standby = World::new(services);
    standby.engine.set_outbox(Box::new(Outbox::default()));
    standby.lease(false, false);
    (owner, outbox, standby)
}

/// Everything the owner has, by the way of a sending of all.
fn send_all(owner: &World, standby: &mut World, mark: u32) -> Adopted {
    let mut records = Vec::new();
    let mut from = Some(0);
    while let Some(at) = from {
        from = owner.engine.shared(&[GROUP], at, &mut records);
    }
    let news: Vec<_> = records.into_iter().map(FlowNews::Known).collect();
    let adopted = standby.engine.adopt(&news, mark, standby.now);
    let mut from = Some(0);
    while let Some(at) = from {
        from = standby.engine.sweep(&[GROUP], mark, at, standby.now);
    }
    adopted
}

fn change_hands(owner: &mut World, standby: &mut World) {
    owner.lease(false, false);
    standby.lease(true, true);
}

/// What a flow looks like on the backend's side.
fn way(world: &mut World, port: u16) -> (u8, SocketAddr) {
    let (_, seen) = world.send(&request_from(Protocol::Tcp, false, port).build()).sent();
    (seen.eth_dst[5], seen.src)
}

/// Opens a flow by SYN and what follows; in `nat` the backend answers.
fn open(world: &mut World, port: u16, mode: Mode) -> (u8, SocketAddr) {
    let (_, seen) = world.send(&request_from(Protocol::Tcp, false, port).flags(SYN).build()).sent();
    if mode == Mode::Nat {
        answer(world, seen.dst, seen.src, SYN_ACK);
    }
    way(world, port)
}

fn answer(world: &mut World, backend: SocketAddr, snat: SocketAddr, flags: u8) {
    world
        .send_by(&Packet::new(Protocol::Tcp, backend, snat).inside().flags(flags).build(), Port::Inside)
        .sent();
}

/// A service in which a backend was drained and another added: the base table is 1, 2, 3, the current one 2, 3, 4.
fn in_transition(mode: Mode) -> ServicePlan {
    let mut service = service(mode, false, Protocol::Tcp, 4);
    service.backends[0].weight = 0;
    service.backends[3].base_weight = 0;
    service
}

#[test]
fn flows_of_slots_in_transition_outlive_their_owner_in_every_mode() {
    for mode in [Mode::Dsr, Mode::NatTransparent, Mode::Nat] {
        let (mut owner, outbox, mut standby) = pair(vec![in_transition(mode)]);
        let ways: HashMap<u16, _> = (2000..3000).map(|port| (port, open(&mut owner, port, mode))).collect();
        let news = outbox.take();
        assert!(!news.is_empty() && news.len() <= 2000, "{mode:?}: {}", news.len());
        let adopted = standby.engine.adopt(&news, 1, standby.now);
        assert_eq!((adopted.taken as usize, adopted.refused, adopted.full), (news.len(), 0, 0));
        change_hands(&mut owner, &mut standby);
        for (port, before) in ways {
            assert_eq!(way(&mut standby, port), before, "{mode:?} {port}");
        }
    }
}

/// What a flow's first packet says is as far as a flood comes; it must not be told to anybody.
#[test]
fn a_flood_of_syns_is_no_news() {
    for mode in [Mode::Dsr, Mode::Nat] {
        let (mut owner, outbox, mut standby) = pair(vec![service(mode, false, Protocol::Tcp, 4)]);
        for port in 2000..3000 {
            owner.send(&request_from(Protocol::Tcp, false, port).flags(SYN).build()).sent();
        }
        assert_eq!(outbox.take(), []);
        assert_eq!(send_all(&owner, &mut standby, 1), Adopted::default());
    }
}

/// But for so many a second of those that a new owner would lead elsewhere.
#[test]
fn a_flood_of_syns_to_a_service_in_transition_is_told_within_bounds() {
    for mode in [Mode::Dsr, Mode::NatTransparent, Mode::Nat] {
        let (mut owner, outbox, mut standby) = pair(vec![in_transition(mode)]);
        for port in 2000..20_000 {
            owner.send(&request_from(Protocol::Tcp, false, port).flags(SYN).build());
        }
        let told = outbox.take().into_iter().filter(|news| matches!(news, FlowNews::Exception(_))).count();
        let bucket = (TOLD_EARLY_PER_SECOND / 4) as usize;
        assert_eq!(told, bucket, "{mode:?}");
        // And so many stand in the other table, until they are told to be gone.
        let adopted = send_all(&owner, &mut standby, 1);
        assert!(adopted.taken as usize <= bucket, "{mode:?}: {adopted:?}");
        owner.pass(3600);
        standby.engine.adopt(&outbox.take(), 1, standby.now);
        assert_eq!((owner.counters().flows, standby.counters().flows), (0, 0), "{mode:?}");
    }
}

/// Found by `make chaos CASES=kill-owner-in-transition`: of connections that were a millisecond old when their owner died some were
/// led to another backend. It is told of them with their first packet.
#[test]
fn a_flow_that_has_hardly_begun_is_known_to_the_standby() {
    for mode in [Mode::Dsr, Mode::NatTransparent, Mode::Nat] {
        let (mut owner, outbox, mut standby) = pair(vec![in_transition(mode)]);
        let mut ways = Vec::new();
        for port in 2000..2400 {
            owner.send(&request_from(Protocol::Tcp, false, port).flags(SYN).build()).sent();
            standby.engine.adopt(&outbox.take(), 1, standby.now);
            ways.push((port, open(&mut owner, port, mode)));
        }
        // What was told since then is lost with its owner.
        change_hands(&mut owner, &mut standby);
        for (port, before) in ways {
            assert_eq!(way(&mut standby, port), before, "{mode:?} {port}");
        }
    }
}

/// In an orderly hand-over the new owner was told of the first packet, and the old one has seen the rest.
#[test]
fn a_new_owner_takes_the_rest_of_a_beginning_from_the_old_one() {
    let (mut owner, outbox, mut standby) = pair(vec![in_transition(Mode::Dsr)]);
    for port in 2000..2100 {
        owner.send(&request_from(Protocol::Tcp, false, port).flags(SYN).build()).sent();
    }
    let begun = outbox.take();
    assert!(!begun.is_empty());
    standby.engine.adopt(&begun, 1, standby.now);
    standby.lease(true, true);
    (2000..2100).for_each(|port| _ = open(&mut owner, port, Mode::Dsr));
    let rest = outbox.take();
    let adopted = standby.engine.adopt(&rest, 1, standby.now);
    assert_eq!((adopted.taken as usize, adopted.refused), (rest.len(), 0));
    // Longer than a beginning is remembered.
    standby.pass(60);
    assert_eq!(standby.counters().flows, begun.len() as u64);
}

/// A new owner that does not know such a flow leads it elsewhere: these go first on the way to it.
#[test]
fn flows_that_the_tables_do_not_tell_are_told_as_exceptions() {
    let mut in_turn = service(Mode::Dsr, false, Protocol::Tcp, 3);
    in_turn.scheduler = Scheduler::RoundRobin;
    let settled = service(Mode::Nat, false, Protocol::Tcp, 3);
    let cases = [
        (in_transition(Mode::Dsr), true),
        (in_transition(Mode::Nat), true),
        (in_turn, true),
        (settled, false),
    ];
    for (service, exception) in cases {
        let mode = service.mode;
        let (mut owner, outbox, mut standby) = pair(vec![service]);
        for port in 2000..2100 {
            open(&mut owner, port, mode);
        }
        let news = outbox.take();
        assert!(!news.is_empty());
        assert!(news.iter().all(|n| matches!(n, FlowNews::Exception(_)) == exception), "{mode:?}");
        let adopted = standby.engine.adopt(&news, 1, standby.now);
        assert_eq!(adopted.taken as usize, news.len());
    }
}

#[test]
fn the_end_of_a_flow_is_told_once() {
    let (mut owner, outbox, mut standby) = pair(vec![service(Mode::Nat, false, Protocol::Tcp, 1)]);
    let (_, snat) = open(&mut owner, 4000, Mode::Nat);
    standby.engine.adopt(&outbox.take(), 1, standby.now);
    assert_eq!(standby.counters().flows, 1);
    let backend = SocketAddr::new(backend_address(Mode::Nat, false, 1), 8080);
    owner.send(&request_from(Protocol::Tcp, false, 4000).flags(FIN_ACK).build()).sent();
    assert_eq!(outbox.take(), [], "half of it may go on");
    answer(&mut owner, backend, snat, FIN_ACK);
    let news = outbox.take();
    let binding = FlowBinding { service: SERVICE, backend: 1, snat };
    assert_eq!(news, [FlowNews::Unbound(binding)]);
    owner.pass(60);
    assert_eq!(outbox.take(), []);
    standby.engine.adopt(&news, 1, standby.now);
    assert_eq!(standby.counters().flows, 0);
}

/// An end names its flow as the backend knows it, which one of the nodes may know no more, or elsewhere.
#[test]
fn an_end_is_understood_by_another_plan() {
    let before = service(Mode::Nat, false, Protocol::Tcp, 2);
    let mut moved = before.clone();
    moved.backends.iter_mut().for_each(|b| b.port += 1);
    let mut left = before.clone();
    left.backends.truncate(1);
    for after in [moved, left] {
        for owner_first in [false, true] {
            let (mut owner, outbox, mut standby) = pair(vec![before.clone()]);
            let ports = 4000..4020;
            ports.clone().for_each(|port| _ = open(&mut owner, port, Mode::Nat));
            standby.engine.adopt(&outbox.take(), 1, standby.now);
            assert_eq!(standby.counters().flows, 20);
            let newer = if owner_first { &mut owner } else { &mut standby };
            newer.engine.install(Plan { revision: 2, ..plan(vec![after.clone()]) }, newer.now).unwrap();
            for port in ports {
                owner.send(&request_from(Protocol::Tcp, false, port).flags(RST).build());
            }
            owner.pass(3600);
            let ends = outbox.take();
            assert!(ends.iter().any(|news| matches!(news, FlowNews::Unbound(_))) || owner_first);
            assert_eq!(owner.counters().flows, 0);
            standby.engine.adopt(&ends, 1, standby.now);
            assert_eq!(standby.counters().flows, 0, "{owner_first} {:?}", after.backends);
        }
    }
}

#[test]
fn a_flow_that_idles_out_is_told_as_gone() {
    let (mut owner, outbox, _) = pair(vec![service(Mode::Nat, false, Protocol::Tcp, 1)]);
    let (_, snat) = open(&mut owner, 4000, Mode::Nat);
    outbox.take();
    owner.pass(1800);
    assert_eq!(outbox.take(), [FlowNews::Unbound(FlowBinding { service: SERVICE, backend: 1, snat })]);

    let (mut owner, outbox, _) = pair(vec![in_transition(Mode::Dsr)]);
    (4000..4100).for_each(|port| _ = open(&mut owner, port, Mode::Dsr));
    let told = outbox.take().into_iter().map(|news| match news {
        FlowNews::Exception(record) => record.name,
        other => panic!("{other:?}"),
    });
    let told: HashSet<_> = told.collect();
    owner.pass(1800);
    let gone: HashSet<_> = outbox.take().into_iter().collect();
    assert_eq!(gone, told.into_iter().map(FlowNews::Gone).collect());
}

/// Packets of a flow pass at its owner: a standby that let it age would forget it in the middle.
#[test]
fn what_was_taken_over_does_not_age_before_this_node_owns_it() {
    let (mut owner, outbox, mut standby) = pair(vec![service(Mode::Nat, false, Protocol::Tcp, 1)]);
    open(&mut owner, 4000, Mode::Nat);
    standby.engine.adopt(&outbox.take(), 1, standby.now);
    standby.pass(86_400);
    assert_eq!(standby.counters().flows, 1);
    change_hands(&mut owner, &mut standby);
    standby.pass(890);
    assert_eq!(standby.counters().flows, 1, "its idle time begins when it changes hands at the earliest");
    for _ in 0..12 {
        standby.pass(100);
    }
    assert_eq!(standby.counters().flows, 0);
}

#[test]
fn a_sending_of_all_takes_away_what_it_does_not_hold() {
    let (mut owner, _, mut standby) = pair(vec![service(Mode::Nat, false, Protocol::Tcp, 2)]);
    // The standby was the owner once.
    standby.lease(true, true);
    for port in 5000..5000 + 2 * SHARE_BUDGET as u16 {
        open(&mut standby, port, Mode::Nat);
    }
    standby.lease(false, false);
    for port in 2000..2000 + 3 * SHARE_BUDGET as u16 {
        open(&mut owner, port, Mode::Nat);
    }
    let adopted = send_all(&owner, &mut standby, 7);
    assert_eq!((adopted.taken, adopted.refused), (3 * SHARE_BUDGET as u32, 0));
    assert_eq!(standby.counters().flows, 3 * SHARE_BUDGET as u64);
    assert_eq!(listed(&owner), listed(&standby));
}

fn listed(world: &World) -> Vec<(SocketAddr, u32, Option<SocketAddr>)> {
    let flows = world.engine.flows(&FlowFilter::default(), 100_000, world.now);
    let mut listed: Vec<_> = flows.iter().map(|f| (f.client, f.backend, f.snat)).collect();
    listed.sort();
    listed
}

/// In an orderly hand-over the old owner goes on forwarding for a while, and both tell.
#[test]
fn an_owner_takes_what_it_lacks_and_keeps_what_it_knows() {
    let (mut owner, outbox, mut standby) = pair(vec![in_transition(Mode::Dsr)]);
    for port in 2000..2100 {
        open(&mut owner, port, Mode::Dsr);
    }
    standby.lease(true, true);
    let before = standby.counters().flows;
    let news = outbox.take();
    let adopted = standby.engine.adopt(&news, 1, standby.now);
    assert_eq!((adopted.taken as usize, adopted.refused), (news.len(), 0));
    // Each was told of twice: when it began, and when its client had answered.
    let gone: HashSet<_> = news
        .iter()
        .map(|news| match news {
            FlowNews::Known(record) | FlowNews::Exception(record) => FlowNews::Gone(record.name),
            gone => *gone,
        })
        .collect();
    let gone: Vec<_> = gone.into_iter().collect();
    assert_eq!(standby.counters().flows, before + gone.len() as u64);
    assert_eq!(standby.engine.adopt(&gone, 1, standby.now).taken, 0);
    assert_eq!(standby.engine.sweep(&[GROUP], 2, 0, standby.now), None);
    assert_eq!(standby.counters().flows, before + gone.len() as u64);
}

#[test]
fn what_the_plan_does_not_know_is_refused() {
    let (mut owner, outbox, _) = pair(vec![service(Mode::Nat, false, Protocol::Tcp, 2)]);
    open(&mut owner, 4000, Mode::Nat);
    let news = outbox.take();
    let refuses = |services: Vec<ServicePlan>, news: &[FlowNews]| {
        let mut world = World::new(services);
        world.lease(false, false);
        let adopted = world.engine.adopt(news, 1, world.now);
        assert_eq!((adopted.taken, adopted.refused, world.counters().flows), (0, 1, 0));
    };
    refuses(vec![], &news);
    refuses(vec![service(Mode::Dsr, false, Protocol::Tcp, 2)], &news);
    refuses(vec![service(Mode::Nat, true, Protocol::Tcp, 2)], &news);
    refuses(vec![service(Mode::Nat, false, Protocol::Udp, 2)], &news);
    let FlowNews::Known(mut record) = news[0] else { panic!() };
    record.backend = 99;
    refuses(vec![service(Mode::Nat, false, Protocol::Tcp, 2)], &[FlowNews::Known(record)]);
    let FlowNews::Known(mut record) = news[0] else { panic!() };
    record.snat = Some("203.0.113.1:5000".parse().unwrap());
    refuses(vec![service(Mode::Nat, false, Protocol::Tcp, 2)], &[FlowNews::Known(record)]);
    let FlowNews::Known(mut record) = news[0] else { panic!() };
    record.progress = 0xff;
    refuses(vec![service(Mode::Nat, false, Protocol::Tcp, 2)], &[FlowNews::Known(record)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever happens on the owner, a standby that was told all of it holds what a sending of all would bring, and treats
    /// every flow whose handshake is over as the owner did.
    #[test]
    fn a_standby_that_was_told_everything_goes_on_as_the_owner_did(
        mode in prop::sample::select(vec![Mode::Dsr, Mode::NatTransparent, Mode::Nat]),
        steps in prop::collection::vec((0u8..8, 0u16..12), 1..120),
    ) {
        let (mut owner, outbox, mut standby) = pair(vec![in_transition(mode)]);
        let mut open_flows: HashMap<u16, (u8, SocketAddr)> = HashMap::new();
        for (what, n) in steps {
            let port = 3000 + n * 7;
            let request = request_from(Protocol::Tcp, false, port);
            match what {
                0..=3 if !open_flows.contains_key(&port) => {
                    open_flows.insert(port, open(&mut owner, port, mode));
                }
                4 => {
                    owner.send(&request.flags(RST).build());
                    open_flows.remove(&port);
                }
                5 => {
                    owner.pass(1);
                    standby.pass(1);
                }
                6 => {
                    standby.engine.adopt(&outbox.take(), 3, standby.now);
                }
                _ if open_flows.contains_key(&port) => {
                    prop_assert_eq!(way(&mut owner, port), open_flows[&port]);
                }
                _ => {}
            }
        }
        standby.engine.adopt(&outbox.take(), 3, standby.now);
        let told = listed(&standby);
        send_all(&owner, &mut standby, 4);
        prop_assert_eq!(&told, &listed(&standby));
        change_hands(&mut owner, &mut standby);
        for (port, before) in open_flows {
            prop_assert_eq!(way(&mut standby, port), before, "{}", port);
        }
    }
}
