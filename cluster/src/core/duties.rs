//! What a leader decides, and what it is asked.

use std::collections::BTreeMap;
use std::time::Duration;

use komainu_proto::domain::{BackendId, GroupId, Health, NodeId, Role};

use super::{Core, Failure, MAX_REQUESTS, Now, Output, Request, Ticket, UnderWay};
use crate::api::Observation;
use crate::pulse::{Ownership, Pulse};
use crate::raft::RaftId;
use crate::state::{Change, Command, MAX_VERDICTS, State, Verdict};

/// How long to wait before a verdict that was proposed and hasn't shown up is proposed again.
const REPEAT: Duration = Duration::from_millis(500);

impl Core {
    /// Asks the leader for something; its end comes as [`Output::Done`] with the ticket given back here, possibly at once.
    /// Only the leader's core carries requests out; on another node the answer is [`Failure::NotLeader`].
    pub fn request(&mut self, request: Request, now: Now) -> Ticket {
        self.now = now;
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        if let Err(failure) = self.accept(request, ticket) {
            self.out.push_back(Output::Done { ticket, result: Err(failure) });
        }
        self.settle();
        ticket
    }

    fn accept(&mut self, request: Request, ticket: Ticket) -> Result<(), Failure> {
        if !self.is_leader() {
            return Err(Failure::NotLeader { leader: self.leader().filter(|n| *n != self.me.node()) });
        }
        if self.transfer.is_some() || self.requests.len() >= MAX_REQUESTS {
            return Err(Failure::Busy);
        }
        match request {
            Request::Command(command) => {
                let configured = self.config.peers.len() + 1;
                let present = self.conf.voters.len();
                if self.state.revision == 0 && present * 2 <= configured {
                    return Err(Failure::NotFormed { present, configured });
                }
                self.raft.propose(Vec::new(), command.encode()).map_err(|_| Failure::Busy)?;
                let index = self.raft.raft.raft_log.last_index();
                self.requests.insert(index, UnderWay { ticket, term: self.raft.raft.term });
            }
            Request::Join(node) => {
                if let Some(m) =
                    self.state.members.iter().find(|m| m.node.id != node.id && m.node.name == node.name)
                {
                    let text = format!(
                        "node {} is named \"{}\" already: choose another name",
                        m.node.id.0, node.name
                    );
                    return Err(Failure::Impossible(text));
                }
                if let Some(old) = self.members.join(node, ticket) {
                    self.out.push_back(Output::Done { ticket: old, result: Err(Failure::Lost) });
                }
            }
            Request::Leave(node) => self.accept_leave(node, ticket)?,
        }
        Ok(())
    }

    fn accept_leave(&mut self, node: NodeId, ticket: Ticket) -> Result<(), Failure> {
        if !self.state.members.iter().any(|m| m.node.id == node) {
            return Err(Failure::Impossible(format!(
                "node {} is no member: see `komainu node list`",
                node.0
            )));
        }
        let others = self.voters().filter(|v| v.node() != node).count();
        if others == 0 {
            return Err(Failure::Impossible(format!(
                "node {} is the only one that votes: stop it instead",
                node.0
            )));
        }
        if let Some(old) = self.members.leave(node, ticket) {
            self.out.push_back(Output::Done { ticket: old, result: Err(Failure::Lost) });
        }
        Ok(())
    }

    /// Everything that a leader looks at after each event.
    pub(super) fn duties(&mut self) {
        if self.transfer.is_some() {
            return self.transfer_duty();
        }
        let leaving: Vec<NodeId> = self.members.leaving().collect();
        for node in leaving {
            self.director.set_leaving(node, true);
        }
        self.members_duty();
        self.ownership_duty();
        self.verdict_duty();
        self.transfer_duty();
    }

    /// Proposes a decision of the leader itself. False when that isn't possible now.
    pub(super) fn propose_own(&mut self, change: Change) -> bool {
        let command = Command::own(self.now.wall_ms, change);
        self.raft.propose(Vec::new(), command.encode()).is_ok()
    }

    fn ownership_duty(&mut self) {
        let changes = {
            let mut pulse = super::lock(&self.pulse);
            self.director.decide(&self.state, &mut pulse, self.now.at)
        };
        for change in changes {
            if !self.propose_own(change.clone()) {
                self.director.not_proposed(&change);
            }
        }
    }

    /// Every node measures the durations in the state; the leader proposes what they end in.
    pub(super) fn look_at_timers(&mut self) {
        if self.timers_due.is_none_or(|at| self.now.at < at) {
            return;
        }
        self.observe_timers(None);
    }

    /// See [`crate::state::Timers::observe`].
    pub(super) fn observe_timers(&mut self, restored_wall_ms: Option<u64>) {
        let due = self.timers.observe(&self.state, self.now.at, restored_wall_ms);
        self.timers_due = due.next;
        if self.is_leader() {
            for change in due.changes {
                self.propose_own(change);
            }
        }
    }

    /// Takes what the checks see where it differs from the verdict: the view of the owner of the group, and where that
    /// is unknown any living balancer's.
    fn verdict_duty(&mut self) {
        let now = self.now.at;
        let verdicts: Vec<Verdict> = {
            let pulse = super::lock(&self.pulse);
            let seen = views(&self.state, &self.verdicts, &pulse, self.me);
            let due = seen.into_iter().filter(|(id, o)| {
                !self.verdicts_asked.get(id).is_some_and(|(h, at)| *h == o.health && now.since(*at) < REPEAT)
            });
            due.take(MAX_VERDICTS)
                .map(|(backend, o)| Verdict { backend, health: o.health, reason: o.reason.clone() })
                .collect()
        };
        if verdicts.is_empty() {
            return;
        }
        for v in &verdicts {
            self.verdicts_asked.insert(v.backend, (v.health, now));
        }
        self.verdicts_asked.retain(|_, (_, at)| now.since(*at) < REPEAT);
        self.propose_own(Change::Health { verdicts });
    }

    /// Hands leadership over when that is due: grants stop, and once nobody but the successor can hold one, `raft` is
    /// told. From then on this leader grants nothing more in its term.
    fn transfer_duty(&mut self) {
        let now = self.now.at;
        let me = self.me.node();
        let Some((target, since)) = self.transfer else {
            if self.state.index < self.term_start || self.raft.raft.has_pending_conf() {
                return;
            }
            let target = self.director.successor(&self.state, &self.lock(), me, self.led_since, now);
            if let Some(target) = target {
                self.director.note_transfer(now);
                self.transfer = Some((target, now));
                let mut pulse = super::lock(&self.pulse);
                for g in self.state.groups.iter().filter(|g| g.owner == Some(me)) {
                    // Only when nobody else can take it and this node goes anyway.
                    pulse.revoke(Ownership { group: g.id, epoch: g.epoch }, now);
                }
                pulse.hold_grants(Some(target));
                drop(pulse);
                self.transfer_duty();
            }
            return;
        };
        let mut pulse = super::lock(&self.pulse);
        if pulse.is_retired() {
            return;
        }
        let lasts = self.config.timing.lease * 2;
        if now.since(since) > lasts {
            // Nothing was said to the successor yet, so this leader may simply go on.
            pulse.hold_grants(None);
            self.transfer = None;
            return;
        }
        let Some(id) = self.state.member(target).map(|m| m.raft_id) else { return };
        let last = self.raft.raft.raft_log.last_index();
        let level = self.raft.raft.prs().get(id).is_some_and(|p| p.matched == last);
        if level && pulse.retire(target, now) {
            drop(pulse);
            self.retired_in = Some(self.raft.raft.term);
            self.raft.transfer_leader(id);
        }
    }
}

/// What to take for each backend, where it differs from the verdict.
fn views<'a>(
    state: &State,
    verdicts: &BTreeMap<BackendId, (GroupId, Health)>,
    pulse: &'a Pulse,
    me: RaftId,
) -> BTreeMap<BackendId, &'a Observation> {
    let mut views: BTreeMap<BackendId, &Observation> = BTreeMap::new();
    let balancers = state.members.iter().filter(|m| m.node.role == Role::Balancer).map(|m| m.node.id);
    let mut sources: Vec<(NodeId, Vec<&Observation>)> = Vec::new();
    for node in balancers {
        if node == me.node() {
            sources.push((node, pulse.differing().take(MAX_VERDICTS).collect()));
        } else if pulse.peer(node).is_some_and(|p| p.alive) {
            sources.push((node, pulse.peer_observations(node).iter().collect()));
        }
    }
    let living: Vec<NodeId> = sources.iter().map(|(n, _)| *n).collect();
    for (node, observations) in sources {
        for o in observations {
            let Some(&(group, verdict)) = verdicts.get(&o.backend) else { continue };
            if o.health == Health::Unknown || verdict == o.health {
                continue;
            }
            let owner = state.group(group).and_then(|g| g.owner).filter(|o| living.contains(o));
            // Before the first verdict anybody's view is better than none.
            if owner.is_none_or(|o| o == node) || verdict == Health::Unknown {
                let keep = owner == Some(node) || !views.contains_key(&o.backend);
                if keep {
                    views.insert(o.backend, o);
                }
            }
        }
    }
    views
}
