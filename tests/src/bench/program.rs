//! What the program in the kernel costs a packet, in nanoseconds beyond an empty program that sends every packet back
//! (`XDP_TX`), by `BPF_PROG_TEST_RUN`: no driver, no sending, nothing else but the program.
//!
//! A wrapper makes each run the packet of another flow, in no order that a cache could guess, and calls the program; the same
//! wrapper calls the empty program, and the difference is the program's. The service has 100 backends, each with a lease check, a
//! choice by hash, and counters for itself. "In transition": one of the 100 is being drained, which leaves about 2 % of the
//! slots in transition; flows of those slots are remembered, the others not.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use komainu_packet::engine::{Engine, EngineConfig, Port, PortConfig};
use komainu_packet::lane::kernel::abi::{self, Bench, FlowCell, Hop, LeaseCell, Plain};
use komainu_packet::lane::kernel::fill::{Filler, Snapshot};
use komainu_packet::lane::kernel::growing::Growth;
use komainu_packet::lane::kernel::harness::Harness;
use komainu_packet::lane::kernel::maps::Memory;
use komainu_packet::lane::kernel::news::News;
use komainu_packet::lane::kernel::program::{Hook, Kernel, Sizes};
use komainu_packet::lease::LeaseBoard;
use komainu_packet::plan::{
    BackendPlan, DeadBackend, GroupPlan, Mode, Plan, Protocol, Scheduler, ServicePlan,
};
use komainu_packet::time::BootTime;

use super::report::Line;

/// What every line of this part begins with.
pub const METRIC: &str = "program_ns";
/// Numbers of flows.
pub const FLOWS: [u32; 4] = [1, 10_000, 500_000, 4_000_000];
const BACKENDS: u32 = 100;
/// Flows that the program makes in a round at most, and before they are taken away again.
const MADE: u32 = 100_000;
const MADE_AT_ONCE: u32 = 4096;
const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];
const GROUP: u32 = 1;
/// The filter of the one service.
const FILTER: u32 = 0;
pub(super) const SYN: u8 = 0x02;
pub(super) const ACK: u8 = 0x10;
/// What the program returns for a packet that leaves by the port that it came by, and for one that goes up.
pub(super) const XDP_PASS: u32 = 2;
pub(super) const XDP_TX: u32 = 3;

/// Measures everything with so many flows each, some of [`FLOWS`]. `runs` rounds of `packets` packets each.
///
/// # Errors
/// The kernel refuses the program, or the program does something else than forward.
pub fn measure(flows: &[u32], runs: usize, packets: u32) -> Result<Vec<Line>> {
    let harness = Harness::load()?;
    let mut lines = clocks(&harness, runs, packets)?;
    for (mode, v6) in [
        (Mode::Dsr, false),
        (Mode::Dsr, true),
        (Mode::NatTransparent, false),
        (Mode::NatTransparent, true),
        (Mode::Nat, false),
        (Mode::Nat, true),
    ] {
        for in_transition in [false, true] {
            // Full NAT remembers every flow, so a transition makes no difference to its packets.
            if mode == Mode::Nat && in_transition {
                continue;
            }
            let bed = Bed::new(mode, v6, in_transition)?;
            lines.extend(bed.measure(&harness, flows, runs, packets)?);
        }
    }
    Ok(lines)
}

/// The floor, and what each way to ask for the time adds to it.
fn clocks(harness: &Harness, runs: usize, packets: u32) -> Result<Vec<Line>> {
    let frame = [0; 96];
    let names = ["clock_boot", "clock_monotonic", "clock_coarse", "clock_jiffies"];
    let (mut floors, mut values) = (Vec::new(), vec![Vec::new(); names.len()]);
    for _ in 0..runs {
        let floor = f64::from(harness.run("nothing", &frame, packets)?.ns);
        floors.push(floor);
        for (name, values) in names.iter().zip(&mut values) {
            values.push(f64::from(harness.run(name, &frame, packets)?.ns) - floor);
        }
    }
    let mut lines = vec![Line::new(format!("{METRIC}/empty_program"), "ns", &floors, None)];
    for (name, values) in names.iter().zip(&values) {
        lines.push(Line::new(format!("{METRIC}/{name}"), "ns", values, None));
    }
    Ok(lines)
}

/// A program with a plan.
pub(super) struct Bed {
    kernel: Kernel,
    news: Mutex<News>,
    engine: Engine,
    mode: Mode,
    v6: bool,
    in_transition: bool,
}

impl Bed {
    /// A service with 100 backends in that mode.
    pub(super) fn new(mode: Mode, v6: bool, in_transition: bool) -> Result<Bed> {
        Bed::with_room(mode, v6, in_transition, Sizes::default().first_flows)
    }

    /// The same, its maps of flows with room for so many at first.
    pub(super) fn with_room(mode: Mode, v6: bool, in_transition: bool, first_flows: u32) -> Result<Bed> {
        // Beside those that are remembered there is room for those that are made.
        let flows = FLOWS[3] + MADE;
        let sizes = Sizes { backends: 256, services: 64, flows, first_flows, ..Sizes::default() };
        let mut kernel = Kernel::load(Hook::Xdp, sizes)?;
        let news = Mutex::new(kernel.take_news().context("nobody else listens to the program")?);
        let maps = Arc::clone(kernel.maps());
        maps.set_port(Port::Service, OWN_MAC, 1, 1500, 0);
        let lease = LeaseCell {
            group: u64::from(GROUP) + 1,
            epoch: 1,
            answer_until: u64::MAX,
            forward_until: u64::MAX,
            reserved: [0; 4],
        };
        maps.leases().write(GROUP, &lease);
        let service = PortConfig { mac: OWN_MAC, ifindex: 1, mtu: 1500, addresses: vec![] };
        let config = EngineConfig { service, inside: None, max_flows: 16, new_flows_per_second: 0, seed: 1 };
        let mut engine = Engine::new(config, Arc::new(LeaseBoard::new()));
        engine.install(plan(mode, v6, in_transition), BootTime(0))?;
        let way = |_| Hop::Known { port: Port::Service, mac: [2, 0, 0, 1, 0, 1], on_link: true };
        Filler::new(Arc::clone(&maps)).install(&Snapshot::of(&engine), &way)?;
        Ok(Bed { kernel, news, engine, mode, v6, in_transition })
    }

    /// Writes those of the flows numbered so that are remembered.
    pub(super) fn remember(&self, flows: Range<u32>) -> Result<()> {
        let maps = self.kernel.maps();
        let all = self.mode == Mode::Nat;
        if !all && !self.in_transition {
            return Ok(());
        }
        let number = self.engine.service_number(0);
        let service = &self.engine.tables().services()[0];
        for flow in flows {
            let (client, port) = client(self.v6, flow);
            let slot = service.slot(service.hash(client, port));
            let Some(backend) = slot.base.filter(|_| all || slot.in_transition()) else { continue };
            if !all {
                maps.set_filter(FILTER, service.hash(client, port), true);
            }
            let cell = FlowCell {
                last_seen: BootTime::now().0,
                backend: self.engine.backend_number(0, backend),
                flags: abi::FLOW_STEADY | if all { abi::FLOW_BOUND } else { 0 },
                snat_port: (1024 + (flow % 60_000) as u16).to_be_bytes(),
                snat: abi::wide(snat(self.v6)),
                client: abi::wide(client),
                service: number,
                client_port: port.to_be_bytes(),
                ..FlowCell::zeroed()
            };
            maps.put_flow(&cell, None).context("write a flow into the program's table")?;
        }
        maps.set_memory(number, Memory::Some { conclusive: true, filter: (!all).then_some(FILTER) });
        Ok(())
    }

    /// The program.
    pub(super) fn program(&self) -> Result<std::os::fd::BorrowedFd<'_>> {
        Ok(self.kernel.program_fd()?)
    }

    /// Has the program make flows of full NAT, so many at least, beside those that there are, and takes them away again; nanoseconds
    /// each.
    fn make_flows(&self, harness: &Harness, flows: u32) -> Result<f64> {
        let mut made = 0;
        let (mut floor, mut cost, mut slices) = (0.0, 0.0, 0);
        while made < flows {
            // Clients that are nobody else's, another for each SYN.
            let bench =
                Bench { runs: 0, flows: 1 << 31, v4: u32::from(!self.v6), frame: new_packet(self.v6) };
            floor += run(harness, &bench, harness.program("nothing")?, MADE_AT_ONCE, XDP_TX)?;
            self.grant(u64::from(MADE_AT_ONCE))?;
            cost += run(harness, &bench, self.program()?, MADE_AT_ONCE, XDP_TX)?;
            slices += 1;
            let taken = self.take_made()?;
            ensure!(taken == MADE_AT_ONCE as usize, "{taken} flows were made by {MADE_AT_ONCE} SYNs");
            made += MADE_AT_ONCE;
        }
        Ok((cost - floor) / f64::from(slices))
    }

    /// Lets each processor make so many flows more. The table grows for them, as the lane would let it.
    pub(super) fn grant(&self, flows: u64) -> Result<()> {
        let maps = self.kernel.maps();
        while maps.proceed_growing()? != Growth::None || maps.should_grow() {
            maps.begin_growing()?;
        }
        self.news.lock().unwrap_or_else(PoisonError::into_inner).grant_each(flows);
        Ok(())
    }

    /// Takes the flows that were made out of the maps; how many there were.
    fn take_made(&self) -> Result<usize> {
        let mut made = Vec::new();
        self.news.lock().unwrap_or_else(PoisonError::into_inner).take(usize::MAX, |news| made.push(*news));
        let maps = self.kernel.maps();
        for news in &made {
            ensure!(maps.remove_flow(&news.flow, None), "a flow that was made is there");
        }
        Ok(made.len())
    }

    fn measure(&self, harness: &Harness, numbers: &[u32], runs: usize, packets: u32) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
        let mode = match self.mode {
            Mode::Dsr => "dsr",
            Mode::Nat => "nat",
            Mode::NatTransparent => "nat_transparent",
        };
        let family = if self.v6 { "v6" } else { "v4" };
        let state = if self.in_transition { "in_transition" } else { "steady" };
        let mut known = 0;
        for &flows in numbers {
            self.remember(known..flows)?;
            known = flows;
            for (kind, flags) in [("established", ACK), ("new", SYN)] {
                // A SYN of a flow that must be remembered is the engine's.
                let up = flags == SYN && (self.mode == Mode::Nat || self.in_transition);
                if up && self.mode != Mode::Nat {
                    continue;
                }
                let bench = Bench { runs: 0, flows, v4: u32::from(!self.v6), frame: packet(self.v6, flags) };
                let mut values = Vec::new();
                for _ in 0..runs {
                    let floor = run(harness, &bench, harness.program("nothing")?, packets, XDP_TX)?;
                    let expected = if up { XDP_PASS } else { XDP_TX };
                    values.push(run(harness, &bench, self.kernel.program_fd()?, packets, expected)? - floor);
                }
                let kind = if up { "new_goes_up" } else { kind };
                let name = format!("{METRIC}/{mode}_{family}/{state}/{kind}/{flows}");
                lines.push(Line::new(name, "ns", &values, None));
            }
            if self.mode == Mode::Nat {
                let mut values = Vec::new();
                for _ in 0..runs {
                    values.push(self.make_flows(harness, packets.min(MADE))?);
                }
                let name = format!("{METRIC}/{mode}_{family}/{state}/new/{flows}");
                lines.push(Line::new(name, "ns", &values, None));
            }
        }
        Ok(lines)
    }
}

/// Has the harness call `program` for `packets` packets, each of which must become `expected`; nanoseconds a packet.
pub(super) fn run(
    harness: &Harness,
    bench: &Bench,
    program: std::os::fd::BorrowedFd<'_>,
    packets: u32,
    expected: u32,
) -> Result<f64> {
    let (ns, became) = run_all(harness, bench, program, packets)?;
    ensure!(became == expected, "the program returned {became} instead of {expected}");
    Ok(ns)
}

/// The same, whatever becomes of them; also what became of the last.
pub(super) fn run_all(
    harness: &Harness,
    bench: &Bench,
    program: std::os::fd::BorrowedFd<'_>,
    packets: u32,
) -> Result<(f64, u32)> {
    harness.measure(program, bench)?;
    let ran = harness.run("vary", &bench.frame, packets)?;
    Ok((f64::from(ran.ns), ran.action))
}

/// Packets of one round, so that it takes about `time`.
pub fn packets_in(time: Duration) -> u32 {
    (time.as_nanos() / 500).clamp(10_000, 5_000_000) as u32
}

fn address(v6: bool, net: u8, host: u32) -> IpAddr {
    if v6 {
        let net = u16::from(net);
        Ipv6Addr::new(0xfd00, 0, 0, net, 0, 0, (host >> 16) as u16, host as u16).into()
    } else {
        let [_, b, c, d] = host.to_be_bytes();
        Ipv4Addr::new(net, b, c, d).into()
    }
}

fn vip(v6: bool) -> IpAddr {
    address(v6, 10, 100)
}

fn snat(v6: bool) -> IpAddr {
    address(v6, 10, 101)
}

/// As `vary` in `packet/bpf/harness.c` counts clients.
fn client(v6: bool, flow: u32) -> (IpAddr, u16) {
    (address(v6, 9, 1 + flow / 50_000), (1024 + flow % 50_000) as u16)
}

fn plan(mode: Mode, v6: bool, in_transition: bool) -> Plan {
    let group = GroupPlan {
        id: GROUP,
        name: "g".to_owned(),
        vips: vec![vip(v6)],
        inside_vips: vec![],
        snat: vec![snat(v6)],
    };
    let backend = |n| BackendPlan {
        id: n,
        name: format!("be{n}"),
        address: address(v6, 10, 1000 + n),
        port: 80,
        weight: u32::from(!(in_transition && n == 1)),
        base_weight: 1,
        alive: true,
    };
    let service = ServicePlan {
        id: 1,
        name: "s".to_owned(),
        group: GROUP,
        vip: vip(v6),
        port: 80,
        protocol: Protocol::Tcp,
        mode,
        scheduler: Scheduler::Maglev,
        dead_backend: DeadBackend::Reset,
        track_udp: true,
        tcp_idle: Duration::from_secs(900),
        udp_idle: Duration::from_secs(30),
        backends: (1..=BACKENDS).map(backend).collect(),
        consult_all_slots: false,
    };
    Plan { revision: 1, groups: vec![group], services: vec![service] }
}

/// A SYN of the first of other clients.
fn new_packet(v6: bool) -> [u8; 96] {
    let mut frame = packet(v6, SYN);
    // Above the addresses that clients of remembered flows have.
    frame[if v6 { 35 } else { 27 }] = 0x80;
    frame
}

/// A TCP segment of the first flow, 96 bytes long.
pub(super) fn packet(v6: bool, flags: u8) -> [u8; 96] {
    let mut frame = [0; 96];
    frame[..6].copy_from_slice(&OWN_MAC);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    let (client, port) = client(v6, 0);
    let l4 = match (client, vip(v6)) {
        (IpAddr::V4(client), IpAddr::V4(vip)) => {
            frame[12..14].copy_from_slice(&[0x08, 0x00]);
            frame[14..18].copy_from_slice(&[0x45, 0, 0, 82]);
            frame[22..24].copy_from_slice(&[64, 6]);
            frame[26..30].copy_from_slice(&client.octets());
            frame[30..34].copy_from_slice(&vip.octets());
            34
        }
        (IpAddr::V6(client), IpAddr::V6(vip)) => {
            frame[12..14].copy_from_slice(&[0x86, 0xdd]);
            frame[14] = 0x60;
            frame[18..22].copy_from_slice(&[0, 42, 6, 64]);
            frame[22..38].copy_from_slice(&client.octets());
            frame[38..54].copy_from_slice(&vip.octets());
            54
        }
        _ => unreachable!("both are of the family that was asked for"),
    };
    frame[l4..l4 + 2].copy_from_slice(&port.to_be_bytes());
    frame[l4 + 2..l4 + 4].copy_from_slice(&80u16.to_be_bytes());
    frame[l4 + 12] = 5 << 4;
    frame[l4 + 13] = flags;
    frame
}
