//! Fragments follow their first.

use super::*;
use crate::engine::*;
use crate::plan::*;

/// Cuts an IP frame in two at `at` bytes of layer 4 (a multiple of 8).
fn cut(frame: &[u8], v6: bool, id: u16, at: usize) -> [Vec<u8>; 2] {
    let l4 = if v6 { 54 } else { 34 };
    let piece = |data: &[u8], offset: usize, more: bool| {
        let mut out = frame[..l4].to_vec();
        if v6 {
            out[18..20].copy_from_slice(&((data.len() + 8) as u16).to_be_bytes());
            let field = (offset as u16) | u16::from(more);
            let mut header = vec![out[20], 0];
            header.extend(field.to_be_bytes());
            header.extend(u32::from(id).to_be_bytes());
            out[20] = 44;
            out.extend(header);
        } else {
            out[16..18].copy_from_slice(&((20 + data.len()) as u16).to_be_bytes());
            out[18..20].copy_from_slice(&id.to_be_bytes());
            let field = (offset as u16 / 8) | if more { 0x2000 } else { 0 };
            out[20..22].copy_from_slice(&field.to_be_bytes());
            out[24..26].fill(0);
            let sum = crate::checksum::checksum(&out[14..34]);
            out[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        out.extend(data);
        out
    };
    let payload = &frame[l4..];
    [piece(&payload[..at], 0, true), piece(&payload[at..], at, false)]
}

/// Puts two fragments together again.
fn join(first: &[u8], second: &[u8], v6: bool) -> Vec<u8> {
    let mut out = first.to_vec();
    if v6 {
        assert_eq!(first[14..62][8..40], second[14..62][8..40], "the same addresses");
        let next = first[54];
        out[20] = next;
        out.drain(54..62);
        out.extend(&second[62..]);
        let len = out.len() as u16 - 54;
        out[18..20].copy_from_slice(&len.to_be_bytes());
    } else {
        for fragment in [first, second] {
            assert_eq!(crate::checksum::checksum(&fragment[14..34]), 0, "header checksum of each");
        }
        assert_eq!(first[26..34], second[26..34], "the same addresses");
        out.extend(&second[34..]);
        let len = out.len() as u16 - 14;
        out[16..18].copy_from_slice(&len.to_be_bytes());
        out[20..22].fill(0);
        out[24..26].fill(0);
        let sum = crate::checksum::checksum(&out[14..34]);
        out[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    out
}

fn pass(world: &mut World, frame: &[u8], port: Port) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let verdict = world.process(&mut frame, Offload::default(), port);
    assert!(matches!(verdict, Verdict::Forward { .. }), "{verdict:?}");
    frame
}

#[test]
fn they_arrive_together_and_whole_both_ways() {
    for mode in [Mode::Dsr, Mode::Nat, Mode::NatTransparent] {
        for v6 in FAMILIES {
            for protocol in PROTOCOLS {
                let mut world = World::new(vec![service(mode, v6, protocol, 3)]);
                let whole = request(protocol, v6).flags(SYN).len(1300).build();
                let [first, second] = cut(&whole, v6, 77, 800);
                assert_eq!(world.send(&second), Outcome::Dropped("fragment_before_first"));
                let (first, second) =
                    (pass(&mut world, &first, Port::Service), pass(&mut world, &second, Port::Service));
                assert_eq!(first[..12], second[..12], "the same way");
                let ttl_at = if v6 { 21 } else { 22 };
                let ttl = if mode == Mode::Dsr { 64 } else { 63 };
                assert_eq!((first[ttl_at], second[ttl_at]), (ttl, ttl));
                let there = Seen::read(&join(&first, &second, v6));
                assert_eq!(there.payload.len(), 1300);
                let n = u32::from(there.eth_dst[5]);
                assert_eq!(world.counters().backends[n as usize - 1].packets, 2);
                if mode == Mode::Dsr {
                    continue;
                }
                let answer = Packet::new(protocol, there.dst, there.src).inside().len(1301).build();
                let [first, second] = cut(&answer, v6, 78, 640);
                let (first, second) =
                    (pass(&mut world, &first, Port::Inside), pass(&mut world, &second, Port::Inside));
                let back = Seen::read(&join(&first, &second, v6));
                assert_eq!((back.src.ip(), back.dst), (vip(v6), client(v6)));
                assert_eq!((back.eth_dst, back.payload.len()), (ROUTER_MAC, 1301));
            }
        }
    }
}

#[test]
fn they_need_the_lease_and_are_forgotten_soon() {
    let mut world = World::new(vec![service(Mode::Nat, false, Protocol::Udp, 1)]);
    let [first, second] = cut(&request(Protocol::Udp, false).len(1300).build(), false, 5, 800);
    pass(&mut world, &first, Port::Service);
    world.lease(true, false);
    assert_eq!(world.send(&second), Outcome::Dropped("no_lease"));
    world.lease(true, true);
    pass(&mut world, &second, Port::Service);
    world.pass(4);
    assert_eq!(world.send(&second), Outcome::Dropped("fragment_before_first"));
    let mut elsewhere = second.clone();
    elsewhere[30..34].copy_from_slice(&[192, 0, 2, 2]);
    elsewhere[24..26].fill(0);
    let sum = crate::checksum::checksum(&elsewhere[14..34]);
    elsewhere[24..26].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(world.send(&elsewhere), Outcome::NotOurs);
}

#[test]
fn a_plan_in_between_does_not_lose_them() {
    let service = service(Mode::Nat, false, Protocol::Udp, 1);
    let mut world = World::new(vec![service.clone()]);
    let [first, second] = cut(&request(Protocol::Udp, false).len(1300).build(), false, 5, 800);
    pass(&mut world, &first, Port::Service);
    world.engine.install(plan(vec![service]), world.now).unwrap();
    pass(&mut world, &second, Port::Service);
    world.engine.install(plan(vec![]), world.now).unwrap();
    let (mut second, now) = (second, world.now);
    let mut frame = FrameMut::new(&mut second);
    world.engine.process(&mut frame, Port::Service, now, &world.hops);
}

#[test]
fn a_large_ping_is_answered_piece_by_piece() {
    let mut world = World::new(vec![service(Mode::Dsr, false, Protocol::Tcp, 1)]);
    let mut whole = Vec::new();
    let (src, dst) = ([198, 51, 100, 7], [192, 0, 2, 100]);
    let data: Vec<u8> = (0..1400u32).map(|i| i as u8).collect();
    etherparse::PacketBuilder::ethernet2(ROUTER_MAC, OWN_MAC)
        .ipv4(src, dst, 64)
        .icmpv4_echo_request(1, 2)
        .write(&mut whole, &data)
        .unwrap();
    let [first, second] = cut(&whole, false, 9, 800);
    let (first, second) = (pass(&mut world, &first, Port::Service), pass(&mut world, &second, Port::Service));
    let reply = super::icmp::read_error(&join(&first, &second, false));
    assert_eq!((reply.kind, reply.packet), (0, data));
    assert_eq!(second[..6], ROUTER_MAC);
}
