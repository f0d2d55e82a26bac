//! Processes inside a namespace that never outlive the lab.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{LabError, Result};
use crate::netns::Namespace;

/// How often a process is looked at while its end is waited for.
const WAIT_STEP: Duration = Duration::from_millis(2);

/// A child process. Killed with -9 and reaped when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: Pid,
    log: PathBuf,
    // The lock keeps a signal from hitting a process id that was reaped and given to a stranger.
    child: Mutex<Child>,
}

impl Process {
    /// Starts `command` inside `ns` with stdout and stderr appended to `log`.
    ///
    /// # Errors
    /// The program or the log can't be opened.
    pub fn spawn(ns: &Namespace, name: &str, mut command: Command, log: &Path) -> Result<Process> {
        let doing = format!("start {name}");
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .map_err(|e| LabError::system(format!("open {}", log.display()), e))?;
        let err = out.try_clone().map_err(|e| LabError::system(&doing, e))?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let child = spawn_in(Some(ns), command).map_err(|e| LabError::system(&doing, e))?;
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id is a positive i32"));
        Ok(Process { name: name.to_owned(), pid, log: log.to_owned(), child: Mutex::new(child) })
    }

    /// Name for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Sends a signal; nothing happens when the process has ended.
    pub fn signal(&self, signal: Signal) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(child.try_wait(), Ok(None)) {
            // The only error left is ESRCH, for a process that ended just now.
            let _ = kill(self.pid, signal);
        }
    }

    /// The exit status, when it has ended.
    pub fn try_exit(&self) -> Option<ExitStatus> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait().ok().flatten()
    }

    /// Waits for its end, at most `limit`.
    pub fn wait(&self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_exit() {
                return Some(status);
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(WAIT_STEP);
        }
    }

    /// Kills it with SIGKILL and reaps it. Returns the instant just before the signal was sent.
    pub fn kill_9(&self) -> Instant {
        let at = Instant::now();
        self.signal(Signal::SIGKILL);
        self.wait(Duration::from_secs(10));
        at
    }
}

/// The living children of a process that run `komainu executor`: what a daemon leaves behind to tell of its death.
pub fn executors_of(parent: i32) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| is_executor(*pid) && parent_of(*pid) == Some(parent)).collect()
}

/// Whether a process is an executor, and hasn't ended.
pub fn is_executor(pid: i32) -> bool {
    // Empty once it has ended, also while nobody has reaped it.
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    words.split(|byte| *byte == 0).nth(1) == Some(b"executor")
}

/// Whether there is a process of that number that has not ended, all of it: one that was killed is there until the kernel has taken back
/// what it had.
pub fn is_there(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next());
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    state.is_some_and(|state| state != "Z" || threads() > 1)
}

fn parent_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold any character: proc_pid_stat(5).
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = child.wait();
    }
}

/// Starts `command`, inside `ns` when given, so that it dies with this process, whatever way this process ends.
pub(crate) fn spawn_in(ns: Option<&Namespace>, mut command: Command) -> std::io::Result<Child> {
    let fd = ns.map(Namespace::shared_fd);
    let parent = std::process::id();
    // SAFETY: between fork and exec only prctl(2), getppid(2) and setns(2) are called: async-signal-safe, no allocation.
    // The descriptor lives in the closure, that is, as long as the command.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // The parent may have died before the request was in force.
            if libc::getppid() != parent as libc::pid_t {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
            if let Some(fd) = &fd
                && libc::setns(fd.as_raw_fd(), libc::CLONE_NEWNET) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    spawn_on_keeper(command)
}

type Order = (Command, Sender<std::io::Result<Child>>);

/// Forks on one thread that lives as long as the process: the kernel delivers the parent-death signal when the
/// *thread* that forked ends (prctl(2)), and a test's thread ends long before its lab may.
fn spawn_on_keeper(command: Command) -> std::io::Result<Child> {
    static KEEPER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (tx, rx) = channel::<Order>();
        std::thread::Builder::new()
            .name("lab-keeper".to_owned())
            .spawn(move || {
                for (mut command, reply) in rx {
                    let _ = reply.send(command.spawn());
                }
            })
            .expect("the system has a thread to give");
        Mutex::new(tx)
    });
    let (tx, rx) = channel();
    keeper
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, tx))
        .expect("the keeper ends with the process");
    rx.recv().expect("the keeper answers every order")
}
