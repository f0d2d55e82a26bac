//! Both sides under one history: an engine alone, and the program with an engine beside it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use komainu_packet::drops::Reason;
use komainu_packet::engine::{Engine, EngineConfig, FrameMut, Passed, Port, Verdict, Windows, compile};
use komainu_packet::flow::BackendSide;
use komainu_packet::hash;
use komainu_packet::lane::kernel::abi::{self, Config, FlowKey, Hop, LeaseCell, Plain, Tally, Traffic, Up};
use komainu_packet::lane::kernel::cache::Cache;
use komainu_packet::lane::kernel::fill::{Filler, Snapshot};
use komainu_packet::lane::kernel::maps::Maps;
use komainu_packet::lane::kernel::news::News;
use komainu_packet::lane::kernel::program::{Hook, Kernel, Sizes};
use komainu_packet::lane::kernel::sys::Ran;
use komainu_packet::lane::{Counters, FlowFilter};
use komainu_packet::lease::{Lease, LeaseBoard};
use komainu_packet::neighbour::NextHops;
use komainu_packet::plan::{Mode, Plan, Protocol, Scheduler};
use komainu_packet::tables::{HASH_SEED, Service, Tables};
use komainu_packet::time::BootTime;
use komainu_packet::wire::{IpInfo, Net, Pretty, dissect};

use crate::build::{self, GROUPS, INSIDE_MAC, ServiceSpec};
use crate::frames::{self, Seen};
use crate::network::{Hops, port_config, write_ways};
use crate::rng::Rng;
use crate::rules::{self, Facts};
use crate::specs::{change, service};

/// Room for flows: little enough that they make room for each other.
const MAX_FLOWS: usize = 64;
/// Numbers of states that one history uses at most.
const STATES: u32 = 1024;
const WINDOW: u64 = 3_000_000_000;

pub struct World {
    hook: Hook,
    kernel: Kernel,
    maps: Arc<Maps>,
    news: News,
    filler: Filler,
    leases: Arc<LeaseBoard>,
    alone: Engine,
    beside: Engine,
    mtus: [u32; 2],
    specs: Vec<ServiceSpec>,
    plan: Plan,
    revision: u64,
    seen: Vec<Seen>,
    /// Lives of backends' numbers: another life, other counters.
    lives: HashMap<u32, u32>,
    seed: u64,
    frames: u64,
    tally: Tally,
    tally_before: Tally,
    /// How old the program's readings of the clock may be, in nanoseconds.
    slack: u64,
    /// Windows of flows seen may differ until then, in nanoseconds: the program read the clock in another one.
    straddled_until: u64,
    /// What became of all frames.
    outcomes: BTreeMap<String, u64>,
}

fn engine(leases: &Arc<LeaseBoard>, mtus: [u32; 2]) -> Engine {
    let config = EngineConfig {
        service: port_config(Port::Service, mtus[0]),
        inside: Some(port_config(Port::Inside, mtus[1])),
        max_flows: MAX_FLOWS,
        new_flows_per_second: 10_000_000,
        seed: 7,
    };
    Engine::new(config, Arc::clone(leases))
}

impl World {
    pub fn new(hook: Hook) -> World {
        // Little room at first, so that the maps of flows grow under what happens.
        let (flows, first_flows) = (4 * MAX_FLOWS as u32, 2);
        let sizes = Sizes { backends: STATES, services: STATES, flows, first_flows, ..Sizes::default() };
        let mut kernel = Kernel::load(hook, sizes).unwrap_or_else(|e| panic!("{e}"));
        let news = kernel.take_news().unwrap();
        let maps = Arc::clone(kernel.maps());
        write_ways(&maps);
        let own = [Port::Service, Port::Inside].map(|p| port_config(p, 0).addresses);
        maps.set_host_addresses(own.iter().flatten().map(|(a, _)| *a)).unwrap();
        let leases = Arc::new(LeaseBoard::new());
        let maps_slack = maps.config().slack;
        World {
            hook,
            filler: Filler::new(Arc::clone(&maps)),
            alone: engine(&leases, [1500; 2]),
            beside: engine(&leases, [1500; 2]),
            tally: maps.tally(),
            tally_before: maps.tally(),
            kernel,
            maps,
            news,
            leases,
            mtus: [1500; 2],
            specs: Vec::new(),
            plan: Plan::default(),
            revision: 0,
            seen: Vec::new(),
            lives: HashMap::new(),
            seed: 0,
            frames: 0,
            slack: maps_slack,
            straddled_until: 0,
            outcomes: BTreeMap::new(),
        }
    }

    /// A new history: no flows, other services.
    pub fn begin(&mut self, seed: u64, rng: &mut Rng) {
        (self.seed, self.frames) = (seed, 0);
        // As on machines where readings of the clock are of any age, too.
        self.maps.set_slack(if rng.one_in(4) { 0 } else { self.slack });
        self.mtus = [rng.of(&[1500, 1500, 1280]), rng.of(&[1500, 1500, 1280])];
        self.alone = engine(&self.leases, self.mtus);
        self.beside = engine(&self.leases, self.mtus);
        self.maps.clear_flows().unwrap();
        for number in 0..STATES {
            self.maps.reset_backend(number);
        }
        self.tally_before = self.maps.tally();
        self.tally = self.tally_before;
        self.beside.set_cache(Box::new(Cache::new(Arc::clone(&self.maps))));
        self.seen.clear();
        self.lives.clear();
        self.straddled_until = 0;
        loop {
            let services = 1 + rng.below(4);
            self.specs = (0..services).map(|n| service(rng, n as u8)).collect();
            if compile(build::plan(self.revision, &self.specs), None).is_ok() {
                break;
            }
        }
        for group in GROUPS {
            self.set_lease(group, true, true);
        }
    }

    pub fn change_lease(&mut self, rng: &mut Rng) {
        let group = rng.of(&GROUPS);
        let held = !rng.one_in(7);
        self.set_lease(group, held && !rng.one_in(4), held);
    }

    fn set_lease(&self, group: u32, answer: bool, forward: bool) {
        let until = |may| if may { u64::MAX } else { 0 };
        let (answer_until, forward_until) = (until(answer), until(forward));
        let lease =
            Lease { epoch: 1, answer_until: BootTime(answer_until), forward_until: BootTime(forward_until) };
        self.leases.set(group, lease);
        let group = u64::from(group) + 1;
        let cell = LeaseCell { group, epoch: 1, answer_until, forward_until, reserved: [0; 4] };
        assert!(self.maps.leases().write(group as u32 - 1, &cell));
    }

    /// Changes health, weights or services, and puts the plan in force on both sides.
    pub fn change_plan(&mut self, rng: &mut Rng) {
        if self.frames > 0 {
            for spec in &mut self.specs {
                change(rng, spec);
            }
            if rng.one_in(6) {
                let n = rng.below(self.specs.len() as u64) as usize;
                self.specs[n] = service(rng, n as u8);
            }
        }
        self.revision += 1;
        let plan = build::plan(self.revision, &self.specs);
        let Ok(tables) = compile(plan.clone(), Some(self.beside.tables())) else { return };
        self.plan = plan;
        let tables = Arc::new(tables);
        let now = BootTime::now();
        self.alone.swap(Arc::clone(&tables), now);
        self.beside.swap(tables, now);
        let snapshot = Snapshot::of(&self.beside);
        for (number, _) in snapshot.backends() {
            let life = self.beside.backend_life(number);
            if self.lives.insert(number, life) != Some(life) {
                self.maps.reset_backend(number);
            }
        }
        let hop = |address| Hop::of(address, Hops.lookup(address));
        let installed = self.filler.install(&snapshot, &hop).unwrap();
        assert_eq!(installed.without_room, 0, "this test makes room");
    }

    /// One frame on both sides.
    pub fn frame(&mut self, rng: &mut Rng) {
        let frame = frames::make(rng, &self.plan, &self.seen, self.hook == Hook::Tc);
        self.frames += 1;
        for port in [Port::Service, Port::Inside] {
            // Test runs come by interface 1.
            let ifindex = if port == frame.port { 1 } else { 1000 };
            let config = port_config(port, self.mtus[port as usize]);
            self.maps.set_port(port, config.mac, ifindex, config.mtu, 2000);
        }
        let facts_before = self.facts_before(&frame.bytes);
        let counted_before = self.alone.counters(BootTime(0));
        let now = BootTime::now();
        self.news.grant(&mut self.beside, now);

        let mut expected = frame.bytes.clone();
        let mut view = FrameMut { bytes: &mut expected, offload: frame.offload() };
        let verdict = self.alone.process(&mut view, frame.port, now, &Hops);
        let expected =
            if matches!(verdict, Verdict::Reply { .. }) { self.alone.reply().to_vec() } else { expected };

        let ran = self.run(&frame.bytes, frame.gso_size);
        if BootTime::now().0 / WINDOW != now.0.saturating_sub(self.slack) / WINDOW {
            self.straddled_until = now.0 + 3 * WINDOW;
        }
        let learned = self.news.learn(&mut self.beside, now);
        let tally = self.maps.tally();
        let moved = |now: &[u64], then: &[u64]| -> Vec<usize> {
            (0..now.len()).flat_map(|i| std::iter::repeat_n(i, (now[i] - then[i]) as usize)).collect()
        };
        let drops = moved(&tally.drops, &self.tally.drops);
        let ups = moved(&tally.up, &self.tally.up);
        self.tally = tally;

        let what = || {
            format!(
                "history {} frame {} at {}: {} by {:?}: alone {verdict:?}, the program {:?} drops {drops:?} ups {:?}\nin {:02x?}\nalone {:02x?}\nprogram {:02x?}\nplan {:#?}",
                self.seed,
                self.frames,
                self.hook.as_str(),
                Pretty(&frame.bytes),
                frame.port,
                ran.action,
                ups.iter().map(|&i| Up::ALL[i]).collect::<Vec<_>>(),
                frame.bytes,
                expected,
                ran.frame,
                self.plan,
            )
        };
        let outcome = match (self.action(ran.action), ups.first()) {
            (Action::Drop, _) => {
                let Verdict::Drop(reason) = verdict else { panic!("dropped: {}", what()) };
                assert_eq!(drops, [reason as usize], "{}", what());
                format!("drop {}", reason.as_str())
            }
            (Action::Leave(back), None) => {
                let (Verdict::Forward { port, .. } | Verdict::Reply { port, .. }) = verdict else {
                    panic!("left: {}", what())
                };
                assert!(drops.is_empty(), "{}", what());
                assert_eq!(ran.frame, expected, "{}", what());
                if let Some(back) = back {
                    assert_eq!(back, port == frame.port, "{}", what());
                }
                match (verdict, facts_before.mode) {
                    (Verdict::Reply { .. }, _) => "reply".to_owned(),
                    // The same bytes: the same SNAT address and port, too.
                    (_, Some((Mode::Nat, true))) if facts_before.opens && rules::begins(&frame.bytes) => {
                        "leave request Nat, made".to_owned()
                    }
                    (_, Some((mode @ Mode::Nat, _))) if learned > 0 => format!("leave {mode:?}, changed"),
                    (_, Some((mode, true))) => format!("leave request {mode:?}"),
                    (_, Some((mode, false))) => format!("leave answer {mode:?}"),
                    (_, None) => "leave".to_owned(),
                }
            }
            (Action::Pass | Action::Leave(_), up) => {
                assert_eq!(learned, 0, "what goes up has changed nothing: {}", what());
                assert!(drops.is_empty() && ups.len() <= 1, "{}", what());
                assert_eq!(ran.frame, frame.bytes, "what goes up is as it came: {}", what());
                let class = match up {
                    Some(&up) => {
                        let up = Up::ALL[up];
                        let after = self.alone.counters(BootTime(0));
                        let facts = facts_before.with(&frame.bytes, verdict, &counted_before, &after);
                        assert!(rules::may_go_up(up, &facts), "needlessly up: {}", what());
                        format!("up {}", up.as_str())
                    }
                    None => {
                        assert!(
                            verdict == Verdict::NotOurs || is_not_seen(&frame.bytes),
                            "passed: {}",
                            what()
                        );
                        "pass".to_owned()
                    }
                };
                // The engine beside gets what came up.
                let mut bytes = frame.bytes.clone();
                let mut view = FrameMut { bytes: &mut bytes, offload: frame.offload() };
                let second = self.beside.process(&mut view, frame.port, now, &Hops);
                assert_eq!(second, verdict, "beside: {}", what());
                let reply = matches!(second, Verdict::Reply { .. });
                let bytes = if reply { self.beside.reply() } else { &bytes };
                assert_eq!(bytes, expected, "beside: {}", what());
                class
            }
        };
        *self.outcomes.entry(outcome).or_default() += 1;
        if let Verdict::Forward { .. } = verdict {
            self.note(&expected);
        }
        if self.frames.is_multiple_of(50) {
            self.compare_counters();
        }
    }

    fn run(&self, frame: &[u8], gso_size: u16) -> Ran {
        // No frame without an Ethernet header ever comes in.
        if frame.len() < 14 {
            let action = if self.hook == Hook::Xdp { 2 } else { u32::MAX };
            return Ran { action, frame: frame.to_vec(), ns: 0 };
        }
        let mut context = [0u8; 192];
        // `gso_segs` and `gso_size` of `struct __sk_buff`.
        context[164..168].copy_from_slice(&u32::from(gso_size > 0).to_ne_bytes());
        context[176..180].copy_from_slice(&u32::from(gso_size).to_ne_bytes());
        let context = (gso_size > 0).then_some(&context[..]);
        match self.kernel.test_run(frame, context, 1) {
            Ok(ran) => ran,
            // The kernel makes no socket buffer of a frame that is too short for the IP header that its type promises.
            Err(e) if self.hook == Hook::Tc && frame.len() < 14 + 40 && e.raw_os_error() == Some(22) => {
                Ran { action: u32::MAX, frame: frame.to_vec(), ns: 0 }
            }
            Err(e) => panic!("test run of {} bytes at {}: {e}", frame.len(), self.hook.as_str()),
        }
    }

    fn action(&self, action: u32) -> Action {
        match (self.hook, action) {
            (Hook::Xdp, 1) | (Hook::Tc, 2) => Action::Drop,
            (Hook::Xdp, 2) | (Hook::Tc, u32::MAX) => Action::Pass,
            (Hook::Xdp, 3) => Action::Leave(Some(true)),
            (Hook::Xdp, 4) => Action::Leave(Some(false)),
            // Where to, the number does not say: the source MAC does.
            (Hook::Tc, 7) => Action::Leave(None),
            (_, other) => panic!("the program returned {other}"),
        }
    }

    /// A way that a packet took, for an answer to come by.
    fn note(&mut self, frame: &[u8]) {
        let Ok(Net::Ip(ip)) = dissect(frame).map(|d| d.net) else { return };
        let (Some((src, dst)), Some(protocol)) = (ip.ports(), Protocol::from_number(ip.proto)) else {
            return;
        };
        self.seen.push(Seen {
            protocol,
            from: SocketAddr::new(ip.src, src),
            to: SocketAddr::new(ip.dst, dst),
        });
        if self.seen.len() > 64 {
            self.seen.remove(0);
        }
    }

    fn facts_before(&self, frame: &[u8]) -> FlowFacts {
        let mut facts = FlowFacts::default();
        let Ok(Net::Ip(ip)) = dissect(frame).map(|d| d.net) else { return facts };
        let (Some((src_port, dst_port)), Some(protocol)) = (ip.ports(), Protocol::from_number(ip.proto))
        else {
            return facts;
        };
        let tables = self.beside.tables();
        if let Some(index) = tables.service_at(ip.dst, dst_port, protocol) {
            self.flow_facts(&mut facts, tables, index, SocketAddr::new(ip.src, src_port));
        } else if tables.owned(ip.dst).is_some_and(|o| o.snat) {
            self.bound_facts(&mut facts, &ip, src_port, dst_port);
        } else if let Some((index, _)) = tables.transparent_backend(ip.src, src_port, protocol) {
            self.flow_facts(&mut facts, tables, index, SocketAddr::new(ip.dst, dst_port));
            // Where flows are remembered, the program asks for the client's before it lets an answer by.
            facts.must_be_remembered = false;
            facts.mode = Some((Mode::NatTransparent, false));
        }
        facts
    }

    fn flow_facts(&self, facts: &mut FlowFacts, tables: &Tables, index: u16, client: SocketAddr) {
        let service: &Service = &tables.services()[usize::from(index)];
        let number = self.beside.service_number(index);
        let trace = self.beside.trace(service.id, client, BootTime(0)).expect("the service is in the plan");
        let slot = service.slot(service.hash(client.ip(), client.port()));
        let key = FlowKey {
            client: abi::wide(client.ip()),
            service: number,
            client_port: client.port().to_be_bytes(),
            reserved: 0,
        };
        let cell = self.maps.flow(&key);
        let steady = cell.is_some_and(|c| c.flags & abi::FLOW_STEADY != 0);
        let kept = cell.is_some_and(|c| c.flags & abi::FLOW_KEPT != 0);
        let closing = kept && cell.is_some_and(|c| matches!(c.progress & 7, 2 | 3));
        let hashed = matches!(service.scheduler, Scheduler::Maglev | Scheduler::SourceIp);
        let gone = cell.and_then(|c| self.maps.backend(c.backend)).is_some_and(|b| b.flags != 3);
        *facts = FlowFacts {
            mode: Some((service.mode, true)),
            remembered: trace.remembered && cell.is_some(),
            steady,
            must_be_remembered: service.tracks_all || slot.in_transition(),
            dead_backend: gone || service.backends.iter().any(|b| !b.alive),
            kept,
            closing,
            opens: !trace.remembered || closing,
            makes: service.mode == Mode::Nat && hashed,
        };
        facts.opens &= facts.makes;
    }

    fn bound_facts(&self, facts: &mut FlowFacts, ip: &IpInfo, src_port: u16, dst_port: u16) {
        let name = BackendSide {
            protocol: ip.proto,
            backend: ip.src,
            backend_port: src_port,
            snat: ip.dst,
            snat_port: dst_port,
        };
        let cell = self.maps.answered(&name);
        *facts = FlowFacts {
            mode: Some((Mode::Nat, false)),
            remembered: cell.is_some(),
            steady: cell.is_some_and(|c| c.flags & abi::FLOW_STEADY != 0),
            must_be_remembered: true,
            dead_backend: false,
            kept: cell.is_some_and(|c| c.flags & abi::FLOW_KEPT != 0),
            ..FlowFacts::default()
        };
    }

    /// Counters of both sides.
    pub fn compare_counters(&mut self) {
        let now = BootTime::now();
        let alone = self.alone.counters(now);
        let maps = &self.maps;
        let mut beside = self.beside.counters_with(now, |number| {
            let t: Traffic = maps.traffic(number);
            let seen = maps.seen(number)?;
            Some(Passed {
                packets: t.packets,
                bytes: t.bytes,
                return_packets: t.return_packets,
                return_bytes: t.return_bytes,
                new_flows: t.new_flows,
                seen: Some(Windows { window: seen.window, registers: seen.registers }),
            })
        });
        for (i, counter) in beside.drops.iter_mut().enumerate() {
            counter.1 += self.tally.drops[i] - self.tally_before.drops[i];
        }
        for (i, counter) in beside.events.iter_mut().enumerate() {
            counter.1 += self.tally.events[i] - self.tally_before.events[i];
        }
        let mut alone: Counters = alone;
        if now.0 < self.straddled_until {
            for c in alone.backends.iter_mut().chain(&mut beside.backends) {
                c.active = 0;
            }
        }
        assert_eq!(alone, beside, "history {} after frame {}", self.seed, self.frames);
        // And the flows themselves: backend, SNAT address and port, state.
        let flows = |engine: &Engine| {
            let flows = engine.flows(&FlowFilter::default(), MAX_FLOWS, now).into_iter();
            let told = flows.map(|f| (f.service, f.client, f.backend, f.snat, f.state));
            told.collect::<BTreeSet<_>>()
        };
        assert_eq!(
            flows(&self.alone),
            flows(&self.beside),
            "history {} after frame {}",
            self.seed,
            self.frames
        );
        // Nothing stays behind of flows that were forgotten.
        let remembered = usize::try_from(self.beside.counters(now).flows).unwrap();
        let (flows, bound) = self.maps.count_flows();
        assert!(flows <= remembered && bound <= flows, "{bound} and {flows} of {remembered} flows");
        self.check_filters(now);
    }

    /// Filters let packets look for flows that are remembered, and for few others.
    fn check_filters(&self, now: BootTime) {
        let tables = self.beside.tables();
        for (index, service) in (0..).zip(tables.services()) {
            let cell = self.maps.service(self.beside.service_number(index)).unwrap();
            if cell.filter == 0 {
                continue;
            }
            let of_service = FlowFilter { service: Some(service.id), backend: None };
            let flows = self.beside.flows(&of_service, MAX_FLOWS, now);
            let hash = |client: SocketAddr| {
                let protocol = service.protocol.number();
                hash::flow(HASH_SEED, client.ip(), client.port(), service.vip, service.port, protocol)
            };
            let expected: BTreeSet<u16> = flows.iter().map(|f| (hash(f.client) >> 16) as u16).collect();
            let filter: BTreeSet<u16> = self.maps.filter(cell.filter - 1).into_iter().collect();
            let what = || format!("history {} after frame {}", self.seed, self.frames);
            assert!(filter.is_superset(&expected), "{}: {filter:?} lacks some of {expected:?}", what());
            // Flows whose backend is gone are remembered, but not listed.
            let remembered = self.beside.counters(now).flows;
            assert!(!filter.is_empty() && filter.len() as u64 <= remembered, "{}: {filter:?}", what());
        }
    }

    /// Prints what became of the frames, and checks that every kind of case came.
    pub fn report(&self) {
        let total: u64 = self.outcomes.values().sum();
        println!("{}: {total} cases", self.hook.as_str());
        for (outcome, n) in &self.outcomes {
            println!("  {n:>9}  {outcome}");
        }
        let count = |outcome: &str| {
            let of_kind = self.outcomes.iter().filter(|(o, _)| o.starts_with(outcome));
            of_kind.map(|(_, n)| n).sum::<u64>()
        };
        // Of a thousand, at least.
        let least = [
            ("leave", 150),
            ("leave request Dsr", 20),
            ("leave request Nat", 10),
            ("leave request Nat, made", 2),
            ("leave Nat, changed", 5),
            ("leave request NatTransparent", 10),
            ("leave answer Nat", 5),
            ("leave answer NatTransparent", 5),
            ("reply", 5),
            ("pass", 20),
            ("drop no_lease", 10),
            ("drop no_service", 5),
            ("drop no_backend", 5),
            ("up segment", 5),
            ("up flow", 5),
        ];
        for (outcome, least) in least {
            let n = count(outcome);
            assert!(n * 1000 >= least * total, "too few cases of \"{outcome}\": {n} of {total}");
        }
        // What the program could not write down: maps that had to grow, a table nearly full of established flows, a closing flow whose
        // port was not its first candidate.
        let (unwritten, written) = (count("up note"), count("leave request Nat, made"));
        assert!(
            unwritten * 4 <= written,
            "{unwritten} frames went up instead of making flows; {written} made one"
        );
    }
}

enum Action {
    Drop,
    Pass,
    /// By the port that it came by, or by the other; the tc hook does not say.
    Leave(Option<bool>),
}

#[derive(Default)]
struct FlowFacts {
    /// Mode of the service, and whether it is a request to it.
    mode: Option<(Mode, bool)>,
    remembered: bool,
    steady: bool,
    must_be_remembered: bool,
    dead_backend: bool,
    /// The program keeps its state.
    kept: bool,
    /// And it is closing.
    closing: bool,
    /// New flows of its service are made by the program.
    makes: bool,
    /// A SYN or datagram begins a flow that the program makes.
    opens: bool,
}

impl FlowFacts {
    fn with<'a>(&self, frame: &'a [u8], verdict: Verdict, before: &Counters, after: &Counters) -> Facts<'a> {
        let moved = after.drops.iter().zip(&before.drops).map(|(a, b)| a.1 - b.1);
        let dropped: Vec<Reason> =
            moved.zip(Reason::ALL).filter(|(n, _)| *n > 0).map(|(_, reason)| *reason).collect();
        let event = |counters: &Counters, name: &str| {
            counters.events.iter().find(|(n, _)| *n == name).map_or(0, |(_, n)| *n)
        };
        let waits = matches!(verdict, Verdict::AwaitNeighbour { .. });
        Facts {
            frame,
            verdict,
            claimed: event(after, "foreign_claim") > event(before, "foreign_claim"),
            remembered: self.remembered,
            steady: self.steady,
            must_be_remembered: self.must_be_remembered,
            dead_backend: self.dead_backend,
            kept: self.kept,
            closing: self.closing,
            makes: self.makes,
            // The program asks for the way before it looks at the size.
            unresolved: waits
                || dropped.contains(&Reason::TooBig)
                || self.kept && dropped.contains(&Reason::NoRoute),
            dropped,
        }
    }
}

/// Frames that the engine does not see in life, either: tagged ones, which the packet socket's filter keeps out, and IPv6 behind
/// extension headers to a group, of which that filter knows nothing.
fn is_not_seen(frame: &[u8]) -> bool {
    let tagged = frame.get(12..14).is_some_and(|t| t == [0x81, 0x00] || t == [0x88, 0xa8]);
    let extended = frame.get(12..14).is_some_and(|t| t == [0x86, 0xdd])
        && frame.get(20).is_some_and(|next| matches!(next, 0 | 43 | 44 | 60));
    tagged || extended && frame.get(38) == Some(&0xff)
}

/// The configuration is as the test writes it.
#[test]
fn the_configuration_is_what_was_written() {
    let kernel = Kernel::load(Hook::Xdp, Sizes { backends: 8, services: 8, ..Sizes::default() }).unwrap();
    kernel.maps().set_port(Port::Inside, INSIDE_MAC, 7, 1400, 9);
    kernel.maps().set_bound_complete(true);
    let config: Config = kernel.maps().config();
    assert_eq!((config.backends, config.services, config.flags), (8, 8, abi::CONFIG_BOUND_COMPLETE));
    let port = config.ports[1];
    assert_eq!((port.mac, port.ifindex, port.mtu, port.up), (abi::mac_word(INSIDE_MAC), 7, 1400, 9));
    assert!(config.slack >= 5_000_000, "a tick is a millisecond at least: {}", config.slack);
    kernel.maps().set_slack(3);
    assert_eq!(kernel.maps().config().slack, 3);
    assert_eq!(kernel.maps().tally(), Tally::zeroed());
}
