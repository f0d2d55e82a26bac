//! The cases, step by step.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use komainu_lab::cluster::{Cluster, Document, SOON, wait_for};
use komainu_lab::topology::{CLUSTER, INSIDE, SERVICE};
use komainu_lab::traffic::crowd::Crowd;
use komainu_lab::traffic::stream::UdpStream;
use komainu_lab::watch::Watch;
use nix::sys::signal::Signal;

use super::case::Case;
use super::contender::Contender;
use super::preload::{DELAY_FILE, WallClock};
use super::squeeze::Squeeze;
use crate::GROUP;

/// After a fault, and again after it was mended, one owner must be back within this time.
pub const BACK: Duration = Duration::from_secs(10);
/// Datagrams that must be answered for the service to be back.
const ANSWERED: u64 = 200;
/// How long what was killed stays dead.
const DEAD: Duration = Duration::from_millis(600);
/// How long cuts and pulled cables last.
const CUT: Duration = Duration::from_secs(2);
/// How long memory is short, and the time between the death of one that takes it and the next.
const PRESSURE: Duration = Duration::from_secs(2);
const HOG_PAUSE: Duration = Duration::from_millis(100);
/// How long disks are full or slow.
const BAD_DISK: Duration = Duration::from_secs(2);
/// A wall clock that is wrong: by how much, and for how long.
const CLOCK_BACK: Duration = Duration::from_secs(3600);
const WRONG_CLOCK: Duration = Duration::from_secs(2);
/// What a slow sync takes longer.
const SYNC_DELAY_MS: u32 = 300;
/// A cable that goes off and on: how often, for how long off and on.
const FLAPS: u32 = 6;
const FLAP_OFF: Duration = Duration::from_millis(150);
const FLAP_ON: Duration = Duration::from_millis(350);
/// First port of the service that comes and goes with the document.
const EXTRA_PORT: u16 = 8100;
/// How long after the beginning of an `apply` the leader is killed, at most, in ms.
const APPLY_SPREAD_MS: u64 = 60;

/// A case that is being played.
pub struct Scene<'a> {
    /// To whom.
    pub side: &'a mut dyn Contender,
    /// The owner before.
    pub owner: String,
    /// The other balancer.
    pub other: String,
    /// What the wire shows.
    pub watch: &'a Watch,
    /// The client.
    pub stream: &'a UdpStream,
    /// Long-lived connections.
    pub crowds: Vec<&'a Crowd>,
    /// When the fault came: set by [`Scene::play`].
    pub at: Instant,
    /// When a cut began to be healed.
    pub mended: Option<Instant>,
    /// Number of the round.
    pub round: usize,
    /// What was not as it should be.
    pub wrong: Vec<String>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

impl Scene<'_> {
    /// Plays `case` to its end: the fault, the time with it, its mending.
    ///
    /// # Errors
    /// It can't be played, or the service does not come back.
    pub fn play(&mut self, case: Case) -> Result<()> {
        let owner = self.owner.clone();
        match case {
            Case::KillOwner => self.kill_and_boot(&owner),
            Case::KillOwnerInTransition => self.kill_in_transition(&owner),
            Case::KillLeader => self.kill_leader(),
            Case::KillWitness => self.kill_and_boot("wit"),
            Case::KillBothInTurn => {
                self.kill_and_boot(&owner)?;
                let first = self.at;
                let second = self.side.settle().context("after the first death")?;
                self.kill_and_boot(&second)?;
                self.at = first;
                Ok(())
            }
            Case::PowerOff => self.power_off(&owner),
            Case::Stop100Ms => self.stop(&owner, Duration::from_millis(100)),
            Case::Stop1S => self.stop(&owner, Duration::from_secs(1)),
            Case::Stop3S => self.stop(&owner, Duration::from_secs(3)),
            Case::Stop10S => self.stop(&owner, Duration::from_secs(10)),
            Case::ServiceLink => self.pull(&owner, &[SERVICE]),
            Case::ClusterLink => self.pull(&owner, &[CLUSTER]),
            Case::AllLinks => self.pull(&owner, &[SERVICE, INSIDE, CLUSTER]),
            Case::OwnerDeaf => self.cut(&owner, true, false),
            Case::OwnerMute => self.cut(&owner, false, true),
            Case::FullSplit => self.cut(&owner, true, true),
            Case::LinkFlap => self.flap(&owner),
            Case::BootAtOnce => self.boot_at_once(),
            Case::RollingRestart => self.rolling_restart(),
            Case::Upgrade => self.upgrade(),
            Case::Switchover => self.switchover(),
            Case::KillLeaderInApply => self.kill_leader_in_apply(),
            Case::DiskFull => self.disk_full(&owner),
            Case::SlowDisk => self.slow_disk(&owner),
            Case::StoreCorrupt => self.corrupt_store(&owner),
            Case::ClockBack => self.set_clock_back(&owner),
            Case::MemoryPressure => self.press(&owner),
        }
    }

    /// A node to ask and to tell: the witness, or the balancer that nothing happens to at first.
    fn through(&self) -> String {
        let witness = self.side.nodes().into_iter().find(|n| n == "wit");
        witness.unwrap_or_else(|| self.other.clone())
    }

    /// Leaves things as they are for a while since the fault, at least as long as this contender needs, and then waits
    /// until clients are served, if they are to be.
    fn dwell(&self, least: Duration) -> Result<()> {
        let until = self.at + least.max(self.side.slowness());
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        if self.side.waits_for_mending() { Ok(()) } else { self.served() }
    }

    /// Waits until clients are served.
    ///
    /// # Errors
    /// They are not, for [`BACK`].
    pub fn served(&self) -> Result<()> {
        if self.stream.wait_answered(ANSWERED, BACK) {
            return Ok(());
        }
        bail!("clients are not served again within {BACK:?}: {:?}", self.stream.report().gaps.last())
    }

    fn kill_and_boot(&mut self, node: &str) -> Result<()> {
        self.at = self.side.kill(node);
        self.dwell(DEAD)?;
        self.side.boot(node)
    }

    /// Half of the connections are made before a backend of each service is drained and another one added, half after it.
    fn kill_in_transition(&mut self, node: &str) -> Result<()> {
        let through = self.through();
        let spares = self.side.spares();
        let cluster = ours(self.side)?;
        let drained: Vec<String> = cluster
            .status(&through)?
            .services
            .iter()
            .filter_map(|s| Some(format!("{}/{}", s.name, s.backends.first()?.name)))
            .collect();
        if let Some(before) =
            cluster.status(&through)?.services.iter().flat_map(|s| &s.backends).find(|b| b.admin != "enabled")
        {
            bail!("{} is {} before anything was drained", before.name, before.admin);
        }
        for backend in &drained {
            cluster.cli_ok(&through, &["backend", "drain", backend])?;
        }
        for (backend, at) in &spares {
            cluster.cli_ok(&through, &["backend", "add", backend, &at.to_string()])?;
        }
        cluster.wait_all_up(SOON)?;
        cluster.wait_status(node, "drain and addition", SOON, |s| !s.settled())?;
        self.refill()?;
        self.kill_and_boot(node)
    }

    /// Closes every second one of the connections and opens others in their place.
    fn refill(&self) -> Result<()> {
        for crowd in &self.crowds {
            crowd.close_every_second();
            crowd.fill(SOON)?;
        }
        Ok(())
    }

    fn power_off(&mut self, node: &str) -> Result<()> {
        let segments = segments_of(self.side, node);
        // Stopped first, so that it neither notices its links nor says good-bye.
        self.at = Instant::now();
        self.side.pause(node);
        for segment in &segments {
            self.side.lab().unplug(node, segment)?;
        }
        self.side.kill_silently(node);
        self.dwell(DEAD)?;
        self.side.forget(node)?;
        for segment in &segments {
            self.side.lab().plug(node, segment)?;
        }
        self.side.boot(node)
    }

    fn stop(&mut self, node: &str, time: Duration) -> Result<()> {
        self.at = Instant::now();
        self.side.pause(node);
        std::thread::sleep(time);
        self.side.resume(node);
        self.dwell(time + Duration::from_millis(700))
    }

    fn pull(&mut self, node: &str, segments: &[&str]) -> Result<()> {
        let on = segments_of(self.side, node);
        let segments: Vec<&str> = segments.iter().copied().filter(|s| on.iter().any(|o| o == s)).collect();
        self.at = Instant::now();
        for segment in &segments {
            self.side.lab().unplug(node, segment)?;
        }
        let result = self.dwell(CUT);
        self.mended = Some(Instant::now());
        for segment in &segments {
            self.side.lab().plug(node, segment)?;
        }
        result
    }

    /// Cuts `node` off from the other nodes, to it (`deaf`), from it (`mute`), or both.
    fn cut(&mut self, node: &str, deaf: bool, mute: bool) -> Result<()> {
        let lab = self.side.lab();
        let mut ways = Vec::new();
        for segment in segments_of(self.side, node) {
            for other in self.side.nodes().iter().filter(|n| *n != node) {
                if segments_of(self.side, other).contains(&segment) {
                    ways.push((other.clone(), segment.clone()));
                }
            }
        }
        self.at = Instant::now();
        for (other, segment) in &ways {
            if deaf {
                lab.cut_one_way(other, node, segment)?;
            }
            if mute {
                lab.cut_one_way(node, other, segment)?;
            }
        }
        let result = self.dwell(CUT);
        self.mended = Some(Instant::now());
        for (other, segment) in &ways {
            lab.heal(node, other, segment)?;
        }
        result
    }

    fn flap(&mut self, node: &str) -> Result<()> {
        self.at = Instant::now();
        for _ in 0..FLAPS {
            self.side.lab().unplug(node, SERVICE)?;
            std::thread::sleep(FLAP_OFF);
            self.side.lab().plug(node, SERVICE)?;
            std::thread::sleep(FLAP_ON);
        }
        self.dwell((FLAP_OFF + FLAP_ON) * FLAPS)
    }

    fn boot_at_once(&mut self) -> Result<()> {
        let nodes = self.side.nodes();
        self.at = Instant::now();
        for node in &nodes {
            self.side.kill(node);
        }
        std::thread::sleep(Duration::from_millis(500));
        for node in &nodes {
            self.side.boot(node)?;
        }
        self.served()
    }

    fn rolling_restart(&mut self) -> Result<()> {
        let mut nodes = self.side.nodes();
        // The owner in the middle, so that the group moves to a node that has been restarted already.
        nodes.retain(|n| *n != self.owner && *n != self.other);
        nodes.insert(0, self.owner.clone());
        nodes.insert(0, self.other.clone());
        self.at = Instant::now();
        for node in &nodes {
            self.side.end(node)?;
            self.side.boot(node)?;
            self.side.settle()?;
        }
        self.served()
    }

    /// Puts another file in the place of the binary and restarts every node.
    fn upgrade(&mut self) -> Result<()> {
        let cluster = ours(self.side)?;
        // Two names in turn: what runs can't be written.
        let names = ["komainu-a", "komainu-b"].map(|name| cluster.lab.dir().join(name));
        let [a, b] = names;
        let file = if cluster.binary() == a { b } else { a };
        if file.exists() {
            fs::remove_file(&file)?;
        }
        fs::copy(cluster.binary(), &file).context("copy the binary")?;
        cluster.set_binary(file.clone());
        self.rolling_restart()?;
        let file = fs::canonicalize(file)?;
        let cluster = ours(self.side)?;
        for node in cluster.running() {
            let runs = fs::read_link(format!("/proc/{}/exe", cluster.process(&node).pid()))?;
            if runs != file {
                self.wrong.push(format!("{node} runs {} and not {}", runs.display(), file.display()));
            }
        }
        Ok(())
    }

    fn press(&mut self, node: &str) -> Result<()> {
        let cluster = ours(self.side)?;
        let mut pids = vec![cluster.process(node).pid()];
        pids.extend(cluster.executor_of(node));
        let log = cluster.lab.dir().join("hog.log");
        let squeeze = Squeeze::around(&pids)?;
        self.at = Instant::now();
        let until = self.at + PRESSURE;
        let mut killed = 0;
        while Instant::now() < until {
            let hog = cluster.lab.host(node).start("hog", squeeze.hog(), &log)?;
            match hog.wait(until.saturating_duration_since(Instant::now())) {
                Some(status) if status.signal() == Some(Signal::SIGKILL as i32) => killed += 1,
                Some(status) => bail!("what was to take memory ended by itself: {status}"),
                None => {}
            }
            std::thread::sleep(HOG_PAUSE);
        }
        drop(squeeze);
        if killed == 0 {
            bail!("memory was never short");
        }
        self.notes.push(format!("memory ran out {killed} times"));
        self.served()?;
        // The kernel may kill the daemon instead: whoever asks for memory while the other is not there. systemd would start it again.
        match ours(self.side)?.process(node).try_exit() {
            None => Ok(()),
            Some(status) if status.signal() == Some(Signal::SIGKILL as i32) => {
                self.notes.push(format!("{node} was killed for it"));
                self.side.kill(node);
                self.side.boot(node)
            }
            Some(status) => bail!("{node} ended: {status}"),
        }
    }

    fn switchover(&mut self) -> Result<()> {
        self.at = Instant::now();
        let through = self.through();
        ours(self.side)?.cli_ok(&through, &["switchover", GROUP])?;
        self.claimed_by_other()?;
        // The old owner forwards for a grace time of one second.
        self.dwell(Duration::from_millis(1300))
    }

    fn claimed_by_other(&self) -> Result<()> {
        let vip = self.vip();
        wait_for(&format!("{} to answer for the VIP", self.other), BACK, || match self.watch.latest(vip) {
            Some((host, at)) if host == self.other && at >= self.at => Ok(()),
            last => Err(format!("{last:?}")),
        })?;
        Ok(())
    }

    fn kill_leader(&mut self) -> Result<()> {
        let leader = leader(ours(self.side)?)?;
        if leader == self.owner {
            self.at = Instant::now();
            ours(self.side)?.cli_ok("wit", &["switchover", GROUP])?;
            self.claimed_by_other()?;
        }
        self.kill_and_boot(&leader)
    }

    fn kill_leader_in_apply(&mut self) -> Result<()> {
        // A different service, or none, in every round.
        let port = (!self.round.is_multiple_of(3)).then(|| EXTRA_PORT + (self.round % 100) as u16);
        let text = self.document(port)?.to_toml();
        let cluster = ours(self.side)?;
        let before = cluster.status("wit")?.cluster.revision;
        let leader = leader(cluster)?;
        let delay = Duration::from_millis((self.round as u64 * 7) % APPLY_SPREAD_MS);
        // Through a node that lives on: what is being tested is the change, not the connection to the one that died.
        let asked = if leader == "wit" { "lb1" } else { "wit" };
        let shared: &Cluster = cluster;
        let (at, answer) = std::thread::scope(|scope| {
            let applying = scope.spawn(|| shared.try_apply(asked, &text));
            std::thread::sleep(delay);
            let at = Instant::now();
            shared.signal(&leader, Signal::SIGKILL);
            (at, applying.join())
        });
        self.at = at;
        self.side.kill(&leader);
        let acknowledged = match answer {
            Ok(output) => output?.status.success(),
            Err(_) => bail!("the thread that applies panicked"),
        };
        self.dwell(DEAD)?;
        self.side.boot(&leader)?;
        self.side.settle()?;
        let cluster = ours(self.side)?;
        let documents = same_document(cluster)?;
        let has = |p: u16| documents.contains(&format!("port = {p}"));
        let in_force = port.map_or_else(|| !documents.contains("\"extra\""), has);
        let after = cluster.status("wit")?.cluster.revision;
        if acknowledged && !in_force {
            self.wrong.push("a change that was acknowledged is lost".to_owned());
        }
        if after > before + 1 {
            self.wrong.push(format!("one change raised the revision from {before} to {after}"));
        }
        Ok(())
    }

    fn disk_full(&mut self, node: &str) -> Result<()> {
        let dir = ours(self.side)?.data_dir_of(node).to_owned();
        let filler = dir.join("filler");
        self.at = Instant::now();
        fill(&filler)?;
        // The leader may be the one that can't write: then whoever applies need not get an answer.
        if let Err(e) = self.change_document() {
            self.notes.push(format!("{e:#}"));
        }
        let result = self.dwell(BAD_DISK);
        fs::remove_file(&filler).context("make room again")?;
        result?;
        // A node that failed to write once does not trust its store any more until it starts again.
        self.side.kill(node);
        self.side.boot(node)?;
        self.side.settle()?;
        same_document(ours(self.side)?).map(drop)
    }

    fn slow_disk(&mut self, node: &str) -> Result<()> {
        let file = ours(self.side)?.data_dir_of(node).join(DELAY_FILE);
        self.at = Instant::now();
        fs::write(&file, SYNC_DELAY_MS.to_string())?;
        let changed = self.change_document();
        let result = changed.and_then(|()| self.dwell(BAD_DISK));
        fs::remove_file(&file)?;
        result
    }

    fn set_clock_back(&mut self, node: &str) -> Result<()> {
        let cluster = ours(self.side)?;
        let clock = WallClock::open(cluster.lab.dir())?;
        let pid = cluster.process(node).pid();
        self.at = Instant::now();
        clock.set_back(pid, CLOCK_BACK)?;
        let changed = self.change_document();
        let result = changed.and_then(|()| self.dwell(WRONG_CLOCK));
        let asked = clock.set_right()?;
        result?;
        if asked == 0 {
            bail!("{node} never looked at its clock");
        }
        self.notes.push(format!("asked {asked} times"));
        // To be put right is a leap, too.
        self.dwell(WRONG_CLOCK * 2)?;
        same_document(ours(self.side)?).map(drop)
    }

    /// Applies a document other than the one in force, through the witness.
    fn change_document(&mut self) -> Result<()> {
        let port = EXTRA_PORT + (self.round % 100) as u16;
        let document = self.document(Some(port))?;
        Ok(ours(self.side)?.apply("wit", &document)?)
    }

    fn corrupt_store(&mut self, node: &str) -> Result<()> {
        self.at = self.side.kill(node);
        self.dwell(DEAD)?;
        let dir = ours(self.side)?.data_dir_of(node).to_owned();
        let changed = corrupt(&dir, self.round as u64)?;
        if changed == 0 {
            bail!("there is nothing in {} that could be damaged", dir.display());
        }
        self.side.boot(node)
    }

    fn document(&self, port: Option<u16>) -> Result<Document> {
        self.side.document(port).context("this case is for Komainu only")
    }

    fn vip(&self) -> IpAddr {
        self.side.addresses()[0]
    }
}

fn ours(side: &mut dyn Contender) -> Result<&mut Cluster> {
    side.cluster().context("this case is for Komainu only")
}

fn segments_of(side: &dyn Contender, node: &str) -> Vec<String> {
    side.lab().host(node).interfaces().iter().map(|l| l.segment.clone()).collect()
}

/// Name of the leader.
fn leader(cluster: &Cluster) -> Result<String> {
    Ok(wait_for("a leader", SOON, || {
        let status = cluster.status("wit").map_err(|e| e.to_string())?;
        let leader = status.cluster.leader.ok_or("none is known")?;
        let member = status.cluster.members.iter().find(|m| m.id == leader && m.alive);
        member.map(|m| m.name.clone()).ok_or_else(|| format!("{leader} is no living member"))
    })?)
}

/// The document, which every node must have.
fn same_document(cluster: &Cluster) -> Result<String> {
    Ok(wait_for("every node to have the same document", BACK, || {
        let mut all = Vec::new();
        for name in cluster.running() {
            let output = cluster.cli_ok(&name, &["export"]).map_err(|e| e.to_string())?;
            all.push(output.stdout);
        }
        let first = all.first().cloned().unwrap_or_default();
        if all.iter().all(|d| *d == first) { Ok(first) } else { Err(all.join("\n----\n")) }
    })?)
}

/// Fills the file system that `path` is on.
fn fill(path: &Path) -> Result<()> {
    let mut file = fs::File::create(path)?;
    for size in [1 << 20, 4096, 1] {
        let block = vec![0xaa; size];
        loop {
            match file.write_all(&block) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::StorageFull => break,
                Err(e) => return Err(e).context("fill the disk"),
            }
        }
    }
    Ok(())
}

/// Changes bytes all over the files below `dir`. How many.
fn corrupt(dir: &Path, seed: u64) -> Result<u64> {
    let mut changed = 0;
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            changed += corrupt(&entry.path(), x)?;
            continue;
        }
        let mut bytes = fs::read(entry.path())?;
        // Where anything stands: most of a sparse database file is empty.
        let used: Vec<usize> = (0..bytes.len()).filter(|&i| bytes[i] != 0).collect();
        if used.is_empty() {
            continue;
        }
        for _ in 0..(used.len() / 512 + 8) {
            // xorshift64 (Marsaglia 2003).
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let at = used[x as usize % used.len()];
            bytes[at] ^= 1 << (x >> 32 & 7);
            changed += 1;
        }
        fs::write(entry.path(), bytes)?;
    }
    Ok(changed)
}
