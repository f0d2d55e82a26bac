//! Two balancers and nobody third: who goes on alone, who waits, and how they meet again.

use std::time::{Duration, Instant};

use komainu_lab::cluster::{SOON, wait_for};
use komainu_lab::topology::{CLUSTER, SERVICE, Standard};
use komainu_lab::watch::WireLog;
use komainu_tests::{Bed, GROUP, Machine, PATIENT, changed, vip, web_document};

/// Longer than anybody needs who goes on alone without asking.
const LONG: Duration = Duration::from_secs(2);
/// Two owners end within this after the two hear each other again.
const MEETING: Duration = Duration::from_secs(1);

fn pair(policy: &str) -> Bed {
    pair_of(policy, "")
}

fn pair_of(policy: &str, timing: &str) -> Bed {
    let topology = Standard { balancers: 2, witness: false, ..Standard::default() };
    let mut bed = Bed::idle(Machine::Alone, topology);
    let gateway = bed.client().v4(SERVICE);
    for node in ["lb1", "lb2"] {
        bed.cluster.configure(node, timing).unwrap();
        bed.cluster.configure_table(node, "service", &format!("gateway = \"{gateway}\"")).unwrap();
        bed.cluster.configure_table(node, "cluster", &format!("pair = \"{policy}\"")).unwrap();
    }
    bed.form(web_document);
    bed
}

/// Cuts the two from each other, or mends it, on these networks.
fn cut(bed: &Bed, networks: &[&str]) {
    networks.iter().for_each(|n| bed.cluster.lab.cut("lb1", "lb2", n).unwrap());
}

fn heal(bed: &Bed, networks: &[&str]) {
    networks.iter().for_each(|n| bed.cluster.lab.heal("lb1", "lb2", n).unwrap());
}

fn wait_solo(bed: &Bed, node: &str, solo: bool) {
    let what = if solo { "to go on alone" } else { "to be one of two" };
    bed.cluster
        .wait_status(node, what, SOON, |s| s.cluster.solo == solo && s.cluster.leader.is_some())
        .unwrap();
}

/// Applies a document that only this caller would, through `node`. Its name of a service.
fn apply_own(bed: &Bed, node: &str) -> String {
    let name = format!("from-{node}");
    let toml = changed(&bed.cluster.lab, |service| service.name.clone_from(&name));
    bed.cluster.try_apply(node, &toml).unwrap().success("apply").unwrap();
    name
}

fn has_service(bed: &Bed, node: &str, name: &str) -> bool {
    bed.cluster.status(node).unwrap().services.iter().any(|s| s.name == name)
}

#[test]
fn a_survivor_takes_over_and_its_peer_comes_back_as_one_of_two() {
    let mut bed = pair("availability");
    let owner = bed.owner();
    let other = bed.other_than(&owner);
    assert_eq!(bed.cluster.status(&owner).unwrap().cluster.quorum, "pair-availability");
    let refused = bed.cluster.cli(&other, &["node", "force", "--yes"]).unwrap();
    assert!(!refused.status.success() && refused.stderr.contains("is heard"), "{refused:?}");

    let stream = bed.stream();
    for network in [SERVICE, CLUSTER] {
        bed.cluster.lab.unplug(&owner, network).unwrap();
    }
    let died = bed.cluster.kill_9(&owner);
    wait_solo(&bed, &other, true);
    assert!(stream.wait_answered(300, SOON), "{:?}", stream.report());
    println!("replaced after {:?}", stream.stop().longest_gap_after(died));
    let status = bed.cluster.status(&other).unwrap();
    assert!(status.notices.iter().any(|n| n.contains("goes on alone since")), "{:?}", status.notices);
    let service = apply_own(&bed, &other);

    for network in [SERVICE, CLUSTER] {
        bed.cluster.lab.plug(&owner, network).unwrap();
    }
    bed.cluster.start(&owner).unwrap();
    bed.cluster.wait_formed(SOON).unwrap();
    wait_solo(&bed, &other, false);
    wait_for("the node that came back to have what was changed", SOON, || {
        if has_service(&bed, &owner, &service) { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .unwrap();
    assert_eq!(bed.owner(), other);
    assert!(bed.stream().wait_answered(100, SOON));
}

/// A node that was stopped for maintenance left without a word, and the other one waited for it as for one that may be alive, without a
/// lease. With leases and promises of seconds, whoever waits for them is told from whoever doesn't.
#[test]
fn nobody_waits_for_a_standby_that_was_stopped_in_order() {
    let mut bed = pair_of("availability", PATIENT);
    let owner = bed.owner();
    let other = bed.other_than(&owner);
    let stream = bed.stream();
    let ended = Instant::now();
    assert!(bed.cluster.terminate(&other, SOON).unwrap().success());
    wait_solo(&bed, &owner, true);
    bed.cluster.wait_logged(&owner, &["its process has ended, and that was told"], SOON).unwrap();
    // One a millisecond, for longer than the lease that it had when the other one left.
    assert!(stream.wait_answered(2000, SOON), "{:?}", stream.report());
    let gap = stream.stop().longest_gap_after(ended);
    println!("longest gap {gap:?}");
    assert!(gap < Duration::from_secs(1), "it waited for what its peer had promised: {gap:?}");
    bed.cluster.start(&other).unwrap();
    bed.cluster.wait_formed(SOON).unwrap();
    wait_solo(&bed, &owner, false);
    assert_eq!(bed.owner(), owner);
}

#[test]
fn a_cut_cluster_cable_alone_moves_nothing() {
    let bed = pair("availability");
    let owner = bed.owner();
    let stream = bed.stream();
    let begun = Instant::now();
    cut(&bed, &[CLUSTER]);
    std::thread::sleep(LONG);
    assert!(stream.wait_answered(300, SOON), "{:?}", stream.report());
    for node in ["lb1", "lb2"] {
        assert!(!bed.cluster.status(node).unwrap().cluster.solo, "{node}");
    }
    let other = bed.other_than(&owner);
    assert_eq!(bed.wire().claims_of_after(&other, begun), 0);
    println!("longest gap {:?}", stream.stop().longest_gap_after(begun));
    heal(&bed, &[CLUSTER]);
    bed.cluster.wait_formed(SOON).unwrap();
    assert_eq!(bed.owner(), owner);
}

#[test]
fn a_pair_that_was_split_in_two_is_one_again_within_a_second_and_nothing_is_dropped() {
    let mut bed = pair("availability");
    cut(&bed, &[CLUSTER, SERVICE]);
    wait_solo(&bed, "lb1", true);
    wait_solo(&bed, "lb2", true);
    let services = ["lb1", "lb2"].map(|node| apply_own(&bed, node));
    for node in ["lb1", "lb2"] {
        wait_for("both to answer", SOON, || {
            let since = Instant::now() - Duration::from_millis(200);
            bed.wire().first_claim_of(node, since).map(drop).ok_or_else(|| format!("{node} is silent"))
        })
        .unwrap();
    }
    let healed = Instant::now();
    heal(&bed, &[SERVICE, CLUSTER]);
    bed.cluster.wait_formed(SOON).unwrap();
    let winner = bed.owner();
    let loser = bed.other_than(&winner);
    wait_solo(&bed, &winner, false);

    // On the wire: the loser is silent soon, and the winner says so.
    let wire: WireLog = bed.stop_watching();
    let last = wire.last_claim_of(&loser).expect("it answered while split").at;
    println!("{loser} was silent {:?} after the cables were back", last.saturating_duration_since(healed));
    assert!(last <= healed + MEETING, "{}", wire.around(last, Duration::from_millis(50)));
    let told = wire.announcements(&winner, vip(0)).iter().any(|c| c.at >= healed && c.at <= healed + MEETING);
    assert!(told, "{winner} announces nothing");

    // What was changed on the loser is kept, shown, and can be applied.
    let mine = usize::from(loser == "lb2");
    assert!(!has_service(&bed, &loser, &services[mine]) && has_service(&bed, &winner, &services[1 - mine]));
    let status = bed
        .cluster
        .wait_status(&loser, "what was set aside", SOON, |s| {
            s.notices.iter().any(|n| n.contains("set aside in"))
        })
        .unwrap();
    let notice = status.notices.iter().find(|n| n.contains("set aside in")).unwrap();
    let file =
        notice.split("set aside in ").nth(1).and_then(|rest| rest.split(": ").next()).unwrap().to_owned();
    let events = |node: &str| bed.cluster.cli_ok(node, &["events"]).unwrap().stdout;
    wait_for("an event about it", SOON, || {
        if events(&winner).contains(&file) { Ok(()) } else { Err(events(&winner)) }
    })
    .unwrap();
    bed.cluster.cli_ok(&loser, &["apply", "-f", &file]).unwrap();
    assert!(has_service(&bed, &loser, &services[mine]));
    assert_eq!(bed.owner(), winner);
}

#[test]
fn under_safety_a_survivor_is_silent_until_it_is_forced() {
    let mut bed = pair("safety");
    let owner = bed.owner();
    let other = bed.other_than(&owner);
    assert_eq!(bed.cluster.status(&other).unwrap().cluster.quorum, "pair-safety");
    let died = bed.cluster.kill_9(&owner);
    let waits = |n: &String| n.contains("this node waits") && n.contains("node force");
    bed.cluster
        .wait_status(&other, "the survivor to say that it waits", SOON, |s| s.notices.iter().any(waits))
        .unwrap();
    std::thread::sleep(LONG.saturating_sub(died.elapsed()));
    assert_eq!(bed.wire().claims_of_after(&other, died), 0);

    let told = bed.cluster.cli(&other, &["node", "force"]).unwrap();
    assert!(
        !told.status.success() && told.stderr.contains("risk:") && told.stderr.contains("nothing was done"),
        "{told:?}"
    );
    assert!(!bed.cluster.status(&other).unwrap().cluster.solo);
    bed.cluster.cli_ok(&other, &["node", "force", "--yes"]).unwrap();
    wait_solo(&bed, &other, true);
    assert!(bed.stream().wait_answered(100, SOON));
    let again = bed.cluster.cli(&other, &["node", "force", "--yes"]).unwrap();
    assert!(again.stderr.contains("decides alone already"), "{again:?}");

    bed.cluster.start(&owner).unwrap();
    bed.cluster.wait_formed(SOON).unwrap();
    wait_solo(&bed, &other, false);
    assert_eq!(bed.cluster.wait_owner(GROUP, SOON).unwrap(), other);
}
