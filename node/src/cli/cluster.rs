//! `komainu switchover`, `komainu node …`

use std::time::{Duration, Instant};

use komainu_proto::admin::{
    Member, NodeForceRequest, NodeJoinRequest, NodeLeaveRequest, NodeListRequest, StatusResponse,
    SwitchoverRequest, SwitchoverResponse,
};

use super::args::NodeCommand;
use super::connect::Client;
use super::output::Output;
use super::{CliError, POLL, look};
use crate::render::{json, status};

/// Hands a group over and waits until the new owner has it.
///
/// # Errors
/// The cluster refuses, or the group has no new owner in time.
pub async fn switchover(
    client: &mut Client,
    output: &Output,
    group: String,
    to: Option<String>,
    timeout: Duration,
) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let started = Instant::now();
    let request = SwitchoverRequest { group: group.clone(), to: to.clone() };
    let wish = client.call(admin.switchover(request)).await?;
    loop {
        if let Some(owner) = arrived(&look::fetch(client).await?, &group, to.as_deref(), &wish) {
            let ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            let value = serde_json::json!({ "group": group, "from": wish.from, "to": owner, "ms": ms });
            return output.either(&value, || match (&wish.from, wish.pending) {
                (_, false) => format!("{group}: {owner} owns it already\n"),
                (Some(from), _) => format!("{group}: {from} -> {owner} in {ms} ms\n"),
                (None, _) => format!("{group}: {owner} in {ms} ms\n"),
            });
        }
        if started.elapsed() >= timeout {
            let wanted = to.map_or_else(|| "another node".to_owned(), |to| format!("node {to}"));
            return Err(CliError::new(format!(
                "{group}: {wanted} has not taken it over within {} ms; see in `komainu status` whether it is alive and fit",
                timeout.as_millis()
            )));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The owner after the hand-over, once there is one with a lease.
fn arrived(
    state: &StatusResponse,
    group: &str,
    to: Option<&str>,
    wish: &SwitchoverResponse,
) -> Option<String> {
    let group = state.groups.iter().find(|g| g.name == group)?;
    let owner = group.owner.clone()?;
    let moved = !wish.pending || group.epoch > wish.epoch;
    let wanted = to.is_none_or(|to| to == owner);
    (moved && wanted && group.lease_left_ms > 0).then_some(owner)
}

/// Does what the command says.
///
/// # Errors
/// The cluster refuses.
pub async fn node(client: &mut Client, output: &Output, command: NodeCommand) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let members = match command {
        NodeCommand::List => client.call(admin.node_list(NodeListRequest {})).await?.members,
        NodeCommand::Join { id, name, address, role } => {
            let request = NodeJoinRequest { id, name, role: role.to_wire(), address: address.to_string() };
            client.call(admin.node_join(request)).await?.members
        }
        NodeCommand::Leave { name } => {
            client.call(admin.node_leave(NodeLeaveRequest { node: name })).await?.members
        }
        NodeCommand::Force { yes } => return force(client, output, yes).await,
    };
    print(output, members)
}

/// Has the asked node go on alone, after what is risked was told.
async fn force(client: &mut Client, output: &Output, yes: bool) -> Result<(), CliError> {
    let mut admin = client.admin.clone();
    let answer = client.call(admin.node_force(NodeForceRequest { confirmed: yes })).await?;
    for risk in &answer.risks {
        output.progress(&format!("risk: {risk}"));
    }
    if !answer.forced {
        return Err(CliError::new(
            "nothing was done: make sure that the peer is dead or cut off from every client, then `komainu node force --yes`",
        ));
    }
    if output.json() {
        return print(output, answer.members);
    }
    output.text("this node goes on alone\n")
}

fn print(output: &Output, members: Vec<Member>) -> Result<(), CliError> {
    if output.json() {
        let members: Vec<json::Member> = members.into_iter().map(Into::into).collect();
        return output.value(&members, false);
    }
    output.text(&status::members(&members).to_string())
}

#[cfg(test)]
mod tests {
    use komainu_proto::admin::GroupStatus;

    use super::*;

    fn state(owner: Option<&str>, epoch: u64, lease_left_ms: u64) -> StatusResponse {
        let owner = owner.map(str::to_owned);
        let group = GroupStatus { name: "web".into(), owner, epoch, lease_left_ms, ..Default::default() };
        StatusResponse { groups: vec![group], ..Default::default() }
    }

    #[test]
    fn a_switchover_is_done_when_the_new_owner_has_a_lease() {
        let wish = SwitchoverResponse { from: Some("lb1".into()), epoch: 3, pending: true };
        let done = |state: StatusResponse, to| arrived(&state, "web", to, &wish);
        assert_eq!(done(state(Some("lb1"), 3, 50), None), None);
        assert_eq!(done(state(None, 3, 0), None), None);
        assert_eq!(done(state(Some("lb2"), 4, 0), None), None);
        assert_eq!(done(state(Some("lb2"), 4, 50), None), Some("lb2".to_owned()));
        assert_eq!(done(state(Some("lb2"), 4, 50), Some("lb3")), None);
    }

    #[test]
    fn a_switchover_to_the_owner_is_done_at_once() {
        let wish = SwitchoverResponse { from: Some("lb1".into()), epoch: 3, pending: false };
        assert_eq!(arrived(&state(Some("lb1"), 3, 50), "web", Some("lb1"), &wish), Some("lb1".to_owned()));
    }
}
