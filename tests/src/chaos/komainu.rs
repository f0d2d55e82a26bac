//! A cluster of the real binary.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use komainu_lab::Lab;
use komainu_lab::cluster::document::Service;
use komainu_lab::cluster::{Cluster, Document, SOON, Status};
use komainu_lab::standard::{self, BACKEND_HTTP, ECHO};
use komainu_lab::topology::{SERVICE, Standard, addr};
use komainu_lab::traffic::server::Server;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;

use super::contender::{Contender, Target};
use super::preload::{CLOCK_VARIABLE, Preload, WallClock};
use super::shape::Shape;
use crate::GROUP;

/// Port of the `nat` service; of the `nat-transparent` one: the next.
pub const NAT_PORT: u16 = 7007;
/// Document of a running service: the checks are not what is measured.
const HEALTH: &str = "type = \"http\"\npath = \"/healthz\"\nport = 8080\ninterval_ms = 500\ntimeout_ms = 400\nrise = 2\nfall = 3\n";
/// After so long without a packet a connection is forgotten, and a change of backends is settled. Short, so that a round need
/// not wait for long until the services are settled; longer than any pause of the connections that are measured.
const TCP_IDLE: &str = "tcp_idle_ms = 8000";
/// Services are settled within this time after a change. A standby does not know yet the flows that a service in transition
/// remembers, so connections are measured on settled ones.
const SETTLED: Duration = Duration::from_secs(12);
/// Backends of each service; one more stands beside them, for cases that add one.
const BACKENDS: u8 = 3;
/// Room of a data directory that will be filled.
const SMALL_DISK: &str = "size=48m";
/// Whatever is to be noticed of a fault, at either timing, is by then.
const SLOWNESS: Duration = Duration::from_millis(600);
/// Time that a standby is given to learn the owner's flows.
const CATCH_UP: Duration = Duration::from_millis(500);

/// What kind of cluster.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The binary.
    pub binary: PathBuf,
    /// Who decides in it.
    pub shape: Shape,
    /// Lane of the balancers.
    pub lane: String,
    /// Modes of services, of `nat`, `dsr`, `nat-transparent`.
    pub modes: Vec<String>,
    /// Whether backends are checked. Where they are not, a busy machine can't make one look dead.
    pub checks: bool,
    /// Further tables of every node file.
    pub node_extra: String,
    /// Whether data directories are small file systems of their own. The process must have mounts of its own.
    pub small_disks: bool,
    /// What stands before the system's library in every node.
    pub preload: Option<Preload>,
}

/// The cluster.
#[derive(Debug)]
pub struct Komainu {
    cluster: Cluster,
    shape: Shape,
    modes: Vec<String>,
    checks: bool,
    _servers: std::collections::BTreeMap<String, Server>,
}

impl Komainu {
    /// Builds the lab, starts the nodes, puts the document in force.
    ///
    /// # Errors
    /// Whatever keeps it from coming about.
    pub fn start(setup: &Setup) -> Result<Komainu> {
        let inside_backends =
            if setup.modes.iter().any(|m| m == "nat-transparent") { BACKENDS + 1 } else { 0 };
        let witness = setup.shape == Shape::Three;
        let lab = Lab::build(
            &Standard { service_backends: BACKENDS + 1, inside_backends, witness, ..Standard::default() }
                .topology(),
        )?;
        quicken(&lab)?;
        let servers = standard::servers(&lab)?;
        let arbiter = lab.host("client").v4(SERVICE);
        let mut cluster = Cluster::with_lane(lab, setup.binary.clone(), Some(&setup.lane))?;
        if let Some(preload) = &setup.preload {
            let library = preload.build(cluster.lab.dir())?;
            cluster.set_env("LD_PRELOAD", &library.display().to_string());
            if *preload == Preload::WallClock {
                let file = WallClock::create(cluster.lab.dir())?;
                cluster.set_env(CLOCK_VARIABLE, &file.display().to_string());
            }
        }
        for name in cluster.names() {
            cluster.configure(&name, &setup.node_extra)?;
            if let Some(policy) = setup.shape.policy() {
                cluster.configure_table(&name, "cluster", &format!("pair = \"{policy}\""))?;
                cluster.configure_table(&name, "service", &format!("gateway = \"{arbiter}\""))?;
            }
            if setup.small_disks {
                mount_small(cluster.data_dir_of(&name))?;
            }
        }
        cluster.start_all()?;
        cluster.wait_formed(SOON)?;
        let (shape, modes, checks) = (setup.shape, setup.modes.clone(), setup.checks);
        let mut komainu = Komainu { cluster, shape, modes, checks, _servers: servers };
        komainu.cluster.apply("lb1", &komainu.text(None))?;
        komainu.settle()?;
        Ok(komainu)
    }

    fn text(&self, port: Option<u16>) -> Document {
        let mut document = self.full(port);
        for service in document.services_mut() {
            service.backends.retain(|(name, _)| !is_spare(name));
        }
        document
    }

    /// The document with every backend that there is.
    fn full(&self, port: Option<u16>) -> Document {
        let health = if self.checks { HEALTH } else { "type = \"none\"\n" };
        document(&self.cluster.lab, &self.modes, health, port)
    }
}

/// Services `nat`, `dsr`, … over TCP and UDP; with one more, `extra`, on `port` when given.
fn document(lab: &Lab, modes: &[String], health: &str, port: Option<u16>) -> Document {
    let vip = addr::service(addr::VIP)[0];
    let mut document = Document::default().group(standard::group(lab));
    for mode in modes {
        let mode = static_mode(mode);
        for protocol in ["tcp", "udp"] {
            let name = format!("{mode}-{protocol}");
            let mut service = standard::service(lab, &name, vip, port_of(mode), protocol, mode, ECHO);
            health.clone_into(&mut service.health);
            TCP_IDLE.clone_into(&mut service.extra);
            document = document.service(service);
        }
    }
    if let Some(port) = port {
        let mut service = standard::service(lab, "extra", vip, port, "tcp", "nat", BACKEND_HTTP);
        health.clone_into(&mut service.health);
        document = document.service(service);
    }
    document
}

/// Whether a backend is the last of its kind: `be4`, `bi4`.
fn is_spare(name: &str) -> bool {
    name.ends_with(&(BACKENDS + 1).to_string())
}

fn static_mode(mode: &str) -> &'static str {
    match mode {
        "dsr" => "dsr",
        "nat-transparent" => "nat-transparent",
        _ => "nat",
    }
}

fn port_of(mode: &str) -> u16 {
    match mode {
        // A backend sees the service's own port.
        "dsr" => ECHO,
        "nat-transparent" => NAT_PORT + 1,
        _ => NAT_PORT,
    }
}

/// Lets TCP try again at least once a second (kernels since 6.15 can), so that after an outage nobody waits for an
/// exponential back-off to end. Whether a connection lives is not touched by it.
pub(super) fn quicken(lab: &Lab) -> Result<()> {
    for (_, host) in lab.hosts() {
        // Older kernels have no such setting.
        let _ = host.sysctl("ipv4/tcp_rto_max_ms", "1000");
    }
    Ok(())
}

fn mount_small(dir: &Path) -> Result<()> {
    mount(Some("komainu-chaos"), dir, Some("tmpfs"), MsFlags::empty(), Some(SMALL_DISK))
        .with_context(|| format!("mount a small file system at {}", dir.display()))
}

impl Contender for Komainu {
    fn lab(&self) -> &Lab {
        &self.cluster.lab
    }

    fn nodes(&self) -> Vec<String> {
        self.cluster.names()
    }

    fn addresses(&self) -> Vec<IpAddr> {
        let mut all = addr::service(addr::VIP).to_vec();
        all.extend(addr::service(addr::SNAT));
        all
    }

    fn targets(&self) -> Vec<Target> {
        let vip = addr::service(addr::VIP)[0];
        self.modes.iter().map(|m| Target { mode: m.clone(), at: (vip, port_of(m)).into() }).collect()
    }

    fn settle(&mut self) -> Result<String> {
        self.cluster.start_all()?;
        self.cluster.wait_formed(SOON)?;
        let owner = self.cluster.wait_owner(GROUP, SOON)?;
        self.cluster.wait_all_up(SOON)?;
        // A standby that lags behind is what connections may break by, not a reason to wait for ever.
        let _ = self.cluster.wait_status(&owner, "the standby to have caught up", CATCH_UP, |s| {
            s.group(GROUP).is_some_and(|g| g.standby_lag_flows == 0)
        });
        Ok(owner)
    }

    fn calm(&mut self, owner: &str) {
        // On a busy machine a check may fail at any time and open a transition: then the round goes on as it is.
        let _ = self.cluster.wait_status(owner, "services to be settled", SETTLED, Status::settled);
    }

    fn kill(&mut self, node: &str) -> Instant {
        self.cluster.kill_9(node)
    }

    fn kill_silently(&mut self, node: &str) -> Instant {
        self.cluster.kill_silently(node)
    }

    fn pause(&self, node: &str) {
        self.cluster.signal(node, Signal::SIGSTOP);
    }

    fn resume(&self, node: &str) {
        self.cluster.signal(node, Signal::SIGCONT);
    }

    fn end(&mut self, node: &str) -> Result<()> {
        let status = self.cluster.terminate(node, SOON)?;
        if !status.success() {
            bail!("{node} ended with {status}");
        }
        Ok(())
    }

    fn boot(&mut self, node: &str) -> Result<()> {
        Ok(self.cluster.start(node)?)
    }

    fn forget(&mut self, _: &str) -> Result<()> {
        // It leaves nothing in the kernel.
        Ok(())
    }

    fn slowness(&self) -> Duration {
        SLOWNESS
    }

    fn waits_for_mending(&self) -> bool {
        self.shape == Shape::PairSafety
    }

    fn renew(&mut self) -> Result<()> {
        self.cluster.apply("lb1", &self.text(None))?;
        // A document that says nothing of it leaves a backend drained.
        for service in self.cluster.status("lb1")?.services {
            for backend in service.backends.iter().filter(|b| b.admin != "enabled") {
                let name = format!("{}/{}", service.name, backend.name);
                self.cluster.cli_ok("lb1", &["backend", "enable", &name])?;
            }
        }
        Ok(())
    }

    fn lane(&self) -> Option<String> {
        self.cluster.status("lb1").ok().map(|s| s.node.lane)
    }

    fn cluster(&mut self) -> Option<&mut Cluster> {
        Some(&mut self.cluster)
    }

    fn document(&self, port: Option<u16>) -> Option<Document> {
        Some(self.text(port))
    }

    fn spares(&self) -> Vec<(String, SocketAddr)> {
        let of = |s: &Service| {
            let (name, at) = s.backends.iter().find(|(name, _)| is_spare(name))?;
            Some((format!("{}/{name}", s.name), *at))
        };
        self.full(None).services().iter().filter_map(of).collect()
    }

    fn last_words(&self) -> String {
        self.cluster.log_tails()
    }
}
