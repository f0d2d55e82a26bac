//! When to campaign.
//!
//! `raft` draws its timeouts from the thread's own generator and counts them in ticks; here they are drawn from the
//! node's seed and end at an instant, so a run can be repeated exactly and no failover waits for a tick.

use std::time::Duration;

use komainu_proto::domain::Role;

use crate::time::Instant;
use crate::timing::Timing;

/// Attempts to be heard that follow each other quickly. A pre-vote costs nobody anything, and the commonest reason for
/// its failure is that another voter's promise ends a few ms later; but a node that is cut off must not go on like that.
const QUICK_ATTEMPTS: u32 = 8;
/// How often the time for an answer is doubled at most: 16 election timeouts.
const MAX_DOUBLINGS: u32 = 4;

/// The election timeout of one node.
#[derive(Debug)]
pub(super) struct Election {
    timing: Timing,
    role: Role,
    random: u64,
    timeout: Duration,
    /// The timeout runs from here, or from the newest beat of a leader if that is later.
    base: Instant,
    attempts: u32,
    /// How often votes were asked for in vain since a leader was there.
    refusals: u32,
}

impl Election {
    pub(super) fn new(timing: Timing, role: Role, seed: u64, now: Instant) -> Self {
        let mut e = Election {
            timing,
            role,
            random: seed,
            timeout: Duration::ZERO,
            base: now,
            attempts: 0,
            refusals: 0,
        };
        e.timeout = e.draw();
        e
    }

    /// When to campaign, if the newest beat of a leader came at `heard`.
    pub(super) fn deadline(&self, heard: Option<Instant>) -> Instant {
        match heard.filter(|at| *at > self.base) {
            // A leader was there since the last attempt: a whole timeout from its last beat on.
            Some(at) => at.after(self.timeout.max(self.timing.election_min)),
            None => self.base.after(self.timeout),
        }
    }

    /// The beginning of the present timeout.
    pub(super) fn since(&self) -> Instant {
        self.base
    }

    /// The deadline has passed and this node campaigns, with a pre-vote or (`real`) with a vote in the balance.
    pub(super) fn campaigned(&mut self, heard: Option<Instant>, now: Instant) {
        if heard.is_some_and(|at| at > self.base) {
            self.attempts = 0;
            self.refusals = 0;
        }
        self.base = now;
        self.attempts += 1;
        self.timeout = if self.attempts <= QUICK_ATTEMPTS {
            // Different for each node and each attempt, or two candidates would meet again and again.
            self.timing.beat / 2 + self.part_of(self.timing.beat)
        } else {
            self.draw()
        };
    }

    /// This node takes part in a real vote now: that takes writes to disk, so it waits a whole timeout.
    pub(super) fn voting(&mut self, now: Instant) {
        self.base = now;
        self.timeout = self.draw();
    }

    /// This node's vote for itself is on disk and the others are asked for theirs. Their disks may be as slow as its own, which
    /// took `written`, or slower: who gave up sooner than they can answer would ask for ever, each time in another term.
    pub(super) fn asking(&mut self, written: Duration, now: Instant) {
        self.base = now;
        self.timeout = (self.draw() + written * 2) * (1 << self.refusals.min(MAX_DOUBLINGS));
        self.refusals += 1;
    }

    /// A leader is known, or this node is it: draw anew for the next time.
    pub(super) fn settled(&mut self, now: Instant) {
        self.base = now;
        self.attempts = 0;
        self.refusals = 0;
        self.timeout = self.draw();
    }

    /// The leader's process has ended, and its node says so: there is nothing to wait for but the promise. In an order, so that
    /// votes don't split: first a balancer that has its flows (`heir`), then other balancers, then witnesses.
    pub(super) fn hasten(&mut self, heir: bool, now: Instant) {
        let beat = self.timing.beat;
        self.base = now;
        self.attempts = 0;
        self.timeout = match (self.role, heir) {
            // The word of the death goes to everybody at once; a voter that has not heard it yet would not answer.
            (Role::Balancer, true) => beat / 16 + self.part_of(beat / 8),
            (Role::Balancer, false) => beat / 4 + self.part_of(beat / 4),
            (Role::Witness, _) => beat + beat / 2 + self.part_of(beat),
        };
    }

    /// Not before `earliest`: beats that came during a stall must be looked at first.
    pub(super) fn postpone(&mut self, earliest: Instant) {
        if self.base.after(self.timeout) < earliest {
            self.base = earliest;
            self.timeout = self.part_of(self.timing.beat);
        }
    }

    /// A timeout in `[E_min, E_max)`. Witnesses take the upper third, so that a balancer normally leads.
    fn draw(&mut self) -> Duration {
        let width = self.timing.election_max - self.timing.election_min;
        let lower = width * 2 / 3;
        match self.role {
            Role::Balancer => self.timing.election_min + self.part_of(lower),
            Role::Witness => self.timing.election_min + lower + self.part_of(width - lower),
        }
    }

    /// A random part of a duration: SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
    /// OOPSLA 2014).
    fn part_of(&mut self, d: Duration) -> Duration {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        Duration::from_nanos(((u128::from(z) * d.as_nanos()) >> 64) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant(ms * 1_000_000)
    }

    #[test]
    fn timeouts_are_within_their_range_and_witnesses_are_later() {
        let t = Timing::default();
        for seed in 0..1000 {
            let deadline = |role| Election::new(t, role, seed, at(0)).deadline(None);
            let (b, w) = (deadline(Role::Balancer), deadline(Role::Witness));
            assert!(at(120) <= b && b < at(160), "{b:?}");
            assert!(at(160) <= w && w < at(180), "{w:?}");
        }
    }

    #[test]
    fn a_beat_starts_the_timeout_anew() {
        let mut e = Election::new(Timing::default(), Role::Balancer, 1, at(0));
        let first = e.deadline(None);
        assert_eq!(e.deadline(Some(at(50))).since(at(50)), first.since(at(0)));
        e.campaigned(Some(at(50)), at(200));
        assert!(e.deadline(Some(at(50))) <= at(230));
        // A quick second attempt is none when a leader has shown up again.
        assert!(e.deadline(Some(at(210))) >= at(330));
    }

    #[test]
    fn after_a_death_that_was_told_nobody_waits_and_heirs_are_first() {
        for seed in 0..1000 {
            let after = |role, heir| {
                let mut e = Election::new(Timing::default(), role, seed, at(0));
                e.hasten(heir, at(1000));
                e.deadline(Some(at(1000))).since(at(1000))
            };
            let (heir, other) = (after(Role::Balancer, true), after(Role::Balancer, false));
            let witness = after(Role::Witness, false);
            assert!(heir < Duration::from_millis(4) && heir < other, "{heir:?} {other:?}");
            assert!(other < witness && witness < Duration::from_millis(50), "{other:?} {witness:?}");
        }
    }

    #[test]
    fn a_candidate_gives_slow_disks_time_and_more_the_next_time() {
        let ms = Duration::from_millis;
        let mut e = Election::new(Timing::default(), Role::Balancer, 1, at(0));
        let wait = |e: &mut Election| {
            e.asking(ms(300), at(1000));
            e.deadline(None).since(at(1000))
        };
        assert!((ms(720)..ms(760)).contains(&wait(&mut e)));
        assert!((ms(1440)..ms(1520)).contains(&wait(&mut e)));
        (0..100).for_each(|_| assert!(wait(&mut e) < ms(760 * 16)));
        e.settled(at(1000));
        assert!((ms(720)..ms(760)).contains(&wait(&mut e)));
    }

    #[test]
    fn a_node_that_is_cut_off_calms_down() {
        let mut e = Election::new(Timing::default(), Role::Balancer, 1, at(0));
        (0..QUICK_ATTEMPTS + 1).for_each(|_| e.campaigned(None, at(0)));
        assert!(e.deadline(None) >= at(120));
    }
}
