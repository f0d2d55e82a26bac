//! What becomes of processes and machines: they start, are killed, lose power, stand still, and have executors.

use komainu_proto::domain::Role;

use super::machine::Time;
use super::warm::Warm;
use super::world::{Arrival, Dead, Event, MS, World};
use crate::rules::Rule;
use crate::store::Store as _;

/// When an executor says what it has to say, after it has begun.
const SAID_AT: [Time; 4] = [0, MS, 3 * MS, 7 * MS];

impl World {
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

    pub(super) fn execute(&mut self, node: u64, dead: Dead, turn: usize) {
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
}
