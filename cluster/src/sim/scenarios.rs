//! What the cluster does in the situations that it was built for. Each transcript stands in `transcripts/` and reads as
//! documentation; `UPDATE=1 cargo test` writes them anew.

use komainu_proto::domain::{
    Backend, DeadBackend, Document, GroupId, Health, HealthCheck, Mode, NodeId, Protocol, Role, Scheduler,
    Service, UdpFlows,
};

use super::machine::{Machine, Time};
use super::world::{MS, World};
use crate::api::Observation;
use crate::core::Request;
use crate::state::{Change, Command};
use crate::timing::Timing;

const G: GroupId = GroupId(1);
const PAIR_AND_WITNESS: [Role; 3] = [Role::Balancer, Role::Balancer, Role::Witness];

fn formed(seed: u64, roles: &[Role], groups: u32) -> World {
    super::faults::formed(seed, roles, groups).unwrap()
}

/// Runs for a while and tells the longest time in which nobody answered for the group.
fn longest_gap(w: &mut World, lasts: Time) -> Time {
    let (mut longest, mut since) = (0, None::<Time>);
    let end = w.t + lasts;
    // A lease ends without an event: look often.
    while w.t < end {
        w.run_for(MS / 10).unwrap();
        match (w.owner(G), since) {
            (None, None) => since = Some(w.t),
            (None, Some(at)) => longest = longest.max(w.t - at),
            (Some(_), _) => since = None,
        }
    }
    longest
}

fn told(w: &mut World, name: &str) {
    // Without the times: whatever happens a little earlier or later, this is the order in which it must happen.
    let lines: Vec<&str> =
        w.transcript.iter().map(|line| line.split_once(" ms  ").map_or(&**line, |l| l.1)).collect();
    let text = lines.join("\n") + "\n";
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/sim/transcripts")
        .join(format!("{name}.txt"));
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "the transcript differs from {}", path.display());
}

#[test]
fn an_election() {
    let mut w = formed(7, &PAIR_AND_WITNESS, 1);
    w.tell_from_here();
    let owner = w.owner(G).unwrap();
    w.kill(owner);
    w.run_for(500 * MS).unwrap();
    assert_ne!(w.owner(G).unwrap(), owner);
    told(&mut w, "election");
}

#[test]
fn a_hand_over() {
    let mut w = formed(7, &PAIR_AND_WITNESS, 1);
    w.tell_from_here();
    let owner = w.owner(G).unwrap();
    let leader = w.leader().unwrap();
    w.switchover(leader, "g0", None).unwrap();
    w.run_for(200 * MS).unwrap();
    assert_ne!(w.owner(G).unwrap(), owner);
    told(&mut w, "hand_over");
}

#[test]
fn leadership_follows_ownership() {
    let mut w = formed(7, &PAIR_AND_WITNESS, 1);
    let leader = w.leader().unwrap();
    w.switchover(leader, "g0", None).unwrap();
    w.run_for(200 * MS).unwrap();
    w.tell_from_here();
    let owner = w.owner(G).unwrap();
    assert_ne!(w.leader(), Some(owner));
    assert_eq!(longest_gap(&mut w, 5_000 * MS), 0);
    assert_eq!(w.leader(), Some(owner));
    told(&mut w, "leadership_follows_ownership");
}

#[test]
fn killing_the_owner_costs_an_election_and_little_more() {
    let mut gaps: Vec<Time> = (0..60)
        .map(|seed| {
            let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
            w.run_for(seed * 3 * MS / 2).unwrap();
            let owner = w.owner(G).unwrap();
            w.kill(owner);
            // The simulated lane outlives its process; the clients of a lane that doesn't see a longer gap.
            w.machine(owner).lane.clear();
            longest_gap(&mut w, 1_000 * MS)
        })
        .collect();
    gaps.sort_unstable();
    let (median, longest) = (gaps[gaps.len() / 2] / MS, gaps[gaps.len() - 1] / MS);
    println!("median {median} ms, longest {longest} ms");
    assert!(median <= 190 && longest <= 250, "median {median} ms, longest {longest} ms");
}

#[test]
fn killing_anybody_else_disturbs_nothing() {
    for seed in 0..10 {
        for victim in [0, 1] {
            let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
            let owner = w.owner(G).unwrap();
            assert!(w.run_until(w.t + 5_000 * MS, |w| w.leader() == Some(owner)).unwrap());
            let victim = [1, 2, 3].into_iter().filter(|n| *n != owner).nth(victim).unwrap();
            w.kill(victim);
            assert_eq!(longest_gap(&mut w, 1_500 * MS), 0, "seed {seed}");
            w.start(victim).unwrap();
            assert_eq!(longest_gap(&mut w, 1_500 * MS), 0, "seed {seed}");
            assert_eq!(w.owner(G), Some(owner));
        }
    }
}

#[test]
fn an_owner_that_is_cut_off_is_silent_within_its_lease() {
    for seed in 0..10 {
        let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
        let owner = w.owner(G).unwrap();
        for other in (1..=3).filter(|n| *n != owner) {
            w.cut.extend([(owner, other), (other, owner)]);
        }
        w.run_for(81 * MS).unwrap();
        assert_ne!(w.owner(G), Some(owner), "seed {seed}");
        w.run_for(300 * MS).unwrap();
        assert!(w.owner(G).is_some_and(|n| n != owner), "seed {seed}");
        w.cut.clear();
        assert_eq!(longest_gap(&mut w, 1_000 * MS), 0, "seed {seed}");
    }
}

/// Found by the system test of one-way cuts: such an owner's beats went on, so the new leader took it for alive and
/// left its group with it, although no grant could reach it any more.
#[test]
fn an_owner_that_hears_nobody_but_is_heard_loses_its_group() {
    for seed in 0..10 {
        let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
        let owner = w.owner(G).unwrap();
        for other in (1..=3).filter(|n| *n != owner) {
            w.cut.insert((other, owner));
        }
        w.run_for(81 * MS).unwrap();
        assert_ne!(w.owner(G), Some(owner), "seed {seed}");
        w.run_for(1_500 * MS).unwrap();
        assert!(w.owner(G).is_some_and(|n| n != owner), "seed {seed}");
        w.cut.clear();
        assert_eq!(longest_gap(&mut w, 1_000 * MS), 0, "seed {seed}");
    }
}

#[test]
fn a_hand_over_leaves_no_hole() {
    for seed in 0..20 {
        let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
        let owner = w.owner(G).unwrap();
        let leader = w.leader().unwrap();
        w.switchover(leader, "g0", None).unwrap();
        let gap = longest_gap(&mut w, 300 * MS);
        assert!(gap <= 25 * MS, "seed {seed}: nobody answers for {} ms", gap / MS);
        let new = w.owner(G).unwrap();
        assert_ne!(new, owner);
        // The old owner goes on forwarding for a while, and only for a while.
        let forwards = |m: &Machine, t| m.lane.get(&G).is_some_and(|l| l.forward_until > m.clock(t));
        assert!(forwards(&w.machines[&owner], w.t));
        w.run_for(1_200 * MS).unwrap();
        assert!(!forwards(&w.machines[&owner], w.t));
    }
}

#[test]
fn an_unfit_owner_gives_its_group_away() {
    let mut w = formed(3, &PAIR_AND_WITNESS, 1);
    let owner = w.owner(G).unwrap();
    w.set_fit(owner, false).unwrap();
    let gap = longest_gap(&mut w, 500 * MS);
    assert!(w.owner(G).is_some_and(|n| n != owner));
    assert!(gap <= 25 * MS, "{gap}");
    // Better an unfit owner than none.
    let other = w.owner(G).unwrap();
    w.set_fit(other, false).unwrap();
    assert_eq!(longest_gap(&mut w, 500 * MS), 0);
}

#[test]
fn stopping_the_owner_hands_everything_over_first() {
    for seed in 0..20 {
        for stopped in 1..=3 {
            let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
            w.run_for(seed * 150 * MS).unwrap();
            w.process(stopped).unwrap().pulse.lock().unwrap().set_resigning(true);
            let t = w.t;
            let mut gap = 0;
            while !w.process(stopped).unwrap().core.has_resigned() {
                gap = gap.max(longest_gap(&mut w, 20 * MS));
                assert!(w.t < t + 4_000 * MS, "seed {seed}, n{stopped}:\n{}", w.transcript.join("\n"));
            }
            w.kill(stopped);
            w.machine(stopped).lane.clear();
            gap = gap.max(longest_gap(&mut w, 1_000 * MS));
            assert!(
                gap <= 30 * MS,
                "seed {seed}, n{stopped}: nobody answers for {} ms\n{}",
                gap / MS,
                w.transcript.join("\n")
            );
        }
    }
}

#[test]
fn a_single_node_needs_nobody() {
    let mut w = World::new(1, &[Role::Balancer], Timing::default());
    w.start(1).unwrap();
    w.run_for(50 * MS).unwrap();
    w.change(1, 1).unwrap();
    assert!(w.run_until(w.t + 100 * MS, |w| w.owner(G) == Some(1)).unwrap());
    assert_eq!(longest_gap(&mut w, 1_000 * MS), 0);
    // It is back as soon as it is started again: there is nobody whose lease it would have to wait for.
    w.kill(1);
    w.machine(1).lane.clear();
    w.start(1).unwrap();
    assert!(longest_gap(&mut w, 500 * MS) < 30 * MS);
    assert_eq!(w.owner(G), Some(1));
}

#[test]
fn a_majority_forms_the_cluster_and_the_rest_joins() {
    let mut w = World::new(5, &PAIR_AND_WITNESS, Timing::default());
    w.start(3).unwrap();
    w.run_for(2_000 * MS).unwrap();
    assert!(w.process(3).unwrap().core.is_empty());
    w.start(2).unwrap();
    w.run_for(1_000 * MS).unwrap();
    assert_eq!(w.process(2).unwrap().core.voters().count(), 2);
    w.start(1).unwrap();
    w.run_for(1_000 * MS).unwrap();
    assert_eq!(w.process(1).unwrap().core.voters().count(), 3);
}

#[test]
fn a_node_that_lost_its_disk_comes_back_as_another_voter() {
    for lost in 1..=3 {
        let mut w = formed(11, &PAIR_AND_WITNESS, 1);
        let before = w.process(lost).unwrap().core.raft_id();
        w.power_off(lost);
        w.machine(lost).disk.lose_everything();
        w.start(lost).unwrap();
        w.run_for(2_000 * MS).unwrap();
        let p = w.process(lost).unwrap();
        let voters: Vec<_> = p.core.voters().collect();
        assert_eq!(voters.len(), 3);
        assert!(voters.contains(&p.core.raft_id()) && !voters.contains(&before));
        assert!(w.owner(G).is_some());
    }
}

#[test]
fn nodes_join_and_leave_while_running() {
    let mut w = formed(2, &PAIR_AND_WITNESS, 2);
    // A fourth machine that only itself knows of.
    let four = Machine::new(4, Role::Balancer, &[1, 2, 3, 4], Timing::default());
    let identity = four.identity.clone();
    w.machines.insert(4, four);
    w.start(4).unwrap();
    w.run_for(500 * MS).unwrap();
    assert_eq!(w.process(1).unwrap().core.voters().count(), 3, "nobody asked for it");
    let leader = w.leader().unwrap();
    w.request(leader, Request::Join(identity)).unwrap();
    w.run_for(1_000 * MS).unwrap();
    assert_eq!(w.process(4).unwrap().core.voters().count(), 4);
    // The two first balancers leave, whoever of them leads.
    for gone in [1, 2] {
        for _ in 0..3 {
            let leader = w.leader().unwrap();
            w.request(leader, Request::Leave(NodeId(gone))).unwrap();
            w.run_for(3_000 * MS).unwrap();
        }
        assert!(
            w.process(4).unwrap().core.voters().all(|v| v.node().0 != gone),
            "{}",
            w.transcript.join("\n")
        );
        w.kill(gone);
    }
    w.run_for(500 * MS).unwrap();
    assert_eq!((w.owner(G), w.owner(GroupId(2))), (Some(4), Some(4)));
    // One that has left stays out although it still has its store.
    w.start(1).unwrap();
    w.run_for(1_000 * MS).unwrap();
    assert_eq!(w.process(4).unwrap().core.voters().count(), 2);
}

#[test]
fn the_whole_cluster_comes_back_with_what_it_knew() {
    let mut w = formed(4, &PAIR_AND_WITNESS, 3);
    for id in 1..=3 {
        w.power_off(id);
    }
    for id in 1..=3 {
        w.start(id).unwrap();
    }
    w.run_for(1_000 * MS).unwrap();
    assert!((1..=3).all(|g| w.owner(GroupId(g)).is_some()));
    let state = w.process(1).unwrap().core.state().clone();
    w.checker.nothing_lost(&state).unwrap();
}

/// One service with two backends in `g0`.
fn document_with_backends() -> Document {
    let backend = |n: u8| Backend {
        name: format!("be{n}"),
        address: std::net::IpAddr::from([10, 9, 0, n]),
        port: 80,
        weight: 1,
        admin: None,
    };
    let mut document = super::world::document(1, 1);
    document.services.push(Service {
        name: "web".to_owned(),
        group: "g0".to_owned(),
        vip: document.groups[0].vips[0],
        port: 80,
        protocol: Protocol::Tcp,
        mode: Mode::Dsr,
        scheduler: Scheduler::Maglev,
        dead_backend: DeadBackend::Reset,
        udp_flows: UdpFlows::Table,
        tcp_idle_ms: 1000,
        udp_idle_ms: 1000,
        health: HealthCheck::default(),
        backends: vec![backend(1), backend(2)],
    });
    document
}

#[test]
fn the_owners_view_of_a_backend_is_the_clusters() {
    let mut w = formed(9, &PAIR_AND_WITNESS, 1);
    let leader = w.leader().unwrap();
    let change =
        Change::Apply { document: document_with_backends(), if_revision: None, confirm_within_ms: None };
    let command = Command { id: None, who: "operator".to_owned(), wall_ms: 0, change };
    w.request(leader, Request::Command(Box::new(command))).unwrap();
    w.run_for(200 * MS).unwrap();
    let owner = w.owner(G).unwrap();
    let other = 3 - owner;
    let health = |w: &World, node: u64| {
        let state = w.process(node).unwrap().core.state().clone();
        let service = state.service_named("web").unwrap().clone();
        let backend = service.backend_named("be1").unwrap();
        (backend.id, service.health(backend))
    };
    let (backend, first) = health(&w, 3);
    assert_eq!(first, Health::Unknown);
    let observe = |w: &mut World, node: u64, health: Health| {
        let o = Observation { backend, health, reason: "seen".to_owned() };
        w.process(node).unwrap().pulse.lock().unwrap().set_observation(o);
        w.run_for(100 * MS).unwrap();
    };
    // Anybody's first view is better than none; then the owner's counts, and the other's does not.
    observe(&mut w, other, Health::Up);
    assert_eq!(health(&w, 3).1, Health::Up);
    observe(&mut w, other, Health::Down);
    assert_eq!(health(&w, 3).1, Health::Up);
    observe(&mut w, owner, Health::Down);
    assert_eq!(health(&w, 3).1, Health::Down);
    observe(&mut w, owner, Health::Up);
    assert_eq!(health(&w, 3).1, Health::Up);
    // Once the owner is gone, the other is the owner.
    w.kill(owner);
    w.run_for(500 * MS).unwrap();
    assert_eq!(health(&w, 3).1, Health::Down);
    // The transition that the changes opened ends by itself when every older flow must be gone.
    observe(&mut w, other, Health::Up);
    w.run_for(3_000 * MS).unwrap();
    let state = w.process(3).unwrap().core.state().clone();
    assert_eq!(state.service_named("web").unwrap().transition, None);
}

#[test]
fn addresses_that_left_a_group_become_free() {
    let mut w = formed(9, &PAIR_AND_WITNESS, 2);
    let leader = w.leader().unwrap();
    w.change(leader, 2).unwrap();
    w.run_for(1_000 * MS).unwrap();
    assert_eq!(w.process(leader).unwrap().core.state().held, []);
    // Also when whoever answered for them died with them.
    let owner = w.owner(G).unwrap();
    w.change(leader, 2).unwrap();
    w.power_off(owner);
    w.run_for(1_500 * MS).unwrap();
    let leader = w.leader().unwrap();
    w.change(leader, 2).unwrap();
    w.run_for(1_500 * MS).unwrap();
    assert_eq!(w.process(leader).unwrap().core.state().held, []);
}
