//! How many flows a backend serves that are not remembered: a count of distinct hashes in the last seconds.
//!
//! HyperLogLog (Flajolet et al., AofA 2007) with 256 registers: an error of about 6.5 %, and for small numbers, where drains
//! end, linear counting over the empty registers (§4 there), which is nearly exact and exactly 0 when nothing came. Two windows
//! take turns, so that what is read covers between one and two window lengths.

use crate::time::BootTime;

/// Registers of a window.
pub const REGISTERS: usize = 256;
/// Bits of the hash that name the register.
const INDEX_BITS: u32 = 8;
/// Length of a window in ns: 3 s. Longer than the pauses of a busy connection; a flow that says nothing for 6 s is not seen.
const WINDOW: u64 = 3_000_000_000;

/// What was seen elsewhere, filled by the same rules: each register holds the highest rank of the hashes that fall on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Number of the newest window: nanoseconds of `CLOCK_BOOTTIME` divided by 3 s.
    pub window: u64,
    /// Registers of the newest window and of the one before it, each at `number & 1`.
    pub registers: [[u8; REGISTERS]; 2],
}

/// The windows of one backend. Takes memory only once a packet came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sketch {
    windows: Option<Box<[[u8; REGISTERS]; 2]>>,
    /// Number of the window that is being filled; its place is its lowest bit.
    window: u64,
}

impl Sketch {
    /// A packet of the flow with that hash was forwarded.
    #[inline]
    pub(crate) fn add(&mut self, hash: u32, now: BootTime) {
        self.turn(now);
        let windows = self.windows.get_or_insert_with(|| Box::new([[0; REGISTERS]; 2]));
        // The flow hash spreads well, but its low bits also choose the slot and so the backend: mix before counting.
        let hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
        let hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
        let rank = ((hash << INDEX_BITS) | 1 << (INDEX_BITS - 1)).leading_zeros() as u8 + 1;
        let register = &mut windows[(self.window & 1) as usize][(hash >> (32 - INDEX_BITS)) as usize];
        if *register < rank {
            *register = rank;
        }
    }

    /// Flows seen in the last one to two windows.
    pub(crate) fn estimate(&self, now: BootTime) -> u64 {
        self.estimate_with(now, None)
    }

    /// The same with what was seen elsewhere: a flow that was seen on both sides counts once.
    pub(crate) fn estimate_with(&self, now: BootTime, other: Option<&Windows>) -> u64 {
        let own = self.windows.as_deref().map(|windows| (self.window, windows));
        let other = other.map(|w| (w.window, &w.registers));
        if own.is_none() && other.is_none() {
            return 0;
        }
        let here = now.0 / WINDOW;
        let fresh = |number: u64| here.saturating_sub(number) <= 1;
        let views = [own, other].map(|view| {
            let Some((window, windows)) = view else { return [None; 2] };
            let current = fresh(window).then_some(&windows[(window & 1) as usize]);
            let previous = (window > 0 && fresh(window - 1)).then(|| &windows[(window & 1 ^ 1) as usize]);
            [current, previous]
        });
        let views = views.as_flattened();
        let mut sum = 0.0;
        let mut empty = 0;
        for i in 0..REGISTERS {
            let rank = views.iter().flatten().map(|w| w[i]).max().unwrap_or(0);
            // A register says at most how many bits of the hash are left; what is not ours may say anything.
            let rank = rank.min(32);
            sum += 1.0 / (1u64 << rank) as f64;
            empty += u32::from(rank == 0);
        }
        let m = REGISTERS as f64;
        let estimate = 0.7213 / (1.0 + 1.079 / m) * m * m / sum;
        let estimate =
            if estimate <= 2.5 * m && empty > 0 { m * (m / f64::from(empty)).ln() } else { estimate };
        estimate.round() as u64
    }

    #[inline]
    fn turn(&mut self, now: BootTime) {
        let here = now.0 / WINDOW;
        if here <= self.window {
            return;
        }
        if let Some(windows) = &mut self.windows {
            windows[(here & 1) as usize] = [0; REGISTERS];
            if here > self.window + 1 {
                windows[(here & 1 ^ 1) as usize] = [0; REGISTERS];
            }
        }
        self.window = here;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash;

    fn filled(flows: u32, now: BootTime) -> Sketch {
        let mut sketch = Sketch::default();
        for flow in 0..flows {
            for _ in 0..3 {
                sketch.add(hash::words(&[flow], 7), now);
            }
        }
        sketch
    }

    #[test]
    fn small_numbers_are_nearly_exact_and_large_ones_near() {
        let now = BootTime(100 * WINDOW);
        for (flows, off) in
            [(0, 0), (1, 0), (3, 0), (10, 1), (100, 12), (10_000, 2_000), (1_000_000, 200_000)]
        {
            let seen = filled(flows, now).estimate(now);
            assert!(seen.abs_diff(u64::from(flows)) <= off, "{seen} of {flows}");
        }
    }

    #[test]
    fn it_falls_to_zero_when_flows_stop() {
        let start = BootTime(100 * WINDOW);
        let sketch = filled(50, start);
        assert!(sketch.estimate(BootTime(start.0 + WINDOW)) > 40);
        assert_eq!(sketch.estimate(BootTime(start.0 + 2 * WINDOW)), 0);
    }

    #[test]
    fn an_older_window_does_not_come_back() {
        let mut sketch = filled(50, BootTime(100 * WINDOW));
        sketch.add(1, BootTime(103 * WINDOW));
        assert_eq!(sketch.estimate(BootTime(103 * WINDOW)), 1);
    }
}
