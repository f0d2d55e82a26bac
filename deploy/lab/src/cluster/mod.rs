//! The real binary in the lab: node files, processes, and its CLI as the only way to ask and tell.

pub mod document;
mod files;
pub mod status;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;

pub use self::document::Document;
pub use self::status::Status;
use crate::error::{LabError, Result};
use crate::lab::Lab;
use crate::process::{Process, executors_of, is_executor, spawn_in};
use crate::topology::{CLUSTER, INSIDE, SERVICE, addr};

/// Port for peer gRPC and beats.
const CLUSTER_PORT: u16 = 7800;
/// Longest time that a single call of the CLI may take; its own waiting commands end sooner.
const CLI_LIMIT: Duration = Duration::from_secs(40);
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);
/// Lines of each log that are shown when something failed.
const LOG_TAIL: usize = 60;
/// Keeps the files of every lab when set.
const KEEP_VARIABLE: &str = "KOMAINU_LAB_KEEP";

/// Bound for whatever happens within a second on a quiet machine. Generous: it decides only when a wait is given up.
pub const SOON: Duration = Duration::from_secs(30);

/// Nodes in a lab. They are killed when it is dropped; when that happens in a panic, their logs are printed and kept.
#[derive(Debug)]
pub struct Cluster {
    // Before the lab, so that the processes end before their network does.
    nodes: BTreeMap<String, Node>,
    binary: PathBuf,
    key: PathBuf,
    /// What node files say of the lane, if anything.
    lane: Option<String>,
    environment: Vec<(String, String)>,
    /// The lab they stand in.
    pub lab: Lab,
}

/// A node of the cluster: its files, and its process while it runs.
#[derive(Debug)]
struct Node {
    host: String,
    id: u64,
    config: PathBuf,
    run_dir: PathBuf,
    data_dir: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

/// What a node file says beyond what the lab knows by itself.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Host, which also is the node's name.
    pub host: String,
    /// Number.
    pub id: u64,
    /// Whether it is a witness.
    pub witness: bool,
    /// Hosts of the other nodes with their numbers.
    pub peers: Vec<(String, u64)>,
    /// Further tables of the file.
    pub extra: String,
}

/// A finished call of the CLI.
#[derive(Clone, Debug)]
pub struct CliOutput {
    /// Exit status.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Cluster {
    /// A cluster of every balancer and witness that `lab` has, none of them started.
    ///
    /// # Errors
    /// The binary isn't there, or files can't be written.
    pub fn new(lab: Lab, binary: PathBuf) -> Result<Cluster> {
        Self::with_lane(lab, binary, None)
    }

    /// The same with nodes that all run `lane`. For `xdp` the network is made fit for it.
    ///
    /// # Errors
    /// The same, and what the kernel refuses.
    pub fn with_lane(lab: Lab, binary: PathBuf, lane: Option<&str>) -> Result<Cluster> {
        let hosts: Vec<String> = lab.hosts().map(|(name, _)| name.to_owned()).collect();
        let members: Vec<(String, u64)> =
            hosts.iter().filter(|h| h.starts_with("lb") || *h == "wit").cloned().zip(1..).collect();
        let mut cluster = Cluster::empty(lab, binary, lane)?;
        for (host, id) in &members {
            cluster.add(&NodeSpec {
                host: host.clone(),
                id: *id,
                witness: host == "wit",
                peers: members.iter().filter(|(other, _)| other != host).cloned().collect(),
                extra: String::new(),
            })?;
        }
        Ok(cluster)
    }

    /// A cluster without nodes, but with a key. Nodes that are added run `lane`; for `xdp` the network of every balancer in the lab
    /// is made fit for it.
    ///
    /// # Errors
    /// The binary isn't there, the key can't be made, or the kernel refuses.
    pub fn empty(lab: Lab, binary: PathBuf, lane: Option<&str>) -> Result<Cluster> {
        if !binary.is_file() {
            return Err(LabError::NoBinary { path: binary });
        }
        if lane == Some("xdp") {
            let balancers: Vec<&str> =
                lab.hosts().map(|(name, _)| name).filter(|h| h.starts_with("lb")).collect();
            lab.ready_for_xdp(&balancers)?;
        }
        let key = lab.dir().join("cluster.key");
        let lane = lane.map(str::to_owned);
        let cluster = Cluster { nodes: BTreeMap::new(), binary, key, lane, environment: Vec::new(), lab };
        let key = cluster.key.display().to_string();
        cluster.run_here(None, &["keygen", "--output", &key])?.success("keygen")?;
        Ok(cluster)
    }

    /// Writes the files of a node. It is not started.
    ///
    /// # Errors
    /// Files can't be written.
    pub fn add(&mut self, spec: &NodeSpec) -> Result<()> {
        let dir = self.lab.dir().join(&spec.host);
        let node = Node {
            host: spec.host.clone(),
            id: spec.id,
            config: dir.join("node.toml"),
            run_dir: dir.join("run"),
            data_dir: dir.join("data"),
            log: dir.join("log"),
            process: None,
        };
        for dir in [&dir, &node.run_dir, &node.data_dir] {
            std::fs::create_dir_all(dir)
                .map_err(|e| LabError::system(format!("make {}", dir.display()), e))?;
        }
        write(&node.config, &self.node_file(spec, &node))?;
        self.nodes.insert(spec.host.clone(), node);
        Ok(())
    }

    fn node_file(&self, spec: &NodeSpec, node: &Node) -> String {
        let host = self.lab.host(&spec.host);
        let mut t = format!(
            "id = {}\nname = \"{}\"\nrole = \"{}\"\ndata_dir = \"{}\"\nrun_dir = \"{}\"\n",
            spec.id,
            spec.host,
            if spec.witness { "witness" } else { "balancer" },
            node.data_dir.display(),
            node.run_dir.display()
        );
        if !spec.witness {
            let _ = writeln!(t, "[service]\ninterface = \"{}\"", host.on(SERVICE).name);
            if let Some(lane) = &self.lane {
                let _ = writeln!(t, "lane = \"{lane}\"");
            }
            if let Some(inside) = host.interfaces().iter().find(|l| l.segment == INSIDE) {
                let _ = writeln!(t, "[inside]\ninterface = \"{}\"", inside.name);
            }
        }
        if !spec.peers.is_empty() {
            let own = self.cluster_address(&spec.host);
            let _ = writeln!(t, "[cluster]\nlisten = \"{own}\"\nsecret_file = \"{}\"", self.key.display());
            for (peer, id) in &spec.peers {
                let _ =
                    writeln!(t, "[[cluster.peer]]\nid = {id}\naddress = \"{}\"", self.cluster_address(peer));
            }
        }
        t.push_str(&spec.extra);
        t
    }

    /// Where `host`'s node listens for the others.
    pub fn cluster_address(&self, host: &str) -> SocketAddr {
        (self.lab.host(host).v4(CLUSTER), CLUSTER_PORT).into()
    }

    /// Names of the nodes, running or not.
    pub fn names(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    /// Names of the nodes that run.
    pub fn running(&self) -> Vec<String> {
        self.nodes.iter().filter(|(_, n)| n.process.is_some()).map(|(name, _)| name.clone()).collect()
    }

    /// Starts a node; nothing happens when it runs.
    ///
    /// # Errors
    /// The binary can't be started.
    pub fn start(&mut self, name: &str) -> Result<()> {
        let node = self.node(name);
        if node.process.is_some() {
            return Ok(());
        }
        let mut command = Command::new(&self.binary);
        command.arg("run").arg("-c").arg(&node.config);
        command.env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()));
        command.env("RUST_BACKTRACE", "1").env_remove("NOTIFY_SOCKET");
        command.envs(self.environment.iter().map(|(k, v)| (k, v)));
        let process = self.lab.host(&node.host).start(name, command, &node.log)?;
        self.node_mut(name).process = Some(process);
        Ok(())
    }

    /// Starts every node that does not run.
    ///
    /// # Errors
    /// The binary can't be started.
    pub fn start_all(&mut self) -> Result<()> {
        for name in self.names() {
            self.start(&name)?;
        }
        Ok(())
    }

    /// The process of a node.
    ///
    /// # Panics
    /// When the node isn't running.
    pub fn process(&self, name: &str) -> &Process {
        self.node(name).process.as_ref().unwrap_or_else(|| panic!("node \"{name}\" does not run"))
    }

    /// The process that a node's daemon has started to tell of its death; absent while it has none.
    pub fn executor_of(&self, name: &str) -> Option<i32> {
        executors_of(self.process(name).pid()).first().copied()
    }

    /// Kills a node with SIGKILL so that nothing is left that could tell of it, as a loss of power does. Returns the instant of the
    /// signal.
    pub fn kill_silently(&mut self, name: &str) -> Instant {
        let Some(process) = self.node_mut(name).process.take() else { return Instant::now() };
        for executor in executors_of(process.pid()) {
            // Not stopped first: the kernel wakes what is stopped when its parent goes. The only error is that it has ended.
            let _ = kill(Pid::from_raw(executor), Signal::SIGKILL);
            let signalled = Instant::now();
            while is_executor(executor) {
                assert!(signalled.elapsed() < SOON, "executor {executor} of {name} outlives SIGKILL");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        process.kill_9()
    }

    /// Kills a node with SIGKILL; its executor tells of it. Returns the instant of the signal.
    pub fn kill_9(&mut self, name: &str) -> Instant {
        let process = self.node_mut(name).process.take();
        process.map_or_else(Instant::now, |p| p.kill_9())
    }

    /// Asks a node to end (SIGTERM) and waits. Its exit status.
    ///
    /// # Errors
    /// It is still there after `limit`; it is killed then.
    pub fn terminate(&mut self, name: &str, limit: Duration) -> Result<ExitStatus> {
        let log = self.node(name).log.clone();
        let process =
            self.node_mut(name).process.take().unwrap_or_else(|| panic!("node \"{name}\" does not run"));
        process.signal(Signal::SIGTERM);
        process.wait(limit).ok_or_else(|| LabError::Timeout {
            what: format!("{name} to end after SIGTERM"),
            waited: limit,
            last: tail(&log, LOG_TAIL),
        })
    }

    /// Sends a signal to a node that runs.
    pub fn signal(&self, name: &str, signal: Signal) {
        self.process(name).signal(signal);
    }

    /// Removes what a node has stored, as the loss of its disk would. It must not run.
    ///
    /// # Errors
    /// Files can't be removed.
    pub fn lose_disk(&mut self, name: &str) -> Result<()> {
        let node = self.node(name);
        assert!(node.process.is_none(), "node \"{name}\" runs");
        let dir = &node.data_dir;
        std::fs::remove_dir_all(dir)
            .and_then(|()| std::fs::create_dir(dir))
            .map_err(|e| LabError::system(format!("empty {}", dir.display()), e))
    }

    /// Calls the CLI against a node's admin socket and returns however it ended.
    ///
    /// # Errors
    /// It can't be started or does not end.
    pub fn cli(&self, name: &str, args: &[&str]) -> Result<CliOutput> {
        let socket = format!("unix:{}", self.node(name).run_dir.join("admin.sock").display());
        let mut all = args.to_vec();
        all.extend(["--node", &socket]);
        self.run_here(Some(&self.node(name).host), &all)
    }

    /// Calls the CLI inside a node's host for a command that asks no node, such as `check`.
    ///
    /// # Errors
    /// It can't be started or does not end.
    pub fn local(&self, name: &str, args: &[&str]) -> Result<CliOutput> {
        self.run_here(Some(&self.node(name).host), args)
    }

    /// Calls the CLI on any host of the lab, which must say itself which node is meant.
    ///
    /// # Errors
    /// It can't be started or does not end.
    pub fn cli_from(&self, host: &str, args: &[&str]) -> Result<CliOutput> {
        self.run_here(Some(host), args)
    }

    /// The same as [`Cluster::cli`]; anything but exit status 0 is an error.
    ///
    /// # Errors
    /// As above, and when the command fails.
    pub fn cli_ok(&self, name: &str, args: &[&str]) -> Result<CliOutput> {
        self.cli(name, args)?.success(&args.join(" "))
    }

    /// The same with `--json`, parsed.
    ///
    /// # Errors
    /// As above, and when the output is not what was expected.
    pub fn cli_json<T: DeserializeOwned>(&self, name: &str, args: &[&str]) -> Result<T> {
        let mut all = args.to_vec();
        all.push("--json");
        let output = self.cli_ok(name, &all)?;
        serde_json::from_str(&output.stdout).map_err(|e| LabError::Output {
            command: all.join(" "),
            reason: e.to_string(),
            output: output.stdout,
        })
    }

    /// What a node says about the cluster.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self, name: &str) -> Result<Status> {
        self.cli_json(name, &["status"])
    }

    /// Writes `toml` to a file and applies it through a node, whatever comes of it.
    ///
    /// # Errors
    /// The CLI can't be called.
    pub fn try_apply(&self, name: &str, toml: &str) -> Result<CliOutput> {
        let file = self.lab.dir().join(format!("apply-{name}.toml"));
        write(&file, toml)?;
        self.cli(name, &["apply", "-f", &file.display().to_string()])
    }

    /// Applies a document through a node.
    ///
    /// # Errors
    /// It is refused.
    pub fn apply(&self, name: &str, document: &Document) -> Result<()> {
        self.try_apply(name, &document.to_toml())?.success("apply").map(drop)
    }

    /// Waits until a node's status satisfies `condition`, which returns what is missing otherwise.
    ///
    /// # Errors
    /// It does not within `limit`.
    pub fn wait_status(
        &self,
        name: &str,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut(&Status) -> bool,
    ) -> Result<Status> {
        let what = format!("{what} (as {name} sees it)");
        let ended = || self.node(name).process.as_ref().and_then(Process::try_exit);
        let found = wait_for(&what, limit, || match self.status(name) {
            Ok(status) if condition(&status) => Ok(Ok(status)),
            Ok(status) => Err(format!("{status:?}")),
            // Waiting for the dead is in vain.
            Err(e) => match ended() {
                Some(status) => Ok(Err(status)),
                None => Err(e.to_string()),
            },
        })?;
        found.map_err(|status| LabError::NodeEnded {
            name: name.to_owned(),
            status: status.to_string(),
            what,
            log: tail(&self.node(name).log, 5),
        })
    }

    /// Waits until every running node knows a leader, is known by all running ones as alive, and all are voters.
    ///
    /// # Errors
    /// Not within `limit`.
    pub fn wait_formed(&self, limit: Duration) -> Result<()> {
        let running = self.running();
        for name in &running {
            self.wait_status(name, "the cluster to form", limit, |s| {
                s.cluster.leader.is_some()
                    && running
                        .iter()
                        .all(|n| s.cluster.members.iter().any(|m| m.name == *n && m.alive && m.voter))
            })?;
        }
        Ok(())
    }

    /// Waits until every running node names the same living owner of `group`. Its name.
    ///
    /// # Errors
    /// Not within `limit`.
    pub fn wait_owner(&self, group: &str, limit: Duration) -> Result<String> {
        let running = self.running();
        wait_for(&format!("an owner of group {group}"), limit, || {
            let mut owners = Vec::new();
            for name in &running {
                let status = self.status(name).map_err(|e| e.to_string())?;
                owners.push(status.owner(group).map(str::to_owned));
            }
            match &owners[..] {
                [Some(first), rest @ ..]
                    if running.contains(first) && rest.iter().all(|o| o.as_ref() == Some(first)) =>
                {
                    Ok(first.clone())
                }
                _ => Err(format!("{running:?} name {owners:?}")),
            }
        })
    }

    /// Waits until a backend has this health, as every running node sees it.
    ///
    /// # Errors
    /// Not within `limit`.
    pub fn wait_health(&self, service: &str, backend: &str, health: &str, limit: Duration) -> Result<()> {
        for name in self.running() {
            self.wait_status(&name, &format!("{service}/{backend} to be {health}"), limit, |s| {
                s.backend(service, backend).is_some_and(|b| b.health == health)
            })?;
        }
        Ok(())
    }

    /// Waits until every backend of every service is up, as every running node sees it.
    ///
    /// # Errors
    /// Not within `limit`.
    pub fn wait_all_up(&self, limit: Duration) -> Result<()> {
        for name in self.running() {
            self.wait_status(&name, "every backend to be up", limit, |s| {
                !s.services.is_empty() && s.all_up()
            })?;
        }
        Ok(())
    }

    /// Waits until a line of a node's log holds all of `words`.
    ///
    /// # Errors
    /// None does within `limit`; the error holds the log's end.
    pub fn wait_logged(&self, name: &str, words: &[&str], limit: Duration) -> Result<()> {
        wait_for(&format!("{name} to log {words:?}"), limit, || {
            let said = self.log_of(name).lines().any(|line| words.iter().all(|word| line.contains(word)));
            if said { Ok(()) } else { Err(tail(&self.node(name).log, LOG_TAIL)) }
        })
    }

    /// Everything that a node has logged.
    pub fn log_of(&self, name: &str) -> String {
        std::fs::read_to_string(&self.node(name).log).unwrap_or_default()
    }

    /// The last lines of every node's log, and what each that runs has dropped.
    pub fn log_tails(&self) -> String {
        let mut text = String::new();
        for (name, node) in &self.nodes {
            let _ = writeln!(text, "---- {name} (id {})\n{}", node.id, tail(&node.log, LOG_TAIL));
            if node.process.is_some() {
                let _ = match self.status(name) {
                    Ok(mut status) => {
                        status.drops.retain(|_, count| *count > 0);
                        writeln!(text, "drops: {:?}", status.drops)
                    }
                    Err(e) => writeln!(text, "no status: {e}"),
                };
            }
        }
        text
    }

    fn run_here(&self, host: Option<&str>, args: &[&str]) -> Result<CliOutput> {
        let mut command = Command::new(&self.binary);
        command.args(args).env_remove("KOMAINU_NODE");
        run(host.map(|h| self.lab.host(h).namespace()), command, &args.join(" "), CLI_LIMIT)
    }

    fn node(&self, name: &str) -> &Node {
        self.nodes.get(name).unwrap_or_else(|| panic!("no node \"{name}\""))
    }

    fn node_mut(&mut self, name: &str) -> &mut Node {
        self.nodes.get_mut(name).unwrap_or_else(|| panic!("no node \"{name}\""))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log_tails());
        }
        if std::thread::panicking() || std::env::var_os(KEEP_VARIABLE).is_some() {
            eprintln!("the nodes' files are kept in {}", crate::workdir::kept_path(self.lab.dir()).display());
            self.lab.keep_dir();
        }
    }
}

impl CliOutput {
    /// Itself, when the command succeeded.
    ///
    /// # Errors
    /// It did not.
    pub fn success(self, command: &str) -> Result<CliOutput> {
        if self.status.success() {
            return Ok(self);
        }
        Err(LabError::Command {
            command: format!("komainu {command}"),
            status: self.status.to_string(),
            stderr: self.stderr,
        })
    }
}

/// Runs a command to its end, in a namespace when given, at most `limit`.
pub(crate) fn run(
    ns: Option<&crate::netns::Namespace>,
    mut command: Command,
    what: &str,
    limit: Duration,
) -> Result<CliOutput> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let failed = |e| LabError::system(format!("run komainu {what}"), e);
    let mut child = spawn_in(ns, command).map_err(failed)?;
    let reader = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut stream) = stream {
                let _ = stream.read_to_end(&mut text);
            }
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let stdout = reader(child.stdout.take().map(|s| Box::new(s) as _));
    let stderr = reader(child.stderr.take().map(|s| Box::new(s) as _));
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    match status {
        Some(status) => Ok(CliOutput { status, stdout, stderr }),
        None => Err(LabError::Timeout {
            what: format!("`komainu {what}` to end"),
            waited: limit,
            last: format!("{stdout}{stderr}"),
        }),
    }
}

/// Waits until `look` returns a value; it returns in words what it sees instead.
///
/// # Errors
/// Not within `limit`: the error tells what was seen last.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> std::result::Result<T, String>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(last) if start.elapsed() >= limit => {
                return Err(LabError::Timeout { what: what.to_owned(), waited: limit, last });
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// The binary under test: `KOMAINU_BIN`, or `komainu` beside the directory of the running test program.
///
/// # Errors
/// It isn't there.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("KOMAINU_BIN") {
        let path = PathBuf::from(path);
        return if path.is_file() { Ok(path) } else { Err(LabError::NoBinary { path }) };
    }
    let own = std::env::current_exe().map_err(|e| LabError::system("find the running program", e))?;
    // target/debug/deps/test-… or target/debug/bench.
    let near = own.ancestors().skip(1).take(2).map(|dir| dir.join("komainu"));
    let mut last = own.clone();
    for path in near {
        if path.is_file() {
            return Ok(path);
        }
        last = path;
    }
    Err(LabError::NoBinary { path: last })
}

/// Both VIPs of the standard topology.
pub fn standard_vips() -> [IpAddr; 2] {
    addr::service(addr::VIP)
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|e| LabError::system(format!("write {}", path.display()), e))
}

fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
