//! Probes: one question to one backend, answered in words.
//!
//! Every probe is a future that owns its socket: dropping it (the backend was removed, the time is up) leaves nothing
//! behind. What comes from the network is bounded before it is looked at. The overall timeout stands here, so that no
//! probe can forget it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use komainu_proto::domain::{CheckType, HealthCheck};
use tokio::time::Instant;

mod dns;
mod grpc;
mod http;
mod icmp;
mod tcp;
mod tls;
mod udp;

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether the backend passed.
    pub success: bool,
    /// Why, in words for an operator: `200 OK in 3 ms`, `connection refused`, `timeout after 500 ms`.
    pub reason: String,
}

impl Answer {
    fn from_result(result: Result<String, String>) -> Answer {
        match result {
            Ok(reason) => Answer { success: true, reason },
            Err(reason) => Answer { success: false, reason },
        }
    }
}

/// Carries out checks over the network.
#[derive(Clone, Debug)]
pub struct NetProbe {
    tls: tls::TlsClients,
}

impl Default for NetProbe {
    fn default() -> Self {
        Self::new()
    }
}

impl NetProbe {
    /// Reads the system's root certificates once. That there are none is no error here: it is the answer of those
    /// checks that verify certificates.
    pub fn new() -> Self {
        NetProbe { tls: tls::TlsClients::new(tls::RootSource::System) }
    }

    /// For checks without verified certificates: reads nothing.
    pub fn without_roots() -> Self {
        NetProbe { tls: tls::TlsClients::new(tls::RootSource::None) }
    }

    /// Asks `address` as `check` says. Ends within `check.timeout_ms`.
    pub async fn ask(&self, address: SocketAddr, check: &HealthCheck) -> Answer {
        let timeout = Duration::from_millis(check.timeout_ms.into());
        let question = async {
            match check.kind {
                CheckType::Tcp => tcp::probe(address).await,
                CheckType::Http => http::probe(address, check).await,
                CheckType::Https => http::probe_tls(address, check, &self.tls).await,
                CheckType::Icmp => icmp::probe(address.ip()).await,
                CheckType::Udp => udp::probe(address, timeout).await,
                CheckType::Dns => dns::probe(address, check.host.as_deref()).await,
                CheckType::Grpc => grpc::probe(address, check.host.as_deref()).await,
                CheckType::None => Ok("not checked".to_owned()),
            }
        };
        if check.kind == CheckType::Udp {
            // Silence is an answer there, so the probe itself ends when the time is up.
            return Answer::from_result(question.await);
        }
        match tokio::time::timeout(timeout, question).await {
            Ok(result) => Answer::from_result(result),
            Err(_) => Answer::from_result(Err(format!("timeout after {} ms", check.timeout_ms))),
        }
    }
}

/// Time since `started` in words: `3 ms`, `<1 ms`.
struct Took(Duration);

impl Took {
    fn since(started: Instant) -> Took {
        Took(started.elapsed())
    }
}

impl fmt::Display for Took {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            0 => f.write_str("<1 ms"),
            ms => write!(f, "{ms} ms"),
        }
    }
}

/// An I/O error as an operator would say it, without the number.
fn io_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::ConnectionReset => "connection reset".to_owned(),
        io::ErrorKind::HostUnreachable => "host unreachable".to_owned(),
        io::ErrorKind::NetworkUnreachable => "network unreachable".to_owned(),
        io::ErrorKind::UnexpectedEof => "connection closed early".to_owned(),
        io::ErrorKind::TimedOut => "no answer from the network".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
