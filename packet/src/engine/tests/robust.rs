//! Whatever comes in, the engine neither panics nor counts a frame twice.

use proptest::prelude::*;

use super::*;
use crate::engine::*;
use crate::plan::*;

fn everything() -> World {
    let mut services = Vec::new();
    let modes = [Mode::Dsr, Mode::Nat, Mode::NatTransparent];
    for (n, mode) in modes.into_iter().enumerate() {
        for v6 in FAMILIES {
            for protocol in PROTOCOLS {
                let mut plan = service(mode, v6, protocol, 3);
                plan.id = services.len() as u32;
                plan.port = 80 + n as u16;
                for backend in &mut plan.backends {
                    backend.port = plan.port;
                }
                plan.backends[0].weight = 0;
                plan.backends[1].alive = false;
                services.push(plan);
            }
        }
    }
    World::with_limits(services, 64, 1_000_000)
}

fn arbitrary_offload() -> impl Strategy<Value = Offload> {
    let gso = prop::sample::select(vec![Gso::None, Gso::None, Gso::TcpV4, Gso::TcpV6, Gso::UdpL4]);
    (any::<bool>(), 0u16..80, 0u16..20, gso, 0u16..2000).prop_map(
        |(needs_csum, csum_start, csum_offset, gso, gso_size)| Offload {
            needs_csum,
            csum_start,
            csum_offset,
            gso,
            gso_size,
            hdr_len: 0,
        },
    )
}

/// Frames that get far: built right, then spoilt here and there.
fn nearly_right() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop::sample::select(vec![SYN, ACK, SYN_ACK, FIN_ACK, RST]);
    let base = (any::<bool>(), any::<bool>(), any::<bool>(), 78u16..84, 1u16..40, flags, 0u8..3).prop_map(
        |(v6, tcp, to_snat, port, client_port, flags, ttl)| {
            let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
            let mut packet = request_from(protocol, v6, client_port).flags(flags).ttl(ttl).len(40);
            packet.dst.set_port(port);
            if to_snat {
                packet.dst.set_ip(snat(v6));
            }
            packet.build()
        },
    );
    let spoils = prop::collection::vec((0usize..120, any::<u8>()), 0..4);
    (base, spoils, prop::option::of(0usize..120)).prop_map(|(mut frame, spoils, cut)| {
        for (at, value) in spoils {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        frame.truncate(cut.unwrap_or(usize::MAX));
        frame
    })
}

/// A header that leads into the parsers, and noise behind it.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let dst = prop::sample::select(vec![OWN_MAC, [0xff; 6], [0x33, 0x33, 0, 0, 0, 1]]);
    let ethertype = prop::sample::select(vec![[8, 0], [0x86, 0xdd], [8, 6], [0x81, 0]]);
    (dst, ethertype, prop::collection::vec(any::<u8>(), 0..200)).prop_map(|(dst, ethertype, rest)| {
        let mut frame = dst.to_vec();
        frame.extend(ROUTER_MAC);
        frame.extend(ethertype);
        frame.extend(rest);
        frame
    })
}

/// An ICMP error that quotes noise or something nearly right.
fn icmp_error() -> impl Strategy<Value = Vec<u8>> {
    (nearly_right(), any::<bool>(), 0u8..5, any::<bool>()).prop_map(|(quoted, v6, code, to_snat)| {
        let quoted = quoted.get(14..).unwrap_or(&[]);
        let dst = if to_snat { snat(v6) } else { vip(v6) };
        let ethernet = etherparse::PacketBuilder::ethernet2(ROUTER_MAC, OWN_MAC);
        let mut frame = Vec::new();
        match (client(v6).ip(), dst) {
            (std::net::IpAddr::V4(src), std::net::IpAddr::V4(dst)) => {
                let icmp = ethernet.ipv4(src.octets(), dst.octets(), 64).icmpv4_raw(3, code, [0; 4]);
                icmp.write(&mut frame, quoted).unwrap();
            }
            (std::net::IpAddr::V6(src), std::net::IpAddr::V6(dst)) => {
                let icmp = ethernet.ipv6(src.octets(), dst.octets(), 64).icmpv6_raw(1 + code % 4, 0, [0; 4]);
                icmp.write(&mut frame, quoted).unwrap();
            }
            _ => unreachable!(),
        }
        frame
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn arbitrary_frames_have_one_verdict_each(
        frames in prop::collection::vec(
            (prop_oneof![4 => nearly_right(), 2 => noise(), 2 => icmp_error(), 1 => prop::collection::vec(any::<u8>(), 0..120)],
             prop_oneof![3 => Just(Offload::default()), 1 => arbitrary_offload()],
             any::<bool>(), any::<bool>(), 0u64..10),
            1..40),
    ) {
        let mut world = everything();
        for (mut frame, offload, inside, lease, seconds) in frames {
            let len = frame.len();
            let port = if inside { Port::Inside } else { Port::Service };
            world.lease(true, lease);
            // `process` checks that exactly one counter moves.
            let verdict = world.process(&mut frame, offload, port);
            prop_assert_eq!(frame.len(), len);
            if !lease {
                let leaves = matches!(
                    verdict,
                    Verdict::Forward { .. } | Verdict::AwaitNeighbour { .. }
                ) || matches!(verdict, Verdict::Reply { fence, .. } if fence.permission == Permission::Forward);
                prop_assert!(!leaves, "without a lease: {:?}", verdict);
            }
            prop_assert!(world.counters().flows <= 64);
            world.pass(seconds);
        }
    }
}
