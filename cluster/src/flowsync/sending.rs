//! To one peer: what waits, what is under way, what is to be sent again.

use std::collections::VecDeque;
use std::time::Duration;

use komainu_proto::domain::NodeId;

use super::wire::Writer;
use super::{
    BURST, Change, DUMP_BELOW, GATHER, GATHER_SOON, MAX_PENDING, Owned, RESEND, RESEND_MISSING, RESEND_MOST,
    TICK, Urgency, WINDOW,
};
use crate::time::Instant;

/// Changes that fill a datagram for sure, so that there is nothing to wait for.
const FULL: usize = 120;

/// See the [module documentation](super) for its states.
#[derive(Debug, Default)]
pub(super) struct Sending {
    /// 0: nothing was ever sent.
    generation: u64,
    phase: Phase,
    scope: Vec<Owned>,
    pending: VecDeque<Change>,
    /// Some of `pending` are to go soon.
    soon: bool,
    /// When a datagram with changes left last.
    left_at: Instant,
    /// Changes of this generation that came, that went into a datagram, and that are applied.
    came: u64,
    left: u64,
    applied: u64,
    /// All flows have been told with the change of that number; absent: not yet known, or said.
    complete_at: Option<u64>,
    window: VecDeque<Sent>,
    next_number: u64,
    /// Somebody waits for what is under way to be applied.
    urgent: bool,
    /// The highest number that has arrived.
    highest: Option<u64>,
    /// Datagrams of the running tick, and when it began.
    burst: (Instant, u32),
    pub(super) resent: u64,
    pub(super) restarts: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// The peer is not heard, or nothing is owned.
    #[default]
    Off,
    /// Not all flows have been told; those from that place of the table on are missing.
    Dumping(usize),
    /// All have been put into `pending`.
    Told,
    /// All have been applied.
    Live,
}

#[derive(Debug)]
struct Sent {
    number: u64,
    bytes: Vec<u8>,
    /// Changes of the generation up to this datagram's last.
    upto: u64,
    completes: bool,
    arrived: bool,
    at: Instant,
    tries: u32,
}

impl Sending {
    /// To a peer that may remember generations up to that one.
    pub(super) fn after(generation: u64) -> Sending {
        Sending { generation, ..Sending::default() }
    }

    /// Begins a new generation with all flows of `scope`; none: nothing is sent.
    pub(super) fn restart(&mut self, scope: &[Owned]) {
        *self = Sending {
            generation: self.generation,
            scope: scope.to_vec(),
            burst: self.burst,
            resent: self.resent,
            restarts: self.restarts,
            ..Sending::default()
        };
        if !self.scope.is_empty() {
            self.generation += 1;
            self.restarts += 1;
            self.phase = Phase::Dumping(0);
        }
    }

    /// Sends nothing any more.
    pub(super) fn stop(&mut self) {
        self.restart(&[]);
    }

    pub(super) fn is_on(&self) -> bool {
        self.phase != Phase::Off
    }

    pub(super) fn scope(&self) -> &[Owned] {
        &self.scope
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether the peer has everything but what is under way.
    pub(super) fn is_live(&self) -> bool {
        self.phase == Phase::Live
    }

    /// Changes that the peer has not applied; absent while it has not been told of all flows.
    pub(super) fn lag(&self) -> Option<u64> {
        self.is_live().then(|| self.came - self.applied)
    }

    /// Changes of the generation that came, and that are applied.
    pub(super) fn progress(&self) -> (u64, u64) {
        (self.came, self.applied)
    }

    /// From where in the table flows are wanted.
    pub(super) fn wants_dump(&self) -> Option<usize> {
        match self.phase {
            Phase::Dumping(from) if self.pending.len() < DUMP_BELOW => Some(from),
            _ => None,
        }
    }

    /// Flows that were asked for; `next`: where the following ones are.
    pub(super) fn dumped(&mut self, flows: impl IntoIterator<Item = Change>, next: Option<usize>) {
        let before = self.pending.len();
        self.pending.extend(flows);
        self.came += (self.pending.len() - before) as u64;
        match next {
            Some(from) => self.phase = Phase::Dumping(from),
            None => {
                self.phase = Phase::Told;
                self.complete_at = Some(self.came);
            }
        }
    }

    /// Something happened. Too far behind: everything anew.
    pub(super) fn push(&mut self, change: Change, urgency: Urgency) {
        if !self.is_on() {
            return;
        }
        if self.pending.len() >= MAX_PENDING {
            let scope = std::mem::take(&mut self.scope);
            return self.restart(&scope);
        }
        self.pending.push_back(change);
        self.soon |= urgency == Urgency::Soon;
        self.came += 1;
    }

    /// Somebody waits for everything that came so far to be applied.
    pub(super) fn hurry(&mut self) {
        self.urgent = self.came > self.applied;
    }

    /// What the peer says has come in; reports come in the order in which they were sent. A peer that has forgotten what it
    /// said before is told everything anew.
    pub(super) fn handle_report(&mut self, generation: u64, applied: u64, arrived: u64) {
        if !self.is_on() {
            return;
        }
        let base = self.window.front().map_or(self.next_number, |s| s.number);
        let knows = generation == self.generation;
        if if knows { applied < base } else { base > 0 } {
            let scope = std::mem::take(&mut self.scope);
            return self.restart(&scope);
        }
        if !knows || applied > self.next_number {
            // What it said of another process of its own, or before it met this one, holds no more.
            self.window.iter_mut().for_each(|s| (s.arrived, s.tries) = (false, 0));
            return;
        }
        while self.window.front().is_some_and(|s| s.number < applied) {
            let Some(sent) = self.window.pop_front() else { break };
            self.applied = sent.upto;
            if sent.completes {
                self.phase = Phase::Live;
            }
        }
        for (i, sent) in self.window.iter_mut().enumerate().take(WINDOW as usize) {
            sent.arrived = arrived >> i & 1 != 0;
            if sent.arrived {
                self.highest = self.highest.max(Some(sent.number));
            }
        }
    }

    /// The next datagram to be sent, with the index of the tables by which `pending` came to be.
    pub(super) fn poll(&mut self, from: NodeId, index: u64, now: Instant) -> Option<Vec<u8>> {
        if !self.is_on() {
            return None;
        }
        if now.since(self.burst.0) >= TICK {
            self.burst = (now, 0);
        }
        if self.burst.1 >= BURST {
            return None;
        }
        let bytes = self.resend(now).or_else(|| self.send(from, index, now))?;
        self.burst.1 += 1;
        Some(bytes)
    }

    fn resend(&mut self, now: Instant) -> Option<Vec<u8>> {
        let highest = self.highest;
        let due = self.window.iter_mut().find(|s| s.due(highest).is_some_and(|at| at <= now))?;
        due.at = now;
        due.tries += 1;
        self.resent += 1;
        Some(due.bytes.clone())
    }

    fn send(&mut self, from: NodeId, index: u64, now: Instant) -> Option<Vec<u8>> {
        if !self.has_something(now) || self.window.len() as u64 >= WINDOW {
            return None;
        }
        let number = self.next_number;
        let mut writer = Writer::new(from, self.generation, number, index, &self.scope);
        while writer.has_room() {
            let Some(change) = self.pending.pop_front() else { break };
            writer.put(&change);
            self.left += 1;
        }
        self.soon &= !self.pending.is_empty();
        self.left_at = now;
        let completes = self.complete_at.is_some_and(|at| at <= self.left);
        if completes {
            self.complete_at = None;
        }
        // Not before the last of what somebody waits for.
        let urgent = self.urgent && self.pending.is_empty();
        self.urgent &= !urgent;
        let bytes = writer.finish(completes, urgent);
        self.next_number += 1;
        self.window.push_back(Sent {
            number,
            bytes: bytes.clone(),
            upto: self.left,
            completes,
            arrived: false,
            at: now,
            tries: 0,
        });
        Some(bytes)
    }

    fn has_something(&self, now: Instant) -> bool {
        self.new_due().is_some_and(|at| at <= now)
    }

    /// When a new datagram is to leave, should there be room.
    fn new_due(&self) -> Option<Instant> {
        if self.next_number == 0
            || self.urgent
            || self.pending.len() >= FULL
            || self.complete_at.is_some_and(|at| at <= self.left)
        {
            return Some(Instant(0));
        }
        let gather = if self.soon { GATHER_SOON } else { GATHER };
        (!self.pending.is_empty()).then(|| self.left_at.after(gather))
    }

    /// When [`Sending::poll`] may have something.
    pub(super) fn deadline(&self) -> Option<Instant> {
        if !self.is_on() {
            return None;
        }
        let resend = self.window.iter().filter_map(|s| s.due(self.highest)).min();
        let new = self.new_due().filter(|_| (self.window.len() as u64) < WINDOW);
        let due = resend.into_iter().chain(new).min()?;
        Some(if self.burst.1 >= BURST { due.max(self.burst.0.after(TICK)) } else { due })
    }
}

impl Sent {
    /// When it is to be sent again.
    fn due(&self, highest: Option<u64>) -> Option<Instant> {
        if self.arrived {
            return None;
        }
        let missing = self.tries == 0 && highest > Some(self.number);
        let wait: Duration =
            if missing { RESEND_MISSING } else { (RESEND * (1 << self.tries.min(8))).min(RESEND_MOST) };
        Some(self.at.after(wait))
    }
}
