//! A host of the lab, and its interfaces.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;

use crate::bpf::{attach_xdp, load_pass_program, transmit_checksums_off};
use crate::error::Result;
use crate::net::with_netlink;
use crate::netns::Namespace;
use crate::process::Process;
use crate::topology::RouteSpec;

/// A host of the lab. Clones mean the same host.
#[derive(Clone, Debug)]
pub struct Host {
    pub(crate) ns: Namespace,
    pub(crate) links: Vec<Interface>,
}

/// An interface of a host.
#[derive(Clone, Debug)]
pub struct Interface {
    /// Segment it is plugged into.
    pub segment: String,
    /// Its name inside the host.
    pub name: String,
    /// Index inside the host.
    pub index: u32,
    /// Link-layer address.
    pub mac: [u8; 6],
    /// Addresses with prefix length.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Index of the switch port on the other end; 0 where there is no switch.
    pub(crate) port: u32,
}

impl Interface {
    /// Index of the switch port on the other end, in the switches' namespace.
    pub(crate) fn port_index(&self) -> u32 {
        self.port
    }
}

impl Host {
    /// Puts an XDP program that lets everything pass into the driver of the interface on `segment`, as somebody else's might be
    /// there. It stays until the descriptor is closed.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn attach_passing_xdp(&self, segment: &str) -> Result<OwnedFd> {
        let program = load_pass_program()?;
        self.run(|| attach_xdp(&program, self.on(segment).index))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.ns.name()
    }

    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.ns
    }

    /// Its interface on `segment`.
    ///
    /// # Panics
    /// When it has none there.
    pub fn on(&self, segment: &str) -> &Interface {
        self.links
            .iter()
            .find(|l| l.segment == segment)
            .unwrap_or_else(|| panic!("host \"{}\" is not on segment \"{segment}\"", self.name()))
    }

    /// Its interfaces.
    pub fn interfaces(&self) -> &[Interface] {
        &self.links
    }

    /// Its IPv4 address on `segment`.
    ///
    /// # Panics
    /// When it has none there.
    pub fn v4(&self, segment: &str) -> IpAddr {
        self.address(segment, IpAddr::is_ipv4)
    }

    /// Its IPv6 address on `segment`.
    ///
    /// # Panics
    /// When it has none there.
    pub fn v6(&self, segment: &str) -> IpAddr {
        self.address(segment, IpAddr::is_ipv6)
    }

    fn address(&self, segment: &str, family: impl Fn(&IpAddr) -> bool) -> IpAddr {
        let found = self.on(segment).addresses.iter().map(|(a, _)| *a).find(family);
        found.unwrap_or_else(|| panic!("host \"{}\" lacks such an address on \"{segment}\"", self.name()))
    }

    /// Runs `f` on a thread inside the host and waits for it.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.ns.run(f)
    }

    /// Starts a thread inside the host.
    pub fn spawn<R: Send + 'static>(
        &self,
        what: &str,
        f: impl FnOnce() -> R + Send + 'static,
    ) -> JoinHandle<R> {
        self.ns.spawn(what, f)
    }

    /// Starts a process inside the host, its output appended to `log`.
    ///
    /// # Errors
    /// The program or the log can't be opened.
    pub fn start(&self, name: &str, command: Command, log: &Path) -> Result<Process> {
        Process::spawn(&self.ns, name, command, log)
    }

    /// Sets an interface administratively up or down from inside, as `ip link set` would. Its IPv6 addresses and
    /// routes go with it, as they do on a real host, and are put back when it comes up.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_link(&self, segment: &str, up: bool) -> Result<()> {
        let link = self.on(segment);
        with_netlink(&self.ns, async |netlink| {
            netlink.set_up(link.index, up).await?;
            if up {
                for &(address, prefix) in link.addresses.iter().filter(|(a, _)| a.is_ipv6()) {
                    // Still there when the kernel keeps addresses of links that are down.
                    let _ = netlink.add_address(link.index, address, prefix).await;
                }
            }
            Ok(())
        })
    }

    /// Sets the MTU of an interface.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_mtu(&self, segment: &str, mtu: u32) -> Result<()> {
        let index = self.on(segment).index;
        with_netlink(&self.ns, async |netlink| netlink.set_mtu(index, mtu).await)
    }

    /// Adds an address, usable at once.
    ///
    /// # Errors
    /// The kernel refuses, e.g. because it is there.
    pub fn add_address(&self, segment: &str, address: IpAddr, prefix: u8) -> Result<()> {
        let index = self.on(segment).index;
        with_netlink(&self.ns, async |netlink| netlink.add_address(index, address, prefix).await)
    }

    /// Has it compute the checksums of what it sends itself, because an XDP program sees no others.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn checksums_by_the_host(&self) -> Result<()> {
        self.run(|| self.links.iter().try_for_each(|link| transmit_checksums_off(&link.name)))
    }

    /// Takes an address away.
    ///
    /// # Errors
    /// The kernel refuses, e.g. because it isn't there.
    pub fn remove_address(&self, segment: &str, address: IpAddr, prefix: u8) -> Result<()> {
        let index = self.on(segment).index;
        with_netlink(&self.ns, async |netlink| netlink.remove_address(index, address, prefix).await)
    }

    /// Adds a route.
    ///
    /// # Errors
    /// The kernel refuses, e.g. because the gateway is not on a connected network.
    pub fn add_route(&self, route: RouteSpec) -> Result<()> {
        with_netlink(&self.ns, async |netlink| netlink.add_route(route.to.0, route.to.1, route.via).await)
    }

    /// Takes a route away.
    ///
    /// # Errors
    /// The kernel refuses, e.g. because it isn't there.
    pub fn remove_route(&self, route: RouteSpec) -> Result<()> {
        with_netlink(&self.ns, async |netlink| netlink.remove_route(route.to.0, route.to.1, route.via).await)
    }

    /// Makes the host believe for good that `address` is at `mac`, whatever it hears.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_neighbour(&self, segment: &str, address: IpAddr, mac: [u8; 6]) -> Result<()> {
        let index = self.on(segment).index;
        with_netlink(&self.ns, async |netlink| netlink.set_neighbour(index, address, mac).await)
    }

    /// Writes a kernel setting under `/proc/sys/net`, e.g. `ipv4/ip_forward`.
    ///
    /// # Errors
    /// There is no such setting, or `/proc/sys` is read-only here.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        crate::net::write_sysctl(&self.ns, key, value)
    }
}

/// `02:6b:6d:00:01:02`.
pub fn mac_string(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}
