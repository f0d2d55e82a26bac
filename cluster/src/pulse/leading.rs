//! The leader's own lease, and what it has granted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use komainu_proto::domain::{GroupId, NodeId};

use super::Ownership;
use crate::raft::RaftId;
use crate::rules::Rule;
use crate::time::Instant;

/// Leadership in one term.
#[derive(Debug)]
pub(super) struct Leading {
    pub(super) term: u64,
    /// Acknowledgements of beats sent before count for nothing.
    since: Instant,
    voters: Vec<RaftId>,
    /// Newest own stamp that each voter acknowledged in this term.
    acked: BTreeMap<RaftId, Instant>,
    /// The same for every node that acknowledges, voter or not.
    followed: BTreeMap<RaftId, Instant>,
    pub(super) lease_end: Instant,
    /// The first entry of this term is applied: the ownership known here is the newest there is.
    pub(super) open: bool,
    /// `MsgTimeoutNow` may be under way to this node: in this term, however long it lasts, nobody else is granted anything.
    pub(super) retired: Option<NodeId>,
    /// While leadership is about to be handed over: the only node that is still granted anything.
    pub(super) only_to: Option<NodeId>,
    granted: BTreeMap<GroupId, Granted>,
    /// Not granted any more: to be released.
    pub(super) revoked: BTreeSet<Ownership>,
}

/// The newest grant of a group to another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Granted {
    pub(super) node: NodeId,
    pub(super) epoch: u64,
    /// The grantee's process.
    pub(super) instance: u64,
    /// On this node's clock; the grantee's own limit is earlier in true time.
    pub(super) until: Instant,
}

impl Leading {
    pub(super) fn new(term: u64, now: Instant, voters: Vec<RaftId>) -> Self {
        Leading {
            term,
            since: now,
            voters,
            acked: BTreeMap::new(),
            followed: BTreeMap::new(),
            lease_end: Instant::default(),
            open: false,
            retired: None,
            only_to: None,
            granted: BTreeMap::new(),
            revoked: BTreeSet::new(),
        }
    }

    /// The voters are others now. A leader that has not granted anything yet may learn of several changes at once: it counts
    /// anew, for a lease that rests on a majority of long ago is known to no majority of today.
    pub(super) fn set_voters(&mut self, voters: Vec<RaftId>) {
        if !self.open && voters != self.voters {
            self.acked.clear();
            self.lease_end = Instant::default();
        }
        self.acked.retain(|id, _| voters.contains(id));
        self.voters = voters;
    }

    /// A node has acknowledged the beat that was sent at `stamp` in this term.
    pub(super) fn acknowledge(&mut self, from: RaftId, stamp: Instant, now: Instant) {
        if stamp < self.since || stamp > now {
            return;
        }
        let newest = self.followed.entry(from).or_insert(stamp);
        *newest = (*newest).max(stamp);
        if self.voters.contains(&from) {
            let newest = self.acked.entry(from).or_insert(stamp);
            *newest = (*newest).max(stamp);
        }
    }

    /// Whether a node follows this leader: it has acknowledged a beat sent within `within`, or leadership is younger than
    /// that. A node that is heard but hears nothing can't renew a lease, however lively its own beats are.
    pub(super) fn is_followed_by(&self, node: RaftId, now: Instant, within: Duration) -> bool {
        let newest = self.followed.get(&node).map_or(self.since, |at| (*at).max(self.since));
        now.since(newest) <= within
    }

    /// Extends the lease as far as the acknowledgements allow: sending time of the newest beat that a quorum has
    /// acknowledged, plus the lease.
    pub(super) fn renew(&mut self, me: RaftId, lease: Duration, now: Instant) {
        let quorum = self.voters.len() / 2 + 1;
        let others_needed = quorum - usize::from(self.voters.contains(&me));
        let base = if others_needed == 0 || Rule::QuorumLease.is_broken() {
            now
        } else {
            let mut newest: Vec<Instant> =
                self.acked.iter().filter(|(id, _)| **id != me).map(|(_, at)| *at).collect();
            newest.sort_unstable_by(|a, b| b.cmp(a));
            match newest.get(others_needed - 1) {
                Some(at) => *at,
                None => return,
            }
        };
        self.lease_end = self.lease_end.max(base.after(lease));
    }

    /// Whether it may grant anything at `now`.
    pub(super) fn may_grant(&self, now: Instant) -> bool {
        self.open && self.lease_end > now
    }

    /// Whether `node` is among those that may be granted anything.
    pub(super) fn grants_to(&self, node: NodeId) -> bool {
        self.retired.or(self.only_to).is_none_or(|only| only == node)
    }

    pub(super) fn note_grant(&mut self, group: GroupId, grant: Granted) {
        self.granted
            .entry(group)
            .and_modify(|old| {
                // Ends may only be forgotten when they are over or belong to the same process.
                *old = Granted { until: old.until.max(grant.until), ..grant };
            })
            .or_insert(grant);
    }

    /// A process has ended and answers for nothing any more: nothing that it was granted is in force.
    pub(super) fn forget_grants_to(&mut self, instance: u64) {
        self.granted.retain(|_, g| g.instance != instance);
    }

    pub(super) fn granted(&self, group: GroupId) -> Option<&Granted> {
        self.granted.get(&group)
    }

    /// Latest end of any grant to a node other than `except`.
    pub(super) fn last_grant_end(&self, except: NodeId) -> Instant {
        self.granted.values().filter(|g| g.node != except).map(|g| g.until).max().unwrap_or_default()
    }

    /// Latest end of any grant to `node`.
    pub(super) fn last_grant_to(&self, node: NodeId) -> Instant {
        self.granted.values().filter(|g| g.node == node).map(|g| g.until).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const L: Duration = Duration::from_millis(80);

    fn id(n: u64) -> RaftId {
        RaftId::new(NodeId(n), 1)
    }

    fn at(ms: u64) -> Instant {
        Instant(ms * 1_000_000)
    }

    fn lease_end(voters: u64, acks: &[(u64, u64)]) -> Instant {
        let mut l = Leading::new(1, at(100), (1..=voters).map(id).collect());
        for &(voter, stamp) in acks {
            l.acknowledge(id(voter), at(stamp), at(200));
        }
        l.renew(id(1), L, at(200));
        l.lease_end
    }

    #[test]
    fn the_lease_runs_from_the_newest_beat_that_a_quorum_acknowledged() {
        assert_eq!(lease_end(1, &[]), at(280));
        assert_eq!(lease_end(2, &[]), at(0));
        assert_eq!(lease_end(2, &[(2, 150)]), at(230));
        assert_eq!(lease_end(3, &[(2, 150)]), at(230));
        assert_eq!(lease_end(3, &[(2, 150), (3, 170)]), at(250));
        assert_eq!(lease_end(4, &[(2, 150)]), at(0));
        assert_eq!(lease_end(4, &[(2, 150), (3, 170)]), at(230));
        assert_eq!(lease_end(5, &[(2, 150), (3, 170), (4, 190)]), at(250));
    }

    #[test]
    fn acknowledgements_that_count_for_nothing() {
        // From before this leadership, from the future, from one who doesn't vote.
        assert_eq!(lease_end(3, &[(2, 99)]), at(0));
        assert_eq!(lease_end(3, &[(2, 201)]), at(0));
        assert_eq!(lease_end(3, &[(4, 150)]), at(0));
    }

    #[test]
    fn a_node_follows_as_long_as_it_acknowledges() {
        let mut l = Leading::new(1, at(100), vec![id(1), id(2)]);
        let within = Duration::from_millis(50);
        // Nobody can have acknowledged a leader that has only just begun.
        assert!(l.is_followed_by(id(2), at(150), within) && !l.is_followed_by(id(2), at(151), within));
        l.acknowledge(id(3), at(150), at(160));
        assert!(l.is_followed_by(id(3), at(200), within) && !l.is_followed_by(id(3), at(201), within));
    }

    #[test]
    fn a_retired_leader_grants_to_its_successor_only() {
        let mut l = Leading::new(1, at(100), vec![id(1)]);
        l.retired = Some(NodeId(2));
        l.only_to = None;
        assert!(l.grants_to(NodeId(2)) && !l.grants_to(NodeId(3)) && !l.grants_to(NodeId(1)));
    }

    #[test]
    fn a_new_leader_counts_anew_when_the_voters_turn_out_to_be_others() {
        let mut l = Leading::new(1, at(100), vec![id(1), id(2), id(3)]);
        l.acknowledge(id(3), at(150), at(200));
        l.renew(id(1), L, at(200));
        assert_eq!(l.lease_end, at(230));
        l.set_voters(vec![id(1), id(2), id(3), id(4), id(5)]);
        assert_eq!(l.lease_end, at(0));
        l.acknowledge(id(3), at(190), at(200));
        l.renew(id(1), L, at(200));
        assert_eq!(l.lease_end, at(0));
    }

    #[test]
    fn a_removed_voter_does_not_count() {
        let mut l = Leading::new(1, at(100), vec![id(1), id(2), id(3)]);
        l.open = true;
        l.acknowledge(id(3), at(150), at(200));
        l.set_voters(vec![id(1), id(2)]);
        l.renew(id(1), L, at(200));
        assert_eq!(l.lease_end, at(0));
    }
}
