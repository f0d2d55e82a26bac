//! How a cluster begins.
//!
//! Nodes with empty stores find each other by their beats. When a majority of the configured nodes is present and empty,
//! and nobody present has a store, each supports the one with the lowest id that it hears, and sticks to it while that one
//! is heard and supports itself; where that one supports a lower one, it follows. The node that a majority supports makes a cluster of which it is the only voter, and admits the others like any node
//! that joins. It takes no command from operators before a majority of the configured nodes votes in it: so, if two
//! nodes should found after all (a crash and a cut within these milliseconds), at most one of the two clusters can ever
//! hold anything.

use std::sync::Arc;
use std::time::Duration;

use raft::eraftpb::{ConfState, HardState};

use super::{Core, Output, new_raft};
use crate::pulse::PeerView;
use crate::raft::{Log, Persist};
use crate::state::{Change, Command, Member, State};

/// How long a node that is supported, or that has founded, may be silent before another one takes its place. Far longer than
/// founding takes, and than a busy machine keeps a process waiting: two clusters never become one by themselves.
const STICK: Duration = Duration::from_secs(20);
/// Index and term of the first snapshot: the log begins after it.
const FIRST: (u64, u64) = (1, 1);

impl Core {
    /// Founds the cluster when it is this node's turn.
    pub(super) fn found(&mut self) {
        if self.cluster != 0 {
            return;
        }
        let me = self.me.node();
        let configured = self.config.peers.len() + 1;
        let majority = configured / 2 + 1;
        let mut pulse = super::lock(&self.pulse);
        let configured_peer = |p: &PeerView| self.config.peers.iter().any(|c| c.id == p.identity.id);
        // Also one that is silent at the moment: it stands still, and will admit this node when it goes on.
        let founded = pulse
            .peers()
            .filter(configured_peer)
            .any(|p| p.cluster != 0 && (p.alive || p.since_beat < STICK));
        let present: Vec<_> = pulse.peers().filter(configured_peer).filter(|p| p.alive).collect();
        if founded {
            pulse.set_support(None);
            return;
        }
        if present.len() + 1 < majority {
            return;
        }
        let lowest = present.iter().map(|p| p.identity.id).chain([me]).min();
        let support = match self.members.supported {
            // Whoever supports another one does not found; so those who supported it may follow it there.
            Some(node) if node != me => {
                match pulse.peer(node).filter(|p| p.since_beat < STICK && p.cluster == 0) {
                    Some(p) => Some(p.support.filter(|s| *s < node).unwrap_or(node)),
                    None => lowest,
                }
            }
            _ => lowest,
        };
        self.members.supported = support;
        pulse.set_support(support);
        let supporters = 1 + present.iter().filter(|p| p.support == Some(me)).count();
        drop(pulse);
        if support == Some(me) && supporters >= majority {
            self.make_cluster();
        }
    }

    fn make_cluster(&mut self) {
        self.cluster = self.me.0;
        let member = Member { raft_id: self.me.0, node: self.config.identity.clone(), voter: true };
        let mut state = State::default();
        state
            .apply(FIRST.0, &Command::own(self.now.wall_ms, Change::MemberPut { member }))
            .expect("an empty state has room for its first member");
        self.state = Arc::new(state);
        self.conf = ConfState { voters: vec![self.me.0], ..ConfState::default() };
        self.hard_state = HardState { term: FIRST.1, vote: raft::INVALID_ID, commit: FIRST.0 };
        let snapshot = self.snapshot(FIRST.0, FIRST.1);
        let mut log = Log::new();
        log.install(snapshot.clone());
        log.set_hard_state(self.hard_state.clone());
        self.raft = new_raft(self.me, log, FIRST.0).expect("a log with one snapshot is in order");
        self.seen = (raft::StateRole::Follower, FIRST.1);
        let number = self.disk.begin(0, true);
        self.out.push_back(Output::Persist(Persist {
            number,
            raft_id: Some(self.me),
            hard_state: Some(self.hard_state.clone()),
            snapshot: Some(snapshot),
            reset_log: true,
            sync: true,
            ..Persist::default()
        }));
        self.lock().set_cluster(self.cluster);
        self.election.settled(self.now.at);
        self.tell_pulse(true);
        self.out.push_back(Output::State);
    }
}
