//! One backend of a hundred is changed under a hundred thousand established connections: not one of the others' moves, and none of
//! its own breaks before its time. Through the engine alone, and through the program at each hook with the engine behind it.

use komainu_packet::lane::kernel::program::Hook;
use komainu_packet::plan::{BackendPlan, Mode};
use komainu_tests::path::{Path, backend};

const BACKENDS: u8 = 100;
/// Established connections.
const FLOWS: u32 = 100_000;
/// Connections made after the change.
const NEW_FLOWS: u32 = 10_000;
/// The backend that is drained, the one that dies, and the one that is added.
const DRAINED: u8 = 37;
const DEAD: u8 = 61;
const ADDED: u8 = 200;

/// Every flow's next segment goes where the flow belongs; flows of the backends `but` are left out.
fn assert_nothing_moves(path: &mut Path, what: &str, belongs: &[u8], but: &[u8]) {
    for (flow, &backend) in belongs.iter().enumerate().filter(|(_, b)| !but.contains(b)) {
        assert_eq!(path.next(flow as u32), Some(backend), "{what}: flow {flow}");
    }
}

/// The story; where each flow went.
fn story(hook: Option<Hook>, mode: Mode) -> Vec<u8> {
    let mut path = Path::new(hook, mode, 1 << 18);
    let mut backends: Vec<BackendPlan> = (1..=BACKENDS).map(backend).collect();
    path.install(&backends);
    let mut belongs: Vec<u8> = (0..FLOWS).map(|flow| path.connect(flow)).collect();
    let on_drained = belongs.iter().filter(|b| **b == DRAINED).count();
    assert!((500..2000).contains(&on_drained), "{on_drained} of {FLOWS} flows on one of {BACKENDS}");

    // It is drained: weight 0, and what was in force before is the base. Not one flow moves, its own included.
    let drained = usize::from(DRAINED - 1);
    backends[drained].weight = 0;
    path.install(&backends);
    let up = path.went_up();
    assert_nothing_moves(&mut path, "drained", &belongs, &[]);
    // Only what a transition makes the engine remember goes up.
    let up = path.went_up() - up;
    assert!(up < u64::from(FLOWS) / 10, "{up} segments of {FLOWS} went up");
    for flow in FLOWS..FLOWS + NEW_FLOWS {
        let backend = path.connect(flow);
        assert_ne!(backend, DRAINED, "new flow {flow}");
        belongs.push(backend);
    }
    assert_nothing_moves(&mut path, "drained, with new flows", &belongs, &[]);

    // The transition ends, the drain's deadline has not come: its flows are all that is left of it.
    backends[drained].base_weight = 0;
    path.install(&backends);
    assert_nothing_moves(&mut path, "settled", &belongs, &[]);

    // Another one joins.
    backends.push(BackendPlan { base_weight: 0, ..backend(ADDED) });
    path.install(&backends);
    assert_nothing_moves(&mut path, "one joins", &belongs, &[]);
    backends[usize::from(BACKENDS)].base_weight = 1;
    path.install(&backends);
    assert_nothing_moves(&mut path, "one has joined", &belongs, &[]);

    // One dies: its own flows end, and only they.
    let dead = &mut backends[usize::from(DEAD - 1)];
    (dead.weight, dead.alive) = (0, false);
    path.install(&backends);
    assert_nothing_moves(&mut path, "one is dead", &belongs, &[DEAD]);
    let flow_of = |backend: u8| belongs.iter().position(|b| *b == backend).expect("it has flows") as u32;
    assert_eq!(path.next(flow_of(DEAD)), None, "a dead backend is sent nothing");

    // The deadline comes: what is left on the drained one ends, and nothing else.
    backends[drained].alive = false;
    path.install(&backends);
    assert_eq!(path.next(flow_of(DRAINED)), None, "past its deadline");
    assert_nothing_moves(&mut path, "after the deadline", &belongs, &[DEAD, DRAINED]);
    belongs
}

fn on_every_lane(mode: Mode) {
    let alone = story(None, mode);
    for hook in [Hook::Xdp, Hook::Tc] {
        let same = story(Some(hook), mode) == alone;
        assert!(same, "{hook:?}: not every flow went where the engine alone sends it");
    }
}

#[test]
fn no_flow_moves_when_one_of_a_hundred_backends_is_changed_dsr() {
    on_every_lane(Mode::Dsr);
}

#[test]
fn no_flow_moves_when_one_of_a_hundred_backends_is_changed_nat() {
    on_every_lane(Mode::Nat);
}

#[test]
fn no_flow_moves_when_one_of_a_hundred_backends_is_changed_nat_transparent() {
    on_every_lane(Mode::NatTransparent);
}
