//! The program in the kernel and its maps. The program itself is `packet/bpf/`.
//!
//! | file | holds |
//! |---|---|
//! | [`abi`] | keys and values of the maps, as `packet/bpf/maps.h` has them |
//! | [`program`] | loading, the maps with a name for each thing that is done to them, test runs |
//! | [`fill`] | from compiled tables to a generation of the maps |
//! | [`sys`] | bpf(2), shared memory |
//!
//! In which order: [`program::Kernel::load`]; ports, routes, neighbours, host addresses into [`program::Maps`]; a
//! [`fill::Filler`] and with it the first plan; then the program is attached.

pub mod abi;
pub mod fill;
pub mod program;
pub mod sys;
