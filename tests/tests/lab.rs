//! The lab does what the other tests rely on.

// Helpers of tests: a failure to set up is a failure of the test.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use komainu_lab::cluster::wait_for;
use komainu_lab::topology::{CLUSTER, SERVICE};
use komainu_lab::traffic::http;
use komainu_lab::traffic::pinger::Pingers;
use komainu_lab::traffic::server::{Listen, Server};
use komainu_lab::traffic::stream::{StreamSpec, UdpStream};
use komainu_lab::watch::Watch;
use komainu_lab::{Lab, Standard, addr};

const LIMIT: Duration = Duration::from_secs(20);

const SHORT: Duration = Duration::from_millis(60);

/// Whether a datagram from `from` reaches `to`.
fn reaches(lab: &Lab, from: &str, to: &str, segment: &str, address: fn(&Lab, &str, &str) -> IpAddr) -> bool {
    let target = address(lab, to, segment);
    let receiver = lab.host(to).run(|| UdpSocket::bind((target, 0)).unwrap());
    receiver.set_read_timeout(Some(SHORT)).unwrap();
    let at = receiver.local_addr().unwrap();
    let source = address(lab, from, segment);
    let sender = lab.host(from).run(|| UdpSocket::bind((source, 0)).unwrap());
    sender.send_to(b"x", at).unwrap();
    receiver.recv(&mut [0; 8]).is_ok()
}

/// The same, allowing for the kernel's own retries in neighbour resolution (one a second).
fn comes_to_reach(
    lab: &Lab,
    from: &str,
    to: &str,
    segment: &str,
    address: fn(&Lab, &str, &str) -> IpAddr,
) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if reaches(lab, from, to, segment, address) {
            return true;
        }
    }
    false
}

fn v4(lab: &Lab, host: &str, segment: &str) -> IpAddr {
    lab.host(host).v4(segment)
}

fn v6(lab: &Lab, host: &str, segment: &str) -> IpAddr {
    lab.host(host).v6(segment)
}

#[test]
fn hosts_of_a_segment_reach_each_other_by_both_families() {
    let lab = Lab::build(&Standard::default().topology()).unwrap();
    assert!(comes_to_reach(&lab, "client", "be1", SERVICE, v4));
    assert!(comes_to_reach(&lab, "client", "be1", SERVICE, v6));
    assert!(comes_to_reach(&lab, "lb1", "wit", CLUSTER, v4));
    assert!(comes_to_reach(&lab, "wit", "lb2", CLUSTER, v6));
}

#[test]
fn a_cut_stops_two_hosts_from_hearing_each_other_and_nobody_else() {
    let lab = Lab::build(&Standard::default().topology()).unwrap();
    lab.cut("lb1", "lb2", CLUSTER).unwrap();
    for family in [v4, v6] {
        assert!(!reaches(&lab, "lb1", "lb2", CLUSTER, family));
        assert!(!reaches(&lab, "lb2", "lb1", CLUSTER, family));
        assert!(reaches(&lab, "lb1", "wit", CLUSTER, family));
        assert!(reaches(&lab, "wit", "lb2", CLUSTER, family));
        assert!(reaches(&lab, "lb1", "lb2", SERVICE, family));
    }
    lab.heal("lb1", "lb2", CLUSTER).unwrap();
    assert!(comes_to_reach(&lab, "lb1", "lb2", CLUSTER, v4));
}

#[test]
fn a_one_way_cut_leaves_the_other_way() {
    let lab = Lab::build(&Standard::default().topology()).unwrap();
    // Neighbours first: resolving them needs both ways.
    assert!(reaches(&lab, "lb1", "lb2", CLUSTER, v4) && reaches(&lab, "lb2", "lb1", CLUSTER, v4));
    lab.cut_one_way("lb1", "lb2", CLUSTER).unwrap();
    assert!(!reaches(&lab, "lb1", "lb2", CLUSTER, v4));
    assert!(reaches(&lab, "lb2", "lb1", CLUSTER, v4));
}

#[test]
fn loss_drops_about_the_share_asked_for() {
    let lab = Lab::build(&Standard::default().topology()).unwrap();
    assert!(reaches(&lab, "lb1", "lb2", CLUSTER, v4));
    lab.set_loss("lb1", "lb2", CLUSTER, 0.5).unwrap();
    let got = (0..40).filter(|_| reaches(&lab, "lb1", "lb2", CLUSTER, v4)).count();
    assert!((5..=35).contains(&got), "{got} of 40 arrived");
}

#[test]
fn an_unplugged_host_is_gone_until_it_is_plugged_in_again() {
    let lab = Lab::build(&Standard::default().topology()).unwrap();
    lab.unplug("be1", SERVICE).unwrap();
    assert!(!reaches(&lab, "client", "be1", SERVICE, v4));
    lab.plug("be1", SERVICE).unwrap();
    assert!(comes_to_reach(&lab, "client", "be1", SERVICE, v4));
    lab.host("be1").set_link(SERVICE, false).unwrap();
    lab.host("be1").set_link(SERVICE, true).unwrap();
    assert!(comes_to_reach(&lab, "client", "be1", SERVICE, v6));
}

#[test]
fn clients_behind_the_router_reach_the_service_segment() {
    let lab = Lab::build(&Standard { far: true, ..Standard::default() }.topology()).unwrap();
    for target in [lab.host("be1").v4(SERVICE), lab.host("be1").v6(SERVICE)] {
        let listener = lab.host("be1").run(|| TcpListener::bind(SocketAddr::new(target, 80)).unwrap());
        let mut there = lab
            .host("far")
            .run(|| {
                std::net::TcpStream::connect_timeout(&listener.local_addr().unwrap(), Duration::from_secs(5))
            })
            .unwrap();
        let (mut here, from) = listener.accept().unwrap();
        assert_eq!(
            from.ip(),
            if target.is_ipv4() { "203.0.113.10" } else { "2001:db8:0:f::a" }.parse::<IpAddr>().unwrap()
        );
        there.write_all(b"hello").unwrap();
        let mut buf = [0; 5];
        here.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"hello");
    }
}

#[test]
fn servers_and_clients_count_what_they_see() {
    let lab = Lab::build(&Standard::default().topology()).unwrap();
    let host = lab.host("be1");
    for ip in [host.v4(SERVICE), host.v6(SERVICE)] {
        let at = |port| SocketAddr::new(ip, port);
        let listens = [Listen::Http(at(80)), Listen::TcpEcho(at(7)), Listen::UdpEcho(at(7))];
        let mut server = Server::start(host, "be1", &listens).unwrap();
        let client = lab.host("client");

        let tally = http::requests(client, at(80), 5, LIMIT);
        assert_eq!((tally.of("be1"), tally.failed), (5, 0), "{tally:?}");
        assert_eq!(server.counts().requests, 5);
        client.run(|| http::download(at(80), 5_000_001, LIMIT)).unwrap();
        assert_eq!(client.run(|| http::get(at(80), "/healthz", LIMIT)).unwrap().status, 200);
        server.set_healthy(false);
        assert_eq!(client.run(|| http::get(at(80), "/healthz", LIMIT)).unwrap().status, 503);

        let pingers = Pingers::start(client, at(7), 2, Duration::from_millis(5), LIMIT).unwrap();
        let stream =
            UdpStream::start(client, at(7), StreamSpec { flows: 3, ..StreamSpec::default() }).unwrap();
        assert!(stream.wait_answered(50, LIMIT) && pingers.wait_answered(5, LIMIT));
        server.kill();
        // The outage lasts until the stream has noticed it.
        let before = stream.report().lost();
        wait_for("datagrams to be lost", LIMIT, || match stream.report().lost() - before {
            lost if lost >= 40 => Ok(()),
            lost => Err(format!("{lost}")),
        })
        .unwrap();
        assert!(pingers.wait_answered(1, LIMIT));
        assert!(pingers.stop().iter().all(|c| c.backend == "be1" && c.broken.is_some()));
        server.restart().unwrap();
        assert!(stream.wait_answered(50, LIMIT));
        let report = stream.stop();
        assert_eq!(report.per_backend.keys().collect::<Vec<_>>(), ["be1"]);
        assert!(report.lost() >= 40 && report.longest_gap() >= Duration::from_millis(20), "{report:?}");
    }
}

#[test]
fn the_wire_listener_tells_who_answers_and_backends_keep_the_vip_on_lo_to_themselves() {
    let lab = Lab::build(&Standard::default().topology()).unwrap();
    let vips = addr::service(addr::VIP);
    let watch = Watch::start(&lab, &vips, Duration::from_millis(2)).unwrap();
    assert!(watch.wait_asked(20, LIMIT));
    assert!(watch.log().claims.is_empty(), "{:?}", watch.log().claims);

    let (v4, v6) = (vips[0], vips[1]);
    let claims = |host: &str, vip| {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if watch.log().claims.iter().filter(|c| c.host == host && c.vip == vip).count() > 10 {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    };
    lab.host("lb1").add_address(SERVICE, v4, 24).unwrap();
    lab.host("lb1").add_address(SERVICE, v6, 64).unwrap();
    assert!(claims("lb1", v4) && claims("lb1", v6));
    watch.log().assert_one_owner();
    lab.host("lb2").add_address(SERVICE, v4, 24).unwrap();
    assert!(claims("lb2", v4));
    assert!(watch.stop().two_owners_ms() > 0, "two hosts with one address were not noticed");
}

#[test]
fn a_process_in_a_host_sees_that_host_and_dies_with_the_lab() {
    let lab = Lab::build(&Standard::default().topology()).unwrap();
    let log = lab.dir().join("sh.log");
    let mut command = std::process::Command::new("/bin/sh");
    command.args(["-c", "cat /proc/net/fib_trie; exec sleep 1000"]);
    let process = lab.host("be2").start("sh", command, &log).unwrap();
    let deadline = Instant::now() + LIMIT;
    while !std::fs::read_to_string(&log).unwrap().contains("192.0.2.12") {
        assert!(Instant::now() < deadline, "{}", std::fs::read_to_string(&log).unwrap());
        std::thread::sleep(Duration::from_millis(5));
    }
    let alive = format!("/proc/{}", process.pid());
    assert!(std::fs::exists(&alive).unwrap());
    drop(process);
    assert!(!std::fs::exists(&alive).unwrap());
    let dir = lab.dir().to_owned();
    drop(lab);
    assert!(!dir.exists());
}
