//! Clock, priorities, limits, forwarding: what the kernel gives this process.

use std::fs;
use std::time::Duration;

use komainu_packet::lane::af_packet::AfPacketConfig;
use komainu_packet::time::BootTime;
use nix::sys::resource::{Resource, getrlimit};

use super::Finding;

/// Bits of capabilities(7).
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_NICE: u32 = 23;
/// Descriptors that a big configuration needs: 256 checks at a time with two each, peers, administrators, and room.
const DESCRIPTORS: u64 = 4096;
/// Memory that the daemon locks at least: the receive rings and the beat thread's stacks.
const LOCKED_BYTES: u64 = 256 << 20;
/// Clock sources that take microseconds to read, or tick in milliseconds (Linux `clocksource` drivers).
const POOR_CLOCKS: &[&str] = &["jiffies", "refined-jiffies", "acpi_pm", "pit", "hpet"];

/// The leases' clock: there, running, and not poor.
pub(super) fn clock(findings: &mut Vec<Finding>) {
    let before = BootTime::now();
    std::thread::sleep(Duration::from_millis(2));
    if BootTime::now() <= before {
        let action = "leases can't be kept on this machine";
        findings.push(Finding::fail("clock", "CLOCK_BOOTTIME does not advance", action));
        return;
    }
    let source = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let source = source.as_deref().map_or("unknown", str::trim);
    findings.push(match POOR_CLOCKS.contains(&source) {
        false => Finding::ok("clock", format!("CLOCK_BOOTTIME runs, clock source {source}")),
        true => Finding::warn(
            "clock",
            format!("clock source {source} is slow to read, and every packet reads it"),
            "see /sys/devices/system/clocksource/clocksource0/available_clocksource for a better one",
        ),
    });
}

/// May the beat thread run before everything else?
pub(super) fn priority(findings: &mut Vec<Finding>) {
    let limit = getrlimit(Resource::RLIMIT_RTPRIO).map_or(0, |(soft, _)| soft);
    findings.push(if has_capability(CAP_SYS_NICE) || limit > 0 {
        Finding::ok("priority", "the beat thread may have real-time priority")
    } else {
        Finding::warn(
            "priority",
            "the beat thread may not have real-time priority: a busy machine may lose its leases",
            "run as root, or give the service AmbientCapabilities=CAP_SYS_NICE or LimitRTPRIO=50",
        )
    });
}

/// May memory be locked, so that a beat never waits for a disk?
pub(super) fn memory_lock(findings: &mut Vec<Finding>) {
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
    findings.push(if has_capability(CAP_IPC_LOCK) || limit >= LOCKED_BYTES {
        Finding::ok("memory", "may be locked")
    } else {
        Finding::warn(
            "memory",
            format!("only {} KiB may be locked: a machine that swaps may lose its leases", limit >> 10),
            "run as root, or give the service LimitMEMLOCK=infinity",
        )
    });
}

/// Are there descriptors enough? The daemon raises the soft limit to the hard one by itself.
pub(super) fn descriptors(findings: &mut Vec<Finding>) {
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    findings.push(if hard >= DESCRIPTORS {
        Finding::ok("descriptors", "enough of them may be open")
    } else {
        Finding::warn(
            "descriptors",
            format!("only {hard} may be open; with many backends checks will fail for want of them"),
            format!("give the service LimitNOFILE={DESCRIPTORS}"),
        )
    });
}

/// Does the kernel throw away packets that come in where it would not send the answer to (RFC 3704)?
///
/// The data path doesn't care, it reads frames before the kernel does. Health checks and cluster traffic do.
pub(super) fn reverse_path_filter(lane: &AfPacketConfig, findings: &mut Vec<Finding>) {
    let read = |name: &str| -> u8 {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
        fs::read_to_string(path).ok().and_then(|v| v.trim().parse().ok()).unwrap_or(0)
    };
    for name in [Some(&lane.service), lane.inside.as_ref()].into_iter().flatten() {
        // The higher of the two is in force (kernel's ip-sysctl, rp_filter).
        if read("all").max(read(name)) == 1 {
            findings.push(Finding::ok(
                format!("interface {name}"),
                "rp_filter is strict: answers to health checks must come in by the interface that their questions left by",
            ));
        }
    }
}

fn has_capability(bit: u32) -> bool {
    let bits = fs::read_to_string("/proc/self/status").ok().and_then(|status| {
        let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    });
    bits.is_some_and(|bits| bits & (1 << bit) != 0)
}
