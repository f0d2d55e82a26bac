//! The beat thread: beats, leases, and the datagrams that votes travel in.
//!
//! It waits for its socket, a wake-up and its next deadline, and for nothing else: no disk, no task, no lock that is held
//! across either. All it does under the lock of [`Pulse`] takes microseconds.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::Sender;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use prost_raft::Message as _;
use raft::eraftpb::Message;

use super::driver::Event;
use super::guard::{AbortOnPanic, be_prompt};
use super::{SecondPath, clock};
use crate::api::{LeaseUpdate, SharedDataPath};
use crate::pulse::{Beat, Output, Pulse, Resign, Will};
use crate::seal::{Kind, ReplayGuard, Sealer};
use crate::will::{Letter, SAY_AGAIN_AFTER_MS, WillMemory};
use komainu_proto::domain::NodeId;

/// Longest datagram that is read; a beat is 1200 bytes, a vote far less.
const MAX_DATAGRAM: usize = 2048;
/// Datagrams read before deadlines are looked at again: a flood must not delay a beat.
const MAX_BATCH: usize = 64;

/// Where a datagram came from that came by the second way: no address of the cluster network.
const NOWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

/// Wakes the beat thread. Cheap, never blocks.
#[derive(Clone, Debug)]
pub(super) struct Waker(Arc<EventFd>);

impl Waker {
    pub(super) fn new() -> io::Result<Waker> {
        use nix::sys::eventfd::EfdFlags;
        Ok(Waker(Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)))
    }

    pub(super) fn wake(&self) {
        // It only fails when the counter is full: then the thread is to be woken anyway.
        let _ = self.0.write(1);
    }
}

/// What the beat thread works with.
pub(super) struct BeatThread {
    pub(super) node: NodeId,
    pub(super) socket: UdpSocket,
    pub(super) waker: Waker,
    pub(super) pulse: Arc<Mutex<Pulse>>,
    pub(super) sealer: Arc<Sealer>,
    pub(super) data_path: Option<SharedDataPath>,
    /// To the Raft thread. Bounded: what does not fit is a vote or heartbeat, which may be lost.
    pub(super) events: Sender<Event>,
    /// Tells the Raft thread that there is something to decide, also when `events` is full.
    pub(super) prompted: Arc<AtomicBool>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) notes: Arc<Mutex<Vec<String>>>,
    /// In a pair: the service network.
    pub(super) second_path: Option<Arc<dyn SecondPath>>,
    /// Where the will is put, and what seals it: most of that is never sent, so its counters are of no use to a guard.
    pub(super) will: Option<(Arc<WillMemory>, Sealer)>,
}

impl BeatThread {
    /// Runs until told to stop; then the lane has no lease any more.
    pub(super) fn run(self) {
        let _guard = AbortOnPanic("beat");
        let notes = be_prompt();
        for note in &notes {
            tracing::warn!("{note}");
        }
        super::lock(&self.notes).extend(notes);
        let mut guards = [ReplayGuard::default(), ReplayGuard::default()];
        let mut buffer = [0; MAX_DATAGRAM];
        while !self.stop.load(Ordering::Acquire) {
            let deadline = self.round(&mut guards, &mut buffer);
            let wait = deadline.since(clock::at());
            let second = self.second_path.as_ref().map_or(self.waker.0.as_fd(), |path| path.fd());
            let mut fds = [
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.waker.0.as_fd(), PollFlags::POLLIN),
                PollFd::new(second, PollFlags::POLLIN),
            ];
            // Interrupted by a signal or woken for nothing: the next round finds out what there is to do.
            if ppoll(&mut fds, Some(TimeSpec::from_duration(wait)), None).is_ok_and(|n| n > 0) {
                let _ = self.waker.0.read();
            }
        }
        self.fall_silent();
        self.say_good_bye();
    }

    /// Takes in what has arrived and does what is due. Answers when to look again.
    fn round(&self, guards: &mut [ReplayGuard; 2], buffer: &mut [u8]) -> crate::time::Instant {
        for _ in 0..MAX_BATCH {
            match self.socket.recv_from(buffer) {
                Ok((len, source)) => _ = self.datagram(guards, source, &buffer[..len]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // An ICMP error about an earlier datagram: the peer is not there. Its silence says the same.
                Err(_) => {}
            }
        }
        if let Some(path) = &self.second_path {
            for _ in 0..MAX_BATCH {
                let Some((len, station)) = path.receive(buffer) else { break };
                if self.datagram(guards, NOWHERE, &buffer[..len]) {
                    path.heard(station);
                }
            }
        }
        let mut pulse = super::lock(&self.pulse);
        let now = clock::at();
        if let Some(data_path) = &self.data_path {
            pulse.set_installed(data_path.installed_index(), now);
            pulse.set_followers(data_path.followers());
            pulse.set_told(data_path.told());
        }
        pulse.handle_timeout(now);
        while let Some(output) = pulse.poll_output() {
            self.carry_out(output);
        }
        pulse.next_deadline()
    }

    /// Takes a datagram in. Answers whether a node of this cluster has sealed it for this one, also when it came before.
    fn datagram(&self, guards: &mut [ReplayGuard; 2], source: SocketAddr, sealed: &[u8]) -> bool {
        let Ok(kind @ (Kind::Beat | Kind::Vote | Kind::Resign)) = self.sealer.peek(sealed) else {
            return false;
        };
        let Ok(opened) = self.sealer.open(kind, &context(self.node), sealed) else { return false };
        if kind == Kind::Resign {
            // True for ever: played back it says nothing new.
            if let Some(resign) = Resign::decode(&opened.plain)
                && super::lock(&self.pulse).handle_resign(resign, clock::at())
            {
                let _ = self.events.try_send(Event::Died(resign.from.node()));
            }
            return true;
        }
        let guard = &mut guards[usize::from(kind == Kind::Vote)];
        if guard.accept(&opened).is_err() {
            return true;
        }
        if kind == Kind::Beat {
            match Beat::decode(&opened.plain) {
                // What is not taken in is counted by `Pulse`.
                Ok(beat) => _ = super::lock(&self.pulse).handle_beat(source, beat, clock::at()),
                Err(e) => tracing::debug!(%source, "a sealed beat that is none: {e}"),
            }
        } else if let Ok(message) = Message::decode(opened.plain.as_slice()) {
            let _ = self.events.try_send(Event::Message(Box::new(message)));
        }
        true
    }

    fn carry_out(&self, output: Output) {
        match output {
            Output::Lease { group, lease } => {
                if let Some(data_path) = &self.data_path {
                    data_path.set_lease(group, lease);
                }
            }
            Output::Announce { group } => {
                if let Some(data_path) = &self.data_path {
                    data_path.announce(group);
                }
            }
            Output::Send { to, address, beat } => {
                let (bytes, _) = beat.encode();
                let sealed = self.sealer.seal(Kind::Beat, &context(to), &bytes);
                // A beat that can't be sent now is worth nothing later.
                let _ = self.socket.send_to(&sealed, address);
                if let Some(path) = &self.second_path {
                    path.send(&sealed);
                }
            }
            Output::Will(will) => self.put_will(&will),
            Output::Prompt => {
                self.prompted.store(true, Ordering::Release);
                let _ = self.events.try_send(Event::Prompt);
            }
        }
    }

    fn put_will(&self, will: &Will) {
        let Some((memory, sealer)) = &self.will else { return };
        let plain = will.resign.encode();
        let letter = |&(node, to): &(NodeId, SocketAddr)| Letter {
            to,
            sealed: sealer.seal(Kind::Resign, &context(node), &plain),
        };
        let letters: Vec<Letter> = will.to.iter().map(letter).collect();
        if !memory.put(&letters) {
            tracing::error!("the will does not fit its place: the death of this process would not be told");
        }
    }

    /// No lease outlives the thread that renews it.
    fn fall_silent(&self) {
        let Some(data_path) = &self.data_path else { return };
        let leases: Vec<_> = super::lock(&self.pulse).leases().collect();
        for (group, lease) in leases {
            data_path.set_lease(group, LeaseUpdate { epoch: lease.epoch, ..LeaseUpdate::default() });
        }
    }

    /// Tells the others that this process renews and grants nothing any more, as its executor would had it been killed. They would find
    /// out by its silence; until then half of a pair does not know that it is alone, and its lease may run out before it does.
    ///
    /// True from here on: the Raft thread has ended, nothing answers in this process's name (`fall_silent`), and no beat leaves any more.
    fn say_good_bye(&self) {
        let Some(will) = super::lock(&self.pulse).will().cloned() else { return };
        let plain = will.resign.encode();
        for pause in std::iter::once(0).chain(SAY_AGAIN_AFTER_MS) {
            std::thread::sleep(Duration::from_millis(pause));
            for &(node, to) in &will.to {
                let sealed = self.sealer.seal(Kind::Resign, &context(node), &plain);
                // A network that is down may take the next one.
                let _ = self.socket.send_to(&sealed, to);
                if let Some(path) = &self.second_path {
                    path.send(&sealed);
                }
            }
        }
    }
}

/// What a datagram's seal says beside its kind: for whom it is.
pub(super) fn context(to: NodeId) -> [u8; 8] {
    to.0.to_be_bytes()
}
