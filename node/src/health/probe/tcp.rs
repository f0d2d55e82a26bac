//! TCP: the handshake completes.

use std::net::SocketAddr;

use tokio::net::TcpStream;
use tokio::time::Instant;

use super::{Took, io_words};

pub(super) async fn probe(address: SocketAddr) -> Result<String, String> {
    let started = Instant::now();
    connect(address).await?;
    Ok(format!("connected in {}", Took::since(started)))
}

pub(super) async fn connect(address: SocketAddr) -> Result<TcpStream, String> {
    let stream = TcpStream::connect(address).await.map_err(|e| io_words(&e))?;
    // A closed local port picked as its own peer connects to itself (RFC 9293 §3.5, simultaneous open): nobody serves.
    if stream.local_addr().ok() == Some(address) {
        return Err("connection refused".to_owned());
    }
    Ok(stream)
}
