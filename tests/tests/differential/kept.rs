//! Flows of full NAT that the program makes and keeps: no packet of an ordinary connection goes up, ports are given once
//! and come back, and a flood of SYNs neither fills the program's maps nor shuts anybody out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use komainu_packet::engine::SNAT_PORT_UPPER;
use komainu_packet::flow::BackendSide;
use komainu_packet::lane::kernel::abi::NOBODY;
use komainu_packet::lane::kernel::growing::Growth;
use komainu_packet::lane::kernel::program::Hook;
use komainu_packet::plan::{Mode, Protocol};
use komainu_tests::path::{Flags, Path, SNAT, backend};

const HOOKS: [Hook; 2] = [Hook::Xdp, Hook::Tc];
/// `MAX_HALF_OPEN` of the engine.
const HALF_OPEN: usize = 8192;
/// Longer than any flow of a connection that has ended is remembered.
const PAST_ENDS: Duration = Duration::from_secs(31);

fn path(hook: Hook, backends: u8, max_flows: usize) -> Path {
    let mut path = Path::new(Some(hook), Mode::Nat, max_flows);
    path.install(&(1..=backends).map(backend).collect::<Vec<_>>());
    path
}

fn udp_path(hook: Hook, backends: u8, max_flows: usize) -> Path {
    let mut path = Path::of(Some(hook), Mode::Nat, Protocol::Udp, max_flows);
    path.install(&(1..=backends).map(backend).collect::<Vec<_>>());
    path
}

/// Opens a connection, exchanges segments, ends it by FINs or an RST; as the backend saw its first segment.
fn whole_connection(path: &mut Path, flow: u32, by_reset: bool) -> Vec<u8> {
    let (_, syn) = path.request(flow, Flags::Syn).expect("the SYN passes");
    path.answer(&syn, Flags::SynAck).expect("its answer");
    for flags in [Flags::Ack, Flags::Ack] {
        path.request(flow, flags).expect("the client's segment");
        path.answer(&syn, Flags::Ack).expect("the backend's");
    }
    if by_reset {
        path.request(flow, Flags::Rst).expect("the reset");
    } else {
        path.request(flow, Flags::Fin).expect("the client's FIN");
        path.answer(&syn, Flags::Fin).expect("the backend's FIN");
        path.request(flow, Flags::Ack).expect("the last segment");
    }
    syn
}

fn source(segment: &[u8]) -> (&[u8], &[u8]) {
    (&segment[26..30], &segment[34..36])
}

#[test]
fn no_packet_of_an_ordinary_connection_goes_up() {
    for hook in HOOKS {
        let mut path = path(hook, 3, 1 << 14);
        for flow in 0..2000 {
            whole_connection(&mut path, flow, flow % 2 == 0);
        }
        assert_eq!(path.went_up(), 0, "{hook:?}");
        assert_eq!((path.remembered(), path.in_maps()), (2000, (2000, 2000)));
    }
}

#[test]
fn a_client_that_uses_its_port_again_has_a_new_connection_at_once() {
    for hook in HOOKS {
        let mut path = path(hook, 3, 1 << 14);
        for flow in 0..500 {
            let first = whole_connection(&mut path, flow, flow % 2 == 0);
            let second = whole_connection(&mut path, flow, flow % 3 == 0);
            assert_eq!(source(&first), source(&second), "{hook:?}: nothing has changed meanwhile");
        }
        assert_eq!((path.went_up(), path.remembered()), (0, 500), "{hook:?}");
        assert_eq!(path.new_flows(), 1000);
        path.tick_after(PAST_ENDS);
        assert_eq!((path.remembered(), path.in_maps()), (0, (0, 0)), "{hook:?}");
    }
}

#[test]
fn no_port_is_given_twice_and_all_come_back() {
    for hook in HOOKS {
        // More than there are lower ports: the engine gives the upper ones, and both find what the other has.
        const FLOWS: u32 = 51_000;
        let mut path = path(hook, 1, 1 << 17);
        for flow in 0..FLOWS {
            path.connect(flow);
        }
        let bindings = path.bindings();
        assert_eq!(bindings.len(), FLOWS as usize);
        let different: BTreeSet<(u32, SocketAddr)> = bindings.iter().copied().collect();
        assert_eq!(different.len(), bindings.len(), "{hook:?}: a port was given twice");
        let upper = bindings.iter().filter(|(_, snat)| snat.port() >= SNAT_PORT_UPPER).count();
        assert!(upper > 0 && upper < 16_384, "{hook:?}: {upper}");
        // What the backend sees is what the engine knows.
        let known: BTreeMap<SocketAddr, u32> = bindings.iter().map(|(b, snat)| (*snat, *b)).collect();
        for flow in (0..FLOWS).step_by(97) {
            let (_, seen) = path.request(flow, Flags::Ack).expect("it goes on");
            let (address, port) = source(&seen);
            let octets: [u8; 4] = address.try_into().unwrap();
            let snat = SocketAddr::from((octets, u16::from_be_bytes(port.try_into().unwrap())));
            assert!(known.contains_key(&snat), "{hook:?}: flow {flow} leaves by {snat}");
        }
        for flow in 0..FLOWS {
            path.request(flow, Flags::Rst).expect("the reset passes");
        }
        path.tick_after(PAST_ENDS);
        assert_eq!((path.remembered(), path.in_maps()), (0, (0, 0)), "{hook:?}");
        let before = path.went_up();
        path.connect(0);
        assert_eq!(path.went_up(), before, "{hook:?}");
    }
}

/// Maps that were full were copied while nothing could be written into them: for 262 000 flows half a second.
#[test]
fn nothing_of_what_happens_while_the_table_grows_is_lost() {
    for hook in HOOKS {
        const EACH: u32 = 2000;
        let mut path = path(hook, 3, 1 << 17);
        for flow in 0..EACH {
            path.connect(flow);
            path.connect(EACH + flow);
            whole_connection(&mut path, 2 * EACH + flow, true);
        }
        path.begin_growing();
        // Of each kind some before and some after what they change has been copied.
        let (mut step, mut new) = (0, 100_000);
        let mut ended = BTreeSet::new();
        loop {
            for n in (step..EACH).step_by(16) {
                if !ended.contains(&n) && path.next(n).is_none() {
                    panic!("{hook:?}: flow {n} ends");
                }
            }
            for n in (EACH + step..2 * EACH).step_by(16) {
                if ended.insert(n) {
                    path.request(n, Flags::Rst).expect("the reset passes");
                }
            }
            for _ in 0..150 {
                path.connect(new);
                whole_connection(&mut path, 1_000_000 + new, new % 2 == 0);
                new += 1;
            }
            whole_connection(&mut path, 2 * EACH + step, true);
            if step == 3 {
                // Those that have ended are forgotten.
                path.tick_after(PAST_ENDS);
            }
            step += 1;
            if path.grow() == Growth::None {
                break;
            }
        }
        assert!(step > 5, "{hook:?}: {step}");
        assert_eq!(path.went_up(), 0, "{hook:?}");
        let remembered = path.remembered() as usize;
        assert_eq!(path.in_maps(), (remembered, remembered), "{hook:?}");
        for n in (0..EACH).chain(100_000..new) {
            path.next(n).expect("what was established goes on");
        }
        let different: BTreeSet<(u32, SocketAddr)> = path.bindings().into_iter().collect();
        assert_eq!(different.len(), remembered, "{hook:?}: a port was given twice");
        for n in (EACH..EACH + step).chain(2 * EACH..2 * EACH + step) {
            path.connect(n);
        }
        // There is room for more than before.
        path.begin_growing();
        while path.grow() != Growth::None {}
        for n in 0..20_000 {
            path.connect(2_000_000 + n);
        }
        assert_eq!(path.went_up(), 0, "{hook:?}");
        path.tick_after(PAST_ENDS);
        let remembered = path.remembered() as usize;
        assert_eq!(path.in_maps(), (remembered, remembered), "{hook:?}");
    }
}

/// Each of them may find a name free, and put it into another slot of the index than the other does.
#[test]
fn two_processors_and_the_engine_give_no_name_twice_at_the_same_time() {
    const ROUNDS: u32 = 60;
    const EACH: u32 = 4000;
    let mut path = path(Hook::Xdp, 1, 1 << 17);
    let (mut reserved, mut taken, mut n) = (0, 0, 0u32);
    let to = backend(1);
    for round in 0..ROUNDS {
        let told = path.make_on_two_processors(2 * round * EACH, EACH, |maps| {
            n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let name = BackendSide {
                protocol: 6,
                backend: to.address,
                backend_port: to.port,
                snat: SNAT.into(),
                snat_port: 1024 + (n >> 16) as u16 % (SNAT_PORT_UPPER - 1024),
            };
            // As the engine does before it remembers a flow.
            if maps.reserve_name(&name).unwrap() {
                reserved += 1;
                let there = maps.answered(&name).expect("a name that was taken is there");
                assert_eq!(there.service, NOBODY, "{name:?} is a flow's, too");
                maps.release_name(&name);
            } else {
                taken += 1;
            }
        });
        let (clients, names) = path.in_maps();
        assert_eq!(clients, names, "round {round}: half of a flow");
        let different: BTreeSet<_> = told.iter().map(|news| news.snat_port).collect();
        assert_eq!(different.len(), told.len(), "round {round}: a port was given twice");
        let different: BTreeSet<_> =
            told.iter().map(|news| (news.flow.client, news.flow.client_port)).collect();
        assert_eq!(different.len(), told.len(), "round {round}: a client has two flows");
        path.clear();
        assert_eq!(path.in_maps(), (0, 0), "round {round}");
    }
    assert!(reserved > 0 && taken > 0, "{reserved} and {taken}");
}

#[test]
fn a_flood_of_syns_fills_no_map_and_shuts_nobody_out() {
    for hook in HOOKS {
        const ESTABLISHED: u32 = 1000;
        const FLOOD: u32 = 60_000;
        let mut path = path(hook, 2, 1 << 18);
        for flow in 0..ESTABLISHED {
            path.connect(flow);
        }
        assert_eq!(path.went_up(), 0);
        let mut others = ESTABLISHED;
        for n in 0..FLOOD {
            path.request(1_000_000 + n, Flags::Syn);
            if n % 1000 == 0 {
                // Somebody who means it.
                path.connect(2_000_000 + n);
                others += 1;
            }
        }
        let (flows, bound) = path.in_maps();
        let most = others as usize + HALF_OPEN;
        assert!(flows <= most && bound <= most, "{hook:?}: {flows}, {bound} entries, {most} at most");
        let before = path.went_up();
        for flow in 0..ESTABLISHED {
            path.next(flow).expect("what was established goes on");
        }
        assert_eq!(path.went_up(), before, "{hook:?}: without the engine");
        path.tick_after(PAST_ENDS);
        assert_eq!(path.remembered(), u64::from(others), "{hook:?}");
        path.connect(3_000_000);
        assert_eq!(path.went_up(), before, "{hook:?}: and afterwards all is as it was");
    }
}

#[test]
fn no_datagram_of_an_ordinary_exchange_goes_up() {
    for hook in HOOKS {
        let mut path = udp_path(hook, 3, 1 << 14);
        for flow in 0..2000 {
            let (backend, there) = path.request(flow, Flags::Ack).expect("a question");
            // Nothing has come back yet.
            assert_eq!(path.next(flow), Some(backend));
            for _ in 0..2 {
                path.answer(&there, Flags::Ack).expect("an answer");
                let (again, later) = path.request(flow, Flags::Ack).expect("a further question");
                assert_eq!((again, source(&later)), (backend, source(&there)), "{hook:?}: flow {flow} moves");
            }
        }
        assert_eq!(path.went_up(), 0, "{hook:?}");
        assert_eq!((path.remembered(), path.in_maps(), path.new_flows()), (2000, (2000, 2000), 2000));
        path.tick_after(PAST_ENDS);
        assert_eq!((path.remembered(), path.in_maps()), (0, (0, 0)), "{hook:?}");
    }
}

/// As with logs that are only sent. More than the half-open flows that the program may make, and than there are upper ports.
#[test]
fn flows_of_datagrams_that_nobody_answers_have_all_ports() {
    for hook in HOOKS {
        const FLOWS: u32 = 40_000;
        let mut path = udp_path(hook, 1, 1 << 17);
        for flow in 0..FLOWS {
            path.request(flow, Flags::Ack).unwrap_or_else(|| panic!("{hook:?}: flow {flow} is refused"));
        }
        let different: BTreeSet<(u32, SocketAddr)> = path.bindings().into_iter().collect();
        assert_eq!(different.len(), FLOWS as usize, "{hook:?}: a port was given twice");
        let up = path.went_up();
        // Of those that it may make a few find the first candidates taken.
        let made = u64::from(FLOWS) - up;
        assert!(made + 100 > HALF_OPEN as u64, "{hook:?}: {made} were made there");
        path.tick_after(PAST_ENDS);
        assert_eq!((path.remembered(), path.in_maps()), (0, (0, 0)), "{hook:?}");
    }
}

#[test]
fn flows_of_several_snat_addresses_are_made_and_opened_again_too() {
    for hook in HOOKS {
        const FLOWS: u32 = 3000;
        const SOURCES: u8 = 7;
        let mut path = Path::new(Some(hook), Mode::Nat, 1 << 14);
        path.set_sources(SOURCES);
        path.install(&(1..=3).map(backend).collect::<Vec<_>>());
        for flow in 0..FLOWS {
            let first = whole_connection(&mut path, flow, flow % 2 == 0);
            let second = whole_connection(&mut path, flow, flow % 3 == 0);
            assert_eq!(source(&first), source(&second), "{hook:?}: nothing has changed meanwhile");
        }
        assert_eq!((path.went_up(), path.remembered()), (0, u64::from(FLOWS)), "{hook:?}");
        let mut by_address: BTreeMap<_, u32> = BTreeMap::new();
        for (_, snat) in path.bindings() {
            *by_address.entry(snat.ip()).or_default() += 1;
        }
        assert_eq!(by_address.len(), usize::from(SOURCES), "{hook:?}: {by_address:?}");
        let share = FLOWS / u32::from(SOURCES);
        assert!(by_address.values().all(|n| n.abs_diff(share) < share / 2), "{hook:?}: {by_address:?}");
        // One address less: what it had stays in use, new flows have the others.
        path.set_sources(SOURCES - 1);
        path.install(&(1..=3).map(backend).collect::<Vec<_>>());
        for flow in FLOWS..2 * FLOWS {
            path.connect(flow);
        }
        assert_eq!(path.went_up(), 0, "{hook:?}");
    }
}
