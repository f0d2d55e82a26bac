//! The thread: socket, lane and clock around the protocol's core.

use std::collections::{BTreeMap, HashMap};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use komainu_cluster::api::DataPath;
use komainu_cluster::flowsync::{
    Binding, Change, Data, Exchange, GATHER, GATHER_SOON, Moment, Name, Owned, Record, Report, Step, Urgency,
    Work, data_context, report_context,
};
use komainu_cluster::seal::{Kind, ReplayGuard, Sealer};
use komainu_cluster::shell::View;
use komainu_cluster::time::Instant;
use komainu_packet::engine::{FlowBinding, FlowName, FlowNews, FlowRecord};
use komainu_packet::lane::{Awaited, FlowSharing, MAX_ADOPTED};
use komainu_packet::time::BootTime;
use komainu_proto::domain::{BackendId, GroupId, NodeId, Role, ServiceId};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use tokio::sync::watch;

use super::{Request, Shared, flow_address};
use crate::datapath::LanePath;

/// Longest datagram that is read.
const MAX_DATAGRAM: usize = 2048;
/// Datagrams read, pieces of the table asked for, and things done for peers in one round: none keeps the others waiting long.
const MAX_BATCH: usize = 64;
/// News taken at once.
const MAX_NEWS: usize = 1 << 15;
/// Leases and the replicated state are looked at this often, however little happens.
const LOOK: Duration = Duration::from_millis(50);

pub(super) struct Worker {
    id: NodeId,
    socket: UdpSocket,
    sealer: Sealer,
    guard: ReplayGuard,
    path: Arc<LanePath>,
    view: watch::Receiver<Arc<View>>,
    shared: Arc<Shared>,
    asked: Receiver<Request>,
    exchange: Exchange,
    addresses: BTreeMap<NodeId, SocketAddr>,
    /// Groups of services.
    groups: HashMap<u32, GroupId>,
    owned: Vec<Owned>,
    flushing: Vec<(Moment, SyncSender<()>)>,
    news: Vec<FlowNews>,
    /// When news came last, and when an exception did: more are waited for without being woken for each.
    news_at: Option<Instant>,
    exception_at: Option<Instant>,
}

impl Worker {
    pub(super) fn new(
        id: NodeId,
        socket: UdpSocket,
        sealer: Sealer,
        path: Arc<LanePath>,
        mut view: watch::Receiver<Arc<View>>,
        shared: Arc<Shared>,
        asked: Receiver<Request>,
    ) -> Worker {
        let exchange = Exchange::new(id, sealer.session());
        view.mark_changed();
        Worker {
            id,
            socket,
            sealer,
            guard: ReplayGuard::default(),
            path,
            view,
            shared,
            asked,
            exchange,
            addresses: BTreeMap::new(),
            groups: HashMap::new(),
            owned: Vec::new(),
            flushing: Vec::new(),
            news: Vec::new(),
            news_at: None,
            exception_at: None,
        }
    }

    /// Runs until told to stop.
    pub(super) fn run(mut self) {
        let path = Arc::clone(&self.path);
        let Some(lane) = path.lane().sharing() else { return };
        let mut buffer = [0; MAX_DATAGRAM];
        while !self.shared.stop.load(Ordering::SeqCst) {
            let more = self.round(lane, &mut buffer);
            self.sleep(lane, more);
        }
    }

    /// Whether there is more to do at once.
    fn round(&mut self, lane: &dyn FlowSharing, buffer: &mut [u8]) -> bool {
        let now = now();
        if self.view.has_changed().unwrap_or(false) {
            self.follow_view(now);
        }
        self.look_at_leases(now);
        let mut more = self.receive(buffer, now);
        self.take_news(lane, now);
        self.exchange.set_installed(self.path.installed_index());
        self.requests(now);
        more |= self.dump(lane);
        more |= self.work(lane, now);
        self.exchange.handle_timeout(now);
        self.transmit(now);
        let exchange = &self.exchange;
        self.flushing.retain(|(moment, answer)| {
            let past = exchange.is_past(moment);
            if past {
                let _ = answer.try_send(());
            }
            !past
        });
        let peers = self.exchange.status(now);
        let followers = peers.iter().filter(|p| p.caught_up).map(|p| p.node.0);
        for (cell, id) in self.shared.followers.iter().zip(followers.chain(std::iter::repeat(0))) {
            cell.store(id, Ordering::Relaxed);
        }
        *self.shared.peers.lock().unwrap_or_else(PoisonError::into_inner) = peers;
        if !self.exchange.told().eq(self.shared.told.load().iter().copied()) {
            self.shared.told.store(Arc::new(self.exchange.told().collect()));
        }
        more
    }

    fn follow_view(&mut self, now: Instant) {
        let view = self.view.borrow_and_update().clone();
        let others =
            view.state.members.iter().filter(|m| m.node.role == Role::Balancer && m.node.id != self.id);
        self.addresses = others.filter_map(|m| Some((m.node.id, flow_address(m.node.address)?))).collect();
        self.exchange.set_peers(self.addresses.keys().copied(), now);
        self.groups = view.state.services.iter().map(|s| (s.id.0, s.group)).collect();
    }

    /// Which groups this node forwards for.
    fn look_at_leases(&mut self, now: Instant) {
        let leases = self.path.leases();
        let mine = leases.iter().filter(|l| l.forward_until.0 > now.0);
        self.owned = mine.map(|l| Owned { group: l.group, epoch: l.epoch }).collect();
        self.exchange.set_owned(self.owned.clone());
    }

    fn receive(&mut self, buffer: &mut [u8], now: Instant) -> bool {
        for _ in 0..MAX_BATCH {
            match self.socket.recv_from(buffer) {
                Ok((len, _)) => self.datagram(&buffer[..len], now),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return false,
                // An ICMP error about an earlier datagram: nobody listens there. Its silence says the same.
                Err(_) => {}
            }
        }
        true
    }

    fn datagram(&mut self, sealed: &[u8], now: Instant) {
        let totals = &self.shared.totals;
        let opened = self.sealer.peek(sealed).and_then(|kind| match kind {
            Kind::Flows => self.sealer.open(kind, &data_context(self.id, self.sealer.session()), sealed),
            _ => self.sealer.open(Kind::FlowReport, &report_context(self.id), sealed),
        });
        let opened = opened.and_then(|opened| self.guard.accept(&opened).map(|()| opened));
        let read = match opened {
            Err(_) => false,
            Ok(opened) if opened.kind == Kind::Flows => match Data::decode(&opened.plain) {
                Ok(data) => {
                    self.exchange.handle_data(opened.session, data, now);
                    true
                }
                Err(_) => false,
            },
            Ok(opened) => match Report::decode(&opened.plain) {
                Ok(report) => {
                    self.exchange.handle_report(opened.session, opened.counter, report, now);
                    true
                }
                Err(_) => false,
            },
        };
        if read {
            totals.received.fetch_add(1, Ordering::Relaxed);
            totals.received_bytes.fetch_add(sealed.len() as u64, Ordering::Relaxed);
        } else {
            totals.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn take_news(&mut self, lane: &dyn FlowSharing, now: Instant) {
        // Before they are taken: what is lost after this is told next time.
        let lost = lane.news().take_lost();
        self.news.clear();
        lane.news().take(MAX_NEWS, &mut self.news);
        // After they are taken: none of them came by newer tables than these.
        self.exchange.set_index(self.path.lane().installed_revision());
        if !self.news.is_empty() {
            self.news_at = Some(now);
        }
        for news in &self.news {
            let urgency = match news {
                FlowNews::Exception(_) => Urgency::Soon,
                FlowNews::Known(_) | FlowNews::Gone(_) | FlowNews::Unbound(_) => Urgency::Normal,
            };
            if urgency == Urgency::Soon {
                self.exception_at = Some(now);
            }
            let change = change(news);
            let group = self.groups.get(&news.service());
            // Of other groups only what this node forgets by itself is told.
            if group.is_some_and(|group| self.owned.iter().any(|o| o.group == *group)) {
                self.exchange.push(change, urgency);
            }
        }
        if lost {
            tracing::warn!("more news of flows than could be taken: the standbys are sent all flows again");
            self.exchange.restart();
        }
    }

    fn requests(&mut self, now: Instant) {
        while let Ok(request) = self.asked.try_recv() {
            match request {
                Request::Flush(answer) => self.flushing.push((self.exchange.moment(), answer)),
                Request::CatchUp(index, answer) => {
                    self.exchange.set_installed(index);
                    let path = Arc::clone(&self.path);
                    if let Some(lane) = path.lane().sharing() {
                        while self.work(lane, now) {}
                    }
                    let _ = answer.try_send(());
                }
            }
        }
    }

    /// Gives the exchange flows that it wants.
    fn dump(&mut self, lane: &dyn FlowSharing) -> bool {
        for _ in 0..MAX_BATCH {
            let Some(dump) = self.exchange.wants_dump() else { return false };
            let groups: Arc<[u32]> = dump.groups.iter().map(|g| g.0).collect();
            // No answer: the lane is stuck, and is asked again after the next sleep.
            let Some((records, next)) = lane.shared(groups, dump.from) else { return false };
            let changes = records.iter().map(|record| change(&FlowNews::Known(*record)));
            self.exchange.dumped(&dump, changes, next);
        }
        true
    }

    /// Does what peers have told.
    fn work(&mut self, lane: &dyn FlowSharing, now: Instant) -> bool {
        for _ in 0..MAX_BATCH {
            let owned = &self.owned;
            // In an orderly hand-over this node goes on forwarding for a while: what it knows is not overwritten before.
            let blocked = |theirs: &[Owned]| {
                theirs.iter().any(|t| owned.iter().any(|o| o.group == t.group && o.epoch < t.epoch))
            };
            let Some(work) = self.exchange.poll_step(blocked) else { return false };
            if !self.carry_out(lane, &work) {
                return false;
            }
            self.exchange.done(work.peer, now);
        }
        true
    }

    fn carry_out(&self, lane: &dyn FlowSharing, work: &Work) -> bool {
        let totals = &self.shared.totals;
        for step in &work.steps {
            match step {
                Step::Adopt(changes) => {
                    let stale = |change: &Change| {
                        let group = self.groups.get(&change.service().0);
                        group.is_some_and(|group| work.stale.contains(group))
                    };
                    for some in changes.chunks(MAX_ADOPTED) {
                        let some = some.iter().filter(|c| work.stale.is_empty() || !stale(c));
                        let Some(adopted) = lane.adopt(some.map(news).collect(), work.mark) else {
                            return false;
                        };
                        totals.adopted.fetch_add(adopted.taken.into(), Ordering::Relaxed);
                        totals.rejected.fetch_add(adopted.refused.into(), Ordering::Relaxed);
                        totals.full.fetch_add(adopted.full.into(), Ordering::Relaxed);
                    }
                }
                Step::Sweep(groups) => {
                    let groups: Arc<[u32]> = groups.iter().map(|g| g.0).collect();
                    let mut from = 0;
                    loop {
                        match lane.sweep(Arc::clone(&groups), work.mark, from) {
                            None => return false,
                            Some(None) => break,
                            Some(Some(next)) => from = next,
                        }
                    }
                }
            }
        }
        true
    }

    fn transmit(&mut self, now: Instant) {
        while let Some(transmit) = self.exchange.poll_transmit(now) {
            let Some(address) = self.addresses.get(&transmit.to) else { continue };
            let sealed = self.sealer.seal(transmit.kind, &transmit.context, &transmit.bytes);
            // What can't be sent now is sent again.
            if self.socket.send_to(&sealed, address).is_ok() {
                self.shared.totals.sent.fetch_add(1, Ordering::Relaxed);
                self.shared.totals.sent_bytes.fetch_add(sealed.len() as u64, Ordering::Relaxed);
            }
        }
    }

    fn sleep(&mut self, lane: &dyn FlowSharing, more: bool) {
        if more {
            return;
        }
        let now = now();
        let mut wait = LOOK;
        if let Some(deadline) = self.exchange.next_deadline() {
            wait = wait.min(deadline.since(now));
        }
        let left = |since: Option<Instant>, gather| {
            since.map(|at| at.after(gather).since(now)).filter(|left| !left.is_zero())
        };
        let gathering = (left(self.exception_at, GATHER_SOON), left(self.news_at, GATHER));
        let (until, awaited) = match gathering {
            (Some(left), _) => (left, None),
            (None, Some(left)) => (left, Some(Awaited::Exceptions)),
            (None, None) => (wait, Some(Awaited::Any)),
        };
        if awaited.is_some_and(|awaited| lane.news().arm(awaited)) {
            return;
        }
        wait = wait.min(until);
        let mut fds = [
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.shared.fd(), PollFlags::POLLIN),
            PollFd::new(lane.news().fd(), PollFlags::POLLIN),
        ];
        // Interrupted or woken for nothing: the next round finds out.
        let _ = ppoll(&mut fds, Some(TimeSpec::from_duration(wait)), None);
        let _ = self.shared.wake.read();
        lane.news().disarm();
    }
}

/// Both layers count nanoseconds of `CLOCK_BOOTTIME`.
fn now() -> Instant {
    Instant(BootTime::now().0)
}

/// The data path's words in the cluster's.
fn change(news: &FlowNews) -> Change {
    let name = |n: &FlowName| Name { service: ServiceId(n.service), client: n.client };
    match news {
        FlowNews::Known(r) | FlowNews::Exception(r) => Change::Known(Record {
            name: name(&r.name),
            backend: BackendId(r.backend),
            snat: r.snat,
            progress: r.progress,
        }),
        FlowNews::Gone(n) => Change::Gone(name(n)),
        FlowNews::Unbound(b) => Change::Unbound(Binding {
            service: ServiceId(b.service),
            backend: BackendId(b.backend),
            snat: b.snat,
        }),
    }
}

/// And back.
fn news(change: &Change) -> FlowNews {
    let name = |n: &Name| FlowName { service: n.service.0, client: n.client };
    match change {
        Change::Known(r) => FlowNews::Known(FlowRecord {
            name: name(&r.name),
            backend: r.backend.0,
            snat: r.snat,
            progress: r.progress,
        }),
        Change::Gone(n) => FlowNews::Gone(name(n)),
        Change::Unbound(b) => {
            FlowNews::Unbound(FlowBinding { service: b.service.0, backend: b.backend.0, snat: b.snat })
        }
    }
}
