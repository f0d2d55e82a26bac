//! HTTP and HTTPS: a GET is answered with an expected status (RFC 9110, RFC 9112).

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use komainu_proto::domain::HealthCheck;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::tls::TlsClients;
use super::{Took, tcp};

/// Bytes of the answer's head that are buffered: what common servers allow themselves. More is a failure.
const MAX_HEAD: usize = 16 * 1024;
/// Bytes of the body that are read and thrown away, so that the backend's log shows a whole answer and not a reset.
const MAX_BODY: usize = 64 * 1024;
/// Time given to the body. The verdict stands already.
const BODY_TIME: Duration = Duration::from_millis(50);

pub(super) async fn probe(address: SocketAddr, check: &HealthCheck) -> Result<String, String> {
    let started = Instant::now();
    let stream = tcp::connect(address).await?;
    exchange(stream, address, 80, check, started).await
}

pub(super) async fn probe_tls(
    address: SocketAddr,
    check: &HealthCheck,
    tls: &TlsClients,
) -> Result<String, String> {
    let started = Instant::now();
    let stream = tcp::connect(address).await?;
    let stream = tls.connect(stream, address.ip(), check.host.as_deref(), check.tls_verify).await?;
    exchange(stream, address, 443, check, started).await
}

async fn exchange<S>(
    stream: S,
    address: SocketAddr,
    default_port: u16,
    check: &HealthCheck,
    started: Instant,
) -> Result<String, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let request = Request::get(&check.path)
        .header(HOST, host_header(address, default_port, check.host.as_deref()))
        .header(USER_AGENT, concat!("komainu/", env!("CARGO_PKG_VERSION")))
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|e| format!("path \"{}\": {e}", check.path))?;
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(MAX_HEAD).handshake(TokioIo::new(stream)).await.map_err(words)?;

    let ask = async move {
        let response = sender.send_request(request).await.map_err(words)?;
        let verdict = judge(&response, check.expect_status, started);
        let _ = tokio::time::timeout(BODY_TIME, discard(response)).await;
        verdict
    };
    tokio::pin!(ask, connection);
    // Both in one task, so that dropping the probe drops the connection. A connection that ends may have left its
    // answer for `ask` to pick up.
    tokio::select! {
        biased;
        verdict = &mut ask => verdict,
        _ = &mut connection => ask.await,
    }
}

fn judge(response: &Response<Incoming>, expected: (u16, u16), started: Instant) -> Result<String, String> {
    let status = response.status();
    if (expected.0..=expected.1).contains(&status.as_u16()) {
        Ok(format!("{status} in {}", Took::since(started)).replace(" <unknown status code>", ""))
    } else if expected.0 == expected.1 {
        Err(format!("status {}, expected {}", status.as_u16(), expected.0))
    } else {
        Err(format!("status {}, expected {}–{}", status.as_u16(), expected.0, expected.1))
    }
}

async fn discard(response: Response<Incoming>) {
    let mut body = response.into_body();
    let mut left = MAX_BODY;
    while let Some(Ok(frame)) = body.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            return;
        }
    }
}

/// The Host header (RFC 9110 §7.2): the configured one as it stands, else the address, with the port where it is not
/// the scheme's own.
fn host_header(address: SocketAddr, default_port: u16, host: Option<&str>) -> String {
    match (host, address) {
        (Some(host), _) => host.to_owned(),
        (None, a) if a.port() != default_port => a.to_string(),
        (None, SocketAddr::V4(a)) => a.ip().to_string(),
        (None, SocketAddr::V6(a)) => format!("[{}]", a.ip()),
    }
}

fn words(error: hyper::Error) -> String {
    if error.is_parse_too_large() {
        return format!("answer's head is longer than {MAX_HEAD} bytes");
    }
    if error.is_parse() {
        return "answer is not HTTP".to_owned();
    }
    if error.is_incomplete_message() || error.is_canceled() {
        return "connection closed before an answer".to_owned();
    }
    match std::error::Error::source(&error).and_then(|e| e.downcast_ref::<std::io::Error>()) {
        Some(io) => super::io_words(io),
        None => error.to_string(),
    }
}
