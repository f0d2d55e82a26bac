//! What can be asked of the replicated state, and what it answers.
//!
//! Everything here travels: a [`Command`] is the payload of a Raft log entry, and its answer goes back to the node that
//! forwarded it. Both are written as JSON behind a format number, because a log entry written by one version is read by
//! the next one during a rolling upgrade, and by people after an accident.

use std::fmt;

use komainu_proto::domain::{
    AdminState, Backend, BackendId, Document, GroupId, Health, NodeId, Service, ServiceId,
};
use serde::{Deserialize, Serialize};

use super::Member;
use crate::api::NodeIdentity;

/// First byte of an encoded [`Command`]. A higher number is a newer format that this version must not guess at.
const COMMAND_FORMAT: u8 = 1;
/// Longest encoded command in bytes. A document of [`super::MAX_SERVICES`] services with 40 backends each fits; a
/// bigger one would hold up the log for everybody.
pub const MAX_COMMAND_LEN: usize = 64 << 20;

/// Names one proposal, so that a retry of it is not applied twice. Drawn by the proposing node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProposalId {
    /// Random number of the proposing process.
    pub session: u64,
    /// Counter within the process.
    pub sequence: u64,
}

/// A change as it stands in the log: with everything that applying it needs, so that every node gets the same result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// Recognises a retry. Absent for the leader's own commands, which carry their own guard (epoch, index).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ProposalId>,
    /// Who asked, for the audit log: an operator's identity, or `cluster` for the leader's own decisions.
    pub who: String,
    /// The proposer's wall clock, ms since 1970. Shown to people and used to estimate how long something has lasted
    /// across a restart; nothing else depends on it.
    pub wall_ms: u64,
    /// What.
    pub change: Change,
}

impl Command {
    /// A decision of the leader itself.
    pub fn own(wall_ms: u64, change: Change) -> Self {
        Command { id: None, who: CLUSTER.to_owned(), wall_ms, change }
    }

    /// The payload of a log entry.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![COMMAND_FORMAT];
        serde_json::to_writer(&mut out, self)
            .expect("a command has no map keys but strings and writes to memory");
        out
    }

    /// Reads a log entry's payload.
    ///
    /// # Errors
    /// The bytes are of a newer format, or damaged. A node that can't read a committed command must stop: skipping it
    /// would make its state differ from the others'.
    pub fn decode(data: &[u8]) -> Result<Command, DecodeError> {
        match data.split_first() {
            Some((&COMMAND_FORMAT, rest)) => {
                serde_json::from_slice(rest).map_err(|e| DecodeError::Damaged(e.to_string()))
            }
            Some((&format, _)) => Err(DecodeError::Format { format, known: COMMAND_FORMAT }),
            None => Err(DecodeError::Damaged("it is empty".to_owned())),
        }
    }
}

/// `who` of the leader's own decisions.
pub const CLUSTER: &str = "cluster";

/// Why replicated bytes can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Written by a newer version.
    #[error("it has format {format} and this version reads up to {known}: upgrade this node")]
    Format {
        /// As written.
        format: u8,
        /// The newest one known here.
        known: u8,
    },
    /// Not what was written.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

/// A change of the replicated state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    // --- what operators ask for: the document -------------------------------------------------------------------
    /// Put a whole document in force. A dry run is [`super::State::check`] and needs no command.
    Apply {
        /// The document.
        document: Document,
        /// Refuse unless this is the revision in force.
        if_revision: Option<u64>,
        /// Roll back unless [`Change::Confirm`] comes within this time, 1 s..=1 h.
        confirm_within_ms: Option<u64>,
    },
    /// Keep what was applied with `confirm_within_ms`.
    Confirm {
        /// The revision to confirm; refused when another one is waiting.
        revision: u64,
    },
    /// Go back to what was in force before the apply that waits for its confirmation: an operator's wish, or the
    /// leader's when the time is over.
    Rollback {
        /// The revision that waits.
        revision: u64,
    },
    /// Put the document of an earlier revision in force again, as a new revision.
    Restore {
        /// One of [`super::State::history`].
        revision: u64,
    },
    /// Add a virtual service.
    ServiceAdd {
        /// The service with its backends.
        service: Service,
    },
    /// Remove a virtual service.
    ServiceRemove {
        /// Its name.
        service: String,
    },
    /// Add a backend.
    BackendAdd {
        /// Name of the service.
        service: String,
        /// The backend.
        backend: Backend,
    },
    /// Remove a backend at once; its flows meet the dead-backend policy. Drain it first to spare them.
    BackendRemove {
        /// Name of the service.
        service: String,
        /// Name of the backend.
        backend: String,
    },
    /// Set a backend's weight.
    BackendWeight {
        /// Name of the service.
        service: String,
        /// Name of the backend.
        backend: String,
        /// 0..=1000.
        weight: u32,
    },

    // --- what operators ask for: beside the document ------------------------------------------------------------
    /// Set a backend's administrative state.
    BackendAdmin {
        /// Name of the service.
        service: String,
        /// Name of the backend.
        backend: String,
        /// The state.
        admin: AdminState,
        /// `draining` only: after this time the backend is `disabled`, whatever flows it has left. Absent: it stays
        /// `draining` until an operator says otherwise. 1 s..=7 days.
        deadline_ms: Option<u64>,
    },
    /// Move a group to a node; it stays there until something better than preference speaks against it.
    Switchover {
        /// Name of the group.
        group: String,
        /// Where to; absent: to whichever other balancer is fit (the director chooses).
        to: Option<NodeId>,
    },

    // --- what the leader decides --------------------------------------------------------------------------------
    /// A drain's deadline has passed.
    DrainExpired {
        /// Which backend.
        backend: BackendId,
        /// [`super::Drain::started_index`] of the drain that is meant; refused when another one runs.
        started_index: u64,
    },
    /// Verdicts on backends. Those that are gone meanwhile, and those that already stand, are skipped.
    Health {
        /// At most [`super::MAX_VERDICTS`].
        verdicts: Vec<Verdict>,
    },
    /// Give a group to a node under the next epoch.
    Assign {
        /// Which group.
        group: GroupId,
        /// To whom: a member with role `balancer`.
        node: NodeId,
        /// The group's epoch + 1; anything else is refused.
        epoch: u64,
    },
    /// Take a group from its owner, who has confirmed its release or whose last grant has run out.
    Release {
        /// Which group.
        group: GroupId,
        /// The epoch that ends; anything but the group's own is refused.
        epoch: u64,
    },
    /// End a service's transition.
    Settle {
        /// Which service.
        service: ServiceId,
        /// [`super::Transition::changed_index`] as the leader saw it; refused when something changed since.
        changed_index: u64,
    },
    /// Addresses that a node answered for are free for other groups: the node has installed tables without them, or
    /// its last grant has run out.
    Free {
        /// Every [`super::Held`] of this node …
        node: NodeId,
        /// … that was held at or before this index.
        up_to_index: u64,
    },

    /// A node has set its own changes aside, which it had made while it went on alone. Changes nothing but the events.
    SetAside {
        /// Which node.
        node: NodeId,
        /// Where, on that node.
        file: String,
    },

    // --- membership: what operators ask for ------------------------------------------------------------------------
    /// Admit a node, as soon as it is heard and is what is said here.
    NodeJoin {
        /// Who it is.
        #[serde(with = "super::identity")]
        node: NodeIdentity,
    },
    /// Remove a node; or admit it no more.
    NodeLeave {
        /// Which.
        node: NodeId,
    },

    // --- membership: the context of a Raft configuration change, or beside it -------------------------------------
    /// A node joins, or its role in the quorum or its identity changes.
    MemberPut {
        /// The member as it is from now on. Replaces one with the same Raft id.
        member: Member,
    },
    /// A member leaves.
    MemberRemove {
        /// Its Raft id.
        raft_id: u64,
    },
}

/// The outcome of the checks of one backend, as the cluster takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Which backend.
    pub backend: BackendId,
    /// The verdict.
    pub health: Health,
    /// The last answer in words, at most [`super::MAX_REASON_LEN`] bytes are kept.
    pub reason: String,
}

/// What an accepted command did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Log index of the command.
    pub index: u64,
    /// Revision in force after it.
    pub revision: u64,
    /// Whether anything differs from before.
    pub changed: bool,
    /// What differs in the document.
    #[serde(default)]
    pub diff: Diff,
    /// What was accepted but looks wrong.
    #[serde(default)]
    pub warnings: Vec<Problem>,
}

/// How two documents differ, line by line in the order of the new one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// The differences; empty when there are none.
    pub lines: Vec<DiffLine>,
    /// What would be accepted but looks wrong.
    #[serde(default)]
    pub warnings: Vec<Problem>,
}

/// One difference between two documents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffLine {
    /// What it is about, by name: `service "web".backend "be1".weight`.
    pub path: String,
    /// Value before; absent for something new.
    pub from: Option<String>,
    /// Value after; absent for something removed.
    pub to: Option<String>,
}

impl fmt::Display for DiffLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.from, &self.to) {
            (None, Some(to)) => write!(f, "+ {}: {to}", self.path),
            (Some(from), None) => write!(f, "- {}: {from}", self.path),
            (from, to) => {
                write!(
                    f,
                    "~ {}: {} -> {}",
                    self.path,
                    from.as_deref().unwrap_or("-"),
                    to.as_deref().unwrap_or("-")
                )
            }
        }
    }
}

/// Something wrong with a document: where, what, why, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{path}: {value}: {reason}; {action}")]
pub struct Problem {
    /// The field by position and name: `service[2] "web".backend[0] "be1".port`. Positions count from 0.
    pub path: String,
    /// Its value as given.
    pub value: String,
    /// What is wrong with it.
    pub reason: String,
    /// What to do about it.
    pub action: String,
}

/// Why a command was refused. The state is as it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The document that would result is wrong; all that is wrong with it.
    #[error("{}", list_problems(.0))]
    Invalid(Vec<Problem>),
    /// `if_revision` names another revision than the one in force.
    #[error(
        "if_revision: {expected}: the revision in force is {actual}; look at what changed (export) and try again"
    )]
    Revision {
        /// As given.
        expected: u64,
        /// In force.
        actual: u64,
    },
    /// An apply waits for its confirmation.
    #[error("revision {revision} waits to be confirmed; confirm it or roll it back first")]
    AwaitingConfirm {
        /// Which.
        revision: u64,
    },
    /// Nothing waits for a confirmation, or something else does.
    #[error(
        "revision: {revision}: it does not wait to be confirmed (waiting: {waiting}); it may have been rolled back already"
    )]
    NotAwaiting {
        /// As given.
        revision: u64,
        /// What waits, in words.
        waiting: String,
    },
    /// A name or number that stands for nothing.
    #[error("{what}: \"{value}\": there is none; name one of: {known}")]
    Unknown {
        /// Kind of thing: `service`, `backend`, `group`, `node`, `revision`.
        what: String,
        /// As given.
        value: String,
        /// What there is.
        known: String,
    },
    /// Something with this name is there already.
    #[error("{what}: \"{value}\": there is one already; choose another name or change the existing one")]
    Exists {
        /// Kind of thing.
        what: String,
        /// As given.
        value: String,
    },
    /// A value out of range or not allowed here.
    #[error("{field}: {value}: {reason}")]
    Value {
        /// Which field.
        field: String,
        /// As given.
        value: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The state has moved on since the proposer looked at it. Nothing to do: it will look again.
    #[error("{what} has changed meanwhile ({detail})")]
    Superseded {
        /// What the command was about.
        what: String,
        /// Expected and actual.
        detail: String,
    },
}

fn list_problems(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}
