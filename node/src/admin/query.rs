//! What nodes ask each other's data paths: counters, flows and traces live only with a group's owner.
//!
//! The messages are `komainu.cluster.v1.NodeQuery` and `NodeAnswer`; the cluster layer carries them sealed and doesn't
//! look inside.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use komainu_cluster::flowsync::PeerStatus;
use komainu_cluster::shell::{ClusterHandle, QueryError, QueryHandler};
use komainu_packet::lane::{FlowFilter, SharedLane};
use komainu_packet::plan::Protocol;
use komainu_proto::cluster::{
    BackendCounters, CountersAnswer, CountersQuery, FlowEntry, FlowFollower, FlowsAnswer, FlowsQuery,
    GroupLease, NodeAnswer, NodeQuery, TraceAnswer, TraceQuery, node_answer::Answer, node_query::Query,
};
use komainu_proto::domain::NodeId;
use prost::Message;
use tonic::Status;

use super::{Context, Followers, refuse};

/// Most flows in one answer, as in `Lane::flows`.
pub const MAX_FLOWS: u32 = 65536;

/// Answers the other nodes' questions about this one's data path.
pub struct NodeQueries {
    lane: Option<SharedLane>,
    followers: Followers,
    cluster: OnceLock<ClusterHandle>,
}

impl NodeQueries {
    /// For a node with this data path, or none, whose flows `followers` have.
    pub fn new(lane: Option<SharedLane>, followers: Followers) -> Self {
        NodeQueries { lane, followers, cluster: OnceLock::new() }
    }

    /// Lets answers tell this node's leases. The cluster layer gets its query handler when it is started and gives its
    /// handle when it has been: hence the second step. Further calls change nothing.
    pub fn attach(&self, cluster: ClusterHandle) {
        let _ = self.cluster.set(cluster);
    }
}

impl QueryHandler for NodeQueries {
    fn query(&self, _from: NodeId, request: Bytes) -> Bytes {
        let answer = match NodeQuery::decode(request) {
            Ok(NodeQuery { query: Some(query) }) => {
                answer(self.lane.as_ref(), &self.followers, self.cluster.get(), query)
            }
            Ok(NodeQuery { query: None }) => {
                Answer::Refused("this version does not know the question".to_owned())
            }
            Err(error) => Answer::Refused(format!("the question can't be read: {error}")),
        };
        NodeAnswer { answer: Some(answer) }.encode_to_vec().into()
    }
}

fn answer(
    lane: Option<&SharedLane>,
    followers: &Followers,
    cluster: Option<&ClusterHandle>,
    query: Query,
) -> Answer {
    let Some(lane) = lane else {
        return Answer::Refused("this node is a witness: it has no data path".to_owned());
    };
    match query {
        Query::Counters(CountersQuery {}) => {
            let backends = lane.counters().backends.iter().map(counters).collect();
            let follower = |p: PeerStatus| FlowFollower {
                node: p.node.0,
                caught_up: p.caught_up,
                lag: p.lag.unwrap_or(0),
            };
            Answer::Counters(CountersAnswer {
                backends,
                leases: cluster.map(leases).unwrap_or_default(),
                followers: followers().into_iter().map(follower).collect(),
            })
        }
        Query::Flows(FlowsQuery { service, backend, limit }) => {
            let filter = FlowFilter { service, backend };
            let flows = lane.flows(&filter, limit.min(MAX_FLOWS) as usize);
            Answer::Flows(FlowsAnswer { flows: flows.into_iter().map(flow).collect() })
        }
        Query::Trace(TraceQuery { service, client }) => match client.parse::<SocketAddr>() {
            Err(_) => Answer::Refused(format!("\"{client}\" is not an address with a port")),
            Ok(client) => match lane.trace(service, client) {
                None => Answer::Refused("the data path does not have this service yet".to_owned()),
                Some(trace) => Answer::Trace(TraceAnswer {
                    existing: trace.existing,
                    new: trace.new,
                    slot: trace.slot,
                    remembered: trace.remembered,
                    reason: trace.reason,
                }),
            },
        },
    }
}

/// Leases that this node holds itself.
fn leases(cluster: &ClusterHandle) -> Vec<GroupLease> {
    let view = cluster.live();
    let own = view.leases.iter().filter(|lease| lease.node == view.node.id);
    own.map(|lease| GroupLease { group: lease.group.0, left_ms: millis(lease.left) }).collect()
}

fn counters(of: &komainu_packet::lane::BackendCounters) -> BackendCounters {
    BackendCounters {
        service: of.service,
        backend: of.backend,
        packets: of.packets,
        bytes: of.bytes,
        return_packets: of.return_packets,
        return_bytes: of.return_bytes,
        new_flows: of.new_flows,
        flows: of.flows,
        active: of.active,
    }
}

fn flow(of: komainu_packet::lane::FlowInfo) -> FlowEntry {
    FlowEntry {
        service: of.service,
        backend: of.backend,
        udp: of.protocol == Protocol::Udp,
        client: of.client.to_string(),
        snat: of.snat.map(|snat| snat.to_string()),
        state: of.state.to_owned(),
        idle_ms: millis(of.idle),
    }
}

/// Whole milliseconds.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Asks the data path of `node`: this node's own directly, another one's through the cluster layer.
///
/// # Errors
/// The node doesn't answer, or can't.
pub async fn ask(context: &Context, node: NodeId, query: Query) -> Result<Answer, Status> {
    let view = context.cluster.view();
    let (own, name) = {
        let view = view.borrow();
        let name = view.members.iter().find(|m| m.node.id == node).map(|m| m.node.name.clone());
        (view.node.id, name.unwrap_or_else(|| format!("node {}", node.0)))
    };
    let answer = if node == own {
        let (lane, cluster) = (context.lane.clone(), context.cluster.clone());
        let followers = context.followers.clone();
        // The lane answers from its own thread's tables: that may take a moment.
        tokio::task::spawn_blocking(move || answer(lane.as_ref(), &followers, Some(&cluster), query))
            .await
            .map_err(|error| Status::internal(format!("the data path's answer was lost: {error}")))?
    } else {
        let request = NodeQuery { query: Some(query) }.encode_to_vec().into();
        let bytes = context.cluster.query(node, request).await.map_err(|error| match error {
            QueryError::UnknownNode(_) => refuse::query(&error),
            QueryError::Unreachable { reason, .. } => Status::unavailable(format!(
                "{name}: {reason}; see in `komainu status` whether it is alive, and try again"
            )),
        })?;
        let unreadable =
            || Status::internal(format!("{name}: sent an answer that can't be read; upgrade this node"));
        NodeAnswer::decode(bytes).ok().and_then(|a| a.answer).ok_or_else(unreadable)?
    };
    match answer {
        Answer::Refused(reason) => Err(Status::failed_precondition(format!("{name}: {reason}"))),
        answer => Ok(answer),
    }
}
