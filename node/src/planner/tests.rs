//! The plan through a service's life, by applying real commands to a real state.

use komainu_cluster::state::{Change, Command, Verdict};
use komainu_proto::domain::{
    AdminState, Backend, BackendId, CheckType, DEFAULT_TCP_IDLE_MS, DEFAULT_UDP_IDLE_MS, Document, Group,
    Health, HealthCheck, Service, UdpFlows,
};
use proptest::prelude::*;

use super::*;

fn backend(n: u8) -> Backend {
    Backend {
        name: format!("be{n}"),
        address: IpAddr::from([192, 0, 2, 10 + n]),
        port: 80,
        weight: 1,
        admin: None,
    }
}

fn document(kind: CheckType, mode: domain::Mode, backends: u8) -> Document {
    Document {
        groups: vec![Group {
            name: "web".to_owned(),
            vips: vec![IpAddr::from([192, 0, 2, 100])],
            inside_vips: vec![],
            snat: vec![IpAddr::from([192, 0, 2, 101])],
            prefer: None,
            preempt: false,
        }],
        services: vec![Service {
            name: "web".to_owned(),
            group: "web".to_owned(),
            vip: IpAddr::from([192, 0, 2, 100]),
            port: 80,
            protocol: domain::Protocol::Tcp,
            mode,
            scheduler: domain::Scheduler::Maglev,
            dead_backend: domain::DeadBackend::Reset,
            udp_flows: UdpFlows::Table,
            tcp_idle_ms: DEFAULT_TCP_IDLE_MS,
            udp_idle_ms: DEFAULT_UDP_IDLE_MS,
            health: HealthCheck { kind, ..HealthCheck::default() },
            backends: (1..=backends).map(backend).collect(),
        }],
    }
}

struct World(State);

impl World {
    fn new(kind: CheckType) -> World {
        let mut world = World(State::default());
        world.apply(document(kind, domain::Mode::Nat, 3));
        world
    }

    fn change(&mut self, change: Change) {
        let index = self.0.index + 1;
        self.0.apply(index, &Command::own(0, change)).unwrap();
    }

    fn apply(&mut self, document: Document) {
        self.change(Change::Apply { document, if_revision: None, confirm_within_ms: None });
    }

    fn health(&mut self, of: &[(u32, Health)]) {
        let verdicts = of.iter().map(|(id, health)| Verdict {
            backend: BackendId(*id),
            health: *health,
            reason: String::new(),
        });
        self.change(Change::Health { verdicts: verdicts.collect() });
    }

    fn admin(&mut self, name: &str, admin: AdminState) {
        self.change(Change::BackendAdmin {
            service: "web".to_owned(),
            backend: name.to_owned(),
            admin,
            deadline_ms: None,
        });
    }

    fn service(&self) -> ServicePlan {
        plan(&self.0).plan.services.remove(0)
    }

    /// `name weight/base`, with `†` where it isn't alive.
    fn table(&self) -> String {
        let words =
            self.service().backends.into_iter().map(|b| {
                format!("{} {}/{}{}", b.name, b.weight, b.base_weight, if b.alive { "" } else { "†" })
            });
        words.collect::<Vec<_>>().join(", ")
    }

    fn ids(&self) -> Vec<u32> {
        self.service().backends.iter().map(|b| b.id).collect()
    }

    fn all_up() -> World {
        let mut world = World::new(CheckType::Http);
        let ids = world.ids();
        world.health(&ids.iter().map(|id| (*id, Health::Up)).collect::<Vec<_>>());
        let service = world.0.services[0].id;
        if let Some(t) = world.0.services[0].transition {
            world.change(Change::Settle { service, changed_index: t.changed_index });
        }
        world
    }
}

#[test]
fn unchecked_backends_take_flows_at_once_and_unknown_ones_none() {
    assert_eq!(World::new(CheckType::None).table(), "be1 1/1, be2 1/1, be3 1/1");
    assert_eq!(World::new(CheckType::Http).table(), "be1 0/0, be2 0/0, be3 0/0");
    assert_eq!(World::all_up().table(), "be1 1/1, be2 1/1, be3 1/1");
}

#[test]
fn a_draining_backend_keeps_its_flows_and_takes_no_new_ones() {
    let mut world = World::all_up();
    world.admin("be2", AdminState::Draining);
    assert_eq!(world.table(), "be1 1/1, be2 0/1, be3 1/1");
    assert!(!world.service().consult_all_slots);
    world.admin("be2", AdminState::Disabled);
    assert_eq!(world.table(), "be1 1/1, be2 0/1†, be3 1/1");
}

#[test]
fn a_dead_backend_is_in_the_base_table_but_not_alive() {
    let mut world = World::all_up();
    let ids = world.ids();
    world.health(&[(ids[0], Health::Down)]);
    assert_eq!(world.table(), "be1 0/1†, be2 1/1, be3 1/1");
    world.health(&[(ids[0], Health::Up)]);
    assert_eq!(world.table(), "be1 1/1, be2 1/1, be3 1/1");
    assert!(world.service().consult_all_slots, "flows of the time in between may be remembered anywhere");
}

#[test]
fn weights_change_the_current_table_only() {
    let mut world = World::all_up();
    for (weight, expected) in [(5, "be1 5/1, be2 1/1, be3 1/1"), (0, "be1 0/1, be2 1/1, be3 1/1")] {
        world.change(Change::BackendWeight { service: "web".to_owned(), backend: "be1".to_owned(), weight });
        assert_eq!(world.table(), expected);
    }
}

#[test]
fn an_added_backend_waits_for_its_check_and_a_removed_one_stays_in_the_base() {
    let mut world = World::all_up();
    world.change(Change::BackendAdd { service: "web".to_owned(), backend: backend(4) });
    assert_eq!(world.table(), "be1 1/1, be2 1/1, be3 1/1, be4 0/0");
    world.change(Change::BackendRemove { service: "web".to_owned(), backend: "be1".to_owned() });
    assert_eq!(world.table(), "be2 1/1, be3 1/1, be4 0/0, be1 0/1†");
    let (service, t) = (world.0.services[0].id, world.0.services[0].transition.unwrap());
    world.change(Change::Settle { service, changed_index: t.changed_index });
    assert_eq!(world.table(), "be2 1/1, be3 1/1, be4 0/0");
}

#[test]
fn the_revision_is_the_index_and_nothing_else_changes_with_it() {
    let mut world = World::all_up();
    let before = plan(&world.0).plan;
    world.0.advance(world.0.index + 1);
    let after = plan(&world.0).plan;
    assert_eq!(after.revision, before.revision + 1);
    assert_eq!(Plan { revision: before.revision, ..after }, before);
}

#[test]
fn a_mode_of_a_newer_version_leaves_out_its_service_only() {
    let mut world = World::all_up();
    let mut other = (*world.0.services[0]).clone();
    other.config.mode = domain::Mode::Tunnel;
    other.config.name = "far".to_owned();
    world.0.services.push(other.into());
    let planned = plan(&world.0);
    assert_eq!(planned.plan.services.len(), 1);
    assert_eq!(planned.omitted.len(), 1);
    assert!(planned.omitted[0].contains("\"far\"") && planned.omitted[0].contains("tunnel"));
}

#[test]
fn a_dsr_backend_behind_a_router_is_named() {
    let mut world = World(State::default());
    world.apply(document(CheckType::None, domain::Mode::Dsr, 2));
    let address = |last| IpAddr::from([192, 0, 2, last]);
    assert_eq!(off_segment(&world.0, &[(address(1), 24)]), Vec::<String>::new());
    let off = off_segment(&world.0, &[(address(10), 31), (IpAddr::from([0; 16]), 0)]);
    assert_eq!(off.len(), 1, "{off:?}");
    assert!(off[0].starts_with("web/be2: 192.0.2.12") && off[0].contains("\"nat\" can"));
    assert_eq!(off_segment(&world.0, &[]).len(), 2);
    assert_eq!(off_segment(&World::all_up().0, &[]).len(), 0, "only dsr needs it");
}

#[test]
fn prefixes_are_compared_bit_by_bit() {
    let v4 = |a: [u8; 4]| IpAddr::from(a);
    assert!(same_prefix(v4([10, 0, 0, 1]), v4([10, 0, 0, 254]), 24));
    assert!(!same_prefix(v4([10, 0, 0, 1]), v4([10, 0, 1, 1]), 24));
    assert!(same_prefix(v4([10, 0, 0, 1]), v4([99, 0, 1, 1]), 0));
    assert!(!same_prefix(v4([10, 0, 0, 1]), v4([10, 0, 0, 0]), 32));
    assert!(!same_prefix(v4([0, 0, 0, 0]), IpAddr::from([0; 16]), 0), "another family");
}

proptest! {
    /// The same log gives the same plan, also by way of a snapshot.
    #[test]
    fn same_state_same_plan(steps in proptest::collection::vec((0u8..4, 0usize..3, 0u32..5), 0..40)) {
        let run = || {
            let mut world = World::all_up();
            let ids = world.ids();
            for (what, which, weight) in &steps {
                let name = format!("be{}", which + 1);
                match what {
                    0 => world.health(&[(ids[*which], if *weight > 2 { Health::Up } else { Health::Down })]),
                    1 => world.admin(&name, AdminState::ALL[*weight as usize % 3]),
                    2 => world.change(Change::BackendWeight { service: "web".to_owned(), backend: name, weight: *weight }),
                    _ => {
                        let (service, t) = (world.0.services[0].id, world.0.services[0].transition);
                        if let Some(t) = t {
                            world.change(Change::Settle { service, changed_index: t.changed_index });
                        }
                    }
                }
            }
            world.0
        };
        let state = run();
        let restored = State::decode(&state.encode()).unwrap();
        prop_assert_eq!(plan(&state), plan(&run()));
        prop_assert_eq!(plan(&state), plan(&restored));
        // What an operator took out takes no new flow, whatever else happened.
        for (b, p) in state.services[0].backends.iter().zip(&plan(&state).plan.services[0].backends) {
            prop_assert!(b.admin == AdminState::Enabled || p.weight == 0);
            prop_assert!(p.weight == 0 || p.alive);
        }
    }
}
