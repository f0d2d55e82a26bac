//! The lane: the engine above the program.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::cache::Cache;
use super::check;
use super::maps::Maps;
use super::pins;
use super::program::{Hook, Kernel, Sizes};
use super::sync::Sync;
use super::tap::Tap;
use crate::lane::af_packet::{AfPacketConfig, AfPacketLane, Finding, Parts, Severity};
use crate::lane::{Counters, FlowFilter, FlowInfo, FlowSharing, Lane, LaneError, LaneKind, LinkInfo, Trace};
use crate::lease::{Lease, LeaseBoard, SharedCells};
use crate::plan::Plan;

/// A program in the kernel with the engine above it. Stops when dropped.
pub struct KernelLane {
    hook: Hook,
    above: AfPacketLane,
    mode: Arc<Mutex<String>>,
    /// Holds what the leases stand in.
    maps: Arc<Maps>,
}

impl KernelLane {
    /// Is this machine fit for the lane? Worst first.
    pub fn check(hook: Hook, config: &AfPacketConfig) -> Vec<Finding> {
        check::check(hook, config)
    }

    /// Loads the program, attaches it, and starts the engine's threads. They stay in the network namespace of the caller.
    /// What an earlier process left attached is replaced in one step.
    ///
    /// # Errors
    /// The first thing found that stands against it, or what the system refused: the verifier's log included.
    pub fn start(hook: Hook, config: AfPacketConfig) -> Result<KernelLane, LaneError> {
        for finding in check::kernel_findings(hook, &config, check::Trial::Skip) {
            match finding.severity {
                Severity::Refuse => return Err(finding.into_error()),
                Severity::Warn => tracing::warn!("{}", finding.message),
                Severity::Note => tracing::info!("{}", finding.message),
            }
        }
        let mode = Arc::new(Mutex::new("detached".to_owned()));
        let told = Arc::clone(&mode);
        let links = !config.tc_by_filter;
        let names = [Some(config.service.clone()), config.inside.clone()];
        let flows = u32::try_from(config.max_flows).unwrap_or(u32::MAX);
        let mut loaded = None;
        let above = AfPacketLane::start_above(config, |net| {
            let system = |doing: &str| {
                let doing = doing.to_owned();
                move |source: std::io::Error| LaneError::System { doing, source }
            };
            pins::mount_bpffs().map_err(system("find a place for what outlives the process"))?;
            pins::remove_defunct();
            let mut kernel =
                Kernel::load(hook, Sizes { flows, ..Sizes::default() }).map_err(|e| LaneError::System {
                    doing: format!("load the {} program", hook.as_str()),
                    source: std::io::Error::other(e),
                })?;
            let mut taps = [None, None];
            if hook == Hook::Tc {
                for (tap, name) in taps.iter_mut().zip(&names) {
                    if name.is_some() {
                        let made = Tap::new().map_err(system("make the device by which frames come up"))?;
                        tracing::debug!(device = made.name, "frames come up by it");
                        *tap = Some(made);
                    }
                }
            }
            let maps = loaded.insert(Arc::clone(kernel.maps()));
            let leases = LeaseBoard::shared(Arc::clone(maps) as Arc<dyn SharedCells>);
            let cache = Cache::new(Arc::clone(kernel.maps()));
            let news = kernel.take_news().ok_or_else(|| LaneError::System {
                doing: "listen to the program".to_owned(),
                source: std::io::Error::other("somebody else does"),
            })?;
            let below = Sync::new(kernel, news, names, taps, links, told, net.clone());
            Ok(Parts { leases: Arc::new(leases), below: Some(Box::new(below)), cache: Some(Box::new(cache)) })
        })?;
        let maps = loaded.ok_or_else(|| LaneError::System {
            doing: "load the program".to_owned(),
            source: std::io::Error::other("nobody did"),
        })?;
        Ok(KernelLane { hook, above, mode, maps })
    }
}

impl Lane for KernelLane {
    fn kind(&self) -> LaneKind {
        match self.hook {
            Hook::Xdp => LaneKind::Xdp,
            Hook::Tc => LaneKind::Tc,
        }
    }

    fn mode(&self) -> String {
        self.mode.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn install(&self, plan: Plan) -> Result<(), LaneError> {
        self.above.install(plan)
    }

    fn installed_revision(&self) -> u64 {
        self.above.installed_revision()
    }

    fn set_lease(&self, group: u32, lease: Lease) {
        self.above.set_lease(group, lease);
    }

    fn announce(&self, group: u32) {
        self.above.announce(group);
    }

    fn counters(&self) -> Counters {
        self.above.counters()
    }

    fn flows(&self, filter: &FlowFilter, limit: usize) -> Vec<FlowInfo> {
        self.above.flows(filter, limit)
    }

    fn trace(&self, service: u32, client: SocketAddr) -> Option<Trace> {
        self.above.trace(service, client)
    }

    fn links(&self) -> Vec<LinkInfo> {
        self.above.links()
    }

    fn forwarding(&self) -> Result<(), String> {
        self.above.forwarding()
    }

    fn sharing(&self) -> Option<&dyn FlowSharing> {
        self.above.sharing()
    }

    fn leases(&self) -> Option<&OwnedFd> {
        Some(self.maps.leases_fd())
    }

    fn gateways(&self) -> Vec<IpAddr> {
        self.above.gateways()
    }

    fn stop(&self) {
        self.above.stop();
    }
}
