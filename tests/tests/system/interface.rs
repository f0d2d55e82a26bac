//! The service interface disappears, and comes back.

use komainu_lab::cluster::{SOON, wait_for};
use komainu_lab::topology::SERVICE;
use komainu_lab::traffic::http::requests;
use komainu_tests::{Bed, GROUP, Machine, PATIENCE, http, udp, vip};

/// Guards against a node that stays unfit until it is restarted although an interface of that name has come back.
fn a_node_takes_up_an_interface_that_was_deleted_and_came_back() {
    let mut bed = Bed::web(Machine::Shared);
    let owner = bed.owner();
    let other = bed.other_than(&owner);
    bed.cluster.lab.remove_interface(&owner, SERVICE).unwrap();
    assert_eq!(bed.owner_other_than(&owner), other);
    let unfit = |bed: &Bed| {
        let members = bed.cluster.status("wit").unwrap().cluster.members;
        members.into_iter().find(|m| m.name == owner).unwrap()
    };
    wait_for("the node to be called unfit", SOON, || match unfit(&bed) {
        member if member.alive && member.fit == Some(false) => Ok(()),
        member => Err(format!("{member:?}")),
    })
    .unwrap();
    let why = unfit(&bed).unfit_reason;
    assert!(why.contains("eth0"), "{why}");

    bed.cluster.lab.insert_interface(&owner, SERVICE).unwrap();
    wait_for("the node to be fit again", SOON, || match unfit(&bed) {
        member if member.fit == Some(true) => Ok(()),
        member => Err(format!("{member:?}")),
    })
    .unwrap();
    bed.cluster.cli_ok("wit", &["switchover", GROUP, "--to", &owner]).unwrap();
    assert_eq!(bed.owner(), owner);
    // It answers for the VIPs, reaches the backends, and checks them. That its checks failed while it had no interface took
    // no backend out.
    for family in [0, 1] {
        wait_for(&format!("all backends to serve {}", vip(family)), SOON, || {
            let tally = requests(bed.client(), http(family), 30, PATIENCE);
            assert_eq!(tally.failed, 0, "{} {tally:?}", vip(family));
            if tally.per_backend.len() == 3 { Ok(()) } else { Err(format!("{tally:?}")) }
        })
        .unwrap();
    }
    assert!(bed.stream().wait_answered(100, SOON), "{} is silent", udp(0));
    bed.servers.get_mut("be1").unwrap().kill();
    bed.cluster.wait_health("web", "be1", "down", SOON).unwrap();
}

komainu_tests::system_on_every_lane!(a_node_takes_up_an_interface_that_was_deleted_and_came_back,);
