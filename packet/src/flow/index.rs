//! From a 32-bit hash to candidate entries: open addressing with linear probing, deletion by shifting back (no tombstones,
//! so a table that lived through a flood is as fast as a new one).
//!
//! All of it is reserved at once and comes zeroed from the system, so pages that are never touched cost nothing, and no
//! rehash ever halts the packet path.

/// An index for at most `capacity` entries at half load.
#[derive(Debug)]
pub(super) struct Index {
    /// `hash << 32 | entry + 1`; 0 is free.
    cells: Vec<u64>,
    mask: usize,
    len: usize,
}

impl Index {
    pub(super) fn new(capacity: usize) -> Index {
        let size = (capacity.max(1) * 2).next_power_of_two();
        Index { cells: vec![0; size], mask: size - 1, len: 0 }
    }

    /// The first entry under `hash` that `is_it` accepts.
    #[inline]
    pub(super) fn find(&self, hash: u32, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let mut at = hash as usize & self.mask;
        loop {
            let cell = self.cells[at];
            if cell == 0 {
                return None;
            }
            if (cell >> 32) as u32 == hash {
                let entry = cell as u32 - 1;
                if is_it(entry) {
                    return Some(entry);
                }
            }
            at = (at + 1) & self.mask;
        }
    }

    /// Adds `entry` under `hash`.
    pub(super) fn insert(&mut self, hash: u32, entry: u32) {
        // The caller bounds entries by the capacity, so at least half of the cells are free and the loop ends.
        assert!(self.len * 2 <= self.mask, "index holds more entries than it was made for");
        let mut at = hash as usize & self.mask;
        while self.cells[at] != 0 {
            at = (at + 1) & self.mask;
        }
        self.cells[at] = u64::from(hash) << 32 | u64::from(entry + 1);
        self.len += 1;
    }

    /// Removes `entry`, which stands under `hash`.
    pub(super) fn remove(&mut self, hash: u32, entry: u32) {
        let wanted = u64::from(hash) << 32 | u64::from(entry + 1);
        let mut at = hash as usize & self.mask;
        while self.cells[at] != wanted {
            if self.cells[at] == 0 {
                return;
            }
            at = (at + 1) & self.mask;
        }
        let mut hole = at;
        loop {
            at = (at + 1) & self.mask;
            let cell = self.cells[at];
            if cell == 0 {
                break;
            }
            // A cell may move into the hole unless its home lies behind the hole on its way.
            let home = (cell >> 32) as usize & self.mask;
            if (at.wrapping_sub(home) & self.mask) >= (at.wrapping_sub(hole) & self.mask) {
                self.cells[hole] = cell;
                hole = at;
            }
        }
        self.cells[hole] = 0;
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Hashes from a tiny range, so that runs collide and wrap around the end.
        #[test]
        fn behaves_like_a_multimap(ops in prop::collection::vec((any::<bool>(), 0u32..24, 0u32..16), 0..200)) {
            let mut index = Index::new(16);
            let mut model: Vec<(u32, u32)> = Vec::new();
            for (add, hash, entry) in ops {
                let hash = hash.wrapping_sub(12);
                let there = model.iter().position(|&(_, e)| e == entry);
                match (add, there) {
                    (true, None) => {
                        index.insert(hash, entry);
                        model.push((hash, entry));
                    }
                    (false, Some(position)) => {
                        let (hash, entry) = model.swap_remove(position);
                        index.remove(hash, entry);
                    }
                    _ => {}
                }
                for entry in 0..16 {
                    for hash in (0u32..24).map(|h| h.wrapping_sub(12)) {
                        let found = index.find(hash, |e| e == entry);
                        prop_assert_eq!(found.is_some(), model.contains(&(hash, entry)));
                    }
                }
            }
        }
    }
}
