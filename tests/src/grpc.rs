//! A gRPC client that knows nothing of Komainu: what any stock client can do.

use std::path::Path;

use komainu_lab::Host;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::pki::Issued;

/// Runs `talk` on a runtime of its own, inside a host: its sockets are the host's.
pub fn inside<R: Send, F: Future<Output = R>>(host: &Host, talk: impl FnOnce() -> F + Send) -> R {
    host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(talk())
    })
}

/// A channel to a Unix socket.
pub async fn unix(path: &Path) -> Channel {
    Endpoint::from_shared(format!("unix:{}", path.display())).unwrap().connect().await.unwrap()
}

/// A channel over TLS, with or without a certificate of the client's.
///
/// # Errors
/// In words, when it can't be had.
pub async fn https(url: &str, authority: &str, client: Option<&Issued>) -> Result<Channel, String> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority));
    if let Some(client) = client {
        tls = tls.identity(Identity::from_pem(&client.cert, &client.key));
    }
    let endpoint = Endpoint::from_shared(url.to_owned()).unwrap().tls_config(tls).unwrap();
    endpoint.connect().await.map_err(|e| format!("{e:?}"))
}
