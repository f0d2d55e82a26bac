//! What the node tells of itself, out of what its parts know.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use komainu_cluster::api::{DataPath, SelfHealth};
use komainu_cluster::flowsync::PeerStatus;
use komainu_cluster::shell::{ClusterHandle, MemberView, View};
use komainu_proto::domain::Role;

use crate::config::NodeConfig;
use crate::datapath::{InstallStatus, LanePath};
use crate::health::schedule::Checker;
use crate::metrics::Snapshot;
use crate::metrics::families::DataPathSnapshot;
use crate::metrics::sharing::SharingSnapshot;
use crate::warm::Warm;
use crate::{metrics, pair, planner};

/// Shared by the administration, the metrics page and systemd's line.
pub(super) struct Facts {
    pub(super) cluster: ClusterHandle,
    /// On balancers.
    pub(super) data_path: Option<DataPathFacts>,
    pub(super) self_health: Arc<Mutex<SelfHealth>>,
    pub(super) config: NodeConfig,
    /// What is wrong with the executor.
    pub(super) executor: Box<dyn Fn() -> Option<String> + Send + Sync>,
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
        let view = self.cluster.view().borrow().clone();
        let mut notices: Vec<String> = not_admitted(&view).into_iter().chain((self.executor)()).collect();
        if let Some(d) = &self.data_path {
            notices.extend(lock(&d.install).notices());
            let own: Vec<_> = d.path.lane().links().into_iter().flat_map(|l| l.addresses).collect();
            notices.extend(planner::off_segment(&view.state, &own));
            notices.extend(not_caught_up(&view, d.path.warm().map(Warm::peers).unwrap_or_default()));
            let gateway = pair::gateway(&self.config, Some(d.path.lane()));
            notices.extend(pair::notices(&view, gateway, &pair::kept(&self.config.data_dir)));
        }
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
        match (own.is_empty(), view.leader) {
            (true, _) => format!("standby; {leader}"),
            // Nobody renews the leases: by the time somebody reads this they have ended.
            (false, None) => format!("no leader: no lease for {}", own.join(", ")),
            (false, Some(_)) => format!("owner of {}; {leader}", own.join(", ")),
        }
    }
}

/// Living balancers that don't have this node's flows, where it owns something.
fn not_caught_up(view: &View, peers: Vec<PeerStatus>) -> Vec<String> {
    if view.state.groups.iter().all(|g| g.owner != Some(view.node.id)) {
        return Vec::new();
    }
    let behind = |m: &&MemberView| m.alive && peers.iter().any(|p| p.node == m.node.id && !p.caught_up);
    let behind = view.members.iter().filter(behind);
    let tell = |m: &MemberView| {
        format!(
            "node {} has not caught up with this node's flows: should this node fail now, connections that the tables alone don't decide may break",
            m.node.name
        )
    };
    behind.map(tell).collect()
}

/// A node that runs, hears a cluster, and is none of it.
fn not_admitted(view: &View) -> Option<String> {
    let me = &view.node;
    let waits =
        view.leader.is_some_and(|l| l != me.id) && view.state.members.iter().all(|m| m.node.id != me.id);
    waits.then(|| {
        format!(
            "this node is no member yet: `komainu node join {} {} {} --role {}` on a member admits it",
            me.id.0, me.name, me.address, me.role
        )
    })
}

impl metrics::Source for Facts {
    fn snapshot(&self) -> Snapshot {
        let data_path = self.data_path.as_ref().map(|d| DataPathSnapshot {
            lane: d.path.lane().kind().as_str(),
            mode: d.path.lane().mode(),
            counters: d.path.lane().counters(),
            installed_index: d.path.installed_index(),
            refused: lock(&d.install).refused.is_some(),
            sharing: d.path.warm().map(SharingSnapshot::of),
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

#[cfg(test)]
mod tests {
    use komainu_cluster::api::NodeIdentity;
    use komainu_cluster::shell::Quorum;
    use komainu_cluster::state::{Change, Command, State};
    use komainu_proto::domain::NodeId;

    use super::*;
    use crate::config::document;

    const DOCUMENT: &str = "[[group]]\nname = \"web\"\nvips = [\"192.0.2.100\"]\n";

    /// What node 4 sees of a cluster in which it owns the only group.
    fn view(role: Role, leader: Option<u64>) -> View {
        let document = document::parse("services.toml", DOCUMENT).unwrap().document;
        let mut state = State::default();
        let change = Change::Apply { document, if_revision: None, confirm_within_ms: None };
        state.apply(1, &Command::own(0, change)).unwrap();
        let mut group = (*state.groups[0]).clone();
        group.owner = Some(NodeId(4));
        state.groups[0] = group.into();
        let address = "192.0.2.4:7800".parse().unwrap();
        View {
            state: Arc::new(state),
            node: NodeIdentity { id: NodeId(4), name: "lb4".to_owned(), role, address },
            raft_id: 4,
            leader: leader.map(NodeId),
            term: 1,
            voter: false,
            members: vec![],
            leases: vec![],
            quorum: Quorum::Witness,
            solo: false,
            standing: komainu_cluster::core::Standing::none("a test"),
            notes: vec![],
            at: komainu_cluster::time::Instant(0),
        }
    }

    #[test]
    fn an_owner_without_a_leader_is_not_told_to_own_anything() {
        assert_eq!(Facts::line(&view(Role::Balancer, None)), "no leader: no lease for web");
        assert!(Facts::line(&view(Role::Balancer, Some(1))).starts_with("owner of web; leader"));
        assert_eq!(Facts::line(&view(Role::Witness, None)), "witness; no leader");
    }

    #[test]
    fn an_owner_says_who_lacks_its_flows() {
        let mut view = view(Role::Balancer, Some(4));
        let other = NodeIdentity {
            id: NodeId(5),
            name: "lb5".to_owned(),
            role: Role::Balancer,
            address: "192.0.2.5:7800".parse().unwrap(),
        };
        view.members.push(MemberView {
            node: other,
            raft_id: Some(5),
            voter: true,
            alive: true,
            since_beat: None,
            version: String::new(),
            health: None,
        });
        let peer = |caught_up| PeerStatus {
            node: NodeId(5),
            heard: true,
            caught_up,
            lag: caught_up.then_some(0),
            restarts: 1,
            resent: 0,
        };
        assert!(not_caught_up(&view, vec![peer(true)]).is_empty());
        assert!(not_caught_up(&view, vec![peer(false)])[0].starts_with("node lb5 has not caught up"));
        // A dead one is told of anyway, and whoever owns nothing sends nothing.
        view.members[0].alive = false;
        assert!(not_caught_up(&view, vec![peer(false)]).is_empty());
        view.members[0].alive = true;
        view.node.id = NodeId(9);
        assert!(not_caught_up(&view, vec![peer(false)]).is_empty());
    }

    #[test]
    fn a_node_that_is_no_member_says_how_it_becomes_one() {
        let told = not_admitted(&view(Role::Balancer, Some(1))).unwrap();
        assert!(told.contains("komainu node join 4 lb4 192.0.2.4:7800 --role balancer"), "{told}");
        // It may yet be the cluster's founder.
        assert_eq!(not_admitted(&view(Role::Balancer, None)), None);
        assert_eq!(not_admitted(&view(Role::Balancer, Some(4))), None);
    }
}
