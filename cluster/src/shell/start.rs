//! Starting and stopping.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytes::Bytes;
use crossbeam_channel::{Sender, TrySendError};
use komainu_proto::cluster::peer_server::PeerServer;
use komainu_proto::domain::NodeId;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio_stream::wrappers::TcpListenerStream;

use super::beat::{BeatThread, Waker};
use super::client::{Client, MAX_ASK_LEN};
use super::driver::{self, Driver, Event, MAX_EVENTS};
use super::facts::Facts;
use super::handle::{Backstage, ClusterHandle, QueryError};
use super::server::PeerService;
use super::streams::Streams;
use super::view::View;
use super::wire::{self, Question};
use super::{QueryHandler, Settings, StartError, clock};
use crate::api::{Observation, SelfHealth, SharedDataPath};
use crate::core::{Config, Core, Failure, Request};
use crate::pair::Sounding;
use crate::pulse::Pulse;
use crate::seal::{KeyError, Sealer};
use crate::state::Outcome;
use crate::store::{self, Store};

/// How long answers that are under way have at an orderly stop.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Calls under way on one connection: a stream of messages, and questions. Whoever has no key is refused only after a
/// whole message has come in.
const MAX_CALLS: u32 = 32;
/// How often a peer's connection is tried for life, and how long that may take.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Starts the cluster layer of this node: store, sockets, threads, tasks. To be called inside a tokio runtime with at
/// least two threads, which must outlive the handle. A witness passes no data path.
///
/// # Errors
/// See [`StartError`]. Nothing is left running then.
pub fn start(
    settings: Settings,
    data_path: Option<SharedDataPath>,
    queries: Arc<dyn QueryHandler>,
) -> Result<ClusterHandle, StartError> {
    settings.timing.validate()?;
    let address = settings.identity.address;
    let socket = bind_udp(address)?;
    let listener = bind_tcp(address)?;
    let opened = store::open(&settings.data_dir)?;
    let notes: Vec<String> = opened.set_aside.iter().map(describe_set_aside).collect();
    for note in &notes {
        tracing::warn!("{note}");
    }
    start_on(settings, data_path, queries, Box::new(opened.store), notes, (socket, listener))
}

fn describe_set_aside(aside: &store::SetAside) -> String {
    match aside.reason.as_str() {
        "" => format!(
            "an earlier store was set aside as {}; remove it when it is no longer needed",
            aside.path.display()
        ),
        reason => format!(
            "the store could not be used ({reason}) and was set aside as {}: this node starts empty, as a new member",
            aside.path.display()
        ),
    }
}

fn start_on(
    settings: Settings,
    data_path: Option<SharedDataPath>,
    queries: Arc<dyn QueryHandler>,
    mut store: Box<dyn Store>,
    notes: Vec<String>,
    (socket, listener): (UdpSocket, std::net::TcpListener),
) -> Result<ClusterHandle, StartError> {
    let system = |what| move |source| StartError::System { what, source };
    let runtime = Handle::current();
    let notes = Arc::new(Mutex::new(notes));
    let config = Config {
        identity: settings.identity.clone(),
        version: settings.version.clone(),
        peers: settings.peers.clone(),
        timing: settings.timing,
        instance: random()?,
        seed: random()?,
        incarnation: random()?,
        pair: settings.pair.policy,
    };
    let restored = store.load()?;
    let core = Core::start(config, restored, clock::now())?;
    let pulse = core.pulse();
    let facts = Facts {
        identity: settings.identity.clone(),
        version: settings.version,
        peers: settings.peers,
        notes: notes.clone(),
    };
    let (view, view_receiver) = watch::channel(Arc::new(facts.view(&core)));
    let (sound, sounds) = watch::channel(false);
    let (events, event_receiver) = crossbeam_channel::bounded(MAX_EVENTS);
    let waker = Waker::new().map_err(system("making an eventfd"))?;
    let (stop, prompted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    // One sealer for datagrams and one for calls: counters of one guard should not have gaps made by the other.
    let datagrams = Arc::new(Sealer::new(&settings.secret)?);
    let calls = Arc::new(Sealer::new(&settings.secret)?);

    let (closing, mut closed) = watch::channel(false);
    let service = PeerService {
        sealer: calls.clone(),
        events: events.clone(),
        queries: queries.clone(),
        asked: Mutex::default(),
        streamed: Mutex::default(),
        closing: closed.clone(),
    };
    let listener = tokio::net::TcpListener::from_std(listener).map_err(system("listening"))?;
    let server = PeerServer::new(service)
        .max_decoding_message_size(MAX_ASK_LEN)
        .max_encoding_message_size(MAX_ASK_LEN);
    let server = runtime.spawn(async move {
        let ended = tonic::transport::Server::builder()
            .tcp_nodelay(true)
            .max_concurrent_streams(MAX_CALLS)
            .http2_keepalive_interval(Some(KEEP_ALIVE))
            .http2_keepalive_timeout(Some(KEEP_ALIVE))
            .add_service(server)
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async move {
                // An error says that the handle is gone: then it ends, too.
                let _ = closed.changed().await;
            });
        if let Err(e) = ended.await {
            tracing::error!("peer service: {e}");
        }
    });

    let will = match settings.will {
        Some(memory) => Some((memory, Sealer::new(&settings.secret)?)),
        None => None,
    };
    let beat = BeatThread {
        node: settings.identity.id,
        socket: socket.try_clone().map_err(system("the UDP socket"))?,
        waker: waker.clone(),
        pulse: pulse.clone(),
        sealer: datagrams.clone(),
        data_path,
        events: events.clone(),
        prompted: prompted.clone(),
        stop: stop.clone(),
        notes: notes.clone(),
        second_path: settings.pair.second_path.clone(),
        will,
    };
    let beat = thread::Builder::new().name("komainu-beat".to_owned()).spawn(move || beat.run());
    let beat = beat.map_err(system("starting the beat thread"))?;
    let driver = Driver {
        core,
        store,
        events: event_receiver,
        prompted,
        waker: waker.clone(),
        socket,
        sealer: datagrams,
        streams: Streams::new(runtime.clone(), settings.secret, events.clone()),
        view,
        facts: facts.clone(),
        notes,
        said: Vec::new(),
        pair: settings.pair,
        sound,
        waiting: HashMap::new(),
    };
    let raft = thread::Builder::new().name("komainu-raft".to_owned()).spawn(move || driver.run());
    let raft = match raft {
        Ok(raft) => raft,
        Err(source) => {
            stop.store(true, Ordering::Release);
            waker.wake();
            return Err(StartError::System { what: "starting the Raft thread", source });
        }
    };
    let threads = Threads { beat, raft, stop, closing, server };
    let node = Node {
        id: settings.identity.id,
        events,
        waker,
        pulse,
        client: Client::new(calls),
        queries,
        view: view_receiver.clone(),
        sounds,
        facts,
        runtime,
        threads: tokio::sync::Mutex::new(Some(threads)),
    };
    Ok(ClusterHandle::new(Arc::new(node), view_receiver, random()?))
}

fn bind_udp(address: SocketAddr) -> Result<UdpSocket, StartError> {
    let listen = |source| StartError::Listen { address, what: "UDP", source };
    let socket = UdpSocket::bind(address).map_err(listen)?;
    socket.set_nonblocking(true).map_err(listen)?;
    Ok(socket)
}

fn bind_tcp(address: SocketAddr) -> Result<std::net::TcpListener, StartError> {
    let listen = |source| StartError::Listen { address, what: "TCP", source };
    let listener = std::net::TcpListener::bind(address).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    Ok(listener)
}

fn random() -> Result<u64, KeyError> {
    getrandom::u64().map_err(|e| KeyError::Random(e.to_string()))
}

struct Threads {
    beat: JoinHandle<()>,
    raft: JoinHandle<()>,
    stop: Arc<AtomicBool>,
    closing: watch::Sender<bool>,
    server: tokio::task::JoinHandle<()>,
}

/// What the handle works on.
struct Node {
    id: NodeId,
    events: Sender<Event>,
    waker: Waker,
    pulse: Arc<Mutex<Pulse>>,
    client: Client,
    queries: Arc<dyn QueryHandler>,
    view: watch::Receiver<Arc<View>>,
    sounds: watch::Receiver<bool>,
    facts: Facts,
    runtime: Handle,
    threads: tokio::sync::Mutex<Option<Threads>>,
}

impl Node {
    fn address_of(&self, node: NodeId) -> Option<SocketAddr> {
        let configured = self.facts.peers.iter().find(|p| p.id == node).map(|p| p.address);
        configured.or_else(|| {
            let view = self.view.borrow();
            let known = view
                .members
                .iter()
                .find(|m| m.node.id == node && (m.raft_id.is_some() || m.since_beat.is_some()));
            known.map(|m| m.node.address)
        })
    }
}

impl Backstage for Node {
    fn request(&self, request: Request, answer: oneshot::Sender<Result<Outcome, Failure>>) {
        if let Err(TrySendError::Full(Event::Request(_, answer))) =
            self.events.try_send(Event::Request(request, answer))
        {
            let _ = answer.send(Err(Failure::Busy));
        }
    }

    fn force(&self, who: &str, answer: oneshot::Sender<Result<Outcome, Failure>>) {
        if let Err(TrySendError::Full(Event::Force(_, answer))) =
            self.events.try_send(Event::Force(who.to_owned(), answer))
        {
            let _ = answer.send(Err(Failure::Busy));
        }
    }

    fn sounds(&self) -> watch::Receiver<bool> {
        self.sounds.clone()
    }

    fn sounded(&self, sounding: Sounding) {
        // What does not fit is asked for again.
        let _ = self.events.try_send(Event::Sounded(sounding));
    }

    fn forward(
        &self,
        to: NodeId,
        request: Request,
    ) -> Pin<Box<dyn Future<Output = Result<Outcome, Failure>> + Send + '_>> {
        Box::pin(async move {
            let address = self.address_of(to).ok_or(Failure::NotLeader { leader: None })?;
            let question = wire::encode_question(self.id, &Question::Request(request));
            match self.client.ask(address, &question).await {
                Ok(answer) => wire::decode_result(&answer),
                Err(reason) => {
                    tracing::debug!("forwarding to node {}: {reason}", to.0);
                    Err(Failure::Lost)
                }
            }
        })
    }

    fn query(
        &self,
        to: NodeId,
        request: Bytes,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, QueryError>> + Send + '_>> {
        Box::pin(async move {
            let unreachable = |reason| QueryError::Unreachable { node: to, reason };
            if to == self.id {
                let queries = self.queries.clone();
                let answer = self.runtime.spawn_blocking(move || queries.query(to, request)).await;
                return answer.map_err(|e| unreachable(e.to_string()));
            }
            let address = self.address_of(to).ok_or(QueryError::UnknownNode(to))?;
            let question = wire::encode_question(self.id, &Question::Query(request));
            let answer = self.client.ask(address, &question).await.map_err(unreachable)?;
            wire::decode_query_answer(&answer).map_err(unreachable)
        })
    }

    // Through the Raft thread: a thread of ordinary priority that is put aside while it holds the lock would hold up
    // the beat thread. Only what does not fit goes the short way, because it is not said again.
    fn observe(&self, observations: Vec<Observation>) {
        if let Err(TrySendError::Full(Event::Observe(observations))) =
            self.events.try_send(Event::Observe(observations))
        {
            driver::observe(&self.pulse, observations);
            self.waker.wake();
        }
    }

    fn set_self_health(&self, health: SelfHealth) {
        if let Err(TrySendError::Full(Event::SelfHealth(health))) =
            self.events.try_send(Event::SelfHealth(health))
        {
            super::lock(&self.pulse).set_self_health(health);
            self.waker.wake();
        }
    }

    fn installed(&self) {
        self.waker.wake();
    }

    fn live(&self) -> View {
        let view = self.view.borrow().clone();
        self.facts.refreshed(&view, &super::lock(&self.pulse))
    }

    fn wall_ms(&self) -> u64 {
        clock::wall_ms()
    }

    fn shutdown(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move {
            let mut threads = self.threads.lock().await;
            let Some(Threads { beat, raft, stop, closing, mut server }) = threads.take() else { return };
            let (events, waker) = (self.events.clone(), self.waker.clone());
            let ended = self.runtime.spawn_blocking(move || {
                // Full: the Raft thread is alive and will take it; closed: it has ended.
                let _ = events.send(Event::Stop);
                // A panic in either has ended the process.
                let _ = raft.join();
                stop.store(true, Ordering::Release);
                waker.wake();
                let _ = beat.join();
            });
            let _ = ended.await;
            let _ = closing.send(true);
            if tokio::time::timeout(CLOSE_TIMEOUT, &mut server).await.is_err() {
                server.abort();
            }
        })
    }
}
