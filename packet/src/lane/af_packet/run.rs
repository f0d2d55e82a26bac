//! The thread that owns sockets and engine: frames in, verdicts, frames out.
//!
//! A round: commands and what the kernel has told, then for each port at most one batch: take frames from the ring, let the
//! engine rewrite them where they lie, look at the clock and the leases again, send, give the slots back. Rounds follow each
//! other without a pause while there are frames; otherwise the thread sleeps until a frame, a command, news of the kernel or
//! a deadline.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::Receiver;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::announce::Announcements;
use super::batch::{Batch, MAX_BATCH, Sockets};
use super::below::Below;
use super::command::{Command, Shared};
use super::filter::Interest;
use super::hops::Hops;
use super::membership::Memberships;
use super::offload::{self, VNET_HDR_LEN};
use super::park::{Park, Parked};
use super::socket::{PacketSocket, Place};
use super::sys;
use crate::drops::Reason;
use crate::engine::{Engine, FrameMut, Port, PortConfig, Verdict};
use crate::lane::{Counters, LaneError};
use crate::netlink;
use crate::tables::Tables;
use crate::time::BootTime;

/// The thread starts a round at least this often, so that others can tell a sleeping thread from a stuck one.
pub const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// Time between two messages about refused frames.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);
/// Time between two tries to open a socket on an interface that came back.
const REOPEN_EVERY: Duration = Duration::from_secs(1);

const PORTS: [Port; Port::COUNT] = [Port::Service, Port::Inside];

/// Names of the interfaces by port.
pub type Names = [Option<String>; Port::COUNT];

/// The thread's state.
pub struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) commands: Receiver<Command>,
    pub(super) net: netlink::Handle,
    pub(super) engine: Engine,
    pub(super) sockets: Sockets,
    /// A program in the kernel that handles most frames before they reach us.
    pub(super) below: Option<Box<dyn Below>>,
    /// When to try again to have it follow the interfaces.
    pub(super) below_again_at: Option<BootTime>,
    /// Whether it could not follow them last time.
    pub(super) below_failed: bool,
    pub(super) names: Names,
    pub(super) hops: Hops,
    pub(super) ring_slots: usize,
    pub(super) interest: Interest,
    pub(super) park: Park,
    pub(super) batch: Batch,
    pub(super) memberships: Memberships,
    pub(super) announcements: Announcements,
    pub(super) stats: Stats,
    pub(super) complained_at: Option<BootTime>,
    pub(super) reopen_at: Option<BootTime>,
}

/// What the lane counts itself, besides what the engine counts for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Frames longer than a ring slot.
    truncated: u64,
    /// Frames lost by sockets that were closed since, because the ring was full.
    ring_full_before: u64,
    /// Frames sent.
    sent: u64,
}

/// Marks the thread as ended however it ends, also by a panic.
struct AliveGuard(Arc<Shared>);

impl Drop for AliveGuard {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::SeqCst);
    }
}

impl Worker {
    /// Runs until told to stop.
    pub fn run(mut self) {
        let _guard = AliveGuard(Arc::clone(&self.shared));
        if let Err(e) = sys::prefer_this_thread() {
            tracing::debug!(error = %e, "the lane's thread runs at ordinary priority (needs CAP_SYS_NICE)");
        }
        while !self.shared.stop.load(Ordering::SeqCst) {
            let now = BootTime::now();
            self.shared.round_at.store(now.0, Ordering::Relaxed);
            self.attend(now);
            let mut frames = 0;
            for port in PORTS {
                frames += self.receive(port);
            }
            if frames == 0 {
                self.sleep();
            }
        }
    }

    /// Everything that is not a frame that just came in.
    fn attend(&mut self, now: BootTime) {
        self.learn(now);
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command, now);
        }
        self.announcements.take_requests(&self.shared, now);
        if self.net.generation() != self.hops.snapshot().generation
            || self.reopen_at.is_some_and(|t| t <= now)
            || self.below_again_at.is_some_and(|t| t <= now)
        {
            self.follow_kernel(now);
        }
        if !self.park.is_empty() {
            self.attend_park(now);
        }
        self.hops.refresh(now);
        if let Some(below) = &mut self.below
            && below.next_deadline() <= now
        {
            below.attend(&mut self.engine, &self.hops, now);
        }
        for (index, address) in self.hops.take_stale() {
            self.net.use_neighbour(index, address);
        }
        if self.engine.next_deadline().is_some_and(|t| t <= now) {
            self.engine.tick(now);
        }
        self.announce(now);
        self.flush();
    }

    /// Has the engine learn what the program below did with flows.
    fn learn(&mut self, now: BootTime) {
        if let Some(below) = &mut self.below {
            below.learn(&mut self.engine, now);
        }
    }

    /// Adds the announcements that are due to the batch.
    fn announce(&mut self, now: BootTime) {
        while let Some(claim) = self.engine.poll_claim() {
            self.announcements.defend(&claim, now);
        }
        let (engine, batch) = (&self.engine, &mut self.batch);
        self.announcements.due(
            now,
            &self.shared.leases,
            |port| engine.port(port).map(|p| p.mac),
            |port, fence, frame| batch.push_frame(&frame, port, fence),
        );
    }

    fn obey(&mut self, command: Command, now: BootTime) {
        // Whoever asked may have given up waiting: then nobody reads the answer.
        match command {
            Command::Install { tables, interest, routers, answer } => {
                let _ = answer.send(self.install(tables, interest, routers, now));
            }
            Command::Counters(answer) => {
                let _ = answer.send(self.counters(now));
            }
            Command::Flows(filter, limit, answer) => {
                let _ = answer.send(self.engine.flows(&filter, limit, now));
            }
            Command::Trace(service, client, answer) => {
                let _ = answer.send(self.engine.trace(service, client, now));
            }
            Command::Share(share) => share.carry_out(&mut self.engine, now),
        }
    }

    /// Filter for both plans, tables, filter for the new plan: at no moment is a frame lost that either plan wants.
    fn install(
        &mut self,
        tables: Arc<Tables>,
        interest: Interest,
        routers: HashSet<IpAddr>,
        now: BootTime,
    ) -> Result<(), LaneError> {
        let both = self.interest.union(&interest);
        for socket in self.sockets.iter().flatten() {
            socket.set_interest(&both).map_err(|source| LaneError::System {
                doing: format!("interface \"{}\": attach the filter of the new plan", socket.name()),
                source,
            })?;
        }
        let revision = tables.revision();
        let before = Arc::clone(self.engine.tables());
        // What the program did under the plan before names things by numbers that the next one but one may give to others.
        self.learn(now);
        self.engine.swap(tables, now);
        if let Some(below) = &mut self.below {
            let installed = below.install(&self.engine, &self.hops);
            below.learn(&mut self.engine, now);
            if let Err(e) = installed {
                self.engine.swap(before, now);
                return Err(e);
            }
        }
        self.interest = interest;
        for socket in self.sockets.iter().flatten() {
            if let Err(e) = socket.set_interest(&self.interest) {
                // The wider filter stays: more is copied than needed, nothing is lost.
                tracing::warn!(interface = socket.name(), error = %e, "the filter could not be narrowed");
            }
        }
        self.join_groups();
        self.announcements.set_addresses(self.engine.owned(), routers, now);
        self.shared.revision.store(revision, Ordering::SeqCst);
        Ok(())
    }

    fn join_groups(&mut self) {
        let owned = self.engine.owned();
        let ports = &self.hops;
        let wanted = owned.iter().flat_map(|o| {
            PORTS
                .into_iter()
                .filter(move |p| o.port.is_none_or(|only| only == *p))
                .filter_map(move |p| Some((ports.index(p)?, o.address)))
        });
        self.memberships.set(wanted.collect::<Vec<_>>());
    }

    /// Takes over a new picture of the kernel's tables.
    fn follow_kernel(&mut self, now: BootTime) {
        let snapshot = self.net.snapshot();
        let mut indices = [None; Port::COUNT];
        let mut troubles = Vec::new();
        let mut moved = false;
        self.reopen_at = None;
        self.below_again_at = None;
        let mut changed = false;
        for port in PORTS {
            let p = port as usize;
            let Some(name) = &self.names[p] else { continue };
            let link = snapshot.link(name);
            let open = self.sockets[p].as_ref().map(PacketSocket::index);
            if open != link.map(|l| l.index) {
                moved = true;
                if let Some(mut gone) = self.sockets[p].take() {
                    self.stats.ring_full_before += gone.ring_full();
                }
            }
            let Some(link) = link else {
                changed |= open.is_some();
                troubles.push(format!("interface \"{name}\" is gone"));
                continue;
            };
            if self.sockets[p].is_none() {
                let listen = self.below.as_ref().and_then(|b| b.comes_up_by(port)).unwrap_or(link.index);
                let place = Place { name, index: link.index, listen };
                match open_socket(&place, self.ring_slots, &self.interest) {
                    Ok(socket) => self.sockets[p] = Some(socket),
                    Err(e) => {
                        troubles.push(e.to_string());
                        self.reopen_at = Some(now.after(REOPEN_EVERY));
                    }
                }
            }
            indices[p] = Some(link.index);
            let config = port_config(link, &snapshot);
            if self.engine.port(port) != Some(&config) {
                self.engine.set_port(port, config);
                changed = true;
            }
        }
        self.hops.update(snapshot, indices);
        if let Some(below) = &mut self.below {
            if changed || moved || self.below_failed {
                let ports = PORTS.map(|p| indices[p as usize].and(self.engine.port(p)));
                let followed = below.follow(ports);
                self.below_failed = followed.is_err();
                if let Err(reason) = followed {
                    troubles.push(reason);
                    self.below_again_at = Some(now.after(REOPEN_EVERY));
                }
            }
            below.hops_changed(&self.engine, &self.hops, now);
        }
        if moved {
            self.join_groups();
        }
        let trouble = (!troubles.is_empty()).then(|| troubles.join("; "));
        if self.shared.trouble.load().as_deref() != trouble.as_ref() {
            match &trouble {
                Some(t) => tracing::error!("the lane can't forward: {t}"),
                None => tracing::info!("the lane forwards again"),
            }
            self.shared.trouble.store(trouble.map(Arc::new));
        }
    }

    fn attend_park(&mut self, now: BootTime) {
        let mut ready: Vec<(Port, Parked)> = Vec::new();
        let hops = &self.hops;
        self.park.release(
            |port, next_hop| hops.mac(port, next_hop),
            |port, mac, mut frame| {
                if let Some(destination) = frame.bytes.get_mut(VNET_HDR_LEN..VNET_HDR_LEN + 6) {
                    destination.copy_from_slice(&mac);
                    ready.push((port, frame));
                }
            },
        );
        for (port, frame) in ready {
            if self.batch.is_full() {
                self.flush();
            }
            self.batch.push_with_header(&frame.bytes, port, frame.fence);
        }
        for _ in 0..self.park.expire(now) {
            self.engine.count_drop(Reason::NeighbourUnresolved);
        }
        for (port, next_hop) in self.park.due(now) {
            if let Some(index) = self.hops.index(port) {
                self.net.use_neighbour(index, next_hop);
            }
        }
    }

    /// Takes at most one batch from a port; how many frames it was.
    fn receive(&mut self, port: Port) -> usize {
        let mut taken = 0;
        let now = BootTime::now();
        while taken < MAX_BATCH {
            let Some(socket) = &mut self.sockets[port as usize] else { return 0 };
            let Some(slot) = socket.ring().take() else { break };
            taken += 1;
            // The filter keeps tagged frames away; those that came before it was attached are of another network too.
            if slot.vlan.is_some_and(|tci| tci & 0x0fff != 0) {
                continue;
            }
            if slot.truncated {
                self.stats.truncated += 1;
                continue;
            }
            // All that the program did before it left this frame.
            if let Some(below) = &mut self.below {
                below.learn(&mut self.engine, now);
            }
            let (head, bytes) = socket.ring().parts(&slot);
            let Some(offload) = offload::decode(head) else {
                self.engine.count_drop(Reason::BadOffload);
                continue;
            };
            let mut frame = FrameMut { bytes, offload };
            match self.engine.process(&mut frame, port, now, &self.hops) {
                Verdict::Forward { port: egress, fence } => {
                    offload::encode(&frame.offload, head);
                    self.batch.push_slot(port, slot, egress, fence);
                }
                Verdict::Reply { port: egress, fence } => {
                    self.batch.push_frame(self.engine.reply(), egress, fence);
                }
                Verdict::AwaitNeighbour { port: egress, next_hop, fence } => {
                    offload::encode(&frame.offload, head);
                    let mut bytes = Vec::with_capacity(VNET_HDR_LEN + frame.bytes.len());
                    bytes.extend_from_slice(head);
                    bytes.extend_from_slice(frame.bytes);
                    if !self.park.add(egress, next_hop, Parked { bytes, fence }, now) {
                        self.engine.count_drop(Reason::NeighbourQueue);
                    }
                }
                Verdict::NotOurs | Verdict::Drop(_) => {}
            }
        }
        if taken > 0 {
            self.flush();
            if let Some(socket) = &mut self.sockets[port as usize] {
                socket.ring().release();
            }
        }
        taken
    }

    fn flush(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let now = BootTime::now();
        let flushed = self.batch.flush(&mut self.sockets, &self.shared.leases, now);
        self.stats.sent += flushed.sent as u64;
        for _ in 0..flushed.lease_ended {
            self.engine.count_drop(Reason::LeaseEnded);
        }
        for _ in 0..flushed.failed {
            self.engine.count_drop(Reason::Send);
        }
        if let Some(error) = flushed.error
            && self.complained_at.is_none_or(|t| now.since(t) >= COMPLAIN_EVERY)
        {
            self.complained_at = Some(now);
            tracing::warn!(%error, frames = flushed.failed, "the kernel refused frames");
        }
    }

    /// Sleeps until there is something to do.
    fn sleep(&mut self) {
        let now = BootTime::now();
        let deadline = [
            self.engine.next_deadline(),
            self.park.next_deadline(),
            self.announcements.next_deadline(),
            self.reopen_at,
            self.below_again_at,
            self.below.as_ref().map(|b| b.next_deadline()),
        ]
        .into_iter()
        .flatten()
        .min()
        .map_or(LONGEST_SLEEP, |t| t.since(now).min(LONGEST_SLEEP));
        let doze = self.below.as_mut().and_then(|b| b.doze(now));
        let deadline = doze.map_or(deadline, |most| most.min(deadline));
        let mut fds = Vec::with_capacity(3 + Port::COUNT);
        fds.push(PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN));
        fds.push(PollFd::new(self.net.published(), PollFlags::POLLIN));
        for socket in self.sockets.iter().flatten() {
            fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        }
        if let Some(news) = self.below.as_ref().and_then(|b| b.wakes()) {
            fds.push(PollFd::new(news, PollFlags::POLLIN));
        }
        // An interrupted sleep is a short one.
        let _ = ppoll(&mut fds, Some(TimeSpec::from_duration(deadline)), None);
        let told = |fd: &PollFd<'_>, flags| fd.revents().is_some_and(|r| r.intersects(flags));
        if told(&fds[0], PollFlags::POLLIN) {
            let _ = self.shared.wake.read();
        }
        // Here, and not where the picture is taken over: that may have happened before this was told of it.
        if told(&fds[1], PollFlags::POLLIN) {
            self.net.clear_published();
        }
        let any_error = fds.iter().any(|fd| told(fd, PollFlags::POLLERR));
        if any_error {
            for socket in self.sockets.iter().flatten() {
                // Taken, or the next sleep would end at once. The state of the link is known from netlink.
                if let Some(e) = socket.take_error() {
                    tracing::warn!(interface = socket.name(), error = %e, "packet socket");
                }
            }
        }
    }

    fn counters(&mut self, now: BootTime) -> Counters {
        let mut counters = match &mut self.below {
            Some(below) => below.counters(&self.engine, now),
            None => self.engine.counters(now),
        };
        let open: u64 = self.sockets.iter_mut().flatten().map(PacketSocket::ring_full).sum();
        counters.drops.push(("ring_full", self.stats.ring_full_before + open));
        counters.drops.push(("truncated", self.stats.truncated));
        counters.events.push(("frames_sent", self.stats.sent));
        counters.events.push(("announcements_sent", self.announcements.sent()));
        counters
    }
}

/// Opens a socket that lets through what `interest` says.
pub fn open_socket(
    place: &Place<'_>,
    ring_slots: usize,
    interest: &Interest,
) -> Result<PacketSocket, LaneError> {
    let socket = PacketSocket::open(place, ring_slots)?;
    socket.set_interest(interest).map_err(|source| LaneError::System {
        doing: format!("interface \"{}\": attach the filter of the plan", place.name),
        source,
    })?;
    Ok(socket)
}

/// What the engine needs to know of an interface.
pub fn port_config(link: &netlink::Link, snapshot: &netlink::Snapshot) -> PortConfig {
    PortConfig {
        mac: link.mac.unwrap_or_default(),
        ifindex: link.index,
        mtu: link.mtu,
        addresses: snapshot.addresses_of(link.index),
    }
}
