//! The network of the benchmark: one client, two servers, and the machines to go through: the kernel's own forwarding,
//! its address translation, HAProxy, and a balancer for each lane.
//!
//! Every path starts at `client`. Paths that a packet and its answer both take end at `bi1` on the inside network; those
//! whose answers go straight to the client end at `be1` on the service network. `bi1` sends its answers back the way the
//! question came because the client has an address of its own for each way.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use komainu_lab::topology::{HostSpec, INSIDE, LinkSpec, RouteSpec, SERVICE};
use komainu_lab::{Host, Lab, Process, Topology};
use komainu_packet::lane::af_packet::AfPacketConfig;
use komainu_packet::lane::{LaneKind, SharedLane};
use komainu_packet::plan::{Mode, Plan, Protocol};

use crate::lane::{self, Renewer};

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const CLIENT: IpAddr = v4(192, 0, 2, 10);
const CLIENT_OF_ROUTER: IpAddr = v4(192, 0, 2, 20);
const CLIENT_OF_DNAT: IpAddr = v4(192, 0, 2, 30);
const BE1: IpAddr = v4(192, 0, 2, 11);
const BI1: IpAddr = v4(10, 20, 0, 11);
/// On `be1`'s loopback, reached through the router.
const BEHIND_BE1: IpAddr = v4(203, 0, 113, 1);
const ROUTER: [IpAddr; 2] = [v4(192, 0, 2, 2), v4(10, 20, 0, 2)];
const DNAT: [IpAddr; 2] = [v4(192, 0, 2, 3), v4(10, 20, 0, 3)];
const HAPROXY: [IpAddr; 2] = [v4(192, 0, 2, 4), v4(10, 20, 0, 4)];

/// Ports: one for each mode, so that one plan holds all three.
const PORT_DSR: u16 = 5001;
const PORT_NAT: u16 = 5002;
const PORT_TRANSPARENT: u16 = 5003;
const PORT_HAPROXY: u16 = 5013;

/// A way from the client to a server.
#[derive(Clone, Debug)]
pub struct Path {
    /// Name in the results.
    pub name: String,
    /// Paths that it is compared with, one line of the results each.
    pub peers: Vec<&'static str>,
    /// Host that serves.
    pub server: &'static str,
    /// Address that the client sends from.
    pub from: IpAddr,
    /// What the client sends to.
    pub to: SocketAddr,
    /// What the server listens on.
    pub listen: SocketAddr,
    /// Whether it carries TCP connections only.
    pub tcp_only: bool,
}

/// No machine between the two ends.
pub const DIRECT: &str = "direct";
/// The kernel forwards both ways.
pub const KERNEL: &str = "kernel_forwarding";
/// The kernel forwards the client's packets; answers go straight back.
pub const KERNEL_ONE_WAY: &str = "kernel_forwarding_one_way";
/// The kernel translates addresses.
pub const NFT: &str = "nftables_dnat";
/// A proxy in user space ends the client's connection and makes another.
pub const HAPROXY_TCP: &str = "haproxy_tcp";

/// A balancer with a lane under test. Its number `n` tells its addresses.
#[derive(Clone, Copy, Debug)]
struct Rig {
    kind: LaneKind,
    host: &'static str,
    n: u8,
}

/// Lanes in the order of the report.
const RIGS: [Rig; 2] =
    [Rig { kind: LaneKind::AfPacket, host: "lbaf", n: 5 }, Rig { kind: LaneKind::Tc, host: "lbtc", n: 6 }];

impl Rig {
    fn own(&self) -> [IpAddr; 2] {
        [v4(192, 0, 2, self.n), v4(10, 20, 0, self.n)]
    }

    fn vip(&self) -> IpAddr {
        v4(192, 0, 2, 100 + self.n)
    }

    fn inside_vip(&self) -> IpAddr {
        v4(10, 20, 0, 100 + self.n)
    }

    fn snat(&self) -> IpAddr {
        v4(10, 20, 0, 150 + self.n)
    }

    /// The client's address for `nat-transparent`: the server sends what goes there back through this balancer.
    fn client(&self) -> IpAddr {
        v4(192, 0, 2, 40 + self.n)
    }
}

/// The network with everything in it running.
pub struct Stage {
    /// Hosts.
    pub lab: Lab,
    /// Paths, in the order in which they take turns.
    pub paths: Vec<Path>,
    /// The lanes under test.
    pub lanes: Vec<SharedLane>,
    _renewers: Vec<Renewer>,
    _haproxy: Process,
}

impl Stage {
    /// Builds it. `ring_slots`: see [`AfPacketConfig::ring_slots`].
    ///
    /// # Errors
    /// Missing privileges, no `nft` or `haproxy`, or a refusal of the kernel.
    pub fn build(ring_slots: usize) -> Result<Stage> {
        let lab = Lab::build(&topology()).context("build the network namespaces")?;
        for (_, host) in lab.hosts() {
            // Not whatever the machine has: BBR paces by timers, which in a virtual machine cost more than all else, and every path
            // would be as slow as they are. Every kernel has this one.
            host.sysctl("ipv4/tcp_congestion_control", "reno")?;
        }
        for name in ["router", "dnat"] {
            for key in ["all", "eth0"] {
                lab.host(name).sysctl(&format!("ipv4/conf/{key}/send_redirects"), "0")?;
            }
        }
        nft(
            lab.host("dnat"),
            &format!(
                "add table ip bench\n\
                 add chain ip bench pre {{ type nat hook prerouting priority dstnat; }}\n\
                 add rule ip bench pre ip daddr {} dnat to {BI1}\n",
                DNAT[0]
            ),
        )?;
        let haproxy =
            haproxy(&lab, "hapr", (HAPROXY[0], PORT_HAPROXY).into(), &[(BI1, PORT_HAPROXY).into()])?;
        let (mut lanes, mut renewers) = (Vec::new(), Vec::new());
        for rig in RIGS {
            let config =
                AfPacketConfig { ring_slots, ..AfPacketConfig::new("eth0", Some("eth1".to_owned())) };
            let lane = lane::start(&lab, rig.host, rig.kind, config)
                .with_context(|| format!("start the lane {}", rig.kind.as_str()))?;
            let (vip, inside_vip) = (rig.vip(), rig.inside_vip());
            let mut plan = lane::plan(1, &[vip], &[inside_vip], &[rig.snat()]);
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                lane::add_service(&mut plan, vip, PORT_DSR, protocol, Mode::Dsr, &[BE1]);
                lane::add_service(&mut plan, vip, PORT_NAT, protocol, Mode::Nat, &[BI1]);
                // A backend's port answers for one service of a balancer only; each balancer has its own service.
                lane::add_service(&mut plan, vip, PORT_TRANSPARENT, protocol, Mode::NatTransparent, &[BI1]);
            }
            lane.install(plan)?;
            renewers.push(Renewer::start(Arc::clone(&lane)));
            lane.announce(lane::GROUP);
            lanes.push(lane);
        }
        Ok(Stage { lab, paths: paths(), lanes, _renewers: renewers, _haproxy: haproxy })
    }
}

/// A plan of `services` services with `backends` backends each, of which the first has weight `weight`.
pub fn large_plan(revision: u64, services: u16, backends: u16, weight: u32) -> Plan {
    let vip = v4(192, 0, 2, 200);
    let mut plan = lane::plan(revision, &[vip], &[], &[]);
    // As many addresses on the service network as are asked for would not fit: full NAT takes any.
    plan.groups[0].snat = vec![v4(192, 0, 2, 201)];
    let addresses: Vec<IpAddr> = (0..backends).map(|n| v4(10, 30, (n >> 8) as u8, n as u8)).collect();
    for port in 1..=services {
        lane::add_service(&mut plan, vip, port, Protocol::Tcp, Mode::Nat, &addresses);
    }
    for service in &mut plan.services {
        service.backends[0].weight = weight;
        service.backends[0].base_weight = weight;
    }
    plan
}

fn paths() -> Vec<Path> {
    let path =
        |name: &str, peers: &[&'static str], server, from, to: (IpAddr, u16), listen: (IpAddr, u16)| Path {
            name: name.to_owned(),
            peers: peers.to_vec(),
            server,
            from,
            to: to.into(),
            listen: listen.into(),
            tcp_only: false,
        };
    let mut paths = vec![
        path(DIRECT, &[], "be1", CLIENT, (BE1, 5009), (BE1, 5009)),
        path(KERNEL, &[DIRECT], "bi1", CLIENT_OF_ROUTER, (BI1, 5010), (BI1, 5010)),
        path(KERNEL_ONE_WAY, &[DIRECT], "be1", CLIENT, (BEHIND_BE1, 5011), (BEHIND_BE1, 5011)),
        path(NFT, &[KERNEL], "bi1", CLIENT_OF_DNAT, (DNAT[0], 5012), (BI1, 5012)),
        Path {
            tcp_only: true,
            ..path(HAPROXY_TCP, &[NFT], "bi1", CLIENT, (HAPROXY[0], PORT_HAPROXY), (BI1, PORT_HAPROXY))
        },
    ];
    for rig in RIGS {
        let name = |mode: &str| format!("{}_{mode}", rig.kind.as_str());
        let vip = rig.vip();
        // The lane in user space is judged by plain forwarding, the kernel lanes by what people use instead of them.
        let peers = |kernel| match rig.kind {
            LaneKind::AfPacket => vec![kernel],
            _ => vec![DIRECT, NFT, HAPROXY_TCP],
        };
        paths.extend([
            path(&name("dsr"), &peers(KERNEL_ONE_WAY), "be1", CLIENT, (vip, PORT_DSR), (vip, PORT_DSR)),
            path(&name("nat"), &peers(KERNEL), "bi1", CLIENT, (vip, PORT_NAT), (BI1, PORT_NAT)),
            path(
                &name("nat_transparent"),
                &peers(KERNEL),
                "bi1",
                rig.client(),
                (vip, PORT_TRANSPARENT),
                (BI1, PORT_TRANSPARENT),
            ),
        ]);
    }
    paths
}

fn topology() -> Topology {
    let link = |segment: &str, number: u8, addresses: &[IpAddr]| LinkSpec {
        segment: segment.to_owned(),
        interface: format!("eth{number}"),
        addresses: addresses.iter().map(|a| (*a, 24)).collect(),
        mtu: None,
    };
    let host = |name: &str, forwards, links: Vec<LinkSpec>, routes: Vec<RouteSpec>, loopback: Vec<IpAddr>| {
        HostSpec { name: name.to_owned(), forwards, links, routes, loopback }
    };
    let to_host = |to: IpAddr, via| RouteSpec { to: (to, 32), via };
    let both =
        |[service, inside]: [IpAddr; 2]| vec![link(SERVICE, 0, &[service]), link(INSIDE, 1, &[inside])];
    let clients: Vec<_> =
        [CLIENT, CLIENT_OF_ROUTER, CLIENT_OF_DNAT].into_iter().chain(RIGS.iter().map(Rig::client)).collect();
    let loopback: Vec<_> = RIGS.iter().map(Rig::vip).chain([BEHIND_BE1]).collect();
    let mut way_back = vec![to_host(CLIENT_OF_ROUTER, ROUTER[1]), to_host(CLIENT_OF_DNAT, DNAT[1])];
    way_back.extend(RIGS.iter().map(|r| to_host(r.client(), r.inside_vip())));
    let mut hosts = vec![
        host(
            "client",
            false,
            vec![link(SERVICE, 0, &clients)],
            vec![to_host(BI1, ROUTER[0]), to_host(BEHIND_BE1, ROUTER[0])],
            vec![],
        ),
        host("be1", false, vec![link(SERVICE, 0, &[BE1])], vec![], loopback),
        host("bi1", false, vec![link(INSIDE, 0, &[BI1])], way_back, vec![]),
        host("router", true, both(ROUTER), vec![to_host(BEHIND_BE1, BE1)], vec![]),
        host("dnat", true, both(DNAT), vec![], vec![]),
        host("hapr", false, both(HAPROXY), vec![], vec![]),
    ];
    hosts.extend(RIGS.iter().map(|r| host(r.host, false, both(r.own()), vec![], vec![])));
    Topology { segments: vec![SERVICE.into(), INSIDE.into()], hosts, ..Topology::default() }
}

/// Starts HAProxy in TCP mode on a host, with settings that its manual recommends for forwarding: one thread a processor,
/// `splice-auto`.
pub(super) fn haproxy(lab: &Lab, host: &str, bind: SocketAddr, servers: &[SocketAddr]) -> Result<Process> {
    let config = lab.dir().join("haproxy.cfg");
    let mut text = format!(
        "global\n    maxconn 4000\n    nbthread 2\n\
         defaults\n    mode tcp\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n    option splice-auto\n\
         listen bench\n    bind {bind} backlog 4096\n",
    );
    for (n, server) in servers.iter().enumerate() {
        text += &format!("    server s{n} {server}\n");
    }
    std::fs::write(&config, text)?;
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(&config);
    let process = lab
        .host(host)
        .start("haproxy", command, &lab.dir().join("haproxy.log"))
        .context("run haproxy: install the package haproxy (\"deploy/setup.sh bench\")")?;
    // It listens when a connection is taken; there is no server behind it yet.
    let end = Instant::now() + Duration::from_secs(5);
    while lab.host(host).run(|| TcpStream::connect(bind)).is_err() {
        if Instant::now() > end {
            let log = std::fs::read_to_string(process.log()).unwrap_or_default();
            bail!("haproxy does not listen: {log}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(process)
}

/// Gives rules to `nft` inside a host.
pub(super) fn nft(host: &Host, rules: &str) -> Result<()> {
    host.run(|| {
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("run nft: install the package nftables (\"deploy/setup.sh bench\")")?;
        child.stdin.take().context("nft's input")?.write_all(rules.as_bytes())?;
        let status = child.wait()?;
        if !status.success() {
            bail!("nft refused the rules: {status}");
        }
        Ok(())
    })
}
