//! The program in the kernel against the engine in user space: the same frames, plans and histories of flows into an engine
//! alone, and into the program (by `BPF_PROG_TEST_RUN`) with an engine beside it that gets what the program leaves. Same
//! verdicts, same bytes, same counters.
//!
//! Needs root. `KOMAINU_CASES=1000000` runs so many cases at each hook; `KOMAINU_SEED` repeats a run that failed.
//!
//! | file | holds |
//! |---|---|
//! | `world` | both sides, and the comparison |
//! | `network` | where hosts are |
//! | `specs` | services and backends by chance |
//! | `frames` | what is sent |
//! | `rules` | what the program may leave to the engine: everything else it must do itself |
//! | `clock` | leases that end, and clocks that stood still |
//! | `build` | plans and frames, those of the fuzz targets |
//! | `change` | one backend of a hundred is changed under a hundred thousand connections |
//! | `kept` | flows of full NAT that the program makes: ports, floods, ends |
//! | `load` | the program by itself: it loads, its types are those of the maps, its hashes those of `hash.rs` |

// All of this is a test: what can't go on fails it.
#![allow(clippy::unwrap_used)]

#[path = "../../fuzz/src/build.rs"]
#[allow(dead_code, missing_docs, reason = "shared with the fuzz targets, which use the rest of it")]
mod build;
mod change;
mod clock;
mod frames;
mod kept;
mod load;
mod network;
mod rng;
mod rules;
mod specs;
mod world;

use std::env;

use komainu_packet::lane::kernel::program::Hook;

use rng::Rng;
use world::World;

/// Cases at each hook in `make test`.
const CASES: u64 = 12_000;
/// Frames under one history: long enough for flows to live, be remembered, and see their backends go.
const FRAMES: u64 = 400;
/// Frames between changes of the plan.
const PLAN: u64 = 100;

#[test]
fn xdp_does_what_the_engine_does() {
    run(Hook::Xdp);
}

#[test]
fn tc_does_what_the_engine_does() {
    run(Hook::Tc);
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{name} is a number, not {v:?}")))
}

fn run(hook: Hook) {
    let cases = number("KOMAINU_CASES").unwrap_or(CASES);
    let seed = number("KOMAINU_SEED").unwrap_or(0x6b6f_6d61);
    let mut world = World::new(hook);
    for history in 0..cases.div_ceil(FRAMES) {
        // Each history from its own seed, which is what a failure names.
        let seed = seed.wrapping_add(history);
        let mut rng = Rng::new(seed);
        world.begin(seed, &mut rng);
        for n in 0..FRAMES {
            if n % PLAN == 0 {
                world.change_plan(&mut rng);
            }
            if rng.one_in(50) {
                world.change_lease(&mut rng);
            }
            world.frame(&mut rng);
        }
        world.compare_counters();
    }
    world.report();
}
