//! Packets and connections per second through a data path: frames made in the kernel, sent over one veth pair, counted where they come back.
//!
//! The generator is an XDP program run by `BPF_PROG_TEST_RUN` with `BPF_F_TEST_XDP_LIVE_FRAMES` (kernel
//! `Documentation/bpf/bpf_prog_run.rst`): what it passes to `XDP_TX` leaves by the interface as if it had come in there. It
//! runs on one processor, and so does whatever the kernel does with its frames; the lane in user space has a thread of its own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use aya::maps::PerCpuArray;
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use komainu_lab::topology::{HostSpec, LinkSpec, RouteSpec};
use komainu_lab::{Host, Lab, Process, Topology};
use komainu_packet::lane::af_packet::AfPacketConfig;
use komainu_packet::lane::kernel::sys;
use komainu_packet::lane::{LaneKind, SharedLane};
use komainu_packet::plan::{Mode, Protocol};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::conntrack::Room;
use super::paths::nft;
use crate::lane::{self, Renewer};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/wire.o"));

/// Name of what the two ends take by themselves.
pub const ENDS: &str = "generator_and_counter";

const CABLE: &str = "wire";
const GENERATOR: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10));
const BALANCER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
const BACKEND: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 11));
const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
/// Enough ports for every connection of a run: [`BACKENDS`] times as many as one has.
const SNAT: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 150));
/// Servers, where one would not do: full NAT has a port for each of its connections.
const BACKENDS: u8 = 64;
/// Established connections that one server has at most.
const CONNECTIONS_OF_ONE: u32 = 10_000;
/// Sources of the flows, the lower half filled in by the generator: the range for benchmarks (RFC 2544 appendix C.2.2).
const CLIENTS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
const PORT: u16 = 80;
/// Ethernet, IPv4 and TCP headers.
const HEADERS: usize = 54;
/// The same in whole words of eight bytes: what the generator copies.
const TEMPLATE: usize = 56;
/// The smallest Ethernet frame without its checksum.
const FRAME: usize = 60;
/// Frames for each call of the kernel: a tenth of a second of work and more, since it waits some milliseconds at the end of each.
const BURST: u32 = 1 << 19;
/// The same for connections to a proxy, which are mostly waited for.
const BURST_OF_CALLS: u32 = 1 << 22;
/// Frames of a burst that flows are warmed up with, where user space must keep up, where it provides what flows are made of (as much
/// as it provides at once), and where the kernel does it all; and how many frames for each flow: 1 in 1000 is missed.
const WARM_BURST: u32 = 1 << 10;
const BURST_OF_GRANTS: u32 = 1 << 13;
const BURST_OF_KERNEL: u32 = 1 << 16;
const WARM_UP: u32 = 7;
/// Bursts before each further run.
const WARM_AGAIN: u32 = 16;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Acknowledgements of so many established connections (1..=2^31), in no order.
    Established(u32),
    /// Connections, each begun, answered, acknowledged and reset. Those of a run are all different for a lane. The kernel's table
    /// has a limit for the whole machine, which is not a benchmark's to raise: there the same addresses and ports come again, and
    /// as a connection that was reset is none any more, it makes a new record of each.
    Connections,
}

impl Load {
    fn flows(self, way: Way) -> u32 {
        match self {
            Load::Established(flows) => flows,
            Load::Connections if way == Way::Nftables => 1 << 17,
            Load::Connections => 1 << 22,
        }
    }
}

/// A data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// None: the counter sits where a data path would, and frames go one way only. What the two ends take by themselves.
    Ends,
    /// Swaps MAC addresses in the driver and sends: what nothing can be faster than.
    Reflector,
    /// The kernel's own address translation.
    Nftables,
    /// A proxy in user space, on every processor of the machine.
    Haproxy,
    /// A lane, in a mode.
    Lane(LaneKind, Mode),
}

impl Way {
    /// All that carry `load`, in the order of the report.
    pub fn all(load: Load) -> Vec<Way> {
        let mut ways = match load {
            Load::Established(_) => vec![Way::Ends, Way::Reflector, Way::Nftables],
            // What reflects makes no connections; and a proxy's segments are its own, so its packets can't be counted.
            Load::Connections => vec![Way::Nftables, Way::Haproxy],
        };
        for kind in [LaneKind::AfPacket, LaneKind::Tc, LaneKind::Xdp] {
            // User space takes minutes to learn so many flows, one frame after the other.
            if kind == LaneKind::AfPacket && matches!(load, Load::Established(1_000_000..)) {
                continue;
            }
            ways.extend([Mode::Dsr, Mode::Nat, Mode::NatTransparent].map(|mode| Way::Lane(kind, mode)));
        }
        ways
    }

    /// Whether servers answer clients without it.
    fn answers_straight(self) -> bool {
        matches!(self, Way::Lane(_, Mode::Dsr))
    }

    /// Name in the results.
    pub fn name(self) -> String {
        match self {
            Way::Ends => ENDS.to_owned(),
            Way::Reflector => "xdp_tx_reflector".to_owned(),
            Way::Nftables => super::paths::NFT.to_owned(),
            Way::Haproxy => super::paths::HAPROXY_TCP.to_owned(),
            Way::Lane(kind, mode) => {
                let mode = match mode {
                    Mode::Dsr => "dsr",
                    Mode::Nat => "nat",
                    Mode::NatTransparent => "nat_transparent",
                };
                format!("{}_{mode}", kind.as_str())
            }
        }
    }
}

/// One data path with generator and counter around it.
pub struct Wire {
    _haproxy: Option<Process>,
    lab: Lab,
    programs: Ebpf,
    lane: Option<(SharedLane, Renewer)>,
    _room: Option<Room>,
    way: Way,
    load: Load,
    /// Frames of a burst while flows are new.
    warm_burst: u32,
    opened: bool,
}

impl Wire {
    /// Builds it.
    ///
    /// # Errors
    /// Missing privileges or tools, or a refusal of the kernel.
    pub fn build(way: Way, load: Load) -> Result<Wire> {
        let lab = Lab::build(&topology()).context("build the network namespaces")?;
        let (generator, balancer) = (lab.host("gen"), lab.host("lb"));
        let backends = match load {
            Load::Established(..=CONNECTIONS_OF_ONE) => vec![BACKEND],
            _ => (0..BACKENDS).map(|n| Ipv4Addr::new(192, 0, 2, 11 + n).into()).collect(),
        };
        for backend in &backends {
            balancer.set_neighbour(CABLE, *backend, generator.on(CABLE).mac)?;
        }
        balancer.set_neighbour(CABLE, GENERATOR, generator.on(CABLE).mac)?;
        let template = template(generator.on(CABLE).mac, balancer.on(CABLE).mac);
        let mut programs = EbpfLoader::new()
            .override_global("template", &template, true)
            .override_global("flows", &load.flows(way), true)
            .override_global("service", &PORT, true)
            .override_global(
                "answered",
                &u32::from(load != Load::Connections || !way.answers_straight()),
                true,
            )
            .load(OBJECT)
            .context("load the generator")?;
        let count = match load {
            Load::Established(_) => "count",
            Load::Connections if way == Way::Haproxy => "count_ends",
            Load::Connections => "count_connections",
        };
        attach(&mut programs, count, generator)?;
        for name in ["generate", "generate_first", "generate_connections", "generate_calls"] {
            loaded(&mut programs, name)?;
        }
        let (mut haproxy, mut room) = (None, None);
        let lane = match way {
            Way::Ends => {
                // The same program is loaded once, and may sit at both ends.
                attach_loaded(&mut programs, count, balancer)?;
                None
            }
            Way::Haproxy => {
                attach(&mut programs, "pass", balancer)?;
                balancer.add_address(CABLE, VIP.into(), 32)?;
                balancer.checksums_by_the_host()?;
                // What the ends do not know: they answer with the options that they were sent.
                for option in ["timestamps", "sack", "window_scaling"] {
                    balancer.sysctl(&format!("ipv4/tcp_{option}"), "0")?;
                }
                let servers: Vec<_> = backends.iter().map(|b| SocketAddr::new(*b, PORT)).collect();
                haproxy = Some(super::paths::haproxy(&lab, "lb", (VIP, PORT).into(), &servers)?);
                None
            }
            Way::Reflector => {
                attach(&mut programs, "reflect", balancer)?;
                None
            }
            Way::Nftables => {
                attach(&mut programs, "pass", balancer)?;
                balancer.sysctl("ipv4/ip_forward", "1")?;
                for key in ["all", "eth0"] {
                    balancer.sysctl(&format!("ipv4/conf/{key}/send_redirects"), "0")?;
                }
                // The kernel remembers its choice, so the map is looked into by the first packet of a connection.
                let choices: Vec<_> =
                    backends.iter().enumerate().map(|(i, backend)| format!("{i} : {backend}")).collect();
                nft(
                    balancer,
                    &format!(
                        "add table ip bench\n\
                         add chain ip bench pre {{ type nat hook prerouting priority dstnat; }}\n\
                         add rule ip bench pre ip daddr {VIP} tcp dport {PORT} \
                         dnat to jhash ip saddr . tcp sport mod {} map {{ {} }}\n",
                        choices.len(),
                        choices.join(", ")
                    ),
                )?;
                if let Load::Established(flows) = load {
                    // Those of other namespaces of the machine besides.
                    room = Room::make(flows + flows / 16)?;
                }
                None
            }
            Way::Lane(kind, mode) => {
                if kind != LaneKind::Xdp {
                    attach(&mut programs, "pass", balancer)?;
                }
                let lane = balancer
                    .run(|| komainu_packet::lane::start(kind, AfPacketConfig::new("eth0", None)))
                    .with_context(|| format!("start the lane {}", kind.as_str()))?;
                let mut plan = lane::plan(1, &[VIP.into()], &[], &[SNAT]);
                lane::add_service(&mut plan, VIP.into(), PORT, Protocol::Tcp, mode, &backends);
                lane.install(plan)?;
                let renewer = Renewer::start(Arc::clone(&lane));
                Some((lane, renewer))
            }
        };
        let warm_burst = match way {
            Way::Lane(LaneKind::AfPacket, Mode::Nat) => WARM_BURST,
            Way::Lane(_, Mode::Nat) => BURST_OF_GRANTS,
            _ => BURST_OF_KERNEL,
        };
        Ok(Wire { _haproxy: haproxy, lab, programs, lane, _room: room, way, load, warm_burst, opened: false })
    }

    /// Sends for `time` and says how much came through each second: packets, or connections whose acknowledgement did.
    ///
    /// # Errors
    /// The kernel refuses to generate, or nothing comes through.
    pub fn per_second(&mut self, time: Duration) -> Result<f64> {
        let (name, count, frames) = match self.load {
            Load::Established(_) => ("generate", 0, BURST),
            Load::Connections if self.way == Way::Haproxy => ("generate_calls", 1, BURST_OF_CALLS),
            Load::Connections => ("generate_connections", 1, BURST),
        };
        let program = generator(&self.programs, name)?;
        let interface = self.lab.host("gen").on(CABLE).index;
        let counted = || -> Result<u64> {
            let map = self.programs.map("counted").context("no counter")?;
            Ok(PerCpuArray::<_, u64>::try_from(map)?.get(&count, 0)?.iter().sum())
        };
        let run = |time: Duration| {
            self.lab.host("gen").run(move || -> Result<Duration> {
                // One processor for generator and data path alike, so that no other one helps unseen.
                let mut one = CpuSet::new();
                one.set(0)?;
                sched_setaffinity(Pid::from_raw(0), &one)?;
                let start = Instant::now();
                while start.elapsed() < time {
                    burst(program, interface, frames)?;
                }
                Ok(start.elapsed())
            })
        };
        if let Load::Established(flows) = self.load {
            if !self.opened {
                self.warm_up(generator(&self.programs, "generate_first")?, interface, flows * WARM_UP)?;
                self.warm_up(program, interface, flows * WARM_UP)?;
            }
            self.warm_up(program, interface, WARM_BURST * WARM_AGAIN)?;
        }
        let before = counted()?;
        let took = run(time)?;
        let came = counted()? - before;
        self.opened = true;
        if came == 0 {
            let counters = self.lane.as_ref().map(|(lane, _)| lane.counters());
            bail!("nothing comes through: {counters:?}");
        }
        Ok(came as f64 / took.as_secs_f64())
    }

    /// So many frames, slowly enough for a lane that takes a flow's first packets up to user space.
    fn warm_up(&self, program: BorrowedFd<'_>, interface: u32, frames: u32) -> Result<()> {
        self.lab.host("gen").run(|| {
            for _ in 0..frames.div_ceil(self.warm_burst) {
                burst(program, interface, self.warm_burst)?;
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if let Some((lane, _)) = &self.lane {
            lane.stop();
        }
    }
}

fn generator<'a>(programs: &'a Ebpf, name: &str) -> Result<BorrowedFd<'a>> {
    let program: &Xdp = programs.program(name).context("no generator")?.try_into()?;
    Ok(program.fd()?.as_fd())
}

fn loaded<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program: &mut Xdp = programs.program_mut(name).context("no such program")?.try_into()?;
    program.load().with_context(|| format!("load the program {name}"))?;
    Ok(program)
}

fn attach(programs: &mut Ebpf, name: &str, host: &Host) -> Result<()> {
    loaded(programs, name)?;
    attach_loaded(programs, name, host)
}

fn attach_loaded(programs: &mut Ebpf, name: &str, host: &Host) -> Result<()> {
    let program: &mut Xdp = programs.program_mut(name).context("no such program")?.try_into()?;
    let index = host.on(CABLE).index;
    host.run(|| program.attach_to_if_index(index, XdpMode::Driver))
        .with_context(|| format!("attach the program {name} in {}", host.name()))?;
    Ok(())
}

fn topology() -> Topology {
    let host = |name: &str, address, routes| HostSpec {
        name: name.to_owned(),
        links: vec![LinkSpec {
            segment: CABLE.to_owned(),
            interface: "eth0".to_owned(),
            addresses: vec![(address, 24)],
            mtu: None,
        }],
        routes,
        ..HostSpec::default()
    };
    Topology {
        cables: vec![CABLE.to_owned()],
        hosts: vec![
            host("gen", GENERATOR, vec![]),
            host("lb", BALANCER, vec![RouteSpec::default_via(GENERATOR)]),
        ],
        ..Topology::default()
    }
}

/// Headers of an ACK of an established connection from the first client port, with right checksums.
fn template(from: [u8; 6], to: [u8; 6]) -> [u8; TEMPLATE] {
    let mut t = [0; TEMPLATE];
    t[..6].copy_from_slice(&to);
    t[6..12].copy_from_slice(&from);
    t[12..14].copy_from_slice(&0x0800u16.to_be_bytes());
    let length = (FRAME - 14) as u16;
    t[14] = 0x45;
    t[16..18].copy_from_slice(&length.to_be_bytes());
    t[20] = 0x40; // Don't fragment.
    t[22] = 64;
    t[23] = 6;
    t[26..30].copy_from_slice(&CLIENTS.octets());
    t[30..34].copy_from_slice(&VIP.octets());
    t[36..38].copy_from_slice(&PORT.to_be_bytes());
    t[38..46].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1]);
    t[46] = 5 << 4;
    t[47] = 0x10; // ACK
    t[48..50].copy_from_slice(&0xffffu16.to_be_bytes());
    // What the generator varies sums up to all ones in both headers (see wire.c), which is nothing in one's complement.
    t[28..30].copy_from_slice(&[0, 0]);
    let header = !sum(&t[14..34], 0);
    t[24..26].copy_from_slice(&header.to_be_bytes());
    let pseudo = u32::from(sum(&t[26..34], 6 + u32::from(length) - 20));
    let segment = !sum(&t[34..HEADERS], pseudo);
    t[50..52].copy_from_slice(&segment.to_be_bytes());
    t
}

/// One's complement sum (RFC 1071).
fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Has the kernel generate `frames` frames, as if they had come in by `interface`.
fn burst(program: BorrowedFd<'_>, interface: u32, frames: u32) -> Result<()> {
    sys::run_live(program, &[0; FRAME], interface, frames).context("generate frames (needs Linux 5.18)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_sums_to_nothing() {
        let t = template([2; 6], [4; 6]);
        assert_eq!(sum(&t[14..34], 0), 0xffff);
        assert_eq!(sum(&t[34..HEADERS], u32::from(sum(&t[26..34], 6 + 26))), 0xffff);
    }
}
