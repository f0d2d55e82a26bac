//! The cluster's clock and its timing rules.

use std::time::Duration;

/// An instant of this node's `CLOCK_BOOTTIME`, in nanoseconds since boot (clock_gettime(2)). Instants of two nodes are
/// not comparable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// This instant plus `d`.
    pub fn after(self, d: Duration) -> Instant {
        Instant(self.0.saturating_add(d.as_nanos() as u64))
    }

    /// Time from `earlier` to this instant; zero when `earlier` is later.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}
