//! The page `docs/failover.md`, from whatever results stand.

use std::fmt::Write as _;

use super::case::Case;
use super::keepalived::Advert;
use super::report::{Distribution, Entry};
use super::shape::Shape;

/// Lanes that three voters are measured on.
const LANES: [&str; 3] = ["af_packet", "tc", "xdp"];

/// What the figures are, and how to have them again.
const ABOUT: &str = "\
A cluster of the real binary (two balancers and a witness; or two balancers alone, a *pair*), and beside it keepalived (VRRPv3,
real-time priority, no preemption) with nftables DNAT and conntrackd (FTFW, straight into the standby's kernel), each in network
namespaces of its own ([the lab](lab.md)), with the same clients and servers. In every round:

- *first gap*: the first time without an answer, from the fault on, that a client saw that sends a datagram every millisecond.
  *gap*: the longest until everything is as before (a dead node has come back, a cut is healed). *lost*: its datagrams lost, median
  and greatest of a round. A node that starts shares the processors with all others here, and what it takes of them can cost an
  owner its lease, with `profile = \"fast\"` more than the fault did.
- *TCP gap*: the longest time without a new connection coming about, of a client that begins one every 10 ms. *errors*:
  connections refused, reset, or not greeted within 4 s, of all rounds.
- *broken*: of the TCP connections that stood before the fault in each mode and exchange a byte every two seconds, those that
  ended or gave no answer afterwards, of all rounds. The client's and servers' TCP tries again at least once a second.
- *two owners*: the longest time in a round in which two hosts answered ARP or neighbour discovery for one address on the wire,
  asked every 4 ms; in brackets, how much of it after a cut began to be healed. Where the old owner's silence is not made sure
  of, that is how long traffic goes two ways.

Every figure is median / p95 / greatest of the rounds unless said otherwise, in ms. Clients, balancers and servers share the
machine's processors. A dead `keepalived` is left dead, and a cut lasts, for longer where it takes its backup longer to notice.

The last column is the commit that a row was measured at. To measure a row again:
`make chaos CASES=<case> LANES=<lane> CLUSTERS=three|pair|pair-safety PROFILE=default|fast PEERS=none ROUNDS=20`, or with
`LANES=none PEERS=keepalived-100ms`. Each run puts its rows in the place of older ones; `ARGS=--missing` plays only what has none.
";

/// The page.
pub fn page(entries: &[Entry], machine: &str) -> String {
    let mut t = format!("# Failover\n\nWritten by `make chaos ARGS=--docs`. {machine}\n\n{ABOUT}");
    let (measured, not): (Vec<Case>, Vec<Case>) =
        Case::ALL.into_iter().partition(|c| entries.iter().any(|e| e.case == c.name()));
    for case in measured {
        section(&mut t, case, entries);
    }
    if !not.is_empty() {
        t.push_str("\n## Not measured\n\n");
        for case in not {
            let _ = writeln!(t, "- `{}`: {}.", case.name(), case.what());
        }
    }
    t
}

fn section(t: &mut String, case: Case, entries: &[Entry]) {
    let of_case: Vec<&Entry> = entries.iter().filter(|e| e.case == case.name()).collect();
    let _ = write!(t, "\n## {}\n\n{}.\n", case.name(), upper_first(case.what()));
    let bounds = case.bounds(Shape::Three);
    if let (Some(median), Some(max)) = (bounds.gap_median, bounds.gap_max) {
        let _ = write!(
            t,
            "Bound for the gap: median {} ms, greatest {} ms.",
            median.as_millis(),
            max.as_millis()
        );
        let goal = |lane, fast| {
            let (median, max) = case.goal(lane, fast)?;
            let max = max.map_or_else(String::new, |m| format!(", greatest {} ms", m.as_millis()));
            Some(format!("median {} ms{max}", median.as_millis()))
        };
        if let (Some(user), Some(kernel)) = (goal("af_packet", false), goal("xdp", false)) {
            let _ = write!(t, " Goal for three voters: on `af_packet` {user}; on kernel lanes {kernel}.");
        } else if let Some(fast) = goal("xdp", true) {
            let _ = write!(t, " Goal of `profile = \"fast\"`, for the first gap: {fast}.");
        }
        t.push('\n');
    }
    if let Some(end) = case.bounds(Shape::Pair).two_owners_end {
        let _ = writeln!(
            t,
            "In a pair that is to be available (`pair = \"availability\"`) two owners are what was chosen for this case; they must end \
             within {} ms of the heal.",
            end.as_millis()
        );
    }
    t.push_str(
        "\n| who | rounds | first gap | gap | lost | TCP gap | errors | broken | two owners | commit |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---|\n",
    );
    for e in &of_case {
        let _ = writeln!(t, "{}", row(e));
    }
    for e in of_case.iter().filter(|e| !e.passed()) {
        let _ = writeln!(t, "\n**Failed, {}:** {}.", who(e), e.wrong.join("; "));
    }
    let missing = missing(case, &of_case);
    if !missing.is_empty() {
        let _ = writeln!(t, "\nNot measured: {}.", missing.join(", "));
    }
}

/// Whom this case has not been done to, of those it should be.
fn missing(case: Case, of_case: &[&Entry]) -> Vec<String> {
    let plain = |e: &&&Entry| e.profile.as_deref().is_none_or(|p| p == "default") && e.node_extra.is_empty();
    let of_shape = |shape| of_case.iter().filter(plain).filter(move |e| e.shape() == Some(shape));
    let mut missing = Vec::new();
    for lane in LANES.into_iter().filter(|_| case.suits(Shape::Three)) {
        let on = |e: &&Entry| [&e.lane, &e.lane_in_force].into_iter().any(|l| l.as_deref() == Some(lane));
        if !of_shape(Shape::Three).any(on) {
            missing.push(format!("three voters on `{lane}`"));
        }
    }
    for shape in [Shape::Pair, Shape::PairSafety] {
        let wanted = case.suits(shape) && (shape == Shape::Pair || case.tells_policies_apart());
        if wanted && of_shape(shape).next().is_none() {
            missing.push(kind(shape).to_owned());
        }
    }
    for advert in Advert::ALL.into_iter().filter(|_| case.suits_keepalived()) {
        if !of_case.iter().any(|e| e.peer == Some(advert.label())) {
            missing.push(peer(&advert.label()));
        }
    }
    missing
}

fn row(e: &Entry) -> String {
    let d = |d: Distribution| format!("{} / {} / {}", d.median, d.p95, d.max);
    let broken: Vec<String> =
        e.by_mode.iter().map(|m| format!("{} of {} `{}`", m.broken, m.established, m.mode)).collect();
    let after = match e.two_owners_after_ms {
        0 => String::new(),
        ms => format!(" ({ms})"),
    };
    format!(
        "| {} | {} | {} | {} | {}, {} | {} | {} of {} | {} | {}{after} | {} |",
        who(e),
        e.rounds,
        e.first_gap_ms.map_or_else(|| "not known".to_owned(), d),
        d(e.gap_ms),
        e.lost_per_round.median,
        e.lost_per_round.max,
        d(e.tcp_gap_ms),
        e.tcp_errors,
        e.tcp_begun,
        broken.join("<br>"),
        e.two_owners_ms,
        e.commit
    )
}

fn who(e: &Entry) -> String {
    let (Some(lane), Some(shape)) = (&e.lane, e.shape()) else { return peer(e.subject()) };
    let mut who = format!("Komainu, {}, `{lane}`", kind(shape));
    if let Some(chosen) = e.lane_in_force.as_ref().filter(|l| *l != lane) {
        let _ = write!(who, " (here `{chosen}`)");
    }
    if let Some(profile) = e.profile.as_ref().filter(|p| *p != "default") {
        let _ = write!(who, ", `{profile}`");
    }
    if e.build.as_deref() == Some("debug") {
        who.push_str(" (debug build)");
    }
    if !e.node_extra.is_empty() {
        let _ = write!(who, " (`{}`)", e.node_extra.trim().replace('\n', " "));
    }
    who
}

fn kind(shape: Shape) -> &'static str {
    match shape {
        Shape::Three => "three voters",
        Shape::Pair => "a pair",
        Shape::PairSafety => "a pair under `safety`",
    }
}

fn peer(label: &str) -> String {
    label.replace('-', ", adverts every ")
}

fn upper_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::super::report::{Subject, merge};
    use super::super::round::Round;
    use super::*;

    #[test]
    fn what_was_not_measured_is_named() {
        let subject = Subject {
            name: "auto".to_owned(),
            shape: Some(Shape::Three),
            profile: "default".to_owned(),
            commit: "0123abc".to_owned(),
            build: "release".to_owned(),
            node_extra: String::new(),
        };
        let mut all = Vec::new();
        let round = Round { gap_ms: 150, first_gap_ms: 140, ..Round::default() };
        merge(&mut all, Entry::new(Case::PowerOff, &subject, Some("tc".to_owned()), &[round], true));
        let text = page(&all, "A machine.");
        assert!(
            text.contains(
                "| Komainu, three voters, `auto` (here `tc`) | 1 | 140 / 140 / 140 | 150 / 150 / 150 |"
            ),
            "{text}"
        );
        let missing = text.lines().find(|l| l.starts_with("Not measured: ")).unwrap();
        assert!(missing.contains("`xdp`") && missing.contains("a pair,"), "{missing}");
        assert!(missing.contains("adverts every 20ms") && !missing.contains("`tc`"), "{missing}");
        let rest = text.split_once("## Not measured").unwrap().1;
        assert!(rest.contains("- `kill-owner`: ") && !rest.contains("- `power-off`"), "{rest}");
    }
}
