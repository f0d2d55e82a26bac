//! Messages that we answer or build: ICMP, neighbour discovery, resets, and packets that ICMP errors quote.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::super::tcp::{Flags, Repr as Reset, Segment};
use super::super::{Malformed, Pretty, Quoted, bytes, ethernet, icmpv4, icmpv6, ipv4, ndp, proto, udp};
use super::{DATAGRAM, ip, syn};

const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const VIP_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
const VIP_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn framed(packet: &[u8]) -> Vec<u8> {
    let ethertype = if packet[0] >> 4 == 4 { ethernet::EtherType::IPV4 } else { ethernet::EtherType::IPV6 };
    let mut frame = vec![0; ethernet::HEADER_LEN];
    ethernet::emit(&mut frame, MAC, [2, 0, 0, 0, 0, 9], ethertype);
    frame.extend(packet);
    frame
}

#[test]
fn an_icmpv4_error_quotes_and_is_read_back() {
    let syn = syn();
    let error = icmpv4::Repr::Error {
        kind: icmpv4::kind::UNREACHABLE,
        code: icmpv4::unreachable::FRAGMENTATION_NEEDED,
        mtu: 1400,
        quoted: &syn[14..58],
    };
    let frame = framed(&error.packet(VIP_V4, CLIENT_V4));
    let info = ip(&frame);
    assert_eq!(icmpv4::Repr::parse(&frame[info.l4..info.end]), Ok(error));
    assert!(Pretty(&frame).to_string().ends_with("ICMP unreachable, need to frag (mtu 1400)"));

    let quoted = Quoted::parse(&frame, &info).unwrap().unwrap();
    assert_eq!((quoted.src, quoted.dst), (IpAddr::V4(CLIENT_V4), IpAddr::V4(VIP_V4)));
    assert_eq!((quoted.proto, quoted.ports), (proto::TCP, Some((40_000, 80))));
    assert_eq!((quoted.l3, quoted.l4, quoted.end), (42, 62, 86));
    assert_eq!(quoted.checksum_at, Some(78));
    assert!(SlicedPacket::from_ethernet(&frame).is_ok());
}

#[test]
fn a_quote_of_eight_bytes_is_enough() {
    let syn = syn();
    let error = icmpv4::Repr::Error { kind: 11, code: 0, mtu: 0, quoted: &syn[14..42] };
    let frame = framed(&error.packet(VIP_V4, CLIENT_V4));
    let quoted = Quoted::parse(&frame, &ip(&frame)).unwrap().unwrap();
    assert_eq!((quoted.ports, quoted.checksum_at), (Some((40_000, 80)), None));

    let too_short = icmpv4::Repr::Error { kind: 11, code: 0, mtu: 0, quoted: &syn[14..37] };
    let frame = framed(&too_short.packet(VIP_V4, CLIENT_V4));
    assert_eq!(Quoted::parse(&frame, &ip(&frame)), Err(Malformed::Truncated));
}

#[test]
fn an_icmpv6_error_quotes_and_is_read_back() {
    let error = icmpv6::Repr::Error {
        kind: icmpv6::kind::PACKET_TOO_BIG,
        code: 0,
        mtu: 1280,
        quoted: &DATAGRAM[14..],
    };
    let frame = framed(&error.packet(VIP_V6, CLIENT_V6));
    let info = ip(&frame);
    assert_eq!(icmpv6::Repr::parse(&frame[info.l4..info.end], VIP_V6, CLIENT_V6), Ok(error));
    assert!(Pretty(&frame).to_string().ends_with("ICMP6 packet too big, mtu 1280"));
    let quoted = Quoted::parse(&frame, &info).unwrap().unwrap();
    assert_eq!((quoted.src, quoted.dst), (IpAddr::V6(CLIENT_V6), IpAddr::V6(VIP_V6)));
    assert_eq!((quoted.ports, quoted.l3, quoted.l4), (Some((40_000, 53)), 62, 102));
    assert_eq!(quoted.checksum_at, Some(108));
}

#[test]
fn errors_stay_within_their_greatest_length() {
    let long = vec![0x45; 3000];
    let v4 = icmpv4::Repr::Error { kind: 3, code: 1, mtu: 0, quoted: &long };
    assert_eq!(v4.packet(VIP_V4, CLIENT_V4).len(), 576);
    let v6 = icmpv6::Repr::Error { kind: 1, code: 0, mtu: 0, quoted: &long };
    assert_eq!(v6.packet(VIP_V6, CLIENT_V6).len(), 1280);
}

#[test]
fn an_echo_becomes_its_reply_in_place() {
    let echo = icmpv4::Repr::Echo { reply: false, ident: 7, sequence: 8, data: b"woof" };
    let mut frame = framed(&echo.packet(CLIENT_V4, VIP_V4));
    assert!(Pretty(&frame).to_string().ends_with("ICMP echo request, id 7, seq 8"));
    let info = ip(&frame);
    let mut message = icmpv4::Message::new_checked(&mut frame[info.l4..info.end]).unwrap();
    message.set_kind(icmpv4::kind::ECHO_REPLY, 0);
    assert!(message.checksum_ok());
    let reply = icmpv4::Repr::Echo { reply: true, ident: 7, sequence: 8, data: b"woof" };
    assert_eq!(icmpv4::Repr::parse(&frame[info.l4..info.end]), Ok(reply));
    frame[info.l4 + 9] ^= 1;
    assert_eq!(icmpv4::Repr::parse(&frame[info.l4..info.end]), Err(Malformed::BadChecksum));
}

#[test]
fn an_echo_over_ipv6_equals_the_oracles() {
    let echo = icmpv6::Repr::Echo { reply: true, ident: 7, sequence: 8, data: b"woof" };
    let mut theirs = Vec::new();
    PacketBuilder::ipv6(VIP_V6.octets(), CLIENT_V6.octets(), 64)
        .icmpv6_echo_reply(7, 8)
        .write(&mut theirs, b"woof")
        .unwrap();
    assert_eq!(echo.packet(VIP_V6, CLIENT_V6), theirs);
    let mut theirs = Vec::new();
    PacketBuilder::ipv4(VIP_V4.octets(), CLIENT_V4.octets(), 64)
        .icmpv4_echo_reply(7, 8)
        .write(&mut theirs, b"woof")
        .unwrap();
    let mut ours =
        icmpv4::Repr::Echo { reply: true, ident: 7, sequence: 8, data: b"woof" }.packet(VIP_V4, CLIENT_V4);
    // The builder sets "don't fragment".
    ours[6] = 0x40;
    ipv4::Packet::new_checked(&mut ours).unwrap().fill_checksum();
    assert_eq!(ours, theirs);
}

/// RFC 9293 §3.10.7.1: what a host without the connection answers.
#[test]
fn resets() {
    let segment = |flags: Flags, seq: u32, ack: u32| {
        let mut data = [0; 20];
        Reset { src_port: 40_000, dst_port: 80, seq, ack, flags }.emit(
            &mut data,
            CLIENT_V4.into(),
            VIP_V4.into(),
        );
        data
    };
    let answer = |data: &[u8], payload| Reset::reset_for(&Segment::new_checked(data).unwrap(), payload);

    let to_ack = answer(&segment(Flags::ACK | Flags::PSH, 100, 555), 10).unwrap();
    assert_eq!((to_ack.seq, to_ack.flags), (555, Flags::RST));
    assert_eq!((to_ack.src_port, to_ack.dst_port), (80, 40_000));
    let to_syn = answer(&segment(Flags::SYN, u32::MAX, 0), 0).unwrap();
    assert_eq!((to_syn.seq, to_syn.ack, to_syn.flags), (0, 0, Flags::RST | Flags::ACK));
    let to_data = answer(&segment(Flags::FIN, 100, 0), 10).unwrap();
    assert_eq!((to_data.seq, to_data.ack), (0, 111));
    assert_eq!(answer(&segment(Flags::RST, 1, 0), 0), None);

    let mut poisoned = [0xa5; 20];
    to_syn.emit(&mut poisoned, VIP_V4.into(), CLIENT_V4.into());
    let written = Segment::new_checked(&poisoned[..]).unwrap();
    assert!(written.checksum_ok(VIP_V4.into(), CLIENT_V4.into()));
    assert_eq!(
        (written.window(), written.header_len(), written.flags().to_string().as_str()),
        (0, 20, "[R.]")
    );
}

#[test]
fn a_udp_checksum_equals_the_oracles() {
    let mut frame = Vec::new();
    PacketBuilder::ipv6(CLIENT_V6.octets(), VIP_V6.octets(), 64).udp(1, 2).write(&mut frame, b"abc").unwrap();
    let mut datagram = udp::Datagram::new_checked(&mut frame[40..]).unwrap();
    assert!(datagram.checksum_ok(CLIENT_V6.into(), VIP_V6.into()));
    let theirs = datagram.checksum();
    datagram.set_checksum(0);
    assert!(!datagram.checksum_ok(CLIENT_V6.into(), VIP_V6.into()), "none is illegal in IPv6");
    datagram.fill_checksum(CLIENT_V6.into(), VIP_V6.into());
    assert_eq!(datagram.checksum(), theirs);
}

fn solicitation(src: Ipv6Addr, source_mac: Option<[u8; 6]>) -> Vec<u8> {
    let dst = ndp::solicited_node(VIP_V6);
    ndp::Repr::Solicitation { target: VIP_V6, source_mac }.frame(ndp::multicast_mac(dst), MAC, src, dst)
}

#[test]
fn a_solicitation_is_answered() {
    let frame = solicitation(CLIENT_V6, Some([2, 0, 0, 0, 0, 9]));
    let info = ip(&frame);
    assert_eq!(info.dst, IpAddr::V6("ff02::1:ff00:100".parse().unwrap()));
    assert!(Pretty(&frame).to_string().ends_with("NDP who-has 2001:db8::100"));
    let asked = ndp::Repr::parse(&frame, &info).unwrap().unwrap();
    let (answer, to) = asked.answer(CLIENT_V6, MAC, false).unwrap();
    assert_eq!(to, CLIENT_V6);
    let frame = answer.frame([2, 0, 0, 0, 0, 9], MAC, VIP_V6, to);
    assert_eq!(ndp::Repr::parse(&frame, &ip(&frame)), Ok(Some(answer)));
    assert!(
        Pretty(&frame)
            .to_string()
            .ends_with("NDP 2001:db8::100 is-at 02:00:00:00:00:01 [solicited, override]")
    );
    // etherparse finds its checksum right too.
    let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
    let Some(TransportSlice::Icmpv6(icmp)) = sliced.transport else { panic!() };
    assert!(icmp.is_checksum_valid(VIP_V6.octets(), CLIENT_V6.octets()));
}

#[test]
fn a_probe_is_answered_to_all_nodes_and_not_as_solicited() {
    let frame = solicitation(Ipv6Addr::UNSPECIFIED, None);
    let asked = ndp::Repr::parse(&frame, &ip(&frame)).unwrap().unwrap();
    let (answer, to) = asked.answer(Ipv6Addr::UNSPECIFIED, MAC, true).unwrap();
    assert_eq!(to, ndp::ALL_NODES);
    assert!(matches!(
        answer,
        ndp::Repr::Advertisement { solicited: false, overrides: true, router: true, .. }
    ));
    assert_eq!(answer.answer(CLIENT_V6, MAC, false), None);
}

/// RFC 4861 §7.1.1 and §7.1.2, rule by rule.
#[test]
fn invalid_neighbour_messages_are_ignored() {
    let good = ndp::Repr::Solicitation { target: VIP_V6, source_mac: Some(MAC) };
    let group = ndp::solicited_node(VIP_V6);
    let parse = |change: &dyn Fn(&mut Vec<u8>), src: Ipv6Addr, dst: Ipv6Addr, hops: u8, repr: ndp::Repr| {
        let mut message = vec![0; repr.buffer_len()];
        repr.emit(&mut message, src, dst);
        change(&mut message);
        message[2..4].fill(0);
        let sum = icmpv6::sum(&message, src, dst);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        ndp::Repr::parse_message(&message, src, dst, hops)
    };
    let keep = |_: &mut Vec<u8>| {};
    assert_eq!(parse(&keep, CLIENT_V6, group, 255, good), Ok(good));
    assert_eq!(parse(&keep, CLIENT_V6, group, 254, good), Err(Malformed::BadField), "hop limit");
    assert_eq!(parse(&|m| m[1] = 1, CLIENT_V6, group, 255, good), Err(Malformed::BadField), "code");
    assert_eq!(parse(&|m| m.truncate(20), CLIENT_V6, group, 255, good), Err(Malformed::Truncated), "length");
    assert_eq!(
        parse(&|m| m[8] = 0xff, CLIENT_V6, group, 255, good),
        Err(Malformed::BadField),
        "multicast target"
    );
    assert_eq!(
        parse(&|m| m[25] = 0, CLIENT_V6, group, 255, good),
        Err(Malformed::BadHeaderLength),
        "empty option"
    );
    assert_eq!(
        parse(&|m| m[25] = 2, CLIENT_V6, group, 255, good),
        Err(Malformed::Truncated),
        "option too long"
    );
    let probe = Ipv6Addr::UNSPECIFIED;
    assert_eq!(parse(&keep, probe, group, 255, good), Err(Malformed::BadField), "probe with an address");
    let bare = ndp::Repr::Solicitation { target: VIP_V6, source_mac: None };
    assert_eq!(parse(&keep, probe, group, 255, bare), Ok(bare));
    assert_eq!(parse(&keep, probe, VIP_V6, 255, bare), Err(Malformed::BadField), "probe to one node");
    let (solicited, _) = good.answer(CLIENT_V6, MAC, false).unwrap();
    assert_eq!(
        parse(&keep, VIP_V6, ndp::ALL_NODES, 255, solicited),
        Err(Malformed::BadField),
        "solicited to all"
    );
    let mut spoiled = vec![0; good.buffer_len()];
    good.emit(&mut spoiled, CLIENT_V6, group);
    spoiled[10] ^= 1;
    assert_eq!(ndp::Repr::parse_message(&spoiled, CLIENT_V6, group, 255), Err(Malformed::BadChecksum));
}

#[test]
fn unknown_options_are_passed_over() {
    let group = ndp::solicited_node(VIP_V6);
    let mut message = vec![0; 24];
    ndp::Repr::Solicitation { target: VIP_V6, source_mac: None }.emit(&mut message, CLIENT_V6, group);
    // A nonce (RFC 3971 §5.3.2), then the address.
    message.extend([14, 1, 1, 2, 3, 4, 5, 6, 1, 1, 2, 0, 0, 0, 0, 9]);
    message[2..4].fill(0);
    let sum = icmpv6::sum(&message, CLIENT_V6, group);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(
        ndp::Repr::parse_message(&message, CLIENT_V6, group, 255),
        Ok(ndp::Repr::Solicitation { target: VIP_V6, source_mac: Some([2, 0, 0, 0, 0, 9]) })
    );
}

proptest! {
    #[test]
    fn parse_is_the_inverse_of_emit(
        target in any::<Ipv6Addr>(), mac in any::<Option<[u8; 6]>>(), flags in any::<(bool, bool)>(), solicit in any::<bool>(),
    ) {
        prop_assume!(!target.is_multicast());
        let repr = if solicit {
            ndp::Repr::Solicitation { target, source_mac: mac }
        } else {
            ndp::Repr::Advertisement { target, router: flags.0, solicited: false, overrides: flags.1, target_mac: mac }
        };
        let mut buffer = vec![0xa5; repr.buffer_len() + 9];
        repr.emit(&mut buffer, CLIENT_V6, VIP_V6);
        prop_assert_eq!(&buffer[repr.buffer_len()..], [0xa5; 9]);
        let message = bytes::range(&buffer, 0, repr.buffer_len());
        prop_assert_eq!(ndp::Repr::parse_message(message, CLIENT_V6, VIP_V6, 255), Ok(repr));
    }
}
