//! What the calls that change something ask of the cluster.
//!
//! The document is judged by the replicated state machine. One thing it can't know and this node can: whether the backends
//! of a `dsr` service are on a segment of this node. So a document is judged here first, with that knowledge, and what
//! is refused here never becomes a log entry.

use std::net::IpAddr;
use std::time::Duration;

use komainu_cluster::state::{self, Change, Diff, Outcome, Refusal, State, validate};
use komainu_packet::lane::SharedLane;
use komainu_proto::admin::{ApplyRequest, ChangeResponse, RestoreRequest};
use komainu_proto::domain::{Document, Mode};
use tonic::Status;
use tracing::info;

use super::{Context, refuse};

/// How long an answer waits for this node's own view to show the change, so that whoever asks the same node next sees
/// it. A node that lags further behind answers all the same.
const SEE_IT: Duration = Duration::from_secs(2);

/// Where the audit log's lines go.
pub(super) const AUDIT: &str = "komainu::audit";

impl Context {
    /// Has the cluster make a change.
    ///
    /// # Errors
    /// The change is refused, or the cluster can't agree.
    pub async fn change(&self, change: Change, who: &str) -> Result<Outcome, Status> {
        let state = self.state();
        if let Some(document) = resulting(&state, &change) {
            judge(&state, &document, self.lane.as_ref()).map_err(refuse::invalid)?;
        }
        let what = describe(&change);
        let outcome = self.cluster.propose(change, who).await.map_err(refuse::propose)?;
        if outcome.changed {
            info!(target: AUDIT, who, index = outcome.index, revision = outcome.revision, "{what}");
        }
        self.see(outcome.index).await;
        Ok(outcome)
    }

    /// Waits until this node's view has reached a log index.
    pub async fn see(&self, index: u64) {
        let mut view = self.cluster.view();
        let seen = view.wait_for(|view| view.state.index >= index);
        // Late, or stopping: the change is made either way.
        let _ = tokio::time::timeout(SEE_IT, seen).await;
    }

    /// The replicated state as this node knows it.
    pub fn state(&self) -> std::sync::Arc<State> {
        self.cluster.view().borrow().state.clone()
    }

    /// Puts a whole document in force, or says what it would change.
    ///
    /// # Errors
    /// As [`Context::change`].
    pub async fn apply(&self, request: ApplyRequest, who: &str) -> Result<ChangeResponse, Status> {
        let document = request.document.ok_or_else(|| {
            refuse::argument("document", "", "is missing", "send one; an empty one removes everything")
        })?;
        let document = Document::try_from(&document).map_err(refuse::convert)?;
        if request.dry_run {
            return self.dry_run(&document, request.if_revision);
        }
        let confirm_within_ms = request.confirm_within_ms;
        let change = Change::Apply { document, if_revision: request.if_revision, confirm_within_ms };
        let outcome = self.change(change, who).await?;
        let waits = outcome.changed;
        Ok(ChangeResponse { confirm_within_ms: confirm_within_ms.filter(|_| waits), ..response(outcome) })
    }

    /// Puts an older document in force, or says what it would change.
    ///
    /// # Errors
    /// As [`Context::change`].
    pub async fn restore(&self, request: RestoreRequest, who: &str) -> Result<ChangeResponse, Status> {
        let RestoreRequest { revision, if_revision, dry_run } = request;
        let state = self.state();
        let older = state.revision(revision).cloned();
        let known = || {
            let known: Vec<String> = state.history.iter().map(|r| r.revision.to_string()).collect();
            refuse::unknown("revision", &revision.to_string(), known.iter().map(String::as_str))
        };
        if dry_run {
            return self.dry_run(&older.ok_or_else(known)?.document, if_revision);
        }
        let change = match if_revision {
            None => Change::Restore { revision },
            // Only an apply carries the condition into the log, where it is decided.
            Some(_) => {
                let document = older.ok_or_else(known)?.document.clone();
                Change::Apply { document, if_revision, confirm_within_ms: None }
            }
        };
        Ok(response(self.change(change, who).await?))
    }

    fn dry_run(&self, document: &Document, if_revision: Option<u64>) -> Result<ChangeResponse, Status> {
        let state = self.state();
        if let Some(expected) = if_revision.filter(|&revision| revision != state.revision) {
            return Err(refuse::refused(Refusal::Revision { expected, actual: state.revision }));
        }
        judge(&state, document, self.lane.as_ref()).map_err(refuse::invalid)?;
        let diff = state.check(document).map_err(refuse::invalid)?;
        let outcome =
            Outcome { index: state.index, revision: state.revision, changed: false, diff, warnings: vec![] };
        Ok(response(outcome))
    }
}

/// A change in a few words, for the audit log.
fn describe(change: &Change) -> String {
    match change {
        Change::Apply { confirm_within_ms: Some(ms), .. } => format!("apply, to be confirmed within {ms} ms"),
        Change::Apply { .. } => "apply".to_owned(),
        Change::Confirm { revision } => format!("confirm {revision}"),
        Change::Rollback { revision } => format!("rollback {revision}"),
        Change::Restore { revision } => format!("restore {revision}"),
        Change::ServiceAdd { service } => format!("service add {}", service.name),
        Change::ServiceRemove { service } => format!("service remove {service}"),
        Change::BackendAdd { service, backend } => format!("backend add {service}/{}", backend.name),
        Change::BackendRemove { service, backend } => format!("backend remove {service}/{backend}"),
        Change::BackendWeight { service, backend, weight } => {
            format!("backend weight {service}/{backend} {weight}")
        }
        Change::BackendAdmin { service, backend, admin, deadline_ms: None } => {
            format!("{service}/{backend} {admin}")
        }
        Change::BackendAdmin { service, backend, admin, deadline_ms: Some(ms) } => {
            format!("{service}/{backend} {admin} for at most {ms} ms")
        }
        // The rest is not an operator's.
        other => format!("{other:?}"),
    }
}

/// What is told about a change.
pub fn response(outcome: Outcome) -> ChangeResponse {
    let Outcome { revision, changed, diff: Diff { lines, warnings }, warnings: more, .. } = outcome;
    let mut all: Vec<state::Problem> = warnings;
    all.extend(more.into_iter().filter(|w| !all.contains(w)).collect::<Vec<_>>());
    ChangeResponse {
        revision,
        diff: lines.iter().map(ToString::to_string).collect(),
        applied: changed,
        confirm_within_ms: None,
        warnings: all.into_iter().map(refuse::problem).collect(),
    }
}

/// Judges a document with what this node knows of its own segments.
fn judge(state: &State, document: &Document, lane: Option<&SharedLane>) -> Result<(), Vec<state::Problem>> {
    let mut context = state::Context::of(state);
    if let Some(segments) = lane.and_then(|lane| segments(lane, document)) {
        context = context.with_segments(segments);
    }
    validate(document, &context).map(|_| ())
}

/// The segments of this node, when it knows one of each family that a `dsr` service uses. An interface without an address
/// of its own tells nothing of its segment, and a link-local address (RFC 3927, RFC 4291 §2.5.6) is on every one.
fn segments(lane: &SharedLane, document: &Document) -> Option<Vec<(IpAddr, u8)>> {
    let telling = |address: &IpAddr| match address {
        IpAddr::V4(v4) => !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    };
    let mut segments: Vec<(IpAddr, u8)> = lane.links().into_iter().flat_map(|link| link.addresses).collect();
    segments.retain(|(address, _)| telling(address));
    let known = |vip: IpAddr| segments.iter().any(|(address, _)| address.is_ipv4() == vip.is_ipv4());
    let all_known = document.services.iter().filter(|s| s.mode == Mode::Dsr).all(|s| known(s.vip));
    all_known.then_some(segments)
}

/// The document that a change would put in force, for changes that bring in something new.
fn resulting(state: &State, change: &Change) -> Option<Document> {
    match change {
        Change::Apply { document, .. } => Some(document.clone()),
        Change::ServiceAdd { service } => {
            let mut document = state.document();
            document.services.push(service.clone());
            // A name that exists is the state machine's to refuse, in its own words.
            state.service_named(&service.name).is_none().then_some(document)
        }
        Change::BackendAdd { service, backend } => {
            let mut document = state.document();
            let found = document.services.iter_mut().find(|s| s.name == *service)?;
            let new = found.backends.iter().all(|b| b.name != backend.name);
            found.backends.push(backend.clone());
            new.then_some(document)
        }
        _ => None,
    }
}
