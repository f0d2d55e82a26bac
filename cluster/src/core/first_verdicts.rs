//! A service's first verdicts are gathered into one command.
//!
//! Where no backend takes flows yet, the first that do become the table without a transition: no flow can be older. Backends
//! that come up one command later change a table that is in use, and a third of its slots would be in transition for the
//! service's idle time, although all were there from the start and only their checks' answers came one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use komainu_proto::domain::{AdminState, BackendId, Health, ServiceId};

use crate::api::Observation;
use crate::state::{ServiceState, State};
use crate::time::Instant;

/// How long the first verdicts of a service wait for the others. Checks of what answers are through in a few milliseconds;
/// those that time out are not worth keeping clients waiting for.
const GATHER: Duration = Duration::from_millis(300);

/// Services of which some verdicts wait, and since when.
#[derive(Debug, Default)]
pub(super) struct FirstVerdicts(BTreeMap<ServiceId, Instant>);

impl FirstVerdicts {
    /// Backends whose verdicts are to wait, out of those that are `due`.
    pub(super) fn held(
        &mut self,
        state: &State,
        due: &BTreeMap<BackendId, &Observation>,
        now: Instant,
    ) -> BTreeSet<BackendId> {
        let mut held = BTreeSet::new();
        let mut waiting = BTreeMap::new();
        for service in state.services.iter().filter(|s| begins(s)) {
            let (known, missing): (Vec<BackendId>, Vec<BackendId>) =
                unknown(service).partition(|id| due.contains_key(id));
            if known.is_empty() || missing.is_empty() {
                continue;
            }
            let since = self.0.get(&service.id).copied().unwrap_or(now);
            waiting.insert(service.id, since);
            if now.since(since) < GATHER {
                held.extend(known);
            }
        }
        self.0 = waiting;
        held
    }
}

/// Whether no backend of the service takes flows.
fn begins(service: &ServiceState) -> bool {
    service.checked() && service.backends.iter().all(|b| service.weight(b) == 0)
}

/// Backends that would take flows were they up, and of which nobody knows it yet.
fn unknown(service: &ServiceState) -> impl Iterator<Item = BackendId> + '_ {
    service
        .living()
        .filter(|b| b.admin == AdminState::Enabled && b.config.weight > 0 && b.health == Health::Unknown)
        .map(|b| b.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Change, Command, Verdict};

    const MS: u64 = 1_000_000;

    fn state() -> State {
        let document = crate::state::tests::document();
        let mut state = State::default();
        let change = Change::Apply { document, if_revision: None, confirm_within_ms: None };
        state.apply(1, &Command::own(0, change)).unwrap();
        state
    }

    fn seen(ids: &[BackendId]) -> Vec<Observation> {
        ids.iter()
            .map(|&backend| Observation { backend, health: Health::Up, reason: String::new() })
            .collect()
    }

    fn held(first: &mut FirstVerdicts, state: &State, seen: &[Observation], at_ms: u64) -> usize {
        let due = seen.iter().map(|o| (o.backend, o)).collect();
        first.held(state, &due, Instant(at_ms * MS)).len()
    }

    #[test]
    fn the_first_verdicts_wait_for_each_other_but_not_for_ever() {
        let state = state();
        let ids: Vec<BackendId> = state.services[0].backends.iter().map(|b| b.id).collect();
        let mut first = FirstVerdicts::default();
        assert_eq!(held(&mut first, &state, &seen(&ids[..1]), 0), 1);
        assert_eq!(held(&mut first, &state, &seen(&ids[..2]), 100), 2);
        assert_eq!(held(&mut first, &state, &seen(&ids), 120), 0, "all are known");

        let mut first = FirstVerdicts::default();
        assert_eq!(held(&mut first, &state, &seen(&ids[..2]), 0), 2);
        assert_eq!(held(&mut first, &state, &seen(&ids[..2]), 299), 2);
        assert_eq!(held(&mut first, &state, &seen(&ids[..2]), 300), 0, "the third may be down");
    }

    /// A service whose backends came up in two commands was at once in transition, and a third of its flows were known to
    /// the owner only.
    #[test]
    fn gathered_verdicts_open_no_transition_and_later_ones_do_not_wait() {
        let mut state = state();
        let ids: Vec<BackendId> = state.services[0].backends.iter().map(|b| b.id).collect();
        let up = |id: BackendId| Verdict { backend: id, health: Health::Up, reason: String::new() };
        let verdicts = ids[..2].iter().copied().map(up).collect();
        state.apply(2, &Command::own(0, Change::Health { verdicts })).unwrap();
        assert!(state.services[0].transition.is_none());
        assert_eq!(held(&mut FirstVerdicts::default(), &state, &seen(&ids[2..]), 0), 0);
    }
}
