//! The Raft log in memory, as `raft` reads it.
//!
//! Everything since the newest snapshot is here, bounded by compaction; the disk is only written ([`super::Persist`])
//! and read once at start. So `raft` never waits for a read, and what it may read does not depend on what is on disk.

use std::cell::Cell;
use std::collections::VecDeque;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use super::Restored;

/// Entries kept behind a snapshot, for followers that are a little behind: catching up from the log is cheaper.
const KEEP_ENTRIES: usize = 256;
/// Entries since the last snapshot that make a new one worth while.
const COMPACT_ENTRIES: usize = 2048;
/// Bytes of entries since the last snapshot that make a new one worth while, however few they are. Bounds memory.
const COMPACT_BYTES: usize = 32 << 20;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub struct Log {
    hard_state: HardState,
    /// Configuration at start: `raft` asks for it once.
    conf_state: ConfState,
    snapshot: Snapshot,
    /// Index and term of the entry before the first one kept.
    before: (u64, u64),
    entries: VecDeque<Entry>,
    bytes: usize,
    /// A follower needs a snapshot and the newest one is of no use to it.
    outdated: Cell<bool>,
}

impl Log {
    /// The log of an empty store.
    pub fn new() -> Log {
        Log::default()
    }

    /// The log as the store holds it.
    pub fn restored(restored: &Restored) -> Log {
        let meta = restored.snapshot.get_metadata();
        let mut log = Log {
            hard_state: restored.hard_state.clone(),
            conf_state: meta.get_conf_state().clone(),
            snapshot: restored.snapshot.clone(),
            before: (meta.index, meta.term),
            ..Log::default()
        };
        log.append(restored.entries.iter().filter(|e| e.index > meta.index).cloned());
        // The commit index is only written along with something else.
        log.hard_state.commit = log.hard_state.commit.clamp(meta.index, log.last());
        log.hard_state.term = log.hard_state.term.max(log.term_of(log.last()).unwrap_or_default());
        log
    }

    /// Index of the newest entry.
    pub fn last(&self) -> u64 {
        self.before.0 + self.entries.len() as u64
    }

    /// Term, vote and commit index at start.
    pub fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    /// The newest snapshot.
    pub fn newest_snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Takes entries in; those from the first one's index on are replaced.
    pub fn append(&mut self, entries: impl IntoIterator<Item = Entry>) {
        for e in entries {
            while self.last() >= e.index {
                let Some(old) = self.entries.pop_back() else { break };
                self.bytes -= size(&old);
            }
            assert_eq!(self.last() + 1, e.index, "the log has no gaps");
            self.bytes += size(&e);
            self.entries.push_back(e);
        }
    }

    /// A snapshot from the leader takes the place of everything.
    pub fn install(&mut self, snapshot: Snapshot) {
        let meta = snapshot.get_metadata();
        self.before = (meta.index, meta.term);
        self.conf_state = meta.get_conf_state().clone();
        self.entries.clear();
        self.bytes = 0;
        self.snapshot = snapshot;
    }

    /// Whether enough has been applied since the last snapshot to make a new one.
    pub fn wants_compaction(&self, applied: u64) -> bool {
        let since = applied.saturating_sub(self.snapshot.get_metadata().index);
        if since > 0 && self.outdated.get() {
            return true;
        }
        since >= COMPACT_ENTRIES as u64 || (since > 0 && self.bytes >= COMPACT_BYTES)
    }

    /// Takes a snapshot of what is applied, and drops the entries that it covers but for the newest. Returns the index
    /// up to which entries were dropped.
    pub fn compact(&mut self, snapshot: Snapshot) -> u64 {
        let index = snapshot.get_metadata().index;
        self.snapshot = snapshot;
        self.outdated.set(false);
        let keep_from =
            if self.bytes >= COMPACT_BYTES { index } else { index.saturating_sub(KEEP_ENTRIES as u64) };
        while self.entries.front().is_some_and(|e| e.index <= keep_from) {
            if let Some(e) = self.entries.pop_front() {
                self.bytes -= size(&e);
                self.before = (e.index, e.term);
            }
        }
        self.before.0
    }

    /// Term of the entry at `index`, while it is known.
    pub fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.before.0 {
            return Some(self.before.1);
        }
        let meta = self.snapshot.get_metadata();
        if index == meta.index {
            return Some(meta.term);
        }
        let at = index.checked_sub(self.before.0 + 1)?;
        self.entries.get(usize::try_from(at).ok()?).map(|e| e.term)
    }

    /// Sets what is read back when `raft` is started on this log again.
    pub fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }
}

fn size(e: &Entry) -> usize {
    e.data.len() + e.context.len() + 32
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.before.0 {
            return Err(StorageError::Compacted.into());
        }
        if high > self.last() + 1 {
            return Err(StorageError::Unavailable.into());
        }
        let max = max_size.into().unwrap_or(u64::MAX);
        let mut out = Vec::new();
        let mut total = 0u64;
        let skip = (low - self.before.0 - 1) as usize;
        for e in self.entries.iter().skip(skip).take((high - low) as usize) {
            total = total.saturating_add(size(e) as u64);
            if !out.is_empty() && total > max {
                break;
            }
            out.push(e.clone());
        }
        Ok(out)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.term_of(index).ok_or_else(|| {
            if index < self.before.0 {
                StorageError::Compacted.into()
            } else {
                StorageError::Unavailable.into()
            }
        })
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.before.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let meta = self.snapshot.get_metadata();
        // A node refuses a snapshot of a configuration that it isn't in.
        let conf = meta.get_conf_state();
        if meta.index < request_index || !conf.voters.iter().chain(&conf.learners).any(|id| *id == to) {
            self.outdated.set(true);
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        Ok(self.snapshot.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: vec![0; 8], ..Entry::default() }
    }

    fn snapshot(index: u64, term: u64) -> Snapshot {
        let mut s = Snapshot::default();
        s.mut_metadata().index = index;
        s.mut_metadata().term = term;
        s
    }

    fn log(last: u64) -> Log {
        let mut log = Log::new();
        log.append((1..=last).map(|i| entry(i, 1)));
        log
    }

    fn read(log: &Log, low: u64, high: u64) -> Vec<u64> {
        let entries = log.entries(low, high, None, GetEntriesContext::empty(false)).unwrap();
        entries.iter().map(|e| e.index).collect()
    }

    #[test]
    fn a_conflicting_tail_is_replaced() {
        let mut log = log(5);
        log.append([entry(3, 2)]);
        assert_eq!(log.last(), 3);
        assert_eq!(log.term_of(3), Some(2));
        assert_eq!(read(&log, 1, 4), [1, 2, 3]);
    }

    #[test]
    fn compaction_keeps_what_a_slow_follower_needs() {
        let mut log = log(1000);
        assert!(!log.wants_compaction(1000));
        log.append((1001..=3000).map(|i| entry(i, 1)));
        assert!(log.wants_compaction(2500));
        assert_eq!(log.compact(snapshot(2500, 1)), 2500 - 256);
        assert_eq!(log.first_index().unwrap(), 2245);
        assert_eq!(log.term_of(2244), Some(1));
        assert_eq!(log.last(), 3000);
        assert!(log.entries(2244, 2300, None, GetEntriesContext::empty(false)).is_err());
        assert_eq!(read(&log, 2245, 2248), [2245, 2246, 2247]);
    }

    #[test]
    fn an_installed_snapshot_takes_the_place_of_everything() {
        let mut log = log(5);
        log.install(snapshot(9, 3));
        assert_eq!((log.first_index().unwrap(), log.last()), (10, 9));
        assert_eq!(log.term_of(9), Some(3));
        log.append([entry(10, 3)]);
        assert_eq!(read(&log, 10, 11), [10]);
    }

    #[test]
    fn a_read_is_limited_but_never_empty() {
        let log = log(5);
        let read = |max| log.entries(1, 6, max, GetEntriesContext::empty(false)).unwrap().len();
        assert_eq!(read(0), 1);
        assert_eq!(read(80), 2);
        assert_eq!(read(u64::MAX), 5);
    }

    #[test]
    fn a_snapshot_that_its_receiver_would_refuse_is_made_anew() {
        let mut log = log(5);
        log.compact(snapshot(3, 1));
        assert!(!log.wants_compaction(5));
        assert!(log.snapshot(0, 7).is_err());
        assert!(log.wants_compaction(5));
        let mut newer = snapshot(5, 1);
        newer.mut_metadata().mut_conf_state().learners.push(7);
        log.compact(newer);
        assert_eq!(log.snapshot(0, 7).unwrap().get_metadata().index, 5);
    }

    #[test]
    fn restored_entries_covered_by_the_snapshot_are_left_out() {
        let restored = Restored {
            raft_id: crate::raft::RaftId(1),
            hard_state: HardState { term: 2, vote: 1, commit: 1 },
            snapshot: snapshot(3, 1),
            entries: (1..=5).map(|i| entry(i, 1)).collect(),
        };
        let log = Log::restored(&restored);
        assert_eq!((log.first_index().unwrap(), log.last()), (4, 5));
        assert_eq!(log.initial_state().unwrap().hard_state.commit, 3);
    }
}
