//! From `raft` to the disk, to the other nodes, and into the replicated state.

use std::collections::BTreeMap;
use std::sync::Arc;

use raft::StateRole;
use raft::eraftpb::{ConfChange, ConfChangeV2, Entry, EntryType, Snapshot};

use super::{Core, Failure, Output};
use crate::pulse::Assignment;
use crate::raft::{Persist, RaftId, SnapshotData};
use crate::state::{Command, Outcome, Refusal, State};

impl Core {
    /// After everything that may have moved `raft`: takes note of its role, decides as a leader, and hands out what it
    /// has ready, until nothing is left.
    pub(super) fn settle(&mut self) {
        loop {
            self.note_role();
            self.found();
            if self.is_leader() {
                self.duties();
            }
            if !self.raft.has_ready() {
                break;
            }
            while self.raft.has_ready() {
                self.take_ready();
            }
        }
        self.compact();
    }

    /// Notices that this node has won or lost a term.
    fn note_role(&mut self) {
        let role = (self.raft.raft.state, self.raft.raft.term);
        let now = self.now.at;
        let pulse_leads = self.lock().attend(now);
        if self.raft.raft.state == StateRole::Leader && !pulse_leads && self.seen == role {
            // A beat of a higher term has made the pulse step down; `raft` would learn of it a little later.
            self.raft.raft.become_follower(role.1, raft::INVALID_ID);
            return self.note_role();
        }
        if role == self.seen {
            return;
        }
        let (before, _) = std::mem::replace(&mut self.seen, role);
        if before == StateRole::Leader {
            self.lock().step_down();
            self.stop_leading();
        }
        if self.raft.raft.leader_id != raft::INVALID_ID {
            self.election.settled(self.now.at);
        }
        if role.0 == StateRole::Leader {
            self.start_leading(role.1);
        }
    }

    fn start_leading(&mut self, term: u64) {
        let now = self.now.at;
        self.led_since = now;
        self.next_tick = now.after(self.config.timing.beat);
        self.term_start = self.raft.raft.raft_log.last_index();
        self.director = crate::director::Director::new(self.director.transferred_at());
        self.transfer = None;
        let voters = self.voters().collect();
        self.alone.at_once = false;
        self.lock().lead(term, voters, now);
        // Decisions that can be made at once travel with the term's first entry: one round and one fsync for both.
        // `raft` has already sent that entry alone and would wait for the answer before the next.
        self.duties();
        let raft = &mut self.raft.raft;
        if raft.raft_log.last_index() > self.term_start {
            raft.msgs.retain(|m| m.get_msg_type() != raft::eraftpb::MessageType::MsgAppend);
            for (_, progress) in raft.mut_prs().iter_mut() {
                progress.paused = false;
            }
            raft.bcast_append();
        }
    }

    pub(super) fn stop_leading(&mut self) {
        self.transfer = None;
        self.trial = None;
        for ticket in self.members.abandon() {
            self.out.push_back(Output::Done { ticket, result: Err(Failure::Lost) });
        }
    }

    fn take_ready(&mut self) {
        let mut ready = self.raft.ready();
        let number = ready.number();
        let at_once = ready.take_messages();
        let later = ready.take_persisted_messages();
        let committed = ready.take_committed_entries();
        let mut write = Persist::default();
        let snapshot = ready.snapshot().clone();
        if !snapshot.is_empty() {
            self.install(snapshot.clone());
            write.snapshot = Some(snapshot);
            write.reset_log = true;
        }
        write.entries = ready.take_entries();
        self.raft.mut_store().append(write.entries.iter().cloned());
        let mut promise = false;
        if let Some(hs) = ready.hs() {
            promise = hs.term != self.hard_state.term || hs.vote != self.hard_state.vote;
            self.hard_state = hs.clone();
        }
        // A commit index alone is not worth a write: after a restart the leader tells it again.
        let must_sync = promise || write.snapshot.is_some() || !write.entries.is_empty();
        // An empty store of a node that doesn't vote has nothing to remember.
        if must_sync && self.cluster != 0 {
            write.hard_state = Some(self.hard_state.clone());
            write.raft_id = (self.disk.newest == 0 || self.alone.unnamed).then_some(self.me);
            self.alone.unnamed = false;
            write.sync = true;
            write.number = self.disk.begin(number, promise);
            if promise {
                self.promised_at = self.now.at;
            }
        }
        self.raft.advance_append_async(ready);
        // A leader's messages go first: its followers' disks work while its own does.
        let at_once = self.disk.after_promise(at_once);
        self.send(at_once);
        if write.number > 0 {
            self.out.push_back(Output::Persist(write));
        } else if self.disk.nothing_to_write(number) {
            self.raft.on_persist_ready(number);
        }
        let later = self.disk.after_writes(later);
        self.send(later);
        self.apply(committed);
        self.report_applied();
    }

    /// Tells `raft` how far the state machine is; it counts only what is on disk too.
    pub(super) fn report_applied(&mut self) {
        let log = &self.raft.raft.raft_log;
        let index = self.state.index.min(log.committed).min(log.persisted);
        if index > log.applied {
            self.raft.advance_apply_to(index);
        }
    }

    /// A snapshot from the leader takes the place of the state.
    fn install(&mut self, snapshot: Snapshot) {
        let data = SnapshotData::decode(&snapshot.data).unwrap_or_else(|e| {
            panic!("a snapshot of the cluster's state can't be read, so this node can't go on: {e}")
        });
        let meta = snapshot.get_metadata();
        if self.conf.voters != meta.get_conf_state().voters {
            self.reconfigured_at = self.now.at;
        }
        self.conf = meta.get_conf_state().clone();
        assert!(data.state.index <= meta.index, "the snapshot's state is newer than the snapshot");
        let mut state = data.state;
        if state.index < meta.index {
            state.advance(meta.index);
        }
        self.state = Arc::new(state);
        if self.cluster == 0 {
            self.cluster = data.cluster;
            let mut pulse = super::lock(&self.pulse);
            pulse.set_cluster(data.cluster);
            pulse.set_line(self.state.line);
        }
        let lost: Vec<u64> = self.requests.range(..=meta.index).map(|(i, _)| *i).collect();
        for index in lost {
            if let Some(r) = self.requests.remove(&index) {
                self.out.push_back(Output::Done { ticket: r.ticket, result: Err(Failure::Lost) });
            }
        }
        self.raft.mut_store().install(snapshot);
        self.observe_timers(Some(self.now.wall_ms));
        self.tell_pulse(true);
        self.out.push_back(Output::State);
    }

    fn apply(&mut self, entries: Vec<Entry>) {
        if entries.is_empty() {
            return;
        }
        // What the log held at start was begun before, by the wall clock; the rest begins now.
        let restored = entries.first().is_some_and(|e| e.index <= self.restored_through);
        let restored_wall_ms = restored.then_some(self.now.wall_ms);
        let mut state = State::clone(&self.state);
        let mut wide = false;
        let mut members_changed = false;
        for entry in entries {
            let result = match entry.get_entry_type() {
                EntryType::EntryNormal if entry.data.is_empty() => {
                    state.advance(entry.index);
                    Ok(Outcome { index: entry.index, revision: state.revision, ..Outcome::default() })
                }
                EntryType::EntryNormal => {
                    let command = decode(&entry.data, entry.index);
                    wide |= touches_more_than_ownership(&command);
                    state.apply(entry.index, &command)
                }
                EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => {
                    members_changed = true;
                    self.reconfigure(&entry, &mut state)
                }
            };
            self.answer(entry.index, entry.term, result);
        }
        if members_changed {
            self.keep_configuration();
        }
        self.state = Arc::new(state);
        self.observe_timers(restored_wall_ms);
        self.tell_pulse(wide || members_changed);
        let opened = self.is_leader() && self.state.index >= self.term_start;
        if opened {
            let now = self.now.at;
            self.lock().open(now);
        }
        self.out.push_back(Output::State);
    }

    fn reconfigure(&mut self, entry: &Entry, state: &mut State) -> Result<Outcome, Refusal> {
        use prost_raft::Message as _;
        let change = match entry.get_entry_type() {
            EntryType::EntryConfChange => ConfChange::decode(entry.data.as_slice()).map(|c| raft_v2(&c)),
            _ => ConfChangeV2::decode(entry.data.as_slice()),
        };
        let change = change.unwrap_or_else(|e| {
            panic!("log entry {} can't be read, so this node can't go on: {e}", entry.index)
        });
        match self.raft.apply_conf_change(&change) {
            Ok(conf) => {
                if conf.voters != self.conf.voters {
                    self.reconfigured_at = self.now.at;
                }
                self.conf = conf;
            }
            // Every node gets the same answer, so nothing is applied anywhere.
            Err(e) => {
                tracing::warn!("configuration change at log entry {} was not possible: {e}", entry.index)
            }
        }
        if entry.context.is_empty() {
            state.advance(entry.index);
            return Ok(Outcome { index: entry.index, revision: state.revision, ..Outcome::default() });
        }
        state.apply(entry.index, &decode(&entry.context, entry.index))
    }

    /// Writes the commit index down, which otherwise only goes along with something else: a node that is started again
    /// before it hears of a leader campaigns in the configuration that it knows to be committed. While a lost store is
    /// replaced that may be one voter more, and two nodes of three would be no majority of it.
    fn keep_configuration(&mut self) {
        if self.cluster == 0 {
            return;
        }
        let number = self.disk.begin(0, false);
        let hard_state = Some(self.hard_state.clone());
        self.out.push_back(Output::Persist(Persist { number, hard_state, sync: true, ..Persist::default() }));
    }

    /// Ends the request whose entry stands at `index`.
    fn answer(&mut self, index: u64, term: u64, result: Result<Outcome, Refusal>) {
        if let Some(r) = self.requests.remove(&index) {
            // Another leader's entry stands where this one's was.
            let result = if r.term == term { result.map_err(Failure::Refused) } else { Err(Failure::Lost) };
            self.out.push_back(Output::Done { ticket: r.ticket, result });
        }
        for (ticket, result) in self.members.applied(&self.conf, index) {
            self.out.push_back(Output::Done { ticket, result });
        }
    }

    /// Tells the beat thread's side what of the state concerns it; with `all` also what seldom changes.
    pub(super) fn tell_pulse(&mut self, all: bool) {
        let assignments = self
            .state
            .groups
            .iter()
            .map(|g| (g.id, Assignment { node: g.owner, epoch: g.epoch, index: g.assigned_index }))
            .collect();
        if !all {
            self.lock().set_assignments(assignments, self.state.index);
            return;
        }
        // There may be many backends: only what changed is told under the lock.
        let mut verdicts = BTreeMap::new();
        for s in self.state.services.iter().filter(|s| s.checked()) {
            verdicts.extend(s.living().map(|b| (b.id, (s.group, b.health))));
        }
        let before = std::mem::replace(&mut self.verdicts, verdicts);
        let gone = before.keys().filter(|id| !self.verdicts.contains_key(id)).map(|id| (*id, None));
        let changed =
            self.verdicts.iter().filter(|(id, (_, health))| before.get(id).is_none_or(|b| b.1 != *health));
        let news: Vec<_> = gone.chain(changed.map(|(id, (_, health))| (*id, Some(*health)))).collect();
        let mut pulse = super::lock(&self.pulse);
        pulse.set_assignments(assignments, self.state.index);
        pulse.set_verdicts(news);
        let members = self.state.members.iter().map(|m| (m.node.id, m.node.address));
        let configured: Vec<_> = self.config.peers.iter().map(|p| (p.id, p.address)).collect();
        let members: Vec<_> = members.filter(|(id, _)| configured.iter().all(|(c, _)| c != id)).collect();
        pulse.set_members(members.into_iter(), configured.into_iter());
        let voters: Vec<RaftId> = self.conf.voters.iter().map(|id| RaftId(*id)).collect();
        // Alone in the configuration: nobody else can vote, and nobody else can hold a grant, because a node is only
        // removed after its last grant has run out.
        // One that went on alone doesn't know what its peer has done since: it listens first.
        let alone = self.state.solo.is_some();
        pulse.set_sole(voters == [self.me] && self.conf.learners.is_empty() && !alone);
        pulse.set_voters(voters);
    }

    /// Takes a snapshot when the log has grown long.
    fn compact(&mut self) {
        let index = self.raft.raft.raft_log.applied;
        if self.cluster == 0 || index != self.state.index || !self.raft.store().wants_compaction(index) {
            return;
        }
        let snapshot = self.snapshot(index, self.raft.store().term_of(index).unwrap_or_default());
        let mut write = Persist {
            snapshot: Some(snapshot.clone()),
            hard_state: Some(self.hard_state.clone()),
            ..Persist::default()
        };
        write.drop_through = self.raft.mut_store().compact(snapshot);
        // Nothing waits for it, but everything written later must not be on disk before it.
        write.number = self.disk.begin(0, false);
        self.out.push_back(Output::Persist(write));
    }

    pub(super) fn snapshot(&self, index: u64, term: u64) -> Snapshot {
        let data = SnapshotData { cluster: self.cluster, state: State::clone(&self.state) }.encode();
        let mut snapshot = Snapshot { data, ..Snapshot::default() };
        let meta = snapshot.mut_metadata();
        meta.index = index;
        meta.term = term;
        meta.set_conf_state(self.conf.clone());
        snapshot
    }
}

pub(super) fn decode(data: &[u8], index: u64) -> Command {
    Command::decode(data).unwrap_or_else(|e| {
        panic!("log entry {index} can't be read, and without it this node's state would be wrong: {e}")
    })
}

/// Whether a command can have changed verdicts or members.
fn touches_more_than_ownership(command: &Command) -> bool {
    use crate::state::Change;
    !matches!(
        command.change,
        Change::Assign { .. }
            | Change::Release { .. }
            | Change::Settle { .. }
            | Change::Free { .. }
            | Change::Switchover { .. }
    )
}

fn raft_v2(change: &ConfChange) -> ConfChangeV2 {
    use raft::eraftpb::ConfChangeSingle;
    let mut single = ConfChangeSingle::default();
    single.set_change_type(change.get_change_type());
    single.node_id = change.node_id;
    ConfChangeV2 { changes: vec![single], ..ConfChangeV2::default() }
}
