//! Durations that the lease rules rest on, and their validation.
//!
//! With beat `B`, lease `L`, election timeout `E ∈ [E_min, E_max)` and drift bound `ρ`: a voter that acknowledged a beat
//! promises not to vote for `E_min` of *its* clock from the beat's arrival on; the leader counts `L` of *its* clock from
//! the beat's sending. The lease has ended in true time before the promise has, when `L·(1+ρ) < E_min·(1−ρ)`.

use std::time::Duration;

/// Parts per million in one.
const MILLION: u64 = 1_000_000;
/// Shortest beat: below it the datagrams of a pair cost more than the traffic of a small site.
const MIN_BEAT: Duration = Duration::from_millis(2);
/// Longest election timeout: above it a mistake in the file is likelier than a wish.
const MAX_ELECTION: Duration = Duration::from_secs(60);
/// Beats that fit into a lease at least: a renewal takes up to two beats, and one lost beat must cost nothing.
const MIN_BEATS_PER_LEASE: u32 = 3;

/// Durations of beats, leases and elections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Time between two beats, ≥ 2 ms.
    pub beat: Duration,
    /// Lease, ≥ 3 beats.
    pub lease: Duration,
    /// Shortest election timeout; also how long a voter's promise lasts.
    pub election_min: Duration,
    /// Longest election timeout (exclusive), at least one beat above the shortest.
    pub election_max: Duration,
    /// How far any node's clock may run fast or slow, in parts per million of true time.
    pub drift_ppm: u32,
    /// How long a node that handed a group over goes on forwarding what still reaches it.
    pub grace: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            beat: Duration::from_millis(20),
            lease: Duration::from_millis(80),
            election_min: Duration::from_millis(120),
            election_max: Duration::from_millis(180),
            // Crystals are within 100 ppm and NTP slews by at most 500 ppm (adjtimex(2)); virtual machines are worse.
            drift_ppm: 10_000,
            grace: Duration::from_secs(1),
        }
    }
}

/// Durations by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// For any pair of machines, virtual ones on busy hosts too: [`Timing::default`].
    Default,
    /// For machines that stand still for less than 15 ms at a time, and disks that write in a few: an owner that loses its
    /// power is replaced in about a third of the time. A machine that stands still for longer loses its lease, and with it
    /// what arrives in that time; two owners there are never.
    Fast,
}

impl Profile {
    /// Every profile.
    pub const ALL: [Profile; 2] = [Profile::Default, Profile::Fast];

    /// The word used in node files.
    pub fn as_str(self) -> &'static str {
        match self {
            Profile::Default => "default",
            Profile::Fast => "fast",
        }
    }

    /// Its durations.
    pub fn timing(self) -> Timing {
        match self {
            Profile::Default => Timing::default(),
            Profile::Fast => Timing {
                beat: Duration::from_millis(5),
                lease: Duration::from_millis(25),
                election_min: Duration::from_millis(35),
                election_max: Duration::from_millis(55),
                ..Timing::default()
            },
        }
    }
}

/// A value or combination of values that the lease rules do not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("timing.{field}: {value}: {reason}")]
pub struct TimingError {
    /// Field of the node file, e.g. `lease_ms`.
    pub field: &'static str,
    /// As given.
    pub value: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl Timing {
    /// Checks every rule.
    ///
    /// # Errors
    /// The first rule that is broken: field, value, reason.
    pub fn validate(&self) -> Result<(), TimingError> {
        let refuse = |field, value: Duration, reason: String| {
            Err(TimingError { field, value: format!("{}", value.as_secs_f64() * 1e3), reason })
        };
        if self.drift_ppm >= 500_000 {
            return Err(TimingError {
                field: "drift_ppm",
                value: self.drift_ppm.to_string(),
                reason: "a clock that runs half as fast again is no clock: choose less than 500000"
                    .to_owned(),
            });
        }
        if self.beat < MIN_BEAT {
            return refuse("beat_ms", self.beat, format!("must be at least {} ms", MIN_BEAT.as_millis()));
        }
        let shortest = self.beat * MIN_BEATS_PER_LEASE;
        if self.lease < shortest {
            return refuse(
                "lease_ms",
                self.lease,
                format!(
                    "must be at least {MIN_BEATS_PER_LEASE} beats ({} ms), or a single lost beat silences the owner",
                    shortest.as_secs_f64() * 1e3
                ),
            );
        }
        let (plus, minus) = (MILLION + u64::from(self.drift_ppm), MILLION - u64::from(self.drift_ppm));
        let longest_lease = u128::from(minus) * self.election_min.as_nanos();
        if u128::from(plus) * self.lease.as_nanos() >= longest_lease {
            return refuse(
                "lease_ms",
                self.lease,
                format!(
                    "with clocks off by {} ppm a lease must be shorter than {:.1} ms, or it can outlive the shortest election \
                     (election_ms {}) and two nodes could own a group",
                    self.drift_ppm,
                    longest_lease as f64 / plus as f64 / 1e6,
                    self.election_min.as_secs_f64() * 1e3
                ),
            );
        }
        if self.election_max < self.election_min + self.beat {
            return refuse(
                "election_ms",
                self.election_max,
                format!(
                    "the longest must be at least one beat above the shortest ({} ms), or candidates collide for ever",
                    (self.election_min + self.beat).as_secs_f64() * 1e3
                ),
            );
        }
        if self.election_max > MAX_ELECTION {
            return refuse(
                "election_ms",
                self.election_max,
                format!("must be at most {} s", MAX_ELECTION.as_secs()),
            );
        }
        Ok(())
    }

    /// In which durations another node's differ from these, for people: field, value here, value there. The rules hold
    /// between nodes that have the same; fractions of a microsecond are no difference.
    pub fn differences(&self, other: &Timing) -> Vec<(&'static str, String, String)> {
        // Asked for every beat that is heard.
        if self == other {
            return Vec::new();
        }
        let ms = |d: Duration| format!("{}", d.as_micros() as f64 / 1e3);
        let election = |t: &Timing| format!("[{}, {}]", ms(t.election_min), ms(t.election_max));
        let both = |f: &dyn Fn(&Timing) -> String| (f(self), f(other));
        let fields: [(&'static str, (String, String)); 5] = [
            ("beat_ms", both(&|t| ms(t.beat))),
            ("lease_ms", both(&|t| ms(t.lease))),
            ("election_ms", both(&election)),
            ("drift_ppm", both(&|t| t.drift_ppm.to_string())),
            ("grace_ms", both(&|t| ms(t.grace))),
        ];
        fields.into_iter().filter(|(_, (a, b))| a != b).map(|(field, (a, b))| (field, a, b)).collect()
    }

    /// The longest lease that no promise given for the same beat ends before, whatever the clocks' drift. What a leader that
    /// hands over grants its successor; `lease` is shorter only so that its end is soon.
    pub fn longest_lease(&self) -> Duration {
        // A microsecond for rounding.
        self.on_another_clock(self.election_min).saturating_sub(Duration::from_micros(1))
    }

    /// The part of `left` (a duration on one node's clock) that another node may count on its own clock from the same
    /// moment on, so that it ends first whatever the two clocks' drift: `left · (1−ρ)/(1+ρ)`.
    pub fn on_another_clock(&self, left: Duration) -> Duration {
        let (plus, minus) = (MILLION + u64::from(self.drift_ppm), MILLION - u64::from(self.drift_ppm));
        let nanos = left.as_nanos() * u128::from(minus) / u128::from(plus);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    fn refused(timing: Timing) -> TimingError {
        timing.validate().expect_err("refused")
    }

    #[test]
    fn every_profile_is_safe() {
        for profile in Profile::ALL {
            profile.timing().validate().expect("safe");
        }
    }

    #[test]
    fn each_refusal_names_field_value_and_reason() {
        let t = Timing::default();
        let cases = [
            (Timing { lease: 118 * MS, ..t }, "lease_ms", "118", "two nodes"),
            (Timing { lease: 59 * MS, ..t }, "lease_ms", "59", "3 beats"),
            (Timing { beat: MS, lease: 40 * MS, ..t }, "beat_ms", "1", "at least 2 ms"),
            (Timing { election_max: 130 * MS, ..t }, "election_ms", "130", "one beat above"),
            (Timing { election_max: 61_000 * MS, ..t }, "election_ms", "61000", "at most 60 s"),
            (Timing { drift_ppm: 500_000, ..t }, "drift_ppm", "500000", "no clock"),
        ];
        for (timing, field, value, reason) in cases {
            let e = refused(timing);
            assert_eq!(e.field, field);
            assert_eq!(e.value, value);
            assert!(e.reason.contains(reason), "{e}");
            assert!(e.to_string().starts_with(&format!("timing.{field}: {value}: ")), "{e}");
        }
    }

    proptest! {
        /// Whatever passes keeps the lease inside the promise for every pair of clocks within the bound.
        #[test]
        fn what_passes_is_safe(
            beat in 2u64..100, lease in 1u64..500, min in 1u64..500, spread in 0u64..500, drift_ppm in 0u32..200_000,
        ) {
            let t = Timing {
                beat: beat as u32 * MS, lease: lease as u32 * MS, election_min: min as u32 * MS,
                election_max: (min + spread) as u32 * MS, drift_ppm, grace: MS,
            };
            if t.validate().is_ok() {
                let rho = f64::from(drift_ppm) / 1e6;
                let lease_at_most = t.lease.as_secs_f64() / (1.0 - rho);
                let promise_at_least = t.election_min.as_secs_f64() / (1.0 + rho);
                prop_assert!(lease_at_most < promise_at_least);
                prop_assert!(t.longest_lease() >= t.lease);
                prop_assert!(t.longest_lease().as_secs_f64() / (1.0 - rho) < promise_at_least);
            }
        }

        /// A duration handed to another clock ends first in true time.
        #[test]
        fn handed_on_time_ends_first(left in 0u64..10_000_000_000, drift_ppm in 0u32..200_000) {
            let t = Timing { drift_ppm, ..Timing::default() };
            let rho = f64::from(drift_ppm) / 1e6;
            let theirs = t.on_another_clock(Duration::from_nanos(left)).as_nanos() as f64 / (1.0 - rho);
            prop_assert!(theirs <= left as f64 / (1.0 + rho) + 1.0);
        }
    }
}
