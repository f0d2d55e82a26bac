//! `make chaos`: see `komainu_tests::chaos`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use komainu_lab::cluster::binary;
use komainu_tests::bench::report::machine;
use komainu_tests::chaos::keepalived::{Advert, Keepalived};
use komainu_tests::chaos::komainu::{Komainu, Setup, build_slow_sync};
use komainu_tests::chaos::report::{self, Entry, Subject};
use komainu_tests::chaos::{Case, Contender, Measure, Round};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const USAGE: &str = "usage: chaos [option VALUE]…   (lists are separated by commas)
  --cases LIST        which cases; all when left out (--list shows them)
  --rounds N          rounds of each case [20]
  --lanes LIST        lanes of Komainu; \"none\" for none [af_packet]
  --peers LIST        keepalived-1000ms, keepalived-100ms, keepalived-20ms, \"all\" or \"none\" [all]
  --modes LIST        modes of services, nat, dsr, nat-transparent; the first is measured with datagrams and new connections [nat,dsr]
  --connections N     long-lived TCP connections in each mode [1000]
  --node-extra FILE   tables added to every node file
  --no-timing         do not judge how long a gap was (the machine is busy with something else)
  --add               keep results of other cases and lanes that stand in target/chaos/results.json
  --docs              also write docs/failover.md
  --list              show the cases and end";
const DIRECTORY: &str = "target/chaos";

#[derive(Debug)]
struct Options {
    cases: Vec<Case>,
    rounds: usize,
    lanes: Vec<String>,
    peers: Vec<Advert>,
    modes: Vec<String>,
    connections: usize,
    node_extra: String,
    timed: bool,
    add: bool,
    docs: bool,
}

fn main() -> ExitCode {
    match options().and_then(|o| o.map_or(Ok(true), |o| run(&o))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("chaos: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    // Mounts of its own: what is mounted here goes with the process, whatever way it ends.
    unshare(CloneFlags::CLONE_NEWNS).context("take mounts of its own (needs root)")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    komainu_lab::clean_up_on_signals();

    let directory = Path::new(DIRECTORY);
    fs::create_dir_all(directory)?;
    let json = directory.join("results.json");
    let mut entries = if options.add { report::read_json(&json)? } else { Vec::new() };
    let mut subjects: Vec<(Subject, Option<Advert>)> = Vec::new();
    let binary = if options.lanes.is_empty() { PathBuf::new() } else { binary()? };
    for lane in &options.lanes {
        let subject = Subject {
            name: lane.clone(),
            peer: false,
            build: build_of(&binary).to_owned(),
            node_extra: options.node_extra.clone(),
        };
        subjects.push((subject, None));
    }
    for advert in &options.peers {
        let subject =
            Subject { name: advert.label(), peer: true, build: String::new(), node_extra: String::new() };
        subjects.push((subject, Some(*advert)));
    }
    let mut log = fs::File::options()
        .create(true)
        .append(options.add)
        .write(true)
        .truncate(!options.add)
        .open(directory.join("rounds.jsonl"))?;
    let (mut passed, mut failed) = (0, 0);
    for case in &options.cases {
        for (subject, advert) in &subjects {
            if advert.is_some() && !case.suits_keepalived() {
                continue;
            }
            let begun = Instant::now();
            let rounds = play(*case, subject, *advert, &binary, options, &mut log)?;
            let entry = Entry::new(*case, subject, &rounds, options.timed);
            println!("{} | {:.0} s", entry.line(), begun.elapsed().as_secs_f64());
            for wrong in &entry.wrong {
                println!("  WRONG: {wrong}");
            }
            if entry.passed() {
                passed += 1
            } else {
                failed += 1
            }
            report::merge(&mut entries, entry);
            // After each: an interrupted run has its results.
            report::write_json(&entries, &json)?;
        }
    }
    if options.docs {
        fs::create_dir_all("docs")?;
        fs::write("docs/failover.md", report::page(&entries, &machine()))?;
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

/// All rounds of a case, in a lab of its own.
fn play(
    case: Case,
    subject: &Subject,
    advert: Option<Advert>,
    binary: &Path,
    options: &Options,
    log: &mut fs::File,
) -> Result<Vec<Round>> {
    let mut rounds: Vec<Round> = Vec::new();
    while rounds.len() < options.rounds {
        // A new one at the beginning, and after a round that went wrong: what it left is evidence, not ground to go on from.
        let started = start(case, subject, advert, binary, options);
        let mut side = match started {
            Ok(side) => side,
            Err(e) => {
                rounds.push(failed_to_start(&e));
                break;
            }
        };
        let measure = Measure::new(side.as_ref(), options.connections)?;
        while rounds.len() < options.rounds {
            let round = measure.round(side.as_mut(), case, rounds.len());
            let line = serde_json::json!({
                "case": case.name(), "subject": subject.name, "round": rounds.len() + 1, "result": &round,
            });
            writeln!(log, "{line}")?;
            let unsafe_round = !subject.peer && round.two_owners_ms > 0;
            let broken = !subject.peer
                && case.bounds().connections_live
                && round.crowds.iter().any(|c| c.mode != "nat" && c.broken > 0);
            let wrong = !round.wrong.is_empty() || unsafe_round || broken;
            rounds.push(round);
            if wrong {
                side.lab().keep_dir();
                eprintln!(
                    "{} on {}, round {}: went wrong\n{}",
                    case.name(),
                    subject.name,
                    rounds.len(),
                    side.last_words()
                );
                break;
            }
        }
    }
    Ok(rounds)
}

fn failed_to_start(e: &anyhow::Error) -> Round {
    Round { wrong: vec![format!("it did not start: {e:#}")], ..Round::default() }
}

fn start(
    case: Case,
    subject: &Subject,
    advert: Option<Advert>,
    binary: &Path,
    options: &Options,
) -> Result<Box<dyn Contender>> {
    if let Some(advert) = advert {
        return Ok(Box::new(Keepalived::start(advert)?));
    }
    let slow_sync = match case {
        Case::SlowDisk => {
            let directory = std::path::absolute(DIRECTORY)?;
            Some(build_slow_sync(&directory)?)
        }
        _ => None,
    };
    Ok(Box::new(Komainu::start(&Setup {
        binary: binary.to_owned(),
        lane: subject.name.clone(),
        modes: options.modes.clone(),
        checks: true,
        node_extra: options.node_extra.clone(),
        small_disks: case == Case::DiskFull,
        slow_sync,
    })?))
}

/// By the directory that it lies in.
fn build_of(binary: &Path) -> &'static str {
    if binary.components().any(|c| c.as_os_str() == "release") { "release" } else { "debug" }
}

fn options() -> Result<Option<Options>> {
    let mut options = Options {
        cases: Case::ALL.to_vec(),
        rounds: 20,
        lanes: vec!["af_packet".to_owned()],
        peers: Advert::ALL.to_vec(),
        modes: vec!["nat".to_owned(), "dsr".to_owned()],
        connections: 1000,
        node_extra: String::new(),
        timed: true,
        add: false,
        docs: false,
    };
    let list = |text: &str| -> Vec<String> {
        text.split(',').map(|w| w.trim().to_owned()).filter(|w| !w.is_empty() && w != "none").collect()
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value\n{USAGE}"));
        match arg.as_str() {
            "--cases" => {
                options.cases = list(&value()?)
                    .iter()
                    .map(|name| {
                        Case::named(name).with_context(|| format!("no case \"{name}\": --list shows them"))
                    })
                    .collect::<Result<_>>()?;
            }
            "--rounds" => options.rounds = value()?.parse().context("--rounds needs a number")?,
            "--lanes" => options.lanes = list(&value()?),
            "--peers" => {
                let text = value()?;
                if text != "all" {
                    options.peers = list(&text)
                        .iter()
                        .map(|label| {
                            Advert::named(label).with_context(|| format!("no peer \"{label}\"\n{USAGE}"))
                        })
                        .collect::<Result<_>>()?;
                }
            }
            "--modes" => {
                options.modes = list(&value()?);
                let known = |m: &String| ["nat", "dsr", "nat-transparent"].contains(&m.as_str());
                if options.modes.is_empty() || !options.modes.iter().all(known) {
                    bail!("--modes: {:?} are not all modes\n{USAGE}", options.modes);
                }
            }
            "--connections" => {
                options.connections = value()?.parse().context("--connections needs a number")?
            }
            "--node-extra" => options.node_extra = fs::read_to_string(value()?)?,
            "--no-timing" => options.timed = false,
            "--add" => options.add = true,
            "--docs" => options.docs = true,
            "--list" => {
                for case in Case::ALL {
                    println!("{:<21} {}", case.name(), case.what());
                }
                return Ok(None);
            }
            _ => bail!("unknown option {arg}\n{USAGE}"),
        }
    }
    if options.rounds == 0 {
        bail!("--rounds must be at least 1");
    }
    Ok(Some(options))
}
