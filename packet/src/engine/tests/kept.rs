//! Beside a program that makes flows of full NAT itself.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use super::*;
use crate::engine::nat::MAX_HALF_OPEN;
use crate::engine::{FlowBinding, FlowCache, FlowNews, Kept, Port, Reservation, SNAT_PORT_UPPER, Verdict};
use crate::flow::{BackendSide, ClientSide, Direction, Flow, Segment, two_way_step};
use crate::lane::FlowFilter;
use crate::plan::*;
use crate::time::BootTime;

/// What the program has: names on the backend's side with what is kept of them, absent while a name is only reserved.
#[derive(Debug, Default)]
struct Book {
    bound: HashMap<BackendSide, Option<(u8, u8)>>,
    refused: u32,
}

#[derive(Clone, Debug, Default)]
struct Program(Arc<Mutex<Book>>);

impl FlowCache for Program {
    fn remember(&mut self, flow: &Flow, _hash: u32) {
        self.change(flow);
    }

    fn change(&mut self, flow: &Flow) {
        if self.keeps(flow) {
            let state = (flow.progress_bits(), flow.version());
            self.0.lock().unwrap().bound.insert(flow.backend_side().unwrap(), Some(state));
        }
    }

    fn forget(&mut self, flow: &Flow, _hash: u32) {
        if self.keeps(flow) {
            assert!(self.0.lock().unwrap().bound.remove(&flow.backend_side().unwrap()).is_some());
        }
    }

    fn last_seen(&self, _flow: &Flow) -> Option<BootTime> {
        None
    }

    fn consult(&mut self, _service: u32, _consult: bool) {}

    fn keeps(&self, flow: &Flow) -> bool {
        flow.bound_port().is_some_and(|(protocol, port)| protocol == 6 && port < SNAT_PORT_UPPER)
    }

    fn reserve(&mut self, name: &BackendSide) -> Reservation {
        let bound = &mut self.0.lock().unwrap().bound;
        if bound.contains_key(name) {
            return Reservation::Taken;
        }
        bound.insert(*name, None);
        Reservation::Made
    }

    fn release(&mut self, name: &BackendSide) {
        self.0.lock().unwrap().bound.remove(name);
    }

    fn made(&mut self, flow: &Flow, _hash: u32) {
        assert!(
            self.0.lock().unwrap().bound.contains_key(&flow.backend_side().unwrap()),
            "it has it already"
        );
    }

    fn replaced(&mut self, _flow: &Flow, _hash: u32) {}

    fn refuse(&mut self, _client: &ClientSide, backend: &BackendSide) {
        let mut book = self.0.lock().unwrap();
        book.refused += 1;
        book.bound.remove(backend);
    }
}

struct Bed {
    world: World,
    program: Program,
    outbox: Outbox,
}

fn bed(max_flows: usize) -> Bed {
    let services = vec![service(Mode::Nat, false, Protocol::Tcp, 1)];
    let mut world = World::with_limits(services, max_flows, 10_000_000);
    let (program, outbox) = (Program::default(), Outbox::default());
    world.engine.set_cache(Box::new(program.clone()));
    world.engine.set_outbox(Box::new(outbox.clone()));
    Bed { world, program, outbox }
}

impl Bed {
    /// The program makes a flow of the client's port `port`, bound to `snat_port`.
    fn opened(&mut self, port: u16, snat_port: u16) -> Kept {
        let kept = Kept {
            client_side: ClientSide {
                service: self.world.engine.service_number(0),
                client: client(false).ip(),
                client_port: port,
            },
            backend: self.world.engine.backend_number(0, 0),
            snat: (snat(false), snat_port),
            opened: true,
            progress: 0,
            version: 0,
            at: self.world.now,
        };
        self.program.0.lock().unwrap().bound.insert(name(snat_port), Some((0, 0)));
        self.learn(&kept);
        kept
    }

    fn learn(&mut self, kept: &Kept) {
        self.world.engine.learn(kept, self.world.now);
    }

    /// States, by the client's port.
    fn states(&self) -> HashMap<u16, &'static str> {
        let flows = self.world.engine.flows(&FlowFilter::default(), 100_000, self.world.now);
        flows.iter().map(|f| (f.client.port(), f.state)).collect()
    }
}

fn name(snat_port: u16) -> BackendSide {
    BackendSide {
        protocol: 6,
        backend: backend_address(Mode::Nat, false, 1),
        backend_port: 8080,
        snat: snat(false),
        snat_port,
    }
}

/// The next piece of news of a flow.
fn step(kept: &Kept, segment: Segment, direction: Direction) -> Kept {
    let (progress, ..) = two_way_step(kept.progress, segment, direction).unwrap();
    let version = if progress == kept.progress { kept.version } else { (kept.version + 1) % 32 };
    Kept { opened: false, progress, version, ..*kept }
}

use Direction::{ToBackend, ToClient};

#[test]
fn a_flow_that_the_program_makes_is_followed_told_and_forgotten_like_any_other() {
    let mut bed = bed(100);
    let syn = bed.opened(4000, 2000);
    assert_eq!(bed.states()[&4000], "syn_sent");
    let answered = step(&syn, Segment::Tcp, ToClient);
    bed.learn(&answered);
    assert_eq!((bed.states()[&4000], bed.outbox.take()), ("syn_sent", vec![]));
    let established = step(&answered, Segment::Tcp, ToBackend);
    bed.learn(&established);
    assert_eq!(bed.states()[&4000], "established");
    let [FlowNews::Known(record)] = bed.outbox.take()[..] else { panic!("one piece of news") };
    assert_eq!((record.snat, record.progress), (Some((snat(false), 2000).into()), established.progress));
    // What comes up is the same flow's.
    let (_, seen) = bed.world.send(&request_from(Protocol::Tcp, false, 4000).build()).sent();
    assert_eq!(seen.src, SocketAddr::new(snat(false), 2000));
    let closed = step(&established, Segment::Rst, ToBackend);
    bed.learn(&closed);
    let flow = FlowBinding { service: SERVICE, backend: 1, snat: (snat(false), 2000).into() };
    assert_eq!(bed.outbox.take(), [FlowNews::Unbound(flow)]);
    assert_eq!(bed.world.counters().backends[0].active, 0, "it has ended");
    bed.world.pass(6);
    assert!(bed.states().is_empty() && bed.program.0.lock().unwrap().bound.is_empty());
}

#[test]
fn of_two_pieces_of_news_the_later_one_holds() {
    let mut bed = bed(100);
    let syn = bed.opened(4000, 2000);
    let answered = step(&syn, Segment::Tcp, ToClient);
    let established = step(&answered, Segment::Tcp, ToBackend);
    bed.learn(&established);
    bed.learn(&answered);
    assert_eq!(bed.states()[&4000], "established");
    // Versions come round.
    let mut last = established;
    for _ in 0..40 {
        for segment in [Segment::Rst, Segment::Tcp] {
            last = step(&last, segment, ToBackend);
            bed.learn(&last);
        }
        assert_eq!(bed.states()[&4000], "established");
    }
    bed.learn(&step(&last, Segment::Fin, ToBackend));
    assert_eq!(bed.states()[&4000], "closing");
}

#[test]
fn a_flow_made_in_the_place_of_another_takes_it() {
    let mut bed = bed(100);
    let syn = bed.opened(4000, 2000);
    let established = step(&step(&syn, Segment::Tcp, ToClient), Segment::Tcp, ToBackend);
    bed.learn(&established);
    let closed = step(&established, Segment::Rst, ToClient);
    bed.learn(&closed);
    bed.outbox.take();
    // The same names.
    bed.learn(&Kept { opened: true, progress: 0, version: closed.version + 1, ..closed });
    assert_eq!((bed.states().len(), bed.states()[&4000]), (1, "syn_sent"));
    assert_eq!(bed.program.0.lock().unwrap().bound.len(), 1);
    // Another port: the engine's own was not known to the program.
    bed.opened(4000, 2001);
    assert_eq!(bed.states().len(), 1);
    assert_eq!(bed.program.0.lock().unwrap().bound.keys().copied().collect::<Vec<_>>(), [name(2001)]);
    // And a port that the engine thought was another flow's.
    bed.opened(4001, 2001);
    assert_eq!(bed.states().into_keys().collect::<Vec<_>>(), [4001]);
    assert_eq!(bed.world.counters().backends[0].flows, 1);
}

#[test]
fn what_is_in_no_plan_any_more_is_refused() {
    let mut bed = bed(100);
    let before = bed.opened(4000, 2000);
    let mut other = plan(vec![service(Mode::Nat, false, Protocol::Tcp, 1)]);
    other.services[0].backends[0].address = ip("10.0.0.99");
    other.revision = 2;
    bed.world.engine.install(other, bed.world.now).unwrap();
    let late = ClientSide { client_port: 4001, ..before.client_side };
    bed.program.0.lock().unwrap().bound.insert(name(2001), Some((0, 0)));
    bed.learn(&Kept { client_side: late, snat: (snat(false), 2001), ..before });
    assert_eq!(bed.world.counters().flows, 1, "the one that was known before");
    let book = bed.program.0.lock().unwrap();
    assert_eq!((book.refused, book.bound.contains_key(&name(2001))), (1, false));
}

#[test]
fn the_engine_takes_no_port_that_the_program_has_given_away() {
    let mut bed = bed(100);
    // As one engine alone does it.
    let mut alone = World::with_limits(vec![service(Mode::Nat, false, Protocol::Tcp, 1)], 100, 10_000_000);
    let syn = request_from(Protocol::Tcp, false, 4000).flags(SYN).build();
    let (_, first) = alone.send(&syn).sent();
    assert!(first.src.port() < SNAT_PORT_UPPER);
    bed.program.0.lock().unwrap().bound.insert(name(first.src.port()), Some((0, 0)));
    let (_, seen) = bed.world.send(&syn).sent();
    assert_eq!(seen.src.port(), first.src.port() + 1);
    let bound = &bed.program.0.lock().unwrap().bound;
    assert_eq!(bound[&name(first.src.port() + 1)], Some((0, 0)), "reserved, then written");
}

#[test]
fn a_flood_takes_upper_ports_and_then_ports_from_itself() {
    let mut bed = bed(100_000);
    let mut answered = Vec::new();
    for n in 0..40_000u32 {
        let src = SocketAddr::new(std::net::Ipv4Addr::from_bits(0x0b00_0000 + n).into(), 4000);
        let syn = Packet::new(Protocol::Tcp, src, (vip(false), 80).into()).flags(SYN).build();
        if n % 1000 == 0 {
            let (_, there) = bed.world.send(&syn).sent();
            let answer = Packet::new(Protocol::Tcp, there.dst, there.src).inside().flags(SYN_ACK);
            bed.world.send_by(&answer.build(), Port::Inside).sent();
            bed.world.send(&Packet::new(Protocol::Tcp, src, (vip(false), 80).into()).build()).sent();
            answered.push((src, there.src));
        } else {
            assert!(matches!(bed.world.send_quietly(&syn), Verdict::Forward { .. }), "{n}");
        }
    }
    assert_eq!(bed.world.engine.may_make(bed.world.now), 0, "no half-open flows more");
    let lower = bed.program.0.lock().unwrap().bound.len();
    assert!(lower <= MAX_HALF_OPEN as usize + answered.len(), "{lower}");
    assert!(bed.world.count("flow_evicted") > 10_000, "the upper ports are 16384");
    for (client, snat) in answered {
        let packet = Packet::new(Protocol::Tcp, client, (vip(false), 80).into());
        assert_eq!(bed.world.send(&packet.build()).sent().1.src, snat);
    }
    bed.world.pass(31);
    assert_eq!(bed.world.engine.may_make(bed.world.now), u64::from(MAX_HALF_OPEN));
}

/// Three hundred unanswered SYNs a second took all that a program may make, for half a minute each.
#[test]
fn flows_that_nobody_answers_wait_the_less_the_more_there_are() {
    let mut bed = bed(100_000);
    let grant = |bed: &mut Bed| bed.world.engine.may_make(bed.world.now);
    for n in 0..MAX_HALF_OPEN as u16 {
        bed.opened(4000 + n, 2000 + n);
    }
    let last = bed.opened(4000 + MAX_HALF_OPEN as u16, 2000 + MAX_HALF_OPEN as u16);
    bed.learn(&step(&step(&last, Segment::Tcp, ToClient), Segment::Tcp, ToBackend));
    assert_eq!(grant(&mut bed), 0);
    bed.world.pass(2);
    let soon = grant(&mut bed);
    assert!((100..1000).contains(&soon), "{soon}: only the last have so little patience");
    bed.world.pass(25);
    let (later, half) = (grant(&mut bed), u64::from(MAX_HALF_OPEN / 2));
    assert!(
        (half * 8 / 10..=half).contains(&later),
        "{later}: the first have all the patience that there is"
    );
    assert_eq!(bed.states()[&4000], "syn_sent");
    bed.world.pass(4);
    assert_eq!(grant(&mut bed), u64::from(MAX_HALF_OPEN));
    bed.world.pass(60);
    assert_eq!(bed.states(), HashMap::from([(4000 + MAX_HALF_OPEN as u16, "established")]));
}

#[test]
fn no_more_is_granted_than_there_is_room_for() {
    let mut bed = bed(10);
    assert_eq!(bed.world.engine.may_make(bed.world.now), 10);
    for n in 0..4 {
        let syn = bed.opened(4000 + n, 2000 + n);
        bed.learn(&step(&step(&syn, Segment::Tcp, ToClient), Segment::Tcp, ToBackend));
    }
    assert_eq!(bed.world.engine.may_make(bed.world.now), 6, "established ones make no room");
    for n in 0..4 {
        bed.opened(5000 + n, 3000 + n);
    }
    assert_eq!(bed.world.engine.may_make(bed.world.now), 6, "half-open ones do");
}
