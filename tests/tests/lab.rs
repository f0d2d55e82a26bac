//! The lab does what the other tests rely on.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use komainu_lab::topology::{CLUSTER, SERVICE};
use komainu_lab::{Lab, Standard};

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
fn hosts_of_a_segment_reach_each_other_at_once_by_both_families() {
    let lab = Lab::build(&Standard::default().topology()).unwrap();
    assert!(reaches(&lab, "client", "be1", SERVICE, v4));
    assert!(reaches(&lab, "client", "be1", SERVICE, v6));
    assert!(reaches(&lab, "lb1", "wit", CLUSTER, v4));
    assert!(reaches(&lab, "wit", "lb2", CLUSTER, v6));
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
