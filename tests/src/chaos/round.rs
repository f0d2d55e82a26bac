//! One playing of a case, with everything that is measured meanwhile.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use komainu_lab::cluster::{SOON, wait_for};
use komainu_lab::traffic::churn::Churn;
use komainu_lab::traffic::crowd::Crowd;
use komainu_lab::traffic::stream::{StreamReport, StreamSpec, UdpStream};
use komainu_lab::watch::{Watch, WireLog};
use serde::{Deserialize, Serialize};

use super::case::Case;
use super::contender::Contender;
use super::play::{BACK, Scene};
use crate::PROBE;

/// Datagrams answered before the fault.
const WARM_UP: u64 = 200;
/// Pace of new TCP connections, and how long each may take: a lost SYN is sent again after one second, and then two.
const CHURN_EVERY: Duration = Duration::from_millis(10);
const CHURN_PATIENCE: Duration = Duration::from_secs(4);
/// How often a long-lived connection exchanges a byte.
const EXCHANGE_EVERY: Duration = Duration::from_secs(2);
/// How long a crowd may take to open, and to answer a roll call.
const FILL_LIMIT: Duration = Duration::from_secs(30);
const ROLL_LIMIT: Duration = Duration::from_secs(8);
/// The owner is single when nobody else has answered for this long.
const SINGLE_FOR: Duration = Duration::from_millis(150);
/// Gaps of the client that are kept.
const MAX_GAPS: usize = 12;
/// A host that is silent for longer than this does not answer: it is asked every few milliseconds.
const STRETCH_PAUSE: Duration = Duration::from_millis(30);
/// Stretches of the time line that are kept.
const MAX_STRETCHES: usize = 60;

/// Long-lived connections in one mode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CrowdResult {
    /// `nat`, `dsr`, `nat-transparent`.
    pub mode: String,
    /// Established before the fault.
    pub established: usize,
    /// Ended, or without an answer, after it.
    pub broken: usize,
    /// Why, of the first.
    pub reasons: Vec<String>,
}

/// A stretch of time in which one host answered for the VIP, in ms since the fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stretch {
    /// Host.
    pub host: String,
    /// First answer or announcement.
    pub from_ms: i64,
    /// Last one.
    pub to_ms: i64,
}

/// Datagrams in a row that nobody answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silence {
    /// When the last answered one before it was sent, in ms since the fault.
    pub from_ms: i64,
    /// How long until the next answered one was sent.
    pub ms: u64,
    /// How many were lost.
    pub lost: u64,
}

/// How long the parts of a round took, in ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Took {
    /// Until everything was well, and clients were there.
    pub before: u64,
    /// The case, until clients were served again.
    pub play: u64,
    /// Until everything was well again.
    pub settle: u64,
    /// Roll call, late answers.
    pub after: u64,
}

impl Took {
    /// All of it.
    pub fn total(&self) -> Duration {
        Duration::from_millis(self.before + self.play + self.settle + self.after)
    }
}

/// What one round has shown.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Round {
    /// Owner before and after.
    pub owners: [String; 2],
    /// Whether the owner also led; unknown with keepalived.
    pub owner_led: Option<bool>,
    /// Longest gap of the client that sends a datagram every millisecond, from the fault to the end of the round.
    pub gap_ms: u64,
    /// The first gap after the fault: what it cost itself. Later ones are of nodes that come back, and of whatever else there is.
    pub first_gap_ms: u64,
    /// Datagrams lost.
    pub lost: u64,
    /// The longest gaps, in order of time.
    pub gaps: Vec<Silence>,
    /// Longest time without a new TCP connection coming about.
    pub tcp_gap_ms: u64,
    /// New TCP connections begun and failed.
    pub tcp_begun: u64,
    /// New TCP connections that failed.
    pub tcp_failed: u64,
    /// Why, of the first.
    pub tcp_failures: Vec<String>,
    /// Long-lived connections.
    pub crowds: Vec<CrowdResult>,
    /// Longest time that two hosts answered for one address.
    pub two_owners_ms: u64,
    /// How long after a cut began to be healed two hosts still did.
    pub two_owners_after_ms: u64,
    /// Who answered for the VIP when.
    pub wire: Vec<Stretch>,
    /// Frames that the owner has dropped in the end, by reason, where it says so.
    pub drops: BTreeMap<String, u64>,
    /// What was not as it must be.
    pub wrong: Vec<String>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
    /// How long it took.
    pub took: Took,
}

/// What stays from round to round of one case.
pub struct Measure {
    crowds: Vec<(String, Crowd)>,
    size: usize,
}

impl Measure {
    /// A crowd of `size` connections for each of the contender's modes; none when `size` is 0.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(side: &dyn Contender, size: usize) -> Result<Measure> {
        let client = side.lab().host("client");
        let mut crowds = Vec::new();
        if size > 0 {
            for target in side.targets() {
                crowds.push((target.mode, Crowd::start(client, target.at, size, EXCHANGE_EVERY)?));
            }
        }
        Ok(Measure { crowds, size })
    }

    /// Plays one round of `case`. Whatever goes wrong in it stands in [`Round::wrong`].
    pub fn round(&self, side: &mut dyn Contender, case: Case, number: usize) -> Round {
        let mut round = Round::default();
        if let Err(e) = self.measured(side, case, number, &mut round) {
            round.wrong.push(format!("{e:#}"));
        }
        round
    }

    fn measured(&self, side: &mut dyn Contender, case: Case, number: usize, round: &mut Round) -> Result<()> {
        let mut clock = Instant::now();
        let mut lap = || {
            let before = std::mem::replace(&mut clock, Instant::now());
            (clock - before).as_millis() as u64
        };
        let owner = side.settle().context("before the fault")?;
        if case.changes_backends() {
            // What they were to in the round before may be gone.
            self.crowds.iter().for_each(|(_, crowd)| crowd.close_all());
            side.renew()?;
        }
        side.calm(&owner);
        let addresses = side.addresses();
        let vip = addresses[0];
        let watch = Watch::start(side.lab(), &addresses, PROBE)?;
        for (mode, crowd) in &self.crowds {
            crowd.fill(FILL_LIMIT).with_context(|| format!("connections in mode {mode}"))?;
        }
        let target = side.targets().remove(0).at;
        let client = side.lab().host("client").clone();
        let stream = UdpStream::start(&client, target, StreamSpec::default())?;
        if !stream.wait_answered(WARM_UP, SOON) {
            bail!("no answers before the fault: {:?}", stream.report());
        }
        let churn = Churn::start(&client, target, CHURN_EVERY, CHURN_PATIENCE)?;
        round.owner_led = match side.cluster() {
            Some(cluster) => {
                let status = cluster.status(&owner)?;
                Some(status.cluster.leader == Some(status.node.id))
            }
            None => None,
        };
        let other = if owner == "lb1" { "lb2" } else { "lb1" }.to_owned();
        let mut scene = Scene {
            side,
            owner: owner.clone(),
            other,
            watch: &watch,
            stream: &stream,
            crowds: self.crowds.iter().map(|(_, crowd)| crowd).collect(),
            at: Instant::now(),
            mended: None,
            round: number,
            wrong: Vec::new(),
            notes: Vec::new(),
        };
        round.took.before = lap();
        let played = scene.play(case);
        round.took.play = lap();
        let (at, healed) = (scene.at, scene.mended);
        round.wrong.append(&mut scene.wrong);
        round.notes.append(&mut scene.notes);
        let mended = played.and_then(|()| {
            single_owner(&watch, vip)?;
            // Where nobody had to before.
            scene.served()?;
            scene.side.settle().context("after the fault was mended")
        });
        round.took.settle = lap();
        if let (Ok(after), Some(cluster)) = (&mended, side.cluster()) {
            round.drops = cluster.status(after)?.drops.into_iter().filter(|(_, n)| *n > 0).collect();
        }
        round.owners = [owner, mended.as_ref().map_or_else(|_| "?".to_owned(), Clone::clone)];

        // Whatever became of it, what was measured is told.
        for (mode, crowd) in &self.crowds {
            let roll = crowd.roll_call(ROLL_LIMIT);
            crowd.forget_silent();
            let mut reasons = roll.reasons;
            if roll.silent > 0 {
                reasons.push(format!("{} gave no answer within {ROLL_LIMIT:?}", roll.silent));
            }
            let broken = roll.broken + roll.silent;
            round.crowds.push(CrowdResult { mode: mode.clone(), established: self.size, broken, reasons });
        }
        let churned = churn.stop();
        let stream = stream.stop();
        let wire = watch.stop();
        round.gap_ms = stream.longest_gap_after(at).as_millis() as u64;
        let first = stream.gaps.iter().filter(|g| g.from + g.length > at).min_by_key(|g| g.from);
        round.first_gap_ms = first.map_or(0, |g| g.length.as_millis() as u64);
        round.lost = stream.lost_between(at, Instant::now());
        round.gaps = longest(&stream, at);
        round.tcp_gap_ms = churned.longest_gap.as_millis() as u64;
        (round.tcp_begun, round.tcp_failed) = (churned.begun, churned.failed);
        round.tcp_failures = churned.failures;
        round.two_owners_ms = wire.worst_two_owners_ms();
        let last = wire.overlaps().iter().map(|o| o.to).max();
        round.two_owners_after_ms = last
            .zip(healed)
            .map_or(0, |(last, healed)| last.saturating_duration_since(healed).as_millis() as u64);
        round.wire = stretches(&wire, vip, at);
        round.took.after = lap();
        mended.map(drop)
    }
}

/// Waits until exactly one host answers for the VIP.
fn single_owner(watch: &Watch, vip: IpAddr) -> Result<()> {
    wait_for("a single owner on the wire", BACK, || {
        let since = Instant::now();
        std::thread::sleep(SINGLE_FOR);
        let seen = watch.claimants_since(vip, since);
        if seen.len() == 1 { Ok(()) } else { Err(format!("{seen:?} answer")) }
    })?;
    Ok(())
}

fn longest(stream: &StreamReport, at: Instant) -> Vec<Silence> {
    let mut gaps = stream.gaps.clone();
    gaps.sort_by_key(|g| std::cmp::Reverse(g.length));
    gaps.truncate(MAX_GAPS);
    gaps.sort_by_key(|g| g.from);
    let ms = gaps.iter().map(|g| Silence {
        from_ms: since(at, g.from),
        ms: g.length.as_millis() as u64,
        lost: g.lost,
    });
    ms.collect()
}

/// Milliseconds from `at` to `t`, which may be earlier.
fn since(at: Instant, t: Instant) -> i64 {
    match t.checked_duration_since(at) {
        Some(later) => later.as_millis() as i64,
        None => -((at - t).as_millis() as i64),
    }
}

fn stretches(wire: &WireLog, vip: IpAddr, at: Instant) -> Vec<Stretch> {
    let all = wire.stretches(vip, STRETCH_PAUSE).into_iter().take(MAX_STRETCHES);
    all.map(|(host, from, to)| Stretch { host, from_ms: since(at, from), to_ms: since(at, to) }).collect()
}
