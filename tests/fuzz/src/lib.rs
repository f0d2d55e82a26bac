//! Bodies of the fuzz targets: each calls everything that its part offers on any bytes at all, and checks more than that
//! nothing panics.
//!
//! `fuzz_targets/` only names them, so that what a finding did can be debugged and kept as an ordinary test: findings
//! become tests of the crate, named after what was wrong.
//!
//! From the repository's root, with a nightly compiler and cargo-fuzz:
//! ```text
//! cargo +nightly fuzz run --fuzz-dir tests/fuzz engine -- -max_total_time=600
//! cargo +nightly fuzz fmt --fuzz-dir tests/fuzz engine tests/fuzz/artifacts/engine/crash-…    # a finding, readable
//! ```

pub mod build;
pub mod engine;
pub mod peers;
pub mod sums;
pub mod wire;
