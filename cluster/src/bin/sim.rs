//! `make sim`: see `komainu_cluster::sim::program`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(komainu_cluster::sim::program::main(std::env::args().skip(1)))
}
