//! `make soak`: see `komainu_tests::soak`.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use komainu_lab::cluster::binary;
use komainu_tests::chaos::Shape;
use komainu_tests::chaos::komainu::Setup;
use komainu_tests::soak::{Lap, Soak};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const USAGE: &str = "usage: soak [option VALUE]…
  --minutes N         how long [10]
  --profile NAME      [timing] profile: default or fast [default]
  --lane NAME         lane [auto]
  --cluster NAME      three (two balancers and a witness), pair, pair-safety [three]
  --hogs N            processes beside it that keep a processor busy each [one for each processor]
  --connections N     long-lived TCP connections in each mode [1000]";
const DIRECTORY: &str = "target/soak";

fn main() -> ExitCode {
    match options().and_then(|o| o.map_or(Ok(true), |o| run(&o))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("soak: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(soak: &Soak) -> Result<bool> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    komainu_lab::clean_up_on_signals();
    println!("soak: {} minutes, {} busy processes beside it", soak.laps, soak.hogs);
    let report = soak.run(tell)?;
    fs::create_dir_all(DIRECTORY)?;
    fs::write(format!("{DIRECTORY}/results.json"), serde_json::to_string_pretty(&report)?)?;
    for wrong in &report.wrong {
        println!("WRONG: {wrong}");
    }
    let sum = |of: fn(&Lap) -> u64| report.laps.iter().map(of).sum::<u64>();
    println!(
        "soak: {} min on {}: {} of {} datagrams lost, {} of {} new and {} of {} long-lived TCP connections failed; {}",
        report.laps.len(),
        report.lane,
        sum(|l| l.lost),
        sum(|l| l.sent),
        sum(|l| l.failed),
        sum(|l| l.begun),
        report.broken,
        report.connections,
        if report.wrong.is_empty() { "passed" } else { "FAILED" },
    );
    Ok(report.wrong.is_empty())
}

fn tell(number: u32, lap: &Lap) {
    let taken: Vec<String> = lap
        .taken
        .iter()
        .map(|(node, t)| format!("{node} {} KiB {} fds {} threads", t.resident_kib, t.descriptors, t.threads))
        .collect();
    println!(
        "minute {number}: {} in epoch {}; {} of {} datagrams lost, longest gap {} ms; {} of {} connections failed; \
         {} ({} ms); {}",
        lap.owner,
        lap.epoch,
        lap.lost,
        lap.sent,
        lap.gap_ms,
        lap.failed,
        lap.begun,
        lap.operator.0,
        lap.operator.1,
        taken.join(", ")
    );
}

/// Absent where only the usage was wanted.
fn options() -> Result<Option<Soak>> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let setup = Setup {
        binary: binary()?,
        shape: Shape::Three,
        lane: "auto".to_owned(),
        modes: vec!["nat".to_owned(), "dsr".to_owned()],
        checks: true,
        node_extra: String::new(),
        small_disks: false,
        preload: None,
    };
    let mut soak = Soak { setup, laps: 10, hogs: processors, connections: 1000 };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value\n{USAGE}"));
        let number =
            |text: String| text.parse::<u32>().with_context(|| format!("{arg} {text}: not a number"));
        match arg.as_str() {
            "--minutes" => soak.laps = number(value()?)?,
            "--profile" => match value()?.as_str() {
                "default" => soak.setup.node_extra.clear(),
                name @ "fast" => soak.setup.node_extra = format!("[timing]\nprofile = \"{name}\"\n"),
                other => bail!("--profile {other}: there are default and fast"),
            },
            "--lane" => soak.setup.lane = value()?,
            "--cluster" => {
                let name = value()?;
                soak.setup.shape =
                    Shape::named(&name).with_context(|| format!("--cluster {name}: unknown\n{USAGE}"))?;
            }
            "--hogs" => soak.hogs = number(value()?)? as usize,
            "--connections" => soak.connections = number(value()?)? as usize,
            "--help" => {
                println!("{USAGE}");
                return Ok(None);
            }
            _ => bail!("{arg}: no such option\n{USAGE}"),
        }
    }
    if soak.laps == 0 {
        bail!("--minutes must be at least 1");
    }
    Ok(Some(soak))
}
