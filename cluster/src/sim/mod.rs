//! A whole cluster in one thread on virtual time, from one seed.
//!
//! Nodes run the real cores. The network loses, delays, duplicates and reorders; links are cut one way or both; nodes are
//! paused, killed and started again, lose what they had not synced, and have clocks that drift up to the bound. After
//! every event the invariants are checked ([`check`]); after the faults have ceased the cluster must heal in time.

pub mod check;
mod fates;
pub mod faults;
pub mod machine;
mod outputs;
pub mod pairs;
pub mod plan;
pub mod program;
#[cfg(test)]
mod scenarios;
pub mod warm;
pub mod world;

pub use faults::{Kind, Violation, play, run};
pub use plan::Plan;
pub use world::World;

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(n)) >> 64) as u64
    }

    /// A number in `from..to`.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to.max(from + 1) - from)
    }

    /// True once in so many million times.
    pub fn ppm(&mut self, ppm: u32) -> bool {
        self.below(1_000_000) < u64::from(ppm)
    }
}
