//! Flows reach the standby: the protocol between an owner's flow table and those of the other balancers, without socket,
//! clock or table.
//!
//! Only what the replicated tables can't tell is remembered by a data path, so only that is sent (`ARCHITECTURE.md`, "Warm
//! standby"). For each peer there is one stream of datagrams, begun anew (a *generation*) with all flows whenever the two may
//! not agree: the peer's process or the groups that this node owns changed, or the peer is too far behind.
//!
//! ```text
//!              generation n: Begin(groups, epochs) ── all flows ── End ── changes as they happen ── …
//!   owner ────────────────────────────────────────────────────────────────────────────────────────▶ standby
//!         ◀──────────────────────────────────────────────────── Report(generation, applied, received)
//!
//!   Sending:    Off ──peer heard, groups owned──▶ Dumping ──End sent and applied──▶ Live
//!                ▲                                  ▲  │                             │
//!                └── peer silent, nothing owned ────┴──┴── too far behind, other ────┘
//! ```
//!
//! Datagrams are numbered from 0 in a generation and applied in order; a report acknowledges those that are *applied*, and
//! names those that have arrived beyond a gap, so that only what is missing is sent again. A datagram names the log index that
//! its sender's tables have, and waits at the receiver until its own tables are as new: it may name a backend that the receiver
//! does not know yet. A report is a node's sign of life too, once a second.
//!
//! **Played-back datagrams.** Data is sealed for the receiver's session, and a peer's session counts only once it has named
//! ours; so nothing that was recorded before either side's restart is taken in.
//!
//! | file | holds |
//! |---|---|
//! | `wire` | both datagrams, byte by byte |
//! | `sending`, `receiving` | one direction to and from one peer |
//! | `exchange` | all peers; what a shell talks to |
//! | `model` | a flow table for simulations |
//!
//! Order of calls: `handle_*`, `set_*` and `push`; then [`Exchange::wants_dump`], [`Exchange::poll_step`] and
//! [`Exchange::poll_transmit`] until each has nothing; then sleep until [`Exchange::next_deadline`].

mod exchange;
#[cfg(any(test, feature = "sim"))]
pub mod model;
mod receiving;
mod sending;
#[cfg(test)]
mod tests;
mod wire;

use std::net::SocketAddr;
use std::time::Duration;

use komainu_proto::domain::{BackendId, GroupId, ServiceId};

pub use exchange::{Dump, Exchange, Moment, PeerStatus, Step, Transmit, Work, data_context, report_context};
pub use wire::{Data, Report, WireError};

/// Bytes of a datagram before sealing: with the seal and UDP's and IPv6's headers below the least MTU of IPv6 (RFC 8200 §5).
pub const MAX_LEN: usize = 1180;
/// Datagrams that may be under way to a peer: as many as a report can name, and as may overtake each other before the guard
/// against replays takes one for old. A full window is some 6 000 flows.
pub const WINDOW: u64 = 64;
/// Changes that wait for a place in the window. A peer that is further behind is sent everything anew, which takes less than
/// telling it the whole story.
pub const MAX_PENDING: usize = 1 << 17;
/// Flows are asked for in pieces while fewer than this wait.
const DUMP_BELOW: usize = 4096;
/// How long a change waits for others to share its datagram, against 80 bytes of seal and headers for each: what an owner's death
/// may take with it. It is counted from the datagram before, so that one that comes alone waits for nothing.
pub const GATHER: Duration = Duration::from_millis(20);
/// The same for changes that a node can't do without when it takes over ([`Urgency::Soon`]): so long that a thousand new
/// connections a second don't take a datagram each, and no longer, because one that is younger dies with its owner.
pub const GATHER_SOON: Duration = Duration::from_micros(200);
/// An acknowledgement waits for others at most so long, or for [`ACK_EVERY`] datagrams.
const ACK_DELAY: Duration = Duration::from_millis(40);
const ACK_EVERY: u64 = 16;
/// A datagram that nobody has acknowledged is sent again after this, more than [`ACK_DELAY`]; twice as long each time.
const RESEND: Duration = Duration::from_millis(100);
const RESEND_MOST: Duration = Duration::from_secs(1);
/// One that is missing while later ones have arrived is sent again after this: more than datagrams overtake each other by.
const RESEND_MISSING: Duration = Duration::from_millis(5);
/// A report comes at least this often.
const REPORT: Duration = Duration::from_secs(1);
/// Answers to a peer that does not know our session yet come at most this often.
const GREET: Duration = Duration::from_millis(50);
/// A peer that has sent no report for so long gets nothing any more: three were lost, or it is dead.
pub const SILENT: Duration = Duration::from_millis(3500);
/// Datagrams to one peer in one [`TICK`]: 20 MB/s, a full table of a million flows in about a second, and never so much at once
/// that it fills a queue which beats must pass.
const BURST: u32 = 16;
const TICK: Duration = Duration::from_millis(1);

/// What names a flow in the whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// Its service.
    pub service: ServiceId,
    /// Client's address and port.
    pub client: SocketAddr,
}

/// A flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// Its name.
    pub name: Name,
    /// Where it goes.
    pub backend: BackendId,
    /// SNAT address and port (`nat` only).
    pub snat: Option<SocketAddr>,
    /// The data path's own word for its state.
    pub progress: u8,
}

/// What names a flow of full NAT as its backend knows it: with fewer bytes than [`Name`], whose address is the client's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Binding {
    /// Its service.
    pub service: ServiceId,
    /// Where it goes.
    pub backend: BackendId,
    /// SNAT address and port.
    pub snat: SocketAddr,
}

/// How long a change may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// [`GATHER`].
    Normal,
    /// [`GATHER_SOON`].
    Soon,
}

/// What happened to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// It is remembered, like this.
    Known(Record),
    /// It has ended or is forgotten.
    Gone(Name),
    /// The same of a flow of full NAT.
    Unbound(Binding),
}

impl Change {
    /// The flow's service.
    pub fn service(&self) -> ServiceId {
        match self {
            Change::Known(record) => record.name.service,
            Change::Gone(name) => name.service,
            Change::Unbound(binding) => binding.service,
        }
    }
}

impl Record {
    /// Its other name, if it has one.
    pub fn binding(&self) -> Option<Binding> {
        self.snat.map(|snat| Binding { service: self.name.service, backend: self.backend, snat })
    }

    /// What is told of its end.
    pub fn ended(&self) -> Change {
        self.binding().map_or(Change::Gone(self.name), Change::Unbound)
    }
}

/// A group that the sender forwards for, and under which epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owned {
    /// Which.
    pub group: GroupId,
    /// Ownership counter.
    pub epoch: u64,
}
