//! The Maglev lookup table (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! §3.4), with weights.
//!
//! Each backend has its own permutation of the slots, derived from its number and the seed. Backends take turns; at its
//! turn a backend takes the first free slot of its permutation. Weights are the paper's "relative frequency of turns":
//! a backend of the greatest weight has a turn in every round, one of half that weight in every second round. Each
//! backend with a weight above 0 has its first turn in the first round, so no weight is too small for a slot.
//!
//! # The table is a pure function of (size, seed, set of (id, weight > 0))
//! Neither the order of the list, nor backends of weight 0 in it, nor the node, nor the past play a part. So every node
//! has the same table, and the base table of a service in transition, rebuilt later from the base weights, is exactly
//! the one that was in force.
//!
//! # Size
//! [`Maglev::size_for`] gives a prime of at least 100 × the backends of weight > 0, from a ladder of few, far-apart
//! steps ([`SIZES`]). Tables of different size agree on next to nothing, so a service that steps from 40 to 41 backends
//! moves nearly all its slots once: correct, since flows older than a change go by the base table, but dear while the
//! transition lasts. Base and current table may therefore differ in size, and are compared for a flow (by its hash),
//! not slot by slot: a slot number has meaning only within one table.

use crate::hash;

/// Table sizes: primes, each with the greatest number of backends that it serves at 100 slots for each.
///
/// Few and far apart, because a step moves nearly all slots. The last serves
/// [`MAX_BACKENDS`](crate::plan::MAX_BACKENDS).
pub const SIZES: [(usize, u32); 3] = [(40, 4093), (655, 65_537), (1000, 100_003)];

/// What an entry holds where the table has no backend at all.
const NOBODY: u16 = u16::MAX;

/// A backend as the table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The backend's number; its permutation follows from it.
    pub id: u32,
    /// Share of slots relative to the others; 0: none.
    pub weight: u32,
}

/// A table from slots to indices into the list of members that it was built from.
#[derive(Clone, PartialEq, Eq)]
pub struct Maglev {
    slots: Box<[u16]>,
}

impl Maglev {
    /// The table for `members`, of the size that [`size_for`](Self::size_for) gives for those of weight > 0.
    ///
    /// Entries are indices into `members`; at most `u16::MAX` members are considered. Of two members with the same id
    /// the first in the list counts.
    pub fn new(seed: u32, members: &[Member]) -> Maglev {
        let takers = members.iter().filter(|m| m.weight > 0).count();
        Maglev::with_size(Maglev::size_for(takers), seed, members)
    }

    /// The table of `size` slots, which should be one of [`SIZES`]; any other number is raised to the next prime.
    pub fn with_size(size: u32, seed: u32, members: &[Member]) -> Maglev {
        let size = next_prime(size);
        let mut slots = vec![NOBODY; size as usize].into_boxed_slice();
        let mut takers = takers(size, seed, members);
        let greatest = takers.iter().map(|t| t.weight).max().unwrap_or(0);
        for taker in &mut takers {
            taker.credit = greatest - taker.weight;
        }
        let mut free = if takers.is_empty() { 0 } else { size };
        while free > 0 {
            for taker in &mut takers {
                taker.credit += taker.weight;
                if taker.credit < greatest {
                    continue;
                }
                taker.credit -= greatest;
                // A step size that is prime to the table's visits every slot, so a free one is found.
                while slots[taker.next as usize] != NOBODY {
                    taker.advance(size);
                }
                slots[taker.next as usize] = taker.index;
                taker.advance(size);
                free -= 1;
                if free == 0 {
                    break;
                }
            }
        }
        Maglev { slots }
    }

    /// The table size for so many backends of weight > 0.
    pub fn size_for(backends: usize) -> u32 {
        let largest = SIZES[SIZES.len() - 1].1;
        SIZES.iter().find(|(most, _)| backends <= *most).map_or(largest, |(_, size)| *size)
    }

    /// Number of slots.
    pub fn size(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The slot that `hash` falls on.
    #[inline]
    pub fn slot(&self, hash: u32) -> u32 {
        hash::scale(hash, self.slots.len() as u32)
    }

    /// Index of the backend in slot `slot`; none when the table is empty or has no such slot.
    #[inline]
    pub fn at(&self, slot: u32) -> Option<u16> {
        self.slots.get(slot as usize).copied().filter(|&index| index != NOBODY)
    }

    /// Index of the backend that `hash` falls on; none when no member had a weight.
    #[inline]
    pub fn lookup(&self, hash: u32) -> Option<u16> {
        self.at(self.slot(hash))
    }

    /// Whether no member had a weight.
    pub fn is_empty(&self) -> bool {
        self.at(0).is_none()
    }

    /// Slots of each member, for display: as many as there were members, counted by index.
    pub fn shares(&self, members: usize) -> Vec<u32> {
        let mut shares = vec![0; members];
        for &index in &self.slots {
            if let Some(share) = shares.get_mut(usize::from(index)) {
                *share += 1;
            }
        }
        shares
    }
}

impl std::fmt::Debug for Maglev {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Maglev({} slots)", self.slots.len())
    }
}

/// A member with a weight, while the table is being filled.
struct Taker {
    index: u16,
    weight: u32,
    /// Grows by `weight` a round; a turn costs the greatest weight.
    credit: u32,
    /// The slot of its permutation that it looks at next.
    next: u32,
    /// From one slot of its permutation to the next.
    skip: u32,
}

impl Taker {
    fn advance(&mut self, size: u32) {
        self.next += self.skip;
        if self.next >= size {
            self.next -= size;
        }
    }
}

/// Members with a weight, in the order of their ids.
fn takers(size: u32, seed: u32, members: &[Member]) -> Vec<Taker> {
    // Credits stay below twice the greatest weight.
    const MAX_WEIGHT: u32 = u32::MAX / 4;
    let mut chosen: Vec<(u32, Taker)> = members
        .iter()
        .zip(0..NOBODY)
        .filter(|(member, _)| member.weight > 0)
        .map(|(member, index)| {
            let next = hash::scale(hash::words(&[member.id, 0], seed), size);
            let skip = hash::scale(hash::words(&[member.id, 1], seed), size - 1) + 1;
            (member.id, Taker { index, weight: member.weight.min(MAX_WEIGHT), credit: 0, next, skip })
        })
        .collect();
    chosen.sort_by_key(|(id, _)| *id);
    chosen.dedup_by_key(|(id, _)| *id);
    // The table must have a slot for each.
    chosen.truncate(size as usize);
    chosen.into_iter().map(|(_, taker)| taker).collect()
}

/// The least prime that is at least `n`, and at least 3.
fn next_prime(n: u32) -> u32 {
    // Above the last step a table would outgrow its bound.
    let largest = SIZES[SIZES.len() - 1].1;
    (n.clamp(3, largest)..=largest)
        .find(|&n| (2..).take_while(|d| d * d <= n).all(|d| n % d != 0))
        .unwrap_or(largest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::MAX_BACKENDS;

    fn members(weights: impl IntoIterator<Item = u32>) -> Vec<Member> {
        weights.into_iter().zip(1..).map(|(weight, id)| Member { id, weight }).collect()
    }

    /// Backend id by slot.
    fn by_id(table: &Maglev, members: &[Member]) -> Vec<u32> {
        (0..table.size()).map(|slot| members[usize::from(table.at(slot).unwrap())].id).collect()
    }

    #[test]
    fn sizes_are_primes_of_at_least_a_hundred_slots_for_each_backend() {
        for (most, size) in SIZES {
            assert_eq!(next_prime(size), size);
            assert!(size as usize >= 100 * most, "{size} for {most}");
        }
        assert!((0..=MAX_BACKENDS).all(|n| Maglev::size_for(n) as usize >= 100 * n));
    }

    #[test]
    fn without_a_weight_there_is_no_backend() {
        for members in [members([]), members([0, 0])] {
            let table = Maglev::new(1, &members);
            assert!(table.is_empty());
            assert_eq!(table.lookup(0xffff_ffff), None);
        }
    }

    #[test]
    fn equal_weights_differ_by_at_most_one_slot() {
        for n in [1, 2, 3, 10, 40, 41, 200] {
            let members = members(vec![5; n]);
            let shares = Maglev::new(7, &members).shares(n);
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1, "{n} backends: {least}..{most}");
        }
    }

    #[test]
    fn the_smallest_weight_still_has_a_slot_and_weight_0_has_none() {
        let mut weights = vec![1000; 600];
        weights[10] = 1;
        weights[11] = 0;
        let members = members(weights);
        let shares = Maglev::new(7, &members).shares(members.len());
        assert!(shares[10] >= 1);
        assert_eq!(shares[11], 0);
    }

    #[test]
    fn the_largest_table_is_filled() {
        let members = members(vec![1; MAX_BACKENDS]);
        let table = Maglev::new(7, &members);
        assert_eq!(table.shares(MAX_BACKENDS).iter().sum::<u32>(), table.size());
        assert!(!table.is_empty());
    }

    /// Like the hashes, the table is a contract between nodes and releases.
    #[test]
    fn known_table() {
        let table = Maglev::with_size(13, 42, &members([1, 2, 3]));
        let slots: Vec<u16> = (0..13).map(|slot| table.at(slot).unwrap()).collect();
        assert_eq!(slots, KNOWN);
    }

    const KNOWN: [u16; 13] = [0, 2, 2, 1, 1, 0, 0, 1, 2, 2, 2, 2, 1];

    /// Of the slots that the leaver did not hold, the share that moved: the paper's fig. 12 has it at a few per cent.
    #[test]
    fn one_backend_leaving_moves_little_else() {
        for (n, limit) in [(3, 0.03), (10, 0.03), (40, 0.03), (100, 0.02), (600, 0.03)] {
            let before = members(vec![1; n]);
            let mut after = before.clone();
            after[n / 2].weight = 0;
            // The same size on both sides of a step: what is measured is the method.
            let size = Maglev::size_for(n);
            let old = by_id(&Maglev::with_size(size, 3, &before), &before);
            let new = by_id(&Maglev::with_size(size, 3, &after), &after);
            let leaver = before[n / 2].id;
            let extra = old.iter().zip(&new).filter(|(a, b)| **a != leaver && a != b).count();
            let share = extra as f64 / f64::from(size);
            assert!(share < limit, "{n} backends: {share:.4} of the slots moved needlessly");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn shares_follow_weights(weights in proptest::collection::vec(0u32..=100, 1..60), seed in any::<u32>()) {
            let members = members(weights.clone());
            let table = Maglev::new(seed, &members);
            let sum: u32 = weights.iter().sum();
            prop_assume!(sum > 0);
            for (weight, share) in weights.iter().zip(table.shares(members.len())) {
                let ideal = f64::from(table.size()) * f64::from(*weight) / f64::from(sum);
                // The head start in the first round and the round that the table ends in are worth less than two slots.
                prop_assert!((f64::from(share) - ideal).abs() <= 2.0 + ideal * 0.02,
                    "weight {} of {}: {} slots, ideal {:.1}", weight, sum, share, ideal);
            }
        }

        #[test]
        fn order_and_weightless_members_play_no_part(
            weights in proptest::collection::vec(0u32..=10, 1..50), seed in any::<u32>(), turn in any::<usize>(),
        ) {
            prop_assume!(weights.iter().any(|w| *w > 0));
            let listed = members(weights);
            let mut turned = listed.clone();
            turned.rotate_left(turn % listed.len());
            turned.reverse();
            let weighty: Vec<Member> = listed.iter().copied().filter(|m| m.weight > 0).collect();
            let table = by_id(&Maglev::new(seed, &listed), &listed);
            prop_assert_eq!(&table, &by_id(&Maglev::new(seed, &turned), &turned));
            prop_assert_eq!(&table, &by_id(&Maglev::new(seed, &weighty), &weighty));
        }

        #[test]
        fn every_slot_of_the_leaver_and_few_others_move(
            weights in proptest::collection::vec(1u32..=10, 3..40), seed in any::<u32>(), who in any::<usize>(),
        ) {
            let before = members(weights);
            let who = who % before.len();
            let mut after = before.clone();
            after[who].weight = 0;
            let old = by_id(&Maglev::new(seed, &before), &before);
            let new = by_id(&Maglev::new(seed, &after), &after);
            let extra = old.iter().zip(&new).filter(|(a, b)| **a != before[who].id && a != b).count();
            prop_assert!(extra as f64 / (old.len() as f64) < 0.15, "{} of {}", extra, old.len());
        }

        #[test]
        fn no_input_panics(
            size in any::<u32>(), ids in proptest::collection::vec((0u32..20, any::<u32>()), 0..20), hash in any::<u32>(),
        ) {
            let members: Vec<Member> = ids.into_iter().map(|(id, weight)| Member { id, weight }).collect();
            let table = Maglev::with_size(size % 5000, 1, &members);
            if let Some(index) = table.lookup(hash) {
                prop_assert!(members[usize::from(index)].weight > 0);
            }
        }
    }
}
