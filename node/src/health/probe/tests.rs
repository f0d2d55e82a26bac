//! Probes against real sockets on loopback.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::*;

const LOCAL: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

fn check(kind: CheckType) -> HealthCheck {
    HealthCheck { kind, timeout_ms: 2000, ..HealthCheck::default() }
}

async fn ask(address: SocketAddr, check: &HealthCheck) -> Answer {
    NetProbe::new().ask(address, check).await
}

async fn read_request(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let byte = stream.read_u8().await.unwrap();
        request.push(byte);
    }
    String::from_utf8(request).unwrap()
}

/// A server that answers every connection's request with `response` and hands the last request out.
async fn http_server(
    ip: IpAddr,
    response: &'static [u8],
) -> (SocketAddr, tokio::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tx, rx) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let request = read_request(&mut stream).await;
            let _ = stream.write_all(response).await;
            let _ = tx.send(request).await;
        }
    });
    (address, rx)
}

/// A port on which nothing listens.
async fn closed_port(ip: IpAddr) -> SocketAddr {
    TcpListener::bind((ip, 0)).await.unwrap().local_addr().unwrap()
}

fn passes(answer: &Answer, begins: &str) {
    assert!(answer.success && answer.reason.starts_with(begins), "{answer:?}, expected {begins}…");
}

fn fails(answer: &Answer, reason: &str) {
    assert!(!answer.success && answer.reason == reason, "{answer:?}, expected {reason}");
}

#[tokio::test]
async fn tcp_connects_or_is_refused() {
    for ip in LOCAL {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        passes(&ask(listener.local_addr().unwrap(), &check(CheckType::Tcp)).await, "connected in ");
        fails(&ask(closed_port(ip).await, &check(CheckType::Tcp)).await, "connection refused");
    }
}

#[tokio::test]
async fn http_judges_the_status() {
    for ip in LOCAL {
        let (address, _rx) = http_server(ip, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
        passes(&ask(address, &check(CheckType::Http)).await, "200 OK in ");
        let (address, _rx) =
            http_server(ip, b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").await;
        fails(&ask(address, &check(CheckType::Http)).await, "status 503, expected 200–399");
        let only_503 = HealthCheck { expect_status: (503, 503), ..check(CheckType::Http) };
        passes(&ask(address, &only_503).await, "503 Service Unavailable in ");
        fails(&ask(closed_port(ip).await, &check(CheckType::Http)).await, "connection refused");
    }
}

#[tokio::test]
async fn http_sends_path_and_host() {
    let (address, mut rx) = http_server(LOCAL[0], b"HTTP/1.1 204 No Content\r\n\r\n").await;
    let named = HealthCheck {
        path: "/healthz?deep=1".to_owned(),
        host: Some("www.example.org".to_owned()),
        ..check(CheckType::Http)
    };
    passes(&ask(address, &named).await, "204 No Content in ");
    let request = rx.recv().await.unwrap().to_lowercase();
    assert!(request.starts_with("get /healthz?deep=1 http/1.1\r\n"), "{request}");
    assert!(request.contains("host: www.example.org\r\n"), "{request}");
    ask(address, &check(CheckType::Http)).await;
    let request = rx.recv().await.unwrap().to_lowercase();
    assert!(request.contains(&format!("host: {address}\r\n")), "{request}");
}

#[tokio::test]
async fn an_answer_that_is_not_http_fails_in_words() {
    for (response, reason) in [
        (&b"SSH-2.0-OpenSSH_9.2\r\n\r\n\r\n"[..], "answer is not HTTP"),
        (b"", "connection closed before an answer"),
    ] {
        let (address, _rx) = http_server(LOCAL[0], response).await;
        fails(&ask(address, &check(CheckType::Http)).await, reason);
    }
}

#[tokio::test]
async fn an_endless_head_is_cut_off() {
    let listener = TcpListener::bind((LOCAL[0], 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
        while stream.write_all(b"x-more: yes, there is always more to come\r\n").await.is_ok() {}
    });
    let answer = ask(address, &check(CheckType::Http)).await;
    assert!(!answer.success, "{answer:?}");
    assert!(!answer.reason.starts_with("timeout"), "{answer:?}");
}

#[tokio::test]
async fn an_endless_body_does_not_delay_the_verdict() {
    let listener = TcpListener::bind((LOCAL[0], 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n").await;
        std::future::pending::<()>().await;
    });
    passes(&ask(address, &check(CheckType::Http)).await, "200 OK in ");
}

#[tokio::test]
async fn silence_is_a_timeout() {
    let listener = TcpListener::bind((LOCAL[0], 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    for kind in [CheckType::Http, CheckType::Https, CheckType::Grpc] {
        let hasty = HealthCheck { timeout_ms: 40, ..check(kind) };
        fails(&ask(address, &hasty).await, "timeout after 40 ms");
    }
    let silent = UdpSocket::bind((LOCAL[0], 0)).await.unwrap();
    let hasty = HealthCheck { timeout_ms: 40, ..check(CheckType::Dns) };
    fails(&ask(silent.local_addr().unwrap(), &hasty).await, "timeout after 40 ms");
}

#[tokio::test]
async fn a_dropped_probe_closes_its_connection() {
    let listener = TcpListener::bind((LOCAL[0], 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let probe = tokio::spawn(async move { ask(address, &check(CheckType::Http)).await });
    let (mut stream, _) = listener.accept().await.unwrap();
    read_request(&mut stream).await;
    probe.abort();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_or(0), 0, "the other side sees the end");
}

#[tokio::test]
async fn udp_is_answered_silent_or_refused() {
    for ip in LOCAL {
        let server = UdpSocket::bind((ip, 0)).await.unwrap();
        let address = server.local_addr().unwrap();
        let quick = HealthCheck { timeout_ms: 50, ..check(CheckType::Udp) };
        passes(&ask(address, &quick).await, "not refused within 50 ms");
        let echo = tokio::spawn(async move {
            let mut buffer = [0; 100];
            loop {
                let (len, from) = server.recv_from(&mut buffer).await.unwrap();
                server.send_to(&buffer[..len], from).await.unwrap();
            }
        });
        passes(&ask(address, &check(CheckType::Udp)).await, "answered in ");
        echo.abort();
        let _ = echo.await;
        fails(&ask(address, &check(CheckType::Udp)).await, "port unreachable");
    }
}

#[tokio::test]
async fn dns_is_judged_by_its_code() {
    let server = UdpSocket::bind((LOCAL[0], 0)).await.unwrap();
    let address = server.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 600];
        loop {
            let (len, from) = server.recv_from(&mut buffer).await.unwrap();
            buffer[2] |= 0x80;
            let is_root = buffer[12] == 0;
            buffer[3] = if is_root { 5 } else { buffer[13] - b'0' };
            // What is no response to the query must be passed over.
            server.send_to(b"stray", from).await.unwrap();
            server.send_to(&buffer[..len], from).await.unwrap();
        }
    });
    let named = |name: &str| HealthCheck { host: Some(name.to_owned()), ..check(CheckType::Dns) };
    passes(&ask(address, &named("0.example")).await, "answered in ");
    fails(&ask(address, &named("2.example")).await, "answered server failure");
    fails(&ask(address, &named("3.example")).await, "answered no such name");
    passes(&ask(address, &check(CheckType::Dns)).await, "answered refused in ");
}

#[tokio::test]
async fn grpc_says_serving() {
    for ip in LOCAL {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (reporter, service) = tonic_health::server::health_reporter();
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
        );
        passes(&ask(address, &check(CheckType::Grpc)).await, "SERVING in ");
        reporter.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        fails(&ask(address, &check(CheckType::Grpc)).await, "NOT_SERVING");
        fails(&ask(closed_port(ip).await, &check(CheckType::Grpc)).await, "connection refused");
    }
}

#[tokio::test]
async fn icmp_is_answered_on_loopback() {
    for ip in LOCAL {
        let answer = ask(SocketAddr::new(ip, 0), &check(CheckType::Icmp)).await;
        if answer.reason.starts_with("this node may not send ICMP") {
            eprintln!("skipped: {}", answer.reason);
            return;
        }
        passes(&answer, "echo reply in ");
    }
}

const CERTIFICATE: &[u8] = include_bytes!("testdata/server.pem");
const KEY: &[u8] = include_bytes!("testdata/server.key");

/// A TLS server with a certificate for `check.example`; answers 200 and hands out the server name it was asked for.
async fn tls_server() -> (SocketAddr, tokio::sync::mpsc::Receiver<Option<String>>) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            CertificateDer::pem_slice_iter(CERTIFICATE).collect::<Result<_, _>>().unwrap(),
            PrivateKeyDer::from_pem_slice(KEY).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((LOCAL[0], 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tx, rx) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let (stream, _): (TcpStream, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let name = stream.get_ref().1.server_name().map(str::to_owned);
            read_request(&mut stream).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
            let _ = tx.send(name).await;
        }
    });
    (address, rx)
}

#[tokio::test]
async fn https_takes_any_certificate_unless_told_to_verify() {
    let (address, mut names) = tls_server().await;
    let https = check(CheckType::Https);
    let named = HealthCheck { host: Some("check.example".to_owned()), ..https.clone() };
    passes(&ask(address, &https).await, "200 OK in ");
    assert_eq!(names.recv().await.unwrap(), None);
    passes(&ask(address, &named).await, "200 OK in ");
    assert_eq!(names.recv().await.unwrap().as_deref(), Some("check.example"));

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), CERTIFICATE).unwrap();
    let probe = NetProbe { tls: tls::TlsClients::new(tls::RootSource::File(file.path().to_owned())) };
    let verified = HealthCheck { tls_verify: true, ..named };
    passes(&probe.ask(address, &verified).await, "200 OK in ");
    let other_name = HealthCheck { host: Some("other.example".to_owned()), ..verified.clone() };
    let answer = probe.ask(address, &other_name).await;
    assert!(!answer.success && answer.reason.starts_with("TLS: invalid peer certificate"), "{answer:?}");

    let empty = tempfile::NamedTempFile::new().unwrap();
    let probe = NetProbe { tls: tls::TlsClients::new(tls::RootSource::File(empty.path().to_owned())) };
    let answer = probe.ask(address, &verified).await;
    assert!(!answer.success && answer.reason.starts_with("no root certificate in "), "{answer:?}");
}

#[tokio::test]
async fn https_to_a_plain_server_fails_in_words() {
    let listener = TcpListener::bind((LOCAL[0], 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.write_all(b"220 mail.example ESMTP\r\n").await;
        std::future::pending::<()>().await;
    });
    let answer = ask(address, &check(CheckType::Https)).await;
    assert!(!answer.success && answer.reason.starts_with("TLS: "), "{answer:?}");
}
