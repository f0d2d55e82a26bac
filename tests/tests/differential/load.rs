//! The program by itself: it loads, its types are those of the maps, its hashes those of `hash.rs`.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use komainu_packet::flow::{BackendSide, Direction, Segment, two_way_step};
use komainu_packet::hash;
use komainu_packet::lane::kernel::abi::{self, FlowCell, FlowKey, LAYOUTS, Plain};
use komainu_packet::lane::kernel::harness::{HARNESS_OBJECT, Harness};
use komainu_packet::lane::kernel::program::{Hook, Kernel, Sizes, TC_OBJECT, XDP_OBJECT};

use crate::rng::Rng;

#[test]
fn both_programs_load_and_let_everything_pass_without_a_plan() {
    for (hook, passes) in [(Hook::Xdp, 2), (Hook::Tc, u32::MAX)] {
        let kernel = Kernel::load(hook, Sizes::default()).unwrap_or_else(|e| panic!("{e}"));
        let frame = [0u8; 64];
        let ran = kernel.test_run(&frame, None, 1).unwrap();
        assert_eq!((ran.action, &ran.frame[..]), (passes, &frame[..]), "{hook:?}");
    }
}

#[test]
fn the_table_of_flows_grows_with_what_is_in_it() {
    const MOST: u32 = 5000;
    let sizes = Sizes { flows: MOST, first_flows: 10, ..Sizes::default() };
    let kernel = Kernel::load(Hook::Xdp, sizes).unwrap_or_else(|e| panic!("{e}"));
    let maps = kernel.maps();
    let name = |n: u32| BackendSide {
        protocol: 6,
        backend: Ipv4Addr::new(10, 0, 0, 1).into(),
        backend_port: 80,
        snat: Ipv4Addr::new(10, 0, 0, 2).into(),
        snat_port: n as u16,
    };
    let key = |n: u32| FlowKey {
        client: abi::wide(Ipv4Addr::from_bits(n).into()),
        service: 1,
        client_port: [1, 2],
        reserved: 0,
    };
    let put = |n: u32| {
        let cell = FlowCell {
            last_seen: n.into(),
            backend: n,
            flags: abi::FLOW_BOUND,
            snat_port: (n as u16).to_be_bytes(),
            snat: abi::wide(name(n).snat),
            client: key(n).client,
            service: 1,
            client_port: [1, 2],
            ..FlowCell::zeroed()
        };
        maps.put_flow(&cell, Some(&name(n)))
    };
    let is_there = |n: u32| {
        let by_client = maps.flow(&key(n));
        by_client.is_some_and(|flow| flow.backend == n) && maps.answered(&name(n)) == by_client
    };
    for n in 0..MOST {
        put(n).unwrap();
    }
    assert_eq!(put(MOST).unwrap_err().raw_os_error(), Some(libc::E2BIG));
    assert!((0..MOST).all(is_there) && maps.count_flows() == (MOST as usize, MOST as usize));
    // Whichever name it is asked for by.
    assert!(
        maps.remove_flow(&key(7), None) && maps.flow(&key(7)).is_none() && maps.answered(&name(7)).is_none()
    );
    assert!(!maps.remove_flow(&key(7), Some(&name(7))));
    put(MOST).unwrap();
    assert!(maps.release_name(&name(8)) && maps.flow(&key(8)).is_none());
    // A name that is taken is nobody else's, and in the end the flow's that it was taken for.
    assert!(maps.reserve_name(&name(8)).unwrap() && !maps.reserve_name(&name(8)).unwrap());
    assert!(maps.answered(&name(8)).is_some_and(|flow| flow.service == abi::NOBODY));
    put(8).unwrap();
    assert!(is_there(8) && (9..=MOST).all(is_there));
    assert_eq!(maps.count_flows(), (MOST as usize, MOST as usize));
    maps.clear_flows().unwrap();
    assert_eq!(maps.count_flows(), (0, 0));
}

/// The maps' types in both objects are laid out as in `abi.rs`, field by field.
#[test]
fn both_sides_agree_on_every_field() {
    for object in [XDP_OBJECT, TC_OBJECT] {
        let mut structs = btf_structs(object);
        // Those that stand behind nested descriptions of maps, where BTF does not reach.
        structs.extend(btf_structs(HARNESS_OBJECT));
        for layout in LAYOUTS {
            let mut name = String::new();
            for c in layout.name.trim_end_matches("Cell").chars() {
                if c.is_uppercase() && !name.is_empty() {
                    name.push('_');
                }
                name.push(c.to_ascii_lowercase());
            }
            let Some((size, fields)) = structs.get(&name) else {
                panic!("struct {name} is not in the object")
            };
            assert_eq!(*size, layout.size, "size of {name}");
            let ours: Vec<(String, usize)> =
                layout.fields.iter().map(|(f, at)| ((*f).to_owned(), *at)).collect();
            assert_eq!(*fields, ours, "fields of {name}");
        }
    }
}

/// The structures that an object's BTF describes (Documentation/bpf/btf.rst): name, size, fields with their offsets in bytes.
fn btf_structs(object: &[u8]) -> HashMap<String, (usize, Vec<(String, usize)>)> {
    let u16_at = |d: &[u8], at: usize| usize::from(u16::from_le_bytes(d[at..at + 2].try_into().unwrap()));
    let u32_at = |d: &[u8], at: usize| u32::from_le_bytes(d[at..at + 4].try_into().unwrap()) as usize;
    let u64_at = |d: &[u8], at: usize| u64::from_le_bytes(d[at..at + 8].try_into().unwrap()) as usize;
    let text = |d: &[u8], at: usize| {
        let end = d[at..].iter().position(|b| *b == 0).unwrap();
        String::from_utf8(d[at..at + end].to_vec()).unwrap()
    };
    // The section ".BTF" of an ELF64 file.
    let (sections, count, names) = (u64_at(object, 0x28), u16_at(object, 0x3c), u16_at(object, 0x3e));
    let header = |n: usize| &object[sections + 64 * n..][..64];
    let bytes = |n: usize| &object[u64_at(header(n), 0x18)..][..u64_at(header(n), 0x20)];
    let section = (0..count).find(|&n| text(bytes(names), u32_at(header(n), 0)) == ".BTF").unwrap();
    let btf = bytes(section);

    let body = &btf[u32_at(btf, 4)..];
    let types = &body[u32_at(btf, 8)..][..u32_at(btf, 12)];
    let strings = &body[u32_at(btf, 16)..][..u32_at(btf, 20)];
    let mut structs = HashMap::new();
    let mut at = 0;
    while at < types.len() {
        let (name, info, size) = (u32_at(types, at), u32_at(types, at + 4), u32_at(types, at + 8));
        let (members, kind) = (info & 0xffff, info >> 24 & 0x1f);
        at += 12;
        if kind == 4 {
            let member = |n: usize| {
                let m = &types[at + 12 * n..][..12];
                (text(strings, u32_at(m, 0)), u32_at(m, 8) / 8)
            };
            structs.insert(text(strings, name), (size, (0..members).map(member).collect()));
        }
        at += match kind {
            1 | 14 | 17 => 4,                // int, variable, tag of a declaration
            3 => 12,                         // array
            4 | 5 | 15 | 19 => 12 * members, // struct, union, section, 64-bit enumeration
            6 | 13 => 8 * members,           // enumeration, function type
            _ => 0,
        };
    }
    structs
}

/// Cluster-wide numbers in a question.
const SERVICE: u32 = 70_000;
const BACKEND: u32 = 123_456;

/// `struct question` of `packet/bpf/harness.c`.
fn question(seed: u32, client: (IpAddr, u16), vip: (IpAddr, u16), protocol: u8, size: u32) -> Vec<u8> {
    let mut q = Vec::new();
    q.extend(seed.to_ne_bytes());
    q.extend(u32::from(client.0.is_ipv6()).to_ne_bytes());
    q.extend(client.1.to_be_bytes());
    q.extend(vip.1.to_be_bytes());
    q.extend(u32::from(protocol).to_ne_bytes());
    q.extend(abi::wide(client.0));
    q.extend(abi::wide(vip.0));
    q.extend(size.to_ne_bytes());
    q.extend([0; 12]);
    q.extend(SERVICE.to_ne_bytes());
    q.extend(BACKEND.to_ne_bytes());
    q.extend([0; 8]);
    q
}

#[test]
fn hashes_are_bit_for_bit_those_of_the_engine() {
    let harness = Harness::load().unwrap_or_else(|e| panic!("{e}"));
    let ask = |seed, client: (IpAddr, u16), vip: (IpAddr, u16), protocol, size| {
        let ran = harness.run("hashes", &question(seed, client, vip, protocol, size), 1).unwrap();
        assert_eq!(ran.action, 3);
        let word = |at: usize| u32::from_ne_bytes(ran.frame[at..at + 4].try_into().unwrap());
        assert_eq!(word(72), hash::snat(seed, client.0, client.1, SERVICE, BACKEND), "{client:?}");
        (word(52), word(56), word(60))
    };
    let v4 = ((Ipv4Addr::new(198, 51, 100, 7).into(), 40_000), (Ipv4Addr::new(192, 0, 2, 100).into(), 80));
    let address = |s: &str| -> IpAddr { s.parse().unwrap() };
    let v6 = ((address("2001:db8:0:1::7"), 40_000), (address("2001:db8::100"), 80));
    // The known answers in hash.rs.
    assert_eq!(ask(0, v4.0, v4.1, 6, 1).0, 0xa985_789c);
    assert_eq!(ask(1, v4.0, v4.1, 6, 1).0, 0xcee8_8c50);
    assert_eq!(ask(0, v4.0, v4.1, 17, 1).0, 0x3687_45e9);
    assert_eq!(ask(0, v6.0, v6.1, 6, 1).0, 0x1979_a192);
    assert_eq!(ask(5, v4.0, v4.1, 6, 1).1, 0xe46c_7043);
    assert_eq!(ask(5, v6.0, v6.1, 6, 1).1, 0x5711_8dad);

    let mut rng = Rng::new(1);
    for _ in 0..1000 {
        let (a, b) = (rng.next(), rng.next());
        let (client, vip): (IpAddr, IpAddr) = if rng.one_in(2) {
            (Ipv4Addr::from_bits(a as u32).into(), Ipv4Addr::from_bits(b as u32).into())
        } else {
            // Not IPv4-mapped ones, which are no addresses on the wire.
            let wide =
                |n: u64| Ipv6Addr::from_bits(u128::from(n | 1 << 63) << 64 | u128::from(n.rotate_left(17)));
            (wide(a).into(), wide(b).into())
        };
        let (seed, protocol) = (rng.next() as u32, rng.of(&[6, 17]));
        let (client, vip) = ((client, rng.next() as u16), (vip, rng.next() as u16));
        let size = 1 + rng.below(200_000) as u32;
        let flow = hash::flow(seed, client.0, client.1, vip.0, vip.1, protocol);
        let expected = (flow, hash::client(seed, client.0), hash::scale(flow, size));
        assert_eq!(ask(seed, client, vip, protocol, size), expected, "{client:?} {vip:?}");
    }
}

/// The states of a flow both of whose directions pass are those of `flow/state.rs`, from each state that a flow can be in.
#[test]
fn states_are_those_of_the_engine() {
    let harness = Harness::load().unwrap_or_else(|e| panic!("{e}"));
    let mut steps = 0;
    for progress in 0..=u8::MAX {
        let segments =
            [0x02u8, 0x12, 0x10, 0x11, 0x04, 0x06, 0x00, 0x18].map(|f| (f, Segment::from_tcp_flags(f)));
        for (tcp_flags, segment) in segments.into_iter().chain([(0, Segment::Udp)]) {
            for to_client in [false, true] {
                let direction = if to_client { Direction::ToClient } else { Direction::ToBackend };
                let Some(expected) = two_way_step(progress, segment, direction) else { continue };
                let words = [progress.into(), tcp_flags.into(), u32::from(to_client), 0, 0, 0];
                let question: Vec<u8> = words.iter().flat_map(|w: &u32| w.to_ne_bytes()).collect();
                let answer = harness.run("states", &question, 1).unwrap().frame;
                let word = |n: usize| u32::from_ne_bytes(answer[4 * n..4 * n + 4].try_into().unwrap());
                let got = (word(3) as u8, word(4) != 0, word(5) != 0);
                assert_eq!(got, expected, "{progress:08b} {segment:?} {direction:?}");
                steps += 1;
            }
        }
    }
    // SynSent, Closing and Closed with three marks each, Established with one more; Udp like that, of one kind of segment only.
    assert_eq!(steps, (3 * 8 + 16) * 16 + 16 * 2);
}
