//! Where the table's flows stand, by the hashes of their names: the lines of `packet/bpf/table.h`, as user space reads and writes them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use super::abi::{INDEX_PROBES, LINE_SLOTS, Line};
use super::sys::{self, Mapped};

/// Where names stand.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) lines: Mapped<Line>,
    pub(super) map: OwnedFd,
    /// How far a hash is shifted to number its lines.
    pub(super) shift: u32,
}

impl Index {
    /// One for so many flows: full, four of seven slots are taken.
    pub(super) fn new(flows: u32) -> io::Result<Index> {
        let lines = (flows / 2).clamp(INDEX_PROBES, 1 << 30).next_power_of_two();
        let map = Index::create(lines)?;
        Ok(Index { lines: Mapped::new(map.as_fd(), lines)?, map, shift: 32 - lines.trailing_zeros() })
    }

    /// The same one once more.
    #[cfg(test)]
    pub(super) fn over(other: &Index) -> Index {
        let map = other.map.try_clone().unwrap();
        Index { lines: Mapped::new(map.as_fd(), other.lines.len()).unwrap(), map, shift: other.shift }
    }

    pub(super) fn create(lines: u32) -> io::Result<OwnedFd> {
        sys::create::<u32, Line>("names", sys::TYPE_ARRAY, lines, sys::FLAG_MMAPABLE | sys::FLAG_INNER)
    }

    /// The words of a line: names displaced, slots.
    fn line(&self, hash: u32, probe: u32) -> &[AtomicU64] {
        let at = (hash >> self.shift).wrapping_add(probe) & (self.lines.len() - 1);
        self.lines.words(at).unwrap_or(&[])
    }

    /// The cells whose flows have that hash.
    pub(super) fn cells(&self, hash: u32) -> impl Iterator<Item = u32> {
        let displaced = self.line(hash, 0).first().is_some_and(|n| n.load(Ordering::SeqCst) != 0);
        let lines = (0..if displaced { INDEX_PROBES } else { 1 }).map(move |probe| self.line(hash, probe));
        let slots = lines.flat_map(|line| line.iter().skip(1)).map(|slot| slot.load(Ordering::SeqCst));
        slots.filter(move |slot| *slot as u32 != 0 && (slot >> 32) as u32 == hash).map(|slot| slot as u32 - 1)
    }

    /// Puts a slot where its hash says; `false`: no line there has room.
    pub(super) fn put(&self, slot: u64) -> bool {
        let hash = (slot >> 32) as u32;
        let home = &self.line(hash, 0)[0];
        for probe in 0..INDEX_PROBES {
            // Said before: whoever looks for it must not stop at the first line.
            if probe > 0 {
                home.fetch_add(1, Ordering::SeqCst);
            }
            let exchange =
                |at: &AtomicU64| at.compare_exchange(0, slot, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            if self.line(hash, probe).iter().skip(1).any(exchange) {
                return true;
            }
            if probe > 0 {
                home.fetch_sub(1, Ordering::SeqCst);
            }
        }
        false
    }

    /// Takes a slot out; `false`: it is not there.
    pub(super) fn take(&self, slot: u64) -> bool {
        let hash = (slot >> 32) as u32;
        for probe in 0..INDEX_PROBES {
            let exchange =
                |at: &AtomicU64| at.compare_exchange(slot, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            if self.line(hash, probe).iter().skip(1).any(exchange) {
                if probe > 0 {
                    self.line(hash, 0)[0].fetch_sub(1, Ordering::SeqCst);
                }
                return true;
            }
        }
        false
    }

    pub(super) fn slots(&self, line: u32) -> [u64; LINE_SLOTS] {
        self.lines.read(line).map_or([0; LINE_SLOTS], |line| line.slots)
    }
}

/// What stands in an index of a name with this hash, of the flow in that cell.
pub(super) fn slot(hash: u32, cell: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(cell + 1)
}
