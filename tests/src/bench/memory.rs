//! What flows cost in memory: the process's own and that of the program's maps, before and after a million connections.
//!
//! Each case runs in a process of its own, so that no memory that another one has given back is taken for free.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use komainu_packet::engine::DEFAULT_MAX_FLOWS;
use komainu_packet::lane::kernel::program::Hook;
use komainu_packet::plan::{BackendPlan, Mode};

use super::report::Line;
use crate::path::{Flags, Path, backend};

/// What every line of this part begins with.
pub const METRIC: &str = "flow_memory";
/// What every line of the flood's memory begins with.
pub const FLOOD_METRIC: &str = "syn_flood_memory";
/// Connections of which memory is told.
const FLOWS: u32 = 1_000_000;
/// Made before the first look: tables have their first size, pages that any flow needs are there.
const FIRST: u32 = 1000;
/// Segments of a flood, each of another client: twice as many as there is room for flows.
const FLOOD: u32 = 2 * DEFAULT_MAX_FLOWS as u32;
const BACKENDS: u8 = 100;
const MIB: f64 = (1 << 20) as f64;

/// A case. Its name stands in the results.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    hook: Option<Hook>,
    mode: Mode,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Connections to a service at rest.
    Flows,
    /// Connections to a service of which one backend of 100 is being drained.
    FlowsInTransition,
    /// A flood of SYNs.
    Flood,
}

const CASES: [Case; 7] = [
    Case { name: "flow_memory/af_packet_nat", hook: None, mode: Mode::Nat, what: What::Flows },
    Case { name: "flow_memory/xdp_nat", hook: Some(Hook::Xdp), mode: Mode::Nat, what: What::Flows },
    Case { name: "flow_memory/xdp_dsr", hook: Some(Hook::Xdp), mode: Mode::Dsr, what: What::Flows },
    Case {
        name: "flow_memory/xdp_dsr_in_transition",
        hook: Some(Hook::Xdp),
        mode: Mode::Dsr,
        what: What::FlowsInTransition,
    },
    Case { name: "syn_flood_memory/xdp_dsr", hook: Some(Hook::Xdp), mode: Mode::Dsr, what: What::Flood },
    Case { name: "syn_flood_memory/xdp_nat", hook: Some(Hook::Xdp), mode: Mode::Nat, what: What::Flood },
    Case { name: "syn_flood_memory/af_packet_nat", hook: None, mode: Mode::Nat, what: What::Flood },
];

/// Measures all cases, each in a run of `program` with the arguments `--memory-of` and its name, which calls [`measure_one`].
///
/// # Errors
/// One of them fails.
pub fn measure(program: &std::path::Path) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for case in CASES {
        let output = Command::new(program).args(["--memory-of", case.name]).output()?;
        if !output.status.success() {
            bail!("{}: {}", case.name, String::from_utf8_lossy(&output.stderr));
        }
        let text = String::from_utf8(output.stdout)?;
        let mib: f64 = text.trim().parse().with_context(|| format!("{}: not a number: {text}", case.name))?;
        lines.push(Line::new(case.name.to_owned(), "MiB", &[mib], None));
    }
    // What the kernel itself keeps for a connection that it translates. Its hash table, of fixed size, is not counted.
    if let Some(bytes) = conntrack_bytes() {
        let mib = bytes * f64::from(FLOWS) / MIB;
        lines.push(Line::new(format!("{METRIC}/{}", super::paths::NFT), "MiB", &[mib], None));
    }
    Ok(lines)
}

/// Measures a case in this process and says how much memory was taken, in MiB.
///
/// # Errors
/// There is no such case, or what can't be measured.
pub fn measure_one(name: &str) -> Result<f64> {
    let case = CASES.into_iter().find(|c| c.name == name).with_context(|| format!("no case {name}"))?;
    let mut path = Path::new(case.hook, case.mode, DEFAULT_MAX_FLOWS);
    let mut backends: Vec<BackendPlan> = (1..=BACKENDS).map(backend).collect();
    path.install(&backends);
    for flow in 0..FIRST {
        path.connect(flow);
    }
    if case.what == What::FlowsInTransition {
        backends[0].weight = 0;
        path.install(&backends);
    }
    let before = taken()?;
    if case.what == What::Flood {
        for flow in FIRST..FIRST + FLOOD {
            path.request(flow, Flags::Syn);
        }
        // It took nothing from those that were there.
        for flow in 0..FIRST {
            ensure!(path.next(flow).is_some(), "flow {flow} was lost to the flood");
        }
    } else {
        for flow in FIRST..FIRST + FLOWS {
            path.connect(flow);
        }
    }
    Ok((taken()? - before) / MIB)
}

/// Bytes that this process and its maps take.
fn taken() -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    // Its own alone: arrays of maps that it looks into are told with the maps.
    let own = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let kib = own.context("no RssAnon in /proc/self/status")?;
    let kib: f64 = kib.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024.0 + map_bytes()?)
}

/// Bytes of the kernel's that the BPF maps of this process take, as it tells (`/proc/self/fdinfo`).
fn map_bytes() -> Result<f64> {
    // A map may be open more than once.
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        // That of the directory itself is closed by now.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id.to_owned(), bytes.parse::<f64>()?);
        }
    }
    Ok(maps.values().sum())
}

/// Size of one of the kernel's connections, as its allocator has it.
fn conntrack_bytes() -> Option<f64> {
    let slabs = fs::read_to_string("/proc/slabinfo").ok()?;
    let line = slabs.lines().find(|l| l.starts_with("nf_conntrack "))?;
    line.split_whitespace().nth(3)?.parse().ok()
}
