//! A pair of balancers without a third node: the second way between the two, the sounding of the service network, and the
//! files in which changes of a line that ended are kept. The decisions are the cluster layer's ([`komainu_cluster::pair`]).

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use komainu_cluster::pair::{Aside, Policy, Sounding, sounding};
use komainu_cluster::shell::{ClusterHandle, PairSettings, SecondPath, View};
use komainu_cluster::state::Change;
use komainu_cluster::time::Instant;
use komainu_packet::lane::SharedLane;
use komainu_packet::netlink;
use komainu_packet::segment::{Found, SegmentSocket, Sounder};
use komainu_packet::time::BootTime;
use komainu_proto::domain::{NodeId, Role};

use crate::config::node::Pair;
use crate::config::{NodeConfig, document};

/// Directory, in `data_dir`, of what was set aside.
const DIRECTORY: &str = "aside";
/// Files that are named in `status`; who has more than this has not looked for long.
const MAX_NAMED: usize = 8;
/// Time between two soundings that failed.
const RETRY: Duration = Duration::from_millis(100);
/// How long to wait before an event that could not be told is told again.
const TELL_AGAIN: Duration = Duration::from_secs(2);

/// Whether the node file describes one of two balancers, as far as one file can tell.
pub fn is_pair(config: &NodeConfig) -> bool {
    config.role == Role::Balancer && config.service.is_some() && config.peers().len() == 1
}

/// What the cluster layer needs of a pair.
///
/// # Errors
/// The service interface can't be listened on.
pub fn settings(config: &NodeConfig) -> io::Result<PairSettings> {
    let Some((service, cluster)) =
        config.service.as_ref().zip(config.cluster.as_ref()).filter(|_| is_pair(config))
    else {
        return Ok(PairSettings::none());
    };
    let policy = match cluster.pair {
        Pair::Availability => Policy::Availability,
        Pair::Safety => Policy::Safety,
    };
    let second = Arc::new(Segment(SegmentSocket::open(&service.interface)?));
    let data_dir = config.data_dir.clone();
    let keep = move |aside: &Aside| match keep(&data_dir, aside, wall_ms()) {
        Ok(path) => {
            tracing::warn!(file = %path.display(), "changes made while split are set aside");
            true
        }
        Err(error) => {
            tracing::error!(%error, "changes made while split can't be set aside: this node waits until they can");
            false
        }
    };
    Ok(PairSettings { policy, second_path: Some(second), keep: Arc::new(keep) })
}

/// The gateway that says whether this node still belongs to its network: the one that the node file names, else the one of the
/// service interface's default route.
pub fn gateway(config: &NodeConfig, lane: Option<&SharedLane>) -> Option<IpAddr> {
    let service = config.service.as_ref()?;
    service.gateway.or_else(|| match lane {
        Some(lane) => lane.gateways().first().copied(),
        None => netlink::read_once().ok()?.default_gateways(&service.interface).first().copied(),
    })
}

struct Segment(SegmentSocket);

impl SecondPath for Segment {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    fn send(&self, datagram: &[u8]) {
        self.0.send(datagram);
    }

    fn receive(&self, buffer: &mut [u8]) -> Option<(usize, [u8; 6])> {
        self.0.receive(buffer)
    }

    fn heard(&self, station: [u8; 6]) {
        self.0.heard(station);
    }
}

/// Sounds the service network whenever the cluster layer wants to know about the peer. Ends with the cluster layer.
pub async fn watch(config: NodeConfig, lane: SharedLane, cluster: ClusterHandle) {
    let Some(service) = config.service.clone() else { return };
    let (mut wanted, lasts) = (cluster.sounds(), sounding(&config.timing));
    let mut sounder: Option<Sounder> = None;
    loop {
        if !*wanted.borrow_and_update() {
            if let Some(used) = sounder.take() {
                // Closing it takes a while.
                tokio::task::spawn_blocking(move || drop(used));
            }
            if wanted.wait_for(|on| *on).await.is_err() {
                return;
            }
        }
        let view = cluster.view().borrow().clone();
        let vips: Vec<IpAddr> =
            view.state.groups.iter().flat_map(|g| g.config.vips.iter().copied()).collect();
        let gateway = gateway(&config, Some(&lane));
        let own = lane.links().into_iter().find(|l| l.name == service.interface).and_then(|l| l.mac);
        let interface = service.interface.clone();
        let opened = sounder.take();
        let began = now();
        let found = tokio::task::spawn_blocking(move || -> io::Result<(Sounder, Found)> {
            let own = own.ok_or(io::ErrorKind::NotFound)?;
            let sounder = opened.map_or_else(|| Sounder::open(&interface), Ok)?;
            let found = sounder.sound(own, gateway, &vips, lasts)?;
            Ok((sounder, found))
        });
        let result = match found.await {
            Ok(Ok((used, found))) => {
                sounder = Some(used);
                Sounding {
                    began,
                    ended: now(),
                    arbiter: gateway.map(|_| found.gateway),
                    claimed: found.claimed.map(|(address, _)| address),
                }
            }
            // Whoever can't ask is in no position to go on alone.
            Ok(Err(error)) => {
                tracing::debug!(%error, "the service network can't be sounded");
                tokio::time::sleep(RETRY).await;
                Sounding { began, ended: now(), arbiter: gateway.map(|_| false), claimed: None }
            }
            Err(_) => return,
        };
        cluster.sounded(result);
    }
}

fn now() -> Instant {
    Instant(BootTime::now().0)
}

fn wall_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Writes what is set aside as a document that `apply` takes, and answers where. It is on disk then.
fn keep(data_dir: &Path, aside: &Aside, wall_ms: u64) -> io::Result<PathBuf> {
    let dir = data_dir.join(DIRECTORY);
    fs::create_dir_all(&dir)?;
    let path = dir.join(format!("term-{}.toml", aside.line));
    let temporary = dir.join(format!(".term-{}.tmp", aside.line));
    let mut file = File::create(&temporary)?;
    file.write_all(text(aside, wall_ms).as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    File::open(&dir)?.sync_all()?;
    File::open(data_dir)?.sync_all()?;
    Ok(path)
}

fn text(aside: &Aside, wall_ms: u64) -> String {
    use std::fmt::Write as _;
    let moment = crate::render::time::moment;
    let mut text = format!(
        "# The document of this node as it was when the pair was whole again, {}.\n\
         # It had gone on alone in term {}; node {} had in term {}, whose document is in force now.\n\
         # Revision {} is what both began with. Changes here since:\n",
        moment(wall_ms),
        aside.line,
        aside.to.0,
        aside.to_line,
        aside.base
    );
    for r in &aside.changes {
        let _ = writeln!(text, "#   {} {} by {:?}: {:?}", r.revision, moment(r.wall_ms), r.who, r.how);
    }
    if aside.changes.is_empty() {
        text.push_str("#   administrative states of backends only\n");
    }
    text.push_str("# `komainu apply -f` with this file puts it in force as a whole; `--dry-run` shows the difference first.\n\n");
    text.push_str(&document::to_toml(&aside.document));
    text
}

/// Files that were set aside and that nobody has removed.
pub fn kept(data_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(data_dir.join(DIRECTORY)).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> =
        entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "toml")).collect();
    files.sort();
    files
}

/// Tells the cluster, once, of each file that was set aside here: an event that every node shows.
pub async fn tell(data_dir: PathBuf, cluster: ClusterHandle) {
    let mut views = cluster.view();
    let mut whole_before = false;
    loop {
        let view = views.borrow_and_update().clone();
        // As a member: what was set aside is told to those who go on.
        let whole = view.leader.is_some() && view.state.member(view.node.id).is_some();
        let (tell_all, dir) = (whole && !whole_before, data_dir.clone());
        whole_before = whole;
        if tell_all {
            let files = tokio::task::spawn_blocking(move || kept(&dir)).await.unwrap_or_default();
            for file in files {
                if !tell_one(&file, &view, &cluster).await {
                    whole_before = false;
                    tokio::time::sleep(TELL_AGAIN).await;
                }
            }
        }
        if views.changed().await.is_err() {
            return;
        }
    }
}

async fn tell_one(file: &Path, view: &View, cluster: &ClusterHandle) -> bool {
    let shown = file.display().to_string();
    let told = view.state.events.iter().any(|e| e.text.contains(&shown) && e.subject == view.node.name);
    if told {
        return true;
    }
    let change = Change::SetAside { node: view.node.id, file: shown };
    cluster.propose(change, komainu_cluster::state::CLUSTER).await.is_ok()
}

/// What an operator should know of this node as one of a pair, a sentence each.
pub fn notices(view: &View, gateway: Option<IpAddr>, kept: &[PathBuf]) -> Vec<String> {
    let name = |node: NodeId| crate::admin::status::name_of(view, node);
    let mut notices = Vec::new();
    if let Some(solo) = &view.state.solo {
        notices.push(format!(
            "{} goes on alone since {} (term {}): it decides and answers without its peer; when the peer is back it joins by itself",
            name(solo.node),
            crate::render::time::moment(solo.since_ms),
            solo.term
        ));
    }
    if let Ok(peer) = view.standing.peer {
        let peer = name(peer);
        let available = view.standing.policy == Policy::Availability;
        if available && gateway.is_none() {
            notices.push(
                "pair = \"availability\" has no arbiter: name [service] gateway in the node file; until then this node waits \
                 for an operator when its peer is silent, as under \"safety\""
                    .to_owned(),
            );
        }
        if view.standing.silent.is_some() {
            let sounding = view.standing.sounding;
            notices.push(match sounding {
                _ if !available || gateway.is_none() => format!(
                    "{peer} is silent on every path and this node waits: make sure that it is dead or cut off from every \
                     client, then `komainu node force` here"
                ),
                Some(Sounding { claimed: Some(address), .. }) => format!(
                    "{peer} is silent, and another station answers for {address}: this node does not go on alone while it does"
                ),
                Some(Sounding { arbiter: Some(false), .. }) => format!(
                    "{peer} is silent, and so is the gateway: this node may be the one that is cut off, and does not go on alone"
                ),
                _ => format!("{peer} is silent: this node finds out whether it may go on alone"),
            });
        }
    }
    let named = kept.iter().take(MAX_NAMED).map(|file| {
        let file = file.display();
        format!(
            "changes made here while the pair was split are set aside in {file}: `komainu apply -f {file}` puts that document \
             in force; remove the file when it is no longer needed"
        )
    });
    notices.extend(named);
    notices
}

/// What is risked when this node is forced to go on alone, a sentence each.
pub fn risks(view: &View, aside: &str) -> Vec<String> {
    let peer = match view.standing.peer {
        Ok(peer) => crate::admin::status::name_of(view, peer),
        Err(_) => return Vec::new(),
    };
    let mut risks = vec![
        format!(
            "should {peer} be alive and only not be heard, both answer for the same addresses, and clients reach one or the \
             other, until the two hear each other again"
        ),
        format!(
            "changes made on both meanwhile don't come together: the node that went on alone in the lower term sets its own \
             aside ({aside}) and takes the other's"
        ),
    ];
    if let Some(address) = view.standing.sounding.and_then(|s| s.claimed) {
        risks.push(format!("another station answered for {address} a moment ago: somebody seems to own it"));
    }
    risks
}

#[cfg(test)]
mod tests {
    use komainu_cluster::state::Revision;

    use super::*;

    const DOCUMENT: &str = "[[group]]\nname = \"web\"\nvips = [\"192.0.2.100\"]\n";

    fn aside() -> Aside {
        let document = document::parse("services.toml", DOCUMENT).unwrap().document;
        let change = Revision {
            revision: 5,
            document: document.clone(),
            who: "uid 0 on lb1\n[[group]]".to_owned(),
            wall_ms: 1_700_000_000_000,
            how: "apply".to_owned(),
        };
        Aside { line: 9, to: NodeId(2), to_line: 12, base: 4, changes: vec![Arc::new(change)], document }
    }

    #[test]
    fn what_is_set_aside_is_a_document_that_can_be_applied() {
        let dir = tempfile::tempdir().unwrap();
        let aside = aside();
        let path = keep(dir.path(), &aside, 1_700_000_001_000).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(document::parse("aside", &text).unwrap().document, aside.document);
        assert!(text.contains("#   5 "), "{text}");
        // Written again after a crash: the same file.
        keep(dir.path(), &aside, 1_700_000_002_000).unwrap();
        assert_eq!(kept(dir.path()), [path]);
        assert!(kept(Path::new("/nonexistent")).is_empty());
    }

    /// What node 1 sees when its peer is silent, and this was found out.
    fn view(policy: Policy, sounding: Option<(Option<bool>, Option<&str>)>) -> View {
        use komainu_cluster::api::NodeIdentity;
        use komainu_cluster::core::Standing;
        use komainu_cluster::shell::Quorum;
        let address = "192.0.2.1:7800".parse().unwrap();
        let sounding = sounding.map(|(arbiter, claimed)| Sounding {
            began: Instant(1),
            ended: Instant(2),
            arbiter,
            claimed: claimed.map(|a| a.parse().unwrap()),
        });
        let silent = Some(Duration::from_secs(3));
        View {
            state: Arc::default(),
            node: NodeIdentity { id: NodeId(1), name: "lb1".to_owned(), role: Role::Balancer, address },
            raft_id: 1,
            leader: None,
            term: 2,
            voter: true,
            members: Vec::new(),
            leases: Vec::new(),
            quorum: Quorum::PairAvailability,
            solo: false,
            standing: Standing { policy, peer: Ok(NodeId(2)), silent, sounding },
            notes: Vec::new(),
            at: Instant(0),
        }
    }

    #[test]
    fn whoever_waits_says_what_for() {
        let gateway = Some(IpAddr::from([192, 0, 2, 254]));
        let told = |policy, sounding, gateway| notices(&view(policy, sounding), gateway, &[]).join("\n");
        let open = Some((Some(true), None));
        assert!(told(Policy::Safety, None, gateway).contains("`komainu node force`"));
        let missing = told(Policy::Availability, None, None);
        assert!(missing.contains("has no arbiter") && missing.contains("`komainu node force`"), "{missing}");
        let cut_off = told(Policy::Availability, Some((Some(false), None)), gateway);
        assert!(cut_off.contains("and so is the gateway"), "{cut_off}");
        let claimed = told(Policy::Availability, Some((Some(true), Some("192.0.2.100"))), gateway);
        assert!(claimed.contains("another station answers for 192.0.2.100"), "{claimed}");
        assert!(told(Policy::Availability, open, gateway).contains("finds out"));
        let claimed = view(Policy::Safety, Some((Some(true), Some("192.0.2.100"))));
        assert_eq!(risks(&claimed, "aside").len(), 3);
        assert_eq!(risks(&view(Policy::Safety, None), "aside").len(), 2);
    }

    #[test]
    fn a_file_is_a_pairs_when_two_balancers_are_all_it_names() {
        let file = |peers: &[u64], role: &str| -> NodeConfig {
            let service = if role == "balancer" { "[service]\ninterface = \"eth0\"\n" } else { "" };
            let mut text = format!(
                "id = 1\nname = \"lb1\"\nrole = \"{role}\"\n{service}[cluster]\nlisten = \"192.0.2.1:7800\"\nsecret_file = \"/k\"\n"
            );
            for id in peers {
                text += &format!("[[cluster.peer]]\nid = {id}\naddress = \"192.0.2.{id}:7800\"\n");
            }
            text.parse().unwrap()
        };
        assert!(is_pair(&file(&[2], "balancer")));
        assert!(
            !is_pair(&file(&[2, 3], "balancer"))
                && !is_pair(&file(&[2], "witness"))
                && !is_pair(&file(&[], "balancer"))
        );
    }
}
