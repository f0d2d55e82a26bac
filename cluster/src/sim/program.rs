//! The simulator as a program: many seeds, each failure shortened to a transcript that people can read.
//!
//! | exit status | meaning |
//! |---|---|
//! | 0 | every seed passed, and with `--mutate` every broken rule was found |
//! | 2 | wrong usage |
//! | 10 | a node crashed |
//! | 11 | an invariant was broken: two owners, an epoch that fell, an acknowledged change that was lost, … |
//! | 12 | the cluster was not whole again in time after the faults had ceased |
//! | 13 | a rule was broken on purpose and nothing was noticed |
//!
//! When several kinds were found it is 11 before 10 before 12. The last line is `N passed, N failed`.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::faults::{self, Kind, Violation};
use super::plan::{PAIRS_FROM, Plan};
use super::world::Weather;
use crate::rules::Rule;

const USAGE: &str =
    "usage: sim [--seeds N] [--first SEED] [--threads N] [--out DIR] [--mutate] [--rule NAME] [--no-shrink]
  --seeds      how many seeds (10000)
  --first      the first of them (1)
  --pairs      how many runs of pairs without a third node beside them (a quarter as many)
  --threads    how many at a time (one a processor)
  --out        directory for transcripts of failures (target/sim)
  --mutate     first break each rule in turn, and fail where nothing notices
  --rule       the same with this rule only
  --no-shrink  write down failures as they are";
/// Failures that are written down; more of them seldom tell more.
const MAX_TOLD: usize = 5;
/// Runs that one failure may be shortened by.
const MAX_SHRINKING: usize = 300;
/// One run of a pair for so many others.
const PAIRS_SHARE: u64 = 4;
/// Seeds within which a broken rule must be found.
const MUTATION_WITHIN: u64 = 20_000;

thread_local! {
    /// What the last panic on this thread said.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

struct Options {
    seeds: u64,
    first: u64,
    /// Runs of pairs without a third node, beside the others.
    pairs: u64,
    threads: usize,
    out: PathBuf,
    mutate: bool,
    rule: Option<String>,
    shrink: bool,
}

/// Runs the program with these arguments. Answers with the exit status.
pub fn main(args: impl Iterator<Item = String>) -> u8 {
    let options = match options(args) {
        Ok(options) => options,
        Err(what) => {
            eprintln!("{what}\n{USAGE}");
            return 2;
        }
    };
    // A node that panics is a finding, told with its transcript.
    panic::set_hook(Box::new(|info| PANIC.set(info.to_string().replace('\n', ": "))));
    let missed = if options.mutate { mutate(&options) } else { 0 };
    let (failed, worst) = hunt(&options);
    println!("{} passed, {failed} failed", options.seeds + options.pairs - failed);
    match worst {
        Some(Kind::Safety) => 11,
        Some(Kind::Crash) => 10,
        Some(Kind::Liveness) => 12,
        None if missed > 0 => 13,
        None => 0,
    }
}

fn options(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let out = PathBuf::from("target/sim");
    let mut o =
        Options { seeds: 10_000, first: 1, pairs: 0, threads, out, mutate: false, rule: None, shrink: true };
    let mut pairs = None;
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{flag}: a value is missing"));
        let number = |text: String| text.parse::<u64>().map_err(|e| format!("{flag} {text}: {e}"));
        match flag.as_str() {
            "--seeds" => o.seeds = number(value()?)?,
            "--pairs" => pairs = Some(number(value()?)?),
            "--first" => o.first = number(value()?)?,
            "--threads" => o.threads = number(value()?)?.clamp(1, 1024) as usize,
            "--out" => o.out = PathBuf::from(value()?),
            "--mutate" => o.mutate = true,
            "--rule" => {
                let name = value()?;
                if !Rule::ALL.iter().any(|rule| format!("{rule:?}") == name) {
                    return Err(format!("{flag} {name}: there are {:?}", Rule::ALL));
                }
                (o.mutate, o.rule) = (true, Some(name));
            }
            "--no-shrink" => o.shrink = false,
            _ => return Err(format!("{flag}: no such option")),
        }
    }
    o.pairs = pairs.unwrap_or(o.seeds / PAIRS_SHARE);
    let end = o.first.checked_add(o.seeds).ok_or("--first and --seeds: too many")?;
    // A seed that stands for a pair is given as it is told.
    o.pairs = if end > PAIRS_FROM { 0 } else { o.pairs };
    Ok(o)
}

/// Plays a plan, and takes a panic for a crash.
fn outcome(plan: &Plan) -> Result<(), Violation> {
    panic::catch_unwind(AssertUnwindSafe(|| faults::play(plan, false).1))
        .unwrap_or_else(|_| Err(Violation { kind: Kind::Crash, text: PANIC.take() }))
}

/// Calls `look` with every seed, on every thread, until it says stop.
pub(super) fn each_seed(seeds: std::ops::Range<u64>, threads: usize, look: impl Fn(u64) -> bool + Sync) {
    let next = AtomicU64::new(seeds.start);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || !look(seed) {
                        // The others stop at their next look.
                        next.fetch_max(seeds.end, Ordering::Relaxed);
                        return;
                    }
                }
            });
        }
    });
}

/// Runs the seeds. Answers how many failed, and the worst that was found.
fn hunt(o: &Options) -> (u64, Option<Kind>) {
    let (failed, told) = (AtomicU64::new(0), AtomicUsize::new(0));
    let worst = Mutex::new(None::<Kind>);
    let look = |seed| {
        let plan = Plan::draw(seed);
        let Err(violation) = outcome(&plan) else { return true };
        failed.fetch_add(1, Ordering::Relaxed);
        {
            let mut worst = worst.lock().expect("no panic");
            *worst = Some(worst.map_or(violation.kind, |w| w.min(violation.kind)));
        }
        if told.fetch_add(1, Ordering::Relaxed) >= MAX_TOLD {
            println!("seed {seed}: {violation}");
            return true;
        }
        let short = if o.shrink { shrink(plan, violation.kind) } else { plan };
        match write_down(&o.out, &short, &violation) {
            Ok(path) => println!("seed {seed}: {violation}\n  transcript: {}", path.display()),
            Err(e) => println!("seed {seed}: {violation}\n  no transcript: {}: {e}", o.out.display()),
        }
        true
    };
    each_seed(o.first..o.first + o.seeds, o.threads, look);
    let pairs = PAIRS_FROM.saturating_add(o.first);
    each_seed(pairs..pairs + o.pairs, o.threads, look);
    (failed.into_inner(), worst.into_inner().expect("no panic"))
}

/// Breaks each rule in turn. Answers how many of them nothing noticed.
fn mutate(o: &Options) -> usize {
    let chosen = |rule: &Rule| o.rule.as_ref().is_none_or(|name| format!("{rule:?}") == *name);
    let missed = Rule::ALL.into_iter().filter(chosen).filter(|rule| {
        let found = Mutex::new(None::<(u64, Violation)>);
        each_seed(1..MUTATION_WITHIN + 1, o.threads, |seed| {
            if let Err(violation) = rule.broken(|| outcome(&Plan::draw(seed)))
                && violation.kind != Kind::Liveness
            {
                let mut found = found.lock().expect("no panic");
                if found.as_ref().is_none_or(|(first, _)| seed < *first) {
                    *found = Some((seed, violation));
                }
                return false;
            }
            true
        });
        match found.into_inner().expect("no panic") {
            Some((seed, violation)) => println!("{rule:?} broken: found by seed {seed}: {violation}"),
            None => {
                println!("{rule:?} broken: not found within {MUTATION_WITHIN} seeds");
                return true;
            }
        }
        false
    });
    missed.count()
}

/// The shortest plan found that fails in the same way.
fn shrink(mut plan: Plan, kind: Kind) -> Plan {
    let mut left = MAX_SHRINKING;
    let mut fails = |candidate: &Plan| {
        left = left.saturating_sub(1);
        left > 0 && outcome(candidate).is_err_and(|v| v.kind == kind)
    };
    // What could not be left out may be without something that was, or in another weather.
    loop {
        let before = plan.clone();
        leave_out_steps(&mut plan, &mut fails);
        simplify_setting(&mut plan, &mut fails);
        if plan == before {
            return plan;
        }
    }
}

/// Half of the steps, a quarter of them, …, single ones (Zeller, Hildebrandt: Simplifying and isolating failure-inducing input,
/// IEEE TSE 2002).
fn leave_out_steps(plan: &mut Plan, fails: &mut impl FnMut(&Plan) -> bool) {
    let mut size = plan.steps.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        while at < plan.steps.len() {
            let mut candidate = plan.clone();
            let end = (at + size).min(candidate.steps.len());
            let waited: u64 = candidate.steps.drain(at..end).map(|s| s.after).sum();
            if let Some(next) = candidate.steps.get_mut(at) {
                // What comes after keeps its time.
                next.after += waited;
            }
            if fails(&candidate) {
                *plan = candidate;
            } else {
                at += size;
            }
        }
        size /= 2;
    }
}

fn simplify_setting(plan: &mut Plan, fails: &mut impl FnMut(&Plan) -> bool) {
    let simpler: [fn(&mut Plan); 5] = [
        |p| p.flows = false,
        |p| p.weather = Weather::FAIR,
        |p| p.drift_ppm.fill(0),
        |p| p.groups = 1,
        |p| p.weather = Weather { loss_ppm: 0, twice_ppm: 0, late_ppm: 0, slow_ppm: 0, ..p.weather },
    ];
    for simplify in simpler {
        let mut candidate = plan.clone();
        simplify(&mut candidate);
        if candidate != *plan && fails(&candidate) {
            *plan = candidate;
        }
    }
}

fn write_down(out: &Path, plan: &Plan, first: &Violation) -> std::io::Result<PathBuf> {
    let mut text = format!("seed {}: {first}\n", plan.seed);
    let _ =
        writeln!(text, "the whole run again: make sim SEEDS=1 SEED={}\n\nshortened to:\n{plan}", plan.seed);
    let mut w = faults::world(plan, true);
    let played = panic::catch_unwind(AssertUnwindSafe(|| faults::play_in(&mut w, plan)));
    let ended = match played {
        Ok(result) => result.err().map_or_else(|| "passed".to_owned(), |v| v.to_string()),
        Err(_) => format!("crash: {}", PANIC.take()),
    };
    text.push_str(&w.transcript.join("\n"));
    let _ = writeln!(text, "\n\n{ended}");
    std::fs::create_dir_all(out)?;
    let path = out.join(format!("seed-{}.txt", plan.seed));
    std::fs::write(&path, text)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_the_same_run_byte_for_byte() {
        for seed in 1..=20 {
            let told = || faults::run(seed, true).0.transcript;
            assert_eq!(told(), told(), "seed {seed}");
        }
    }

    /// A program that plays very many runs spares most of them the writing and reading of beats.
    #[test]
    fn a_run_is_the_same_whether_beats_are_bytes_or_not() {
        for seed in (1..=40).chain(PAIRS_FROM..PAIRS_FROM + 20) {
            let told = |as_bytes| {
                let plan = Plan::draw(seed);
                let mut w = faults::world(&plan, true);
                w.beats_as_bytes = as_bytes;
                let result = faults::play_in(&mut w, &plan);
                (w.transcript, result)
            };
            assert_eq!(told(true), told(false), "seed {seed}");
        }
    }

    #[test]
    fn a_failure_is_shortened_to_what_it_needs() {
        // A rule whose breach shows in fair weather, too: what needs a lucky datagram needs all the steps that lead up to it.
        let (plan, kind) = Rule::Promise.broken(|| {
            let plans = (1..1_000).map(Plan::draw);
            plans
                .filter_map(|p| Some((p.clone(), faults::play(&p, false).1.err()?.kind)))
                .next()
                .expect("one fails")
        });
        let steps = plan.steps.len();
        Rule::Promise.broken(|| {
            let short = shrink(plan, kind);
            assert!(short.steps.len() <= 6 && short.steps.len() < steps, "{short}");
            assert_eq!(faults::play(&short, false).1.map_err(|v| v.kind), Err(kind));
        });
    }

    #[test]
    fn arguments_are_read_and_refused() {
        let read = |text: &str| options(text.split_whitespace().map(str::to_owned));
        assert!(
            read("--seeds 5 --first 7 --mutate").is_ok_and(|o| (o.seeds, o.first, o.mutate) == (5, 7, true))
        );
        for wrong in ["--seeds", "--seeds x", "--what", "--first 18446744073709551615 --seeds 2"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
