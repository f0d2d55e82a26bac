//! What operators read: every command says what it did, and nothing it doesn't know.

use komainu_lab::cluster::{SOON, wait_for};
use komainu_tests::{Bed, GROUP, Machine};

#[test]
fn an_administrative_state_is_told_in_a_line_with_deadline_and_revision() {
    let bed = Bed::web(Machine::Shared);
    let revision = bed.cluster.status("lb1").unwrap().cluster.revision;
    for (args, said) in [
        (&["backend", "disable", "web/be1"][..], "web/be1: disabled, revision R\n"),
        (&["backend", "disable", "web/be1"], "web/be1: already disabled, revision R\n"),
        (&["backend", "enable", "web/be1"], "web/be1: enabled, revision R\n"),
        (&["backend", "drain", "web/be1"], "web/be1: draining, no deadline, revision R\n"),
        (
            &["backend", "drain", "web/be2", "--deadline", "5m"],
            "web/be2: draining, disabled in 5 m at the latest, revision R\n",
        ),
    ] {
        let output = bed.cluster.cli_ok("lb2", args).unwrap();
        assert_eq!(output.stdout, said.replace('R', &revision.to_string()), "{args:?}");
    }
    let json: serde_json::Value =
        bed.cluster.cli_json("lb2", &["backend", "drain", "web/be3", "--deadline", "5m"]).unwrap();
    assert_eq!(json["backend"], "web/be3");
    assert_eq!(json["admin"], "draining");
    assert_eq!(json["deadline_ms"], 300_000);
    assert_eq!(json["revision"], revision);
}

/// Fault: it stood in the events although nothing had happened.
#[test]
fn a_switchover_to_the_owner_says_so_and_is_no_event() {
    let bed = Bed::web(Machine::Shared);
    let owner = bed.owner();
    let events = || bed.cluster.cli_ok("wit", &["events", "--json"]).unwrap().stdout.lines().count();
    let before = events();
    let output = bed.cluster.cli_ok("wit", &["switchover", GROUP, "--to", &owner]).unwrap();
    assert_eq!(output.stdout, format!("{GROUP}: {owner} owns it already\n"));
    assert_eq!(events(), before);
}

/// Fault: it was shown as fit.
#[test]
fn what_a_dead_node_once_said_of_its_fitness_is_not_shown() {
    let mut bed = Bed::web(Machine::Shared);
    let owner = bed.owner();
    let row = |bed: &Bed| {
        let list = bed.cluster.cli_ok("wit", &["node", "list"]).unwrap().stdout;
        let fit = list.lines().next().unwrap().find("FIT").unwrap();
        let row = list.lines().find(|l| l.starts_with(&owner)).unwrap();
        row[fit..].split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(row(&bed), "yes");
    bed.cluster.kill_9(&owner);
    wait_for("the node's fitness to be unknown", SOON, || match row(&bed) {
        said if said == "-" => Ok(()),
        said => Err(said),
    })
    .unwrap();
    let members = bed.cluster.status("wit").unwrap().cluster.members;
    assert_eq!(members.iter().find(|m| m.name == owner).unwrap().fit, None);
}
