//! From one peer: datagrams that came, in order or not, until they are applied.

use std::collections::BTreeMap;

use super::wire::Data;
use super::{ACK_DELAY, ACK_EVERY, Owned, WINDOW};
use crate::time::Instant;

/// What comes in from a peer's process.
#[derive(Debug, Default)]
pub(super) struct Receiving {
    /// 0: nothing has come.
    generation: u64,
    scope: Vec<Owned>,
    /// Names the generation to the data path.
    mark: u32,
    /// The next number to be applied.
    next: u64,
    waiting: BTreeMap<u64, Data>,
    /// Since when something has not been acknowledged, and how many datagrams.
    unreported: Option<(Instant, u64)>,
}

impl Receiving {
    /// Takes a datagram in.
    pub(super) fn take(&mut self, data: Data, now: Instant) {
        if data.generation < self.generation {
            return;
        }
        if data.generation > self.generation {
            *self = Receiving { generation: data.generation, ..Receiving::default() };
        }
        let (since, count) = self.unreported.unwrap_or((now, 0));
        // One that was taken already is sent because its acknowledgement was lost.
        let again = data.number < self.next || self.waiting.contains_key(&data.number);
        let gap = data.number > self.next && !self.waiting.contains_key(&self.next);
        self.unreported = Some((since, if again || gap { ACK_EVERY } else { count + 1 }));
        if !again && data.number - self.next < WINDOW {
            self.waiting.insert(data.number, data);
        }
    }

    /// The datagram to be applied now, if the data path's tables are as new as the sender's and `blocked` has nothing against
    /// its groups. `mark` names a generation that begins.
    pub(super) fn next(
        &mut self,
        installed: u64,
        blocked: impl Fn(&[Owned]) -> bool,
        mark: impl FnOnce() -> u32,
    ) -> Option<(&Data, u32, &[Owned])> {
        let data = self.waiting.get(&self.next).filter(|data| data.index <= installed)?;
        if let Some(scope) = &data.begins {
            if self.mark == 0 {
                self.mark = mark();
            }
            self.scope.clone_from(scope);
        }
        if blocked(&self.scope) {
            return None;
        }
        Some((data, self.mark, &self.scope))
    }

    /// The datagram that [`Receiving::next`] gave is applied.
    pub(super) fn applied(&mut self, now: Instant) {
        if let Some(data) = self.waiting.remove(&self.next) {
            self.next += 1;
            let (since, count) = self.unreported.unwrap_or((now, 0));
            self.unreported = Some((since, if data.urgent { ACK_EVERY } else { count }));
        }
    }

    /// Whether something waits only for tables as new as `installed`.
    pub(super) fn waits_for(&self, installed: u64) -> bool {
        self.waiting.get(&self.next).is_some_and(|data| data.index <= installed)
    }

    /// When an acknowledgement is due.
    pub(super) fn report_due(&self) -> Option<Instant> {
        let (since, count) = self.unreported?;
        Some(if count >= ACK_EVERY { since } else { since.after(ACK_DELAY) })
    }

    /// Generation, datagrams applied, those that have arrived beyond. It is being told.
    pub(super) fn report(&mut self) -> (u64, u64, u64) {
        self.unreported = None;
        let arrived = self.waiting.keys().fold(0, |bits, number| bits | 1 << (number - self.next));
        (self.generation, self.next, arrived)
    }
}
