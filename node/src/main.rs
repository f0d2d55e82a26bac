//! `komainu`: dispatches to the library.

fn main() -> std::process::ExitCode {
    komainu_node::cli::main()
}
