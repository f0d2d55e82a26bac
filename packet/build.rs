//! Compiles the eBPF program, once for each hook, by clang.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for hook in ["xdp", "tc", "harness"] {
        compile(hook, &out.join(format!("{hook}.o")));
    }
}

/// Compiles the program for a hook; `harness` is what tests and benchmarks put around it.
fn compile(hook: &str, to: &Path) {
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let source = if hook == "harness" { "bpf/harness.c" } else { "bpf/komainu.c" };
    let mut command = Command::new(&clang);
    command.args(["-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]);
    // Debian keeps <asm/types.h>, which the kernel's headers include, by machine.
    let machine = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets the target");
    command.arg(format!("-I/usr/include/{machine}-linux-gnu"));
    command.arg(format!("-DKOMAINU_{}", if hook == "tc" { "TC" } else { "XDP" }));
    command.args(["-c", source, "-o"]).arg(to);
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => {
            eprintln!(
                "{clang} refused {source} for {hook} ({status}). It takes clang 11 or later and the kernel's headers:"
            );
            eprintln!(
                "on Debian and its children the packages clang and linux-libc-dev (\"deploy/setup.sh build\" installs them)."
            );
            std::process::exit(1);
        }
        Err(e) => {
            eprintln!(
                "{clang} can't be run: {e}. The kernel lanes' program is compiled by clang: install the package"
            );
            eprintln!(
                "clang (\"deploy/setup.sh build\" does), or name another compiler in the variable CLANG."
            );
            std::process::exit(1);
        }
    }
}
