//! UDP: a datagram is answered, or at least not refused.
//!
//! Nothing in UDP obliges a server to answer a datagram that it doesn't understand, so silence passes; what fails is a
//! port unreachable (RFC 792) or no way to the host. A service whose protocol has a question of its own (`dns`) should
//! be checked by that.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::Instant;

use super::{Took, io_words};

/// Tells whoever captures it who asks.
const QUESTION: &[u8] = b"komainu health check\n";
/// Bytes of the answer that are looked at: none of them matter.
const MAX_ANSWER: usize = 64;

pub(super) async fn probe(address: SocketAddr, timeout: Duration) -> Result<String, String> {
    let started = Instant::now();
    let answered = async {
        let socket = connected(address).await?;
        socket.send(QUESTION).await.map_err(|e| words(&e))?;
        socket.recv(&mut [0; MAX_ANSWER]).await.map_err(|e| words(&e))
    };
    match tokio::time::timeout(timeout, answered).await {
        Ok(Ok(_)) => Ok(format!("answered in {}", Took::since(started))),
        Ok(Err(reason)) => Err(reason),
        Err(_) => Ok(format!("not refused within {} ms", timeout.as_millis())),
    }
}

/// A socket that takes datagrams and ICMP errors of `address` alone.
pub(super) async fn connected(address: SocketAddr) -> Result<UdpSocket, String> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await.map_err(|e| words(&e))?;
    socket.connect(address).await.map_err(|e| words(&e))?;
    Ok(socket)
}

pub(super) fn words(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "port unreachable".to_owned(),
        _ => io_words(error),
    }
}
