//! The lane and the machine it runs on: what it refuses, and what it does when interfaces come and go.

// A failure to set up is a failure of the test.
#![allow(clippy::unwrap_used)]

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use komainu_lab::topology::{RouteSpec, SERVICE, addr};
use komainu_lab::{Lab, Standard};
use komainu_packet::lane::af_packet::{AfPacketConfig, AfPacketLane, Severity};
use komainu_packet::lane::kernel::{self, Choice};
use komainu_packet::lane::{Counters, LaneError, LaneKind, SharedLane};
use komainu_packet::plan::{Mode, Protocol};
use komainu_tests::lane::{self, GROUP, Renewer};

const PORT: u16 = 5353;
const SOON: Duration = Duration::from_secs(10);

fn lab() -> Lab {
    let topology =
        Standard { service_backends: 1, inside_backends: 0, far: false, balancers: 1, witness: false };
    Lab::build(&topology.topology()).unwrap()
}

fn config() -> AfPacketConfig {
    AfPacketConfig::new("eth0", None)
}

fn refusals(lab: &Lab, config: &AfPacketConfig) -> Vec<String> {
    let findings = lab.host("lb1").run(|| AfPacketLane::check(config));
    findings.into_iter().filter(|f| f.severity == Severity::Refuse).map(|f| f.message).collect()
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < SOON, "{what} did not come about within {SOON:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A lane with a `dsr` service, its lease, and a client and a server that talk through it.
struct Talk {
    lane: SharedLane,
    client: UdpSocket,
    server: UdpSocket,
    sent: AtomicU64,
    _renewer: Renewer,
}

impl Talk {
    fn start(lab: &Lab, kind: LaneKind) -> Talk {
        Talk::with(lab, lane::start(lab, "lb1", kind, config()).unwrap())
    }

    fn with(lab: &Lab, lane: SharedLane) -> Talk {
        let vip = addr::service(addr::VIP)[0];
        let mut plan = lane::plan(1, &[vip], &[], &[]);
        let backend = addr::service(addr::FIRST_BACKEND)[0];
        lane::add_service(&mut plan, vip, PORT, Protocol::Udp, Mode::Dsr, &[backend]);
        lane.install(plan).unwrap();
        let renewer = Renewer::start(Arc::clone(&lane));
        lane.announce(GROUP);
        let server = lab.host("be1").run(|| UdpSocket::bind((vip, PORT))).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let client = lab.host("client").run(|| UdpSocket::bind((addr::service(addr::CLIENT)[0], 0))).unwrap();
        client.connect((vip, PORT)).unwrap();
        Talk { lane, client, server, sent: AtomicU64::new(0), _renewer: renewer }
    }

    /// Whether a datagram gets through: this one, not one that was under way before.
    fn works(&self) -> bool {
        let number = self.sent.fetch_add(1, Ordering::Relaxed).to_ne_bytes();
        let _ = self.client.send(&number);
        let mut got = [0; 8];
        while self.server.recv(&mut got).is_ok() {
            if got == number {
                return true;
            }
        }
        false
    }
}

fn ip(lab: &Lab, host: &str, args: &str) {
    let status = lab.host(host).run(|| Command::new("ip").args(args.split(' ')).status()).unwrap();
    assert!(status.success(), "ip {args}: {status}");
}

#[test]
fn a_fit_machine_is_not_refused() {
    let lab = lab();
    assert_eq!(refusals(&lab, &config()), Vec::<String>::new());
}

#[test]
fn ip_forwarding_is_refused_and_the_sysctl_named() {
    for (key, named) in [
        ("ipv4/conf/eth0/forwarding", "net.ipv4.conf.eth0.forwarding"),
        ("ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    ] {
        let lab = lab();
        lab.host("lb1").sysctl(key, "1").unwrap();
        let found = refusals(&lab, &config());
        assert!(found.len() == 1 && found[0].contains(named), "{found:?}");
        let refused = lane::start(&lab, "lb1", LaneKind::AfPacket, config()).err().unwrap();
        assert!(refused.to_string().contains(named), "{refused}");
    }
}

#[test]
fn an_interface_that_is_missing_down_or_no_ethernet_is_refused() {
    let lab = lab();
    let found = refusals(&lab, &AfPacketConfig::new("eth7", None));
    assert!(
        found.len() == 1 && found[0].contains("does not exist") && found[0].contains("eth0"),
        "{found:?}"
    );
    let found = refusals(&lab, &AfPacketConfig::new("eth0", Some("eth0".to_owned())));
    assert!(found.iter().any(|f| f.contains("both")), "{found:?}");
    let found = refusals(&lab, &AfPacketConfig::new("lo", None));
    assert!(found.iter().any(|f| f.contains("not an Ethernet interface")), "{found:?}");
    lab.host("lb1").set_link(SERVICE, false).unwrap();
    let found = refusals(&lab, &config());
    assert!(found.iter().any(|f| f.contains("ip link set eth0 up")), "{found:?}");
    assert!(matches!(
        lane::start(&lab, "lb1", LaneKind::AfPacket, config()),
        Err(LaneError::Interface { .. })
    ));
}

fn a_link_that_goes_down_is_told_and_forwarding_resumes_when_it_is_back(kind: LaneKind) {
    let lab = lab();
    let talk = Talk::start(&lab, kind);
    eventually("traffic", || talk.works());
    assert!(talk.lane.links()[0].up);

    lab.unplug("lb1", SERVICE).unwrap();
    eventually("the loss of the carrier", || !talk.lane.links()[0].up);
    assert!(!talk.works());
    lab.plug("lb1", SERVICE).unwrap();
    eventually("the carrier", || talk.lane.links()[0].up);
    eventually("traffic after the cable was back", || talk.works());

    lab.host("lb1").set_link(SERVICE, false).unwrap();
    eventually("link down", || !talk.lane.links()[0].up);
    assert!(!talk.works());
    lab.host("lb1").set_link(SERVICE, true).unwrap();
    eventually("traffic after the interface was up again", || talk.works());
    assert_eq!(talk.lane.forwarding(), Ok(()));
}

fn an_interface_that_is_gone_is_told_and_taken_up_again_when_it_returns(kind: LaneKind) {
    let lab = lab();
    let talk = Talk::start(&lab, kind);
    eventually("traffic", || talk.works());
    // Another interface takes the name, as when a NIC is replaced.
    ip(&lab, "lb1", "link set eth0 down");
    ip(&lab, "lb1", "link set eth0 name old0");
    eventually("the loss of the interface", || talk.lane.forwarding().is_err());
    assert!(talk.lane.forwarding().unwrap_err().contains("eth0"));
    assert!(!talk.works());
    ip(&lab, "lb1", "link set old0 name eth0");
    ip(&lab, "lb1", "link set eth0 up");
    eventually("the interface", || talk.lane.forwarding().is_ok());
    eventually("traffic", || talk.works());
}

fn the_gateway_of_the_service_network_is_known(kind: LaneKind) {
    let lab = lab();
    let talk = Talk::start(&lab, kind);
    assert!(talk.lane.gateways().is_empty());
    let gateway = addr::service(addr::ROUTER)[0];
    lab.host("lb1").add_route(RouteSpec::default_via(gateway)).unwrap();
    eventually("the gateway", || talk.lane.gateways() == [gateway]);
}

fn a_lane_that_was_stopped_is_silent_and_says_so(kind: LaneKind) {
    let lab = lab();
    let talk = Talk::start(&lab, kind);
    eventually("traffic", || talk.works());
    let before = talk.lane.counters();
    talk.lane.stop();
    talk.lane.stop();
    assert!(!talk.works());
    assert!(talk.lane.forwarding().is_err());
    assert!(talk.lane.install(lane::plan(2, &[], &[], &[])).is_err());
    assert_eq!(talk.lane.counters().events.len(), before.events.len());
}

/// Kernels before 6.6 have no links at the tc hook.
#[test]
fn a_filter_serves_at_the_tc_hook_where_there_are_no_links() {
    let lab = lab();
    let without_links = AfPacketConfig { tc_by_filter: true, ..config() };
    let filters = || {
        let show = || Command::new("tc").args(["filter", "show", "dev", "eth0", "ingress"]).output();
        let output = lab.host("lb1").run(show).unwrap();
        String::from_utf8(output.stdout).unwrap().matches("direct-action").count()
    };
    // What ran before had links, and has crashed: what is left of it goes.
    let linked = lane::start(&lab, "lb1", LaneKind::Tc, config()).unwrap();
    assert_eq!((linked.mode().as_str(), filters()), ("tcx", 0));
    drop(linked);
    let talk = Talk::with(&lab, lane::start(&lab, "lb1", LaneKind::Tc, without_links.clone()).unwrap());
    assert_eq!((talk.lane.mode().as_str(), filters()), ("clsact", 1));
    eventually("traffic", || talk.works());
    // It is the program that forwards, not the engine above it.
    let counters = || talk.lane.counters();
    let up = |counters: &Counters| -> u64 {
        counters.events.iter().filter(|(name, _)| name.starts_with("up_")).map(|(_, n)| n).sum()
    };
    let before = counters();
    for _ in 0..20 {
        assert!(talk.works());
    }
    let after = counters();
    assert!(after.backends[0].packets >= before.backends[0].packets + 20, "{before:?} {after:?}");
    assert!(up(&after) < up(&before) + 20, "{before:?} {after:?}");
    // Another takes its place in one step, as after a crash: there is one filter.
    let again = lane::start(&lab, "lb1", LaneKind::Tc, without_links).unwrap();
    assert_eq!(filters(), 1);
    again.stop();
    assert_eq!(filters(), 0);
}

#[test]
fn what_a_veth_needs_of_its_neighbours_for_xdp_is_told() {
    let lab = lab();
    let found = lab.host("lb1").run(|| komainu_packet::lane::check(LaneKind::Xdp, &config()));
    let warned = found.iter().find(|f| f.severity == Severity::Warn && f.message.contains("veth"));
    let warned = &warned.unwrap_or_else(|| panic!("{found:?}")).message;
    for word in ["peer", "tx off", "lane = \"tc\""] {
        assert!(warned.contains(word), "{word} in {warned}");
    }
    // Nothing of it matters to the lane that is chosen.
    let found = lab.host("lb1").run(|| komainu_packet::lane::check(LaneKind::Tc, &config()));
    assert!(found.iter().all(|f| f.severity == Severity::Note), "{found:?}");
    assert!(found.iter().any(|f| f.message.contains("tcx")), "{found:?}");
}

#[test]
fn auto_is_tc_on_a_veth_also_beside_a_foreign_xdp_program() {
    let lab = lab();
    let choose = || lab.host("lb1").run(|| kernel::choose(&config()));
    let choice = choose();
    assert!(choice.kind == LaneKind::Tc && choice.reason.contains("veth"), "{choice:?}");
    // A lane that was asked for is not replaced: what stands against it is an error.
    let foreign = lab.host("lb1").attach_passing_xdp(SERVICE).unwrap();
    let forced = Choice::forced(LaneKind::Xdp);
    let refused =
        lab.host("lb1").run(|| komainu_packet::lane::start_chosen(forced, &config())).err().unwrap();
    assert!(refused.to_string().contains("another XDP program"), "{refused}");
    // One that was chosen freely is.
    let free = Choice { kind: LaneKind::Xdp, reason: String::new(), forced: false };
    let (lane, chosen) = lab.host("lb1").run(|| komainu_packet::lane::start_chosen(free, &config())).unwrap();
    assert_eq!((lane.kind(), chosen.kind), (LaneKind::Tc, LaneKind::Tc));
    assert!(chosen.reason.contains("another XDP program"), "{chosen:?}");
    drop(foreign);
}

#[test]
fn a_driver_that_takes_no_xdp_program_gets_tc_instead_of_a_slow_one() {
    let lab = lab();
    // A bridge has no driver that could run one.
    ip(&lab, "lb1", "link add nat0 type bridge");
    ip(&lab, "lb1", "link set nat0 up");
    let config = AfPacketConfig::new("nat0", None);
    let start =
        |choice: Choice| lab.host("lb1").run(|| komainu_packet::lane::start_chosen(choice, &config)).unwrap();
    let (lane, _) = start(Choice::forced(LaneKind::Xdp));
    assert_eq!(lane.mode(), kernel::GENERIC);
    drop(lane);
    let (lane, choice) = start(Choice { kind: LaneKind::Xdp, reason: String::new(), forced: false });
    assert_eq!((lane.kind(), choice.kind), (LaneKind::Tc, LaneKind::Tc));
    assert!(choice.reason.contains("driver"), "{choice:?}");
}

/// Guards against a wake-up by the netlink thread that nobody took off: a lane that had the picture already never slept again.
fn a_lane_at_rest_sleeps(kind: LaneKind) {
    const WATCHED: Duration = Duration::from_secs(1);
    let lab = lab();
    let lane = lane::start(&lab, "lb1", kind, config()).unwrap();
    let renewer = Renewer::start(Arc::clone(&lane));
    for changes in [0, 30] {
        for _ in 0..changes {
            ip(&lab, "lb1", "neighbour replace 192.0.2.77 lladdr 02:00:00:00:00:77 dev eth0");
            ip(&lab, "lb1", "neighbour delete 192.0.2.77 dev eth0");
        }
        let before = lane::processor_time(lab.host("lb1")).unwrap();
        assert!(!before.is_zero(), "the lane's threads were not found");
        std::thread::sleep(WATCHED);
        let used = lane::processor_time(lab.host("lb1")).unwrap() - before;
        assert!(used < WATCHED / 4, "{used:?} of processor time in {WATCHED:?} without a packet");
    }
    drop(renewer);
    lane.stop();
}

komainu_tests::on_every_lane!(
    a_lane_at_rest_sleeps,
    a_link_that_goes_down_is_told_and_forwarding_resumes_when_it_is_back,
    an_interface_that_is_gone_is_told_and_taken_up_again_when_it_returns,
    the_gateway_of_the_service_network_is_known,
    a_lane_that_was_stopped_is_silent_and_says_so,
);
