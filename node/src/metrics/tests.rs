//! The exporter's text, its agreement with the page in `docs/`, and the pages' answers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use komainu_cluster::api::NodeIdentity;
use komainu_cluster::flowsync::PeerStatus;
use komainu_cluster::shell::{LeaseView, MemberView, Quorum, View};
use komainu_cluster::state::{Change, Command, State};
use komainu_cluster::time::Instant;
use komainu_packet::lane::{BackendCounters, Counters};
use komainu_proto::domain::{
    AdminState, Backend, DEFAULT_TCP_IDLE_MS, DEFAULT_UDP_IDLE_MS, DeadBackend, Document, Group, Health,
    HealthCheck, Mode, NodeId, Protocol, Role, Scheduler, Service, UdpFlows,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::families::DataPathSnapshot;
use super::sharing::SharingSnapshot;
use super::*;
use crate::health::schedule::CheckStatus;

fn identity(id: u64, role: Role) -> NodeIdentity {
    NodeIdentity {
        id: NodeId(id),
        name: format!("lb{id}"),
        role,
        address: SocketAddr::from(([192, 0, 2, id as u8], 7800)),
    }
}

fn state() -> State {
    let document = Document {
        groups: vec![Group {
            name: "web".to_owned(),
            vips: vec![[192, 0, 2, 100].into()],
            inside_vips: vec![],
            snat: vec![[192, 0, 2, 101].into()],
            prefer: None,
            preempt: false,
        }],
        services: vec![Service {
            name: "web".to_owned(),
            group: "web".to_owned(),
            vip: [192, 0, 2, 100].into(),
            port: 80,
            protocol: Protocol::Tcp,
            mode: Mode::Nat,
            scheduler: Scheduler::Maglev,
            dead_backend: DeadBackend::Reset,
            udp_flows: UdpFlows::Table,
            tcp_idle_ms: DEFAULT_TCP_IDLE_MS,
            udp_idle_ms: DEFAULT_UDP_IDLE_MS,
            health: HealthCheck::default(),
            backends: vec![Backend {
                name: "be1".to_owned(),
                address: [192, 0, 2, 11].into(),
                port: 80,
                weight: 3,
                admin: Some(AdminState::Draining),
            }],
        }],
    };
    let mut state = State::default();
    let change = Change::Apply { document, if_revision: None, confirm_within_ms: None };
    state.apply(1, &Command::own(0, change)).unwrap();
    state
}

/// A snapshot in which every metric has a value.
fn full() -> Snapshot {
    let state = state();
    let (group, service) = (state.groups[0].id, &state.services[0]);
    let backend = service.backends[0].id;
    let counters = Counters {
        backends: vec![BackendCounters {
            service: service.id.0,
            backend: backend.0,
            packets: 5,
            bytes: 500,
            ..BackendCounters::default()
        }],
        drops: vec![("no_lease", 0), ("no_service", 7)],
        events: vec![("arp_answered", 2)],
        flows: 1,
    };
    let member = |id, role, since: Duration| MemberView {
        node: identity(id, role),
        raft_id: Some(id),
        voter: true,
        alive: true,
        since_beat: Some(since),
        version: String::new(),
        health: None,
    };
    let mut owned = state.clone();
    let mut owned_group = (*owned.groups[0]).clone();
    owned_group.owner = Some(NodeId(1));
    owned.groups[0] = owned_group.into();
    Snapshot {
        view: View {
            state: Arc::new(owned),
            node: identity(1, Role::Balancer),
            raft_id: 1,
            leader: Some(NodeId(1)),
            term: 7,
            voter: true,
            members: vec![
                member(1, Role::Balancer, Duration::ZERO),
                member(2, Role::Witness, Duration::from_millis(4)),
            ],
            leases: vec![LeaseView { group, node: NodeId(1), epoch: 3, left: Duration::from_millis(61) }],
            quorum: Quorum::Witness,
            solo: false,
            standing: komainu_cluster::core::Standing::none("a test"),
            notes: vec![],
            at: Instant(0),
        },
        data_path: Some(DataPathSnapshot {
            lane: "af_packet",
            mode: "ring+vnet_hdr".to_owned(),
            counters,
            installed_index: 1,
            refused: false,
            sharing: Some(SharingSnapshot {
                peers: vec![PeerStatus {
                    node: NodeId(2),
                    heard: true,
                    caught_up: true,
                    lag: Some(3),
                    restarts: 1,
                    resent: 0,
                }],
                datagrams: [("sent", 9), ("received", 8), ("refused", 0)],
                bytes: [("sent", 900), ("received", 800)],
                flows: [("adopted", 7), ("rejected", 0), ("full", 0)],
            }),
        }),
        checks: vec![CheckStatus {
            backend,
            name: "web/be1".to_owned(),
            health: Health::Up,
            reason: "fine".to_owned(),
            passed: 3,
            failed: 1,
            took: Duration::from_millis(2),
            took_total: Duration::from_millis(1500),
        }],
        fit: true,
        uptime: Duration::from_secs(9),
        version: "0.1.0",
    }
}

#[test]
fn values_come_out_where_they_belong() {
    let page = encode(full()).unwrap();
    for line in [
        r#"komainu_backend_packets_total{service="web",backend="be1"} 5"#,
        r#"komainu_backend_bytes_total{service="web",backend="be1"} 500"#,
        r#"komainu_backend_admin{service="web",backend="be1",admin="draining"} 1"#,
        r#"komainu_backend_admin{service="web",backend="be1",admin="enabled"} 0"#,
        r#"komainu_backend_up{service="web",backend="be1"} 0"#,
        r#"komainu_drops_total{reason="no_service"} 7"#,
        r#"komainu_drops_total{reason="no_lease"} 0"#,
        r#"komainu_group_owner{group="web",node="lb1"} 1"#,
        r#"komainu_lease_left_seconds{group="web"} 0.061"#,
        r#"komainu_member_since_beat_seconds{node="lb2"} 0.004"#,
        r#"komainu_checks_total{service="web",backend="be1",result="failed"} 1"#,
        r#"komainu_check_duration_seconds_total{service="web",backend="be1"} 1.5"#,
        "komainu_raft_term 7",
        "# TYPE komainu_backend_packets counter",
        "# EOF",
    ] {
        assert!(page.lines().any(|l| l == line), "{line} is not in\n{page}");
    }
    assert!(!page.contains(r#"komainu_member_alive{node="lb1"}"#), "a node does not watch itself");
}

#[test]
fn a_witness_exports_no_data_path() {
    let page = encode(Snapshot { data_path: None, ..full() }).unwrap();
    for name in ["komainu_drops", "komainu_backend_packets", "komainu_flows", "komainu_installed_index"] {
        assert!(!page.contains(name), "{name}");
    }
    assert!(page.contains("komainu_raft_term 7"));
}

#[test]
fn the_page_and_the_exporter_agree() {
    let exported: BTreeMap<String, BTreeSet<String>> = families::all(&full())
        .iter()
        .map(|f| (f.definition.full_name(), f.definition.labels.iter().map(|l| (*l).to_owned()).collect()))
        .collect();
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md")).unwrap();
    let ticked =
        |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let documented: BTreeMap<String, BTreeSet<String>> = page
        .lines()
        .filter(|l| l.starts_with("| `komainu_"))
        .map(|l| {
            let cells: Vec<&str> = l.split('|').collect();
            (ticked(cells[1]).remove(0), ticked(cells[2]).into_iter().collect())
        })
        .collect();
    assert_eq!(exported, documented, "exporter (left) and docs/metrics.md (right) differ");
    // And every one of them has a value in a full snapshot, so that none is documented and never seen.
    let text = encode(full()).unwrap();
    for name in exported.keys() {
        assert!(text.lines().any(|l| l.starts_with(name.as_str())), "{name} has no value");
    }
}

struct Fixed(Mutex<Vec<String>>);

impl Source for Fixed {
    fn snapshot(&self) -> Snapshot {
        full()
    }

    fn unready(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

async fn get_page(address: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn pages_answer() {
    let source = Arc::new(Fixed(Mutex::new(vec![])));
    let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, source.clone()));
    let metrics = get_page(address, "/metrics").await;
    assert!(metrics.starts_with("HTTP/1.1 200 ") && metrics.contains(OPEN_METRICS), "{metrics}");
    assert!(metrics.contains("komainu_raft_term 7"));
    assert!(get_page(address, "/healthz").await.starts_with("HTTP/1.1 200 "));
    assert!(get_page(address, "/readyz").await.starts_with("HTTP/1.1 200 "));
    source.0.lock().unwrap().push("no leader".to_owned());
    let unready = get_page(address, "/readyz").await;
    assert!(unready.starts_with("HTTP/1.1 503 ") && unready.contains("not ready: no leader"), "{unready}");
    assert!(get_page(address, "/other").await.starts_with("HTTP/1.1 404 "));
}
