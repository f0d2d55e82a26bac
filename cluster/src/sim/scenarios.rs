//! What the cluster does in the situations that it was built for. Each transcript stands in `transcripts/` and reads as
//! documentation; `UPDATE=1 cargo test` writes them anew.

use komainu_proto::domain::{GroupId, NodeId, Role};

use super::machine::{Machine, Time};
use super::world::{MS, Weather, World};
use crate::api::NodeIdentity;
use crate::core::Request;
use crate::rules::Rule;
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

/// How long nobody answers after the owner's process has died, for many seeds, the shortest first.
fn gaps_after_death(die: impl Fn(&mut World, u64)) -> Vec<Time> {
    let gap = |seed: u64| {
        let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
        w.run_for(seed * 3 * MS / 2).unwrap();
        let owner = w.owner(G).unwrap();
        die(&mut w, owner);
        w.machine(owner).lane.clear();
        let gap = longest_gap(&mut w, 1_000 * MS);
        assert!(w.owner(G).is_some_and(|n| n != owner), "seed {seed}");
        gap
    };
    let mut gaps: Vec<Time> = (0..60).map(gap).collect();
    gaps.sort_unstable();
    println!("median {} ms, longest {} ms", gaps[30] / MS, gaps[59] / MS);
    gaps
}

#[test]
fn a_death_that_is_told_costs_no_promise() {
    let gaps = gaps_after_death(|w, owner| w.kill_and_tell(owner, MS / 5));
    assert!(gaps[30] <= 30 * MS && gaps[59] <= 60 * MS, "{gaps:?}");
}

#[test]
fn the_word_of_a_death_may_be_lost_on_its_way_to_one_voter() {
    let gaps = gaps_after_death(|w, owner| {
        w.cut.insert((owner, 3));
        w.kill_and_tell(owner, MS / 5);
    });
    assert!(gaps[59] <= 250 * MS, "{gaps:?}");
}

/// Both balancers own a group: the dead leader had granted one to the other, so the promise stands.
#[test]
fn a_death_takes_no_group_from_a_living_owner() {
    for seed in 0..20 {
        let mut w = formed(seed, &PAIR_AND_WITNESS, 2);
        let leader = w.leader().unwrap();
        let other = 3 - leader;
        if leader > 2 {
            continue;
        }
        w.switchover(leader, "g0", Some(leader)).unwrap();
        w.switchover(leader, "g1", Some(other)).unwrap();
        w.run_for(1_500 * MS).unwrap();
        let (own, others) = (GroupId(1), GroupId(2));
        assert_eq!((w.owner(own), w.owner(others)), (Some(leader), Some(other)), "seed {seed}");
        w.kill_and_tell(leader, MS / 5);
        w.run_for(1_000 * MS).unwrap();
        assert_eq!((w.owner(own), w.owner(others)), (Some(other), Some(other)), "seed {seed}");
    }
}

/// A leader dies that had granted a group to a node which its successor can't hear. Answers whether all went well.
fn leader_dies_and_an_owner_is_cut_from_its_successor(seed: u64) -> Result<(), String> {
    let roles = [Role::Balancer, Role::Balancer, Role::Witness, Role::Balancer, Role::Witness];
    let mut w = formed(seed, &roles, 3);
    let Some(leader) = w.leader().filter(|l| [1, 2, 4].contains(l)) else { return Ok(()) };
    let others: Vec<u64> = [1, 2, 4].into_iter().filter(|n| *n != leader).collect();
    for (group, to) in ["g0", "g1", "g2"].into_iter().zip([leader, others[0], others[1]]) {
        w.switchover(leader, group, Some(to))?;
    }
    w.run_for(1_500 * MS)?;
    w.cut.extend([(others[0], others[1]), (others[1], others[0])]);
    w.run_for(70 * MS)?;
    w.kill_and_tell(leader, MS / 5);
    w.run_for(1_000 * MS)
}

#[test]
fn what_a_dead_leader_had_granted_to_others_is_waited_for() {
    let all = || (0..20).try_for_each(leader_dies_and_an_owner_is_cut_from_its_successor);
    assert_eq!(all(), Ok(()));
    let broken = Rule::NothingGranted.broken(all);
    assert!(broken.is_err_and(|e| e.contains("is answered for by")), "a breach of the rule shows nothing");
}

/// A word about the process before must not be taken for one about the process that was started after it.
#[test]
fn a_late_word_about_a_restarted_process_takes_nothing_from_it() {
    for seed in 0..20 {
        let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
        let leader = w.leader().unwrap();
        let standby = (1..=2).find(|n| Some(*n) != w.owner(G)).unwrap();
        w.kill_and_tell(standby, 400 * MS);
        w.start(standby).unwrap();
        w.run_for(300 * MS).unwrap();
        w.switchover(leader, "g0", Some(standby)).unwrap();
        w.run_for(90 * MS).unwrap();
        let before = w.owner(G);
        assert_eq!(longest_gap(&mut w, 500 * MS), 0, "seed {seed}");
        assert_eq!(w.owner(G), before, "seed {seed}");
    }
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

/// Stops a node in order; the longest time in which what clients sent to its group was not forwarded.
fn unserved_while_stopping(w: &mut World, stopped: u64) -> Time {
    w.process(stopped).unwrap().pulse.lock().unwrap().set_resigning(true);
    let (mut longest, mut since) = (0, None::<Time>);
    let (mut ended, mut end) = (false, w.t + 8_000 * MS);
    while w.t < end {
        w.run_for(MS / 10).unwrap();
        if !ended && w.process(stopped).unwrap().core.has_resigned() {
            w.kill(stopped);
            w.machine(stopped).lane.clear();
            (ended, end) = (true, w.t + 1_000 * MS);
        }
        match (w.is_served(G), since) {
            (false, None) => since = Some(w.t),
            (false, Some(at)) => longest = longest.max(w.t - at),
            (true, _) => since = None,
        }
    }
    assert!(ended, "it did not end:\n{}", w.transcript.join("\n"));
    longest
}

/// `MsgTimeoutNow`, a vote or its answer was lost, and with it a third of a second of datagrams.
#[test]
fn a_datagram_lost_in_a_hand_over_costs_no_client_anything() {
    use raft::eraftpb::MessageType::{
        MsgAppend, MsgAppendResponse, MsgRequestVote, MsgRequestVoteResponse, MsgTimeoutNow,
    };
    let kinds = [MsgTimeoutNow, MsgRequestVote, MsgRequestVoteResponse, MsgAppend, MsgAppendResponse];
    for (kind, seed) in kinds.into_iter().flat_map(|k| (0..4).map(move |s| (k, s))) {
        let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
        let owner = w.owner(G).unwrap();
        assert!(w.run_until(w.t + 5_000 * MS, |w| w.leader() == Some(owner)).unwrap());
        w.run_for(seed * 7 * MS).unwrap();
        w.lose = vec![kind];
        let unserved = unserved_while_stopping(&mut w, owner);
        assert!(w.lose.is_empty(), "{kind:?} was not sent");
        assert_eq!(unserved, 0, "{kind:?}, seed {seed}:\n{}", w.transcript.join("\n"));
    }
}

/// N2: answers wait for the disk, and a follower of a pair whose disk was slow made its leader step down.
#[test]
fn a_slow_disk_deposes_nobody() {
    for slow in 1..=2 {
        let mut w = formed(5, &PAIR_AND_WITNESS[..2], 1);
        w.run_for(5_000 * MS).unwrap();
        let (owner, term) = (w.owner(G), w.process(1).unwrap().core.term());
        w.machine(slow).slow_fsync = Some(900 * MS);
        for _ in 0..8 {
            let leader = w.leader().unwrap();
            w.change(leader, 1).unwrap();
            assert_eq!(longest_gap(&mut w, 500 * MS), 0, "the disk of n{slow} is slow");
        }
        assert_eq!((w.owner(G), w.process(1).unwrap().core.term()), (owner, term));
    }
}

/// Where every write took longer than half an election timeout, candidates gave up before the answer could be there, and asked
/// anew in the next term: nobody led until the disks were faster.
#[test]
fn a_failover_takes_three_writes_however_slow_they_are() {
    for fsync in [5, 60, 100, 200, 400, 1_000] {
        for seed in 0..20 {
            let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
            w.run_for(seed * 7 * MS).unwrap();
            let owner = w.owner(G).unwrap();
            w.machines.values_mut().for_each(|m| m.slow_fsync = Some(fsync * MS));
            w.kill(owner);
            w.machine(owner).lane.clear();
            let gap = longest_gap(&mut w, 1_000 * MS + 6 * fsync * MS) / MS;
            assert!(
                w.owner(G).is_some_and(|n| n != owner),
                "{fsync} ms, seed {seed}: {}",
                w.transcript.join("\n")
            );
            // The candidate's vote, the other's, the assignment; before that the promise must end.
            assert!(
                gap <= 200 + 3 * fsync,
                "{fsync} ms a write, seed {seed}: {gap} ms\n{}",
                w.transcript.join("\n")
            );
        }
    }
}

/// A node with another lease would rely on promises that nobody gave.
#[test]
fn a_node_with_other_durations_is_refused_and_says_so() {
    use std::time::Duration;
    let mut w = World::new(2, &PAIR_AND_WITNESS, Timing::default());
    w.machine(3).timing.lease = Duration::from_millis(100);
    (1..=3).try_for_each(|id| w.start(id)).unwrap();
    w.run_for(3_000 * MS).unwrap();
    let notices = |w: &World, id| w.process(id).unwrap().pulse.lock().unwrap().notices();
    for id in [1, 2] {
        assert_eq!(w.process(id).unwrap().core.voters().count(), 2);
        let [notice] = &notices(&w, id)[..] else { panic!("{:?}", notices(&w, id)) };
        assert!(
            notice.contains("node 3 \"n3\"") && notice.contains("lease_ms is 80 here and 100 there"),
            "{notice}"
        );
    }
    assert!(w.process(3).unwrap().core.is_empty());
    assert_eq!(notices(&w, 3).len(), 2);
    // Put right.
    w.kill(3);
    w.machine(3).timing = Timing::default();
    w.start(3).unwrap();
    w.run_for(2_000 * MS).unwrap();
    assert_eq!(w.process(3).unwrap().core.voters().count(), 3);
    assert!((1..=3).all(|id| notices(&w, id).is_empty()));
}

/// What an operator wants of the membership was forgotten with the leader that he had asked, and so was who he is.
#[test]
fn wishes_about_members_outlive_the_leader() {
    let mut w = formed(2, &PAIR_AND_WITNESS, 1);
    let four = Machine::new(4, Role::Balancer, &[1, 2, 3, 4], Timing::default());
    let identity = four.identity.clone();
    w.machines.insert(4, four);
    let leader = w.leader().unwrap();
    w.request(leader, Request::Join { node: identity, who: "ann".to_owned() }).unwrap();
    w.run_for(50 * MS).unwrap();
    w.kill(leader);
    w.run_for(500 * MS).unwrap();
    w.start(4).unwrap();
    w.run_for(1_000 * MS).unwrap();
    assert_eq!(w.process(4).unwrap().core.voters().count(), 4);
    w.start(leader).unwrap();
    w.run_for(500 * MS).unwrap();
    let leader = w.leader().unwrap();
    let gone = (1..=2).find(|n| *n != leader).unwrap();
    w.request(leader, Request::Leave { node: NodeId(gone), who: "bob".to_owned() }).unwrap();
    w.run_for(20 * MS).unwrap();
    w.kill(leader);
    w.run_for(1_000 * MS).unwrap();
    let state = w.process(4).unwrap().core.state().clone();
    assert!(state.member(NodeId(gone)).is_none() && state.joining.is_empty() && state.leaving.is_empty());
    let said = |who: &str, text: &str| state.events.iter().any(|e| e.who == who && e.text.contains(text));
    assert!(
        said("ann", "to join") && said("ann", "joined") && said("bob", "to leave") && said("bob", "left")
    );
}

/// A campaign while a snapshot was on its way to the disk ended the process: one that was behind, and whose new leader was killed.
#[test]
fn a_node_whose_snapshot_is_being_written_does_not_campaign() {
    let roles = [Role::Balancer, Role::Balancer, Role::Witness, Role::Balancer, Role::Witness];
    let mut taken = 0;
    for seed in 0..12 {
        let mut w = formed(seed, &roles, 1);
        let voters = |w: &World| w.leader().and_then(|l| w.process(l)).map(|p| p.core.voters().count());
        assert!(w.run_until(w.t + 2_000 * MS, |w| voters(w) == Some(5)).unwrap());
        let first = w.leader().unwrap();
        let joins = [1, 2, 4].into_iter().find(|n| *n != first).unwrap();
        let behind = [3, 5].into_iter().find(|n| *n != first).unwrap();
        w.kill(behind);
        w.run_for(300 * MS).unwrap();
        // The log of a node that joins begins with a snapshot: it has nothing older for one that is behind.
        w.power_off(joins);
        w.machine(joins).disk.lose_everything();
        w.start(joins).unwrap();
        let led = |w: &World| w.leader().is_some_and(|l| l != joins);
        w.run_for(1_000 * MS).unwrap();
        assert!(led(&w), "{}", w.transcript.join("\n"));
        w.kill(w.leader().unwrap());
        w.start(behind).unwrap();
        if !w.run_until(w.t + 1_000 * MS, |w| w.leader() == Some(joins)).unwrap() {
            continue;
        }
        w.machine(behind).slow_fsync = Some(400 * MS);
        let index = |w: &World, node: u64| w.process(node).map(|p| p.core.state().index);
        let old = index(&w, behind);
        assert!(
            w.run_until(w.t + 500 * MS, |w| index(w, behind) > old).unwrap(),
            "{}",
            w.transcript.join("\n")
        );
        w.kill_and_tell(joins, MS);
        w.run_for(1_000 * MS).unwrap();
        taken += 1;
        w.machine(behind).slow_fsync = None;
        w.start(joins).unwrap();
        w.run_for(2_000 * MS).unwrap();
        assert!(w.owner(G).is_some(), "seed {seed}:\n{}", w.transcript.join("\n"));
    }
    assert!(taken > 0, "the one that joined never led");
}

/// A machine with a slow disk and a busy processor: whatever takes longer, the old owner goes on forwarding.
#[test]
fn stopping_the_owner_on_a_busy_machine_loses_no_datagram() {
    for seed in 0..30 {
        let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
        let owner = w.owner(G).unwrap();
        w.weather = Weather {
            delay: 4 * MS,
            fsync: 15 * MS,
            loss_ppm: 10_000,
            late_ppm: 50_000,
            late: 12 * MS,
            ..Weather::FAIR
        };
        w.run_for(2_300 * MS + seed * 31 * MS).unwrap();
        let unserved = unserved_while_stopping(&mut w, owner);
        assert!(unserved == 0, "seed {seed}: {} ms\n{}", unserved / MS, w.transcript.join("\n"));
    }
}

/// The same for an operator's switchover; with an fsync that takes longer than the grace time.
#[test]
fn a_switchover_waits_for_a_slow_disk_without_loss() {
    for seed in 0..10 {
        let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
        let (owner, leader) = (w.owner(G).unwrap(), w.leader().unwrap());
        w.weather = Weather { fsync: 1_500 * MS, ..Weather::FAIR };
        w.switchover(leader, "g0", None).unwrap();
        for _ in 0..60_000 {
            w.run_for(MS / 10).unwrap();
            assert!(w.is_served(G), "seed {seed}:\n{}", w.transcript.join("\n"));
        }
        assert!(w.owner(G).is_some_and(|n| n != owner), "seed {seed}");
    }
}

/// N1: a lease outlived two changes of the voters, after which another majority need not know of it.
#[test]
fn voters_change_once_a_lease_at_most() {
    let mut w = World::new(3, &[Role::Balancer; 5], Timing::default());
    (1..=5).try_for_each(|id| w.start(id)).unwrap();
    let mut changes: Vec<(usize, Time)> = Vec::new();
    while w.t < 6_000 * MS {
        w.run_for(MS / 5).unwrap();
        let voters = w.leader().and_then(|l| w.process(l)).map_or(0, |p| p.core.voters().count());
        if changes.last().is_none_or(|(n, _)| *n != voters) {
            changes.push((voters, w.t));
        }
    }
    let grown: Vec<_> = changes.into_iter().filter(|(n, _)| *n > 1).collect();
    assert_eq!(grown.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [2, 3, 4, 5]);
    assert!(grown.windows(2).all(|w| w[1].1 - w[0].1 >= 119 * MS), "{grown:?}");
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
    w.request(leader, Request::Join { node: identity, who: "operator".to_owned() }).unwrap();
    w.run_for(1_000 * MS).unwrap();
    assert_eq!(w.process(4).unwrap().core.voters().count(), 4);
    // The two first balancers leave, whoever of them leads.
    for gone in [1, 2] {
        for _ in 0..3 {
            let leader = w.leader().unwrap();
            w.request(leader, Request::Leave { node: NodeId(gone), who: "operator".to_owned() }).unwrap();
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
fn a_node_joins_only_as_what_the_operator_asked_for() {
    let mut w = formed(2, &PAIR_AND_WITNESS, 1);
    let four = Machine::new(4, Role::Balancer, &[1, 2, 3, 4], Timing::default());
    let as_it_is = four.identity.clone();
    w.machines.insert(4, four);
    let voters = |w: &World| w.process(w.leader().unwrap()).unwrap().core.voters().count();
    let otherwise = NodeIdentity { role: Role::Witness, ..as_it_is.clone() };
    // Asked for before it is heard, and after.
    let leader = w.leader().unwrap();
    w.request(leader, Request::Join { node: otherwise.clone(), who: "operator".to_owned() }).unwrap();
    w.start(4).unwrap();
    w.run_for(1_000 * MS).unwrap();
    w.request(leader, Request::Join { node: otherwise, who: "operator".to_owned() }).unwrap();
    w.run_for(1_000 * MS).unwrap();
    assert_eq!(voters(&w), 3);
    // Once right, twice: the second time there is nothing left to do.
    for _ in 0..2 {
        w.request(leader, Request::Join { node: as_it_is.clone(), who: "operator".to_owned() }).unwrap();
        w.run_for(1_000 * MS).unwrap();
        assert_eq!(voters(&w), 4);
    }
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

/// A leader whose disk is full renewed its lease and decided nothing: a group whose owner died stayed without one.
#[test]
fn a_leader_whose_disk_is_full_gives_way() {
    for seed in 0..5 {
        let mut w = formed(seed, &PAIR_AND_WITNESS, 1);
        w.run_for(5_000 * MS).unwrap();
        let leader = w.leader().unwrap();
        w.machine(leader).disk_full = true;
        w.change(leader, 2).unwrap();
        w.run_for(4_000 * MS).unwrap();
        let next = w.leader().unwrap();
        assert_ne!(next, leader, "seed {seed}");
        assert!(w.owner(G).is_some_and(|n| n != leader), "seed {seed}");
        w.change(next, 1).unwrap();
        assert_eq!(longest_gap(&mut w, 1_000 * MS), 0, "seed {seed}");
    }
}

/// Where nobody could take over, a full disk costs changes, not service.
#[test]
fn full_disks_that_leave_no_quorum_interrupt_nothing() {
    for (roles, full) in [
        (&PAIR_AND_WITNESS[..2], &[1][..]),
        (&PAIR_AND_WITNESS[..2], &[2][..]),
        (&PAIR_AND_WITNESS[..], &[1, 2, 3][..]),
    ] {
        let mut w = formed(3, roles, 1);
        w.run_for(5_000 * MS).unwrap();
        for &node in full {
            w.machine(node).disk_full = true;
        }
        let leader = w.leader().unwrap();
        w.change(leader, 2).unwrap();
        assert_eq!(longest_gap(&mut w, 4_000 * MS), 0, "{full:?} of {}", roles.len());
    }
}

/// What a restart finds in the log began before it: a drain or a confirmation must not begin anew.
#[test]
fn durations_go_on_over_a_restart() {
    let mut w = formed(1, &PAIR_AND_WITNESS[..1], 1);
    let change = crate::state::Change::Apply {
        document: super::world::document(2, 7),
        if_revision: None,
        confirm_within_ms: Some(20_000),
    };
    let wall_ms = w.machines[&1].now(w.t).wall_ms;
    let command = crate::state::Command { id: None, who: "operator".to_owned(), wall_ms, change };
    w.request(1, Request::Command(Box::new(command))).unwrap();
    w.run_for(15_000 * MS).unwrap();
    w.kill(1);
    w.start(1).unwrap();
    let pending = |w: &World| w.process(1).unwrap().core.state().pending.is_some();
    w.run_for(4_000 * MS).unwrap();
    assert!(pending(&w));
    w.run_for(2_000 * MS).unwrap();
    assert!(!pending(&w));
}

/// A founder that dies before those that it admitted got its snapshot: after a while they found a cluster of their own. When it
/// comes back, it must not send its log into theirs.
#[test]
fn two_clusters_with_one_secret_leave_each_other_alone() {
    let mut met = 0;
    for seed in 0..20 {
        let mut w = World::new(seed, &PAIR_AND_WITNESS, Timing::default());
        (1..=3).try_for_each(|id| w.start(id)).unwrap();
        let admitted = |w: &World| w.process(1).is_some_and(|p| p.core.state().members.len() > 1);
        assert!(w.run_until(3_000 * MS, admitted).unwrap());
        w.kill(1);
        w.run_for(26_000 * MS).unwrap();
        let Some(other) = w.leader() else { continue };
        w.start(1).unwrap();
        w.run_for(2_000 * MS).unwrap();
        let two = w.process(1).is_some_and(|p| !p.core.is_empty() && p.core.is_leader());
        met += u32::from(two);
        // N6: nobody told the operator.
        let notices = w.process(1).unwrap().pulse.lock().unwrap().notices();
        assert!(!two || notices.iter().any(|n| n.contains("this node is alone")), "{notices:?}");
        assert!(w.process(other).is_some_and(|p| p.core.voters().count() >= 2), "seed {seed}");
    }
    assert!(met > 0, "no seed made two clusters");
}

/// Found by a system test on a busy machine: the founder stood still for a moment right after it had made the cluster, and the
/// others, who had heard of it, made another one. Two clusters never become one.
#[test]
fn a_founder_that_stands_still_is_waited_for() {
    for seed in 0..30 {
        let mut w = World::new(seed, &PAIR_AND_WITNESS, Timing::default());
        (1..=3).try_for_each(|id| w.start(id)).unwrap();
        assert!(w.run_until(10_000 * MS, |w| w.leader().is_some()).unwrap(), "seed {seed}");
        let founder = w.leader().unwrap();
        // Long enough to be called dead, at any moment of the others' admission.
        w.run_for(seed * 2 * MS).unwrap();
        w.pause(founder, (100 + 60 * seed) * MS);
        let whole =
            |w: &World| w.leader().and_then(|l| w.process(l)).is_some_and(|p| p.core.voters().count() == 3);
        assert!(w.run_until(30_000 * MS, whole).unwrap(), "seed {seed}:\n{}", w.transcript.join("\n"));
    }
}
