//! What happens in a run: drawn from the seed before it begins, so that a run that failed can be shortened.

use std::fmt;

use komainu_proto::domain::Role;

use super::Random;
use super::machine::Time;
use super::world::{MS, Weather};
use crate::pair::Policy;
use crate::timing::Profile;

/// The kinds of faults, and how likely each is at most.
const KINDS: [(Kind, u64); 16] = [
    (Kind::Kill, 6),
    (Kind::PowerOff, 6),
    (Kind::Freeze, 6),
    (Kind::Suspend, 3),
    (Kind::Cut, 8),
    (Kind::Split, 6),
    (Kind::Unfit, 3),
    (Kind::Switchover, 5),
    (Kind::Resign, 4),
    (Kind::LoseDisk, 2),
    (Kind::CorruptStore, 2),
    (Kind::SlowDisk, 3),
    (Kind::Drift, 2),
    (Kind::WallClock, 2),
    (Kind::Join, 1),
    (Kind::Leave, 1),
];
/// Clocks run fast or slow by up to this: what [`crate::timing::Timing`] allows for.
pub const MAX_DRIFT_PPM: i64 = 10_000;

/// Seeds from here on are runs of pairs without a third node.
pub const PAIRS_FROM: u64 = 1 << 40;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Kill,
    PowerOff,
    Freeze,
    Suspend,
    Cut,
    Split,
    Unfit,
    Switchover,
    Resign,
    LoseDisk,
    CorruptStore,
    SlowDisk,
    Drift,
    WallClock,
    Join,
    Leave,
}

/// What happens to the cluster, or is asked of it. What can't happen as things are then is left out.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// A process ends; or one that has ended is started again. With `again` a supervisor starts it after that time.
    Kill {
        /// Which node.
        node: u64,
        /// After what time its executor acts; absent: it dies, too.
        told: Option<Time>,
        /// After what time it is started again.
        again: Option<Time>,
    },
    /// The leader's process ends, and its executor says so.
    KillLeader {
        /// After what time the executor acts.
        told: Time,
        /// After what time it is started again.
        again: Option<Time>,
    },
    /// A machine loses power; or it is switched on again.
    PowerOff {
        /// Which node.
        node: u64,
        /// After what time it is switched on again.
        again: Option<Time>,
    },
    /// A process is frozen; the machine's clock and data path go on.
    Freeze {
        /// Which node.
        node: u64,
        /// For how long.
        lasts: Time,
    },
    /// A whole machine is halted, and its clock with it.
    Suspend {
        /// Which node.
        node: u64,
        /// For how long.
        lasts: Time,
    },
    /// One link is cut, one way or both; or all are mended.
    Cut {
        /// From this node.
        from: u64,
        /// To this node.
        to: u64,
        /// Not in the other direction.
        one_way: bool,
    },
    /// The nodes fall into two halves; or all cuts are mended.
    Split {
        /// One half.
        half: Vec<u64>,
    },
    /// A node becomes unfit, or fit again.
    Unfit {
        /// Which node.
        node: u64,
    },
    /// An operator moves a group.
    Switchover {
        /// Where to, or anywhere else.
        to: Option<u64>,
    },
    /// A node is stopped in an orderly way, and started again.
    Resign {
        /// Which node.
        node: u64,
        /// How long its operator is patient.
        within: Time,
    },
    /// A machine comes back with an empty disk.
    LoseDisk {
        /// Which node.
        node: u64,
    },
    /// A process is started again and finds its store damaged: it sets it aside and starts empty.
    CorruptStore {
        /// Which node.
        node: u64,
    },
    /// A disk is slow for a while.
    SlowDisk {
        /// Which node.
        node: u64,
        /// How long a write takes.
        fsync: Time,
        /// For how long.
        lasts: Time,
    },
    /// A clock changes its speed.
    Drift {
        /// Which node.
        node: u64,
        /// From now on, in parts per million of true time.
        ppm: i64,
    },
    /// A wall clock is set.
    WallClock {
        /// Which node.
        node: u64,
        /// By how much.
        ms: i64,
    },
    /// A new machine is switched on and an operator has it join.
    Join,
    /// An operator has a node leave.
    Leave {
        /// Which node.
        node: u64,
    },
    /// Nothing of the others reaches a node.
    Deafen {
        /// Which.
        node: u64,
    },
    /// In a pair: one way of the service network is cut, or both.
    CutService {
        /// From this node to the other.
        from: u64,
        /// Not in the other direction.
        one_way: bool,
    },
    /// In a pair: the two are cut from each other on both networks; or all is mended.
    SplitPair,
    /// In a pair: the gateway answers a node no more, or again.
    Gateway {
        /// Which node.
        node: u64,
    },
    /// A client asks for a change of the document.
    Change {
        /// Which node it asks; the leader if there is one and `leader` says so.
        node: u64,
        /// See `node`.
        leader: bool,
    },
}

/// A fault and when.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Time since the step before.
    pub after: Time,
    /// What.
    pub action: Action,
}

/// A run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Where it came from.
    pub seed: u64,
    /// Seed of everything else that is random: delays, losses, the nodes' own numbers.
    pub world: u64,
    /// The nodes.
    pub roles: Vec<Role>,
    /// VIP groups.
    pub groups: u32,
    /// Behaviour of network and disks while faults last.
    pub weather: Weather,
    /// Speed of each clock.
    pub drift_ppm: Vec<i64>,
    /// Durations of beats, leases and elections.
    pub profile: Profile,
    /// A pair without a third node, and what it does.
    pub pair: Option<Policy>,
    /// Whether clients have flows that the standbys are told of.
    pub flows: bool,
    /// What happens.
    pub steps: Vec<Step>,
}

impl Plan {
    /// The run of a seed.
    pub fn draw(seed: u64) -> Plan {
        if seed >= PAIRS_FROM {
            return Plan::draw_pair(seed);
        }
        let mut random = Random(seed);
        let r = &mut random;
        let world = r.draw();
        let some = |r: &mut Random, n: u64| if r.below(2) == 0 { 0 } else { r.below(n) };
        let roles = match r.below(8) {
            0 => vec![Role::Balancer],
            1 => vec![Role::Balancer, Role::Balancer],
            2 => vec![Role::Balancer, Role::Balancer, Role::Balancer],
            3 => vec![Role::Balancer, Role::Balancer, Role::Witness, Role::Balancer, Role::Witness],
            _ => vec![Role::Balancer, Role::Balancer, Role::Witness],
        };
        let weather = Weather {
            loss_ppm: some(r, 200_000) as u32,
            twice_ppm: some(r, 100_000) as u32,
            delay: r.between(MS / 10, 3 * MS),
            late_ppm: some(r, 50_000) as u32,
            late: r.between(10 * MS, 1_000 * MS),
            fsync: r.between(MS, 15 * MS),
            slow_ppm: some(r, 50_000) as u32,
            slow: r.between(20 * MS, 500 * MS),
        };
        let most_drift = r.below(MAX_DRIFT_PPM as u64 + 1) as i64;
        let drift_ppm = roles.iter().map(|_| drift(r, most_drift)).collect();
        let likely = KINDS.map(|(_, most)| some(r, most));
        let lasts = if r.below(4) == 0 { r.between(4_000, 9_000) } else { r.between(1_000, 4_000) } * MS;
        let every = r.between(50 * MS, 600 * MS);
        let groups = r.between(1, 4) as u32;
        let profile = if seed % 8 == 3 { Profile::Fast } else { Profile::Default };
        let mut plan = Plan {
            seed,
            world,
            roles,
            groups,
            weather,
            drift_ppm,
            profile,
            pair: None,
            flows: has_flows(seed),
            steps: Vec::new(),
        };
        // By numbers of their own: the runs before there were executors stay what they were.
        let mut executors = Random(seed ^ 0x1234_5678);
        let mut t = 0;
        while t < lasts {
            let after = r.below(every);
            t += after;
            if let Some(mut action) = plan.draw_action(r, &likely, most_drift) {
                if let Action::Kill { told, .. } = &mut action {
                    *told = executor(&mut executors);
                }
                // In every other run.
                let death = if seed % 2 == 1 { death_after(&mut executors, &action) } else { None };
                let relapse = if seed % 4 == 2 { plan.relapse_after(&mut executors, &action) } else { None };
                let late_word =
                    if seed % 8 == 4 { deaf_at_a_late_word(&mut executors, &action) } else { None };
                plan.steps.push(Step { after, action });
                plan.steps.extend(death);
                plan.steps.extend(relapse);
                plan.steps.extend(late_word);
            }
            if r.below(3) == 0 {
                let node = plan.node(r);
                plan.steps.push(Step { after: 0, action: Action::Change { node, leader: r.below(4) > 0 } });
            }
        }
        plan
    }

    fn node(&self, r: &mut Random) -> u64 {
        1 + r.below(self.roles.len() as u64)
    }

    /// When two nodes have given each other up, one that hears both may die and be back at once, not knowing whom it followed.
    fn relapse_after(&self, r: &mut Random, action: &Action) -> Option<Step> {
        let Action::Cut { from, to, .. } = action else { return None };
        let timing = self.profile.timing();
        let [earliest, latest] = [timing.election_min, timing.election_max].map(|d| d.as_nanos() as Time);
        let after = r.between(earliest * 3 / 4, latest);
        let node = self.node(r);
        let again = Some(r.below(timing.lease.as_nanos() as Time / 2));
        let action = Action::Kill { node, told: None, again };
        (node != *from && node != *to).then_some(Step { after, action })
    }

    fn draw_action(&self, r: &mut Random, likely: &[u64], most_drift: i64) -> Option<Action> {
        let mut pick = r.below(likely.iter().sum::<u64>().max(1));
        let (node, other) = (self.node(r), self.node(r));
        let kind = KINDS.iter().zip(likely).find_map(|((kind, _), n)| {
            let found = pick < *n;
            pick = pick.wrapping_sub(*n);
            found.then_some(*kind)
        })?;
        let again = |r: &mut Random| (r.below(2) == 0).then(|| r.below(60 * MS));
        Some(match kind {
            Kind::Kill => Action::Kill { node, told: None, again: again(r) },
            Kind::PowerOff => Action::PowerOff { node, again: again(r) },
            Kind::Freeze => Action::Freeze { node, lasts: r.between(5 * MS, 1_500 * MS) },
            Kind::Suspend => Action::Suspend { node, lasts: r.between(5 * MS, 1_500 * MS) },
            Kind::Cut => Action::Cut { from: node, to: other, one_way: r.below(3) == 0 },
            Kind::Split => {
                let half = (1..=self.roles.len() as u64).filter(|_| r.below(2) == 0).collect();
                Action::Split { half }
            }
            Kind::Unfit => Action::Unfit { node },
            Kind::Switchover => Action::Switchover {
                to: (r.below(2) == 0)
                    .then_some(node)
                    .filter(|n| self.roles[*n as usize - 1] == Role::Balancer),
            },
            Kind::Resign => Action::Resign { node, within: r.between(10 * MS, 1_500 * MS) },
            Kind::LoseDisk => Action::LoseDisk { node },
            Kind::CorruptStore => Action::CorruptStore { node },
            Kind::SlowDisk => Action::SlowDisk {
                node,
                fsync: r.between(50 * MS, 800 * MS),
                lasts: r.between(100 * MS, 3_000 * MS),
            },
            Kind::Drift => Action::Drift { node, ppm: drift(r, most_drift) },
            Kind::WallClock => Action::WallClock { node, ms: r.below(7_200_000) as i64 - 3_600_000 },
            Kind::Join => Action::Join,
            Kind::Leave => Action::Leave { node },
        })
    }
}

/// In every other run: the runs before there were flows stay what they were.
pub(super) fn has_flows(seed: u64) -> bool {
    Random(seed ^ 0xf10f_10f1).below(2) == 0
}

/// The leader may die in the middle of a hand-over, or when two other nodes have just given each other up.
fn death_after(r: &mut Random, action: &Action) -> Option<Step> {
    let after = match action {
        Action::Switchover { .. } | Action::Unfit { .. } => r.below(20 * MS),
        Action::Cut { .. } => r.between(50 * MS, 150 * MS),
        _ => return None,
    };
    let again = (r.below(2) == 0).then(|| r.below(300 * MS));
    let told = r.below(MS);
    (r.below(4) > 0).then_some(Step { after, action: Action::KillLeader { told, again } })
}

/// A node may hear nobody when a late executor tells of its process before.
fn deaf_at_a_late_word(r: &mut Random, action: &Action) -> Option<Step> {
    let Action::Kill { node, told: Some(told), again: Some(again) } = *action else { return None };
    let after = told.checked_sub(again + r.below(30 * MS)).filter(|after| *after > 150 * MS)?;
    Some(Step { after, action: Action::Deafen { node } })
}

/// After what time an executor acts, if there is one: usually at once, and on a machine that is busy beyond measure much later.
pub(super) fn executor(r: &mut Random) -> Option<Time> {
    match r.below(8) {
        0 | 1 => None,
        2..=4 => Some(r.below(MS)),
        5 => Some(r.below(20 * MS)),
        6 => Some(r.below(300 * MS)),
        _ => Some(r.below(2_000 * MS)),
    }
}

pub(super) fn drift(r: &mut Random, most: i64) -> i64 {
    r.below(2 * most as u64 + 1) as i64 - most
}

impl fmt::Display for Plan {
    /// The run as people read it: the setting, then what happens.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let roles: Vec<&str> = self.roles.iter().map(|r| r.as_str()).collect();
        writeln!(
            f,
            "nodes {}; {} groups; timing {}; clocks off by {:?} ppm",
            roles.join(", "),
            self.groups,
            self.profile.as_str(),
            self.drift_ppm
        )?;
        if let Some(policy) = self.pair {
            writeln!(f, "a pair: {policy:?}")?;
        }
        if self.flows {
            writeln!(f, "with flows")?;
        }
        writeln!(f, "{:?}", self.weather)?;
        for step in &self.steps {
            writeln!(f, "  +{:>8.3} ms  {:?}", step.after as f64 / MS as f64, step.action)?;
        }
        Ok(())
    }
}
