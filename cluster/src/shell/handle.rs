//! The node's hands on its cluster layer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use komainu_proto::domain::NodeId;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::View;
use crate::api::{NodeIdentity, Observation, SelfHealth};
use crate::core::{Failure, Request};
use crate::pair::Sounding;
use crate::state::{Change, Command, MAX_COMMAND_LEN, Outcome, ProposalId, Refusal};

/// How long a proposal is tried before it is given up: several failovers fit.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait before a proposal is tried again: half an election.
const RETRY: Duration = Duration::from_millis(60);
/// How long a query to another node may take.
const QUERY_TIMEOUT: Duration = Duration::from_secs(3);

/// Why a change was not made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The cluster has looked at it and said no; nothing has changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is no leader, so nothing can be agreed. Nothing has changed.
    #[error(
        "the cluster has no leader: a majority of its nodes is not reachable from here; try again when it is"
    )]
    NoLeader,
    /// No answer in time. It may have been made: look at the state before trying again.
    #[error("no answer from the leader within {} s; the change may have been made: look before trying again", PROPOSE_TIMEOUT.as_secs())]
    Timeout,
    /// It can't be done as things are.
    #[error("{0}")]
    Impossible(String),
    /// This node is stopping.
    #[error("this node is stopping")]
    Stopping,
}

/// Why a query was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// Nobody has this id.
    #[error("node {}: there is no such node", .0.0)]
    UnknownNode(NodeId),
    /// It can't be reached.
    #[error("node {}: {reason}", node.0)]
    Unreachable {
        /// Which node.
        node: NodeId,
        /// Why.
        reason: String,
    },
}

/// What the handle asks the threads to do. The shell implements it; tests of callers can, too.
pub(crate) trait Backstage: Send + Sync {
    /// Makes a request of this node's own core.
    fn request(&self, request: Request, answer: oneshot::Sender<Result<Outcome, Failure>>);
    /// Makes a request of another node's core.
    fn forward(
        &self,
        to: NodeId,
        request: Request,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Outcome, Failure>> + Send + '_>>;
    /// Asks another node's query handler, or this one's.
    fn query(
        &self,
        to: NodeId,
        request: Bytes,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Bytes, QueryError>> + Send + '_>>;
    /// Has this node go on alone.
    fn force(&self, who: &str, answer: oneshot::Sender<Result<Outcome, Failure>>);
    /// Whether the service network is to be sounded.
    fn sounds(&self) -> watch::Receiver<bool>;
    /// What was found out about it.
    fn sounded(&self, sounding: Sounding);
    fn observe(&self, observations: Vec<Observation>);
    fn set_self_health(&self, health: SelfHealth);
    /// The lane has new tables.
    fn installed(&self);
    /// The view at this moment.
    fn live(&self) -> View;
    /// The wall clock, ms since 1970.
    fn wall_ms(&self) -> u64;
    /// Hands over what this node owns and leads, then stops; done when the threads have ended.
    fn shutdown(&self) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// The cluster layer of this node. Clones are handles on the same one.
#[derive(Clone)]
pub struct ClusterHandle {
    backstage: Arc<dyn Backstage>,
    view: watch::Receiver<Arc<View>>,
    session: u64,
    sequence: Arc<AtomicU64>,
}

impl std::fmt::Debug for ClusterHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterHandle").field("session", &self.session).finish_non_exhaustive()
    }
}

impl ClusterHandle {
    /// `session` is a random number of this process.
    pub(crate) fn new(backstage: Arc<dyn Backstage>, view: watch::Receiver<Arc<View>>, session: u64) -> Self {
        ClusterHandle { backstage, view, session, sequence: Arc::new(AtomicU64::new(0)) }
    }

    /// Has the cluster make a change, whoever leads it. Tried again over changes of leader, and never made twice.
    /// When this returns, the change is committed; this node's own view may follow a moment later.
    ///
    /// `who` is the operator's identity for the audit log.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose(&self, change: Change, who: &str) -> Result<Outcome, ProposeError> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let id = Some(ProposalId { session: self.session, sequence });
        let command = Command { id, who: who.to_owned(), wall_ms: self.backstage.wall_ms(), change };
        let len = command.encode().len();
        if len > MAX_COMMAND_LEN {
            let reason = format!(
                "the change is {len} bytes long and at most {MAX_COMMAND_LEN} can be replicated at once"
            );
            return Err(ProposeError::Impossible(reason));
        }
        self.request(Request::Command(Box::new(command))).await
    }

    /// Moves a group to another node, `to` or the director's choice, and returns when that is agreed; the hand-over
    /// itself shows in the view ([`crate::state::GroupState::owner`]).
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn switchover(
        &self,
        group: &str,
        to: Option<NodeId>,
        who: &str,
    ) -> Result<Outcome, ProposeError> {
        self.propose(Change::Switchover { group: group.to_owned(), to }, who).await
    }

    /// Admits a node that isn't in the leader's node file. Returns when it is a member; after [`ProposeError::Timeout`] the
    /// wish stands, whoever leads, until the node is heard or told to leave.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn join(&self, node: NodeIdentity, who: &str) -> Result<Outcome, ProposeError> {
        self.request(Request::Join { node, who: who.to_owned() }).await
    }

    /// Removes a node from the cluster; its groups are moved away first.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn leave(&self, node: NodeId, who: &str) -> Result<Outcome, ProposeError> {
        self.request(Request::Leave { node, who: who.to_owned() }).await
    }

    /// Has this node of a pair go on alone, without its peer.
    ///
    /// # Errors
    /// It is no pair, the peer is heard, or a promise to it has not run out yet.
    pub async fn force(&self, who: &str) -> Result<Outcome, ProposeError> {
        let deadline = Instant::now() + PROPOSE_TIMEOUT;
        loop {
            let (answer, result) = oneshot::channel();
            self.backstage.force(who, answer);
            match result.await.unwrap_or(Err(Failure::Lost)) {
                Ok(outcome) => return Ok(outcome),
                Err(Failure::Busy) if Instant::now() + RETRY < deadline => tokio::time::sleep(RETRY).await,
                Err(Failure::Lost) => return Err(ProposeError::Stopping),
                Err(failure) => return Err(ProposeError::Impossible(failure.to_string())),
            }
        }
    }

    /// True while this node of a pair wants to know about its peer: then the service network is to be sounded time and again,
    /// and each result told.
    pub fn sounds(&self) -> watch::Receiver<bool> {
        self.backstage.sounds()
    }

    /// Tells what was found out about the service network.
    pub fn sounded(&self, sounding: Sounding) {
        self.backstage.sounded(sounding);
    }

    /// What this node knows of the cluster. Changes with the state, the leader, and whoever comes or goes; the durations
    /// in it are as old as [`View::at`].
    pub fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    /// The view with its durations as they are now.
    pub fn live(&self) -> View {
        self.backstage.live()
    }

    /// Tells what this node's checks see: all observations at every call, or only those that changed.
    pub fn observe(&self, observations: Vec<Observation>) {
        self.backstage.observe(observations);
    }

    /// Tells what this node knows of its own fitness.
    pub fn set_self_health(&self, health: SelfHealth) {
        self.backstage.set_self_health(health);
    }

    /// Tells that [`crate::api::DataPath::installed_index`] has risen. Without the call it is noticed within a beat.
    pub fn installed(&self) {
        self.backstage.installed();
    }

    /// Asks a node's [`super::QueryHandler`], this node's own included.
    ///
    /// # Errors
    /// There is no such node, or it did not answer.
    pub async fn query(&self, node: NodeId, request: Bytes) -> Result<Bytes, QueryError> {
        match tokio::time::timeout(QUERY_TIMEOUT, self.backstage.query(node, request)).await {
            Ok(answer) => answer,
            Err(_) => {
                let reason = format!("no answer within {} s", QUERY_TIMEOUT.as_secs());
                Err(QueryError::Unreachable { node, reason })
            }
        }
    }

    /// Hands over what this node owns and leads, then stops. Returns when the threads have ended. Idempotent.
    pub async fn shutdown(&self) {
        self.backstage.shutdown().await;
    }

    async fn request(&self, request: Request) -> Result<Outcome, ProposeError> {
        let deadline = Instant::now() + PROPOSE_TIMEOUT;
        let mut last = ProposeError::NoLeader;
        let mut leader = None;
        let mut lost = false;
        loop {
            let attempt = async {
                match leader {
                    None => self.request_here(request.clone()).await,
                    Some(node) => self.backstage.forward(node, request.clone()).await,
                }
            };
            let answer = match tokio::time::timeout_at(deadline, attempt).await {
                Ok(answer) => answer,
                Err(_) => return Err(ProposeError::Timeout),
            };
            let asked = leader;
            match answer {
                Ok(outcome) => return Ok(outcome),
                Err(Failure::Refused(refusal)) => return Err(ProposeError::Refused(refusal)),
                Err(Failure::Impossible(reason)) => {
                    return match &request {
                        // Done by the leader that left before it could say so: the node that is to leave may be that leader.
                        Request::Leave { node, .. } if lost && self.is_gone(*node, deadline).await => {
                            Ok(Outcome {
                                index: self.view.borrow().state.index,
                                changed: true,
                                ..Outcome::default()
                            })
                        }
                        _ => Err(ProposeError::Impossible(reason)),
                    };
                }
                Err(Failure::NotLeader { leader: known }) => {
                    // Whoever was asked may know better; but never ask the same one twice in a row without a pause.
                    leader = known.filter(|&n| Some(n) != asked && n != self.view.borrow().node.id);
                    if leader.is_some() && asked.is_none() {
                        continue;
                    }
                    leader = None;
                }
                Err(failure @ Failure::NotFormed { .. }) => {
                    last = ProposeError::Impossible(failure.to_string());
                    leader = None;
                }
                Err(Failure::Lost) => {
                    last = ProposeError::Timeout;
                    lost = true;
                    leader = None;
                }
                Err(Failure::Busy) => leader = None,
            }
            if self.view.has_changed().is_err() {
                return Err(ProposeError::Stopping);
            }
            if Instant::now() + RETRY >= deadline {
                return Err(last);
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Whether a node is no member any more, once this node has applied what the leader has.
    async fn is_gone(&self, node: NodeId, deadline: Instant) -> bool {
        let mut view = self.view.clone();
        let gone = view.wait_for(|view| view.state.members.iter().all(|m| m.node.id != node));
        matches!(tokio::time::timeout_at(deadline, gone).await, Ok(Ok(_)))
    }

    async fn request_here(&self, request: Request) -> Result<Outcome, Failure> {
        let (answer, result) = oneshot::channel();
        self.backstage.request(request, answer);
        result.await.unwrap_or(Err(Failure::Lost))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::pin::Pin;
    use std::sync::Mutex;

    use komainu_proto::domain::Role;

    use super::super::view::Quorum;
    use super::*;
    use crate::core::Standing;
    use crate::state::{Member, State};

    type Answers = Mutex<VecDeque<Result<Outcome, Failure>>>;

    /// Threads that answer requests as the script says, whoever is asked.
    struct Script(Answers);

    impl Backstage for Script {
        fn request(&self, _: Request, answer: oneshot::Sender<Result<Outcome, Failure>>) {
            let next = self.0.lock().unwrap().pop_front().expect("the script says how often it is asked");
            answer.send(next).unwrap();
        }

        fn forward(
            &self,
            _: NodeId,
            _: Request,
        ) -> Pin<Box<dyn Future<Output = Result<Outcome, Failure>> + Send + '_>> {
            let next = self.0.lock().unwrap().pop_front().expect("the script says how often it is asked");
            Box::pin(async move { next })
        }

        fn query(
            &self,
            _: NodeId,
            _: Bytes,
        ) -> Pin<Box<dyn Future<Output = Result<Bytes, QueryError>> + Send + '_>> {
            unreachable!("nobody asks")
        }

        fn force(&self, _: &str, _: oneshot::Sender<Result<Outcome, Failure>>) {
            unreachable!("nobody asks")
        }

        fn sounds(&self) -> watch::Receiver<bool> {
            unreachable!("nobody asks")
        }

        fn sounded(&self, _: Sounding) {}

        fn observe(&self, _: Vec<Observation>) {}

        fn set_self_health(&self, _: SelfHealth) {}

        fn installed(&self) {}

        fn live(&self) -> View {
            unreachable!("nobody looks")
        }

        fn wall_ms(&self) -> u64 {
            0
        }

        fn shutdown(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
            Box::pin(async {})
        }
    }

    fn identity(id: u64) -> NodeIdentity {
        NodeIdentity {
            id: NodeId(id),
            name: format!("lb{id}"),
            role: Role::Balancer,
            address: std::net::SocketAddr::from(([127, 0, 0, 1], 7800)),
        }
    }

    /// What node 1 knows when these are members.
    fn view(members: &[u64]) -> Arc<View> {
        let member = |&id| Member { raft_id: id, node: identity(id), voter: true };
        let mut state = State::default();
        state.members = members.iter().map(member).collect();
        Arc::new(View {
            state: Arc::new(state),
            node: identity(1),
            raft_id: 1,
            leader: None,
            term: 2,
            voter: true,
            members: Vec::new(),
            leases: Vec::new(),
            quorum: Quorum::Witness,
            solo: false,
            standing: Standing::none("a test"),
            notes: Vec::new(),
            at: crate::time::Instant::default(),
        })
    }

    fn no_such_node() -> Result<Outcome, Failure> {
        Err(Failure::Impossible("node 3 is no member".to_owned()))
    }

    /// The leader was told to leave, did, and was gone before it could answer; the next one knew no such node, and the operator
    /// was told that it was impossible.
    #[tokio::test(start_paused = true)]
    async fn a_leader_that_left_before_it_could_answer_is_gone() {
        let script = Script(Mutex::new([Err(Failure::Lost), no_such_node()].into()));
        let (tell, known) = watch::channel(view(&[1, 2, 3]));
        let handle = ClusterHandle::new(Arc::new(script), known, 1);
        let leave = tokio::spawn(async move { handle.leave(NodeId(3), "somebody").await });
        // This node learns of it after it has been told.
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!leave.is_finished());
        tell.send(view(&[1, 2])).unwrap();
        assert!(leave.await.unwrap().unwrap().changed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_never_was_a_member_cannot_leave() {
        let script = Script(Mutex::new([no_such_node()].into()));
        let (_tell, known) = watch::channel(view(&[1, 2]));
        let handle = ClusterHandle::new(Arc::new(script), known, 1);
        let refused = handle.leave(NodeId(3), "somebody").await;
        assert_eq!(refused, Err(ProposeError::Impossible("node 3 is no member".to_owned())));
    }
}
