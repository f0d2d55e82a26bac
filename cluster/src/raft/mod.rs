//! Driving `raft`: the log in memory, what must be on disk before what, ids.

mod ids;
mod persist;

pub use ids::RaftId;
pub use persist::{Persist, Restored};
