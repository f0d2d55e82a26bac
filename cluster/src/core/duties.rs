//! What a leader decides, and what it is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use komainu_proto::domain::{BackendId, GroupId, Health, NodeId, Role};
use raft::eraftpb::{Message, MessageType};

use super::{Core, Failure, HandedOver, MAX_REQUESTS, Now, Output, Request, Ticket, UnderWay};
use crate::api::{NodeIdentity, Observation};
use crate::pulse::{Ownership, Pulse};
use crate::raft::RaftId;
use crate::state::{Change, Command, MAX_MEMBERS, MAX_VERDICTS, Outcome, State, Verdict};
use crate::time::Instant;

/// How long to wait before a verdict that was proposed and hasn't shown up is proposed again.
const REPEAT: Duration = Duration::from_millis(500);

/// How long a leader that goes looks for a moment in which the disks are quick enough for a change of leader without a gap.
/// Less than an orderly stop takes at most.
const TRIALS: Duration = Duration::from_secs(3);
/// How long to wait after a slow write before the next trial.
const TRIAL_PAUSE: Duration = Duration::from_millis(100);

/// An entry by which a leader finds out how quickly the voters write.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trial {
    /// When the first one was made.
    since: Instant,
    /// When this one was made.
    at: Instant,
    entry: Option<u64>,
    took: Option<Duration>,
}

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
        if self.transfer.is_some() || self.requests.len() >= MAX_REQUESTS || self.disk.has_failed() {
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
                let under_way = UnderWay { ticket, term: self.raft.raft.term };
                if let Some(old) = self.requests.insert(index, under_way) {
                    // From an earlier term: the entry that stood here is gone.
                    self.out.push_back(Output::Done { ticket: old.ticket, result: Err(Failure::Lost) });
                }
            }
            Request::Join { node, who } => self.accept_join(node, who, ticket)?,
            Request::Leave { node, who } => self.accept_leave(node, who, ticket)?,
        }
        Ok(())
    }

    /// What can't come to a good end is refused at once: a join waits until the node is heard.
    fn accept_join(&mut self, node: NodeIdentity, who: String, ticket: Ticket) -> Result<(), Failure> {
        let members = || self.state.members.iter().map(|m| &m.node);
        if members().any(|m| *m == node) {
            // Repeated after its answer was lost.
            let outcome = Outcome { index: self.state.index, ..Outcome::default() };
            self.out.push_back(Output::Done { ticket, result: Ok(outcome) });
            return Ok(());
        }
        let impossible = |text: String| Err(Failure::Impossible(text));
        if let Some(m) = members().find(|m| m.id == node.id) {
            return impossible(format!(
                "node {} is a member already, named \"{}\": give the new node a number of its own",
                m.id.0, m.name
            ));
        }
        if let Some(m) = members().find(|m| m.name == node.name) {
            return impossible(format!(
                "node {} is named \"{}\" already: choose another name",
                m.id.0, m.name
            ));
        }
        if let Some(m) = members().find(|m| m.address == node.address) {
            return impossible(format!(
                "node {} (\"{}\") is at {} already: give the address of the new node",
                m.id.0, m.name, m.address
            ));
        }
        if members().count() + self.state.joining.iter().filter(|j| j.node.id != node.id).count()
            >= MAX_MEMBERS
        {
            return impossible(format!(
                "there are {MAX_MEMBERS} members already, those who are to join included: remove one first"
            ));
        }
        let heard = self.lock().peer(node.id).filter(|p| p.alive).map(|p| p.identity);
        if let Some(said) = heard.filter(|said| **said != node) {
            return impossible(format!(
                "node {} says of itself that it is {} \"{}\" at {}: join it as that, or correct its node file",
                said.id.0, said.role, said.name, said.address
            ));
        }
        if self.state.joining.iter().all(|j| j.node != node) {
            let change = Change::NodeJoin { node: node.clone() };
            self.propose_for(who, change)?;
        }
        if let Some(old) = self.members.join(node.id, ticket) {
            self.out.push_back(Output::Done { ticket: old, result: Err(Failure::Lost) });
        }
        Ok(())
    }

    fn accept_leave(&mut self, node: NodeId, who: String, ticket: Ticket) -> Result<(), Failure> {
        let awaited = self.state.joining.iter().any(|j| j.node.id == node);
        if !awaited && !self.state.members.iter().any(|m| m.node.id == node) {
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
        if awaited || self.state.leaving.iter().all(|l| l.node != node) {
            self.propose_for(who, Change::NodeLeave { node })?;
        }
        if let Some(old) = self.members.leave(node, ticket) {
            self.out.push_back(Output::Done { ticket: old, result: Err(Failure::Lost) });
        }
        Ok(())
    }

    /// Everything that a leader looks at after each event.
    pub(super) fn duties(&mut self) {
        if self.disk.has_failed() {
            // What it decided it would never see applied: a group that it took back would stay without an owner.
            return;
        }
        if self.transfer.is_some() {
            return self.transfer_duty();
        }
        self.director.set_leaving(self.state.leaving.iter().map(|l| l.node).collect());
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

    /// Proposes what an operator asked for.
    fn propose_for(&mut self, who: String, change: Change) -> Result<(), Failure> {
        let command = Command { who, ..Command::own(self.now.wall_ms, change) };
        self.raft.propose(Vec::new(), command.encode()).map_err(|_| Failure::Busy)
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
            let held = self.first_verdicts.held(&self.state, &seen, now);
            let due = seen.into_iter().filter(|(id, o)| {
                !held.contains(id)
                    && !self
                        .verdicts_asked
                        .get(id)
                        .is_some_and(|(h, at)| *h == o.health && now.since(*at) < REPEAT)
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

    /// Hands leadership over when that is due: first nobody but the successor is granted anything any more, and once no
    /// other grant can be in force, the successor is told.
    fn transfer_duty(&mut self) {
        let now = self.now.at;
        let Some((target, since)) = self.transfer else { return self.begin_transfer() };
        if self.handed_over.is_some_and(|h| h.term == self.raft.raft.term) {
            return;
        }
        let pulse = Arc::clone(&self.pulse);
        let mut pulse = super::lock(&pulse);
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
            self.handed_over = Some(HandedOver { to: id, term: self.raft.raft.term, at: now });
            self.raft.transfer_leader(id);
        }
    }

    fn begin_transfer(&mut self) {
        let now = self.now.at;
        let me = self.me.node();
        if self.state.index < self.term_start
            || self.raft.raft.has_pending_conf()
            || self.reconfigured_lately()
        {
            return;
        }
        let pulse = Arc::clone(&self.pulse);
        let held = super::lock(&pulse);
        let Some(target) = self.director.successor(&self.state, &held, me, self.led_since, now) else {
            self.trial = None;
            return;
        };
        let (goes, living) =
            (held.is_resigning(), held.peers().filter(|p| p.alive).map(|p| p.raft_id.0).collect());
        drop(held);
        if !self.writes_are_quick(goes, living) {
            return;
        }
        self.director.note_transfer(now);
        self.transfer = Some((target, now));
        let mut pulse = super::lock(&pulse);
        for g in self.state.groups.iter().filter(|g| g.owner == Some(me)) {
            // Only when nobody else can take it and this node goes anyway.
            pulse.revoke(Ownership { group: g.id, epoch: g.epoch }, now);
        }
        pulse.hold_grants(Some(target));
        drop(pulse);
        self.transfer_duty();
    }

    /// Whether a change of leader can be expected to end while the grants given before it last: it takes three writes, one
    /// after the other. Finds out by an entry that says nothing. A leader that goes anyway doesn't wait for ever.
    fn writes_are_quick(&mut self, goes: bool, living: BTreeSet<u64>) -> bool {
        let now = self.now.at;
        let mut trial = self.trial.unwrap_or(Trial { since: now, at: now, entry: None, took: None });
        if goes && now.since(trial.since) >= TRIALS {
            return true;
        }
        let mut again = trial.entry.is_none();
        if let Some(entry) = trial.entry {
            let raft = &self.raft.raft;
            let there = |id: &u64| raft.prs().get(*id).is_some_and(|p| p.matched >= entry);
            let mut voters = self.conf.voters.iter().filter(|id| **id == self.me.0 || living.contains(id));
            if trial.took.is_none() && voters.all(there) && raft.raft_log.committed >= entry {
                trial.took = Some(now.since(trial.at));
            }
            if trial.took.is_some_and(|took| took <= self.config.timing.lease / 4)
                && now.since(trial.at) < TRIAL_PAUSE
            {
                return true;
            }
            // A good answer is soon too old, and after a bad one the disk is given a moment.
            again = trial.took.is_some() && now.since(trial.at) >= TRIAL_PAUSE;
        }
        if again && self.raft.propose(Vec::new(), Vec::new()).is_ok() {
            trial = Trial { at: now, entry: Some(self.raft.raft.raft_log.last_index()), took: None, ..trial };
        }
        self.trial = Some(trial);
        false
    }

    /// Each beat after leadership was handed over: says it again, for a datagram may be lost. A successor that hasn't taken
    /// over by the time in which a dead leader would be replaced won't; then this node leads no more, and an election
    /// follows.
    pub(super) fn repeat_hand_over(&mut self) {
        let now = self.now.at;
        let Some(h) = self.handed_over.filter(|h| h.term == self.raft.raft.term && self.is_leader()) else {
            return;
        };
        let gone = self.lock().peer(RaftId(h.to).node()).is_none_or(|p| !p.alive);
        if gone || now.since(h.at) >= self.config.timing.election_max {
            return self.raft.raft.become_follower(h.term, raft::INVALID_ID);
        }
        let mut message = Message { to: h.to, from: self.me.0, term: h.term, ..Message::default() };
        message.set_msg_type(MessageType::MsgTimeoutNow);
        self.send(vec![message]);
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
