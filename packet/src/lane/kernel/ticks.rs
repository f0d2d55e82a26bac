//! How old a reading of the clock may be that the program compares a lease with: `packet/bpf/clock.h` says why.

use std::fs;
use std::time::Duration;

use nix::time::{ClockId, clock_getres};

/// Kernel from which on any processor counts ticks when the one whose turn it is doesn't: before, a reading may be of any age.
const COUNTED_BY_ANY: (u32, u32) = (5, 18);
/// Ticks after which it has done so: one that begins to count, five that find nothing counted, and one more for what is late.
const TICKS: u32 = 7;

/// The age in nanoseconds that no reading exceeds while jiffies don't move; 0 where there is no such age.
pub(super) fn slack() -> u64 {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // Processors without ticks, which can't count them for others, either. The file is not there where there can be none.
    let tickless = fs::read_to_string("/sys/devices/system/cpu/nohz_full").unwrap_or_default();
    // The coarse clocks move once a tick, and say so.
    let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).map(Duration::from);
    slack_of(release.trim(), tickless.trim(), tick.unwrap_or_default())
}

fn slack_of(release: &str, tickless: &str, tick: Duration) -> u64 {
    let counted = version(release).is_some_and(|version| version >= COUNTED_BY_ANY);
    let ticking = matches!(tickless, "" | "(null)");
    if counted && ticking { (tick * TICKS).as_nanos() as u64 } else { 0 }
}

/// Of a release as `6.12.9-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_serves_again_only_where_its_age_is_bounded() {
        let tick = Duration::from_millis(4);
        for release in ["5.18.0", "5.18-rc1", "6.12.9-amd64", "6.1.0+", "7.0"] {
            for tickless in ["", "(null)"] {
                assert_eq!(slack_of(release, tickless, tick), 28_000_000, "{release} {tickless:?}");
            }
            assert_eq!(slack_of(release, "1-3", tick), 0, "{release}");
        }
        for release in ["5.17.15", "5.15.0-100-generic", "4.19", "", "5", "x.y", "-1"] {
            assert_eq!(slack_of(release, "", tick), 0, "{release}");
        }
        assert_eq!(slack_of("6.12", "", Duration::ZERO), 0);
    }
}
