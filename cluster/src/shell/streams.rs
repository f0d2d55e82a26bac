//! Raft messages to peers over gRPC: one stream a member, opened ahead and kept open, each message in pieces.
//!
//! Nothing is sent twice and nothing is kept: when a stream breaks, what was on its way is lost, the Raft thread is told,
//! and Raft finds out by itself from where to go on.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use crossbeam_channel::Sender;
use komainu_proto::cluster::{Piece, Sealed};
use komainu_proto::domain::NodeId;
use prost::Message as _;
use prost_raft::Message as _;
use raft::eraftpb::Message;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::client::{Connection, connect, describe};
use super::driver::Event;
use crate::seal::{Key, Kind, Sealer};

/// Messages waiting for one peer. Raft itself has at most 64 with entries on their way.
const MAX_QUEUED: usize = 256;
/// Bytes of a message in one piece: big enough to cost little, small enough for gRPC's default limit of 4 MiB.
const PIECE_LEN: usize = 512 << 10;
/// Pieces waiting in the transport: what a slow peer may hold back in memory.
const MAX_PIECES: usize = 8;
/// How long a piece may wait for the transport before the stream is given up.
const STALL: Duration = Duration::from_secs(5);
/// How long to wait before a peer that could not be reached is tried again: a fraction of what an operator notices, and
/// not a busy loop.
const BACKOFF: Duration = Duration::from_millis(100);
/// The same at most, while there is nothing to send.
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// The outgoing streams of a node.
pub(super) struct Streams {
    runtime: Handle,
    key: Key,
    events: Sender<Event>,
    queues: HashMap<NodeId, (SocketAddr, mpsc::Sender<Message>)>,
}

impl Streams {
    pub(super) fn new(runtime: Handle, key: Key, events: Sender<Event>) -> Streams {
        Streams { runtime, key, events, queues: HashMap::new() }
    }

    /// Connects to these nodes ahead of the first message, and drops what leads to others: a change of leader must not wait
    /// for a connection.
    pub(super) fn keep(&mut self, nodes: &[(NodeId, SocketAddr)]) {
        self.queues.retain(|node, _| nodes.iter().any(|(id, _)| id == node));
        for &(to, address) in nodes {
            self.queue(to, address);
        }
    }

    /// Hands a message over for sending. False when the peer's queue is full.
    pub(super) fn send(&mut self, to: NodeId, address: SocketAddr, message: Message) -> bool {
        self.queue(to, address).try_send(message).is_ok()
    }

    fn queue(&mut self, to: NodeId, address: SocketAddr) -> &mpsc::Sender<Message> {
        if self.queues.get(&to).is_some_and(|(at, queue)| *at != address || queue.is_closed()) {
            self.queues.remove(&to);
        }
        let (_, queue) = self.queues.entry(to).or_insert_with(|| {
            let (queue, messages) = mpsc::channel(MAX_QUEUED);
            let stream = Stream { to, address, key: self.key.clone(), messages, events: self.events.clone() };
            self.runtime.spawn(stream.run());
            (address, queue)
        });
        queue
    }
}

/// The task that serves one peer. Ends when the queue is closed.
struct Stream {
    to: NodeId,
    address: SocketAddr,
    key: Key,
    messages: mpsc::Receiver<Message>,
    events: Sender<Event>,
}

impl Stream {
    async fn run(mut self) {
        let mut said = false;
        let mut first: Option<Message> = None;
        let mut pause = BACKOFF;
        loop {
            let mut lost = first.is_some();
            let reason = match connect(self.address).await {
                Ok(connection) => {
                    pause = BACKOFF;
                    lost = true;
                    match self.serve(connection, first.take()).await {
                        Ok(()) => return,
                        Err(reason) => reason,
                    }
                }
                Err(reason) => reason,
            };
            // What waits is older than what Raft will want to send when it has looked again.
            while self.messages.try_recv().is_ok() {
                lost = true;
            }
            let who = describe(self.to, self.address);
            if lost && !std::mem::replace(&mut said, true) {
                tracing::info!("messages to {who}: {reason}");
            } else {
                tracing::debug!("messages to {who}: {reason}");
            }
            if lost {
                let _ = self.events.try_send(Event::Unreachable(self.to));
            }
            tokio::time::sleep(BACKOFF).await;
            // Nothing to send: a node that is away for long need not be asked for all the time.
            let waiting = tokio::time::timeout(pause.saturating_sub(BACKOFF), self.messages.recv()).await;
            first = match waiting {
                Ok(Some(message)) => Some(message),
                Ok(None) => return,
                Err(_) => None,
            };
            pause = (pause * 2).min(MAX_BACKOFF);
        }
    }

    /// Sends messages over one stream until it breaks, or until there will be no more.
    async fn serve(&mut self, connection: Connection, first: Option<Message>) -> Result<(), String> {
        // A sealer for this stream alone: its counter numbers the pieces.
        let sealer = Sealer::new(&self.key).map_err(|e| e.to_string())?;
        let (pieces, body) = mpsc::channel(MAX_PIECES);
        let mut client = connection.client;
        let mut call = tokio::spawn(async move { client.messages(ReceiverStream::new(body)).await });
        let mut next = first;
        loop {
            let message = match next.take() {
                Some(message) => message,
                None => tokio::select! {
                    message = self.messages.recv() => match message {
                        Some(message) => message,
                        None => return Ok(()),
                    },
                    ended = &mut call => return Err(ended_early(ended)),
                },
            };
            let bytes = message.encode_to_vec();
            let count = bytes.len().div_ceil(PIECE_LEN).max(1);
            for i in 0..count {
                let data = bytes[i * PIECE_LEN..bytes.len().min((i + 1) * PIECE_LEN)].to_vec();
                let piece = Piece { data, last: i + 1 == count }.encode_to_vec();
                let sealed = Sealed { data: sealer.seal(Kind::Stream, &connection.session, &piece) };
                tokio::select! {
                    sent = tokio::time::timeout(STALL, pieces.send(sealed)) => match sent {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return Err("the stream was closed".to_owned()),
                        Err(_) => return Err(format!("nothing was taken for {} s", STALL.as_secs())),
                    },
                    ended = &mut call => return Err(ended_early(ended)),
                }
            }
        }
    }
}

type Ended = Result<
    Result<tonic::Response<komainu_proto::cluster::MessagesResponse>, tonic::Status>,
    tokio::task::JoinError,
>;

fn ended_early(ended: Ended) -> String {
    match ended {
        Ok(Ok(_)) => "the stream was closed".to_owned(),
        Ok(Err(status)) => status.message().to_owned(),
        Err(e) => e.to_string(),
    }
}
