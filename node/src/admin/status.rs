//! The answer to `Status`: this node's view, and the counters of each group's owner.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use komainu_cluster::shell::{MemberView, View};
use komainu_cluster::state::{BackendState, GroupState, ServiceState};
use komainu_proto::admin::{
    BackendStatus, ClusterStatus, GroupStatus, Member, NamedCount, NodeStatus, PendingConfirm, ServiceStatus,
    StatusResponse,
};
use komainu_proto::cluster::{
    BackendCounters, CountersAnswer, CountersQuery, node_answer::Answer, node_query::Query,
};
use komainu_proto::domain::{BackendId, Health, NodeId, Role, ServiceId};

use super::Context;
use super::query::{ask, millis};

/// How long another owner may take to tell its counters before status is shown without them.
const OWNER_PATIENCE: Duration = Duration::from_millis(800);

/// What the owners tell, by node.
type Told = HashMap<NodeId, CountersAnswer>;

impl Context {
    /// The state of the cluster as this node sees it.
    pub async fn status(&self, local_only: bool) -> StatusResponse {
        let view = self.cluster.live();
        let told = self.ask_owners(&view, local_only).await;
        let mut notices = view.notes.clone();
        notices.extend((self.notices)());
        notices.extend(remarks(&view));
        let counters = self.lane.as_ref().map(|lane| lane.counters()).unwrap_or_default();
        let named = |counts: &[(&'static str, u64)]| {
            counts.iter().map(|&(name, value)| NamedCount { name: name.to_owned(), value }).collect()
        };
        StatusResponse {
            node: Some(self.node(&view)),
            cluster: Some(cluster(&view)),
            groups: view.state.groups.iter().map(|g| group(g, &view, &told)).collect(),
            services: view.state.services.iter().map(|s| service(s, &view, &told)).collect(),
            drops: named(&counters.drops),
            events: named(&counters.events),
            notices,
        }
    }

    /// Counters and leases of the nodes that own something. One that doesn't answer is left out.
    async fn ask_owners(&self, view: &View, local_only: bool) -> Told {
        let mut owners: Vec<NodeId> = view.state.groups.iter().filter_map(|g| g.owner).collect();
        owners.sort_unstable();
        owners.dedup();
        owners.retain(|&owner| {
            let alive = view.members.iter().any(|m| m.node.id == owner && m.alive);
            owner == view.node.id || (alive && !local_only)
        });
        let mut asked = tokio::task::JoinSet::new();
        for owner in owners {
            let context = self.clone();
            asked.spawn(async move {
                let question = ask(&context, owner, Query::Counters(CountersQuery {}));
                match tokio::time::timeout(OWNER_PATIENCE, question).await {
                    Ok(Ok(Answer::Counters(answer))) => Some((owner, answer)),
                    _ => None,
                }
            });
        }
        asked.join_all().await.into_iter().flatten().collect()
    }

    fn node(&self, view: &View) -> NodeStatus {
        let own = view.members.iter().find(|m| m.node.id == view.node.id);
        let health = own.and_then(|m| m.health.as_ref());
        let balancer = view.node.role == Role::Balancer;
        NodeStatus {
            id: view.node.id.0,
            name: view.node.name.clone(),
            role: view.node.role.to_wire(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            lane: self.lane.as_ref().map(|lane| lane.kind().as_str().to_owned()).unwrap_or_default(),
            lane_mode: self.lane.as_ref().map(|lane| lane.mode()).unwrap_or_default(),
            lane_reason: self.lane_reason.to_string(),
            fit: balancer && health.is_some_and(|h| h.fit()),
            unfit_reason: health
                .filter(|h| balancer && !h.fit())
                .map(|h| h.reason.clone())
                .unwrap_or_default(),
        }
    }
}

fn cluster(view: &View) -> ClusterStatus {
    ClusterStatus {
        leader: view.leader.map(|leader| leader.0),
        leader_name: view.leader.map(|leader| name_of(view, leader)).unwrap_or_default(),
        term: view.term,
        quorum: view.quorum.as_str().to_owned(),
        solo: view.solo,
        solo_term: view.state.solo.as_ref().map(|solo| solo.term),
        solo_since_unix_ms: view.state.solo.as_ref().map(|solo| solo.since_ms),
        revision: view.state.revision,
        pending_confirm: view.state.pending.as_ref().map(|pending| PendingConfirm {
            revision: pending.revision,
            rollback_to: view
                .state
                .history
                .iter()
                .map(|r| r.revision)
                .filter(|&revision| revision < pending.revision)
                .max()
                .unwrap_or(0),
            left_ms: left(pending.started_ms, pending.within_ms),
        }),
        members: members(view),
    }
}

/// The members on the wire, by id.
pub fn members(view: &View) -> Vec<Member> {
    view.members.iter().map(|m| member(m, m.node.id == view.node.id)).collect()
}

fn member(member: &MemberView, own: bool) -> Member {
    let balancer = member.node.role == Role::Balancer;
    // What a dead node once said of itself is no news of it.
    let health = member.health.as_ref().filter(|_| balancer && member.alive);
    Member {
        id: member.node.id.0,
        name: member.node.name.clone(),
        role: member.node.role.to_wire(),
        alive: member.alive,
        since_beat_ms: if own { Some(0) } else { member.since_beat.map(millis) },
        address: member.node.address.to_string(),
        voter: member.voter,
        fit: health.map(|h| h.fit()),
        unfit_reason: health.filter(|h| !h.fit()).map(|h| h.reason.clone()).unwrap_or_default(),
    }
}

fn group(group: &GroupState, view: &View, told: &Told) -> GroupStatus {
    let counters = group.owner.and_then(|owner| told.get(&owner));
    let own = view
        .leases
        .iter()
        .find(|l| l.group == group.id && Some(l.node) == group.owner)
        .map(|l| millis(l.left));
    let theirs = counters.and_then(|c| c.leases.iter().find(|l| l.group == group.id.0)).map(|l| l.left_ms);
    GroupStatus {
        name: group.config.name.clone(),
        vips: group.config.vips.iter().map(ToString::to_string).collect(),
        owner: group.owner.map(|owner| name_of(view, owner)),
        epoch: group.epoch,
        // What the holder says of its own lease; else what the leader has granted.
        lease_left_ms: theirs.or(own).unwrap_or(0),
        standby_lag_flows: standby_lag(group, view, counters),
    }
}

/// Flows that the standby lacks of those that the owner remembers and the tables alone don't decide; with several standbys, the
/// one that lacks fewest. A standby that has not been told of all flows lacks them all: an upper bound of what a failover can
/// break.
fn standby_lag(group: &GroupState, view: &View, counters: Option<&CountersAnswer>) -> u64 {
    let standby = |m: &&MemberView| m.node.role == Role::Balancer && Some(m.node.id) != group.owner;
    let Some(counters) = counters.filter(|_| view.members.iter().any(|m| standby(&m))) else { return 0 };
    let of_group = |id: u32| view.state.services.iter().any(|s| s.id == ServiceId(id) && s.group == group.id);
    let remembered = counters.backends.iter().filter(|b| of_group(b.service)).map(|b| b.flows).sum();
    let alive = |node: u64| view.members.iter().filter(standby).any(|m| m.node.id.0 == node && m.alive);
    let following = counters.followers.iter().filter(|f| f.caught_up && alive(f.node));
    following.map(|f| f.lag).min().map_or(remembered, |lag| lag.min(remembered))
}

fn service(service: &ServiceState, view: &View, told: &Told) -> ServiceStatus {
    let config = &service.config;
    let group = view.state.group(service.group);
    let counters = group.and_then(|g| g.owner).and_then(|owner| told.get(&owner));
    let of = |id: BackendId| {
        let found = counters?.backends.iter().find(|b| b.service == service.id.0 && b.backend == id.0);
        // A backend that has had no packet yet may have no counter yet.
        Some(found.copied().unwrap_or_default())
    };
    ServiceStatus {
        name: config.name.clone(),
        vip: config.vip.to_string(),
        port: config.port.into(),
        protocol: config.protocol.to_wire(),
        mode: config.mode.to_wire(),
        backends: service.living().map(|b| backend(service, b, of(b.id).unwrap_or_default())).collect(),
        group: config.group.clone(),
        scheduler: config.scheduler.to_wire(),
        in_transition: service.transition.is_some(),
        counters_known: counters.is_some(),
    }
}

fn backend(service: &ServiceState, backend: &BackendState, counters: BackendCounters) -> BackendStatus {
    let deadline = backend.drain.and_then(|drain| Some((drain.started_ms, drain.deadline_ms?)));
    BackendStatus {
        name: backend.config.name.clone(),
        address: backend.config.address.to_string(),
        port: backend.config.port.into(),
        weight: backend.config.weight,
        admin: backend.admin.to_wire(),
        health: service.health(backend).to_wire(),
        flows: counters.active,
        packets: counters.packets,
        bytes: counters.bytes,
        reason: if service.checked() { backend.reason.clone() } else { "not checked".to_owned() },
        drain_left_ms: deadline.map(|(started_ms, deadline_ms)| left(started_ms, deadline_ms)),
        new_flows: counters.new_flows,
        return_packets: counters.return_packets,
        return_bytes: counters.return_bytes,
    }
}

/// What an operator should look at, a sentence each.
fn remarks(view: &View) -> Vec<String> {
    let mut remarks = Vec::new();
    if view.leader.is_none() {
        remarks.push("the cluster has no leader: nothing can be changed and leases run out".to_owned());
    }
    for member in view.members.iter().filter(|m| !m.alive) {
        remarks.push(format!("node {} is silent", member.node.name));
    }
    for group in view.state.groups.iter().filter(|g| g.owner.is_none()) {
        remarks.push(format!("group {} has no owner: its VIPs are not answered for", group.config.name));
    }
    for service in &view.state.services {
        let mut backends = service.living().peekable();
        if backends.peek().is_some() && backends.all(|b| service.health(b) == Health::Down) {
            remarks.push(format!("service {}: every backend is down", service.config.name));
        }
    }
    remarks
}

/// Name of a node; its number where it has none any more.
pub fn name_of(view: &View, node: NodeId) -> String {
    let member = view.members.iter().find(|m| m.node.id == node).map(|m| m.node.name.clone());
    member.unwrap_or_else(|| format!("node {}", node.0))
}

/// What is left of a time that began at `started_ms`, by the wall clock. For people only: the leader counts by the
/// cluster's clock.
fn left(started_ms: u64, length_ms: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis);
    (started_ms.saturating_add(length_ms)).saturating_sub(now).min(length_ms)
}
