//! How a command ends that could not do what it was asked to.

use std::io::Write;
use std::process::ExitCode;

use komainu_proto::refusal;

/// Why a command failed.
#[derive(Debug)]
pub enum CliError {
    /// Lines for stderr: what, where, what to do.
    Failed(Vec<String>),
    /// Whoever read our output has gone. It has what it wanted: not a failure.
    Closed,
}

impl CliError {
    /// One line: what, where, what to do.
    pub fn new(line: impl Into<String>) -> Self {
        CliError::Failed(vec![line.into()])
    }

    /// Tells the user, and says how the process is to end.
    pub fn report(self) -> ExitCode {
        match self {
            CliError::Closed => ExitCode::SUCCESS,
            CliError::Failed(lines) => {
                let mut stderr = std::io::stderr().lock();
                for line in lines {
                    // Nobody can be told that stderr is closed.
                    let _ = writeln!(stderr, "komainu: {line}");
                }
                ExitCode::from(1)
            }
        }
    }
}

impl From<tonic::Status> for CliError {
    fn from(status: tonic::Status) -> Self {
        let problems = refusal::problems(&status);
        if problems.is_empty() {
            CliError::new(text(&status))
        } else {
            CliError::Failed(problems.iter().map(refusal::text).collect())
        }
    }
}

impl From<crate::config::ConfigError> for CliError {
    fn from(error: crate::config::ConfigError) -> Self {
        CliError::Failed(error.mistakes.iter().map(ToString::to_string).collect())
    }
}

/// A status in one line. Statuses of our own service speak for themselves; those made by the transport don't.
fn text(status: &tonic::Status) -> String {
    use tonic::Code;
    let message = status.message().replace('\n', "; ");
    match status.code() {
        Code::Unimplemented => {
            format!("the node does not know this command ({message}); upgrade it to this version of komainu")
        }
        Code::Unknown | Code::Internal
            if message.contains("transport") || message.contains("h2 protocol") =>
        {
            format!(
                "the connection to the node broke ({message}); look at `komainu status` before repeating a change"
            )
        }
        Code::Cancelled => {
            format!(
                "the node ended the call ({message}); it may be stopping or not accept your certificate; see its log, or ask another one with --node"
            )
        }
        _ if message.is_empty() => format!("the node answered {:?} without a reason", status.code()),
        _ => message,
    }
}
