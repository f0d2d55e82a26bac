//! `make bench`: see `komainu_tests::bench`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use komainu_packet::lane::af_packet::DEFAULT_RING_SLOTS;
use komainu_tests::bench::measure::Metric;
use komainu_tests::bench::paths::Stage;
use komainu_tests::bench::report::{self, Line};

const USAGE: &str = "usage: bench [--quick] [--docs] [--only METRIC[/PATH]] [--runs N] [--ms N] [--slots N]
  --quick   3 runs of half a second each instead of 5 of one second
  --docs    also write docs/benchmarks.md
  --only    one metric (tcp_bulk, udp_packets, tcp_connections) or one line of the results; writes nothing
  --runs    rounds
  --ms      milliseconds a run
  --slots   slots of each of the lane's receive rings";
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
    let stage = Stage::build(options.slots)?;
    let mut lines = Vec::new();
    for metric in Metric::ALL {
        let wanted = |path: &str| match &options.only {
            Some(only) => *only == metric.name() || *only == format!("{}/{path}", metric.name()),
            None => true,
        };
        let paths: Vec<_> = stage.paths.iter().filter(|p| wanted(p.name)).collect();
        let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for _ in 0..options.runs {
            for path in &paths {
                values.entry(path.name).or_default().push(metric.measure(&stage.lab, path, options.time)?);
            }
        }
        for path in &paths {
            let full = |name: &str| format!("{}/{name}", metric.name());
            let peer = path.peer.and_then(|p| Some((full(p), values.get(p)?.as_slice())));
            lines.push(Line::new(full(path.name), metric.unit(), &values[path.name], peer));
        }
    }
    if options.only.is_none() {
        let milliseconds = cpu_at_rest()?;
        lines.push(Line::new("cpu_at_rest/af_packet".into(), "ms/s", &[milliseconds], None));
    }
    print!("{}", report::table(&lines));
    for (reason, n) in stage.lane.counters().drops.iter().filter(|(_, n)| *n > 0) {
        println!("lane: {n} frames dropped: {reason}");
    }
    if options.only.is_some() {
        println!("lane: {:?}", stage.lane.counters().events);
    } else {
        report::write_json(&lines, Path::new("target/bench/results.json"))?;
        if options.docs {
            fs::create_dir_all("docs")?;
            fs::write("docs/benchmarks.md", report::page(&lines, "make bench ARGS=--docs"))?;
        }
    }
    stage.lane.stop();
    Ok(())
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
