//! The one clock of the data path.

use std::time::Duration;

/// An instant of `CLOCK_BOOTTIME` in nanoseconds since boot: it goes on while the machine is suspended, and no wall
/// clock step moves it (clock_gettime(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootTime(pub u64);

impl BootTime {
    /// Reads the clock.
    pub fn now() -> BootTime {
        let t = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
            .expect("CLOCK_BOOTTIME exists since Linux 2.6.39");
        BootTime(t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
    }

    /// This instant plus `d`.
    pub fn after(self, d: Duration) -> BootTime {
        BootTime(self.0.saturating_add(d.as_nanos() as u64))
    }

    /// Time from `earlier` to this instant; zero when `earlier` is later.
    pub fn since(self, earlier: BootTime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}
