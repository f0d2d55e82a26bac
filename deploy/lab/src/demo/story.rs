//! What happens in the demo, in order.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Summary;
use super::teller::Teller;
use crate::cluster::{Cluster, Document, SOON, wait_for};
use crate::error::{LabError, Result};
use crate::host::Host;
use crate::lab::Lab;
use crate::standard::{self, BACKEND_HTTP, ECHO, HTTP};
use crate::topology::{Standard, addr};
use crate::traffic::http::{RequestLoop, Tally, requests};
use crate::traffic::pinger::Pingers;
use crate::traffic::server::Server;
use crate::traffic::stream::{StreamSpec, UdpStream};
use crate::watch::Watch;

/// How often the VIPs are asked for on the wire.
const PROBE: Duration = Duration::from_millis(5);
/// How long a client waits for one answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Longest outage after which the demo still counts as gone well. Far above the usual: machines are busy.
const WORST_GAP: Duration = Duration::from_secs(2);
/// Datagrams that a switchover may lose: those whose fate a scheduler's hiccup decides.
const WORST_SWITCHOVER: u64 = 2;

const PICTURE: &str = "
     client            be1   be2   be3      real servers: HTTP and echo
       |                |     |     |
  -----+------+---------+-----+-----+---    service network  192.0.2.0/24, 2001:db8::/64
              |         |                   VIPs  192.0.2.100, 2001:db8::64
             lb1       lb2       wit
              |         |         |
  ------------+---------+---------+-----    cluster network  198.51.100.0/24";

pub struct Story<'a> {
    teller: &'a Teller,
    binary: PathBuf,
    cluster: Option<Cluster>,
}

impl<'a> Story<'a> {
    pub fn new(teller: &'a Teller, binary: PathBuf) -> Story<'a> {
        Story { teller, binary, cluster: None }
    }

    /// The nodes' last words, to stderr.
    pub fn show_logs(&self) {
        if let Some(cluster) = &self.cluster {
            eprintln!("{}", cluster.log_tails());
        }
    }

    pub fn play(&mut self, summary: &mut Summary) -> Result<()> {
        let teller = self.teller;
        teller.chapter(
            "Two balancers, a witness, three servers and a client, each in a network namespace of its own",
        );
        teller.picture(PICTURE);
        let lab = Lab::build(&Standard::default().topology())?;
        let mut servers = standard::servers(&lab)?;
        teller.event(
            "lab",
            "the lab stands",
            json!({ "hosts": lab.hosts().map(|(n, _)| n).collect::<Vec<_>>() }),
        );
        let cluster = self.cluster.insert(Cluster::new(lab, self.binary.clone())?);

        start(teller, cluster)?;
        let vips = addr::service(addr::VIP);
        let watch = Watch::start(&cluster.lab, &vips, PROBE)?;
        let result = (|| {
            show_requests(teller, cluster);
            summary.backend_excluded_ms = kill_a_backend(teller, cluster, &mut servers)?;
            drain(teller, cluster)?;
            summary.switchover_lost = switchover(teller, cluster)?;
            summary.owner_killed_gap_ms = kill_the_owner(teller, cluster)?;
            rejoin(teller, cluster)
        })();
        let wire = watch.stop();
        summary.two_owners_ms = wire.two_owners_ms();
        result?;
        teller.chapter("What the wire saw");
        teller.event(
            "wire",
            &format!(
                "{} answers and announcements for the VIPs, by {}; two nodes at once for {} ms",
                wire.claims.len(),
                wire.claimants().into_iter().collect::<Vec<_>>().join(" and "),
                summary.two_owners_ms
            ),
            json!({ "claims": wire.claims.len(), "two_owners_ms": summary.two_owners_ms }),
        );
        teller.check(summary.two_owners_ms == 0, "two nodes answered for a VIP at the same time");
        teller.check(!wire.claims.is_empty(), "nobody ever answered for a VIP");
        Ok(())
    }
}

fn web(family: usize) -> SocketAddr {
    (addr::service(addr::VIP)[family], HTTP).into()
}

fn talk() -> SocketAddr {
    (addr::service(addr::VIP)[0], ECHO).into()
}

fn start(teller: &Teller, cluster: &mut Cluster) -> Result<()> {
    teller.chapter("The cluster forms");
    let begun = Instant::now();
    cluster.start_all()?;
    cluster.wait_formed(SOON)?;
    let status = cluster.status("lb1")?;
    teller.event(
        "formed",
        &format!(
            "lb1, lb2 and the witness have formed a cluster; leader is node {}, lane {} ({})",
            status.cluster.leader.unwrap_or_default(),
            status.node.lane,
            status.node.lane_mode
        ),
        json!({ "ms": begun.elapsed().as_millis() as u64, "leader": status.cluster.leader, "lane": status.node.lane }),
    );
    let [v4, v6] = addr::service(addr::VIP);
    let lab = &cluster.lab;
    let document = Document::default()
        .group(standard::group(lab))
        .service(standard::service(lab, "web", v4, HTTP, "tcp", "nat", BACKEND_HTTP))
        .service(standard::service(lab, "web6", v6, HTTP, "tcp", "dsr", HTTP))
        .service(standard::service(lab, "talk", v4, ECHO, "tcp", "dsr", ECHO))
        .service(standard::service(lab, "echo", v4, ECHO, "udp", "nat", ECHO));
    cluster.apply("lb1", &document)?;
    let owner = cluster.wait_owner("web", SOON)?;
    cluster.wait_all_up(SOON)?;
    teller.event(
        "applied",
        &format!("a document with four services is in force; {owner} owns the VIPs and all servers are up"),
        json!({ "owner": owner }),
    );
    Ok(())
}

fn show_requests(teller: &Teller, cluster: &Cluster) {
    teller.chapter("Requests through the VIPs");
    let client = cluster.lab.host("client");
    for (family, words) in ["IPv4, full NAT", "IPv6, direct server return"].into_iter().enumerate() {
        let tally = requests(client, web(family), 150, PATIENCE);
        tell_tally(teller, &format!("150 requests to {} ({words})", web(family)), &tally);
        teller.check(tally.failed == 0 && tally.per_backend.len() == 3, "requests failed or missed a server");
    }
}

fn tell_tally(teller: &Teller, what: &str, tally: &Tally) {
    let shares: Vec<String> = tally.per_backend.iter().map(|(b, n)| format!("{b} {n}")).collect();
    let failed = if tally.failed > 0 {
        format!(", {} failed ({})", tally.failed, tally.failures.join("; "))
    } else {
        String::new()
    };
    teller.event(
        "requests",
        &format!("{what}: {}{failed}", shares.join(", ")),
        json!({ "per_backend": tally.per_backend, "failed": tally.failed }),
    );
}

fn kill_a_backend(teller: &Teller, cluster: &Cluster, servers: &mut BTreeMap<String, Server>) -> Result<u64> {
    teller.chapter("A server dies");
    let client = cluster.lab.host("client");
    let owner = cluster.wait_owner("web", SOON)?;
    let load = RequestLoop::start(client, web(0), Duration::from_millis(5), PATIENCE);
    let server = servers.get_mut("be2").ok_or_else(|| missing("be2"))?;
    let died = Instant::now();
    server.kill();
    teller.event("backend_killed", "be2 is dead", json!({ "backend": "be2" }));
    let status = cluster.wait_status(&owner, "be2 to be taken out", SOON, |s| {
        ["web", "web6", "talk", "echo"]
            .iter()
            .all(|s2| s.backend(s2, "be2").is_some_and(|b| b.health == "down"))
    })?;
    let excluded_ms = died.elapsed().as_millis() as u64;
    let meanwhile = load.take();
    let reason = status.backend("web", "be2").map(|b| b.reason.clone()).unwrap_or_default();
    teller.event(
        "backend_excluded",
        &format!(
            "the checks say down ({reason}) after {excluded_ms} ms; meanwhile {} requests went well and {} failed",
            meanwhile.answered(),
            meanwhile.failed
        ),
        json!({ "backend": "be2", "ms": excluded_ms, "answered": meanwhile.answered(), "failed": meanwhile.failed }),
    );
    drop(load);
    // What the cluster agreed on reaches the data path a moment later.
    let tally = settled(client, |tally| tally.failed == 0)?;
    tell_tally(teller, "100 requests without it", &tally);
    teller.check(tally.of("be2") == 0, "the dead server still gets requests");
    server.restart()?;
    cluster.wait_all_up(SOON)?;
    let tally = settled(client, |tally| tally.of("be2") > 0)?;
    tell_tally(teller, "be2 is back: 100 requests", &tally);
    teller.check(tally.failed == 0, "requests fail although all servers are up");
    Ok(excluded_ms)
}

/// Rounds of 100 requests until one is as it should be.
fn settled(client: &Host, good: impl Fn(&Tally) -> bool) -> Result<Tally> {
    wait_for("the data path to follow the cluster", SOON, || {
        let tally = requests(client, web(0), 100, PATIENCE);
        if good(&tally) { Ok(tally) } else { Err(format!("{tally:?}")) }
    })
}

fn drain(teller: &Teller, cluster: &Cluster) -> Result<()> {
    teller.chapter("A server is drained");
    let client = cluster.lab.host("client");
    let ping = Duration::from_millis(20);
    let old = Pingers::start(client, talk(), 12, ping, PATIENCE)?;
    let held = |p: &Pingers| p.report().iter().filter(|c| c.backend == "be3").count();
    teller.event(
        "connections",
        &format!("12 long connections stand, {} of them to be3", held(&old)),
        json!({ "connections": 12, "to_be3": held(&old) }),
    );
    cluster.cli_ok("lb2", &["backend", "drain", "talk/be3"])?;
    let owner = cluster.wait_owner("web", SOON)?;
    cluster.wait_status(&owner, "the drain", SOON, |s| {
        s.backend("talk", "be3").is_some_and(|b| b.admin == "draining")
    })?;
    let new = wait_for("the data path to follow the cluster", SOON, || {
        let new = Pingers::start(client, talk(), 24, ping, PATIENCE).map_err(|e| e.to_string())?;
        if held(&new) == 0 { Ok(new) } else { Err(format!("{} new connections went to be3", held(&new))) }
    })?;
    let alive = old.wait_answered(5, SOON) && old.report().iter().all(|c| c.broken.is_none());
    teller.event(
        "drained",
        &format!(
            "be3 drains: {} of 24 new connections went to it; the old ones {}",
            held(&new),
            if alive { "all go on" } else { "broke" }
        ),
        json!({ "new_to_be3": held(&new), "old_alive": alive }),
    );
    teller.check(held(&new) == 0 && alive, "the drain sent new connections or broke old ones");
    drop((old, new));
    cluster.cli_ok("lb2", &["backend", "enable", "talk/be3"])?;
    Ok(())
}

fn stream(cluster: &Cluster) -> Result<UdpStream> {
    let stream = UdpStream::start(cluster.lab.host("client"), talk(), StreamSpec::default())?;
    if stream.wait_answered(300, SOON) { Ok(stream) } else { Err(silent("before anything was done to it")) }
}

fn switchover(teller: &Teller, cluster: &Cluster) -> Result<u64> {
    teller.chapter("The VIPs change hands on order, under a client that sends a datagram every millisecond");
    let before = cluster.wait_owner("web", SOON)?;
    let stream = stream(cluster)?;
    cluster.cli_ok("lb1", &["switchover", "web"])?;
    let after = wait_for("the group to change hands", SOON, || {
        let owner = cluster.wait_owner("web", SOON).map_err(|e| e.to_string())?;
        if owner == before { Err(format!("{owner} still owns it")) } else { Ok(owner) }
    })?;
    if !stream.wait_answered(300, SOON) {
        return Err(silent("after the switchover"));
    }
    let report = stream.stop();
    teller.event(
        "switchover",
        &format!("{before} -> {after}: {} of {} datagrams lost", report.lost(), report.sent),
        json!({ "from": before, "to": after, "lost": report.lost(), "sent": report.sent }),
    );
    teller.check(report.lost() <= WORST_SWITCHOVER, "the switchover lost datagrams");
    Ok(report.lost())
}

fn kill_the_owner(teller: &Teller, cluster: &mut Cluster) -> Result<u64> {
    teller.chapter("The owner is killed with -9");
    let owner = cluster.wait_owner("web", SOON)?;
    let stream = stream(cluster)?;
    let killed = cluster.kill_9(&owner);
    teller.event("owner_killed", &format!("{owner} is dead"), json!({ "node": owner }));
    let after = cluster.wait_owner("web", SOON)?;
    if !stream.wait_answered(500, SOON) {
        return Err(silent("after the owner's death"));
    }
    let report = stream.stop();
    let gap = report.longest_gap_after(killed);
    teller.event(
        "failover",
        &format!(
            "{after} has taken over; the client went {} ms without an answer and lost {} datagrams",
            gap.as_millis(),
            report.lost()
        ),
        json!({ "from": owner, "to": after, "gap_ms": gap.as_millis() as u64, "lost": report.lost() }),
    );
    teller.check(gap <= WORST_GAP, "the outage was too long");
    let tally = requests(cluster.lab.host("client"), web(0), 60, PATIENCE);
    tell_tally(teller, "60 requests through the new owner", &tally);
    teller.check(tally.failed == 0, "requests fail after the failover");
    Ok(gap.as_millis() as u64)
}

fn rejoin(teller: &Teller, cluster: &mut Cluster) -> Result<()> {
    teller.chapter("The dead balancer comes back");
    let owner = cluster.wait_owner("web", SOON)?;
    let begun = Instant::now();
    cluster.start_all()?;
    cluster.wait_formed(SOON)?;
    let still = cluster.wait_owner("web", SOON)?;
    teller.event(
        "rejoined",
        &format!("it is a member again after {} ms; {still} keeps the VIPs", begun.elapsed().as_millis()),
        json!({ "ms": begun.elapsed().as_millis() as u64, "owner": still }),
    );
    teller.check(still == owner, "the VIPs moved although nothing asked for it");
    Ok(())
}

fn silent(when: &str) -> LabError {
    LabError::Timeout {
        what: format!("answers to the client's datagrams {when}"),
        waited: SOON,
        last: "none".to_owned(),
    }
}

fn missing(server: &str) -> LabError {
    LabError::Unknown { what: "server", name: server.to_owned(), known: "be1, be2, be3".to_owned() }
}
