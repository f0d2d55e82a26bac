//! The replicated state machine: what every node agrees on.
//!
//! Pure and deterministic: [`State::apply`] gets the log index and a [`Command`] that carries the proposer's identity and
//! wall clock; there is no clock, no randomness and no map with an order of its own in here. The same log gives the same
//! state on every node, byte for byte.
//!
//! # Eligibility and transitions
//!
//! A backend's *eligible weight* is its weight when it is `enabled` and its health is `up`, and 0 otherwise. A backend
//! of a service with a check starts `unknown`, so it takes no flow before its first verdict; without a check
//! (`type = "none"`) it is always `up`. A backend is *alive* — flows that it already has may go on — while it is not
//! `disabled`, not `down` and still in the document.
//!
//! A service is *settled* while flows may only have been given out under the weights in force. The first change of an
//! eligible weight opens a [`Transition`]: the weights before it become the *base*. Further changes are counted: after
//! the second one a flow made in between may be remembered in any slot ([`ServiceState::consult_all_slots`]). A
//! [`Change::Settle`] ends the transition. Two cases need none: where no backend was eligible before, no flow can exist;
//! and a UDP service with `udp_flows = "hash"` promises nothing to flows.
//!
//! A backend that was removed, or whose address or port changed, stays in the service as *gone* until the service
//! settles: without it the base table would be another one than was in force, and flows of other backends would move.
//! Its own flows meet the dead-backend policy.
//!
//! Where no backend is eligible at all the current table is empty: new flows are dropped as `no_backend` (there is no
//! "all down means all up"), flows of living backends go on.
//!
//! # Addresses that change hands
//!
//! An address that leaves an owned group is [`Held`]: its owner may still answer for it until it has installed the new
//! tables or its lease has run out. Until the leader says [`Change::Free`], no other group can take the address. So an
//! address moves between groups in two applies, and no two nodes ever answer for it.

mod apply;
mod change;
mod document;
mod events;
mod snapshot;
mod solo;
#[cfg(test)]
pub(crate) mod tests;
mod timers;
mod transition;
mod validate;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;

use komainu_proto::domain::{
    self, AdminState, BackendId, CheckType, Document, GroupId, Health, NodeId, ServiceId,
};
use serde::{Deserialize, Serialize};

use crate::api::NodeIdentity;

pub use change::{
    CLUSTER, Change, Command, DecodeError, Diff, DiffLine, MAX_COMMAND_LEN, Outcome, Problem, ProposalId,
    Refusal, Verdict,
};
pub use events::{Event, EventKind};
pub use solo::Solo;
pub use timers::{Due, Timers};
pub use validate::{Context, validate};

/// VIP groups in one document. Each is a lease that rides on every beat; 64 keep a beat within one datagram. Also keeps
/// living groups apart modulo 256, the number of lease cells in a lane.
pub const MAX_GROUPS: usize = 64;
/// Addresses (VIPs, inside VIPs, SNAT) of one group. Each is announced on its own at a takeover.
pub const MAX_GROUP_ADDRESSES: usize = 256;
/// Virtual services in one document: what a lane's tables are sized for.
pub const MAX_SERVICES: usize = 4096;
/// Backends of one service: what a Maglev table is sized for.
pub const MAX_BACKENDS: usize = 1000;
/// Backends in one document. Bounds the state's size in memory (some 40 MB) and in a snapshot.
pub const MAX_BACKENDS_TOTAL: usize = 100_000;
/// Earlier documents kept to be restored.
pub const MAX_HISTORY: usize = 64;
/// Services and backends in all earlier documents together: a long history of a big document would make every
/// snapshot big.
pub const MAX_HISTORY_ITEMS: usize = 200_000;
/// Events kept. Some hours of a busy cluster; whoever wants more reads the log.
pub const MAX_EVENTS: usize = 1024;
/// Results kept to answer a retried proposal. A retry comes within seconds; 256 are more than can be under way.
pub const MAX_RESULTS: usize = 256;
/// Verdicts in one command.
pub const MAX_VERDICTS: usize = 1024;
/// Length in bytes of a verdict's reason and of `who`, cut at a character's end.
pub const MAX_REASON_LEN: usize = 200;
/// Members, voting or not. Far above any sensible cluster; bounds the beat.
pub const MAX_MEMBERS: usize = 16;

/// What every node agrees on. Cheap to clone: everything big is shared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Log index of the newest command applied.
    pub index: u64,
    /// The configuration counter: rises by one with every change of the document; 0 before the first.
    pub revision: u64,
    /// VIP groups in the document's order.
    pub groups: Vec<Arc<GroupState>>,
    /// Virtual services in the document's order.
    pub services: Vec<Arc<ServiceState>>,
    /// Members by Raft id, ascending.
    pub members: Vec<Member>,
    /// Nodes that operators want to be admitted and that aren't members yet, at most [`MAX_MEMBERS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joining: Vec<Joining>,
    /// Members that operators want to be removed, at most [`MAX_MEMBERS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leaving: Vec<Leaving>,
    /// Addresses that left a group and may still be answered for.
    #[serde(default)]
    pub held: Vec<Held>,
    /// Documents by revision, oldest first, the last one in force. At most [`MAX_HISTORY`] and [`MAX_HISTORY_ITEMS`].
    pub history: VecDeque<Arc<Revision>>,
    /// What happened, oldest first, at most [`MAX_EVENTS`].
    pub events: VecDeque<Arc<Event>>,
    /// An apply that waits for its confirmation.
    #[serde(default)]
    pub pending: Option<Arc<PendingConfirm>>,
    /// Term of the newest time that a node of a pair went on alone; 0: never. Each such time begins a line of its own.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub line: u64,
    /// The node that goes on alone, as long as it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solo: Option<Solo>,
    /// Numbers given out last.
    ids: Ids,
    /// Results of the newest proposals, oldest first, at most [`MAX_RESULTS`].
    results: VecDeque<Arc<ProposalResult>>,
}

/// A VIP group with its ownership.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupState {
    /// Number; living groups differ modulo 256.
    pub id: GroupId,
    /// As in the document.
    pub config: domain::Group,
    /// Who owns it; absent before the first assignment and between release and assignment.
    pub owner: Option<NodeId>,
    /// Ownership counter: that of the owner, or of the last one.
    pub epoch: u64,
    /// Log index of the newest assignment; a grant needs tables of at least this index in the lane.
    pub assigned_index: u64,
    /// Where an operator moved the group to (switchover). Goes before `prefer`.
    #[serde(default)]
    pub wanted: Option<Wanted>,
}

/// An operator's wish where a group should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The node; absent: any fit balancer but [`Wanted::not`].
    pub node: Option<NodeId>,
    /// The owner at the time of the wish, when no node was named.
    pub not: Option<NodeId>,
    /// Log index of the wish.
    pub index: u64,
}

/// A virtual service with what happened to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceState {
    /// Number.
    pub id: ServiceId,
    /// Number of its group.
    pub group: GroupId,
    /// As in the document, but with an empty `backends`: they are below.
    pub config: domain::Service,
    /// Backends in the document's order, those that are gone last.
    pub backends: Vec<BackendState>,
    /// Open while flows of older weights may exist.
    #[serde(default)]
    pub transition: Option<Transition>,
}

/// A backend with what operators want of it and what the checks saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendState {
    /// Number. Another one after a change of address or port: it is another server then.
    pub id: BackendId,
    /// As in the document, but with `admin` absent: it is below.
    pub config: domain::Backend,
    /// What the operator wants.
    pub admin: AdminState,
    /// While draining: since when and how long.
    #[serde(default)]
    pub drain: Option<Drain>,
    /// What the checks saw. Without meaning for a service without a check.
    pub health: Health,
    /// The last answer in words; empty before the first.
    #[serde(default)]
    pub reason: String,
    /// Wall clock of the change to this health, ms since 1970.
    #[serde(default)]
    pub health_since_ms: u64,
    /// Weight in the base table: in force when the service was last settled.
    pub base_weight: u32,
    /// No longer in the document; here for the base table until the service settles.
    #[serde(default)]
    pub gone: bool,
}

/// A drain under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// How long after its start the backend becomes `disabled`; absent: never by itself.
    pub deadline_ms: Option<u64>,
    /// Log index of its start.
    pub started_index: u64,
    /// Wall clock of its start, ms since 1970: only to estimate what is left of it after a restart.
    pub started_ms: u64,
}

/// The time between a change of eligible weights and the end of the last flow that is older.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// Log index of the change that opened it.
    pub opened_index: u64,
    /// Log index of the newest change.
    pub changed_index: u64,
    /// Wall clock of the newest change, ms since 1970: only to estimate after a restart.
    pub changed_ms: u64,
    /// How many changes there were.
    pub changes: u32,
}

/// A node as the cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Raft id: node id and the incarnation of its store.
    pub raft_id: u64,
    /// Who it is.
    #[serde(with = "identity")]
    pub node: NodeIdentity,
    /// Whether it votes; one that doesn't is catching up.
    pub voter: bool,
}

/// An operator's wish that a node be admitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joining {
    /// Who it is.
    #[serde(with = "identity")]
    pub node: NodeIdentity,
    /// Who asked.
    pub who: String,
}

/// An operator's wish that a member be removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    /// Which.
    pub node: NodeId,
    /// Who asked.
    pub who: String,
}

/// An address that left an owned group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The address.
    pub address: IpAddr,
    /// Who may still answer for it.
    pub node: NodeId,
    /// Log index at which it left its group.
    pub index: u64,
}

/// A document that was in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// Its number.
    pub revision: u64,
    /// The document, without administrative states: restoring it doesn't end somebody's maintenance.
    pub document: Document,
    /// Who put it in force.
    pub who: String,
    /// Wall clock, ms since 1970.
    pub wall_ms: u64,
    /// How: `apply`, `restore of 3`, `backend weight web/be1`, …
    pub how: String,
}

/// An apply that waits for its confirmation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingConfirm {
    /// Its revision.
    pub revision: u64,
    /// What a rollback puts in force: the document before, with those administrative states that the apply changed.
    pub previous: Document,
    /// How long it waits.
    pub within_ms: u64,
    /// Log index of the apply.
    pub started_index: u64,
    /// Wall clock of the apply, ms since 1970: only to estimate what is left after a restart.
    pub started_ms: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Ids {
    group: u32,
    service: u32,
    backend: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ProposalResult {
    id: ProposalId,
    result: Result<Outcome, Refusal>,
}

/// For fields that are left out where they say nothing.
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl State {
    /// The group of this number.
    pub fn group(&self, id: GroupId) -> Option<&Arc<GroupState>> {
        self.groups.iter().find(|g| g.id == id)
    }

    /// The group of this name.
    pub fn group_named(&self, name: &str) -> Option<&Arc<GroupState>> {
        self.groups.iter().find(|g| g.config.name == name)
    }

    /// The service of this number.
    pub fn service(&self, id: ServiceId) -> Option<&Arc<ServiceState>> {
        self.services.iter().find(|s| s.id == id)
    }

    /// The service of this name.
    pub fn service_named(&self, name: &str) -> Option<&Arc<ServiceState>> {
        self.services.iter().find(|s| s.config.name == name)
    }

    /// The backend of this number, with its service.
    pub fn backend(&self, id: BackendId) -> Option<(&Arc<ServiceState>, &BackendState)> {
        self.services.iter().find_map(|s| s.backends.iter().find(|b| b.id == id).map(|b| (s, b)))
    }

    /// The member of this node id: the voting one when a node is there twice because it lost its disk.
    pub fn member(&self, node: NodeId) -> Option<&Member> {
        self.members.iter().filter(|m| m.node.id == node).max_by_key(|m| m.voter)
    }

    /// The member of this Raft id.
    pub fn member_by_raft_id(&self, raft_id: u64) -> Option<&Member> {
        self.members.iter().find(|m| m.raft_id == raft_id)
    }

    /// The member of this name.
    pub fn member_named(&self, name: &str) -> Option<&Member> {
        self.members.iter().filter(|m| m.node.name == name).max_by_key(|m| m.voter)
    }

    /// The document in force, without administrative states: what history keeps and `apply` compares with.
    pub fn document(&self) -> Document {
        Document {
            groups: self.groups.iter().map(|g| g.config.clone()).collect(),
            services: self.services.iter().map(|s| s.document(false)).collect(),
        }
    }

    /// The document in force with the administrative states that aren't `enabled`: what `export` shows.
    pub fn export(&self) -> Document {
        Document {
            groups: self.groups.iter().map(|g| g.config.clone()).collect(),
            services: self.services.iter().map(|s| s.document(true)).collect(),
        }
    }

    /// The document of an earlier revision, while it is in the history.
    pub fn revision(&self, revision: u64) -> Option<&Arc<Revision>> {
        self.history.iter().find(|r| r.revision == revision)
    }

    /// What is wrong with a document, or what it would change. Changes nothing: a dry run.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn check(&self, document: &Document) -> Result<Diff, Vec<Problem>> {
        let warnings = validate(document, &Context::of(self))?;
        Ok(Diff { lines: document::diff(self, document), warnings })
    }

    /// The answer given to a proposal, while it is remembered.
    pub fn result(&self, id: ProposalId) -> Option<&Result<Outcome, Refusal>> {
        self.results.iter().rev().find(|r| r.id == id).map(|r| &r.result)
    }
}

impl GroupState {
    /// Every address of the group: VIPs, inside VIPs, SNAT addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let c = &self.config;
        c.vips.iter().chain(&c.inside_vips).chain(&c.snat).copied()
    }
}

impl ServiceState {
    /// Whether flows older than the weights in force may exist in any slot, because they changed more than once.
    pub fn consult_all_slots(&self) -> bool {
        self.transition.is_some_and(|t| t.changes > 1)
    }

    /// Whether the service has a health check.
    pub fn checked(&self) -> bool {
        self.config.health.kind != CheckType::None
    }

    /// Weight of a backend in the current table; 0 when it takes no new flows.
    pub fn weight(&self, backend: &BackendState) -> u32 {
        match (backend.gone, backend.admin, self.health(backend)) {
            (false, AdminState::Enabled, Health::Up) => backend.config.weight,
            _ => 0,
        }
    }

    /// Weight of a backend in the base table; 0 when it was not in it.
    pub fn base_weight(&self, backend: &BackendState) -> u32 {
        backend.base_weight
    }

    /// Whether flows that a backend already has may still be sent to it.
    pub fn alive(&self, backend: &BackendState) -> bool {
        !backend.gone && backend.admin != AdminState::Disabled && self.health(backend) != Health::Down
    }

    /// Health of a backend: always up in a service without a check.
    pub fn health(&self, backend: &BackendState) -> Health {
        if self.checked() { backend.health } else { Health::Up }
    }

    /// Backends that are in the document.
    pub fn living(&self) -> impl Iterator<Item = &BackendState> {
        self.backends.iter().filter(|b| !b.gone)
    }

    /// The backend of this name in the document.
    pub fn backend_named(&self, name: &str) -> Option<&BackendState> {
        self.living().find(|b| b.config.name == name)
    }

    /// How long after the newest change every older flow has been seen again or is gone, in ms.
    pub fn settle_after_ms(&self) -> u64 {
        u64::from(match self.config.protocol {
            domain::Protocol::Tcp => self.config.tcp_idle_ms,
            domain::Protocol::Udp => self.config.udp_idle_ms,
        })
    }

    fn document(&self, with_admin: bool) -> domain::Service {
        let backends = self.living().map(|b| domain::Backend {
            admin: (with_admin && b.admin != AdminState::Enabled).then_some(b.admin),
            ..b.config.clone()
        });
        domain::Service { backends: backends.collect(), ..self.config.clone() }
    }
}

/// [`NodeIdentity`] belongs to the seam and knows nothing of how it is stored.
mod identity {
    use std::net::SocketAddr;

    use komainu_proto::domain::{NodeId, Role};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::api::NodeIdentity;

    #[derive(Serialize, Deserialize)]
    struct Stored {
        id: NodeId,
        name: String,
        role: Role,
        address: SocketAddr,
    }

    pub fn serialize<S: Serializer>(node: &NodeIdentity, s: S) -> Result<S::Ok, S::Error> {
        Stored { id: node.id, name: node.name.clone(), role: node.role, address: node.address }.serialize(s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<NodeIdentity, D::Error> {
        let Stored { id, name, role, address } = Stored::deserialize(d)?;
        Ok(NodeIdentity { id, name, role, address })
    }
}
