//! The lane in user space: packet sockets, one thread, the reference for every other lane.
//!
//! | file | holds |
//! |---|---|
//! | `sys`, `ring` | system calls and shared memory: all that is `unsafe` |
//! | `socket` | one socket on one interface |
//! | `offload` | virtio-net header, ethtool |
//! | `filter` | which frames the kernel copies to us |
//! | `batch` | frames on their way out, and the last look at the lease |
//! | `park` | frames that wait for a neighbour |
//! | `hops` | the engine's view of routes and neighbours |
//! | `announce` | announcements under way, by port |
//! | `membership` | solicited-node groups |
//! | `below` | a program in the kernel that handles most frames before they reach this lane |
//! | `command`, `run` | the engine's thread and how others talk to it |
//! | `share` | flows that are shared with other nodes |
//! | `check` | is the machine fit? |
//!
//! **What can't be fenced.** The lease is compared with the clock for every frame right before the system call that sends it.
//! A machine that is paused *within* that call sends the rest of the batch, at most 64 frames, when it goes on.
//! Announcements and answers to ARP/ND are not among them unless they were in that very batch.

mod announce;
mod batch;
pub(crate) mod below;
mod check;
mod command;
mod filter;
pub(crate) mod hops;
mod membership;
mod offload;
mod park;
mod ring;
mod run;
mod share;
mod socket;
pub(crate) mod sys;

use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::eventfd::{EfdFlags, EventFd};

pub(crate) use check::has_capability;
pub use check::{Finding, Severity};
pub use offload::Offloads;
pub use share::{Awaited, News};

use super::{Counters, FlowFilter, FlowInfo, FlowSharing, Lane, LaneError, LaneKind, LinkInfo, Trace};
use crate::engine::{
    self, Adopted, DEFAULT_MAX_FLOWS, DEFAULT_NEW_FLOWS_PER_SECOND, Engine, EngineConfig, FlowCache,
    FlowNews, FlowRecord, Port,
};
use crate::lease::{Lease, LeaseBoard};
use crate::netlink::{self, Watch};
use crate::plan::Plan;
use crate::tables::Tables;
use crate::time::BootTime;

use below::Below;
use command::{Command, MAX_COMMANDS, Shared};
use filter::Interest;
use run::Worker;
use share::Share;
use socket::Place;

/// Ring slots of a lane that was told nothing else, for each interface: 34 MB. At 200 000 frames a second it bridges 2.5 ms
/// in which the thread does not run.
pub const DEFAULT_RING_SLOTS: usize = 4 * ring::SLOTS_PER_BLOCK;
/// How long a question may take: the thread answers between two batches.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// A thread that has started no round for this long is stuck. Several times [`run::LONGEST_SLEEP`], because a machine under
/// load may keep it waiting for a processor.
const STUCK_AFTER: Duration = Duration::from_secs(5);

/// Settings of the lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AfPacketConfig {
    /// Interface on the network that the VIPs are on.
    pub service: String,
    /// Interface on the second network, for NAT; absent when there is none.
    pub inside: Option<String>,
    /// Most flows remembered, 1..=[`engine::MAX_FLOWS`].
    pub max_flows: usize,
    /// Most flows remembered anew each second.
    pub new_flows_per_second: u32,
    /// Slots of each receive ring, 64 KiB each; rounded up to a multiple of 31.
    pub ring_slots: usize,
    /// Attach to the tc hook as kernels without links for it do, by a `clsact` filter. For tests of that way.
    pub tc_by_filter: bool,
}

impl AfPacketConfig {
    /// Default settings for a pair of interfaces.
    pub fn new(service: impl Into<String>, inside: Option<String>) -> AfPacketConfig {
        AfPacketConfig {
            service: service.into(),
            inside,
            max_flows: DEFAULT_MAX_FLOWS,
            new_flows_per_second: DEFAULT_NEW_FLOWS_PER_SECOND,
            ring_slots: DEFAULT_RING_SLOTS,
            tc_by_filter: false,
        }
    }

    /// Names of the interfaces.
    pub fn interfaces(&self) -> impl Iterator<Item = &str> + Clone {
        std::iter::once(self.service.as_str()).chain(self.inside.as_deref())
    }
}

/// The lane. Stops when dropped.
pub struct AfPacketLane {
    config: AfPacketConfig,
    shared: Arc<Shared>,
    commands: Sender<Command>,
    net: netlink::Handle,
    watch: Watch,
    /// Tables in force; held locked while others are being put in force, so that plans take turns.
    tables: Mutex<Arc<Tables>>,
    last_counters: Mutex<Counters>,
    news: News,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl AfPacketLane {
    /// Is this machine fit for the lane? What stands against it, what may, and what was found; worst first.
    pub fn check(config: &AfPacketConfig) -> Vec<Finding> {
        check::check(config)
    }

    /// Opens the sockets and starts the threads. They stay in the network namespace of the caller.
    ///
    /// # Errors
    /// The first thing found that stands against it, or what the system refused.
    pub fn start(config: AfPacketConfig) -> Result<AfPacketLane, LaneError> {
        Self::start_above(config, |_| Ok(Parts::default()))
    }

    /// The same above a program in the kernel, which `below` makes once the machine was found fit.
    pub(crate) fn start_above(
        config: AfPacketConfig,
        below: impl FnOnce(&netlink::Handle) -> Result<Parts, LaneError>,
    ) -> Result<AfPacketLane, LaneError> {
        for finding in check::check(&config) {
            match finding.severity {
                Severity::Refuse => return Err(finding.into_error()),
                Severity::Warn => tracing::warn!("{}", finding.message),
                Severity::Note => tracing::info!("{}", finding.message),
            }
        }
        for name in config.interfaces() {
            if Offloads::read(name).lro == Some(true) {
                offload::disable_lro(name).map_err(|source| LaneError::System {
                    doing: format!(
                        "interface \"{name}\": turn large receive offload off (\"ethtool -K {name} lro off\")"
                    ),
                    source,
                })?;
                tracing::warn!(
                    interface = name,
                    "large receive offload turned off: what it puts together can't be forwarded"
                );
            }
        }
        let system = |doing: &str| {
            let doing = doing.to_owned();
            move |source: std::io::Error| LaneError::System { doing, source }
        };
        let watch = Watch::start(config.interfaces().map(str::to_owned).collect())
            .map_err(system("read the kernel's routes and neighbours"))?;
        let net = watch.handle();
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| system("make an event descriptor")(e.into()))?;
        let Parts { leases, below, cache } = below(&net)?;
        let shared = Arc::new(Shared::new(wake, leases));
        let (commands, receiver) = bounded(MAX_COMMANDS);
        let mut worker = worker(&config, &shared, receiver, &net, below, cache)?;
        let (news, outbox) = News::new().map_err(system("make an event descriptor"))?;
        worker.engine.set_outbox(outbox);
        let thread = std::thread::Builder::new()
            .name("komainu-lane".to_owned())
            .spawn(move || worker.run())
            .map_err(system("start the lane's thread"))?;
        Ok(AfPacketLane {
            config,
            shared,
            commands,
            net,
            watch,
            tables: Mutex::default(),
            last_counters: Mutex::default(),
            news,
            thread: Mutex::new(Some(thread)),
        })
    }

    fn ask<T>(&self, question: impl FnOnce(Sender<T>) -> Command) -> Option<T> {
        let (answer, answered) = bounded(1);
        self.commands.send_timeout(question(answer), ANSWER_WITHIN).ok()?;
        let _ = self.shared.wake.write(1);
        answered.recv_timeout(ANSWER_WITHIN).ok()
    }
}

/// What a lane above a program in the kernel is made of besides.
#[derive(Default)]
pub(crate) struct Parts {
    /// Where leases are written.
    pub leases: Arc<LeaseBoard>,
    /// The program.
    pub below: Option<Box<dyn Below>>,
    /// The program's copy of steady flows.
    pub cache: Option<Box<dyn FlowCache>>,
}

/// Sockets and engine, ready to run.
fn worker(
    config: &AfPacketConfig,
    shared: &Arc<Shared>,
    commands: Receiver<Command>,
    net: &netlink::Handle,
    mut below: Option<Box<dyn Below>>,
    cache: Option<Box<dyn FlowCache>>,
) -> Result<Worker, LaneError> {
    let snapshot = net.snapshot();
    let interest = Interest::default();
    let mut sockets = batch::Sockets::default();
    let mut indices = [None; Port::COUNT];
    let mut open = |port: Port, name: &str| {
        let link = snapshot.link(name).ok_or_else(|| check::no_interface(name))?;
        let listen = below.as_ref().and_then(|b| b.comes_up_by(port)).unwrap_or(link.index);
        let place = Place { name, index: link.index, listen };
        sockets[port as usize] = Some(run::open_socket(&place, config.ring_slots, &interest)?);
        indices[port as usize] = Some(link.index);
        Ok::<_, LaneError>(run::port_config(link, &snapshot))
    };
    let service = open(Port::Service, &config.service)?;
    let inside = config.inside.as_deref().map(|name| open(Port::Inside, name)).transpose()?;
    let mut engine = Engine::new(
        EngineConfig {
            service,
            inside,
            max_flows: config.max_flows,
            new_flows_per_second: config.new_flows_per_second,
            // The standard library draws its hash keys from the system's random source.
            seed: std::collections::hash_map::RandomState::new().build_hasher().finish(),
        },
        Arc::clone(&shared.leases),
    );
    if let Some(cache) = cache {
        engine.set_cache(cache);
    }
    if let Some(below) = &mut below {
        let ports = [engine.port(Port::Service), engine.port(Port::Inside)];
        below.follow(ports).map_err(|reason| LaneError::System {
            doing: "attach the program".to_owned(),
            source: std::io::Error::other(reason),
        })?;
    }
    let hops = hops::Hops::new(snapshot, indices);
    if let Some(below) = &mut below {
        // The kernel may have nothing new to say for a long time: a process before this one has had its neighbours resolved.
        below.hops_changed(&engine, &hops, BootTime::now());
    }
    shared.round_at.store(BootTime::now().0, Ordering::Relaxed);
    Ok(Worker {
        shared: Arc::clone(shared),
        commands,
        net: net.clone(),
        engine,
        sockets,
        below,
        below_again_at: None,
        below_failed: false,
        names: [Some(config.service.clone()), config.inside.clone()],
        hops,
        ring_slots: config.ring_slots,
        interest,
        park: park::Park::default(),
        batch: batch::Batch::default(),
        memberships: membership::Memberships::default(),
        announcements: announce::Announcements::default(),
        stats: run::Stats::default(),
        complained_at: None,
        reopen_at: None,
    })
}

impl Lane for AfPacketLane {
    fn kind(&self) -> LaneKind {
        LaneKind::AfPacket
    }

    fn mode(&self) -> String {
        "ring+vnet_hdr".to_owned()
    }

    fn install(&self, plan: Plan) -> Result<(), LaneError> {
        let mut tables = lock(&self.tables);
        let revision = plan.revision;
        let interest = Interest::of(&plan);
        let routers = plan.groups.iter().flat_map(|g| g.inside_vips.iter().copied()).collect();
        let compiled = engine::compile(plan, Some(&tables))
            .map_err(|e| LaneError::Plan { revision, reason: e.to_string() })?;
        let compiled = Arc::new(compiled);
        let (answer, answered) = bounded(1);
        let command = Command::Install { tables: Arc::clone(&compiled), interest, routers, answer };
        let gone = || LaneError::System {
            doing: format!("put the plan at revision {revision} in force"),
            source: std::io::Error::other("the lane's thread has ended"),
        };
        // No time limit: the caller must know whether the plan is in force. A thread that ends closes the channel.
        self.commands.send(command).map_err(|_| gone())?;
        let _ = self.shared.wake.write(1);
        answered.recv().map_err(|_| gone())??;
        *tables = compiled;
        Ok(())
    }

    fn installed_revision(&self) -> u64 {
        self.shared.revision.load(Ordering::SeqCst)
    }

    fn set_lease(&self, group: u32, lease: Lease) {
        self.shared.leases.set(group, lease);
    }

    fn announce(&self, group: u32) {
        self.shared.request_announcement(group);
    }

    fn counters(&self) -> Counters {
        match self.ask(Command::Counters) {
            Some(counters) => {
                *lock(&self.last_counters) = counters.clone();
                counters
            }
            // Counters never go back, also not when the thread is gone.
            None => lock(&self.last_counters).clone(),
        }
    }

    fn flows(&self, filter: &FlowFilter, limit: usize) -> Vec<FlowInfo> {
        let filter = filter.clone();
        self.ask(|answer| Command::Flows(filter, limit, answer)).unwrap_or_default()
    }

    fn trace(&self, service: u32, client: SocketAddr) -> Option<Trace> {
        self.ask(|answer| Command::Trace(service, client, answer)).flatten()
    }

    fn links(&self) -> Vec<LinkInfo> {
        let snapshot = self.net.snapshot();
        self.config
            .interfaces()
            .map(|name| match snapshot.link(name) {
                Some(link) => LinkInfo {
                    name: name.to_owned(),
                    up: link.up(),
                    mac: link.mac,
                    addresses: snapshot.addresses_of(link.index),
                },
                None => LinkInfo { name: name.to_owned(), up: false, mac: None, addresses: Vec::new() },
            })
            .collect()
    }

    fn forwarding(&self) -> Result<(), String> {
        if !self.shared.alive.load(Ordering::SeqCst) {
            return Err("the lane's thread has ended".to_owned());
        }
        let since = BootTime::now().since(BootTime(self.shared.round_at.load(Ordering::Relaxed)));
        if since > STUCK_AFTER {
            return Err(format!("the lane's thread has not run for {} s", since.as_secs()));
        }
        if !self.net.alive() {
            return Err("the thread that follows the kernel's routes and neighbours has ended".to_owned());
        }
        match self.shared.trouble.load_full() {
            Some(trouble) => Err(trouble.as_str().to_owned()),
            None => Ok(()),
        }
    }

    fn sharing(&self) -> Option<&dyn FlowSharing> {
        Some(self)
    }

    fn gateways(&self) -> Vec<IpAddr> {
        self.net.snapshot().default_gateways(&self.config.service)
    }

    fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let _ = self.shared.wake.write(1);
        if let Some(thread) = lock(&self.thread).take() {
            // A panic of the thread has been told by then; there is nothing to add.
            let _ = thread.join();
        }
        self.watch.stop();
    }
}

impl FlowSharing for AfPacketLane {
    fn news(&self) -> &News {
        &self.news
    }

    fn shared(&self, groups: Arc<[u32]>, from: usize) -> Option<(Vec<FlowRecord>, Option<usize>)> {
        self.ask(|answer| Command::Share(Share::Shared(groups, from, answer)))
    }

    fn adopt(&self, news: Vec<FlowNews>, mark: u32) -> Option<Adopted> {
        self.ask(|answer| Command::Share(Share::Adopt(news, mark, answer)))
    }

    fn sweep(&self, groups: Arc<[u32]>, mark: u32, from: usize) -> Option<Option<usize>> {
        self.ask(|answer| Command::Share(Share::Sweep(groups, mark, from, answer)))
    }
}

impl Drop for AfPacketLane {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Locks, also after a panic of another holder: what is behind these locks is replaced as a whole, never half.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
