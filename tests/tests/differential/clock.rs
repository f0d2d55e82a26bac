//! A lease ends on the nanosecond, although not every packet reads the clock; and when a machine stood still, no more frames
//! leave than one reading serves.

use std::sync::Arc;

use komainu_packet::engine::{Engine, EngineConfig, Port, PortConfig};
use komainu_packet::lane::kernel::abi::{Clock, Hop, LeaseCell, Plain};
use komainu_packet::lane::kernel::fill::{Filler, Snapshot};
use komainu_packet::lane::kernel::program::{Hook, Kernel, Sizes};
use komainu_packet::lease::LeaseBoard;
use komainu_packet::time::BootTime;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::build::{self, BackendSpec, GROUPS, OTHER_MAC, Place, SERVICE_MAC, ServiceSpec};

/// `CLOCK_USES` in `packet/bpf/clock.h`.
const USES: usize = 16;
const HOOKS: [Hook; 2] = [Hook::Xdp, Hook::Tc];

/// A program with one service, and a frame for it.
struct Bed {
    hook: Hook,
    kernel: Kernel,
    frame: Vec<u8>,
}

impl Bed {
    fn new(hook: Hook) -> Bed {
        let sizes = Sizes { backends: 16, services: 16, flows: 16, ..Sizes::default() };
        let kernel = Kernel::load(hook, sizes).unwrap_or_else(|e| panic!("{e}"));
        let maps = Arc::clone(kernel.maps());
        maps.set_port(Port::Service, SERVICE_MAC, 1, 1500, 2000);
        let service = PortConfig { mac: SERVICE_MAC, ifindex: 1, mtu: 1500, addresses: vec![] };
        let config = EngineConfig { service, inside: None, max_flows: 16, new_flows_per_second: 0, seed: 1 };
        let mut engine = Engine::new(config, Arc::new(LeaseBoard::new()));
        let backend = BackendSpec { place: 0, second_port: false, weight: 1, base_weight: 1, alive: true };
        let spec = ServiceSpec {
            id: 1,
            second_vip: false,
            v6: false,
            second_port: false,
            udp: false,
            mode: 1,
            scheduler: 0,
            dead_backend: 0,
            track_udp: false,
            consult_all_slots: false,
            backends: vec![backend],
        };
        engine.install(build::plan(1, &[spec]), BootTime(0)).unwrap();
        let way = |_| Hop::Known { port: Port::Service, mac: OTHER_MAC, on_link: true };
        Filler::new(maps).install(&Snapshot::of(&engine), &way).unwrap();

        let octets = |place: Place| match place.address(false) {
            std::net::IpAddr::V4(a) => a.octets(),
            std::net::IpAddr::V6(_) => unreachable!("asked for IPv4"),
        };
        let mut frame = Vec::new();
        etherparse::PacketBuilder::ethernet2(OTHER_MAC, SERVICE_MAC)
            .ipv4(octets(Place::Client(1)), octets(Place::Vip(false)), 64)
            .tcp(40_000, 80, 1, 65_535)
            .ack(1)
            .write(&mut frame, b"")
            .unwrap();
        Bed { hook, kernel, frame }
    }

    fn lease(&self, until: u64) {
        let group = u64::from(GROUPS[0]) + 1;
        let cell = LeaseCell { group, epoch: 1, answer_until: until, forward_until: until, reserved: [0; 4] };
        assert!(self.kernel.maps().leases().write(GROUPS[0], &cell));
    }

    /// Whether a frame is forwarded now.
    fn forwards(&self) -> bool {
        match (self.hook, self.kernel.test_run(&self.frame, None, 1).unwrap().action) {
            (Hook::Xdp, 3) | (Hook::Tc, 7) => true,
            (Hook::Xdp, 1) | (Hook::Tc, 2) => false,
            (_, other) => panic!("the program returned {other}"),
        }
    }
}

#[test]
fn a_lease_ends_on_the_nanosecond() {
    for hook in HOOKS {
        let bed = Bed::new(hook);
        let slack = bed.kernel.maps().config().slack;
        for slack in [slack, 0] {
            bed.kernel.maps().set_slack(slack);
            // Shorter than a reading may be old, and longer.
            for lease in [1_000_000, 10_000_000, 40_000_000, 90_000_000] {
                let until = BootTime::now().0 + lease;
                bed.lease(until);
                let (mut forwarded, mut over) = (0, false);
                while !over {
                    let before = BootTime::now().0;
                    let forwards = bed.forwards();
                    let after = BootTime::now().0;
                    assert!(!forwards || before < until, "{hook:?}: {} ns late", before - until);
                    assert!(forwards || after >= until, "{hook:?}: {} ns early", until - after);
                    forwarded += u32::from(forwards);
                    over = !forwards;
                }
                assert!(forwarded > 0, "{hook:?}: never under a lease of {lease} ns");
                assert!((0..100).all(|_| !bed.forwards()), "{hook:?}: again after the lease has ended");
                // Renewed, it goes on at once.
                bed.lease(u64::MAX);
                assert!((0..100).all(|_| bed.forwards()));
            }
        }
    }
}

/// A machine that stood still goes on with an old reading, and ticks are counted again only some time later.
#[test]
fn after_a_standstill_one_reading_serves_a_few_frames_at_most() {
    // Each processor has a reading of its own: one is enough here.
    let mine = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut one = CpuSet::new();
    one.set((0..CpuSet::count()).find(|&n| mine.is_set(n).unwrap()).unwrap()).unwrap();
    sched_setaffinity(Pid::from_raw(0), &one).unwrap();
    for hook in HOOKS {
        let bed = Bed::new(hook);
        let maps = bed.kernel.maps();
        let mut worst = 0;
        for _ in 0..200 {
            bed.lease(u64::MAX);
            assert!(bed.forwards());
            let clock = maps.tally().clock;
            assert!(clock.ticks > 0, "the clock was read");
            let second = 1_000_000_000;
            bed.lease(clock.now - second / 2);
            maps.set_clocks(&Clock { now: clock.now - second, uses: 0, ..clock });
            let left = (0..100).filter(|_| bed.forwards()).count();
            worst = worst.max(left);
        }
        // Where a tick came between, fewer.
        assert_eq!(worst, USES, "{hook:?}");
        // And where a reading may be of any age, none.
        maps.set_slack(0);
        let clock = maps.tally().clock;
        bed.lease(clock.now - 1);
        maps.set_clocks(&Clock { now: clock.now - 1_000_000_000, uses: 0, ..clock });
        assert!(!bed.forwards());
        // A clock that was never read permits nothing.
        bed.lease(1);
        maps.set_clocks(&Clock::zeroed());
        assert!(!bed.forwards());
    }
}
