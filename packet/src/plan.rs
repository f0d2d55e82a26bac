//! What a lane is to do, as one whole picture: the seam between the cluster's replicated state and the data path.
//!
//! Every node derives the same plan from the same replicated state at the same revision, so a standby's tables send a
//! flow to the same backend as the owner's did.

use std::net::IpAddr;
use std::time::Duration;

/// VIP groups that one lane can serve. Bounded because each has a fixed lease cell that every packet reads.
pub const MAX_GROUPS: usize = 256;
/// Backends of one virtual service. Bounded by the size of a Maglev table entry and the table's build time.
pub const MAX_BACKENDS: usize = 1000;
/// Virtual services in one plan.
pub const MAX_SERVICES: usize = 4096;

/// Everything a lane forwards, at one revision of the cluster's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Counter of the replicated state that this plan was derived from; rises.
    pub revision: u64,
    /// VIP groups.
    pub groups: Vec<GroupPlan>,
    /// Virtual services.
    pub services: Vec<ServicePlan>,
}

/// A VIP group: addresses that are answered for under one lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupPlan {
    /// Cluster-wide number, never reused. Two groups of one plan differ in `id % MAX_GROUPS`.
    pub id: u32,
    /// Name for messages.
    pub name: String,
    /// Addresses that clients use, on the service network.
    pub vips: Vec<IpAddr>,
    /// Addresses that `nat-transparent` backends route back through, on the inside network (on the service network
    /// when the node has no inside interface).
    pub inside_vips: Vec<IpAddr>,
    /// Source addresses of `nat` services. Answered for on the network that the backends are reached through.
    pub snat: Vec<IpAddr>,
}

/// Layer-4 protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Forwarding mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Rewrite the destination MAC only; the backend holds the VIP and answers the client itself.
    Dsr,
    /// Full NAT: source becomes a SNAT address and port of the group, destination the backend.
    Nat,
    /// Destination rewritten only; the backend routes its answers through the group's inside VIP.
    NatTransparent,
}

/// How a new flow finds its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheduler {
    /// Maglev table indexed by a hash of the 5-tuple.
    Maglev,
    /// Maglev table indexed by a hash of the client address.
    SourceIp,
    /// Next in turn, by weight; every flow is remembered.
    RoundRobin,
    /// Fewest flows relative to weight; every flow is remembered.
    LeastConn,
}

/// What happens to a segment or datagram whose backend is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeadBackend {
    /// TCP: RST to the client. UDP: dropped and forgotten, so that the next datagram finds a living one.
    Reset,
    /// Goes to the current backend of its slot.
    Rehash,
    /// Goes to the dead backend, which may come back.
    Keep,
}

/// A virtual service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// Cluster-wide number, never reused.
    pub id: u32,
    /// Name for messages.
    pub name: String,
    /// Group that the VIP belongs to: its lease is this service's lease.
    pub group: u32,
    /// Virtual IP address.
    pub vip: IpAddr,
    /// Destination port.
    pub port: u16,
    /// Layer-4 protocol.
    pub protocol: Protocol,
    /// Forwarding mode.
    pub mode: Mode,
    /// Scheduler.
    pub scheduler: Scheduler,
    /// Dead-backend policy.
    pub dead_backend: DeadBackend,
    /// UDP: remember flows (`true`) or send each datagram where the hash says.
    pub track_udp: bool,
    /// Idle time after which an established TCP flow is forgotten.
    pub tcp_idle: Duration,
    /// Idle time after which a UDP flow is forgotten.
    pub udp_idle: Duration,
    /// Backends of the current table and of the base table, in one list.
    pub backends: Vec<BackendPlan>,
    /// Set while the service is in transition and has changed more than once since its base table was in force: then
    /// flows of any slot may be remembered, so every slot consults the flow table.
    pub consult_all_slots: bool,
}

/// A backend as the tables see it.
///
/// The *current* table is built from `weight`, the *base* table (what was in force before the transition began) from
/// `base_weight`. A slot on which both agree needs no flow state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendPlan {
    /// Cluster-wide number, never reused; also what the backend's Maglev permutation is derived from.
    pub id: u32,
    /// Name for messages.
    pub name: String,
    /// Address; same family as the VIP.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// Weight in the current table; 0 when it takes no new flows (draining, disabled, down, weight 0).
    pub weight: u32,
    /// Weight in the base table; 0 when it was not in it.
    pub base_weight: u32,
    /// Whether flows that it already has may still be sent to it. `false`: the dead-backend policy applies.
    pub alive: bool,
}
