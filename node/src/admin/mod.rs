//! The administration: `komainu.admin.v1` served on the local socket and, where configured, over mutual TLS.
//!
//! | file | holds |
//! |---|---|
//! | [`listen`] | the sockets: opened at start, so that what is wrong with them is said then |
//! | [`doorway`] | TLS of the remote listener, and who was turned away there |
//! | [`identity`] | who is calling |
//! | [`service`] | the calls |
//! | [`changes`] | what the calls that change something ask of the cluster |
//! | [`status`] | the answer to `Status` |
//! | [`query`] | what nodes ask each other's data paths, and the answers |
//! | [`refuse`] | what went wrong, as gRPC statuses |
//!
//! A call's life: [`listen`] accepts, [`service`] finds out who calls ([`identity`]); a write goes through
//! [`changes`] and `ClusterHandle::propose` to the leader; a read is answered from this node's view, with what only a
//! group's owner knows fetched through [`query`].

pub mod changes;
pub mod doorway;
pub mod identity;
pub mod listen;
pub mod query;
pub mod refuse;
pub mod service;
pub mod status;

use std::sync::Arc;

use komainu_cluster::flowsync::PeerStatus;
use komainu_cluster::shell::ClusterHandle;
use komainu_packet::lane::SharedLane;

pub use listen::{Listeners, ServeError};
pub use query::NodeQueries;

/// What operators should know of this node beside what its cluster layer says, a sentence each.
pub type Notices = Arc<dyn Fn() -> Vec<String> + Send + Sync>;

/// How far other balancers have followed with this node's flows.
pub type Followers = Arc<dyn Fn() -> Vec<PeerStatus> + Send + Sync>;

/// What the calls work with.
#[derive(Clone)]
pub struct Context {
    /// The cluster layer.
    pub cluster: ClusterHandle,
    /// The data path; absent on a witness.
    pub lane: Option<SharedLane>,
    /// Why it is that lane, in a sentence; empty on a witness.
    pub lane_reason: Arc<str>,
    /// Where this node stores what it keeps.
    pub data_dir: std::path::PathBuf,
    /// Who has this node's flows.
    pub followers: Followers,
    /// Shown in status beside the cluster layer's.
    pub notices: Notices,
}

#[cfg(test)]
mod tests;
