//! The daemon: puts the parts together, runs until a signal, hands over, leaves.
//!
//! | file | holds |
//! |---|---|
//! | [`logging`] | where the log goes and in which form |
//! | `node` | the parts of a running node and what flows between them |
//! | `facts` | what the node tells of itself: metrics, readiness, notices, the line in `systemctl status` |
//! | `systemd` | sd_notify(3) |
//!
//! **Start.** Everything that can be wrong is looked for first ([`crate::check`]), then sockets, data path, cluster
//! layer, checks, in this order; what fails says so and nothing is left behind. **End.** SIGTERM and SIGINT hand over
//! what this node owns and then end it, within [`STOP_TIMEOUT`]; a second one ends it at once. SIGHUP does nothing: what
//! can change without a restart is the cluster document. **Panic.** Ends the process: a crash is a failover, a node of
//! which half is dead is an outage. There is no file that says "owner": who owns is agreed again after every start.

pub mod logging;

mod facts;
mod node;
mod systemd;

use std::process::ExitCode;
use std::time::Duration;

use komainu_packet::lane::kernel::Choice;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::check::{self, Asker, Level};
use crate::config::NodeConfig;
use node::Node;

/// Time for an orderly end: handing over takes a few hundred milliseconds and the grace time, a busy disk perhaps a
/// second. Service managers kill after 90 s.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Time that tasks under way have when everything else has ended.
const LAST_TASKS: Duration = Duration::from_millis(500);
/// Tokio threads at most: checks, administration, log replication. The data path and the beats have their own.
const MAX_WORKERS: usize = 4;
/// Descriptors to ask for, where the hard limit allows more: far above what 256 checks at a time and the peers need.
const MAX_DESCRIPTORS: u64 = 65_536;

/// Why the daemon did not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The node file or the machine is wrong.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Unfit(Vec<check::Finding>),
    /// The system refused something.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The data path can't be started.
    #[error("data path: {0}")]
    Lane(#[from] komainu_packet::lane::LaneError),
    /// The cluster layer can't be started.
    #[error(transparent)]
    Cluster(#[from] komainu_cluster::shell::StartError),
    /// The cluster's secret can't be read.
    #[error("cluster.secret_file: {0}")]
    Secret(#[from] komainu_cluster::seal::KeyError),
    /// The administration can't be served.
    #[error(transparent)]
    Admin(#[from] crate::admin::ServeError),
    /// A part ended although nobody asked it to.
    #[error("{0} ended by itself")]
    Ended(&'static str),
}

/// Runs the node until it is told to stop. Sets up logging first.
///
/// # Errors
/// It can't start, or a part of it ended by itself.
pub fn run(config: NodeConfig) -> Result<ExitCode, RunError> {
    logging::start(&config.log);
    abort_on_panic();
    let choice = look_first(&config)?;
    raise_descriptors();
    // Two TLS libraries' worth of dependencies agree on one provider here. Already installed is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let workers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, MAX_WORKERS);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .thread_name("komainu-tokio")
        .enable_all()
        .build()
        .map_err(|source| RunError::System { doing: "start the runtime".to_owned(), source })?;
    let result = runtime.block_on(live(config, choice));
    runtime.shutdown_timeout(LAST_TASKS);
    result
}

/// A node's life.
async fn live(config: NodeConfig, choice: Option<Choice>) -> Result<ExitCode, RunError> {
    let mut signals = Signals::new()?;
    let mut node = Node::start(&config, choice).await?;
    tracing::info!(
        id = config.id.0,
        name = config.name,
        role = %config.role,
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    systemd::ready();
    let ended = tokio::select! {
        name = signals.stop() => {
            tracing::info!(signal = name, "stopping: handing over what this node owns");
            None
        }
        ended = node.ended() => Some(ended),
    };
    systemd::stopping();
    tokio::select! {
        () = node.stop() => {}
        () = tokio::time::sleep(STOP_TIMEOUT) => {
            tracing::warn!("the hand-over took more than {} s: leaving without it", STOP_TIMEOUT.as_secs());
        }
        name = signals.stop() => {
            tracing::warn!(signal = name, "told a second time: leaving at once");
            return Ok(ExitCode::FAILURE);
        }
    }
    tracing::info!("stopped");
    match ended {
        None => Ok(ExitCode::SUCCESS),
        Some(error) => Err(error),
    }
}

/// The same questions as `komainu check`; the lane to run.
fn look_first(config: &NodeConfig) -> Result<Option<Choice>, RunError> {
    let report = check::check(config, Asker::Daemon);
    for finding in &report.findings {
        match finding.level {
            Level::Ok => tracing::debug!("{finding}"),
            Level::Warn => tracing::warn!("{finding}"),
            // The process ends with them on its lips.
            Level::Fail => {}
        }
    }
    let failures: Vec<_> = report.failures().cloned().collect();
    if failures.is_empty() { Ok(report.choice) } else { Err(RunError::Unfit(failures)) }
}

/// The usual soft limit of 1024 is for programs that use select(2).
fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        let wanted = hard.min(MAX_DESCRIPTORS).max(soft);
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard)
    });
    if let Err(error) = raised {
        tracing::warn!("the limit of open descriptors can't be raised: {error}");
    }
}

/// Ends the process after a panic anywhere, also in a task, whose panic the runtime would otherwise keep to itself.
fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        tracing::error!("ending the process: {panic}");
        std::process::abort();
    }));
}

/// The signals that a node heeds.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Signals, RunError> {
        let listen = |kind| {
            signal(kind).map_err(|source| RunError::System { doing: "listen for signals".to_owned(), source })
        };
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// The next signal that means stop. Cancel-safe: a signal that is not awaited waits.
    async fn stop(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hangup.recv() => {
                    tracing::info!("SIGHUP: nothing to do: the node file is read at start, the cluster document by `komainu apply`");
                }
            }
        }
    }
}
