//! A run: the faults of a plan, then healing.

use std::collections::BTreeSet;
use std::fmt;

use komainu_proto::domain::{GroupId, Role};

use super::machine::{Machine, Time};
use super::plan::{Action, Plan};
use super::world::{MS, Weather, World};
use crate::core::Request;
use crate::pair::Policy;
use crate::timing::Timing;

/// How long the cluster may take to be whole again after the last fault.
const HEALS_WITHIN: Time = 6_000 * MS;
/// The same in a pair: one that has lost its store, or gives way, joins anew, and whoever is switched on waits for the other.
const PAIR_HEALS_WITHIN: Time = 12_000 * MS;
/// How long the standbys may then lack flows: a peer is asked again each second, and its silence noticed after 3.5 s.
const FLOWS_AGREE_WITHIN: Time = 6_000 * MS;
/// One run of so many sends its beats as bytes; in the others it makes no difference (there is a test of that).
const BYTES_IN: u64 = 8;
/// Machines of one run, those that join included.
const MAX_MACHINES: u64 = 7;

/// What a run can show, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Two owners, or something else that must never be.
    Safety,
    /// A node panicked.
    Crash,
    /// The cluster was not whole again in time.
    Liveness,
}

/// What went wrong in a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which kind.
    pub kind: Kind,
    /// What.
    pub text: String,
}

impl From<String> for Violation {
    /// Invariants are checked at every step and told as text.
    fn from(text: String) -> Violation {
        Violation { kind: Kind::Safety, text }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Safety => "safety",
            Kind::Crash => "crash",
            Kind::Liveness => "liveness",
        };
        write!(f, "{kind}: {}", self.text)
    }
}

fn liveness(text: impl Into<String>) -> Violation {
    Violation { kind: Kind::Liveness, text: text.into() }
}

/// Plays a plan. The transcript of a `verbose` world tells how it came to what it came to.
///
/// # Panics
/// A node does.
pub fn play(plan: &Plan, verbose: bool) -> (World, Result<(), Violation>) {
    let mut w = world(plan, verbose);
    let result = play_in(&mut w, plan);
    (w, result)
}

/// The world of a plan, before anything has happened.
pub(super) fn world(plan: &Plan, verbose: bool) -> World {
    let mut w = World::new(plan.world, &plan.roles, plan.profile.timing());
    w.verbose = verbose;
    w.beats_as_bytes = verbose || plan.seed.is_multiple_of(BYTES_IN);
    if let Some(policy) = plan.pair {
        w.make_pair(policy);
    }
    if plan.flows {
        w.begin_flows(plan.seed);
    }
    w
}

/// Runs one seed.
///
/// # Errors
/// What went wrong. The transcript of a `verbose` world tells how it came to that.
pub fn run(seed: u64, verbose: bool) -> (World, Result<(), Violation>) {
    play(&Plan::draw(seed), verbose)
}

/// See [`play`].
pub(super) fn play_in(w: &mut World, plan: &Plan) -> Result<(), Violation> {
    let ids: Vec<u64> = w.machines.keys().copied().collect();
    for (&id, &ppm) in ids.iter().zip(&plan.drift_ppm) {
        w.machine(id).drift_ppm = ppm;
    }
    // All nodes are started within a second and find each other in good weather: forming is tested elsewhere.
    for &id in &ids {
        w.start(id)?;
        let lasts = w.random.below(300 * MS);
        w.run_for(lasts)?;
    }
    let formed = w.run_until(w.t + HEALS_WITHIN, |w| {
        w.leader().and_then(|l| w.process(l)).is_some_and(|p| p.core.voters().count() == w.machines.len())
    })?;
    if !formed {
        return Err(liveness("the cluster did not form"));
    }
    let leader = w.leader().unwrap_or(1);
    w.change(leader, plan.groups)?;
    if !w.run_until(w.t + HEALS_WITHIN, |w| w.checker.acknowledged() > 0)? {
        return Err(liveness("the first change was not acknowledged"));
    }
    w.weather = plan.weather;
    for step in &plan.steps {
        w.run_for(step.after)?;
        act(w, plan, &step.action)?;
    }
    heal(w)?;
    whole_again(w, plan)
}

/// A cluster that has formed in fair weather and owns some groups.
///
/// # Errors
/// It did not form.
pub fn formed(seed: u64, roles: &[Role], groups: u32) -> Result<World, String> {
    let mut w = World::new(seed, roles, Timing::default());
    w.verbose = true;
    (1..=roles.len() as u64).try_for_each(|id| w.start(id))?;
    let whole = |w: &World| {
        w.leader().and_then(|l| w.process(l)).is_some_and(|p| p.core.voters().count() == w.machines.len())
    };
    if !w.run_until(HEALS_WITHIN, whole)? {
        return Err(format!("it does not form:\n{}", w.transcript.join("\n")));
    }
    let leader = w.leader().unwrap_or(1);
    w.change(leader, groups)?;
    w.run_for(500 * MS)?;
    if (1..=groups).any(|g| w.owner(GroupId(g)).is_none()) {
        return Err(format!("groups without an owner:\n{}", w.transcript.join("\n")));
    }
    Ok(w)
}

fn act(w: &mut World, plan: &Plan, action: &Action) -> Result<(), String> {
    let ids: Vec<u64> = w.machines.keys().copied().collect();
    match action {
        Action::Kill { node, again, .. } | Action::PowerOff { node, again } if w.process(*node).is_some() => {
            match action {
                Action::Kill { told: Some(after), .. } => w.kill_and_tell(*node, *after),
                Action::Kill { .. } => w.kill(*node),
                _ => {
                    w.say(*node, || "loses power".to_owned());
                    w.power_off(*node);
                }
            }
            if let Some(after) = again {
                // A supervisor starts it again at once: it must remember, or wait out, what it promised.
                w.run_for(*after)?;
                w.start(*node)?;
            }
        }
        Action::KillLeader { told, again } => {
            let Some(leader) = w.leader() else { return Ok(()) };
            w.kill_and_tell(leader, *told);
            if let Some(after) = again {
                w.run_for(*after)?;
                w.start(leader)?;
            }
        }
        Action::Kill { node, .. } | Action::PowerOff { node, .. } => w.start(*node)?,
        Action::Freeze { node, lasts } if w.process(*node).is_some() => w.pause(*node, *lasts),
        Action::Suspend { node, lasts } if w.process(*node).is_some() => w.suspend(*node, *lasts),
        Action::Cut { .. } | Action::Split { .. } if !w.cut.is_empty() && w.random.below(2) == 0 => {
            w.say(0, || "all cuts are mended".to_owned());
            w.cut.clear();
        }
        Action::Cut { from, to, one_way } => {
            let how = if *one_way { "does not reach" } else { "is cut from" };
            w.say(*from, || format!("{how} n{to}"));
            w.cut.insert((*from, *to));
            if !one_way {
                w.cut.insert((*to, *from));
            }
        }
        Action::Deafen { node } => {
            w.say(*node, || "hears nobody".to_owned());
            w.cut.extend(ids.iter().filter(|id| *id != node).map(|id| (*id, *node)));
        }
        Action::Split { half } => {
            w.say(0, || format!("{half:?} are cut from the rest"));
            for (&a, &b) in half.iter().flat_map(|a| ids.iter().map(move |b| (a, b))) {
                if !half.contains(&b) {
                    w.cut.extend([(a, b), (b, a)]);
                }
            }
        }
        Action::Unfit { node } => {
            let fit = w.machine(*node).fit;
            w.set_fit(*node, !fit)?;
        }
        Action::Switchover { to } => {
            if let Some(leader) = w.leader() {
                w.say(leader, || format!("is asked to move g0 to {to:?}"));
                w.switchover(leader, "g0", *to)?;
            }
        }
        Action::Resign { node, within } if w.process(*node).is_some() => {
            w.say(*node, || "is stopped".to_owned());
            if let Some(p) = w.process(*node) {
                p.pulse.lock().expect("no panic").set_resigning(true);
            }
            let until = w.t + within;
            w.run_until(until, |w| w.process(*node).is_none_or(|p| p.core.has_resigned()))?;
            w.kill(*node);
            w.start(*node)?;
        }
        // One disk at a time, and only while every other node is there: two lost disks of three are a lost cluster.
        Action::LoseDisk { node } if replaceable(w) => {
            w.say(*node, || "loses its disk".to_owned());
            w.power_off(*node);
            w.machine(*node).disk.lose_everything();
            w.start(*node)?;
        }
        Action::CorruptStore { node } if replaceable(w) => {
            w.say(*node, || "finds its store damaged and sets it aside".to_owned());
            w.kill(*node);
            w.machine(*node).disk.lose_everything();
            w.start(*node)?;
        }
        Action::SlowDisk { node, fsync, lasts } => {
            w.say(*node, || format!("writes in {} ms for {} ms", fsync / MS, lasts / MS));
            w.slow_disk(*node, *fsync, *lasts);
        }
        Action::Drift { node, ppm } => {
            w.say(*node, || format!("has a clock that is off by {ppm} ppm from now on"));
            let t = w.t;
            w.machine(*node).set_drift(t, *ppm);
            w.poke(*node);
        }
        Action::WallClock { node, ms } => {
            w.say(*node, || format!("has its wall clock set by {ms} ms"));
            w.machine(*node).wall_offset_ms += ms;
        }
        Action::Join => {
            let id = ids.len() as u64 + 1;
            let Some(leader) = w.leader().filter(|_| id <= MAX_MACHINES) else { return Ok(()) };
            let all: Vec<u64> = (1..=id).collect();
            let machine = Machine::new(id, Role::Balancer, &all, plan.profile.timing());
            let node = machine.identity.clone();
            w.machines.insert(id, machine);
            w.say(leader, || format!("is asked to admit n{id}"));
            w.start(id)?;
            w.request(leader, Request::Join { node, who: "operator".to_owned() })?;
        }
        // Not from a pair: what is left would be one node, and two lost disks then are a lost cluster.
        Action::Leave { node } if plan.roles.len() >= 3 && w.left.is_empty() && replaceable(w) => {
            let Some(leader) = w.leader() else { return Ok(()) };
            w.left.insert(*node);
            w.say(leader, || format!("is asked to remove n{node}"));
            let node = komainu_proto::domain::NodeId(*node);
            w.request(leader, Request::Leave { node, who: "operator".to_owned() })?;
        }
        Action::CutService { .. } | Action::SplitPair
            if !w.service.cut.is_empty() && w.random.below(2) == 0 =>
        {
            w.say(0, || "all cuts are mended".to_owned());
            w.mend_pair();
        }
        Action::CutService { from, one_way } => {
            let to = 3 - from;
            let how = if *one_way { "does not reach" } else { "is cut from" };
            w.say(*from, || format!("{how} n{to} on the service network"));
            w.service.cut.insert((*from, to));
            if !one_way {
                w.service.cut.insert((to, *from));
            }
        }
        Action::SplitPair => {
            w.say(0, || "the two are cut from each other everywhere".to_owned());
            w.split_pair();
        }
        Action::Gateway { node } => {
            let gone = w.service.no_gateway.insert(*node) || !w.service.no_gateway.remove(node);
            w.say(*node, || format!("{} its gateway", if gone { "loses" } else { "finds" }));
        }
        Action::LoseDisk { node }
            if plan.pair == Some(Policy::Availability) && super::pairs::is_replaceable(w) =>
        {
            w.say(*node, || "loses its disk".to_owned());
            w.power_off(*node);
            w.machine(*node).disk.lose_everything();
            w.start(*node)?;
        }
        Action::Change { node, leader } => {
            let asked = w.leader().filter(|_| *leader).unwrap_or(*node);
            w.change(asked, plan.groups)?;
        }
        _ => {}
    }
    Ok(())
}

/// Whether every node votes and everybody knows it, so that one disk more can be lost. The disks know it, too: who has it in memory
/// only and is started anew asks for the vote of the store that was lost before, and where two do, no two of three are a majority.
fn replaceable(w: &World) -> bool {
    let running: Vec<_> = w.machines.values().filter_map(|m| m.process.as_ref()).collect();
    let own: BTreeSet<_> = running.iter().map(|p| p.core.raft_id()).collect();
    w.machines.len() >= 3
        && running.len() == w.machines.len()
        && running.iter().all(|p| p.core.voters().collect::<BTreeSet<_>>() == own)
        && w.machines.values().all(|m| m.voters_on_disk(w.t) == own)
}

fn heal(w: &mut World) -> Result<(), String> {
    w.say(0, || "faults cease".to_owned());
    w.end_flows();
    w.weather = Weather::FAIR;
    w.mend_pair();
    let ids: Vec<u64> = w.machines.keys().copied().collect();
    for id in ids {
        w.machine(id).slow_fsync = None;
        if !w.machine(id).fit {
            w.set_fit(id, true)?;
        }
        if w.process(id).is_none() {
            w.start(id)?;
        }
        w.thaw(id)?;
    }
    Ok(())
}

fn whole_again(w: &mut World, plan: &Plan) -> Result<(), Violation> {
    let until = w.disks_well_at() + if plan.pair.is_some() { PAIR_HEALS_WITHIN } else { HEALS_WITHIN };
    let groups: Vec<GroupId> = (1..=plan.groups).map(GroupId).collect();
    let whole = |w: &World| {
        let Some(state) = w.leader().and_then(|l| w.process(l)).map(|p| p.core.state()) else { return false };
        // Not by a lease that it has only because its clock stood still.
        groups.iter().all(|g| w.owner(*g).is_some_and(|n| !w.machines[&n].is_excused(w.t)))
            && (plan.pair.is_none() || super::pairs::is_whole(w))
            && state.held.is_empty()
            && state.members.iter().all(|m| {
                w.process(m.node.id.0).is_some_and(|p| p.core.raft_id().0 == m.raft_id && p.core.state().index == state.index)
            })
            // Whoever was not told to leave is a member.
            && w.machines.keys().all(|id| {
                w.left.contains(id) || state.members.iter().any(|m| m.node.id.0 == *id && m.voter) || *id > plan.roles.len() as u64
            })
    };
    if !w.run_until(until, whole)? {
        let ids: Vec<u64> = w.machines.keys().copied().collect();
        let owners: Vec<_> = groups.iter().map(|g| w.owner(*g)).collect();
        let indexes: Vec<_> =
            ids.iter().map(|id| w.process(*id).map(|p| (p.core.state().index, p.core.term()))).collect();
        for id in ids {
            let progress = w.process(id).map(|p| p.core.progress());
            w.say(id, || format!("{progress:?}"));
        }
        return Err(liveness(format!(
            "not whole again in time: leader {:?}, owners {owners:?}, index and term {indexes:?}",
            w.leader()
        )));
    }
    // And it stays so.
    let before: Vec<_> = groups.iter().map(|g| w.owner(*g)).collect();
    w.run_for(300 * MS)?;
    // A hand-over that was asked for before may still be under way, at a leader whose disk writes for as long as that takes.
    if !w.run_until(w.disks_well_at() + 500 * MS, |w| groups.iter().all(|g| w.owner(*g).is_some()))? {
        let owners: Vec<_> = groups.iter().map(|g| w.owner(*g)).collect();
        return Err(liveness(format!("groups are answered for by {owners:?}, after {before:?}")));
    }
    if let Some(p) = w.leader().and_then(|l| w.process(l)) {
        let state = p.core.state().clone();
        w.checker.nothing_lost(&state)?;
    }
    if !w.run_until(w.disks_well_at() + FLOWS_AGREE_WITHIN, World::flows_agree)? {
        return Err(liveness(format!("the standbys do not have the owners' flows: {}", w.flows_told())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::program::each_seed;
    use super::*;
    use crate::rules::Rule;

    /// Seeds of one `cargo test`; `make test` asks for more.
    const SEEDS: u64 = 200;

    /// The simulation has teeth: these rules, broken, are found within a few seeds. The others are broken one by one in the
    /// situations below; `make sim MUTATE=1` looks for all of them in the seeds.
    #[test]
    fn rules_whose_breach_shows_soon() {
        for rule in
            [Rule::QuorumLease, Rule::Promise, Rule::InstalledFirst, Rule::PersistFirst, Rule::OneStepALease]
        {
            assert!(
                is_found(rule, 1..=1_000, |seed| run(seed, false).1.map_err(|v| v.to_string())),
                "{rule:?}"
            );
        }
    }

    /// Whether the rule, broken, makes any of these runs fail; unbroken, none of the first few does.
    fn is_found(
        rule: Rule,
        mut seeds: std::ops::RangeInclusive<u64>,
        run: impl Fn(u64) -> Result<(), String> + std::panic::RefUnwindSafe,
    ) -> bool {
        for seed in seeds.clone().take(10) {
            run(seed).unwrap_or_else(|what| panic!("{rule:?} in force, seed {seed}: {what}"));
        }
        let found = seeds.find_map(|seed| {
            let result = std::panic::catch_unwind(|| rule.broken(|| run(seed)));
            Some((seed, result.unwrap_or_else(|_| Err("a node panicked".to_owned())).err()?))
        });
        println!("{rule:?}: {found:?}");
        found.is_some()
    }

    fn cut(w: &mut World, a: &[u64], b: &[u64]) {
        w.cut.extend(a.iter().flat_map(|&a| b.iter().flat_map(move |&b| [(a, b), (b, a)])));
    }

    /// The leader and the other balancer don't hear each other, and the witness, which hears both, starts again.
    #[test]
    fn a_voter_that_starts_again_has_forgotten_its_promise() {
        let run = |seed| {
            let mut w = formed(seed, &[Role::Balancer, Role::Balancer, Role::Witness], 1)?;
            cut(&mut w, &[1], &[2]);
            w.run_for((150 + seed * 7) * MS)?;
            w.kill(3);
            w.start(3)?;
            w.run_for(300 * MS)
        };
        assert!(is_found(Rule::StartWait, 1..=100, run));
    }

    /// The leader and an owner are cut off together: the owner hears the leader, but no quorum does.
    #[test]
    fn an_owner_in_the_minority_outlives_its_leader() {
        let run = |seed| {
            let roles = [Role::Balancer, Role::Balancer, Role::Balancer, Role::Witness, Role::Witness];
            let mut w = formed(seed, &roles, 3)?;
            let leader = w.leader().ok_or("no leader")?;
            let owner = (1..=3).find(|n| *n != leader && w.owner(GroupId(*n as u32)).is_some()).unwrap_or(1);
            let rest: Vec<u64> = (1..=5).filter(|n| ![leader, owner].contains(n)).collect();
            cut(&mut w, &[leader, owner], &rest);
            w.run_for(400 * MS)
        };
        assert!(is_found(Rule::GrantWithinLease, 1..=100, run));
    }

    /// A leader goes while its successor doesn't hear the third owner.
    #[test]
    fn a_successor_knows_nothing_of_older_grants() {
        let run = |seed| {
            let mut w = formed(seed, &[Role::Balancer; 3], 3)?;
            let leader = w.leader().ok_or("no leader")?;
            let others: Vec<u64> = (1..=3).filter(|n| *n != leader).collect();
            cut(&mut w, &others[..1], &others[1..]);
            w.run_for(100 * MS)?;
            if let Some(p) = w.process(leader) {
                p.pulse.lock().expect("no panic").set_resigning(true);
            }
            w.run_for(4_000 * MS)
        };
        assert!(is_found(Rule::RetireFirst, 1..=100, run));
    }

    /// A group is taken back from an owner that doesn't hear it.
    #[test]
    fn an_owner_that_does_not_hear_that_it_is_to_let_go() {
        let run = |seed| {
            let mut w = formed(seed, &[Role::Balancer, Role::Balancer, Role::Witness], 1)?;
            let leader = w.leader().ok_or("no leader")?;
            let other = (1..=2).find(|n| *n != leader).ok_or("no other")?;
            w.switchover(leader, "g0", Some(other))?;
            w.run_for((100 + seed) * MS)?;
            if w.leader() != Some(leader) || w.owner(GroupId(1)) != Some(other) {
                return Err(format!("n{leader} leads no more, or n{other} does not own the group"));
            }
            w.cut.insert((leader, other));
            w.switchover(leader, "g0", Some(leader))?;
            w.run_for(300 * MS)
        };
        assert!(is_found(Rule::ReleaseFirst, 1..=100, run));
    }

    /// An executor that the machine has kept waiting speaks when the next process of its node owns the group again.
    #[test]
    fn a_late_word_of_one_process_is_not_about_the_next() {
        let run = |seed| {
            let mut w = formed(seed, &[Role::Balancer, Role::Balancer, Role::Witness], 1)?;
            let owner = w.owner(GroupId(1)).ok_or("no owner")?;
            w.kill_and_tell(owner, 1_000 * MS);
            w.run_for(20 * MS)?;
            w.start(owner)?;
            // It hears nobody when the word comes, so that it goes on for the rest of its lease.
            w.run_for((940 + seed % 40) * MS)?;
            w.cut.extend((1..=3).filter(|n| *n != owner).map(|n| (n, owner)));
            w.run_for(300 * MS)
        };
        assert!(is_found(Rule::OneProcess, 1..=100, run));
    }

    #[test]
    fn any_number_of_nodes_form_one_cluster() {
        for nodes in 1..=7 {
            for seed in 0..20 {
                let mut w = World::new(seed, &vec![Role::Balancer; nodes], Timing::default());
                w.weather.delay = (1 + seed) * MS;
                (1..=nodes as u64).for_each(|id| w.start(id).unwrap());
                w.run_for(5_000 * MS).unwrap();
                let voters = |id| w.process(id).unwrap().core.voters().collect::<Vec<_>>();
                assert_eq!(voters(1).len(), nodes, "{nodes} nodes, seed {seed}");
                assert!((1..=nodes as u64).all(|id| voters(id) == voters(1)), "{nodes} nodes, seed {seed}");
            }
        }
    }

    #[test]
    fn three_nodes_form_a_cluster() {
        let mut w = World::new(1, &[Role::Balancer, Role::Balancer, Role::Witness], Timing::default());
        w.verbose = true;
        (1..=3).for_each(|id| w.start(id).unwrap());
        w.run_for(1_000 * MS).unwrap();
        println!("{}", w.transcript.join("\n"));
        for id in 1..=3 {
            let p = w.process(id).unwrap();
            println!(
                "{id}: empty {} {:?}",
                p.core.is_empty(),
                p.pulse.lock().unwrap().peers().collect::<Vec<_>>()
            );
        }
        assert_eq!(w.process(1).unwrap().core.voters().count(), 3);
    }

    /// Seeds that found something. 336: a leader never removed the store that it had lost itself. 612: what had come in from a
    /// peer's earlier process was reported to the next one as its own. 105: an earlier owner swept away what its successor had told.
    /// 6000246 found a mistake of the checker: what a leader grants whose clock stood still was excused only if the newer epoch had
    /// been seen before. 6172839: an earlier owner's telling waited until a later one forwarded no more, and swept away what that one
    /// had seen. 6065530 found a mistake of the plan: a second disk was lost while only one node's disk knew that the first was made
    /// good. 10317324, another of the checker: all was taken for well again by a lease that its owner had only because its clock had
    /// stood still, and when that had ended it was missed.
    const FOUND: &[u64] = &[336, 612, 105, 6_000_246, 6_172_839, 6_065_530, 10_317_324];

    #[test]
    fn what_was_found_once_stays_mended() {
        for &seed in FOUND {
            run(seed, false).1.unwrap_or_else(|v| panic!("seed {seed}: {v}"));
        }
    }

    #[test]
    fn no_seed_breaks_an_invariant() {
        let number = |name| std::env::var(name).ok().and_then(|s: String| s.parse::<u64>().ok());
        let (first, seeds) = (number("SEED").unwrap_or(1), number("SEEDS").unwrap_or(SEEDS));
        let lines = number("LINES").unwrap_or(60) as usize;
        let failed = Mutex::new(Vec::new());
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        each_seed(first..first + seeds, threads, |seed| {
            let run = |verbose| std::panic::catch_unwind(|| run(seed, verbose));
            let result = run(false)
                .map_or_else(|_| Err("a node panicked".to_owned()), |(_, r)| r.map_err(|v| v.to_string()));
            let Err(what) = result else { return true };
            let transcript = run(true).map_or_else(|_| Vec::new(), |(w, _)| w.transcript);
            let tail = transcript.len().saturating_sub(lines);
            let mut failed = failed.lock().unwrap();
            failed.push(format!("seed {seed}: {what}\n{}", transcript[tail..].join("\n")));
            failed.len() < 3
        });
        let failed = failed.into_inner().unwrap();
        assert!(failed.is_empty(), "{}", failed.join("\n\n"));
    }
}
