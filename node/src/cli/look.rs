//! Commands that only look.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::time::Duration;

use komainu_proto::admin::{
    Event, EventsRequest, FlowsRequest, StatusRequest, StatusResponse, TraceRequest, VersionRequest,
};

use super::CliError;
use super::connect::Client;
use super::output::Output;
use crate::render::table::Table;
use crate::render::{json, status as text, time};

/// Time between two pictures of `status --watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// The state of the cluster.
///
/// # Errors
/// The node doesn't answer.
pub async fn fetch(client: &mut Client) -> Result<StatusResponse, CliError> {
    let mut admin = client.admin.clone();
    client.call(admin.status(StatusRequest::default())).await
}

/// Shows the state, once or until interrupted.
///
/// # Errors
/// The node doesn't answer.
pub async fn status(client: &mut Client, output: &Output, watch: bool) -> Result<(), CliError> {
    if !watch {
        let state = fetch(client).await?;
        if output.json() {
            return output.value(&json::Status::from(state), false);
        }
        return output.text(&text::status(&state));
    }
    let mut ticks = tokio::time::interval(WATCH_EVERY);
    loop {
        ticks.tick().await;
        match fetch(client).await {
            Ok(state) if output.json() => output.value(&json::Status::from(state), true)?,
            Ok(state) => {
                // Clear the screen and go to its top left corner (ECMA-48 §8.3.39, §8.3.21).
                let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
                output.text(&format!("{clear}{}", text::status(&state)))?;
            }
            // The node may be restarting: whoever watches wants to see it come back.
            Err(CliError::Failed(lines)) => output.progress(&lines.join("\n")),
            Err(closed) => return Err(closed),
        }
    }
}

/// Lists remembered flows.
///
/// # Errors
/// There is no such service or backend, or an owner doesn't answer.
pub async fn flows(
    client: &mut Client,
    output: &Output,
    service: Option<String>,
    backend: Option<String>,
    limit: u32,
) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let mut stream = client.call(admin.flows(FlowsRequest { service, backend, limit: Some(limit) })).await?;
    let mut flows = Vec::new();
    while let Some(flow) = stream.message().await? {
        flows.push(flow);
    }
    if output.json() {
        let flows: Vec<json::Flow> = flows.into_iter().map(Into::into).collect();
        return output.value(&flows, false);
    }
    let mut table = Table::new(["SERVICE/BACKEND", "PROTOCOL", "CLIENT", "SNAT", "STATE", "IDLE", "NODE"]);
    for flow in flows {
        table.row([
            format!("{}/{}", flow.service, flow.backend),
            json::protocol(flow.protocol).to_owned(),
            flow.client,
            flow.snat.unwrap_or_else(|| "-".to_owned()),
            flow.state,
            time::duration(flow.idle_ms),
            flow.node,
        ]);
    }
    output.text(&table.to_string())
}

/// Says where a flow would go.
///
/// # Errors
/// There is no such service, or the owner doesn't answer.
pub async fn trace(
    client: &mut Client,
    output: &Output,
    service: String,
    from: SocketAddr,
) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let request = TraceRequest { service: service.clone(), from: from.to_string() };
    let trace = client.call(admin.trace(request)).await?;
    let backend = |name: &Option<String>| name.clone().unwrap_or_else(|| "none".to_owned());
    let text = {
        let slot = trace.slot.map_or_else(String::new, |slot| format!(", slot {slot}"));
        let remembered = if trace.remembered { "remembered" } else { "not remembered" };
        format!(
            "{from} -> {service} on {}: a new flow goes to {}, an existing one to {} ({remembered}{slot})\n{}\n",
            trace.node,
            backend(&trace.new),
            backend(&trace.existing),
            trace.reason
        )
    };
    output.either(&json::Trace::from(trace), || text)
}

/// Lists events, and goes on with new ones.
///
/// # Errors
/// The node doesn't answer, or ends the stream.
pub async fn events(client: &mut Client, output: &Output, follow: bool) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let mut stream = client.call(admin.events(EventsRequest { follow, after: 0 })).await?;
    while let Some(event) = stream.message().await? {
        if output.json() {
            output.value(&json::Event::from(event), true)?;
        } else {
            output.line(&line(&event))?;
        }
    }
    if follow {
        return Err(CliError::new(
            "the node ended the stream of events; it is stopping, try another one with --node",
        ));
    }
    Ok(())
}

fn line(event: &Event) -> String {
    let subject = if event.subject.is_empty() { String::new() } else { format!("{}: ", event.subject) };
    format!("{}  {:8}  {subject}{}  [{}]", time::moment(event.at_unix_ms), event.kind, event.text, event.who)
}

/// Version of the asked node and of this program.
///
/// # Errors
/// The node doesn't answer.
pub async fn version(client: &mut Client, output: &Output) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let answer = client.call(admin.version(VersionRequest {})).await?;
    let own = env!("CARGO_PKG_VERSION");
    let value = serde_json::json!({ "client": own, "node": answer.version, "api": answer.api });
    output.either(&value, || format!("komainu {own}, node {} ({})\n", answer.version, answer.api))
}
