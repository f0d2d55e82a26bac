//! Who belongs to the cluster: one step at a time, each a configuration change of one node, so that any majority before
//! and any majority after have a node in common.

use std::collections::BTreeMap;
use std::time::Duration;

use komainu_proto::domain::NodeId;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState};

use super::{Core, Failure, Ticket};
use crate::pulse::PeerView;
use crate::raft::RaftId;
use crate::state::{Change, Command, MAX_MEMBERS, Member, Outcome};
use crate::time::Instant;

/// A learner that lacks no more entries than this has caught up: the rest comes while it is promoted.
const CAUGHT_UP: u64 = 16;
/// How long a node must have been heard with another store before the place of its former one is given up.
const STEADY: Duration = Duration::from_millis(500);
/// How long to wait before the same correction of a member's identity is proposed again.
const REPEAT: Duration = Duration::from_secs(1);

/// What is under way.
#[derive(Debug, Default)]
pub(super) struct Membership {
    /// Who waits for a node to be admitted.
    joining: BTreeMap<NodeId, Ticket>,
    /// Who waits for a node to be removed.
    leaving: BTreeMap<NodeId, Ticket>,
    corrected_at: Option<Instant>,
    /// While the store is empty: who should found the cluster.
    pub(super) supported: Option<NodeId>,
}

impl Membership {
    pub(super) fn join(&mut self, node: NodeId, ticket: Ticket) -> Option<Ticket> {
        self.joining.insert(node, ticket)
    }

    pub(super) fn leave(&mut self, node: NodeId, ticket: Ticket) -> Option<Ticket> {
        self.leaving.insert(node, ticket)
    }

    /// This node leads no more: what was under way may or may not come to its end.
    pub(super) fn abandon(&mut self) -> Vec<Ticket> {
        let joining = std::mem::take(&mut self.joining).into_values();
        joining.chain(std::mem::take(&mut self.leaving).into_values()).collect()
    }

    /// Requests that the configuration now in force fulfils.
    pub(super) fn applied(
        &mut self,
        conf: &ConfState,
        index: u64,
    ) -> Vec<(Ticket, Result<Outcome, Failure>)> {
        if self.joining.is_empty() && self.leaving.is_empty() {
            return Vec::new();
        }
        let member =
            |node: NodeId| conf.voters.iter().chain(&conf.learners).any(|id| RaftId(*id).node() == node);
        let joined: Vec<NodeId> = self.joining.keys().copied().filter(|n| member(*n)).collect();
        let left: Vec<NodeId> = self.leaving.keys().copied().filter(|n| !member(*n)).collect();
        let joined = joined.into_iter().filter_map(|n| self.joining.remove(&n));
        let tickets: Vec<Ticket> =
            joined.chain(left.into_iter().filter_map(|n| self.leaving.remove(&n))).collect();
        let outcome = Outcome { index, changed: true, ..Outcome::default() };
        tickets.into_iter().map(|t| (t, Ok(outcome.clone()))).collect()
    }
}

impl Core {
    /// As a leader: the next step, if one is due.
    pub(super) fn members_duty(&mut self) {
        if self.raft.raft.has_pending_conf()
            || self.state.index < self.term_start
            || self.reconfigured_lately()
        {
            return;
        }
        let present: Vec<PeerView> = self.lock().peers().filter(|p| p.alive).collect();
        if let Some(id) = self.to_remove(&present) {
            return self.reconfigure_one(
                ConfChangeType::RemoveNode,
                id,
                Change::MemberRemove { raft_id: id.0 },
            );
        }
        if let Some(p) = present.iter().find(|p| self.to_promote(p)) {
            let member = Member { raft_id: p.raft_id.0, node: (*p.identity).clone(), voter: true };
            return self.reconfigure_one(ConfChangeType::AddNode, p.raft_id, Change::MemberPut { member });
        }
        if let Some(p) = present.iter().find(|p| self.to_admit(p)) {
            let member = Member { raft_id: p.raft_id.0, node: (*p.identity).clone(), voter: false };
            return self.reconfigure_one(
                ConfChangeType::AddLearnerNode,
                p.raft_id,
                Change::MemberPut { member },
            );
        }
        self.correct_identities(&present);
    }

    fn members(&self) -> impl Iterator<Item = RaftId> + '_ {
        self.conf.voters.iter().chain(&self.conf.learners).map(|id| RaftId(*id))
    }

    fn is_leaving(&self, node: NodeId) -> bool {
        self.state.leaving.iter().any(|l| l.node == node)
    }

    fn is_learner(&self, id: RaftId) -> bool {
        self.conf.learners.contains(&id.0)
    }

    fn to_remove(&self, present: &[PeerView]) -> Option<RaftId> {
        self.members().filter(|id| *id != self.me).find(|id| {
            if self.is_leaving(id.node()) {
                // What it was granted must have ended: nobody will remember it.
                let owns = self.state.groups.iter().any(|g| g.owner == Some(id.node()));
                return !owns && self.lock().last_grant_to(id.node()) <= self.now.at;
            }
            if id.node() == self.me.node() {
                // What this node was before it lost a store: it leads, so it votes under its new id.
                return true;
            }
            // The same node is back with another store. The old one's place is kept until the new one votes, so that
            // no majority is lost meanwhile.
            present.iter().any(|p| {
                p.identity.id == id.node()
                    && p.raft_id != *id
                    // A stray datagram of a process that has ended is no sign of another store.
                    && p.steady >= STEADY
                    && (self.is_learner(*id) || self.conf.voters.contains(&p.raft_id.0))
            })
        })
    }

    fn to_promote(&self, p: &PeerView) -> bool {
        let last = self.raft.raft.raft_log.last_index();
        self.is_learner(p.raft_id)
            && p.cluster == self.cluster
            && !self.is_leaving(p.identity.id)
            && self
                .raft
                .raft
                .prs()
                .get(p.raft_id.0)
                .is_some_and(|pr| pr.matched > 0 && pr.matched + CAUGHT_UP >= last)
    }

    fn to_admit(&self, p: &PeerView) -> bool {
        let id = p.identity.id;
        if self.members().any(|m| m == p.raft_id) || self.is_leaving(id) {
            return false;
        }
        if self.state.members.len() >= MAX_MEMBERS {
            return false;
        }
        // As what it was asked for: another machine with this number is not meant.
        let asked_for = self.state.joining.iter().any(|j| j.node == *p.identity);
        let member = self.state.members.iter().any(|m| m.node.id == id);
        let configured = self.config.peers.iter().any(|c| c.id == id);
        // One with a store of this cluster whose node is no member was removed, and stays so until an operator asks.
        asked_for || member || (configured && p.cluster == 0)
    }

    fn correct_identities(&mut self, present: &[PeerView]) {
        let now = self.now.at;
        if self.members.corrected_at.is_some_and(|at| now.since(at) < REPEAT) {
            return;
        }
        let wrong = self.state.members.iter().find_map(|m| {
            let said = if m.raft_id == self.me.0 {
                &self.config.identity
            } else {
                &present.iter().find(|p| p.raft_id.0 == m.raft_id)?.identity
            };
            (*said != m.node).then(|| Member { node: said.clone(), ..m.clone() })
        });
        if let Some(member) = wrong {
            self.members.corrected_at = Some(now);
            self.propose_own(Change::MemberPut { member });
        }
    }

    fn reconfigure_one(&mut self, kind: ConfChangeType, id: RaftId, change: Change) {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(kind);
        single.node_id = id.0;
        let conf_change = ConfChangeV2 { changes: vec![single], ..ConfChangeV2::default() };
        let command = Command::own(self.now.wall_ms, change).encode();
        // When it can't be proposed now, the next look finds it still to be done.
        let _ = self.raft.propose_conf_change(command, conf_change);
    }
}
