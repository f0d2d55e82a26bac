//! What this node is told: of itself, of the replicated state, of the configuration.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use komainu_proto::domain::{BackendId, GroupId, Health, NodeId};

use super::{Assignment, Pulse};
use crate::api::{Observation, SelfHealth};
use crate::flowsync::Owned;
use crate::raft::RaftId;
use crate::state::MAX_BACKENDS_TOTAL;
use crate::time::Instant;

impl Pulse {
    /// Log index that the lane's tables were derived from.
    pub fn set_installed(&mut self, index: u64, now: Instant) {
        self.advance(now);
        if index > self.holdings.installed() {
            self.holdings.set_installed(index);
            self.refresh();
        }
    }

    /// Who has the remembered flows of this node's data path; see [`crate::api::DataPath::followers`].
    pub fn set_followers(&mut self, followers: Option<Vec<NodeId>>) {
        if followers != self.followers {
            self.followers = followers;
            self.prompt();
        }
    }

    /// Whose flows this node's data path was told; see [`crate::api::DataPath::told`].
    pub fn set_told(&mut self, told: Vec<Owned>) {
        if told != self.told {
            self.told = told;
            self.prompt();
        }
    }

    /// This node's fitness to own a group.
    pub fn set_self_health(&mut self, health: SelfHealth) {
        if health.fit() != self.health.fit() {
            self.beat_now();
            self.prompt();
        }
        self.health = health;
    }

    /// What this node's checks see of one backend.
    pub fn set_observation(&mut self, observation: Observation) {
        let id = observation.backend;
        if !self.observations.contains_key(&id) && self.observations.len() >= MAX_BACKENDS_TOTAL {
            // Checks of backends that are gone may have reported once more.
            self.observations.retain(|id, _| self.verdicts.contains_key(id));
            if self.observations.len() >= MAX_BACKENDS_TOTAL {
                return;
            }
        }
        self.observations.insert(id, observation);
        self.compare(id);
    }

    /// Shutting down: wants its groups taken.
    pub fn set_resigning(&mut self, resigning: bool) {
        if self.resigning != resigning {
            self.resigning = resigning;
            self.beat_now();
            self.prompt();
        }
    }

    /// Replicated verdicts that changed, and backends that are gone.
    pub(crate) fn set_verdicts(&mut self, changed: Vec<(BackendId, Option<Health>)>) {
        for (id, verdict) in changed {
            match verdict {
                Some(health) => {
                    self.verdicts.insert(id, health);
                }
                None => {
                    self.verdicts.remove(&id);
                    self.observations.remove(&id);
                }
            }
            self.compare(id);
        }
    }

    /// Ownership by the replicated state, which has reached log index `applied`.
    pub(crate) fn set_assignments(&mut self, assignments: BTreeMap<GroupId, Assignment>, applied: u64) {
        self.applied = self.applied.max(applied);
        if *self.holdings.assignments() == assignments {
            return;
        }
        if let Some(l) = &mut self.leading {
            l.revoked.retain(|o| assignments.get(&o.group).is_some_and(|a| a.epoch == o.epoch));
        }
        self.holdings.set_assignments(assignments);
        self.refresh();
        if self.leading.is_some() {
            // A new owner need not wait for the next beat to hear of its grant.
            self.beat_now();
        }
    }

    /// Members with their addresses, besides those of the node file.
    pub(crate) fn set_members(
        &mut self,
        members: impl Iterator<Item = (NodeId, SocketAddr)>,
        configured: impl Iterator<Item = (NodeId, SocketAddr)>,
    ) {
        for p in self.peers.values_mut() {
            p.wanted = false;
        }
        for (id, address) in configured.chain(members) {
            if id != self.identity.id {
                self.want(id, address);
            }
        }
        // A member that was removed is forgotten once it is silent.
        let (now, silent_after) = (self.now, self.silent_after());
        self.peers.retain(|_, p| p.wanted || p.alive(now, silent_after));
    }

    /// Cluster of this node's store.
    pub(crate) fn set_cluster(&mut self, cluster: u64) {
        self.cluster = cluster;
        self.support = None;
    }

    /// Whom this node, whose store is empty, wants to found the cluster.
    pub(crate) fn set_support(&mut self, support: Option<NodeId>) {
        if self.support != support {
            self.support = support;
            self.beat_now();
        }
    }

    /// Whether no other node can hold a lease or vote.
    pub(crate) fn set_sole(&mut self, sole: bool) {
        self.sole = sole;
    }

    /// The store takes nothing any more.
    pub(crate) fn set_store_failed(&mut self, now: Instant) {
        self.store_failed_at.get_or_insert(now);
    }

    /// Whether nothing that this node says can be relied upon: it belongs to another cluster, or its durations are others.
    pub(crate) fn is_shunned(&self, id: RaftId) -> bool {
        self.cluster != 0 && self.foreign.get(&id.node()) == Some(&id)
            || self.mistimed.contains_key(&id.node())
    }

    /// The voters of the configuration in force.
    pub(crate) fn set_voters(&mut self, voters: Vec<RaftId>) {
        self.voters.clone_from(&voters);
        if let Some(l) = &mut self.leading {
            l.set_voters(voters);
        }
    }
}
