//! `make chaos`: see `komainu_tests::chaos`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use komainu_lab::cluster::binary;
use komainu_tests::bench::report::machine;
use komainu_tests::chaos::keepalived::{Advert, Keepalived};
use komainu_tests::chaos::komainu::{Komainu, Setup};
use komainu_tests::chaos::page::page;
use komainu_tests::chaos::preload::Preload;
use komainu_tests::chaos::report::{self, Entry, Subject};
use komainu_tests::chaos::{Case, Contender, Measure, Round, Shape};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const USAGE: &str = "usage: chaos [option VALUE]…   (lists are separated by commas)
  --cases LIST        which cases, \"all\" or \"none\" [all] (--list shows them)
  --rounds N          rounds of each case [20]
  --lanes LIST        lanes of Komainu, or \"none\" [af_packet,tc,xdp]
  --clusters LIST     kinds of clusters on these lanes: three (two balancers and a witness), pair, pair-safety [three]
  --profile NAME      [timing] profile of Komainu: default or fast [default]
  --peers LIST        keepalived-1000ms, keepalived-100ms, keepalived-20ms, \"all\" or \"none\" [all]
  --modes LIST        modes of services, nat, dsr, nat-transparent; the first is measured with datagrams and new connections [all]
  --connections N     long-lived TCP connections in each mode [1000]
  --node-extra FILE   tables added to every node file
  --no-timing         do not judge how long a gap was (the machine is busy with something else)
  --missing           play only what there is no result of, in target/chaos/results.json or else in docs/failover.json
  --fresh             forget what stands there; else results of this run take the place of older ones, and the others stay
  --docs              also write docs/failover.md and docs/failover.json from all results that stand
  --list              show the cases and end";
const DIRECTORY: &str = "target/chaos";
/// The page, and the results that it was written from: what another machine, or another day, adds to.
const PAGE: &str = "docs/failover.md";
const PUBLISHED: &str = "docs/failover.json";

#[derive(Debug)]
struct Options {
    cases: Vec<Case>,
    rounds: usize,
    lanes: Vec<String>,
    clusters: Vec<Shape>,
    profile: String,
    peers: Vec<Advert>,
    modes: Vec<String>,
    connections: usize,
    node_extra: String,
    timed: bool,
    missing: bool,
    fresh: bool,
    docs: bool,
}

/// What a case is played on, for as long as it is fit for the next.
struct Stage {
    needs: Needs,
    // Before the lab that its connections are in.
    measure: Measure,
    side: Box<dyn Contender>,
}

/// What a case needs of a lab beyond what all need.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Needs {
    small_disks: bool,
    preload: Option<Preload>,
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
    let mut entries = match (options.fresh, json.exists()) {
        (true, _) => Vec::new(),
        (false, true) => report::read_json(&json)?,
        (false, false) => report::read_json(Path::new(PUBLISHED))?,
    };
    let binary = if options.lanes.is_empty() { PathBuf::new() } else { binary()? };
    let mut log = fs::File::options()
        .create(true)
        .append(!options.fresh)
        .write(true)
        .truncate(options.fresh)
        .open(directory.join("rounds.jsonl"))?;
    let (mut passed, mut failed) = (0, 0);
    for (subject, advert) in subjects(options, &binary) {
        // A lab serves from case to case: building one takes as long as some rounds.
        let mut stage = None;
        for case in &options.cases {
            let suits = subject.shape.map_or_else(|| case.suits_keepalived(), |shape| case.suits(shape));
            let stands = || entries.iter().any(|e| e.is_of(*case, &subject) && e.rounds >= options.rounds);
            if !suits || options.missing && stands() {
                continue;
            }
            let begun = Instant::now();
            let player = Player { case: *case, subject: &subject, advert, binary: &binary, options };
            let (lane, rounds) = player.play(&mut stage, &mut log)?;
            let entry = Entry::new(*case, &subject, lane, &rounds, options.timed);
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
        fs::write(PAGE, page(&entries, &machine()))?;
        report::write_json(&entries, Path::new(PUBLISHED))?;
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

/// Everybody that cases are to be done to.
fn subjects(options: &Options, binary: &Path) -> Vec<(Subject, Option<Advert>)> {
    let commit = commit();
    let mut subjects = Vec::new();
    for shape in &options.clusters {
        for lane in &options.lanes {
            let subject = Subject {
                name: lane.clone(),
                shape: Some(*shape),
                profile: options.profile.clone(),
                commit: commit.clone(),
                build: build_of(binary).to_owned(),
                node_extra: options.node_extra.clone(),
            };
            subjects.push((subject, None));
        }
    }
    for advert in &options.peers {
        let subject = Subject {
            name: advert.label(),
            shape: None,
            profile: String::new(),
            commit: commit.clone(),
            build: String::new(),
            node_extra: String::new(),
        };
        subjects.push((subject, Some(*advert)));
    }
    subjects
}

/// What is played, and on whom.
struct Player<'a> {
    case: Case,
    subject: &'a Subject,
    advert: Option<Advert>,
    binary: &'a Path,
    options: &'a Options,
}

impl Player<'_> {
    /// All rounds, on `stage` if that is fit for them. What forwarded, and what was seen.
    fn play(&self, stage: &mut Option<Stage>, log: &mut fs::File) -> Result<(Option<String>, Vec<Round>)> {
        let (case, subject) = (self.case, self.subject);
        let preload = match case {
            Case::SlowDisk => Some(Preload::SlowSync),
            Case::ClockBack => Some(Preload::WallClock),
            _ => None,
        };
        let needs = Needs {
            small_disks: case == Case::DiskFull && self.advert.is_none(),
            preload: preload.filter(|_| self.advert.is_none()),
        };
        *stage = stage.take().filter(|s| s.needs == needs);
        if let Some(used) = stage
            && let Err(e) = used.side.renew()
        {
            eprintln!("{} on {}: another lab is built: {e:#}", case.name(), subject.name);
            *stage = None;
        }
        let mut rounds: Vec<Round> = Vec::new();
        let mut lane = None;
        while rounds.len() < self.options.rounds {
            // A new one at the beginning, and after a round that went wrong: what it left is evidence, not ground to go on from.
            let on = match stage.take() {
                Some(on) => stage.insert(on),
                None => match self.build(needs) {
                    Ok(built) => stage.insert(built),
                    Err(e) => {
                        rounds.push(failed_to_start(&e));
                        break;
                    }
                },
            };
            lane = on.side.lane().or(lane);
            let round = on.measure.round(on.side.as_mut(), case, rounds.len());
            let line = serde_json::json!({
                "case": case.name(), "subject": subject.name, "cluster": subject.shape.map(Shape::name),
                "profile": subject.profile, "commit": subject.commit, "round": rounds.len() + 1, "result": &round,
            });
            writeln!(log, "{line}")?;
            let wrong = self.is_wrong(&round);
            rounds.push(round);
            if wrong {
                on.side.lab().keep_dir();
                eprintln!(
                    "{} on {}, round {}: went wrong\n{}",
                    case.name(),
                    subject.name,
                    rounds.len(),
                    on.side.last_words()
                );
                *stage = None;
            }
        }
        Ok((lane, rounds))
    }

    fn is_wrong(&self, round: &Round) -> bool {
        let Some(shape) = self.subject.shape else { return !round.wrong.is_empty() };
        let bounds = self.case.bounds(shape);
        let two_owners = match bounds.two_owners_end {
            Some(end) => u128::from(round.two_owners_after_ms) > end.as_millis(),
            None => round.two_owners_ms > 0,
        };
        let broken = bounds.connections_live && round.crowds.iter().any(|c| c.broken > 0);
        !round.wrong.is_empty() || two_owners || broken
    }

    fn build(&self, needs: Needs) -> Result<Stage> {
        let side: Box<dyn Contender> = match (self.advert, self.subject.shape) {
            (Some(advert), _) => Box::new(Keepalived::start(advert)?),
            (None, shape) => {
                let profile = match self.options.profile.as_str() {
                    "default" => String::new(),
                    other => format!("[timing]\nprofile = \"{other}\"\n"),
                };
                Box::new(Komainu::start(&Setup {
                    binary: self.binary.to_owned(),
                    shape: shape.unwrap_or(Shape::Three),
                    lane: self.subject.name.clone(),
                    modes: self.options.modes.clone(),
                    checks: true,
                    node_extra: format!("{profile}{}", self.options.node_extra),
                    small_disks: needs.small_disks,
                    preload: needs.preload,
                })?)
            }
        };
        Ok(Stage { needs, measure: Measure::new(side.as_ref(), self.options.connections)?, side })
    }
}

fn failed_to_start(e: &anyhow::Error) -> Round {
    Round { wrong: vec![format!("it did not start: {e:#}")], ..Round::default() }
}

/// The commit that is checked out, as short as git makes it; with `+changes` where files of it differ.
fn commit() -> String {
    let git = |args: &[&str]| {
        // The run is root's, the files may be another user's.
        let output = Command::new("git").args(["-c", "safe.directory=*"]).args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else { return "unknown".to_owned() };
    // Results and their page don't count.
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!*.md"]);
    if changed.is_none_or(|c| c.is_empty()) { commit } else { format!("{commit}+changes") }
}

/// By the directory that it lies in.
fn build_of(binary: &Path) -> &'static str {
    if binary.components().any(|c| c.as_os_str() == "release") { "release" } else { "debug" }
}

fn options() -> Result<Option<Options>> {
    let mut options = Options {
        cases: Case::ALL.to_vec(),
        rounds: 20,
        lanes: ["af_packet", "tc", "xdp"].map(str::to_owned).to_vec(),
        clusters: vec![Shape::Three],
        profile: "default".to_owned(),
        peers: Advert::ALL.to_vec(),
        modes: ["nat", "dsr", "nat-transparent"].map(str::to_owned).to_vec(),
        connections: 1000,
        node_extra: String::new(),
        timed: true,
        missing: false,
        fresh: false,
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
                let text = value()?;
                if text != "all" {
                    options.cases = list(&text)
                        .iter()
                        .map(|name| {
                            Case::named(name)
                                .with_context(|| format!("no case \"{name}\": --list shows them"))
                        })
                        .collect::<Result<_>>()?;
                }
            }
            "--rounds" => options.rounds = value()?.parse().context("--rounds needs a number")?,
            "--lanes" => options.lanes = list(&value()?),
            "--clusters" => {
                options.clusters = list(&value()?)
                    .iter()
                    .map(|name| {
                        Shape::named(name).with_context(|| format!("no kind of cluster \"{name}\"\n{USAGE}"))
                    })
                    .collect::<Result<_>>()?;
            }
            "--profile" => {
                options.profile = value()?;
                if !["default", "fast"].contains(&options.profile.as_str()) {
                    bail!("no profile \"{}\"\n{USAGE}", options.profile);
                }
            }
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
            "--missing" => options.missing = true,
            "--fresh" => options.fresh = true,
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
