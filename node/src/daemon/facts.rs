//! What the node tells of itself, out of what its parts know.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use komainu_cluster::api::{DataPath, SelfHealth};
use komainu_cluster::shell::{ClusterHandle, View};
use komainu_proto::domain::Role;

use crate::datapath::{InstallStatus, LanePath};
use crate::health::schedule::Checker;
use crate::metrics::Snapshot;
use crate::metrics::families::DataPathSnapshot;
use crate::{metrics, planner};

/// Shared by the administration, the metrics page and systemd's line.
pub(super) struct Facts {
    pub(super) cluster: ClusterHandle,
    /// On balancers.
    pub(super) data_path: Option<DataPathFacts>,
    pub(super) self_health: Arc<Mutex<SelfHealth>>,
    pub(super) started: Instant,
}

/// What a balancer has and a witness has not.
pub(super) struct DataPathFacts {
    pub(super) path: Arc<LanePath>,
    pub(super) checker: Arc<Checker>,
    pub(super) install: Arc<Mutex<InstallStatus>>,
}

impl Facts {
    /// What an operator should know beside what the cluster layer says.
    pub(super) fn notices(&self) -> Vec<String> {
        let Some(d) = &self.data_path else { return Vec::new() };
        let mut notices = lock(&d.install).notices();
        let own: Vec<_> = d.path.lane().links().into_iter().flat_map(|l| l.addresses).collect();
        notices.extend(planner::off_segment(&self.cluster.view().borrow().state, &own));
        notices
    }

    /// The line in `systemctl status`.
    pub(super) fn line(view: &View) -> String {
        let name = |id| view.members.iter().find(|m| m.node.id == id).map_or("?", |m| m.node.name.as_str());
        let leader = match view.leader {
            Some(leader) => format!("leader {}", name(leader)),
            None => "no leader".to_owned(),
        };
        if view.node.role == Role::Witness {
            return format!("witness; {leader}");
        }
        let own: Vec<&str> = view
            .state
            .groups
            .iter()
            .filter(|g| g.owner == Some(view.node.id))
            .map(|g| g.config.name.as_str())
            .collect();
        match own.is_empty() {
            true => format!("standby; {leader}"),
            false => format!("owner of {}; {leader}", own.join(", ")),
        }
    }
}

impl metrics::Source for Facts {
    fn snapshot(&self) -> Snapshot {
        let data_path = self.data_path.as_ref().map(|d| DataPathSnapshot {
            lane: d.path.lane().kind().as_str(),
            mode: d.path.lane().mode(),
            counters: d.path.lane().counters(),
            installed_index: d.path.installed_index(),
            refused: lock(&d.install).refused.is_some(),
        });
        Snapshot {
            view: self.cluster.live(),
            fit: self.data_path.is_some() && lock(&self.self_health).fit(),
            data_path,
            checks: self.data_path.as_ref().map(|d| d.checker.statuses()).unwrap_or_default(),
            uptime: self.started.elapsed(),
            version: env!("CARGO_PKG_VERSION"),
        }
    }

    fn unready(&self) -> Vec<String> {
        let view = self.cluster.view();
        let mut reasons = Vec::new();
        if view.borrow().leader.is_none() {
            reasons.push("the cluster has no leader, or this node can't hear it".to_owned());
        }
        if let Some(d) = &self.data_path {
            if d.path.installed_index() == 0 {
                reasons.push("no tables are installed yet".to_owned());
            }
            reasons.extend(lock(&d.install).notices());
        }
        reasons
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("a panic anywhere ends the process")
}
