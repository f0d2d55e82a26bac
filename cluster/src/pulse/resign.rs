//! The last word about a process that has ended, and the will that it is read from.
//!
//! A process says with every change what is to be said once it is dead ([`Will`]); whoever outlives it (the executor, or the
//! simulation) sends it then, and only after it has made sure that nothing answers for a group any more in the dead one's name. A
//! process that ends in order sends it itself, when nothing of it answers, votes, grants or renews any more (`shell/beat.rs`).
//! So a [`Resign`] is true for ever, whenever it arrives and however often, and needs no guard against replays. It says:
//!
//! 1. Process `instance` answers for nothing. A leader takes what it had granted to *that process* for released.
//! 2. Process `instance` grants and renews nothing. What its beats bind a voter to is void, provided that nothing that it granted
//!    to *others* can be in force: when its clock had passed `granted_until` before the newest beat that this voter accepted was
//!    sent. Otherwise the promise runs to its usual end.
//!
//! What stays as it was: the promise of the first `E_min` after a voter's start, the end of a lease that the voter itself had,
//! what it promised to another leader, and everything about the next process of that node.
//!
//! Why 2 is safe: a promise protects the leases that rest on the voter's acknowledgements. The dead leader's own are void by 1.
//! Those that it granted to others have ended: its grants are told in the will before the beats that carry them leave, a grant ends
//! in true time before the granter's clock shows its end, and that clock had passed the last of them when the beat was sent.
//! Those of older leaders ended before this one was elected, or were its own (a transfer).

use std::net::SocketAddr;

use komainu_proto::cluster as wire;
use komainu_proto::domain::NodeId;
use prost::Message as _;

use super::{Bereaved, Pulse};
use crate::raft::RaftId;
use crate::rules::Rule;
use crate::time::Instant;

/// Longest resign in bytes before sealing: four numbers.
pub const RESIGN_MAX_BYTES: usize = 64;

/// See the [module documentation](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resign {
    /// Raft id of the node.
    pub from: RaftId,
    /// Random number of the process that has ended.
    pub instance: u64,
    /// Cluster that its store belonged to; 0 while it was empty.
    pub cluster: u64,
    /// Latest end, on that node's clock, of anything that the process granted to another node.
    pub granted_until: Instant,
}

/// What is to be said of a process once it has ended, and to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Will {
    /// What.
    pub resign: Resign,
    /// To whom: everybody that beats are sent to.
    pub to: Vec<(NodeId, SocketAddr)>,
}

impl Resign {
    /// On the wire, at most [`RESIGN_MAX_BYTES`].
    pub fn encode(&self) -> Vec<u8> {
        wire::Resign {
            from: self.from.0,
            instance: self.instance,
            cluster: self.cluster,
            granted_until_ns: self.granted_until.0,
        }
        .encode_to_vec()
    }

    /// Reads one; `None`: it is none.
    pub fn decode(data: &[u8]) -> Option<Resign> {
        let w = wire::Resign::decode(data).ok().filter(|_| data.len() <= RESIGN_MAX_BYTES)?;
        let from = RaftId(w.from);
        (from.node().0 != 0).then_some(Resign {
            from,
            instance: w.instance,
            cluster: w.cluster,
            granted_until: Instant(w.granted_until_ns),
        })
    }
}

impl Pulse {
    /// A process of another node has ended. Answers whether that is news about the one that was heard last.
    pub fn handle_resign(&mut self, resign: Resign, now: Instant) -> bool {
        self.advance(now);
        let node = resign.from.node();
        if self.cluster != 0 && resign.cluster != 0 && resign.cluster != self.cluster {
            return false;
        }
        // Nothing rests on a node that was never heard of.
        let Some(peer) = self.peers.get_mut(&node) else { return false };
        let heard = peer.heard.as_ref().map(|h| h.beat.instance);
        let instance = match heard {
            Some(heard) if Rule::OneProcess.is_broken() => heard,
            _ => resign.instance,
        };
        if !peer.bury(instance) {
            return false;
        }
        if heard == Some(instance) {
            peer.echo = None;
        }
        if let Some(l) = &mut self.leading {
            l.forget_grants_to(instance);
        }
        if let Some(f) = self.followed.filter(|f| f.instance == instance) {
            let free = f.sent > resign.granted_until || Rule::NothingGranted.is_broken();
            self.bereaved = Some(Bereaved { at: self.now, free });
            self.leader = None;
        }
        self.prompt();
        heard == Some(instance)
    }

    /// Whether the process that was heard last of a node, in whatever line, has ended, and that was told.
    pub(crate) fn has_died(&self, node: NodeId) -> bool {
        let peer = self.peers.get(&node).filter(|p| p.is_dead());
        peer.and_then(|p| p.heard.as_ref()).is_some_and(|h| self.heard_at(node) == Some(h.at))
    }

    /// When this node heard that the process of the leader it followed has ended; absent when there is, or was, another leader.
    pub(crate) fn bereaved_at(&self) -> Option<Instant> {
        self.bereaved.map(|b| b.at)
    }

    /// Whether this node has the flows of the leader that has died, as far as that one said.
    pub(crate) fn is_heir(&self) -> bool {
        let instance = self.followed.map(|f| f.instance);
        self.peers.values().filter_map(|p| p.heard.as_ref()).any(|h| {
            Some(h.beat.instance) == instance
                && h.beat.followers.as_ref().is_some_and(|f| f.contains(&self.identity.id))
        })
    }

    /// The will that was put in force last; absent before the first.
    pub(crate) fn will(&self) -> Option<&Will> {
        self.will.as_ref()
    }

    /// The will, when it is another than was put in force last.
    pub(super) fn amended_will(&mut self) -> Option<Will> {
        let resign = Resign {
            from: self.me,
            instance: self.instance,
            cluster: self.cluster,
            granted_until: self.granted_until,
        };
        let to = || self.peers.values().filter(|p| p.wanted || p.heard.is_some()).map(|p| (p.id, p.address));
        if self.will.as_ref().is_some_and(|w| w.resign == resign && w.to.iter().copied().eq(to())) {
            return None;
        }
        let will = Will { resign, to: to().collect() };
        self.will = Some(will.clone());
        Some(will)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn survives_the_wire_and_stays_below_its_limit() {
        let resign = Resign {
            from: RaftId::new(NodeId(7), u64::MAX),
            instance: u64::MAX,
            cluster: u64::MAX,
            granted_until: Instant(u64::MAX),
        };
        let bytes = resign.encode();
        assert!(bytes.len() <= RESIGN_MAX_BYTES, "{}", bytes.len());
        assert_eq!(Resign::decode(&bytes), Some(resign));
    }

    proptest! {
        #[test]
        fn never_panics_on_any_datagram(data in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Resign::decode(&data);
        }
    }
}
