//! Who answers for the addresses, and who else claims them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::*;
use crate::engine::*;
use crate::neighbour::Mac;
use crate::plan::*;
use crate::wire::{arp, ndp};

const ASKER: Mac = [2, 0, 0, 0, 0, 9];

fn world() -> World {
    World::new(vec![service(Mode::Nat, false, Protocol::Tcp, 1)])
}

fn v4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(a) => a,
        IpAddr::V6(_) => panic!("IPv6"),
    }
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V6(a) => a,
        IpAddr::V4(_) => panic!("IPv4"),
    }
}

fn request_arp(target: IpAddr, sender: Option<&str>, dst: Mac) -> Vec<u8> {
    let sender = sender.map(|s| s.parse().unwrap());
    arp::Repr::request(v4(target), sender, ASKER).frame(dst, ASKER).to_vec()
}

fn solicit(target: IpAddr, src: &str, dst: Option<IpAddr>, dst_mac: Option<Mac>) -> Vec<u8> {
    let target = v6(target);
    let src: Ipv6Addr = src.parse().unwrap();
    let source_mac = (!src.is_unspecified()).then_some(ASKER);
    let dst = dst.map_or(ndp::solicited_node(target), v6);
    let dst_mac = dst_mac.unwrap_or(ndp::multicast_mac(dst));
    ndp::Repr::Solicitation { target, source_mac }.frame(dst_mac, ASKER, src, dst)
}

#[test]
fn an_arp_request_is_answered_on_its_port_under_the_lease() {
    let mut world = world();
    for dst in [[0xff; 6], OWN_MAC] {
        let frame = request_arp(vip(false), Some("192.0.2.9"), dst);
        let reply = world.send(&frame).reply();
        assert_eq!((&reply[..6], &reply[6..12]), (&ASKER[..], &OWN_MAC[..]));
        let message = arp::Repr::parse(&reply[14..]).unwrap();
        assert_eq!(message.operation, arp::Operation::Reply);
        assert_eq!((message.sender_ip, message.sender_mac), (v4(vip(false)), OWN_MAC));
        assert_eq!((message.target_ip, message.target_mac), ("192.0.2.9".parse().unwrap(), ASKER));
    }
    assert_eq!(world.count("arp_answered"), 2);
    let frame = request_arp(vip(false), Some("10.0.0.9"), [0xff; 6]);
    assert_eq!(world.send_by(&frame, Port::Inside), Outcome::NotOurs, "not on the inside network");
    let inside = request_arp(inside_vip(false), Some("10.0.0.9"), [0xff; 6]);
    assert_eq!(world.send(&inside), Outcome::NotOurs);
    assert_eq!(world.send_by(&inside, Port::Inside).reply()[6..12], INSIDE_MAC);
    let frame = request_arp(service_net(false, 2), Some("192.0.2.9"), [0xff; 6]);
    assert_eq!(world.send(&frame), Outcome::NotOurs, "the host's own");

    // In an orderly hand-over the old owner forwards, and is silent.
    world.lease(false, true);
    let frame = request_arp(vip(false), Some("192.0.2.9"), [0xff; 6]);
    assert_eq!(world.send(&frame), Outcome::Dropped("no_lease"));
}

#[test]
fn a_probe_is_answered_so_that_the_prober_gives_the_address_up() {
    let mut world = world();
    let reply = world.send(&request_arp(vip(false), None, [0xff; 6])).reply();
    let message = arp::Repr::parse(&reply[14..]).unwrap();
    assert_eq!((message.sender_ip, message.target_ip), (v4(vip(false)), Ipv4Addr::UNSPECIFIED));
}

#[test]
fn a_solicitation_is_answered_multicast_and_unicast() {
    let mut world = world();
    let target = vip(true);
    let frames = [
        solicit(target, "2001:db8::9", None, None),
        solicit(target, "2001:db8::9", Some(target), Some(OWN_MAC)),
    ];
    for frame in frames {
        let reply = world.send(&frame).reply();
        assert_eq!((&reply[..6], &reply[6..12]), (&ASKER[..], &OWN_MAC[..]));
        let message =
            ndp::Repr::parse_message(&reply[54..], v6(target), "2001:db8::9".parse().unwrap(), reply[21]);
        let expected = ndp::Repr::Advertisement {
            target: v6(target),
            router: false,
            solicited: true,
            overrides: true,
            target_mac: Some(OWN_MAC),
        };
        assert_eq!(message, Ok(expected));
    }
    world.lease(false, true);
    assert_eq!(world.send(&solicit(target, "2001:db8::9", None, None)), Outcome::Dropped("no_lease"));
    let inside = solicit(inside_vip(true), "fd00::9", None, None);
    assert_eq!(world.send(&inside), Outcome::NotOurs, "answered for on the other port");
}

#[test]
fn duplicate_address_detection_is_defended_against_to_all_nodes() {
    let mut world = world();
    let reply = world.send(&solicit(vip(true), "::", None, None)).reply();
    assert_eq!(reply[..6], [0x33, 0x33, 0, 0, 0, 1]);
    let message = ndp::Repr::parse_message(&reply[54..], v6(vip(true)), ndp::ALL_NODES, 255).unwrap();
    let ndp::Repr::Advertisement { solicited: false, overrides: true, target, .. } = message else {
        panic!("{message:?}")
    };
    assert_eq!(target, v6(vip(true)));
}

#[test]
fn a_solicitation_from_afar_or_spoilt_is_dropped() {
    let mut world = world();
    let mut frame = solicit(vip(true), "2001:db8::9", None, None);
    frame[21] = 254;
    assert_eq!(world.send(&frame), Outcome::Dropped("bad_field"), "a router passed it on");
    frame[21] = 255;
    *frame.last_mut().unwrap() ^= 1;
    assert_eq!(world.send(&frame), Outcome::Dropped("bad_checksum"));
}

#[test]
fn somebody_elses_claim_is_reported_while_the_lease_is_held() {
    let mut world = world();
    let garp = arp::Repr::announcement(v4(vip(false)), ASKER).frame([0xff; 6], ASKER).to_vec();
    let all = ndp::multicast_mac(ndp::ALL_NODES);
    let target = v6(vip(true));
    let na = ndp::Repr::announcement(target, ASKER, false).frame(all, ASKER, target, ndp::ALL_NODES);
    for _ in 0..3 {
        assert_eq!(world.send(&garp), Outcome::NotOurs);
        assert_eq!(world.send(&na), Outcome::NotOurs);
    }
    let claims: Vec<Claim> = std::iter::from_fn(|| world.engine.poll_claim()).collect();
    let claim = |address| Claim { group: GROUP, address, mac: ASKER, port: Port::Service };
    assert_eq!(claims, [claim(vip(false)), claim(vip(true))], "once for each address");
    assert_eq!(world.count("foreign_claim"), 6);

    // Our own announcements, seen again, claim nothing; nor does the owner's while we are standby.
    let own = arp::Repr::announcement(v4(vip(false)), OWN_MAC).frame([0xff; 6], OWN_MAC).to_vec();
    assert_eq!(world.send(&own), Outcome::NotOurs);
    world.lease(false, false);
    assert_eq!(world.send(&garp), Outcome::NotOurs);
    assert_eq!(world.engine.poll_claim(), None);
}

#[test]
fn owned_addresses_are_told_with_their_ports() {
    let world = world();
    let owned = world.engine.owned();
    assert_eq!(owned.len(), 6);
    for address in owned {
        let inside = [inside_vip(false), inside_vip(true)].contains(&address.address);
        assert_eq!(address.port, Some(if inside { Port::Inside } else { Port::Service }));
        assert_eq!(address.group, GROUP);
    }
}
