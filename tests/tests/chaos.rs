//! A short cut of `make chaos`: some cases, one round each, on one cluster. Safety is judged, time only by generous bounds.

// A failure to set up is a failure of the test.
#![allow(clippy::unwrap_used)]

use komainu_lab::cluster::binary;
use komainu_tests::chaos::komainu::{Komainu, Setup};
use komainu_tests::chaos::{Case, Contender, Measure, Shape};

/// Long-lived connections in each mode.
const CONNECTIONS: usize = 60;

/// Plays each case once on one cluster. Safety is judged: two owners, and connections that break in a mode without state.
fn plays(shape: Shape, lane: &str, cases: &[Case]) {
    komainu_lab::clean_up_on_signals();
    let setup = Setup {
        binary: binary().unwrap(),
        shape,
        lane: lane.to_owned(),
        modes: ["nat", "dsr", "nat-transparent"].map(str::to_owned).to_vec(),
        checks: false,
        node_extra: String::new(),
        small_disks: false,
        preload: None,
    };
    let mut side = Komainu::start(&setup).unwrap();
    let measure = Measure::new(&side, CONNECTIONS).unwrap();
    for case in cases {
        let round = measure.round(&mut side, *case, 0);
        println!("{}: gap {} ms, {round:?}", case.name(), round.gap_ms);
        let logs = || side.last_words();
        assert!(round.wrong.is_empty(), "{}: {:#?}\n{}", case.name(), round, logs());
        match case.bounds(shape).two_owners_end {
            None => assert_eq!(round.two_owners_ms, 0, "{}: {:#?}\n{}", case.name(), round, logs()),
            Some(end) => {
                let after = u128::from(round.two_owners_after_ms);
                assert!(after <= end.as_millis(), "{}: {:#?}\n{}", case.name(), round, logs());
            }
        }
        let broken: usize = round.crowds.iter().map(|c| c.broken).sum();
        assert_eq!(broken, 0, "{}: {:#?}\n{}", case.name(), round, logs());
    }
}

#[test]
fn machines_cables_and_processes_fail_and_there_is_always_one_owner() {
    plays(Shape::Three, "af_packet", &[Case::KillOwner, Case::PowerOff, Case::Stop1S, Case::FullSplit]);
}

#[test]
fn a_pair_has_two_owners_in_a_full_split_only() {
    plays(Shape::Pair, "tc", &[Case::PowerOff, Case::OwnerMute, Case::FullSplit]);
}
