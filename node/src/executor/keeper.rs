//! The daemon's side of the executor.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use komainu_cluster::will::WillMemory;

use super::READY;
use super::tether::Tether;

/// How long to wait before another one is started in the place of one that ended, at first; twice as long after each that did not
/// last, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// A machine that has no room for a small process has other worries than one every minute.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// One that lived that long had nothing wrong with it.
const LASTED: Duration = Duration::from_secs(10);
/// Bytes of what it says that are read.
const MAX_WORDS: u64 = 1024;

/// The executor of this process, and the thread that starts another when it ends. Dropping it without [`Executor::dismiss`] leaves it
/// to do its work when this process has ended.
pub struct Executor {
    shared: Arc<Shared>,
    will: Arc<WillMemory>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    child: Option<Child>,
    dismissed: bool,
    /// Why there is none that is ready; absent while there is one.
    missing: Option<String>,
}

/// What it is started with.
struct Recipe {
    will: Arc<WillMemory>,
    tether: Tether,
    leases: Option<OwnedFd>,
    listen: IpAddr,
}

impl Executor {
    /// Starts it, for a process that listens for its peers at `listen`, with the leases of a program in the kernel, if there is one.
    /// That it can't be started is told in [`Executor::notice`] and in the log; the node then runs without.
    ///
    /// # Errors
    /// The system has no memory for the will, or no thread.
    pub fn start(listen: IpAddr, leases: Option<&OwnedFd>) -> io::Result<Executor> {
        let will = Arc::new(WillMemory::new()?);
        let recipe = Recipe {
            will: will.clone(),
            tether: Tether::new()?,
            leases: leases.map(OwnedFd::try_clone).transpose()?,
            listen,
        };
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let keeping = shared.clone();
        let thread = std::thread::Builder::new().name("komainu-keeper".to_owned()).spawn(move || {
            // For as long as this thread lives, which is as long as the process does, or nobody is to say that it has died.
            if let Err(e) = recipe.tether.hold() {
                tracing::warn!("an executor will be slow to notice the death of this process: {e}");
            }
            keeping.keep(&recipe);
        })?;
        Ok(Executor { shared, will, thread: Some(thread) })
    }

    /// Where the will is to be put.
    pub fn will(&self) -> Arc<WillMemory> {
        self.will.clone()
    }

    /// A handle on what an operator should know of it.
    pub fn notices(&self) -> impl Fn() -> Option<String> + Send + Sync + 'static {
        let shared = self.shared.clone();
        move || shared.lock().missing.clone()
    }

    /// Ends it: this process ends in order, and has said so itself.
    pub fn dismiss(mut self) {
        self.will.revoke();
        let mut state = self.shared.lock();
        state.dismissed = true;
        if let Some(child) = &mut state.child {
            // It has ended just now, if this fails.
            let _ = child.kill();
        }
        drop(state);
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic has ended the process.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic anywhere ends the process")
    }

    fn keep(&self, recipe: &Recipe) {
        let mut pause = FIRST_PAUSE;
        loop {
            let started = Instant::now();
            let why = match self.one(recipe) {
                Ok(why) => why,
                Err(e) => format!("it can't be started: {e}"),
            };
            let mut state = self.lock();
            if state.dismissed {
                return;
            }
            let missing = format!(
                "no executor ({why}): should this process die, the others wait until its leases have run out"
            );
            tracing::warn!("{missing}; trying again in {} ms", pause.as_millis());
            state.missing = Some(missing);
            if started.elapsed() >= LASTED {
                pause = FIRST_PAUSE;
            }
            let until = Instant::now() + pause;
            while !state.dismissed {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = self.changed.wait_timeout(state, left).expect("a panic anywhere ends the process").0;
            }
            if state.dismissed {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Starts one and waits for its end. Why it ended.
    fn one(&self, recipe: &Recipe) -> io::Result<String> {
        let words = {
            let mut state = self.lock();
            if state.dismissed {
                return Ok(String::new());
            }
            let mut child = recipe.command()?.spawn()?;
            let words = child.stderr.take();
            state.child = Some(child);
            words
        };
        let mut last = String::new();
        let lines = words.into_iter().flat_map(|w| BufReader::new(w.take(MAX_WORDS)).lines());
        for line in lines.map_while(Result::ok) {
            if line == READY {
                let mut state = self.lock();
                let pid = state.child.as_ref().map_or(0, Child::id);
                tracing::info!(pid, "the executor watches over this process");
                state.missing = None;
            } else {
                last = line;
            }
        }
        let Some(mut child) = self.lock().child.take() else { return Ok(last) };
        // It has ended, or says what no executor says; from here on nobody else can end it, and it is waited for.
        let _ = child.kill();
        let status = child.wait()?.to_string();
        Ok(if last.is_empty() { status } else { format!("{status}: {last}") })
    }
}

impl Recipe {
    fn command(&self) -> io::Result<Command> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("komainu").arg("executor");
        command.arg("--process").arg(std::process::id().to_string());
        command.arg("--tether").arg(self.tether.number().to_string());
        command.arg("--listen").arg(self.listen.to_string());
        command.stdin(File::from(self.will.fd().try_clone_to_owned()?)).stderr(Stdio::piped());
        match &self.leases {
            Some(fd) => command.arg("--leases").stdout(File::from(fd.try_clone()?)),
            None => command.stdout(Stdio::null()),
        };
        // A group of its own: what a terminal or a service manager sends to the daemon's is not meant for it.
        command.process_group(0);
        Ok(command)
    }
}
