//! A node of a pair goes on alone: the state that its line begins with, and the end of being alone.

use std::sync::Arc;

use komainu_proto::domain::NodeId;
use serde::{Deserialize, Serialize};

use super::change::{CLUSTER, Change, Command};
use super::events::{Event, EventKind, cut};
use super::{MAX_EVENTS, Member, State};
use crate::pair;

/// A node goes on alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Solo {
    /// Its first term, which names the line.
    pub term: u64,
    /// Which node.
    pub node: NodeId,
    /// Wall clock, ms since 1970.
    pub since_ms: u64,
    /// Who wanted it: an operator, or `cluster` for the node itself.
    pub who: String,
    /// Revision in force when it began: what the peer may have, too.
    pub revision: u64,
    /// Whether operators have changed anything since.
    #[serde(default)]
    pub touched: bool,
}

impl State {
    /// Begins a line: from here on everything is one node's alone. Nobody else owns a group any more; the others are members that
    /// have no vote.
    ///
    /// # Panics
    /// When the line is not above the one before.
    pub(crate) fn go_solo(&mut self, term: u64, me: Member, who: &str, wall_ms: u64) {
        assert!(term > self.line, "line {term} after {}", self.line);
        self.advance(pair::first_index(term).max(self.index + 1));
        self.line = term;
        let node = me.node.id;
        self.solo = Some(Solo {
            term,
            node,
            since_ms: wall_ms,
            who: cut(who).to_owned(),
            revision: self.revision,
            touched: false,
        });
        let name = me.node.name.clone();
        self.members.retain(|m| m.node.id != node);
        for other in &mut self.members {
            other.voter = false;
        }
        self.members.push(me);
        self.members.sort_by_key(|m| m.raft_id);
        // Who may still answer for what is no longer to be found out.
        self.held.retain(|h| h.node == node);
        for group in &mut self.groups {
            let group = Arc::make_mut(group);
            group.epoch = group.epoch.max(pair::first_epoch(term));
            if group.owner == Some(node) {
                // It goes on, under a lease and tables of this line.
                group.epoch += 1;
                group.assigned_index = self.index;
            } else {
                group.owner = None;
            }
        }
        let text = match who {
            CLUSTER => {
                format!("goes on alone in term {term}: its peer is silent on every path, or has ended")
            }
            _ => format!("goes on alone in term {term}: forced"),
        };
        self.solo_event(who, wall_ms, &name, text);
    }

    /// After a change was made: notes what of it concerns a node that is alone.
    pub(super) fn follow_solo(&mut self, command: &Command, changed: bool) {
        let Some(solo) = &mut self.solo else { return };
        solo.touched |= changed && is_configuration(&command.change);
        let node = solo.node;
        let Change::MemberPut { member } = &command.change else { return };
        if member.node.id == node {
            return;
        }
        // It is back with a store of this line: what it was before is no member any more.
        self.members.retain(|m| m.node.id != member.node.id || m.raft_id == member.raft_id);
        if member.voter {
            self.solo = None;
            let name = self.node_name(Some(node));
            let text = format!("is no longer alone: {} votes again", member.node.name);
            self.solo_event(&command.who, command.wall_ms, &name, text);
        }
    }

    fn solo_event(&mut self, who: &str, wall_ms: u64, subject: &str, text: String) {
        self.events.push_back(Arc::new(Event {
            index: self.index,
            wall_ms,
            who: cut(who).to_owned(),
            kind: EventKind::Member,
            subject: subject.to_owned(),
            text,
        }));
        while self.events.len() > MAX_EVENTS {
            self.events.pop_front();
        }
    }
}

/// Whether a change is an operator's, of what the cluster is to do: what must not be dropped when a line ends.
fn is_configuration(change: &Change) -> bool {
    matches!(
        change,
        Change::Apply { .. }
            | Change::Rollback { .. }
            | Change::Restore { .. }
            | Change::ServiceAdd { .. }
            | Change::ServiceRemove { .. }
            | Change::BackendAdd { .. }
            | Change::BackendRemove { .. }
            | Change::BackendWeight { .. }
            | Change::BackendAdmin { .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::NodeIdentity;
    use komainu_proto::domain::Role;

    fn member(id: u64, raft_id: u64, voter: bool) -> Member {
        let address = std::net::SocketAddr::from(([10, 0, 0, id as u8], 7800));
        let node = NodeIdentity { id: NodeId(id), name: format!("lb{id}"), role: Role::Balancer, address };
        Member { raft_id, node, voter }
    }

    fn pair() -> State {
        let mut state = State::default();
        let document = crate::state::tests::document();
        let apply = Change::Apply { document, if_revision: None, confirm_within_ms: None };
        let own = |change| Command::own(0, change);
        state.apply(1, &own(apply)).unwrap();
        state.apply(2, &own(Change::MemberPut { member: member(1, 0x1_0001, true) })).unwrap();
        state.apply(3, &own(Change::MemberPut { member: member(2, 0x1_0002, true) })).unwrap();
        let group = state.groups[0].id;
        state.apply(4, &own(Change::Assign { group, node: NodeId(2), epoch: 1 })).unwrap();
        state
    }

    #[test]
    fn a_line_begins_with_one_voter_and_without_owners_above_everything_before() {
        let mut state = pair();
        state.go_solo(8, member(1, 0x2_0001, true), CLUSTER, 77);
        assert_eq!((state.line, state.index), (8, 8 << 32));
        assert!(state.groups.iter().all(|g| g.owner.is_none() && g.epoch >= 8 << 12));
        let voters: Vec<u64> = state.members.iter().filter(|m| m.voter).map(|m| m.raft_id).collect();
        assert_eq!(voters, [0x2_0001]);
        assert!(state.events.back().unwrap().text.contains("goes on alone"));
        // What is written is read again.
        assert_eq!(State::decode(&state.encode()).unwrap(), state);
    }

    #[test]
    fn it_ends_when_the_peer_votes_again_and_the_former_peer_is_gone() {
        let mut state = pair();
        state.go_solo(8, member(1, 0x2_0001, true), CLUSTER, 77);
        let own = |change| Command::own(0, change);
        let next = |state: &State| state.index + 1;
        state.apply(next(&state), &own(Change::MemberPut { member: member(2, 0x5_0002, false) })).unwrap();
        assert!(state.solo.is_some());
        assert_eq!(state.members.len(), 2);
        state.apply(next(&state), &own(Change::MemberPut { member: member(2, 0x5_0002, true) })).unwrap();
        assert_eq!((state.solo.clone(), state.line), (None, 8));
    }

    #[test]
    fn only_what_operators_change_counts_as_touched() {
        let mut state = pair();
        state.go_solo(9, member(2, 0x2_0002, true), "operator", 77);
        let group = state.groups[0].id;
        let epoch = state.groups[0].epoch + 1;
        let assign = Change::Assign { group, node: NodeId(2), epoch };
        state.apply(state.index + 1, &Command::own(0, assign)).unwrap();
        assert!(!state.solo.as_ref().unwrap().touched);
        let mut document = crate::state::tests::document();
        document.services.pop();
        let apply = Change::Apply { document, if_revision: None, confirm_within_ms: None };
        state.apply(state.index + 1, &Command::own(0, apply)).unwrap();
        assert!(state.solo.as_ref().unwrap().touched);
    }
}
