//! A pair without a third node: when this node goes on alone, and how it gives way to one that did. The argument stands in
//! [`crate::pair`] and in `ARCHITECTURE.md`.
//!
//! ```text
//!         ended; silent, sounded; or forced                   a higher line has heard us
//!   of two ─────────────────────────────────▶ solo ──────────────────────────────────────┐
//!     ▲                                         │ the peer votes again                    ▼
//!     │◀────────────────────────────────────────┘                               set aside what is ours alone
//!     │                 admitted, caught up, promoted                                     │
//!     └───────────────────────────────────────────────────────── empty, a new Raft id ◀───┘
//! ```

use std::sync::Arc;
use std::time::Duration;

use komainu_proto::domain::{NodeId, Role};
use raft::eraftpb::{ConfChange, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType, HardState};
use raft::{GetEntriesContext, Storage as _};

use super::{Core, Failure, Now, Output, new_raft};
use crate::director::Director;
use crate::pair::{self, Aside, BOOT_PATIENCE, FRESH, Policy, Sounding};
use crate::pulse::Pulse;
use crate::raft::{Log, Persist, RaftId};
use crate::state::{CLUSTER, Member, Outcome, State, Timers};
use crate::time::Instant;

/// How long a peer must have been heard with an empty store before its former one is given up.
const STEADY: Duration = Duration::from_millis(500);
/// How long to wait before what can't be set aside is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What is under way.
#[derive(Debug, Default)]
pub(super) struct Alone {
    /// The newest sounding.
    sounding: Option<Sounding>,
    /// Soundings are asked for.
    asked: bool,
    /// The write that a line begins with: nothing is done in it before that is on disk.
    pub(super) base_write: u64,
    /// The line that begins with that write.
    begins: Option<u64>,
    /// The line has just begun: there is nobody to wait for.
    pub(super) at_once: bool,
    /// The next write must name the store.
    pub(super) unnamed: bool,
    /// What is set aside is on its way to disk; or could not be written at that time.
    aside: Option<Result<(), Instant>>,
}

/// How a node stands to its only peer.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    /// The promise.
    pub policy: Policy,
    /// The peer; or why there is no pair, in words.
    pub peer: Result<NodeId, String>,
    /// For how long it has been silent on every path; absent while it is heard, or was not waited for long enough.
    pub silent: Option<Duration>,
    /// What was found out last about the service network.
    pub sounding: Option<Sounding>,
}

impl Standing {
    /// Of a node that is no part of a pair.
    pub fn none(why: &str) -> Standing {
        Standing { policy: Policy::Safety, peer: Err(why.to_owned()), silent: None, sounding: None }
    }

    /// Whether two differ in durations at most.
    pub(crate) fn same_but_for_time(&self, other: &Standing) -> bool {
        let found = |s: &Standing| s.sounding.map(|s| (s.arbiter, s.claimed));
        let kept = |s: &Standing| (s.policy, s.peer.clone(), s.silent.is_some(), found(s));
        kept(self) == kept(other)
    }
}

impl Core {
    /// How this node stands to its peer, for people.
    pub fn standing(&self) -> Standing {
        let peer = self.pair();
        let silent = peer.as_ref().ok().and_then(|id| self.silent_for(&self.lock(), *id));
        let silent = silent.filter(|s| *s >= pair::silence(&self.config.timing));
        Standing {
            policy: self.config.pair,
            peer: peer.map(RaftId::node),
            silent,
            sounding: self.alone.sounding,
        }
    }

    /// What was found out about the service network, as asked for by [`Output::Sound`].
    pub fn handle_sounding(&mut self, sounding: Sounding, now: Now) {
        self.now = now;
        self.alone.sounding = Some(sounding);
        self.pair_duty();
        self.settle();
    }

    /// Whether what [`Output::Aside`] asked for is on disk.
    pub fn handle_aside(&mut self, kept: bool, now: Now) {
        self.now = now;
        if !kept {
            self.alone.aside = Some(Err(now.at));
            return;
        }
        self.start_anew();
        self.settle();
    }

    /// An operator has this node go on alone.
    ///
    /// # Errors
    /// It is no pair, or the peer is heard. Nothing has changed.
    pub fn force(&mut self, who: &str, now: Now) -> Result<Outcome, Failure> {
        self.now = now;
        let peer = self.pair().map_err(Failure::Impossible)?;
        let (silent, free) = {
            let pulse = self.lock();
            (self.silent_for(&pulse, peer), pulse.may_promise(now.at))
        };
        let name = self.name_of(peer.node());
        if silent.is_none_or(|s| s < pair::silence(&self.config.timing)) {
            return Err(Failure::Impossible(format!(
                "{name} is heard, or was until a moment ago: only a node whose peer is silent on every path can be forced"
            )));
        }
        if !free || self.disk.has_failed() {
            return Err(Failure::Busy);
        }
        self.go_solo(who);
        let (index, revision) = (self.state.index, self.state.revision);
        self.settle();
        Ok(Outcome { index, revision, changed: true, ..Outcome::default() })
    }

    /// Gives way where that is due, has the service network sounded, and goes on alone.
    pub(super) fn pair_duty(&mut self) {
        if self.lock().yields_to().is_some() {
            return self.give_way_to_line();
        }
        let peer = self.peer_to_do_without();
        let wants = peer.is_some_and(|peer| self.wants_to_sound(peer));
        if wants != self.alone.asked {
            self.alone.asked = wants;
            self.out.push_back(Output::Sound { on: wants });
        }
        if peer.is_some_and(|peer| self.may_go_alone(peer)) {
            if std::mem::take(&mut self.alone.asked) {
                self.out.push_back(Output::Sound { on: false });
            }
            self.go_solo(CLUSTER);
        }
    }

    /// When the only peer, should it remain silent, has been so for long enough to be asked about, or to do without it.
    pub(super) fn pair_due(&self, pulse: &Pulse) -> Option<Instant> {
        if self.config.pair != Policy::Availability || self.conf.voters.len() != 2 {
            return None;
        }
        let heard = pulse.heard_at(self.pair().ok()?.node())?;
        let timing = &self.config.timing;
        let [asked, done_without] = [pair::suspicion(timing), pair::silence(timing)].map(|d| heard.after(d));
        let due = [pulse.promise_free_at(), asked, done_without];
        due.into_iter().filter(|at| *at > self.now.at).min()
    }

    /// Whether there is reason to ask about the peer, and its answer would mean something: until the promise is over it may own a
    /// group, and answer for it. Nobody has to be asked about a process that is known to have ended.
    fn wants_to_sound(&self, peer: RaftId) -> bool {
        let pulse = self.lock();
        let silent = self.silent_for(&pulse, peer);
        silent.is_some_and(|s| s >= pair::suspicion(&self.config.timing))
            && self.now.at >= pulse.promise_free_at()
            && !self.has_ended(&pulse, peer)
    }

    /// The only peer, if this node may go on without it by itself.
    fn peer_to_do_without(&self) -> Option<RaftId> {
        let may = self.config.pair == Policy::Availability && !self.disk.has_failed();
        self.pair().ok().filter(|_| may)
    }

    /// Whether the peer's process has ended for certain, and no other process of that node can have come to own anything since it was
    /// heard: that one owns nothing without this node's acknowledgements before it has waited for [`BOOT_PATIENCE`].
    fn has_ended(&self, pulse: &Pulse, peer: RaftId) -> bool {
        let node = peer.node();
        pulse.has_died(node)
            && pulse.heard_at(node).is_some_and(|at| self.now.at.since(at) < pair::REMEMBERED_END)
    }

    /// Whether nothing speaks against it any more. What the peer may have held under this configuration ended before anybody
    /// was asked: a leader's lease needs this node's acknowledgement, and the promise behind that is over; what this node granted
    /// it never outlasts this node's own lease.
    fn may_go_alone(&self, peer: RaftId) -> bool {
        let now = self.now.at;
        let pulse = self.lock();
        if self.has_ended(&pulse, peer) {
            return pulse.may_promise(now);
        }
        let Some(s) = self.alone.sounding.filter(|s| now.since(s.ended) <= FRESH) else { return false };
        let Some(silent) = self.silent_for(&pulse, peer) else { return false };
        let asked_in_silence = silent.checked_sub(now.since(s.began));
        silent >= pair::silence(&self.config.timing)
            && asked_in_silence.is_some_and(|before| before >= pair::suspicion(&self.config.timing))
            && pulse.may_promise(now)
            && s.began >= pulse.promise_free_at()
            && s.arbiter == Some(true)
            && s.claimed.is_none()
    }

    /// For how long a voter has been silent; absent before it has been waited for long enough.
    fn silent_for(&self, pulse: &Pulse, peer: RaftId) -> Option<Duration> {
        let now = self.now.at;
        let node = peer.node();
        if let Some(p) = pulse.peer(node).filter(|p| p.alive && p.cluster == 0 && p.raft_id != peer) {
            // Its process is there and its store is not: nobody can vote with that any more.
            return Some(p.steady).filter(|steady| *steady >= STEADY);
        }
        match pulse.heard_at(node) {
            // Its executor has said so: there is no process that could be heard, however long one waits.
            Some(at) if pulse.has_died(node) => Some(now.since(at) + pair::silence(&self.config.timing)),
            Some(at) => Some(now.since(at)),
            None => {
                let waited = now.since(self.started_at).checked_sub(BOOT_PATIENCE)?;
                Some(waited + pair::silence(&self.config.timing))
            }
        }
    }

    /// The other voter, where two balancers are all there is; or why it is no pair.
    fn pair(&self) -> Result<RaftId, String> {
        let me = self.me.node();
        let no = |text: &str| Err(text.to_owned());
        if self.cluster == 0 {
            return no("this node belongs to no cluster yet");
        }
        if self.config.identity.role != Role::Balancer {
            return no("this node is a witness");
        }
        if !self.conf.voters.contains(&self.me.0) {
            return no("this node has no vote: it waits for the one that has");
        }
        let mut others = self.voters().filter(|v| *v != self.me);
        let (peer, third) = (others.next(), others.next());
        let Some(peer) = peer else {
            return no("this node decides alone already");
        };
        let third = third.map(RaftId::node);
        let members = self.state.members.iter().map(|m| m.node.id);
        let known = members
            .chain(self.state.joining.iter().map(|j| j.node.id))
            .chain(self.config.peers.iter().map(|p| p.id));
        let third = third.or_else(|| known.into_iter().find(|n| *n != me && *n != peer.node()));
        if let Some(third) = third.filter(|n| *n != me) {
            return Err(format!(
                "the cluster is no pair: there is {}, too, and a majority decides; bring that one or the other back",
                self.name_of(third)
            ));
        }
        if third.is_some()
            || peer.node() == me
            || self.state.member(peer.node()).is_some_and(|m| m.node.role != Role::Balancer)
        {
            return no("the cluster is no pair of balancers");
        }
        if self.tail().iter().any(|e| changes_others(e, self.me, peer.node())) {
            return no("a change of the members is under way, and whether it was made is not known here");
        }
        Ok(peer)
    }

    fn name_of(&self, node: NodeId) -> String {
        let member = self.state.member(node).map(|m| m.node.name.clone());
        member.unwrap_or_else(|| format!("node {}", node.0))
    }

    /// Entries of the log that are not applied: some of them may be committed elsewhere.
    fn tail(&self) -> Vec<Entry> {
        let log = self.raft.store();
        let (low, high) = (self.state.index + 1, log.last() + 1);
        if low >= high {
            return Vec::new();
        }
        log.entries(low, high, None, GetEntriesContext::empty(false)).unwrap_or_default()
    }

    /// The state with everything that stands in the log, whether that is known to be committed or not. Whoever asked for what
    /// isn't is told that it may have been made.
    fn with_tail(&self) -> State {
        let mut state = State::clone(&self.state);
        for entry in self.tail() {
            match entry.get_entry_type() {
                EntryType::EntryNormal if !entry.data.is_empty() => {
                    let _ = state.apply(entry.index, &super::apply::decode(&entry.data, entry.index));
                }
                // Who votes is not decided here.
                _ => state.advance(entry.index),
            }
        }
        state
    }

    /// Begins a line with this node as its only voter. All that this node has in its log becomes part of it: what the two agreed on
    /// is on both disks, whether this one was told of that or not.
    fn go_solo(&mut self, who: &str) {
        let now = self.now;
        let peer = self.voters().find(|v| *v != self.me).map_or(NodeId(0), RaftId::node);
        let mut state = self.with_tail();
        let known = self.raft.raft.term.max(self.lock().term()).max(state.line);
        let line = pair::solo_term(known, self.me.node() < peer);
        let me = RaftId::new(self.me.node(), self.incarnation(line));
        let member = Member { raft_id: me.0, node: self.config.identity.clone(), voter: true };
        state.go_solo(line, member, who, now.wall_ms);
        tracing::warn!(line, who, peer = peer.0, "this node goes on alone");

        self.conf = ConfState { voters: vec![me.0], ..ConfState::default() };
        self.hard_state = HardState { term: line - 1, vote: raft::INVALID_ID, commit: state.index };
        self.state = Arc::new(state);
        let index = self.state.index;
        let snapshot = self.snapshot(index, line - 1);
        let mut log = Log::new();
        log.install(snapshot.clone());
        log.set_hard_state(self.hard_state.clone());
        self.restart(me, log, index);
        let number = self.disk.begin(0, true);
        self.alone.base_write = number;
        self.alone.at_once = true;
        self.out.push_back(Output::Persist(Persist {
            number,
            raft_id: Some(me),
            hard_state: Some(self.hard_state.clone()),
            snapshot: Some(snapshot),
            reset_log: true,
            sync: true,
            ..Persist::default()
        }));
        // Until it is on disk nobody hears of it, this node's own beats included: another process would begin the same line with
        // something else in it.
        self.alone.begins = Some(line);
        self.lock().step_down();
    }

    /// A write is on disk: if it was a line's first, the line begins.
    pub(super) fn begin_line(&mut self) {
        if self.disk.persisted < self.alone.base_write {
            return;
        }
        let Some(line) = self.alone.begins.take() else { return };
        self.lock().begin_line(self.me, line, self.now.at);
        self.observe_timers(None);
        self.tell_pulse(true);
        self.out.push_back(Output::State);
    }

    /// Another line goes on: sees to it that nothing is lost of this one, and then belongs to none.
    fn give_way_to_line(&mut self) {
        let Some((to, to_line)) = self.lock().yields_to() else { return };
        match self.alone.aside {
            Some(Ok(())) => return,
            Some(Err(at)) if self.now.at.since(at) < RETRY => return,
            _ => {}
        }
        if self.state.solo.is_none() {
            return self.start_anew();
        }
        // Of a node that was started again the end of the log may be acknowledged and not applied yet.
        let state = self.with_tail();
        let Some(solo) = state.solo.as_ref().filter(|s| s.touched) else {
            return self.start_anew();
        };
        self.alone.aside = Some(Ok(()));
        let changes = state.history.iter().filter(|r| r.revision > solo.revision).cloned().collect();
        self.out.push_back(Output::Aside(Box::new(Aside {
            line: state.line,
            to,
            to_line,
            base: solo.revision,
            changes,
            document: state.export(),
        })));
    }

    /// Forgets everything: whoever goes on alone admits this node like any that is new.
    fn start_anew(&mut self) {
        let now = self.now;
        let Some((to, to_line)) = self.lock().yields_to() else { return };
        tracing::warn!(to = to.0, line = to_line, "another line goes on: this node joins it as a new member");
        let me =
            RaftId::new(self.me.node(), self.incarnation(to_line ^ self.state.line << INCARNATION_SHIFT));
        self.cluster = 0;
        self.state = Arc::new(State::default());
        self.conf = ConfState::default();
        self.hard_state = HardState::default();
        self.restart(me, Log::new(), 0);
        self.timers = Timers::new();
        self.verdicts.clear();
        self.alone = Alone { unnamed: true, ..Alone::default() };
        let number = self.disk.begin(0, true);
        self.alone.base_write = number;
        self.out.push_back(Output::Persist(Persist {
            number,
            forget: true,
            sync: true,
            ..Persist::default()
        }));
        self.lock().start_anew(me, now.at);
        self.observe_timers(None);
        self.tell_pulse(true);
        self.out.push_back(Output::State);
    }

    /// Everything that concerns the log of before begins anew.
    fn restart(&mut self, me: RaftId, log: Log, applied: u64) {
        self.stop_leading();
        for (_, request) in std::mem::take(&mut self.requests) {
            self.out.push_back(Output::Done { ticket: request.ticket, result: Err(Failure::Lost) });
        }
        self.restored_through = log.last();
        self.raft = new_raft(me, log, applied).expect("a log with one snapshot, or none, is in order");
        self.me = me;
        self.seen = (raft::StateRole::Follower, self.hard_state.term);
        self.disk.restart();
        self.director = Director::default();
        self.members.supported = None;
        self.handed_over = None;
        self.told_to_lead = None;
        self.asked.clear();
        self.snapshots_since.clear();
        self.verdicts_asked.clear();
        self.term_start = 0;
        self.reconfigured_at = self.now.at;
        self.election.settled(self.now.at);
    }

    /// A number for a Raft id that this node has never had: drawn from this process's own, as a store's is.
    fn incarnation(&self, salt: u64) -> u64 {
        let mut z = self.config.incarnation.wrapping_add(salt.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Before a campaign of a node that is alone: its terms keep their parity.
    pub(super) fn keep_parity(&mut self) {
        if self.state.solo.is_none() {
            return;
        }
        let term = self.raft.raft.term;
        if (term + 1).is_multiple_of(2) != self.state.line.is_multiple_of(2) {
            self.raft.raft.become_follower(term + 1, raft::INVALID_ID);
        }
    }
}

/// Keeps the two numbers apart that a new Raft id is drawn from.
const INCARNATION_SHIFT: u32 = 32;

/// Whether an entry would change the membership of a node beside the two, or take this node out.
fn changes_others(entry: &Entry, me: RaftId, peer: NodeId) -> bool {
    use prost_raft::Message as _;
    let changes = match entry.get_entry_type() {
        EntryType::EntryNormal => return false,
        EntryType::EntryConfChange => {
            ConfChange::decode(entry.data.as_slice()).map(|c| vec![(c.get_change_type(), c.node_id)])
        }
        EntryType::EntryConfChangeV2 => ConfChangeV2::decode(entry.data.as_slice())
            .map(|c| c.changes.iter().map(|s| (s.get_change_type(), s.node_id)).collect()),
    };
    changes.map_or(true, |all| {
        all.into_iter().any(|(kind, id)| {
            let node = RaftId(id).node();
            (node != me.node() && node != peer) || (id == me.0 && kind == ConfChangeType::RemoveNode)
        })
    })
}
