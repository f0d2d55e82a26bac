//! The doorway of the remote administration: TCP in, verified TLS out.
//!
//! tonic could do the handshakes, but it tells nobody of those that fail, and who was turned away from the administration
//! belongs into the log.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tracing::warn;

use super::changes::AUDIT;
use crate::config::files;
use crate::config::node::RemoteAdmin;

/// gRPC is HTTP/2 (RFC 9113 §3.2).
const ALPN: &[u8] = b"h2";
/// Time that a client has for its handshake: a few round trips to anywhere, and a slow machine.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at a time, which bounds what strangers can make this node hold. Further clients wait in the kernel's backlog.
const MAX_HANDSHAKES: usize = 64;
/// Pause after the system refused a connection, most likely for want of descriptors: it would refuse the next as well.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);
/// Refusals told in one [`REFUSALS_WINDOW`]; the rest is told as a number. Whoever can reach the port could fill the log.
const MAX_REFUSALS_TOLD: u32 = 20;
/// See [`MAX_REFUSALS_TOLD`].
const REFUSALS_WINDOW: Duration = Duration::from_secs(10);

/// What comes through: clients whose certificate is verified.
pub type Incoming = ReceiverStream<io::Result<TlsStream<TcpStream>>>;

/// The listener, open, and what clients must prove.
pub struct Doorway {
    listener: std::net::TcpListener,
    acceptor: TlsAcceptor,
}

impl Doorway {
    /// Reads the certificates and opens the listener.
    ///
    /// # Errors
    /// In words with what to do: a file is unusable, key and certificate don't belong together, or the address is taken.
    pub fn open(remote: &RemoteAdmin) -> Result<Self, String> {
        let config = server_config(remote)?;
        let listen = || {
            let listener = std::net::TcpListener::bind(remote.listen)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = listen().map_err(|error: io::Error| {
            format!("can't be listened on: {error}; is the address one of this machine, and free?")
        })?;
        Ok(Doorway { listener, acceptor: TlsAcceptor::from(Arc::new(config)) })
    }

    /// Lets clients in until the receiver is dropped.
    ///
    /// # Errors
    /// The listener can't be watched for clients.
    pub fn incoming(self) -> io::Result<Incoming> {
        let listener = TcpListener::from_std(self.listener)?;
        // The server takes them at once.
        let (through, incoming) = mpsc::channel(1);
        tokio::spawn(receive(listener, self.acceptor, through));
        Ok(ReceiverStream::new(incoming))
    }
}

/// Cancel-safe throughout; dropping the set ends the handshakes under way.
async fn receive(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    through: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
) {
    let mut handshakes: JoinSet<(SocketAddr, Result<TlsStream<TcpStream>, String>)> = JoinSet::new();
    let mut refusals = Refusals::default();
    loop {
        tokio::select! {
            () = through.closed() => return,
            Some(done) = handshakes.join_next() => match done {
                Ok((_, Ok(stream))) => {
                    if through.send(Ok(stream)).await.is_err() {
                        return;
                    }
                }
                Ok((peer, Err(reason))) => refusals.tell(peer, &reason),
                // A panic ends the process.
                Err(_) => {}
            },
            accepted = listener.accept(), if handshakes.len() < MAX_HANDSHAKES => match accepted {
                Ok((stream, peer)) => {
                    let acceptor = acceptor.clone();
                    handshakes.spawn(async move { (peer, handshake(acceptor, stream).await) });
                }
                Err(error) => {
                    warn!(target: AUDIT, %error, "a client of the remote administration can't be accepted");
                    tokio::time::sleep(REFUSED_PAUSE).await;
                }
            },
        }
    }
}

async fn handshake(acceptor: TlsAcceptor, stream: TcpStream) -> Result<TlsStream<TcpStream>, String> {
    // Only a matter of speed.
    let _ = stream.set_nodelay(true);
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(in_words(&error)),
        Err(_) => Err(format!("no handshake within {} s", HANDSHAKE_TIMEOUT.as_secs())),
    }
}

/// Why a handshake failed, as an operator would say it.
fn in_words(error: &io::Error) -> String {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => "it left before the handshake was done".to_owned(),
            _ => error.to_string(),
        };
    };
    match tls {
        rustls::Error::NoCertificatesPresented => "it showed no certificate".to_owned(),
        rustls::Error::InvalidCertificate(
            // An authority of the same name with another key shows as a signature that is wrong.
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "its certificate is not from the authority in client_ca_file".to_owned(),
        rustls::Error::InvalidCertificate(reason) => format!("its certificate is refused: {reason:?}"),
        rustls::Error::InvalidMessage(_) => "what it sent is no TLS".to_owned(),
        rustls::Error::AlertReceived(alert) => format!("it refused this node: {alert:?}"),
        other => other.to_string(),
    }
}

/// Tells of refusals, but not of more than a log can bear.
#[derive(Default)]
struct Refusals {
    since: Option<Instant>,
    told: u32,
    untold: u64,
}

impl Refusals {
    fn tell(&mut self, peer: SocketAddr, reason: &str) {
        if self.since.is_none_or(|since| since.elapsed() >= REFUSALS_WINDOW) {
            *self = Refusals { since: Some(Instant::now()), told: 0, untold: self.untold };
        }
        if self.told == MAX_REFUSALS_TOLD {
            self.untold += 1;
            return;
        }
        self.told += 1;
        let untold = std::mem::take(&mut self.untold);
        if untold > 0 {
            warn!(target: AUDIT, "remote administration: {untold} more clients were refused before this one");
        }
        warn!(target: AUDIT, %peer, reason, "remote administration: a client was refused");
    }
}

fn server_config(remote: &RemoteAdmin) -> Result<ServerConfig, String> {
    let pem = |path: &Path, kind| {
        files::read_pem(path, kind).map_err(|error| format!("{}: {error}", path.display()))
    };
    let certificates = |text: String, path: &Path| {
        CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>().map_err(|error| {
            format!("{}: is no certificate: {error}; give a PEM file with one", path.display())
        })
    };
    let chain = certificates(pem(&remote.cert_file, files::CERTIFICATE)?, &remote.cert_file)?;
    let key = PrivateKeyDer::from_pem_slice(pem(&remote.key_file, files::PRIVATE_KEY)?.as_bytes()).map_err(
        |error| {
            format!("{}: is no private key: {error}; give a PEM file with one", remote.key_file.display())
        },
    )?;
    let authorities = pem(&remote.client_ca_file, files::CERTIFICATE)?;
    let mut roots = RootCertStore::empty();
    for authority in certificates(authorities, &remote.client_ca_file)? {
        roots.add(authority).map_err(|error| {
            format!(
                "{}: holds a certificate that can't vouch for others: {error}; give the authority's own",
                remote.client_ca_file.display()
            )
        })?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|error| format!("client_ca_file is unusable: {error}; give the authority's certificate"))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring supports the default protocol versions")
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| format!("cert_file, key_file: are unusable: {error}; do they belong together?"))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_is_told_as_a_number() {
        let mut refusals = Refusals::default();
        let peer = SocketAddr::from(([192, 0, 2, 1], 1));
        for _ in 0..MAX_REFUSALS_TOLD + 5 {
            refusals.tell(peer, "it showed no certificate");
        }
        assert_eq!((refusals.told, refusals.untold), (MAX_REFUSALS_TOLD, 5));
        refusals.since = Instant::now().checked_sub(REFUSALS_WINDOW);
        refusals.tell(peer, "it showed no certificate");
        assert_eq!((refusals.told, refusals.untold), (1, 0));
    }
}
