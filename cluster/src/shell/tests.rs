//! Whole nodes on loopback sockets, with stores on disk.
//!
//! Real threads and a real clock: timing is slow enough for a busy machine, and every wait is for a condition.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use komainu_proto::domain::{
    AdminState, Backend, DeadBackend, Document, Group, GroupId, HealthCheck, Mode, NodeId, Protocol, Role,
    Scheduler, Service, UdpFlows,
};

use super::*;
use crate::api::{DataPath, LeaseUpdate, SelfHealth, SharedDataPath};
use crate::state::{Change, Refusal, State};

/// A lane that installs at once whatever it is told, and remembers its leases.
#[derive(Default)]
struct Lane {
    installed: AtomicU64,
    leases: Mutex<BTreeMap<GroupId, LeaseUpdate>>,
    announced: AtomicU64,
}

impl DataPath for Lane {
    fn set_lease(&self, group: GroupId, lease: LeaseUpdate) {
        self.leases.lock().expect("no panic").insert(group, lease);
    }

    fn announce(&self, _: GroupId) {
        self.announced.fetch_add(1, Ordering::SeqCst);
    }

    fn installed_index(&self) -> u64 {
        self.installed.load(Ordering::SeqCst)
    }
}

impl Lane {
    fn answers(&self) -> bool {
        let now = clock::at();
        self.leases.lock().expect("no panic").values().any(|l| now < l.answer_until)
    }
}

struct Echo;

impl QueryHandler for Echo {
    fn query(&self, from: NodeId, request: Bytes) -> Bytes {
        Bytes::from(format!("{} asked {}", from.0, String::from_utf8_lossy(&request)))
    }
}

struct TestNode {
    handle: ClusterHandle,
    lane: Arc<Lane>,
    installer: tokio::task::JoinHandle<()>,
}

struct Cluster {
    dir: tempfile::TempDir,
    addresses: Vec<SocketAddr>,
    nodes: BTreeMap<u64, TestNode>,
}

const WAIT: Duration = Duration::from_secs(30);

impl Cluster {
    fn new(count: u64) -> Cluster {
        Cluster {
            dir: tempfile::tempdir().expect("a directory"),
            addresses: (0..count).map(|_| free_address()).collect(),
            nodes: BTreeMap::new(),
        }
    }

    fn data_dir(&self, id: u64) -> PathBuf {
        self.dir.path().join(format!("n{id}"))
    }

    /// The last of three or more is a witness.
    fn role(&self, id: u64) -> Role {
        if id >= 3 && id as usize == self.addresses.len() { Role::Witness } else { Role::Balancer }
    }

    fn settings(&self, id: u64) -> Settings {
        let peers = (1..).zip(&self.addresses).filter(|(p, _)| *p != id);
        Settings {
            identity: NodeIdentity {
                id: NodeId(id),
                name: format!("lb{id}"),
                role: self.role(id),
                address: self.addresses[id as usize - 1],
            },
            peers: peers.map(|(p, &address)| Peer { id: NodeId(p), address }).collect(),
            secret: Key::from_bytes([7; 32]),
            data_dir: self.data_dir(id),
            pair: super::PairSettings::none(),
            timing: Timing {
                beat: Duration::from_millis(30),
                lease: Duration::from_millis(250),
                election_min: Duration::from_millis(400),
                election_max: Duration::from_millis(700),
                grace: Duration::from_millis(100),
                ..Timing::default()
            },
            version: "test".to_owned(),
            will: None,
        }
    }

    fn start(&mut self, id: u64) {
        let lane = Arc::new(Lane::default());
        let data_path = (self.role(id) == Role::Balancer).then(|| lane.clone() as SharedDataPath);
        let handle = start(self.settings(id), data_path, Arc::new(Echo)).expect("starts");
        handle.set_self_health(SelfHealth { links_up: true, forwarding: true, ..SelfHealth::default() });
        let mut view = handle.view();
        let (installing, told) = (lane.clone(), handle.clone());
        let installer = tokio::spawn(async move {
            loop {
                let index = view.borrow_and_update().state.index;
                installing.installed.store(index, Ordering::SeqCst);
                told.installed();
                if view.changed().await.is_err() {
                    return;
                }
            }
        });
        self.nodes.insert(id, TestNode { handle, lane, installer });
    }

    fn handle(&self, id: u64) -> &ClusterHandle {
        &self.nodes[&id].handle
    }

    async fn stop(&mut self, id: u64) {
        let node = self.nodes.remove(&id).expect("it runs");
        node.handle.shutdown().await;
        node.installer.abort();
    }

    async fn until(&self, what: &str, condition: impl Fn(&Cluster) -> bool) {
        let deadline = tokio::time::Instant::now() + WAIT;
        while !condition(self) {
            let views: Vec<_> = self.nodes.values().map(|n| n.handle.live()).collect();
            assert!(tokio::time::Instant::now() < deadline, "not within {WAIT:?}: {what}\n{views:#?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn owner(&self) -> Option<u64> {
        let answering: Vec<u64> =
            self.nodes.iter().filter(|(_, n)| n.lane.answers()).map(|(&id, _)| id).collect();
        assert!(answering.len() <= 1, "two owners: {answering:?}");
        answering.first().copied()
    }

    fn state(&self, id: u64) -> Arc<State> {
        self.handle(id).view().borrow().state.clone()
    }
}

fn free_address() -> SocketAddr {
    // A port that is free for TCP and UDP alike.
    loop {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
        let address = tcp.local_addr().expect("bound");
        if std::net::UdpSocket::bind(address).is_ok() {
            return address;
        }
    }
}

fn document(weight: u32) -> Document {
    let vip: IpAddr = "192.0.2.100".parse().expect("an address");
    let group = Group {
        name: "web".to_owned(),
        vips: vec![vip],
        inside_vips: Vec::new(),
        snat: vec!["192.0.2.101".parse().expect("an address")],
        prefer: None,
        preempt: false,
    };
    let backend = Backend {
        name: "be1".to_owned(),
        address: "192.0.2.11".parse().expect("an address"),
        port: 80,
        weight,
        admin: None,
    };
    let service = Service {
        name: "web".to_owned(),
        group: "web".to_owned(),
        vip,
        port: 80,
        protocol: Protocol::Tcp,
        mode: Mode::Nat,
        scheduler: Scheduler::Maglev,
        dead_backend: DeadBackend::Reset,
        udp_flows: UdpFlows::Table,
        tcp_idle_ms: 60_000,
        udp_idle_ms: 60_000,
        health: HealthCheck::default(),
        backends: vec![backend],
    };
    Document { groups: vec![group], services: vec![service] }
}

fn apply(weight: u32) -> Change {
    Change::Apply { document: document(weight), if_revision: None, confirm_within_ms: None }
}

fn weight(state: &State) -> Option<u32> {
    Some(state.service_named("web")?.backend_named("be1")?.config.weight)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_node_needs_no_peers_and_keeps_what_it_agreed_with_itself() {
    let mut cluster = Cluster::new(1);
    cluster.start(1);
    let outcome = cluster.handle(1).propose(apply(3), "admin").await.expect("is accepted");
    assert_eq!(outcome.revision, 1);
    cluster.until("the only node owns the group", |c| c.owner() == Some(1)).await;
    let refused = cluster.handle(1).propose(apply(3000), "admin").await.expect_err("is refused");
    let super::ProposeError::Refused(Refusal::Invalid(problems)) = refused else { panic!("{refused}") };
    assert_eq!(problems[0].path, "service[0] \"web\".backend[0] \"be1\".weight");
    let answer = cluster.handle(1).query(NodeId(1), Bytes::from_static(b"x")).await;
    assert_eq!(answer, Ok(Bytes::from_static(b"1 asked x")));
    cluster.stop(1).await;
    cluster.start(1);
    cluster.until("it is all there", |c| weight(&c.state(1)) == Some(3) && c.owner() == Some(1)).await;
    cluster.stop(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_elect_agree_lose_their_leader_and_come_back_with_everything() {
    let mut cluster = Cluster::new(3);
    for id in 1..=3 {
        cluster.start(id);
    }
    // Any node takes a change, whoever leads.
    for id in 1..=3 {
        cluster.handle(id).propose(apply(id as u32), "admin").await.expect("is accepted");
    }
    cluster.until("everybody has it", |c| (1..=3).all(|id| weight(&c.state(id)) == Some(3))).await;
    cluster.until("a balancer owns the group", |c| c.owner().is_some()).await;
    let all_vote = |c: &Cluster| c.state(1).members.iter().filter(|m| m.voter).count() == 3;
    cluster.until("all three vote", all_vote).await;

    // A question travels sealed to another node and back.
    let answer = cluster.handle(3).query(NodeId(1), Bytes::from_static(b"flows?")).await;
    assert_eq!(answer, Ok(Bytes::from_static(b"3 asked flows?")));

    // An orderly stop hands over.
    let first = cluster.owner().expect("somebody");
    let other = if first == 1 { 2 } else { 1 };
    cluster.stop(first).await;
    cluster.until("the other balancer owns the group", |c| c.owner() == Some(other)).await;
    let drain = Change::BackendAdmin {
        service: "web".to_owned(),
        backend: "be1".to_owned(),
        admin: AdminState::Draining,
        deadline_ms: Some(3_600_000),
    };
    cluster.handle(3).propose(drain, "admin").await.expect("two of three are enough");
    cluster.start(first);
    let draining =
        |s: &State| s.backend_named_in("web", "be1").map(|b| b.admin) == Some(AdminState::Draining);
    cluster.until("the one that was away has caught up", |c| draining(&c.state(first))).await;

    // Everything stops and starts.
    for id in 1..=3 {
        cluster.stop(id).await;
    }
    for id in 1..=3 {
        cluster.start(id);
    }
    cluster.until("the document and the drain are there", |c| (1..=3).all(|id| draining(&c.state(id)))).await;
    cluster.until("somebody owns the group", |c| c.owner().is_some()).await;
    cluster.handle(2).propose(apply(9), "admin").await.expect("is accepted");
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_its_disk_comes_back_as_a_new_member() {
    let mut cluster = Cluster::new(3);
    for id in 1..=3 {
        cluster.start(id);
    }
    cluster.handle(1).propose(apply(1), "admin").await.expect("is accepted");
    let voters = |c: &Cluster, id: u64| {
        c.state(id).members.iter().filter(|m| m.voter).map(|m| m.raft_id).collect::<Vec<_>>()
    };
    cluster.until("all three vote", |c| (1..=3).all(|id| voters(c, id).len() == 3)).await;
    let before = voters(&cluster, 1);
    cluster.stop(2).await;
    let db = cluster.data_dir(2).join("store/log/db");
    std::fs::write(&db, vec![0xa5; 600_000]).expect("writes");
    let called_a_voter =
        |view: &View| view.members.iter().any(|m| m.node.id == NodeId(2) && m.alive && m.voter);
    cluster.until("it is missed", |c| !called_a_voter(&c.handle(1).live())).await;
    cluster.start(2);
    let back = |c: &Cluster| {
        [1, 2].map(|by| c.handle(by).live()).iter().all(|view| {
            let members = &view.state.members;
            let now: Vec<u64> = members.iter().filter(|m| m.voter).map(|m| m.raft_id).collect();
            let back = now.len() == 3 && members.len() == 3 && now != before;
            // Guards against a status that says it votes while the dead place of its former store still counts: whoever then
            // stopped another node had no majority left.
            assert!(back || !called_a_voter(view), "{view:#?}");
            back && called_a_voter(view)
        })
    };
    cluster.until("it votes under a new id", back).await;
    assert_eq!(weight(&cluster.state(2)), Some(1));
    let notes = cluster.handle(2).view().borrow().notes.join("\n");
    assert!(notes.contains("store.bad-1"), "{notes}");
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_in_use_is_named() {
    let mut cluster = Cluster::new(1);
    cluster.start(1);
    let mut settings = cluster.settings(1);
    settings.data_dir = cluster.data_dir(2);
    let error = start(settings, None, Arc::new(Echo)).map(drop).expect_err("is refused").to_string();
    assert!(error.contains(&cluster.addresses[0].to_string()) && error.contains("in use"), "{error}");
    let mut settings = cluster.settings(1);
    settings.identity.address = free_address();
    let error = start(settings, None, Arc::new(Echo)).map(drop).expect_err("is refused").to_string();
    assert!(error.contains("another komainu is using it"), "{error}");
    cluster.stop(1).await;
}

impl State {
    fn backend_named_in(&self, service: &str, backend: &str) -> Option<&crate::state::BackendState> {
        self.services.iter().find(|s| s.config.name == service)?.backend_named(backend)
    }
}
