//! The network of the benchmark: one client, two servers, and three machines to go through.
//!
//! Every path starts at `client`. Paths that a packet and its answer both take end at `bi1` on the inside network; those
//! whose answers go straight to the client end at `be1` on the service network. `bi1` sends its answers back the way the
//! question came because the client has an address of its own for each way.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use komainu_lab::topology::{HostSpec, INSIDE, LinkSpec, RouteSpec, SERVICE};
use komainu_lab::{Host, Lab, Topology};
use komainu_packet::lane::af_packet::AfPacketConfig;
use komainu_packet::lane::{LaneKind, SharedLane};
use komainu_packet::plan::{Mode, Protocol};

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
const BALANCER: [IpAddr; 2] = [v4(192, 0, 2, 4), v4(10, 20, 0, 4)];
const VIP: IpAddr = v4(192, 0, 2, 100);
const INSIDE_VIP: IpAddr = v4(10, 20, 0, 100);
const SNAT: IpAddr = v4(10, 20, 0, 150);

/// Ports: one for each mode, so that one plan holds all three.
const PORT_DSR: u16 = 5001;
const PORT_NAT: u16 = 5002;
const PORT_TRANSPARENT: u16 = 5003;

/// A way from the client to a server.
#[derive(Clone, Debug)]
pub struct Path {
    /// Name in the results.
    pub name: &'static str,
    /// Path that it is compared with.
    pub peer: Option<&'static str>,
    /// Host that serves.
    pub server: &'static str,
    /// Address that the client sends from.
    pub from: IpAddr,
    /// What the client sends to.
    pub to: SocketAddr,
    /// What the server listens on.
    pub listen: SocketAddr,
}

/// The kernel forwards both ways.
pub const KERNEL: &str = "kernel_forwarding";
/// The kernel forwards the client's packets; answers go straight back.
pub const KERNEL_ONE_WAY: &str = "kernel_forwarding_one_way";

/// The network with everything in it running.
pub struct Stage {
    /// Hosts.
    pub lab: Lab,
    /// Paths, in the order in which they take turns.
    pub paths: Vec<Path>,
    /// The lane under test.
    pub lane: SharedLane,
    _renewer: Renewer,
}

impl Stage {
    /// Builds it. `ring_slots`: see [`AfPacketConfig::ring_slots`].
    ///
    /// # Errors
    /// Missing privileges, no `nft`, or a refusal of the kernel.
    pub fn build(ring_slots: usize) -> Result<Stage> {
        let lab = Lab::build(&topology()).context("build the network namespaces")?;
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
        let config = AfPacketConfig { ring_slots, ..AfPacketConfig::new("eth0", Some("eth1".to_owned())) };
        let lane = lane::start(&lab, "lb", LaneKind::AfPacket, config)?;
        let mut plan = lane::plan(1, &[VIP], &[INSIDE_VIP], &[SNAT]);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            lane::add_service(&mut plan, VIP, PORT_DSR, protocol, Mode::Dsr, &[BE1]);
            lane::add_service(&mut plan, VIP, PORT_NAT, protocol, Mode::Nat, &[BI1]);
            lane::add_service(&mut plan, VIP, PORT_TRANSPARENT, protocol, Mode::NatTransparent, &[BI1]);
        }
        lane.install(plan)?;
        let renewer = Renewer::start(Arc::clone(&lane));
        lane.announce(lane::GROUP);
        Ok(Stage { lab, paths: paths(), lane, _renewer: renewer })
    }
}

fn paths() -> Vec<Path> {
    let path = |name, peer, server, from, to: (IpAddr, u16), listen: (IpAddr, u16)| Path {
        name,
        peer,
        server,
        from,
        to: to.into(),
        listen: listen.into(),
    };
    vec![
        path(KERNEL, None, "bi1", CLIENT_OF_ROUTER, (BI1, 5010), (BI1, 5010)),
        path(KERNEL_ONE_WAY, None, "be1", CLIENT, (BEHIND_BE1, 5011), (BEHIND_BE1, 5011)),
        path("nftables_dnat", Some(KERNEL), "bi1", CLIENT_OF_DNAT, (DNAT[0], 5012), (BI1, 5012)),
        path("af_packet_dsr", Some(KERNEL_ONE_WAY), "be1", CLIENT, (VIP, PORT_DSR), (VIP, PORT_DSR)),
        path("af_packet_nat", Some(KERNEL), "bi1", CLIENT, (VIP, PORT_NAT), (BI1, PORT_NAT)),
        path(
            "af_packet_nat_transparent",
            Some(KERNEL),
            "bi1",
            CLIENT,
            (VIP, PORT_TRANSPARENT),
            (BI1, PORT_TRANSPARENT),
        ),
    ]
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
    Topology {
        segments: vec![SERVICE.into(), INSIDE.into()],
        hosts: vec![
            host(
                "client",
                false,
                vec![link(SERVICE, 0, &[CLIENT, CLIENT_OF_ROUTER, CLIENT_OF_DNAT])],
                vec![to_host(BI1, ROUTER[0]), to_host(BEHIND_BE1, ROUTER[0])],
                vec![],
            ),
            host("be1", false, vec![link(SERVICE, 0, &[BE1])], vec![], vec![VIP, BEHIND_BE1]),
            host(
                "bi1",
                false,
                vec![link(INSIDE, 0, &[BI1])],
                vec![
                    RouteSpec::default_via(INSIDE_VIP),
                    to_host(CLIENT_OF_ROUTER, ROUTER[1]),
                    to_host(CLIENT_OF_DNAT, DNAT[1]),
                ],
                vec![],
            ),
            host("router", true, both(ROUTER), vec![to_host(BEHIND_BE1, BE1)], vec![]),
            host("dnat", true, both(DNAT), vec![], vec![]),
            host("lb", false, both(BALANCER), vec![], vec![]),
        ],
    }
}

/// Gives rules to `nft` inside a host.
fn nft(host: &Host, rules: &str) -> Result<()> {
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
