//! A lane without a network: one service with its flows through the engine alone (what the `af_packet` lane is made of), or
//! through the program at a hook, run by `BPF_PROG_TEST_RUN`, with the engine behind it for what the program leaves.
//!
//! Everybody stands on one IPv4 network but the clients, which are behind a router. Needs root where there is a hook.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use komainu_packet::checksum::{Sum, checksum};
use komainu_packet::engine::{Engine, EngineConfig, FrameMut, Passed, Port, PortConfig, Verdict, compile};
use komainu_packet::lane::FlowFilter;
use komainu_packet::lane::kernel::abi::{self, Bench, Hop, LeaseCell};
use komainu_packet::lane::kernel::cache::Cache;
use komainu_packet::lane::kernel::fill::{Filler, Snapshot};
use komainu_packet::lane::kernel::growing::Growth;
use komainu_packet::lane::kernel::harness::Harness;
use komainu_packet::lane::kernel::maps::Maps;
use komainu_packet::lane::kernel::news::News;
use komainu_packet::lane::kernel::program::{Hook, Kernel, Sizes};
use komainu_packet::lease::{Lease, LeaseBoard};
use komainu_packet::neighbour::{Mac, NextHop, NextHops};
use komainu_packet::plan::{
    BackendPlan, DeadBackend, GroupPlan, Mode, Plan, Protocol, Scheduler, ServicePlan,
};
use komainu_packet::time::BootTime;

const GROUP: u32 = 1;
/// Port of the service and of its backends.
const PORT: u16 = 80;
const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
/// The first SNAT address.
pub const SNAT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 101);
const OWN_MAC: Mac = [2, 0, 0, 0, 0, 0xaa];
const ROUTER_MAC: Mac = [2, 0, 0, 0, 0, 1];
/// Flows of one client address.
const FLOWS_A_CLIENT: u32 = 50_000;
/// Ethernet, IPv4 and TCP headers, and a few bytes.
const SEGMENT: usize = 64;

/// See the module.
pub struct Path {
    engine: Engine,
    kernel: Option<(Kernel, Filler, News)>,
    mode: Mode,
    protocol: Protocol,
    sources: u8,
    revision: u64,
    up: u64,
    /// Whether the program's table of flows grows by itself.
    grows: bool,
}

/// Flags of a TCP segment; over UDP all are the same datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    /// The first.
    Syn = 0x02,
    /// Its answer.
    SynAck = 0x12,
    /// Any later one.
    Ack = 0x10,
    /// The last of one side.
    Fin = 0x11,
    /// The end.
    Rst = 0x04,
}

struct Hops;

fn mac_of(address: IpAddr) -> Mac {
    match address {
        IpAddr::V4(a) if a.octets()[..3] == [10, 0, 1] => [2, 0, 0, 0, 1, a.octets()[3]],
        _ => ROUTER_MAC,
    }
}

impl NextHops for Hops {
    fn lookup(&self, destination: IpAddr) -> NextHop {
        NextHop::Resolved { port: Port::Service, next_hop: destination, mac: mac_of(destination) }
    }
}

/// Keeps the calling thread on one processor; where there is no such, wherever it is.
fn run_on(cpu: usize) {
    // SAFETY: a set of processors is plain data, and the calls write into this one only.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

/// The table of flows grows as the lane lets it.
fn grow(maps: &Maps) {
    if maps.proceed_growing().unwrap() == Growth::None && maps.should_grow() {
        maps.begin_growing().unwrap();
    }
}

impl Path {
    /// A path of a TCP service with an unlimited lease, without backends, and room for `max_flows`.
    pub fn new(hook: Option<Hook>, mode: Mode, max_flows: usize) -> Path {
        Path::of(hook, mode, Protocol::Tcp, max_flows)
    }

    /// The same of a service of that protocol.
    pub fn of(hook: Option<Hook>, mode: Mode, protocol: Protocol, max_flows: usize) -> Path {
        let leases = Arc::new(LeaseBoard::new());
        let until = BootTime(u64::MAX);
        leases.set(GROUP, Lease { epoch: 1, answer_until: until, forward_until: until });
        let service =
            PortConfig { mac: OWN_MAC, ifindex: 1, mtu: 1500, addresses: vec![(IpAddr::V4(OWN), 16)] };
        // All of them come within moments here.
        let new_flows_per_second = 10_000_000;
        let config = EngineConfig { service, inside: None, max_flows, new_flows_per_second, seed: 7 };
        let mut engine = Engine::new(config, leases);
        let kernel = hook.map(|hook| {
            let sizes = Sizes { backends: 512, services: 64, flows: max_flows as u32, ..Sizes::default() };
            let mut kernel = Kernel::load(hook, sizes).unwrap_or_else(|e| panic!("{e}"));
            let news = kernel.take_news().expect("nobody else listens");
            let maps = kernel.maps();
            // Test runs come by interface 1.
            maps.set_port(Port::Service, OWN_MAC, 1, 1500, 2000);
            maps.set_host_addresses([IpAddr::V4(OWN)]).unwrap();
            let router = Hop::Known { port: Port::Service, mac: ROUTER_MAC, on_link: false };
            maps.put_route(Ipv4Addr::UNSPECIFIED.into(), 0, router).unwrap();
            let (answer_until, forward_until) = (until.0, until.0);
            let group = u64::from(GROUP) + 1;
            let lease = LeaseCell { group, epoch: 1, answer_until, forward_until, reserved: [0; 4] };
            assert!(maps.leases().write(GROUP, &lease));
            engine.set_cache(Box::new(Cache::new(Arc::clone(maps))));
            let filler = Filler::new(Arc::clone(maps));
            (kernel, filler, news)
        });
        Path { engine, kernel, mode, protocol, sources: 1, revision: 0, up: 0, grows: true }
    }

    /// So many SNAT addresses, from the next plan on.
    pub fn set_sources(&mut self, sources: u8) {
        self.sources = sources;
    }

    /// Puts a plan with these backends in force.
    pub fn install(&mut self, backends: &[BackendPlan]) {
        self.revision += 1;
        let plan = plan(self.revision, (self.mode, self.protocol), self.sources, backends);
        let tables = compile(plan, Some(self.engine.tables())).unwrap();
        self.engine.swap(Arc::new(tables), BootTime::now());
        if let Some((_, filler, _)) = &mut self.kernel {
            let hop = |address| Hop::of(address, Hops.lookup(address));
            let installed = filler.install(&Snapshot::of(&self.engine), &hop).unwrap();
            assert_eq!(installed.without_room, 0);
        }
    }

    /// Frames that the program left to the engine so far.
    pub fn went_up(&self) -> u64 {
        self.up
    }

    /// Flows that the engine remembers.
    pub fn remembered(&self) -> u64 {
        self.engine.counters(BootTime::now()).flows
    }

    /// The engine does what falls due after so long.
    pub fn tick_after(&mut self, time: Duration) {
        let now = BootTime::now().after(time);
        self.learn();
        while self.engine.next_deadline().is_some_and(|due| due <= now) {
            self.engine.tick(now);
        }
    }

    fn learn(&mut self) {
        if let Some((kernel, _, news)) = &mut self.kernel {
            news.learn(&mut self.engine, BootTime::now());
            self.grows.then(|| grow(kernel.maps()));
        }
    }

    /// New flows that were counted, of all backends.
    pub fn new_flows(&self) -> u64 {
        let counters = self.engine.counters_with(BootTime::now(), |number| {
            let traffic = self.kernel.as_ref()?.0.maps().traffic(number);
            Some(Passed { new_flows: traffic.new_flows, ..Passed::default() })
        });
        counters.backends.iter().map(|b| b.new_flows).sum()
    }

    /// Takes every flow out of the program's table.
    pub fn clear(&self) {
        let (kernel, ..) = self.kernel.as_ref().expect("a program");
        kernel.maps().clear_flows().unwrap();
    }

    /// Flows in the program's table: on the client's side, on the backend's side.
    pub fn in_maps(&self) -> (usize, usize) {
        self.kernel.as_ref().map_or((0, 0), |(kernel, ..)| kernel.maps().count_flows())
    }

    /// Has two processors run the program at once on first segments of `each` clients, from that with number `first` on: mostly each of
    /// the two on another client, and now and then both on the same at the same moment, for they count together and without locks. The
    /// caller does what `beside` does meanwhile. What the program tells of the flows that it has made.
    pub fn make_on_two_processors(
        &mut self,
        first: u32,
        each: u32,
        mut beside: impl FnMut(&Maps),
    ) -> Vec<abi::News> {
        let segment = self.packet(client(0), (VIP, PORT), ROUTER_MAC, Flags::Syn);
        let mut frame = [0; 96];
        frame[..segment.len()].copy_from_slice(&segment);
        // The harness reckons the header's checksum over what it finds.
        frame[24..26].fill(0);
        let (kernel, _, news) = self.kernel.as_mut().expect("a program");
        let harness = Harness::load().unwrap();
        let bench = Bench { runs: first.into(), flows: 1 << 31, v4: 1, frame };
        harness.measure(kernel.program_fd().unwrap(), &bench).unwrap();
        news.grant_each(each.into());
        let start = Barrier::new(2);
        std::thread::scope(|scope| {
            let threads = [0, 1].map(|cpu| {
                let (harness, start) = (&harness, &start);
                scope.spawn(move || {
                    run_on(cpu);
                    start.wait();
                    harness.run("vary", &frame, each).unwrap();
                })
            });
            while !threads.iter().all(|thread| thread.is_finished()) {
                beside(kernel.maps());
            }
        });
        let mut told = Vec::new();
        news.take(usize::MAX, |news| told.push(*news));
        told
    }

    /// The program's table of flows begins to grow, and from now on grows only when it is told to ([`Path::grow`]).
    pub fn begin_growing(&mut self) {
        self.grows = false;
        let (kernel, ..) = self.kernel.as_ref().expect("a program");
        kernel.maps().begin_growing().unwrap();
    }

    /// It does a piece of it.
    pub fn grow(&mut self) -> Growth {
        let (kernel, ..) = self.kernel.as_ref().expect("a program");
        kernel.maps().proceed_growing().unwrap()
    }

    /// Every remembered flow's SNAT address and port, with its backend's id.
    pub fn bindings(&self) -> Vec<(u32, SocketAddr)> {
        let flows = self.engine.flows(&FlowFilter::default(), usize::MAX, BootTime::now());
        flows.into_iter().filter_map(|f| Some((f.backend, f.snat?))).collect()
    }

    /// The frame as it leaves, if it does.
    fn send(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        if let Some((kernel, _, news)) = &mut self.kernel {
            let now = BootTime::now();
            news.grant(&mut self.engine, now);
            let ran = kernel.test_run(frame, None, 1).unwrap();
            // As the lane does before it looks at the next frame.
            news.learn(&mut self.engine, BootTime::now());
            self.grows.then(|| grow(kernel.maps()));
            // What leaves has other MAC addresses.
            if ran.frame != frame {
                return Some(ran.frame);
            }
            self.up += 1;
        }
        let mut bytes = frame.to_vec();
        let mut view = FrameMut::new(&mut bytes);
        let verdict = self.engine.process(&mut view, Port::Service, BootTime::now(), &Hops);
        matches!(verdict, Verdict::Forward { .. }).then_some(bytes)
    }

    fn packet(
        &self,
        from: (Ipv4Addr, u16),
        to: (Ipv4Addr, u16),
        from_mac: Mac,
        flags: Flags,
    ) -> [u8; SEGMENT] {
        match self.protocol {
            Protocol::Tcp => segment(from, to, from_mac, flags),
            Protocol::Udp => datagram(from, to, from_mac),
        }
    }

    /// Sends a client's segment to the service: the number of the backend that it went to, and the segment as it got there.
    pub fn request(&mut self, flow: u32, flags: Flags) -> Option<(u8, Vec<u8>)> {
        let sent = self.send(&self.packet(client(flow), (VIP, PORT), ROUTER_MAC, flags))?;
        assert_eq!(sent[..5], [2, 0, 0, 0, 1], "flow {flow} went to no backend");
        Some((sent[5], sent))
    }

    /// Where a flow's next segment goes.
    pub fn next(&mut self, flow: u32) -> Option<u8> {
        self.request(flow, Flags::Ack).map(|(backend, _)| backend)
    }

    /// The backend answers a client's segment, as it got there, by one with these flags: that, as it gets to the client, if it does.
    pub fn answer(&mut self, segment_there: &[u8], flags: Flags) -> Option<Vec<u8>> {
        let s = segment_there;
        let at = |i: usize| Ipv4Addr::new(s[i], s[i + 1], s[i + 2], s[i + 3]);
        let port = |i: usize| u16::from_be_bytes([s[i], s[i + 1]]);
        let (from, to) = ((at(30), port(36)), (at(26), port(34)));
        let answer = self.send(&self.packet(from, to, mac_of(from.0.into()), flags))?;
        assert_eq!(answer[..6], ROUTER_MAC);
        Some(answer)
    }

    /// A connection is made, by three segments. Its backend.
    pub fn connect(&mut self, flow: u32) -> u8 {
        let (backend, syn) =
            self.request(flow, Flags::Syn).unwrap_or_else(|| panic!("flow {flow} is refused"));
        // In `dsr` the answer goes its own way.
        if self.mode != Mode::Dsr {
            let answer = self.answer(&syn, Flags::SynAck);
            let answer = answer.unwrap_or_else(|| panic!("the answer of flow {flow} is lost"));
            assert_eq!(answer[30..34], client(flow).0.octets());
        }
        assert_eq!(self.next(flow), Some(backend), "flow {flow} moves while it is made");
        backend
    }
}

/// A backend of weight 1 that is in force. Its number is the last part of its address.
pub fn backend(number: u8) -> BackendPlan {
    BackendPlan {
        id: number.into(),
        name: format!("be{number}"),
        address: Ipv4Addr::new(10, 0, 1, number).into(),
        port: PORT,
        weight: 1,
        base_weight: 1,
        alive: true,
    }
}

fn plan(revision: u64, (mode, protocol): (Mode, Protocol), sources: u8, backends: &[BackendPlan]) -> Plan {
    let [a, b, c, first] = SNAT.octets();
    let group = GroupPlan {
        id: GROUP,
        name: "group".to_owned(),
        vips: vec![VIP.into()],
        inside_vips: vec![],
        snat: (0..sources).map(|n| Ipv4Addr::new(a, b, c, first + n).into()).collect(),
    };
    let service = ServicePlan {
        id: 1,
        name: "service".to_owned(),
        group: GROUP,
        vip: VIP.into(),
        port: PORT,
        protocol,
        mode,
        scheduler: Scheduler::Maglev,
        dead_backend: DeadBackend::Reset,
        track_udp: true,
        tcp_idle: Duration::from_secs(900),
        udp_idle: Duration::from_secs(30),
        backends: backends.to_vec(),
        consult_all_slots: false,
    };
    Plan { revision, groups: vec![group], services: vec![service] }
}

fn client(flow: u32) -> (Ipv4Addr, u16) {
    let [_, b, c, d] = (1 + flow / FLOWS_A_CLIENT).to_be_bytes();
    (Ipv4Addr::new(9, b, c, d), 10_000 + (flow % FLOWS_A_CLIENT) as u16)
}

/// Ethernet and IPv4 headers, and ports.
fn headers(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), from_mac: Mac, protocol: u8) -> [u8; SEGMENT] {
    let mut s = [0; SEGMENT];
    s[..6].copy_from_slice(&OWN_MAC);
    s[6..12].copy_from_slice(&from_mac);
    s[12..14].copy_from_slice(&[0x08, 0x00]);
    s[14..18].copy_from_slice(&[0x45, 0, 0, (SEGMENT - 14) as u8]);
    s[22..24].copy_from_slice(&[64, protocol]);
    s[26..30].copy_from_slice(&from.0.octets());
    s[30..34].copy_from_slice(&to.0.octets());
    let header = checksum(&s[14..34]);
    s[24..26].copy_from_slice(&header.to_be_bytes());
    s[34..36].copy_from_slice(&from.1.to_be_bytes());
    s[36..38].copy_from_slice(&to.1.to_be_bytes());
    s
}

fn datagram(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), from_mac: Mac) -> [u8; SEGMENT] {
    let mut s = headers(from, to, from_mac, 17);
    let length = (SEGMENT - 34) as u16;
    s[38..40].copy_from_slice(&length.to_be_bytes());
    let sum = Sum::pseudo_header(from.0.into(), to.0.into(), 17, length.into()).bytes(&s[34..]).checksum();
    s[40..42].copy_from_slice(&sum.to_be_bytes());
    s
}

fn segment(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), from_mac: Mac, flags: Flags) -> [u8; SEGMENT] {
    let mut s = headers(from, to, from_mac, 6);
    s[41] = 1;
    s[45] = u8::from(flags != Flags::Syn);
    s[46..48].copy_from_slice(&[5 << 4, flags as u8]);
    s[48..50].copy_from_slice(&[0xff, 0xff]);
    let length = (SEGMENT - 34) as u32;
    let sum = Sum::pseudo_header(from.0.into(), to.0.into(), 6, length).bytes(&s[34..]).checksum();
    s[50..52].copy_from_slice(&sum.to_be_bytes());
    s
}
