//! The calls of `komainu.admin.v1.Admin`.

use std::net::SocketAddr;
use std::pin::Pin;

use komainu_cluster::api::NodeIdentity;
use komainu_cluster::shell::{ProposeError, View};
use komainu_cluster::state::{Change, GroupState, ServiceState, State};
use komainu_proto::admin::admin_server::Admin;
use komainu_proto::admin::*;
use komainu_proto::cluster::{FlowEntry, FlowsQuery, TraceQuery, node_answer::Answer, node_query::Query};
use komainu_proto::domain::{self, BackendId, NodeId, ServiceId};
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::query::{MAX_FLOWS, ask};
use super::{Context, changes, identity, listen, refuse, status};
use crate::config::node::is_node_name;
use crate::pair;

/// Flows listed when the request gives no limit.
const DEFAULT_FLOWS: u32 = 1000;
/// Events on their way to one listener. One that reads slower than the cluster changes is waited for, and catches up from
/// the replicated events.
const EVENT_QUEUE: usize = 64;

/// The service.
pub struct Administration {
    context: Context,
    stop: watch::Receiver<bool>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Administration {
    /// Streams end when `stop` becomes true.
    pub fn new(context: Context, stop: watch::Receiver<bool>) -> Self {
        Administration { context, stop }
    }

    fn who<T>(&self, request: &Request<T>) -> String {
        identity::of(request, &self.context.cluster.view().borrow().node.name)
    }

    async fn change(&self, change: Change, who: &str) -> Result<Response<ChangeResponse>, Status> {
        Ok(Response::new(changes::response(self.context.change(change, who).await?)))
    }

    /// The revision that a caller means who named none: the one that waits.
    fn waiting(&self, revision: Option<u64>) -> Result<u64, Status> {
        revision.or_else(|| self.context.state().pending.as_ref().map(|pending| pending.revision)).ok_or_else(|| {
            Status::failed_precondition(
                "revision: nothing waits to be confirmed; it may have been confirmed or rolled back already, see `komainu history`",
            )
        })
    }
}

#[tonic::async_trait]
impl Admin for Administration {
    type FlowsStream = Answers<Flow>;
    type EventsStream = Answers<Event>;

    async fn version(&self, _: Request<VersionRequest>) -> Result<Response<VersionResponse>, Status> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(VersionResponse { version, api: "komainu.admin.v1".to_owned() }))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.context.status(request.into_inner().local_only).await))
    }

    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ChangeResponse>, Status> {
        let who = self.who(&request);
        Ok(Response::new(self.context.apply(request.into_inner(), &who).await?))
    }

    async fn confirm(&self, request: Request<ConfirmRequest>) -> Result<Response<ChangeResponse>, Status> {
        let who = self.who(&request);
        let revision = self.waiting(request.into_inner().revision)?;
        self.change(Change::Confirm { revision }, &who).await
    }

    async fn rollback(&self, request: Request<RollbackRequest>) -> Result<Response<ChangeResponse>, Status> {
        let who = self.who(&request);
        let revision = self.waiting(request.into_inner().revision)?;
        self.change(Change::Rollback { revision }, &who).await
    }

    async fn export(&self, request: Request<ExportRequest>) -> Result<Response<ExportResponse>, Status> {
        let state = self.context.state();
        let (revision, document) = match request.into_inner().revision {
            None => (state.revision, state.export()),
            Some(revision) if revision == state.revision => (revision, state.export()),
            Some(revision) => {
                let older = state.revision(revision).ok_or_else(|| {
                    let known: Vec<String> = state.history.iter().map(|r| r.revision.to_string()).collect();
                    refuse::unknown("revision", &revision.to_string(), known.iter().map(String::as_str))
                })?;
                (revision, older.document.clone())
            }
        };
        Ok(Response::new(ExportResponse { revision, document: Some(Document::from(&document)) }))
    }

    async fn history(&self, _: Request<HistoryRequest>) -> Result<Response<HistoryResponse>, Status> {
        let state = self.context.state();
        let entries = state.history.iter().rev().map(|r| HistoryEntry {
            revision: r.revision,
            at_unix_ms: r.wall_ms,
            who: r.who.clone(),
            what: r.how.clone(),
        });
        Ok(Response::new(HistoryResponse { entries: entries.collect() }))
    }

    async fn restore(&self, request: Request<RestoreRequest>) -> Result<Response<ChangeResponse>, Status> {
        let who = self.who(&request);
        Ok(Response::new(self.context.restore(request.into_inner(), &who).await?))
    }

    async fn service_add(
        &self,
        request: Request<ServiceAddRequest>,
    ) -> Result<Response<ChangeResponse>, Status> {
        let who = self.who(&request);
        let service = request
            .into_inner()
            .service
            .ok_or_else(|| refuse::argument("service", "", "is missing", "send the service to add"))?;
        let service = domain::Service::try_from(&service)
            .map_err(|error| refuse::convert(error.within(&format!("service[{}]", service.name))))?;
        self.change(Change::ServiceAdd { service }, &who).await
    }

    async fn service_remove(
        &self,
        request: Request<ServiceRemoveRequest>,
    ) -> Result<Response<ChangeResponse>, Status> {
        let who = self.who(&request);
        self.change(Change::ServiceRemove { service: request.into_inner().service }, &who).await
    }

    async fn backend_add(
        &self,
        request: Request<BackendAddRequest>,
    ) -> Result<Response<ChangeResponse>, Status> {
        let who = self.who(&request);
        let BackendAddRequest { service, backend } = request.into_inner();
        let backend = backend
            .ok_or_else(|| refuse::argument("backend", "", "is missing", "send the backend to add"))?;
        let backend = domain::Backend::try_from(&backend).map_err(|error| {
            refuse::convert(error.within(&format!("service[{service}].backend[{}]", backend.name)))
        })?;
        self.change(Change::BackendAdd { service, backend }, &who).await
    }

    async fn backend_remove(
        &self,
        request: Request<BackendRemoveRequest>,
    ) -> Result<Response<ChangeResponse>, Status> {
        let who = self.who(&request);
        let BackendRemoveRequest { service, backend } = request.into_inner();
        self.change(Change::BackendRemove { service, backend }, &who).await
    }

    async fn backend_set_admin(
        &self,
        request: Request<BackendSetAdminRequest>,
    ) -> Result<Response<ChangeResponse>, Status> {
        let who = self.who(&request);
        let BackendSetAdminRequest { service, backend, admin, drain_deadline_ms: deadline_ms } =
            request.into_inner();
        let admin = domain::AdminState::from_wire(admin).map_err(refuse::convert)?;
        self.change(Change::BackendAdmin { service, backend, admin, deadline_ms }, &who).await
    }

    async fn backend_set_weight(
        &self,
        request: Request<BackendSetWeightRequest>,
    ) -> Result<Response<ChangeResponse>, Status> {
        let who = self.who(&request);
        let BackendSetWeightRequest { service, backend, weight } = request.into_inner();
        self.change(Change::BackendWeight { service, backend, weight }, &who).await
    }

    async fn switchover(
        &self,
        request: Request<SwitchoverRequest>,
    ) -> Result<Response<SwitchoverResponse>, Status> {
        let who = self.who(&request);
        let SwitchoverRequest { group, to } = request.into_inner();
        let view = self.context.cluster.live();
        let before = group_named(&view.state, &group)?;
        let (owner, epoch) = (before.owner, before.epoch);
        let to = target(&view, owner, to.as_deref())?;
        let outcome = self.context.cluster.switchover(&group, to, &who).await.map_err(refuse::propose)?;
        if outcome.changed {
            info!(target: changes::AUDIT, who, index = outcome.index, group, "switchover");
        }
        let pending = to.is_none() || to != owner;
        let from = owner.map(|owner| status::name_of(&view, owner));
        Ok(Response::new(SwitchoverResponse { from, epoch, pending }))
    }

    async fn node_list(&self, _: Request<NodeListRequest>) -> Result<Response<NodeListResponse>, Status> {
        Ok(Response::new(NodeListResponse { members: status::members(&self.context.cluster.live()) }))
    }

    async fn node_join(
        &self,
        request: Request<NodeJoinRequest>,
    ) -> Result<Response<NodeChangeResponse>, Status> {
        let who = self.who(&request);
        let NodeJoinRequest { id, name, role, address } = request.into_inner();
        let role = domain::Role::from_wire(role).map_err(refuse::convert)?;
        let address: SocketAddr = address.parse().map_err(|_| {
            refuse::argument(
                "address",
                &address,
                "is not an address with a port",
                "write e.g. 192.0.2.4:7800",
            )
        })?;
        if !(1..=65535).contains(&id) {
            return Err(refuse::argument("id", id, "is not a node id", "give 1..=65535"));
        }
        if !is_node_name(&name) {
            let action = "give the name from the node's file: letters, digits, '-', '_' or '.'";
            return Err(refuse::argument("name", name, "is not a node name", action));
        }
        if address.ip().is_unspecified() || address.ip().is_multicast() || address.port() == 0 {
            let action = "give the node's cluster.listen, under which the other nodes reach it";
            return Err(refuse::argument("address", address, "is not the address of one node", action));
        }
        let node = NodeIdentity { id: NodeId(id), name, role, address };
        let outcome = self
            .context
            .cluster
            .join(node.clone(), &who)
            .await
            .map_err(|error| refuse::join(&node, error))?;
        info!(target: changes::AUDIT, who, index = outcome.index, node = node.name, "node join");
        self.context.see(outcome.index).await;
        Ok(Response::new(NodeChangeResponse { members: status::members(&self.context.cluster.live()) }))
    }

    async fn node_leave(
        &self,
        request: Request<NodeLeaveRequest>,
    ) -> Result<Response<NodeChangeResponse>, Status> {
        let who = self.who(&request);
        let name = request.into_inner().node;
        let node = node_named(&self.context.cluster.live(), &name)?;
        let outcome = self.context.cluster.leave(node, &who).await.map_err(refuse::propose)?;
        info!(target: changes::AUDIT, who, index = outcome.index, node = name, "node leave");
        self.context.see(outcome.index).await;
        Ok(Response::new(NodeChangeResponse { members: status::members(&self.context.cluster.live()) }))
    }

    async fn node_force(
        &self,
        request: Request<NodeForceRequest>,
    ) -> Result<Response<NodeForceResponse>, Status> {
        let who = self.who(&request);
        let view = self.context.cluster.live();
        let refuse = |reason: &str| Err(Status::failed_precondition(format!("node force: {reason}")));
        let peer = match &view.standing.peer {
            Err(reason) => return refuse(reason),
            Ok(peer) => status::name_of(&view, *peer),
        };
        if view.standing.silent.is_none() {
            return refuse(&format!(
                "{peer} is heard, or was until a moment ago: only a node whose peer is silent on every path can be forced"
            ));
        }
        let risks = pair::risks(&view, &self.context.data_dir.join("aside").display().to_string());
        let forced = request.into_inner().confirmed;
        if forced {
            let outcome = self.context.cluster.force(&who).await.map_err(|error| match error {
                ProposeError::Impossible(reason) => {
                    Status::failed_precondition(format!("node force: {reason}"))
                }
                error => refuse::propose(error),
            })?;
            warn!(target: changes::AUDIT, who, index = outcome.index, "node force");
            self.context.see(outcome.index).await;
        }
        let members = status::members(&self.context.cluster.live());
        Ok(Response::new(NodeForceResponse { members, risks, forced }))
    }

    async fn flows(&self, request: Request<FlowsRequest>) -> Result<Response<Self::FlowsStream>, Status> {
        let flows = self.context.flows(request.into_inner()).await?;
        Ok(Response::new(Box::pin(tokio_stream::iter(flows.into_iter().map(Ok)))))
    }

    async fn trace(&self, request: Request<TraceRequest>) -> Result<Response<TraceResponse>, Status> {
        Ok(Response::new(self.context.trace(request.into_inner()).await?))
    }

    async fn events(&self, request: Request<EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        let EventsRequest { follow, after } = request.into_inner();
        let (events, stream) = mpsc::channel(EVENT_QUEUE);
        let (context, stop) = (self.context.clone(), self.stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = tell_events(&context, &events, follow, after) => {}
                () = listen::stopped(stop) => {}
                () = events.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

async fn tell_events(context: &Context, to: &mpsc::Sender<Result<Event, Status>>, follow: bool, after: u64) {
    let mut view = context.cluster.view();
    let mut after = after;
    loop {
        let state = view.borrow_and_update().state.clone();
        // Events of one command come into the state together, so a log index is told whole or not at all.
        for event in state.events.iter().filter(|event| event.index > after) {
            let event = Event {
                index: event.index,
                at_unix_ms: event.wall_ms,
                who: event.who.clone(),
                kind: event.kind.as_str().to_owned(),
                subject: event.subject.clone(),
                text: event.text.clone(),
            };
            if to.send(Ok(event)).await.is_err() {
                return;
            }
        }
        after = after.max(state.index);
        if !follow || view.changed().await.is_err() {
            return;
        }
    }
}

impl Context {
    /// Remembered flows of the owners of the groups that are meant.
    async fn flows(&self, request: FlowsRequest) -> Result<Vec<Flow>, Status> {
        let FlowsRequest { service, backend, limit } = request;
        let limit = limit.unwrap_or(DEFAULT_FLOWS);
        if !(1..=MAX_FLOWS).contains(&limit) {
            return Err(refuse::argument(
                "limit",
                limit,
                "is out of range",
                &format!("give 1..={MAX_FLOWS}"),
            ));
        }
        let view = self.cluster.live();
        let state = &view.state;
        let services: Vec<&ServiceState> = match &service {
            Some(name) => vec![service_named(state, name)?],
            None => state.services.iter().map(AsRef::as_ref).collect(),
        };
        let backends: Option<Vec<BackendId>> = match &backend {
            None => None,
            Some(name) => {
                let named: Vec<BackendId> = services
                    .iter()
                    .flat_map(|s| &s.backends)
                    .filter(|b| b.config.name == *name)
                    .map(|b| b.id)
                    .collect();
                if named.is_empty() {
                    let known = services.iter().flat_map(|s| &s.backends).map(|b| b.config.name.as_str());
                    return Err(refuse::unknown("backend", name, known));
                }
                Some(named)
            }
        };
        let mut owners: Vec<NodeId> = services.iter().filter_map(|s| state.group(s.group)?.owner).collect();
        owners.sort_unstable();
        owners.dedup();
        let one = |ids: Option<&[BackendId]>| match ids {
            Some([id]) => Some(id.0),
            _ => None,
        };
        let query = FlowsQuery {
            service: service.as_ref().map(|_| services[0].id.0),
            backend: one(backends.as_deref()),
            // What is filtered here has to come whole.
            limit: if backends.as_ref().is_some_and(|b| b.len() > 1) { MAX_FLOWS } else { limit },
        };
        let mut flows = Vec::new();
        for owner in owners {
            let Answer::Flows(answer) = ask(self, owner, Query::Flows(query)).await? else { continue };
            let node = status::name_of(&view, owner);
            let wanted = answer
                .flows
                .into_iter()
                .filter(|f| backends.as_ref().is_none_or(|all| all.contains(&BackendId(f.backend))));
            flows.extend(wanted.filter_map(|f| flow(state, &node, f)));
        }
        flows.truncate(limit as usize);
        Ok(flows)
    }

    /// Where a flow would go on the owner of its service's group.
    async fn trace(&self, request: TraceRequest) -> Result<TraceResponse, Status> {
        let TraceRequest { service, from } = request;
        let client: SocketAddr = from.parse().map_err(|_| {
            refuse::argument("from", &from, "is not an address with a port", "write e.g. 198.51.100.7:40000")
        })?;
        let view = self.cluster.live();
        let found = service_named(&view.state, &service)?;
        if client.is_ipv4() != found.config.vip.is_ipv4() {
            let reason = format!("is not of the family of the VIP {}", found.config.vip);
            return Err(refuse::argument("from", &from, &reason, "give a client of the VIP's family"));
        }
        let owner = view.state.group(found.group).and_then(|group| group.owner).unwrap_or(view.node.id);
        let query = Query::Trace(TraceQuery { service: found.id.0, client: client.to_string() });
        let Answer::Trace(trace) = ask(self, owner, query).await? else {
            return Err(Status::internal("the owner answered another question; upgrade the older node"));
        };
        let name = |id: Option<u32>| {
            id.map(|id| backend_name(found, id).unwrap_or_else(|| format!("backend {id} (removed)")))
        };
        Ok(TraceResponse {
            node: status::name_of(&view, owner),
            existing: name(trace.existing),
            new: name(trace.new),
            slot: trace.slot,
            remembered: trace.remembered,
            reason: trace.reason,
        })
    }
}

/// A flow with names. `None` for one of a service that is gone meanwhile.
fn flow(state: &State, node: &str, flow: FlowEntry) -> Option<Flow> {
    let service = state.service(ServiceId(flow.service))?;
    let protocol = if flow.udp { domain::Protocol::Udp } else { domain::Protocol::Tcp };
    Some(Flow {
        service: service.config.name.clone(),
        backend: backend_name(service, flow.backend)
            .unwrap_or_else(|| format!("backend {} (removed)", flow.backend)),
        protocol: protocol.to_wire(),
        client: flow.client,
        snat: flow.snat,
        state: flow.state,
        idle_ms: flow.idle_ms,
        node: node.to_owned(),
    })
}

fn backend_name(service: &ServiceState, id: u32) -> Option<String> {
    service.backends.iter().find(|b| b.id == BackendId(id)).map(|b| b.config.name.clone())
}

fn service_named<'a>(state: &'a State, name: &str) -> Result<&'a ServiceState, Status> {
    let known = state.services.iter().map(|s| s.config.name.as_str());
    state.service_named(name).map(AsRef::as_ref).ok_or_else(|| refuse::unknown("service", name, known))
}

fn group_named<'a>(state: &'a State, name: &str) -> Result<&'a GroupState, Status> {
    let known = state.groups.iter().map(|g| g.config.name.as_str());
    state.group_named(name).map(AsRef::as_ref).ok_or_else(|| refuse::unknown("group", name, known))
}

fn node_named(view: &View, name: &str) -> Result<NodeId, Status> {
    let found = view.members.iter().find(|m| m.node.name == name).map(|m| m.node.id);
    found.ok_or_else(|| refuse::unknown("node", name, view.members.iter().map(|m| m.node.name.as_str())))
}

/// The node that a switchover goes to, if one was named. Whoever is named or would be chosen must be able to take the group.
fn target(view: &View, owner: Option<NodeId>, to: Option<&str>) -> Result<Option<NodeId>, Status> {
    let why_not = |node: NodeId| {
        let member = view.members.iter().find(|m| m.node.id == node)?;
        let name = &member.node.name;
        let health = member.health.as_ref();
        if member.node.role == domain::Role::Witness {
            Some(format!("{name} is a witness: it has no data path"))
        } else if !member.alive {
            Some(format!("{name} is silent: no beat of it arrives"))
        } else {
            health.filter(|h| !h.fit()).map(|health| format!("{name} is not fit: {}", health.reason))
        }
    };
    match to {
        Some(name) => {
            let node = node_named(view, name)?;
            match why_not(node) {
                Some(reason) => Err(Status::failed_precondition(format!(
                    "switchover: {reason}; repair it, or name another node"
                ))),
                None => Ok(Some(node)),
            }
        }
        None => {
            let others = || view.members.iter().filter(|m| Some(m.node.id) != owner);
            if others().any(|m| why_not(m.node.id).is_none()) {
                return Ok(None);
            }
            let reasons: Vec<String> = others().filter_map(|m| why_not(m.node.id)).collect();
            let reasons = if reasons.is_empty() { "there is none".to_owned() } else { reasons.join(", ") };
            Err(Status::failed_precondition(format!(
                "switchover: no other node can take the group ({reasons}); repair one first"
            )))
        }
    }
}
