//! Ends what the program in the kernel answers for, by a process other than the one that loaded it.
//!
//! When a daemon is killed its program goes on until the leases run out: it answers ARP and neighbour discovery, and forwards.
//! Whoever tells the other nodes of the death must first take the answering from it. The forwarding stays for what is left of the
//! lease, as in an orderly hand-over.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use super::abi::{self, LeaseCell};
use super::sys::Mapped;
use crate::lease::ANSWER_UNTIL;

/// The leases of one loaded program. Those of a program that was loaded later are others.
#[derive(Debug)]
pub struct Silencer {
    leases: Mapped<LeaseCell>,
}

impl Silencer {
    /// Maps the leases into memory, so that nothing is left that could fail. `leases` is what [`crate::lane::Lane::leases`] gave.
    ///
    /// # Errors
    /// It is something else.
    pub fn new(leases: &OwnedFd) -> io::Result<Silencer> {
        Ok(Silencer { leases: Mapped::new(leases.as_fd(), abi::LEASES)? })
    }

    /// No group is answered for any more by any frame that is looked at from now on. To be called when the process that renews
    /// the leases is dead.
    pub fn silence(&self) {
        for index in 0..self.leases.len() {
            if let Some(limit) = self.leases.words(index).and_then(|cell| cell.get(ANSWER_UNTIL)) {
                limit.store(0, Ordering::SeqCst);
            }
        }
    }
}
