//! Distributions, as JSON for other tools and as a page for people.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::case::{Case, LEFT_OUT};
use super::round::Round;

/// The middle and the end of a distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// Half are at most this (the greater of the two in the middle of an even number).
    pub median: u64,
    /// 95 of 100 are at most this.
    pub p95: u64,
    /// All are at most this.
    pub max: u64,
}

impl Distribution {
    /// Of these values; all zero when there are none.
    pub fn of(values: impl IntoIterator<Item = u64>) -> Distribution {
        let mut all: Vec<u64> = values.into_iter().collect();
        all.sort_unstable();
        let at = |share: f64| {
            // The nearest rank: of 20 values the 19th is the p95.
            let rank = (share * all.len() as f64).ceil().max(1.0) as usize;
            all.get(rank - 1).copied().unwrap_or_default()
        };
        Distribution {
            median: all.get(all.len() / 2).copied().unwrap_or_default(),
            p95: at(0.95),
            max: all.last().copied().unwrap_or_default(),
        }
    }
}

/// Connections of one mode, over all rounds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// `nat`, `dsr`, `nat-transparent`.
    pub mode: String,
    /// Established before the faults.
    pub established: usize,
    /// Broken by them.
    pub broken: usize,
}

/// One entry of `target/chaos/results.json`: a case, done to a contender.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Name of the case.
    pub case: String,
    /// Lane; absent for the peer.
    pub lane: Option<String>,
    /// The peer; absent for Komainu.
    pub peer: Option<String>,
    /// Voters; absent for the peer.
    pub voters: Option<usize>,
    /// `release` or `debug`; absent for the peer.
    pub build: Option<String>,
    /// What was changed in the node files; empty when nothing was.
    pub node_extra: String,
    /// Number of rounds.
    pub rounds: usize,
    /// Longest gap of a client that sends a datagram every millisecond, by round.
    pub gap_ms: Distribution,
    /// Datagrams lost, all rounds together.
    pub lost: u64,
    /// The same by round.
    pub lost_per_round: Distribution,
    /// Longest time without a new TCP connection, by round.
    pub tcp_gap_ms: Distribution,
    /// New TCP connections begun, all rounds together.
    pub tcp_begun: u64,
    /// New TCP connections that failed.
    pub tcp_errors: u64,
    /// Long-lived TCP connections broken, all rounds and modes together.
    pub connections_broken: usize,
    /// Long-lived TCP connections established before the faults.
    pub connections: usize,
    /// The same by mode.
    pub by_mode: Vec<Connections>,
    /// Longest time in a round in which two hosts answered for one address.
    pub two_owners_ms: u64,
    /// What was not as it must be, in words; empty when the case has passed.
    pub wrong: Vec<String>,
}

/// Who a case was done to.
#[derive(Clone, Debug)]
pub struct Subject {
    /// A lane of Komainu, or a peer's label.
    pub name: String,
    /// Whether it is a peer.
    pub peer: bool,
    /// `release` or `debug`.
    pub build: String,
    /// Further tables of the node files.
    pub node_extra: String,
}

impl Entry {
    /// From the rounds of `case`. `timed`: whether bounds of time are judged.
    pub fn new(case: Case, subject: &Subject, rounds: &[Round], timed: bool) -> Entry {
        let ours = !subject.peer;
        let mut by_mode: Vec<Connections> = Vec::new();
        for crowd in rounds.iter().flat_map(|r| &r.crowds) {
            match by_mode.iter_mut().find(|m| m.mode == crowd.mode) {
                Some(mode) => {
                    mode.established += crowd.established;
                    mode.broken += crowd.broken;
                }
                None => by_mode.push(Connections {
                    mode: crowd.mode.clone(),
                    established: crowd.established,
                    broken: crowd.broken,
                }),
            }
        }
        let mut entry = Entry {
            case: case.name().to_owned(),
            lane: ours.then(|| subject.name.clone()),
            peer: subject.peer.then(|| subject.name.clone()),
            voters: ours.then_some(3),
            build: ours.then(|| subject.build.clone()),
            node_extra: subject.node_extra.clone(),
            rounds: rounds.len(),
            gap_ms: Distribution::of(rounds.iter().map(|r| r.gap_ms)),
            lost: rounds.iter().map(|r| r.lost).sum(),
            lost_per_round: Distribution::of(rounds.iter().map(|r| r.lost)),
            tcp_gap_ms: Distribution::of(rounds.iter().map(|r| r.tcp_gap_ms)),
            tcp_begun: rounds.iter().map(|r| r.tcp_begun).sum(),
            tcp_errors: rounds.iter().map(|r| r.tcp_failed).sum(),
            connections_broken: by_mode.iter().map(|m| m.broken).sum(),
            connections: by_mode.iter().map(|m| m.established).sum(),
            by_mode,
            two_owners_ms: rounds.iter().map(|r| r.two_owners_ms).max().unwrap_or_default(),
            wrong: Vec::new(),
        };
        for (number, round) in rounds.iter().enumerate() {
            entry.wrong.extend(round.wrong.iter().map(|w| format!("round {}: {w}", number + 1)));
        }
        if ours {
            entry.judge(case, timed);
        }
        entry
    }

    fn judge(&mut self, case: Case, timed: bool) {
        let bounds = case.bounds();
        if self.two_owners_ms > 0 {
            self.wrong.push(format!("two owners for {} ms", self.two_owners_ms));
        }
        for mode in &self.by_mode {
            // Flows of `nat` are state that the standby does not have; few of them can't be derived.
            if bounds.connections_live && mode.mode != "nat" && mode.broken > 0 {
                self.wrong.push(format!(
                    "{} of {} connections in mode {} broke",
                    mode.broken, mode.established, mode.mode
                ));
            }
        }
        let over = |value: u64, bound: Option<Duration>| {
            bound.is_some_and(|b| timed && u128::from(value) > b.as_millis())
        };
        if over(self.gap_ms.median, bounds.gap_median) {
            self.wrong.push(format!("the median gap, {} ms, is too long", self.gap_ms.median));
        }
        if over(self.gap_ms.max, bounds.gap_max) {
            self.wrong.push(format!("the longest gap, {} ms, is too long", self.gap_ms.max));
        }
        if timed && bounds.lost_median.is_some_and(|b| self.lost_per_round.median > b) {
            self.wrong.push(format!("{} datagrams were lost (median)", self.lost_per_round.median));
        }
    }

    /// Whether everything was as it must be.
    pub fn passed(&self) -> bool {
        self.wrong.is_empty()
    }

    /// Who it was done to.
    pub fn subject(&self) -> &str {
        self.lane.as_deref().or(self.peer.as_deref()).unwrap_or("?")
    }

    fn same_as(&self, other: &Entry) -> bool {
        self.case == other.case && self.subject() == other.subject() && self.node_extra == other.node_extra
    }

    /// One line for whoever watches.
    pub fn line(&self) -> String {
        format!(
            "{:<20} {:<17} {:>3} rounds | gap {}/{}/{} ms | lost {} | tcp gap {}/{}/{} ms, {} errors | {} of {} connections broke | two owners {} ms",
            self.case,
            self.subject(),
            self.rounds,
            self.gap_ms.median,
            self.gap_ms.p95,
            self.gap_ms.max,
            self.lost,
            self.tcp_gap_ms.median,
            self.tcp_gap_ms.p95,
            self.tcp_gap_ms.max,
            self.tcp_errors,
            self.connections_broken,
            self.connections,
            self.two_owners_ms
        )
    }
}

/// Reads results, none when there is no file.
///
/// # Errors
/// The file is there and is something else.
pub fn read_json(from: &Path) -> Result<Vec<Entry>> {
    match fs::read_to_string(from) {
        Ok(text) => serde_json::from_str(&text).with_context(|| format!("read {}", from.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("read {}", from.display())),
    }
}

/// Puts `entry` in the place of an older one for the same case and subject.
pub fn merge(entries: &mut Vec<Entry>, entry: Entry) {
    entries.retain(|e| !e.same_as(&entry));
    entries.push(entry);
    let place = |e: &Entry| {
        let case = Case::named(&e.case).and_then(|c| Case::ALL.iter().position(|x| *x == c));
        (case, e.peer.is_some(), e.subject().to_owned(), e.node_extra.clone())
    };
    entries.sort_by_key(place);
}

/// Writes the JSON file.
///
/// # Errors
/// It can't be written.
pub fn write_json(entries: &[Entry], to: &Path) -> Result<()> {
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory)?;
    }
    // Never half a file, also when the run is interrupted.
    let beside = to.with_extension("json.new");
    fs::write(&beside, serde_json::to_string_pretty(entries)? + "\n")?;
    fs::rename(&beside, to).with_context(|| format!("write {}", to.display()))
}

/// The page `docs/failover.md`.
pub fn page(entries: &[Entry], machine: &str) -> String {
    let mut t = format!(
        "# Failover\n\n\
         Written by `make chaos ARGS=--docs`. {machine}\n\n\
         Three voters of the real binary (two balancers and a witness), and beside them keepalived (VRRPv3, real-time priority, no \
         preemption) with nftables DNAT and conntrackd (FTFW, straight into the standby's kernel), each in network namespaces of its \
         own ([the lab](lab.md)), with the same clients and servers. In every round:\n\n\
         - *gap*: the longest time without an answer that a client saw that sends a datagram every millisecond, from the fault until \
         everything is as before (a dead node has come back, a cut is healed). *lost*: its datagrams lost, median and greatest of a \
         round.\n\
         - *TCP gap*: the longest time without a new connection coming about, of a client that begins one every 10 ms. *errors*: \
         connections refused, reset, or not greeted within 4 s, of all rounds.\n\
         - *broken*: of the TCP connections that stood before the fault in each mode and exchange a byte every two seconds, those \
         that ended or gave no answer afterwards, of all rounds. The client's and servers' TCP tries again at least once a second.\n\
         - *two owners*: the longest time in a round in which two hosts answered ARP or neighbour discovery for one address on the \
         wire, asked every 4 ms. Where the old owner's silence is not made sure of, that is how long traffic goes two ways.\n\n\
         Every figure is median / p95 / greatest of the rounds unless said otherwise, in ms. Clients, balancers and servers share the \
         machine's processors. A dead `keepalived` is left dead for longer than a second where it takes its backup longer to \
         notice.\n"
    );
    for case in Case::ALL {
        let of_case: Vec<&Entry> = entries.iter().filter(|e| e.case == case.name()).collect();
        if of_case.is_empty() {
            continue;
        }
        let _ = write!(t, "\n## {}\n\n{}.\n", case.name(), upper_first(case.what()));
        let bounds = case.bounds();
        if let (Some(median), Some(max)) = (bounds.gap_median, bounds.gap_max) {
            let _ = write!(
                t,
                "Bound for the gap: median {} ms, greatest {} ms.",
                median.as_millis(),
                max.as_millis()
            );
            if let (Some((lane, max)), Some((kernel, _))) = (case.goal("af_packet"), case.goal("xdp")) {
                let _ = write!(
                    t,
                    " Goal: median {} ms on `af_packet`, {} ms on kernel lanes, greatest {} ms.",
                    lane.as_millis(),
                    kernel.as_millis(),
                    max.as_millis()
                );
            }
            t.push('\n');
        }
        t.push_str(
            "\n| who | rounds | gap | lost | TCP gap | errors | broken | two owners |\n|---|---:|---:|---:|---:|---:|---:|---:|\n",
        );
        for e in of_case {
            let _ = writeln!(t, "{}", row(e));
        }
        for e in entries.iter().filter(|e| e.case == case.name() && !e.passed()) {
            let _ = writeln!(t, "\n**Failed on {}:** {}.", e.subject(), e.wrong.join("; "));
        }
    }
    t.push_str("\n## Not among the cases\n\n");
    for (what, why) in LEFT_OUT {
        let _ = writeln!(t, "- {what}: {}.", why.trim_end_matches('.'));
    }
    t
}

fn row(e: &Entry) -> String {
    let d = |d: Distribution| format!("{} / {} / {}", d.median, d.p95, d.max);
    let mut who = match &e.lane {
        Some(lane) => format!("Komainu, `{lane}`"),
        None => e.subject().replace('-', ", adverts every "),
    };
    if e.build.as_deref() == Some("debug") {
        who.push_str(" (debug build)");
    }
    if !e.node_extra.is_empty() {
        let _ = write!(who, " (`{}`)", e.node_extra.trim().replace('\n', " "));
    }
    let broken: Vec<String> =
        e.by_mode.iter().map(|m| format!("{} of {} `{}`", m.broken, m.established, m.mode)).collect();
    format!(
        "| {who} | {} | {} | {}, {} | {} | {} of {} | {} | {} |",
        e.rounds,
        d(e.gap_ms),
        e.lost_per_round.median,
        e.lost_per_round.max,
        d(e.tcp_gap_ms),
        e.tcp_errors,
        e.tcp_begun,
        broken.join("<br>"),
        e.two_owners_ms
    )
}

fn upper_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::round::CrowdResult;

    fn subject(peer: bool) -> Subject {
        let name = if peer { "keepalived-100ms" } else { "af_packet" }.to_owned();
        Subject { name, peer, build: "release".to_owned(), node_extra: String::new() }
    }

    fn round(gap_ms: u64, two_owners_ms: u64, broken: usize) -> Round {
        let crowd = CrowdResult { mode: "dsr".into(), established: 10, broken, reasons: Vec::new() };
        Round { gap_ms, two_owners_ms, crowds: vec![crowd], ..Round::default() }
    }

    #[test]
    fn a_distribution_of_twenty() {
        let d = Distribution::of(1..=20);
        assert_eq!(d, Distribution { median: 11, p95: 19, max: 20 });
        assert_eq!(Distribution::of([]), Distribution::default());
        assert_eq!(Distribution::of([7]), Distribution { median: 7, p95: 7, max: 7 });
    }

    #[test]
    fn two_owners_broken_connections_and_long_gaps_fail_a_case() {
        let case = Case::PowerOff;
        assert!(Entry::new(case, &subject(false), &[round(190, 0, 0)], true).passed());
        assert!(!Entry::new(case, &subject(false), &[round(190, 1, 0)], true).passed());
        assert!(!Entry::new(case, &subject(false), &[round(190, 0, 1)], true).passed());
        assert!(!Entry::new(case, &subject(false), &[round(201, 0, 0)], true).passed());
        assert!(
            !Entry::new(case, &subject(false), &[round(9, 0, 0), round(8, 0, 0), round(351, 0, 0)], true)
                .passed()
        );
        assert!(Entry::new(case, &subject(false), &[round(900, 0, 0)], false).passed());
        // What a peer does is told, not judged.
        assert!(Entry::new(case, &subject(true), &[round(5000, 9, 3)], true).passed());
    }

    #[test]
    fn a_newer_entry_takes_the_place_of_an_older_one() {
        let mut all = Vec::new();
        for (case, gap) in [(Case::PowerOff, 1), (Case::KillOwner, 2), (Case::PowerOff, 3)] {
            merge(&mut all, Entry::new(case, &subject(false), &[round(gap, 0, 0)], true));
        }
        let seen: Vec<_> = all.iter().map(|e| (e.case.as_str(), e.gap_ms.max)).collect();
        assert_eq!(seen, [("kill-owner", 2), ("power-off", 3)]);
    }
}
