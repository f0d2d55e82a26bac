//! What is to be done: leases, announcements, beats.

use std::collections::BTreeSet;
use std::time::Duration;

use komainu_proto::domain::{BackendId, NodeId};

use super::leading::Granted;
use super::{Beat, Contact, DEAF_BEATS, MAX_OBSERVATIONS, MAX_OWNERSHIPS, Output, Ownership, Pulse};
use crate::api::Observation;
use crate::rules::Rule;
use crate::time::Instant;

impl Pulse {
    /// The next thing to do. The call says that the one before has been done.
    pub fn poll_output(&mut self) -> Option<Output> {
        if self.in_hand.take().is_some() && self.lane_in_force() {
            // A lease that was given up is out of the lane: what waited for that can go on.
            self.prompt();
        }
        if let Some(o) = self.out.pop_front() {
            match &o {
                Output::Lease { group, lease } if lease.answer_until <= self.now => {
                    self.in_hand = Some(*group)
                }
                Output::Prompt => self.prompted = false,
                _ => {}
            }
            return Some(o);
        }
        let due = self.peers.values().find(|p| p.beat_due || p.answer_due)?.id;
        let send = self.compose(due);
        // What a beat grants stands in the will before it leaves.
        match self.amended_will() {
            Some(will) => {
                self.out.push_front(send);
                Some(Output::Will(Box::new(will)))
            }
            None => Some(send),
        }
    }

    /// When [`Pulse::handle_timeout`] is to be called at the latest.
    pub fn next_deadline(&self) -> Instant {
        self.next_beat_at
    }

    pub(super) fn compose(&mut self, to: NodeId) -> Output {
        let now = self.now;
        let silent_after = self.silent_after();
        let held: Vec<_> = self.holdings.held(now).collect();
        // A leader decides by its own, and its grants may need the room.
        let told = self.told_by_owners().filter(|_| self.leading.is_none()).collect();
        let (contact, grants, releases) = self.grants_to(to, now, silent_after);
        let peer = self.peers.get_mut(&to).expect("only known peers are due");
        let answer = !peer.beat_due;
        peer.beat_due = false;
        peer.answer_due = false;
        let observations: Vec<Observation> = rotate(&self.differing, peer.rotation, MAX_OBSERVATIONS)
            .filter_map(|id| self.observations.get(&id).cloned())
            .collect();
        let mut beat = Beat {
            from: self.me,
            instance: self.instance,
            cluster: self.cluster,
            sent: now,
            answer,
            term: self.floor,
            leading: self.leading.is_some(),
            leader: if self.leading.is_some() { Some(self.me) } else { self.leader.map(|l| l.0) },
            echo: peer.echo,
            identity: self.identity.clone(),
            version: self.version.clone(),
            timing: self.timing,
            applied: self.applied,
            installed: self.holdings.installed(),
            health: self.health.clone(),
            resigning: self.resigning,
            support: self.support,
            contact,
            grants,
            releases,
            released: self.holdings.released().collect(),
            held,
            observations,
            followers: self.followers.clone(),
            told,
            line: self.lines.own,
            met: self.lines.answer_to(to),
        };
        if !beat.observations.is_empty() {
            let (_, kept) = beat.encode();
            beat.observations.truncate(kept);
            peer.rotation = peer.rotation.wrapping_add(kept);
        }
        Output::Send { to, address: peer.address, beat: Box::new(beat) }
    }

    /// What a leader's beat to `to` grants, and what it asks back. Grants are noted before they leave.
    fn grants_to(
        &mut self,
        to: NodeId,
        now: Instant,
        silent_after: Duration,
    ) -> (Option<Contact>, Vec<Ownership>, Vec<Ownership>) {
        let nothing = (None, Vec::new(), Vec::new());
        let Some(l) = &mut self.leading else { return nothing };
        let owned: Vec<Ownership> = self
            .holdings
            .assignments()
            .iter()
            .filter(|(_, a)| a.node == Some(to))
            .map(|(&group, a)| Ownership { group, epoch: a.epoch })
            .collect();
        let (releases, owned): (Vec<_>, Vec<_>) = owned.into_iter().partition(|o| l.revoked.contains(o));
        let peer = &self.peers[&to];
        let deaf_after = self.timing.beat * DEAF_BEATS;
        let deaf = peer.heard.as_ref().is_none_or(|h| !l.is_followed_by(h.beat.from, now, deaf_after));
        if !l.may_grant(now) || !peer.alive(now, silent_after) || deaf {
            return (None, Vec::new(), releases);
        }
        let end = if Rule::GrantWithinLease.is_broken() { now.after(self.timing.lease) } else { l.lease_end };
        let Some(contact) = peer.limit(end, |left| self.timing.on_another_clock(left)) else {
            return (None, Vec::new(), releases);
        };
        // Contact alone lets a node go on forwarding what still reaches it; it answers for nothing by that.
        let most = if l.grants_to(to) { MAX_OWNERSHIPS } else { 0 };
        let grants: Vec<Ownership> = owned.into_iter().take(most).collect();
        for o in &grants {
            let granted =
                Granted { node: to, epoch: o.epoch, instance: contact.instance, until: l.lease_end };
            l.note_grant(o.group, granted);
            self.granted_until = self.granted_until.max(l.lease_end);
        }
        (Some(contact), grants, releases)
    }
}

/// At most `n` of `ids`, starting at the `start`th and going round.
fn rotate(ids: &BTreeSet<BackendId>, start: usize, n: usize) -> impl Iterator<Item = BackendId> + '_ {
    let len = ids.len();
    let skip = if len == 0 { 0 } else { start % len };
    ids.iter().copied().skip(skip).chain(ids.iter().copied().take(skip)).take(n)
}
