//! All peers; what a shell talks to.

use std::collections::BTreeMap;
use std::time::Duration;

use komainu_proto::domain::{GroupId, NodeId};

use super::receiving::Receiving;
use super::sending::Sending;
use super::wire::{Data, Report};
use super::{Change, GREET, Owned, REPORT, SILENT, Urgency};
use crate::seal::{Kind, Session};
use crate::time::Instant;

/// Peers: as many as a cluster has members.
const MAX_PEERS: usize = crate::state::MAX_MEMBERS;

/// A peer's process that was heard within this time is not displaced by another one: what an earlier one left under way may
/// still arrive. Should one that late displace the living one, that displaces it in turn, and is sent everything anew.
const DISPLACE: Duration = Duration::from_millis(100);

/// See the [module documentation](super).
#[derive(Debug)]
pub struct Exchange {
    me: NodeId,
    session: Session,
    peers: BTreeMap<NodeId, Link>,
    owned: Vec<Owned>,
    /// Log index of the tables by which changes come to be.
    index: u64,
    /// Log index of the tables by which changes of others are understood.
    installed: u64,
    next_mark: u32,
    /// The highest generation of a peer that is none any more: should it come back, it may still remember that one.
    last_generation: u64,
    /// Under which epoch each group was told of last, and by whom: of each peer no more groups than one generation has, and those that
    /// this node itself has owned.
    newest: BTreeMap<GroupId, (u64, NodeId)>,
    /// Under which epoch all flows of a group were told last.
    told: BTreeMap<GroupId, u64>,
}

#[derive(Debug)]
struct Link {
    /// The peer's process, once it has named ours.
    session: Option<Session>,
    /// The process that spoke last, whether it knows ours or not.
    claimed: Option<Session>,
    /// The newest report's place among what the peer's process has sealed.
    newest: u64,
    heard_at: Option<Instant>,
    report_at: Instant,
    reported_at: Option<Instant>,
    sending: Sending,
    receiving: Receiving,
    /// Groups of which all flows will have been told once the work in hand is done.
    completing: Vec<Owned>,
}

/// A datagram to be sealed and sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// To whom.
    pub to: NodeId,
    /// What it is sealed as.
    pub kind: Kind,
    /// What it is sealed for.
    pub context: Vec<u8>,
    /// The datagram.
    pub bytes: Vec<u8>,
}

/// Flows that are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dump {
    /// For whom.
    pub peer: NodeId,
    /// For which of its generations.
    pub generation: u64,
    /// Of which groups.
    pub groups: Vec<GroupId>,
    /// From which place of the table on.
    pub from: usize,
}

/// What a peer has told, for the data path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// Who told it.
    pub peer: NodeId,
    /// Names the sending that it belongs to; never 0.
    pub mark: u32,
    /// What to do, in this order.
    pub steps: Vec<Step>,
    /// Of flows of these groups nothing: another peer tells of them under a newer epoch.
    pub stale: Vec<GroupId>,
}

/// A part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Take these over.
    Adopt(Vec<Change>),
    /// All have been told: forget flows of these groups that did not come under the mark.
    Sweep(Vec<GroupId>),
}

/// How far a peer has followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// Which node.
    pub node: NodeId,
    /// Whether it speaks this protocol with us.
    pub heard: bool,
    /// Whether it holds all flows of the groups that this node owns, but for `lag`.
    pub caught_up: bool,
    /// Changes that it has not applied; absent while it has not been told of all flows.
    pub lag: Option<u64>,
    /// Times that all flows were sent, and datagrams that were sent again.
    pub restarts: u64,
    /// Datagrams that were sent again.
    pub resent: u64,
}

/// A moment in the streams to the peers that are in step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moment(Vec<(NodeId, u64, u64)>);

impl Exchange {
    /// A node without peers. `session` is the one by which it seals.
    pub fn new(me: NodeId, session: Session) -> Exchange {
        Exchange {
            me,
            session,
            peers: BTreeMap::new(),
            owned: Vec::new(),
            index: 0,
            installed: 0,
            next_mark: 1,
            last_generation: 0,
            newest: BTreeMap::new(),
            told: BTreeMap::new(),
        }
    }

    /// The other balancers.
    pub fn set_peers(&mut self, peers: impl IntoIterator<Item = NodeId>, now: Instant) {
        let wanted: Vec<NodeId> = peers.into_iter().filter(|p| *p != self.me).take(MAX_PEERS).collect();
        let last = &mut self.last_generation;
        self.peers.retain(|node, link| {
            *last = (*last).max(link.sending.generation());
            wanted.contains(node)
        });
        for node in wanted {
            self.peers.entry(node).or_insert_with(|| Link {
                session: None,
                claimed: None,
                newest: 0,
                heard_at: None,
                report_at: now,
                reported_at: None,
                sending: Sending::after(self.last_generation),
                receiving: Receiving::default(),
                completing: Vec::new(),
            });
        }
    }

    /// The groups that this node forwards for.
    pub fn set_owned(&mut self, mut owned: Vec<Owned>) {
        owned.sort_unstable();
        if owned != self.owned {
            self.owned = owned;
            // An earlier owner's telling, under way until this one forwards no more, takes nothing away from what it has seen since.
            for o in &self.owned {
                let newest = self.newest.entry(o.group).or_insert((o.epoch, self.me));
                if o.epoch >= newest.0 {
                    *newest = (o.epoch, self.me);
                }
            }
            self.restart();
        }
    }

    /// Flows were lost on their way here, or changed in a way that nobody told: all peers are sent everything anew.
    pub fn restart(&mut self) {
        for link in self.peers.values_mut().filter(|l| l.session.is_some()) {
            link.sending.restart(&self.owned);
        }
    }

    /// Log index of the tables by which the changes pushed from now on came to be.
    pub fn set_index(&mut self, index: u64) {
        self.index = self.index.max(index);
    }

    /// Log index of the tables that changes of others are understood by.
    pub fn set_installed(&mut self, index: u64) {
        self.installed = self.installed.max(index);
    }

    /// Something happened to a flow of a group that this node owns.
    pub fn push(&mut self, change: Change, urgency: Urgency) {
        for link in self.peers.values_mut() {
            link.sending.push(change, urgency);
        }
    }

    /// A report has arrived, sealed by `session` for this node, as its `counter`th message.
    pub fn handle_report(&mut self, session: Session, counter: u64, report: Report, now: Instant) {
        let Some(link) = self.peers.get_mut(&report.from) else { return };
        if link.session == Some(session) && counter <= link.newest {
            return;
        }
        link.claimed = Some(session);
        if report.to != Some(self.session) {
            // It does not know this process yet.
            link.greet(now);
            return;
        }
        let other = link.session != Some(session);
        if other && link.session.is_some() && link.heard_at.is_some_and(|at| now.since(at) < DISPLACE) {
            link.report_at = link.report_at.min(now.after(DISPLACE));
            return;
        }
        (link.heard_at, link.newest) = (Some(now), counter);
        if other {
            link.session = Some(session);
            link.receiving = Receiving::default();
            link.sending.restart(&self.owned);
            // So that it knows ours without waiting.
            link.report_at = now;
        } else if !link.sending.is_on() && !self.owned.is_empty() {
            link.sending.restart(&self.owned);
        }
        if link.sending.is_on() && report.generation != link.sending.generation() {
            // It may not take in what comes before it has heard of this process by a report.
            link.greet(now);
        }
        link.sending.handle_report(report.generation, report.applied, report.arrived);
    }

    /// Flows have arrived, sealed by `session` for this node's.
    pub fn handle_data(&mut self, session: Session, data: Data, now: Instant) {
        let Some(link) = self.peers.get_mut(&data.from) else { return };
        if link.session == Some(session) {
            link.receiving.take(data, now);
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        for link in self.peers.values_mut() {
            if link.sending.is_on() && !link.is_heard(now) {
                link.sending.stop();
            }
        }
    }

    /// Flows that are wanted from the table, to be given to [`Exchange::dumped`].
    pub fn wants_dump(&self) -> Option<Dump> {
        self.peers.iter().find_map(|(&peer, link)| {
            let from = link.sending.wants_dump()?;
            let groups = link.sending.scope().iter().map(|o| o.group).collect();
            Some(Dump { peer, generation: link.sending.generation(), groups, from })
        })
    }

    /// Flows that were wanted, and where to go on.
    pub fn dumped(&mut self, dump: &Dump, flows: impl IntoIterator<Item = Change>, next: Option<usize>) {
        if let Some(link) = self.peers.get_mut(&dump.peer)
            && link.sending.generation() == dump.generation
            && link.sending.wants_dump() == Some(dump.from)
        {
            link.sending.dumped(flows, next);
        }
    }

    /// What a peer has told and the data path is to do now; then [`Exchange::done`]. `blocked`: groups that must wait, because
    /// this node still forwards for them under an older epoch.
    pub fn poll_step(&mut self, blocked: impl Fn(&[Owned]) -> bool) -> Option<Work> {
        let (installed, next_mark) = (self.installed, &mut self.next_mark);
        for (&peer, link) in &mut self.peers {
            let mark = || {
                let mark = *next_mark;
                *next_mark = mark.checked_add(1).unwrap_or(1);
                mark
            };
            let Some((data, mark, scope)) = link.receiving.next(installed, &blocked, mark) else { continue };
            if data.begins.is_some() {
                self.newest.retain(|_, (_, teller)| *teller != peer);
                for owned in scope {
                    let newest = self.newest.entry(owned.group).or_insert((owned.epoch, peer));
                    if owned.epoch > newest.0 {
                        *newest = (owned.epoch, peer);
                    }
                }
            }
            let is_stale = |o: &&Owned| {
                self.newest.get(&o.group).is_some_and(|(epoch, other)| *other != peer && *epoch > o.epoch)
            };
            let stale: Vec<GroupId> = scope.iter().filter(is_stale).map(|o| o.group).collect();
            let mut steps = Vec::new();
            link.completing.clear();
            if !data.changes.is_empty() {
                steps.push(Step::Adopt(data.changes.clone()));
            }
            if data.complete {
                let groups = scope.iter().map(|o| o.group).filter(|g| !stale.contains(g));
                steps.push(Step::Sweep(groups.collect()));
                link.completing = scope.iter().filter(|o| !stale.contains(&o.group)).copied().collect();
            }
            return Some(Work { peer, mark, steps, stale });
        }
        None
    }

    /// The work that a peer gave is done.
    pub fn done(&mut self, peer: NodeId, now: Instant) {
        if let Some(link) = self.peers.get_mut(&peer) {
            link.receiving.applied(now);
            for o in link.completing.drain(..) {
                let epoch = self.told.entry(o.group).or_insert(o.epoch);
                *epoch = (*epoch).max(o.epoch);
            }
            // Groups that nobody tells of any more are nobody's.
            let newest = &self.newest;
            self.told.retain(|group, _| newest.contains_key(group));
        }
    }

    /// Groups of which all flows were told, and the newest epoch under which they were.
    pub fn told(&self) -> impl Iterator<Item = Owned> + '_ {
        self.told.iter().map(|(&group, &epoch)| Owned { group, epoch })
    }

    /// Whether a peer has told something that tables of that index are enough for.
    pub fn waits_for(&self, installed: u64) -> bool {
        self.peers.values().any(|link| link.receiving.waits_for(installed))
    }

    /// The next datagram to be sent.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        let me = self.me;
        for (&to, link) in &mut self.peers {
            if link.report_due().is_some_and(|at| at <= now) {
                let (generation, applied, arrived) = link.receiving.report();
                // What an earlier process of the peer told is nothing to the one that speaks now.
                let same = link.claimed == link.session;
                let (generation, applied, arrived) =
                    if same { (generation, applied, arrived) } else { (0, 0, 0) };
                link.report_at = now.after(REPORT);
                link.reported_at = Some(now);
                let report = Report { from: me, to: link.claimed, generation, applied, arrived };
                return Some(Transmit {
                    to,
                    kind: Kind::FlowReport,
                    context: report_context(to),
                    bytes: report.encode(),
                });
            }
            let Some(session) = link.session else { continue };
            if let Some(bytes) = link.sending.poll(me, self.index, now) {
                return Some(Transmit { to, kind: Kind::Flows, context: data_context(to, session), bytes });
            }
        }
        None
    }

    /// When to look again at the latest; absent without peers.
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadlines = self.peers.values().flat_map(|link| {
            let silent = link.heard_at.filter(|_| link.sending.is_on()).map(|at| at.after(SILENT));
            [link.report_due(), link.sending.deadline().filter(|_| link.session.is_some()), silent]
        });
        deadlines.flatten().min()
    }

    /// How far each peer has followed.
    pub fn status(&self, now: Instant) -> Vec<PeerStatus> {
        let status = self.peers.iter().map(|(&node, link)| PeerStatus {
            node,
            heard: link.is_heard(now),
            caught_up: link.sending.is_live(),
            lag: link.sending.lag(),
            restarts: link.sending.restarts,
            resent: link.sending.resent,
        });
        status.collect()
    }

    /// This moment in the streams to the peers that are in step, which are asked to acknowledge it at once.
    pub fn moment(&mut self) -> Moment {
        self.peers.values_mut().filter(|l| l.sending.is_live()).for_each(|l| l.sending.hurry());
        let live = self.peers.iter().filter(|(_, link)| link.sending.is_live());
        Moment(live.map(|(&peer, l)| (peer, l.sending.generation(), l.sending.progress().0)).collect())
    }

    /// Whether everything that was pushed before a moment is applied by the peers that were in step then and still are.
    pub fn is_past(&self, moment: &Moment) -> bool {
        moment.0.iter().all(|(peer, generation, came)| {
            self.peers.get(peer).is_none_or(|link| {
                let sending = &link.sending;
                sending.generation() != *generation || !sending.is_live() || sending.progress().1 >= *came
            })
        })
    }
}

impl Link {
    /// A report is due, unless one has just been sent.
    fn greet(&mut self, now: Instant) {
        let earliest = self.reported_at.map_or(now, |at| at.after(GREET));
        self.report_at = self.report_at.min(earliest.max(now));
    }

    fn is_heard(&self, now: Instant) -> bool {
        self.session.is_some() && self.heard_at.is_some_and(|at| now.since(at) < SILENT)
    }

    fn report_due(&self) -> Option<Instant> {
        let due = self.receiving.report_due().map_or(self.report_at, |at| at.min(self.report_at));
        // Never more often than this, whatever a peer sends.
        Some(self.reported_at.map_or(due, |at| due.max(at.after(Duration::from_millis(1)))))
    }
}

/// What a report is sealed for: the node.
pub fn report_context(to: NodeId) -> Vec<u8> {
    to.0.to_be_bytes().to_vec()
}

/// What flows are sealed for: the node's process.
pub fn data_context(to: NodeId, session: Session) -> Vec<u8> {
    [&to.0.to_be_bytes()[..], &session.0].concat()
}
