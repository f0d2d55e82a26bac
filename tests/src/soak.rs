//! A cluster under load for long: the owner keeps the VIP, connections live, and nothing grows.
//!
//! Every minute an operator changes something, as operators do, and what the nodes take is noted. Beside it other work may
//! keep the processors busy: that a machine is slow is no reason to change owners.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use komainu_lab::Process;
use komainu_lab::cluster::SOON;
use komainu_lab::traffic::churn::Churn;
use komainu_lab::traffic::crowd::Crowd;
use komainu_lab::traffic::stream::{StreamSpec, UdpStream};
use serde::Serialize;

use crate::GROUP;
use crate::chaos::Contender;
use crate::chaos::komainu::{Komainu, Setup};

/// Time between two looks at everything.
const LAP: Duration = Duration::from_secs(60);
/// After that part of a lap the operator acts.
const OPERATOR_AFTER: Duration = Duration::from_secs(20);
/// Port of the service that comes and goes.
const EXTRA_PORT: u16 = 8088;
/// A backend that is taken out and put back; no connections of the crowds are on it.
const DRAINED: &str = "nat-udp/be2";
/// How often a long-lived connection exchanges a byte.
const EXCHANGE_EVERY: Duration = Duration::from_secs(2);
/// Pace of new TCP connections, and how long each may take.
const CHURN_EVERY: Duration = Duration::from_millis(10);
const CHURN_PATIENCE: Duration = Duration::from_secs(10);
/// How long a crowd may take to open, and to answer a roll call.
const FILL_LIMIT: Duration = Duration::from_secs(60);
const ROLL_LIMIT: Duration = Duration::from_secs(20);
/// What a process may take more in the end than at a third of the time: a quarter, and this.
const ROOM_KIB: u64 = 8 << 10;
const ROOM_DESCRIPTORS: u64 = 16;

/// What is run, and for how long.
#[derive(Clone, Debug)]
pub struct Soak {
    /// The cluster.
    pub setup: Setup,
    /// How many [`LAP`]s.
    pub laps: u32,
    /// Processes that do nothing but keep a processor busy, at usual priority.
    pub hogs: usize,
    /// Long-lived TCP connections in each mode.
    pub connections: usize,
}

/// What a process takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Taken {
    /// Memory that is its own or shared, in KiB (`VmRSS`).
    pub resident_kib: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
}

/// What one lap has shown.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Lap {
    /// Owner at its end, and its epoch.
    pub owner: String,
    /// The epoch it owns in.
    pub epoch: u64,
    /// Datagrams sent, one a millisecond, and lost.
    pub sent: u64,
    /// Datagrams without an answer.
    pub lost: u64,
    /// Longest time without an answered datagram, in ms.
    pub gap_ms: u64,
    /// TCP connections begun, one each 10 ms.
    pub begun: u64,
    /// Those that failed.
    pub failed: u64,
    /// What the operator did, and how long it took in ms.
    pub operator: (String, u64),
    /// By node.
    pub taken: BTreeMap<String, Taken>,
}

/// What the whole run has shown.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Lane in force.
    pub lane: String,
    /// Every lap.
    pub laps: Vec<Lap>,
    /// Long-lived connections, and how many of them did not live to the end.
    pub connections: usize,
    /// See there.
    pub broken: usize,
    /// What was not as it must be.
    pub wrong: Vec<String>,
}

impl Soak {
    /// Runs it; `told` gets every lap as it ends.
    ///
    /// # Errors
    /// The cluster does not come about, or can't be asked.
    pub fn run(&self, told: impl Fn(u32, &Lap)) -> Result<Report> {
        let mut cluster = Komainu::start(&self.setup)?;
        let owner = cluster.settle()?;
        cluster.calm(&owner);
        let client = cluster.lab().host("client").clone();
        let mut crowds = Vec::new();
        for target in cluster.targets() {
            let crowd = Crowd::start(&client, target.at, self.connections, EXCHANGE_EVERY)?;
            crowd.fill(FILL_LIMIT).with_context(|| format!("connections in mode {}", target.mode))?;
            crowds.push((target.mode, crowd));
        }
        let target = cluster.targets().remove(0).at;
        let epoch = epoch_of(&mut cluster, &owner)?;
        let mut report = Report { lane: cluster.lane().unwrap_or_default(), ..Report::default() };
        let hogs = self.keep_busy(&cluster)?;
        for number in 0..self.laps {
            let begun = Instant::now();
            let stream = UdpStream::start(&client, target, StreamSpec::default())?;
            let churn = Churn::start(&client, target, CHURN_EVERY, CHURN_PATIENCE)?;
            thread::sleep(OPERATOR_AFTER);
            let at = Instant::now();
            let what = operate(&mut cluster, &owner, number).unwrap_or_else(|e| {
                report.wrong.push(format!("lap {number}: {e:#}"));
                format!("{e:#}")
            });
            let operator = (what, at.elapsed().as_millis() as u64);
            thread::sleep(LAP.saturating_sub(begun.elapsed()));
            let (churned, stream) = (churn.stop(), stream.stop());
            let status = cluster_of(&mut cluster)?.status(&owner)?;
            let group = status.group(GROUP).context("the group is gone")?;
            let lap = Lap {
                owner: group.owner.clone().unwrap_or_default(),
                epoch: group.epoch,
                sent: stream.sent,
                lost: stream.lost(),
                gap_ms: stream.longest_gap().as_millis() as u64,
                begun: churned.begun,
                failed: churned.failed,
                operator,
                taken: taken(&mut cluster)?,
            };
            told(number + 1, &lap);
            report.laps.push(lap);
        }
        drop(hogs);
        for (mode, crowd) in &crowds {
            let roll = crowd.roll_call(ROLL_LIMIT);
            report.connections += self.connections;
            report.broken += roll.broken + roll.silent;
            if roll.broken + roll.silent > 0 {
                let (broken, silent) = (roll.broken, roll.silent);
                report.wrong.push(format!("{mode}: {broken} broken, {silent} silent: {:?}", roll.reasons));
            }
        }
        report.judge(&owner, epoch);
        Ok(report)
    }

    fn keep_busy(&self, cluster: &Komainu) -> Result<Vec<Process>> {
        let lab = cluster.lab();
        let hog = |n: usize| {
            let mut command = Command::new("sh");
            command.args(["-c", "while :; do :; done"]);
            Ok(lab.host("client").start(
                &format!("hog{n}"),
                command,
                &lab.dir().join(format!("hog{n}.log")),
            )?)
        };
        (0..self.hogs).map(hog).collect()
    }
}

impl Report {
    fn judge(&mut self, owner: &str, epoch: u64) {
        for (number, lap) in self.laps.iter().enumerate() {
            if (lap.owner.as_str(), lap.epoch) != (owner, epoch) {
                let (now, then) = (&lap.owner, lap.epoch);
                self.wrong.push(format!(
                    "lap {}: {now} owns in epoch {then}, before it was {owner} in epoch {epoch}",
                    number + 1
                ));
                break;
            }
        }
        if self.laps.iter().any(|lap| lap.failed > 0) {
            let failed: u64 = self.laps.iter().map(|lap| lap.failed).sum();
            self.wrong.push(format!("{failed} new TCP connections failed"));
        }
        let (Some(early), Some(late)) = (self.laps.get(self.laps.len() / 3), self.laps.last()) else {
            return;
        };
        for (node, before) in &early.taken {
            let Some(after) = late.taken.get(node) else { continue };
            let more = |what: &str, before: u64, after: u64, room: u64| {
                (after > before + before / 4 + room)
                    .then(|| format!("{node}: {what} grew from {before} to {after}"))
            };
            self.wrong.extend(more(
                "resident memory (KiB)",
                before.resident_kib,
                after.resident_kib,
                ROOM_KIB,
            ));
            self.wrong.extend(more(
                "open descriptors",
                before.descriptors,
                after.descriptors,
                ROOM_DESCRIPTORS,
            ));
            self.wrong.extend(more("threads", before.threads, after.threads, ROOM_DESCRIPTORS));
        }
    }
}

fn cluster_of(komainu: &mut Komainu) -> Result<&mut komainu_lab::cluster::Cluster> {
    komainu.cluster().context("it is a cluster of Komainu")
}

fn epoch_of(komainu: &mut Komainu, owner: &str) -> Result<u64> {
    let status = cluster_of(komainu)?.status(owner)?;
    Ok(status.group(GROUP).context("there is no such group")?.epoch)
}

/// What an operator does in that lap: a backend goes and comes back, a service comes and goes.
fn operate(komainu: &mut Komainu, owner: &str, number: u32) -> Result<String> {
    let port = (number % 4 == 2).then_some(EXTRA_PORT);
    let document = komainu.document(port).context("it has a document")?;
    let cluster = cluster_of(komainu)?;
    let command: &[&str] = match number % 4 {
        0 => &["backend", "drain", DRAINED],
        1 => &["backend", "enable", DRAINED],
        which => {
            cluster.apply(owner, &document)?;
            cluster.wait_all_up(SOON)?;
            return Ok(if which == 2 { "apply one service more" } else { "apply without it" }.to_owned());
        }
    };
    cluster.cli_ok(owner, command)?;
    Ok(command.join(" "))
}

/// What the nodes' processes take.
fn taken(komainu: &mut Komainu) -> Result<BTreeMap<String, Taken>> {
    let cluster = cluster_of(komainu)?;
    let mut all = BTreeMap::new();
    for name in cluster.names() {
        let pid = cluster.process(&name).pid();
        let status =
            fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("{name} is gone"))?;
        let field = |key: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
            line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok())
        };
        let (Some(resident_kib), Some(threads)) = (field("VmRSS"), field("Threads")) else {
            bail!("/proc/{pid}/status has no VmRSS or Threads");
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        all.insert(name, Taken { resident_kib, descriptors, threads });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lap(owner: &str, epoch: u64, resident_kib: u64) -> Lap {
        let taken = Taken { resident_kib, descriptors: 40, threads: 9 };
        Lap { owner: owner.to_owned(), epoch, taken: [("lb1".to_owned(), taken)].into(), ..Lap::default() }
    }

    fn judged(laps: Vec<Lap>) -> Vec<String> {
        let mut report = Report { laps, ..Report::default() };
        report.judge("lb1", 3);
        report.wrong
    }

    #[test]
    fn what_stays_as_it_is_is_well() {
        assert!(judged(vec![lap("lb1", 3, 40_000), lap("lb1", 3, 44_000)]).is_empty());
    }

    #[test]
    fn another_owner_growth_and_failures_are_told() {
        let wrong = judged(vec![lap("lb1", 3, 40_000), lap("lb2", 4, 80_000)]);
        assert!(wrong.len() == 2 && wrong[0].contains("lb2 owns in epoch 4"), "{wrong:?}");
        assert!(wrong[1].contains("lb1: resident memory (KiB) grew from 40000 to 80000"), "{wrong:?}");
        // There and back again is a change, too.
        assert_eq!(judged(vec![lap("lb1", 5, 40_000)]).len(), 1);
        let failed = Lap { failed: 2, ..lap("lb1", 3, 40_000) };
        assert_eq!(judged(vec![failed]), ["2 new TCP connections failed"]);
    }
}
