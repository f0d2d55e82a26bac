//! The answering side of the peer gRPC service.

use std::sync::{Arc, Mutex};

use crossbeam_channel::Sender;
use komainu_proto::cluster::peer_server::Peer;
use komainu_proto::cluster::{GreetRequest, GreetResponse, MessagesResponse, Piece, Sealed};
use prost::Message as _;
use prost_raft::Message as _;
use raft::eraftpb::Message;
use tokio::sync::{oneshot, watch};
use tonic::{Request, Response, Status, Streaming};

use super::QueryHandler;
use super::driver::Event;
use super::wire::{self, Question};
use crate::core::Failure;
use crate::seal::{Kind, OpenError, ReplayGuard, Sealer, Session};

/// Longest Raft message: a snapshot of the biggest state that the limits of a document allow, several times over.
const MAX_MESSAGE_LEN: usize = 512 << 20;

/// Answers peers.
pub(super) struct PeerService {
    pub(super) sealer: Arc<Sealer>,
    pub(super) events: Sender<Event>,
    pub(super) queries: Arc<dyn QueryHandler>,
    pub(super) asked: Mutex<ReplayGuard>,
    pub(super) streamed: Mutex<ReplayGuard>,
    /// Becomes true when this node stops: streams of peers never end by themselves.
    pub(super) closing: watch::Receiver<bool>,
}

impl PeerService {
    fn context(&self) -> [u8; 16] {
        self.sealer.session().0
    }
}

/// Says nothing more than the caller can know already. [`super::client::Client`] greets again on this.
fn refused(e: OpenError) -> Status {
    Status::unauthenticated(e.to_string())
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn greet(&self, _: Request<GreetRequest>) -> Result<Response<GreetResponse>, Status> {
        Ok(Response::new(GreetResponse { session: self.context().to_vec() }))
    }

    async fn messages(
        &self,
        request: Request<Streaming<Sealed>>,
    ) -> Result<Response<MessagesResponse>, Status> {
        let mut stream = request.into_inner();
        let mut order = Order::default();
        let mut bytes = Vec::new();
        let mut closing = self.closing.clone();
        loop {
            let next = tokio::select! {
                next = stream.message() => next?,
                _ = closing.changed() => None,
            };
            let Some(sealed) = next else { break };
            let opened = self.sealer.open(Kind::Stream, &self.context(), &sealed.data).map_err(refused)?;
            if order.is_first() {
                super::lock(&self.streamed).accept(&opened).map_err(refused)?;
            }
            order.follow(opened.session, opened.counter).map_err(refused)?;
            let piece = Piece::decode(opened.plain.as_slice())
                .map_err(|e| Status::invalid_argument(e.to_string()))?;
            if bytes.len() + piece.data.len() > MAX_MESSAGE_LEN {
                return Err(Status::resource_exhausted("a message is too long"));
            }
            bytes.extend_from_slice(&piece.data);
            if piece.last {
                let message =
                    Message::decode(bytes.as_slice()).map_err(|e| Status::invalid_argument(e.to_string()))?;
                // Full while the disk is slow: lost like on a network that is slow.
                let _ = self.events.try_send(Event::Message(Box::new(message)));
                // A snapshot's memory is given back.
                bytes = Vec::new();
            }
        }
        Ok(Response::new(MessagesResponse {}))
    }

    async fn ask(&self, request: Request<Sealed>) -> Result<Response<Sealed>, Status> {
        let opened =
            self.sealer.open(Kind::Request, &self.context(), &request.into_inner().data).map_err(refused)?;
        super::lock(&self.asked).accept(&opened).map_err(refused)?;
        let (from, question) = wire::decode_question(&opened.plain).map_err(Status::invalid_argument)?;
        let answer = match question {
            Question::Request(request) => {
                let (answer, result) = oneshot::channel();
                let result = match self.events.try_send(Event::Request(request, answer)) {
                    Ok(()) => result.await.unwrap_or(Err(Failure::Lost)),
                    Err(_) => Err(Failure::Busy),
                };
                wire::encode_result(&result)
            }
            Question::Query(query) => {
                let queries = self.queries.clone();
                let answer = tokio::task::spawn_blocking(move || queries.query(from, query)).await;
                wire::encode_query_answer(
                    answer.map_err(|_| Status::internal("the query could not be answered"))?,
                )
            }
        };
        Ok(Response::new(Sealed { data: self.sealer.seal(Kind::Answer, &opened.session.0, &answer) }))
    }
}

/// The pieces of a stream: sealed by one process, numbered without gaps.
#[derive(Default)]
struct Order(Option<(Session, u64)>);

impl Order {
    fn is_first(&self) -> bool {
        self.0.is_none()
    }

    fn follow(&mut self, session: Session, counter: u64) -> Result<(), OpenError> {
        match self.0 {
            None if counter == 0 => {}
            Some((same, last)) if same == session && counter == last + 1 => {}
            _ => return Err(OpenError::Replayed),
        }
        self.0 = Some((session, counter));
        Ok(())
    }
}
