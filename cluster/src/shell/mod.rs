//! Threads, sockets, disk and clock around the cores.
//!
//! | who | owns | may wait for |
//! |---|---|---|
//! | beat thread | UDP socket, the clock of the leases | nothing but its socket and its next deadline |
//! | Raft thread | Raft core, store | fsync |
//! | tokio tasks | gRPC server and streams to peers | the network |
//!
//! A panic in the beat thread or the Raft thread aborts the process: a crash is a failover, a half-dead node is an outage.

mod beat;
mod client;
mod clock;
mod driver;
mod facts;
mod guard;
mod handle;
mod server;
mod start;
mod streams;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod transport_tests;
mod view;
mod wire;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use bytes::Bytes;
use komainu_proto::domain::NodeId;

pub use handle::{ClusterHandle, ProposeError, QueryError};
pub use start::start;
pub use view::{LeaseView, MemberView, Quorum, View};

use crate::api::NodeIdentity;
use crate::core::Peer;
use crate::seal::{Key, KeyError};
use crate::store::StoreError;
use crate::timing::{Timing, TimingError};

/// What a node knows at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who this node is. `address` is what the others reach it by; it is also what is listened on.
    pub identity: NodeIdentity,
    /// Every other node in the node file.
    pub peers: Vec<Peer>,
    /// The cluster's secret.
    pub secret: Key,
    /// Directory of the store; made when missing.
    pub data_dir: PathBuf,
    /// Durations.
    pub timing: Timing,
    /// Version of the program, for status.
    pub version: String,
}

/// Answers what other nodes ask about this one's data path (counters, flows, traces).
pub trait QueryHandler: Send + Sync {
    /// Answers one query; both are opaque to the cluster layer. Called on a thread that may block for a short time.
    fn query(&self, from: NodeId, request: Bytes) -> Bytes;
}

/// Why a node can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The durations break a lease rule.
    #[error(transparent)]
    Timing(#[from] TimingError),
    /// The store can't be used, not even an empty one.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An address can't be listened on.
    #[error(
        "cluster.listen: {address} ({what}): {source}; is another komainu running, is the address one of this machine?"
    )]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// `UDP` or `TCP`.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// What the store holds is not for this node, or can't be read by this version.
    #[error(transparent)]
    Core(#[from] crate::core::StartError),
    /// No randomness.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A thread can't be started.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("whoever panicked with the lock has ended the process: a crash is a failover")
}
