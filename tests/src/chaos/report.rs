//! Distributions, and the file in which they stand.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::case::Case;
use super::round::Round;
use super::shape::Shape;

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

/// The middle and the far end of a distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ends {
    /// As in [`Distribution`].
    pub median: u64,
    /// As there.
    pub max: u64,
}

impl From<Distribution> for Ends {
    fn from(d: Distribution) -> Ends {
        Ends { median: d.median, max: d.max }
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
    /// Lane, as asked for; absent for the peer.
    pub lane: Option<String>,
    /// What `auto` chose, else the same.
    pub lane_in_force: Option<String>,
    /// The peer; absent for Komainu.
    pub peer: Option<String>,
    /// Kind of cluster ([`Shape::name`]); absent for the peer.
    pub cluster: Option<String>,
    /// Voters; absent for the peer.
    pub voters: Option<usize>,
    /// Durations in force, `default` or `fast`; absent for the peer.
    pub profile: Option<String>,
    /// `release` or `debug`; absent for the peer.
    pub build: Option<String>,
    /// The commit that was measured, with `+changes` where something was not committed.
    pub commit: String,
    /// What was changed in the node files; empty when nothing was.
    pub node_extra: String,
    /// Number of rounds.
    pub rounds: usize,
    /// Longest gap of a client that sends a datagram every millisecond, by round.
    pub gap_ms: Distribution,
    /// First gap after the fault, by round.
    pub first_gap_ms: Option<Distribution>,
    /// Datagrams lost, by round.
    pub lost_per_round: Ends,
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
    /// Longest time after a cut began to be healed in which two hosts still did.
    pub two_owners_after_ms: u64,
    /// What a round took, on average; the building of the lab not counted. Absent in old entries.
    pub seconds_per_round: Option<f64>,
    /// What was not as it must be, in words; empty when the case has passed.
    pub wrong: Vec<String>,
}

/// Who a case was done to.
#[derive(Clone, Debug)]
pub struct Subject {
    /// A lane of Komainu, or a peer's label.
    pub name: String,
    /// What kind of cluster; absent for a peer.
    pub shape: Option<Shape>,
    /// Durations, `default` or `fast`.
    pub profile: String,
    /// The commit that is measured.
    pub commit: String,
    /// `release` or `debug`.
    pub build: String,
    /// Further tables of the node files.
    pub node_extra: String,
}

impl Entry {
    /// From the rounds of `case`, on what forwards there (`lane`). `timed`: whether bounds of time are judged.
    pub fn new(case: Case, subject: &Subject, lane: Option<String>, rounds: &[Round], timed: bool) -> Entry {
        let ours = subject.shape.is_some();
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
            lane_in_force: lane,
            peer: (!ours).then(|| subject.name.clone()),
            cluster: subject.shape.map(|s| s.name().to_owned()),
            voters: subject.shape.map(Shape::voters),
            profile: ours.then(|| subject.profile.clone()),
            build: ours.then(|| subject.build.clone()),
            commit: subject.commit.clone(),
            node_extra: subject.node_extra.clone(),
            rounds: rounds.len(),
            gap_ms: Distribution::of(rounds.iter().map(|r| r.gap_ms)),
            first_gap_ms: Some(Distribution::of(rounds.iter().map(|r| r.first_gap_ms))),
            lost_per_round: Distribution::of(rounds.iter().map(|r| r.lost)).into(),
            tcp_gap_ms: Distribution::of(rounds.iter().map(|r| r.tcp_gap_ms)),
            tcp_begun: rounds.iter().map(|r| r.tcp_begun).sum(),
            tcp_errors: rounds.iter().map(|r| r.tcp_failed).sum(),
            connections_broken: by_mode.iter().map(|m| m.broken).sum(),
            connections: by_mode.iter().map(|m| m.established).sum(),
            by_mode,
            two_owners_ms: rounds.iter().map(|r| r.two_owners_ms).max().unwrap_or_default(),
            two_owners_after_ms: rounds.iter().map(|r| r.two_owners_after_ms).max().unwrap_or_default(),
            seconds_per_round: Some(
                rounds.iter().map(|r| r.took.total().as_secs_f64()).sum::<f64>() / rounds.len().max(1) as f64,
            ),
            wrong: Vec::new(),
        };
        for (number, round) in rounds.iter().enumerate() {
            entry.wrong.extend(round.wrong.iter().map(|w| format!("round {}: {w}", number + 1)));
        }
        if let Some(shape) = subject.shape {
            entry.judge(case, shape, timed);
        }
        entry
    }

    fn judge(&mut self, case: Case, shape: Shape, timed: bool) {
        let bounds = case.bounds(shape);
        match bounds.two_owners_end {
            None if self.two_owners_ms > 0 => {
                self.wrong.push(format!("two owners for {} ms", self.two_owners_ms));
            }
            Some(end) if u128::from(self.two_owners_after_ms) > end.as_millis() => {
                let after = self.two_owners_after_ms;
                self.wrong.push(format!("two owners until {after} ms after the two could hear each other"));
            }
            _ => {}
        }
        for mode in &self.by_mode {
            if bounds.connections_live && mode.broken > 0 {
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

    /// The kind of cluster that it was done to; absent for a peer.
    pub fn shape(&self) -> Option<Shape> {
        self.cluster.as_deref().and_then(Shape::named)
    }

    /// Whether it is about this case and this subject.
    pub fn is_of(&self, case: Case, subject: &Subject) -> bool {
        // `auto` is measured where the lane that it chooses is.
        let names = [self.lane_in_force.as_deref().filter(|_| self.peer.is_none()), Some(self.subject())];
        self.case == case.name()
            && names.contains(&Some(&subject.name))
            && self.shape() == subject.shape
            && self.profile.as_ref().is_none_or(|p| *p == subject.profile)
            && self.node_extra == subject.node_extra
    }

    fn key(&self) -> impl Ord + use<> {
        let case = Case::named(&self.case).and_then(|c| Case::ALL.iter().position(|x| *x == c));
        let who = (self.peer.is_some(), self.shape(), self.profile.clone(), self.subject().to_owned());
        (case, who, self.node_extra.clone())
    }

    /// One line for whoever watches.
    pub fn line(&self) -> String {
        format!(
            "{:<20} {:<17} {:<11} {:<7} {:>3} rounds of {:.1} s | gap {}/{}/{} ms, the first {:?} | lost {}/{} | tcp gap {}/{}/{} ms, {} errors | {} of {} connections broke | two owners {} ms, {} ms after",
            self.case,
            self.subject(),
            self.cluster.as_deref().unwrap_or_default(),
            self.profile.as_deref().unwrap_or_default(),
            self.rounds,
            self.seconds_per_round.unwrap_or_default(),
            self.gap_ms.median,
            self.gap_ms.p95,
            self.gap_ms.max,
            self.first_gap_ms.map(|d| (d.median, d.p95, d.max)).unwrap_or_default(),
            self.lost_per_round.median,
            self.lost_per_round.max,
            self.tcp_gap_ms.median,
            self.tcp_gap_ms.p95,
            self.tcp_gap_ms.max,
            self.tcp_errors,
            self.connections_broken,
            self.connections,
            self.two_owners_ms,
            self.two_owners_after_ms
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
    entries.retain(|e| e.key() != entry.key());
    entries.push(entry);
    entries.sort_by_key(Entry::key);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::round::CrowdResult;

    fn subject(shape: Option<Shape>) -> Subject {
        Subject {
            name: if shape.is_some() { "af_packet" } else { "keepalived-100ms" }.to_owned(),
            shape,
            profile: "default".to_owned(),
            commit: "0123abc".to_owned(),
            build: "release".to_owned(),
            node_extra: String::new(),
        }
    }

    fn judged(case: Case, shape: Option<Shape>, rounds: &[Round], timed: bool) -> Entry {
        Entry::new(case, &subject(shape), None, rounds, timed)
    }

    const THREE: Option<Shape> = Some(Shape::Three);

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
        let passed = |rounds: &[Round]| judged(Case::PowerOff, THREE, rounds, true).passed();
        assert!(passed(&[round(190, 0, 0)]));
        assert!(!passed(&[round(190, 1, 0)]));
        assert!(!passed(&[round(190, 0, 1)]));
        assert!(!passed(&[round(201, 0, 0)]));
        assert!(!passed(&[round(9, 0, 0), round(8, 0, 0), round(351, 0, 0)]));
        assert!(judged(Case::PowerOff, THREE, &[round(900, 0, 0)], false).passed());
        assert!(judged(Case::PowerOff, Some(Shape::PairSafety), &[round(900, 0, 0)], true).passed());
        // What a peer does is told, not judged.
        assert!(judged(Case::PowerOff, None, &[round(5000, 9, 3)], true).passed());
    }

    #[test]
    fn only_a_pair_that_was_split_may_have_two_owners_and_not_for_long() {
        let split = |after: u64| Round { two_owners_after_ms: after, ..round(0, 1500, 0) };
        for (case, shape, after, passes) in [
            (Case::FullSplit, Shape::Pair, 1000, true),
            (Case::FullSplit, Shape::Pair, 1001, false),
            (Case::FullSplit, Shape::PairSafety, 0, false),
            (Case::FullSplit, Shape::Three, 0, false),
            (Case::OwnerMute, Shape::Pair, 0, false),
        ] {
            let entry = judged(case, Some(shape), &[split(after)], true);
            assert_eq!(entry.passed(), passes, "{case:?} {shape:?} {:?}", entry.wrong);
        }
    }

    #[test]
    fn a_newer_entry_takes_the_place_of_an_older_one() {
        let mut all = Vec::new();
        for (case, gap) in [(Case::PowerOff, 1), (Case::KillOwner, 2), (Case::PowerOff, 3)] {
            merge(&mut all, judged(case, THREE, &[round(gap, 0, 0)], true));
        }
        let seen: Vec<_> = all.iter().map(|e| (e.case.as_str(), e.gap_ms.max)).collect();
        assert_eq!(seen, [("kill-owner", 2), ("power-off", 3)]);
        // Another kind of cluster, other durations: another entry.
        merge(&mut all, judged(Case::PowerOff, Some(Shape::Pair), &[round(4, 0, 0)], true));
        let fast = Subject { profile: "fast".to_owned(), ..subject(THREE) };
        merge(&mut all, Entry::new(Case::PowerOff, &fast, None, &[round(5, 0, 0)], true));
        let seen: Vec<_> = all.iter().map(|e| e.gap_ms.max).collect();
        assert_eq!(seen, [2, 3, 5, 4]);
        assert!(all[2].is_of(Case::PowerOff, &fast) && !all[2].is_of(Case::PowerOff, &subject(THREE)));
        let json = serde_json::to_string(&all).unwrap();
        let back: Vec<Entry> = serde_json::from_str(&json).unwrap();
        assert_eq!(back.len(), 4);
    }
}
