//! A verdict out of check results: a pure counter.
//!
//! ```text
//!            1 success                    fall failures in a row
//!  unknown ─────────────▶ up ────────────────────────────────────▶ down
//!     │                    ▲                                        │ ▲
//!     │                    └────────────────────────────────────────┘ │
//!     │                               rise successes in a row         │
//!     └───────────────────────────────────────────────────────────────┘
//!                          fall failures in a row
//! ```
//!
//! **The first success of an unknown backend makes it up at once.** An unknown backend takes no traffic, so waiting for
//! `rise` would protect nobody and only lengthen the time until a fresh cluster serves: `rise` is there to keep a backend
//! that *has failed* out until it is steady. Failures get no such shortcut: a backend that answers the second or third
//! check is merely starting, and unknown takes as little traffic as down does.

use komainu_proto::domain::Health;

/// Counts results in a row and turns them into a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RiseFall {
    rise: u32,
    fall: u32,
    health: Health,
    /// Results in a row that speak against `health`; for `unknown`, failures.
    against: u32,
}

impl RiseFall {
    /// A counter that begins at `health`, which no result of its own stands behind yet. Limits of 0 count as 1.
    pub fn new(rise: u32, fall: u32, health: Health) -> Self {
        RiseFall { rise: rise.max(1), fall: fall.max(1), health, against: 0 }
    }

    /// The verdict.
    pub fn health(&self) -> Health {
        self.health
    }

    /// Counts one result; the new verdict if this result changed it.
    pub fn record(&mut self, success: bool) -> Option<Health> {
        let speaks_for = match self.health {
            Health::Up => success,
            Health::Down => !success,
            Health::Unknown => false,
        };
        if speaks_for {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let (needed, next) = match (self.health, success) {
            (Health::Unknown, true) => (1, Health::Up),
            (Health::Unknown, false) | (Health::Up, _) => (self.fall, Health::Down),
            (Health::Down, _) => (self.rise, Health::Up),
        };
        if self.against < needed {
            return None;
        }
        self.against = 0;
        self.health = next;
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn verdicts(mut c: RiseFall, results: &str) -> String {
        results
            .chars()
            .map(|r| {
                c.record(r == '+');
                match c.health() {
                    Health::Up => 'u',
                    Health::Down => 'd',
                    Health::Unknown => '?',
                }
            })
            .collect()
    }

    #[test]
    fn every_state_and_result() {
        let counter = |health| RiseFall::new(2, 3, health);
        for (from, results, expected) in [
            (Health::Unknown, "+", "u"),
            (Health::Unknown, "--+", "??u"),
            (Health::Unknown, "---", "??d"),
            (Health::Unknown, "---++", "??ddu"),
            (Health::Up, "--+--", "uuuuu"),
            (Health::Up, "---", "uud"),
            (Health::Down, "+-+-+", "ddddd"),
            (Health::Down, "++", "du"),
            (Health::Up, "---++---", "uudduuud"),
        ] {
            assert_eq!(verdicts(counter(from), results), expected, "{from} {results}");
        }
    }

    #[test]
    fn a_change_is_told_once() {
        let mut c = RiseFall::new(1, 1, Health::Unknown);
        assert_eq!(c.record(true), Some(Health::Up));
        assert_eq!(c.record(true), None);
        assert_eq!(c.record(false), Some(Health::Down));
        assert_eq!(c.record(false), None);
    }

    #[test]
    fn limits_of_zero_count_as_one() {
        assert_eq!(verdicts(RiseFall::new(0, 0, Health::Up), "-+"), "du");
    }

    proptest! {
        /// Against a model that looks at the whole history instead of counting.
        #[test]
        fn agrees_with_the_history(rise in 1u32..5, fall in 1u32..5, results in proptest::collection::vec(any::<bool>(), 0..60)) {
            let mut counter = RiseFall::new(rise, fall, Health::Unknown);
            let mut model = Health::Unknown;
            for n in 1..=results.len() {
                let run = results[..n].iter().rev().take_while(|r| **r == results[n - 1]).count();
                let last = results[n - 1];
                model = match model {
                    Health::Unknown if last => Health::Up,
                    Health::Down if last && run >= rise as usize => Health::Up,
                    Health::Up | Health::Unknown if !last && run >= fall as usize => Health::Down,
                    other => other,
                };
                counter.record(last);
                prop_assert_eq!(counter.health(), model);
            }
        }
    }
}
