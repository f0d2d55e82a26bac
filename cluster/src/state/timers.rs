//! What becomes due with time: deadlines of drains, ends of transitions, confirmations that did not come.
//!
//! The replicated state holds durations. Every node measures them on its own monotonic clock from the moment it applied
//! the change, so that a new leader goes on where the old one stopped and no wall clock can end a drain. Only after a
//! restart, when that moment is lost, is what has passed estimated from the wall clock, and then clamped: a clock set
//! back restarts the duration, a clock set forward ends it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use komainu_proto::domain::{BackendId, ServiceId};

use super::{Change, State};
use crate::time::Instant;

/// How long to wait before a change that is due, was proposed and has not shown up in the state is asked for again.
const REPEAT: Duration = Duration::from_secs(1);

/// What is running, by the index that began it: a new run of the same thing is another key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Drain(BackendId, u64),
    Settle(ServiceId, u64),
    Confirm(u64),
}

/// What is due, and when to look again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Due {
    /// For the leader to propose now. Others ignore it.
    pub changes: Vec<Change>,
    /// The next moment at which something may be due; absent: only a change of the state can make it so.
    pub next: Option<Instant>,
}

/// Measures the durations in the state. Every node keeps one, so that whoever becomes the leader knows.
#[derive(Clone, Debug, Default)]
pub struct Timers {
    running: BTreeMap<Key, Running>,
}

#[derive(Clone, Copy, Debug)]
struct Running {
    due: Instant,
    asked: Option<Instant>,
}

impl Timers {
    /// Timers of a node that knows nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at the state. To be called after every change of it and at [`Due::next`].
    ///
    /// `restored_wall_ms` is the wall clock (ms since 1970) when the state came from disk or from a snapshot: what is
    /// seen for the first time began earlier. Absent when the state changed by the log: it begins now.
    pub fn observe(&mut self, state: &State, now: Instant, restored_wall_ms: Option<u64>) -> Due {
        let current = runs(state);
        let keys: BTreeSet<Key> = current.iter().map(|run| run.key).collect();
        self.running.retain(|key, _| keys.contains(key));
        let mut due = Due::default();
        for Run { key, since_ms, lasts_ms, blocked, change } in current {
            let run = self.running.entry(key).or_insert_with(|| {
                let passed_ms = restored_wall_ms.map_or(0, |wall_ms| wall_ms.saturating_sub(since_ms));
                Running {
                    due: now.after(Duration::from_millis(lasts_ms.saturating_sub(passed_ms))),
                    asked: None,
                }
            });
            if blocked {
                continue;
            }
            let wait_until = run.asked.map_or(run.due, |asked| asked.after(REPEAT));
            if now >= wait_until {
                run.asked = Some(now);
                due.changes.push(change);
                due.next = earlier(due.next, now.after(REPEAT));
            } else {
                due.next = earlier(due.next, wait_until);
            }
        }
        due
    }

    /// How much of a backend's drain deadline is left; absent when it has none or isn't draining.
    pub fn drain_left(&self, state: &State, backend: BackendId, now: Instant) -> Option<Duration> {
        let drain = state.backend(backend)?.1.drain?;
        self.running.get(&Key::Drain(backend, drain.started_index)).map(|run| run.due.since(now))
    }
}

fn earlier(a: Option<Instant>, b: Instant) -> Option<Instant> {
    Some(a.map_or(b, |a| a.min(b)))
}

/// Something with a duration in the state.
struct Run {
    key: Key,
    /// Wall clock of its beginning, ms since 1970.
    since_ms: u64,
    lasts_ms: u64,
    /// Time passes for it, but it must not end yet.
    blocked: bool,
    /// What it ends in.
    change: Change,
}

fn runs(state: &State) -> Vec<Run> {
    let mut out = Vec::new();
    if let Some(p) = &state.pending {
        out.push(Run {
            key: Key::Confirm(p.started_index),
            since_ms: p.started_ms,
            lasts_ms: p.within_ms,
            blocked: false,
            change: Change::Rollback { revision: p.revision },
        });
    }
    for service in &state.services {
        let mut deadline_open = false;
        for backend in service.living() {
            let Some((drain, lasts_ms)) = backend.drain.and_then(|d| Some((d, d.deadline_ms?))) else {
                continue;
            };
            deadline_open = true;
            out.push(Run {
                key: Key::Drain(backend.id, drain.started_index),
                since_ms: drain.started_ms,
                lasts_ms,
                blocked: false,
                change: Change::DrainExpired { backend: backend.id, started_index: drain.started_index },
            });
        }
        if let Some(t) = service.transition {
            out.push(Run {
                key: Key::Settle(service.id, t.changed_index),
                since_ms: t.changed_ms,
                lasts_ms: service.settle_after_ms(),
                blocked: deadline_open,
                change: Change::Settle { service: service.id, changed_index: t.changed_index },
            });
        }
    }
    out
}
