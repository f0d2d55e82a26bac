#![no_main]

libfuzzer_sys::fuzz_target!(|ops: Vec<komainu_fuzz::engine::Op>| komainu_fuzz::engine::run(ops));
