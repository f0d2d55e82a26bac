//! The standard gRPC health service (`grpc.health.v1.Health/Check`) says SERVING.

use std::net::SocketAddr;

use tokio::time::Instant;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::Took;

/// Bytes of the answer: it holds one enum.
const MAX_ANSWER: usize = 4096;

/// Asks for the server as a whole (empty service name); `host` is the `:authority`.
pub(super) async fn probe(address: SocketAddr, host: Option<&str>) -> Result<String, String> {
    let started = Instant::now();
    let mut endpoint =
        Endpoint::from_shared(format!("http://{address}")).map_err(|e| format!("address {address}: {e}"))?;
    if let Some(host) = host {
        let origin =
            format!("http://{host}").parse().map_err(|_| format!("host \"{host}\" is no authority"))?;
        endpoint = endpoint.origin(origin);
    }
    let channel = endpoint.connect().await.map_err(|e| transport_words(&e))?;
    let mut client = HealthClient::new(channel).max_decoding_message_size(MAX_ANSWER);
    match client.check(HealthCheckRequest { service: String::new() }).await {
        Ok(answer) => match answer.into_inner().status() {
            ServingStatus::Serving => Ok(format!("SERVING in {}", Took::since(started))),
            other => Err(other.as_str_name().to_owned()),
        },
        Err(status) => Err(format!("gRPC {:?}: {}", status.code(), status.message())),
    }
}

/// The innermost I/O error in words, or the error as it is.
fn transport_words(error: &tonic::transport::Error) -> String {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = source {
        if let Some(io) = e.downcast_ref::<std::io::Error>() {
            return super::io_words(io);
        }
        source = e.source();
    }
    error.to_string()
}
