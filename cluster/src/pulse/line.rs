//! Lines: what is done when a node is heard that belongs to the same cluster and descends from another time of going on
//! alone ([`crate::pair`]).
//!
//! ```text
//!   heard, lower line than ours ──▶ it is answered at once, and our addresses are announced again
//!   heard, higher line, and it has heard this process ──▶ every lease ends here and now; the Raft thread does the rest
//!   heard, higher line, not heard there ──▶ nothing: it could be a datagram of long ago
//! ```

use std::collections::BTreeMap;

use komainu_proto::domain::NodeId;

use super::holding::Holdings;
use super::{Beat, Echo, Output, Pulse};
use crate::raft::RaftId;
use crate::time::Instant;

/// What this node knows of lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// The line of this node's store.
    pub(super) own: u64,
    /// The newest beat of another line. Pairs have one peer.
    met: Option<Met>,
    /// The line that this node gives way to, and whose it is.
    pub(super) yields_to: Option<(NodeId, u64)>,
}

/// A node of another line.
#[derive(Clone, Copy, Debug)]
struct Met {
    node: NodeId,
    line: u64,
    beat: Echo,
    at: Instant,
}

impl Lines {
    /// What a beat to `node` says of its newest beat, if that was of another line.
    pub(super) fn answer_to(&self, node: NodeId) -> Option<Echo> {
        self.met.filter(|m| m.node == node).map(|m| m.beat)
    }
}

impl Pulse {
    /// When a node was heard last, whatever line it belongs to.
    pub(crate) fn heard_at(&self, node: NodeId) -> Option<Instant> {
        let met = self.lines.met.filter(|m| m.node == node).map(|m| m.at);
        let heard = self.peers.get(&node).and_then(|p| p.heard.as_ref()).map(|h| h.at);
        met.max(heard)
    }

    /// The line that this node's store belongs to.
    pub fn line(&self) -> u64 {
        self.lines.own
    }

    /// The line that this node gives way to: it holds nothing any more and waits for the Raft thread to start anew.
    pub(crate) fn yields_to(&self) -> Option<(NodeId, u64)> {
        self.lines.yields_to
    }

    /// This node goes on alone, under a new Raft id.
    pub(crate) fn begin_line(&mut self, me: RaftId, line: u64, now: Instant) {
        self.advance(now);
        self.step_down();
        self.me = me;
        self.lines.own = line;
        self.leader = None;
        for p in self.peers.values_mut() {
            p.echo = None;
        }
        self.beat_now();
    }

    /// The line of a snapshot that took the place of an empty state.
    pub(crate) fn set_line(&mut self, line: u64) {
        self.lines.own = line;
    }

    /// The store is empty again: this node knows nothing but its peers' addresses, and has another Raft id.
    pub(crate) fn start_anew(&mut self, me: RaftId, now: Instant) {
        self.advance(now);
        self.drop_everything();
        self.me = me;
        self.cluster = 0;
        self.support = None;
        self.floor = 0;
        self.heard_leader_at = None;
        self.leader = None;
        self.own_lease_end = Instant::default();
        self.started_at = self.now;
        self.sole = false;
        self.voters.clear();
        self.applied = 0;
        self.verdicts = BTreeMap::new();
        self.differing.clear();
        self.lines = Lines::default();
        for p in self.peers.values_mut() {
            p.echo = None;
            p.heard = None;
        }
        self.beat_now();
    }

    /// A beat of another line of this cluster.
    pub(super) fn meet(&mut self, node: NodeId, beat: &Beat) {
        let before = self.lines.met.filter(|m| m.node == node);
        if before.is_some_and(|m| m.beat.instance == beat.instance && beat.sent <= m.beat.stamp) {
            return;
        }
        let echo = Echo { instance: beat.instance, stamp: beat.sent, term: beat.term };
        self.lines.met = Some(Met { node, line: beat.line, beat: echo, at: self.now });
        let heard = beat.met.is_some_and(|m| {
            m.instance == self.instance && m.stamp >= self.started_at && m.stamp <= self.now
        });
        if beat.line > self.lines.own {
            if heard && self.lines.yields_to.is_none() {
                self.lines.yields_to = Some((node, beat.line));
                self.drop_everything();
            }
            self.prompt();
        } else if before.is_none_or(|m| m.line != beat.line || m.beat.instance != beat.instance) {
            // Clients have learnt the other's address meanwhile.
            self.holdings.announce_again(self.now, &mut self.out);
        }
        if !beat.answer
            && let Some(peer) = self.peers.get_mut(&node)
        {
            peer.answer_due = true;
        }
    }

    /// The other line has ended: what it may have announced last is announced again.
    pub(super) fn outlive(&mut self, node: NodeId) {
        if self.lines.met.take_if(|m| m.node == node).is_some() {
            self.holdings.announce_again(self.now, &mut self.out);
        }
    }

    fn drop_everything(&mut self) {
        self.step_down();
        self.holdings.set_assignments(BTreeMap::new());
        self.holdings.forget();
        self.refresh();
    }
}

impl Holdings {
    /// Announces every group that the lane answers for.
    fn announce_again(&self, now: Instant, out: &mut std::collections::VecDeque<Output>) {
        out.extend(self.held(now).map(|(own, _)| Output::Announce { group: own.group }));
    }
}
