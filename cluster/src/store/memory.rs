//! A store in memory: for tests and simulations.

use super::{Store, StoreError};
use crate::raft::{Persist, Restored};

/// Keeps what was written, and can lose what was not synced, as a machine does whose power fails.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    /// As the process sees it.
    now: Contents,
    /// As it would be found after a power failure.
    synced: Contents,
    /// Makes the next write fail with this reason.
    failing: Option<String>,
    broken: Option<String>,
}

/// What a store holds, whatever it is made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Contents {
    raft_id: Option<crate::raft::RaftId>,
    hard_state: raft::eraftpb::HardState,
    snapshot: raft::eraftpb::Snapshot,
    entries: Vec<raft::eraftpb::Entry>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// The power fails: what was not synced is gone. Writes work again.
    pub fn lose_unsynced(&mut self) {
        self.now = self.synced.clone();
        self.restart();
    }

    /// The process ends and starts again, the machine goes on: nothing is lost. Writes work again.
    pub fn restart(&mut self) {
        self.failing = None;
        self.broken = None;
    }

    /// The disk is lost.
    pub fn lose_everything(&mut self) {
        *self = MemoryStore::default();
    }

    /// Lets the next write fail.
    pub fn fail_next_write(&mut self, reason: &str) {
        self.failing = Some(reason.to_owned());
    }
}

impl Store for MemoryStore {
    fn load(&mut self) -> Result<Option<Restored>, StoreError> {
        Ok(self.now.restored())
    }

    fn write(&mut self, write: &Persist) -> Result<(), StoreError> {
        if let Some(reason) = self.failing.take() {
            self.broken = Some(reason);
        }
        if let Some(reason) = &self.broken {
            return Err(StoreError::Broken(reason.clone()));
        }
        self.now.apply(write);
        if write.sync {
            self.synced = self.now.clone();
        }
        Ok(())
    }
}

impl Contents {
    fn apply(&mut self, write: &Persist) {
        if write.forget {
            *self = Contents::default();
        }
        if let Some(raft_id) = write.raft_id {
            self.raft_id = Some(raft_id);
        }
        if let Some(hard_state) = &write.hard_state {
            self.hard_state = hard_state.clone();
        }
        if let Some(snapshot) = &write.snapshot {
            self.snapshot = snapshot.clone();
        }
        if write.reset_log {
            self.entries.clear();
        }
        self.entries.retain(|e| e.index > write.drop_through);
        if let Some(first) = write.entries.first() {
            self.entries.retain(|e| e.index < first.index);
            self.entries.extend_from_slice(&write.entries);
        }
    }

    fn restored(&self) -> Option<Restored> {
        Some(Restored {
            raft_id: self.raft_id?,
            hard_state: self.hard_state.clone(),
            snapshot: self.snapshot.clone(),
            entries: self.entries.clone(),
        })
    }
}
