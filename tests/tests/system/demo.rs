//! `komainu demo` as a script sees it.

use std::process::Command;
use std::time::{Duration, Instant};

use komainu_tests::{Bed, Machine};

#[test]
fn the_demo_ends_well_with_its_figures_in_the_last_line() {
    // Nothing of the bed is used but its place in the queue: the demo measures time.
    let _alone =
        Bed::idle(Machine::Alone, komainu_lab::Standard { service_backends: 0, ..Default::default() });
    let start = Instant::now();
    let output =
        Command::new(komainu_lab::cluster::binary().unwrap()).args(["demo", "--json"]).output().unwrap();
    let took = start.elapsed();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    let lines: Vec<serde_json::Value> = stdout
        .lines()
        .map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("not JSON ({e}): {l}")))
        .collect();
    let last = lines.last().unwrap();
    assert_eq!(last["ok"], true, "{stdout}");
    for figure in ["owner_killed_gap_ms", "switchover_lost", "two_owners_ms", "backend_excluded_ms"] {
        assert!(last[figure].is_u64(), "{figure} in {last}");
    }
    assert_eq!(last["two_owners_ms"], 0);
    for event in ["formed", "requests", "backend_excluded", "drained", "switchover", "failover", "rejoined"] {
        assert!(lines.iter().any(|l| l["event"] == event), "no {event} in {stdout}");
    }
    assert!(took < Duration::from_secs(120), "it took {took:?}");
}
