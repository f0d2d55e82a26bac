//! `make bench`: see `komainu_tests::bench`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use komainu_packet::lane::SharedLane;
use komainu_packet::lane::af_packet::DEFAULT_RING_SLOTS;
use komainu_tests::bench::measure::Metric;
use komainu_tests::bench::paths::{Stage, large_plan};
use komainu_tests::bench::program;
use komainu_tests::bench::report::{self, Line};
use komainu_tests::bench::wire::{Way, Wire};

const USAGE: &str = "usage: bench [--quick] [--docs] [--only METRIC[/PATH]] [--runs N] [--ms N] [--slots N]
  --quick   3 runs of half a second each instead of 5 of one second
  --docs    also write docs/benchmarks.md
  --only    one metric (program_ns, tcp_bulk, udp_packets, tcp_connections, wire_packets) or one line of the results;
            writes nothing
  --runs    rounds
  --ms      milliseconds a run
  --slots   slots of each of the lane's receive rings";
/// Services, and backends of each, of a large plan.
const LARGE_PLAN: (u16, u16) = (1000, 100);
/// Name of [`wire_packets`] in the results.
const WIRE_METRIC: &str = "wire_packets";
/// Flows of the packets that the kernel generates.
const WIRE_FLOWS: u32 = 10_000;
/// Time over which the lane is watched at rest.
const REST: Duration = Duration::from_secs(3);

#[derive(Debug)]
struct Options {
    runs: usize,
    time: Duration,
    docs: bool,
    only: Option<String>,
    slots: usize,
}

fn main() -> ExitCode {
    match options().and_then(|o| run(&o)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let mut lines = Vec::new();
    if options.only.as_deref().is_none_or(|only| only == program::METRIC) {
        // Millions of flows take their time to be written down.
        let flows = if options.runs < 5 { &program::FLOWS[..2] } else { &program::FLOWS };
        lines = program::measure(flows, options.runs, program::packets_in(options.time / 4))?;
        if options.only.is_some() {
            print!("{}", report::table(&lines));
            return Ok(());
        }
    }
    if options.only.as_deref().is_none_or(|only| !only.starts_with(WIRE_METRIC)) {
        let stage = Stage::build(options.slots)?;
        lines.extend(end_to_end(&stage, options)?);
        if options.only.is_none() {
            let milliseconds = cpu_at_rest()?;
            lines.push(Line::new("cpu_at_rest/lanes".into(), "ms/s", &[milliseconds], None));
            lines.extend(plan_changes(&stage, options.runs)?);
        }
        for lane in &stage.lanes {
            let (name, counters) = (lane.kind().as_str(), lane.counters());
            for (reason, n) in counters.drops.iter().filter(|(_, n)| *n > 0) {
                println!("lane {name}: {n} frames dropped: {reason}");
            }
            lane.stop();
        }
    }
    lines.extend(wire_packets(options)?);
    print!("{}", report::table(&lines));
    if options.only.is_none() {
        report::write_json(&lines, Path::new("target/bench/results.json"))?;
        if options.docs {
            fs::create_dir_all("docs")?;
            fs::write("docs/benchmarks.md", report::page(&lines, "make bench ARGS=--docs"))?;
        }
    }
    Ok(())
}

/// What a client and a server see, through every path.
fn end_to_end(stage: &Stage, options: &Options) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for metric in Metric::ALL {
        let wanted = |path: &str| match &options.only {
            Some(only) => *only == metric.name() || *only == format!("{}/{path}", metric.name()),
            None => true,
        };
        let paths: Vec<_> =
            stage.paths.iter().filter(|p| wanted(&p.name) && metric.is_carried_by(p)).collect();
        let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for _ in 0..options.runs {
            for path in &paths {
                values.entry(&path.name).or_default().push(metric.measure(&stage.lab, path, options.time)?);
            }
        }
        for path in &paths {
            let full = |name: &str| format!("{}/{name}", metric.name());
            let peers: Vec<_> = path.peers.iter().filter_map(|p| Some((full(p), values.get(p)?))).collect();
            let ours = &values[path.name.as_str()];
            if peers.is_empty() {
                lines.push(Line::new(full(&path.name), metric.unit(), ours, None));
            }
            for (name, theirs) in peers {
                lines.push(Line::new(full(&path.name), metric.unit(), ours, Some((name, theirs))));
            }
        }
    }
    Ok(lines)
}

/// Milliseconds until a change of every one of many services is in force, by lane.
fn plan_changes(stage: &Stage, runs: usize) -> Result<Vec<Line>> {
    let (services, backends) = LARGE_PLAN;
    let mut values: Vec<Vec<f64>> = vec![Vec::new(); stage.lanes.len()];
    let mut revision = 10;
    for _ in 0..runs {
        for (lane, values) in stage.lanes.iter().zip(&mut values) {
            // Every table is another one than before.
            for weight in [1, 2] {
                revision += 1;
                let plan = large_plan(revision, services, backends, weight);
                let start = Instant::now();
                lane.install(plan)?;
                let took = start.elapsed();
                if weight == 2 {
                    values.push(took.as_secs_f64() * 1000.0);
                }
            }
        }
    }
    let full = |lane: &SharedLane| format!("plan_change/{}", lane.kind().as_str());
    let line = |(lane, values): (&SharedLane, &Vec<f64>)| Line::new(full(lane), "ms", values, None);
    Ok(stage.lanes.iter().zip(&values).map(line).collect())
}

/// Packets per second through each data path, from a generator in the kernel.
fn wire_packets(options: &Options) -> Result<Vec<Line>> {
    let full = |name: &str| format!("{WIRE_METRIC}/{name}");
    let wanted = |way: &Way| match &options.only {
        Some(only) => *only == WIRE_METRIC || *only == full(&way.name()),
        None => true,
    };
    let mut wires = Vec::new();
    for way in Way::all().into_iter().filter(wanted) {
        wires.push((way, Wire::build(way, WIRE_FLOWS).with_context(|| full(&way.name()))?, Vec::new()));
    }
    for _ in 0..options.runs {
        for (way, wire, values) in &mut wires {
            let rate = wire.packets_per_second(options.time).with_context(|| full(&way.name()))?;
            values.push(rate / 1e6);
        }
    }
    let values = |name: &str| wires.iter().find(|(way, ..)| way.name() == name).map(|(.., values)| values);
    let mut lines = Vec::new();
    for (way, _, ours) in &wires {
        let mut peers = vec![Way::Reflector.name(), Way::Nftables.name()];
        peers.retain(|p| *p != way.name() && values(p).is_some());
        if peers.is_empty() {
            lines.push(Line::new(full(&way.name()), "Mpps", ours, None));
        }
        for peer in peers {
            let theirs = values(&peer).map(|theirs| (full(&peer), theirs.as_slice()));
            lines.push(Line::new(full(&way.name()), "Mpps", ours, theirs));
        }
    }
    Ok(lines)
}

/// Processor time that the lane's threads use in a second with nothing to do, in milliseconds.
fn cpu_at_rest() -> Result<f64> {
    // Neighbours that were just used are still being confirmed by the kernel.
    thread::sleep(Duration::from_millis(500));
    let before = lane_time()?;
    thread::sleep(REST);
    Ok((lane_time()? - before).as_secs_f64() * 1000.0 / REST.as_secs_f64())
}

/// Processor time used by the lane's threads since they started (`/proc/PID/task/TID/schedstat`).
fn lane_time() -> Result<Duration> {
    let mut total = Duration::ZERO;
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        // A thread may end while the list is read.
        let Ok(name) = fs::read_to_string(task.join("comm")) else { continue };
        if matches!(name.trim(), "komainu-lane" | "komainu-netlink") {
            let stat = fs::read_to_string(task.join("schedstat"))?;
            let ns = stat.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
            total += Duration::from_nanos(ns);
        }
    }
    Ok(total)
}

fn options() -> Result<Options> {
    let mut options =
        Options { runs: 5, time: Duration::from_secs(1), docs: false, only: None, slots: DEFAULT_RING_SLOTS };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || match args.next() {
            Some(v) => Ok(v),
            None => bail!("{arg} needs a value\n{USAGE}"),
        };
        match arg.as_str() {
            "--quick" => (options.runs, options.time) = (3, Duration::from_millis(500)),
            "--docs" => options.docs = true,
            "--only" => options.only = Some(value()?),
            "--runs" => options.runs = value()?.parse()?,
            "--ms" => options.time = Duration::from_millis(value()?.parse()?),
            "--slots" => options.slots = value()?.parse()?,
            _ => bail!("unknown option {arg}\n{USAGE}"),
        }
    }
    Ok(options)
}
