//! Is the machine fit for a program in the kernel, and which lane should `auto` be?

use std::path::Path;

use super::link::{Link, Point};
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

/// Largest MTU with which all of [`NATIVE_XDP`] run a program that takes each frame in one piece: i40e and ixgbe allow frames of
/// 3072 bytes, header, tags and checksum included; the others about 3500.
const MAX_XDP_MTU: u32 = 3000;

/// The lane to run, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The lane.
    pub kind: LaneKind,
    /// Why, in a sentence.
    pub reason: String,
    /// Whether the operator asked for this lane, rather than for the best one.
    pub forced: bool,
}

impl Choice {
    /// The lane that the operator asked for.
    pub fn forced(kind: LaneKind) -> Choice {
        Choice { kind, reason: "as the node file says".to_owned(), forced: true }
    }
}

/// What an interface offers.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Offer {
    name: String,
    /// Empty: unknown.
    driver: String,
    mtu: u32,
}

/// Chooses the lane for `auto` by what the machine can do and what the interfaces offer.
pub fn choose(config: &AfPacketConfig) -> Choice {
    let snapshot = netlink::read_once().unwrap_or_default();
    let offers: Vec<Offer> = config
        .interfaces()
        .map(|name| Offer {
            name: name.to_owned(),
            driver: driver_name(name).unwrap_or_default(),
            mtu: snapshot.link(name).map_or(0, |link| link.mtu),
        })
        .collect();
    choose_among(&offers, |hook| {
        let findings = kernel_findings(hook, config, Trial::Load);
        findings.into_iter().find(|f| f.severity == Severity::Refuse).map(|f| f.message)
    })
}

/// The choice among what the interfaces offer; `against` says what stands against a hook on this machine.
fn choose_among(offers: &[Offer], against: impl Fn(Hook) -> Option<String>) -> Choice {
    let (hook, mut reason) = best_hook(offers);
    let kind = match (hook, against(hook)) {
        (Hook::Xdp, None) => LaneKind::Xdp,
        (Hook::Tc, None) => LaneKind::Tc,
        (Hook::Xdp, Some(obstacle)) => match against(Hook::Tc) {
            None => {
                reason = format!("no program in the driver: {obstacle}");
                LaneKind::Tc
            }
            Some(obstacle) => {
                reason = format!("no program in the kernel: {obstacle}");
                LaneKind::AfPacket
            }
        },
        (Hook::Tc, Some(obstacle)) => {
            reason = format!("no program in the kernel: {obstacle}");
            LaneKind::AfPacket
        }
    };
    Choice { kind, reason, forced: false }
}

/// The hook that is fastest on all of the interfaces, and why.
fn best_hook(offers: &[Offer]) -> (Hook, String) {
    for Offer { name, driver, mtu } in offers {
        if DEARLY.contains(&driver.as_str()) {
            let reason = format!(
                "{name} ({driver}) would lose its offloads to XDP and bulk TCP would be slower: at the tc hook it keeps them"
            );
            return (Hook::Tc, reason);
        }
        if !NATIVE_XDP.contains(&driver.as_str()) {
            let driver = if driver.is_empty() { "driver unknown" } else { driver };
            return (Hook::Tc, format!("{name} ({driver}) is not known to run XDP programs in its driver"));
        }
        if *mtu > MAX_XDP_MTU {
            let reason =
                format!("{name} ({driver}) runs no XDP programs with frames as large as its MTU of {mtu}");
            return (Hook::Tc, reason);
        }
    }
    let drivers: Vec<String> = offers.iter().map(|o| format!("{} ({})", o.name, o.driver)).collect();
    (Hook::Xdp, format!("{}: the driver runs XDP programs", drivers.join(" and ")))
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
    if let Trial::Load = trial {
        findings.push(match Kernel::load(hook, TRIAL) {
            Ok(program) => Finding::new(Severity::Note, None, how(hook, &program)),
            Err(e) => Finding::new(Severity::Refuse, None, e.to_string()),
        });
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
            if !runs_natively(&driver) {
                let message = format!(
                    "the driver ({}) is not known to run XDP programs: then they run behind it (mode \"generic\"), slower than \
                     with lane = \"tc\"",
                    if driver.is_empty() { "unknown" } else { &driver }
                );
                findings.push(Finding::new(Severity::Warn, Some(name), message));
            } else if driver == "veth" {
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

/// How the program will be attached, as far as can be told beforehand.
fn how(hook: Hook, program: &Kernel) -> String {
    match hook {
        Hook::Xdp => "the kernel takes the program for xdp".to_owned(),
        Hook::Tc => {
            let links = program.program_fd().is_ok_and(|fd| Link::is_known(fd, Point::Tcx));
            match links {
                true => "the kernel takes the program for tc, and has links for it (tcx)".to_owned(),
                false => "the kernel takes the program for tc; it has no links for that hook (tcx, Linux 6.6), so a clsact \
                          filter is used"
                    .to_owned(),
            }
        }
    }
}

fn runs_natively(driver: &str) -> bool {
    NATIVE_XDP.contains(&driver) || DEARLY.contains(&driver)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(name: &str, driver: &str, mtu: u32) -> Offer {
        Offer { name: name.to_owned(), driver: driver.to_owned(), mtu }
    }

    fn nothing(_: Hook) -> Option<String> {
        None
    }

    #[test]
    fn a_network_card_whose_driver_runs_xdp_gets_it() {
        for driver in ["ixgbe", "mlx5_core", "ena"] {
            let choice = choose_among(&[offer("eth0", driver, 1500), offer("eth1", driver, 1500)], nothing);
            assert_eq!(choice.kind, LaneKind::Xdp, "{choice:?}");
            assert!(choice.reason.contains(driver) && choice.reason.contains("eth1"), "{choice:?}");
            assert!(!choice.forced);
        }
    }

    #[test]
    fn what_would_lose_its_offloads_or_does_not_run_xdp_gets_tc() {
        for (driver, word) in [
            ("veth", "offloads"),
            ("virtio_net", "offloads"),
            ("bonding", "not known"),
            ("", "driver unknown"),
        ] {
            // One of two is enough.
            let choice = choose_among(&[offer("eth0", "ice", 1500), offer("eth1", driver, 1500)], nothing);
            assert_eq!(choice.kind, LaneKind::Tc, "{choice:?}");
            assert!(choice.reason.contains("eth1") && choice.reason.contains(word), "{choice:?}");
        }
    }

    #[test]
    fn frames_too_large_for_xdp_get_tc() {
        assert_eq!(choose_among(&[offer("eth0", "ice", MAX_XDP_MTU)], nothing).kind, LaneKind::Xdp);
        let choice = choose_among(&[offer("eth0", "ice", 9000)], nothing);
        assert!(choice.kind == LaneKind::Tc && choice.reason.contains("9000"), "{choice:?}");
    }

    #[test]
    fn what_the_machine_can_not_do_is_said_and_the_next_best_taken() {
        let card = [offer("eth0", "ice", 1500)];
        let against = |hook: Hook| (hook == Hook::Xdp).then(|| "another XDP program".to_owned());
        let choice = choose_among(&card, against);
        assert!(choice.kind == LaneKind::Tc && choice.reason.contains("another XDP program"), "{choice:?}");
        for offers in [card, [offer("eth0", "veth", 1500)]] {
            let choice = choose_among(&offers, |_| Some("CAP_BPF missing".to_owned()));
            assert!(choice.kind == LaneKind::AfPacket && choice.reason.contains("CAP_BPF"), "{choice:?}");
        }
    }
}
