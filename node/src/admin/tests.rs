//! The API over its real sockets, with real cluster layers on loopback and a data path that only pretends.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use komainu_cluster::api::{DataPath, LeaseUpdate, NodeIdentity, SelfHealth, SharedDataPath};
use komainu_cluster::core::Peer;
use komainu_cluster::seal::Key;
use komainu_cluster::shell::{self, Settings};
use komainu_cluster::timing::Timing;
use komainu_packet::lane::{self, Counters, FlowFilter, FlowInfo, Lane, LaneError, LaneKind, LinkInfo};
use komainu_packet::lease::Lease;
use komainu_packet::plan::{Plan, Protocol};
use komainu_proto::admin::admin_client::AdminClient;
use komainu_proto::admin::*;
use komainu_proto::domain::{GroupId, NodeId, Role};
use komainu_proto::refusal;
use tokio::sync::watch;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};

use super::*;
use crate::config::NodeConfig;
use crate::config::document;

/// Longest wait for anything that comes to pass.
const WAIT: Duration = Duration::from_secs(30);

/// A data path that has seen some traffic for the first backend of the first service.
struct Pretended {
    packets: u64,
}

impl Lane for Pretended {
    fn kind(&self) -> LaneKind {
        LaneKind::AfPacket
    }
    fn mode(&self) -> String {
        "pretended".to_owned()
    }
    fn install(&self, _: Plan) -> Result<(), LaneError> {
        Ok(())
    }
    fn installed_revision(&self) -> u64 {
        u64::MAX
    }
    fn set_lease(&self, _: u32, _: Lease) {}
    fn announce(&self, _: u32) {}
    fn counters(&self) -> Counters {
        let (packets, active, flows) = (self.packets, 3, 2);
        let one =
            lane::BackendCounters { service: 1, backend: 1, packets, active, flows, ..Default::default() };
        Counters {
            backends: vec![one],
            drops: vec![("no_lease", 5)],
            events: vec![("arp_answered", 7)],
            flows: 2,
        }
    }
    fn flows(&self, filter: &FlowFilter, limit: usize) -> Vec<FlowInfo> {
        let one = FlowInfo {
            service: 1,
            backend: 1,
            protocol: Protocol::Tcp,
            client: "198.51.100.7:40000".parse().unwrap(),
            snat: None,
            state: "established",
            idle: Duration::from_millis(1500),
        };
        let other = FlowInfo { backend: 2, ..one.clone() };
        let all = [one, other].into_iter();
        all.filter(|f| filter.backend.is_none_or(|b| b == f.backend)).take(limit).collect()
    }
    fn trace(&self, service: u32, client: SocketAddr) -> Option<lane::Trace> {
        (service == 1).then(|| lane::Trace {
            existing: Some(1),
            new: Some(2),
            slot: Some(17),
            remembered: false,
            reason: format!("slot of {client}"),
        })
    }
    fn links(&self) -> Vec<LinkInfo> {
        let addresses = vec![("192.0.2.1".parse().unwrap(), 24)];
        vec![LinkInfo { name: "eth0".to_owned(), up: true, mac: None, addresses }]
    }
    fn stop(&self) {}
}

impl DataPath for Pretended {
    fn set_lease(&self, _: GroupId, _: LeaseUpdate) {}
    fn announce(&self, _: GroupId) {}
    fn installed_index(&self) -> u64 {
        u64::MAX
    }
}

struct Node {
    socket: PathBuf,
    cluster: ClusterHandle,
    stop: watch::Sender<bool>,
    serving: tokio::task::JoinHandle<Result<(), ServeError>>,
}

struct World {
    dir: tempfile::TempDir,
    addresses: Vec<SocketAddr>,
}

fn free_address() -> SocketAddr {
    // Both protocols have to be free; the kernel hands out the ports in no fixed order, so a clash is unlikely.
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl World {
    fn new(nodes: usize) -> World {
        World { dir: tempfile::tempdir().unwrap(), addresses: (0..nodes).map(|_| free_address()).collect() }
    }

    /// Starts node `lb{id}`; with a data path unless it is the third.
    async fn start(&self, id: u64, more: &str) -> Node {
        let role = if id == 3 { Role::Witness } else { Role::Balancer };
        let service = if id == 3 { "" } else { "[service]\ninterface = \"eth0\"\n" };
        let dir = self.dir.path().join(format!("lb{id}"));
        let text = format!(
            "id = {id}\nname = \"lb{id}\"\nrole = \"{role}\"\nrun_dir = \"{}\"\n{service}{more}",
            dir.display()
        );
        let config: NodeConfig = text.parse().unwrap();
        let own = self.addresses[id as usize - 1];
        let peers = (1..).map(NodeId).zip(&self.addresses).filter(|(peer, _)| peer.0 != id);
        let settings = Settings {
            identity: NodeIdentity { id: NodeId(id), name: config.name.clone(), role, address: own },
            peers: peers.map(|(id, &address)| Peer { id, address }).collect(),
            secret: Key::from_bytes([7; 32]),
            data_dir: dir.join("data"),
            // A machine that builds at the same time keeps threads waiting.
            timing: Timing {
                beat: Duration::from_millis(30),
                lease: Duration::from_millis(250),
                election_min: Duration::from_millis(400),
                election_max: Duration::from_millis(700),
                ..Timing::default()
            },
            version: "test".to_owned(),
            pair: shell::PairSettings::none(),
            will: None,
        };
        let lane = (role == Role::Balancer).then(|| Arc::new(Pretended { packets: 100 * id }));
        let queries =
            Arc::new(NodeQueries::new(lane.clone().map(|lane| lane as SharedLane), Arc::new(Vec::new)));
        let path = lane.clone().map(|lane| lane as SharedDataPath);
        let cluster = shell::start(settings, path, queries.clone()).unwrap();
        queries.attach(cluster.clone());
        cluster.set_self_health(SelfHealth { links_up: true, forwarding: true, ..Default::default() });
        let context = Context {
            cluster: cluster.clone(),
            lane: lane.map(|lane| lane as SharedLane),
            lane_reason: "as the test says".into(),
            data_dir: dir.clone(),
            followers: Arc::new(Vec::new),
            notices: Arc::new(|| vec!["a notice".to_owned()]),
        };
        let listeners = Listeners::open(&config).await.unwrap();
        let (stop, stopped) = watch::channel(false);
        let serving = tokio::spawn(listeners.serve(context, stopped));
        Node { socket: config.socket(), cluster, stop, serving }
    }
}

impl Node {
    async fn channel(&self) -> Channel {
        let url = format!("unix:{}", self.socket.display());
        Endpoint::from_shared(url).unwrap().connect().await.unwrap()
    }

    async fn client(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel().await)
    }

    /// Polls the status until it pleases.
    async fn until(&self, what: &str, pleases: impl Fn(&StatusResponse) -> bool) -> StatusResponse {
        let mut client = self.client().await;
        let deadline = tokio::time::Instant::now() + WAIT;
        loop {
            let status = client.status(StatusRequest::default()).await.unwrap().into_inner();
            if pleases(&status) {
                return status;
            }
            assert!(tokio::time::Instant::now() < deadline, "{what}: {status:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn stop(self) {
        self.cluster.shutdown().await;
        self.stop.send(true).unwrap();
        self.serving.await.unwrap().unwrap();
        assert!(!self.socket.exists());
    }
}

const DOCUMENT: &str = r#"
[[group]]
name = "web"
vips = ["192.0.2.100"]
snat = ["192.0.2.101"]
[[service]]
name = "web"
group = "web"
vip = "192.0.2.100"
port = 80
mode = "nat"
health = { type = "none" }
[[service.backend]]
name = "be1"
address = "192.0.2.11"
port = 8080
[[service.backend]]
name = "be2"
address = "192.0.2.12"
port = 8080
"#;

fn apply(text: &str) -> ApplyRequest {
    let document = document::parse("test", text).unwrap().document;
    ApplyRequest { document: Some(Document::from(&document)), ..Default::default() }
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, words: &[&str]) -> Status {
    let status = answer.expect_err("refused");
    assert_eq!(status.code(), code, "{status}");
    for word in words {
        assert!(status.message().contains(word), "{word}: {}", status.message());
    }
    status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_is_changed_through_the_api_and_every_refusal_changes_nothing() {
    let world = World::new(1);
    let node = world.start(1, "").await;
    let mut client = node.client().await;
    node.until("leads", |s| s.cluster.as_ref().unwrap().leader == Some(1)).await;

    // A dry run says what would change and changes nothing.
    let dry = client.apply(ApplyRequest { dry_run: true, ..apply(DOCUMENT) }).await.unwrap().into_inner();
    assert!(!dry.applied && dry.revision == 0 && !dry.diff.is_empty(), "{dry:?}");
    let change = client.apply(apply(DOCUMENT)).await.unwrap().into_inner();
    assert!(change.applied && change.revision == 1, "{change:?}");
    assert_eq!(change.diff, dry.diff);
    // The same again is no change.
    let again = client.apply(apply(DOCUMENT)).await.unwrap().into_inner();
    assert!(!again.applied && again.revision == 1 && again.diff.is_empty(), "{again:?}");

    // Everything that is wrong is told with its field.
    let wrong = DOCUMENT.replace("group = \"web\"", "group = \"wbe\"").replace("192.0.2.12", "2001:db8::1");
    let status = refused(client.apply(apply(&wrong)).await, Code::InvalidArgument, &["service[0]"]);
    let problems = refusal::problems(&status);
    assert!(problems.iter().any(|p| p.field.ends_with(".group") && !p.action.is_empty()), "{problems:?}");
    assert!(problems.iter().any(|p| p.field.ends_with(".address")), "{problems:?}");
    // What only this node knows: its segments.
    let off_segment = DOCUMENT
        .replace("mode = \"nat\"", "mode = \"dsr\"")
        .replace("port = 8080", "port = 80")
        .replace("192.0.2.12", "203.0.113.12");
    refused(client.apply(apply(&off_segment)).await, Code::InvalidArgument, &["203.0.113.12"]);
    let stale = ApplyRequest { if_revision: Some(7), ..apply("group = []") };
    refused(client.apply(stale.clone()).await, Code::FailedPrecondition, &["7", "1"]);
    refused(client.apply(ApplyRequest { dry_run: true, ..stale }).await, Code::FailedPrecondition, &["7"]);
    refused(client.apply(ApplyRequest::default()).await, Code::InvalidArgument, &["document"]);
    assert_eq!(client.export(ExportRequest::default()).await.unwrap().into_inner().revision, 1);

    // Small verbs edit the same document.
    let backend =
        Backend { name: "be3".into(), address: "192.0.2.13".into(), port: 8080, ..Default::default() };
    let add = BackendAddRequest { service: "web".into(), backend: Some(backend) };
    assert_eq!(client.backend_add(add.clone()).await.unwrap().into_inner().revision, 2);
    refused(client.backend_add(add).await, Code::AlreadyExists, &["be3"]);
    let weight = |backend: &str, weight| BackendSetWeightRequest {
        service: "web".into(),
        backend: backend.into(),
        weight,
    };
    assert!(client.backend_set_weight(weight("be3", 0)).await.unwrap().into_inner().applied);
    refused(client.backend_set_weight(weight("be9", 1)).await, Code::NotFound, &["be9", "be3"]);
    refused(client.backend_set_weight(weight("be3", 1001)).await, Code::InvalidArgument, &["1001"]);
    let drain = BackendSetAdminRequest {
        service: "web".into(),
        backend: "be1".into(),
        admin: AdminState::Draining as i32,
        drain_deadline_ms: Some(60_000),
    };
    assert!(client.backend_set_admin(drain).await.unwrap().into_inner().applied);
    let status =
        node.until("drains", |s| s.services[0].backends[0].admin == AdminState::Draining as i32).await;
    let left = status.services[0].backends[0].drain_left_ms.unwrap();
    assert!((1..=60_000).contains(&left), "{left}");
    assert_eq!(status.services[0].backends[2].weight, 0);

    // What is exported applies again and changes nothing.
    let exported = client.export(ExportRequest::default()).await.unwrap().into_inner();
    let request = ApplyRequest { document: exported.document, ..Default::default() };
    assert!(!client.apply(request).await.unwrap().into_inner().applied);

    // Confirmed or rolled back.
    let request = ApplyRequest { confirm_within_ms: Some(60_000), ..apply("group = []") };
    let change = client.apply(request.clone()).await.unwrap().into_inner();
    assert_eq!(change.confirm_within_ms, Some(60_000));
    let status = node.until("waits", |s| s.cluster.as_ref().unwrap().pending_confirm.is_some()).await;
    let pending = status.cluster.unwrap().pending_confirm.unwrap();
    assert_eq!((pending.revision, pending.rollback_to), (4, 3));
    refused(client.apply(apply(DOCUMENT)).await, Code::FailedPrecondition, &["confirm"]);
    assert!(client.rollback(RollbackRequest::default()).await.unwrap().into_inner().applied);
    refused(client.confirm(ConfirmRequest::default()).await, Code::FailedPrecondition, &["nothing waits"]);
    assert_eq!(node.until("is back", |s| s.services.len() == 1).await.services[0].backends.len(), 3);

    // History knows who; older revisions come back as new ones.
    let history = client.history(HistoryRequest {}).await.unwrap().into_inner().entries;
    assert!(history[0].revision > history[1].revision);
    assert!(
        history.iter().any(|e| e.what == "apply" && e.who.starts_with("uid ") && e.who.ends_with(" on lb1"))
    );
    let restore = RestoreRequest { revision: 1, ..Default::default() };
    let dry = client.restore(RestoreRequest { dry_run: true, ..restore }).await.unwrap().into_inner();
    assert!(!dry.applied && !dry.diff.is_empty());
    refused(
        client.restore(RestoreRequest { if_revision: Some(1), ..restore }).await,
        Code::FailedPrecondition,
        &["1"],
    );
    assert!(client.restore(restore).await.unwrap().into_inner().applied);
    refused(client.restore(RestoreRequest { revision: 99, ..restore }).await, Code::NotFound, &["99"]);
    assert_eq!(node.until("restored", |s| s.services[0].backends.len() == 2).await.services.len(), 1);
    refused(
        client.node_force(NodeForceRequest { confirmed: true }).await,
        Code::FailedPrecondition,
        &["decides alone already"],
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_answers_for_the_owner_and_for_the_cluster() {
    let world = World::new(3);
    let (one, two, witness) = tokio::join!(world.start(1, ""), world.start(2, ""), world.start(3, ""));
    // The founder admits the others one by one: until then the cluster is a pair, or a single node.
    witness.until("is whole", |s| s.cluster.as_ref().unwrap().quorum == "witness").await;
    // A write through the witness, wherever the leader is.
    let mut client = witness.client().await;
    assert!(client.apply(apply(DOCUMENT)).await.unwrap().into_inner().applied);
    let owned =
        |s: &StatusResponse| s.groups.first().is_some_and(|g| g.owner.is_some() && g.lease_left_ms > 0);
    let status = witness.until("is owned", owned).await;
    let owner = status.groups[0].owner.clone().unwrap();
    let packets = |owner: &str| if owner == "lb1" { 100 } else { 200 };
    assert_eq!(status.cluster.as_ref().unwrap().quorum, "witness");
    assert!(status.node.as_ref().unwrap().lane.is_empty());
    assert!(status.services[0].counters_known);
    assert_eq!(status.services[0].backends[0].packets, packets(&owner));
    assert_eq!(status.services[0].backends[0].flows, 3);
    // These nodes send their flows to nobody, so the standby lacks what the owner remembers.
    assert_eq!(status.groups[0].standby_lag_flows, 2);
    assert!(status.notices.contains(&"a notice".to_owned()));

    let flows = |request: FlowsRequest| {
        let mut client = client.clone();
        async move {
            let mut stream = client.flows(request).await?.into_inner();
            let mut flows = Vec::new();
            while let Some(flow) = stream.message().await? {
                flows.push(flow);
            }
            Ok::<_, Status>(flows)
        }
    };
    let all = flows(FlowsRequest::default()).await.unwrap();
    assert_eq!(all.len(), 2);
    assert_eq!((all[0].service.as_str(), all[0].backend.as_str(), &all[0].node), ("web", "be1", &owner));
    let second = FlowsRequest { service: Some("web".into()), backend: Some("be2".into()), limit: Some(10) };
    assert_eq!(flows(second).await.unwrap()[0].backend, "be2");
    let wrong = FlowsRequest { service: Some("wbe".into()), ..Default::default() };
    refused(flows(wrong).await, Code::NotFound, &["wbe", "web"]);
    refused(
        flows(FlowsRequest { limit: Some(0), ..Default::default() }).await,
        Code::InvalidArgument,
        &["limit"],
    );

    let mut asked = client.clone();
    let trace = TraceRequest { service: "web".into(), from: "198.51.100.7:40000".into() };
    let answer = asked.trace(trace.clone()).await.unwrap().into_inner();
    assert_eq!(
        (answer.existing.as_deref(), answer.new.as_deref(), answer.slot),
        (Some("be1"), Some("be2"), Some(17))
    );
    assert_eq!(answer.node, owner);
    let v6 = TraceRequest { from: "[2001:db8::7]:1".into(), ..trace.clone() };
    refused(asked.trace(v6).await, Code::InvalidArgument, &["family"]);
    refused(asked.trace(TraceRequest { from: "x".into(), ..trace }).await, Code::InvalidArgument, &["from"]);

    // A switchover asked of the witness; events follow it.
    let request = EventsRequest { follow: true, after: 0 };
    let mut events = two.client().await.events(request).await.unwrap().into_inner();
    let to_witness = SwitchoverRequest { group: "web".into(), to: Some("lb3".into()) };
    refused(client.switchover(to_witness).await, Code::FailedPrecondition, &["witness"]);
    let wish = SwitchoverRequest { group: "web".into(), to: None };
    let before = client.switchover(wish).await.unwrap().into_inner();
    assert!(before.pending);
    let moved = |s: &StatusResponse| s.groups[0].epoch > before.epoch && owned(s);
    let status = witness.until("has moved", moved).await;
    let new_owner = status.groups[0].owner.clone().unwrap();
    assert_ne!(new_owner, owner);
    assert_eq!(status.services[0].backends[0].packets, packets(&new_owner));
    let told = tokio::time::timeout(WAIT, async {
        loop {
            let event = events.message().await.unwrap().expect("follows");
            if event.kind == "owner" && event.text.contains(&new_owner) {
                break event;
            }
        }
    });
    assert_eq!(told.await.unwrap().subject, "web");

    // Stopping ends streams.
    let list = client.node_list(NodeListRequest {}).await.unwrap().into_inner().members;
    assert_eq!(list.iter().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["lb1", "lb2", "lb3"]);
    for node in [two, one, witness] {
        node.stop().await;
    }
    let rest = async { while let Ok(Some(_)) = events.message().await {} };
    tokio::time::timeout(WAIT, rest).await.expect("the stream ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_cannot_come_true_is_refused_at_once() {
    let world = World::new(1);
    let node = world.start(1, "").await;
    let mut client = node.client().await;
    node.until("leads", |s| s.cluster.as_ref().unwrap().leader == Some(1)).await;
    let join = |id, name: &str, address: &str| NodeJoinRequest {
        id,
        name: name.to_owned(),
        role: Role::Balancer.to_wire(),
        address: address.to_owned(),
    };
    let (elsewhere, here) = ("192.0.2.9:7800", world.addresses[0].to_string());
    let argument = Code::InvalidArgument;
    let impossible = Code::FailedPrecondition;
    for (request, code, words) in [
        (join(4, "a b", elsewhere), argument, ["name", "a b"]),
        (join(4, "lb4", "0.0.0.0:7800"), argument, ["address", "0.0.0.0:7800"]),
        (join(4, "lb4", "192.0.2.9:0"), argument, ["address", "192.0.2.9:0"]),
        (join(1, "lb4", elsewhere), impossible, ["node 1", "a member already"]),
        (join(4, "lb1", elsewhere), impossible, ["node 1", "another name"]),
        (join(4, "lb4", &here), impossible, ["node 1", &here]),
    ] {
        refused(client.node_join(request).await, code, &words);
    }
    // Repeated after a lost answer.
    client.node_join(join(1, "lb1", &here)).await.unwrap();
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_reflection_are_served() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };

    let world = World::new(1);
    let node = world.start(1, "").await;
    let mut health = HealthClient::new(node.channel().await);
    for service in ["", "komainu.admin.v1.Admin"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        assert_eq!(health.check(request).await.unwrap().into_inner().status, 1, "{service}");
    }
    let mut reflection = ServerReflectionClient::new(node.channel().await);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers =
        reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list")
    };
    let names: Vec<&str> = list.service.iter().map(|s| s.name.as_str()).collect();
    assert!(
        names.contains(&"komainu.admin.v1.Admin") && names.contains(&"grpc.health.v1.Health"),
        "{names:?}"
    );
    node.stop().await;
}

/// A certificate authority for tests.
struct Authority {
    certificate: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Authority { certificate, issuer: rcgen::Issuer::new(params, key) }
    }

    /// Certificate and key, PEM.
    fn issue(&self, name: &str) -> (String, String) {
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn remote_administration_is_for_known_certificates_only() {
    let world = World::new(1);
    let (ours, theirs) = (Authority::new(), Authority::new());
    let file = |name: &str, text: &str| {
        let path = world.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (cert, key) = ours.issue("lb1");
    let address = free_address();
    let admin = format!(
        "[admin]\nlisten = \"{address}\"\ncert_file = {:?}\nkey_file = {:?}\nclient_ca_file = {:?}\n",
        file("cert.pem", &cert),
        file("key.pem", &key),
        file("ca.pem", &ours.certificate.pem()),
    );
    let node = world.start(1, &admin).await;
    node.until("leads", |s| s.cluster.as_ref().unwrap().leader == Some(1)).await;

    let connect = async |identity: Option<(String, String)>| {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ours.certificate.pem()));
        if let Some((cert, key)) = identity {
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        let url = format!("https://localhost:{}", address.port());
        let channel = Endpoint::from_shared(url).unwrap().tls_config(tls).unwrap().connect().await;
        // TLS 1.3 tells a client that it was refused only when it reads (RFC 8446 §4.4.2.4).
        match channel {
            Ok(channel) => AdminClient::new(channel).apply(apply(DOCUMENT)).await.map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        }
    };
    connect(None).await.expect_err("a client without a certificate");
    connect(Some(theirs.issue("mallory"))).await.expect_err("a certificate of somebody else's");
    assert!(connect(Some(ours.issue("alice"))).await.unwrap().into_inner().applied);
    let history = node.client().await.history(HistoryRequest {}).await.unwrap().into_inner().entries;
    assert_eq!(history[0].who, "cn alice");
    node.stop().await;
}

#[tokio::test]
async fn what_is_wrong_with_the_remote_listener_is_said_at_start() {
    let world = World::new(1);
    let ours = Authority::new();
    let ((cert, key), (_, other_key)) = (ours.issue("lb1"), ours.issue("lb2"));
    let file = |name: &str, text: &str| {
        let path = world.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let open = async |key: &str, address: SocketAddr| {
        let text = format!(
            "id = 1\nname = \"w\"\nrole = \"witness\"\nrun_dir = {:?}\n[admin]\nlisten = \"{address}\"\ncert_file = {:?}\nkey_file = {:?}\nclient_ca_file = {:?}\n",
            world.dir.path(),
            file("cert.pem", &cert),
            file("key.pem", key),
            file("ca.pem", &ours.certificate.pem()),
        );
        Listeners::open(&text.parse().unwrap()).await.err().expect("refused").to_string()
    };
    let error = open(&other_key, free_address()).await;
    assert!(error.contains("cert_file, key_file"), "{error}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let error = open(&key, taken.local_addr().unwrap()).await;
    assert!(error.contains("admin.listen") && error.contains("free?"), "{error}");
}
