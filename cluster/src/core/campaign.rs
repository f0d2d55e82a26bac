//! Votes: when this node asks for them, and which it gives.

use std::sync::Arc;

use raft::StateRole;
use raft::eraftpb::{Message, MessageType};

use super::{Core, lock};
use crate::pulse::Pulse;
use crate::time::Instant;

/// Context by which `raft` marks votes asked for in a leadership transfer.
const CAMPAIGN_TRANSFER: &[u8] = b"CampaignTransfer";

impl Core {
    /// When to campaign; absent while this node can't.
    pub(super) fn campaign_at(&self, pulse: &Pulse) -> Option<Instant> {
        if !self.raft.raft.promotable() || self.waits_for_disk() || self.disk.has_failed() {
            return None;
        }
        if pulse.yields_to().is_some() {
            return None;
        }
        if pulse.is_sole() || self.alone.at_once {
            // There is nobody whose beat could come.
            return Some(self.election.since().after(self.config.timing.beat / 4));
        }
        Some(self.election.deadline(pulse.heard_leader_at()).max(pulse.promise_free_at()))
    }

    /// A vote or pre-vote is asked of this node. Only if its promise allows, `raft` gets to see it; the promise not to
    /// help lower terms is made under the same lock.
    pub(super) fn vote_asked(&mut self, message: Message) {
        let pulse = Arc::clone(&self.pulse);
        let mut pulse = lock(&pulse);
        // The leader that asked for this transfer has given up its lease first.
        let transfer =
            message.context == CAMPAIGN_TRANSFER && message.get_msg_type() == MessageType::MsgRequestVote;
        if !transfer && !pulse.may_promise(self.now.at) {
            return;
        }
        if message.get_msg_type() == MessageType::MsgRequestPreVote && self.disk.owes_promise() {
            // Another vote would have to wait behind the one that is being written, whose answer may be all that is missing.
            return;
        }
        // `raft` has a rule of its own, counted in ticks since it heard the leader; the promise is the stricter one.
        self.raft.raft.election_elapsed = self.raft.raft.election_timeout();
        let term_before = self.raft.raft.term;
        // Errors are about messages that don't fit the state: then there is nothing to do.
        let _ = self.raft.step(message);
        pulse.promise(self.raft.raft.term);
        if self.raft.raft.term > term_before {
            self.election.voting(self.now.at);
        }
    }

    /// A message that may make this node a candidate.
    pub(super) fn may_campaign(&mut self, message: Message) {
        let pulse = Arc::clone(&self.pulse);
        let mut pulse = lock(&pulse);
        let transfer = message.get_msg_type() == MessageType::MsgTimeoutNow;
        if !transfer && !message.reject && !pulse.may_promise(self.now.at) {
            return;
        }
        if transfer && (self.is_taking_snapshot() || !self.is_supplied(&message, &pulse)) {
            return;
        }
        let term_before = self.raft.raft.term;
        let _ = self.raft.step(message);
        pulse.promise(self.raft.raft.term);
        if self.raft.raft.state == StateRole::Candidate && self.raft.raft.term > term_before {
            self.election.voting(self.now.at);
        }
    }

    /// Whether what this node holds lasts for the campaign that it is told to begin: as a candidate it takes no grant any
    /// more. Its leader goes on granting and telling it, so a moment later it may; but it must not let that one wait for
    /// ever.
    fn is_supplied(&mut self, told: &Message, pulse: &Pulse) -> bool {
        let (now, timing) = (self.now.at, &self.config.timing);
        let (_, since) = *self.told_to_lead.insert(match self.told_to_lead {
            Some((term, since)) if term == told.term => (term, since),
            _ => (told.term, now),
        });
        let enough = timing.longest_lease().saturating_sub(timing.beat * 2);
        now.since(since) >= timing.beat * 4 || pulse.shortest_held(now).is_none_or(|left| left >= enough)
    }

    /// Whether this node must not campaign before something is on disk.
    fn waits_for_disk(&self) -> bool {
        let log = &self.raft.raft.raft_log;
        // The first write makes the store; before that nothing promised would last. And a voter that needs no vote but
        // its own leads at once, for which `raft` wants the whole log on disk.
        // Nobody hears of a vote before it is on disk, and the next one would be written after it.
        self.disk.newest > 0 && self.disk.persisted == 0
            || self.disk.owes_promise()
            || self.is_taking_snapshot()
            || self.disk.persisted < self.alone.base_write
            || self.conf.voters.len() == 1 && log.persisted < log.last_index()
    }

    /// Whether the log begins after what `raft` takes for applied, because a snapshot is not on disk yet. `raft` looks between there
    /// and what is committed for changes of the voters before it campaigns, and panics where that is not in the log.
    fn is_taking_snapshot(&self) -> bool {
        let log = &self.raft.raft.raft_log;
        log.applied + 1 < log.first_index()
    }

    /// A term or vote is on disk. Where votes were waiting for that, the time for the others' answer begins now.
    pub(super) fn promise_is_safe(&mut self) {
        let now = self.now.at;
        match self.raft.raft.state {
            StateRole::Candidate => self.election.asking(now.since(self.promised_at), now),
            StateRole::Follower if self.raft.raft.leader_id == raft::INVALID_ID => self.election.voting(now),
            _ => {}
        }
    }

    /// The leader that this node follows may have died: then somebody should follow it up at once.
    pub(super) fn heed_death(&mut self) {
        let pulse = Arc::clone(&self.pulse);
        let pulse = lock(&pulse);
        let at = pulse.bereaved_at();
        if at.is_some() && at != self.bereaved_at {
            self.election.hasten(pulse.is_heir(), self.now.at);
        }
        self.bereaved_at = at;
    }

    pub(super) fn maybe_campaign(&mut self) {
        let pulse = Arc::clone(&self.pulse);
        let mut pulse = lock(&pulse);
        if self.campaign_at(&pulse).is_none_or(|at| self.now.at < at) || !pulse.may_promise(self.now.at) {
            return;
        }
        let heard = pulse.heard_leader_at();
        if pulse.is_resigning() && self.conf.voters.len() > 1 {
            // It would only have to be replaced again.
            self.election.settled(self.now.at);
            return;
        }
        self.election.campaigned(heard, self.now.at);
        if self.raft.raft.state == StateRole::Candidate {
            // The real vote came to nothing. A new one begins with a pre-vote like every other.
            let term = self.raft.raft.term;
            self.raft.raft.become_follower(term, raft::INVALID_ID);
        }
        self.keep_parity();
        let _ = self.raft.campaign();
        pulse.promise(self.raft.raft.term);
    }

    /// A vote asked for, or its answer, may be lost: asks again each beat, as long as this node is a candidate in that term.
    pub(super) fn ask_again(&mut self) {
        let raft = &self.raft.raft;
        if raft.state != StateRole::Candidate || self.asked.first().is_some_and(|m| m.term != raft.term) {
            self.asked.clear();
        }
        if !self.asked.is_empty() && self.now.at >= self.ask_again_at {
            self.send(self.asked.clone());
        }
    }
}
