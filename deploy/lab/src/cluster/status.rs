//! `komainu status --json`, as far as the lab reads it. Unknown fields are ignored: the surface may grow.

use serde::Deserialize;

/// The whole answer.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// The node that answered.
    pub node: NodeStatus,
    /// Its cluster.
    pub cluster: ClusterStatus,
    /// VIP groups.
    pub groups: Vec<GroupStatus>,
    /// Virtual services.
    pub services: Vec<ServiceStatus>,
    /// Frames dropped, by reason.
    #[serde(default)]
    pub drops: std::collections::BTreeMap<String, u64>,
    /// What an operator should know.
    #[serde(default)]
    pub notices: Vec<String>,
}

/// The node that answered.
#[derive(Clone, Debug, Deserialize)]
pub struct NodeStatus {
    /// Number.
    pub id: u64,
    /// Name.
    pub name: String,
    /// `balancer` or `witness`.
    pub role: String,
    /// Which lane runs.
    #[serde(default)]
    pub lane: String,
    /// How it is attached.
    #[serde(default)]
    pub lane_mode: String,
    /// Why it is that lane.
    pub lane_reason: String,
}

/// The cluster.
#[derive(Clone, Debug, Deserialize)]
pub struct ClusterStatus {
    /// Id of the leader as this node knows it.
    pub leader: Option<u64>,
    /// Raft's term.
    pub term: u64,
    /// What majority there is.
    pub quorum: String,
    /// Whether a node of a pair goes on alone.
    #[serde(default)]
    pub solo: bool,
    /// Revision of the document.
    pub revision: u64,
    /// Members.
    pub members: Vec<MemberStatus>,
}

/// A member of the cluster.
#[derive(Clone, Debug, Deserialize)]
pub struct MemberStatus {
    /// Number.
    pub id: u64,
    /// Name.
    pub name: String,
    /// Whether the asked node heard of it lately.
    pub alive: bool,
    /// Whether it votes.
    #[serde(default)]
    pub voter: bool,
    /// Whether it can own a VIP group; absent when not known.
    #[serde(default)]
    pub fit: Option<bool>,
    /// Why not.
    #[serde(default)]
    pub unfit_reason: String,
}

/// A VIP group.
#[derive(Clone, Debug, Deserialize)]
pub struct GroupStatus {
    /// Name.
    pub name: String,
    /// Name of the owner.
    pub owner: Option<String>,
    /// Counter of ownership.
    pub epoch: u64,
    /// What is left of the lease, in ms, where the asked node knows.
    #[serde(default)]
    pub lease_left_ms: u64,
    /// Flows that the standby does not know yet.
    #[serde(default)]
    pub standby_lag_flows: u64,
}

/// A virtual service.
#[derive(Clone, Debug, Deserialize)]
pub struct ServiceStatus {
    /// Name.
    pub name: String,
    /// Backends.
    pub backends: Vec<BackendStatus>,
    /// Whether flows may still be there that are older than the newest change of the backends.
    #[serde(default)]
    pub in_transition: bool,
}

/// A backend.
#[derive(Clone, Debug, Deserialize)]
pub struct BackendStatus {
    /// Name.
    pub name: String,
    /// `enabled`, `draining` or `disabled`.
    pub admin: String,
    /// `up`, `down` or `unknown`.
    pub health: String,
    /// Flows at this moment.
    #[serde(default)]
    pub flows: u64,
    /// Packets sent to it.
    #[serde(default)]
    pub packets: u64,
    /// Last answer of its check in words.
    #[serde(default)]
    pub reason: String,
}

impl Status {
    /// The group called `name`.
    pub fn group(&self, name: &str) -> Option<&GroupStatus> {
        self.groups.iter().find(|g| g.name == name)
    }

    /// A backend of a service.
    pub fn backend(&self, service: &str, backend: &str) -> Option<&BackendStatus> {
        self.services.iter().find(|s| s.name == service)?.backends.iter().find(|b| b.name == backend)
    }

    /// Name of the owner of `group`.
    pub fn owner(&self, group: &str) -> Option<&str> {
        self.group(group)?.owner.as_deref()
    }

    /// Whether no service is in transition.
    pub fn settled(&self) -> bool {
        self.services.iter().all(|s| !s.in_transition)
    }

    /// Whether every backend of every service is up.
    pub fn all_up(&self) -> bool {
        self.services.iter().flat_map(|s| &s.backends).all(|b| b.health == "up")
    }
}
