//! Flows: what clients do at an owner's data path, the exchange that brings it to the other balancers, and what must be true of
//! it: a node that begins to forward has every flow that its predecessor took for told.
//!
//! Random numbers here come from a stream of their own, so that a run with flows is the run without them otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use komainu_proto::domain::{BackendId, GroupId, NodeId, Role, ServiceId};

use super::Random;
use super::machine::{Machine, Time};
use super::world::{Arrival, Event, MS, World};
use crate::flowsync::model::Table;
use crate::flowsync::{
    Change, Data, Exchange, Name, Owned, Record, Report, Step, Transmit, Urgency, Work, data_context,
    report_context,
};
use crate::seal::{Kind, Session};
use crate::time::Instant;

/// Leases and tables are looked at this often, however little happens.
const LOOK: std::time::Duration = std::time::Duration::from_millis(50);
/// Longest time between two things that clients do.
const EVERY: Time = 40 * MS;
/// Flows of a group: more than the table gives out at once, and few enough to compare often.
const MOST: usize = 24;
/// Places of a table that are given out at once.
const PIECE: usize = 8;

/// The process's side of it.
#[derive(Debug)]
pub struct Warm {
    exchange: Exchange,
    session: Session,
    /// Messages sealed so far.
    counter: u64,
    look_at: Instant,
    /// Index of the state by which the peers are known.
    index: Option<u64>,
    owned: Vec<Owned>,
    /// Which process of a node its flows go to.
    talks_to: BTreeMap<NodeId, Session>,
    /// Nodes that have this one's flows.
    pub followers: Vec<NodeId>,
}

/// A sealed datagram.
#[derive(Clone, Debug)]
pub struct Sealed {
    kind: Kind,
    context: Vec<u8>,
    session: Session,
    counter: u64,
    bytes: Vec<u8>,
}

/// What is known of flows, by somebody who sees everything.
#[derive(Debug)]
pub struct Flows {
    random: Random,
    made: u64,
    clients_go_on: bool,
    /// Every flow that there ever was.
    known: BTreeSet<(Name, BackendId)>,
    /// Those that their clients have ended.
    ended: BTreeSet<Name>,
    /// By process: flows that an owner took for told, and that have not ended since.
    told: BTreeMap<(NodeId, Session), BTreeMap<Name, Record>>,
    /// Who began to forward for each group under the highest epoch yet. (A node whose clock was halted begins anew under the one
    /// it had, until it hears of others.)
    taken_by: BTreeMap<GroupId, (u64, NodeId)>,
    /// How often a node began to forward with such flows, and how many there were.
    pub taken_over: (u64, u64),
}

fn told_by(work: &Work) -> String {
    let mut text = format!("is told by n{}:", work.peer.0);
    for step in &work.steps {
        match step {
            Step::Adopt(changes) => {
                for change in changes {
                    let (sign, port) = match change {
                        Change::Known(record) => ("+", record.name.client.port()),
                        Change::Gone(name) => ("-", name.client.port()),
                        Change::Unbound(binding) => ("-snat ", binding.snat.port()),
                    };
                    text += &format!(" {sign}{}/{port}", change.service().0);
                }
            }
            Step::Sweep(groups) => {
                text += &format!(", all of {:?}", groups.iter().map(|g| g.0).collect::<Vec<_>>())
            }
        }
    }
    if !work.stale.is_empty() {
        text += &format!(", not heard on {:?}", work.stale.iter().map(|g| g.0).collect::<Vec<_>>());
    }
    text
}

/// Flows of a group.
fn of(table: &Table, group: GroupId) -> impl Iterator<Item = &Record> {
    table.records().filter(move |r| group_of(r.name.service) == group)
}

fn group_of(service: ServiceId) -> GroupId {
    GroupId(service.0)
}

impl Warm {
    /// Of a process that starts.
    pub fn new(node: NodeId, generation: u64) -> Warm {
        let mut session = [0; 16];
        session[..8].copy_from_slice(&node.0.to_be_bytes());
        session[8..].copy_from_slice(&generation.to_be_bytes());
        let session = Session(session);
        Warm {
            exchange: Exchange::new(node, session),
            session,
            counter: 0,
            look_at: Instant(0),
            index: None,
            owned: Vec::new(),
            talks_to: BTreeMap::new(),
            followers: Vec::new(),
        }
    }

    fn receive(&mut self, me: NodeId, sealed: Sealed, now: Instant) {
        self.look_at = now;
        if sealed.kind == Kind::Flows {
            // Else it is sealed for an earlier process.
            if sealed.context == data_context(me, self.session) {
                let data = Data::decode(&sealed.bytes).expect("flows survive the wire");
                self.exchange.handle_data(sealed.session, data, now);
            }
        } else if sealed.context == report_context(me) {
            let report = Report::decode(&sealed.bytes).expect("a report survives the wire");
            self.exchange.handle_report(sealed.session, sealed.counter, report, now);
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.look_at <= now || self.exchange.next_deadline().is_some_and(|at| at <= now)
    }

    /// When to look again at the latest.
    pub fn next_deadline(&self) -> Instant {
        self.exchange.next_deadline().map_or(self.look_at, |at| at.min(self.look_at))
    }
}

impl Machine {
    /// One round of the exchange. What is to be sent.
    fn exchange_flows(&mut self, t: Time, mut note: impl FnMut(String)) -> Vec<(NodeId, Sealed)> {
        let now = self.clock(t);
        let installed = self.installed;
        let Some(p) = &mut self.process else { return Vec::new() };
        let Some(warm) = &mut p.warm else { return Vec::new() };
        warm.look_at = now.after(LOOK);
        let state = p.core.state();
        if warm.index != Some(state.index) {
            warm.index = Some(state.index);
            let balancers = state.members.iter().filter(|m| m.node.role == Role::Balancer);
            warm.exchange.set_peers(balancers.map(|m| m.node.id).collect::<Vec<_>>(), now);
        }
        let mine = self.lane.iter().filter(|(_, lease)| lease.forward_until > now);
        warm.owned = mine.map(|(&group, lease)| Owned { group, epoch: lease.epoch }).collect();
        let owned = &warm.owned;
        warm.exchange.set_owned(owned.clone());
        let owns = |group| owned.iter().any(|o| o.group == group);
        let news = std::mem::take(&mut self.flows.news);
        warm.exchange.set_index(installed);
        for change in news {
            if owns(group_of(change.service())) {
                let soon = matches!(change, Change::Known(r) if r.name.client.port() % 2 == 0);
                let urgency = if soon { Urgency::Soon } else { Urgency::Normal };
                warm.exchange.push(change, urgency);
            }
        }
        warm.exchange.set_installed(installed);
        while let Some(dump) = warm.exchange.wants_dump() {
            let (piece, next) = self.flows.piece(dump.from, PIECE);
            let piece: Vec<_> = piece
                .filter(|r| dump.groups.contains(&group_of(r.name.service)))
                .map(|r| Change::Known(*r))
                .collect();
            warm.exchange.dumped(&dump, piece, next);
        }
        let blocked = |theirs: &[Owned]| {
            theirs.iter().any(|t| owned.iter().any(|o| o.group == t.group && o.epoch < t.epoch))
        };
        while let Some(work) = warm.exchange.poll_step(blocked) {
            note(told_by(&work));
            self.flows.take_over(&work, group_of, owns);
            warm.exchange.done(work.peer, now);
        }
        warm.exchange.handle_timeout(now);
        let mut out = Vec::new();
        while let Some(Transmit { to, kind, context, bytes }) = warm.exchange.poll_transmit(now) {
            if kind == Kind::Flows {
                let process = context[context.len() - 16..].try_into().expect("ends with a session");
                warm.talks_to.insert(to, Session(process));
            }
            warm.counter += 1;
            let (session, counter) = (warm.session, warm.counter);
            out.push((to, Sealed { kind, context, session, counter, bytes }));
        }
        let caught_up = warm.exchange.status(now).into_iter().filter(|p| p.caught_up);
        warm.followers = caught_up.map(|p| p.node).collect();
        let mut pulse = p.pulse.lock().expect("no panic");
        pulse.set_followers(Some(warm.followers.clone()));
        pulse.set_told(warm.exchange.told().collect());
        drop(pulse);
        out
    }
}

impl World {
    /// From now on clients have flows.
    pub fn begin_flows(&mut self, seed: u64) {
        self.flows = Some(Flows {
            random: Random(seed),
            made: 0,
            clients_go_on: true,
            known: BTreeSet::new(),
            ended: BTreeSet::new(),
            told: BTreeMap::new(),
            taken_by: BTreeMap::new(),
            taken_over: (0, 0),
        });
        self.post(self.t, Event::Client);
    }

    /// Clients do nothing new.
    pub fn end_flows(&mut self) {
        if let Some(flows) = &mut self.flows {
            flows.clients_go_on = false;
        }
    }

    /// A client does something.
    pub(super) fn client(&mut self) -> Result<(), String> {
        let t = self.t;
        let Some(flows) = self.flows.as_mut().filter(|f| f.clients_go_on) else { return Ok(()) };
        let at = t + flows.random.between(MS, EVERY);
        let nth = flows.random.below(self.announced.len().max(1) as u64) as usize;
        let place = self.announced.iter().nth(nth).map(|(group, node)| (*group, *node));
        if let Some((group, node)) = place {
            let machine = self.machines.get_mut(&node).expect("a node of this world");
            let forwards = machine.lane.get(&group).is_some_and(|l| l.forward_until > machine.clock(t));
            if forwards && machine.halted_since.is_none() && machine.process.is_some() {
                let there: Vec<Record> = of(&machine.flows, group).copied().collect();
                if there.len() >= MOST || (!there.is_empty() && flows.random.below(3) == 0) {
                    let record = there[flows.random.below(there.len() as u64) as usize];
                    machine.flows.remove(&record.name);
                    machine.flows.news.push(record.ended());
                    flows.ended.insert(record.name);
                    flows.told.values_mut().for_each(|told| _ = told.remove(&record.name));
                } else {
                    flows.made += 1;
                    let client = SocketAddr::from(([10, 9, (flows.made >> 16) as u8, 1], flows.made as u16));
                    let snat = SocketAddr::from(([10, 8, (flows.made >> 16) as u8, 1], flows.made as u16));
                    let record = Record {
                        name: Name { service: ServiceId(group.0), client },
                        backend: BackendId(flows.random.below(5) as u32),
                        snat: (flows.made % 3 > 0).then_some(snat),
                        progress: 2,
                    };
                    flows.known.insert((record.name, record.backend));
                    machine.flows.put(record, 0);
                    machine.flows.news.push(Change::Known(record));
                }
            }
        }
        self.post(at, Event::Client);
        Ok(())
    }

    /// What has arrived at a node's exchange.
    pub(super) fn flows_arrive(&mut self, node: u64, sealed: Sealed) {
        let t = self.t;
        let machine = self.machine(node);
        let (id, now) = (machine.identity.id, machine.clock(t));
        if let Some(warm) = machine.process.as_mut().and_then(|p| p.warm.as_mut()) {
            warm.receive(id, sealed, now);
        }
    }

    /// A node's exchange does what is due.
    ///
    /// # Errors
    /// An invariant is broken.
    pub(super) fn exchange_flows(&mut self, node: u64) -> Result<(), String> {
        let t = self.t;
        let machine = self.machine(node);
        let now = machine.clock(t);
        let warm = machine.process.as_ref().and_then(|p| p.warm.as_ref());
        let Some(before) = warm.filter(|w| w.is_due(now)).map(|w| w.followers.clone()) else { return Ok(()) };
        let mut notes = Vec::new();
        let out = machine.exchange_flows(t, |line| notes.push(line));
        let after = machine.process.as_ref().and_then(|p| p.warm.as_ref()).map(|w| w.followers.clone());
        if let Some(after) = after.filter(|after| *after != before) {
            self.say(node, || format!("has told its flows to {after:?}"));
        }
        notes.into_iter().for_each(|line| self.say(node, || line));
        for (to, sealed) in out {
            self.flow_datagram(node, to.0, sealed);
        }
        self.note_what_is_told(node)
    }

    fn flow_datagram(&mut self, from: u64, to: u64, sealed: Sealed) {
        let w = self.weather;
        let Some(flows) = &mut self.flows else { return };
        let r = &mut flows.random;
        if !self.machines.contains_key(&to) || self.cut.contains(&(from, to)) || r.ppm(w.loss_ppm) {
            return;
        }
        let copies = if r.ppm(w.twice_ppm) { 2 } else { 1 };
        let delays: Vec<Time> = (0..copies)
            .map(|_| {
                let longest = if r.ppm(w.late_ppm) { w.late } else { w.delay };
                r.between(longest / 5, longest)
            })
            .collect();
        for delay in delays {
            let arrival = Arrival::Flows(Box::new(sealed.clone()));
            self.post(self.t + delay, Event::Arrive { to, arrival });
        }
    }

    /// Where an owner takes a peer for told of everything, it is.
    fn note_what_is_told(&mut self, node: u64) -> Result<(), String> {
        let t = self.t;
        let World { machines, flows: Some(flows), .. } = self else { return Ok(()) };
        let machine = &machines[&node];
        let now = machine.clock(t);
        let Some(warm) = machine.process.as_ref().and_then(|p| p.warm.as_ref()) else { return Ok(()) };
        if !machine.flows.news.is_empty() {
            return Ok(());
        }
        for peer in warm.exchange.status(now).iter().filter(|p| p.caught_up && p.lag == Some(0)) {
            let Some(session) = warm.talks_to.get(&peer.node) else { continue };
            let Some(other) = machines.get(&peer.node.0) else { continue };
            let process = other.process.as_ref().and_then(|p| p.warm.as_ref());
            if process.is_none_or(|w| w.session != *session) {
                continue;
            }
            let told = flows.told.entry((peer.node, *session)).or_default();
            for owned in &warm.owned {
                // Whoever took over since, or forwards itself, knows better.
                let clock = other.clock(t);
                let newest = flows.taken_by.get(&owned.group) == Some(&(owned.epoch, machine.identity.id));
                if !newest || other.lane.get(&owned.group).is_some_and(|l| l.forward_until > clock) {
                    continue;
                }
                told.retain(|name, _| group_of(name.service) != owned.group);
                // A node that still forwards beside a new owner hears of an end that the owner doesn't take from it.
                let lives = |r: &&Record| !flows.ended.contains(&r.name);
                for record in of(&machine.flows, owned.group).filter(lives) {
                    if other.flows.get(&record.name) != Some(record) {
                        return Err(format!(
                            "n{node} takes n{} for told of {record:?}, which has {:?}",
                            peer.node.0,
                            other.flows.get(&record.name)
                        ));
                    }
                    told.insert(record.name, *record);
                }
            }
        }
        Ok(())
    }

    /// A node begins to answer for a group: it has what it was told.
    pub(super) fn takes_over(&mut self, node: u64, group: GroupId) -> Result<(), String> {
        let World { machines, flows: Some(flows), .. } = self else { return Ok(()) };
        let machine = &machines[&node];
        let Some(epoch) = machine.lane.get(&group).map(|lease| lease.epoch) else { return Ok(()) };
        if flows.taken_by.get(&group).is_some_and(|(newest, _)| *newest > epoch) {
            return Ok(());
        }
        let Some(warm) = machine.process.as_ref().and_then(|p| p.warm.as_ref()) else { return Ok(()) };
        let told = flows.told.get(&(machine.identity.id, warm.session));
        let told = told.into_iter().flatten().filter(|(name, _)| group_of(name.service) == group);
        let mut count = 0;
        for (name, record) in told {
            if machine.flows.get(name) != Some(record) {
                return Err(format!(
                    "n{node} forwards for group {} without {record:?}, which it was told of",
                    group.0
                ));
            }
            count += 1;
        }
        if let Some((name, r)) = of(&machine.flows, group)
            .map(|r| (r.name, r))
            .find(|(name, r)| !flows.known.contains(&(*name, r.backend)))
        {
            return Err(format!("n{node} knows of {name:?} as {r:?}, which never was"));
        }
        flows.taken_by.insert(group, (epoch, machine.identity.id));
        // From now on others have what this one tells them.
        flows.told.values_mut().for_each(|told| told.retain(|name, _| group_of(name.service) != group));
        if count > 0 {
            flows.taken_over.0 += 1;
            flows.taken_over.1 += count;
        }
        Ok(())
    }

    /// Whether every balancer that is a member has its owners' flows, those and no others.
    pub fn flows_agree(&self) -> bool {
        if self.flows.is_none() {
            return true;
        }
        let Some(state) = self.leader().and_then(|l| self.process(l)).map(|p| p.core.state()) else {
            return false;
        };
        let balancers = state.members.iter().filter(|m| m.node.role == Role::Balancer).map(|m| m.node.id.0);
        let balancers: Vec<u64> = balancers.collect();
        state.groups.iter().all(|group| {
            let Some(owner) = self.owner(group.id) else { return false };
            let of = |node: &u64| {
                let flows = of(&self.machines[node].flows, group.id);
                flows.map(|r| (r.name, r.backend)).collect::<BTreeSet<_>>()
            };
            let known = of(&owner);
            let followers = self
                .process(owner)
                .and_then(|p| p.warm.as_ref())
                .map(|w| w.followers.as_slice())
                .unwrap_or_default();
            balancers.iter().all(|n| *n == owner || (of(n) == known && followers.contains(&NodeId(*n))))
        })
    }

    /// Who has how many flows of which group, for people.
    pub fn flows_told(&self) -> String {
        let Some(state) = self.leader().and_then(|l| self.process(l)).map(|p| p.core.state()) else {
            return "nobody leads".to_owned();
        };
        let mut text = String::new();
        for group in &state.groups {
            let owner = self.owner(group.id);
            let followers =
                owner.and_then(|o| self.process(o)).and_then(|p| p.warm.as_ref()).map(|w| &w.followers);
            let counts: Vec<_> =
                self.machines.iter().map(|(id, m)| (*id, of(&m.flows, group.id).count())).collect();
            text += &format!(
                "group {}: owner {owner:?}, followers {followers:?}, flows {counts:?}; ",
                group.id.0
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use komainu_proto::domain::{GroupId, Role};

    use super::super::run;
    use super::super::world::{MS, World};
    use crate::timing::Timing;

    const G: GroupId = GroupId(1);
    const ROLES: [Role; 3] = [Role::Balancer, Role::Balancer, Role::Witness];

    /// A cluster of which a client's flows are known to owner and standby. Also says which is which.
    fn warmed(seed: u64, roles: &[Role]) -> (World, u64, u64) {
        let mut w = World::new(seed, roles, Timing::default());
        w.begin_flows(seed);
        (1..=roles.len() as u64).try_for_each(|id| w.start(id)).unwrap();
        let whole = |w: &World| {
            w.leader().and_then(|l| w.process(l)).is_some_and(|p| p.core.voters().count() == w.machines.len())
        };
        assert!(w.run_until(10_000 * MS, whole).unwrap(), "seed {seed}");
        w.change(w.leader().unwrap(), 1).unwrap();
        w.run_for(3_000 * MS).unwrap();
        w.end_flows();
        w.run_for(300 * MS).unwrap();
        assert!(w.flows_agree(), "seed {seed}: {}", w.flows_told());
        let owner = w.owner(G).unwrap();
        (w, owner, 3 - owner)
    }

    /// Found by `make chaos CLUSTERS=pair-safety CASES=kill-owner-in-transition`: an owner that nobody could replace was started again,
    /// took up its group without a single flow, and a quarter of the connections went to other backends; the standby had them all.
    #[test]
    fn an_owner_that_was_started_anew_leaves_its_group_to_whoever_has_its_flows() {
        for seed in 1..=40 {
            // Nobody can take over: the standby alone is no quorum.
            for roles in [&ROLES[..2], &ROLES] {
                let (mut w, owner, standby) = warmed(seed, roles);
                w.verbose = true;
                let dies: Vec<u64> = (1..=roles.len() as u64).filter(|n| *n != standby).collect();
                dies.iter().for_each(|n| w.kill(*n));
                w.run_for((20 + 37 * seed) * MS).unwrap();
                dies.iter().try_for_each(|n| w.start(*n)).unwrap();
                w.run_for(2_000 * MS).unwrap();
                assert_eq!(
                    w.owner(G),
                    Some(standby),
                    "seed {seed}, {owner} died:\n{}",
                    w.transcript.join("\n")
                );
                assert!(w.flows.as_ref().unwrap().taken_over.1 > 0, "seed {seed}");
            }
        }
    }

    /// Without anybody who has them it goes on.
    #[test]
    fn an_owner_that_was_started_anew_does_not_wait_for_the_dead() {
        for seed in 1..=20 {
            let (mut w, owner, standby) = warmed(seed, &ROLES);
            w.kill(standby);
            w.run_for(2_000 * MS).unwrap();
            w.kill(owner);
            w.start(owner).unwrap();
            assert!(w.run_until(w.t + 1_000 * MS, |w| w.owner(G) == Some(owner)).unwrap(), "seed {seed}");
        }
    }

    #[test]
    fn owners_are_replaced_by_nodes_that_have_flows() {
        let (mut times, mut flows) = (0, 0);
        for seed in 1..=60 {
            if let Some(seen) = run(seed, false).0.flows {
                (times, flows) = (times + seen.taken_over.0, flows + seen.taken_over.1);
            }
        }
        assert!(times >= 10 && flows >= 50, "{times} times, {flows} flows");
    }
}
