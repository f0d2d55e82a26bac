//! Random commands: invariants hold after each.

use std::collections::{BTreeMap, BTreeSet};

use komainu_proto::domain::{BackendId, GroupId, ServiceId};
use proptest::prelude::*;

use super::*;

fn any_admin() -> impl Strategy<Value = AdminState> {
    prop::sample::select(AdminState::ALL)
}

/// Few names and addresses, so that they meet.
fn any_backend() -> impl Strategy<Value = Backend> {
    (0u8..5, 0u8..5, 0u32..3, prop::option::weighted(0.2, any_admin())).prop_map(
        |(name, address, weight, admin)| Backend {
            weight,
            admin,
            ..backend(&format!("be{name}"), address + 1)
        },
    )
}

fn any_service() -> impl Strategy<Value = Service> {
    let mode = prop::sample::select(vec![Mode::Nat, Mode::Nat, Mode::NatTransparent, Mode::Dsr]);
    let backends = prop::collection::btree_map(0u8..5, any_backend(), 0..5);
    (0u8..3, 0u8..3, 80u16..83, mode, any::<[bool; 3]>(), backends).prop_map(
        |(name, group, port, mode, [udp, hash, checked], backends)| {
            let mut s = Service {
                mode,
                protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
                udp_flows: if hash { UdpFlows::Hash } else { UdpFlows::Table },
                health: HealthCheck {
                    kind: if checked { CheckType::Tcp } else { CheckType::None },
                    ..HealthCheck::default()
                },
                // Mostly a name of its own each.
                backends: backends
                    .into_iter()
                    .map(|(i, b)| Backend { name: format!("be{i}"), ..b })
                    .collect(),
                ..service(&format!("s{name}"), &format!("g{group}"), 100 + group, port)
            };
            if mode == Mode::Dsr {
                s.backends.iter_mut().for_each(|b| b.port = port);
            }
            s
        },
    )
}

fn any_document() -> impl Strategy<Value = Document> {
    // Mostly all groups with their own addresses; sometimes one has another's.
    let groups = prop_oneof![
        4 => Just(vec![(0, 0), (1, 1), (2, 2)]),
        1 => prop::collection::btree_map(0u8..3, 0u8..3, 1..4).prop_map(|m| m.into_iter().collect::<Vec<_>>()),
    ];
    let services = prop_oneof![
        4 => prop::collection::btree_map(0u8..3, any_service(), 0..4).prop_map(|services| {
            services.into_iter().map(|(i, s)| Service { name: format!("s{i}"), ..s }).collect::<Vec<_>>()
        }),
        1 => prop::collection::vec(any_service(), 0..4),
    ];
    (groups, services).prop_map(|(groups, services)| Document {
        groups: groups.into_iter().map(|(name, address)| group(&format!("g{name}"), 100 + address)).collect(),
        services,
    })
}

fn any_health() -> impl Strategy<Value = Health> {
    prop::sample::select(Health::ALL)
}

fn any_change() -> impl Strategy<Value = Change> {
    let name = || (0u8..3).prop_map(|i| format!("s{i}"));
    let be = || (0u8..5).prop_map(|i| format!("be{i}"));
    let ms = || prop::option::of(500u64..3000);
    let id = 1u32..12;
    prop_oneof![
        4 => (any_document(), prop::option::weighted(0.1, 0u64..6), prop::option::weighted(0.2, 500u64..3000)).prop_map(
            |(document, if_revision, confirm_within_ms)| Change::Apply { document, if_revision, confirm_within_ms }),
        1 => (0u64..8).prop_map(|revision| Change::Confirm { revision }),
        1 => (0u64..8).prop_map(|revision| Change::Rollback { revision }),
        1 => (0u64..8).prop_map(|revision| Change::Restore { revision }),
        1 => any_service().prop_map(|service| Change::ServiceAdd { service }),
        1 => name().prop_map(|service| Change::ServiceRemove { service }),
        2 => (name(), any_backend()).prop_map(|(service, backend)| Change::BackendAdd { service, backend }),
        2 => (name(), be()).prop_map(|(service, backend)| Change::BackendRemove { service, backend }),
        2 => (name(), be(), 0u32..3).prop_map(|(service, backend, weight)| Change::BackendWeight { service, backend, weight }),
        4 => (name(), be(), any_admin(), ms()).prop_map(|(service, backend, admin, deadline_ms)| Change::BackendAdmin {
            service, backend, admin, deadline_ms }),
        1 => (id.clone(), 0u64..40).prop_map(|(b, started_index)| Change::DrainExpired { backend: BackendId(b), started_index }),
        6 => prop::collection::vec((id.clone(), any_health()), 1..6).prop_map(|v| Change::Health {
            verdicts: v.into_iter().map(|(b, health)| Verdict { backend: BackendId(b), health, reason: "r".into() }).collect() }),
        4 => (1u32..5, 1u64..4, 1u64..6).prop_map(|(g, n, epoch)| Change::Assign { group: GroupId(g), node: NodeId(n), epoch }),
        1 => (1u32..5, 1u64..6).prop_map(|(g, epoch)| Change::Release { group: GroupId(g), epoch }),
        2 => (1u32..6, 0u64..40).prop_map(|(s, changed_index)| Change::Settle { service: ServiceId(s), changed_index }),
        1 => (1u64..4, 0u64..40).prop_map(|(n, up_to_index)| Change::Free { node: NodeId(n), up_to_index }),
        1 => ("g[0-3]", prop::option::of(1u64..4)).prop_map(|(group, to)| Change::Switchover { group, to: to.map(NodeId) }),
    ]
}

/// Whatever was given out: numbers rise, and none is ever seen again after it was gone.
#[derive(Default)]
struct Seen {
    backends: BTreeSet<u32>,
    gone: BTreeSet<u32>,
    epochs: BTreeMap<GroupId, u64>,
}

fn check(state: &State, seen: &mut Seen) -> Result<(), TestCaseError> {
    // What is in force would be accepted again (but for addresses that just changed hands).
    prop_assert_eq!(
        validate(&state.document(), &Context::default()).map_err(|p| format!("{p:?}")),
        Ok(vec![])
    );
    prop_assert!(
        state.history.back().is_none_or(|r| r.revision == state.revision && r.document == state.document())
    );
    let read_back = State::decode(&state.encode());
    prop_assert_eq!(read_back.as_ref(), Ok(state));
    let now: BTreeSet<u32> = state.services.iter().flat_map(|s| &s.backends).map(|b| b.id.0).collect();
    let count: usize = state.services.iter().map(|s| s.backends.len()).sum();
    prop_assert_eq!(now.len(), count, "a number stands for one backend");
    prop_assert!(now.is_disjoint(&seen.gone), "numbers are never used again");
    seen.gone.extend(seen.backends.difference(&now));
    seen.backends = now;
    let mut cells = BTreeSet::new();
    for g in &state.groups {
        prop_assert!(cells.insert(g.id.0 % 256), "a lease cell of its own");
        let epoch = seen.epochs.entry(g.id).or_default();
        prop_assert!(g.epoch >= *epoch, "epochs rise");
        *epoch = g.epoch;
        // Nobody else may still answer for an address that somebody owns now.
        for held in state.held.iter().filter(|h| g.addresses().any(|a| a == h.address)) {
            prop_assert!(g.owner.is_none_or(|owner| owner == held.node) || g.assigned_index > held.index);
        }
    }
    for s in &state.services {
        prop_assert_eq!(state.group(s.group).map(|g| &g.config.name), Some(&s.config.group));
        prop_assert!(s.backends.is_sorted_by_key(|b| b.gone), "those that are gone stand last");
        for b in &s.backends {
            prop_assert_eq!(b.drain.is_some(), !b.gone && b.admin == AdminState::Draining);
            if s.transition.is_none() {
                prop_assert_eq!(s.weight(b), b.base_weight, "settled: the base is what is in force");
                prop_assert!(!b.gone);
            }
            prop_assert!(!b.gone || (s.weight(b) == 0 && b.base_weight > 0 && !s.alive(b)));
        }
        prop_assert!(
            s.transition.is_none()
                || s.backends.iter().any(|b| b.base_weight > 0)
                || s.backends.is_empty()
                || s.transition.is_some_and(|t| t.changes > 0)
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_commands_keep_the_invariants(changes in prop::collection::vec(any_change(), 1..40)) {
        let mut m = Machine::new();
        let mut seen = Seen::default();
        let mut replayed = State::default();
        let mut log = Vec::new();
        for (i, role) in [(1, Role::Balancer), (2, Role::Balancer), (3, Role::Witness)] {
            let change = Change::MemberPut { member: member(i, role) };
            log.push(Command { id: None, who: "admin".into(), wall_ms: WALL_MS + 10 * log.len() as u64 + 10, change });
        }
        for change in changes {
            let before = m.state.clone();
            let dry = match &change {
                Change::Apply { document, .. } => Some(m.state.check(document)),
                _ => None,
            };
            let result = m.apply(change.clone());
            log.push(Command { id: None, who: "admin".into(), wall_ms: m.wall_ms, change });
            match &result {
                Ok(outcome) => {
                    let changed = State { index: before.index, ..m.state.clone() } != before;
                    prop_assert_eq!(changed, outcome.changed);
                    prop_assert!(m.state.revision - before.revision <= 1);
                    prop_assert_eq!(outcome.revision, m.state.revision);
                    if let Some(dry) = dry {
                        prop_assert_eq!(dry.map(|d| d.lines), Ok(outcome.diff.lines.clone()), "a dry run tells the truth");
                    }
                }
                Err(refusal) => {
                    prop_assert_eq!(&State { index: before.index, ..m.state.clone() }, &before);
                    if let (Some(dry), Refusal::Invalid(problems)) = (dry, refusal) {
                        prop_assert_eq!(dry.err(), Some(problems.clone()));
                    }
                }
            }
            check(&m.state, &mut seen)?;
        }
        // The same log gives the same bytes, also on a node that began with a snapshot in the middle.
        let middle = log.len() / 2;
        for (i, command) in log.iter().enumerate() {
            if i == middle {
                replayed = State::decode(&replayed.encode()).expect("reads");
            }
            let _ = replayed.apply(i as u64 + 1, command);
        }
        prop_assert_eq!(replayed.encode(), m.state.encode());
    }
}
