//! Little memory, and somebody who takes all of it: a memory cgroup of its own (cgroups(7), either version), so that nobody else on
//! the machine has less.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Bytes that processes in it can get beyond what they have when they come in.
const ROOM: u64 = 64 << 20;
/// Name of every such group, followed by the number of the process that made it.
const NAME: &str = "komainu-chaos-";

/// A memory cgroup with processes in it. They go back where they were, and it goes, when it is dropped.
#[derive(Debug)]
pub struct Squeeze {
    dir: PathBuf,
    /// Processes, and the list that each was in before.
    members: Vec<(i32, PathBuf)>,
}

/// Where memory is limited on this machine.
#[derive(Debug)]
struct Hierarchy {
    mount: PathBuf,
    /// Version 2, in which one hierarchy has all controllers.
    unified: bool,
}

impl Squeeze {
    /// Puts `pids` into a group of its own. What they have is theirs; what they take from now on is limited.
    ///
    /// # Errors
    /// The machine has no memory cgroups, or refuses.
    pub fn around(pids: &[i32]) -> Result<Squeeze> {
        let hierarchy = Hierarchy::find()?;
        hierarchy.clean_up();
        let dir = hierarchy.mount.join(format!("{NAME}{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        let mut squeeze = Squeeze { dir, members: Vec::new() };
        let limits = if hierarchy.unified {
            // Not everybody has swap.
            let _ = fs::write(squeeze.dir.join("memory.swap.max"), "0");
            "memory.max"
        } else {
            let _ = fs::write(squeeze.dir.join("memory.swappiness"), "0");
            "memory.limit_in_bytes"
        };
        fs::write(squeeze.dir.join(limits), ROOM.to_string()).context("limit memory")?;
        for pid in pids {
            let home = hierarchy.list_of(*pid)?;
            fs::write(squeeze.list(), pid.to_string()).context("move a process")?;
            squeeze.members.push((*pid, home));
        }
        Ok(squeeze)
    }

    /// A process that moves in, offers itself to be killed first, and takes memory until it is.
    pub fn hog(&self) -> Command {
        let mut command = Command::new("sh");
        // A line without an end, which tail(1) must keep.
        let script = "echo $$ >\"$0\" && echo 1000 >/proc/self/oom_score_adj && exec tail /dev/zero";
        command.args(["-c", script]).arg(self.list());
        command
    }

    fn list(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }
}

impl Drop for Squeeze {
    fn drop(&mut self) {
        for (pid, home) in &self.members {
            // It has died, if this fails.
            let _ = fs::write(home, pid.to_string());
        }
        if let Err(e) = fs::remove_dir(&self.dir) {
            eprintln!("{} can't be removed: {e}", self.dir.display());
        }
    }
}

impl Hierarchy {
    fn find() -> Result<Hierarchy> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        for line in mounts.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [_, mount, kind, options, ..] = words[..] else { continue };
            let mount = PathBuf::from(mount);
            if kind == "cgroup" && options.split(',').any(|o| o == "memory") {
                return Ok(Hierarchy { mount, unified: false });
            }
            let controllers = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
            if kind == "cgroup2" && controllers.split_whitespace().any(|c| c == "memory") {
                fs::write(mount.join("cgroup.subtree_control"), "+memory").context("limit memory")?;
                return Ok(Hierarchy { mount, unified: true });
            }
        }
        bail!("memory can't be limited here: there is no cgroup controller for it");
    }

    /// Removes what a run left that was killed.
    fn clean_up(&self) {
        for entry in fs::read_dir(&self.mount).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let owner = name.to_str().and_then(|n| n.strip_prefix(NAME));
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                // Busy, if a process of that run is still ending.
                let _ = fs::remove_dir(entry.path());
            }
        }
    }

    /// The list of processes that `pid` stands in.
    fn list_of(&self, pid: i32) -> Result<PathBuf> {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let own = groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let ours = if self.unified {
                controllers.is_empty()
            } else {
                controllers.split(',').any(|c| c == "memory")
            };
            ours.then(|| path.to_owned())
        });
        let own = own.with_context(|| format!("process {pid} is in no memory cgroup"))?;
        Ok(self.mount.join(own.trim_start_matches('/')).join("cgroup.procs"))
    }
}
