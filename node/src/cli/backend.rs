//! `komainu backend …`

use std::time::Duration;

use komainu_proto::admin::{
    Backend, BackendAddRequest, BackendRemoveRequest, BackendSetAdminRequest, BackendSetWeightRequest,
    BackendStatus, ChangeResponse, StatusResponse,
};
use komainu_proto::domain::{self, AdminState};

use super::args::{BackendCommand, BackendName};
use super::connect::Client;
use super::output::Output;
use super::{CliError, POLL, document, look, service};
use crate::render::{json, status, time};

/// Polls in a row that must see no flow before a drain counts as done: a flow between two counters is seen by the second.
const QUIET_POLLS: u32 = 2;

/// Does what the command says.
///
/// # Errors
/// There is no such backend, or the cluster refuses the change.
pub async fn run(client: &mut Client, output: &Output, command: BackendCommand) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let change = match command {
        BackendCommand::List { service } => return list(output, look::fetch(client).await?, service),
        BackendCommand::Add { backend, address, weight } => {
            let new = domain::Backend {
                name: backend.backend,
                address: address.ip(),
                port: address.port(),
                weight,
                admin: None,
            };
            let request = BackendAddRequest { service: backend.service, backend: Some(Backend::from(&new)) };
            client.call(admin.backend_add(request)).await?
        }
        BackendCommand::Remove { backend } => {
            let request = BackendRemoveRequest { service: backend.service, backend: backend.backend };
            client.call(admin.backend_remove(request)).await?
        }
        BackendCommand::Enable { backend } => {
            let request = set_admin(&backend, AdminState::Enabled, None);
            return told(
                output,
                client.call(admin.backend_set_admin(request)).await?,
                &backend,
                "enabled",
                None,
            );
        }
        BackendCommand::Disable { backend } => {
            let request = set_admin(&backend, AdminState::Disabled, None);
            return told(
                output,
                client.call(admin.backend_set_admin(request)).await?,
                &backend,
                "disabled",
                None,
            );
        }
        BackendCommand::Drain { backend, deadline, wait } => {
            let request = set_admin(&backend, AdminState::Draining, deadline);
            let change = client.call(admin.backend_set_admin(request)).await?;
            return match wait {
                true => drained(client, output, &backend).await,
                false => told(output, change, &backend, "draining", deadline),
            };
        }
        BackendCommand::Weight { backend, weight } => {
            let request =
                BackendSetWeightRequest { service: backend.service, backend: backend.backend, weight };
            client.call(admin.backend_set_weight(request)).await?
        }
    };
    document::report(output, change, false)
}

/// What has become of a backend's administrative state, which is no part of the document: so its revision stays.
fn told(
    output: &Output,
    change: ChangeResponse,
    name: &BackendName,
    state: &str,
    deadline: Option<Duration>,
) -> Result<(), CliError> {
    let deadline_ms = deadline.map(millis);
    let text = told_in_words(&change, name, state, deadline_ms);
    let (backend, state) = (name.to_string(), state.to_owned());
    output.either(&json::AdminChange { backend, admin: state, deadline_ms, change: change.into() }, || text)
}

fn told_in_words(
    change: &ChangeResponse,
    name: &BackendName,
    state: &str,
    deadline_ms: Option<u64>,
) -> String {
    let already = if change.applied { "" } else { "already " };
    let deadline = match (state, deadline_ms) {
        ("draining", Some(ms)) => format!(", disabled in {} at the latest", time::duration(ms)),
        ("draining", None) if change.applied => ", no deadline".to_owned(),
        _ => String::new(),
    };
    format!("{name}: {already}{state}{deadline}, revision {}\n", change.revision)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn set_admin(name: &BackendName, admin: AdminState, deadline: Option<Duration>) -> BackendSetAdminRequest {
    BackendSetAdminRequest {
        service: name.service.clone(),
        backend: name.backend.clone(),
        admin: admin.to_wire(),
        drain_deadline_ms: deadline.map(millis),
    }
}

fn list(output: &Output, state: StatusResponse, only: Option<String>) -> Result<(), CliError> {
    let mut services = state.services;
    if let Some(only) = only {
        services = vec![service::find(&services, &only)?.clone()];
    }
    if output.json() {
        let backends: Vec<json::Backend> = services
            .into_iter()
            .flat_map(|s| s.backends.into_iter().map(move |b| json::Backend::new(Some(s.name.clone()), b)))
            .collect();
        return output.value(&backends, false);
    }
    let mut table = status::backend_table();
    for service in &services {
        for backend in &service.backends {
            status::backend_row(&mut table, format!("{}/{}", service.name, backend.name), backend);
        }
    }
    output.text(&table.to_string())
}

/// How a drain stands.
#[derive(Debug, PartialEq, Eq)]
enum Drain {
    /// This many flows are left; `None` when the owner can't be asked.
    Waiting(Option<u64>),
    /// The deadline has passed with this many flows left.
    Expired(u64),
    /// Somebody has ended it.
    Ended,
}

fn drain(state: &StatusResponse, name: &BackendName) -> Result<Drain, CliError> {
    let service = service::find(&state.services, &name.service)?;
    let Some(backend) = service.backends.iter().find(|b| b.name == name.backend) else {
        return Ok(Drain::Ended);
    };
    let BackendStatus { flows, admin, .. } = *backend;
    Ok(match AdminState::from_wire(admin) {
        Ok(AdminState::Draining) => Drain::Waiting(service.counters_known.then_some(flows)),
        Ok(AdminState::Disabled) => Drain::Expired(flows),
        _ => Drain::Ended,
    })
}

/// Waits until a drain is over. Survives a failover in between: the drain is replicated, and any node can be asked.
async fn drained(client: &mut Client, output: &Output, name: &BackendName) -> Result<(), CliError> {
    let mut quiet = 0;
    let mut told = None;
    loop {
        let state = look::fetch(client).await?;
        let now = drain(&state, name)?;
        if told.as_ref() != Some(&now)
            && let Drain::Waiting(flows) = &now
        {
            let left = flows.map_or_else(
                || "flows not known: the owner does not answer".to_owned(),
                |n| format!("{n} flows left"),
            );
            output.progress(&format!("{name}: draining, {left}"));
        }
        quiet = if now == Drain::Waiting(Some(0)) { quiet + 1 } else { 0 };
        let done = match &now {
            Drain::Waiting(_) if quiet < QUIET_POLLS => None,
            Drain::Waiting(_) => Some((0, false)),
            Drain::Expired(left) => Some((*left, true)),
            Drain::Ended => {
                return Err(CliError::new(format!(
                    "{name}: is no longer draining: somebody enabled or removed it; see `komainu events`"
                )));
            }
        };
        if let Some((left, expired)) = done {
            let value = serde_json::json!({ "backend": name.to_string(), "flows_left": left, "deadline_passed": expired });
            return output.either(&value, || match expired {
                true => format!(
                    "{name}: the deadline has passed with {left} flows left; the backend is disabled\n"
                ),
                false => format!("{name}: drained\n"),
            });
        }
        told = Some(now);
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use komainu_proto::admin::ServiceStatus;

    use super::*;

    fn state(admin: AdminState, flows: u64, counters_known: bool) -> StatusResponse {
        let backend =
            BackendStatus { name: "be1".into(), admin: admin.to_wire(), flows, ..Default::default() };
        let service = ServiceStatus {
            name: "web".into(),
            backends: vec![backend],
            counters_known,
            ..Default::default()
        };
        StatusResponse { services: vec![service], ..Default::default() }
    }

    /// Fault: only the revision was printed.
    #[test]
    fn a_changed_state_is_told_with_backend_deadline_and_revision() {
        let name: BackendName = "web/be1".parse().unwrap();
        let told = |applied, state, deadline| {
            let change = ChangeResponse { revision: 7, applied, ..Default::default() };
            told_in_words(&change, &name, state, deadline)
        };
        assert_eq!(told(true, "disabled", None), "web/be1: disabled, revision 7\n");
        assert_eq!(told(false, "enabled", None), "web/be1: already enabled, revision 7\n");
        assert_eq!(told(true, "draining", None), "web/be1: draining, no deadline, revision 7\n");
        let text = told(true, "draining", Some(300_000));
        assert_eq!(text, "web/be1: draining, disabled in 5 m at the latest, revision 7\n");
    }

    #[test]
    fn a_drain_is_judged_by_the_replicated_state_and_the_owners_counters() {
        let name: BackendName = "web/be1".parse().unwrap();
        let judge = |state: StatusResponse| drain(&state, &name).unwrap();
        assert_eq!(judge(state(AdminState::Draining, 3, true)), Drain::Waiting(Some(3)));
        // No flow seen because nobody looked is not the same as no flow.
        assert_eq!(judge(state(AdminState::Draining, 0, false)), Drain::Waiting(None));
        assert_eq!(judge(state(AdminState::Disabled, 2, true)), Drain::Expired(2));
        assert_eq!(judge(state(AdminState::Enabled, 0, true)), Drain::Ended);
        assert!(drain(&StatusResponse::default(), &name).is_err());
    }
}
