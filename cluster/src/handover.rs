//! Whether an orderly hand-over waits until the new owner has the flows.
//!
//! A group is not moved from a living, working owner to a node that lacks the owner's flows: for mere preference never, for an
//! operator's wish and for an owner that goes not before a while. Nothing here concerns an owner that is silent or unfit: its
//! groups go to whoever is best, at once. Once a hand-over has begun it is not thought about again: a group that is being
//! released has no flows to send any more.

use std::collections::BTreeMap;
use std::time::Duration;

use komainu_proto::domain::{GroupId, NodeId};

use crate::time::Instant;

/// How long an operator's switchover waits. A full table is sent in about a second.
const FOR_A_WISH: Duration = Duration::from_secs(5);
/// How long an owner that goes waits; an orderly stop takes 10 s at most.
const FOR_LEAVING: Duration = Duration::from_secs(2);

/// Why a group is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// It has a preferred node.
    Preference,
    /// An operator wants it.
    Wish,
    /// Its owner is shutting down or leaves the cluster.
    Leaving,
}

/// Hand-overs that wait, and those that don't any more.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    since: BTreeMap<GroupId, (NodeId, Instant)>,
    begun: BTreeMap<GroupId, (u64, NodeId)>,
}

impl Waits {
    /// Whether the hand-over of `group`, owned under `epoch`, to node `to` is to wait. `followers`: who has the owner's flows;
    /// absent: the owner keeps none or does not say.
    pub(crate) fn holds(
        &mut self,
        (group, epoch): (GroupId, u64),
        to: NodeId,
        followers: Option<&[NodeId]>,
        why: Why,
        now: Instant,
    ) -> bool {
        if self.begun.get(&group) == Some(&(epoch, to)) {
            return false;
        }
        let (node, since) = *self.since.entry(group).or_insert((to, now));
        let since = if node == to { since } else { now };
        self.since.insert(group, (to, since));
        let patience = match why {
            Why::Preference => None,
            Why::Wish => Some(FOR_A_WISH),
            Why::Leaving => Some(FOR_LEAVING),
        };
        let has_them = followers.is_none_or(|f| f.contains(&to));
        let holds = !has_them && patience.is_none_or(|p| now.since(since) < p);
        if !holds {
            self.begun.insert(group, (epoch, to));
            self.since.remove(&group);
        }
        holds
    }

    /// Nothing is to move.
    pub(crate) fn rests(&mut self, group: GroupId) {
        self.since.remove(&group);
        self.begun.remove(&group);
    }

    /// Forgets groups that are gone.
    pub(crate) fn retain(&mut self, there: impl Fn(GroupId) -> bool) {
        self.since.retain(|group, _| there(*group));
        self.begun.retain(|group, _| there(*group));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: (GroupId, u64) = (GroupId(1), 4);
    const LACKS: Option<&[NodeId]> = Some(&[NodeId(3)]);
    const HAS: Option<&[NodeId]> = Some(&[NodeId(2)]);

    fn at(ms: u64) -> Instant {
        Instant(1_000_000_000 + ms * 1_000_000)
    }

    #[test]
    fn whoever_has_the_flows_does_not_wait() {
        for why in [Why::Preference, Why::Wish, Why::Leaving] {
            assert!(!Waits::default().holds(G, NodeId(2), HAS, why, at(0)));
            assert!(!Waits::default().holds(G, NodeId(2), None, why, at(0)));
        }
    }

    #[test]
    fn preference_waits_for_ever_and_a_wish_for_a_while() {
        for (why, patience) in [(Why::Preference, 86_400_000), (Why::Wish, 5_000), (Why::Leaving, 2_000)] {
            let mut waits = Waits::default();
            assert!(waits.holds(G, NodeId(2), LACKS, why, at(0)));
            assert!(waits.holds(G, NodeId(2), LACKS, why, at(patience - 1)), "{why:?}");
            assert_eq!(waits.holds(G, NodeId(2), LACKS, why, at(patience)), why == Why::Preference);
            assert!(!waits.holds(G, NodeId(2), HAS, why, at(patience + 1)));
        }
    }

    /// The owner has nothing to send any more once it gives the group up, and so nobody follows it.
    #[test]
    fn what_has_begun_is_not_thought_about_again() {
        let mut waits = Waits::default();
        assert!(!waits.holds(G, NodeId(2), HAS, Why::Preference, at(0)));
        assert!(!waits.holds(G, NodeId(2), Some(&[]), Why::Preference, at(50)));
        // Under another epoch, to another node, or after it came to nothing it is another hand-over.
        assert!(waits.holds((GroupId(1), 5), NodeId(2), Some(&[]), Why::Preference, at(50)));
        assert!(waits.holds(G, NodeId(5), Some(&[]), Why::Preference, at(50)));
        waits.rests(GroupId(1));
        assert!(waits.holds(G, NodeId(2), LACKS, Why::Preference, at(60)));
    }
}
