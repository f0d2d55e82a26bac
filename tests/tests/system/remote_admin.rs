//! Administration over the network: mutual TLS, and nothing else.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};

use komainu_lab::cluster::{CliOutput, SOON};
use komainu_lab::topology::{SERVICE, Standard};
use komainu_tests::grpc::{https, inside};
use komainu_tests::pki::{Authority, Issued};
use komainu_tests::{Bed, Machine, PATIENCE, web_document};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const PORT: u16 = 7801;

/// A bed whose balancers listen on the service network, and the authority that they trust.
fn bed() -> (Bed, Authority) {
    let mut bed = Bed::idle(Machine::Shared, Standard::default());
    let ours = Authority::new("ours");
    let dir = bed.cluster.lab.dir().to_owned();
    std::fs::write(dir.join("ca.pem"), ours.pem()).unwrap();
    for node in ["lb1", "lb2"] {
        let address = bed.host(node).v4(SERVICE);
        let (cert, key) = ours.issue(node, &address.to_string()).write(&dir, node);
        let text = format!(
            "[admin]\nlisten = \"{address}:{PORT}\"\ncert_file = {cert:?}\nkey_file = {key:?}\nclient_ca_file = {:?}\n",
            dir.join("ca.pem")
        );
        bed.cluster.configure(node, &text).unwrap();
    }
    bed.cluster.start_all().unwrap();
    bed.cluster.wait_formed(SOON).unwrap();
    let document = web_document(&bed.cluster.lab);
    bed.cluster.apply("lb1", &document).unwrap();
    (bed, ours)
}

fn listens(bed: &Bed, node: &str) -> SocketAddr {
    (bed.host(node).v4(SERVICE), PORT).into()
}

/// The CLI on the client's machine against a balancer.
fn from_afar(bed: &Bed, node: &str, ca: &Path, (cert, key): &(PathBuf, PathBuf), args: &[&str]) -> CliOutput {
    let url = format!("https://{}", listens(bed, node));
    let paths = [ca, cert, key].map(|p| p.display().to_string());
    let mut all = args.to_vec();
    all.extend(["--node", &url, "--ca", &paths[0], "--cert", &paths[1], "--key", &paths[2]]);
    bed.cluster.cli_from("client", &all).unwrap()
}

/// Waits until the log of `node` tells of a client from the client's machine that was refused for `reason`.
fn refusal_is_logged(bed: &Bed, node: &str, reason: &str) {
    let peer = format!("{}:", bed.client().v4(SERVICE));
    bed.cluster.wait_logged(node, &["a client was refused", &peer, reason], SOON).unwrap();
}

#[test]
fn a_known_certificate_administrates_from_another_machine_also_through_the_standby() {
    let (bed, ours) = bed();
    let dir = bed.cluster.lab.dir();
    let alice = ours.issue("alice", "client").write(dir, "alice");
    for (node, weight) in [("lb1", "5"), ("lb2", "6")] {
        let ca = dir.join("ca.pem");
        let change = from_afar(&bed, node, &ca, &alice, &["backend", "weight", "web/be1", weight]);
        assert!(change.status.success(), "{change:?}");
        let history = from_afar(&bed, node, &ca, &alice, &["history"]);
        let newest = history.stdout.lines().nth(1).unwrap_or_default().to_owned();
        assert!(newest.contains("cn alice"), "{history:?}");
    }
    assert!(!bed.cluster.log_of("lb1").contains("a client was refused"));
}

#[test]
fn whoever_can_not_show_a_known_certificate_is_refused_and_logged() {
    let (bed, ours) = bed();
    let theirs = Authority::new("theirs");
    let dir = bed.cluster.lab.dir();
    let (ca, their_ca) = (dir.join("ca.pem"), dir.join("their-ca.pem"));
    std::fs::write(&their_ca, theirs.pem()).unwrap();
    let before = bed.cluster.cli_ok("lb1", &["export"]).unwrap().stdout;
    let drain = ["backend", "weight", "web/be1", "9"];

    let mallory = theirs.issue("mallory", "client").write(dir, "mallory");
    let refused = from_afar(&bed, "lb1", &ca, &mallory, &drain);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    refusal_is_logged(&bed, "lb1", "not from the authority");

    // An authority with the name of ours and another key is another authority.
    let namesake = Authority::new("ours").issue("mallory", "client").write(dir, "namesake");
    let refused = from_afar(&bed, "lb1", &ca, &namesake, &drain);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");

    let alice = ours.issue("alice", "client").write(dir, "alice");
    let refused = from_afar(&bed, "lb1", &their_ca, &alice, &drain);
    assert_eq!(refused.status.code(), Some(1), "a node that can't prove who it is: {refused:?}");
    refusal_is_logged(&bed, "lb1", "it refused this node");

    let url = format!("https://{}", listens(&bed, "lb1"));
    let ask = |client: Option<Issued>| {
        let (url, ca) = (&url, ours.pem());
        inside(bed.client(), || async move {
            // TLS 1.3 tells a client that it was refused only when it reads (RFC 8446 §4.4.2.4).
            let channel = https(url, &ca, client.as_ref()).await?;
            let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
            answer.map_err(|e| e.to_string())
        })
    };
    ask(None).expect_err("without a certificate");
    refusal_is_logged(&bed, "lb1", "no certificate");
    ask(Some(ours.issue("bob", "client"))).expect("with one");

    for said in [&b"GET / HTTP/1.1\r\nHost: lb1\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let target = listens(&bed, "lb1");
        let answer = bed.client().run(|| {
            let mut stream = TcpStream::connect_timeout(&target, PATIENCE).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(said).unwrap();
            let mut answer = Vec::new();
            // A reset says no as well as an end.
            let _ = stream.read_to_end(&mut answer);
            answer
        });
        // At most a TLS alert (RFC 8446 §6): content type 21.
        assert!(answer.first().is_none_or(|&first| first == 21), "{answer:?}");
    }
    refusal_is_logged(&bed, "lb1", "no TLS");
    assert_eq!(bed.cluster.cli_ok("lb1", &["export"]).unwrap().stdout, before);
}
