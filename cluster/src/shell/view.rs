//! What a node shows of the cluster.

use std::sync::Arc;
use std::time::Duration;

use komainu_proto::domain::{GroupId, NodeId};

use crate::api::{NodeIdentity, SelfHealth};
use crate::core::Standing;
use crate::pair::Policy;
use crate::state::State;
use crate::time::Instant;

/// What this node knows of the cluster at one moment. Cheap to clone.
#[derive(Clone, Debug)]
pub struct View {
    /// The replicated state as far as this node has applied it.
    pub state: Arc<State>,
    /// This node.
    pub node: NodeIdentity,
    /// This node's Raft id; 0 before its store has one.
    pub raft_id: u64,
    /// Who leads, as far as this node knows.
    pub leader: Option<NodeId>,
    /// Raft's term.
    pub term: u64,
    /// Whether this node has a vote.
    pub voter: bool,
    /// Every node that is a member or stands in the node file, by id.
    pub members: Vec<MemberView>,
    /// Leases that this node holds, and on the leader those that it has granted, by group.
    pub leases: Vec<LeaseView>,
    /// What decides who owns a group.
    pub quorum: Quorum,
    /// Whether a node of a pair goes on alone; [`State::solo`] says which and since when.
    pub solo: bool,
    /// How this node stands to its peer, in a pair.
    pub standing: Standing,
    /// What operators should know: a store set aside, a disk that is full, a real-time priority that was refused.
    pub notes: Vec<String>,
    /// The moment that the durations count from, on this node's clock.
    pub at: Instant,
}

/// A node as another one sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberView {
    /// Who it is: as the cluster knows it, or as the node file and its beats say.
    pub node: NodeIdentity,
    /// Its Raft id; absent when it is no member.
    pub raft_id: Option<u64>,
    /// Whether it has a vote: the process that lives, if one does, and no former store of that node besides. So a node that lost
    /// its disk is none until its vote has been moved to its new store.
    pub voter: bool,
    /// Whether a beat of it came recently; always `true` for this node itself.
    pub alive: bool,
    /// Time since its newest beat; zero for this node itself; absent before the first.
    pub since_beat: Option<Duration>,
    /// Version of its program; empty before the first beat.
    pub version: String,
    /// What it says of its fitness to own a group; absent before the first beat.
    pub health: Option<SelfHealth>,
}

/// A lease as this node knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseView {
    /// Which group.
    pub group: GroupId,
    /// Who holds it.
    pub node: NodeId,
    /// Its epoch.
    pub epoch: u64,
    /// Time left.
    pub left: Duration,
}

/// What decides who owns a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quorum {
    /// Three voters or more: never two owners.
    Witness,
    /// Two voters that each go on alone when the other is silent.
    PairAvailability,
    /// Two voters that wait for an operator when the other is silent.
    PairSafety,
    /// One voter.
    Single,
}

impl Quorum {
    /// The word used in CLI, JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Quorum::Witness => "witness",
            Quorum::PairAvailability => "pair-availability",
            Quorum::PairSafety => "pair-safety",
            Quorum::Single => "single",
        }
    }

    /// The quorum of this many voters, of which one may go on alone.
    pub fn of(voters: usize, solo: bool, standing: &Standing) -> Quorum {
        match (voters, standing.policy) {
            (0 | 1, _) if !solo => Quorum::Single,
            (0 | 1, Policy::Safety) => Quorum::PairSafety,
            (0 | 1, Policy::Availability) => Quorum::PairAvailability,
            (2, Policy::Availability) if standing.peer.is_ok() => Quorum::PairAvailability,
            // Two voters that are no pair of balancers wait for each other.
            (2, _) => Quorum::PairSafety,
            _ => Quorum::Witness,
        }
    }
}
