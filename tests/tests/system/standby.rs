//! What a standby knows: connections that outlive their owner.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use komainu_lab::Lab;
use komainu_lab::cluster::{Document, SOON};
use komainu_lab::standard::{self, ECHO};
use komainu_lab::topology::Standard;
use komainu_lab::traffic::crowd::Crowd;
use komainu_tests::{Bed, GROUP, Machine, vip};

/// Connections for each mode.
const CROWD: usize = 1000;
/// How often each says something.
const INTERVAL: Duration = Duration::from_secs(4);
/// How long opening them may take on a machine that does much else.
const FILL: Duration = Duration::from_secs(60);
/// How long a connection may take to answer after a failover: its segments are sent again at growing intervals.
const ROLL: Duration = Duration::from_secs(30);
/// Where a node shows its metrics, when it is told to.
pub const METRICS: &str = "127.0.0.1:7802";
/// Modes, and the ports of their echo services: `dsr` can't change ports.
const MODES: [(&str, u16); 3] = [("nat", 71), ("nat-transparent", 72), ("dsr", ECHO)];
const BACKENDS: Standard =
    Standard { service_backends: 4, inside_backends: 3, far: false, balancers: 2, witness: true };

/// A TCP echo service in every mode, with all backends of the lab or all but the last.
fn document(lab: &Lab, all: bool) -> Document {
    let mut document = Document::default().group(standard::group(lab));
    for (mode, port) in MODES {
        let mut service = standard::service(lab, mode, vip(0), port, "tcp", mode, ECHO);
        if !all {
            service.backends.pop();
        }
        document = document.service(service);
    }
    document
}

fn crowds(bed: &Bed) -> Vec<(&'static str, Crowd)> {
    let open = |(mode, port): (&'static str, u16)| {
        let at: SocketAddr = (vip(0), port).into();
        (mode, Crowd::start(bed.client(), at, CROWD, INTERVAL).unwrap())
    };
    let crowds: Vec<_> = MODES.into_iter().map(open).collect();
    for (mode, crowd) in &crowds {
        crowd.fill(FILL).unwrap_or_else(|e| panic!("{mode}: {e}"));
    }
    crowds
}

/// Waits until the standby has what the owner has.
fn caught_up(bed: &Bed, owner: &str) {
    bed.cluster
        .wait_status(owner, "the standby to have all flows", SOON, |s| {
            s.group(GROUP).is_some_and(|g| g.standby_lag_flows == 0)
                && !s.notices.iter().any(|n| n.contains("has not caught up"))
        })
        .unwrap();
}

fn all_alive(crowds: &[(&str, Crowd)], when: &str) {
    for (mode, crowd) in crowds {
        let roll = crowd.roll_call(ROLL);
        println!("{mode}, {when}: {} of {CROWD} alive", roll.alive);
        assert_eq!((roll.alive, roll.broken), (CROWD, 0), "{mode}, {when}: {roll:?}");
    }
}

/// With services that have been settled from the start: only what `nat` binds is known to the flow table.
fn a_thousand_connections_of_every_mode_outlive_their_owner() {
    let mut bed = Bed::start(Machine::Alone, BACKENDS, |lab| document(lab, true));
    let crowds = crowds(&bed);
    all_alive(&crowds, "before");
    let owner = bed.owner();
    caught_up(&bed, &owner);
    bed.cluster.kill_9(&owner);
    let after = bed.owner_other_than(&owner);
    all_alive(&crowds, "after the first death");
    // And the other way round, by flows that the new owner has from the old one.
    bed.cluster.start(&owner).unwrap();
    bed.cluster.wait_formed(SOON).unwrap();
    caught_up(&bed, &after);
    bed.cluster.kill_9(&after);
    bed.owner_other_than(&after);
    all_alive(&crowds, "after the second death");
}

/// Slots in transition: flows of before, on the drained backend, and of after, which only the flow table knows.
fn so_do_they_when_a_backend_was_drained_and_another_added_just_before() {
    let mut bed = Bed::start(Machine::Alone, BACKENDS, |lab| document(lab, false));
    let crowds = crowds(&bed);
    let owner = bed.owner();
    let whole = document(&bed.cluster.lab, true);
    bed.cluster.apply(&owner, &whole).unwrap();
    bed.cluster.wait_all_up(SOON).unwrap();
    for (mode, _) in MODES {
        let first = if mode == "nat-transparent" { "bi1" } else { "be1" };
        bed.cluster.cli_ok(&owner, &["backend", "drain", &format!("{mode}/{first}")]).unwrap();
    }
    for (mode, crowd) in &crowds {
        crowd.close_every_second();
        crowd.fill(FILL).unwrap_or_else(|e| panic!("{mode}: {e}"));
    }
    all_alive(&crowds, "before");
    caught_up(&bed, &owner);
    bed.cluster.kill_9(&owner);
    bed.owner_other_than(&owner);
    all_alive(&crowds, "after");
}

komainu_tests::system_on_every_lane!(
    a_thousand_connections_of_every_mode_outlive_their_owner,
    so_do_they_when_a_backend_was_drained_and_another_added_just_before,
);

/// Nothing is promised for a standby that isn't there, and status says so; nor does it hold up anything.
#[test]
fn a_standby_that_is_gone_lacks_everything_until_it_is_back_and_has_caught_up() {
    let mut bed = Bed::start(Machine::Alone, BACKENDS, |lab| document(lab, true));
    let crowd = Crowd::start(bed.client(), (vip(0), 71).into(), 200, INTERVAL).unwrap();
    crowd.fill(FILL).unwrap();
    let owner = bed.owner();
    caught_up(&bed, &owner);
    let standby = bed.other_than(&owner);
    bed.cluster.kill_9(&standby);
    bed.cluster
        .wait_status(&owner, "what the dead standby lacks", SOON, |s| {
            s.group(GROUP).is_some_and(|g| g.standby_lag_flows >= 200)
        })
        .unwrap();
    bed.cluster.start(&standby).unwrap();
    bed.cluster.wait_formed(SOON).unwrap();
    caught_up(&bed, &owner);
    bed.cluster.kill_9(&owner);
    assert_eq!(bed.owner_other_than(&owner), standby);
    let roll = crowd.roll_call(ROLL);
    assert_eq!((roll.alive, roll.broken), (200, 0), "{roll:?}");
}

/// Value of a series on a node's metrics page.
pub fn metric(bed: &Bed, node: &str, series: &str) -> u64 {
    let page = bed.host(node).run(|| {
        let mut stream = TcpStream::connect(METRICS).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        page
    });
    let line = page.lines().find(|l| l.starts_with(series)).unwrap_or_else(|| panic!("{series} in {page}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Settled services of `dsr` and `nat-transparent` need no flow on the standby; `nat` a few bytes for each.
#[test]
fn only_flows_that_the_tables_do_not_tell_are_sent() {
    let mut bed = Bed::idle(Machine::Alone, BACKENDS);
    for node in ["lb1", "lb2"] {
        bed.cluster.configure(node, &format!("[metrics]\nlisten = \"{METRICS}\"\n")).unwrap();
    }
    let owner = bed.form(|lab| document(lab, true));
    caught_up(&bed, &owner);
    let standby = bed.other_than(&owner);
    // UDP and IPv4 headers included.
    let sent = |bed: &Bed| -> u64 {
        let of = |node: &str, what: &str| {
            metric(bed, node, &format!("komainu_flow_sync_{what}_total{{what=\"sent\"}}"))
        };
        ["lb1", "lb2"].iter().map(|node| of(node, "bytes") + 28 * of(node, "datagrams")).sum()
    };
    let adopted = |bed: &Bed| metric(bed, &standby, "komainu_flow_sync_flows_total{what=\"adopted\"}");
    // `nat` last: the ends of its connections are news too, and would be counted for the mode after it.
    for (mode, port) in MODES.into_iter().rev() {
        let (bytes, flows) = (sent(&bed), adopted(&bed));
        let crowd = Crowd::start(bed.client(), (vip(0), port).into(), CROWD, INTERVAL).unwrap();
        let began = std::time::Instant::now();
        crowd.fill(FILL).unwrap();
        let took = began.elapsed();
        caught_up(&bed, &owner);
        let (bytes, flows) = (sent(&bed) - bytes, adopted(&bed) - flows);
        println!(
            "{mode}: {bytes} bytes for {CROWD} connections opened within {took:?}, {flows} of them told"
        );
        // A few may have been closed by the client while they were being opened, and told twice.
        let expected = if mode == "nat" { CROWD as u64..2 * CROWD as u64 } else { 0..1 };
        assert!(expected.contains(&flows), "{mode}: {flows}");
    }
}
