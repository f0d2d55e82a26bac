//! Generates the wire types and gRPC stubs from every `.proto` file under `komainu/`, and a descriptor set for
//! reflection.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

fn main() -> ExitCode {
    println!("cargo:rerun-if-env-changed=PROTOC");
    println!("cargo:rerun-if-changed=komainu");
    let protoc = std::env::var_os("PROTOC").unwrap_or_else(|| "protoc".into());
    let runs = Command::new(&protoc).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !runs.is_ok_and(|status| status.success()) {
        eprintln!(
            "komainu-proto: the protobuf compiler {protoc:?} does not run. Install it (Debian, Ubuntu: `apt-get install \
             protobuf-compiler`), or set PROTOC to its path."
        );
        return ExitCode::FAILURE;
    }
    match generate() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("komainu-proto: {error}");
            ExitCode::FAILURE
        }
    }
}

fn generate() -> std::io::Result<()> {
    let mut files = Vec::new();
    collect(Path::new("komainu"), &mut files)?;
    files.sort();
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or(std::io::ErrorKind::NotFound)?);
    tonic_prost_build::configure()
        .file_descriptor_set_path(out.join("komainu.bin"))
        .compile_protos(&files, &[PathBuf::from(".")])
}

/// Every `.proto` file below `dir`.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
