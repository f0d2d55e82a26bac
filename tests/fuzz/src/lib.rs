//! Bodies of the fuzz targets: each calls everything that its part offers on any bytes at all, and checks more than that nothing panics.
//!
//! `fuzz_targets/` only names them, so that what a finding did can be debugged and kept as an ordinary test.

pub mod wire;
