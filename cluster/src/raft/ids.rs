//! Raft ids: which store a voter's promises are kept in.

use std::fmt;

use komainu_proto::domain::NodeId;

/// Bits of a Raft id that hold the node id (1..=65535); the rest is the incarnation.
const NODE_BITS: u32 = 16;

/// Id of a Raft peer: the node, and the incarnation of its store. A node that lost its store lost its promises with it,
/// so it must never vote under the old id: it comes back under a new incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RaftId(pub u64);

impl RaftId {
    /// The id of `node` with a store of this incarnation (a random number; 48 bits of it are used, never 0).
    pub fn new(node: NodeId, incarnation: u64) -> RaftId {
        let incarnation = (incarnation & (u64::MAX >> NODE_BITS)).max(1);
        RaftId(incarnation << NODE_BITS | node.0 & ((1 << NODE_BITS) - 1))
    }

    /// The node.
    pub fn node(self) -> NodeId {
        NodeId(self.0 & ((1 << NODE_BITS) - 1))
    }
}

impl fmt::Display for RaftId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{:x}", self.node().0, self.0 >> NODE_BITS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_node_and_incarnation() {
        let id = RaftId::new(NodeId(65535), u64::MAX);
        assert_eq!(id.node(), NodeId(65535));
        assert_ne!(id, RaftId::new(NodeId(65535), 7));
        assert_eq!(RaftId::new(NodeId(3), 0xab).to_string(), "3:ab");
    }

    #[test]
    fn is_never_zero_in_its_incarnation() {
        assert_eq!(RaftId::new(NodeId(3), 0), RaftId::new(NodeId(3), 1));
    }
}
