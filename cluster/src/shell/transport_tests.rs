//! The peer service and its callers over loopback: long messages, other keys, recorded traffic.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use komainu_proto::cluster::peer_server::PeerServer;
use komainu_proto::cluster::{Piece, Sealed};
use komainu_proto::domain::NodeId;
use prost::Message as _;
use raft::eraftpb::{Entry, Message};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;

use super::client::{Client, connect};
use super::driver::Event;
use super::server::PeerService;
use super::streams::Streams;
use super::wire::{self, Question};
use super::*;
use crate::seal::{Kind, Sealer};

const WAIT: Duration = Duration::from_secs(20);

struct Answering;

impl QueryHandler for Answering {
    fn query(&self, from: NodeId, request: Bytes) -> Bytes {
        Bytes::from(format!("{}:{}", from.0, request.len()))
    }
}

fn key(byte: u8) -> Key {
    Key::from_bytes([byte; 32])
}

/// A peer service with key 1, and what it takes in.
async fn serve() -> (SocketAddr, crossbeam_channel::Receiver<Event>, watch::Sender<bool>) {
    let (events, received) = crossbeam_channel::bounded(64);
    let (closing, closed) = watch::channel(false);
    let service = PeerService {
        sealer: Arc::new(Sealer::new(&key(1)).expect("randomness")),
        events,
        queries: Arc::new(Answering),
        asked: Mutex::default(),
        streamed: Mutex::default(),
        closing: closed,
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("bound");
    let server = tonic::transport::Server::builder().add_service(PeerServer::new(service));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, received, closing)
}

async fn next(received: &crossbeam_channel::Receiver<Event>) -> Event {
    let received = received.clone();
    let waiting = tokio::task::spawn_blocking(move || received.recv_timeout(WAIT));
    waiting.await.expect("no panic").expect("something arrives")
}

fn message(index: u64, len: usize) -> Message {
    let entry = Entry { index, data: (0..len).map(|i| (i % 251) as u8).collect(), ..Entry::default() };
    Message { index, entries: vec![entry], ..Message::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_any_length_arrive_whole_and_in_order() {
    let (address, received, _closing) = serve().await;
    let (events, told) = crossbeam_channel::bounded(64);
    let mut streams = Streams::new(Handle::current(), key(1), events);
    let sent: Vec<_> =
        [0, 1, 3_000_000, 512 << 10, 5].iter().zip(1..).map(|(&len, i)| message(i, len)).collect();
    let mut arrived = 0;
    for _ in 0..10 {
        for m in &sent[arrived..] {
            assert!(streams.send(NodeId(2), address, m.clone()));
        }
        // A machine that is busy enough breaks the stream. Then the sender is told, and Raft goes on from what has
        // arrived.
        while told.is_empty() && arrived < sent.len() {
            let Ok(event) = received.try_recv() else {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            };
            let Event::Message(m) = event else { panic!("only messages were sent") };
            assert!(*m == sent[arrived], "message {} arrived as {}", arrived + 1, m.index);
            arrived += 1;
        }
        if arrived == sent.len() {
            return;
        }
        while told.try_recv().is_ok() {}
        // What arrives twice says nothing about the order.
        tokio::time::sleep(Duration::from_secs(1)).await;
        while received.try_recv().is_ok_and(|e| matches!(e, Event::Message(_))) {}
    }
    panic!("{arrived} of {} messages arrived", sent.len());
}

/// The first entry after a change of leader waited for a connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_are_opened_ahead() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("bound");
    let (events, _told) = crossbeam_channel::bounded(64);
    let mut streams = Streams::new(Handle::current(), key(1), events);
    streams.keep(&[(NodeId(2), address)]);
    let connected = tokio::time::timeout(WAIT, listener.accept()).await;
    assert!(connected.is_ok_and(|c| c.is_ok()), "nobody connected");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_another_key_gets_nowhere_and_learns_nothing() {
    let (address, received, _closing) = serve().await;
    let question = wire::encode_question(NodeId(2), &Question::Query(Bytes::from_static(b"abc")));
    let client = Client::new(Arc::new(Sealer::new(&key(1)).expect("randomness")));
    let answer = client.ask(address, &question).await.expect("is answered");
    assert_eq!(wire::decode_query_answer(&answer), Ok(Bytes::from_static(b"2:3")));
    let stranger = Client::new(Arc::new(Sealer::new(&key(2)).expect("randomness")));
    let error = stranger.ask(address, &question).await.expect_err("is refused");
    assert!(error.contains("another key"), "{error}");

    let (events, told) = crossbeam_channel::bounded(64);
    let mut streams = Streams::new(Handle::current(), key(2), events);
    streams.send(NodeId(2), address, message(1, 10));
    assert!(matches!(next(&told).await, Event::Unreachable(NodeId(2))));
    assert!(received.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_recorded_can_not_be_played_back() {
    let (address, received, _closing) = serve().await;
    let mut connection = connect(address).await.expect("connects");
    let sealer = Sealer::new(&key(1)).expect("randomness");
    let question = wire::encode_question(NodeId(2), &Question::Query(Bytes::new()));
    let sealed = Sealed { data: sealer.seal(Kind::Request, &connection.session, &question) };
    connection.client.ask(sealed.clone()).await.expect("the first time");
    let again = connection.client.ask(sealed).await.expect_err("is refused");
    assert_eq!(again.message(), "it was seen before");
    // Sealed for another process: what a restart makes of everything that was recorded before.
    let old = Sealed { data: sealer.seal(Kind::Request, &[9; 16], &question) };
    assert_eq!(
        connection.client.ask(old).await.expect_err("is refused").code(),
        tonic::Code::Unauthenticated
    );

    let stream = Sealer::new(&key(1)).expect("randomness");
    let piece = |data: &[u8], last| {
        let piece = Piece { data: data.to_vec(), last }.encode_to_vec();
        Sealed { data: stream.seal(Kind::Stream, &connection.session, &piece) }
    };
    let recorded = [piece(&[], true), piece(&[], true), piece(&[], true)];
    let mut client = connection.client.clone();
    let mut play = async |pieces: Vec<Sealed>| client.messages(tokio_stream::iter(pieces)).await.map(drop);
    play(recorded.to_vec()).await.expect("the first time");
    for _ in &recorded {
        assert!(matches!(next(&received).await, Event::Message(_)));
    }
    // All of it, its end, and with a piece left out.
    for pieces in [recorded.to_vec(), recorded[1..].to_vec(), vec![recorded[0].clone(), recorded[2].clone()]]
    {
        assert_eq!(play(pieces).await.expect_err("is refused").message(), "it was seen before");
    }
    assert!(received.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_not_there_is_reported_and_found_again() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("binds");
    let (events, told) = crossbeam_channel::bounded(64);
    let mut streams = Streams::new(Handle::current(), key(1), events);
    streams.send(NodeId(2), address, message(1, 10));
    assert!(matches!(next(&told).await, Event::Unreachable(NodeId(2))));
    let (address, received, closing) = serve().await;
    streams.send(NodeId(2), address, message(2, 10));
    assert!(matches!(next(&received).await, Event::Message(m) if m.index == 2));
    // It stops: the stream ends, and the sender hears of it without sending anything.
    closing.send(true).expect("it serves");
    streams.send(NodeId(2), address, message(3, 10));
    assert!(matches!(next(&told).await, Event::Unreachable(NodeId(2))));
}
