use std::collections::HashMap;
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

const IDLE: Duration = Duration::from_secs(60);
const SECOND: u64 = 1_000_000_000;

fn client_side(n: u8) -> ClientSide {
    ClientSide {
        service: u32::from(n % 3),
        client: Ipv4Addr::new(10, 0, 0, n % 4).into(),
        client_port: u16::from(n),
    }
}

fn backend_side(n: u8) -> BackendSide {
    BackendSide {
        protocol: 6,
        backend: Ipv4Addr::new(10, 1, 0, n % 2).into(),
        backend_port: 80,
        snat: "2001:db8::1".parse().unwrap(),
        snat_port: 1024 + u16::from(n),
    }
}

fn new(n: u8, first: Segment, bound: bool) -> NewFlow {
    NewFlow {
        client_side: client_side(n),
        backend_side: bound.then(|| backend_side(n)),
        backend: u32::from(n),
        first,
        idle: IDLE,
    }
}

fn expire_all(table: &mut FlowTable, now: BootTime) -> Vec<Flow> {
    let mut budget = usize::MAX;
    std::iter::from_fn(|| table.expire(now, &mut budget, |_| None)).collect()
}

#[test]
fn an_entry_stays_within_its_budget_of_memory() {
    assert!(size_of::<Option<Flow>>() <= 112, "{}", size_of::<Option<Flow>>());
}

#[test]
fn both_names_lead_to_the_flow_and_give_it_back_whole() {
    let mut table = FlowTable::new(8, 1);
    let id = table.insert(new(5, Segment::Syn, true), BootTime(7)).unwrap().id;
    assert_eq!(table.find(&client_side(5)), Some(id));
    assert_eq!(table.find_answered(&backend_side(5)), Some(id));
    assert_eq!(table.find(&client_side(8)), None);
    let flow = table.get(id);
    assert_eq!((flow.client_side(), flow.backend_side()), (client_side(5), Some(backend_side(5))));
    assert_eq!((flow.backend, flow.service(), flow.last_seen()), (5, 2, BootTime(7)));
}

#[test]
fn a_flood_of_syns_replaces_itself_and_no_established_flow() {
    let mut table = FlowTable::new(100, 1);
    for n in 0..60 {
        let id = table.insert(new(n, Segment::Syn, false), BootTime(0)).unwrap().id;
        table.touch(id, Segment::Tcp, Direction::ToBackend, IDLE, BootTime(0));
    }
    for port in 0..10_000u32 {
        let client = IpAddr::from(Ipv4Addr::from_bits(0xc0a8_0000 + port));
        let flood = NewFlow {
            client_side: ClientSide { service: 9, client, client_port: port as u16 },
            ..new(0, Segment::Syn, false)
        };
        table.insert(flood, BootTime(1)).unwrap();
    }
    assert_eq!(table.len(), 100);
    for n in 0..60 {
        assert!(table.find(&client_side(n)).is_some());
    }
}

#[test]
fn a_table_full_of_established_flows_refuses() {
    let mut table = FlowTable::new(2, 1);
    for n in 0..2 {
        let id = table.insert(new(n, Segment::Syn, false), BootTime(0)).unwrap().id;
        table.touch(id, Segment::Tcp, Direction::ToBackend, IDLE, BootTime(0));
    }
    assert_eq!(table.insert(new(2, Segment::Syn, false), BootTime(0)).unwrap_err(), TableFull);
    assert_eq!(table.len(), 2);
}

#[test]
fn a_day_of_idle_time_is_kept_to() {
    let mut table = FlowTable::new(2, 1);
    let day = Duration::from_secs(86_400);
    let id = table.insert(NewFlow { idle: day, ..new(1, Segment::Tcp, false) }, BootTime(SECOND)).unwrap().id;
    table.touch(id, Segment::Tcp, Direction::ToBackend, day, BootTime(SECOND));
    for hour in 0..24 {
        assert!(expire_all(&mut table, BootTime(hour * 3600 * SECOND)).is_empty());
    }
    assert_eq!(expire_all(&mut table, BootTime(86_402 * SECOND)).len(), 1);
    assert_eq!(table.next_deadline(), None);
}

#[test]
fn expiry_does_no_more_than_its_budget() {
    let mut table = FlowTable::new(200, 1);
    for n in 0..200 {
        table.insert(new(n, Segment::Syn, false), BootTime(0)).unwrap();
    }
    let late = BootTime(3600 * SECOND);
    let mut budget = 250;
    let mut first = 0;
    while table.expire(late, &mut budget, |_| None).is_some() {
        first += 1;
    }
    assert!(budget == 0 && first < 200, "{first} flows in 250 looks at flows and ticks");
    assert_eq!(expire_all(&mut table, late).len(), 200 - first);
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u8, Segment, bool),
    Touch(u8, Segment, Direction),
    Remove(u8),
    Pass(u64),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let segment = || {
        prop::sample::select(vec![
            Segment::Syn,
            Segment::Tcp,
            Segment::Tcp,
            Segment::Fin,
            Segment::Rst,
            Segment::Udp,
        ])
    };
    let direction = prop::sample::select(vec![Direction::ToBackend, Direction::ToClient]);
    let op = prop_oneof![
        4 => (0u8..24, segment(), any::<bool>()).prop_map(|(n, s, b)| Op::Insert(n, s, b)),
        6 => (0u8..24, segment(), direction).prop_map(|(n, s, d)| Op::Touch(n, s, d)),
        1 => (0u8..24).prop_map(Op::Remove),
        2 => (0u64..40 * SECOND).prop_map(Op::Pass),
    ];
    prop::collection::vec(op, 0..120)
}

/// What the model knows of a flow: its progress, when it was last seen, and since when it has been unassured.
struct Known {
    progress: Progress,
    seen: u64,
    unassured_since: usize,
    bound: bool,
}

impl Known {
    fn deadline(&self) -> u64 {
        self.seen + self.progress.state.idle(IDLE).as_nanos() as u64
    }
}

proptest! {
    /// Against a map that is searched through and through.
    #[test]
    fn behaves_like_a_map_with_idle_times(ops in ops()) {
        const MAX: usize = 12;
        const TICKS: u64 = 2 << 28;
        let mut table = FlowTable::new(MAX, 42);
        let mut model: HashMap<u8, Known> = HashMap::new();
        let mut now = SECOND;
        for (turn, op) in ops.into_iter().enumerate() {
            match op {
                Op::Insert(n, segment, bound) if !model.contains_key(&n) => {
                    let oldest = model
                        .iter()
                        .filter(|(_, k)| !k.progress.assured)
                        .min_by_key(|(_, k)| k.unassured_since)
                        .map(|(n, _)| *n);
                    let full = model.len() == MAX;
                    match table.insert(new(n, segment, bound), BootTime(now)) {
                        Ok(Inserted { evicted, .. }) => {
                            let evicted = evicted.map(|f| f.backend as u8);
                            prop_assert_eq!(evicted, if full { oldest } else { None });
                            if let Some(evicted) = evicted {
                                model.remove(&evicted);
                            }
                            let progress = Progress::new(segment, bound);
                            model.insert(n, Known { progress, seen: now, unassured_since: turn, bound });
                        }
                        Err(TableFull) => prop_assert!(full && oldest.is_none()),
                    }
                }
                Op::Touch(n, segment, direction) => {
                    if let Some(known) = model.get_mut(&n) {
                        let id = table.find(&client_side(n)).unwrap();
                        table.touch(id, segment, direction, IDLE, BootTime(now));
                        let was = known.progress.assured;
                        known.progress.advance(segment, direction);
                        known.seen = now;
                        if was && !known.progress.assured {
                            known.unassured_since = turn;
                        }
                        prop_assert_eq!(table.get(id).state(), known.progress.state);
                    }
                }
                Op::Remove(n) if model.remove(&n).is_some() => {
                    table.remove(table.find(&client_side(n)).unwrap());
                }
                Op::Insert(..) | Op::Remove(_) => {}
                Op::Pass(time) => {
                    now += time;
                    for gone in expire_all(&mut table, BootTime(now)) {
                        let known = model.remove(&(gone.backend as u8));
                        prop_assert!(known.is_some_and(|k| k.deadline() <= now), "forgotten too early");
                    }
                    for known in model.values() {
                        prop_assert!(known.deadline() + TICKS > now, "remembered too long");
                    }
                }
            }
            prop_assert_eq!(table.len(), model.len());
            prop_assert_eq!(table.iter().count(), model.len());
            for n in 0..24 {
                let known = model.get(&n);
                prop_assert_eq!(table.find(&client_side(n)).is_some(), known.is_some());
                prop_assert_eq!(
                    table.find_answered(&backend_side(n)).is_some(),
                    known.is_some_and(|k| k.bound)
                );
            }
        }
    }
}
