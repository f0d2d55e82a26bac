//! What beats and the clock bring.

use std::net::SocketAddr;

use komainu_proto::domain::NodeId;

use super::peer::Peer;
use super::{Beat, Contact, Echo, FAILED_FOR, Followed, Ignored, MAX_PEERS, Ownership, Pulse, UNATTENDED};
use crate::raft::RaftId;
use crate::time::Instant;

impl Pulse {
    /// A beat has arrived from `source`.
    ///
    /// # Errors
    /// It was not taken in; counted.
    pub fn handle_beat(&mut self, source: SocketAddr, beat: Beat, now: Instant) -> Result<(), Ignored> {
        self.advance(now);
        let taken = self.take_beat(source, beat);
        if let Err(why) = taken {
            *self.ignored.entry(why).or_default() += 1;
        }
        taken
    }

    /// Time has passed: due beats, due renewals.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.advance(now);
        if self.now >= self.next_beat_at {
            for p in self.peers.values_mut().filter(|p| p.wanted || p.heard.is_some()) {
                p.beat_due = true;
            }
            // Beats missed during a stall are not made up for.
            let on_time = self.next_beat_at.after(self.timing.beat);
            self.next_beat_at = if on_time > self.now { on_time } else { self.now.after(self.timing.beat) };
            // A silent node makes no event; who decides about ownership must look at it again.
            self.prompt();
            self.give_way();
        }
        self.renew();
    }

    fn take_beat(&mut self, source: SocketAddr, beat: Beat) -> Result<(), Ignored> {
        let (from, node) = (beat.from, beat.from.node());
        if node == self.identity.id {
            return Err(Ignored::OwnId);
        }
        if self.cluster != 0 && beat.cluster != 0 && beat.cluster != self.cluster {
            if self.foreign.len() < MAX_PEERS || self.foreign.contains_key(&node) {
                self.foreign.insert(node, from);
                self.refused_at.insert(node, self.now);
            }
            return Err(Ignored::OtherCluster);
        }
        self.foreign.remove(&node);
        if self.cluster != 0 && beat.cluster != 0 && beat.line != self.lines.own {
            self.meet(node, &beat);
            return Err(Ignored::OtherLine);
        }
        if !self.timing.differences(&beat.timing).is_empty() {
            if self.mistimed.len() < MAX_PEERS || self.mistimed.contains_key(&node) {
                self.mistimed.insert(node, (beat.identity.name.clone(), beat.timing));
                self.refused_at.insert(node, self.now);
            }
            return Err(Ignored::OtherTiming);
        }
        self.mistimed.remove(&node);
        self.refused_at.remove(&node);
        if !self.peers.contains_key(&node) && self.peers.len() >= MAX_PEERS && !self.forget_a_stranger() {
            return Err(Ignored::TooMany);
        }
        self.outlive(node);
        let silent_after = self.silent_after();
        let peer = self.peers.entry(node).or_insert_with(|| Peer::new(node, source));
        if !peer.wanted {
            peer.address = beat.identity.address;
        }
        let before = peer.heard.as_ref().map(|h| prompting(&h.beat));
        let after = prompting(&beat);
        let (leading, answer) = (beat.leading, beat.answer);
        let (term, sent, instance, echo) = (beat.term, beat.sent, beat.instance, beat.echo);
        let (contact, grants, releases) = (beat.contact, beat.grants.clone(), beat.releases.clone());
        if !peer.take(beat, self.now, silent_after) {
            return Err(Ignored::Old);
        }
        if before.as_ref() != Some(&after) {
            self.prompt();
        }
        if leading && self.accepts(term) {
            if self.leading.is_some() {
                self.step_down();
            }
            if self.leader != Some((from, term)) {
                self.prompt();
            }
            self.floor = term;
            self.leader = Some((from, term));
            self.heard_leader_at = Some(self.now);
            self.followed = Some(Followed { instance, sent });
            self.bereaved = None;
            self.follow(node, Echo { instance, stamp: sent, term }, contact, &grants, &releases);
        }
        if let (Some(l), Some(echo)) = (&mut self.leading, echo)
            && echo.instance == self.instance
            && echo.term == l.term
        {
            l.acknowledge(from, echo.stamp, self.now);
        }
        if !answer && (leading || self.leading.is_some()) {
            self.peers.get_mut(&node).expect("it was put in above").answer_due = true;
        }
        self.renew();
        Ok(())
    }

    /// A leader's beat was accepted: acknowledge it, and take what it grants.
    fn follow(
        &mut self,
        node: NodeId,
        echo: Echo,
        contact: Option<Contact>,
        grants: &[Ownership],
        releases: &[Ownership],
    ) {
        for p in self.peers.values_mut() {
            p.echo = (p.id == node).then_some(echo);
        }
        for &o in releases {
            self.holdings.release(o);
        }
        if let Some(c) = contact
            .filter(|c| c.instance == self.instance && c.stamp >= self.started_at && c.stamp <= self.now)
        {
            let until = c.stamp.after(c.lasts);
            self.holdings.contact(until);
            for &o in grants {
                self.holdings.grant(o, until);
            }
        }
    }

    /// A leader that can't write, or whose Raft thread hangs in a write, renews leases and decides nothing: a group whose
    /// owner dies would stay without one. It leads no more, and a node whose store has failed wants its groups taken,
    /// provided that the others can agree on something without it. Where they can't, as in a pair, going on is better.
    fn give_way(&mut self) {
        let wait = if self.leading.is_some() { FAILED_FOR * 2 } else { FAILED_FOR };
        let failed = self.store_failed_at.is_some_and(|at| self.now.since(at) >= wait);
        let unattended = self.leading.is_some() && self.now.since(self.attended_at) >= UNATTENDED;
        if !failed && !unattended || !self.others_suffice() {
            return;
        }
        self.step_down();
        if failed {
            self.set_resigning(true);
        }
    }

    /// Whether the other voters that are alive and well are a quorum.
    fn others_suffice(&self) -> bool {
        let well = |id: &RaftId| {
            *id != self.me
                && self.peers.get(&id.node()).is_some_and(|p| {
                    p.alive(self.now, self.silent_after())
                        && p.heard.as_ref().is_some_and(|h| h.beat.from == *id && !h.beat.resigning)
                })
        };
        self.voters.iter().filter(|id| well(id)).count() > self.voters.len() / 2
    }

    fn accepts(&self, term: u64) -> bool {
        term >= self.floor && self.leading.as_ref().is_none_or(|l| term > l.term)
    }

    fn forget_a_stranger(&mut self) -> bool {
        let silent =
            self.peers.values().find(|p| !p.wanted && !p.alive(self.now, self.silent_after())).map(|p| p.id);
        silent.and_then(|id| self.peers.remove(&id)).is_some()
    }
}

/// What of a beat the Raft thread wants to know at once.
fn prompting(b: &Beat) -> (RaftId, u64, bool, bool, Vec<Ownership>, Option<NodeId>) {
    (b.from, b.cluster, b.health.fit(), b.resigning, b.released.clone(), b.support)
}
