//! The peer: keepalived (VRRPv3) with nftables DNAT and conntrackd on both machines, in the same lab.
//!
//! Set up as its own documentation advises, and to its advantage where there is a choice: real-time priority, no
//! preemption, conntrackd with a dedicated link that writes flows into the standby's kernel at once, the same hash of the
//! connection on both nodes for flows that conntrackd may have missed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use komainu_lab::cluster::{Cluster, Document, SOON, wait_for};
use komainu_lab::standard::{self, ECHO};
use komainu_lab::topology::{CLUSTER, SERVICE, Standard, addr};
use komainu_lab::traffic::server::Server;
use komainu_lab::watch::Watch;
use komainu_lab::{Lab, Process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::contender::{Contender, Target};
use super::komainu::{NAT_PORT, quicken};
use crate::PROBE;

/// Its two nodes with their priorities.
const NODES: [(&str, u8); 2] = [("lb1", 150), ("lb2", 100)];
/// Backends behind the one service.
const BACKENDS: u8 = 3;
/// Time for flows to reach the standby.
const RESYNC: Duration = Duration::from_millis(300);
/// Lines of a log that are shown.
const LOG_TAIL: usize = 20;

/// How often the master says that it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advert(pub u64);

impl Advert {
    /// Those that are compared: the default, and two that people choose who want it faster.
    pub const ALL: [Advert; 3] = [Advert(1000), Advert(100), Advert(20)];

    /// What the results call it.
    pub fn label(self) -> String {
        format!("keepalived-{}ms", self.0)
    }

    /// The advert interval of that label.
    pub fn named(label: &str) -> Option<Advert> {
        Advert::ALL.into_iter().find(|a| a.label() == label)
    }
}

/// One machine.
#[derive(Debug)]
struct Node {
    dir: PathBuf,
    vrrp: Option<Process>,
    sync: Option<Process>,
}

/// The pair.
#[derive(Debug)]
pub struct Keepalived {
    // Before the lab: they end before their network does.
    nodes: BTreeMap<String, Node>,
    lab: Lab,
    advert: Advert,
    _servers: BTreeMap<String, Server>,
}

impl Keepalived {
    /// Builds the lab and starts both nodes.
    ///
    /// # Errors
    /// A program is missing (`deploy/setup.sh chaos` installs them), or does not come up.
    pub fn start(advert: Advert) -> Result<Keepalived> {
        let sizes = Standard { service_backends: BACKENDS, witness: false, ..Standard::default() };
        let mut topology = sizes.topology();
        for host in &mut topology.hosts {
            host.forwards = host.name.starts_with("lb");
        }
        let lab = Lab::build(&topology)?;
        quicken(&lab)?;
        let servers = standard::servers(&lab)?;
        let mut pair = Keepalived { nodes: BTreeMap::new(), lab, advert, _servers: servers };
        for (name, priority) in NODES {
            pair.prepare(name, priority)?;
        }
        for (name, _) in NODES {
            pair.boot(name)?;
        }
        pair.settle()?;
        Ok(pair)
    }

    fn prepare(&mut self, name: &str, priority: u8) -> Result<()> {
        let dir = self.lab.dir().join(name);
        std::fs::create_dir_all(&dir)?;
        let host = self.lab.host(name);
        for key in ["all", &host.on(SERVICE).name] {
            // One network for clients and servers: a router would tell them to talk directly.
            host.sysctl(&format!("ipv4/conf/{key}/send_redirects"), "0")?;
        }
        // The peer's flows are picked up in their middle.
        host.sysctl("netfilter/nf_conntrack_tcp_be_liberal", "1")?;
        std::fs::write(dir.join("keepalived.conf"), self.keepalived_conf(name, priority))?;
        std::fs::write(dir.join("conntrackd.conf"), self.conntrackd_conf(name, &dir))?;
        std::fs::write(dir.join("rules.nft"), self.rules())?;
        self.tool(name, "nft", &["-f", &dir.join("rules.nft").display().to_string()])?;
        self.nodes.insert(name.to_owned(), Node { dir, vrrp: None, sync: None });
        Ok(())
    }

    fn keepalived_conf(&self, name: &str, priority: u8) -> String {
        let interface = &self.lab.host(name).on(SERVICE).name;
        let [vip, snat] = addresses();
        format!(
            "global_defs {{\n  router_id {name}\n  vrrp_version 3\n  vrrp_rt_priority 50\n  vrrp_rlimit_rttime 2000000\n}}\n\
             vrrp_instance service {{\n  interface {interface}\n  virtual_router_id 51\n  state BACKUP\n  nopreempt\n  \
             priority {priority}\n  advert_int {}\n  \
             virtual_ipaddress {{\n    {vip}/24 dev {interface}\n    {snat}/24 dev {interface}\n  }}\n}}\n",
            self.advert.0 as f64 / 1000.0
        )
    }

    fn conntrackd_conf(&self, name: &str, dir: &Path) -> String {
        let other = if name == "lb1" { "lb2" } else { "lb1" };
        let own = self.lab.host(name).v4(CLUSTER);
        let peer = self.lab.host(other).v4(CLUSTER);
        let file = |what: &str| dir.join(what).display().to_string();
        format!(
            "Sync {{\n  Mode FTFW {{\n    DisableExternalCache yes\n    StartupResync yes\n  }}\n  \
             UDP {{\n    IPv4_address {own}\n    IPv4_Destination_Address {peer}\n    Port 3780\n    Interface {}\n    \
             SndSocketBuffer 1249280\n    RcvSocketBuffer 1249280\n    Checksum on\n  }}\n}}\n\
             General {{\n  HashSize 32768\n  HashLimit 131072\n  LogFile {}\n  LockFile {}\n  UNIX {{\n    Path {}\n  }}\n  \
             NetlinkBufferSize 2097152\n  NetlinkBufferSizeMaxGrowth 8388608\n  \
             Filter From Userspace {{\n    Protocol Accept {{\n      TCP\n      UDP\n    }}\n    \
             Address Ignore {{\n      IPv4_address 127.0.0.1\n      IPv4_address {own}\n      IPv4_address {peer}\n    }}\n  }}\n}}\n",
            self.lab.host(name).on(CLUSTER).name,
            file("conntrackd.log"),
            file("conntrackd.lock"),
            file("conntrackd.sock"),
        )
    }

    fn rules(&self) -> String {
        let [vip, snat] = addresses();
        let backends: Vec<IpAddr> =
            (1..=BACKENDS).map(|n| self.lab.host(&format!("be{n}")).v4(SERVICE)).collect();
        let map: Vec<String> = backends.iter().enumerate().map(|(i, b)| format!("{i} : {b}")).collect();
        let mut rules =
            String::from("table ip balance {\n chain pre {\n  type nat hook prerouting priority dstnat;\n");
        for protocol in ["tcp", "udp"] {
            let _ = writeln!(
                rules,
                "  ip daddr {vip} {protocol} dport {NAT_PORT} dnat to jhash ip saddr . {protocol} sport mod {BACKENDS} map {{ {} }} : {ECHO}",
                map.join(", ")
            );
        }
        let _ = writeln!(
            rules,
            " }}\n chain post {{\n  type nat hook postrouting priority srcnat;\n  ct status dnat snat to {snat}\n }}\n}}"
        );
        rules
    }

    /// Runs a program inside a node's host to its end.
    fn tool(&self, node: &str, program: &str, args: &[&str]) -> Result<()> {
        let output = self
            .lab
            .host(node)
            .run(|| Command::new(program).args(args).output())
            .with_context(|| format!("run {program} (\"deploy/setup.sh chaos\" installs it)"))?;
        if !output.status.success() {
            bail!("{program} {} on {node}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    fn node(&self, name: &str) -> &Node {
        self.nodes.get(name).unwrap_or_else(|| panic!("no node \"{name}\""))
    }

    fn node_mut(&mut self, name: &str) -> &mut Node {
        self.nodes.get_mut(name).unwrap_or_else(|| panic!("no node \"{name}\""))
    }

    /// The process that speaks VRRP: a child of the one that we have started, as its own file says.
    fn speaker(&self, name: &str) -> Option<Pid> {
        let node = self.node(name);
        let parent = node.vrrp.as_ref()?.pid();
        let pid: i32 = std::fs::read_to_string(node.dir.join("vrrp.pid")).ok()?.trim().parse().ok()?;
        // The file may be older than the process: only a child of ours is signalled.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let of: i32 = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        (of == parent).then(|| Pid::from_raw(pid))
    }

    fn signal(&self, name: &str, signal: Signal) {
        // The child first: it is told to end in order when its parent dies, and that would not be a death.
        if let Some(speaker) = self.speaker(name) {
            let _ = kill(speaker, signal);
        }
        if let Some(process) = &self.node(name).vrrp {
            process.signal(signal);
        }
    }

    /// Time after which a backup that hears nothing takes over (RFC 5798 §6.1, the skew rounded up), and then some.
    fn master_down(&self) -> Duration {
        Duration::from_millis(self.advert.0) * 4 + Duration::from_millis(200)
    }
}

/// VIP and source address: both belong to the master.
fn addresses() -> [IpAddr; 2] {
    [addr::service(addr::VIP)[0], addr::service(addr::SNAT)[0]]
}

impl Contender for Keepalived {
    fn lab(&self) -> &Lab {
        &self.lab
    }

    fn nodes(&self) -> Vec<String> {
        NODES.iter().map(|(name, _)| (*name).to_owned()).collect()
    }

    fn addresses(&self) -> Vec<IpAddr> {
        addresses().to_vec()
    }

    fn targets(&self) -> Vec<Target> {
        vec![Target { mode: "nat".to_owned(), at: (addresses()[0], NAT_PORT).into() }]
    }

    fn settle(&mut self) -> Result<String> {
        for (name, _) in NODES {
            self.boot(name)?;
        }
        // Nothing but the wire says which of them is the master; and a backup that has just started must have heard it.
        let vip = addresses()[0];
        let window = self.master_down();
        let watch = Watch::start(&self.lab, &[vip], PROBE)?;
        let mut since = Instant::now();
        let owner = wait_for("one master", SOON, || {
            let seen = watch.claimants_since(vip, since);
            if since.elapsed() < window {
                return Err(format!("{seen:?} so far"));
            }
            since = Instant::now();
            match seen.len() {
                1 => seen.into_iter().next().ok_or_else(String::new),
                _ => Err(format!("{seen:?} answer")),
            }
        })?;
        Ok(owner)
    }

    fn calm(&mut self, owner: &str) {
        // What it asked for at its start may have met a link that was not up yet.
        for (node, _) in NODES.iter().filter(|(node, _)| *node != owner) {
            let config = self.node(node).dir.join("conntrackd.conf").display().to_string();
            let _ = self.tool(node, "conntrackd", &["-C", &config, "-n"]);
        }
        std::thread::sleep(RESYNC);
    }

    fn kill(&mut self, node: &str) -> Instant {
        let at = Instant::now();
        self.signal(node, Signal::SIGKILL);
        if let Some(process) = self.node_mut(node).vrrp.take() {
            process.wait(SOON);
        }
        at
    }

    fn pause(&self, node: &str) {
        self.signal(node, Signal::SIGSTOP);
    }

    fn resume(&self, node: &str) {
        self.signal(node, Signal::SIGCONT);
    }

    fn end(&mut self, node: &str) -> Result<()> {
        if let Some(process) = self.node_mut(node).vrrp.take() {
            process.signal(Signal::SIGTERM);
            process.wait(SOON).with_context(|| format!("{node} does not end"))?;
        }
        Ok(())
    }

    fn boot(&mut self, node: &str) -> Result<()> {
        let dir = self.node(node).dir.clone();
        let file = |what: &str| dir.join(what).display().to_string();
        if self.node(node).sync.is_none() {
            let _ = std::fs::remove_file(dir.join("conntrackd.lock"));
            let _ = std::fs::remove_file(dir.join("conntrackd.sock"));
            let mut command = Command::new("conntrackd");
            command.args(["-C", &file("conntrackd.conf")]);
            let process = self.lab.host(node).start("conntrackd", command, &dir.join("conntrackd.out"))?;
            self.node_mut(node).sync = Some(process);
        }
        if self.node(node).vrrp.is_none() {
            // It would take whoever has its old number for itself.
            let _ = std::fs::remove_file(dir.join("keepalived.pid"));
            let _ = std::fs::remove_file(dir.join("vrrp.pid"));
            let mut command = Command::new("keepalived");
            command.args(["--dont-fork", "--log-console", "--vrrp", "--use-file", &file("keepalived.conf")]);
            command.args(["--pid", &file("keepalived.pid"), "--vrrp_pid", &file("vrrp.pid")]);
            let process = self.lab.host(node).start("keepalived", command, &dir.join("keepalived.out"))?;
            self.node_mut(node).vrrp = Some(process);
        }
        for process in [&self.node(node).sync, &self.node(node).vrrp].into_iter().flatten() {
            if let Some(status) = process.try_exit() {
                bail!("{} on {node} has ended ({status}): {}", process.name(), self.last_words());
            }
        }
        Ok(())
    }

    fn forget(&mut self, node: &str) -> Result<()> {
        if let Some(process) = self.node_mut(node).sync.take() {
            process.kill_9();
        }
        for address in addresses() {
            // Gone already when it was not the master.
            let _ = self.lab.host(node).remove_address(SERVICE, address, 24);
        }
        self.tool(node, "conntrack", &["-F"])
    }

    fn slowness(&self) -> Duration {
        (self.master_down() + Duration::from_millis(500)).max(Duration::from_secs(1))
    }

    fn cluster(&mut self) -> Option<&mut Cluster> {
        None
    }

    fn document(&self, _: Option<u16>) -> Option<Document> {
        None
    }

    fn last_words(&self) -> String {
        let mut text = String::new();
        for (name, node) in &self.nodes {
            for file in ["keepalived.out", "conntrackd.out", "conntrackd.log"] {
                let log = std::fs::read_to_string(node.dir.join(file)).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(LOG_TAIL)..].join("\n");
                let _ = writeln!(text, "---- {name} {file}\n{tail}");
            }
        }
        text
    }
}

impl Drop for Keepalived {
    fn drop(&mut self) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for name in names {
            self.kill(&name);
        }
    }
}
