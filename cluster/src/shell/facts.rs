//! Building a [`View`] out of what the cores know.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use komainu_proto::domain::NodeId;

use super::clock;
use super::view::{LeaseView, MemberView, Quorum, View};
use crate::api::NodeIdentity;
use crate::core::{Core, Peer};
use crate::pulse::Pulse;
use crate::state::State;

/// What a view is built from beside the cores.
#[derive(Clone)]
pub(super) struct Facts {
    pub(super) identity: NodeIdentity,
    pub(super) version: String,
    pub(super) peers: Vec<Peer>,
    pub(super) notes: Arc<Mutex<Vec<String>>>,
}

impl Facts {
    /// The view as the Raft thread sees it.
    pub(super) fn view(&self, core: &Core) -> View {
        let voters: Vec<u64> = core.voters().map(|id| id.0).collect();
        let standing = core.standing();
        let solo = core.state().solo.is_some();
        let base = View {
            state: core.state().clone(),
            node: self.identity.clone(),
            raft_id: core.raft_id().0,
            leader: core.leader(),
            term: core.term(),
            voter: voters.contains(&core.raft_id().0),
            members: Vec::new(),
            leases: Vec::new(),
            quorum: Quorum::of(voters.len(), solo, &standing),
            solo,
            standing,
            notes: Vec::new(),
            at: clock::at(),
        };
        let pulse = core.pulse();
        let pulse = super::lock(&pulse);
        self.refreshed(&base, &pulse)
    }

    /// The view with everything that beats tell as it is now.
    pub(super) fn refreshed(&self, view: &View, pulse: &Pulse) -> View {
        let at = clock::at();
        let state = &view.state;
        let leases = state.groups.iter().filter_map(|group| {
            let left = pulse.lease_left(group.id, at).filter(|left| *left > Duration::ZERO)?;
            Some(LeaseView { group: group.id, node: group.owner?, epoch: group.epoch, left })
        });
        let members = self.members(view.raft_id, state, pulse);
        let replaced = members.iter().filter(|m| m.raft_id.is_some() && !m.voter && m.alive).filter(|m| {
            let places = state.members.iter().filter(|p| p.node.id == m.node.id);
            // A node that has one place and no vote yet is new.
            places.clone().any(|p| p.voter)
        });
        let replaced: Vec<String> = replaced
            .map(|m| {
                format!(
                    "{} is back with another store, and the place of its former one still counts: until its vote has been \
                     moved the cluster may not bear another failure",
                    m.node.name
                )
            })
            .collect();
        let notes = super::lock(&self.notes).clone();
        View {
            members,
            leases: leases.collect(),
            notes: notes.into_iter().chain(pulse.notices()).chain(replaced).collect(),
            at,
            ..view.clone()
        }
    }

    fn members(&self, own: u64, state: &State, pulse: &Pulse) -> Vec<MemberView> {
        let mut ids: Vec<NodeId> = state.members.iter().map(|m| m.node.id).collect();
        ids.extend(self.peers.iter().map(|p| p.id));
        ids.extend(pulse.peers().map(|p| p.identity.id));
        ids.push(self.identity.id);
        ids.sort();
        ids.dedup();
        ids.into_iter().map(|id| self.member(id, own, state, pulse)).collect()
    }

    fn member(&self, id: NodeId, own: u64, state: &State, pulse: &Pulse) -> MemberView {
        let member = state.member(id);
        let raft_id = member.map(|m| m.raft_id);
        let heard = pulse.peer(id);
        // Of a node that lost its disk the process that lives has another Raft id than the place that it had.
        let lives_as = if id == self.identity.id {
            Some(own)
        } else {
            heard.as_ref().filter(|h| h.alive).map(|h| h.raft_id.0)
        };
        let places = state.members.iter().filter(|m| m.node.id == id).count();
        let voter = places == 1
            && member.is_some_and(|m| m.voter && lives_as.is_none_or(|raft_id| raft_id == m.raft_id));
        if id == self.identity.id {
            return MemberView {
                node: self.identity.clone(),
                raft_id,
                voter,
                alive: true,
                since_beat: Some(Duration::ZERO),
                version: self.version.clone(),
                health: Some(pulse.self_health().clone()),
            };
        }
        let named =
            || member.map(|m| m.node.clone()).or_else(|| heard.as_ref().map(|h| (*h.identity).clone()));
        let node = named().unwrap_or_else(|| NodeIdentity {
            id,
            name: format!("node {}", id.0),
            role: komainu_proto::domain::Role::Balancer,
            // Only nodes of the node file are neither members nor heard of.
            address: self
                .peers
                .iter()
                .find(|p| p.id == id)
                .map_or_else(|| ([0, 0, 0, 0], 0).into(), |p| p.address),
        });
        MemberView {
            node,
            raft_id,
            voter,
            alive: heard.as_ref().is_some_and(|h| h.alive),
            since_beat: heard.as_ref().map(|h| h.since_beat),
            version: heard.as_ref().map(|h| h.version.to_string()).unwrap_or_default(),
            health: heard.map(|h| h.health),
        }
    }
}

impl View {
    /// Whether two views differ in durations at most.
    pub(super) fn same_but_for_time(&self, other: &View) -> bool {
        let member =
            |m: &MemberView| MemberView { since_beat: m.since_beat.map(|_| Duration::ZERO), ..m.clone() };
        let lease = |l: &LeaseView| (l.group, l.node, l.epoch);
        Arc::ptr_eq(&self.state, &other.state)
            && (self.leader, self.term, self.voter, self.quorum)
                == (other.leader, other.term, other.voter, other.quorum)
            && self.standing.same_but_for_time(&other.standing)
            && self.notes == other.notes
            && self.members.iter().map(member).eq(other.members.iter().map(member))
            && self.leases.iter().map(lease).eq(other.leases.iter().map(lease))
    }
}
