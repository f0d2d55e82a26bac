//! The machines, the network between them, and time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::SocketAddr;

use komainu_proto::domain::{Document, Group, GroupId, NodeId, Role};
use raft::eraftpb::{Message, MessageType};

use super::Random;
use super::check::Checker;
use super::machine::{Machine, Process, Time, address};
use super::pairs::ServiceNetwork;
use super::warm::{Flows, Sealed, Warm};
use crate::core::{Output, Request, Ticket, Via};
use crate::pulse;
use crate::rules::Rule;
use crate::state::{Change, Command, ProposalId};
use crate::store::Store as _;
use crate::timing::Timing;

/// One millisecond of true time.
pub const MS: Time = 1_000_000;
/// Time between two wake-ups of a node that finds its deadline in the past.
const NO_SPIN: Time = 20_000;
/// When an executor says what it has to say, after it has begun.
const SAID_AT: [Time; 4] = [0, MS, 3 * MS, 7 * MS];
/// Datagrams that wait at a frozen process: what a socket buffer holds of beats.
const BACKLOG: usize = 256;

/// What arrives at a node.
#[derive(Clone, Debug)]
pub enum Arrival {
    /// A beat, as bytes.
    Beat(SocketAddr, Vec<u8>),
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
    generation: u64,
    power: u64,
    will: pulse::Will,
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
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    events: BTreeMap<u64, Event>,
    sequence: u64,
}

/// Changes that were asked for.
#[derive(Default)]
pub struct Clients {
    under_way: BTreeMap<(u64, u64, Ticket), String>,
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
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            sequence: 0,
        }
    }

    /// Starts a node's process.
    pub fn start(&mut self, node: u64) -> Result<(), String> {
        let seed = self.random.draw();
        let t = self.t;
        self.say(node, || "starts".to_owned());
        self.machine(node).start(t, seed);
        if self.flows.is_some() {
            let machine = self.machine(node);
            let (id, generation) = (machine.identity.id, machine.generation);
            let balances = machine.identity.role == Role::Balancer;
            if let Some(p) = machine.process.as_mut().filter(|_| balances) {
                p.warm = Some(Warm::new(id, generation));
            }
        }
        self.drive(node)
    }

    /// Ends a node's process at once. What was on its way to disk is lost, or not, from some point on.
    pub fn kill(&mut self, node: u64) {
        let t = self.t;
        let Some(process) = self.machine(node).process.take() else { return };
        self.say(node, || "is killed".to_owned());
        let reached = self.random.below(process.writing.len() as u64 + 1) as usize;
        let machine = self.machine(node);
        for (write, _) in process.writing.into_iter().take(reached) {
            machine.disk.write(&write).expect("memory can be written");
        }
        machine.disk.restart();
        machine.paused_until = t;
        machine.go_on(t);
        machine.backlog.clear();
        self.clients.under_way.retain(|(n, _, _), _| *n != node);
    }

    /// As [`World::kill`], and the machine's executor acts `after` that time.
    pub fn kill_and_tell(&mut self, node: u64, after: Time) {
        let machine = self.machine(node);
        let (generation, power, will) = (machine.generation, machine.power, machine.will.take());
        self.kill(node);
        if let Some(will) = will {
            let dead = Dead { generation, power, will };
            self.post(self.t + after, Event::Execute { node, dead, turn: 0 });
        }
    }

    fn execute(&mut self, node: u64, dead: Dead, turn: usize) {
        let t = self.t;
        let machine = self.machine(node);
        if machine.power != dead.power {
            return;
        }
        if machine.halted_since.is_some() {
            self.post(t + MS, Event::Execute { node, dead, turn });
            return;
        }
        if turn == 0 {
            // What a later process has in its lane is not the dead one's.
            if machine.generation == dead.generation && !Rule::SilenceFirst.is_broken() {
                machine.lane.values_mut().for_each(|lease| lease.answer_until = Default::default());
            }
            self.say(node, || "answers no more; its executor says that its process has ended".to_owned());
        }
        let bytes = dead.will.resign.encode();
        for (to, _) in &dead.will.to {
            self.datagram(node, to.0, Arrival::Resign(bytes.clone()));
        }
        if let Some(next) = SAID_AT.get(turn + 1) {
            let at = t + next - SAID_AT[turn];
            self.post(at, Event::Execute { node, dead, turn: turn + 1 });
        }
    }

    /// Cuts the power: the process is gone, the lane is dark, what was not synced is lost, the clock starts again.
    pub fn power_off(&mut self, node: u64) {
        self.kill(node);
        let (t, offset) = (self.t, self.random.below(5_000 * MS));
        let machine = self.machine(node);
        machine.power += 1;
        machine.disk.lose_unsynced();
        machine.lane.clear();
        machine.flows = Default::default();
        machine.booted_at = t;
        machine.boot_offset = offset;
    }

    /// Freezes a node's process for a while. Its clock and its lane go on.
    pub fn pause(&mut self, node: u64, lasts: Time) {
        let until = self.t + lasts;
        self.say(node, || format!("is frozen for {} ms", lasts / MS));
        let machine = self.machine(node);
        machine.paused_until = machine.paused_until.max(until);
        self.post(until, Event::Resume { node });
    }

    /// Halts a whole machine for a while, its clock and its lane with it.
    pub fn suspend(&mut self, node: u64, lasts: Time) {
        let (t, until) = (self.t, self.t + lasts);
        self.say(node, || format!("is halted for {} ms", lasts / MS));
        let machine = self.machine(node);
        machine.halted_since.get_or_insert(t);
        machine.paused_until = machine.paused_until.max(until);
        self.post(until, Event::Resume { node });
    }

    /// Makes a node's disk slow for a while.
    pub fn slow_disk(&mut self, node: u64, fsync: Time, lasts: Time) {
        self.machine(node).slow_fsync = Some(fsync);
        self.post(self.t + lasts, Event::DiskWell { node });
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

    /// Lets a frozen process or a halted machine go on.
    ///
    /// # Errors
    /// An invariant is broken.
    pub fn thaw(&mut self, node: u64) -> Result<(), String> {
        let t = self.t;
        let machine = self.machine(node);
        if machine.paused_until > t {
            machine.paused_until = t;
            self.handle(Event::Resume { node })?;
        }
        Ok(())
    }

    /// Runs until true time `until`, or until `done` says so after an event.
    ///
    /// # Errors
    /// An invariant is broken.
    pub fn run_until(&mut self, until: Time, mut done: impl FnMut(&World) -> bool) -> Result<bool, String> {
        while let Some(&Reverse((at, sequence))) = self.queue.peek() {
            if at > until {
                break;
            }
            self.queue.pop();
            let Some(event) = self.events.remove(&sequence) else { continue };
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
        self.events.insert(self.sequence, event);
        self.queue.push(Reverse((at.max(self.t), self.sequence)));
    }

    fn handle(&mut self, event: Event) -> Result<(), String> {
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

    fn carry_out(&mut self, node: u64, output: pulse::Output) -> Result<(), String> {
        let t = self.t;
        match output {
            pulse::Output::Lease { group, lease } => {
                let machine = self.machine(node);
                let before = machine.answers(group, t);
                machine.lane.insert(group, lease);
                let after = machine.answers(group, t);
                if before.is_none() && after.is_some() {
                    self.takes_over(node, group)?;
                }
                if before != after {
                    match after {
                        Some(epoch) => {
                            self.say(node, || format!("answers for group {} under epoch {epoch}", group.0))
                        }
                        None => self.say(node, || format!("answers no more for group {}", group.0)),
                    }
                }
                self.check_leases()
            }
            pulse::Output::Announce { group } => {
                let machine = self.machine(node);
                if machine.answers(group, t).is_none() {
                    return Err(format!("node {node} announces group {} without a lease", group.0));
                }
                let assigned = machine
                    .process
                    .as_ref()
                    .and_then(|p| p.core.state().group(group))
                    .map(|g| g.assigned_index);
                if assigned.is_none_or(|index| machine.installed < index) {
                    return Err(format!(
                        "node {node} announces group {} before its tables are installed",
                        group.0
                    ));
                }
                self.say(node, || format!("announces group {}", group.0));
                self.announced.insert(group, node);
                Ok(())
            }
            pulse::Output::Send { to, beat, .. } => {
                let (bytes, _) = beat.encode();
                self.datagram(node, to.0, Arrival::Beat(address(node), bytes));
                Ok(())
            }
            pulse::Output::Will(will) => {
                self.machine(node).will = Some(*will);
                Ok(())
            }
            pulse::Output::Prompt => {
                let machine = self.machine(node);
                let now = machine.now(t);
                if let Some(p) = &mut machine.process {
                    p.core.handle_timeout(now);
                }
                Ok(())
            }
        }
    }

    fn carry_out_core(&mut self, node: u64, output: Output) -> Result<(), String> {
        let t = self.t;
        match output {
            Output::Send { to, via: Via::Datagram, message, .. } => {
                self.datagram(node, to.0, Arrival::Raft(Box::new(message)));
                Ok(())
            }
            Output::Send { to, via: via @ (Via::Stream | Via::Both), message, .. } => {
                if via == Via::Both {
                    self.datagram(node, to.0, Arrival::Raft(Box::new(message.clone())));
                }
                self.stream(node, to.0, message);
                Ok(())
            }
            Output::Persist(write) => {
                let w = self.weather;
                let lasts = if self.random.ppm(w.slow_ppm) { w.slow } else { w.fsync };
                let lasts = self.random.between(lasts / 10, lasts);
                let machine = self.machine(node);
                let lasts = machine.slow_fsync.unwrap_or(lasts);
                let generation = machine.generation;
                let number = write.number;
                let (disk_full, now) = (machine.disk_full, machine.now(t));
                let Some(p) = &mut machine.process else { return Ok(()) };
                if disk_full {
                    p.core.handle_store_failed(now);
                    return Ok(());
                }
                // One thread writes: a write begins when the one before is done.
                let at = p.writing.back().map_or(t, |(_, done)| *done).max(t) + lasts;
                p.writing.push_back((write, at));
                self.post(at, Event::Written { node, generation, number });
                Ok(())
            }
            Output::Done { ticket, result } => {
                let generation = self.machine(node).generation;
                if let Some(who) = self.clients.under_way.remove(&(node, generation, ticket)) {
                    self.say(node, || match &result {
                        Ok(o) => {
                            format!("acknowledges {who} at index {} as revision {}", o.index, o.revision)
                        }
                        Err(e) => format!("answers {who}: {e}"),
                    });
                    if let Ok(outcome) = result {
                        self.checker.acknowledge(outcome.revision, who);
                    }
                }
                Ok(())
            }
            Output::Sound { on } => {
                self.sound(node, on);
                Ok(())
            }
            Output::Aside(aside) => {
                let who = aside.changes.iter().map(|r| r.who.clone()).collect();
                self.write_aside(node, who);
                Ok(())
            }
            Output::State => {
                let lasts = self.random.between(MS / 10, 4 * MS);
                let machine = self.machine(node);
                let (id, generation) = (machine.identity.id, machine.generation);
                let Some(p) = &mut machine.process else { return Ok(()) };
                let (cluster, state) = (p.core.cluster(), p.core.state().clone());
                let index = state.index;
                let told = std::mem::replace(&mut p.applied, index);
                machine.solo = state.solo.is_some();
                if index > p.planned && machine.identity.role == Role::Balancer {
                    p.planned = index;
                    self.post(t + lasts, Event::Installed { node, generation, index });
                }
                if self.verbose {
                    let news: Vec<_> = state.events.iter().filter(|e| e.index > told).cloned().collect();
                    for e in news {
                        self.say(node, || format!("applies {}: {} {}", e.index, e.subject, e.text));
                    }
                }
                self.checker.state(id, cluster, &state)?;
                let machine = &self.machines[&node];
                let Some(p) = &machine.process else { return Ok(()) };
                self.checker.voters(id, &p.core, machine.now(t).at, machine.timing.longest_lease())
            }
        }
    }

    fn datagram(&mut self, from: u64, to: u64, arrival: Arrival) {
        let w = self.weather;
        if let Arrival::Raft(message) = &arrival
            && let Some(at) = self.lose.iter().position(|kind| *kind == message.get_msg_type())
        {
            self.say(from, || format!("sends {:?} to n{to}, which is lost", message.get_msg_type()));
            self.lose.remove(at);
            return;
        }
        self.by_service_network(from, to, &arrival);
        if !self.machines.contains_key(&to) || self.cut.contains(&(from, to)) || self.random.ppm(w.loss_ppm) {
            return;
        }
        let copies = if self.random.ppm(w.twice_ppm) { 2 } else { 1 };
        for _ in 0..copies {
            let at = self.t + self.delay();
            self.post(at, Event::Arrive { to, arrival: arrival.clone() });
        }
    }

    fn stream(&mut self, from: u64, to: u64, message: Message) {
        let reachable = self.machines.get(&to).is_some_and(|m| m.process.is_some());
        let at = self.t + self.delay();
        if !reachable || self.cut.contains(&(from, to)) || self.cut.contains(&(to, from)) {
            self.post(at + 5 * MS, Event::Arrive { to: from, arrival: Arrival::Unreachable(NodeId(to)) });
            return;
        }
        self.post(at, Event::Arrive { to, arrival: Arrival::Raft(Box::new(message)) });
    }

    pub(super) fn delay(&mut self) -> Time {
        let w = self.weather;
        let longest = if self.random.ppm(w.late_ppm) { w.late } else { w.delay };
        self.random.between(longest / 5, longest)
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
