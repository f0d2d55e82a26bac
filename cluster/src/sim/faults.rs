//! A run: a mix of faults drawn from the seed, then healing.

use komainu_proto::domain::{GroupId, Role};

use super::Random;
use super::machine::Time;
use super::world::{MS, Weather, World};
use crate::timing::Timing;

/// How long the cluster may take to be whole again after the last fault.
const HEALS_WITHIN: Time = 6_000 * MS;

/// The kinds of faults, and how likely each is at most.
const KINDS: [(Kind, u64); 9] = [
    (Kind::Kill, 6),
    (Kind::PowerOff, 6),
    (Kind::Pause, 6),
    (Kind::Cut, 8),
    (Kind::Split, 6),
    (Kind::Unfit, 3),
    (Kind::Switchover, 5),
    (Kind::Resign, 4),
    (Kind::LostDisk, 2),
];

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A process ends; or one that has ended is started again.
    Kill,
    /// A machine loses power; or it is switched on again.
    PowerOff,
    /// A process is frozen.
    Pause,
    /// One link is cut, one way or both; or all are mended.
    Cut,
    /// The nodes fall into two halves; or all cuts are mended.
    Split,
    /// A node becomes unfit, or fit again.
    Unfit,
    /// An operator moves a group.
    Switchover,
    /// A node is stopped in an orderly way, and started again.
    Resign,
    /// A machine comes back with an empty disk.
    LostDisk,
}

/// What a run is made of.
#[derive(Clone, Debug)]
pub struct Mix {
    /// The nodes.
    pub roles: Vec<Role>,
    /// VIP groups.
    pub groups: u32,
    /// Behaviour of network and disks while faults last.
    pub weather: Weather,
    /// How long faults go on.
    pub lasts: Time,
    /// Longest time between two faults.
    pub every: Time,
    /// How likely each kind of fault is, by [`KINDS`].
    pub kinds: [u64; KINDS.len()],
    /// Clocks drift by up to this.
    pub drift_ppm: i64,
}

impl Mix {
    /// Draws a mix.
    pub fn draw(r: &mut Random) -> Mix {
        let some = |r: &mut Random, n: u64| if r.below(2) == 0 { 0 } else { r.below(n) };
        let roles = match r.below(8) {
            0 => vec![Role::Balancer],
            1 => vec![Role::Balancer, Role::Balancer],
            2 => vec![Role::Balancer, Role::Balancer, Role::Balancer],
            3 => vec![Role::Balancer, Role::Balancer, Role::Witness, Role::Balancer, Role::Witness],
            _ => vec![Role::Balancer, Role::Balancer, Role::Witness],
        };
        Mix {
            roles,
            groups: r.between(1, 4) as u32,
            weather: Weather {
                loss_ppm: some(r, 200_000) as u32,
                twice_ppm: some(r, 100_000) as u32,
                delay: r.between(MS / 10, 3 * MS),
                late_ppm: some(r, 50_000) as u32,
                late: r.between(10 * MS, 1_000 * MS),
                fsync: r.between(MS, 15 * MS),
                slow_ppm: some(r, 50_000) as u32,
                slow: r.between(20 * MS, 500 * MS),
            },
            lasts: if r.below(4) == 0 {
                r.between(4_000 * MS, 9_000 * MS)
            } else {
                r.between(1_000 * MS, 4_000 * MS)
            },
            every: r.between(50 * MS, 600 * MS),
            kinds: KINDS.map(|(_, most)| some(r, most)),
            drift_ppm: r.below(10_001) as i64,
        }
    }
}

/// Runs one seed.
///
/// # Errors
/// What went wrong. The transcript of a `verbose` world tells how it came to that.
pub fn run(seed: u64, verbose: bool) -> (World, Result<(), String>) {
    let mut r = Random(seed);
    let mix = Mix::draw(&mut r);
    let mut w = World::new(r.draw(), &mix.roles, Timing::default());
    w.verbose = verbose;
    w.say(0, || format!("seed {seed}: {mix:?}"));
    let result = play(&mut w, &mix, &mut r);
    (w, result)
}

fn play(w: &mut World, mix: &Mix, r: &mut Random) -> Result<(), String> {
    let ids: Vec<u64> = w.machines.keys().copied().collect();
    for &id in &ids {
        let span = 2 * mix.drift_ppm as u64 + 1;
        w.machine(id).drift_ppm = r.below(span) as i64 - mix.drift_ppm;
    }
    // All nodes are started within a second and find each other in good weather: forming is tested elsewhere.
    for &id in &ids {
        w.start(id)?;
        let lasts = r.below(300 * MS);
        w.run_for(lasts)?;
    }
    let formed = w.run_until(w.t + HEALS_WITHIN, |w| {
        w.leader().and_then(|l| w.process(l)).is_some_and(|p| p.core.voters().count() == w.machines.len())
    })?;
    if !formed {
        return Err("the cluster did not form".to_owned());
    }
    let leader = w.leader().unwrap_or(1);
    w.change(leader, mix.groups)?;
    if !w.run_until(w.t + HEALS_WITHIN, |w| w.checker.acknowledged() > 0)? {
        return Err("the first change was not acknowledged".to_owned());
    }
    w.weather = mix.weather;
    let end = w.t + mix.lasts;
    while w.t < end {
        let lasts = r.below(mix.every);
        w.run_for(lasts)?;
        fault(w, mix, r, &ids)?;
        let node = ids[r.below(ids.len() as u64) as usize];
        let asked = w.leader().filter(|_| r.below(4) > 0).unwrap_or(node);
        if r.below(3) == 0 {
            w.change(asked, mix.groups)?;
        }
    }
    heal(w, &ids)?;
    whole_again(w, mix, &ids)
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

fn fault(w: &mut World, mix: &Mix, r: &mut Random, ids: &[u64]) -> Result<(), String> {
    let total: u64 = mix.kinds.iter().sum();
    if total == 0 {
        return Ok(());
    }
    let mut pick = r.below(total);
    let mut kind = Kind::Kill;
    for ((k, _), likely) in KINDS.iter().zip(mix.kinds) {
        if pick < likely {
            kind = *k;
            break;
        }
        pick -= likely;
    }
    let node = ids[r.below(ids.len() as u64) as usize];
    let other = ids[r.below(ids.len() as u64) as usize];
    let running = w.process(node).is_some();
    match kind {
        Kind::Kill | Kind::PowerOff if running => {
            if kind == Kind::PowerOff {
                w.say(node, || "loses power".to_owned());
                w.power_off(node);
            } else {
                w.kill(node);
            }
            if r.below(2) == 0 {
                // A supervisor starts it again at once: it must remember, or wait out, what it promised.
                let lasts = r.below(60 * MS);
                w.run_for(lasts)?;
                w.start(node)?;
            }
        }
        Kind::Kill | Kind::PowerOff => w.start(node)?,
        Kind::Pause if running => {
            let lasts = r.between(5 * MS, 1_500 * MS);
            w.pause(node, lasts);
        }
        Kind::Cut | Kind::Split if !w.cut.is_empty() && r.below(2) == 0 => {
            w.say(0, || "all cuts are mended".to_owned());
            w.cut.clear();
        }
        Kind::Cut if r.below(3) == 0 => {
            w.say(node, || format!("does not reach n{other}"));
            w.cut.insert((node, other));
        }
        Kind::Cut => {
            w.say(node, || format!("is cut from n{other}"));
            w.cut.extend([(node, other), (other, node)]);
        }
        Kind::Split => {
            let half: Vec<u64> = ids.iter().copied().filter(|_| r.below(2) == 0).collect();
            w.say(0, || format!("{half:?} are cut from the rest"));
            for (&a, &b) in half.iter().flat_map(|a| ids.iter().map(move |b| (a, b))) {
                if !half.contains(&b) {
                    w.cut.extend([(a, b), (b, a)]);
                }
            }
        }
        Kind::Unfit => {
            let fit = w.machine(node).fit;
            w.set_fit(node, !fit)?;
        }
        Kind::Switchover => {
            let to =
                (r.below(2) == 0).then_some(node).filter(|n| w.machines[n].identity.role == Role::Balancer);
            if let Some(leader) = w.leader() {
                w.say(leader, || format!("is asked to move g0 to {to:?}"));
                w.switchover(leader, "g0", to)?;
            }
        }
        Kind::Resign if running => {
            w.say(node, || "is stopped".to_owned());
            if let Some(p) = w.process(node) {
                p.pulse.lock().expect("no panic").set_resigning(true);
            }
            let until = w.t + r.between(10 * MS, 1_500 * MS);
            w.run_until(until, |w| w.process(node).is_none_or(|p| p.core.has_resigned()))?;
            w.kill(node);
            w.start(node)?;
        }
        // One disk at a time, and only while every other node is there: two lost disks of three are a lost cluster.
        Kind::LostDisk
            if ids.len() >= 3 && ids.iter().all(|id| w.process(*id).is_some()) && replaceable(w, ids) =>
        {
            w.say(node, || "loses its disk".to_owned());
            w.power_off(node);
            w.machine(node).disk.lose_everything();
            w.start(node)?;
        }
        _ => {}
    }
    Ok(())
}

/// Whether every node votes and everybody knows it, so that one disk more can be lost.
fn replaceable(w: &World, ids: &[u64]) -> bool {
    let mut running = ids.iter().filter_map(|id| w.process(*id));
    let own: std::collections::BTreeSet<_> = running.clone().map(|p| p.core.raft_id()).collect();
    running.all(|p| p.core.voters().collect::<std::collections::BTreeSet<_>>() == own)
}

fn heal(w: &mut World, ids: &[u64]) -> Result<(), String> {
    w.say(0, || "faults cease".to_owned());
    w.weather = Weather::FAIR;
    w.cut.clear();
    for &id in ids {
        if !w.machine(id).fit {
            w.set_fit(id, true)?;
        }
        if w.process(id).is_none() {
            w.start(id)?;
        }
        w.thaw(id);
    }
    Ok(())
}

fn whole_again(w: &mut World, mix: &Mix, ids: &[u64]) -> Result<(), String> {
    let until = w.t + HEALS_WITHIN;
    let groups: Vec<GroupId> = (1..=mix.groups).map(GroupId).collect();
    let whole = |w: &World| {
        let Some(leader) = w.leader() else { return false };
        let Some(index) = w.process(leader).map(|p| p.core.state().index) else { return false };
        groups.iter().all(|g| w.owner(*g).is_some())
            && w.process(leader).is_some_and(|p| p.core.state().held.is_empty())
            && ids.iter().all(|id| w.process(*id).is_some_and(|p| p.core.state().index == index))
    };
    if !w.run_until(until, whole)? {
        let owners: Vec<_> = groups.iter().map(|g| w.owner(*g)).collect();
        let indexes: Vec<_> =
            ids.iter().map(|id| w.process(*id).map(|p| (p.core.state().index, p.core.term()))).collect();
        for id in ids {
            let progress = w.process(*id).map(|p| p.core.progress());
            w.say(*id, || format!("{progress:?}"));
        }
        return Err(format!(
            "not whole again in time: leader {:?}, owners {owners:?}, index and term {indexes:?}",
            w.leader()
        ));
    }
    // And it stays so.
    let before: Vec<_> = groups.iter().map(|g| w.owner(*g)).collect();
    w.run_for(300 * MS)?;
    for (g, owner) in groups.iter().zip(before) {
        if w.owner(*g).is_none() {
            return Err(format!("group {} is answered for by nobody, after {owner:?}", g.0));
        }
    }
    for id in ids {
        if let Some(p) = w.process(*id) {
            let state = p.core.state().clone();
            if w.leader() == Some(*id) {
                w.checker.nothing_lost(&state)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::Rule;

    /// Seeds of one `cargo test`.
    const SEEDS: u64 = 200;

    /// The simulation has teeth: these rules, broken, are found within a few seeds. The others are broken one by one in the
    /// situations below; `make sim MUTATE=1` looks for all of them in the seeds.
    #[test]
    fn rules_whose_breach_shows_soon() {
        for rule in [
            Rule::QuorumLease,
            Rule::Promise,
            Rule::ReleaseFirst,
            Rule::InstalledFirst,
            Rule::PersistFirst,
            Rule::OneStepALease,
        ] {
            assert!(is_found(rule, 1..=200, |seed| run(seed, false).1), "{rule:?}");
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

    #[test]
    fn no_seed_breaks_an_invariant() {
        let first = std::env::var("SEED").ok().and_then(|s| s.parse().ok());
        let seeds = std::env::var("SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(SEEDS);
        let lines = std::env::var("LINES").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
        let mut failed = Vec::new();
        for seed in first.unwrap_or(1)..first.unwrap_or(1) + seeds {
            let run = |verbose| std::panic::catch_unwind(|| run(seed, verbose));
            let result = run(false).map_or_else(|_| Err("a node panicked".to_owned()), |(_, result)| result);
            if let Err(what) = result {
                let transcript = run(true).map_or_else(|_| Vec::new(), |(w, _)| w.transcript);
                let tail = transcript.len().saturating_sub(lines);
                failed.push(format!("seed {seed}: {what}\n{}", transcript[tail..].join("\n")));
                if failed.len() >= 3 {
                    break;
                }
            }
        }
        assert!(failed.is_empty(), "{}", failed.join("\n\n"));
    }
}
