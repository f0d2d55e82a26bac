//! The engine under a sequence of operations. What must hold after each frame, whatever it was:
//!
//! - exactly one counter of dispositions moved, and the frame kept its length;
//! - nothing was forwarded or answered without the lease for it;
//! - what leaves has the port's own MAC as source, and was readable;
//! - right checksums stayed right, complete and partial ones alike; answers have right ones;
//! - no more flows are remembered than allowed.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use arbitrary::Arbitrary;
use komainu_packet::engine::{
    Engine, EngineConfig, Event, FrameMut, Offload, Permission, Port, PortConfig, Verdict, compile,
};
use komainu_packet::lane::FlowFilter;
use komainu_packet::lease::{Lease, LeaseBoard};
use komainu_packet::neighbour::{Mac, NextHop, NextHops};
use komainu_packet::tables::Tables;
use komainu_packet::time::BootTime;
use komainu_packet::wire::{Net, Pretty, dissect};

use crate::build::{self, FrameSpec, GROUPS, INSIDE_MAC, Place, SERVICE_MAC, ServiceSpec};
use crate::sums;

/// One operation on an engine.
#[derive(Arbitrary, Debug)]
pub enum Op {
    /// A new plan; one that contradicts itself changes nothing.
    Install(Vec<ServiceSpec>),
    /// A lease for one of two groups, in ms from now.
    Lease { second: bool, answer_ms: u16, forward_ms: u16 },
    /// A frame, so often.
    Frame(FrameSpec),
    /// The same flow again: the last frame as it was built.
    Again,
    /// Time passes.
    Advance { ms: u16 },
    /// A link changes.
    Mtu { inside: bool, mtu: u16 },
    /// Somebody looks.
    Look { service: u8, client: u8 },
}

/// Operations of one run; a longer one finds nothing that two shorter ones don't.
const MOST_OPS: usize = 64;
const MOST_FLOWS: usize = 16;
const START: BootTime = BootTime(1_000_000_000_000);

/// Backends stand on the inside network, the first two on the service network too; some neighbours are unknown.
struct Hops;

impl NextHops for Hops {
    fn lookup(&self, destination: IpAddr) -> NextHop {
        let (net, host) = match destination {
            IpAddr::V4(a) => (u16::from(a.octets()[2]), u16::from(a.octets()[3])),
            IpAddr::V6(a) => (a.segments()[3], a.segments()[7]),
        };
        let resolved = |port, next_hop| NextHop::Resolved { port, next_hop, mac: mac_of(host) };
        match (net, host) {
            (2, 15) => NextHop::Unresolved { port: Port::Inside, next_hop: destination },
            (2, 10 | 11) => resolved(Port::Service, destination),
            (2, _) => resolved(Port::Inside, destination),
            (3, _) => NextHop::NoRoute,
            _ => resolved(Port::Service, Place::Any(0x0101).address(destination.is_ipv6())),
        }
    }
}

fn mac_of(host: u16) -> Mac {
    [2, 0, 0, 1, 0, host as u8]
}

struct World {
    engine: Engine,
    leases: Arc<LeaseBoard>,
    now: BootTime,
    revision: u64,
    last: Option<FrameSpec>,
}

/// Carries out `ops` from an engine with every mode in force and leases held.
pub fn run(ops: Vec<Op>) {
    let leases = Arc::new(LeaseBoard::new());
    let config = EngineConfig {
        service: port(false, 1500),
        inside: Some(port(true, 1500)),
        max_flows: MOST_FLOWS,
        new_flows_per_second: 1000,
        seed: 7,
    };
    let engine = Engine::new(config, Arc::clone(&leases));
    let mut world = World { engine, leases, now: START, revision: 1, last: None };
    world.engine.swap(Arc::clone(first_tables()), START);
    for group in GROUPS {
        let until = START.after(std::time::Duration::from_secs(30));
        world.leases.set(group, Lease { epoch: 1, answer_until: until, forward_until: until });
    }
    for op in ops.into_iter().take(MOST_OPS) {
        world.apply(op);
    }
}

/// Compiled once: its Maglev tables would take most of each run.
fn first_tables() -> &'static Arc<Tables> {
    static FIRST: OnceLock<Arc<Tables>> = OnceLock::new();
    FIRST.get_or_init(|| Arc::new(compile(build::first_plan(), None).expect("the first plan is sound")))
}

fn port(inside: bool, mtu: u32) -> PortConfig {
    let host = |v6| Place::Any(if inside { 0x0202 } else { 0x0102 }).address(v6);
    PortConfig {
        mac: if inside { INSIDE_MAC } else { SERVICE_MAC },
        ifindex: 1 + u32::from(inside),
        mtu,
        addresses: vec![(host(false), 24), (host(true), 64)],
    }
}

impl World {
    fn apply(&mut self, op: Op) {
        match op {
            Op::Install(services) => {
                self.revision += 1;
                let before = self.engine.tables().revision();
                let done = self.engine.install(build::plan(self.revision, &services), self.now);
                let expected = if done.is_ok() { self.revision } else { before };
                assert_eq!(self.engine.tables().revision(), expected);
            }
            Op::Lease { second, answer_ms, forward_ms } => {
                let until = |ms: u16| self.now.after(std::time::Duration::from_millis(ms.into()));
                let lease =
                    Lease { epoch: 1, answer_until: until(answer_ms), forward_until: until(forward_ms) };
                self.leases.set(GROUPS[usize::from(second)], lease);
            }
            Op::Frame(spec) => {
                self.frame(&spec);
                self.last = Some(spec);
            }
            Op::Again => {
                if let Some(spec) = self.last.take() {
                    self.frame(&spec);
                    self.last = Some(spec);
                }
            }
            Op::Advance { ms } => {
                self.now = self.now.after(std::time::Duration::from_millis(ms.into()));
                // Bounded work at each tick, and at last an end of it.
                for _ in 0..100_000 {
                    match self.engine.next_deadline() {
                        Some(at) if at <= self.now => self.engine.tick(self.now),
                        _ => return,
                    }
                }
                panic!("ticks without end");
            }
            Op::Mtu { inside, mtu } => {
                let which = if inside { Port::Inside } else { Port::Service };
                self.engine.set_port(which, port(inside, u32::from(mtu).max(1280)));
            }
            Op::Look { service, client } => {
                let client = (Place::Client(client).address(client & 1 != 0), 40_000).into();
                let _ = self.engine.trace(u32::from(service % 8), client, self.now);
                let flows = self.engine.flows(&FlowFilter::default(), 5, self.now);
                assert!(flows.len() <= 5);
                let _ = (self.engine.owned().len(), self.engine.counters(self.now).flows);
                while self.engine.poll_claim().is_some() {}
            }
        }
    }

    fn frame(&mut self, spec: &FrameSpec) {
        let (built, offload) = spec.build();
        let came_right = sums::right(&built, &offload);
        let before = self.dispositions();
        let mut bytes = built.clone();
        let mut frame = FrameMut { bytes: &mut bytes, offload };
        let verdict = self.engine.process(&mut frame, spec.port(), self.now, &Hops);
        let offload = frame.offload;
        let what = || format!("{} became {}: {verdict:?}", Pretty(&built), Pretty(&bytes));
        assert_eq!(bytes.len(), built.len(), "{}", what());
        assert_eq!(self.dispositions(), before + 1, "{}", what());
        assert!(self.engine.counters(self.now).flows <= MOST_FLOWS as u64, "{}", what());
        match verdict {
            Verdict::Forward { port, fence } | Verdict::AwaitNeighbour { port, fence, .. } => {
                assert_eq!(fence.permission, Permission::Forward, "{}", what());
                assert!(fence.is_open(&self.leases, self.now), "without a lease: {}", what());
                let mac = self.engine.port(port).expect("a port to leave by").mac;
                assert_eq!(bytes[6..12], mac, "{}", what());
                let waits = matches!(verdict, Verdict::AwaitNeighbour { .. });
                assert_eq!(bytes[..6] == [0; 6], waits, "{}", what());
                if came_right == Some(true) {
                    assert_eq!(sums::right(&bytes, &offload), Some(true), "{}", what());
                }
                let Ok(dissected) = dissect(&bytes) else { panic!("{}", what()) };
                assert!(matches!(dissected.net, Net::Ip(_)), "{}", what());
            }
            Verdict::Reply { port, fence } => {
                assert!(fence.is_open(&self.leases, self.now), "without a lease: {}", what());
                let reply = self.engine.reply();
                let Ok(dissected) = dissect(reply) else { panic!("{}: {}", what(), Pretty(reply)) };
                assert_eq!(dissected.src, self.engine.port(port).expect("a port to leave by").mac);
                if let Net::Ip(_) = dissected.net {
                    let right = sums::right(reply, &Offload::default());
                    assert_eq!(right, Some(true), "{}: {}", what(), Pretty(reply));
                }
            }
            Verdict::NotOurs => assert_eq!(bytes, built, "{}", what()),
            Verdict::Drop(_) => {}
        }
    }

    /// Frames that have been counted as one thing or another.
    fn dispositions(&self) -> u64 {
        let besides =
            [Event::IcmpErrorSent, Event::AwaitedNeighbour, Event::FlowEvicted, Event::FlowNotRemembered];
        let counters = self.engine.counters(self.now);
        let drops: u64 = counters.drops.iter().map(|(_, n)| n).sum();
        let events = counters.events.iter().filter(|(name, _)| besides.iter().all(|b| b.as_str() != *name));
        drops + events.map(|(_, n)| n).sum::<u64>()
    }
}
