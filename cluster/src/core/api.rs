//! What goes into and comes out of [`super::Core`].

use std::net::SocketAddr;

use komainu_proto::domain::NodeId;
use raft::eraftpb::Message;

use crate::api::NodeIdentity;
use crate::pair::{Aside, Policy};
use crate::raft::Persist;
use crate::state::{Command, Outcome, Refusal};
use crate::time::Instant;
use crate::timing::Timing;

/// What a node knows at start, beside its store.
#[derive(Clone, Debug)]
pub struct Config {
    /// Who this node is.
    pub identity: NodeIdentity,
    /// Version of the program, for status.
    pub version: String,
    /// Every other node in the node file.
    pub peers: Vec<Peer>,
    /// Durations; must have passed [`Timing::validate`].
    pub timing: Timing,
    /// Random number of this process: recognises stamps of an earlier boot.
    pub instance: u64,
    /// Random number: election timeouts are drawn from it.
    pub seed: u64,
    /// Random number: the incarnation of the store, when this node has to make one.
    pub incarnation: u64,
    /// What is done where two balancers are all there is.
    pub pair: Policy,
}

/// Another node as the node file names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its id.
    pub id: NodeId,
    /// Its address for beats and peer gRPC.
    pub address: SocketAddr,
}

/// The two clocks at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// `CLOCK_BOOTTIME`: the only one that decides anything.
    pub at: Instant,
    /// Wall clock, ms since 1970: only written down for people.
    pub wall_ms: u64,
}

/// How a Raft message travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// Sealed UDP datagram: votes, heartbeats. May be lost.
    Datagram,
    /// gRPC: entries and snapshots. When it can't be delivered, call [`super::Core::handle_unreachable`].
    Stream,
    /// By both ways: short entries and their acknowledgements. The datagram is usually there first; the stream makes sure.
    Both,
}

/// Names one request made to this core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// What can be asked of the leader.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Replicate and apply a command.
    Command(Box<Command>),
    /// Admit a node that isn't in the leader's node file. Done when it is a member; it votes once it has caught up. The wish
    /// is replicated: it outlives whoever asked and whoever leads.
    Join {
        /// Which.
        node: NodeIdentity,
        /// Who asked, for the events.
        who: String,
    },
    /// Remove a node: its groups are moved away first. Done when it is out of the quorum. The wish is replicated.
    Leave {
        /// Which.
        node: NodeId,
        /// Who asked, for the events.
        who: String,
    },
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The command was replicated and refused; the state is as before.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// This node doesn't lead. Nothing was done: ask the leader.
    #[error("this node does not lead the cluster{}", match leader { Some(n) => format!(" (node {} does)", n.0), None => ": it has no leader now".to_owned() })]
    NotLeader {
        /// Who leads, as far as this node knows.
        leader: Option<NodeId>,
    },
    /// The cluster is being formed for the first time.
    #[error(
        "the cluster is not formed yet: {present} of {configured} configured nodes are members, a majority is needed"
    )]
    NotFormed {
        /// Members that vote.
        present: usize,
        /// Nodes in the node file.
        configured: usize,
    },
    /// Too many requests are under way, or leadership is being handed over. Nothing was done: try again.
    #[error("the leader is busy: try again")]
    Busy,
    /// The leader changed while the request was under way: it may or may not have been carried out. Commands with a
    /// [`crate::state::ProposalId`] can simply be sent again.
    #[error("the leader changed while the request was under way; it may have been carried out")]
    Lost,
    /// The request can't be carried out as things are.
    #[error("{0}")]
    Impossible(String),
}

/// What the shell is to do. Drained with [`super::Core::poll_output`] until it is empty, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send a Raft message. Everything that must be on disk before it leaves already is.
    Send {
        /// To which node.
        to: NodeId,
        /// Its address.
        address: SocketAddr,
        /// How.
        via: Via,
        /// What; `to` and `from` in it are Raft ids.
        message: Message,
    },
    /// Write to the store, then call [`super::Core::handle_persisted`].
    Persist(Persist),
    /// A request has come to its end.
    Done {
        /// Which.
        ticket: Ticket,
        /// How it ended.
        result: Result<Outcome, Failure>,
    },
    /// The replicated state has changed: [`super::Core::state`] is the new one.
    State,
    /// From now on, or no more: find out about the service network time and again, and call
    /// [`super::Core::handle_sounding`] with each result.
    Sound {
        /// Which of the two.
        on: bool,
    },
    /// Write this where nothing deletes it, then call [`super::Core::handle_aside`]. Until then this node holds nothing.
    Aside(Box<Aside>),
}
