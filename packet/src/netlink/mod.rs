//! What the kernel knows of links, addresses, routes and neighbours, kept current by a thread of its own.
//!
//! There is no second ARP cache: an unknown neighbour is resolved, and a stale one confirmed, by the kernel itself when
//! it is told that the entry is used ([`Handle::use_neighbour`]).
//!
//! Readers get an immutable [`Snapshot`] and never wait. Neighbours follow the kernel's announcements one by one.
//! Links, addresses and routes are few and are read anew as a whole whenever one of them changes: the kernel does not
//! announce every route that it removes. Announcements that were lost (`ENOBUFS`) lead to reading everything anew.
//!
//! Only the main routing table is looked at: policy rules, VRFs and source routing are not followed.

mod table;
pub(crate) mod traffic_control;
mod wire;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use netlink_sys::Socket;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;

pub use table::{Hop, Link, Neighbour, Neighbours, Route, Routes, Snapshot, Via, XdpState};

use wire::{Change, Requests};

/// Requests to the kernel that wait for the thread. Each costs it some microseconds; more than this waiting is a scan of
/// unused addresses, and what is lost is asked for again.
const REQUESTS: usize = 1024;
/// Announcements read before a picture is published, so that readers are not starved by a storm.
const CHANGES_AT_ONCE: usize = 4096;
/// Shortest time between two readings of links, addresses and routes: a routing daemon's burst costs a few.
const REREAD_EVERY: Duration = Duration::from_millis(20);
/// Everything is read anew at least this often, should an announcement ever have gone missing unnoticed.
const RESYNC_EVERY: Duration = Duration::from_secs(60);
/// Time to the next try when the kernel refuses an answer.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// Receive buffer of the announcement socket: a few thousand neighbour changes.
const RECEIVE_BUFFER: usize = 4 << 20;

/// The thread and its picture. Stops on drop.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Reads the picture and asks for neighbours. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    snapshot: ArcSwap<Snapshot>,
    requests: Sender<(u32, IpAddr)>,
    /// Wakes the thread.
    wake: EventFd,
    /// Wakes whoever reads the picture, when there is a new one.
    published: EventFd,
    stop: AtomicBool,
    alive: AtomicBool,
}

impl Watch {
    /// Reads everything once and starts the thread, which stays in the network namespace of the caller. Neighbours are
    /// kept for the named interfaces only.
    ///
    /// # Errors
    /// No netlink socket, or the kernel refuses an answer.
    pub fn start(interfaces: Vec<String>) -> io::Result<Watch> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let (requests, waiting) = bounded(REQUESTS);
        let shared = Arc::new(Shared {
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            requests,
            wake: EventFd::from_flags(flags)?,
            published: EventFd::from_flags(flags)?,
            stop: AtomicBool::new(false),
            alive: AtomicBool::new(true),
        });
        // Announcements first, then the dump: what changes in between is announced.
        let announcements = wire::subscribe()?;
        // Over the limit of unprivileged users where allowed; without, the default serves, with more resyncs.
        let _ = nix::sys::socket::setsockopt(
            &announcements,
            nix::sys::socket::sockopt::RcvBufForce,
            &RECEIVE_BUFFER,
        );
        let mut worker = Worker {
            shared: Arc::clone(&shared),
            announcements,
            kernel: Requests::new()?,
            waiting,
            interfaces,
            picture: Snapshot::default(),
            changes: Vec::new(),
        };
        worker.read_all()?;
        worker.publish();
        let thread =
            std::thread::Builder::new().name("komainu-netlink".to_owned()).spawn(move || worker.run())?;
        Ok(Watch { shared, thread: Mutex::new(Some(thread)) })
    }

    /// A reader.
    pub fn handle(&self) -> Handle {
        Handle { shared: Arc::clone(&self.shared) }
    }

    /// Ends the thread. Idempotent; returns when it has ended.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let _ = self.shared.wake.write(1);
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Handle {
    /// The current picture.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot.load_full()
    }

    /// Generation of the current picture.
    pub fn generation(&self) -> u64 {
        self.shared.snapshot.load().generation
    }

    /// Whether the thread lives: a picture that nobody keeps current must not be trusted for long.
    pub fn alive(&self) -> bool {
        self.shared.alive.load(Ordering::Relaxed)
    }

    /// Asks the kernel to resolve or confirm a neighbour. Never waits; whether the request was taken.
    pub fn use_neighbour(&self, index: u32, address: IpAddr) -> bool {
        match self.shared.requests.try_send((index, address)) {
            Ok(()) => self.shared.wake.write(1).is_ok(),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        }
    }

    /// Readable when a new picture was published since [`Handle::clear_published`].
    pub fn published(&self) -> BorrowedFd<'_> {
        self.shared.published.as_fd()
    }

    /// See [`Handle::published`]. Call before reading the picture.
    pub fn clear_published(&self) {
        let _ = self.shared.published.read();
    }
}

/// Reads links, addresses and routes once, for checks made before there is a lane.
///
/// # Errors
/// No netlink socket, or the kernel refuses an answer.
pub fn read_once() -> io::Result<Snapshot> {
    let mut kernel = Requests::new()?;
    Ok(Snapshot {
        generation: 1,
        links: Arc::new(kernel.links()?),
        addresses: Arc::new(kernel.addresses()?),
        routes: Arc::new(Routes::new(kernel.routes(|_| false)?)),
        neighbours: Arc::default(),
    })
}

struct Worker {
    shared: Arc<Shared>,
    announcements: Socket,
    kernel: Requests,
    waiting: Receiver<(u32, IpAddr)>,
    interfaces: Vec<String>,
    picture: Snapshot,
    changes: Vec<Change>,
}

/// Clears the flag however the thread ends, also by a panic.
struct AliveGuard(Arc<Shared>);

impl Drop for AliveGuard {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::SeqCst);
        let _ = self.0.published.write(1);
    }
}

impl Worker {
    fn run(mut self) {
        let _guard = AliveGuard(Arc::clone(&self.shared));
        // The first answers of a new owner wait here until the kernel has resolved its clients, so this thread runs as soon as
        // the one that forwards. Where that is not allowed, that one has said so.
        let _ = crate::lane::af_packet::sys::prefer_this_thread();
        let start = Instant::now();
        let (mut reread, mut resync) = (false, false);
        let (mut reread_not_before, mut resync_at) = (start, start + RESYNC_EVERY);
        loop {
            let now = Instant::now();
            let until = if reread || resync { reread_not_before.min(resync_at) } else { resync_at };
            self.wait(until.saturating_duration_since(now));
            if self.shared.stop.load(Ordering::SeqCst) {
                return;
            }
            let mut changed = false;
            match self.read_changes() {
                Ok(more) => {
                    changed |= more.neighbours;
                    reread |= more.others;
                }
                Err(e) => {
                    tracing::debug!(error = %e, "netlink announcements lost, reading everything anew");
                    resync = true;
                }
            }
            let now = Instant::now();
            if now >= resync_at || (resync && now >= reread_not_before) {
                (resync, reread) = match self.read_all() {
                    Ok(()) => (false, false),
                    Err(e) => {
                        tracing::warn!(error = %e, "the kernel's routing tables could not be read");
                        (true, reread)
                    }
                };
                reread_not_before = now + if resync { RETRY_AFTER } else { REREAD_EVERY };
                resync_at = now + RESYNC_EVERY;
                changed = true;
            } else if reread && now >= reread_not_before {
                match self.read_tables() {
                    Ok(()) => reread = false,
                    Err(e) => tracing::warn!(error = %e, "the kernel's routing tables could not be read"),
                }
                reread_not_before = now + if reread { RETRY_AFTER } else { REREAD_EVERY };
                changed = true;
            }
            if changed {
                self.publish();
            }
            self.pass_requests();
        }
    }

    fn wait(&self, time: Duration) {
        let mut fds = [
            PollFd::new(self.announcements.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
        ];
        // An interrupted wait is a short one.
        let _ = ppoll(&mut fds, Some(TimeSpec::from_duration(time)), None);
        let _ = self.shared.wake.read();
    }

    fn read_changes(&mut self) -> io::Result<Seen> {
        let mut seen = Seen::default();
        self.changes.clear();
        while self.changes.len() < CHANGES_AT_ONCE
            && wire::read_changes(&self.announcements, &mut self.changes)?
        {}
        for change in self.changes.drain(..) {
            match change {
                Change::Links | Change::Addresses | Change::Routes => seen.others = true,
                Change::Neighbour { index, address, entry } => {
                    if !is_ours(&self.picture, &self.interfaces, index) {
                        continue;
                    }
                    if self.picture.neighbours.get(&(index, address)).copied() == entry {
                        continue;
                    }
                    seen.neighbours = true;
                    // Copied only when a reader still holds the picture before.
                    let neighbours = Arc::make_mut(&mut self.picture.neighbours);
                    match entry {
                        Some(entry) => neighbours.insert((index, address), entry),
                        None => neighbours.remove(&(index, address)),
                    };
                }
            }
        }
        Ok(seen)
    }

    fn read_all(&mut self) -> io::Result<()> {
        self.read_tables()?;
        self.read_neighbours()
    }

    fn read_tables(&mut self) -> io::Result<()> {
        let before: Vec<u32> = self.ours();
        self.picture.links = Arc::new(self.kernel.links()?);
        self.picture.addresses = Arc::new(self.kernel.addresses()?);
        let ours = self.ours();
        self.picture.routes = Arc::new(Routes::new(self.kernel.routes(|index| ours.contains(&index))?));
        // An interface that came back under another number brings neighbours that were passed over until now.
        if before != ours {
            self.read_neighbours()?;
        }
        Ok(())
    }

    fn read_neighbours(&mut self) -> io::Result<()> {
        let ours = self.ours();
        let all = self.kernel.neighbours()?;
        self.picture.neighbours = Arc::new(
            all.into_iter()
                .filter(|(index, ..)| ours.contains(index))
                .map(|(index, address, entry)| ((index, address), entry))
                .collect(),
        );
        Ok(())
    }

    fn ours(&self) -> Vec<u32> {
        self.interfaces.iter().filter_map(|name| self.picture.link(name)).map(|l| l.index).collect()
    }

    fn publish(&mut self) {
        self.picture.generation += 1;
        self.shared.snapshot.store(Arc::new(self.picture.clone()));
        let _ = self.shared.published.write(1);
    }

    fn pass_requests(&mut self) {
        // As many as can wait: those that come meanwhile are the next round's.
        for (index, address) in self.waiting.try_iter().take(REQUESTS) {
            if let Err(e) = self.kernel.use_neighbour(index, address) {
                tracing::debug!(%address, error = %e, "the kernel can't resolve a neighbour");
            }
        }
    }
}

#[derive(Default)]
struct Seen {
    neighbours: bool,
    others: bool,
}

fn is_ours(picture: &Snapshot, interfaces: &[String], index: u32) -> bool {
    picture.links.iter().any(|l| l.index == index && interfaces.contains(&l.name))
}
