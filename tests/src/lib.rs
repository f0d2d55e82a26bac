//! What the system tests share: a cluster of the real binary in a lab, with real servers and a wire listener.
//!
//! Whatever a test is about, it fails when two nodes ever answered for one VIP at the same time.

// Only tests call this: a failure to set up is a failure of the test.
#![allow(clippy::unwrap_used)]

pub mod bench;
pub mod chaos;
pub mod grpc;
pub mod lane;
pub mod path;
pub mod pki;
pub mod soak;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use komainu_lab::cluster::document::Service;
use komainu_lab::cluster::{Cluster, Document, SOON, binary};
use komainu_lab::pcap::Capture;
use komainu_lab::standard::{self, BACKEND_HTTP, ECHO, HTTP};
use komainu_lab::topology::{SERVICE, Standard, Topology, addr};
use komainu_lab::traffic::http::{Tally, requests};
use komainu_lab::traffic::server::Server;
use komainu_lab::traffic::stream::{StreamSpec, UdpStream};
use komainu_lab::watch::{Watch, WireLog};
use komainu_lab::{Host, Lab};
use komainu_packet::lane::LaneKind;

/// How often the wire listener asks for each VIP.
pub const PROBE: Duration = Duration::from_millis(4);
/// How long a client waits for one answer.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Leases and promises so long that whoever waits for them is told from whoever doesn't: 1.5 s and 2.5 s.
pub const PATIENT: &str = "[timing]\nbeat_ms = 20\nlease_ms = 1500\nelection_ms = [2500, 3000]\n";
/// Name of the VIP group of [`web_document`].
pub const GROUP: &str = "web";
/// Records the service network into each lab's directory when set. Only useful with `KOMAINU_LAB_KEEP`.
const CAPTURE_VARIABLE: &str = "KOMAINU_LAB_PCAP";

/// Lane of every node when set and the test says nothing: `af_packet`, `tc` or `xdp`. Runs the whole suite on another lane.
const LANE_VARIABLE: &str = "KOMAINU_TEST_LANE";

std::thread_local! {
    static LANE: Cell<Option<LaneKind>> = const { Cell::new(None) };
}

/// Runs a test whose nodes all run `lane`.
pub fn with_lane(lane: LaneKind, test: impl FnOnce()) {
    LANE.set(Some(lane));
    test();
    LANE.set(None);
}

/// The word for the nodes' files: what [`with_lane`] or the environment says; otherwise none, which is `auto`.
pub fn lane_word() -> Option<String> {
    LANE.get().map(|lane| lane.as_str().to_owned()).or_else(|| std::env::var(LANE_VARIABLE).ok())
}

/// Makes of each test function one test for each lane: its [`Bed`]s run that lane.
#[macro_export]
macro_rules! system_on_every_lane {
    ($($name:ident),+ $(,)?) => {
        $crate::system_on_every_lane!(@lane af_packet, AfPacket, $($name),+);
        $crate::system_on_every_lane!(@lane tc, Tc, $($name),+);
        $crate::system_on_every_lane!(@lane xdp, Xdp, $($name),+);
    };
    (@lane $lane:ident, $kind:ident, $($name:ident),+) => {
        mod $lane {
            $(#[test]
            fn $name() {
                komainu_tests::with_lane(komainu_packet::lane::LaneKind::$kind, super::$name);
            })+
        }
    };
}

/// Tests that measure time run alone; the others side by side.
static MACHINE: RwLock<()> = RwLock::new(());

/// How much of the machine a test needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// Others may run.
    Shared,
    /// The test measures time.
    Alone,
}

#[derive(Debug)]
enum Share {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Alone { _guard: RwLockWriteGuard<'static, ()> },
}

/// A cluster with everything around it. Dropping it checks that there never were two owners.
#[derive(Debug)]
pub struct Bed {
    watch: Option<Watch>,
    _capture: Option<Capture>,
    /// The nodes, and the lab in `cluster.lab`.
    pub cluster: Cluster,
    /// Servers by host.
    pub servers: BTreeMap<String, Server>,
    _share: Share,
}

impl Bed {
    /// Lab, servers and node files; nothing is started yet.
    pub fn idle(machine: Machine, topology: impl Into<Topology>) -> Bed {
        let share = match machine {
            Machine::Shared => {
                Share::Shared { _guard: MACHINE.read().unwrap_or_else(PoisonError::into_inner) }
            }
            Machine::Alone => {
                Share::Alone { _guard: MACHINE.write().unwrap_or_else(PoisonError::into_inner) }
            }
        };
        komainu_lab::clean_up_on_signals();
        let lab = Lab::build(&topology.into()).unwrap();
        let servers = standard::servers(&lab).unwrap();
        let capture = std::env::var_os(CAPTURE_VARIABLE)
            .map(|_| Capture::start(&lab, SERVICE, &lab.dir().join("service.pcap")).unwrap());
        let mut vips = addr::service(addr::VIP).to_vec();
        vips.extend(addr::service(addr::SNAT));
        let watch = Watch::start(&lab, &vips, PROBE).unwrap();
        let cluster = Cluster::with_lane(lab, binary().unwrap(), lane_word().as_deref()).unwrap();
        Bed { watch: Some(watch), _capture: capture, cluster, servers, _share: share }
    }

    /// The same, started, with `document` in force, an owner, and every backend up.
    pub fn start(
        machine: Machine,
        topology: impl Into<Topology>,
        document: impl FnOnce(&Lab) -> Document,
    ) -> Bed {
        let mut bed = Bed::idle(machine, topology);
        bed.form(document);
        bed
    }

    /// Starts all nodes, and waits until `document` is in force, a node owns the group, and every backend is up. Answers who owns it.
    pub fn form(&mut self, document: impl FnOnce(&Lab) -> Document) -> String {
        self.cluster.start_all().unwrap();
        self.cluster.wait_formed(SOON).unwrap();
        let document = document(&self.cluster.lab);
        self.cluster.apply("lb1", &document).unwrap();
        let owner = self.owner();
        self.cluster.wait_all_up(SOON).unwrap();
        owner
    }

    /// The usual one: [`web_document`] on the standard topology.
    pub fn web(machine: Machine) -> Bed {
        Bed::start(machine, Standard::default(), web_document)
    }

    /// A host.
    pub fn host(&self, name: &str) -> &Host {
        self.cluster.lab.host(name)
    }

    /// The client on the service network.
    pub fn client(&self) -> &Host {
        self.host("client")
    }

    /// Waits until all running nodes name the same owner of the group.
    pub fn owner(&self) -> String {
        self.cluster.wait_owner(GROUP, SOON).unwrap()
    }

    /// Waits until the owner is another than `old`.
    pub fn owner_other_than(&self, old: &str) -> String {
        komainu_lab::cluster::wait_for(&format!("an owner other than {old}"), SOON, || {
            match self.cluster.wait_owner(GROUP, SOON) {
                Ok(owner) if owner != old => Ok(owner),
                Ok(owner) => Err(format!("{owner} owns it")),
                Err(e) => Err(e.to_string()),
            }
        })
        .unwrap()
    }

    /// The balancer that isn't `node`.
    pub fn other_than(&self, node: &str) -> String {
        if node == "lb1" { "lb2".to_owned() } else { "lb1".to_owned() }
    }

    /// Rounds of 60 requests to the IPv4 HTTP service until one satisfies `good`: what the cluster agreed on reaches the
    /// data path a moment after status shows it.
    pub fn settled(&self, what: &str, good: impl Fn(&Tally) -> bool) -> Tally {
        komainu_lab::cluster::wait_for(what, SOON, || {
            let tally = requests(self.client(), http(0), 60, PATIENCE);
            if good(&tally) { Ok(tally) } else { Err(format!("{tally:?}")) }
        })
        .unwrap()
    }

    /// A stream of one datagram a millisecond to the echo service, already answered.
    pub fn stream(&self) -> UdpStream {
        let stream = UdpStream::start(self.client(), udp(0), StreamSpec::default()).unwrap();
        assert!(stream.wait_answered(300, SOON), "no answers: {:?}", stream.report());
        stream
    }

    /// Claims to a VIP on the wire while it is asked for `rounds` times more.
    pub fn claims_in(&self, rounds: u64) -> usize {
        let watch = self.watch.as_ref().expect("it runs until the bed is dropped");
        let before = watch.log().claims.len();
        assert!(watch.wait_asked(rounds, SOON), "the prober does not get to ask");
        watch.log().claims.len() - before
    }

    /// Ends listening: from here on two owners are no failure of the test, which judges what was seen itself.
    pub fn stop_watching(&mut self) -> WireLog {
        self.watch.take().expect("it is stopped once").stop()
    }

    /// What the wire has shown so far.
    pub fn wire(&self) -> WireLog {
        self.watch.as_ref().expect("it runs until the bed is dropped").log()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let Some(watch) = self.watch.take() else { return };
        let wire = watch.stop();
        if !std::thread::panicking() {
            wire.assert_one_owner();
        }
    }
}

/// The first VIP of a family: 0 is IPv4, 1 is IPv6.
pub fn vip(family: usize) -> IpAddr {
    addr::service(addr::VIP)[family]
}

/// The HTTP service of [`web_document`].
pub fn http(family: usize) -> SocketAddr {
    (vip(family), HTTP).into()
}

/// The TCP echo service of [`web_document`].
pub fn tcp(family: usize) -> SocketAddr {
    (vip(family), ECHO).into()
}

/// The UDP echo service of [`web_document`].
pub fn udp(family: usize) -> SocketAddr {
    (vip(family), ECHO).into()
}

/// Services in mode `nat`, for both families: `web`, `web6` (HTTP), `talk`, `talk6` (TCP echo), `echo`, `echo6` (UDP).
pub fn web_document(lab: &Lab) -> Document {
    let mut document = Document::default().group(standard::group(lab));
    for (family, suffix) in ["", "6"].into_iter().enumerate() {
        for (name, port, protocol, backend_port) in
            [("web", HTTP, "tcp", BACKEND_HTTP), ("talk", ECHO, "tcp", ECHO), ("echo", ECHO, "udp", ECHO)]
        {
            document = document.service(standard::service(
                lab,
                &format!("{name}{suffix}"),
                vip(family),
                port,
                protocol,
                "nat",
                backend_port,
            ));
        }
    }
    document
}

/// [`web_document`] with one IPv4 service more or less changed by `change`, as TOML.
pub fn changed(lab: &Lab, change: impl FnOnce(&mut Service)) -> String {
    let mut service = standard::service(lab, "extra", vip(0), 8081, "tcp", "nat", BACKEND_HTTP);
    change(&mut service);
    web_document(lab).service(service).to_toml()
}
