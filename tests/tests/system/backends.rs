//! Backends die, come back, are drained and weighed.

use std::time::Duration;

use komainu_lab::cluster::{SOON, wait_for};
use komainu_lab::traffic::http::{RequestLoop, requests};
use komainu_lab::traffic::pinger::Pingers;
use komainu_tests::{Bed, Machine, PATIENCE, http, tcp};

const PING: Duration = Duration::from_millis(10);
/// So many that each of three backends has some: a given one has none in one run of 10⁸. (Of 12, be2 had none once.)
const MANY: usize = 48;

fn a_dead_backend_is_taken_out_and_comes_back() {
    let mut bed = Bed::web(Machine::Shared);
    let load = RequestLoop::start(bed.client(), http(0), Duration::from_millis(5), PATIENCE);
    bed.servers.get_mut("be2").unwrap().kill();
    bed.cluster.wait_health("web", "be2", "down", SOON).unwrap();
    let tally = bed.settled("be2 to get nothing", |t| t.failed == 0);
    assert!(tally.of("be2") == 0 && tally.per_backend.len() == 2, "{tally:?}");
    load.take();
    let mut answered = 0;
    wait_for("50 requests more to be answered", SOON, || {
        let meanwhile = load.take();
        assert_eq!(meanwhile.failed, 0, "{meanwhile:?}");
        answered += meanwhile.answered();
        if answered >= 50 { Ok(()) } else { Err(format!("{answered}")) }
    })
    .unwrap();

    bed.servers.get_mut("be2").unwrap().restart().unwrap();
    bed.cluster.wait_health("web", "be2", "up", SOON).unwrap();
    let tally = bed.settled("be2 to get something", |t| t.of("be2") > 0);
    assert_eq!(tally.failed, 0, "{tally:?}");
}

#[test]
fn a_backend_that_says_503_is_taken_out_with_the_reason_in_status() {
    let bed = Bed::web(Machine::Shared);
    bed.servers["be1"].set_healthy(false);
    bed.cluster.wait_health("web", "be1", "down", SOON).unwrap();
    let status = bed.cluster.status("lb2").unwrap();
    let reason = &status.backend("web", "be1").unwrap().reason;
    assert!(reason.contains("503"), "{reason}");
    bed.servers["be1"].set_healthy(true);
    bed.cluster.wait_health("web", "be1", "up", SOON).unwrap();
}

fn connections_to_living_backends_outlive_the_death_of_another() {
    let mut bed = Bed::web(Machine::Shared);
    let old = Pingers::start(bed.client(), tcp(0), MANY, PING, PATIENCE).unwrap();
    assert!(old.wait_answered(3, SOON));
    bed.servers.get_mut("be1").unwrap().kill();
    bed.cluster.wait_health("talk", "be1", "down", SOON).unwrap();
    bed.servers.get_mut("be1").unwrap().restart().unwrap();
    bed.cluster.wait_health("talk", "be1", "up", SOON).unwrap();
    assert!(old.wait_answered(10, SOON));
    for c in old.stop() {
        assert_eq!(c.broken.is_some(), c.backend == "be1", "{c:?}");
    }
}

fn a_drain_keeps_connections_and_takes_no_new_ones_and_survives_a_failover() {
    let mut bed = Bed::web(Machine::Shared);
    let old = Pingers::start(bed.client(), tcp(0), MANY, PING, PATIENCE).unwrap();
    let held = old.report().iter().filter(|c| c.backend == "be3").count();
    assert!(held > 0, "no connection went to be3: {:?}", old.report());

    bed.cluster.cli_ok("wit", &["backend", "drain", "talk/be3"]).unwrap();
    let drained = |bed: &Bed| {
        for name in bed.cluster.running() {
            bed.cluster
                .wait_status(&name, "the drain", SOON, |s| {
                    s.backend("talk", "be3").is_some_and(|b| b.admin == "draining" && b.health == "up")
                })
                .unwrap();
        }
        let spared = || {
            let new =
                Pingers::start(bed.client(), tcp(0), MANY, PING, PATIENCE).map_err(|e| e.to_string())?;
            let report = new.report();
            if report.iter().all(|c| c.backend != "be3") { Ok(()) } else { Err(format!("{report:?}")) }
        };
        wait_for("new connections to spare be3", SOON, spared).unwrap();
        // From then on, always.
        spared().unwrap();
    };
    drained(&bed);
    assert!(old.wait_answered(20, SOON));
    let report = old.stop();
    assert!(report.iter().all(|c| c.broken.is_none()), "{report:?}");
    assert!(report.iter().filter(|c| c.backend == "be3").all(|c| c.pings >= 20), "{report:?}");

    let owner = bed.owner();
    bed.cluster.kill_9(&owner);
    bed.owner_other_than(&owner);
    drained(&bed);

    bed.cluster.cli_ok("wit", &["backend", "enable", "talk/be3"]).unwrap();
    wait_for("be3 to take new connections", SOON, || {
        let new = Pingers::start(bed.client(), tcp(0), MANY, PING, PATIENCE).map_err(|e| e.to_string())?;
        if new.report().iter().any(|c| c.backend == "be3") { Ok(()) } else { Err("none".to_owned()) }
    })
    .unwrap();
}

fn drain_wait_ends_when_the_last_connection_has() {
    let bed = Bed::web(Machine::Shared);
    let connections = Pingers::start(bed.client(), tcp(0), MANY, PING, PATIENCE).unwrap();
    assert!(connections.report().iter().any(|c| c.backend == "be2"));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| bed.cluster.cli_ok("lb1", &["backend", "drain", "talk/be2", "--wait"]));
        bed.cluster
            .wait_status("lb2", "the drain", SOON, |s| {
                s.backend("talk", "be2").is_some_and(|b| b.admin == "draining")
            })
            .unwrap();
        assert!(connections.wait_answered(30, SOON));
        assert!(!waiting.is_finished(), "drain --wait did not wait for the connections");
        drop(connections);
        waiting.join().unwrap().unwrap();
    });
}

fn weight_0_takes_no_new_flows_and_disable_takes_nothing() {
    let bed = Bed::web(Machine::Shared);
    bed.cluster.cli_ok("lb2", &["backend", "weight", "web/be1", "0"]).unwrap();
    let without = |backend: &str, also: &str| {
        wait_for(&format!("no request to go to {backend}"), SOON, || {
            let tally = requests(bed.client(), http(0), 40, PATIENCE);
            if tally.failed == 0 && tally.of(backend) == 0 && tally.of(also) == 0 {
                Ok(())
            } else {
                Err(format!("{tally:?}"))
            }
        })
        .unwrap();
    };
    without("be1", "be1");
    bed.cluster.cli_ok("lb2", &["backend", "disable", "web/be2"]).unwrap();
    without("be1", "be2");
    let tally = requests(bed.client(), http(0), 40, PATIENCE);
    assert_eq!((tally.of("be3"), tally.failed), (40, 0), "{tally:?}");
    bed.cluster.cli_ok("lb2", &["backend", "enable", "web/be2"]).unwrap();
    bed.cluster.cli_ok("lb2", &["backend", "weight", "web/be1", "1"]).unwrap();
    wait_for("all to take requests again", SOON, || {
        let tally = requests(bed.client(), http(0), 60, PATIENCE);
        if tally.per_backend.len() == 3 && tally.failed == 0 { Ok(()) } else { Err(format!("{tally:?}")) }
    })
    .unwrap();
}

komainu_tests::system_on_every_lane!(
    a_dead_backend_is_taken_out_and_comes_back,
    a_drain_keeps_connections_and_takes_no_new_ones_and_survives_a_failover,
    connections_to_living_backends_outlive_the_death_of_another,
    drain_wait_ends_when_the_last_connection_has,
    weight_0_takes_no_new_flows_and_disable_takes_nothing,
);
