//! Leases as the data path sees them: one cell for each VIP group, written by the beat thread at every renewal and
//! compared with the clock for every packet.
//!
//! Two limits, because an orderly hand-over ends them at different times: the new owner answers ARP/ND from the moment
//! that the old one has stopped to, while the old one goes on forwarding what still reaches it for a grace time.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::plan::MAX_GROUPS;
use crate::time::BootTime;

/// What a node may do for one VIP group, and until when. The default permits nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lease {
    /// Epoch of the ownership that this lease belongs to.
    pub epoch: u64,
    /// Answer ARP/ND for the group's addresses and announce them while `now < answer_until`.
    pub answer_until: BootTime,
    /// Forward for the group's services while `now < forward_until`.
    pub forward_until: BootTime,
}

impl Lease {
    /// Whether the node may answer for the group's addresses at `now`.
    pub fn may_answer(&self, now: BootTime) -> bool {
        now < self.answer_until
    }

    /// Whether the node may forward for the group's services at `now`.
    pub fn may_forward(&self, now: BootTime) -> bool {
        now < self.forward_until
    }
}

/// One lease cell for each of [`MAX_GROUPS`] groups. Readers and the writer never wait for each other.
#[derive(Debug)]
pub struct LeaseBoard {
    cells: Box<[Cell]>,
}

/// A cell has a cache line of its own, so that the renewal of one group does not slow packets of another.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Cell {
    group: AtomicU64,
    epoch: AtomicU64,
    answer_until: AtomicU64,
    forward_until: AtomicU64,
}

impl Default for LeaseBoard {
    fn default() -> Self {
        LeaseBoard { cells: (0..MAX_GROUPS).map(|_| Cell::default()).collect() }
    }
}

impl LeaseBoard {
    /// A board on which every group is without a lease.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes the lease of `group`. One writer at a time (the beat thread).
    ///
    /// Limits are cleared before the group or epoch changes, so that a reader never sees one group's limit with another
    /// group's number, nor one epoch's limit with another epoch.
    pub fn set(&self, group: u32, lease: Lease) {
        let cell = self.cell(group);
        let owner = u64::from(group) + 1;
        if cell.group.load(Ordering::Relaxed) != owner || cell.epoch.load(Ordering::Relaxed) != lease.epoch {
            cell.answer_until.store(0, Ordering::SeqCst);
            cell.forward_until.store(0, Ordering::SeqCst);
            cell.group.store(owner, Ordering::SeqCst);
            cell.epoch.store(lease.epoch, Ordering::SeqCst);
        }
        cell.forward_until.store(lease.forward_until.0, Ordering::SeqCst);
        cell.answer_until.store(lease.answer_until.0, Ordering::SeqCst);
    }

    /// The lease of `group`.
    pub fn get(&self, group: u32) -> Lease {
        let cell = self.cell(group);
        let owner = u64::from(group) + 1;
        // Read before and after: a cell that was or became another group's meanwhile permits nothing.
        if cell.group.load(Ordering::SeqCst) != owner {
            return Lease::default();
        }
        let lease = Lease {
            answer_until: BootTime(cell.answer_until.load(Ordering::SeqCst)),
            forward_until: BootTime(cell.forward_until.load(Ordering::SeqCst)),
            epoch: cell.epoch.load(Ordering::SeqCst),
        };
        if cell.group.load(Ordering::SeqCst) == owner { lease } else { Lease::default() }
    }

    fn cell(&self, group: u32) -> &Cell {
        &self.cells[group as usize % MAX_GROUPS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_without_a_lease_may_nothing() {
        let board = LeaseBoard::new();
        assert!(!board.get(3).may_answer(BootTime(0)));
        assert!(!board.get(3).may_forward(BootTime(0)));
    }

    #[test]
    fn a_lease_ends_at_its_instant_not_after() {
        let board = LeaseBoard::new();
        board.set(3, Lease { epoch: 1, answer_until: BootTime(10), forward_until: BootTime(20) });
        let lease = board.get(3);
        assert!(lease.may_answer(BootTime(9)) && !lease.may_answer(BootTime(10)));
        assert!(lease.may_forward(BootTime(19)) && !lease.may_forward(BootTime(20)));
    }

    #[test]
    fn groups_that_share_a_cell_do_not_share_a_lease() {
        let board = LeaseBoard::new();
        let other = 3 + MAX_GROUPS as u32;
        board.set(3, Lease { epoch: 1, answer_until: BootTime(10), forward_until: BootTime(10) });
        assert_eq!(board.get(other), Lease::default());
        board.set(other, Lease { epoch: 2, ..Lease::default() });
        assert_eq!(board.get(3), Lease::default());
    }
}
