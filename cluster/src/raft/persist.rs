//! What the Raft core wants on disk, and what it gets back from there at start.

use raft::eraftpb::{Entry, HardState, Snapshot};

use super::RaftId;
use crate::state::{DecodeError, State};

/// One write to the store. Writes are made in the order in which they are handed out, each as a whole or not at all;
/// [`crate::core::Core::handle_persisted`] is called with `number` when the write and all before it are on disk (with
/// `sync`: after fsync). Within one write the order is: `forget`, `reset_log`, `drop_through`, then `entries`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Persist {
    /// Rises by one with each write of a process; starts at 1.
    pub number: u64,
    /// The id of the store, in the first write of a store's life. A store without one is empty.
    pub raft_id: Option<RaftId>,
    /// Replaces the term, vote and commit index stored.
    pub hard_state: Option<HardState>,
    /// Replaces the snapshot stored. Its data is opaque here, see [`crate::raft::SnapshotData`].
    pub snapshot: Option<Snapshot>,
    /// Delete every log entry first: a snapshot from the leader took their place.
    pub reset_log: bool,
    /// Delete log entries up to this index, inclusive; 0 for none. They are in the snapshot.
    pub drop_through: u64,
    /// Entries to append. Every stored entry from the first one's index on is deleted before.
    pub entries: Vec<Entry>,
    /// The store is empty from here on, before anything else in this write.
    pub forget: bool,
    /// Whether it must be on disk before it is reported; without, the write may be reported once handed to the system
    /// (only a commit index moved, or the log was compacted).
    pub sync: bool,
}

/// What a store holds at start.
#[derive(Clone, Debug, PartialEq)]
pub struct Restored {
    /// Id under which the store was created.
    pub raft_id: RaftId,
    /// Term, vote, commit index.
    pub hard_state: HardState,
    /// The snapshot; every store that isn't empty has one.
    pub snapshot: Snapshot,
    /// Entries by index, without gaps; the first index is at most the snapshot's + 1.
    pub entries: Vec<Entry>,
}

/// The data of a snapshot: which cluster, and its state.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotData {
    /// Raft id of the node that founded the cluster: no two clusters have the same.
    pub cluster: u64,
    /// Replicated state at the snapshot's index.
    pub state: State,
}

/// Bytes before the state.
const HEAD: usize = 8;

impl SnapshotData {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.cluster.to_be_bytes().to_vec();
        out.extend_from_slice(&self.state.encode());
        out
    }

    /// Reads what [`SnapshotData::encode`] wrote.
    ///
    /// # Errors
    /// It is of a newer format, or damaged.
    pub fn decode(data: &[u8]) -> Result<SnapshotData, DecodeError> {
        let Some((head, state)) = data.split_first_chunk::<HEAD>() else {
            return Err(DecodeError::Damaged("it is too short".to_owned()));
        };
        Ok(SnapshotData { cluster: u64::from_be_bytes(*head), state: State::decode(state)? })
    }
}
