//! What this node knows of another one, from its beats.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use komainu_proto::domain::{GroupId, NodeId};

use super::Ownership;
use super::beat::{Beat, Contact, Echo};
use crate::time::Instant;

/// Processes of one node that are remembered to be dead: as many as a supervisor can start and see end while a datagram is
/// under way.
const MAX_DEAD: usize = 8;

/// Another node.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) id: NodeId,
    pub(super) address: SocketAddr,
    /// Named in the node file or a member: is beaten even while it is silent.
    pub(super) wanted: bool,
    /// Its newest beat and when that arrived.
    pub(super) heard: Option<Heard>,
    /// To be acknowledged: its newest beat accepted as a leader's.
    pub(super) echo: Option<Echo>,
    pub(super) beat_due: bool,
    pub(super) answer_due: bool,
    /// Where the rotation of observations stands.
    pub(super) rotation: usize,
    /// Its processes that have ended and of which that was told, the newest last.
    dead: VecDeque<u64>,
}

/// The newest beat of a node.
#[derive(Debug)]
pub(super) struct Heard {
    pub(super) beat: Beat,
    pub(super) at: Instant,
    /// Since when it has been heard without an interruption.
    pub(super) since: Instant,
}

impl Peer {
    pub(super) fn new(id: NodeId, address: SocketAddr) -> Self {
        Peer {
            id,
            address,
            wanted: false,
            heard: None,
            echo: None,
            beat_due: false,
            answer_due: false,
            rotation: 0,
            dead: VecDeque::new(),
        }
    }

    /// Takes a beat in, unless a newer one of the same process, or one of a newer process, came before.
    pub(super) fn take(&mut self, beat: Beat, now: Instant, silent_after: Duration) -> bool {
        if self.dead.contains(&beat.instance) {
            return false;
        }
        let dead = self.is_dead();
        if let Some(heard) = &mut self.heard {
            if heard.beat.instance == beat.instance {
                if beat.sent <= heard.beat.sent {
                    return false;
                }
                if now.since(heard.at) > silent_after {
                    heard.since = now;
                }
                heard.at = now;
                heard.beat = beat;
                return true;
            }
            // Datagrams of a process that has ended may still turn up. They must not displace the living one; and should
            // they be taken for news while that one is silent, it does no harm: whatever matters names its process.
            if !dead && now.since(heard.at) <= silent_after {
                return false;
            }
            // A new process has accepted nothing and acknowledged nothing yet.
            self.echo = None;
        }
        self.heard = Some(Heard { beat, at: now, since: now });
        true
    }

    /// Whether it was heard within `within`, and is not known to have died since.
    pub(super) fn alive(&self, now: Instant, within: Duration) -> bool {
        !self.is_dead() && self.heard.as_ref().is_some_and(|h| now.since(h.at) <= within)
    }

    /// Its process `instance` has ended. Answers whether that is news.
    pub(super) fn bury(&mut self, instance: u64) -> bool {
        if self.dead.contains(&instance) {
            return false;
        }
        if self.dead.len() >= MAX_DEAD {
            self.dead.pop_front();
        }
        self.dead.push_back(instance);
        true
    }

    /// Whether the process that was heard last has ended.
    pub(super) fn is_dead(&self) -> bool {
        self.heard.as_ref().is_some_and(|h| self.dead.contains(&h.beat.instance))
    }

    /// The limit that ends at `end` on this node's clock, told on the peer's clock.
    pub(super) fn limit(
        &self,
        end: Instant,
        on_another_clock: impl Fn(Duration) -> Duration,
    ) -> Option<Contact> {
        let heard = self.heard.as_ref()?;
        let left = end.since(heard.at);
        (left > Duration::ZERO).then(|| Contact {
            instance: heard.beat.instance,
            stamp: heard.beat.sent,
            lasts: on_another_clock(left),
        })
    }

    /// Whether its process `instance` says that it has given the group up.
    pub(super) fn has_released(&self, o: Ownership, instance: u64) -> bool {
        self.heard.as_ref().is_some_and(|h| {
            h.beat.instance == instance
                && h.beat.released.iter().any(|r| r.group == o.group && r.epoch >= o.epoch)
        })
    }

    /// What it says is left of its lease.
    pub(super) fn left(&self, group: GroupId, epoch: u64, now: Instant) -> Option<Duration> {
        let heard = self.heard.as_ref()?;
        let (_, left) = heard.beat.held.iter().find(|(o, _)| o.group == group && o.epoch == epoch)?;
        left.checked_sub(now.since(heard.at))
    }
}
