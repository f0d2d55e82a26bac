//! When to ask whom, and whom to tell.
//!
//! One task for each backend: ask, count, tell if the verdict changed, sleep. A backend that is removed or asked
//! differently has its task aborted, which drops the probe with its socket; results of an aborted task are never
//! reported, because it must hold the slot's lock and find its own generation there.
//!
//! **Times.** The first check comes at once, so that a fresh cluster serves as soon as its backends answer; first checks
//! are only kept apart by [`FIRST_CHECK_SPACING`]. The second one comes at a random point of the interval and every
//! later one after the interval ±10 %, so that checks of many backends, and those of several balancers, spread out and
//! never fall into step. All of it is monotonic time; a step of the wall clock moves nothing.
//!
//! **A node that is cut off learns nothing of backends.** While an interface of the data path has no link, and for
//! [`SETTLING`] after, a failed check is shown but not counted: see [`Checker::set_cut_off`].

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use komainu_cluster::api::Observation;
use komainu_proto::domain::{BackendId, CheckType, Health, HealthCheck};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::probe::{Answer, NetProbe};
use super::rise_fall::RiseFall;

/// Checks under way at one time. Each holds a descriptor or two, and the usual soft limit is 1024; what a health check
/// measures is also worth less the more of them compete for this machine.
pub const MAX_CONCURRENT: usize = 256;
/// Distance between the first checks of backends that appear together: 1000 backends are asked within two seconds.
pub const FIRST_CHECK_SPACING: Duration = Duration::from_millis(2);
/// How long after its link has come back a node's own failures count for nothing: a neighbour that had another link-layer
/// address for it may keep that for a second (Linux: `net.ipv4.neigh.*.locktime`), and a bridge learns where it is meanwhile.
pub const SETTLING: Duration = Duration::from_secs(2);
/// Share of the interval by which each wait may be shorter or longer.
const JITTER: f64 = 0.1;

/// A backend to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Which.
    pub backend: BackendId,
    /// `service/backend`, for messages.
    pub name: String,
    /// Address and port to ask.
    pub address: SocketAddr,
    /// What to ask, how often, and how to count.
    pub check: HealthCheck,
    /// Verdict in force in the cluster when this node begins to check the backend. Counting starts there, so that a
    /// restarted node needs as many failures as any other to take out a backend that was up.
    pub initial: Health,
}

/// The way questions are put; the network in earnest, a script in tests.
pub trait Probe: Send + Sync + 'static {
    /// Asks once.
    fn ask<'a>(&'a self, target: &'a Target) -> Pin<Box<dyn Future<Output = Answer> + Send + 'a>>;
}

impl Probe for NetProbe {
    fn ask<'a>(&'a self, target: &'a Target) -> Pin<Box<dyn Future<Output = Answer> + Send + 'a>> {
        Box::pin(NetProbe::ask(self, target.address, &target.check))
    }
}

/// Told of every verdict that a result changed, and of the first one of a backend. Must not wait.
pub type Report = Arc<dyn Fn(Observation) + Send + Sync>;

/// What the checks of one backend have seen on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckStatus {
    /// Which backend.
    pub backend: BackendId,
    /// `service/backend`.
    pub name: String,
    /// Verdict after rise/fall counting.
    pub health: Health,
    /// The newest answer in words; `not checked yet` before the first.
    pub reason: String,
    /// Checks that passed since the node started to check this backend.
    pub passed: u64,
    /// Checks that failed, counted or not.
    pub failed: u64,
    /// How long the newest check took; zero before the first.
    pub took: Duration,
    /// Sum of all checks' durations.
    pub took_total: Duration,
}

/// Checks a changing set of backends.
pub struct Checker {
    runtime: Handle,
    common: Arc<Common>,
    running: Mutex<HashMap<BackendId, Running>>,
    seed: u64,
}

/// What all check tasks share.
struct Common {
    probe: Arc<dyn Probe>,
    report: Report,
    permits: Semaphore,
    /// Failures of checks that began before this instant don't count; none does while it is absent.
    counts_from: Mutex<Option<Instant>>,
}

impl Common {
    fn counts(&self, answer: &Answer, asked: Instant) -> bool {
        answer.success || lock(&self.counts_from).is_some_and(|from| asked >= from)
    }
}

struct Running {
    target: Target,
    slot: Arc<Mutex<Slot>>,
    task: Option<AbortHandle>,
}

/// State of one backend's checks; outlives a change of how it is checked.
struct Slot {
    /// Raised when the task is replaced: a result of an older one counts no more.
    generation: u64,
    counter: RiseFall,
    /// Whether a result stands behind the counter's verdict and it was reported.
    reported: bool,
    status: CheckStatus,
}

impl Checker {
    /// A checker without backends. Tasks run on `runtime`; `seed` makes the jitter reproducible.
    pub fn new(runtime: Handle, probe: Arc<dyn Probe>, report: Report, seed: u64) -> Self {
        let common = Arc::new(Common {
            probe,
            report,
            permits: Semaphore::new(MAX_CONCURRENT),
            counts_from: Mutex::new(Some(Instant::now())),
        });
        Checker { runtime, common, running: Mutex::default(), seed }
    }

    /// Makes `targets` the set of backends that are checked. Those that are already checked the same way go on
    /// undisturbed. Idempotent.
    ///
    /// A backend whose address or port changed is another machine as far as checks can tell: its verdict begins at
    /// `unknown`. One that is merely asked differently keeps its verdict until the new check has decided otherwise, so
    /// that correcting a path takes no service down.
    pub fn set_targets(&self, targets: Vec<Target>) {
        let mut running = lock(&self.running);
        let mut old = std::mem::take(&mut *running);
        let mut new_ones = 0;
        for target in targets {
            let entry = match old.remove(&target.backend) {
                Some(same) if asks_alike(&same.target, &target) => {
                    lock(&same.slot).status.name.clone_from(&target.name);
                    Running { target, ..same }
                }
                Some(changed) => {
                    changed.abort();
                    self.restart(changed, target)
                }
                None => {
                    new_ones += 1;
                    self.start(target, FIRST_CHECK_SPACING * new_ones)
                }
            };
            running.insert(entry.target.backend, entry);
        }
        for gone in old.into_values() {
            gone.abort();
        }
    }

    /// Says whether this node is cut off from its networks. What fails then fails for its own reasons, and when it owns a
    /// group again its verdicts of that time would take good backends out. Idempotent.
    pub fn set_cut_off(&self, cut_off: bool) {
        let mut from = lock(&self.common.counts_from);
        match (cut_off, *from) {
            (true, _) => *from = None,
            (false, None) => *from = Some(Instant::now() + SETTLING),
            (false, Some(_)) => {}
        }
    }

    /// What the checks have seen, by backend.
    pub fn statuses(&self) -> Vec<CheckStatus> {
        let slots: Vec<_> = lock(&self.running).values().map(|r| r.slot.clone()).collect();
        let mut statuses: Vec<_> = slots.iter().map(|slot| lock(slot).status.clone()).collect();
        statuses.sort_by_key(|s| s.backend);
        statuses
    }

    /// What the checks have seen of one backend; `None` when it is not checked.
    pub fn status(&self, backend: BackendId) -> Option<CheckStatus> {
        let slot = lock(&self.running).get(&backend)?.slot.clone();
        let status = lock(&slot).status.clone();
        Some(status)
    }

    fn start(&self, target: Target, first: Duration) -> Running {
        let slot = Slot {
            generation: 0,
            counter: RiseFall::new(target.check.rise, target.check.fall, target.initial),
            reported: false,
            status: CheckStatus {
                backend: target.backend,
                name: target.name.clone(),
                health: target.initial,
                reason: "not checked yet".to_owned(),
                passed: 0,
                failed: 0,
                took: Duration::ZERO,
                took_total: Duration::ZERO,
            },
        };
        self.spawn(target, Arc::new(Mutex::new(slot)), first)
    }

    fn restart(&self, old: Running, target: Target) -> Running {
        let mut slot = lock(&old.slot);
        let kept = if old.target.address == target.address { slot.counter.health() } else { Health::Unknown };
        slot.generation += 1;
        slot.counter = RiseFall::new(target.check.rise, target.check.fall, kept);
        slot.status.name.clone_from(&target.name);
        if kept != slot.status.health {
            slot.status.health = kept;
            slot.status.reason = "not checked yet at its new address".to_owned();
            slot.reported = true;
            (self.common.report)(slot.observation());
        }
        drop(slot);
        self.spawn(target, old.slot, FIRST_CHECK_SPACING)
    }

    fn spawn(&self, target: Target, slot: Arc<Mutex<Slot>>, first: Duration) -> Running {
        if target.check.kind == CheckType::None {
            let mut locked = lock(&slot);
            locked.status.health = Health::Up;
            locked.status.reason = "not checked".to_owned();
            (self.common.report)(locked.observation());
            drop(locked);
            return Running { target, slot, task: None };
        }
        let rng = StdRng::seed_from_u64(self.seed ^ u64::from(target.backend.0));
        let generation = lock(&slot).generation;
        let task = self.runtime.spawn(check(
            self.common.clone(),
            target.clone(),
            slot.clone(),
            generation,
            first,
            rng,
        ));
        Running { target, slot, task: Some(task.abort_handle()) }
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        for running in lock(&self.running).values() {
            running.abort();
        }
    }
}

impl Running {
    fn abort(&self) {
        if let Some(task) = &self.task {
            task.abort();
        }
        lock(&self.slot).generation += 1;
    }
}

impl Slot {
    fn observation(&self) -> Observation {
        Observation {
            backend: self.status.backend,
            health: self.status.health,
            reason: self.status.reason.clone(),
        }
    }

    fn record(&mut self, answer: Answer, took: Duration, counts: bool, report: &Report) {
        let changed = if counts { self.counter.record(answer.success) } else { None };
        self.status.health = self.counter.health();
        self.status.reason = answer.reason;
        self.status.took = took;
        self.status.took_total += took;
        match answer.success {
            true => self.status.passed += 1,
            false => self.status.failed += 1,
        }
        // A verdict taken over from the cluster is confirmed by the first result that agrees with it.
        let confirmed = counts && !self.reported && self.status.health == verdict_of(answer.success);
        if changed.is_some() || confirmed {
            self.reported = true;
            report(self.observation());
        }
    }
}

fn verdict_of(success: bool) -> Health {
    if success { Health::Up } else { Health::Down }
}

/// The life of one backend's checks. Cancel-safe at every await: nothing is half counted, because counting and
/// reporting happen between two awaits under the slot's lock.
async fn check(
    common: Arc<Common>,
    target: Target,
    slot: Arc<Mutex<Slot>>,
    generation: u64,
    first: Duration,
    mut rng: StdRng,
) {
    let interval = Duration::from_millis(target.check.interval_ms.into());
    let mut next = Instant::now() + first;
    let mut is_first = true;
    loop {
        tokio::time::sleep_until(next).await;
        let permit = common.permits.acquire().await.expect("the semaphore is never closed");
        let asked = Instant::now();
        let answer = common.probe.ask(&target).await;
        drop(permit);
        {
            let mut slot = lock(&slot);
            if slot.generation != generation {
                return;
            }
            let counts = common.counts(&answer, asked);
            slot.record(answer, asked.elapsed(), counts, &common.report);
        }
        let wait = if is_first { spread(interval, &mut rng) } else { jittered(interval, &mut rng) };
        is_first = false;
        // From the question, not from the answer: slow answers must not make a service be checked less often.
        next = asked + wait;
    }
}

/// Somewhere in the interval, but not right after the first check.
fn spread(interval: Duration, rng: &mut StdRng) -> Duration {
    interval.mul_f64(rng.random_range(0.2..1.0))
}

fn jittered(interval: Duration, rng: &mut StdRng) -> Duration {
    interval.mul_f64(rng.random_range(1.0 - JITTER..=1.0 + JITTER))
}

/// Whether two targets are the same question at the same times.
fn asks_alike(a: &Target, b: &Target) -> bool {
    a.address == b.address && a.check == b.check
}

/// A panic while a lock is held aborts the process (see the daemon), so a poisoned lock is never seen.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panicked while it held the lock")
}

#[cfg(test)]
mod tests;
