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
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use komainu_proto::domain::NodeId;

pub use guard::be_prompt;
pub use handle::{ClusterHandle, ProposeError, QueryError};
pub use start::start;
pub use view::{LeaseView, MemberView, Quorum, View};

use crate::api::NodeIdentity;
use crate::core::Peer;
use crate::pair::{Aside, Policy};
use crate::seal::{Key, KeyError};
use crate::store::StoreError;
use crate::timing::{Timing, TimingError};
use crate::will::WillMemory;

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
    /// Where to put what is to be said when this process has died, if anybody will say it.
    pub will: Option<Arc<WillMemory>>,
    /// What matters where two balancers are all there is.
    pub pair: PairSettings,
}

/// What a pair without a third node needs.
#[derive(Clone)]
pub struct PairSettings {
    /// What the survivor does.
    pub policy: Policy,
    /// The second way between the two; without one, the cluster network is the only one.
    pub second_path: Option<Arc<dyn SecondPath>>,
    /// Writes what is set aside where nothing deletes it. Answers whether it is on disk.
    pub keep: Arc<dyn Fn(&Aside) -> bool + Send + Sync>,
}

impl PairSettings {
    /// For a node that is no part of a pair: it never goes on alone by itself, so there never is anything to keep.
    pub fn none() -> PairSettings {
        PairSettings { policy: Policy::Safety, second_path: None, keep: Arc::new(|_| false) }
    }
}

impl std::fmt::Debug for PairSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let second = self.second_path.is_some();
        f.debug_struct("PairSettings").field("policy", &self.policy).field("second_path", &second).finish()
    }
}

/// A second way for the sealed datagrams of a pair, beside the cluster network: the service network. Each datagram goes by
/// both, as the same bytes; whichever comes second is refused like any that was seen before. No method waits.
pub trait SecondPath: Send + Sync {
    /// Readable when something has arrived.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Sends to the peer.
    fn send(&self, datagram: &[u8]);
    /// The next datagram: its length, and the station that it came from; absent when there is none.
    fn receive(&self, buffer: &mut [u8]) -> Option<(usize, [u8; 6])>;
    /// What came from this station was sealed by a node of this cluster.
    fn heard(&self, station: [u8; 6]);
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
