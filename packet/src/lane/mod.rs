//! A lane: an implementation of the data path.
//!
//! `af_packet` (user space) is the reference. `xdp` and `tc` ([`kernel`]) implement the same trait with the same behaviour: a
//! program in the kernel handles most frames, and hands up the others to the same engine. So nothing outside this module may
//! depend on which lane runs.

pub mod af_packet;
pub mod kernel;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use self::af_packet::{AfPacketConfig, AfPacketLane, Finding};
pub use self::af_packet::{Awaited, News};
use self::kernel::{Choice, Hook, KernelLane};
use crate::engine::{Adopted, FlowNews, FlowRecord};
use crate::lease::Lease;
use crate::plan::{Plan, Protocol};

/// Which lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LaneKind {
    /// Packet sockets, in user space.
    AfPacket,
    /// eBPF at the driver.
    Xdp,
    /// eBPF at the traffic-control hook.
    Tc,
}

impl LaneKind {
    /// The word used in files, CLI and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            LaneKind::AfPacket => "af_packet",
            LaneKind::Xdp => "xdp",
            LaneKind::Tc => "tc",
        }
    }
}

/// The data path of one node. All methods may be called from any thread.
pub trait Lane: Send + Sync {
    /// Which lane this is.
    fn kind(&self) -> LaneKind;

    /// How it is attached, for `status` (`lane_mode`), e.g. `ring+vnet_hdr`.
    fn mode(&self) -> String;

    /// Puts `plan` in force as a whole. When this returns, every packet read after is treated by it.
    ///
    /// # Errors
    /// The plan can't be carried out by this lane; the previous plan stays in force.
    fn install(&self, plan: Plan) -> Result<(), LaneError>;

    /// Revision of the plan in force; 0 before the first.
    fn installed_revision(&self) -> u64;

    /// Writes a lease. Called by the beat thread every few milliseconds: never waits.
    fn set_lease(&self, group: u32, lease: Lease);

    /// Starts the announcement schedule for the group's addresses: at once, repeated, then refreshed, all of it only
    /// while the lease permits to answer. Called after the lease was written. Never waits.
    fn announce(&self, group: u32);

    /// Counters since start. Monotonic.
    fn counters(&self) -> Counters;

    /// Remembered flows that match, at most `limit` (0..=65536), in no order.
    fn flows(&self, filter: &FlowFilter, limit: usize) -> Vec<FlowInfo>;

    /// Where a flow from `client` to the service would go now, and why.
    fn trace(&self, service: u32, client: SocketAddr) -> Option<Trace>;

    /// State of the interfaces that the lane uses.
    fn links(&self) -> Vec<LinkInfo>;

    /// Whether the data path works, and if not, why: its thread has ended or is stuck, or an interface is gone. A link that
    /// is merely down is told by [`Lane::links`].
    ///
    /// # Errors
    /// The reason in a sentence, for the node's self-health.
    fn forwarding(&self) -> Result<(), String> {
        Ok(())
    }

    /// Gateways of the service interface's default routes, the preferred one first, both families.
    fn gateways(&self) -> Vec<IpAddr> {
        Vec::new()
    }

    /// How its remembered flows are exchanged with other nodes; `None`: not at all.
    fn sharing(&self) -> Option<&dyn FlowSharing> {
        None
    }

    /// What the leases stand in, for whoever must end what this lane answers for when this process is dead
    /// ([`kernel::Silencer`]). `None`: a dead process answers for nothing anyway.
    fn leases(&self) -> Option<&OwnedFd> {
        None
    }

    /// Stops forwarding and announcing and gives everything back. Idempotent; returns when threads have ended.
    fn stop(&self);
}

/// Remembered flows on their way to and from other nodes. All methods may be called from any thread; those that answer an
/// `Option` ask the lane's thread, and `None` says that it gave no answer in time.
pub trait FlowSharing: Send + Sync {
    /// What happens to this node's flows. One taker.
    fn news(&self) -> &News;

    /// Flows of `groups` that others should know, from a place of the table on (0: its beginning), and where to go on; no
    /// place: that was all. What happens meanwhile is told as news.
    fn shared(&self, groups: Arc<[u32]>, from: usize) -> Option<(Vec<FlowRecord>, Option<usize>)>;

    /// Takes over what another node tells, at most [`MAX_ADOPTED`] at a time, under the `mark` of its sending, which is not 0.
    /// Where this node has a lease, what it knows itself stays.
    fn adopt(&self, news: Vec<FlowNews>, mark: u32) -> Option<Adopted>;

    /// Forgets flows of `groups` that did not come with the sending of that `mark`, from a place of the table on, except where
    /// this node has a lease. Where to go on; no place: that was all.
    fn sweep(&self, groups: Arc<[u32]>, mark: u32, from: usize) -> Option<Option<usize>>;
}

/// News that are taken over in one go: some tens of microseconds, so that no frame waits long.
pub const MAX_ADOPTED: usize = 256;

/// Where a lane can't do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The interface does not exist.
    #[error("interface \"{name}\" does not exist: name one of {known}")]
    NoInterface {
        /// As configured.
        name: String,
        /// Those that exist.
        known: String,
    },
    /// The interface is of no use as it is.
    #[error("interface \"{name}\": {reason}")]
    Interface {
        /// Its name.
        name: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A system call failed.
    #[error("{doing}: {source}")]
    System {
        /// What was being done, with the interface's name.
        doing: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The plan contradicts itself or exceeds a limit.
    #[error("plan at revision {revision}: {reason}")]
    Plan {
        /// Its revision.
        revision: u64,
        /// What is wrong.
        reason: String,
    },
}

/// Counters of a lane since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// By service id, backend id.
    pub backends: Vec<BackendCounters>,
    /// Reason and number of frames dropped, every reason present also at 0, in a fixed order.
    pub drops: Vec<(&'static str, u64)>,
    /// Other events by name (ARP answered, announcements sent, foreign claims seen, …), in a fixed order.
    pub events: Vec<(&'static str, u64)>,
    /// Remembered flows at this moment.
    pub flows: u64,
}

/// Counters of one backend of one service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendCounters {
    /// Service id.
    pub service: u32,
    /// Backend id.
    pub backend: u32,
    /// Packets sent to the backend. A super-frame counts as the segments it holds.
    pub packets: u64,
    /// Bytes of layer 3 sent to the backend.
    pub bytes: u64,
    /// Packets from the backend to clients (not in `dsr`).
    pub return_packets: u64,
    /// Bytes of layer 3 from the backend to clients (not in `dsr`).
    pub return_bytes: u64,
    /// New flows: TCP SYNs and new UDP flows sent to the backend.
    pub new_flows: u64,
    /// Remembered flows at this moment.
    pub flows: u64,
    /// Flows at this moment as far as they can be seen: remembered ones, and for stateless services an estimate of
    /// those that sent something in the last seconds. Drain waits for this to reach 0.
    pub active: u64,
}

/// Which flows to list. Absent fields match all.
#[derive(Clone, Debug, Default)]
pub struct FlowFilter {
    /// Service id.
    pub service: Option<u32>,
    /// Backend id.
    pub backend: Option<u32>,
}

/// A remembered flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowInfo {
    /// Service id.
    pub service: u32,
    /// Backend id.
    pub backend: u32,
    /// Layer-4 protocol.
    pub protocol: Protocol,
    /// Client's address and port.
    pub client: SocketAddr,
    /// SNAT address and port (`nat` only).
    pub snat: Option<SocketAddr>,
    /// State: `syn_sent`, `established`, `closing`, `udp`.
    pub state: &'static str,
    /// Time since the last packet.
    pub idle: Duration,
}

/// Where a flow would go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Backend that a segment of a flow that exists would go to; absent when there is none.
    pub existing: Option<u32>,
    /// Backend that a new flow would go to; absent when there is none.
    pub new: Option<u32>,
    /// Slot of the Maglev table, when one decided.
    pub slot: Option<u32>,
    /// Whether the flow is remembered.
    pub remembered: bool,
    /// Why, in a sentence.
    pub reason: String,
}

/// State of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Name.
    pub name: String,
    /// Administratively up and with carrier.
    pub up: bool,
    /// Its address, when it has one.
    pub mac: Option<[u8; 6]>,
    /// Addresses with prefix length that the kernel has on it.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// A lane shared between the threads of a node.
pub type SharedLane = Arc<dyn Lane>;

/// Is this machine fit for a lane? What stands against it, what may, and what was found; worst first.
pub fn check(kind: LaneKind, config: &AfPacketConfig) -> Vec<Finding> {
    match kind {
        LaneKind::AfPacket => AfPacketLane::check(config),
        LaneKind::Xdp => KernelLane::check(Hook::Xdp, config),
        LaneKind::Tc => KernelLane::check(Hook::Tc, config),
    }
}

/// Starts a lane in the network namespace of the calling thread.
///
/// # Errors
/// The first thing found that stands against it, or what the system refused.
pub fn start(kind: LaneKind, config: AfPacketConfig) -> Result<SharedLane, LaneError> {
    Ok(match kind {
        LaneKind::AfPacket => {
            clear_the_way(&config);
            Arc::new(AfPacketLane::start(config)?)
        }
        LaneKind::Xdp => Arc::new(KernelLane::start(Hook::Xdp, config)?),
        LaneKind::Tc => Arc::new(KernelLane::start(Hook::Tc, config)?),
    })
}

/// Starts the lane that was chosen. Where the choice was free and the machine refuses it after all, the next best is started;
/// what runs then, and why, is returned. An XDP program that the driver won't run is slower than one at the tc hook: so that
/// counts as a refusal too.
///
/// # Errors
/// As [`start`].
pub fn start_chosen(mut choice: Choice, config: &AfPacketConfig) -> Result<(SharedLane, Choice), LaneError> {
    loop {
        let started = start(choice.kind, config.clone());
        if choice.forced || choice.kind == LaneKind::AfPacket {
            return Ok((started?, choice));
        }
        let reason = match started {
            Ok(lane) if choice.kind == LaneKind::Xdp && lane.mode().contains(kernel::GENERIC) => {
                lane.stop();
                "the driver does not take the XDP program".to_owned()
            }
            Ok(lane) => return Ok((lane, choice)),
            Err(error) => error.to_string(),
        };
        tracing::warn!(lane = choice.kind.as_str(), reason, "can't be had: the next best lane");
        let kind = if choice.kind == LaneKind::Xdp { LaneKind::Tc } else { LaneKind::AfPacket };
        choice = Choice { kind, reason, forced: false };
    }
}

/// Takes away what a lane in the kernel left when its process was killed: without a lease it would keep from packet sockets
/// what is for the VIPs.
fn clear_the_way(config: &AfPacketConfig) {
    let interfaces: Vec<&str> = config.interfaces().collect();
    match kernel::clean_up(&interfaces) {
        Ok(0) => {}
        Ok(links) => tracing::info!(links, "taken away what a lane in the kernel had left"),
        Err(error) => tracing::warn!(error, "what a lane in the kernel left may stand in the way"),
    }
}
