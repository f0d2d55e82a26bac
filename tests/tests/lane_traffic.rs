//! The lane carries real TCP and UDP between real hosts, whole, in every mode and both families.

// A failure to set up is a failure of the test.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::EbpfLoader;
use aya::maps::PerCpuArray;
use aya::programs::tc::{SchedClassifier, TcAttachType, qdisc_add_clsact};
use komainu_lab::topology::{SERVICE, addr};
use komainu_lab::{Lab, Standard};
use komainu_packet::lane::af_packet::AfPacketConfig;
use komainu_packet::lane::{FlowFilter, LaneKind, SharedLane};
use komainu_packet::plan::{Mode, Plan, Protocol};
use komainu_tests::lane::{self, GROUP, Renewer};

static LINEAR: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/linear.o"));

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
const TCP: u16 = 8080;
const UDP: u16 = 5353;

/// `client`, `lb1`, `be1` on the service segment with the VIP on `lo`, `bi1` on the inside segment behind the inside VIP.
struct Stage {
    lab: Lab,
    lane: SharedLane,
    _renewer: Renewer,
}

const MODES: [Mode; 3] = [Mode::Dsr, Mode::Nat, Mode::NatTransparent];

/// VIP, inside VIP, SNAT address and backend of a mode and family (0: IPv4, 1: IPv6). Modes differ in their VIP.
fn vip(mode: Mode, family: usize) -> IpAddr {
    let host = match mode {
        Mode::Dsr => addr::VIP,
        Mode::Nat => addr::VIP + 1,
        Mode::NatTransparent => addr::VIP + 2,
    };
    addr::service(host)[family]
}

fn backend(mode: Mode, family: usize) -> (&'static str, IpAddr) {
    match mode {
        Mode::Dsr => ("be1", addr::service(addr::FIRST_BACKEND)[family]),
        _ => ("bi1", addr::inside(addr::FIRST_BACKEND)[family]),
    }
}

/// Address that the server of a mode listens on.
fn listen(mode: Mode, family: usize) -> (&'static str, IpAddr) {
    match mode {
        Mode::Dsr => ("be1", vip(mode, family)),
        _ => backend(mode, family),
    }
}

/// Port of a mode: in `nat-transparent` a backend's port belongs to one service.
fn port(base: u16, mode: Mode) -> u16 {
    base + MODES.iter().position(|m| *m == mode).unwrap() as u16
}

fn plan(revision: u64) -> Plan {
    let vips: Vec<IpAddr> = MODES.iter().flat_map(|m| [vip(*m, 0), vip(*m, 1)]).collect();
    let mut plan = lane::plan(revision, &vips, &addr::inside(addr::VIP), &addr::inside(addr::SNAT));
    for mode in MODES {
        for family in 0..2 {
            for (protocol, base) in [(Protocol::Tcp, TCP), (Protocol::Udp, UDP)] {
                let to = [backend(mode, family).1];
                lane::add_service(&mut plan, vip(mode, family), port(base, mode), protocol, mode, &to);
            }
        }
    }
    plan
}

impl Stage {
    fn build(kind: LaneKind) -> Stage {
        let topology =
            Standard { service_backends: 1, inside_backends: 1, far: false, balancers: 1, witness: false };
        let lab = Lab::build(&topology.topology()).unwrap();
        let lane =
            lane::start(&lab, "lb1", kind, AfPacketConfig::new("eth0", Some("eth1".to_owned()))).unwrap();
        lane.install(plan(1)).unwrap();
        let renewer = Renewer::start(Arc::clone(&lane));
        lane.announce(GROUP);
        Stage { lab, lane, _renewer: renewer }
    }

    fn connect(&self, mode: Mode, family: usize) -> TcpStream {
        let to = SocketAddr::new(vip(mode, family), port(TCP, mode));
        let stream = self
            .lab
            .host("client")
            .run(|| TcpStream::connect_timeout(&to, PATIENCE))
            .unwrap_or_else(|e| panic!("{mode:?} {to}: {e}; {:?}", nonzero(&self.lane.counters().drops)));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

fn nonzero(counters: &[(&'static str, u64)]) -> Vec<(&'static str, u64)> {
    counters.iter().copied().filter(|(_, n)| *n > 0).collect()
}

/// A stream of bytes in which every 8 bytes differ from all others, so that no loss, swap or repetition goes unseen.
struct Pattern(u64);

impl Pattern {
    fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_exact_mut(8) {
            self.0 = self.0.wrapping_add(1);
            word.copy_from_slice(&(self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes());
        }
    }
}

fn send_pattern(mut stream: &TcpStream, bytes: usize) -> std::io::Result<()> {
    let (mut pattern, mut chunk) = (Pattern(0), vec![0; 64 * 1024]);
    for _ in 0..bytes / chunk.len() {
        pattern.fill(&mut chunk);
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)
}

/// Reads to the end; how many bytes it was, all as sent.
fn check_pattern(mut stream: &TcpStream) -> std::io::Result<usize> {
    let (mut pattern, mut got, mut wanted) = (Pattern(0), vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut total = 0;
    loop {
        let mut have = 0;
        while have < got.len() {
            match stream.read(&mut got[have..])? {
                0 => break,
                n => have += n,
            }
        }
        pattern.fill(&mut wanted);
        assert!(got[..have] == wanted[..have], "the stream differs within 64 KiB after byte {total}");
        total += have;
        if have < got.len() {
            return Ok(total);
        }
    }
}

fn a_hundred_mebibytes_of_tcp_arrive_whole_in_every_mode_and_family(kind: LaneKind) {
    let stage = Stage::build(kind);
    for mode in MODES {
        for family in 0..2 {
            let (host, at) = listen(mode, family);
            let listener = stage.lab.host(host).run(|| TcpListener::bind((at, port(TCP, mode)))).unwrap();
            let server = std::thread::spawn(move || {
                let (stream, peer) = listener.accept().unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let up = check_pattern(&stream).unwrap();
                send_pattern(&stream, 100 * MIB).unwrap();
                (up, peer)
            });
            let start = Instant::now();
            let stream = stage.connect(mode, family);
            send_pattern(&stream, 100 * MIB).unwrap();
            let down = check_pattern(&stream).unwrap();
            let (up, peer) = server.join().unwrap();
            assert_eq!((up, down), (100 * MIB, 100 * MIB), "{mode:?}, family {family}");
            let client = stream.local_addr().unwrap();
            match mode {
                Mode::Nat => assert_eq!(peer.ip(), addr::inside(addr::SNAT)[family]),
                _ => assert_eq!(peer, client),
            }
            println!("{mode:?} family {family}: 200 MiB in {:?}", start.elapsed());
        }
    }
    let counters = stage.lane.counters();
    println!("{:?}", nonzero(&counters.events));
    let count = |name: &str| counters.events.iter().find(|(n, _)| *n == name).map_or(0, |(_, n)| *n);
    if kind != LaneKind::AfPacket {
        let all = count("forwarded") + count("returned");
        assert!(
            count("frames_sent") * 50 < all,
            "the engine sends what the program should: {all} frames in all"
        );
    }
}

/// The program at the tc hook once had each super-frame of IPv4 copied: it asked for as many bytes as the longest headers that it reads.
#[test]
fn headers_of_super_frames_are_not_moved() {
    let stage = Stage::build(LaneKind::Tc);
    for mode in MODES {
        let (host, at) = listen(mode, 0);
        let server = stage.lab.host(host);
        let mut programs = EbpfLoader::new().load(LINEAR).unwrap();
        let program: &mut SchedClassifier = programs.program_mut("linear").unwrap().try_into().unwrap();
        program.load().unwrap();
        server.run(|| {
            // Where there are no links at the hook, it is there for filters only once it was asked for.
            let _ = qdisc_add_clsact("eth0");
            program.attach("eth0", TcAttachType::Ingress).unwrap();
        });
        let listener = server.run(|| TcpListener::bind((at, port(TCP, mode)))).unwrap();
        let reader = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            check_pattern(&stream).unwrap()
        });
        send_pattern(&stage.connect(mode, 0), 20 * MIB).unwrap();
        assert_eq!(reader.join().unwrap(), 20 * MIB);
        let counted = PerCpuArray::<_, u64>::try_from(programs.map("super_frames").unwrap()).unwrap();
        let [all, moved] = [0, 1].map(|which| counted.get(&which, 0).unwrap().iter().sum::<u64>());
        assert!(all > 20, "{mode:?}: {all} super-frames for 20 MiB");
        assert_eq!(moved, 0, "{mode:?}: of {all}");
    }
}

/// An echo server that serves connections until its listener's last connection said so.
fn echo(listener: TcpListener) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(1) if byte == [END] => return,
                Ok(1) => stream.write_all(&byte).unwrap(),
                // A probe that said nothing.
                _ => {}
            }
            // The client ends it, and its end is waited for.
            let _ = stream.read(&mut byte);
        }
    })
}

const END: u8 = 0xff;

/// Guards the program's making of flows: through user space a connection of full NAT cost four frames.
fn connections_of_full_nat_are_made_and_ended_in_the_kernel(kind: LaneKind) {
    const CONNECTIONS: usize = 300;
    let stage = Stage::build(kind);
    let count = |names: &[&str]| {
        let counters = stage.lane.counters();
        counters.events.iter().filter(|(n, _)| names.contains(n)).map(|(_, n)| *n).sum::<u64>()
    };
    for family in 0..2 {
        let (host, at) = listen(Mode::Nat, family);
        let listener = stage.lab.host(host).run(|| TcpListener::bind((at, port(TCP, Mode::Nat)))).unwrap();
        let server = echo(listener);
        let exchange = |byte: u8| {
            let mut stream = stage.connect(Mode::Nat, family);
            stream.write_all(&[byte]).unwrap();
            let mut back = [0];
            let n = stream.read(&mut back).unwrap();
            (n, back[0], stream.local_addr().unwrap())
        };
        // The first one may wait for neighbours.
        assert_eq!(exchange(1).0, 1);
        let ups = ["up_flow", "up_segment", "up_unsteady", "up_note", "up_neighbour"];
        let before = count(&ups);
        let clients: Vec<SocketAddr> = (0..CONNECTIONS)
            .map(|n| {
                let (length, byte, client) = exchange(n as u8 & 0x7f);
                assert_eq!((length, byte), (1, n as u8 & 0x7f));
                client
            })
            .collect();
        if kind != LaneKind::AfPacket {
            let up = count(&ups) - before;
            // A neighbour may have to be confirmed meanwhile, and clients may use a port again.
            assert!(up < CONNECTIONS as u64 / 20, "{up} frames of {CONNECTIONS} connections went up");
        }
        // The engine knows each, with a port of its own.
        let flows = stage.lane.flows(&FlowFilter::default(), 10_000);
        let mut ports = std::collections::BTreeSet::new();
        for client in clients {
            let flow = flows.iter().find(|f| f.client == client);
            let flow = flow.unwrap_or_else(|| panic!("{client} is not in the list"));
            assert!(ports.insert(flow.snat), "{:?} twice", flow.snat);
        }
        exchange(END);
        server.join().unwrap();
    }
    // They end by themselves, and nothing is left.
    let start = Instant::now();
    while stage.lane.counters().flows > 0 {
        assert!(start.elapsed() < PATIENCE, "{} flows are left", stage.lane.counters().flows);
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn the_first_datagram_of_a_fresh_client_is_answered(kind: LaneKind) {
    let stage = Stage::build(kind);
    for (i, mode) in MODES.into_iter().enumerate() {
        for family in 0..2 {
            let (host, at) = listen(mode, family);
            let server = stage.lab.host(host).run(|| UdpSocket::bind((at, port(UDP, mode)))).unwrap();
            server.set_read_timeout(Some(PATIENCE)).unwrap();
            let echo = std::thread::spawn(move || {
                let mut buffer = [0; 64];
                let (n, from) = server.recv_from(&mut buffer).unwrap();
                server.send_to(&buffer[..n], from).unwrap();
            });
            // An address that nobody on the network has heard of: the balancer's kernel has to find it.
            let fresh = addr::service(200 + 2 * i as u8)[family];
            let prefix = if family == 0 { 24 } else { 64 };
            let host = stage.lab.host("client");
            host.add_address(SERVICE, fresh, prefix).unwrap();
            let client = host.run(|| UdpSocket::bind((fresh, 0))).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            client.send_to(b"once", (vip(mode, family), port(UDP, mode))).unwrap();
            let mut buffer = [0; 64];
            let (n, from) = client.recv_from(&mut buffer).unwrap_or_else(|e| {
                panic!("{mode:?} family {family}: {e}; {:?}", nonzero(&stage.lane.counters().drops))
            });
            assert_eq!((&buffer[..n], from.ip()), (&b"once"[..], vip(mode, family)));
            echo.join().unwrap();
        }
    }
}

fn a_plan_that_drops_a_service_is_in_force_when_install_returns(kind: LaneKind) {
    let stage = Stage::build(kind);
    let (host, at) = listen(Mode::Nat, 0);
    let server = stage.lab.host(host).run(|| UdpSocket::bind((at, port(UDP, Mode::Nat)))).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let client =
        stage.lab.host("client").run(|| UdpSocket::bind((addr::service(addr::CLIENT)[0], 0))).unwrap();
    let to = (vip(Mode::Nat, 0), port(UDP, Mode::Nat));
    let mut buffer = [0; 64];

    client.send_to(b"before", to).unwrap();
    assert_eq!(server.recv(&mut buffer).unwrap(), 6);
    let mut without = plan(2);
    without.services.retain(|s| s.mode != Mode::Nat);
    stage.lane.install(without).unwrap();
    assert_eq!(stage.lane.installed_revision(), 2);
    client.send_to(b"between", to).unwrap();
    let dropped = || stage.lane.counters().drops.iter().any(|(reason, n)| *reason == "no_service" && *n > 0);
    let start = Instant::now();
    while !dropped() {
        assert!(start.elapsed() < PATIENCE, "{:?}", nonzero(&stage.lane.counters().drops));
    }
    stage.lane.install(plan(3)).unwrap();
    client.send_to(b"after", to).unwrap();
    assert_eq!(server.recv(&mut buffer).unwrap(), 5, "what was sent in between must not have been forwarded");
}

komainu_tests::on_every_lane!(
    a_hundred_mebibytes_of_tcp_arrive_whole_in_every_mode_and_family,
    connections_of_full_nat_are_made_and_ended_in_the_kernel,
    the_first_datagram_of_a_fresh_client_is_answered,
    a_plan_that_drops_a_service_is_in_force_when_install_returns,
);
