//! Beats, leases, promises and grants: the part of a node that must never wait.
//!
//! A synchronous state machine without socket, clock or randomness. The beat thread calls, in this order and under one
//! lock: any of `handle_*`, `set_*`, …; then [`Pulse::poll_output`] until it is empty, **carrying out each output before
//! polling the next**; then it sleeps until [`Pulse::next_deadline`], a datagram, or a wake-up. The Raft thread shares
//! the lock through [`crate::core::Core`] and never holds it across I/O.
//!
//! ```text
//!                 beat of a leader, term ≥ floor                       lead(term)
//!          ┌───────────────┐        ┌──────────────────────────────────────────────────────┐
//!          ▼               │        │                                                      ▼
//!   ┌─────────────────────────────────┐   promise(term'): floor = term',     ┌──────────────────────────────┐
//!   │ following                       │   beats below it are refused         │ leading                      │
//!   │ promise runs E_min from the     │◀─────────────────────────────────────│ lease runs L from the newest │
//!   │ newest accepted beat            │   step_down, or a higher term's beat │ beat that a quorum accepted  │
//!   └─────────────────────────────────┘                                      └───────────┬──────────────────┘
//!                                                                    retire: for good in │ this term
//!                                                                                        ▼
//!                                                                              ┌───────────────────┐
//!                                                                              │ retired: no lease │
//!                                                                              └───────────────────┘
//! ```

mod beat;
mod holding;
mod leading;
mod peer;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use komainu_proto::domain::{BackendId, GroupId, Health, NodeId};

pub use beat::{BEAT_MAX_BYTES, Beat, BeatError, Contact, Echo, MAX_OBSERVATIONS, MAX_OWNERSHIPS, Ownership};
pub use holding::Assignment;

use crate::api::{LeaseUpdate, NodeIdentity, Observation, SelfHealth};
use crate::core::Config;
use crate::raft::RaftId;
use crate::rules::Rule;
use crate::state::MAX_BACKENDS_TOTAL;
use crate::time::Instant;
use crate::timing::Timing;
use holding::Holdings;
use leading::{Granted, Leading};
use peer::Peer;

/// Nodes that beats are exchanged with: members, configured ones, and strangers who want to join. Bounds what forged
/// node ids of a key holder can make us remember.
pub const MAX_PEERS: usize = 2 * crate::state::MAX_MEMBERS;
/// A peer is taken for silent after this many beats: grants to it stop, so that its group can be given away soon.
const SILENT_BEATS: u32 = 3;
/// A peer is taken for deaf when this many of a leader's beats went unacknowledged: more than for silence, because an
/// acknowledgement takes the way there and back.
const DEAF_BEATS: u32 = 2 * SILENT_BEATS;

/// A leader whose Raft thread has not been seen for so long hangs in a write and decides nothing any more. Far longer than
/// a busy disk takes: giving way costs an election.
const UNATTENDED: Duration = Duration::from_secs(5);
/// A node whose store has failed gives way after this, a leader after twice as long: so it hears first whether the others'
/// have failed, too.
const FAILED_FOR: Duration = Duration::from_secs(1);

/// What the beat thread is to do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Write a lease into the lane.
    Lease {
        /// Which group.
        group: GroupId,
        /// What to write.
        lease: LeaseUpdate,
    },
    /// Announce a group's addresses.
    Announce {
        /// Which group.
        group: GroupId,
    },
    /// Seal and send a beat.
    Send {
        /// To which node.
        to: NodeId,
        /// Its address.
        address: SocketAddr,
        /// What.
        beat: Box<Beat>,
    },
    /// Wake the Raft thread: [`crate::core::Core::handle_timeout`] has something to decide.
    Prompt,
}

/// Another node as beats show it.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerView {
    /// Its Raft id.
    pub raft_id: RaftId,
    /// Who it says it is.
    pub identity: NodeIdentity,
    /// Version of its program.
    pub version: String,
    /// Heard within the last beats.
    pub alive: bool,
    /// Hears this node too: while this node leads, it acknowledges its beats. Always true on a node that doesn't lead.
    pub follows: bool,
    /// Time since its newest beat.
    pub since_beat: Duration,
    /// For how long it has been heard without an interruption; zero while it isn't alive.
    pub steady: Duration,
    /// Cluster of its store; 0 while that is empty.
    pub cluster: u64,
    /// Whom it wants to found the cluster.
    pub support: Option<NodeId>,
    /// Log index of its replicated state.
    pub applied: u64,
    /// Log index of its installed tables.
    pub installed: u64,
    /// Its fitness.
    pub health: SelfHealth,
    /// It is shutting down.
    pub resigning: bool,
    /// Its process.
    pub instance: u64,
}

/// Why a beat was not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ignored {
    /// It claims this node's own id.
    OwnId,
    /// Its store belongs to another cluster.
    OtherCluster,
    /// A newer beat of that node came before.
    Old,
    /// Too many nodes.
    TooMany,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Pulse {
    timing: Timing,
    me: RaftId,
    identity: NodeIdentity,
    version: String,
    instance: u64,
    cluster: u64,
    support: Option<NodeId>,
    started_at: Instant,
    /// Newest instant that any call brought.
    now: Instant,
    /// Beats of lower terms are neither accepted nor acknowledged.
    floor: u64,
    /// Arrival of the newest accepted beat of a leader.
    heard_leader_at: Option<Instant>,
    leader: Option<(RaftId, u64)>,
    /// End of the last lease that this node had as a leader: until then it votes for nobody.
    own_lease_end: Instant,
    /// No other node can hold a lease or vote: the wait after a start protects nobody.
    sole: bool,
    leading: Option<Leading>,
    /// Who votes, by the configuration applied here.
    voters: Vec<RaftId>,
    /// When the Raft thread was last here.
    attended_at: Instant,
    /// Since when the store takes nothing.
    store_failed_at: Option<Instant>,
    /// Nodes whose beats said that they belong to another cluster.
    foreign: BTreeMap<NodeId, RaftId>,
    peers: BTreeMap<NodeId, Peer>,
    holdings: Holdings,
    health: SelfHealth,
    resigning: bool,
    applied: u64,
    observations: BTreeMap<BackendId, Observation>,
    verdicts: BTreeMap<BackendId, Health>,
    differing: BTreeSet<BackendId>,
    next_beat_at: Instant,
    out: VecDeque<Output>,
    prompted: bool,
    /// An output was handed out and the next call has not come yet.
    in_hand: Option<GroupId>,
    ignored: BTreeMap<Ignored, u64>,
}

// --- getters ---------------------------------------------------------------------------------------------------------

impl Pulse {
    /// A node that has just been started. `term` is the newest term in its store.
    pub(crate) fn new(config: &Config, me: RaftId, cluster: u64, term: u64, now: Instant) -> Pulse {
        let mut pulse = Pulse {
            timing: config.timing,
            me,
            identity: config.identity.clone(),
            version: config.version.clone(),
            instance: config.instance,
            cluster,
            support: None,
            started_at: now,
            now,
            floor: term,
            heard_leader_at: None,
            leader: None,
            own_lease_end: Instant::default(),
            sole: false,
            leading: None,
            voters: Vec::new(),
            attended_at: now,
            store_failed_at: None,
            foreign: BTreeMap::new(),
            peers: BTreeMap::new(),
            holdings: Holdings::new(config.identity.id, config.timing.grace),
            health: SelfHealth::default(),
            resigning: false,
            applied: 0,
            observations: BTreeMap::new(),
            verdicts: BTreeMap::new(),
            differing: BTreeSet::new(),
            next_beat_at: now,
            out: VecDeque::new(),
            prompted: false,
            in_hand: None,
            ignored: BTreeMap::new(),
        };
        for p in &config.peers {
            pulse.want(p.id, p.address);
        }
        pulse
    }

    /// This node's Raft id.
    pub fn raft_id(&self) -> RaftId {
        self.me
    }

    /// The leader and its term, as far as beats tell; this node itself while it leads.
    pub fn leader(&self) -> Option<(RaftId, u64)> {
        match &self.leading {
            Some(l) => Some((self.me, l.term)),
            None => self.leader.filter(|_| {
                self.heard_leader_at.is_some_and(|at| self.now.since(at) < self.timing.election_max)
            }),
        }
    }

    /// Whether this node leads by its own lights.
    pub fn is_leading(&self) -> bool {
        self.leading.is_some()
    }

    /// Whether no other node can hold a lease or vote.
    pub(crate) fn is_sole(&self) -> bool {
        self.sole
    }

    /// Newest term that this node knows of.
    pub fn term(&self) -> u64 {
        self.floor
    }

    /// Durations in force.
    pub fn timing(&self) -> &Timing {
        &self.timing
    }

    /// End of this node's lease as a leader; the past when it has none.
    pub fn lease_end(&self) -> Instant {
        self.leading.as_ref().map_or(Instant::default(), |l| l.lease_end)
    }

    /// Arrival of the newest accepted beat of a leader.
    pub fn heard_leader_at(&self) -> Option<Instant> {
        self.heard_leader_at
    }

    /// Other nodes that have been heard of, by id.
    pub fn peers(&self) -> impl Iterator<Item = PeerView> + '_ {
        self.peers.values().filter_map(|p| self.view(p))
    }

    /// One other node.
    pub fn peer(&self, id: NodeId) -> Option<PeerView> {
        self.peers.get(&id).and_then(|p| self.view(p))
    }

    /// What the lane was told last of each group.
    pub fn leases(&self) -> impl Iterator<Item = (GroupId, LeaseUpdate)> + '_ {
        self.holdings.lane()
    }

    /// What is left of a group's lease, whoever holds it, as far as this node knows.
    pub fn lease_left(&self, group: GroupId, now: Instant) -> Option<Duration> {
        let assigned = self.holdings.assignments().get(&group)?;
        let node = assigned.node?;
        if node == self.identity.id {
            let (_, left) = self.holdings.held(now).find(|(o, _)| o.group == group)?;
            return Some(left);
        }
        self.peers.get(&node)?.left(group, assigned.epoch, now)
    }

    /// Whether the lane may answer or forward for any group at `now`.
    pub fn holds_anything(&self, now: Instant) -> bool {
        self.holdings.holds_anything(now)
    }

    /// Whether this node is shutting down.
    pub fn is_resigning(&self) -> bool {
        self.resigning
    }

    /// This node's own fitness.
    pub fn self_health(&self) -> &SelfHealth {
        &self.health
    }

    /// Log index of the lane's tables.
    pub fn installed(&self) -> u64 {
        self.holdings.installed()
    }

    /// What this node's own checks see.
    pub fn observations(&self) -> &BTreeMap<BackendId, Observation> {
        &self.observations
    }

    /// Observations in which a peer's newest beat differs from the replicated verdicts.
    pub fn peer_observations(&self, id: NodeId) -> &[Observation] {
        self.peers.get(&id).and_then(|p| p.heard.as_ref()).map_or(&[], |h| &h.beat.observations)
    }

    /// Own observations that differ from the replicated verdicts.
    pub(crate) fn differing(&self) -> impl Iterator<Item = &Observation> + '_ {
        self.differing.iter().filter_map(|id| self.observations.get(id))
    }

    /// Beats not taken in, by reason.
    pub fn ignored(&self) -> impl Iterator<Item = (Ignored, u64)> + '_ {
        self.ignored.iter().map(|(&why, &n)| (why, n))
    }

    fn silent_after(&self) -> Duration {
        self.timing.beat * SILENT_BEATS
    }

    fn deaf_after(&self) -> Duration {
        self.timing.beat * DEAF_BEATS
    }

    fn view(&self, p: &Peer) -> Option<PeerView> {
        let h = p.heard.as_ref()?;
        let alive = p.alive(self.now, self.silent_after());
        Some(PeerView {
            raft_id: h.beat.from,
            identity: h.beat.identity.clone(),
            version: h.beat.version.clone(),
            alive,
            follows: self
                .leading
                .as_ref()
                .is_none_or(|l| l.is_followed_by(h.beat.from, self.now, self.deaf_after())),
            since_beat: self.now.since(h.at),
            steady: if alive { self.now.since(h.since) } else { Duration::ZERO },
            cluster: h.beat.cluster,
            support: h.beat.support,
            applied: h.beat.applied,
            installed: h.beat.installed,
            health: h.beat.health.clone(),
            resigning: h.beat.resigning,
            instance: h.beat.instance,
        })
    }
}

// --- handle ----------------------------------------------------------------------------------------------------------

impl Pulse {
    /// A beat has arrived from `source`.
    ///
    /// # Errors
    /// It was not taken in; counted.
    pub fn handle_beat(&mut self, source: SocketAddr, beat: Beat, now: Instant) -> Result<(), Ignored> {
        self.advance(now);
        let taken = self.take_beat(source, beat);
        if let Err(why) = taken {
            *self.ignored.entry(why).or_default() += 1;
        }
        taken
    }

    /// Time has passed: due beats, due renewals.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.advance(now);
        if self.now >= self.next_beat_at {
            for p in self.peers.values_mut().filter(|p| p.wanted || p.heard.is_some()) {
                p.beat_due = true;
            }
            // Beats missed during a stall are not made up for.
            let on_time = self.next_beat_at.after(self.timing.beat);
            self.next_beat_at = if on_time > self.now { on_time } else { self.now.after(self.timing.beat) };
            // A silent node makes no event; who decides about ownership must look at it again.
            self.prompt();
            self.give_way();
        }
        self.renew();
    }

    fn take_beat(&mut self, source: SocketAddr, beat: Beat) -> Result<(), Ignored> {
        let (from, node) = (beat.from, beat.from.node());
        if node == self.identity.id {
            return Err(Ignored::OwnId);
        }
        if self.cluster != 0 && beat.cluster != 0 && beat.cluster != self.cluster {
            if self.foreign.len() < MAX_PEERS || self.foreign.contains_key(&node) {
                self.foreign.insert(node, from);
            }
            return Err(Ignored::OtherCluster);
        }
        if !self.peers.contains_key(&node) && self.peers.len() >= MAX_PEERS && !self.forget_a_stranger() {
            return Err(Ignored::TooMany);
        }
        let silent_after = self.silent_after();
        let peer = self.peers.entry(node).or_insert_with(|| Peer::new(node, source));
        if !peer.wanted {
            peer.address = beat.identity.address;
        }
        let before = peer.heard.as_ref().map(|h| prompting(&h.beat));
        let after = prompting(&beat);
        let (leading, answer) = (beat.leading, beat.answer);
        let (term, sent, instance, echo) = (beat.term, beat.sent, beat.instance, beat.echo);
        let (contact, grants, releases) = (beat.contact, beat.grants.clone(), beat.releases.clone());
        if !peer.take(beat, self.now, silent_after) {
            return Err(Ignored::Old);
        }
        if before.as_ref() != Some(&after) {
            self.prompt();
        }
        if leading && self.accepts(term) {
            if self.leading.is_some() {
                self.step_down();
            }
            if self.leader != Some((from, term)) {
                self.prompt();
            }
            self.floor = term;
            self.leader = Some((from, term));
            self.heard_leader_at = Some(self.now);
            self.follow(node, Echo { instance, stamp: sent, term }, contact, &grants, &releases);
        }
        if let (Some(l), Some(echo)) = (&mut self.leading, echo)
            && echo.instance == self.instance
            && echo.term == l.term
        {
            l.acknowledge(from, echo.stamp, self.now);
        }
        if !answer && (leading || self.leading.is_some()) {
            self.peers.get_mut(&node).expect("it was put in above").answer_due = true;
        }
        self.renew();
        Ok(())
    }

    /// A leader's beat was accepted: acknowledge it, and take what it grants.
    fn follow(
        &mut self,
        node: NodeId,
        echo: Echo,
        contact: Option<Contact>,
        grants: &[Ownership],
        releases: &[Ownership],
    ) {
        for p in self.peers.values_mut() {
            p.echo = (p.id == node).then_some(echo);
        }
        for &o in releases {
            self.holdings.release(o);
        }
        if let Some(c) = contact
            .filter(|c| c.instance == self.instance && c.stamp >= self.started_at && c.stamp <= self.now)
        {
            let until = c.stamp.after(c.lasts);
            self.holdings.contact(until);
            for &o in grants {
                self.holdings.grant(o, until);
            }
        }
    }

    /// A leader that can't write, or whose Raft thread hangs in a write, renews leases and decides nothing: a group whose
    /// owner dies would stay without one. It leads no more, and a node whose store has failed wants its groups taken,
    /// provided that the others can agree on something without it. Where they can't, as in a pair, going on is better.
    fn give_way(&mut self) {
        let wait = if self.leading.is_some() { FAILED_FOR * 2 } else { FAILED_FOR };
        let failed = self.store_failed_at.is_some_and(|at| self.now.since(at) >= wait);
        let unattended = self.leading.is_some() && self.now.since(self.attended_at) >= UNATTENDED;
        if !failed && !unattended || !self.others_suffice() {
            return;
        }
        self.step_down();
        if failed {
            self.set_resigning(true);
        }
    }

    /// Whether the other voters that are alive and well are a quorum.
    fn others_suffice(&self) -> bool {
        let well = |id: &RaftId| {
            *id != self.me
                && self.peers.get(&id.node()).is_some_and(|p| {
                    p.alive(self.now, self.silent_after())
                        && p.heard.as_ref().is_some_and(|h| h.beat.from == *id && !h.beat.resigning)
                })
        };
        self.voters.iter().filter(|id| well(id)).count() > self.voters.len() / 2
    }

    fn accepts(&self, term: u64) -> bool {
        term >= self.floor && self.leading.as_ref().is_none_or(|l| term > l.term)
    }

    fn forget_a_stranger(&mut self) -> bool {
        let silent =
            self.peers.values().find(|p| !p.wanted && !p.alive(self.now, self.silent_after())).map(|p| p.id);
        silent.and_then(|id| self.peers.remove(&id)).is_some()
    }
}

/// What of a beat the Raft thread wants to know at once.
fn prompting(b: &Beat) -> (RaftId, u64, bool, bool, Vec<Ownership>, Option<NodeId>) {
    (b.from, b.cluster, b.health.fit(), b.resigning, b.released.clone(), b.support)
}

// --- promises --------------------------------------------------------------------------------------------------------

impl Pulse {
    /// Whether this node may vote or campaign at `now`: no leader that it helped to a lease can still have it.
    pub fn may_promise(&self, now: Instant) -> bool {
        let promised = self.timing.election_min;
        let started = self.sole || now >= self.started_at.after(promised) || Rule::StartWait.is_broken();
        let heard =
            self.heard_leader_at.is_none_or(|at| now >= at.after(promised)) || Rule::Promise.is_broken();
        let own = now >= self.own_lease_end && self.leading.as_ref().is_none_or(|l| now >= l.lease_end);
        started && heard && own
    }

    /// The earliest instant at which [`Pulse::may_promise`] can hold.
    pub fn promise_free_at(&self) -> Instant {
        let promised = self.timing.election_min;
        let no_wait = self.sole || Rule::StartWait.is_broken();
        let started = if no_wait { Instant::default() } else { self.started_at.after(promised) };
        let heard = self.heard_leader_at.map_or(Instant::default(), |at| at.after(promised));
        started.max(heard).max(self.own_lease_end).max(self.lease_end())
    }

    /// Promises to help no leader below `term`: from now on its beats are neither accepted nor acknowledged. Called when
    /// a vote for `term` is given, or the term is reached otherwise, under the same lock as the check before it.
    pub fn promise(&mut self, term: u64) {
        if self.leading.as_ref().is_some_and(|l| l.term < term) {
            self.step_down();
        }
        if term > self.floor {
            self.floor = term;
            for p in self.peers.values_mut() {
                p.echo = None;
            }
        }
    }
}

// --- mutators --------------------------------------------------------------------------------------------------------

impl Pulse {
    /// Log index that the lane's tables were derived from.
    pub fn set_installed(&mut self, index: u64, now: Instant) {
        self.advance(now);
        if index > self.holdings.installed() {
            self.holdings.set_installed(index);
            self.refresh();
        }
    }

    /// This node's fitness to own a group.
    pub fn set_self_health(&mut self, health: SelfHealth) {
        if health.fit() != self.health.fit() {
            self.beat_now();
            self.prompt();
        }
        self.health = health;
    }

    /// What this node's checks see of one backend.
    pub fn set_observation(&mut self, observation: Observation) {
        let id = observation.backend;
        if !self.observations.contains_key(&id) && self.observations.len() >= MAX_BACKENDS_TOTAL {
            // Checks of backends that are gone may have reported once more.
            self.observations.retain(|id, _| self.verdicts.contains_key(id));
            if self.observations.len() >= MAX_BACKENDS_TOTAL {
                return;
            }
        }
        self.observations.insert(id, observation);
        self.compare(id);
    }

    /// Shutting down: wants its groups taken.
    pub fn set_resigning(&mut self, resigning: bool) {
        if self.resigning != resigning {
            self.resigning = resigning;
            self.beat_now();
            self.prompt();
        }
    }

    /// Replicated verdicts that changed, and backends that are gone.
    pub(crate) fn set_verdicts(&mut self, changed: Vec<(BackendId, Option<Health>)>) {
        for (id, verdict) in changed {
            match verdict {
                Some(health) => {
                    self.verdicts.insert(id, health);
                }
                None => {
                    self.verdicts.remove(&id);
                    self.observations.remove(&id);
                }
            }
            self.compare(id);
        }
    }

    /// Ownership by the replicated state, which has reached log index `applied`.
    pub(crate) fn set_assignments(&mut self, assignments: BTreeMap<GroupId, Assignment>, applied: u64) {
        self.applied = self.applied.max(applied);
        if *self.holdings.assignments() == assignments {
            return;
        }
        if let Some(l) = &mut self.leading {
            l.revoked.retain(|o| assignments.get(&o.group).is_some_and(|a| a.epoch == o.epoch));
        }
        self.holdings.set_assignments(assignments);
        self.refresh();
        if self.leading.is_some() {
            // A new owner need not wait for the next beat to hear of its grant.
            self.beat_now();
        }
    }

    /// Members with their addresses, besides those of the node file.
    pub(crate) fn set_members(
        &mut self,
        members: impl Iterator<Item = (NodeId, SocketAddr)>,
        configured: impl Iterator<Item = (NodeId, SocketAddr)>,
    ) {
        for p in self.peers.values_mut() {
            p.wanted = false;
        }
        for (id, address) in configured.chain(members) {
            if id != self.identity.id {
                self.want(id, address);
            }
        }
        // A member that was removed is forgotten once it is silent.
        let (now, silent_after) = (self.now, self.silent_after());
        self.peers.retain(|_, p| p.wanted || p.alive(now, silent_after));
    }

    /// Cluster of this node's store.
    pub(crate) fn set_cluster(&mut self, cluster: u64) {
        self.cluster = cluster;
        self.support = None;
    }

    /// Whom this node, whose store is empty, wants to found the cluster.
    pub(crate) fn set_support(&mut self, support: Option<NodeId>) {
        if self.support != support {
            self.support = support;
            self.beat_now();
        }
    }

    /// Whether no other node can hold a lease or vote.
    pub(crate) fn set_sole(&mut self, sole: bool) {
        self.sole = sole;
    }

    /// This node has won `term`.
    pub(crate) fn lead(&mut self, term: u64, voters: Vec<RaftId>, now: Instant) {
        self.advance(now);
        self.promise(term);
        self.leading = Some(Leading::new(term, self.now, voters));
        self.leader = None;
        self.beat_now();
    }

    /// The Raft thread is here. Answers whether this node leads.
    pub(crate) fn attend(&mut self, now: Instant) -> bool {
        self.attended_at = self.attended_at.max(now);
        self.is_leading()
    }

    /// The store takes nothing any more.
    pub(crate) fn set_store_failed(&mut self, now: Instant) {
        self.store_failed_at.get_or_insert(now);
    }

    /// Whether a Raft id is known to belong to another cluster.
    pub(crate) fn is_foreign(&self, id: RaftId) -> bool {
        self.cluster != 0 && self.foreign.get(&id.node()) == Some(&id)
    }

    /// The voters of the configuration in force.
    pub(crate) fn set_voters(&mut self, voters: Vec<RaftId>) {
        self.voters.clone_from(&voters);
        if let Some(l) = &mut self.leading {
            l.set_voters(voters);
        }
    }

    /// The first entry of this leader's term is applied: it may grant.
    pub(crate) fn open(&mut self, now: Instant) {
        self.advance(now);
        if let Some(l) = &mut self.leading
            && !l.open
        {
            l.open = true;
            self.renew();
            self.beat_now();
        }
    }

    /// This node leads no more. What it granted itself runs to its end, and until then it votes for nobody.
    pub(crate) fn step_down(&mut self) {
        if let Some(l) = self.leading.take() {
            self.own_lease_end = self.own_lease_end.max(l.lease_end);
            self.prompt();
        }
    }

    /// Leadership is to be handed to `target`: grants to all others stop (and with `None` go on again).
    pub(crate) fn hold_grants(&mut self, target: Option<NodeId>) {
        if let Some(l) = &mut self.leading {
            l.only_to = target;
        }
    }

    /// Before `MsgTimeoutNow`: gives up granting for the rest of this term. Refused while this node answers for a group,
    /// or any grant to a node other than `target` may be in force.
    ///
    /// The message may be delivered at any later time, and lets `target` win the next term without regard to promises:
    /// so this node must never grant anything in this term again, whether the transfer succeeds or not.
    pub(crate) fn retire(&mut self, target: NodeId, now: Instant) -> bool {
        self.advance(now);
        let answers = self.holdings.held(self.now).next().is_some() || !self.lane_in_force();
        match &mut self.leading {
            Some(_) if Rule::RetireFirst.is_broken() => true,
            Some(l) if !answers && l.last_grant_end(target) <= self.now => {
                l.retired = true;
                true
            }
            _ => false,
        }
    }

    /// Whether this node has retired in the term it leads in.
    pub(crate) fn is_retired(&self) -> bool {
        self.leading.as_ref().is_some_and(|l| l.retired)
    }

    /// Stops granting a group: its owner is told to release it, or gives it up at once when it is this node.
    pub(crate) fn revoke(&mut self, o: Ownership, now: Instant) {
        self.advance(now);
        let Some(l) = &mut self.leading else { return };
        if l.revoked.insert(o) {
            if self.holdings.assignments().get(&o.group).is_some_and(|a| a.node == Some(self.identity.id)) {
                self.holdings.release(o);
                self.refresh();
            }
            self.beat_now();
        }
    }

    /// Whether nobody can answer for a group under `epoch` any more: released, or every grant has run out. Only a
    /// leader knows, and only after [`Pulse::revoke`].
    pub(crate) fn is_free(&self, o: Ownership, now: Instant) -> bool {
        let Some(l) = self.leading.as_ref() else { return false };
        if Rule::ReleaseFirst.is_broken() {
            return true;
        }
        // Own old grants (of a term before) are in the lane too.
        if self.holdings.answers(o.group, now) || !self.lane_in_force() {
            return false;
        }
        l.granted(o.group).is_none_or(|g| {
            g.until <= now
                || self
                    .peers
                    .get(&g.node)
                    .is_some_and(|p| p.has_released(Ownership { epoch: g.epoch, ..o }, g.instance))
        })
    }

    /// Whether the owner itself says that it has given the group up for good.
    pub(crate) fn is_given_up(&self, node: NodeId, o: Ownership) -> bool {
        if node == self.identity.id {
            return self.holdings.has_released(o);
        }
        self.peers
            .get(&node)
            .and_then(|p| p.heard.as_ref())
            .is_some_and(|h| h.beat.released.iter().any(|r| r.group == o.group && r.epoch >= o.epoch))
    }

    /// Latest end, on this node's clock, of any grant that it gave to `node` in this term.
    pub(crate) fn last_grant_to(&self, node: NodeId) -> Instant {
        self.leading.as_ref().map_or(Instant::default(), |l| l.last_grant_to(node))
    }

    fn want(&mut self, id: NodeId, address: SocketAddr) {
        let p = self.peers.entry(id).or_insert_with(|| Peer::new(id, address));
        p.wanted = true;
        p.address = address;
    }

    fn compare(&mut self, id: BackendId) {
        let differs = match (self.observations.get(&id), self.verdicts.get(&id)) {
            (Some(o), Some(v)) => o.health != *v && o.health != Health::Unknown,
            _ => false,
        };
        if differs {
            if self.differing.insert(id) {
                self.prompt();
            }
        } else {
            self.differing.remove(&id);
        }
    }

    fn advance(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    fn prompt(&mut self) {
        if !self.prompted {
            self.prompted = true;
            self.out.push_back(Output::Prompt);
        }
    }

    fn beat_now(&mut self) {
        for p in self.peers.values_mut().filter(|p| p.wanted || p.heard.is_some()) {
            p.beat_due = true;
        }
    }

    /// As a leader: extends the lease, and what it grants to this node itself.
    fn renew(&mut self) {
        let now = self.now;
        if let Some(l) = &mut self.leading {
            l.renew(self.me, self.timing.lease, now);
            if l.may_grant(now) {
                let (end, me) = (l.lease_end, self.identity.id);
                let own: Vec<Ownership> = self
                    .holdings
                    .assignments()
                    .iter()
                    .filter(|(_, a)| a.node == Some(me))
                    .map(|(&group, a)| Ownership { group, epoch: a.epoch })
                    .filter(|o| !l.revoked.contains(o))
                    .collect();
                self.holdings.contact(end);
                own.into_iter().for_each(|o| self.holdings.grant(o, end));
            }
        }
        self.refresh();
    }

    fn refresh(&mut self) {
        self.holdings.refresh(self.now, &mut self.out);
    }

    /// Whether every lease handed out has been carried out.
    fn lane_in_force(&self) -> bool {
        self.in_hand.is_none() && !self.out.iter().any(|o| matches!(o, Output::Lease { .. }))
    }
}

// --- poll ------------------------------------------------------------------------------------------------------------

impl Pulse {
    /// The next thing to do. The call says that the one before has been done.
    pub fn poll_output(&mut self) -> Option<Output> {
        if self.in_hand.take().is_some() && self.lane_in_force() {
            // A lease that was given up is out of the lane: what waited for that can go on.
            self.prompt();
        }
        if let Some(o) = self.out.pop_front() {
            match &o {
                Output::Lease { group, lease } if lease.answer_until <= self.now => {
                    self.in_hand = Some(*group)
                }
                Output::Prompt => self.prompted = false,
                _ => {}
            }
            return Some(o);
        }
        let due = self.peers.values().find(|p| p.beat_due || p.answer_due)?.id;
        Some(self.compose(due))
    }

    /// When [`Pulse::handle_timeout`] is to be called at the latest.
    pub fn next_deadline(&self) -> Instant {
        self.next_beat_at
    }

    fn compose(&mut self, to: NodeId) -> Output {
        let now = self.now;
        let silent_after = self.silent_after();
        let held: Vec<_> = self.holdings.held(now).collect();
        let (contact, grants, releases) = self.grants_to(to, now, silent_after);
        let peer = self.peers.get_mut(&to).expect("only known peers are due");
        let answer = !peer.beat_due;
        peer.beat_due = false;
        peer.answer_due = false;
        let observations: Vec<Observation> = rotate(&self.differing, peer.rotation, MAX_OBSERVATIONS)
            .filter_map(|id| self.observations.get(&id).cloned())
            .collect();
        let mut beat = Beat {
            from: self.me,
            instance: self.instance,
            cluster: self.cluster,
            sent: now,
            answer,
            term: self.floor,
            leading: self.leading.as_ref().is_some_and(|l| !l.retired),
            leader: if self.leading.is_some() { Some(self.me) } else { self.leader.map(|l| l.0) },
            echo: peer.echo,
            identity: self.identity.clone(),
            version: self.version.clone(),
            applied: self.applied,
            installed: self.holdings.installed(),
            health: self.health.clone(),
            resigning: self.resigning,
            support: self.support,
            contact,
            grants,
            releases,
            released: self.holdings.released().collect(),
            held,
            observations,
        };
        let (_, kept) = beat.encode();
        beat.observations.truncate(kept);
        peer.rotation = peer.rotation.wrapping_add(kept);
        Output::Send { to, address: peer.address, beat: Box::new(beat) }
    }

    /// What a leader's beat to `to` grants, and what it asks back. Grants are noted before they leave.
    fn grants_to(
        &mut self,
        to: NodeId,
        now: Instant,
        silent_after: Duration,
    ) -> (Option<Contact>, Vec<Ownership>, Vec<Ownership>) {
        let nothing = (None, Vec::new(), Vec::new());
        let Some(l) = &mut self.leading else { return nothing };
        let owned: Vec<Ownership> = self
            .holdings
            .assignments()
            .iter()
            .filter(|(_, a)| a.node == Some(to))
            .map(|(&group, a)| Ownership { group, epoch: a.epoch })
            .collect();
        let (releases, owned): (Vec<_>, Vec<_>) = owned.into_iter().partition(|o| l.revoked.contains(o));
        let peer = &self.peers[&to];
        let deaf_after = self.timing.beat * DEAF_BEATS;
        let deaf = peer.heard.as_ref().is_none_or(|h| !l.is_followed_by(h.beat.from, now, deaf_after));
        if !l.may_grant(now) || !peer.alive(now, silent_after) || deaf || l.only_to.is_some_and(|n| n != to) {
            return (None, Vec::new(), releases);
        }
        let end = if Rule::GrantWithinLease.is_broken() { now.after(self.timing.lease) } else { l.lease_end };
        let Some(contact) = peer.limit(end, |left| self.timing.on_another_clock(left)) else {
            return (None, Vec::new(), releases);
        };
        let grants: Vec<Ownership> = owned.into_iter().take(MAX_OWNERSHIPS).collect();
        for o in &grants {
            let granted =
                Granted { node: to, epoch: o.epoch, instance: contact.instance, until: l.lease_end };
            l.note_grant(o.group, granted);
        }
        (Some(contact), grants, releases)
    }
}

/// At most `n` of `ids`, starting at the `start`th and going round.
fn rotate(ids: &BTreeSet<BackendId>, start: usize, n: usize) -> impl Iterator<Item = BackendId> + '_ {
    let len = ids.len();
    let skip = if len == 0 { 0 } else { start % len };
    ids.iter().copied().skip(skip).chain(ids.iter().copied().take(skip)).take(n)
}
