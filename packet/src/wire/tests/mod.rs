//! Tests of dissection: literal frames, frames that break one rule each, and etherparse as an independent oracle.

mod messages;
mod oracle;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::dissect::{Fragment, IpInfo, Net, Transport, dissect};
use super::{Malformed, Pretty, bytes, ipv4, ipv6, proto};
use crate::checksum;

/// A SYN with options over IPv4, padded to the least frame length.
const SYN: [u8; 64] = [
    0x02, 0, 0, 0, 0, 0x01, 0x02, 0, 0, 0, 0, 0x0a, 0x08, 0x00, // Ethernet
    0x45, 0x00, 0, 44, 0, 0, 0x40, 0, 64, 6, 0, 0, 198, 51, 100, 7, 192, 0, 2,
    100, // IPv4, checksum below
    0x9c, 0x40, 0, 80, 0, 0, 0, 9, 0, 0, 0, 0, 0x60, 0x02, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 0xb4, // TCP
    0, 0, 0, 0, 0, 0, // padding
];

/// A UDP datagram over IPv6.
const DATAGRAM: [u8; 66] = [
    0x02, 0, 0, 0, 0, 0x01, 0x02, 0, 0, 0, 0, 0x0a, 0x86, 0xdd, // Ethernet
    0x6b, 0x80, 0, 0, 0, 12, 17, 61, // IPv6
    0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, // source
    0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, // destination
    0x9c, 0x40, 0, 53, 0, 12, 0x12, 0x34, 1, 2, 3, 4, // UDP
];

/// The frame with the IPv4 header checksum put right.
fn checked_v4(mut frame: Vec<u8>) -> Vec<u8> {
    let header = usize::from(frame[14] & 15) * 4;
    frame[24..26].fill(0);
    let sum = checksum::checksum(bytes::range(&frame, 14, 14 + header));
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn syn() -> Vec<u8> {
    checked_v4(SYN.to_vec())
}

/// The frame after `change`, its IPv4 checksum put right.
fn syn_with(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = SYN.to_vec();
    change(&mut frame);
    checked_v4(frame)
}

fn datagram_with(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = DATAGRAM.to_vec();
    change(&mut frame);
    frame
}

/// The datagram with `extensions` (next-header numbers within included) between IPv6 header and UDP.
fn datagram_behind(first: u8, extensions: &[u8]) -> Vec<u8> {
    datagram_with(|frame| {
        frame[20] = first;
        frame.splice(54..54, extensions.iter().copied());
        let len = (frame.len() - 54) as u16;
        frame[18..20].copy_from_slice(&len.to_be_bytes());
    })
}

fn ip(frame: &[u8]) -> IpInfo {
    match dissect(frame).expect("a good frame").net {
        Net::Ip(ip) => ip,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_syn_over_ipv4() {
    let frame = syn();
    let info = ip(&frame);
    assert_eq!(info.src, IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)));
    assert_eq!(info.dst, IpAddr::V4(Ipv4Addr::new(192, 0, 2, 100)));
    assert_eq!((info.l3, info.l4, info.end, info.len(), info.l4_len()), (14, 34, 58, 44, 24));
    assert_eq!((info.ttl, info.proto, info.fragment), (64, proto::TCP, Fragment::Whole));
    assert_eq!(info.ports(), Some((40_000, 80)));
    assert_eq!(info.checksum_at(), Some(50));
    let Transport::Tcp { flags, header_len, .. } = info.transport else { panic!("{info:?}") };
    assert!(flags.opens());
    assert_eq!(header_len, 24);
    assert_eq!(
        Pretty(&frame).to_string(),
        "02:00:00:00:00:0a > 02:00:00:00:00:01, IP 198.51.100.7.40000 > 192.0.2.100.80: TCP [S] seq 9, length 0"
    );
}

#[test]
fn a_datagram_over_ipv6() {
    let info = ip(&DATAGRAM);
    assert_eq!(info.dst, IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100)));
    assert_eq!((info.l4, info.end, info.ttl, info.traffic_class), (54, 66, 61, 0xb8));
    assert_eq!((info.ports(), info.checksum_at()), (Some((40_000, 53)), Some(60)));
    assert_eq!(
        Pretty(&DATAGRAM).to_string(),
        "02:00:00:00:00:0a > 02:00:00:00:00:01, IP6 2001:db8::7.40000 > 2001:db8::100.53: UDP, length 4"
    );
}

#[test]
fn tags_shift_every_offset() {
    let plain = ip(&syn());
    let mut frame = syn();
    frame.splice(12..12, [0x88, 0xa8, 0, 100, 0x81, 0, 0, 200]);
    let tagged = ip(&frame);
    assert_eq!((tagged.l3, tagged.l4, tagged.end), (plain.l3 + 8, plain.l4 + 8, plain.end + 8));
    assert_eq!(tagged.transport, plain.transport);
    assert!(Pretty(&frame).to_string().contains("vlan 100, vlan 200, IP 198"));
}

#[test]
fn arp_and_strange_frames_are_no_ip() {
    let net = |ethertype: [u8; 2]| {
        let mut frame = SYN.to_vec();
        frame[12..14].copy_from_slice(&ethertype);
        dissect(&frame).unwrap().net
    };
    assert_eq!(net([8, 6]), Net::Arp);
    for other in [[0x88, 0xcc], [0, 50], [0x88, 0x47]] {
        assert_eq!(net(other), Net::Other);
    }
}

/// A super-frame is as long as IPv4 can say.
#[test]
fn a_super_frame_of_64_kib_is_legal() {
    let frame = syn_with(|f| {
        f.truncate(58);
        f.resize(14 + 65_535, 0x5a);
        f[16..18].copy_from_slice(&[0xff, 0xff]);
    });
    assert_eq!(ip(&frame).end, frame.len());
    let frame = datagram_with(|f| {
        f.resize(54 + 65_535, 0x5a);
        f[18..20].copy_from_slice(&[0xff, 0xff]);
        f[58..60].copy_from_slice(&[0xff, 0xff]);
    });
    assert_eq!(ip(&frame).end, frame.len());
}

#[test]
fn each_broken_rule_has_its_name() {
    use Malformed::*;
    let source_route = [131, 7, 4, 192, 0, 2, 1, 0];
    let cases: &[(&str, Vec<u8>, Malformed)] = &[
        ("no frame", vec![], Truncated),
        ("half an Ethernet header", SYN[..13].to_vec(), Truncated),
        ("half an IPv4 header", SYN[..33].to_vec(), Truncated),
        ("half an IPv6 header", DATAGRAM[..53].to_vec(), Truncated),
        ("IPv6 as IPv4", syn_with(|f| f[14] = 0x65), BadVersion),
        ("IPv4 as IPv6", datagram_with(|f| f[14] = 0x4b), BadVersion),
        ("IPv4 header of 16 bytes", syn_with(|f| f[14] = 0x44), BadHeaderLength),
        (
            "IPv4 header beyond the frame",
            syn_with(|f| {
                f.truncate(38);
                f[14] = 0x4f
            }),
            BadHeaderLength,
        ),
        ("IPv4 packet shorter than its header", syn_with(|f| f[17] = 19), BadTotalLength),
        ("IPv4 packet longer than the frame", syn_with(|f| f[17] = 51), BadTotalLength),
        ("IPv6 packet longer than the frame", datagram_with(|f| f[19] = 13), BadTotalLength),
        (
            "wrong checksum",
            {
                let mut f = syn();
                f[22] -= 1;
                f
            },
            BadHeaderChecksum,
        ),
        ("TCP header cut off by the packet's end", syn_with(|f| f[17] = 39), Truncated),
        ("TCP header of 16 bytes", syn_with(|f| f[46] = 0x40), BadHeaderLength),
        ("TCP options beyond the packet", syn_with(|f| f[46] = 0x70), BadHeaderLength),
        ("UDP length below its header", datagram_with(|f| f[59] = 7), BadUdpLength),
        ("UDP length beyond the packet", datagram_with(|f| f[59] = 13), BadUdpLength),
        ("UDP header cut off", datagram_with(|f| f[19] = 7), Truncated),
        (
            "first fragment with half a TCP header",
            syn_with(|f| {
                f[20] = 0x20;
                f[17] = 36
            }),
            TinyFragment,
        ),
        ("fragment over the TCP header", syn_with(|f| f[20..22].copy_from_slice(&[0, 2])), TinyFragment),
        ("fragment beyond 64 KiB", syn_with(|f| f[20..22].copy_from_slice(&[0x1f, 0xff])), BadFragment),
        ("IPv6 fragment of odd length", datagram_behind(44, &[17, 0, 0, 1, 0, 0, 0, 1]), BadFragment),
        (
            "IPv6 fragment without its headers",
            datagram_behind(44, &[60, 0, 0, 1, 0, 0, 0, 1, 17, 3, 0, 0, 0, 0, 0, 0]),
            TinyFragment,
        ),
        (
            "jumbogram",
            datagram_with(|f| {
                f[18..20].fill(0);
                f[20] = 0
            }),
            Jumbogram,
        ),
        ("routing header on its way", datagram_behind(43, &[17, 0, 0, 1, 0, 0, 0, 0]), SourceRouted),
        (
            "hop-by-hop options behind others",
            datagram_behind(60, &[0, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0]),
            BadField,
        ),
        ("extension beyond the packet", datagram_behind(60, &[17, 9, 0, 0, 0, 0, 0, 0]), Truncated),
        (
            "source route option",
            syn_with(|f| {
                f[14] = 0x47;
                f[17] = 52;
                f.splice(34..34, source_route);
                f.truncate(66)
            }),
            SourceRouted,
        ),
        (
            "nine extensions",
            datagram_behind(60, &{
                let mut e = [60, 0, 1, 4, 0, 0, 0, 0].repeat(9);
                e[64] = 17;
                e
            }),
            TooManyExtensions,
        ),
    ];
    for (what, frame, reason) in cases {
        assert_eq!(dissect(frame), Err(*reason), "{what}");
        assert!(Pretty(frame).to_string().contains(reason.as_str()), "{what}");
    }
}

#[test]
fn extension_headers_are_walked() {
    let extensions =
        [60, 0, 1, 4, 0, 0, 0, 0, 43, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 17, 0, 4, 0, 0, 0, 0, 0];
    let info = ip(&datagram_behind(proto::HOP_BY_HOP, &extensions));
    assert_eq!((info.l4, info.proto, info.ports()), (54 + 32, proto::UDP, Some((40_000, 53))));
    // As many as are allowed.
    let mut eight = [60, 0, 1, 4, 0, 0, 0, 0].repeat(8);
    eight[56] = 17;
    assert_eq!(ip(&datagram_behind(60, &eight)).l4, 54 + 64);
}

#[test]
fn what_ah_and_esp_hide_is_not_looked_at() {
    for hidden in [50, 51, 59, 135] {
        let info = ip(&datagram_behind(hidden, &[]));
        assert_eq!((info.proto, info.transport, info.ports()), (hidden, Transport::Other, None));
    }
    // ICMP of the other family is no ICMP.
    assert_eq!(ip(&datagram_behind(proto::ICMP, &[])).transport, Transport::Other);
    assert_eq!(ip(&syn_with(|f| f[23] = proto::ICMPV6)).transport, Transport::Other);
}

#[test]
fn fragments_of_ipv4() {
    let first = ip(&syn_with(|f| f[18..22].copy_from_slice(&[0x12, 0x34, 0x20, 0])));
    assert_eq!((first.fragment, first.ports()), (Fragment::First { id: 0x1234 }, Some((40_000, 80))));
    let later = ip(&syn_with(|f| f[18..22].copy_from_slice(&[0x12, 0x34, 0x20, 185])));
    assert_eq!(later.fragment, Fragment::Later { id: 0x1234, offset: 1480, last: false });
    assert_eq!((later.transport, later.ports(), later.checksum_at()), (Transport::None, None, None));
    let last = ip(&syn_with(|f| f[18..22].copy_from_slice(&[0x12, 0x34, 0, 185])));
    assert_eq!(last.fragment, Fragment::Later { id: 0x1234, offset: 1480, last: true });
}

#[test]
fn fragments_of_ipv6() {
    let mut frame = datagram_behind(44, &[17, 0, 0, 1, 0, 0, 0, 7]);
    frame.extend([0; 4]);
    frame[19] += 4;
    // A first fragment's UDP length is that of the whole datagram.
    frame[66..68].copy_from_slice(&[0x20, 0]);
    let first = ip(&frame);
    assert_eq!((first.fragment, first.fragment_header), (Fragment::First { id: 7 }, 54));
    assert_eq!(first.ports(), Some((40_000, 53)));

    let later = ip(&datagram_behind(44, &[17, 0, 0x05, 0xc8, 0, 0, 0, 7]));
    assert_eq!(later.fragment, Fragment::Later { id: 7, offset: 1480, last: true });
    assert_eq!((later.proto, later.l4, later.transport), (proto::UDP, 62, Transport::None));

    // An atomic fragment is whole (RFC 6946).
    let atomic = ip(&datagram_behind(44, &[17, 0, 0, 0, 0, 0, 0, 7]));
    assert_eq!((atomic.fragment, atomic.fragment_header), (Fragment::Whole, 54));
    assert_eq!(atomic.ports(), Some((40_000, 53)));
}

#[test]
fn rewriting_an_ipv4_header_keeps_its_checksum_right() {
    let mut frame = syn();
    let mut packet = ipv4::Packet::new_checked(&mut frame[14..]).unwrap();
    packet.set_ttl(63);
    packet.set_tos(0xb8);
    let delta = packet.set_src(Ipv4Addr::new(10, 0, 0, 1));
    assert_eq!(delta, checksum::Delta::v4(Ipv4Addr::new(198, 51, 100, 7), Ipv4Addr::new(10, 0, 0, 1)));
    packet.set_dst(Ipv4Addr::new(10, 0, 0, 2));
    assert!(packet.checksum_ok());
    assert_eq!((packet.ttl(), packet.tos(), packet.protocol()), (63, 0xb8, proto::TCP));
    assert_eq!(packet.dst(), Ipv4Addr::new(10, 0, 0, 2));
}

#[test]
fn options_that_are_no_source_route_pass() {
    let with_options = |options: [u8; 8]| {
        syn_with(|f| {
            f[14] = 0x47;
            f[17] = 52;
            f.splice(34..34, options);
            f.truncate(66);
        })
    };
    // Router alert; no operation and end; lengths that lead nowhere.
    for options in [[148, 4, 0, 0, 1, 1, 0, 131], [7, 0, 131, 7, 4, 0, 0, 0], [7, 200, 131, 7, 4, 0, 0, 0]] {
        assert_eq!(ip(&with_options(options)).l4, 42);
    }
    assert_eq!(dissect(&with_options([1, 1, 137, 6, 4, 0, 0, 0])), Err(Malformed::SourceRouted));
}

#[test]
fn headers_that_we_build_are_read_back() {
    let mut buffer = [0xa5; 60];
    let repr = ipv6::Repr {
        src: Ipv6Addr::LOCALHOST,
        dst: Ipv6Addr::UNSPECIFIED,
        next_header: proto::UDP,
        hop_limit: 9,
        traffic_class: 0xb8,
        payload_len: 20,
    };
    repr.emit(&mut buffer);
    let packet = ipv6::Packet::new_checked(&buffer[..]).unwrap();
    assert_eq!((packet.src(), packet.dst(), packet.hop_limit()), (repr.src, repr.dst, 9));
    assert_eq!((packet.traffic_class(), packet.flow_label(), packet.payload()), (0xb8, 0, &[0xa5; 20][..]));
}

/// Calls everything that takes a frame.
fn exercise(frame: &[u8]) {
    let _ = Pretty(frame).to_string();
    if let Ok(dissected) = dissect(frame) {
        let _ = super::arp::Repr::parse(bytes::range(frame, dissected.l3, usize::MAX));
        if let Net::Ip(ip) = dissected.net {
            assert!(ip.l3 <= ip.l4 && ip.l4 <= ip.end && ip.end <= frame.len());
            assert!(ip.checksum_at().is_none_or(|at| at + 2 <= ip.end));
            let _ = super::ndp::Repr::parse(frame, &ip);
            if let Ok(Some(quoted)) = super::Quoted::parse(frame, &ip) {
                assert!(quoted.l3 < quoted.l4 && quoted.l4 <= quoted.end && quoted.end <= ip.end);
                assert!(quoted.checksum_at.is_none_or(|at| at + 2 <= quoted.end));
            }
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(frame in proptest::collection::vec(any::<u8>(), 0..200)) {
        exercise(&frame);
    }

    #[test]
    fn no_mutation_of_a_good_frame_panics(
        which in 0usize..4, cut in 0usize..100, changes in proptest::collection::vec((0usize..90, any::<u8>()), 0..6),
    ) {
        let mut frame = match which {
            0 => syn(),
            1 => DATAGRAM.to_vec(),
            2 => datagram_behind(44, &[17, 0, 0, 1, 0, 0, 0, 7]),
            _ => datagram_behind(0, &[60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0]),
        };
        frame.truncate(cut.max(15));
        for (at, value) in changes {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        if frame[12..14] == [8, 0] && frame.len() >= 34 {
            frame = checked_v4(frame);
        }
        exercise(&frame);
    }
}
