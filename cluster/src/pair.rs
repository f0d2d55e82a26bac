//! A pair of balancers without a third node: what is asked of the world, and what goes on when one is alone.
//!
//! No algorithm can tell a dead peer from a cut cable. Under [`Policy::Safety`] the survivor waits for an operator; under
//! [`Policy::Availability`] it goes *solo* by itself when its peer has been silent on every path for longer than any lease that
//! it could hold, the arbiter (the service network's gateway) answers, and nobody else answers for an address of the cluster. A
//! process that has ended, of which its executor or itself has told, is no cut cable: there the survivor asks nobody, and goes on as
//! soon as its own lease and promise are over.
//!
//! Solo is a *line* of its own: a configuration of one voter under a new Raft id, named after its first term, whose parity is
//! that of the node. So two solo terms are never the same, and nothing that belongs to one line is ever taken for part of another: not a
//! message, not an acknowledgement, not a lease. Log indexes and epochs go on in a range that is the line's own (a higher
//! line's are higher), so that "newer" means the same across lines. When two lines meet, the lower one yields.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use komainu_proto::domain::{Document, NodeId};

use crate::state::Revision;
use crate::time::Instant;
use crate::timing::Timing;

/// Log indexes of one line.
const INDEXES: u32 = 32;
/// Epochs of one line: a group changes hands far less often while a pair is split, and small numbers keep beats short.
const EPOCHS: u32 = 12;
/// How long a node whose process has never heard its peer waits for it: machines that are switched on at the same moment are
/// up some seconds after each other.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(5);
/// How long after a process was heard last its end, of which was told, makes asking about it needless: in less than
/// [`BOOT_PATIENCE`] no process after it owns anything, so a word that was long under way does no harm.
pub const REMEMBERED_END: Duration = Duration::from_millis(2500);
/// How old the end of a sounding may be when a decision is made on it.
pub const FRESH: Duration = Duration::from_secs(1);

/// Stations on a segment answer within a millisecond or two, busy ones later.
const SHORTEST_SOUNDING: Duration = Duration::from_millis(20);
/// What nobody has answered by then, nobody will.
const LONGEST_SOUNDING: Duration = Duration::from_millis(200);

/// What a pair without a witness does when the two lose each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The survivor goes on alone.
    Availability,
    /// The survivor waits for an operator.
    Safety,
}

/// What was found out about the service network: somebody was asked, and listened to for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sounding {
    /// Before the first question.
    pub began: Instant,
    /// After the last answer was waited for.
    pub ended: Instant,
    /// Whether the gateway answered; absent when this node knows of none.
    pub arbiter: Option<bool>,
    /// An address of the cluster that another station answered for.
    pub claimed: Option<IpAddr>,
}

/// What a node knew when it yielded to another line, for whoever keeps what would be lost.
#[derive(Clone, Debug, PartialEq)]
pub struct Aside {
    /// The line that ends here.
    pub line: u64,
    /// Whose line goes on.
    pub to: NodeId,
    /// The line that goes on.
    pub to_line: u64,
    /// Revision that both lines have in common, as far as this node knows.
    pub base: u64,
    /// Changes of the document since, oldest first; none where only administrative states were changed.
    pub changes: Vec<Arc<Revision>>,
    /// The document with everything that was changed, as `export` would have shown it.
    pub document: Document,
}

/// How long a peer must be silent before a survivor goes on without it: whatever it held has run out by then, and a majority
/// of three would have begun to elect somebody else.
pub fn silence(timing: &Timing) -> Duration {
    timing.election_max
}

/// How long a peer must be silent before anybody is asked about it.
pub fn suspicion(timing: &Timing) -> Duration {
    timing.election_min
}

/// How long the service network is listened to in one sounding: until a peer that was suspected has been silent for long enough.
pub fn sounding(timing: &Timing) -> Duration {
    (silence(timing).saturating_sub(suspicion(timing))).clamp(SHORTEST_SOUNDING, LONGEST_SOUNDING)
}

/// The first solo term above `term` of the node that has the lower id of the two (even terms), or the higher one (odd terms).
pub fn solo_term(term: u64, lower: bool) -> u64 {
    let next = term + 1;
    next + u64::from(next.is_multiple_of(2) != lower)
}

/// The log index that a line begins at.
pub(crate) fn first_index(line: u64) -> u64 {
    line << INDEXES
}

/// The epoch that the epochs of a line are above.
pub(crate) fn first_epoch(line: u64) -> u64 {
    line << EPOCHS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solo_terms_rise_and_never_collide() {
        for term in 0..50 {
            let (a, b) = (solo_term(term, true), solo_term(term, false));
            assert!(a > term && a <= term + 2 && a.is_multiple_of(2), "{term} {a}");
            assert!(b > term && b <= term + 2 && !b.is_multiple_of(2), "{term} {b}");
        }
    }

    #[test]
    fn whoever_is_silent_for_so_long_holds_nothing() {
        for timing in crate::timing::Profile::ALL.map(crate::timing::Profile::timing) {
            assert!(silence(&timing) > timing.election_min && silence(&timing) > timing.longest_lease());
        }
    }
}
