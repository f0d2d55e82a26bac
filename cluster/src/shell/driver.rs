//! The Raft thread: the only one that touches [`Core`] and the store. It may wait for the disk.

use std::collections::HashMap;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};
use komainu_proto::domain::NodeId;
use prost_raft::Message as _;
use raft::eraftpb::Message;
use tokio::sync::{oneshot, watch};

use super::beat::{Waker, context};
use super::facts::Facts;
use super::guard::{AbortOnPanic, be_quick};
use super::streams::Streams;
use super::view::View;
use super::{PairSettings, clock};
use crate::api::{Observation, SelfHealth};
use crate::core::{Core, Failure, Output, Request, Ticket, Via};
use crate::pair::Sounding;
use crate::pulse::Pulse;
use crate::seal::{Kind, Sealer};
use crate::state::Outcome;
use crate::store::Store;

/// Events waiting for the Raft thread. While it waits for a slow disk, this many messages can pile up; a leader repeats
/// what is lost.
pub(super) const MAX_EVENTS: usize = 4096;
/// Events taken in before outputs are carried out: what arrives together is written together.
const MAX_BATCH: usize = 64;
/// The longest sleep, so that the view shows who went silent.
const MAX_SLEEP: Duration = Duration::from_millis(250);
/// How long an orderly stop waits for others to take over.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Something for the Raft thread.
pub(super) enum Event {
    /// A Raft message.
    Message(Box<Message>),
    /// A request of this node's own core.
    Request(Request, oneshot::Sender<Result<Outcome, Failure>>),
    /// What this node's checks see.
    Observe(Vec<Observation>),
    /// This node's fitness.
    SelfHealth(SelfHealth),
    /// A stream to a node broke.
    Unreachable(NodeId),
    /// An operator has this node go on alone.
    Force(String, oneshot::Sender<Result<Outcome, Failure>>),
    /// What was found out about the service network.
    Sounded(Sounding),
    /// Another node's process has ended.
    Died(NodeId),
    /// The beat thread has seen something to decide on.
    Prompt,
    /// Hand over, then end.
    Stop,
}

/// What the Raft thread works with.
pub(super) struct Driver {
    pub(super) core: Core,
    pub(super) store: Box<dyn Store>,
    pub(super) events: Receiver<Event>,
    pub(super) prompted: Arc<AtomicBool>,
    pub(super) waker: Waker,
    pub(super) socket: UdpSocket,
    pub(super) sealer: Arc<Sealer>,
    pub(super) streams: Streams,
    pub(super) view: watch::Sender<Arc<View>>,
    pub(super) facts: Facts,
    pub(super) notes: Arc<Mutex<Vec<String>>>,
    /// Notices that were logged and still hold.
    pub(super) said: Vec<String>,
    /// Of a pair.
    pub(super) pair: PairSettings,
    /// Whether the service network is to be sounded.
    pub(super) sound: watch::Sender<bool>,
    /// Requests that wait for their end.
    pub(super) waiting: HashMap<Ticket, oneshot::Sender<Result<Outcome, Failure>>>,
}

impl Driver {
    /// Runs until it has stopped in order.
    pub(super) fn run(mut self) {
        let _guard = AbortOnPanic("raft");
        be_quick();
        let mut stop_at = None;
        loop {
            self.carry_out();
            self.waker.wake();
            self.publish();
            crate::raft::logger::flush();
            if let Some(at) = stop_at
                && (self.core.has_resigned() || clock::at() >= at)
            {
                break;
            }
            let wait = self.core.next_deadline().since(clock::at()).min(MAX_SLEEP);
            match self.events.recv_timeout(wait) {
                Ok(event) => {
                    for event in std::iter::once(event).chain(self.events.clone().try_iter().take(MAX_BATCH))
                    {
                        if let Event::Stop = event {
                            stop_at.get_or_insert(clock::at().after(STOP_TIMEOUT));
                            super::lock(&self.core.pulse()).set_resigning(true);
                        }
                        self.take_in(event);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let now = clock::now();
            if self.prompted.swap(false, Ordering::AcqRel)
                || now.at >= self.core.next_deadline()
                || stop_at.is_some()
            {
                self.core.handle_timeout(now);
            }
        }
        for (_, answer) in self.waiting.drain() {
            let _ = answer.send(Err(Failure::Lost));
        }
    }

    fn take_in(&mut self, event: Event) {
        let now = clock::now();
        match event {
            Event::Message(message) => self.core.handle_message(*message, now),
            Event::Request(request, answer) => {
                let ticket = self.core.request(request, now);
                self.waiting.insert(ticket, answer);
            }
            Event::Unreachable(node) => self.core.handle_unreachable(node, now),
            Event::Observe(observations) => observe(&self.core.pulse(), observations),
            Event::SelfHealth(health) => super::lock(&self.core.pulse()).set_self_health(health),
            Event::Force(who, answer) => {
                let result = self.core.force(&who, now);
                // Answered when it is on disk.
                self.carry_out();
                let _ = answer.send(result);
            }
            Event::Sounded(sounding) => self.core.handle_sounding(sounding, now),
            Event::Died(node) => {
                tracing::warn!(
                    node = node.0,
                    "its process has ended, and that was told: nobody waits for it"
                );
            }
            Event::Prompt | Event::Stop => {}
        }
    }

    fn carry_out(&mut self) {
        while let Some(output) = self.core.poll_output() {
            match output {
                Output::Send { to, address, via, message } => {
                    if matches!(via, Via::Datagram | Via::Both) {
                        let sealed = self.sealer.seal(Kind::Vote, &context(to), &message.encode_to_vec());
                        // Lost like any datagram; its sender repeats it or goes on without.
                        let _ = self.socket.send_to(&sealed, address);
                        if let Some(path) = &self.pair.second_path {
                            path.send(&sealed);
                        }
                    }
                    if matches!(via, Via::Stream | Via::Both) && !self.streams.send(to, address, message) {
                        self.core.handle_unreachable(to, clock::now());
                    }
                }
                Output::Persist(write) => match self.store.write(&write) {
                    Ok(()) => self.core.handle_persisted(write.number, clock::now()),
                    Err(e) => self.store_failed(&e),
                },
                Output::Done { ticket, result } => {
                    if let Some(answer) = self.waiting.remove(&ticket) {
                        // Whoever asked may have given up.
                        let _ = answer.send(result);
                    }
                }
                Output::State => self.streams.keep(&self.core.others()),
                Output::Sound { on } => _ = self.sound.send_replace(on),
                Output::Aside(aside) => {
                    let kept = (self.pair.keep)(&aside);
                    self.core.handle_aside(kept, clock::now());
                }
            }
        }
    }

    /// What could not be written is never reported as persisted: no vote and no acknowledgement that rests on it leaves.
    fn store_failed(&mut self, error: &crate::store::StoreError) {
        self.core.handle_store_failed(clock::now());
        let mut notes = super::lock(&self.notes);
        if matches!(error, crate::store::StoreError::Broken(_)) {
            return;
        }
        let note = format!("this node neither votes nor acknowledges any more: {error}");
        tracing::error!("{note}");
        notes.push(note);
    }

    /// Publishes the view when something in it, but for durations, has changed.
    fn publish(&mut self) {
        let view = self.facts.view(&self.core);
        self.say_notices();
        self.view.send_if_modified(|old| {
            if view.same_but_for_time(old) {
                return false;
            }
            *old = Arc::new(view);
            true
        });
    }
}

impl Driver {
    /// Logs what has come up since the last time.
    fn say_notices(&mut self) {
        let notices = super::lock(&self.core.pulse()).notices();
        for notice in notices.iter().filter(|n| !self.said.contains(n)) {
            tracing::warn!("{notice}");
        }
        self.said = notices;
    }
}

/// Passes on what this node's checks see.
pub(super) fn observe(pulse: &Mutex<Pulse>, observations: Vec<Observation>) {
    let mut pulse = super::lock(pulse);
    for observation in observations {
        pulse.set_observation(observation);
    }
}
