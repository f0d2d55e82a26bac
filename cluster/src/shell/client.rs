//! The calling side of the peer gRPC service.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use komainu_proto::cluster::peer_client::PeerClient;
use komainu_proto::cluster::{GreetRequest, Sealed};
use komainu_proto::domain::NodeId;
use tonic::transport::{Channel, Endpoint};

use crate::seal::{Kind, Sealer};
use crate::state::MAX_MEMBERS;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a connection is tried for life: a dead peer's connection must not swallow what is sent for ever.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long a sign of life may take. On a busy machine one that was up to a second late was taken for death, and with the
/// connection went what was on its way.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest question or answer: a command with a whole document, and what goes around it.
pub(super) const MAX_ASK_LEN: usize = crate::state::MAX_COMMAND_LEN + (1 << 20);
/// Connections kept: one a member, and as many again for nodes that come and go.
const MAX_CONNECTIONS: usize = 2 * MAX_MEMBERS;

/// A connection to a peer, and the session of the process at its end.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: PeerClient<Channel>,
    pub(super) session: Vec<u8>,
}

/// Asks peers. Connections are made when they are needed and kept.
pub(super) struct Client {
    sealer: Arc<Sealer>,
    connections: Mutex<HashMap<SocketAddr, Connection>>,
}

impl Client {
    pub(super) fn new(sealer: Arc<Sealer>) -> Client {
        Client { sealer, connections: Mutex::default() }
    }

    /// Asks the node at `address`. Whether an error came before or after the question was taken in is not known.
    pub(super) async fn ask(&self, address: SocketAddr, question: &[u8]) -> Result<Vec<u8>, String> {
        let known = super::lock(&self.connections).get(&address).cloned();
        if let Some(connection) = known {
            match self.ask_over(connection, question).await {
                // The process there is another one than at the greeting. It has not taken in anything.
                Err(status) if status.code() == tonic::Code::Unauthenticated => {}
                result => return result.map_err(|status| self.failed(address, &status)),
            }
        }
        let connection = connect(address).await?;
        self.keep(address, connection.clone());
        self.ask_over(connection, question).await.map_err(|status| self.failed(address, &status))
    }

    fn keep(&self, address: SocketAddr, connection: Connection) {
        let mut connections = super::lock(&self.connections);
        if connections.len() >= MAX_CONNECTIONS {
            connections.clear();
        }
        connections.insert(address, connection);
    }

    async fn ask_over(&self, mut connection: Connection, question: &[u8]) -> Result<Vec<u8>, tonic::Status> {
        let sealed = Sealed { data: self.sealer.seal(Kind::Request, &connection.session, question) };
        let answer = connection.client.ask(sealed).await?.into_inner();
        // The answer is for this process and for nobody else.
        let opened = self.sealer.open(Kind::Answer, &self.sealer.session().0, &answer.data);
        let opened = opened.map_err(|e| tonic::Status::data_loss(format!("its answer: {e}")))?;
        if opened.session.0[..] != connection.session[..] {
            return Err(tonic::Status::data_loss("its answer comes from another process"));
        }
        Ok(opened.plain)
    }

    fn failed(&self, address: SocketAddr, status: &tonic::Status) -> String {
        super::lock(&self.connections).remove(&address);
        format!("{address}: {}", status.message())
    }
}

/// Connects and greets.
pub(super) async fn connect(address: SocketAddr) -> Result<Connection, String> {
    let failed = |e: &dyn std::fmt::Display| format!("{address}: {e}");
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|e| failed(&e))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let channel = endpoint.connect().await.map_err(|e| {
        let cause = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
        failed(&cause)
    })?;
    let mut client = PeerClient::new(channel)
        .max_decoding_message_size(MAX_ASK_LEN)
        .max_encoding_message_size(MAX_ASK_LEN);
    let greeting = tokio::time::timeout(CONNECT_TIMEOUT, client.greet(GreetRequest {})).await;
    let session = match greeting {
        Ok(Ok(response)) => response.into_inner().session,
        Ok(Err(status)) => return Err(failed(&status.message())),
        Err(_) => return Err(failed(&"it does not answer")),
    };
    Ok(Connection { client, session })
}

/// Who asks, for logs.
pub(super) fn describe(node: NodeId, address: SocketAddr) -> String {
    format!("node {} at {address}", node.0)
}
