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
//!                                                                     ┌───────────────────────────────────┐
//!                                                                     │ retired: only the successor is    │
//!                                                                     │ granted anything                  │
//!                                                                     └───────────────────────────────────┘
//! ```

mod beat;
mod facts;
mod hear;
mod holding;
mod leading;
mod line;
mod peer;
mod poll;
mod promise;
mod resign;
mod steer;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use komainu_proto::domain::{BackendId, GroupId, Health, NodeId};

pub use beat::{BEAT_MAX_BYTES, Beat, BeatError, Contact, Echo, MAX_OBSERVATIONS, MAX_OWNERSHIPS, Ownership};
pub use holding::Assignment;
pub use resign::{RESIGN_MAX_BYTES, Resign, Will};

use crate::api::{LeaseUpdate, NodeIdentity, Observation, SelfHealth};
use crate::core::Config;
use crate::flowsync::Owned;
use crate::raft::RaftId;
use crate::time::Instant;
use crate::timing::Timing;
use holding::Holdings;
use leading::Leading;
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
/// A node that this one can't work with is spoken of as long as it is heard, and for so long after.
const NOTICED: Duration = Duration::from_secs(10);
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
    /// Put this will in the place of the one before, where it outlives the process.
    Will(Box<Will>),
}

/// Another node as beats show it.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerView {
    /// Its Raft id.
    pub raft_id: RaftId,
    /// Who it says it is.
    pub identity: Arc<NodeIdentity>,
    /// Version of its program.
    pub version: Arc<str>,
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
    /// Who has its flows; absent: it sends them to nobody.
    pub followers: Option<Vec<NodeId>>,
    /// Groups of which it was told all flows by the owner that they have by the state at `applied`.
    pub told: Vec<GroupId>,
}

/// Why a beat was not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ignored {
    /// It claims this node's own id.
    OwnId,
    /// Its store belongs to another cluster.
    OtherCluster,
    /// Its durations are others than this node's: what the two promise each other would not hold.
    OtherTiming,
    /// It is of another line of this cluster: see [`crate::pair`].
    OtherLine,
    /// A newer beat of that node came before.
    Old,
    /// Too many nodes.
    TooMany,
}

/// The process of a leader.
#[derive(Clone, Copy, Debug)]
struct Followed {
    instance: u64,
    /// Stamp of its newest accepted beat.
    sent: Instant,
}

/// The leader's process has ended.
#[derive(Clone, Copy, Debug)]
struct Bereaved {
    /// When that was heard.
    at: Instant,
    /// Nothing that it granted can be in force: its beats bind this node no more.
    free: bool,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Pulse {
    timing: Timing,
    me: RaftId,
    identity: Arc<NodeIdentity>,
    version: Arc<str>,
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
    /// The process that the newest accepted beat of a leader came from.
    followed: Option<Followed>,
    /// That process has ended, and no other has been followed since.
    bereaved: Option<Bereaved>,
    /// Latest end, on this node's clock, of anything that this process ever granted to another node.
    granted_until: Instant,
    /// The will as it was put in force last.
    will: Option<Will>,
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
    /// Nodes whose newest beat said that they belong to another cluster.
    foreign: BTreeMap<NodeId, RaftId>,
    /// Nodes whose newest beat said that they have other durations, and which.
    mistimed: BTreeMap<NodeId, (String, Timing)>,
    /// What this node's store descends from, and whom it met that descends from something else.
    lines: line::Lines,
    /// When a beat of either was refused last.
    refused_at: BTreeMap<NodeId, Instant>,
    peers: BTreeMap<NodeId, Peer>,
    holdings: Holdings,
    health: SelfHealth,
    /// Who has the flows of this node's data path.
    followers: Option<Vec<NodeId>>,
    /// Of which groups it was told all flows, and under which epoch their owner had them.
    told: Vec<Owned>,
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
    /// A node that has just been started. `term` is the newest term in its store, `stored_through` the index of its last log entry.
    pub(crate) fn new(
        config: &Config,
        me: RaftId,
        cluster: u64,
        term: u64,
        stored_through: u64,
        now: Instant,
    ) -> Pulse {
        let mut pulse = Pulse {
            timing: config.timing,
            me,
            identity: Arc::new(config.identity.clone()),
            version: config.version.as_str().into(),
            instance: config.instance,
            cluster,
            support: None,
            started_at: now,
            now,
            floor: term,
            heard_leader_at: None,
            leader: None,
            followed: None,
            bereaved: None,
            granted_until: Instant::default(),
            will: None,
            own_lease_end: Instant::default(),
            sole: false,
            leading: None,
            voters: Vec::new(),
            attended_at: now,
            store_failed_at: None,
            foreign: BTreeMap::new(),
            mistimed: BTreeMap::new(),
            lines: line::Lines::default(),
            refused_at: BTreeMap::new(),
            peers: BTreeMap::new(),
            holdings: Holdings::new(config.identity.id, config.timing.grace, stored_through),
            health: SelfHealth::default(),
            followers: None,
            told: Vec::new(),
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

    /// Groups of which this node was told all flows by the owner that they have.
    pub fn told_by_owners(&self) -> impl Iterator<Item = GroupId> + '_ {
        let owned =
            |o: &&Owned| self.holdings.assignments().get(&o.group).is_some_and(|a| a.epoch == o.epoch);
        self.told.iter().filter(owned).map(|o| o.group)
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

    /// What is left of the lease that ends first, of those that this node holds.
    pub fn shortest_held(&self, now: Instant) -> Option<Duration> {
        self.holdings.held(now).map(|(_, left)| left).min()
    }

    /// Whether the lane may answer or forward for any group at `now`.
    pub fn holds_anything(&self, now: Instant) -> bool {
        self.holdings.holds_anything(now)
    }

    /// Whether the grace time of a group that this node has given up goes on.
    pub fn yields(&self, now: Instant) -> bool {
        self.holdings.yields(now)
    }

    /// Whether this node is shutting down.
    pub fn is_resigning(&self) -> bool {
        self.resigning
    }

    /// Who has the flows of this node's data path; absent: it sends them to nobody.
    pub fn followers(&self) -> Option<&[NodeId]> {
        self.followers.as_deref()
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

    /// What operators must put right: nodes that this one can't work with.
    pub fn notices(&self) -> Vec<String> {
        let lately = |id: &NodeId| self.refused_at.get(id).is_some_and(|at| self.now.since(*at) < NOTICED);
        let mistimed = self.mistimed.iter().filter(|(id, _)| lately(id)).map(|(id, (name, theirs))| {
            let differ: Vec<String> = self
                .timing
                .differences(theirs)
                .into_iter()
                .map(|(field, here, there)| format!("{field} is {here} here and {there} there"))
                .collect();
            format!(
                "node {} \"{name}\" has another [timing] than this node ({}), so neither relies on what the other says: \
                 put the same into both node files and restart the node that was wrong",
                id.0,
                differ.join(", ")
            )
        });
        let alone = self.voters == [self.me];
        let foreign = self.foreign.keys().filter(|id| lately(id)).map(|id| match alone {
            true => format!(
                "node {} belongs to another cluster, and this node is alone in the one that it founded: to have it join the \
                 other, stop it, move its data_dir aside and start it again; what was applied here is then only in what was \
                 moved aside",
                id.0
            ),
            false => format!(
                "node {} belongs to another cluster: to have it join this one, stop it, move its data_dir aside and start it again",
                id.0
            ),
        });
        mistimed.chain(foreign).collect()
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
            followers: h.beat.followers.clone(),
            told: h.beat.told.clone(),
        })
    }
}

// --- what every part of it uses -----------------------------------------------------------------------------------------

impl Pulse {
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
            let retired = l.retired.is_some();
            let lease = if retired { self.timing.longest_lease() } else { self.timing.lease };
            l.renew(self.me, lease, now);
            if l.may_grant(now) {
                let (end, me) = (l.lease_end, self.identity.id);
                let own: Vec<Ownership> = self
                    .holdings
                    .assignments()
                    .iter()
                    .filter(|(_, a)| a.node == Some(me) && l.grants_to(me))
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
