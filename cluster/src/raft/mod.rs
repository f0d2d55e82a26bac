//! What `raft` needs around it: ids, the log in memory, and what must be on disk before what.

mod ids;
mod log;
pub(crate) mod logger;
mod persist;

pub use ids::RaftId;
pub use log::Log;
pub use persist::{Persist, Restored, SnapshotData};
