//! Is the machine fit for this lane? Used by `komainu check` and at every start.

use std::fs;

use super::offload::Offloads;
use super::ring::MAX_FRAME_LEN;
use super::{AfPacketConfig, LaneError};
use crate::netlink::{self, Link, Snapshot};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The lane does not start.
    Refuse,
    /// It starts, and something will not work as well as it could.
    Warn,
    /// Worth knowing.
    Note,
}

/// Something found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// Interface it is about.
    pub interface: Option<String>,
    /// What was found, and what to do about it.
    pub message: String,
}

impl Finding {
    pub(crate) fn new(severity: Severity, interface: Option<&str>, message: impl Into<String>) -> Finding {
        Finding { severity, interface: interface.map(str::to_owned), message: message.into() }
    }

    /// As the error that a refused start gives.
    pub fn into_error(self) -> LaneError {
        match self.interface {
            Some(name) => LaneError::Interface { name, reason: self.message },
            None => LaneError::System {
                doing: "start the lane".to_owned(),
                source: std::io::Error::other(self.message),
            },
        }
    }
}

/// IPv6's minimum (RFC 8200 §5).
const MIN_MTU: u32 = 1280;
/// Bits of capabilities(7).
const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;

/// Everything there is to say, worst first.
pub fn check(config: &AfPacketConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    capabilities(&mut findings);
    if config.inside.as_deref() == Some(config.service.as_str()) {
        findings.push(Finding::new(
            Severity::Refuse,
            Some(&config.service),
            "is both the service and the inside interface: leave [inside] out when there is one network",
        ));
    }
    match netlink::read_once() {
        Ok(snapshot) => {
            for name in config.interfaces() {
                match snapshot.link(name) {
                    Some(link) => interface(link, &snapshot, &mut findings),
                    None => findings.push(Finding::new(
                        Severity::Refuse,
                        Some(name),
                        format!("does not exist: name one of {}", existing()),
                    )),
                }
            }
        }
        Err(e) => findings.push(Finding::new(
            Severity::Refuse,
            None,
            format!("the kernel's interfaces and routes can't be read (rtnetlink): {e}"),
        )),
    }
    findings.sort_by_key(|f| f.severity);
    findings
}

/// The error for an interface that does not exist.
pub fn no_interface(name: &str) -> LaneError {
    LaneError::NoInterface { name: name.to_owned(), known: existing() }
}

/// Names of the Ethernet-like interfaces that exist.
fn existing() -> String {
    let mut names: Vec<String> =
        pnet::datalink::interfaces().into_iter().filter(|i| !i.is_loopback()).map(|i| i.name).collect();
    names.sort();
    names.dedup();
    if names.is_empty() { "(none exists)".to_owned() } else { names.join(", ") }
}

fn capabilities(findings: &mut Vec<Finding>) {
    let Some(bits) = effective_capabilities() else {
        findings.push(Finding::new(
            Severity::Warn,
            None,
            "the process's capabilities can't be read from /proc/self/status",
        ));
        return;
    };
    for (bit, name, what) in [
        (CAP_NET_RAW, "CAP_NET_RAW", "open packet sockets"),
        (CAP_NET_ADMIN, "CAP_NET_ADMIN", "ask the kernel to resolve neighbours and enlarge socket buffers"),
    ] {
        if bits & (1 << bit) == 0 {
            findings.push(Finding::new(
                Severity::Refuse,
                None,
                format!(
                    "{name} is missing, needed to {what}: run as root or give the service AmbientCapabilities={name}"
                ),
            ));
        }
    }
}

/// Whether the process has a capability, by its bit.
pub fn has_capability(bit: u32) -> bool {
    effective_capabilities().is_some_and(|bits| bits & (1 << bit) != 0)
}

fn effective_capabilities() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn interface(link: &Link, snapshot: &Snapshot, findings: &mut Vec<Finding>) {
    let name = link.name.as_str();
    let mut add = |severity, message: String| findings.push(Finding::new(severity, Some(name), message));
    if !link.ethernet || link.mac.is_none() {
        add(
            Severity::Refuse,
            "is not an Ethernet interface: the lane answers ARP and ND and rewrites MAC addresses".into(),
        );
    }
    if !link.admin_up {
        add(Severity::Refuse, format!("is down: \"ip link set {name} up\""));
    } else if !link.carrier {
        add(Severity::Warn, "has no carrier: the node can't own a VIP group until it has".into());
    }
    if link.mtu < MIN_MTU {
        add(
            Severity::Warn,
            format!("has an MTU of {}: IPv6 needs {MIN_MTU}, so IPv6 services won't work over it", link.mtu),
        );
    }
    if link.gro_max_len as usize > MAX_FRAME_LEN {
        add(
            Severity::Warn,
            format!(
                "merges received segments into frames of up to {} bytes (gro_max_size); those above 65536 don't fit the \
                 lane's ring and are dropped: \"ip link set {name} gro_max_size 65536 gro_ipv4_max_size 65536\"",
                link.gro_max_len
            ),
        );
    }
    if snapshot.addresses_of(link.index).iter().all(|(a, _)| a.is_ipv6()) {
        add(
            Severity::Warn,
            "has no IPv4 address: the kernel needs one on the same network to resolve IPv4 neighbours".into(),
        );
    }
    for (family, scope, key) in FORWARDING {
        let scope = if scope.is_empty() { name } else { scope };
        if sysctl(family, scope, key).as_deref() == Some("1") {
            let key = format!("net.{family}.conf.{scope}.{key}");
            add(
                Severity::Refuse,
                format!(
                    "{key} is 1: the kernel would forward a second copy of frames: \"sysctl -w {key}=0\""
                ),
            );
        }
    }
    add(Severity::Note, format!("MTU {}; {}", link.mtu, Offloads::read(name).describe()));
}

/// Settings under which the kernel forwards what comes in by an interface: family, scope (empty: the interface), key.
/// IPv4 goes by the interface alone (`IN_DEV_FORWARD`), IPv6 by `all` or by `force_forwarding` (`ip6_forward`).
const FORWARDING: [(&str, &str, &str); 3] =
    [("ipv4", "", "forwarding"), ("ipv6", "all", "forwarding"), ("ipv6", "", "force_forwarding")];

fn sysctl(family: &str, scope: &str, key: &str) -> Option<String> {
    // Not by the dotted name: an interface's name may hold dots.
    fs::read_to_string(format!("/proc/sys/net/{family}/conf/{scope}/{key}")).ok().map(|v| v.trim().to_owned())
}
