//! How a node ends.

use komainu_lab::cluster::SOON;
use komainu_tests::{Bed, Machine};
use nix::sys::signal::Signal;

/// An orderly end that can't come to its end, because nobody is left to take over, is cut short by a second signal.
#[test]
fn a_second_signal_ends_the_node_at_once() {
    for (first, second) in [(Signal::SIGTERM, Signal::SIGTERM), (Signal::SIGINT, Signal::SIGINT)] {
        let bed = Bed::web(Machine::Shared);
        let owner = bed.owner();
        for other in bed.cluster.names().iter().filter(|n| **n != owner) {
            bed.cluster.signal(other, Signal::SIGSTOP);
        }
        bed.cluster.signal(&owner, first);
        bed.cluster.wait_logged(&owner, &["stopping: handing over"], SOON).unwrap();
        bed.cluster.signal(&owner, second);
        let status = bed.cluster.process(&owner).wait(SOON).expect("it ends");
        let log = bed.cluster.log_of(&owner);
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("told a second time: leaving at once"), "{log}");
        assert!(!log.contains("leaving without it"), "{log}");
        for other in bed.cluster.names().iter().filter(|n| **n != owner) {
            bed.cluster.signal(other, Signal::SIGCONT);
        }
    }
}
