//! Flows that were taken over from another node or made by a program, and what is told to other nodes of one's own.

use std::time::Duration;

use crate::plan::Protocol;
use crate::time::BootTime;

use super::{Flow, FlowId, FlowTable, Inserted, NewFlow, Progress, State, TableFull, Touched, VERSIONS};

impl FlowTable {
    /// Notes the version of a flow that a program has just made.
    ///
    /// # Panics
    /// The flow has been removed.
    pub fn set_version(&mut self, id: FlowId, version: u8) {
        self.entries.get_mut(id.0).version = version % VERSIONS;
    }

    /// Follows a change of a flow's state that a program has made because of a segment that came at `at`; what it did. `None`: what is
    /// known is as new, or there is no such state.
    ///
    /// # Panics
    /// The flow has been removed.
    pub fn follow(
        &mut self,
        id: FlowId,
        bits: u8,
        version: u8,
        idle: Duration,
        at: BootTime,
    ) -> Option<Touched> {
        let flow = self.entries.get(id.0);
        let ahead = version.wrapping_sub(flow.version) % VERSIONS;
        if ahead == 0 || ahead >= VERSIONS / 2 {
            return None;
        }
        let protocol = if flow.progress.state == State::Udp { Protocol::Udp } else { Protocol::Tcp };
        let after = Progress::from_bits(bits, true, protocol)?;
        Some(self.change(id, after, ahead, idle, at))
    }

    /// Remembers a flow whose names are both new as another node remembers it: in the state that `bits` stand for
    /// ([`Flow::progress_bits`]), under the `mark` of the sending that it came with. `None`: there is no such state.
    ///
    /// # Errors
    /// The table is full and every flow in it is assured.
    pub fn adopt(
        &mut self,
        new: NewFlow,
        protocol: Protocol,
        bits: u8,
        mark: u32,
        now: BootTime,
    ) -> Result<Option<Inserted>, TableFull> {
        let Some(progress) = Progress::from_bits(bits, new.backend_side.is_some(), protocol) else {
            return Ok(None);
        };
        let idle = new.idle;
        let inserted = self.insert(new, now)?;
        let entry = inserted.id.0;
        if progress.assured {
            // No flow is assured by its first packet alone.
            self.unlink_unassured(entry);
        }
        let flow = self.entries.get_mut(entry);
        flow.progress = progress;
        flow.mark = mark;
        flow.told = progress.state != State::Closed;
        flow.set_idle(idle);
        let deadline_ns = flow.deadline_ns();
        self.wheel.unlink(&mut self.entries, entry);
        self.wheel.schedule(&mut self.entries, entry, deadline_ns);
        Ok(Some(inserted))
    }

    /// Notes the sending that a flow came with once more.
    ///
    /// # Panics
    /// The flow has been removed.
    pub fn set_mark(&mut self, id: FlowId, mark: u32) {
        self.entries.get_mut(id.0).mark = mark;
    }

    /// Notes whether others are told of a flow.
    ///
    /// # Panics
    /// The flow has been removed.
    pub fn set_told(&mut self, id: FlowId, told: bool) {
        self.entries.get_mut(id.0).told = told;
    }

    /// The flows at places `from..to`, for whoever walks through the table in pieces. A flow stays at its place.
    pub fn at(&self, from: usize, to: usize) -> impl Iterator<Item = (FlowId, &Flow)> {
        let to = to.min(self.entries.slots.len());
        let places = self.entries.slots[from.min(to)..to].iter().zip(from..);
        places.filter_map(|(flow, place)| Some((FlowId(place as u32), flow.as_ref()?)))
    }

    /// Places in use so far.
    pub fn places(&self) -> usize {
        self.entries.slots.len()
    }
}

impl Flow {
    /// Whether a flow of another node says the same as this one does.
    pub(crate) fn is_like(&self, new: &NewFlow, bits: u8) -> bool {
        self.goes_like(new) && self.progress.to_bits() == bits
    }

    /// Whether a flow of another node goes where this one does.
    pub(crate) fn goes_like(&self, new: &NewFlow) -> bool {
        self.backend == new.backend && self.backend_side() == new.backend_side
    }
}
