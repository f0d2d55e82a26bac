//! Leases as the data path sees them: one cell for each VIP group, written by the beat thread at every renewal and
//! compared with the clock for every packet.
//!
//! Two limits, because an orderly hand-over ends them at different times: the new owner answers ARP/ND from the moment
//! that the old one has stopped to, while the old one goes on forwarding what still reaches it for a grace time.

use std::sync::Arc;
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
    cells: Cells,
}

/// Words of a cell: a cache line of its own, so that the renewal of one group does not slow packets of another.
pub const CELL_WORDS: usize = 8;

/// A cell, as the kernel's programs read it too.
pub type Cell = [AtomicU64; CELL_WORDS];

/// Places in a cell: number of the group plus 1 (0: nobody's), epoch, and the two limits in ns of `CLOCK_BOOTTIME`.
const GROUP: usize = 0;
const EPOCH: usize = 1;
pub(crate) const ANSWER_UNTIL: usize = 2;
const FORWARD_UNTIL: usize = 3;

/// Cells that somebody else reads too.
pub trait SharedCells: std::fmt::Debug + Send + Sync {
    /// The cell at `index`, below [`MAX_GROUPS`].
    fn cell(&self, index: usize) -> &Cell;
}

#[derive(Debug)]
enum Cells {
    Own(Box<[Line]>),
    Shared(Arc<dyn SharedCells>),
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Line(Cell);

impl Default for LeaseBoard {
    fn default() -> Self {
        LeaseBoard { cells: Cells::Own((0..MAX_GROUPS).map(|_| Line::default()).collect()) }
    }
}

impl LeaseBoard {
    /// A board on which every group is without a lease.
    pub fn new() -> Self {
        Self::default()
    }

    /// A board in memory that the kernel's program reads: what is written is in force there at once, without a system call.
    pub fn shared(cells: Arc<dyn SharedCells>) -> Self {
        LeaseBoard { cells: Cells::Shared(cells) }
    }

    /// Writes the lease of `group`. One writer at a time (the beat thread).
    ///
    /// Limits are cleared before the group or epoch changes, so that a reader never sees one group's limit with another
    /// group's number, nor one epoch's limit with another epoch.
    pub fn set(&self, group: u32, lease: Lease) {
        let cell = self.cell(group);
        let owner = u64::from(group) + 1;
        if cell[GROUP].load(Ordering::Relaxed) != owner || cell[EPOCH].load(Ordering::Relaxed) != lease.epoch
        {
            cell[ANSWER_UNTIL].store(0, Ordering::SeqCst);
            cell[FORWARD_UNTIL].store(0, Ordering::SeqCst);
            cell[GROUP].store(owner, Ordering::SeqCst);
            cell[EPOCH].store(lease.epoch, Ordering::SeqCst);
        }
        cell[FORWARD_UNTIL].store(lease.forward_until.0, Ordering::SeqCst);
        cell[ANSWER_UNTIL].store(lease.answer_until.0, Ordering::SeqCst);
    }

    /// The lease of `group`.
    pub fn get(&self, group: u32) -> Lease {
        let cell = self.cell(group);
        let owner = u64::from(group) + 1;
        // Read before and after: a cell that was or became another group's meanwhile permits nothing.
        if cell[GROUP].load(Ordering::SeqCst) != owner {
            return Lease::default();
        }
        let lease = Lease {
            answer_until: BootTime(cell[ANSWER_UNTIL].load(Ordering::SeqCst)),
            forward_until: BootTime(cell[FORWARD_UNTIL].load(Ordering::SeqCst)),
            epoch: cell[EPOCH].load(Ordering::SeqCst),
        };
        if cell[GROUP].load(Ordering::SeqCst) == owner { lease } else { Lease::default() }
    }

    fn cell(&self, group: u32) -> &Cell {
        let index = group as usize % MAX_GROUPS;
        match &self.cells {
            Cells::Own(lines) => &lines[index].0,
            Cells::Shared(cells) => cells.cell(index),
        }
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
