//! The program in the kernel and its maps. The program itself is `packet/bpf/`.
//!
//! | file | holds |
//! |---|---|
//! | [`abi`] | keys and values of the maps, as `packet/bpf/maps.h` has them |
//! | `lane` | [`KernelLane`]: the engine above the program |
//! | `sync` | keeps the program as the engine is: ports, plans, counters |
//! | `cache` | the program's copy of remembered flows |
//! | [`news`] | what the program tells of the flows that it keeps, and how many it may make |
//! | `ways` | routes and neighbours |
//! | `attach`, `link`, `pins` | the program on its interfaces, and what outlives the process |
//! | `tap` | how frames come up from the tc hook |
//! | `check` | is the machine fit, and what is `auto`? |
//! | [`program`] | loading, test runs |
//! | [`maps`] | the maps with a name for each thing that is done to them |
//! | [`fill`] | from compiled tables to a generation of the maps |
//! | `table`, `index`, [`growing`] | the table of flows, where its names stand, and how it grows |
//! | [`harness`] | what tests and benchmarks put around the program |
//! | `places` | how a generation's table is laid out |
//! | [`Silencer`] | ends what the program answers for when its process is dead |
//! | `ticks` | how old a reading of the clock may be |
//! | [`sys`] | bpf(2), shared memory |
//!
//! In which order: [`program::Kernel::load`]; ports, routes, neighbours, host addresses into [`maps::Maps`]; a
//! [`fill::Filler`] and with it the first plan; then the program is attached.

pub mod abi;
mod attach;
pub mod cache;
mod check;
pub mod fill;
pub mod growing;
pub mod harness;
mod index;
mod lane;
mod link;
pub mod maps;
pub mod news;
mod pins;
mod places;
pub mod program;
mod silencer;
mod sync;
pub mod sys;
mod table;
mod tap;
mod ticks;
mod ways;

pub use attach::GENERIC;
pub use check::{Choice, choose, clean_up, is_left};
pub use lane::KernelLane;
pub use program::Hook;
pub use silencer::Silencer;
