//! The invariants.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use komainu_proto::domain::{GroupId, NodeId};

use super::machine::{Machine, Time};
use crate::pair;
use crate::raft::RaftId;
use crate::state::State;
use crate::time::Instant;

/// States kept to compare those of slower nodes with.
const STATES: usize = 512;

/// What has been seen so far.
#[derive(Default)]
pub struct Checker {
    /// Highest epoch under which each group was answered for in each line, and by whom.
    epochs: BTreeMap<(GroupId, u64), (u64, NodeId)>,
    /// By cluster and index: two clusters have nothing to agree on.
    states: BTreeMap<(u64, u64), Arc<State>>,
    /// Of each leader: its term, the voters, and when it changed them last.
    voters: BTreeMap<NodeId, (u64, Vec<RaftId>, Option<Instant>)>,
    /// Revision and author of every change that was acknowledged.
    acknowledged: Vec<(u64, String)>,
    /// Authors of changes that were set aside.
    set_aside: BTreeSet<String>,
}

impl Checker {
    /// At most one node answers for a group at any instant of true time, and epochs rise. `split`: a pair is cut in two, and
    /// nodes that both went on alone may both answer.
    pub fn leases(&mut self, machines: &BTreeMap<u64, Machine>, t: Time, split: bool) -> Result<(), String> {
        let groups: BTreeSet<GroupId> = machines.values().flat_map(|m| m.lane.keys().copied()).collect();
        for group in groups {
            // What a leader granted whose clock has stood still.
            let late_grants = machines.values().any(|m| m.is_excused(t) && m.led_when_halted);
            let line = |epoch: u64| epoch / pair::first_epoch(1);
            let mut holders: Vec<(NodeId, u64)> = machines
                .values()
                .filter(|m| !m.is_excused(t))
                .filter_map(|m| Some((m.identity.id, m.answers(group, t)?)))
                .collect();
            if late_grants {
                // The newer epoch may be seen here for the first time.
                let seen = |l: u64| self.epochs.get(&(group, l)).map(|(newest, _)| *newest);
                let all = holders.clone();
                let newest = |l: u64| all.iter().map(|h| h.1).filter(|e| line(*e) == l).chain(seen(l)).max();
                holders.retain(|(_, epoch)| Some(*epoch) == newest(line(*epoch)));
            }
            let both_alone = split && holders.iter().all(|(node, _)| machines[&node.0].solo);
            if holders.len() > 1 && !both_alone {
                return Err(format!("group {} is answered for by {holders:?}", group.0));
            }
            for (node, epoch) in holders {
                let highest = self.epochs.entry((group, line(epoch))).or_insert((epoch, node));
                if epoch < highest.0 || (epoch == highest.0 && node != highest.1) {
                    return Err(format!(
                        "group {}: node {} under epoch {epoch} after node {} under {}",
                        group.0, node.0, highest.1.0, highest.0
                    ));
                }
                *highest = (epoch, node);
            }
        }
        Ok(())
    }

    /// A leader changes the voters once in `within` of its clock at most.
    pub fn voters(
        &mut self,
        node: NodeId,
        core: &crate::core::Core,
        now: Instant,
        within: Duration,
    ) -> Result<(), String> {
        if !core.is_leader() {
            self.voters.remove(&node);
            return Ok(());
        }
        let voters: Vec<_> = core.voters().collect();
        let seen = self.voters.entry(node).or_insert_with(|| (core.term(), voters.clone(), None));
        if seen.0 != core.term() {
            *seen = (core.term(), voters, None);
        } else if seen.1 != voters {
            if let Some(at) = seen.2.filter(|at| now.since(*at) < within) {
                let ms = now.since(at).as_millis();
                return Err(format!("node {} changes the voters twice within {ms} ms", node.0));
            }
            *seen = (core.term(), voters, Some(now));
        }
        Ok(())
    }

    /// Every node of a cluster has the same state at the same index.
    pub fn state(&mut self, node: NodeId, cluster: u64, state: &Arc<State>) -> Result<(), String> {
        match self.states.get(&(cluster, state.index)) {
            Some(known) if **known != **state => {
                Err(format!("node {} has another state at index {} than others have", node.0, state.index))
            }
            Some(_) => Ok(()),
            None => {
                self.states.insert((cluster, state.index), Arc::clone(state));
                while self.states.len() > STATES {
                    self.states.pop_first();
                }
                Ok(())
            }
        }
    }

    /// A change was acknowledged.
    pub fn acknowledge(&mut self, revision: u64, who: String) {
        self.acknowledged.push((revision, who));
    }

    /// Changes of these authors were set aside.
    pub fn set_aside(&mut self, who: impl Iterator<Item = String>) {
        self.set_aside.extend(who);
    }

    /// How many changes were acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.len()
    }

    /// Every acknowledged change is in the state, as far back as its history goes.
    pub fn nothing_lost(&self, state: &State) -> Result<(), String> {
        let first = state.history.front().map_or(0, |r| r.revision);
        for (revision, who) in self.acknowledged.iter().filter(|(revision, _)| *revision >= first) {
            match state.revision(*revision) {
                Some(r) if r.who == *who => {}
                _ if self.set_aside.contains(who) => {}
                found => {
                    return Err(format!(
                        "revision {revision} was acknowledged to {who} and is {:?}",
                        found.map(|r| &r.who)
                    ));
                }
            }
        }
        Ok(())
    }
}
