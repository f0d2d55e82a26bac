//! What other threads tell and ask the engine's thread.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use crossbeam_channel::Sender;
use nix::sys::eventfd::EventFd;

use super::filter::Interest;
use super::share::Share;
use crate::lane::{Counters, FlowFilter, FlowInfo, LaneError, Trace};
use crate::lease::LeaseBoard;
use crate::plan::MAX_GROUPS;
use crate::tables::Tables;

/// Commands that wait. Callers wait for their answer, so there is one at most for each of them.
pub const MAX_COMMANDS: usize = 64;

/// Something to do between two batches.
#[derive(Debug)]
pub enum Command {
    /// Put tables in force; answered when they are.
    Install {
        /// What to forward.
        tables: Arc<Tables>,
        /// What to let through to the ring.
        interest: Interest,
        /// Addresses that are next hops for others (inside VIPs).
        routers: HashSet<IpAddr>,
        /// Where the answer goes.
        answer: Sender<Result<(), LaneError>>,
    },
    /// Read the counters.
    Counters(Sender<Counters>),
    /// List flows.
    Flows(FlowFilter, usize, Sender<Vec<FlowInfo>>),
    /// Where would a flow go?
    Trace(u32, SocketAddr, Sender<Option<Trace>>),
    /// Exchange flows with other nodes.
    Share(Share),
}

/// What the lane's handle and its thread both hold.
#[derive(Debug)]
pub struct Shared {
    /// Leases, written by the beat thread and read for every frame.
    pub leases: Arc<LeaseBoard>,
    /// Wakes the thread.
    pub wake: EventFd,
    /// Ends the thread.
    pub stop: AtomicBool,
    /// Cleared when the thread ends, however it ends.
    pub alive: AtomicBool,
    /// Clock reading of the thread's newest round, in nanoseconds.
    pub round_at: AtomicU64,
    /// Revision in force.
    pub revision: AtomicU64,
    /// Why the thread can't forward, if it can't.
    pub trouble: ArcSwapOption<String>,
    /// Groups to be announced, by `id % MAX_GROUPS`: a bit set twice is one announcement, and setting it never waits.
    announce: [AtomicU64; MAX_GROUPS / 64],
}

impl Shared {
    /// Shared state of a thread that is about to start.
    pub fn new(wake: EventFd, leases: Arc<LeaseBoard>) -> Shared {
        Shared {
            leases,
            wake,
            stop: AtomicBool::new(false),
            alive: AtomicBool::new(true),
            round_at: AtomicU64::new(0),
            revision: AtomicU64::new(0),
            trouble: ArcSwapOption::empty(),
            announce: Default::default(),
        }
    }

    /// Notes that a group is to be announced.
    pub fn request_announcement(&self, group: u32) {
        let cell = group as usize % MAX_GROUPS;
        self.announce[cell / 64].fetch_or(1 << (cell % 64), Ordering::SeqCst);
        let _ = self.wake.write(1);
    }

    /// Takes the cells (`id % MAX_GROUPS`) of groups to be announced.
    pub fn take_announcements(&self, mut each: impl FnMut(usize)) {
        for (i, word) in self.announce.iter().enumerate() {
            // Read before written: this is looked at in every round, and nearly always empty.
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::SeqCst);
            while bits != 0 {
                each(i * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_asked_for_twice_is_announced_once() {
        let shared = Shared::new(EventFd::new().unwrap(), Arc::default());
        for group in [3, 3, 200, 256 + 70] {
            shared.request_announcement(group);
        }
        let mut cells = Vec::new();
        shared.take_announcements(|cell| cells.push(cell));
        assert_eq!(cells, [3, 70, 200]);
        shared.take_announcements(|_| panic!("taken already"));
    }
}
