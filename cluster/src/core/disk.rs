//! What is on its way to disk, and what waits for it.

use std::collections::VecDeque;

use raft::eraftpb::{Message, MessageType};

use crate::rules::Rule;

/// Writes that were handed out, in order, and messages that may leave only after them.
#[derive(Debug, Default)]
pub(super) struct Disk {
    /// Number of the newest write handed out.
    pub(super) newest: u64,
    /// Number of the newest write known to be on disk.
    pub(super) persisted: u64,
    /// The newest write that changed term or vote.
    promise: u64,
    /// Write, and the `Ready` that it completes.
    under_way: VecDeque<(u64, u64)>,
    held: VecDeque<(u64, Message)>,
    /// Nothing is written any more.
    failed: bool,
}

/// What a completed write sets free.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Freed {
    /// Newest `Ready` that is on disk.
    pub(super) ready: Option<u64>,
    /// Messages that may leave now.
    pub(super) messages: Vec<Message>,
}

impl Disk {
    /// Number for the next write, which completes the `Ready` numbered `ready` (0 for none).
    pub(super) fn begin(&mut self, ready: u64, promise: bool) -> u64 {
        self.newest += 1;
        if promise {
            self.promise = self.newest;
        }
        self.under_way.push_back((self.newest, ready));
        self.newest
    }

    /// Whether a term or vote was handed out that is not known to be on disk.
    pub(super) fn owes_promise(&self) -> bool {
        self.persisted < self.promise
    }

    /// A `Ready` without anything to write. True when all before it is on disk, so it is complete at once.
    pub(super) fn nothing_to_write(&mut self, ready: u64) -> bool {
        match self.under_way.back_mut() {
            Some(last) => {
                last.1 = ready;
                false
            }
            None => true,
        }
    }

    /// Messages that rest on everything handed out so far. Gives back those that may leave at once.
    pub(super) fn after_writes(&mut self, messages: Vec<Message>) -> Vec<Message> {
        self.hold(self.newest, messages)
    }

    /// Messages of a leader, which may leave before its own log is on disk, but not before its term and vote are.
    pub(super) fn after_promise(&mut self, messages: Vec<Message>) -> Vec<Message> {
        self.hold(self.promise, messages)
    }

    fn hold(&mut self, after: u64, messages: Vec<Message>) -> Vec<Message> {
        if self.persisted >= after || Rule::PersistFirst.is_broken() {
            return messages;
        }
        if self.failed {
            // What rests on the disk would be held for ever. That this node is there doesn't: without its answer the leader
            // would take it for dead, and in a pair give up although its lease is acknowledged.
            let is_answer = |m: &Message| m.get_msg_type() == MessageType::MsgHeartbeatResponse;
            return messages.into_iter().filter(is_answer).collect();
        }
        self.held.extend(messages.into_iter().map(|m| (after, m)));
        Vec::new()
    }

    /// The newest write, and with it every later one, will never be on disk.
    pub(super) fn fail(&mut self) {
        self.failed = true;
        self.held.clear();
    }

    /// What was handed out belongs to another log: nothing waits for it any more.
    pub(super) fn restart(&mut self) {
        self.under_way.clear();
        self.held.clear();
        self.promise = 0;
    }

    /// Whether writing has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Every write up to `number` is on disk.
    pub(super) fn persisted(&mut self, number: u64) -> Freed {
        self.persisted = self.persisted.max(number.min(self.newest));
        let mut freed = Freed::default();
        while let Some(&(_, ready)) = self.under_way.front().filter(|(write, _)| *write <= self.persisted) {
            freed.ready = freed.ready.max(Some(ready).filter(|r| *r > 0));
            self.under_way.pop_front();
        }
        let (out, held) =
            std::mem::take(&mut self.held).into_iter().partition(|(after, _)| *after <= self.persisted);
        self.held = held;
        let out: VecDeque<(u64, Message)> = out;
        freed.messages = out.into_iter().map(|(_, m)| m).collect();
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(index: u64) -> Message {
        Message { index, ..Message::default() }
    }

    #[test]
    fn what_rests_on_a_write_waits_for_it() {
        let mut d = Disk::default();
        assert_eq!(d.after_writes(vec![message(0)]), [message(0)]);
        assert_eq!(d.begin(7, true), 1);
        assert_eq!(d.after_writes(vec![message(1)]), []);
        assert_eq!(d.begin(8, false), 2);
        assert_eq!(d.after_writes(vec![message(2)]), []);
        assert_eq!(d.persisted(1), Freed { ready: Some(7), messages: vec![message(1)] });
        assert_eq!(d.persisted(2), Freed { ready: Some(8), messages: vec![message(2)] });
    }

    #[test]
    fn a_failed_disk_holds_nothing_back_for_ever_and_promises_nothing() {
        let mut d = Disk::default();
        d.begin(1, true);
        assert_eq!(d.after_writes(vec![message(1)]), []);
        d.fail();
        let mut answer = Message::default();
        answer.set_msg_type(MessageType::MsgHeartbeatResponse);
        assert_eq!(d.after_writes(vec![message(2), answer.clone()]), [answer]);
        assert_eq!(d.held.len(), 0);
    }

    #[test]
    fn a_leader_waits_for_its_vote_only() {
        let mut d = Disk::default();
        d.begin(1, true);
        assert_eq!(d.after_promise(vec![message(1)]), []);
        d.persisted(1);
        d.begin(2, false);
        assert_eq!(d.after_promise(vec![message(2)]), [message(2)]);
    }

    #[test]
    fn a_promise_is_owed_until_it_is_on_disk() {
        let mut d = Disk::default();
        d.begin(1, false);
        assert!(!d.owes_promise());
        d.begin(2, true);
        d.begin(3, false);
        d.persisted(1);
        assert!(d.owes_promise());
        d.persisted(2);
        assert!(!d.owes_promise());
    }

    #[test]
    fn a_ready_without_a_write_is_complete_with_the_write_before() {
        let mut d = Disk::default();
        assert!(d.nothing_to_write(1));
        d.begin(2, false);
        assert!(!d.nothing_to_write(3));
        assert_eq!(d.persisted(1).ready, Some(3));
        assert!(d.nothing_to_write(4));
    }
}
