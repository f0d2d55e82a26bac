//! Who tells of a daemon's death, and what follows from it.

use std::time::{Duration, Instant};

use komainu_lab::cluster::{SOON, wait_for};
use komainu_lab::process::{is_executor, is_there};
use komainu_lab::topology::Standard;
use komainu_tests::{Bed, GROUP, Machine, PATIENT, web_document};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a node logs that was told of another's death.
const TOLD: &str = "its process has ended, and that was told";
const PROMISE: Duration = Duration::from_millis(2500);

/// Three nodes that don't give each other up for long; the owner leads, as it does once things are calm.
fn patient() -> (Bed, String) {
    let mut bed = Bed::idle(Machine::Shared, Standard::default());
    for node in ["lb1", "lb2", "wit"] {
        bed.cluster.configure(node, PATIENT).unwrap();
    }
    let owner = bed.form(web_document);
    bed.cluster
        .wait_status(&owner, "the owner to lead", SOON, |s| s.cluster.leader == Some(s.node.id))
        .unwrap();
    (bed, owner)
}

/// The executor of a node, once there is one that is ready.
fn executor(bed: &Bed, node: &str) -> i32 {
    let pid =
        wait_for("an executor", SOON, || bed.cluster.executor_of(node).ok_or("there is none".to_owned()));
    let pid = pid.unwrap();
    bed.cluster.wait_logged(node, &["the executor watches", &format!("pid={pid}")], SOON).unwrap();
    pid
}

fn gone(pid: i32) {
    let left = || if is_executor(pid) { Err("it is there".to_owned()) } else { Ok(()) };
    wait_for("the executor to end", SOON, left).unwrap();
}

fn told(bed: &Bed, node: &str) -> usize {
    bed.cluster.log_of(node).lines().filter(|line| line.contains(TOLD)).count()
}

/// Waits until `node` claims the VIP on the wire.
fn claims(bed: &Bed, node: &str, since: Instant) -> Instant {
    wait_for("the other balancer to answer", SOON, || {
        bed.wire().first_claim_of(node, since).map(|c| c.at).ok_or_else(|| "silence".to_owned())
    })
    .unwrap()
}

fn the_death_of_the_leading_owner_is_told_and_nobody_waits_for_its_promise() {
    let (mut bed, owner) = patient();
    let other = bed.other_than(&owner);
    let pid = executor(&bed, &owner);
    let stream = bed.stream();
    let killed = bed.cluster.kill_9(&owner);
    let taken = claims(&bed, &other, killed);
    println!("{other} answers {:?} after the death of {owner}", taken - killed);
    assert!(taken - killed < PROMISE, "the promise was waited for");
    for node in [other.as_str(), "wit"] {
        assert_eq!(told(&bed, node), 1, "{node}: {}", bed.cluster.log_of(node));
    }
    let wire = bed.wire();
    let last = wire.last_claim_of(&owner).expect("it answered before").at;
    assert!(last < taken, "{owner} answered after {other} had begun:\n{}", wire.around(taken, PROMISE));
    gone(pid);
    assert!(stream.wait_answered(300, SOON), "{:?}", stream.report());
    println!("longest gap {:?}", stream.stop().longest_gap_after(killed));
    // It comes back as a member like any other, and its next process is not taken for the dead one.
    bed.cluster.start(&owner).unwrap();
    bed.cluster.wait_formed(SOON).unwrap();
    assert_eq!(bed.owner(), other);
}

/// The kernel takes the longer the more sockets a process had, and with a second network it took longer than a lease lasts. Nobody
/// waits for that: it is enough that no thread of the dead one will run again.
fn a_death_is_told_before_the_kernel_has_taken_back_what_the_dead_one_had() {
    let sizes = Standard { inside_backends: 1, ..Standard::default() };
    let mut bed = Bed::idle(Machine::Shared, sizes);
    let owner = bed.form(web_document);
    let other = bed.other_than(&owner);
    executor(&bed, &owner);
    let pid = bed.cluster.process(&owner).pid();
    let begun = Instant::now();
    // Not reaped: whoever is, is gone at once from where it is looked for.
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let mut told_first = false;
    wait_for("the other to be told", SOON, || {
        let told = told(&bed, &other) > 0;
        let there = is_there(pid);
        told_first |= told && there;
        if told && !there { Ok(()) } else { Err(format!("told {told}, there {there}")) }
    })
    .unwrap();
    println!("told, and gone, after {:?}", begun.elapsed());
    assert!(told_first, "{other} was told only when {owner} was gone: {}", bed.cluster.log_of(&other));
    bed.cluster.kill_9(&owner);
}

/// The leader is another: it takes the dead one's group at once.
#[test]
fn the_death_of_an_owner_that_does_not_lead_is_told_too() {
    let (mut bed, owner) = patient();
    let other = bed.other_than(&owner);
    bed.cluster.cli_ok("wit", &["switchover", GROUP]).unwrap();
    assert_eq!(bed.owner_other_than(&owner), other);
    let killed = bed.cluster.kill_9(&other);
    let taken = claims(&bed, &owner, killed);
    assert!(taken - killed < Duration::from_millis(1500), "the lease was waited for: {:?}", taken - killed);
    assert!(told(&bed, &owner) == 1 && bed.owner() == owner);
}

/// A word about the process before must take nothing from the one after it.
#[test]
fn an_owner_that_is_started_at_once_after_its_death_makes_no_two_owners() {
    let mut bed = Bed::web(Machine::Shared);
    for _ in 0..4 {
        let owner = bed.owner();
        bed.cluster.kill_9(&owner);
        bed.cluster.start(&owner).unwrap();
        bed.cluster.wait_formed(SOON).unwrap();
        bed.owner();
        assert!(bed.stream().wait_answered(100, SOON));
        bed.wire().assert_one_owner();
    }
}

#[test]
fn an_orderly_end_leaves_no_executor_and_is_told_by_the_node_itself() {
    let mut bed = Bed::web(Machine::Shared);
    let pids: Vec<i32> = ["lb1", "lb2", "wit"].map(|node| executor(&bed, node)).into();
    // What is meant for the service is not meant for it.
    for pid in &pids {
        kill(Pid::from_raw(*pid), Signal::SIGTERM).unwrap();
        kill(Pid::from_raw(*pid), Signal::SIGINT).unwrap();
    }
    let owner = bed.owner();
    let last = bed.other_than(&owner);
    for node in [owner.as_str(), "wit", last.as_str()] {
        assert!(bed.cluster.terminate(node, SOON).unwrap().success());
    }
    // Each of those that were still there, once.
    for (node, ends) in [(owner.as_str(), 0), ("wit", 1), (last.as_str(), 2)] {
        assert_eq!(told(&bed, node), ends, "{node}: {}", bed.cluster.log_of(node));
    }
    for (node, pid) in ["lb1", "lb2", "wit"].into_iter().zip(pids) {
        assert!(!is_executor(pid), "{node} has left its executor behind");
        assert!(!bed.cluster.log_of(node).contains("no executor"), "{}", bed.cluster.log_of(node));
    }
}

#[test]
fn an_executor_that_dies_is_missed_and_another_takes_its_place() {
    let (mut bed, owner) = patient();
    let other = bed.other_than(&owner);
    let first = executor(&bed, &owner);
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    bed.cluster.wait_logged(&owner, &["no executor", "wait until its leases"], SOON).unwrap();
    let second = wait_for("another executor", SOON, || {
        bed.cluster.executor_of(&owner).filter(|pid| *pid != first).ok_or("there is none".to_owned())
    })
    .unwrap();
    bed.cluster.wait_logged(&owner, &["the executor watches", &format!("pid={second}")], SOON).unwrap();
    assert_eq!(told(&bed, &other), 0, "the daemon lives");
    let killed = bed.cluster.kill_9(&owner);
    let taken = claims(&bed, &other, killed);
    assert!(taken - killed < PROMISE, "the promise was waited for");
    assert_eq!(told(&bed, &other), 1);
    gone(second);
}

/// A machine that loses its power tells nothing: then, and only then, the promise is waited for.
#[test]
fn a_death_that_nobody_tells_of_is_waited_for() {
    let (mut bed, owner) = patient();
    let other = bed.other_than(&owner);
    executor(&bed, &owner);
    let killed = bed.cluster.kill_silently(&owner);
    let taken = claims(&bed, &other, killed);
    // Its last beat may have been a beat earlier.
    assert!(taken - killed > PROMISE - Duration::from_millis(100), "{:?}", taken - killed);
    assert_eq!((told(&bed, &other), told(&bed, "wit")), (0, 0));
}

komainu_tests::system_on_every_lane!(
    the_death_of_the_leading_owner_is_told_and_nobody_waits_for_its_promise,
    a_death_is_told_before_the_kernel_has_taken_back_what_the_dead_one_had,
);
