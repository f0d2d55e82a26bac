//! What can go wrong in a lab.

use std::path::PathBuf;
use std::time::Duration;

/// Where the lab could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The process may not make network namespaces.
    #[error(
        "{doing}: not permitted: the lab makes network namespaces and needs CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW: \
         run it as root"
    )]
    Privilege {
        /// What was being done.
        doing: String,
    },
    /// A system call failed.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A netlink request was refused.
    #[error("{doing}: netlink: {source}")]
    Netlink {
        /// What was being done.
        doing: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// A host, segment or interface that the topology does not have.
    #[error("the lab has no {what} \"{name}\": it has {known}")]
    Unknown {
        /// Kind of thing.
        what: &'static str,
        /// Name asked for.
        name: String,
        /// Names that exist.
        known: String,
    },
    /// The topology contradicts itself.
    #[error("topology: {0}")]
    Topology(String),
    /// Something that was waited for did not happen.
    #[error("waited {waited:?} for {what}; last seen: {last}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
        /// What was seen instead, the last time it was looked at.
        last: String,
    },
    /// A node ended although it should run.
    #[error("node {name} has ended ({status}) while waiting for {what}; its last words: {log}")]
    NodeEnded {
        /// Its name.
        name: String,
        /// Its exit status.
        status: String,
        /// What was waited for.
        what: String,
        /// The end of its log.
        log: String,
    },
    /// A command of the product failed.
    #[error("`{command}` ended with {status}: {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit status.
        status: String,
        /// What it wrote to stderr.
        stderr: String,
    },
    /// A command of the product printed what can't be read.
    #[error("`{command}` printed unexpected output ({reason}): {output}")]
    Output {
        /// The command line.
        command: String,
        /// What is wrong.
        reason: String,
        /// What it printed.
        output: String,
    },
    /// The binary under test isn't there.
    #[error("no komainu binary at {}: run `cargo build -p komainu-node` first, or set KOMAINU_BIN", path.display())]
    NoBinary {
        /// Where it was looked for.
        path: PathBuf,
    },
}

impl LabError {
    /// An error of the system; lack of permission gets the message that says what is needed.
    pub fn system(doing: impl Into<String>, source: std::io::Error) -> LabError {
        let doing = doing.into();
        if source.kind() == std::io::ErrorKind::PermissionDenied {
            LabError::Privilege { doing }
        } else {
            LabError::System { doing, source }
        }
    }

    pub(crate) fn last_os(doing: impl Into<String>) -> LabError {
        LabError::system(doing, std::io::Error::last_os_error())
    }

    pub(crate) fn nix(doing: impl Into<String>) -> impl FnOnce(nix::Error) -> LabError {
        let doing = doing.into();
        move |e| LabError::system(doing, e.into())
    }

    pub(crate) fn netlink(doing: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> LabError {
        let doing = doing.into();
        move |source| match &source {
            rtnetlink::Error::NetlinkError(m) if m.to_io().kind() == std::io::ErrorKind::PermissionDenied => {
                LabError::Privilege { doing }
            }
            _ => LabError::Netlink { doing, source },
        }
    }
}

/// Result of a lab operation.
pub type Result<T> = std::result::Result<T, LabError>;
