//! What the program tells of the flows that it keeps (`packet/bpf/make.h`), and how many it may make.
//!
//! The program tells in a ring, and wakes nobody as a rule: while there is news the engine's thread naps for [`NAP`] between two looks,
//! so that a connection does not cost a change of threads for each of its steps. Only when it has heard nothing for [`QUIET`]
//! does it sleep until it is woken.
//!
//! Each processor may have made so many flows since the program was loaded: those that the engine has learned of from it, and its
//! share of those that the engine has room for. There are machines with many more processors than ever see a SYN, so half of the room
//! is for those that do. So the flows of all processors together are never more than there is room for, without
//! a word that they would all write to.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};

use super::abi::{self, Plain};
use super::maps::Maps;
use crate::engine::{Engine, Kept};
use crate::flow::ClientSide;
use crate::time::BootTime;

/// How long news may wait while there is any: this much later than if they had come up as frames other nodes learn of a flow.
const NAP: Duration = Duration::from_millis(1);
/// Silence after which the thread sleeps until it is woken.
const QUIET: Duration = Duration::from_millis(5);
/// Time over which a processor counts as one that makes flows.
const LATELY: Duration = Duration::from_millis(100);
/// Pieces taken in one go, as many as the ring holds: a flood must not keep the thread from frames.
const AT_ONCE: usize = 1 << 16;
/// Pieces after which it is said anew how many flows may be made, so that nobody waits for all of them to be taken.
const GRANT_EVERY: usize = 256;

/// The engine's end. One thread has it.
pub struct News {
    ring: RingBuf<MapData>,
    maps: Arc<Maps>,
    /// By processor: flows that it made and the engine has learned of.
    learned: Vec<u64>,
    /// As it stood at `counted_at`, and whether it had grown since the time before.
    learned_before: Vec<u64>,
    busy: Vec<bool>,
    counted_at: BootTime,
    heard_at: BootTime,
    /// The next piece wakes whoever waits.
    armed: bool,
}

impl fmt::Debug for News {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("News")
            .field("learned", &self.learned)
            .field("armed", &self.armed)
            .finish_non_exhaustive()
    }
}

impl News {
    pub(super) fn new(ring: RingBuf<MapData>, maps: Arc<Maps>) -> News {
        let cpus = maps.cpus() as usize;
        News {
            ring,
            maps,
            learned: vec![0; cpus],
            learned_before: vec![0; cpus],
            busy: vec![false; cpus],
            counted_at: BootTime(0),
            heard_at: BootTime(0),
            armed: false,
        }
    }

    /// Has the engine learn what there is, and gives out anew how many flows may be made. How many pieces there were.
    pub fn learn(&mut self, engine: &mut Engine, now: BootTime) -> usize {
        let mut pieces = 0;
        while pieces < AT_ONCE {
            let taken = self.take(GRANT_EVERY, |news| engine.learn(&kept(news), now));
            if taken == 0 {
                break;
            }
            pieces += taken;
            self.grant(engine, now);
            if taken < GRANT_EVERY {
                break;
            }
        }
        if pieces > 0 {
            self.heard_at = now;
            // More may follow, and is looked for without being woken.
            if std::mem::take(&mut self.armed) {
                self.maps.set_wake(false);
            }
        }
        pieces
    }

    /// Takes what there is, `most` pieces at most, for `each`; how many. Whoever takes without an engine gives out grants himself.
    pub fn take(&mut self, most: usize, mut each: impl FnMut(&abi::News)) -> usize {
        let mut pieces = 0;
        while pieces < most {
            let Some(item) = self.ring.next() else { break };
            let Some(news) = abi::News::from_bytes(&item) else { continue };
            if news.kind == abi::NEWS_OPENED
                && let Some(learned) = self.learned.get_mut(news.cpu as usize)
            {
                *learned += 1;
            }
            each(&news);
            pieces += 1;
        }
        pieces
    }

    /// Gives out how many flows may be made: half of it to all processors alike, half to those that made some lately. To be called from
    /// time to time also when there is no news.
    pub fn grant(&mut self, engine: &mut Engine, now: BootTime) {
        let room = engine.may_make(now);
        if now.since(self.counted_at) >= LATELY {
            self.counted_at = now;
            for (busy, (learned, before)) in
                self.busy.iter_mut().zip(self.learned.iter().zip(&mut self.learned_before))
            {
                *busy = std::mem::replace(before, *learned) != *learned;
            }
        }
        let share = room / 2 / self.learned.len().max(1) as u64;
        let among = self.busy.iter().filter(|busy| **busy).count().max(1) as u64;
        for (cpu, (learned, busy)) in (0..).zip(self.learned.iter().zip(&self.busy)) {
            let more = if *busy { room / 2 / among } else { 0 };
            self.maps.set_grant(cpu, learned + share + more);
        }
    }

    /// Lets each processor make so many flows more than [`News::take`] has heard of.
    pub fn grant_each(&self, share: u64) {
        for (cpu, learned) in (0..).zip(&self.learned) {
            self.maps.set_grant(cpu, learned + share);
        }
    }

    /// Before the thread sleeps: how long at most; `None`: until it is woken.
    pub(super) fn doze(&mut self, now: BootTime) -> Option<Duration> {
        if now.since(self.heard_at) < QUIET {
            return Some(NAP);
        }
        // Written once, not for each sleep: every packet reads that cache line.
        if !std::mem::replace(&mut self.armed, true) {
            self.maps.set_wake(true);
        }
        None
    }

    /// Readable when there is news; absent while the thread only naps, for whatever is there already would end that at once.
    pub(super) fn wakes(&self) -> Option<BorrowedFd<'_>> {
        self.armed.then(|| self.ring.as_fd())
    }
}

fn kept(news: &abi::News) -> Kept {
    Kept {
        client_side: ClientSide {
            service: news.flow.service,
            client: abi::narrow(news.flow.client),
            client_port: u16::from_be_bytes(news.flow.client_port),
        },
        backend: news.backend,
        snat: (abi::narrow(news.snat), u16::from_be_bytes(news.snat_port)),
        opened: news.kind == abi::NEWS_OPENED,
        progress: news.progress,
        version: news.flags >> abi::FLOW_VERSION_SHIFT,
        at: BootTime(news.now),
    }
}
