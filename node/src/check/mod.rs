//! `komainu check`: is the node file right, and can this machine do what it asks? The daemon asks the same questions
//! before it starts anything, and refuses to start for the same reasons.
//!
//! | file | holds |
//! |---|---|
//! | [`report`] | findings and how they are shown |
//! | `machine` | clock, priorities, limits, forwarding |
//! | `places` | directories, addresses |

pub mod report;

mod machine;
mod places;

use std::path::Path;

use komainu_packet::lane::af_packet::{AfPacketConfig, Severity};
use komainu_packet::lane::kernel::{self, Choice};
use komainu_packet::lane::{self, LaneKind};

pub use report::{Finding, Level, Report};

use crate::config::node::{LaneChoice, Pair};
use crate::config::{ConfigError, NodeConfig};
use crate::pair;

/// Who asks: what a running daemon holds is no fault to an operator, and a good reason for another daemon not to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// `komainu check`.
    Operator,
    /// The daemon, before it starts.
    Daemon,
}

/// Checks the file and the machine.
pub fn check_file(path: &Path) -> Report {
    match NodeConfig::load(path) {
        Ok(config) => check(&config, Asker::Operator),
        Err(error) => Report { findings: of_mistakes(&error), choice: None },
    }
}

/// Checks the machine for a file that was found right.
pub fn check(config: &NodeConfig, asker: Asker) -> Report {
    let mut findings = vec![Finding::ok("node file", format!("{} is right", config.file.display()))];
    let running = places::daemon_is_running(config);
    let choice = lane_choice(config);
    if let (Some(lane), Some(choice)) = (lane_config(config), &choice) {
        findings.push(Finding::ok("lane", format!("{}: {}", choice.kind.as_str(), choice.reason)));
        lane_findings(choice.kind, &lane, &mut findings);
        machine::reverse_path_filter(&lane, &mut findings);
    }
    pair(config, &mut findings);
    machine::clock(&mut findings);
    machine::priority(&mut findings);
    machine::memory_lock(&mut findings);
    machine::descriptors(&mut findings);
    places::directories(config, &mut findings);
    places::listeners(config, running, asker, &mut findings);
    Report { findings, choice }
}

/// Settings of the lane that this node runs; `None` on a witness.
pub fn lane_config(config: &NodeConfig) -> Option<AfPacketConfig> {
    let service = config.service.as_ref()?;
    Some(AfPacketConfig::new(service.interface.clone(), config.inside_interface.clone()))
}

/// Whether a daemon answers on this node file's admin socket.
pub fn daemon_is_running(config: &NodeConfig) -> bool {
    places::daemon_is_running(config)
}

/// Interfaces of the data path; none on a witness.
pub fn interfaces(config: &NodeConfig) -> Vec<&str> {
    let service = config.service.iter().map(|s| s.interface.as_str());
    service.chain(config.inside_interface.as_deref()).collect()
}

/// The lane that this node runs and why; `None` on a witness.
fn lane_choice(config: &NodeConfig) -> Option<Choice> {
    let service = config.service.as_ref()?;
    Some(match service.lane {
        LaneChoice::Auto => kernel::choose(&lane_config(config)?),
        LaneChoice::Xdp => Choice::forced(LaneKind::Xdp),
        LaneChoice::Tc => Choice::forced(LaneKind::Tc),
        LaneChoice::AfPacket => Choice::forced(LaneKind::AfPacket),
    })
}

/// What two balancers without a third node promise, and what is missing for it.
fn pair(config: &NodeConfig, findings: &mut Vec<Finding>) {
    let Some(cluster) = config.cluster.as_ref().filter(|_| pair::is_pair(config)) else { return };
    let text = match (cluster.pair, pair::gateway(config, None)) {
        (Pair::Safety, _) => {
            "safety: when the peer is silent this node waits for `komainu node force`".to_owned()
        }
        (Pair::Availability, Some(gateway)) => format!(
            "availability: when the peer is silent on every path this node goes on alone, provided that the gateway {gateway} \
             answers and nobody else answers for a VIP"
        ),
        (Pair::Availability, None) => {
            let text = "availability, but there is no gateway by which to tell a dead peer from a cut cable here: when the \
                        peer is silent this node waits for `komainu node force`";
            findings.push(Finding::warn("pair", text, "name the router's address as [service] gateway"));
            return;
        }
    };
    findings.push(Finding::ok("pair", text));
}

fn of_mistakes(error: &ConfigError) -> Vec<Finding> {
    let finding = |m: &crate::config::Mistake| {
        let whole = m.to_string();
        // The action is shown by itself.
        let text = whole.strip_suffix(&format!("; {}", m.action)).unwrap_or(&whole).to_owned();
        Finding::fail("node file", text, m.action.clone())
    };
    error.mistakes.iter().map(finding).collect()
}

fn lane_findings(kind: LaneKind, lane: &AfPacketConfig, findings: &mut Vec<Finding>) {
    for found in lane::check(kind, lane) {
        let subject = match &found.interface {
            Some(name) => format!("interface {name}"),
            None => "data path".to_owned(),
        };
        // The lane's messages say what is wrong and what to do in one sentence.
        findings.push(match found.severity {
            Severity::Refuse => Finding::fail(subject, found.message, String::new()),
            Severity::Warn => Finding::warn(subject, found.message, String::new()),
            Severity::Note => Finding::ok(subject, found.message),
        });
    }
}

#[cfg(test)]
mod tests;
