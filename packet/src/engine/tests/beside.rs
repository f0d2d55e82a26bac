//! Beside a program that handles steady flows itself.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::engine::{FlowCache, Passed, Port, REGISTERS, Windows};
use crate::flow::{ClientSide, Flow};
use crate::lane::FlowFilter;
use crate::plan::*;
use crate::time::BootTime;

/// What the cache was told.
#[derive(Debug, Default)]
struct Book {
    flows: HashMap<ClientSide, (bool, Option<BootTime>)>,
    consulted: HashSet<u32>,
}

#[derive(Clone, Debug, Default)]
struct Cache(Arc<Mutex<Book>>);

impl FlowCache for Cache {
    fn remember(&mut self, flow: &Flow, _hash: u32) {
        self.change(flow);
    }

    fn change(&mut self, flow: &Flow) {
        let mut book = self.0.lock().unwrap();
        assert!(book.consulted.contains(&flow.service()), "consulted before there is something to find");
        let steady = flow.is_steady();
        let before = book.flows.insert(flow.client_side(), (steady, None));
        assert!(before.is_none_or(|(was_steady, _)| was_steady != steady), "told of changes only");
    }

    fn forget(&mut self, flow: &Flow, _hash: u32) {
        let mut book = self.0.lock().unwrap();
        assert!(book.flows.remove(&flow.client_side()).is_some(), "what was put");
    }

    fn last_seen(&self, flow: &Flow) -> Option<BootTime> {
        self.0.lock().unwrap().flows[&flow.client_side()].1
    }

    fn consult(&mut self, service: u32, consult: bool) {
        let mut book = self.0.lock().unwrap();
        let changed = if consult { book.consulted.insert(service) } else { book.consulted.remove(&service) };
        assert!(changed, "told of changes only");
    }
}

fn world(services: Vec<ServicePlan>) -> (World, Cache) {
    let cache = Cache::default();
    let mut world = World::new(services);
    world.engine.set_cache(Box::new(cache.clone()));
    (world, cache)
}

fn answer(port: u16, protocol: Protocol) -> Packet {
    let from = std::net::SocketAddr::new(backend_address(Mode::Nat, false, 1), 8080);
    Packet::new(protocol, from, std::net::SocketAddr::new(snat(false), port)).inside()
}

/// Opens a flow of the `nat` service by SYN, SYN/ACK, ACK; returns its SNAT port.
fn handshake(world: &mut World, port: u16) -> u16 {
    let (_, seen) = world.send(&request_from(Protocol::Tcp, false, port).flags(SYN).build()).sent();
    let snat = seen.src.port();
    world.send_by(&answer(snat, Protocol::Tcp).flags(SYN_ACK).build(), Port::Inside).sent();
    world.send(&request_from(Protocol::Tcp, false, port).build()).sent();
    snat
}

#[test]
fn a_flow_is_handed_over_after_its_handshake_and_taken_back_at_its_reset() {
    let (mut world, cache) = world(vec![service(Mode::Nat, false, Protocol::Tcp, 1)]);
    let snat = handshake(&mut world, 4000);
    let steady = || cache.0.lock().unwrap().flows.values().filter(|(steady, _)| *steady).count();
    assert_eq!(steady(), 1);
    world.send_by(&answer(snat, Protocol::Tcp).flags(RST).build(), Port::Inside).sent();
    assert_eq!(steady(), 0, "a segment after the RST brings it back to life");
    world.send(&request_from(Protocol::Tcp, false, 4000).build()).sent();
    assert_eq!(steady(), 1);
}

#[test]
fn a_flood_of_syns_makes_nothing_steady() {
    let (mut world, cache) = world(vec![service(Mode::Nat, false, Protocol::Tcp, 1)]);
    for port in 1000..2000 {
        world.send(&request_from(Protocol::Tcp, false, port).flags(SYN).build()).sent();
    }
    let book = cache.0.lock().unwrap();
    assert!(book.flows.len() == 1000 && book.flows.values().all(|(steady, _)| !steady));
    assert_eq!(book.consulted.len(), 1);
}

#[test]
fn a_flow_that_passes_without_the_engine_is_kept_and_then_forgotten() {
    let (mut world, cache) = world(vec![service(Mode::Nat, false, Protocol::Tcp, 1)]);
    handshake(&mut world, 4000);
    let seen = BootTime(world.now.0 + 800 * SECOND);
    *cache.0.lock().unwrap().flows.values_mut().next().unwrap() = (true, Some(seen));
    world.pass(1600);
    let flows = world.engine.flows(&FlowFilter::default(), 10, world.now);
    assert_eq!(flows.len(), 1, "900 s of silence have not passed since");
    assert_eq!(flows[0].idle.as_secs(), 800);
    world.pass(200);
    assert!(world.engine.flows(&FlowFilter::default(), 10, world.now).is_empty());
    let book = cache.0.lock().unwrap();
    assert!(book.flows.is_empty() && book.consulted.is_empty(), "{book:?}");
}

#[test]
fn what_passed_without_the_engine_is_counted_with_what_passed_it() {
    let (mut world, _) = world(vec![service(Mode::Dsr, false, Protocol::Tcp, 1)]);
    for port in 4000..4010 {
        world.send(&request_from(Protocol::Tcp, false, port).build()).sent();
    }
    let number = world.engine.backend_number(0, 0);
    let before = world.counters().backends[0];
    let window = world.now.0 / (3 * SECOND);
    let mut registers = [[0; REGISTERS]; 2];
    registers[(window & 1) as usize][7] = 1;
    registers[(window & 1) as usize][9] = 3;
    let passed = Passed {
        packets: 5,
        bytes: 500,
        return_packets: 2,
        return_bytes: 200,
        new_flows: 1,
        seen: Some(Windows { window, registers }),
    };
    let after = world.engine.counters_with(world.now, |n| (n == number).then(|| passed.clone())).backends[0];
    assert_eq!((after.packets, after.bytes), (before.packets + 5, before.bytes + 500));
    assert_eq!((after.return_packets, after.return_bytes, after.new_flows), (2, 200, 1));
    assert!((before.active + 1..=before.active + 3).contains(&after.active), "{before:?} {after:?}");
    // Old windows say nothing.
    world.pass(9);
    let later = world.engine.counters_with(world.now, |_| Some(passed.clone())).backends[0];
    assert_eq!(later.active, 0);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Request(u16, u8),
    Answer(u16, u8),
    Pass(u64),
    Change(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let flags = prop::sample::select(vec![SYN, ACK, SYN_ACK, FIN_ACK, RST]);
    let step = prop_oneof![
        6 => (1000u16..1008, flags.clone()).prop_map(|(port, flags)| Step::Request(port, flags)),
        4 => (0u16..8, flags).prop_map(|(flow, flags)| Step::Answer(flow, flags)),
        1 => (1u64..40).prop_map(Step::Pass),
        1 => (0u8..3).prop_map(Step::Change),
    ];
    prop::collection::vec(step, 1..80)
}

proptest! {
    /// Whatever happens, the cache knows every flow and which are steady, and services without flows are not consulted.
    #[test]
    fn the_cache_knows_every_flow(
        steps in steps(),
        mode in prop::sample::select(vec![Mode::Nat, Mode::NatTransparent, Mode::Dsr]),
        udp in any::<bool>(),
    ) {
        let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
        let mut service = service(mode, false, protocol, 2);
        service.dead_backend = DeadBackend::Rehash;
        let cache = Cache::default();
        // Little room, so that flows make room for each other.
        let mut world = World::with_limits(vec![service.clone()], 5, 1_000_000);
        world.engine.set_cache(Box::new(cache.clone()));
        let mut bound = Vec::new();
        for step in steps {
            match step {
                Step::Request(port, flags) => {
                    let frame = request_from(protocol, false, port).flags(flags).build();
                    if let Outcome::Sent(_, seen) = world.send(&frame) {
                        bound.push((seen.dst, seen.src));
                    }
                }
                Step::Answer(flow, flags) => {
                    let Some(&(from, to)) = bound.iter().rev().nth(usize::from(flow)) else { continue };
                    if mode == Mode::Dsr {
                        continue;
                    }
                    world.send_by(&Packet::new(protocol, from, to).inside().flags(flags).build(), Port::Inside);
                }
                Step::Pass(seconds) => world.pass(seconds),
                Step::Change(n) => {
                    service.backends[0].weight = u32::from(n == 0);
                    service.backends[0].alive = n < 2;
                    let mut plan = plan(vec![service.clone()]);
                    plan.revision = world.engine.tables().revision() + 1;
                    world.engine.install(plan, world.now).unwrap();
                }
            }
            let book = cache.0.lock().unwrap();
            let flows = world.engine.core.flows.iter();
            let steady: HashMap<ClientSide, bool> =
                flows.map(|f| (f.client_side(), f.is_steady())).collect();
            let told = book.flows.iter().map(|(name, (steady, _))| (*name, *steady));
            prop_assert_eq!(&steady, &told.collect::<HashMap<_, _>>());
            prop_assert_eq!(book.consulted.is_empty(), world.engine.core.flows.is_empty());
        }
    }
}
