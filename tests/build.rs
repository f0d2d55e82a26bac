//! Compiles the programs of the packets-per-second benchmark and of tests, by clang.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-changed=../packet/bpf/helpers.h");
    println!("cargo::rerun-if-env-changed=CLANG");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let machine = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets the target");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for (name, hook) in [("wire", "-DKOMAINU_XDP"), ("linear", "-DKOMAINU_TC")] {
        let mut command = Command::new(&clang);
        command
            .args(["-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror", hook])
            .args(["-I../packet/bpf".to_owned(), format!("-I/usr/include/{machine}-linux-gnu")])
            .args(["-c".to_owned(), format!("bpf/{name}.c"), "-o".to_owned()])
            .arg(out.join(name).with_extension("o"));
        if !command.status().is_ok_and(|status| status.success()) {
            eprintln!(
                "{clang} can't compile bpf/{name}.c: install the packages clang and linux-libc-dev (\"deploy/setup.sh build\")"
            );
            exit(1);
        }
    }
}
