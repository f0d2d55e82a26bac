//! The lane as the cluster layer sees it, and the thread that keeps its tables at the newest state.
//!
//! Two speeds: leases go through [`LanePath`] straight into the lane, from the beat thread, without waiting for anybody.
//! Tables go through the [`Installer`]: building them takes milliseconds (Maglev), so a thread of its own does it, and
//! whatever arrived meanwhile but the newest is skipped. What connects the two is the index: a lease for an assignment
//! is granted only when tables of at least that index are installed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use komainu_cluster::api::{DataPath, LeaseUpdate};
use komainu_cluster::flowsync::Owned;
use komainu_cluster::state::State;
use komainu_packet::lane::SharedLane;
use komainu_packet::lease::Lease;
use komainu_packet::plan::{MAX_GROUPS, Plan};
use komainu_packet::time::BootTime;
use komainu_proto::domain::{GroupId, NodeId};

use crate::planner::{self, Planned};
use crate::warm::Warm;

/// Time after which a refused plan is offered again although nothing changed: what made the system refuse it (memory, a
/// netlink queue) may have passed.
const RETRY: Duration = Duration::from_secs(1);

/// The lane behind the cluster layer's seam.
pub struct LanePath {
    lane: SharedLane,
    /// Log index that the lane's tables were derived from, or would be: see [`Installer`].
    installed_index: AtomicU64,
    /// What may be forwarded until when, by `id % MAX_GROUPS` like the lane's own cells.
    cells: Box<[Cell]>,
    /// Exchanges flows with the other balancers, where that is done.
    warm: OnceLock<Warm>,
}

/// A group's number plus 1 (0: nobody's), the epoch, and until when it may be forwarded for.
#[derive(Debug, Default)]
struct Cell {
    group: AtomicU64,
    epoch: AtomicU64,
    forward_until: AtomicU64,
}

/// Until when this node may forward for a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which group.
    pub group: GroupId,
    /// Under which epoch.
    pub epoch: u64,
    /// Until when; may have passed.
    pub forward_until: BootTime,
}

impl LanePath {
    /// A lane without tables.
    pub fn new(lane: SharedLane) -> Self {
        let cells = (0..MAX_GROUPS).map(|_| Cell::default()).collect();
        LanePath { lane, installed_index: AtomicU64::new(0), cells, warm: OnceLock::new() }
    }

    /// From now on flows are exchanged by `warm`. Further calls change nothing.
    pub fn set_warm(&self, warm: Warm) {
        let _ = self.warm.set(warm);
    }

    /// What exchanges flows with the other balancers.
    pub fn warm(&self) -> Option<&Warm> {
        self.warm.get()
    }

    /// Groups that this node forwards for, or has forwarded for.
    pub fn leases(&self) -> Vec<Held> {
        let held = self.cells.iter().filter_map(|cell| {
            let group = cell.group.load(Ordering::SeqCst).checked_sub(1)?;
            let (epoch, until) =
                (cell.epoch.load(Ordering::SeqCst), cell.forward_until.load(Ordering::SeqCst));
            // Another group's or epoch's by now: the next look finds it.
            let same =
                cell.group.load(Ordering::SeqCst) == group + 1 && cell.epoch.load(Ordering::SeqCst) == epoch;
            let group = GroupId(u32::try_from(group).ok()?);
            same.then_some(Held { group, epoch, forward_until: BootTime(until) })
        });
        held.collect()
    }

    /// The lane.
    pub fn lane(&self) -> &SharedLane {
        &self.lane
    }

    /// When the last group ends that the lane may forward for, as far as is written now. A node that has handed its
    /// groups over goes on until then, so that what is under way to it still arrives.
    pub fn forwards_until(&self) -> BootTime {
        let until = self.cells.iter().map(|cell| cell.forward_until.load(Ordering::Relaxed));
        BootTime(until.max().unwrap_or(0))
    }
}

/// Both sides count nanoseconds of `CLOCK_BOOTTIME`, so an instant is carried over as it is.
impl DataPath for LanePath {
    fn set_lease(&self, group: GroupId, lease: LeaseUpdate) {
        let lease = Lease {
            epoch: lease.epoch,
            answer_until: BootTime(lease.answer_until.0),
            forward_until: BootTime(lease.forward_until.0),
        };
        self.lane.set_lease(group.0, lease);
        let cell = &self.cells[group.0 as usize % MAX_GROUPS];
        let number = u64::from(group.0) + 1;
        if cell.group.load(Ordering::Relaxed) != number || cell.epoch.load(Ordering::Relaxed) != lease.epoch {
            // So that nobody takes one epoch's limit for another's.
            cell.forward_until.store(0, Ordering::SeqCst);
            cell.group.store(number, Ordering::SeqCst);
            cell.epoch.store(lease.epoch, Ordering::SeqCst);
        }
        cell.forward_until.store(lease.forward_until.0, Ordering::SeqCst);
    }

    fn announce(&self, group: GroupId) {
        self.lane.announce(group.0);
    }

    fn installed_index(&self) -> u64 {
        // Pairs with the store after `install`: whoever reads the index may rely on the tables.
        self.installed_index.load(Ordering::Acquire)
    }

    fn followers(&self) -> Option<Vec<NodeId>> {
        self.warm().map(Warm::followers)
    }

    fn told(&self) -> Vec<Owned> {
        self.warm().map(Warm::told).unwrap_or_default()
    }
}

/// What stands between the newest state and the lane's tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InstallStatus {
    /// The lane's last refusal, with the index that it was about; absent when the newest plan is in force.
    pub refused: Option<(u64, String)>,
    /// Services that this version can't forward.
    pub omitted: Vec<String>,
}

impl InstallStatus {
    /// What an operator should know, a sentence each.
    pub fn notices(&self) -> Vec<String> {
        let refused = self.refused.iter().map(|(index, reason)| {
            format!("the data path refused the tables of log index {index} and goes on with the older ones: {reason}")
        });
        refused.chain(self.omitted.iter().cloned()).collect()
    }
}

/// Keeps the lane's tables at the newest state. Dropping it ends the thread.
///
/// Many log entries change nothing for the lane (an event, a member, an ownership). Then the index alone is raised and
/// the tables are left in peace.
pub struct Installer {
    inbox: Arc<Inbox>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Inbox {
    mail: Mutex<Mail>,
    changed: Condvar,
}

#[derive(Default)]
struct Mail {
    newest: Option<Arc<State>>,
    stop: bool,
    status: InstallStatus,
}

impl Installer {
    /// Starts the thread. From it `installed` is called after every rise of the index, and `told` after every change of
    /// the status.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(
        path: Arc<LanePath>,
        installed: impl Fn() + Send + 'static,
        told: impl Fn(&InstallStatus) + Send + 'static,
    ) -> std::io::Result<Installer> {
        let inbox = Arc::new(Inbox::default());
        let worker = Worker {
            path,
            inbox: inbox.clone(),
            installed: Box::new(installed),
            told: Box::new(told),
            in_force: None,
        };
        let thread =
            std::thread::Builder::new().name("komainu-install".to_owned()).spawn(move || worker.run())?;
        Ok(Installer { inbox, thread: Some(thread) })
    }

    /// Hands over a newer state. Never waits for the lane.
    pub fn submit(&self, state: Arc<State>) {
        let mut mail = self.inbox.lock();
        if mail.newest.as_ref().is_none_or(|waiting| waiting.index < state.index) {
            mail.newest = Some(state);
            self.inbox.changed.notify_one();
        }
    }

    /// What stands between the newest state and the lane's tables.
    pub fn status(&self) -> InstallStatus {
        self.inbox.lock().status.clone()
    }
}

impl Drop for Installer {
    fn drop(&mut self) {
        self.inbox.lock().stop = true;
        self.inbox.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It ended by itself or by a panic, which has aborted the process.
            let _ = thread.join();
        }
    }
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().expect("no thread panicked while it held the lock")
    }

    /// The next state to install: the newest submitted one, or after [`RETRY`] the refused one. `None`: the end.
    fn next(&self, refused: Option<&Arc<State>>) -> Option<Arc<State>> {
        let mut mail = self.lock();
        loop {
            if mail.stop {
                return None;
            }
            if let Some(state) = mail.newest.take() {
                return Some(state);
            }
            match refused {
                None => mail = self.changed.wait(mail).expect("no thread panicked while it held the lock"),
                Some(state) => {
                    let (woken, waited) = self
                        .changed
                        .wait_timeout(mail, RETRY)
                        .expect("no thread panicked while it held the lock");
                    mail = woken;
                    if waited.timed_out() && mail.newest.is_none() && !mail.stop {
                        return Some(state.clone());
                    }
                }
            }
        }
    }
}

struct Worker {
    path: Arc<LanePath>,
    inbox: Arc<Inbox>,
    installed: Box<dyn Fn() + Send>,
    told: Box<dyn Fn(&InstallStatus) + Send>,
    /// The plan in force, at whatever revision it was installed.
    in_force: Option<Plan>,
}

impl Worker {
    fn run(mut self) {
        let mut refused = None;
        while let Some(state) = self.inbox.next(refused.as_ref()) {
            let index = state.index;
            if index < self.path.installed_index() {
                continue;
            }
            let Planned { plan, omitted } = planner::plan(&state);
            let result = self.install(plan, index);
            let status = InstallStatus { refused: result.err().map(|reason| (index, reason)), omitted };
            refused = status.refused.is_some().then_some(state);
            if refused.is_none() {
                self.path.installed_index.store(index, Ordering::Release);
                (self.installed)();
            }
            self.tell(status);
        }
    }

    /// Flows that these tables turn into exceptions are with the standbys before the tables are in force, and what came by
    /// such tables from another node is taken over before a lease can rest on them. Both wait for a bounded time only.
    fn install(&mut self, plan: Plan, index: u64) -> Result<(), String> {
        if self.in_force.as_ref().is_some_and(|p| p.groups == plan.groups && p.services == plan.services) {
            return Ok(());
        }
        if let Some(warm) = self.path.warm() {
            warm.flush();
        }
        self.path.lane.install(plan.clone()).map_err(|e| e.to_string())?;
        if let Some(warm) = self.path.warm() {
            warm.catch_up(index);
        }
        self.in_force = Some(plan);
        Ok(())
    }

    fn tell(&self, status: InstallStatus) {
        let mut mail = self.inbox.lock();
        // A refusal that is repeated under another index is no news.
        let news = mail.status.omitted != status.omitted
            || mail.status.refused.as_ref().map(|r| &r.1) != status.refused.as_ref().map(|r| &r.1);
        mail.status = status.clone();
        drop(mail);
        if news {
            (self.told)(&status);
        }
    }
}

#[cfg(test)]
mod tests;
