//! What this node holds: assignments to it, grants for them, and what its lane was told.
//!
//! ```text
//!             assigned here, granted, installed                    grant runs out
//!   nothing ────────────────────────────────────▶ answering ────────────────────────▶ lapsed
//!      ▲                                           │      ▲            granted again      │
//!      │                 release, or assigned away │      └───────────────────────────────┘
//!      │        grace over                         ▼
//!      └───────────────────────────────────── forwarding only
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use komainu_proto::domain::{GroupId, NodeId};

use super::{Output, Ownership};
use crate::api::LeaseUpdate;
use crate::rules::Rule;
use crate::time::Instant;

/// Releases remembered. More than there can be groups: only groups that this node has not heard of yet, or that are
/// gone, can fill it up.
const MAX_RELEASED: usize = 4 * super::beat::MAX_OWNERSHIPS;

/// Who owns a group, by the replicated state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// Owner; absent when the group has none.
    pub node: Option<NodeId>,
    /// Ownership counter.
    pub epoch: u64,
    /// Log index of the assignment.
    pub index: u64,
}

/// What one node holds of every group.
#[derive(Debug)]
pub(super) struct Holdings {
    me: NodeId,
    grace: Duration,
    /// Assignments up to this log index are of an earlier process of this node.
    stored_through: u64,
    assignments: BTreeMap<GroupId, Assignment>,
    /// Epoch and end of the newest grant. Kept also while the assignment has not been applied here yet.
    grants: BTreeMap<GroupId, (u64, Instant)>,
    /// Epochs that this node will not answer for again: each entry covers all epochs up to its own.
    released: BTreeMap<GroupId, u64>,
    /// Groups that were given up, and how long this node goes on forwarding for them.
    yielded: BTreeMap<GroupId, (u64, Instant)>,
    /// Until when the node is in contact with a leader, which is what grace forwarding needs.
    contact_until: Instant,
    installed: u64,
    /// What the lane was told last.
    lane: BTreeMap<GroupId, LeaseUpdate>,
}

impl Holdings {
    pub(super) fn new(me: NodeId, grace: Duration, stored_through: u64) -> Self {
        Holdings {
            me,
            grace,
            stored_through,
            assignments: BTreeMap::new(),
            grants: BTreeMap::new(),
            released: BTreeMap::new(),
            yielded: BTreeMap::new(),
            contact_until: Instant::default(),
            installed: 0,
            lane: BTreeMap::new(),
        }
    }

    pub(super) fn assignments(&self) -> &BTreeMap<GroupId, Assignment> {
        &self.assignments
    }

    pub(super) fn installed(&self) -> u64 {
        self.installed
    }

    pub(super) fn set_installed(&mut self, index: u64) {
        self.installed = self.installed.max(index);
    }

    pub(super) fn set_assignments(&mut self, assignments: BTreeMap<GroupId, Assignment>) {
        self.released.retain(|g, epoch| assignments.get(g).is_none_or(|a| a.epoch <= *epoch));
        while self.released.len() > MAX_RELEASED {
            self.released.pop_first();
        }
        self.grants.retain(|g, (epoch, _)| assignments.get(g).is_none_or(|a| a.epoch <= *epoch));
        self.assignments = assignments;
        // What an earlier process of this node had is not taken up again: its flows went with it, and another node may have
        // them. The leader gives the group to that one, or to this one anew.
        for (&group, a) in &self.assignments {
            if a.node == Some(self.me) && a.index <= self.stored_through {
                let epoch = self.released.entry(group).or_insert(a.epoch);
                *epoch = (*epoch).max(a.epoch);
            }
        }
    }

    /// What was granted and given up under another line means nothing any more.
    pub(super) fn forget(&mut self) {
        self.stored_through = 0;
        self.grants.clear();
        self.released.clear();
        self.yielded.clear();
    }

    /// A grant never shortens an older one of the same epoch.
    pub(super) fn grant(&mut self, to: Ownership, until: Instant) {
        let held = self.grants.entry(to.group).or_insert((to.epoch, until));
        if to.epoch > held.0 {
            *held = (to.epoch, until);
        } else if to.epoch == held.0 {
            held.1 = held.1.max(until);
        }
    }

    pub(super) fn contact(&mut self, until: Instant) {
        self.contact_until = self.contact_until.max(until);
    }

    /// Gives a group up for good under this epoch.
    pub(super) fn release(&mut self, o: Ownership) {
        if self.assignments.get(&o.group).is_some_and(|a| a.epoch > o.epoch) {
            return;
        }
        let epoch = self.released.entry(o.group).or_insert(o.epoch);
        *epoch = (*epoch).max(o.epoch);
    }

    /// Whether this node has given the group up under this epoch.
    pub(super) fn has_released(&self, o: Ownership) -> bool {
        self.released.get(&o.group).is_some_and(|e| *e >= o.epoch)
    }

    /// Everything given up that is not assigned anew.
    pub(super) fn released(&self) -> impl Iterator<Item = Ownership> + '_ {
        self.released.iter().map(|(&group, &epoch)| Ownership { group, epoch })
    }

    /// Whether the lane was told to answer for the group at `now`.
    pub(super) fn answers(&self, group: GroupId, now: Instant) -> bool {
        self.lane.get(&group).is_some_and(|l| l.answer_until > now)
    }

    /// Every group that the lane was told to answer for at `now`.
    pub(super) fn held(&self, now: Instant) -> impl Iterator<Item = (Ownership, Duration)> + '_ {
        self.lane
            .iter()
            .filter(move |(_, l)| l.answer_until > now)
            .map(move |(&group, l)| (Ownership { group, epoch: l.epoch }, l.answer_until.since(now)))
    }

    /// What the lane was told of every group that it was ever told of.
    pub(super) fn lane(&self) -> impl Iterator<Item = (GroupId, LeaseUpdate)> + '_ {
        self.lane.iter().map(|(&g, &l)| (g, l))
    }

    /// Whether the lane forwards or answers for any group at `now`.
    pub(super) fn holds_anything(&self, now: Instant) -> bool {
        self.lane.values().any(|l| l.answer_until > now || l.forward_until > now)
    }

    /// Whether it would forward for a group that it has given up, if it were in contact.
    pub(super) fn yields(&self, now: Instant) -> bool {
        self.yielded.values().any(|(_, limit)| *limit > now)
    }

    /// Brings the lane up to date. Leases come before announcements.
    pub(super) fn refresh(&mut self, now: Instant, out: &mut VecDeque<Output>) {
        let groups: Vec<GroupId> = self.assignments.keys().chain(self.lane.keys()).copied().collect();
        let mut announce = Vec::new();
        for group in groups {
            let before = self.lane.get(&group).copied().unwrap_or_default();
            let after = self.due(group, before, now);
            if after == before {
                continue;
            }
            let answered = before.answer_until > now && before.epoch == after.epoch;
            if after.answer_until > now && !answered {
                announce.push(group);
            }
            self.lane.insert(group, after);
            out.push_back(Output::Lease { group, lease: after });
        }
        // A group that is gone has nothing more to say once its lease has ended.
        let known = &self.assignments;
        self.lane.retain(|g, l| known.contains_key(g) || l.answer_until > now || l.forward_until > now);
        out.extend(announce.into_iter().map(|group| Output::Announce { group }));
    }

    /// What the lane should be told of a group.
    fn due(&mut self, group: GroupId, before: LeaseUpdate, now: Instant) -> LeaseUpdate {
        let Some(&assigned) = self.assignments.get(&group) else {
            // Removed from the document: its addresses are nobody's.
            self.yielded.remove(&group);
            return LeaseUpdate { epoch: before.epoch, ..LeaseUpdate::default() };
        };
        let own = Ownership { group, epoch: assigned.epoch };
        let granted =
            self.grants.get(&group).filter(|(epoch, _)| *epoch == assigned.epoch).map(|(_, until)| *until);
        if let (true, Some(until)) = (assigned.node == Some(self.me) && !self.has_released(own), granted) {
            self.yielded.remove(&group);
            if self.installed < assigned.index && !Rule::InstalledFirst.is_broken() {
                // Granted, but the lane has not got the tables yet. What it had before under an older epoch is over.
                return if before.epoch == assigned.epoch {
                    before
                } else {
                    LeaseUpdate { epoch: before.epoch, ..LeaseUpdate::default() }
                };
            }
            return LeaseUpdate { epoch: assigned.epoch, answer_until: until, forward_until: until };
        }
        if before.answer_until > now
            && (assigned.epoch > before.epoch || self.has_released(Ownership { group, epoch: before.epoch }))
        {
            self.yielded.insert(group, (before.epoch, now.after(self.grace)));
        }
        if let Some((epoch, limit)) = self.yielded.get_mut(&group)
            && (assigned.node, assigned.epoch) == (Some(self.me), *epoch)
        {
            // Nobody has it yet: the grace time is for what comes after the new owner's announcement.
            *limit = now.after(self.grace);
        }
        match self.yielded.get(&group) {
            Some(&(epoch, limit)) if limit > now => LeaseUpdate {
                epoch,
                answer_until: Instant::default(),
                forward_until: limit.min(self.contact_until),
            },
            _ if before.answer_until > now => {
                // Assigned here and neither granted anew nor released: the lease goes on to its end.
                if assigned.node == Some(self.me) && assigned.epoch == before.epoch {
                    before
                } else {
                    LeaseUpdate { epoch: before.epoch, ..LeaseUpdate::default() }
                }
            }
            _ => before,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: NodeId = NodeId(1);
    const OTHER: NodeId = NodeId(2);
    const G: GroupId = GroupId(1);

    fn own(epoch: u64) -> Ownership {
        Ownership { group: G, epoch }
    }

    fn at(ms: u64) -> Instant {
        Instant(ms * 1_000_000)
    }

    fn holdings() -> Holdings {
        Holdings::new(ME, Duration::from_secs(1), 0)
    }

    fn assign(h: &mut Holdings, node: NodeId, epoch: u64, index: u64) {
        h.set_assignments([(G, Assignment { node: Some(node), epoch, index })].into());
    }

    fn refresh(h: &mut Holdings, now: Instant) -> Vec<Output> {
        let mut out = VecDeque::new();
        h.refresh(now, &mut out);
        out.into()
    }

    fn lease(epoch: u64, answer: u64, forward: u64) -> Output {
        Output::Lease {
            group: G,
            lease: LeaseUpdate { epoch, answer_until: at(answer), forward_until: at(forward) },
        }
    }

    /// Assigned, installed and granted until 80 ms under epoch 1.
    fn answering() -> Holdings {
        let mut h = holdings();
        assign(&mut h, ME, 1, 5);
        h.set_installed(5);
        h.grant(own(1), at(80));
        h.contact(at(80));
        assert_eq!(refresh(&mut h, at(10)), [lease(1, 80, 80), Output::Announce { group: G }]);
        h
    }

    #[test]
    fn a_lease_needs_assignment_grant_and_tables() {
        for (assigned, granted, installed, active) in [
            (true, true, true, true),
            (false, true, true, false),
            (true, false, true, false),
            (true, true, false, false),
        ] {
            let mut h = holdings();
            assign(&mut h, if assigned { ME } else { OTHER }, 1, 5);
            h.set_installed(if installed { 5 } else { 4 });
            if granted {
                h.grant(own(1), at(80));
            }
            refresh(&mut h, at(10));
            assert_eq!(h.answers(G, at(10)), active, "{assigned} {granted} {installed}");
        }
    }

    #[test]
    fn a_grant_may_come_before_its_assignment() {
        let mut h = holdings();
        h.set_installed(9);
        h.grant(own(1), at(80));
        assert_eq!(refresh(&mut h, at(10)), []);
        assign(&mut h, ME, 1, 5);
        assert_eq!(refresh(&mut h, at(10)).len(), 2);
    }

    #[test]
    fn a_grant_of_another_epoch_counts_for_nothing() {
        let mut h = holdings();
        assign(&mut h, ME, 2, 5);
        h.set_installed(5);
        h.grant(own(1), at(80));
        assert_eq!(refresh(&mut h, at(10)), []);
        h.grant(own(3), at(80));
        assert_eq!(refresh(&mut h, at(10)), []);
    }

    #[test]
    fn a_renewal_announces_nothing_and_never_shortens() {
        let mut h = answering();
        h.grant(own(1), at(100));
        assert_eq!(refresh(&mut h, at(20)), [lease(1, 100, 100)]);
        h.grant(own(1), at(90));
        assert_eq!(refresh(&mut h, at(20)), []);
    }

    #[test]
    fn a_lapsed_lease_is_announced_again() {
        let mut h = answering();
        assert_eq!(refresh(&mut h, at(90)), []);
        assert!(!h.answers(G, at(90)));
        h.grant(own(1), at(200));
        assert_eq!(refresh(&mut h, at(120)), [lease(1, 200, 200), Output::Announce { group: G }]);
    }

    #[test]
    fn a_release_is_for_good() {
        let mut h = answering();
        h.release(own(1));
        assert_eq!(refresh(&mut h, at(20)), [lease(1, 0, 80)]);
        h.grant(own(1), at(200));
        refresh(&mut h, at(30));
        assert!(!h.answers(G, at(30)));
        assert_eq!(h.released().collect::<Vec<_>>(), [own(1)]);
        // Under the next epoch it counts no more.
        assign(&mut h, ME, 2, 6);
        h.set_installed(6);
        h.grant(own(2), at(300));
        refresh(&mut h, at(40));
        assert!(h.answers(G, at(40)));
        assert_eq!(h.released().count(), 0);
    }

    #[test]
    fn a_release_may_come_before_the_assignment() {
        let mut h = holdings();
        h.set_installed(9);
        h.release(own(1));
        assign(&mut h, ME, 1, 5);
        h.grant(own(1), at(80));
        assert_eq!(refresh(&mut h, at(10)), []);
    }

    #[test]
    fn grace_forwarding_ends_with_contact_or_with_the_grace() {
        let mut h = answering();
        h.release(own(1));
        assert_eq!(refresh(&mut h, at(20)), [lease(1, 0, 80)]);
        assign(&mut h, OTHER, 2, 6);
        h.contact(at(500));
        assert_eq!(refresh(&mut h, at(30)), [lease(1, 0, 500)]);
        h.contact(at(5000));
        assert_eq!(refresh(&mut h, at(480)), [lease(1, 0, 1020)]);
        h.contact(at(6000));
        assert_eq!(refresh(&mut h, at(1021)), []);
        assert!(!h.holds_anything(at(1021)) && !h.yields(at(1021)));
    }

    /// A slow disk held the new assignment up for longer than the grace time, and datagrams were lost.
    #[test]
    fn grace_begins_when_somebody_else_has_the_group() {
        let mut h = answering();
        h.release(own(1));
        h.contact(at(9000));
        assert_eq!(refresh(&mut h, at(20)), [lease(1, 0, 1020)]);
        assert_eq!(refresh(&mut h, at(1500)), [lease(1, 0, 2500)]);
        assign(&mut h, OTHER, 2, 6);
        assert_eq!(refresh(&mut h, at(2000)), []);
        assert_eq!(refresh(&mut h, at(2501)), []);
        assert!(!h.holds_anything(at(2501)));
    }

    #[test]
    fn an_owner_that_was_passed_over_stops_answering() {
        let mut h = answering();
        assign(&mut h, OTHER, 2, 6);
        assert_eq!(refresh(&mut h, at(20)), [lease(1, 0, 80)]);
    }

    #[test]
    fn a_removed_group_ends_at_once() {
        let mut h = answering();
        h.set_assignments(BTreeMap::new());
        assert_eq!(refresh(&mut h, at(20)), [lease(1, 0, 0)]);
        assert_eq!(refresh(&mut h, at(21)), []);
    }

    #[test]
    fn a_new_epoch_waits_for_its_own_tables() {
        let mut h = answering();
        assign(&mut h, ME, 2, 9);
        h.grant(own(2), at(200));
        assert_eq!(refresh(&mut h, at(20)), [lease(1, 0, 0)]);
        h.set_installed(9);
        assert_eq!(refresh(&mut h, at(30)), [lease(2, 200, 200), Output::Announce { group: G }]);
    }
}
