//! Is the machine fit for a program in the kernel, and which lane should `auto` be?

use std::path::Path;

use super::pins;
use super::program::{Hook, Kernel, Sizes};
use crate::lane::LaneKind;
use crate::lane::af_packet::sys::driver_name;
use crate::lane::af_packet::{AfPacketConfig, AfPacketLane, Finding, Severity, has_capability};
use crate::netlink::{self, XdpState};

/// Bits of capabilities(7).
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Drivers of NICs that run XDP programs natively and send from them (`XDP_TX`, `XDP_REDIRECT`), as of Linux 6.12. An
/// interface of another driver gets the `tc` lane, which any interface takes.
const NATIVE_XDP: [&str; 17] = [
    "bnxt_en",
    "ena",
    "fsl_dpaa2_eth",
    "fsl_enetc",
    "gve",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "mana",
    "mlx5_core",
    "mvneta",
    "mvpp2",
    "nfp",
    "sfc",
];
/// Drivers that know XDP but give up their offloads for it: bulk TCP gets slower by several times.
const DEARLY: [&str; 3] = ["veth", "virtio_net", "tun"];

/// Maps of a program that is loaded only to see whether it can be.
const TRIAL: Sizes =
    Sizes { backends: 16, services: 16, flows: 16, first_flows: 16, routes: 16, neighbours: 16 };

/// What `auto` stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The lane.
    pub kind: LaneKind,
    /// Why, in a sentence.
    pub reason: String,
}

/// Chooses the lane for `auto` by what the machine can do and what the interfaces offer.
pub fn choose(config: &AfPacketConfig) -> Choice {
    let interfaces = config.interfaces().map(|name| (name, driver_name(name).unwrap_or_default()));
    let other = interfaces.clone().find(|(_, driver)| !NATIVE_XDP.contains(&driver.as_str()));
    let (kind, hook, reason) = match other {
        None => {
            let drivers: Vec<String> =
                interfaces.map(|(name, driver)| format!("{name} ({driver})")).collect();
            let reason = format!("{}: the driver runs XDP programs", drivers.join(" and "));
            (LaneKind::Xdp, Hook::Xdp, reason)
        }
        Some((name, driver)) if DEARLY.contains(&driver.as_str()) => {
            let reason = format!(
                "{name} ({driver}) would lose its offloads to XDP and bulk TCP would be slower: at the tc hook it keeps them"
            );
            (LaneKind::Tc, Hook::Tc, reason)
        }
        Some((name, driver)) => {
            let driver = if driver.is_empty() { "driver unknown".to_owned() } else { driver };
            let reason = format!("{name} ({driver}) is not known to run XDP programs in its driver");
            (LaneKind::Tc, Hook::Tc, reason)
        }
    };
    let against =
        kernel_findings(hook, config, Trial::Load).into_iter().find(|f| f.severity == Severity::Refuse);
    match against {
        None => Choice { kind, reason },
        Some(finding) => Choice {
            kind: LaneKind::AfPacket,
            reason: format!("no program in the kernel: {}", finding.message),
        },
    }
}

/// Whether to see if the kernel takes the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trial {
    /// Loaded, and thrown away.
    Load,
    /// It is about to be loaded anyway.
    Skip,
}

/// Everything there is to say, worst first.
pub(super) fn check(hook: Hook, config: &AfPacketConfig) -> Vec<Finding> {
    let mut findings = AfPacketLane::check(config);
    findings.extend(kernel_findings(hook, config, Trial::Load));
    findings.sort_by_key(|f| f.severity);
    findings
}

/// What is to be said of the program alone.
pub(super) fn kernel_findings(hook: Hook, config: &AfPacketConfig, trial: Trial) -> Vec<Finding> {
    let mut findings = Vec::new();
    let missing: Vec<&str> = [(CAP_BPF, "CAP_BPF"), (CAP_PERFMON, "CAP_PERFMON")]
        .into_iter()
        .filter(|(bit, _)| !has_capability(*bit) && !has_capability(CAP_SYS_ADMIN))
        .map(|(_, name)| name)
        .collect();
    if !missing.is_empty() {
        let message = format!(
            "{} missing, needed to load a program into the kernel: run as root or give the service these capabilities, or \
             choose lane = \"af_packet\"",
            missing.join(" and ")
        );
        findings.push(Finding::new(Severity::Refuse, None, message));
        return findings;
    }
    if !pins::is_bpffs() && !has_capability(CAP_SYS_ADMIN) {
        let message =
            "no bpffs is mounted at /sys/fs/bpf: \"mount -t bpf bpf /sys/fs/bpf\" (systemd does so at boot)";
        findings.push(Finding::new(Severity::Refuse, None, message));
    }
    if hook == Hook::Tc && !Path::new("/dev/net/tun").exists() {
        let message = "there is no /dev/net/tun, by which frames come up from the tc hook: \"modprobe tun\"";
        findings.push(Finding::new(Severity::Refuse, None, message));
    }
    if let Trial::Load = trial
        && let Err(e) = Kernel::load(hook, TRIAL)
    {
        findings.push(Finding::new(Severity::Refuse, None, e.to_string()));
    }
    if hook == Hook::Xdp {
        let snapshot = netlink::read_once().ok();
        for name in config.interfaces() {
            let link = snapshot.as_ref().and_then(|s| s.link(name));
            // Our own, which is replaced in one step, is no obstacle.
            if link.is_some_and(|l| l.xdp != XdpState::None) && !pins::any(&[name]) {
                let message = format!(
                    "another XDP program is attached: end who attached it, or \"ip link set {name} xdp off\""
                );
                findings.push(Finding::new(Severity::Refuse, Some(name), message));
            }
            let driver = driver_name(name).unwrap_or_default();
            if driver == "veth" {
                let message = "a veth with an XDP program needs one on its peer too (one that passes everything will do), or \
                               what is sent back is lost, and needs senders that compute their checksums (\"ethtool -K … tx \
                               off\"); lane = \"tc\" needs neither";
                findings.push(Finding::new(Severity::Warn, Some(name), message));
            } else if DEARLY.contains(&driver.as_str()) {
                let message = format!(
                    "{driver} gives up its offloads for an XDP program, and bulk TCP gets slower: lane = \"tc\" keeps them"
                );
                findings.push(Finding::new(Severity::Warn, Some(name), message));
            }
        }
    }
    findings
}

/// Takes away what an earlier process of this node left in the kernel: links pinned for these interfaces, and filters. How many
/// links that were.
///
/// # Errors
/// The system refuses, in a sentence.
pub fn clean_up(interfaces: &[&str]) -> Result<usize, String> {
    let removed =
        pins::remove(interfaces).map_err(|e| format!("remove what is pinned in {}: {e}", pins::OURS))?;
    if let Ok(snapshot) = netlink::read_once() {
        for link in interfaces.iter().filter_map(|name| snapshot.link(name)) {
            // There is one only on kernels without links for that hook.
            let _ = netlink::traffic_control::detach(link.index);
        }
    }
    Ok(removed)
}

/// Whether an earlier process of this node left something attached to these interfaces.
pub fn is_left(interfaces: &[&str]) -> bool {
    pins::any(interfaces)
}
