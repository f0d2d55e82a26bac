//! The wire formats.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use komainu_packet::checksum::{self, Delta, L4Sum};
use komainu_packet::wire::dissect::{Fragment, IpInfo, Net, dissect};
use komainu_packet::wire::{Pretty, Quoted, arp, bytes, ethernet, icmpv4, icmpv6, ipv4, ipv6, ndp, tcp, udp};

const A: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const B: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const C: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const D: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Frames: the data as it is, and as an IPv4 and an IPv6 packet with what chance hardly gets right put right.
pub fn ethernet(data: &[u8]) {
    frame(data);
    for ethertype in [ethernet::EtherType::IPV4, ethernet::EtherType::IPV6] {
        let mut whole = vec![0; ethernet::HEADER_LEN];
        ethernet::emit(&mut whole, MAC, MAC, ethertype);
        whole.extend(data);
        let packet = &mut whole[ethernet::HEADER_LEN..];
        if ethertype == ethernet::EtherType::IPV4 {
            bytes::put_u8(packet, 0, 0x40 | bytes::u8(packet, 0) & 0x0f);
            if let Ok(mut packet) = ipv4::Packet::new_checked(packet) {
                packet.fill_checksum();
            }
        } else {
            bytes::put_u8(packet, 0, 0x60 | bytes::u8(packet, 0) & 0x0f);
        }
        frame(&whole);
    }
}

/// Ethernet, tags, and one pass over all of it.
fn frame(data: &[u8]) {
    let _ = Pretty(data).to_string();
    let dissected = dissect(data);
    let Ok(frame) = ethernet::Frame::new_checked(data) else {
        assert!(dissected.is_err());
        return;
    };
    let _ = (frame.dst(), frame.src(), frame.payload(), frame.outer_ethertype().to_string());
    if let Ok((tags, ethertype, payload)) = frame.tags() {
        assert!(payload <= data.len());
        assert_eq!(payload, ethernet::HEADER_LEN + tags.len_bytes());
        let _ = (tags.ids().count(), ethertype.to_string());
    }
    if let Ok(dissected) = dissected
        && let Net::Ip(ip) = dissected.net
    {
        check_ip(data, &ip);
    }
    let mut copy = data.to_vec();
    ethernet::emit(&mut copy, MAC, MAC, ethernet::EtherType::ARP);
    let Ok(mut frame) = ethernet::Frame::new_checked(&mut copy[..]) else {
        unreachable!("as long as before")
    };
    assert_eq!((frame.dst(), frame.src()), (MAC, MAC));
    let _ = frame.payload_mut();
}

fn check_ip(frame: &[u8], ip: &IpInfo) {
    assert!(ip.l3 < ip.l4 && ip.l4 <= ip.end && ip.end <= frame.len());
    assert_eq!(ip.src.is_ipv4(), ip.dst.is_ipv4());
    assert_eq!((ip.v4().is_some(), ip.v6().is_some()), (!ip.is_v6(), ip.is_v6()));
    assert!(ip.checksum_at().is_none_or(|at| at >= ip.l4 && at + 2 <= ip.end));
    assert!(!ip.is_empty() && ip.l4_len() <= ip.len());
    if ip.fragment_header != 0 {
        assert!(ip.is_v6() && ip.fragment_header + ipv6::FRAGMENT_HEADER_LEN <= ip.l4);
    }
    if let Fragment::Later { offset, .. } = ip.fragment {
        assert!(offset > 0 && ip.ports().is_none());
    }
    let _ = ndp::Repr::parse(frame, ip);
    if let Ok(Some(quoted)) = Quoted::parse(frame, ip) {
        assert!(
            ip.l4 < quoted.l3 && quoted.l3 < quoted.l4 && quoted.l4 <= quoted.end && quoted.end <= ip.end
        );
        assert!(quoted.checksum_at.is_none_or(|at| at >= quoted.l4 && at + 2 <= quoted.end));
        assert!(quoted.ports.is_none() || quoted.l4 + 4 <= quoted.end);
    }
}

/// ARP.
pub fn arp(data: &[u8]) {
    let Ok(repr) = arp::Repr::parse(data) else { return };
    let mut again = [0xa5; arp::LEN];
    repr.emit(&mut again);
    assert_eq!(&again[..], &data[..arp::LEN]);
    let _ = (repr.to_string(), repr.is_announcement(), repr.is_probe(), repr.claimed());
    if let Some(reply) = repr.reply(MAC) {
        assert_eq!((reply.sender_ip, reply.target_ip), (repr.target_ip, repr.sender_ip));
        assert_eq!(arp::Repr::parse(&reply.frame(MAC, MAC)[ethernet::HEADER_LEN..]), Ok(reply));
    }
}

/// IPv4.
pub fn ipv4(data: &[u8]) {
    if let Ok(packet) = ipv4::Packet::new_header(data) {
        let _ = (packet.options(), packet.payload(), packet.is_source_routed());
    }
    let mut copy = data.to_vec();
    let Ok(mut packet) = ipv4::Packet::new_checked(&mut copy[..]) else { return };
    let _ = (packet.dont_fragment(), packet.more_fragments(), packet.fragment_offset(), packet.ident());
    assert_eq!(packet.payload().len(), usize::from(packet.total_len()) - packet.header_len());
    packet.fill_checksum();
    assert!(packet.checksum_ok());
    packet.set_ttl(packet.ttl().wrapping_sub(1));
    packet.set_tos(!packet.tos());
    let (src, dst) = (packet.src(), packet.dst());
    assert_eq!(packet.set_src(A), Delta::v4(src, A));
    assert_eq!(packet.set_dst(B), Delta::v4(dst, B));
    assert!(packet.checksum_ok());
    packet.payload_mut().fill(0);
    assert!(packet.checksum_ok());
}

/// IPv6 and its extension headers. The first byte stands for the kind of the first header.
pub fn ipv6(data: &[u8]) {
    if let Some((&first, rest)) = data.split_first()
        && let Ok(walk) = ipv6::walk(first, rest)
    {
        assert!(walk.offset <= rest.len());
        assert!(walk.fragment.is_none_or(|f| f.at + ipv6::FRAGMENT_HEADER_LEN <= walk.offset));
    }
    let _ = ipv6::Packet::new_header(data).map(|packet| packet.payload().len());
    let mut copy = data.to_vec();
    let Ok(mut packet) = ipv6::Packet::new_checked(&mut copy[..]) else { return };
    let _ = (packet.traffic_class(), packet.flow_label(), packet.hop_limit(), packet.version());
    assert_eq!(packet.payload().len(), usize::from(packet.payload_len()));
    let (src, dst) = (packet.src(), packet.dst());
    assert_eq!(packet.set_src(C), Delta::v6(src, C));
    assert_eq!(packet.set_dst(D), Delta::v6(dst, D));
    packet.set_hop_limit(1);
    packet.payload_mut().fill(0);
    assert_eq!((packet.src(), packet.dst(), packet.hop_limit()), (C, D, 1));
}

/// TCP: incremental update equals recomputation; the reset is well-formed.
pub fn tcp(data: &[u8]) {
    let Ok(segment) = tcp::Segment::new_checked(data) else { return };
    let _ = (segment.options(), segment.window(), segment.flags().to_string(), segment.flags().opens());
    assert_eq!(segment.header_len() + segment.payload().len(), data.len());
    if let Some(reset) = tcp::Repr::reset_for(&segment, segment.payload().len()) {
        let mut buffer = [0xa5; 40];
        reset.emit(&mut buffer, C.into(), D.into());
        let Ok(written) = tcp::Segment::new_checked(&buffer[..reset.buffer_len()]) else {
            panic!("unreadable")
        };
        assert!(written.checksum_ok(C.into(), D.into()) && written.flags().rst());
        assert_eq!(tcp::Repr::reset_for(&written, 0), None);
        assert_eq!(buffer[20..], [0xa5; 20]);
    }
    let mut copy = data.to_vec();
    let Ok(mut segment) = tcp::Segment::new_checked(&mut copy[..]) else { unreachable!("checked above") };
    segment.fill_checksum(A.into(), B.into());
    assert!(segment.checksum_ok(A.into(), B.into()));
    let pseudo = Delta::v4(A, Ipv4Addr::new(10, 0, 0, 1));
    let body = Delta::u16(segment.src_port(), 4711).and(Delta::u16(segment.dst_port(), 80));
    segment.set_src_port(4711);
    segment.set_dst_port(80);
    segment.set_checksum(L4Sum::Complete.update(segment.checksum(), pseudo, body));
    assert!(segment.checksum_ok(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), B.into()));
}

/// UDP.
pub fn udp(data: &[u8]) {
    if let Ok(datagram) = udp::Datagram::new_header(data) {
        let _ = (datagram.payload(), datagram.is_empty(), datagram.checksum_ok(A.into(), B.into()));
    }
    let mut copy = data.to_vec();
    let Ok(mut datagram) = udp::Datagram::new_checked(&mut copy[..]) else { return };
    datagram.fill_checksum(C.into(), D.into());
    assert!(datagram.checksum_ok(C.into(), D.into()));
    assert!(!checksum::udp_checksum_missing(datagram.checksum(), L4Sum::Complete));
    let body = Delta::u16(datagram.src_port(), 53).and(Delta::u16(datagram.dst_port(), 54));
    datagram.set_src_port(53);
    datagram.set_dst_port(54);
    let sum = L4Sum::Complete.update_udp(datagram.checksum(), Delta::v6(D, Ipv6Addr::LOCALHOST), body);
    datagram.set_checksum(sum);
    assert!(datagram.checksum_ok(C.into(), Ipv6Addr::LOCALHOST.into()));
    datagram.payload_mut().fill(0);
    datagram.set_len(0);
    let _ = (datagram.payload_mut().len(), datagram.is_empty());
}

/// ICMP of both families, and what its errors quote.
pub fn icmp(data: &[u8]) {
    if let Ok(repr) = icmpv4::Repr::parse(data) {
        let _ = repr.to_string();
        let packet = repr.packet(A, B);
        if let Ok(again) = icmpv4::Repr::parse(&packet[ipv4::MIN_HEADER_LEN..]) {
            assert_eq!(again.to_string(), repr.to_string());
        }
    }
    if let Ok(repr) = icmpv6::Repr::parse(data, C, D) {
        let _ = (repr.to_string(), repr.packet(C, D).len());
    }
    let mut copy = data.to_vec();
    if let Ok(mut message) = icmpv4::Message::new_checked(&mut copy[..]) {
        let _ = (message.ident(), message.sequence(), message.mtu(), message.code(), message.is_error());
        message.fill_checksum();
        assert!(message.checksum_ok());
        // All zero is the one content whose checksum has two forms.
        if message.kind() != 0 || message.code() != 0 || message.payload().iter().any(|b| *b != 0) {
            message.set_kind(icmpv4::kind::ECHO_REPLY, 7);
            assert!(message.checksum_ok());
        }
        message.payload_mut().fill(0);
    }
    let mut copy = data.to_vec();
    if let Ok(mut message) = icmpv6::Message::new_checked(&mut copy[..]) {
        message.set_kind(128, 0);
        message.fill_checksum(C, D);
        assert!(message.checksum_ok(C, D));
        let _ = (message.ident(), message.sequence(), message.mtu(), message.code(), message.is_error());
        assert!(icmpv6::Repr::parse(&copy, C, D).is_ok());
    }
    // As the payload of well-formed errors: only the quoted packet is the fuzzer's.
    for (packet, ethertype) in [
        (
            icmpv4::Repr::Error { kind: 3, code: 4, mtu: 1400, quoted: data }.packet(A, B),
            ethernet::EtherType::IPV4,
        ),
        (
            icmpv6::Repr::Error { kind: 2, code: 0, mtu: 1400, quoted: data }.packet(C, D),
            ethernet::EtherType::IPV6,
        ),
    ] {
        let mut frame = vec![0; ethernet::HEADER_LEN];
        ethernet::emit(&mut frame, MAC, MAC, ethertype);
        frame.extend(packet);
        ethernet(&frame);
        let Ok(dissected) = dissect(&frame) else { panic!("our own error is unreadable") };
        let Net::Ip(ip) = dissected.net else { panic!("our own error is no IP") };
        assert!(!matches!(Quoted::parse(&frame, &ip), Ok(None)));
    }
}

/// Neighbour discovery: first as it is, then with the checksum put right, so that the options are reached.
pub fn ndp(data: &[u8]) {
    for dst in [D, ndp::solicited_node(D), ndp::ALL_NODES] {
        for src in [C, Ipv6Addr::UNSPECIFIED] {
            let _ = ndp::Repr::parse_message(data, src, dst, ndp::HOP_LIMIT);
            let mut message = data.to_vec();
            bytes::put_u16(&mut message, icmpv6::CHECKSUM_AT, 0);
            let Ok(mut view) = icmpv6::Message::new_checked(&mut message[..]) else { return };
            view.fill_checksum(src, dst);
            let Ok(repr) = ndp::Repr::parse_message(&message, src, dst, ndp::HOP_LIMIT) else { continue };
            let _ = repr.to_string();
            let mut again = vec![0xa5; repr.buffer_len()];
            repr.emit(&mut again, src, dst);
            assert_eq!(ndp::Repr::parse_message(&again, src, dst, ndp::HOP_LIMIT), Ok(repr));
            if let Some((answer, to)) = repr.answer(src, MAC, true) {
                let frame = answer.frame(MAC, MAC, D, to);
                let Ok(Net::Ip(ip)) = dissect(&frame).map(|d| d.net) else {
                    panic!("our own answer is unreadable")
                };
                assert_eq!(ndp::Repr::parse(&frame, &ip), Ok(Some(answer)));
            }
        }
    }
}
