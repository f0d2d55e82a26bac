//! Leadership: won, lost, handed over; and groups taken back from their owners.

use komainu_proto::domain::NodeId;

use super::leading::Leading;
use super::{Ownership, Pulse};
use crate::raft::RaftId;
use crate::rules::Rule;
use crate::time::Instant;

impl Pulse {
    /// This node has won `term`.
    pub(crate) fn lead(&mut self, term: u64, voters: Vec<RaftId>, now: Instant) {
        self.advance(now);
        self.promise(term);
        self.leading = Some(Leading::new(term, self.now, voters));
        self.leader = None;
        self.beat_now();
    }

    /// The Raft thread is here. Answers whether this node leads.
    pub(crate) fn attend(&mut self, now: Instant) -> bool {
        self.attended_at = self.attended_at.max(now);
        self.is_leading()
    }

    /// The first entry of this leader's term is applied: it may grant.
    pub(crate) fn open(&mut self, now: Instant) {
        self.advance(now);
        if let Some(l) = &mut self.leading
            && !l.open
        {
            l.open = true;
            self.renew();
            self.beat_now();
        }
    }

    /// This node leads no more. What it granted itself runs to its end, and until then it votes for nobody.
    pub(crate) fn step_down(&mut self) {
        if let Some(l) = self.leading.take() {
            self.own_lease_end = self.own_lease_end.max(l.lease_end);
            self.prompt();
        }
    }

    /// Leadership is to be handed to `target`: grants to all others stop (and with `None` go on again).
    pub(crate) fn hold_grants(&mut self, target: Option<NodeId>) {
        if let Some(l) = &mut self.leading
            && !Rule::RetireFirst.is_broken()
        {
            l.only_to = target;
        }
    }

    /// Before `MsgTimeoutNow`: from now on, and for the rest of this term, nobody but `target` is granted anything. Refused
    /// while this node answers for a group, or any grant to a node other than `target` may be in force.
    ///
    /// The message may be delivered at any later time, and lets `target` win the next term without regard to promises.
    /// That can only ever meet grants of `target`'s own: this node must grant nobody else anything in this term, whether
    /// the transfer succeeds or not. `target` itself goes on being granted what it owns, so that handing leadership over,
    /// however long it takes, leaves no moment without an owner.
    pub(crate) fn retire(&mut self, target: NodeId, now: Instant) -> bool {
        self.advance(now);
        let answers = self.holdings.held(self.now).next().is_some() || !self.lane_in_force();
        let Some(l) = &mut self.leading else { return false };
        if Rule::RetireFirst.is_broken() {
            return true;
        }
        if answers || l.last_grant_end(target) > self.now {
            return false;
        }
        l.retired = Some(target);
        // The successor campaigns as soon as it is told, and then takes no grant any more until it has won: the one that it
        // has by then should be new.
        self.renew();
        self.beat_now();
        true
    }

    /// Stops granting a group: its owner is told to release it, or gives it up at once when it is this node.
    pub(crate) fn revoke(&mut self, o: Ownership, now: Instant) {
        self.advance(now);
        let Some(l) = &mut self.leading else { return };
        if l.revoked.insert(o) {
            if self.holdings.assignments().get(&o.group).is_some_and(|a| a.node == Some(self.identity.id)) {
                self.holdings.release(o);
                self.refresh();
            }
            self.beat_now();
        }
    }

    /// Whether nobody can answer for a group under `epoch` any more: released, or every grant has run out. Only a
    /// leader knows, and only after [`Pulse::revoke`].
    pub(crate) fn is_free(&self, o: Ownership, now: Instant) -> bool {
        let Some(l) = self.leading.as_ref() else { return false };
        if Rule::ReleaseFirst.is_broken() {
            return true;
        }
        // Own old grants (of a term before) are in the lane too.
        if self.holdings.answers(o.group, now) || !self.lane_in_force() {
            return false;
        }
        l.granted(o.group).is_none_or(|g| {
            g.until <= now
                || self
                    .peers
                    .get(&g.node)
                    .is_some_and(|p| p.has_released(Ownership { epoch: g.epoch, ..o }, g.instance))
        })
    }

    /// Whether the owner itself says that it has given the group up for good.
    pub(crate) fn is_given_up(&self, node: NodeId, o: Ownership) -> bool {
        if node == self.identity.id {
            return self.holdings.has_released(o);
        }
        self.peers
            .get(&node)
            .and_then(|p| p.heard.as_ref())
            .is_some_and(|h| h.beat.released.iter().any(|r| r.group == o.group && r.epoch >= o.epoch))
    }

    /// Latest end, on this node's clock, of any grant that it gave to `node` in this term.
    pub(crate) fn last_grant_to(&self, node: NodeId) -> Instant {
        self.leading.as_ref().map_or(Instant::default(), |l| l.last_grant_to(node))
    }
}
