//! etherparse as an independent oracle.

use etherparse::*;
use proptest::prelude::*;

use super::super::dissect::{Fragment, Net, Transport, dissect};
use super::bytes;

/// What follows the IP header.
#[derive(Clone, Debug)]
enum L4 {
    Tcp { syn: bool, fin: bool, rst: bool, ack: Option<u32>, options: Vec<u8> },
    Udp,
    Echo,
}

#[derive(Clone, Debug)]
struct Spec {
    vlans: Vec<u16>,
    src: [u8; 16],
    dst: [u8; 16],
    v6: bool,
    ttl: u8,
    tos: u8,
    ports: (u16, u16),
    l4: L4,
    /// Bytes of IPv4 options in units of 4 (no operation), and of an IPv6 destination options header in units of 8.
    options: u8,
    hop_by_hop: bool,
    payload: Vec<u8>,
    padding: usize,
}

fn l4() -> impl Strategy<Value = L4> {
    let tcp = (any::<(bool, bool, bool)>(), any::<Option<u32>>(), 0usize..10).prop_map(
        |((syn, fin, rst), ack, words)| L4::Tcp { syn, fin, rst, ack, options: vec![1; words * 4] },
    );
    prop_oneof![tcp, Just(L4::Udp), Just(L4::Echo)]
}

prop_compose! {
    fn spec()(
        vlans in proptest::collection::vec(0u16..4096, 0..=2),
        src in any::<[u8; 16]>(), dst in any::<[u8; 16]>(), v6 in any::<bool>(), ttl in any::<u8>(), tos in any::<u8>(),
        ports in any::<(u16, u16)>(), l4 in l4(), options in 0u8..10, hop_by_hop in any::<bool>(),
        payload in proptest::collection::vec(any::<u8>(), 0..80), padding in 0usize..40,
    ) -> Spec {
        Spec { vlans, src, dst, v6, ttl, tos, ports, l4, options, hop_by_hop, payload, padding }
    }
}

impl Spec {
    fn ip(&self) -> IpHeaders {
        // The builder sets protocol, lengths and checksum.
        if self.v6 {
            let raw = |units: u8| {
                Ipv6RawExtHeader::new_raw(IpNumber::UDP, &vec![0; 6 + usize::from(units) * 8]).unwrap()
            };
            let header = Ipv6Header {
                traffic_class: self.tos,
                hop_limit: self.ttl,
                source: self.src,
                destination: self.dst,
                ..Ipv6Header::default()
            };
            let extensions = Ipv6Extensions {
                hop_by_hop_options: self.hop_by_hop.then(|| raw(0)),
                destination_options: (self.options > 0).then(|| raw(self.options)),
                ..Ipv6Extensions::default()
            };
            IpHeaders::Ipv6(header, extensions)
        } else {
            let short = |a: [u8; 16]| [a[0], a[1], a[2], a[3]];
            let mut header =
                Ipv4Header::new(0, self.ttl, IpNumber::UDP, short(self.src), short(self.dst)).unwrap();
            header.dscp = IpDscp::try_new(self.tos >> 2).unwrap();
            header.ecn = IpEcn::try_new(self.tos & 3).unwrap();
            header.options = Ipv4Options::try_from(&vec![1; usize::from(self.options) * 4][..]).unwrap();
            IpHeaders::Ipv4(header, Ipv4Extensions::default())
        }
    }

    fn frame(&self) -> Vec<u8> {
        let link = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let id = |n: usize| VlanId::try_new(self.vlans[n]).unwrap();
        let ip = match self.vlans.len() {
            0 => link.ip(self.ip()),
            1 => link.single_vlan(id(0)).ip(self.ip()),
            _ => link.double_vlan(id(0), id(1)).ip(self.ip()),
        };
        let mut frame = Vec::new();
        match &self.l4 {
            L4::Tcp { syn, fin, rst, ack, options } => {
                let mut header = TcpHeader::new(self.ports.0, self.ports.1, 77, 1000);
                (header.syn, header.fin, header.rst) = (*syn, *fin, *rst);
                header.ack = ack.is_some();
                header.acknowledgment_number = ack.unwrap_or(0);
                header.set_options_raw(options).unwrap();
                ip.tcp_header(header).write(&mut frame, &self.payload).unwrap();
            }
            L4::Udp => ip.udp(self.ports.0, self.ports.1).write(&mut frame, &self.payload).unwrap(),
            L4::Echo if self.v6 => ip.icmpv6_echo_request(1, 2).write(&mut frame, &self.payload).unwrap(),
            L4::Echo => ip.icmpv4_echo_reply(1, 2).write(&mut frame, &self.payload).unwrap(),
        }
        frame.resize(frame.len() + self.padding, 0x5a);
        frame
    }
}

/// Compares our reading of `frame` with etherparse's, when both can read it. What we read, etherparse must.
fn compare(frame: &[u8]) -> Result<(), TestCaseError> {
    let Ok(ours) = dissect(frame) else { return Ok(()) };
    let Net::Ip(ip) = ours.net else { return Ok(()) };
    // etherparse looks behind AH, and reads IGMP and ICMP of the other family; we don't.
    if ip.transport == Transport::Other && matches!(ip.proto, 1 | 2 | 51 | 58) {
        return Ok(());
    }
    // It takes an IPv6 payload length of 0 for "up to the end", whether or not that is a jumbogram's.
    if ip.is_v6() && ip.len() == super::super::ipv6::HEADER_LEN {
        return Ok(());
    }
    // It wants ICMP timestamps to be of one exact length.
    if matches!(ip.transport, Transport::Icmp { kind: 13 | 14, .. }) {
        return Ok(());
    }
    let theirs = SlicedPacket::from_ethernet(frame);
    let theirs = match theirs {
        Ok(theirs) => theirs,
        Err(error) => return Err(TestCaseError::fail(format!("{error} for {ours:?}"))),
    };
    let vlans: Vec<u16> = theirs.vlan_ids().iter().map(|id| id.value()).collect();
    prop_assert_eq!(ours.vlan.ids().collect::<Vec<_>>(), vlans);
    let (payload, src, dst, ttl, tos) = match theirs.net {
        Some(NetSlice::Ipv4(slice)) => {
            let h = slice.header();
            let tos = h.dcp().value() << 2 | h.ecn().value();
            (slice.payload().clone(), h.source_addr().into(), h.destination_addr().into(), h.ttl(), tos)
        }
        Some(NetSlice::Ipv6(slice)) => {
            let h = slice.header();
            let (src, dst) = (h.source_addr().into(), h.destination_addr().into());
            (slice.payload().clone(), src, dst, h.hop_limit(), h.traffic_class())
        }
        other => return Err(TestCaseError::fail(format!("{other:?} for {ours:?}"))),
    };
    let ips: (std::net::IpAddr, std::net::IpAddr) = (src, dst);
    prop_assert_eq!((ip.src, ip.dst, ip.ttl, ip.traffic_class), (ips.0, ips.1, ttl, tos));
    prop_assert_eq!(ip.fragment != Fragment::Whole, payload.fragmented);
    // etherparse stops at the second extension header of a kind, and looks for some in later fragments.
    let later = ip.is_v6() && matches!(ip.fragment, Fragment::Later { .. });
    if later || matches!(payload.ip_number.0, 0 | 43 | 44 | 60) {
        return Ok(());
    }
    prop_assert_eq!(ip.proto, payload.ip_number.0);
    prop_assert_eq!(bytes::range(frame, ip.l4, ip.end), payload.payload);
    match (ip.transport, theirs.transport) {
        (Transport::Tcp { src_port, dst_port, flags, header_len }, Some(TransportSlice::Tcp(tcp))) => {
            prop_assert_eq!((src_port, dst_port), (tcp.source_port(), tcp.destination_port()));
            prop_assert_eq!(header_len, tcp.header_len());
            let theirs = (tcp.syn(), tcp.ack(), tcp.fin(), tcp.rst());
            prop_assert_eq!((flags.syn(), flags.ack(), flags.fin(), flags.rst()), theirs);
        }
        (Transport::Udp { src_port, dst_port }, Some(TransportSlice::Udp(udp))) => {
            prop_assert_eq!((src_port, dst_port), (udp.source_port(), udp.destination_port()));
        }
        (Transport::Icmp { kind, code }, Some(TransportSlice::Icmpv4(icmp))) => {
            prop_assert_eq!((kind, code), (icmp.type_u8(), icmp.code_u8()));
        }
        (Transport::Icmpv6 { kind, code }, Some(TransportSlice::Icmpv6(icmp))) => {
            prop_assert_eq!((kind, code), (icmp.type_u8(), icmp.code_u8()));
        }
        // etherparse reads no L4 header of any fragment, we do of the first.
        (_, None) if payload.fragmented => {}
        (Transport::Other | Transport::None, None) => {}
        (ours, theirs) => return Err(TestCaseError::fail(format!("{ours:?}, oracle: {theirs:?}"))),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn generated_frames_are_read_alike(spec in spec()) {
        let frame = spec.frame();
        prop_assert!(dissect(&frame).is_ok(), "{:?}", dissect(&frame));
        compare(&frame)?;
    }

    #[test]
    fn broken_frames_are_read_alike_or_refused(
        spec in spec(), changes in proptest::collection::vec((0usize..90, any::<u8>()), 1..4), cut in 0usize..200,
    ) {
        let mut frame = spec.frame();
        for (at, value) in changes {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        frame.truncate(cut.max(40));
        // Otherwise hardly a changed IPv4 header would pass.
        if spec.vlans.is_empty() && frame[12..14] == [8, 0] {
            frame = super::checked_v4(frame);
        }
        compare(&frame)?;
    }
}
