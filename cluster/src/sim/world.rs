//! The machines, the network between them, and time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::SocketAddr;
use std::sync::Arc;

use komainu_proto::domain::{Document, Group, GroupId, NodeId, Role};
use raft::eraftpb::{Message, MessageType};

use super::Random;
use super::check::Checker;
use super::machine::{Machine, Process, Time};
use super::pairs::ServiceNetwork;
use super::warm::{Flows, Sealed};
use crate::core::{Request, Ticket};
use crate::pulse;
use crate::state::{Change, Command, ProposalId};
use crate::store::Store as _;
use crate::timing::Timing;

/// One millisecond of true time.
pub const MS: Time = 1_000_000;
/// Time between two wake-ups of a node that finds its deadline in the past.
const NO_SPIN: Time = 20_000;
/// Datagrams that wait at a frozen process: what a socket buffer holds of beats.
const BACKLOG: usize = 256;

/// What arrives at a node.
#[derive(Clone, Debug)]
pub enum Arrival {
    /// A beat, as bytes.
    Beat(SocketAddr, Vec<u8>),
    /// A beat as it comes out of its bytes.
    ReadBeat(SocketAddr, Arc<pulse::Beat>),
    /// A Raft message.
    Raft(Box<Message>),
    /// A stream to a node broke.
    Unreachable(NodeId),
    /// What an executor says of a process that has ended, as bytes.
    Resign(Vec<u8>),
    /// Flows, or a report of them.
    Flows(Box<Sealed>),
}

#[derive(Debug)]
pub(super) enum Event {
    Arrive {
        to: u64,
        arrival: Arrival,
    },
    Written {
        node: u64,
        generation: u64,
        number: u64,
    },
    Installed {
        node: u64,
        generation: u64,
        index: u64,
    },
    Wake {
        node: u64,
    },
    /// A client does something.
    Client,
    Resume {
        node: u64,
    },
    DiskWell {
        node: u64,
    },
    Ask {
        node: u64,
        generation: u64,
    },
    AsideWritten {
        node: u64,
        generation: u64,
        who: Vec<String>,
    },
    /// An executor does what is left to do for a process that has died: once, and then it says again what it said.
    Execute {
        node: u64,
        dead: Dead,
        turn: usize,
    },
}

/// A process that has died and has an executor.
#[derive(Debug)]
pub(super) struct Dead {
    pub(super) generation: u64,
    pub(super) power: u64,
    pub(super) will: pulse::Will,
}

/// How the network and the disks behave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weather {
    /// Datagrams lost, in ppm.
    pub loss_ppm: u32,
    /// Datagrams that arrive twice, in ppm.
    pub twice_ppm: u32,
    /// Longest usual delay in ns.
    pub delay: Time,
    /// Datagrams that take up to `late` instead, in ppm.
    pub late_ppm: u32,
    /// Longest delay of those in ns.
    pub late: Time,
    /// Longest usual fsync in ns.
    pub fsync: Time,
    /// Fsyncs that take up to `slow` instead, in ppm.
    pub slow_ppm: u32,
    /// Longest fsync of those in ns.
    pub slow: Time,
}

impl Weather {
    /// A good network, good disks.
    pub const FAIR: Weather = Weather {
        loss_ppm: 0,
        twice_ppm: 0,
        delay: MS / 2,
        late_ppm: 0,
        late: MS,
        fsync: 2 * MS,
        slow_ppm: 0,
        slow: MS,
    };
}

/// See the [module documentation](self).
pub struct World {
    /// True time in ns since the beginning.
    pub t: Time,
    /// Everything random.
    pub random: Random,
    /// The machines by node id.
    pub machines: BTreeMap<u64, Machine>,
    /// Behaviour of network and disks.
    pub weather: Weather,
    /// Directed pairs that nothing gets through between.
    pub cut: BTreeSet<(u64, u64)>,
    /// The service network beside the cluster network, where that matters: in pairs.
    pub service: ServiceNetwork,
    /// Nodes that an operator has told to leave.
    pub left: BTreeSet<u64>,
    /// Kinds of Raft datagrams of which the next one is lost.
    pub lose: Vec<MessageType>,
    /// Who announced each group last: clients send there.
    pub announced: BTreeMap<GroupId, u64>,
    /// The invariants.
    pub checker: Checker,
    /// What happened, for people.
    pub transcript: Vec<String>,
    /// The transcript's zero.
    told_from: Time,
    /// Whether to write the transcript.
    pub verbose: bool,
    /// What the clients do.
    pub clients: Clients,
    /// Flows, where there are any.
    pub flows: Option<Flows>,
    /// Whether beats travel as bytes. Writing and reading them takes a third of a run and is the same in every run, so a program
    /// that plays very many does it in some of them only.
    pub beats_as_bytes: bool,
    /// When, the how many-eth event of the world, and its place in `events`.
    queue: BinaryHeap<Reverse<(Time, u64, usize)>>,
    events: Vec<Option<Event>>,
    /// Places in `events` that are free again.
    free: Vec<usize>,
    sequence: u64,
}

/// Changes that were asked for.
#[derive(Default)]
pub struct Clients {
    pub(super) under_way: BTreeMap<(u64, u64, Ticket), String>,
    made: u64,
}

impl World {
    /// Machines that are switched off, all in each other's node files.
    pub fn new(seed: u64, roles: &[Role], timing: Timing) -> World {
        let ids: Vec<u64> = (1..=roles.len() as u64).collect();
        let machines =
            ids.iter().zip(roles).map(|(&id, &role)| (id, Machine::new(id, role, &ids, timing))).collect();
        World {
            t: 0,
            random: Random(seed),
            machines,
            weather: Weather::FAIR,
            cut: BTreeSet::new(),
            service: ServiceNetwork::default(),
            left: BTreeSet::new(),
            lose: Vec::new(),
            announced: BTreeMap::new(),
            checker: Checker::default(),
            transcript: Vec::new(),
            told_from: 0,
            verbose: false,
            clients: Clients::default(),
            flows: None,
            beats_as_bytes: true,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            free: Vec::new(),
            sequence: 0,
        }
    }

    /// Its clock shows something else than was reckoned with: looks at its deadline anew.
    pub fn poke(&mut self, node: u64) {
        let t = self.t;
        if self.process(node).is_some() {
            self.machine(node).wake_at = Some(t);
            self.post(t, Event::Wake { node });
        }
    }

    /// Begins the transcript anew. From here on nothing takes any time but what the nodes wait for themselves, so that
    /// the order in which things happen is theirs and not chance.
    pub fn tell_from_here(&mut self) {
        self.transcript.clear();
        self.told_from = self.t;
        self.weather = Weather { delay: 1, fsync: 1, ..Weather::FAIR };
    }

    /// Runs until true time `until`, or until `done` says so after an event.
    ///
    /// # Errors
    /// An invariant is broken.
    pub fn run_until(&mut self, until: Time, mut done: impl FnMut(&World) -> bool) -> Result<bool, String> {
        while let Some(&Reverse((at, _, place))) = self.queue.peek() {
            if at > until {
                break;
            }
            self.queue.pop();
            let event = self.events[place].take().expect("an event at its place");
            self.free.push(place);
            self.t = at;
            // Leases begin where a lane is told of one, or a clock is moved; there they are checked. Time only ends them.
            self.handle(event)?;
            self.note_meeting();
            if done(self) {
                return Ok(true);
            }
        }
        self.t = until;
        Ok(false)
    }

    /// Runs for a while.
    ///
    /// # Errors
    /// An invariant is broken.
    pub fn run_for(&mut self, lasts: Time) -> Result<(), String> {
        self.run_until(self.t + lasts, |_| false).map(|_| ())
    }

    /// Who answers for a group now.
    pub fn owner(&self, group: GroupId) -> Option<u64> {
        self.machines.iter().find(|(_, m)| m.answers(group, self.t).is_some()).map(|(id, _)| *id)
    }

    /// Whether what clients send to a group's addresses now is forwarded.
    pub fn is_served(&self, group: GroupId) -> bool {
        self.announced.get(&group).is_some_and(|node| {
            let m = &self.machines[node];
            m.lane.get(&group).is_some_and(|l| l.forward_until > m.clock(self.t))
        })
    }

    /// Who leads by its own lights.
    pub fn leader(&self) -> Option<u64> {
        let leaders = self.machines.iter().filter_map(|(id, m)| Some((m.process.as_ref()?, *id)));
        leaders.filter(|(p, _)| p.core.is_leader()).max_by_key(|(p, _)| p.core.term()).map(|(_, id)| id)
    }

    /// When everything that was handed to the disks while they were slow will have been written.
    pub fn disks_well_at(&self) -> Time {
        let last = |m: &Machine| m.process.as_ref().and_then(|p| p.writing.back()).map(|(_, done)| *done);
        self.machines.values().filter_map(last).max().unwrap_or(0).max(self.t)
    }

    /// A running process.
    pub fn process(&self, node: u64) -> Option<&Process> {
        self.machines[&node].process.as_ref()
    }

    /// Asks a node for something.
    ///
    /// # Errors
    /// An invariant is broken.
    pub fn request(&mut self, node: u64, request: Request) -> Result<Option<Ticket>, String> {
        let t = self.t;
        let machine = self.machine(node);
        let now = machine.now(t);
        if machine.paused_until > t {
            return Ok(None);
        }
        let Some(p) = &mut machine.process else { return Ok(None) };
        let ticket = p.core.request(request, now);
        self.drive(node)?;
        Ok(Some(ticket))
    }

    /// A client asks a node for a change that everybody can recognise: a document with this many groups.
    ///
    /// # Errors
    /// An invariant is broken.
    pub fn change(&mut self, node: u64, groups: u32) -> Result<(), String> {
        let t = self.t;
        self.clients.made += 1;
        let n = self.clients.made;
        let who = format!("client {n}");
        let document = document(groups, n);
        let change = Change::Apply { document, if_revision: None, confirm_within_ms: None };
        let id = Some(ProposalId { session: 1, sequence: n });
        let command = Command { id, who: who.clone(), wall_ms: t / MS, change };
        let machine = self.machine(node);
        let generation = machine.generation;
        let now = machine.now(t);
        if machine.paused_until > t {
            return Ok(());
        }
        let Some(p) = &mut machine.process else { return Ok(()) };
        let ticket = p.core.request(Request::Command(Box::new(command)), now);
        self.clients.under_way.insert((node, generation, ticket), who);
        self.drive(node)
    }

    /// Lets an operator move a group.
    ///
    /// # Errors
    /// An invariant is broken.
    pub fn switchover(&mut self, node: u64, group: &str, to: Option<u64>) -> Result<(), String> {
        let change = Change::Switchover { group: group.to_owned(), to: to.map(NodeId) };
        let command = Command { id: None, who: "operator".to_owned(), wall_ms: 0, change };
        self.request(node, Request::Command(Box::new(command))).map(|_| ())
    }

    /// Writes a line into the transcript.
    pub fn say(&mut self, node: u64, what: impl FnOnce() -> String) {
        if self.verbose {
            let line =
                format!("{:>10.3} ms  n{node} {}", (self.t - self.told_from) as f64 / MS as f64, what());
            self.transcript.push(line);
        }
    }

    /// The machine of a node.
    pub fn machine(&mut self, node: u64) -> &mut Machine {
        self.machines.get_mut(&node).expect("a node of this world")
    }

    /// Sets whether a node is fit, and tells its process.
    ///
    /// # Errors
    /// An invariant is broken.
    pub fn set_fit(&mut self, node: u64, fit: bool) -> Result<(), String> {
        self.say(node, || format!("is {}", if fit { "fit" } else { "unfit" }));
        let machine = self.machine(node);
        machine.fit = fit;
        if let Some(p) = &machine.process {
            let health = crate::api::SelfHealth {
                links_up: fit,
                gateway: None,
                forwarding: true,
                reason: String::new(),
            };
            p.pulse.lock().expect("no panic").set_self_health(health);
        }
        self.drive(node)
    }

    pub(super) fn post(&mut self, at: Time, event: Event) {
        self.sequence += 1;
        let place = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[place] = Some(event);
        self.queue.push(Reverse((at.max(self.t), self.sequence, place)));
    }

    pub(super) fn handle(&mut self, event: Event) -> Result<(), String> {
        let t = self.t;
        match event {
            Event::Arrive { to, arrival } => {
                let machine = self.machine(to);
                if machine.process.is_none() {
                    return Ok(());
                }
                if machine.paused_until > t {
                    if machine.backlog.len() < BACKLOG {
                        machine.backlog.push_back(arrival);
                    }
                    return Ok(());
                }
                self.deliver(to, arrival);
                self.drive(to)
            }
            Event::Written { node, generation, number } => self.written(node, generation, number),
            Event::Installed { node, generation, index } => {
                let machine = self.machine(node);
                let now = machine.now(t);
                if machine.paused_until > t && machine.generation == generation {
                    let until = machine.paused_until;
                    self.post(until + 1, Event::Installed { node, generation, index });
                    return Ok(());
                }
                let machine = self.machine(node);
                match &machine.process {
                    Some(p) if machine.generation == generation => {
                        machine.installed = machine.installed.max(index);
                        p.pulse.lock().expect("no panic").set_installed(index, now.at);
                        self.drive(node)
                    }
                    _ => Ok(()),
                }
            }
            Event::Wake { node } => {
                let machine = self.machine(node);
                if machine.wake_at != Some(t) || machine.process.is_none() {
                    return Ok(());
                }
                machine.wake_at = None;
                if machine.paused_until > t {
                    return Ok(());
                }
                self.time_out(node);
                self.drive(node)
            }
            Event::Client => self.client(),
            Event::Ask { node, generation } => self.ask(node, generation),
            Event::AsideWritten { node, generation, who } => self.aside_written(node, generation, who),
            Event::Execute { node, dead, turn } => {
                self.execute(node, dead, turn);
                Ok(())
            }
            Event::DiskWell { node } => {
                self.machine(node).slow_fsync = None;
                Ok(())
            }
            Event::Resume { node } => {
                if self.machine(node).paused_until > t || self.machine(node).process.is_none() {
                    return Ok(());
                }
                self.say(node, || "goes on".to_owned());
                self.machine(node).go_on(t);
                self.check_leases()?;
                // A process finds both a socket full of datagrams and a timer that is over, in either order.
                if self.random.ppm(500_000) {
                    self.time_out(node);
                    self.drive(node)?;
                }
                while let Some(arrival) = self.machine(node).backlog.pop_front() {
                    self.deliver(node, arrival);
                    self.drive(node)?;
                }
                self.time_out(node);
                self.drive(node)
            }
        }
    }

    fn time_out(&mut self, node: u64) {
        let t = self.t;
        let machine = self.machine(node);
        let now = machine.now(t);
        let Some(p) = &mut machine.process else { return };
        let due = {
            let mut pulse = p.pulse.lock().expect("no panic");
            if pulse.next_deadline() <= now.at {
                pulse.handle_timeout(now.at);
            }
            p.core.deadline(&pulse) <= now.at
        };
        if due {
            p.core.handle_timeout(now);
        }
    }

    fn deliver(&mut self, to: u64, arrival: Arrival) {
        let t = self.t;
        let machine = self.machine(to);
        let now = machine.now(t);
        let Some(p) = &mut machine.process else { return };
        match arrival {
            Arrival::Beat(source, data) => {
                let beat = pulse::Beat::decode(&data).expect("a beat survives the wire");
                let _ = p.pulse.lock().expect("no panic").handle_beat(source, beat, now.at);
            }
            Arrival::ReadBeat(source, beat) => {
                let beat = Arc::unwrap_or_clone(beat);
                let _ = p.pulse.lock().expect("no panic").handle_beat(source, beat, now.at);
            }
            Arrival::Resign(data) => {
                let resign = pulse::Resign::decode(&data).expect("a resign survives the wire");
                p.pulse.lock().expect("no panic").handle_resign(resign, now.at);
            }
            Arrival::Raft(message) => p.core.handle_message(*message, now),
            Arrival::Unreachable(node) => p.core.handle_unreachable(node, now),
            Arrival::Flows(sealed) => self.flows_arrive(to, *sealed),
        }
    }

    fn written(&mut self, node: u64, generation: u64, number: u64) -> Result<(), String> {
        let t = self.t;
        let machine = self.machine(node);
        if machine.generation != generation || machine.process.is_none() {
            return Ok(());
        }
        if machine.paused_until > t {
            let until = machine.paused_until;
            self.post(until + 1, Event::Written { node, generation, number });
            return Ok(());
        }
        let now = machine.now(t);
        let Some(p) = &mut machine.process else { return Ok(()) };
        while p.writing.front().is_some_and(|(w, _)| w.number <= number) {
            let (write, _) = p.writing.pop_front().expect("looked at");
            machine.disk.write(&write).expect("memory can be written");
        }
        p.core.handle_persisted(number, now);
        self.drive(node)
    }

    /// Carries out what a node wants done, until it wants nothing, and sets its alarm.
    pub(super) fn drive(&mut self, node: u64) -> Result<(), String> {
        self.exchange_flows(node)?;
        loop {
            let Some(p) = &mut self.machine(node).process else { return Ok(()) };
            // Leases before messages: what the Raft side sends may rest on what the lane was told.
            let next = p.pulse.lock().expect("no panic").poll_output();
            if let Some(output) = next {
                self.carry_out(node, output)?;
                continue;
            }
            let Some(output) = p.core.poll_output() else { break };
            self.carry_out_core(node, output)?;
        }
        self.tell(node);
        let (t, machine) = (self.t, self.machine(node));
        let Some(p) = &machine.process else { return Ok(()) };
        let mut deadline = p.core.next_deadline().min(p.pulse.lock().expect("no panic").next_deadline());
        if let Some(warm) = &p.warm {
            deadline = deadline.min(warm.next_deadline());
        }
        let at = machine.when(deadline, t + NO_SPIN);
        if machine.wake_at.is_none_or(|w| at != w) {
            machine.wake_at = Some(at);
            self.post(at, Event::Wake { node });
        }
        Ok(())
    }

    /// Notes in the transcript what changed about a node.
    fn tell(&mut self, node: u64) {
        if !self.verbose {
            return;
        }
        let machine = self.machine(node);
        let Some(p) = &mut machine.process else { return };
        let seen =
            (p.core.is_leader(), p.core.term(), p.core.voters().map(|v| v.to_string()).collect::<Vec<_>>());
        let before = std::mem::replace(&mut p.told, seen.clone());
        if before == seen {
            return;
        }
        let (leads, term, voters) = seen;
        self.say(node, || {
            let role = if leads { "leads" } else { "follows" };
            format!("{role} in term {term}, voters {}", voters.join(" "))
        });
    }
}

/// A document with so many groups; its history tells which change it came from.
pub fn document(groups: u32, change: u64) -> Document {
    let group = |i: u32| Group {
        name: format!("g{i}"),
        vips: vec![
            std::net::IpAddr::from([10, 1, i as u8, 1]),
            std::net::IpAddr::from([10, 2 + i as u8, (change >> 8) as u8, change as u8]),
        ],
        inside_vips: Vec::new(),
        snat: Vec::new(),
        prefer: None,
        preempt: false,
    };
    Document { groups: (0..groups).map(group).collect(), services: Vec::new() }
}
