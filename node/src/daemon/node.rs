//! The parts of a running node and what flows between them.
//!
//! ```text
//!  state ──▶ installer ──▶ lane            cluster layer ──▶ leases ──▶ lane
//!    │                       │
//!    └─────▶ checker ──▶ observations ──▶ cluster layer ◀── self-health ◀── lane's links
//! ```
//!
//! Tasks, all of them cancel-safe (nothing is held across an await): `follow` (hands each new state to installer and
//! checker), self-health, watchdog, metrics, administration.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use komainu_cluster::api::{NodeIdentity, SelfHealth, SharedDataPath};
use komainu_cluster::core::Peer;
use komainu_cluster::seal::Key;
use komainu_cluster::shell::{self, ClusterHandle, Settings, View};
use komainu_cluster::state::{ServiceState, State};
use komainu_packet::lane::kernel::Choice;
use komainu_packet::lane::{self, SharedLane};
use komainu_packet::time::BootTime;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::facts::{DataPathFacts, Facts};
use super::{RunError, systemd};
use crate::admin::{Context, Followers, Listeners, NodeQueries};
use crate::check::lane_config;
use crate::config::NodeConfig;
use crate::datapath::{InstallStatus, Installer, LanePath};
use crate::executor::Executor;
use crate::health::probe::NetProbe;
use crate::health::schedule::{Checker, Target};
use crate::warm::Warm;
use crate::{metrics, pair, self_health};

/// A running node.
pub(super) struct Node {
    cluster: ClusterHandle,
    data_path: Option<RunningDataPath>,
    /// Told to end the administration.
    stop_admin: watch::Sender<bool>,
    /// The administration; ends by itself after being told, within a bounded time. Absent once it has ended.
    admin: Option<JoinHandle<RunError>>,
    tasks: JoinSet<RunError>,
    /// Tells the others when this process dies.
    executor: Option<Executor>,
}

struct RunningDataPath {
    path: Arc<LanePath>,
    checker: Arc<Checker>,
    installer: Arc<Installer>,
}

impl Node {
    /// Starts everything. `choice`: the lane, as the checks had it.
    ///
    /// # Errors
    /// The first thing that can't be had; what was started before it has ended again.
    pub(super) async fn start(config: &NodeConfig, choice: Option<Choice>) -> Result<Node, RunError> {
        let started = Instant::now();
        let listeners = Listeners::open(config).await?;
        let metrics_listener = match config.metrics {
            Some(address) => Some(metrics::listen(address).await.map_err(|source| RunError::System {
                doing: format!("metrics.listen: {address} can't be listened on"),
                source,
            })?),
            None => None,
        };
        let mut settings = settings(config)?;
        let (lane, lane_reason) = match (choice, lane_config(config)) {
            (Some(choice), Some(settings)) => {
                let (lane, choice) = lane::start_chosen(choice, &settings)?;
                tracing::info!(
                    lane = lane.kind().as_str(),
                    mode = lane.mode(),
                    why = choice.reason,
                    "data path started"
                );
                (Some(lane), choice.reason)
            }
            _ => (None, String::new()),
        };
        let path = lane.as_ref().map(|lane| Arc::new(LanePath::new(lane.clone())));
        let followed = path.clone();
        let followers: Followers = Arc::new(move || {
            followed.as_ref().and_then(|path| path.warm()).map(|warm| warm.peers()).unwrap_or_default()
        });
        let queries = Arc::new(NodeQueries::new(lane.clone(), followers.clone()));
        let (secret, listen) = (settings.secret.clone(), settings.identity.address);
        let executor = executor(config, lane.as_ref());
        settings.will = executor.as_ref().ok().and_then(|e| Some(e.as_ref()?.will()));
        let seam = path.clone().map(|path| path as SharedDataPath);
        let cluster = shell::start(settings, seam, queries.clone())?;
        queries.attach(cluster.clone());
        if let Some(path) = &path {
            // Before the first tables are installed: these wait for what the standby must know first.
            let warm = Warm::start(config.id, listen, &secret, path, cluster.view());
            match warm.map_err(|source| RunError::System {
                doing: "start exchanging flows with the other balancers".to_owned(),
                source,
            })? {
                Some(warm) => path.set_warm(warm),
                None => tracing::info!("flows are exchanged with nobody"),
            }
        }

        let self_health = Arc::new(Mutex::new(SelfHealth::default()));
        let install = Arc::new(Mutex::new(InstallStatus::default()));
        let data_path = match path {
            Some(path) => Some(start_data_path(path, &cluster, install.clone())?),
            None => None,
        };
        let facts = Arc::new(Facts {
            cluster: cluster.clone(),
            data_path: data_path.as_ref().map(|d| DataPathFacts {
                path: d.path.clone(),
                checker: d.checker.clone(),
                install,
            }),
            self_health: self_health.clone(),
            config: config.clone(),
            executor: match &executor {
                Ok(Some(executor)) => Box::new(executor.notices()),
                Ok(None) => Box::new(|| None),
                Err(missing) => {
                    let missing = missing.clone();
                    Box::new(move || Some(missing.clone()))
                }
            },
            started,
        });

        let mut tasks = JoinSet::new();
        let (stop_admin, stopped) = watch::channel(false);
        let noticing = facts.clone();
        let context = Context {
            cluster: cluster.clone(),
            lane,
            lane_reason: lane_reason.into(),
            data_dir: config.data_dir.clone(),
            followers,
            notices: Arc::new(move || noticing.notices()),
        };
        let admin = tokio::spawn(async move {
            match listeners.serve(context, stopped).await {
                Ok(()) => RunError::Ended("the administration"),
                Err(error) => error.into(),
            }
        });
        if let Some(listener) = metrics_listener {
            tasks.spawn(async move {
                let _ = metrics::serve(listener, facts).await;
                RunError::Ended("the metrics page")
            });
        }
        if let Some(d) = &data_path {
            tasks.spawn(watch_self(config, d, cluster.clone(), self_health));
            if pair::is_pair(config) {
                let watched = pair::watch(config.clone(), d.path.lane().clone(), cluster.clone());
                let told = pair::tell(config.data_dir.clone(), cluster.clone());
                tasks.spawn(async move {
                    tokio::join!(watched, told);
                    // With the cluster layer, which says so itself.
                    std::future::pending().await
                });
            }
        }
        tasks.spawn(follow(
            cluster.view(),
            data_path.as_ref().map(|d| (d.installer.clone(), d.checker.clone())),
        ));
        let watched = cluster.clone();
        tasks.spawn(async move {
            systemd::watchdog(watched).await;
            // Nobody asked for it: not an end.
            std::future::pending().await
        });
        let executor = executor.ok().flatten();
        Ok(Node { cluster, data_path, stop_admin, admin: Some(admin), tasks, executor })
    }

    /// Returns when a part has ended by itself. Cancel-safe.
    pub(super) async fn ended(&mut self) -> RunError {
        let admin = async {
            match &mut self.admin {
                Some(admin) => admin.await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            ended = self.tasks.join_next() => ended,
            ended = admin => {
                self.admin = None;
                Some(ended)
            }
        };
        match ended {
            Some(Ok(error)) => error,
            // A task's panic has ended the process; nobody aborts one before `stop`.
            Some(Err(_)) | None => RunError::Ended("a task"),
        }
    }

    /// Hands over, waits until nothing is on its way here any more, ends everything.
    pub(super) async fn stop(&mut self) {
        self.cluster.shutdown().await;
        if let Some(d) = &self.data_path {
            let rest = d.path.forwards_until().since(BootTime::now());
            if !rest.is_zero() {
                tracing::info!("handed over: forwarding what is still under way for {} ms", rest.as_millis());
                tokio::time::sleep(rest).await;
            }
        }
        let _ = self.stop_admin.send(true);
        // Streams end and calls under way are answered; a client that doesn't listen is left after a moment.
        if let Some(admin) = self.admin.take() {
            let _ = admin.await;
        }
        self.tasks.shutdown().await;
        if let Some(d) = self.data_path.take() {
            // Joins threads.
            let _ = tokio::task::spawn_blocking(move || {
                d.checker.set_targets(Vec::new());
                drop(d.installer);
                if let Some(warm) = d.path.warm() {
                    warm.stop();
                }
                d.path.lane().stop();
            })
            .await;
        }
        if let Some(executor) = self.executor.take() {
            // Everything is handed over and ended in order, and the cluster layer has said so. Joins a thread.
            let _ = tokio::task::spawn_blocking(move || executor.dismiss()).await;
        }
    }
}

/// Whoever tells the others when this process dies. There is none where there are no others; why there is none where there should be,
/// for operators.
fn executor(config: &NodeConfig, lane: Option<&SharedLane>) -> Result<Option<Executor>, String> {
    let Some(cluster) = &config.cluster else { return Ok(None) };
    let leases = lane.and_then(|lane| lane.leases());
    Executor::start(cluster.listen.ip(), leases).map(Some).map_err(|error| {
        let missing = format!(
            "no executor ({error}): should this process die, the others wait until its leases have run out"
        );
        tracing::warn!("{missing}");
        missing
    })
}

fn settings(config: &NodeConfig) -> Result<Settings, RunError> {
    // A node that stands alone is reached by nobody, and its sockets need no fixed address.
    let alone = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let address = config.cluster.as_ref().map_or(alone, |c| c.listen);
    let secret = match config.cluster.as_ref().and_then(|c| c.secret_file.as_deref()) {
        Some(file) => Key::load(file)?,
        None => Key::generate()?,
    };
    Ok(Settings {
        identity: NodeIdentity { id: config.id, name: config.name.clone(), role: config.role, address },
        peers: config.peers().iter().map(|p| Peer { id: p.id, address: p.address }).collect(),
        secret,
        data_dir: config.data_dir.clone(),
        timing: config.timing,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pair: pair::settings(config).map_err(|source| RunError::System {
            doing: "listen to the peer on the service network".to_owned(),
            source,
        })?,
        will: None,
    })
}

fn start_data_path(
    path: Arc<LanePath>,
    cluster: &ClusterHandle,
    install: Arc<Mutex<InstallStatus>>,
) -> Result<RunningDataPath, RunError> {
    let told = cluster.clone();
    let installer = Installer::start(
        path.clone(),
        move || told.installed(),
        move |status| {
            for notice in status.notices() {
                tracing::error!("{notice}");
            }
            *install.lock().expect("a panic anywhere ends the process") = status.clone();
        },
    )
    .map_err(|source| RunError::System { doing: "start the installing thread".to_owned(), source })?;
    let observer = cluster.clone();
    let view = cluster.view();
    let report = Arc::new(move |seen: komainu_cluster::api::Observation| {
        let name = match view.borrow().state.backend(seen.backend) {
            Some((service, backend)) => format!("{}/{}", service.config.name, backend.config.name),
            None => seen.backend.0.to_string(),
        };
        tracing::info!(backend = name, health = %seen.health, reason = seen.reason, "check");
        observer.observe(vec![seen]);
    });
    let probe = Arc::new(NetProbe::new());
    let checker = Arc::new(Checker::new(Handle::current(), probe, report, rand::random()));
    Ok(RunningDataPath { path, checker, installer: Arc::new(installer) })
}

/// Keeps telling the cluster layer whether this node is fit, and the checks whether they can mean anything.
fn watch_self(
    config: &NodeConfig,
    data_path: &RunningDataPath,
    cluster: ClusterHandle,
    newest: Arc<Mutex<SelfHealth>>,
) -> impl Future<Output = RunError> + use<> {
    let gateway = config.service.as_ref().and_then(|s| s.gateway);
    let (lane, checker) = (data_path.path.lane().clone(), data_path.checker.clone());
    async move {
        self_health::watch(lane, gateway, |health| {
            match health.fit() {
                true => tracing::info!("fit to own VIP groups"),
                false => tracing::warn!(reason = health.reason, "not fit to own VIP groups"),
            }
            // A gateway that is silent says nothing about backends.
            checker.set_cut_off(!health.links_up || !health.forwarding);
            *newest.lock().expect("a panic anywhere ends the process") = health.clone();
            cluster.set_self_health(health);
        })
        .await;
        RunError::Ended("the watch over this node's fitness")
    }
}

/// Hands every new state to those who live by it, and tells the log and systemd who leads and owns.
async fn follow(
    mut views: watch::Receiver<Arc<View>>,
    to: Option<(Arc<Installer>, Arc<Checker>)>,
) -> RunError {
    let mut line = String::new();
    let mut services: Option<Vec<Arc<ServiceState>>> = None;
    loop {
        let view = views.borrow_and_update().clone();
        if let Some((installer, checker)) = &to {
            installer.submit(view.state.clone());
            // Most changes touch no service: then comparing pointers is all there is to do.
            let unchanged = services.as_ref().is_some_and(|old| {
                old.len() == view.state.services.len()
                    && old.iter().zip(&view.state.services).all(|(a, b)| Arc::ptr_eq(a, b))
            });
            if !unchanged {
                checker.set_targets(targets(&view.state));
                services = Some(view.state.services.clone());
            }
        }
        let now = Facts::line(&view);
        if now != line {
            tracing::info!("{now}");
            systemd::status(&now);
            line = now;
        }
        if views.changed().await.is_err() {
            return RunError::Ended("the cluster layer");
        }
    }
}

/// Whom to ask what: every backend in the document, whatever operators want of it, so that a disabled one shows whether
/// it could come back.
fn targets(state: &State) -> Vec<Target> {
    let all = state.services.iter().flat_map(|s| s.living().map(move |b| (s, b)));
    all.map(|(s, b)| Target {
        backend: b.id,
        name: format!("{}/{}", s.config.name, b.config.name),
        address: SocketAddr::new(b.config.address, s.config.health.port.unwrap_or(b.config.port)),
        check: s.config.health.clone(),
        initial: b.health,
    })
    .collect()
}
