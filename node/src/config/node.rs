//! The node file: what only this machine knows.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use komainu_cluster::seal::Key;
use komainu_cluster::timing::{Profile, Timing};
use komainu_proto::domain::{NodeId, Role};
use komainu_proto::words;

use super::files;
use super::mistake::ConfigError;
use super::reader::{Section, Source, Word};

/// Where the node file is looked for when nobody names one.
pub const DEFAULT_FILE: &str = "/etc/komainu/node.toml";
/// `data_dir` when the file names none.
const DEFAULT_DATA_DIR: &str = "/var/lib/komainu";
/// `run_dir` when the file names none.
pub const DEFAULT_RUN_DIR: &str = "/run/komainu";
/// Name of the admin socket in `run_dir`.
pub const SOCKET_NAME: &str = "admin.sock";
/// Highest node id: the Raft id keeps the rest of its bits for the incarnation.
const MAX_NODE_ID: u64 = 65535;
/// Longest node name in bytes, as in DNS labels (RFC 1035 §2.3.4): it travels on beats.
const MAX_NAME_LEN: usize = 63;
/// Longest interface name in bytes: IFNAMSIZ − 1 (if_nametoindex(3)).
const MAX_INTERFACE_LEN: usize = 15;

words! {
    /// Which lane the operator wants.
    LaneChoice, "lane" {
        /// Whatever serves this machine best.
        Auto = "auto",
        /// eBPF at the driver.
        Xdp = "xdp",
        /// eBPF at the traffic-control hook.
        Tc = "tc",
        /// Packet sockets, in user space.
        AfPacket = "af_packet",
    }
}

words! {
    /// What a pair without a witness promises when the two lose each other.
    Pair, "pair" {
        /// The survivor goes on alone.
        Availability = "availability",
        /// The survivor waits for an operator.
        Safety = "safety",
    }
}

words! {
    /// Form of the log lines.
    LogFormat, "format" {
        /// For people.
        Human = "human",
        /// One JSON object a line.
        Json = "json",
    }
}

/// The node file with every default filled in, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeConfig {
    /// Where it was read from.
    pub file: PathBuf,
    /// Number, unique in the cluster.
    pub id: NodeId,
    /// Name, unique in the cluster.
    pub name: String,
    /// Role.
    pub role: Role,
    /// Directory of the store.
    pub data_dir: PathBuf,
    /// Directory of the admin socket.
    pub run_dir: PathBuf,
    /// The network that the VIPs are on. Present exactly on balancers.
    pub service: Option<ServiceNetwork>,
    /// Interface of the second network.
    pub inside_interface: Option<String>,
    /// The other nodes and how to reach them; absent on a node that stands alone.
    pub cluster: Option<ClusterNetwork>,
    /// Beat, lease and election.
    pub timing: Timing,
    /// Remote administration.
    pub admin: Option<RemoteAdmin>,
    /// Address of metrics and health pages.
    pub metrics: Option<SocketAddr>,
    /// Logging.
    pub log: Log,
}

/// The network that the VIPs are on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceNetwork {
    /// Interface.
    pub interface: String,
    /// Lane.
    pub lane: LaneChoice,
    /// Gateway whose answer is part of this node's fitness.
    pub gateway: Option<IpAddr>,
}

/// The other nodes and how to reach them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterNetwork {
    /// This node's address for peer gRPC (TCP) and beats (UDP).
    pub listen: SocketAddr,
    /// Promise of a pair without a witness.
    pub pair: Pair,
    /// File of the secret that seals what nodes say to each other. Present whenever there are peers.
    pub secret_file: Option<PathBuf>,
    /// Every other node.
    pub peers: Vec<Peer>,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its number.
    pub id: NodeId,
    /// Its address for peer gRPC and beats.
    pub address: SocketAddr,
}

/// Remote administration over mutual TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteAdmin {
    /// Address.
    pub listen: SocketAddr,
    /// Certificate chain, PEM.
    pub cert_file: PathBuf,
    /// Private key, PEM.
    pub key_file: PathBuf,
    /// Certificates that client certificates must descend from, PEM.
    pub client_ca_file: PathBuf,
}

/// Logging.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// Form.
    pub format: LogFormat,
    /// What is logged, as a `tracing` filter, e.g. `info` or `info,komainu_cluster=debug`.
    pub filter: String,
}

impl NodeConfig {
    /// Reads and checks the file at `path` and the files that it names.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let file = path.display().to_string();
        let text = files::read_text(path).map_err(|error| ConfigError::unreadable(&file, &error))?;
        Self::read(&file, &text, true)
    }

    /// Checks `text` without looking at any file that it names.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfigError> {
        Self::read(file, text, false)
    }

    /// The admin socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join(SOCKET_NAME)
    }

    /// Every other node; none when this one stands alone.
    pub fn peers(&self) -> &[Peer] {
        self.cluster.as_ref().map_or(&[], |cluster| &cluster.peers)
    }

    fn read(file: &str, text: &str, look_at_files: bool) -> Result<Self, ConfigError> {
        let read = Source::new(file, text).read(|root| {
            let id = node_id(root, "id");
            let name = node_name(root);
            let role =
                root.required::<Word<Role>>("role", "add role = \"balancer\" or \"witness\"").map(|w| w.0);
            let data_dir = root.or("data_dir", PathBuf::from(DEFAULT_DATA_DIR));
            let run_dir = root.or("run_dir", PathBuf::from(DEFAULT_RUN_DIR));
            let service = service(root, role);
            let inside_interface = inside(root, role, service.as_ref());
            let cluster = cluster(root, id, look_at_files);
            let timing = timing(root);
            let admin = admin(root, look_at_files);
            let metrics = metrics(root);
            let log = log(root);
            one_listener_each(root, cluster.as_ref(), admin.as_ref(), metrics);
            Some(NodeConfig {
                file: PathBuf::from(file),
                id: id?,
                name: name?,
                role: role?,
                data_dir: data_dir?,
                run_dir: run_dir?,
                service,
                inside_interface,
                cluster,
                timing: timing?,
                admin,
                metrics,
                log: log?,
            })
        })?;
        Ok(read.value)
    }
}

fn node_id(section: &mut Section<'_>, key: &'static str) -> Option<NodeId> {
    let id: u64 = section.required(key, "add id = N, unique in the cluster")?;
    if (1..=MAX_NODE_ID).contains(&id) {
        Some(NodeId(id))
    } else {
        section.wrong(key, "is not a node id", format!("give 1..={MAX_NODE_ID}"));
        None
    }
}

/// Whether a node may have this name.
pub fn is_node_name(name: &str) -> bool {
    (1..=MAX_NAME_LEN).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn node_name(root: &mut Section<'_>) -> Option<String> {
    let name: String = root.required("name", "add name = \"…\", unique in the cluster")?;
    let fits = is_node_name(&name);
    if !fits {
        root.wrong(
            "name",
            "is not a node name",
            format!("use 1 to {MAX_NAME_LEN} letters, digits, '-', '_' or '.'"),
        );
    }
    fits.then_some(name)
}

fn interface(section: &mut Section<'_>) -> Option<String> {
    let name: String = section.required("interface", "add interface = \"…\" (`ip link` lists them)")?;
    let fits = (1..=MAX_INTERFACE_LEN).contains(&name.len())
        && !name.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control());
    if !fits {
        section.wrong(
            "interface",
            "is not the name of an interface",
            format!("give a name of 1 to {MAX_INTERFACE_LEN} characters as `ip link` shows it"),
        );
    }
    fits.then_some(name)
}

fn service(root: &mut Section<'_>, role: Option<Role>) -> Option<ServiceNetwork> {
    let Some(mut section) = root.section("service") else {
        if role == Some(Role::Balancer) && !root.has("service") {
            root.missing("service", "a balancer needs [service] with interface = \"…\"");
        }
        return None;
    };
    if role == Some(Role::Witness) {
        section.wrong("", "a witness has no data path", "remove [service], or make the role \"balancer\"");
    }
    let interface = interface(&mut section);
    let lane = section.or("lane", Word(LaneChoice::Auto)).map(|w| w.0);
    let gateway: Option<IpAddr> = section.optional("gateway");
    if gateway.is_some_and(|g| g.is_unspecified() || g.is_multicast() || g.is_loopback()) {
        section.wrong(
            "gateway",
            "can't be the address of a gateway",
            "give the router's address on this network",
        );
    }
    section.finish();
    Some(ServiceNetwork { interface: interface?, lane: lane?, gateway })
}

fn inside(root: &mut Section<'_>, role: Option<Role>, service: Option<&ServiceNetwork>) -> Option<String> {
    let mut section = root.section("inside")?;
    if role == Some(Role::Witness) {
        section.wrong("", "a witness has no data path", "remove [inside], or make the role \"balancer\"");
    }
    let interface = interface(&mut section);
    if interface.is_some() && interface.as_ref() == service.map(|s| &s.interface) {
        section.wrong(
            "interface",
            "is the service interface already",
            "name a second interface, or remove [inside]",
        );
    }
    section.finish();
    interface
}

fn cluster(root: &mut Section<'_>, own_id: Option<NodeId>, look_at_files: bool) -> Option<ClusterNetwork> {
    let mut section = root.section("cluster")?;
    let listen: Option<SocketAddr> =
        section.required("listen", "add listen = \"IP:7800\" with this node's address");
    if let Some(listen) = listen {
        address_of_a_node(&section, "listen", listen);
    }
    let pair = section.or("pair", Word(Pair::Availability)).map(|w| w.0);
    let secret_file: Option<PathBuf> = section.optional("secret_file");
    let mut peers: Vec<Peer> = Vec::new();
    for mut peer in section.sections("peer") {
        let id = node_id(&mut peer, "id");
        let address: Option<SocketAddr> = peer.required("address", "add address = \"IP:7800\"");
        if id.is_some() && id == own_id {
            peer.wrong("id", "is this node's own id", "list only the other nodes");
        }
        if id.is_some_and(|id| peers.iter().any(|p| p.id == id)) {
            peer.wrong("id", "is listed twice", "give every node its own id");
        }
        if let Some(address) = address {
            address_of_a_node(&peer, "address", address);
            if Some(address) == listen {
                peer.wrong("address", "is this node's own address", "give the other node's address");
            } else if peers.iter().any(|p| p.address == address) {
                peer.wrong("address", "is listed twice", "give every node its own address");
            }
        }
        peer.finish();
        if let (Some(id), Some(address)) = (id, address) {
            peers.push(Peer { id, address });
        }
    }
    if section.has("peer") && !section.has("secret_file") {
        section.missing(
            "secret_file",
            "make one with `komainu keygen -o FILE`, copy it to every node, and name it here",
        );
    }
    if let (true, Some(file)) = (look_at_files, &secret_file)
        && let Err(error) = Key::load(file)
    {
        section.wrong("secret_file", error.to_string(), "");
    }
    section.finish();
    Some(ClusterNetwork { listen: listen?, pair: pair?, secret_file, peers })
}

/// An address under which other nodes can reach a node.
fn address_of_a_node(section: &Section<'_>, key: &str, address: SocketAddr) {
    if address.ip().is_unspecified() || address.ip().is_multicast() {
        let action = "give the address under which the other nodes reach it";
        section.wrong(key, "is not the address of one node", action);
    } else if address.port() == 0 {
        section.wrong(key, "has port 0", "give a port, e.g. 7800");
    }
}

fn timing(root: &mut Section<'_>) -> Option<Timing> {
    let Some(mut section) = root.section("timing") else { return Some(Timing::default()) };
    let before = section.mistakes();
    let written = section.or("profile", Profile::Default.as_str().to_owned());
    let profile = written.and_then(|written| Profile::ALL.into_iter().find(|p| p.as_str() == written));
    if profile.is_none() && section.mistakes() == before {
        let known = Profile::ALL.map(|p| format!("\"{}\"", p.as_str())).join(" or ");
        section.wrong("profile", "is no profile", format!("write {known}"));
    }
    // The other durations are read also under a profile that doesn't exist, so that all mistakes are told at once.
    let default = profile.unwrap_or(Profile::Default).timing();
    let beat = millis(&mut section, "beat_ms", default.beat);
    let lease = millis(&mut section, "lease_ms", default.lease);
    let grace = millis(&mut section, "grace_ms", default.grace);
    let drift_ppm = section.or("drift_ppm", default.drift_ppm);
    let both = [default.election_min, default.election_max].map(|d| d.as_millis() as u32);
    let election: Option<Vec<u32>> = section.or("election_ms", both.to_vec());
    let election = election.and_then(|e| match e[..] {
        [min, max] => Some((min, max)),
        _ => {
            section.wrong("election_ms", "is not a range", "write [shortest, longest], e.g. [120, 180]");
            None
        }
    });
    let timing = (|| {
        let (min, max) = election?;
        Some(Timing {
            beat: beat?,
            lease: lease?,
            election_min: Duration::from_millis(min.into()),
            election_max: Duration::from_millis(max.into()),
            drift_ppm: drift_ppm?,
            grace: grace?,
        })
    })();
    if let (Some(timing), true) = (&timing, section.mistakes() == before)
        && let Err(error) = timing.validate()
    {
        section.wrong(error.field, error.reason, "");
    }
    section.finish();
    timing
}

fn millis(section: &mut Section<'_>, key: &'static str, default: Duration) -> Option<Duration> {
    Some(Duration::from_millis(section.or(key, default.as_millis() as u32)?.into()))
}

fn admin(root: &mut Section<'_>, look_at_files: bool) -> Option<RemoteAdmin> {
    let mut section = root.section("admin")?;
    let tls =
        "remote administration is served over mutual TLS only: give cert_file, key_file and client_ca_file";
    let wants = ["listen", "cert_file", "key_file", "client_ca_file"].iter().any(|key| section.has(key));
    if !wants {
        section.finish();
        return None;
    }
    let listen: Option<SocketAddr> = section
        .required("listen", "add listen = \"IP:7801\", or remove [admin]: the local socket is always there");
    if listen.is_some_and(|l| l.port() == 0) {
        section.wrong("listen", "has port 0", "give a port, e.g. 7801");
    }
    let cert_file = pem_file(&mut section, "cert_file", tls, look_at_files, files::CERTIFICATE);
    let key_file = pem_file(&mut section, "key_file", tls, look_at_files, files::PRIVATE_KEY);
    let client_ca_file = pem_file(&mut section, "client_ca_file", tls, look_at_files, files::CERTIFICATE);
    section.finish();
    Some(RemoteAdmin {
        listen: listen?,
        cert_file: cert_file?,
        key_file: key_file?,
        client_ca_file: client_ca_file?,
    })
}

fn pem_file(
    section: &mut Section<'_>,
    key: &'static str,
    missing: &str,
    look_at_files: bool,
    kind: &'static str,
) -> Option<PathBuf> {
    let path: PathBuf = section.required(key, missing)?;
    if look_at_files && let Err(error) = files::read_pem(&path, kind) {
        section.wrong(key, error.reason, error.action);
    }
    Some(path)
}

fn metrics(root: &mut Section<'_>) -> Option<SocketAddr> {
    let mut section = root.section("metrics")?;
    let listen: Option<SocketAddr> =
        section.required("listen", "add listen = \"127.0.0.1:7802\", or remove [metrics]");
    if listen.is_some_and(|l| l.port() == 0) {
        section.wrong("listen", "has port 0", "give a port, e.g. 7802");
    }
    section.finish();
    listen
}

fn log(root: &mut Section<'_>) -> Option<Log> {
    let default = Log { format: LogFormat::Human, filter: "info".to_owned() };
    let Some(mut section) = root.section("log") else { return Some(default) };
    let format = section.or("format", Word(default.format)).map(|w| w.0);
    let filter: Option<String> = section.or("filter", default.filter);
    if let Some(filter) = &filter
        && let Err(error) = tracing_subscriber::EnvFilter::builder().parse(filter)
    {
        let reason = format!("is not a filter ({error})");
        section.wrong("filter", reason, "write e.g. \"info\" or \"info,komainu_cluster=debug\"");
    }
    section.finish();
    Some(Log { format: format?, filter: filter? })
}

/// Two TCP listeners can't share an address.
fn one_listener_each(
    root: &mut Section<'_>,
    cluster: Option<&ClusterNetwork>,
    admin: Option<&RemoteAdmin>,
    metrics: Option<SocketAddr>,
) {
    let clash = |a: SocketAddr, b: SocketAddr| {
        a.port() == b.port() && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
    };
    let listeners =
        [("cluster", cluster.map(|c| c.listen)), ("admin", admin.map(|a| a.listen)), ("metrics", metrics)];
    for (i, (name, address)) in listeners.iter().enumerate() {
        for (other, taken) in &listeners[..i] {
            if let (Some(address), Some(taken)) = (address, taken)
                && clash(*address, *taken)
                && let Some(section) = root.section(name)
            {
                let reason = format!("is taken by {other}.listen ({taken})");
                section.wrong("listen", reason, "give each its own port");
            }
        }
    }
}

/// For tests of other modules and for tools that make node files.
impl std::str::FromStr for NodeConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        NodeConfig::parse("node.toml", text)
    }
}

#[cfg(test)]
mod tests;
