//! What nodes want done: leases in lanes, writes to disk, messages through a network that loses, delays and repeats them.

use std::sync::Arc;
use std::time::Duration;

use komainu_proto::domain::{NodeId, Role};
use raft::eraftpb::Message;

use super::machine::{Time, address};
use super::world::{Arrival, Event, MS, World};
use crate::core::{Output, Via};
use crate::pulse;

impl World {
    /// What the beat thread wants done.
    pub(super) fn carry_out(&mut self, node: u64, output: pulse::Output) -> Result<(), String> {
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
                let source = address(node);
                let arrival = match self.beats_as_bytes {
                    true => Arrival::Beat(source, beat.encode().0),
                    false => Arrival::ReadBeat(source, Arc::new(as_read(*beat))),
                };
                self.datagram(node, to.0, arrival);
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

    /// What the Raft thread wants done.
    pub(super) fn carry_out_core(&mut self, node: u64, output: Output) -> Result<(), String> {
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

    pub(super) fn datagram(&mut self, from: u64, to: u64, arrival: Arrival) {
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

    /// What the network takes for something.
    pub(super) fn delay(&mut self) -> Time {
        let w = self.weather;
        let longest = if self.random.ppm(w.late_ppm) { w.late } else { w.delay };
        self.random.between(longest / 5, longest)
    }
}

/// A beat as it is after it was written as bytes and read again, which takes longer.
fn as_read(mut beat: pulse::Beat) -> pulse::Beat {
    for (_, left) in &mut beat.held {
        *left = Duration::from_millis(left.as_millis() as u64);
    }
    beat
}
