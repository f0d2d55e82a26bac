//! Without a lease the lane is silent: it forwards nothing, answers nothing, announces nothing.

// A failure to set up is a failure of the test.
#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::net::{IpAddr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use komainu_lab::topology::addr;
use komainu_lab::{Lab, Standard};
use komainu_packet::lane::LaneKind;
use komainu_packet::lane::af_packet::AfPacketConfig;
use komainu_packet::lane::kernel::Silencer;
use komainu_packet::lease::Lease;
use komainu_packet::plan::Plan;
use komainu_packet::time::BootTime;
use komainu_tests::lane::{self, GROUP, LEASE, Renewer};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};

const PORT: u16 = 5353;
/// Time that a frame may be under way from the lane's look at the clock to the receiver's.
const UNDER_WAY: Duration = Duration::from_millis(50);

fn lab() -> Lab {
    let topology =
        Standard { service_backends: 1, inside_backends: 0, far: false, balancers: 1, witness: false };
    Lab::build(&topology.topology()).unwrap()
}

fn plan() -> Plan {
    lane::dsr_plan(PORT)
}

/// Sends a datagram to the VIP each millisecond while the returned flag is set.
fn stream(lab: &Lab) -> Arc<AtomicBool> {
    let going = Arc::new(AtomicBool::new(true));
    let seen = Arc::clone(&going);
    let vip = addr::service(addr::VIP)[0];
    lab.host("client").spawn("stream", move || {
        let socket = UdpSocket::bind((addr::service(addr::CLIENT)[0], 0)).unwrap();
        while seen.load(Ordering::Relaxed) {
            let _ = socket.send_to(b"tick", (vip, PORT));
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    going
}

/// A server on `be1` for what comes to the VIP.
fn server(lab: &Lab) -> UdpSocket {
    let vip = addr::service(addr::VIP)[0];
    let socket = lab.host("be1").run(|| UdpSocket::bind((vip, PORT))).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

/// Reads what the wire listener has seen until nothing more comes for `quiet`: every frame with when it was read.
fn capture(lab: &Lab) -> Socket {
    let all = libc::ETH_P_ALL as u16;
    lab.host("watch")
        .run(|| Socket::new(Domain::PACKET, Type::RAW, Some(i32::from(all.to_be()).into())))
        .unwrap()
}

fn frames(socket: &Socket, quiet: Duration) -> Vec<Vec<u8>> {
    socket.set_read_timeout(Some(quiet)).unwrap();
    let mut out = Vec::new();
    let mut buffer = [0; 2048];
    while let Ok(n) = (&mut &*socket).read(&mut buffer) {
        out.push(buffer[..n].to_vec());
    }
    out
}

/// Whether a frame claims `address` for its sender: gratuitous ARP or a neighbour advertisement.
fn claims(frame: &[u8], address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => frame.get(12..14) == Some(&[8, 6]) && frame.get(28..32) == Some(&a.octets()),
        IpAddr::V6(a) => {
            frame.get(12..14) == Some(&[0x86, 0xdd])
                && frame.get(54) == Some(&136)
                && frame.get(62..78) == Some(&a.octets())
        }
    }
}

fn forwarding_ends_with_the_lease(kind: LaneKind) {
    let lab = lab();
    let lane = lane::start(&lab, "lb1", kind, AfPacketConfig::new("eth0", None)).unwrap();
    lane.install(plan()).unwrap();
    let server = server(&lab);
    let until = BootTime::now().after(Duration::from_millis(700));
    lane.set_lease(GROUP, Lease { epoch: 1, answer_until: until, forward_until: until });
    lane.announce(GROUP);
    let going = stream(&lab);

    let (mut count, mut last) = (0, BootTime(0));
    while server.recv(&mut [0; 16]).is_ok() {
        count += 1;
        last = BootTime::now();
    }
    assert!(count > 100, "{count} datagrams arrived while the lease lasted");
    assert!(last < until.after(UNDER_WAY), "one arrived {:?} after the lease", last.since(until));

    // And it goes on with the next lease, without anything else being told.
    let until = BootTime::now().after(Duration::from_secs(60));
    lane.set_lease(GROUP, Lease { epoch: 2, answer_until: until, forward_until: until });
    assert!(server.recv(&mut [0; 16]).is_ok());
    going.store(false, Ordering::Relaxed);
    assert!(lane.counters().drops.iter().any(|(reason, n)| *reason == "no_lease" && *n > 100));
}

fn both_families_are_announced_at_once_and_again_and_never_without_a_lease(kind: LaneKind) {
    let lab = lab();
    let lane = lane::start(&lab, "lb1", kind, AfPacketConfig::new("eth0", None)).unwrap();
    lane.install(plan()).unwrap();
    let wire = capture(&lab);
    lane.announce(GROUP);
    let silent = frames(&wire, Duration::from_millis(1500));
    let vips = addr::service(addr::VIP);
    assert!(!silent.iter().any(|f| vips.iter().any(|a| claims(f, *a))), "announced without a lease");

    let renewer = Renewer::start(Arc::clone(&lane));
    lane.announce(GROUP);
    let start = BootTime::now();
    let mut seen: Vec<Vec<BootTime>> = vec![Vec::new(); 2];
    while BootTime::now().since(start) < Duration::from_millis(2600) {
        for frame in frames(&wire, Duration::from_millis(20)) {
            for (family, address) in vips.iter().enumerate() {
                if claims(&frame, *address) {
                    seen[family].push(BootTime::now());
                }
            }
        }
    }
    for (family, times) in seen.iter().enumerate() {
        let first = times.first().expect("announced").since(start);
        assert!(first < Duration::from_millis(300), "family {family}: first after {first:?}");
        assert!(times.len() >= 3, "family {family}: announced {} times", times.len());
    }
    drop(renewer);
}

fn the_vip_is_resolved_by_its_clients_only_while_there_is_a_lease(kind: LaneKind) {
    let lab = lab();
    let lane = lane::start(&lab, "lb1", kind, AfPacketConfig::new("eth0", None)).unwrap();
    lane.install(plan()).unwrap();
    let wire = capture(&lab);
    let ask = |family: usize| {
        lab.host("client").run(|| {
            let s = UdpSocket::bind((addr::service(addr::CLIENT)[family], 0)).unwrap();
            s.send_to(b"x", (addr::service(addr::VIP)[family], 9)).unwrap();
        });
    };
    ask(0);
    ask(1);
    frames(&wire, Duration::from_millis(1200));
    let answered = |name: &str| {
        let events = lane.counters().events;
        events.iter().find(|(n, _)| *n == name).map_or(0, |(_, n)| *n)
    };
    assert_eq!((answered("arp_answered"), answered("nd_answered")), (0, 0));

    let _renewer = Renewer::start(Arc::clone(&lane));
    let start = BootTime::now();
    while answered("arp_answered") == 0 || answered("nd_answered") == 0 {
        assert!(BootTime::now().since(start) < Duration::from_secs(5), "nobody answers for the VIP");
        ask(0);
        ask(1);
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What is done to a program whose process has died, before others are told of that.
fn a_silenced_program_answers_for_nothing_and_goes_on_forwarding(kind: LaneKind) {
    let lab = lab();
    let lane = lane::start(&lab, "lb1", kind, AfPacketConfig::new("eth0", None)).unwrap();
    lane.install(plan()).unwrap();
    let until = BootTime::now().after(Duration::from_secs(60));
    lane.set_lease(GROUP, Lease { epoch: 1, answer_until: until, forward_until: until });
    let Some(leases) = lane.leases() else {
        assert_eq!(kind, LaneKind::AfPacket, "a lane in user space dies with its process");
        return;
    };
    let server = server(&lab);
    let going = stream(&lab);
    assert!(server.recv(&mut [0; 16]).is_ok());
    let answered = || {
        let events = lane.counters().events;
        let count = |name| events.iter().find(|(n, _)| *n == name).map_or(0, |(_, n)| *n);
        count("arp_answered") + count("nd_answered")
    };
    assert!(answered() > 0);

    Silencer::new(leases).unwrap().silence();
    let before = answered();
    // Whoever knows the VIP goes on.
    for _ in 0..200 {
        server.recv(&mut [0; 16]).unwrap();
    }
    // Whoever asks for it is not answered, in neither family.
    let ask = || {
        lab.host("watch").run(|| {
            for family in [0, 1] {
                let s = UdpSocket::bind((addr::service(addr::WATCH)[family], 0)).unwrap();
                s.send_to(b"x", (addr::service(addr::VIP)[family], 9)).unwrap();
            }
        });
    };
    let wire = capture(&lab);
    ask();
    frames(&wire, Duration::from_millis(300));
    assert_eq!(answered(), before);
    going.store(false, Ordering::Relaxed);
    // It was asked: with a lease it answers.
    lane.set_lease(GROUP, Lease { epoch: 2, answer_until: until, forward_until: until });
    let start = BootTime::now();
    while answered() < before + 2 {
        assert!(BootTime::now().since(start) < Duration::from_secs(5), "nobody answers for the VIP");
        ask();
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn a_process_that_was_stopped_sends_nothing_when_it_goes_on(kind: LaneKind) {
    let lab = lab();
    if kind == LaneKind::Xdp {
        lab.ready_for_xdp(&["lb1"]).unwrap();
    }
    // A lane with a beat thread, for UDP services on PORT in mode dsr.
    let mut command = Command::new(env!("CARGO_BIN_EXE_lane-child"));
    command.args([&PORT.to_string(), kind.as_str()]);
    let log = lab.dir().join("child.log");
    let child = lab.host("lb1").start("lane", command, &log).unwrap();
    let server = server(&lab);
    let going = stream(&lab);

    // It forwards: its lease is renewed.
    let start = BootTime::now();
    while server.recv(&mut [0; 16]).is_err() {
        assert!(
            BootTime::now().since(start) < Duration::from_secs(10),
            "{}",
            std::fs::read_to_string(&log).unwrap_or_default()
        );
    }
    child.signal(Signal::SIGSTOP);
    // It is the clock that ends a lease, so only time can be waited for: a longer wait makes nothing else of it. Meanwhile
    // frames gather in its ring, of which those from before the end are the ones that must not leave.
    std::thread::sleep(LEASE * 3);
    server.set_nonblocking(true).unwrap();
    while server.recv(&mut [0; 16]).is_ok() {}
    server.set_nonblocking(false).unwrap();

    child.signal(Signal::SIGCONT);
    server.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    let late = server.recv(&mut [0; 16]);
    going.store(false, Ordering::Relaxed);
    assert!(late.is_err(), "a datagram was forwarded without a lease");
}

komainu_tests::on_every_lane!(
    forwarding_ends_with_the_lease,
    both_families_are_announced_at_once_and_again_and_never_without_a_lease,
    the_vip_is_resolved_by_its_clients_only_while_there_is_a_lease,
    a_silenced_program_answers_for_nothing_and_goes_on_forwarding,
    a_process_that_was_stopped_sends_nothing_when_it_goes_on,
);
