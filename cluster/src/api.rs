//! What a node gives to and gets from its cluster layer: the seam to `node`.

use std::sync::Arc;

use komainu_proto::domain::{BackendId, GroupId, Health, NodeId, Role};

use crate::flowsync::Owned;
use crate::time::Instant;

/// What this node may do for one VIP group, and until when, on this node's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseUpdate {
    /// Epoch of the ownership.
    pub epoch: u64,
    /// Answer ARP/ND and announce until then.
    pub answer_until: Instant,
    /// Forward until then.
    pub forward_until: Instant,
}

/// The data path as the cluster layer sees it. A witness has none.
///
/// Called from the beat thread: every method must return within microseconds and must never wait.
pub trait DataPath: Send + Sync {
    /// Writes a lease; it is in force for every packet that leaves after the call.
    fn set_lease(&self, group: GroupId, lease: LeaseUpdate);
    /// Announce the group's addresses; called once each time this node becomes the owner, after `set_lease`, and again
    /// when a split heals.
    fn announce(&self, group: GroupId);
    /// Log index of the replicated state that the installed tables were derived from. A group is granted to a node
    /// only when this has reached the index of its assignment.
    fn installed_index(&self) -> u64;
    /// The other nodes that have all remembered flows of the groups that this one owns, but for what is under way; a group
    /// is handed over in order to one of them. Absent: this data path sends its flows to nobody, and nobody need have them.
    fn followers(&self) -> Option<Vec<NodeId>> {
        None
    }
    /// Groups of which this node was told all remembered flows, and under which epoch their owner had them. An owner that was started
    /// anew has none of its own any more.
    fn told(&self) -> Vec<Owned> {
        Vec::new()
    }
}

/// What a node knows about its own fitness to own a VIP group. Carried on beats.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SelfHealth {
    /// Interfaces of the data path are up.
    pub links_up: bool,
    /// The service network's gateway answers; absent when none is configured.
    pub gateway: Option<bool>,
    /// The data path forwards.
    pub forwarding: bool,
    /// Why not, for status; empty when fit.
    pub reason: String,
}

impl SelfHealth {
    /// Whether the node can own a VIP group.
    pub fn fit(&self) -> bool {
        self.links_up && self.forwarding && self.gateway != Some(false)
    }
}

/// What this node's checks see of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Which.
    pub backend: BackendId,
    /// After rise/fall counting.
    pub health: Health,
    /// The last answer in words, e.g. `200 OK in 3 ms`.
    pub reason: String,
}

/// Identity of a node as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    /// Number from the node file.
    pub id: NodeId,
    /// Name.
    pub name: String,
    /// Role.
    pub role: Role,
    /// Address for peer gRPC and beats.
    pub address: std::net::SocketAddr,
}

/// A data path shared with the beat thread.
pub type SharedDataPath = Arc<dyn DataPath>;
