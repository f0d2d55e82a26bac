//! `make bench`: see `komainu_tests::bench`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use komainu_lab::{Host, Lab, Standard};
use komainu_packet::lane::LaneKind;
use komainu_packet::lane::af_packet::{AfPacketConfig, DEFAULT_RING_SLOTS};
use komainu_tests::bench::measure::Metric;
use komainu_tests::bench::paths::{Stage, large_plan};
use komainu_tests::bench::report::{self, Line};
use komainu_tests::bench::wire::{ENDS, Load, Way, Wire};
use komainu_tests::bench::{flood, memory, program};
use komainu_tests::lane::{self, Renewer};

const USAGE: &str = "usage: bench [--quick] [--docs] [--only METRIC[/PATH]] [--runs N] [--ms N] [--slots N]
  --quick   3 runs of half a second each instead of 5 of one second
  --docs    also write docs/benchmarks.md
  --only    one metric (program_ns, syn_flood_ns, flow_memory, cpu_at_rest, tcp_bulk, tcp_bulk_back, udp_packets,
            tcp_connections, wire_packets, wire_packets_200k, wire_packets_1m, wire_connections) or, from tcp_bulk on, one line of the results; writes nothing
  --runs    rounds
  --ms      milliseconds a run
  --slots   slots of each of the lane's receive rings";
/// Services, and backends of each, of a large plan.
const LARGE_PLAN: (u16, u16) = (1000, 100);
/// Names of [`alone`] in the results.
const PLAN_METRIC: &str = "plan_change";
const REST_METRIC: &str = "cpu_at_rest";
/// What the kernel generates: name in the results, load, unit and how many make one of it.
const WIRE: [(&str, Load, &str, f64); 4] = [
    ("wire_packets", Load::Established(10_000), "Mpps", 1e6),
    // The kernel's own table has room for 262 144 by default.
    ("wire_packets_200k", Load::Established(200_000), "Mpps", 1e6),
    ("wire_packets_1m", Load::Established(1_000_000), "Mpps", 1e6),
    ("wire_connections", Load::Connections, "connections/s", 1.0),
];
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

impl Options {
    /// Whether the lines that begin with `metric` are asked for.
    fn wants(&self, metric: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == metric)
    }
}

fn main() -> ExitCode {
    // One case of the memory's measurement, in a process of its own.
    let mut args = std::env::args().skip(1);
    if let (Some("--memory-of"), Some(name)) = (args.next().as_deref(), args.next()) {
        return match memory::measure_one(&name) {
            Ok(mib) => {
                println!("{mib}");
                ExitCode::SUCCESS
            }
            Err(e) => {
                eprintln!("{e:#}");
                ExitCode::FAILURE
            }
        };
    }
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
    if options.wants(program::METRIC) {
        tell("nanoseconds for each packet, in the programs");
        // Millions of flows take their time to be written down.
        let flows = if options.runs < 5 { &program::FLOWS[..2] } else { &program::FLOWS };
        lines = program::measure(flows, options.runs, program::packets_in(options.time / 4))?;
    }
    if options.wants(flood::METRIC) {
        tell("a flood of SYNs");
        lines.extend(flood::measure(options.runs, program::packets_in(options.time / 4))?);
    }
    if options.wants(memory::METRIC) || options.wants(memory::FLOOD_METRIC) {
        tell("memory of flows");
        lines.extend(memory::measure(&std::env::current_exe()?)?);
    }
    if options.wants(PLAN_METRIC) || options.wants(REST_METRIC) {
        tell("changes of tables, and rest");
        lines.extend(alone(options)?);
    }
    if options.only.as_deref().is_none_or(|only| Metric::ALL.iter().any(|m| only.starts_with(m.name()))) {
        let stage = Stage::build(options.slots)?;
        lines.extend(end_to_end(&stage, options)?);
        for lane in &stage.lanes {
            let (name, counters) = (lane.kind().as_str(), lane.counters());
            for (reason, n) in counters.drops.iter().filter(|(_, n)| *n > 0) {
                println!("lane {name}: {n} frames dropped: {reason}");
            }
            lane.stop();
        }
    }
    for (metric, load, unit, one) in WIRE {
        if options.only.as_deref().is_none_or(|only| only.split('/').next() == Some(metric)) {
            tell(metric);
            lines.extend(wire(options, metric, load, unit, one)?);
        }
    }
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

/// Says on standard error what is being measured: all of it takes half an hour.
fn tell(what: &str) {
    eprintln!("bench: {what}");
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
        let rounds = metric.rounds(options.runs);
        for round in 1..=rounds {
            tell(&format!("{} of {} paths, round {round} of {rounds}", metric.name(), paths.len()));
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

/// What each lane takes by itself: processor time at rest, and the time until a change of every one of many services is in force.
fn alone(options: &Options) -> Result<Vec<Line>> {
    let (services, backends) = LARGE_PLAN;
    let (mut rest, mut changes) = (Vec::new(), Vec::new());
    for kind in [LaneKind::AfPacket, LaneKind::Tc, LaneKind::Xdp] {
        let topology =
            Standard { service_backends: 1, inside_backends: 0, balancers: 1, ..Standard::default() };
        let lab = Lab::build(&topology.topology())?;
        let lane = lane::start(&lab, "lb1", kind, AfPacketConfig::new("eth0", None))?;
        lane.install(lane::dsr_plan(80))?;
        let renewer = Renewer::start(Arc::clone(&lane));
        rest.push(Line::new(
            format!("{REST_METRIC}/{}", kind.as_str()),
            "ms/s",
            &[cpu_at_rest(lab.host("lb1"))?],
            None,
        ));
        drop(renewer);
        let mut milliseconds = Vec::new();
        for revision in 0..options.runs as u64 {
            // Every table is another one than before.
            for weight in [1, 2] {
                let plan = large_plan(2 * revision + u64::from(weight) + 1, services, backends, weight);
                let start = Instant::now();
                lane.install(plan)?;
                let took = start.elapsed();
                if weight == 2 {
                    milliseconds.push(took.as_secs_f64() * 1000.0);
                }
            }
        }
        lane.stop();
        changes.push(Line::new(format!("{PLAN_METRIC}/{}", kind.as_str()), "ms", &milliseconds, None));
    }
    rest.extend(changes);
    Ok(rest)
}

/// Packets or connections per second through each data path, from a generator in the kernel.
fn wire(options: &Options, metric: &str, load: Load, unit: &'static str, one: f64) -> Result<Vec<Line>> {
    let full = |name: &str| format!("{metric}/{name}");
    let wanted = |way: &Way| match &options.only {
        Some(only) => *only == metric || *only == full(&way.name()),
        None => true,
    };
    let mut wires = Vec::new();
    for way in Way::all(load).into_iter().filter(wanted) {
        wires.push((way, Wire::build(way, load).with_context(|| full(&way.name()))?, Vec::new()));
    }
    for _ in 0..options.runs {
        for (way, wire, values) in &mut wires {
            let rate = wire.per_second(options.time).with_context(|| full(&way.name()))?;
            values.push(rate / one);
        }
    }
    let values = |name: &str| wires.iter().find(|(way, ..)| way.name() == name).map(|(.., values)| values);
    let mut lines = Vec::new();
    for (way, _, ours) in &wires {
        let mut peers = vec![Way::Reflector.name(), Way::Nftables.name(), Way::Haproxy.name()];
        peers.retain(|p| *p != way.name() && values(p).is_some());
        if peers.is_empty() {
            lines.push(Line::new(full(&way.name()), unit, ours, None));
        }
        for peer in peers {
            let theirs = values(&peer).map(|theirs| (full(&peer), theirs.as_slice()));
            lines.push(Line::new(full(&way.name()), unit, ours, theirs));
        }
    }
    if let Some(ends) = values(ENDS)
        && let Load::Established(_) = load
    {
        lines.extend(beyond_the_ends(metric, ends, one, &wires));
    }
    Ok(lines)
}

/// What a packet takes of a data path itself, in nanoseconds: its share of a second less that of generator and counter, which a
/// balancer's processor does not have to do.
fn beyond_the_ends(metric: &str, ends: &[f64], one: f64, wires: &[(Way, Wire, Vec<f64>)]) -> Vec<Line> {
    let full = |name: &str| format!("{metric}_ns/{name}");
    let net = |values: &[f64]| -> Vec<f64> {
        values.iter().zip(ends).map(|(ours, ends)| 1e9 / one * (1.0 / ours - 1.0 / ends)).collect()
    };
    let kernel = wires.iter().find(|(way, ..)| *way == Way::Nftables).map(|(.., values)| net(values));
    let mut lines = Vec::new();
    for (way, _, values) in wires.iter().filter(|(way, ..)| *way != Way::Ends) {
        let theirs = kernel.as_deref().filter(|_| *way != Way::Nftables);
        let theirs = theirs.map(|values| (full(&Way::Nftables.name()), values));
        lines.push(Line::new(full(&way.name()), "ns", &net(values), theirs));
    }
    lines
}

/// Processor time that the lane's threads use in a second with nothing to do, in milliseconds.
fn cpu_at_rest(host: &Host) -> Result<f64> {
    // Neighbours that were just used are still being confirmed by the kernel.
    thread::sleep(Duration::from_millis(500));
    let before = lane::processor_time(host)?;
    thread::sleep(REST);
    Ok((lane::processor_time(host)? - before).as_secs_f64() * 1000.0 / REST.as_secs_f64())
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
