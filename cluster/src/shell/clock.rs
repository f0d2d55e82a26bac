//! The shell's clocks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

use crate::core::Now;
use crate::time::Instant;

/// `CLOCK_BOOTTIME`: goes on while the machine is suspended, and no wall clock step moves it (clock_gettime(2)).
pub(super) fn at() -> Instant {
    let t = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME exists since Linux 2.6.39");
    Instant(t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// The wall clock, ms since 1970.
pub(super) fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as u64
}

/// Both clocks.
pub(super) fn now() -> Now {
    Now { at: at(), wall_ms: wall_ms() }
}
