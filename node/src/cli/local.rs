//! Commands that ask nobody.

use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use komainu_cluster::seal::{Key, KeyError};
use komainu_packet::lane::kernel;
use serde_json::json;

use super::CliError;
use super::args::Cli;
use super::output::Output;
use crate::config::NodeConfig;
use crate::config::node::LogFormat;
use crate::daemon::RunError;
use crate::{check, daemon};

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// The node file or the machine is wrong, or a part of the daemon failed.
pub fn run(file: &Path) -> Result<ExitCode, CliError> {
    let config = NodeConfig::load(file)?;
    let format = config.log.format;
    daemon::run(config).or_else(|error| ended(format, &error))
}

/// Tells once why the daemon ended: as its log does, when programs read that, else as every command does.
fn ended(format: LogFormat, error: &RunError) -> Result<ExitCode, CliError> {
    let lines: Vec<String> = error.to_string().lines().map(str::to_owned).collect();
    match format {
        LogFormat::Human => Err(CliError::Failed(lines)),
        LogFormat::Json => {
            for line in lines {
                tracing::error!("{line}");
            }
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Tells whether the node file is right and the machine can do what it asks. Fails, with everything on stdout, when not.
///
/// # Errors
/// Stdout can't be written.
pub fn check(output: &Output, file: &Path) -> Result<ExitCode, CliError> {
    let report = check::check_file(file);
    output.either(&report.to_json(), || report.to_string())?;
    Ok(if report.ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Takes away what a daemon that is gone left in the kernel. Its programs may still forward for the rest of its lease while another
/// node takes over, so that time is given to them.
///
/// # Errors
/// The daemon runs, or the system refuses.
pub fn cleanup(output: &Output, file: &Path) -> Result<(), CliError> {
    let config = NodeConfig::load(file)?;
    if check::daemon_is_running(&config) {
        return Err(CliError::new(format!(
            "the daemon of {} runs: stop it first, it takes away what it has attached",
            file.display()
        )));
    }
    let interfaces: Vec<&str> = check::interfaces(&config);
    if kernel::is_left(&interfaces) {
        std::thread::sleep(config.timing.lease);
    }
    let removed = kernel::clean_up(&interfaces).map_err(CliError::new)?;
    output.either(&json!({ "removed": removed }), || match removed {
        0 => "nothing was left\n".to_owned(),
        1 => "removed 1 program from its interface\n".to_owned(),
        n => format!("removed {n} programs from their interfaces\n"),
    })
}

/// Plays the demo with this very binary.
///
/// # Errors
/// The binary can't be found again. A story that goes wrong is told by the exit status.
pub fn demo(output: &Output) -> Result<ExitCode, CliError> {
    let binary = std::env::current_exe().map_err(|error| {
        CliError::new(format!("can't find this program's own file: {error}; is /proc mounted?"))
    })?;
    Ok(komainu_lab::demo::run(&komainu_lab::demo::Options { binary, json: output.json() }))
}

/// Makes a cluster secret.
///
/// # Errors
/// No random bytes, or the file exists or can't be written.
pub fn keygen(output: &Output, file: Option<&Path>) -> Result<(), CliError> {
    let key = Key::generate().map_err(|error| CliError::new(error.to_string()))?;
    match file {
        Some(path) => {
            key.save(path).map_err(|error| CliError::new(save_failed(&error)))?;
            output.either(&json!({ "file": path }), || {
                format!(
                    "wrote {}; copy it to every node and name it as cluster.secret_file\n",
                    path.display()
                )
            })
        }
        None => {
            let text = key.to_text();
            output.either(&json!({ "secret": text.trim() }), || text.clone())
        }
    }
}

fn save_failed(error: &KeyError) -> String {
    match error {
        KeyError::Io { path, source } if source.kind() == std::io::ErrorKind::AlreadyExists => format!(
            "{}: exists already; remove it first if the whole cluster is to get a new secret",
            path.display()
        ),
        KeyError::Io { path, source } => {
            format!(
                "{}: can't be written: {source}; name a file in a directory that you may write to",
                path.display()
            )
        }
        other => other.to_string(),
    }
}

/// Prints completions.
///
/// # Errors
/// Stdout can't be written.
pub fn completions(output: &Output, shell: clap_complete::Shell) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "komainu", &mut script);
    output.text(&String::from_utf8_lossy(&script))
}
