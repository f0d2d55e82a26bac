//! The command line: a client of `komainu.admin.v1` and nothing else, beside the commands that work on this machine.
//!
//! | file | holds |
//! |---|---|
//! | [`args`] | the commands and their options as clap sees them |
//! | [`connect`] | which node is meant, and how it is reached |
//! | [`output`] | lines on stdout that survive a closed pipe |
//! | [`document`] | `apply`, `confirm`, `rollback`, `export`, `history`, `restore` |
//! | [`service`], [`backend`] | the small verbs |
//! | [`cluster`] | `switchover`, `node` |
//! | [`look`] | `status`, `flows`, `trace`, `events`, `version` |
//! | [`local`] | `run`, `check`, `demo`, `keygen`, `completions` |
//!
//! Exit status: 0 done, 1 refused or failed (on stderr what, where, what to do), 2 wrong usage.

pub mod args;
pub mod backend;
pub mod cluster;
pub mod connect;
pub mod document;
pub mod error;
pub mod local;
pub mod look;
pub mod output;
pub mod service;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use connect::Client;
pub use error::CliError;
use output::Output;

/// Longest time in which a command that waits for the cluster may stay silent before it looks again.
const POLL: std::time::Duration = std::time::Duration::from_millis(200);

/// Reads the command line, does what it says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => error.report(),
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, CliError> {
    let output = Output::new(cli.client.json);
    match cli.command {
        Command::Run { config } => local::run(&config),
        Command::Executor { process, tether, listen, leases } => {
            Ok(crate::executor::run(process, tether, listen, leases))
        }
        Command::Check { config } => local::check(&output, &config),
        Command::Cleanup { config } => local::cleanup(&output, &config).map(|()| ExitCode::SUCCESS),
        Command::Demo => local::demo(&output),
        Command::Keygen { output: file } => {
            local::keygen(&output, file.as_deref()).map(|()| ExitCode::SUCCESS)
        }
        Command::Completions { shell } => local::completions(&output, shell).map(|()| ExitCode::SUCCESS),
        command => {
            // One thread is plenty for a client, and starts in no time.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| CliError::new(format!("can't start: {error}")))?;
            runtime.block_on(async {
                let mut client = Client::connect(&cli.client).await?;
                remote(&mut client, &output, command).await
            })?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn remote(client: &mut Client, output: &Output, command: Command) -> Result<(), CliError> {
    match command {
        Command::Apply(args) => document::apply(client, output, args).await,
        Command::Confirm { revision } => document::confirm(client, output, revision).await,
        Command::Rollback { revision } => document::rollback(client, output, revision).await,
        Command::Export { revision } => document::export(client, output, revision).await,
        Command::History => document::history(client, output).await,
        Command::Restore { revision, if_revision, dry_run } => {
            document::restore(client, output, revision, if_revision, dry_run).await
        }
        Command::Status { watch } => look::status(client, output, watch).await,
        Command::Service(command) => service::run(client, output, command).await,
        Command::Backend(command) => backend::run(client, output, command).await,
        Command::Switchover { group, to, timeout } => {
            cluster::switchover(client, output, group, to, timeout).await
        }
        Command::Node(command) => cluster::node(client, output, command).await,
        Command::Flows { service, backend, limit } => {
            look::flows(client, output, service, backend, limit).await
        }
        Command::Trace { service, from } => look::trace(client, output, service, from).await,
        Command::Events { follow } => look::events(client, output, follow).await,
        Command::Version => look::version(client, output).await,
        Command::Run { .. }
        | Command::Executor { .. }
        | Command::Check { .. }
        | Command::Cleanup { .. }
        | Command::Demo
        | Command::Keygen { .. }
        | Command::Completions { .. } => unreachable!("done before a node was asked"),
    }
}
