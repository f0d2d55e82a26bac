//! Who should own which VIP group: the leader's decisions.
//!
//! | owner … | … and the rule wants it to be | then |
//! |---|---|---|
//! | none | a node | assign |
//! | answers | the same | nothing |
//! | answers | another | take back: revoke, wait for its release (or the end of its last grant), assign |
//! | answers, unfit | nobody (no other is fit) | nothing: an unfit owner is better than none |
//! | silent, grant running | | wait: it may come back |
//! | silent, grant run out | a node | assign |
//! | silent, grant run out | nobody | record that it has no owner |
//! | was started anew | | it gave up what it had, with the flows: assign, to one that was told them if there is one |
//!
//! The rule: what an operator wants (switchover) before the preferred node (when there is no owner, or with `preempt`
//! once that node has been steady), before whoever has it, before the balancer with the fewest groups.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use komainu_proto::domain::{GroupId, NodeId, Role};

use crate::handover::{Waits, Why};
use crate::pulse::{Ownership, Pulse};
use crate::state::{Change, GroupState, State};
use crate::time::Instant;

/// How long a node must have been heard, and ownership been unchanged, before anything moves for mere preference.
pub const CALM: Duration = Duration::from_secs(2);
/// A node whose tables are older than this is not given a group.
const TABLES_WITHIN: Duration = Duration::from_secs(2);
/// How long to wait before a decision that was proposed and hasn't shown up is proposed again.
const REPEAT: Duration = Duration::from_secs(1);
/// How long after an attempt to hand leadership over the next one may come. Each failure costs an election.
const TRANSFER_PAUSE: Duration = Duration::from_secs(30);

/// See the [module documentation](self). Kept while a node leads, and begun anew with each term.
#[derive(Debug, Default)]
pub struct Director {
    /// When it was asked first.
    began_at: Option<Instant>,
    /// Nodes that are being removed.
    leaving: BTreeSet<NodeId>,
    /// What was proposed, and when.
    asked: BTreeMap<GroupId, (Asked, Instant)>,
    /// When addresses that a node held were proposed to be free.
    freed_at: BTreeMap<NodeId, Instant>,
    /// Log index applied at each second of the last few.
    history: VecDeque<(Instant, u64)>,
    /// Ownership as last seen, and since when.
    owners: Vec<(GroupId, Option<NodeId>, u64)>,
    quiet_since: Option<Instant>,
    transferred_at: Option<Instant>,
    /// Hand-overs that wait for the flows.
    waits: Waits,
}

/// The epoch that an assignment begins or a release ends, and the new owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    epoch: u64,
    node: Option<NodeId>,
}

/// What a node that could own a group is like.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    node: NodeId,
    /// Has been there long enough to be preferred over a working owner.
    steady: bool,
    /// Its tables are new enough to be given a group.
    ready: bool,
}

impl Director {
    /// A leader's director at the beginning of its term. Decisions of an earlier term count for nothing.
    pub fn new(last_transfer: Option<Instant>) -> Self {
        Director { transferred_at: last_transfer, ..Director::default() }
    }

    /// When leadership was last handed over from here.
    pub fn transferred_at(&self) -> Option<Instant> {
        self.transferred_at
    }

    /// Nodes that are to be removed: they get no group any more.
    pub fn set_leaving(&mut self, nodes: BTreeSet<NodeId>) {
        self.leaving = nodes;
    }

    /// Whether a node is being removed.
    pub fn is_leaving(&self, node: NodeId) -> bool {
        self.leaving.contains(&node)
    }

    /// What to propose now. To be asked after every change of the state or of `pulse`, and every beat.
    pub fn decide(&mut self, state: &State, pulse: &mut Pulse, now: Instant) -> Vec<Change> {
        self.began_at.get_or_insert(now);
        self.remember(state, now);
        let candidates = self.candidates(state, pulse, now);
        let mut load = loads(state);
        let mut out = Vec::new();
        for group in &state.groups {
            if let Some(change) = self.decide_group(group, state, &candidates, &mut load, pulse, now) {
                out.push(change);
            }
        }
        self.waits.retain(|id| state.group(id).is_some());
        self.asked.retain(|id, (asked, _)| state.group(*id).is_some_and(|g| g.epoch <= asked.epoch));
        out.extend(self.freed(state, pulse, now));
        out
    }

    /// The proposal could not be made: ask again as if it had not been.
    pub fn not_proposed(&mut self, change: &Change) {
        if let Change::Assign { group, .. } | Change::Release { group, .. } = change {
            self.asked.remove(group);
        }
    }

    /// Whom leadership should be handed to: the one that owns every group, once things have been calm; or anyone fit to
    /// lead, when this node wants to go.
    pub fn successor(
        &self,
        state: &State,
        pulse: &Pulse,
        me: NodeId,
        led_since: Instant,
        now: Instant,
    ) -> Option<NodeId> {
        let owned_here = state.groups.iter().any(|g| g.owner == Some(me));
        let mut owners = state.groups.iter().map(|g| g.owner);
        let first = owners.next().flatten();
        let sole_owner = first.filter(|_| owners.all(|o| o == first));
        let goes = pulse.is_resigning() || self.leaving.contains(&me);
        let can = |node: NodeId| {
            node != me
                && !self.leaving.contains(&node)
                && state.member(node).is_some_and(|m| m.voter)
                && pulse.peer(node).is_some_and(|p| {
                    p.alive
                        && p.follows
                        && !p.resigning
                        && state.member(node).is_some_and(|m| m.raft_id == p.raft_id.0)
                })
        };
        if goes {
            // A group that nobody else can take goes down with this node anyway.
            if owned_here && !self.candidates(state, pulse, now).is_empty() {
                return None;
            }
            // The new owners first get to their feet: while leadership changes nothing is assigned or begun.
            let settled = self.quiet_since.is_some_and(|at| now.since(at) >= pulse.timing().grace);
            if !settled && !all_answered(state, pulse, me, now) {
                return None;
            }
            let balancers_first = |n: &NodeId| state.member(*n).is_some_and(|m| m.node.role == Role::Witness);
            let mut others: Vec<NodeId> =
                state.members.iter().map(|m| m.node.id).filter(|n| can(*n)).collect();
            others.sort_by_key(balancers_first);
            return sole_owner.filter(|n| can(*n)).or(others.first().copied());
        }
        let calm = now.since(led_since) >= CALM
            && self.quiet_since.is_some_and(|at| now.since(at) >= CALM)
            && self.transferred_at.is_none_or(|at| now.since(at) >= TRANSFER_PAUSE);
        let target = sole_owner.filter(|n| calm && can(*n))?;
        let steady = pulse.peer(target).is_some_and(|p| p.steady >= CALM && p.health.fit());
        (steady && all_answered(state, pulse, me, now)).then_some(target)
    }

    /// Leadership is being handed over.
    pub fn note_transfer(&mut self, now: Instant) {
        self.transferred_at = Some(now);
    }

    fn remember(&mut self, state: &State, now: Instant) {
        if self.history.back().is_none_or(|(at, _)| now.since(*at) >= TABLES_WITHIN / 2) {
            self.history.push_back((now, state.index));
        }
        while self.history.get(1).is_some_and(|(at, _)| now.since(*at) >= TABLES_WITHIN) {
            self.history.pop_front();
        }
        let owners: Vec<_> = state.groups.iter().map(|g| (g.id, g.owner, g.epoch)).collect();
        if self.quiet_since.is_none() || owners != self.owners {
            self.owners = owners;
            self.quiet_since = Some(now);
        }
    }

    /// Index that tables must have reached.
    fn tables_floor(&self, now: Instant) -> u64 {
        self.history.front().filter(|(at, _)| now.since(*at) >= TABLES_WITHIN).map_or(0, |(_, index)| *index)
    }

    fn candidates(&self, state: &State, pulse: &Pulse, now: Instant) -> Vec<Candidate> {
        let floor = self.tables_floor(now);
        let me = pulse.raft_id();
        let mut out = Vec::new();
        for m in state
            .members
            .iter()
            .filter(|m| m.node.role == Role::Balancer && !self.leaving.contains(&m.node.id))
        {
            let candidate = if m.raft_id == me.0 {
                (pulse.self_health().fit() && !pulse.is_resigning()).then(|| (true, pulse.installed()))
            } else {
                pulse
                    .peer(m.node.id)
                    .filter(|p| {
                        p.alive && p.follows && p.raft_id.0 == m.raft_id && p.health.fit() && !p.resigning
                    })
                    .map(|p| (p.steady >= CALM, p.installed))
            };
            if let Some((steady, installed)) = candidate {
                out.push(Candidate { node: m.node.id, steady, ready: installed >= floor });
            }
        }
        // This node first: what it decides for itself takes effect soonest.
        out.sort_by_key(|c| (c.node != me.node(), c.node));
        out
    }

    fn decide_group(
        &mut self,
        group: &GroupState,
        state: &State,
        candidates: &[Candidate],
        load: &mut BTreeMap<NodeId, usize>,
        pulse: &mut Pulse,
        now: Instant,
    ) -> Option<Change> {
        let own = Ownership { group: group.id, epoch: group.epoch };
        let prefer =
            group.config.prefer.as_deref().and_then(|name| state.member_named(name)).map(|m| m.node.id);
        let followers = match group.owner {
            Some(owner) if owner == pulse.raft_id().node() => pulse.followers().map(<[NodeId]>::to_vec),
            Some(owner) => pulse.peer(owner).and_then(|p| p.followers),
            None => None,
        };
        let lost = self.lost_flows(group, pulse, followers.as_deref());
        let heirs = if lost { self.heirs(group, candidates, pulse) } else { Vec::new() };
        let target = match choose_heir(group, &heirs, candidates, load) {
            Some(node) => Some(node),
            None => choose(group, prefer, candidates, load, followers.as_deref()),
        };
        if lost && heirs.is_empty() && self.heirs_may_come(state, candidates, pulse, now) {
            return None;
        }
        if self.waits_for_flows(group, target, followers.as_deref(), pulse, now) {
            return None;
        }
        let assign = |node| Change::Assign { group: group.id, node, epoch: group.epoch + 1 };
        let change = match (group.owner, target) {
            (None, Some(node)) => assign(node),
            (None, None) => return None,
            (Some(owner), target) => {
                let me = pulse.raft_id().node();
                let alive = owner == me || pulse.peer(owner).is_some_and(|p| p.alive && p.follows);
                if !alive && pulse.last_grant_to(owner) > now {
                    return None;
                }
                let stays = target == Some(owner) || (target.is_none() && alive);
                if stays && !pulse.is_given_up(owner, own) {
                    return None;
                }
                pulse.revoke(own, now);
                if !pulse.is_free(own, now) {
                    return None;
                }
                match target {
                    Some(node) => assign(node),
                    None => Change::Release { group: group.id, epoch: group.epoch },
                }
            }
        };
        let asked = match &change {
            Change::Assign { node, epoch, .. } => Asked { epoch: *epoch, node: Some(*node) },
            _ => Asked { epoch: group.epoch, node: None },
        };
        if self.asked.get(&group.id).is_some_and(|(before, at)| *before == asked && now.since(*at) < REPEAT) {
            return None;
        }
        self.asked.insert(group.id, (asked, now));
        if let Change::Assign { node, .. } = &change {
            *load.entry(*node).or_default() += 1;
        }
        Some(change)
    }

    /// Whether the group's owner has given it up and has sent its flows to nobody: it was started anew, and begins without any.
    fn lost_flows(&self, group: &GroupState, pulse: &Pulse, followers: Option<&[NodeId]>) -> bool {
        let own = Ownership { group: group.id, epoch: group.epoch };
        group.owner.is_some_and(|owner| pulse.is_given_up(owner, own))
            && followers.is_none_or(<[_]>::is_empty)
    }

    /// Candidates that were told all flows by the process that the owner was before.
    fn heirs(&self, group: &GroupState, candidates: &[Candidate], pulse: &Pulse) -> Vec<NodeId> {
        let told = |c: &&Candidate| {
            if c.node == pulse.raft_id().node() {
                return pulse.told_by_owners().any(|g| g == group.id);
            }
            // By the epoch that the group has now, if that node has heard of it.
            pulse
                .peer(c.node)
                .is_some_and(|p| p.applied >= group.assigned_index && p.told.contains(&group.id))
        };
        candidates.iter().filter(told).map(|c| c.node).collect()
    }

    /// Whether it is worth waiting for a balancer that may have a group's flows: after an election others are heard one after the
    /// other.
    fn heirs_may_come(&self, state: &State, candidates: &[Candidate], pulse: &Pulse, now: Instant) -> bool {
        let balancers = state.members.iter().filter(|m| m.node.role == Role::Balancer).count();
        candidates.len() < balancers
            && self.began_at.is_some_and(|at| now.since(at) < pulse.timing().election_min)
    }

    /// Whether the group's owner works and its flows are not yet where they should be when the group is.
    fn waits_for_flows(
        &mut self,
        group: &GroupState,
        target: Option<NodeId>,
        followers: Option<&[NodeId]>,
        pulse: &Pulse,
        now: Instant,
    ) -> bool {
        let (Some(owner), Some(to)) = (group.owner, target.filter(|t| Some(*t) != group.owner)) else {
            self.waits.rests(group.id);
            return false;
        };
        let (works, resigning) = if owner == pulse.raft_id().node() {
            (pulse.self_health().fit(), pulse.is_resigning())
        } else {
            let peer = pulse.peer(owner).filter(|p| p.alive && p.follows);
            (peer.as_ref().is_some_and(|p| p.health.fit()), peer.is_some_and(|p| p.resigning))
        };
        let why = match () {
            () if resigning || self.leaving.contains(&owner) => Why::Leaving,
            () if group.wanted.is_some() => Why::Wish,
            () => Why::Preference,
        };
        // Begun under an earlier leader: the owner has no flows to send any more.
        let given_up = pulse.is_given_up(owner, Ownership { group: group.id, epoch: group.epoch });
        works && !given_up && self.waits.holds((group.id, group.epoch), to, followers, why, now)
    }

    /// Addresses that left a group and that nobody can answer for any more.
    fn freed(&mut self, state: &State, pulse: &Pulse, now: Instant) -> Vec<Change> {
        let mut nodes: BTreeMap<NodeId, u64> = BTreeMap::new();
        for h in &state.held {
            let newest = nodes.entry(h.node).or_default();
            *newest = (*newest).max(h.index);
        }
        let me = pulse.raft_id().node();
        let mut out = Vec::new();
        for (node, newest) in nodes {
            let up_to_index = if node == me {
                pulse.installed()
            } else {
                match pulse.peer(node).filter(|p| p.alive) {
                    Some(p) => p.installed,
                    None if pulse.last_grant_to(node) <= now => newest,
                    None => 0,
                }
            };
            let some = state.held.iter().any(|h| h.node == node && h.index <= up_to_index);
            if some && self.freed_at.get(&node).is_none_or(|at| now.since(*at) >= REPEAT) {
                self.freed_at.insert(node, now);
                out.push(Change::Free { node, up_to_index });
            }
        }
        out
    }
}

/// Whether every group that another living node owns is answered for.
fn all_answered(state: &State, pulse: &Pulse, me: NodeId, now: Instant) -> bool {
    let living = |n: &NodeId| *n != me && pulse.peer(*n).is_some_and(|p| p.alive);
    state
        .groups
        .iter()
        .filter(|g| g.owner.as_ref().is_some_and(living))
        .all(|g| pulse.lease_left(g.id, now).is_some())
}

fn loads(state: &State) -> BTreeMap<NodeId, usize> {
    let mut load = BTreeMap::new();
    for owner in state.groups.iter().filter_map(|g| g.owner) {
        *load.entry(owner).or_default() += 1;
    }
    load
}

/// Whoever has the flows of an owner that has lost them, unless an operator wants the group elsewhere.
fn choose_heir(
    group: &GroupState,
    heirs: &[NodeId],
    candidates: &[Candidate],
    load: &BTreeMap<NodeId, usize>,
) -> Option<NodeId> {
    let wish = group.wanted.as_ref();
    let is_wanted =
        |node: NodeId| wish.is_none_or(|w| w.node.is_none_or(|n| n == node) && w.not != Some(node));
    let ready = candidates.iter().filter(|c| c.ready && heirs.contains(&c.node) && is_wanted(c.node));
    ready.map(|c| c.node).min_by_key(|node| (load.get(node).copied().unwrap_or(0), *node))
}

/// The rule. Absent when nobody can own the group.
fn choose(
    group: &GroupState,
    prefer: Option<NodeId>,
    candidates: &[Candidate],
    load: &BTreeMap<NodeId, usize>,
    followers: Option<&[NodeId]>,
) -> Option<NodeId> {
    let fit = |node: NodeId| candidates.iter().find(|c| c.node == node);
    // Tables that are too old rule out a new owner, but not the one that is working.
    let ready = |node: NodeId| fit(node).filter(|c| c.ready || group.owner == Some(node));
    let wanted = group.wanted.as_ref();
    if let Some(node) = wanted.and_then(|w| w.node).filter(|n| ready(*n).is_some()) {
        return Some(node);
    }
    // "Anywhere but here", as long as there is anywhere else.
    let not = wanted.filter(|w| w.node.is_none()).and_then(|w| w.not);
    let owner = group.owner.filter(|o| fit(*o).is_some());
    if let Some(c) = prefer.filter(|n| Some(*n) != not).and_then(ready)
        && (owner.is_none() || (group.config.preempt && c.steady && wanted.is_none()))
    {
        return Some(c.node);
    }
    if let Some(owner) = owner.filter(|o| Some(*o) != not) {
        return Some(owner);
    }
    let best = |ready_only: bool| {
        candidates
            .iter()
            .filter(|c| Some(c.node) != not && (c.ready || !ready_only))
            // Whoever has the flows of the owner, be it dead, before whoever has fewer groups.
            .min_by_key(|c| {
                let lacks = followers.is_some_and(|f| !f.contains(&c.node));
                (lacks, load.get(&c.node).copied().unwrap_or(0))
            })
            .map(|c| c.node)
    };
    best(true).or(owner).or_else(|| best(false)).or(not.filter(|n| fit(*n).is_some()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Wanted;
    use komainu_proto::domain::Group;

    fn group(owner: Option<u64>) -> GroupState {
        GroupState {
            id: GroupId(1),
            config: Group {
                name: "web".to_owned(),
                vips: Vec::new(),
                inside_vips: Vec::new(),
                snat: Vec::new(),
                prefer: None,
                preempt: false,
            },
            owner: owner.map(NodeId),
            epoch: 3,
            assigned_index: 1,
            wanted: None,
        }
    }

    fn fit(nodes: &[u64]) -> Vec<Candidate> {
        nodes.iter().map(|&n| Candidate { node: NodeId(n), steady: true, ready: true }).collect()
    }

    fn chosen(group: &GroupState, prefer: Option<u64>, candidates: &[Candidate]) -> Option<u64> {
        choose(group, prefer.map(NodeId), candidates, &BTreeMap::new(), None).map(|n| n.0)
    }

    #[test]
    fn who_has_it_keeps_it() {
        assert_eq!(chosen(&group(Some(2)), None, &fit(&[1, 2])), Some(2));
        assert_eq!(chosen(&group(Some(2)), Some(1), &fit(&[1, 2])), Some(2));
    }

    #[test]
    fn the_preferred_node_takes_what_nobody_has_and_what_it_may_preempt() {
        assert_eq!(chosen(&group(None), Some(2), &fit(&[1, 2])), Some(2));
        assert_eq!(chosen(&group(Some(3)), Some(2), &fit(&[1, 2])), Some(2));
        let mut g = group(Some(1));
        g.config.preempt = true;
        assert_eq!(chosen(&g, Some(2), &fit(&[1, 2])), Some(2));
        // Not before it has been steady, and not against an operator's wish.
        let mut unsteady = fit(&[1, 2]);
        unsteady[1].steady = false;
        assert_eq!(chosen(&g, Some(2), &unsteady), Some(1));
        g.wanted = Some(Wanted { node: Some(NodeId(1)), not: None, index: 1 });
        assert_eq!(chosen(&g, Some(2), &fit(&[1, 2])), Some(1));
    }

    #[test]
    fn an_operators_wish_goes_before_preference() {
        let mut g = group(Some(1));
        g.wanted = Some(Wanted { node: Some(NodeId(2)), not: None, index: 1 });
        assert_eq!(chosen(&g, Some(1), &fit(&[1, 2])), Some(2));
        assert_eq!(chosen(&g, Some(1), &fit(&[1])), Some(1));
        g.wanted = Some(Wanted { node: None, not: Some(NodeId(1)), index: 1 });
        assert_eq!(chosen(&g, Some(1), &fit(&[1, 2, 3])), Some(2));
        assert_eq!(chosen(&g, Some(1), &fit(&[1])), Some(1));
    }

    #[test]
    fn groups_spread_where_nothing_is_preferred() {
        let load = BTreeMap::from([(NodeId(1), 2), (NodeId(2), 1)]);
        assert_eq!(choose(&group(None), None, &fit(&[1, 2]), &load, None), Some(NodeId(2)));
    }

    #[test]
    fn a_dead_owners_group_goes_to_whoever_has_its_flows() {
        let load = BTreeMap::from([(NodeId(1), 2), (NodeId(2), 1)]);
        let (owned, here) = (group(Some(3)), fit(&[1, 2]));
        assert_eq!(choose(&owned, None, &here, &load, Some(&[NodeId(1)])), Some(NodeId(1)));
        // Better without flows than not at all.
        assert_eq!(choose(&owned, None, &here, &load, Some(&[])), Some(NodeId(2)));
    }

    #[test]
    fn old_tables_rule_out_a_new_owner_but_not_the_present_one() {
        let mut old = fit(&[1, 2]);
        old[0].ready = false;
        assert_eq!(chosen(&group(Some(1)), None, &old), Some(1));
        assert_eq!(chosen(&group(None), None, &old), Some(2));
        // Better old tables than none.
        old[1].ready = false;
        assert_eq!(chosen(&group(None), None, &old), Some(1));
        assert_eq!(chosen(&group(None), None, &[]), None);
    }
}
