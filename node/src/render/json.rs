//! The JSON forms of the API's answers. Names and units are a promise to scripts: fields are added, never changed.

use std::collections::BTreeMap;

use komainu_proto::convert::ConvertError;
use komainu_proto::{admin as wire, domain};
use serde::Serialize;

/// `komainu status --json`.
#[derive(Debug, Serialize)]
pub struct Status {
    node: Node,
    cluster: Cluster,
    groups: Vec<Group>,
    services: Vec<Service>,
    drops: BTreeMap<String, u64>,
    events: BTreeMap<String, u64>,
    notices: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Node {
    id: u64,
    name: String,
    role: &'static str,
    version: String,
    lane: String,
    lane_mode: String,
    lane_reason: String,
    fit: bool,
    unfit_reason: String,
}

#[derive(Debug, Serialize)]
struct Cluster {
    leader: Option<u64>,
    leader_name: Option<String>,
    term: u64,
    quorum: String,
    solo: bool,
    solo_term: Option<u64>,
    solo_since_unix_ms: Option<u64>,
    revision: u64,
    pending_confirm: Option<PendingConfirm>,
    members: Vec<Member>,
}

#[derive(Debug, Serialize)]
struct PendingConfirm {
    revision: u64,
    rollback_to: u64,
    left_ms: u64,
}

/// A member, as in `komainu node list --json`.
#[derive(Debug, Serialize)]
pub struct Member {
    id: u64,
    name: String,
    role: &'static str,
    alive: bool,
    since_beat_ms: Option<u64>,
    address: String,
    voter: bool,
    fit: Option<bool>,
    unfit_reason: String,
}

#[derive(Debug, Serialize)]
struct Group {
    name: String,
    vips: Vec<String>,
    owner: Option<String>,
    epoch: u64,
    lease_left_ms: u64,
    standby_lag_flows: u64,
}

/// A service, as in `komainu service show --json`.
#[derive(Debug, Serialize)]
pub struct Service {
    name: String,
    group: String,
    vip: String,
    port: u32,
    protocol: &'static str,
    mode: &'static str,
    scheduler: &'static str,
    in_transition: bool,
    counters_known: bool,
    backends: Vec<Backend>,
}

/// A backend, as in `komainu backend list --json`.
#[derive(Debug, Serialize)]
pub struct Backend {
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<String>,
    name: String,
    address: String,
    port: u32,
    weight: u32,
    admin: &'static str,
    health: &'static str,
    flows: u64,
    packets: u64,
    bytes: u64,
    return_packets: u64,
    return_bytes: u64,
    new_flows: u64,
    reason: String,
    drain_left_ms: Option<u64>,
}

/// A change, as printed by every command that makes one.
#[derive(Debug, Serialize)]
pub struct Change {
    revision: u64,
    applied: bool,
    diff: Vec<String>,
    confirm_within_ms: Option<u64>,
    warnings: Vec<Problem>,
}

/// What `komainu backend enable|disable|drain --json` print.
#[derive(Debug, Serialize)]
pub struct AdminChange {
    /// `service/backend`.
    pub backend: String,
    /// Its new administrative state.
    pub admin: String,
    /// After which a drain disables it.
    pub deadline_ms: Option<u64>,
    /// As every change.
    #[serde(flatten)]
    pub change: Change,
}

/// What was accepted but looks wrong.
#[derive(Debug, Serialize)]
struct Problem {
    field: String,
    value: String,
    reason: String,
    action: String,
}

/// A revision, as in `komainu history --json`.
#[derive(Debug, Serialize)]
pub struct HistoryEntry {
    revision: u64,
    at_unix_ms: u64,
    who: String,
    what: String,
}

/// A flow, as in `komainu flows --json`.
#[derive(Debug, Serialize)]
pub struct Flow {
    service: String,
    backend: String,
    protocol: &'static str,
    client: String,
    snat: Option<String>,
    state: String,
    idle_ms: u64,
    node: String,
}

/// `komainu trace --json`.
#[derive(Debug, Serialize)]
pub struct Trace {
    node: String,
    existing: Option<String>,
    new: Option<String>,
    slot: Option<u32>,
    remembered: bool,
    reason: String,
}

/// An event, as in `komainu events --json`.
#[derive(Debug, Serialize)]
pub struct Event {
    index: u64,
    at_unix_ms: u64,
    who: String,
    kind: String,
    subject: String,
    text: String,
}

/// The word for a number on the wire; `unknown` for one that a newer node has sent.
pub(super) fn word<T: Copy>(
    word: Result<T, ConvertError>,
    as_str: impl Fn(T) -> &'static str,
) -> &'static str {
    word.map_or("unknown", as_str)
}

/// The word for a protocol number.
pub fn protocol(number: i32) -> &'static str {
    word(domain::Protocol::from_wire(number), domain::Protocol::as_str)
}

/// The word for an administrative state.
pub fn admin(number: i32) -> &'static str {
    word(domain::AdminState::from_wire(number), domain::AdminState::as_str)
}

/// The word for a health.
pub fn health(number: i32) -> &'static str {
    word(domain::Health::from_wire(number), domain::Health::as_str)
}

/// The word for a mode.
pub fn mode(number: i32) -> &'static str {
    word(domain::Mode::from_wire(number), domain::Mode::as_str)
}

/// The word for a scheduler.
pub fn scheduler(number: i32) -> &'static str {
    word(domain::Scheduler::from_wire(number), domain::Scheduler::as_str)
}

/// The word for a role.
pub fn role(number: i32) -> &'static str {
    word(domain::Role::from_wire(number), domain::Role::as_str)
}

fn counts(counts: Vec<wire::NamedCount>) -> BTreeMap<String, u64> {
    counts.into_iter().map(|count| (count.name, count.value)).collect()
}

impl From<wire::StatusResponse> for Status {
    fn from(status: wire::StatusResponse) -> Self {
        let node = status.node.unwrap_or_default();
        let cluster = status.cluster.unwrap_or_default();
        Status {
            node: Node {
                id: node.id,
                name: node.name,
                role: role(node.role),
                version: node.version,
                lane: node.lane,
                lane_mode: node.lane_mode,
                lane_reason: node.lane_reason,
                fit: node.fit,
                unfit_reason: node.unfit_reason,
            },
            cluster: Cluster {
                leader: cluster.leader,
                leader_name: (!cluster.leader_name.is_empty()).then_some(cluster.leader_name),
                term: cluster.term,
                quorum: cluster.quorum,
                solo: cluster.solo,
                solo_term: cluster.solo_term,
                solo_since_unix_ms: cluster.solo_since_unix_ms,
                revision: cluster.revision,
                pending_confirm: cluster.pending_confirm.map(|pending| PendingConfirm {
                    revision: pending.revision,
                    rollback_to: pending.rollback_to,
                    left_ms: pending.left_ms,
                }),
                members: cluster.members.into_iter().map(Into::into).collect(),
            },
            groups: status
                .groups
                .into_iter()
                .map(|group| Group {
                    name: group.name,
                    vips: group.vips,
                    owner: group.owner,
                    epoch: group.epoch,
                    lease_left_ms: group.lease_left_ms,
                    standby_lag_flows: group.standby_lag_flows,
                })
                .collect(),
            services: status.services.into_iter().map(Into::into).collect(),
            drops: counts(status.drops),
            events: counts(status.events),
            notices: status.notices,
        }
    }
}

impl From<wire::Member> for Member {
    fn from(member: wire::Member) -> Self {
        Member {
            id: member.id,
            name: member.name,
            role: role(member.role),
            alive: member.alive,
            since_beat_ms: member.since_beat_ms,
            address: member.address,
            voter: member.voter,
            fit: member.fit,
            unfit_reason: member.unfit_reason,
        }
    }
}

impl From<wire::ServiceStatus> for Service {
    fn from(service: wire::ServiceStatus) -> Self {
        Service {
            name: service.name,
            group: service.group,
            vip: service.vip,
            port: service.port,
            protocol: protocol(service.protocol),
            mode: mode(service.mode),
            scheduler: scheduler(service.scheduler),
            in_transition: service.in_transition,
            counters_known: service.counters_known,
            backends: service.backends.into_iter().map(|b| Backend::new(None, b)).collect(),
        }
    }
}

impl Backend {
    /// With the name of its service where the context doesn't tell.
    pub fn new(service: Option<String>, backend: wire::BackendStatus) -> Self {
        Backend {
            service,
            name: backend.name,
            address: backend.address,
            port: backend.port,
            weight: backend.weight,
            admin: admin(backend.admin),
            health: health(backend.health),
            flows: backend.flows,
            packets: backend.packets,
            bytes: backend.bytes,
            return_packets: backend.return_packets,
            return_bytes: backend.return_bytes,
            new_flows: backend.new_flows,
            reason: backend.reason,
            drain_left_ms: backend.drain_left_ms,
        }
    }
}

impl From<wire::ChangeResponse> for Change {
    fn from(change: wire::ChangeResponse) -> Self {
        Change {
            revision: change.revision,
            applied: change.applied,
            diff: change.diff,
            confirm_within_ms: change.confirm_within_ms,
            warnings: change
                .warnings
                .into_iter()
                .map(|p| Problem { field: p.field, value: p.value, reason: p.reason, action: p.action })
                .collect(),
        }
    }
}

impl From<wire::HistoryEntry> for HistoryEntry {
    fn from(entry: wire::HistoryEntry) -> Self {
        HistoryEntry {
            revision: entry.revision,
            at_unix_ms: entry.at_unix_ms,
            who: entry.who,
            what: entry.what,
        }
    }
}

impl From<wire::Flow> for Flow {
    fn from(flow: wire::Flow) -> Self {
        Flow {
            service: flow.service,
            backend: flow.backend,
            protocol: protocol(flow.protocol),
            client: flow.client,
            snat: flow.snat,
            state: flow.state,
            idle_ms: flow.idle_ms,
            node: flow.node,
        }
    }
}

impl From<wire::TraceResponse> for Trace {
    fn from(trace: wire::TraceResponse) -> Self {
        Trace {
            node: trace.node,
            existing: trace.existing,
            new: trace.new,
            slot: trace.slot,
            remembered: trace.remembered,
            reason: trace.reason,
        }
    }
}

impl From<wire::Event> for Event {
    fn from(event: wire::Event) -> Self {
        Event {
            index: event.index,
            at_unix_ms: event.at_unix_ms,
            who: event.who,
            kind: event.kind,
            subject: event.subject,
            text: event.text,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// A status with one of everything.
    fn sample() -> wire::StatusResponse {
        let backend = wire::BackendStatus {
            name: "be1".into(),
            address: "192.0.2.11".into(),
            port: 8080,
            weight: 1,
            admin: wire::AdminState::Draining as i32,
            health: wire::Health::Up as i32,
            flows: 120,
            reason: "200 OK in 3 ms".into(),
            drain_left_ms: Some(90_000),
            ..Default::default()
        };
        let service = wire::ServiceStatus {
            name: "web".into(),
            vip: "2001:db8::100".into(),
            port: 80,
            protocol: wire::Protocol::Tcp as i32,
            mode: wire::Mode::NatTransparent as i32,
            backends: vec![backend],
            ..Default::default()
        };
        let group = wire::GroupStatus {
            name: "web".into(),
            vips: vec!["2001:db8::100".into()],
            owner: Some("lb1".into()),
            epoch: 3,
            lease_left_ms: 61,
            ..Default::default()
        };
        let member = wire::Member {
            id: 1,
            name: "lb1".into(),
            role: wire::Role::Balancer as i32,
            alive: true,
            since_beat_ms: Some(4),
            ..Default::default()
        };
        wire::StatusResponse {
            node: Some(wire::NodeStatus {
                id: 1,
                name: "lb1".into(),
                lane: "af_packet".into(),
                ..Default::default()
            }),
            cluster: Some(wire::ClusterStatus {
                leader: Some(1),
                leader_name: "lb1".into(),
                term: 7,
                quorum: "witness".into(),
                revision: 12,
                members: vec![member],
                ..Default::default()
            }),
            groups: vec![group],
            services: vec![service],
            drops: vec![wire::NamedCount { name: "no_lease".into(), value: 5 }],
            notices: vec!["look here".into()],
            ..Default::default()
        }
    }

    #[test]
    fn the_promised_fields_are_there() {
        let json = serde_json::to_value(Status::from(sample())).unwrap();
        for (object, fields) in [
            ("/node", "id name role version lane lane_mode lane_reason"),
            ("/cluster", "leader term quorum solo solo_term solo_since_unix_ms revision members"),
            ("/cluster/members/0", "id name role alive since_beat_ms"),
            ("/groups/0", "name vips owner epoch lease_left_ms standby_lag_flows"),
            ("/services/0", "name vip port protocol mode backends"),
            ("/services/0/backends/0", "name address port weight admin health flows packets bytes reason"),
        ] {
            let found =
                json.pointer(object).and_then(Value::as_object).unwrap_or_else(|| panic!("{object}: {json}"));
            for field in fields.split_whitespace() {
                assert!(found.contains_key(field), "{object} lacks {field}");
            }
        }
        assert_eq!(json.pointer("/services/0/mode"), Some(&Value::from("nat-transparent")));
        assert_eq!(json.pointer("/services/0/backends/0/admin"), Some(&Value::from("draining")));
        assert_eq!(json.pointer("/drops/no_lease"), Some(&Value::from(5)));
    }

    #[test]
    fn people_see_the_same() {
        let text = crate::render::status::status(&sample());
        for words in [
            "leader lb1",
            "quorum witness",
            "look here",
            "[2001:db8::100]:80",
            "draining (1 m 30 s left)",
            "200 OK in 3 ms",
            "no_lease 5",
            "61 ms",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}
