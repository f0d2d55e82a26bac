//! Promises: when this node may vote or campaign, and which leaders it helps no more.

use super::Pulse;
use crate::rules::Rule;
use crate::time::Instant;

impl Pulse {
    /// Whether this node may vote or campaign at `now`: no leader that it helped to a lease can still have it.
    pub fn may_promise(&self, now: Instant) -> bool {
        let promised = self.timing.election_min;
        let started = self.sole || now >= self.started_at.after(promised) || Rule::StartWait.is_broken();
        let heard = self.bound_by().is_none_or(|at| now >= at.after(promised)) || Rule::Promise.is_broken();
        let own = now >= self.own_lease_end && self.leading.as_ref().is_none_or(|l| now >= l.lease_end);
        started && heard && own && self.lines.yields_to.is_none()
    }

    /// The earliest instant at which [`Pulse::may_promise`] can hold.
    pub fn promise_free_at(&self) -> Instant {
        let promised = self.timing.election_min;
        let no_wait = self.sole || Rule::StartWait.is_broken();
        let started = if no_wait { Instant::default() } else { self.started_at.after(promised) };
        let heard = self.bound_by().map_or(Instant::default(), |at| at.after(promised));
        started.max(heard).max(self.own_lease_end).max(self.lease_end())
    }

    /// Arrival of the beat that this node's promise runs from; absent when no beat binds it.
    fn bound_by(&self) -> Option<Instant> {
        self.heard_leader_at.filter(|_| !self.bereaved.is_some_and(|b| b.free))
    }

    /// Promises to help no leader below `term`: from now on its beats are neither accepted nor acknowledged. Called when
    /// a vote for `term` is given, or the term is reached otherwise, under the same lock as the check before it.
    pub fn promise(&mut self, term: u64) {
        if self.leading.as_ref().is_some_and(|l| l.term < term) {
            self.step_down();
        }
        if term > self.floor {
            self.floor = term;
            for p in self.peers.values_mut() {
                p.echo = None;
            }
        }
    }
}
