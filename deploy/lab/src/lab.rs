//! The lab itself: builds a topology, injects faults, leaves nothing behind.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::bpf::{DropRule, attach_xdp, load_drop_program, load_pass_program, transmit_checksums_off};
use crate::error::{LabError, Result};
use crate::host::{Host, Interface, mac_string};
use crate::net::{Netlink, with_netlink, write_sysctl_here};
use crate::netns::Namespace;
use crate::topology::{HostSpec, Topology};
use crate::workdir::WorkDir;

/// Longest name of a host and of a segment: a port on the switch is named after both and the kernel allows 15
/// characters, of which one is the dot and one marks the other end.
const MAX_HOST_NAME: usize = 6;
const MAX_SEGMENT_NAME: usize = 7;

/// Network namespaces with cables between them. Everything in it ends when it is dropped, and also when the process dies.
#[derive(Debug)]
pub struct Lab {
    switch: Namespace,
    segments: Vec<String>,
    hosts: BTreeMap<String, Host>,
    // Ports that drop, by (host, segment): from which host and how much.
    faults: Mutex<BTreeMap<(String, String), Vec<Fault>>>,
    // Programs on switch ports.
    passing: Mutex<BTreeMap<u32, OwnedFd>>,
    dir: WorkDir,
}

#[derive(Clone, Debug)]
struct Fault {
    from: String,
    threshold: u32,
}

impl Lab {
    /// Builds `topology`.
    ///
    /// # Errors
    /// Missing privileges (the message names them), a topology that contradicts itself, or a refusal of the kernel.
    pub fn build(topology: &Topology) -> Result<Lab> {
        check_names(topology)?;
        let dir = WorkDir::create()?;
        let switch = Namespace::create("switch")?;
        switch.run(no_firewall)?;
        let mut namespaces = BTreeMap::new();
        for host in &topology.hosts {
            let ns = Namespace::create(&host.name)?;
            prepare(&ns, host)?;
            namespaces.insert(host.name.clone(), ns);
        }
        let ports = with_netlink(&switch, async |netlink| lay_cables(netlink, topology, &namespaces).await)?;
        let mut hosts = BTreeMap::new();
        for (number, spec) in topology.hosts.iter().enumerate() {
            let ns = namespaces[&spec.name].clone();
            let ports = &ports;
            let links = with_netlink(&ns, async |netlink| {
                configure_host(netlink, spec, number, topology, ports).await
            })?;
            hosts.insert(spec.name.clone(), Host { ns, links });
        }
        Ok(Lab {
            switch,
            segments: topology.segments.clone(),
            hosts,
            faults: Mutex::default(),
            passing: Mutex::default(),
            dir,
        })
    }

    /// A directory for files of this lab, removed with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Keeps the directory when the lab ends, for a look at what failed.
    pub fn keep_dir(&self) {
        self.dir.keep();
    }

    /// The host called `name`.
    ///
    /// # Panics
    /// When there is none: that is a mistake in the story, not in the network.
    pub fn host(&self, name: &str) -> &Host {
        self.hosts.get(name).unwrap_or_else(|| {
            panic!("the lab has no host \"{name}\": it has {:?}", self.hosts.keys().collect::<Vec<_>>())
        })
    }

    /// All hosts, by name.
    pub fn hosts(&self) -> impl Iterator<Item = (&str, &Host)> {
        self.hosts.iter().map(|(name, host)| (name.as_str(), host))
    }

    /// Who a MAC address belongs to: `host`, or the address itself when it is nobody's.
    pub fn who(&self, mac: [u8; 6]) -> String {
        self.hosts
            .iter()
            .find(|(_, h)| h.links.iter().any(|l| l.mac == mac))
            .map_or_else(|| mac_string(mac), |(name, _)| name.clone())
    }

    /// Makes the network one in which `hosts` can run XDP programs: their switch ports get a program that lets everything pass,
    /// without which a veth loses what its peer's program sends back, and every host computes its checksums itself, because an
    /// XDP program sees no others.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn ready_for_xdp(&self, hosts: &[&str]) -> Result<()> {
        for host in self.hosts.values() {
            host.checksums_by_the_host()?;
        }
        let program = load_pass_program()?;
        let mut passing = self.passing.lock().unwrap_or_else(PoisonError::into_inner);
        for host in hosts {
            for link in &self.host(host).links {
                passing.insert(link.port, self.switch.run(|| attach_xdp(&program, link.port))?);
            }
        }
        Ok(())
    }

    /// Pulls the cable of `host` out of `segment`: both ends lose the carrier.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unplug(&self, host: &str, segment: &str) -> Result<()> {
        self.set_port(host, segment, false)
    }

    /// Puts it back.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn plug(&self, host: &str, segment: &str) -> Result<()> {
        self.set_port(host, segment, true)
    }

    fn set_port(&self, host: &str, segment: &str, up: bool) -> Result<()> {
        let port = self.host(host).on(segment).port;
        with_netlink(&self.switch, async |netlink| netlink.set_up(port, up).await)
    }

    /// Takes the interface of `host` on `segment` out of the machine, as a card that is pulled or a driver that is unloaded.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_interface(&self, host: &str, segment: &str) -> Result<()> {
        let host = self.host(host);
        let index = host.on(segment).index;
        with_netlink(&host.ns, async |netlink| netlink.remove_link(index).await)
    }

    /// Puts it back: name, MAC address and addresses are what they were, its index in the host is another. Routes beyond
    /// the connected ones are not put back. [`Host`]s that were cloned before don't know the new one.
    ///
    /// # Errors
    /// The kernel refuses, e.g. because it is there.
    pub fn insert_interface(&mut self, host: &str, segment: &str) -> Result<()> {
        let ns = self.host(host).ns.clone();
        let old = self.host(host).on(segment).clone();
        let port = format!("{host}.{segment}");
        with_netlink(&self.switch, async |netlink| {
            let bridge = netlink.index(segment).await?;
            // The same port of the switch, so that whoever listens there goes on knowing it.
            netlink.add_cable(&port, Some(old.port), bridge, &old.name, &ns).await
        })?;
        let index = with_netlink(&ns, async |netlink| {
            let index = netlink.index(&old.name).await?;
            netlink.configure(index, old.mac, None).await?;
            netlink.set_up(index, true).await?;
            for &(address, prefix) in &old.addresses {
                netlink.add_address(index, address, prefix).await?;
            }
            Ok(index)
        })?;
        let passing = self.passing.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !passing.is_empty() {
            ns.run(|| transmit_checksums_off(&old.name))?;
        }
        if let Some(passing) = passing.get_mut(&old.port) {
            *passing = self.switch.run(|| attach_xdp(&load_pass_program()?, old.port))?;
        }
        let links = self.hosts.get_mut(host).map(|h| &mut h.links);
        if let Some(link) = links.into_iter().flatten().find(|l| l.segment == segment) {
            link.index = index;
        }
        Ok(())
    }

    /// Drops whatever `from` sends to `to` on `segment`, and nothing else: one way only.
    ///
    /// # Errors
    /// The kernel refuses the filter.
    pub fn cut_one_way(&self, from: &str, to: &str, segment: &str) -> Result<()> {
        self.set_loss(from, to, segment, 1.0)
    }

    /// Drops whatever `a` and `b` send to each other on `segment`. Frames between either of them and others pass.
    ///
    /// # Errors
    /// The kernel refuses the filter.
    pub fn cut(&self, a: &str, b: &str, segment: &str) -> Result<()> {
        self.cut_one_way(a, b, segment)?;
        self.cut_one_way(b, a, segment)
    }

    /// Ends what [`Lab::cut`], [`Lab::cut_one_way`] or [`Lab::set_loss`] did between the two, both ways.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn heal(&self, a: &str, b: &str, segment: &str) -> Result<()> {
        self.set_loss(a, b, segment, 0.0)?;
        self.set_loss(b, a, segment, 0.0)
    }

    /// Drops a share (0.0..=1.0) of what `from` sends to `to` on `segment`, at random.
    ///
    /// # Errors
    /// The kernel refuses the filter.
    pub fn set_loss(&self, from: &str, to: &str, segment: &str, share: f64) -> Result<()> {
        // Both must be there, or the cut would silently cut nothing.
        self.host(from).on(segment);
        let port = self.host(to).on(segment).port;
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let list = faults.entry((to.to_owned(), segment.to_owned())).or_default();
        list.retain(|f| f.from != from);
        if share > 0.0 {
            let threshold = (share.min(1.0) * f64::from(u32::MAX)) as u32;
            list.push(Fault { from: from.to_owned(), threshold });
        }
        let rules: Vec<DropRule> = list
            .iter()
            .map(|f| DropRule { mac: self.host(&f.from).on(segment).mac, threshold: f.threshold })
            .collect();
        let program = if rules.is_empty() { None } else { Some(load_drop_program(&rules)?) };
        with_netlink(&self.switch, async |mut netlink| netlink.set_egress_filter(port, program).await)
    }

    /// The topology as it stands, for a reader: one line a host.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for (name, host) in &self.hosts {
            let links: Vec<String> = host
                .links
                .iter()
                .map(|l| {
                    let addresses: Vec<String> =
                        l.addresses.iter().map(|(a, p)| format!("{a}/{p}")).collect();
                    format!("{} on {} ({}, {})", l.name, l.segment, addresses.join(", "), mac_string(l.mac))
                })
                .collect();
            let _ = writeln!(text, "{name:<7} {}", links.join("; "));
        }
        text
    }

    /// The namespace that all switches stand in.
    pub(crate) fn switch(&self) -> &Namespace {
        &self.switch
    }

    /// Names of the segments.
    pub fn segments(&self) -> &[String] {
        &self.segments
    }
}

impl Drop for Lab {
    /// A node that was killed leaves its program's link pinned, for the next one in its namespace; there will be none.
    fn drop(&mut self) {
        use std::os::unix::fs::MetadataExt;
        for host in self.hosts.values() {
            if let Ok(namespace) = host.run(|| std::fs::metadata("/proc/thread-self/ns/net")) {
                let _ = std::fs::remove_dir_all(format!("/sys/fs/bpf/komainu/net-{}", namespace.ino()));
            }
        }
    }
}

fn check_names(topology: &Topology) -> Result<()> {
    let long = |what: &str, name: &str, most: usize| {
        Err(LabError::Topology(format!("{what} name \"{name}\" is empty or longer than {most} characters")))
    };
    for segment in &topology.segments {
        if segment.is_empty() || segment.len() > MAX_SEGMENT_NAME {
            return long("segment", segment, MAX_SEGMENT_NAME);
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    for host in &topology.hosts {
        if host.name.is_empty() || host.name.len() > MAX_HOST_NAME {
            return long("host", &host.name, MAX_HOST_NAME);
        }
        if !seen.insert(&host.name) {
            return Err(LabError::Topology(format!("two hosts are called \"{}\"", host.name)));
        }
        for link in &host.links {
            if !topology.segments.contains(&link.segment) && !topology.cables.contains(&link.segment) {
                return Err(LabError::Unknown {
                    what: "segment",
                    name: link.segment.clone(),
                    known: topology.segments.join(", "),
                });
            }
        }
    }
    for cable in &topology.cables {
        if cable.is_empty() || cable.len() > MAX_SEGMENT_NAME {
            return long("cable", cable, MAX_SEGMENT_NAME);
        }
        let ends = topology.hosts.iter().flat_map(|h| &h.links).filter(|l| l.segment == *cable).count();
        if ends != 2 || topology.segments.contains(cable) {
            return Err(LabError::Topology(format!(
                "cable \"{cable}\" has {ends} ends, or a segment's name: a cable joins two hosts"
            )));
        }
    }
    Ok(())
}

/// A switch looks into no packet. Where `br_netfilter` is loaded, as container engines have it, every bridged frame would go through the
/// firewall's hooks (kernel `Documentation/networking/bridge.rst`).
fn no_firewall() -> Result<()> {
    for family in ["ip", "ip6", "arp"] {
        let key = format!("bridge/bridge-nf-call-{family}tables");
        if Path::new("/proc/sys/net").join(&key).exists() {
            write_sysctl_here(&key, "0")?;
        }
    }
    Ok(())
}

/// Settings that must be in force before an interface appears.
fn prepare(ns: &Namespace, host: &HostSpec) -> Result<()> {
    let forward = if host.forwards { "1" } else { "0" };
    ns.run(|| {
        for which in ["all", "default"] {
            write_sysctl_here(&format!("ipv6/conf/{which}/accept_dad"), "0")?;
            write_sysctl_here(&format!("ipv6/conf/{which}/accept_ra"), "0")?;
            // A link that goes down and up again finds its addresses as they were.
            write_sysctl_here(&format!("ipv6/conf/{which}/keep_addr_on_down"), "1")?;
            write_sysctl_here(&format!("ipv6/conf/{which}/forwarding"), forward)?;
            write_sysctl_here(&format!("ipv4/conf/{which}/rp_filter"), "0")?;
            if !host.loopback.is_empty() {
                // The VIP on lo is nobody's business: answer only for addresses of the interface asked on, and
                // never name the VIP in a request (arp(7); kernel ip-sysctl).
                write_sysctl_here(&format!("ipv4/conf/{which}/arp_ignore"), "1")?;
                write_sysctl_here(&format!("ipv4/conf/{which}/arp_announce"), "2")?;
            }
        }
        // Set whatever it was: the first namespace's value is inherited.
        write_sysctl_here("ipv4/ip_forward", forward)?;
        // Failure tests provoke more ICMP errors than the default limit lets out.
        write_sysctl_here("ipv4/icmp_ratelimit", "0")?;
        write_sysctl_here("ipv6/icmp/ratelimit", "0")
    })
}

async fn lay_cables(
    netlink: Netlink,
    topology: &Topology,
    namespaces: &BTreeMap<String, Namespace>,
) -> Result<BTreeMap<(String, String), u32>> {
    let mut bridges = BTreeMap::new();
    for segment in &topology.segments {
        bridges.insert(segment.as_str(), netlink.add_bridge(segment).await?);
    }
    for cable in &topology.cables {
        let links = topology.hosts.iter().flat_map(|h| h.links.iter().map(move |l| (h, l)));
        let ends: Vec<_> = links
            .filter(|(_, l)| l.segment == *cable)
            .map(|(h, l)| (l.interface.as_str(), &namespaces[&h.name]))
            .collect();
        let &[a, b] = ends.as_slice() else { continue };
        netlink.add_direct_cable(cable, [a, b]).await?;
    }
    let mut ports = BTreeMap::new();
    for host in &topology.hosts {
        for link in host.links.iter().filter(|l| topology.segments.contains(&l.segment)) {
            let port = format!("{}.{}", host.name, link.segment);
            netlink
                .add_cable(
                    &port,
                    None,
                    bridges[link.segment.as_str()],
                    &link.interface,
                    &namespaces[&host.name],
                )
                .await?;
            ports.insert((host.name.clone(), link.segment.clone()), netlink.index(&port).await?);
        }
    }
    Ok(ports)
}

async fn configure_host(
    netlink: Netlink,
    host: &HostSpec,
    number: usize,
    topology: &Topology,
    ports: &BTreeMap<(String, String), u32>,
) -> Result<Vec<Interface>> {
    let lo = netlink.index("lo").await?;
    netlink.set_up(lo, true).await?;
    for &address in &host.loopback {
        netlink.add_address(lo, address, if address.is_ipv4() { 32 } else { 128 }).await?;
    }
    let mut links = Vec::new();
    for link in &host.links {
        let index = netlink.index(&link.interface).await?;
        let mut segments = topology.segments.iter().chain(&topology.cables);
        let segment = segments.position(|s| *s == link.segment).unwrap_or_default();
        // Readable in a capture: locally administered, segment, host.
        let mac = [0x02, 0x6b, 0x6d, 0x00, segment as u8, number as u8 + 1];
        netlink.configure(index, mac, link.mtu).await?;
        netlink.set_up(index, true).await?;
        for &(address, prefix) in &link.addresses {
            netlink.add_address(index, address, prefix).await?;
        }
        links.push(Interface {
            segment: link.segment.clone(),
            name: link.interface.clone(),
            index,
            mac,
            addresses: link.addresses.clone(),
            port: ports.get(&(host.name.clone(), link.segment.clone())).copied().unwrap_or_default(),
        });
    }
    for route in &host.routes {
        netlink.add_route(route.to.0, route.to.1, route.via).await?;
    }
    Ok(links)
}
