//! The whole node as one synchronous machine, without socket, clock, task, disk or randomness of its own.
//!
//! Two parts, because one of them must never wait: [`Pulse`] (beats, leases, promises) belongs to the beat thread,
//! [`Core`] (Raft, ownership decisions, membership) to the Raft thread. What both need is in `Pulse`, behind a mutex
//! ([`Core::pulse`]) that `Core` takes for moments only and never while it encodes, applies or waits.
//!
//! ```text
//! beat thread:  lock { pulse.handle_* ; carry out each pulse.poll_output() } -> lane, UDP, "wake the Raft thread"
//! Raft thread:  core.handle_* ; drain core.poll_output() -> UDP, gRPC, store (fsync) -> core.handle_persisted(n)
//!               sleep until a message, a request, a wake-up from the beat thread (then core.handle_timeout), or
//!               core.next_deadline()
//! ```
//!
//! After each call of `Core` the beat thread should be woken: what `Core` decided (a grant, a release) waits in `Pulse`.
//!
//! Order of calls in one round: `handle_*` and `request`, then [`Core::poll_output`] until it is empty, then
//! [`Core::next_deadline`].

mod api;
mod apply;
mod campaign;
mod disk;
mod duties;
mod election;
mod first_verdicts;
mod founding;
mod membership;
mod solo;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use komainu_proto::domain::{BackendId, GroupId, Health, NodeId};
use prost_raft::Message as _;
use raft::eraftpb::{ConfState, HardState, Message, MessageType};
use raft::{RawNode, SnapshotStatus, StateRole};

pub use api::{Config, Failure, Now, Output, Peer, Request, Ticket, Via};
pub use solo::Standing;

use crate::director::Director;
use crate::pulse::Pulse;
use crate::raft::{Log, RaftId, Restored, SnapshotData};
use crate::rules::Rule;
use crate::state::{DecodeError, State, Timers};
use crate::time::Instant;
use crate::timing::TimingError;
use disk::Disk;
use election::Election;
use first_verdicts::FirstVerdicts;
use membership::Membership;

/// Requests under way. Each holds its command in memory; an operator's tool that sends more than this at once is better
/// told to wait.
const MAX_REQUESTS: usize = 1024;
/// Bytes of entries in one message: a document of usual size in one piece.
const MAX_MESSAGE_BYTES: u64 = 1 << 20;
/// Messages with entries that may be on their way to one follower.
const MAX_IN_FLIGHT: usize = 64;
/// Bytes of a message that goes as a datagram, before sealing: fits one packet on every usual path.
const MAX_DATAGRAM_LEN: usize = crate::pulse::BEAT_MAX_BYTES;
/// How long a follower may take to take a snapshot in before it is sent again. The biggest state is some 100 MB.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(10);
/// A node that resigns no longer waits for others that have been silent for so long. On a busy machine a beat may be late
/// by far more than a leader would wait.
const GONE: Duration = Duration::from_secs(1);

/// Why a node can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Unsafe durations.
    #[error(transparent)]
    Timing(#[from] TimingError),
    /// The store belongs to another node.
    #[error(
        "the store was made by node {stored}, this is node {configured}: point data_dir elsewhere or correct the id"
    )]
    OtherNode {
        /// In the store.
        stored: u64,
        /// In the node file.
        configured: u64,
    },
    /// The snapshot can't be read.
    #[error("the store's snapshot can't be read: {0}")]
    Snapshot(#[from] DecodeError),
    /// `raft` refuses what the store holds.
    #[error("the store contradicts itself: {0}")]
    Raft(#[from] raft::Error),
}

/// See the [module documentation](self).
pub struct Core {
    config: Config,
    me: RaftId,
    pulse: Arc<Mutex<Pulse>>,
    raft: RawNode<Log>,
    state: Arc<State>,
    conf: ConfState,
    /// Cluster of the store; 0 while it is empty.
    cluster: u64,
    /// Term, vote and commit index as `raft` has them, and the part of it that was written.
    hard_state: HardState,
    disk: Disk,
    election: Election,
    /// When the newest term or vote was handed to the store.
    promised_at: Instant,
    /// The leader's death that the election was hastened for.
    bereaved_at: Option<Instant>,
    /// Role and term that everything here was last told of.
    seen: (StateRole, u64),
    led_since: Instant,
    /// First index of the own term while leading: once it is applied, all that came before is known.
    term_start: u64,
    next_tick: Instant,
    requests: BTreeMap<u64, UnderWay>,
    next_ticket: u64,
    members: Membership,
    director: Director,
    timers: Timers,
    timers_due: Option<Instant>,
    /// Group and verdict of each backend that is checked.
    verdicts: BTreeMap<BackendId, (GroupId, Health)>,
    verdicts_asked: BTreeMap<BackendId, (Health, Instant)>,
    first_verdicts: FirstVerdicts,
    /// Since when each follower has been waited for to take a snapshot in.
    snapshots_since: BTreeMap<u64, Instant>,
    /// Whom leadership is being handed to, and since when.
    transfer: Option<(NodeId, Instant)>,
    /// The log's last entry at start: what was begun up to here may have begun long ago.
    restored_through: u64,
    /// The last time that leadership was handed over from here.
    handed_over: Option<HandedOver>,
    /// The newest term in which this node was told to take over, and when first.
    told_to_lead: Option<(u64, Instant)>,
    /// Before leadership is handed over: how quick the disks are.
    trial: Option<duties::Trial>,
    /// When the voters changed last.
    reconfigured_at: Instant,
    /// In a pair: going on alone.
    alone: solo::Alone,
    started_at: Instant,
    /// As a candidate: the votes asked for, and when to ask again.
    asked: Vec<Message>,
    ask_again_at: Instant,
    now: Now,
    out: VecDeque<Output>,
}

/// `MsgTimeoutNow` was sent.
#[derive(Clone, Copy, Debug)]
struct HandedOver {
    to: u64,
    term: u64,
    at: Instant,
}

/// A request whose entry is in the log at a known index.
#[derive(Debug)]
struct UnderWay {
    ticket: Ticket,
    term: u64,
}

// --- getters ---------------------------------------------------------------------------------------------------------

impl Core {
    /// Starts a node on what its store holds; `None` for an empty store.
    ///
    /// # Errors
    /// The store is not this node's or can't be read, or the timing is unsafe.
    pub fn start(config: Config, restored: Option<Restored>, now: Now) -> Result<Core, StartError> {
        config.timing.validate()?;
        let me = match &restored {
            Some(r) if r.raft_id.node() != config.identity.id => {
                return Err(StartError::OtherNode {
                    stored: r.raft_id.node().0,
                    configured: config.identity.id.0,
                });
            }
            Some(r) => r.raft_id,
            None => RaftId::new(config.identity.id, config.incarnation),
        };
        let (log, data) = match &restored {
            Some(r) => (Log::restored(r), SnapshotData::decode(&r.snapshot.data)?),
            None => (Log::new(), SnapshotData { cluster: 0, state: State::default() }),
        };
        let pulse = Pulse::new(&config, me, data.cluster, log.hard_state().term, log.last(), now.at);
        let election = Election::new(config.timing, config.identity.role, config.seed, now.at);
        let applied = log.newest_snapshot().get_metadata().index;
        let hard_state = log.hard_state().clone();
        let restored_through = log.last();
        let raft = new_raft(me, log, applied)?;
        let conf = raft.raft.prs().conf().to_conf_state();
        let mut core = Core {
            me,
            pulse: Arc::new(Mutex::new(pulse)),
            raft,
            state: Arc::new(data.state),
            conf,
            cluster: data.cluster,
            hard_state,
            disk: Disk::default(),
            election,
            promised_at: now.at,
            bereaved_at: None,
            seen: (StateRole::Follower, 0),
            led_since: now.at,
            term_start: 0,
            next_tick: now.at,
            requests: BTreeMap::new(),
            next_ticket: 0,
            members: Membership::default(),
            director: Director::default(),
            timers: Timers::new(),
            timers_due: None,
            verdicts: BTreeMap::new(),
            verdicts_asked: BTreeMap::new(),
            first_verdicts: FirstVerdicts::default(),
            snapshots_since: BTreeMap::new(),
            transfer: None,
            restored_through,
            handed_over: None,
            told_to_lead: None,
            trial: None,
            reconfigured_at: now.at,
            alone: solo::Alone::default(),
            started_at: now.at,
            asked: Vec::new(),
            ask_again_at: now.at,
            now,
            out: VecDeque::new(),
            config,
        };
        core.lock().set_line(core.state.line);
        core.observe_timers(Some(now.wall_ms));
        core.tell_pulse(true);
        core.settle();
        Ok(core)
    }

    /// The part that the beat thread drives.
    pub fn pulse(&self) -> Arc<Mutex<Pulse>> {
        Arc::clone(&self.pulse)
    }

    /// The replicated state as far as it is applied here.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// This node's Raft id.
    pub fn raft_id(&self) -> RaftId {
        self.me
    }

    /// Whether this node leads.
    pub fn is_leader(&self) -> bool {
        self.raft.raft.state == StateRole::Leader
    }

    /// Raft's term.
    pub fn term(&self) -> u64 {
        self.raft.raft.term
    }

    /// How far this node's log is, and how far it thinks that each other node's is, for people who look for a fault.
    pub fn progress(&self) -> String {
        let one = |(id, p): (&u64, &raft::Progress)| {
            format!(
                "{}: {:?} matched {} next {} snapshot {}",
                RaftId(*id),
                p.state,
                p.matched,
                p.next_idx,
                p.pending_snapshot
            )
        };
        let log = &self.raft.raft.raft_log;
        let own = format!(
            "{}: last {} committed {} persisted {} applied {}, writes {} of {}; ",
            self.me,
            log.last_index(),
            log.committed,
            log.persisted,
            log.applied,
            self.disk.persisted,
            self.disk.newest
        );
        own + &self.raft.raft.prs().iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// The leader, as far as this node knows.
    pub fn leader(&self) -> Option<NodeId> {
        let id = self.raft.raft.leader_id;
        if id != raft::INVALID_ID {
            return Some(RaftId(id).node());
        }
        self.lock().leader().map(|(id, _)| id.node())
    }

    /// Raft ids that vote.
    pub fn voters(&self) -> impl Iterator<Item = RaftId> + '_ {
        self.conf.voters.iter().map(|id| RaftId(*id))
    }

    /// Whether the store is empty: this node belongs to no cluster yet.
    pub fn is_empty(&self) -> bool {
        self.cluster == 0
    }

    /// Number of the cluster that this node's store belongs to; 0 while it is empty.
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// Index of the newest entry committed, as far as this node knows.
    pub fn committed(&self) -> u64 {
        self.raft.raft.raft_log.committed
    }

    /// What is left of a backend's drain, on this node's clock.
    pub fn drain_left(&self, backend: BackendId, now: Now) -> Option<Duration> {
        self.timers.drain_left(&self.state, backend, now.at)
    }

    /// Whether a node that was told to resign has nothing left that others could take over: it can be stopped.
    pub fn has_resigned(&self) -> bool {
        let pulse = self.lock();
        let others = pulse.peers().any(|p| {
            p.since_beat < GONE
                && p.health.fit()
                && !p.resigning
                && p.identity.role == komainu_proto::domain::Role::Balancer
        });
        let owns = self.state.groups.iter().any(|g| g.owner == Some(self.me.node()));
        let voters_left = pulse
            .peers()
            .any(|p| p.since_beat < GONE && !p.resigning && self.conf.voters.contains(&p.raft_id.0));
        let holds = pulse.holds_anything(self.now.at) || pulse.yields(self.now.at);
        (!owns && !holds || !others) && (!self.is_leader() || !voters_left)
    }

    /// Whether the voters changed so lately that a lease may rest on acknowledgements counted before. Two changes in that
    /// time, and a quorum of today need not have a node in common with the one that such a lease rests on.
    fn reconfigured_lately(&self) -> bool {
        self.now.at.since(self.reconfigured_at) < self.config.timing.election_min
            && !Rule::OneStepALease.is_broken()
    }

    /// The other members and their addresses.
    pub fn others(&self) -> Vec<(NodeId, SocketAddr)> {
        let ids = self.state.members.iter().map(|m| m.node.id).filter(|id| *id != self.me.node());
        ids.filter_map(|id| Some((id, self.address_of(id)?))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Pulse> {
        lock(&self.pulse)
    }

    fn address_of(&self, node: NodeId) -> Option<SocketAddr> {
        let member = self.state.members.iter().find(|m| m.node.id == node).map(|m| m.node.address);
        let configured = self.config.peers.iter().find(|p| p.id == node).map(|p| p.address);
        // The node file of this machine knows best how to reach another one from here.
        configured.or(member).or_else(|| self.lock().peer(node).map(|p| p.identity.address))
    }
}

fn lock(pulse: &Mutex<Pulse>) -> MutexGuard<'_, Pulse> {
    pulse.lock().expect("whoever panicked with the lock has ended the process: a crash is a failover")
}

fn new_raft(me: RaftId, log: Log, applied: u64) -> raft::Result<RawNode<Log>> {
    // Time is not `raft`'s here: campaigns are started by `Election`, and what `raft` counts in ticks is only the
    // leader's heartbeats and its check for a quorum (a tick a beat).
    const ELECTION_TICKS: usize = 8;
    let config = raft::Config {
        id: me.0,
        election_tick: ELECTION_TICKS,
        min_election_tick: ELECTION_TICKS,
        max_election_tick: ELECTION_TICKS + 1,
        heartbeat_tick: 1,
        applied,
        max_size_per_msg: MAX_MESSAGE_BYTES,
        max_inflight_msgs: MAX_IN_FLIGHT,
        check_quorum: true,
        pre_vote: true,
        ..raft::Config::default()
    };
    RawNode::new(&config, log, &crate::raft::logger::logger())
}

// --- handle ----------------------------------------------------------------------------------------------------------

impl Core {
    /// A Raft message has arrived.
    pub fn handle_message(&mut self, message: Message, now: Now) {
        self.now = now;
        if message.to != self.me.0 || message.from == self.me.0 {
            return;
        }
        if self.lock().is_shunned(RaftId(message.from)) {
            // It admitted this node before that one belonged to a cluster: two logs that have nothing to do with each other
            // must not be taken for one. Or it counts leases and promises by another measure.
            return;
        }
        match message.get_msg_type() {
            MessageType::MsgRequestVote | MessageType::MsgRequestPreVote => self.vote_asked(message),
            MessageType::MsgRequestPreVoteResponse | MessageType::MsgTimeoutNow => self.may_campaign(message),
            MessageType::MsgAppend
            | MessageType::MsgAppendResponse
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgSnapshot
            | MessageType::MsgHeartbeat
            | MessageType::MsgHeartbeatResponse => self.step(message),
            // Proposals and the like are forwarded by the shell, as requests with an answer.
            _ => return,
        }
        self.settle();
    }

    /// The store has carried out every write up to `number`.
    pub fn handle_persisted(&mut self, number: u64, now: Now) {
        self.now = now;
        let owed = self.disk.owes_promise();
        let freed = self.disk.persisted(number);
        if owed && !self.disk.owes_promise() {
            self.promise_is_safe();
        }
        if let Some(ready) = freed.ready {
            self.raft.on_persist_ready(ready);
            self.report_applied();
        }
        self.send(freed.messages);
        self.begin_line();
        if !self.is_leader() {
            self.maybe_campaign();
        }
        self.settle();
    }

    /// A write was not carried out, and none will be any more: what rests on one is never said. As a leader this node
    /// decides nothing from now on, and gives way as soon as the others can do without it.
    pub fn handle_store_failed(&mut self, now: Now) {
        self.now = now;
        self.disk.fail();
        self.lock().set_store_failed(now.at);
    }

    /// A message of [`Via::Stream`] could not be delivered to a node.
    pub fn handle_unreachable(&mut self, node: NodeId, now: Now) {
        self.now = now;
        let ids: Vec<u64> =
            self.raft.raft.prs().iter().map(|(id, _)| *id).filter(|id| RaftId(*id).node() == node).collect();
        for id in ids {
            self.raft.report_unreachable(id);
            self.raft.report_snapshot(id, SnapshotStatus::Failure);
        }
        self.settle();
    }

    /// Time has passed, or the beat thread has seen something that concerns this side ([`crate::pulse::Output::Prompt`]).
    pub fn handle_timeout(&mut self, now: Now) {
        let stalled = now.at.since(self.now.at) >= self.config.timing.election_min;
        self.now = now;
        if stalled {
            // Whatever is in the sockets may prove that there is a leader.
            self.election.postpone(now.at.after(self.config.timing.beat * 2));
        }
        if self.is_leader() {
            self.lead_on();
        } else {
            self.heed_death();
            self.maybe_campaign();
            self.ask_again();
        }
        self.look_at_timers();
        self.settle();
        self.pair_duty();
        self.settle();
    }

    /// When [`Core::handle_timeout`] is to be called at the latest.
    pub fn next_deadline(&self) -> Instant {
        self.deadline(&self.lock())
    }

    /// [`Core::next_deadline`] for one who holds the lock already.
    pub fn deadline(&self, pulse: &Pulse) -> Instant {
        let next = if self.is_leader() {
            self.next_tick
        } else {
            let campaign =
                self.campaign_at(pulse).unwrap_or(self.now.at.after(self.config.timing.election_max));
            if self.asked.is_empty() { campaign } else { campaign.min(self.ask_again_at) }
        };
        let next = self.pair_due(pulse).map_or(next, |due| next.min(due));
        self.timers_due.map_or(next, |due| next.min(due))
    }

    fn step(&mut self, message: Message) {
        let _ = self.raft.step(message);
        let term = self.raft.raft.term;
        self.lock().promise(term);
    }

    /// `raft` counts who answered its heartbeats, and steps down without a quorum; a follower whose Raft thread waits
    /// for a slow disk doesn't answer them. Whoever acknowledges beats is there, so the lease alone decides.
    fn note_activity(&mut self) {
        let now = self.now.at;
        let within = self.config.timing.election_min;
        let peers: Vec<_> = self.lock().peers().collect();
        let active: Vec<u64> = peers.iter().filter(|p| p.since_beat < within).map(|p| p.raft_id.0).collect();
        let applied: Vec<(u64, u64)> = peers.iter().map(|p| (p.raft_id.0, p.applied)).collect();
        let mut done = Vec::new();
        let mut stuck = Vec::new();
        for (id, progress) in self.raft.raft.mut_prs().iter_mut() {
            progress.recent_active |= active.contains(id);
            if progress.state == raft::ProgressState::Snapshot {
                if applied.iter().any(|(peer, index)| peer == id && *index >= progress.pending_snapshot) {
                    // It was taken in and the answer was lost.
                    done.push(*id);
                    continue;
                }
                let since = *self.snapshots_since.entry(*id).or_insert(now);
                if now.since(since) >= SNAPSHOT_TIMEOUT {
                    stuck.push(*id);
                }
            } else {
                self.snapshots_since.remove(id);
            }
        }
        for id in done {
            self.snapshots_since.remove(&id);
            self.raft.report_snapshot(id, SnapshotStatus::Finish);
        }
        for id in stuck {
            // It was delivered and yet not taken in: the process ended in between.
            self.snapshots_since.remove(&id);
            self.raft.report_snapshot(id, SnapshotStatus::Failure);
        }
    }

    /// What a leader does every beat.
    fn lead_on(&mut self) {
        let now = self.now.at;
        if now >= self.next_tick {
            self.note_activity();
            // One tick however late it is: a stall must not look like lost heartbeats.
            self.raft.tick();
            self.next_tick = now.after(self.config.timing.beat);
            self.repeat_hand_over();
        }
        let quorum_at = {
            let end = self.lock().lease_end();
            let lease = self.config.timing.lease.as_nanos() as u64;
            Instant(end.0.saturating_sub(lease)).max(self.led_since)
        };
        if self.is_leader() && now.since(quorum_at) >= self.config.timing.election_max {
            // Nobody follows any more.
            let term = self.raft.raft.term;
            self.raft.raft.become_follower(term, raft::INVALID_ID);
        }
    }
}

// --- poll ------------------------------------------------------------------------------------------------------------

impl Core {
    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    fn send(&mut self, messages: Vec<Message>) {
        let asked: Vec<Message> =
            messages.iter().filter(|m| m.get_msg_type() == MessageType::MsgRequestVote).cloned().collect();
        if !asked.is_empty() {
            self.asked = asked;
            self.ask_again_at = self.now.at.after(self.config.timing.beat);
        }
        for message in messages {
            let to = RaftId(message.to).node();
            let kind = message.get_msg_type();
            if kind == MessageType::MsgTimeoutNow {
                assert!(
                    self.handed_over.is_some_and(|h| (h.term, h.to) == (message.term, message.to)),
                    "leadership is handed over only after the lease has been given up"
                );
            }
            let via = self.way_of(&message);
            if let Some(address) = self.address_of(to) {
                self.out.push_back(Output::Send { to, address, via, message });
            }
        }
    }

    /// How a message travels. A stream waits for its connection, and after a loss for TCP to notice: what is short and
    /// waited for goes as a datagram, too.
    fn way_of(&self, message: &Message) -> Via {
        match message.get_msg_type() {
            MessageType::MsgSnapshot => Via::Stream,
            MessageType::MsgAppendResponse => Via::Both,
            MessageType::MsgAppend => {
                // To a follower that lacks what comes before, it would only be an occasion to say so.
                let next = self.raft.raft.prs().get(message.to).is_some_and(|p| p.matched >= message.index);
                if next && message.encoded_len() <= MAX_DATAGRAM_LEN { Via::Both } else { Via::Stream }
            }
            _ => Via::Datagram,
        }
    }
}
