//! The adapter and the installer over a lane that writes down what it is told.

use std::net::SocketAddr;
use std::sync::mpsc;

use komainu_cluster::state::{Change, Command};
use komainu_cluster::time::Instant;
use komainu_packet::lane::{Counters, FlowFilter, FlowInfo, Lane, LaneError, LaneKind, LinkInfo, Trace};
use komainu_proto::domain::{Document, Group};

use super::*;

#[derive(Default)]
struct Recorder {
    plans: Mutex<Vec<u64>>,
    leases: Mutex<Vec<(u32, Lease)>>,
    announced: Mutex<Vec<u32>>,
    refuse: Mutex<Option<String>>,
    /// Held while an installation is to take its time.
    gate: Mutex<()>,
}

impl Lane for Recorder {
    fn kind(&self) -> LaneKind {
        LaneKind::AfPacket
    }

    fn mode(&self) -> String {
        "recorder".to_owned()
    }

    fn install(&self, plan: Plan) -> Result<(), LaneError> {
        let _gate = self.gate.lock().unwrap();
        if let Some(reason) = self.refuse.lock().unwrap().clone() {
            return Err(LaneError::Plan { revision: plan.revision, reason });
        }
        self.plans.lock().unwrap().push(plan.revision);
        Ok(())
    }

    fn installed_revision(&self) -> u64 {
        self.plans.lock().unwrap().last().copied().unwrap_or(0)
    }

    fn set_lease(&self, group: u32, lease: Lease) {
        self.leases.lock().unwrap().push((group, lease));
    }

    fn announce(&self, group: u32) {
        self.announced.lock().unwrap().push(group);
    }

    fn counters(&self) -> Counters {
        Counters::default()
    }

    fn flows(&self, _filter: &FlowFilter, _limit: usize) -> Vec<FlowInfo> {
        Vec::new()
    }

    fn trace(&self, _service: u32, _client: SocketAddr) -> Option<Trace> {
        None
    }

    fn links(&self) -> Vec<LinkInfo> {
        Vec::new()
    }

    fn stop(&self) {}
}

struct Bench {
    lane: Arc<Recorder>,
    path: Arc<LanePath>,
    installer: Installer,
    told: mpsc::Receiver<InstallStatus>,
    state: State,
}

const SOON: Duration = Duration::from_secs(10);

impl Bench {
    fn new() -> Bench {
        let lane = Arc::new(Recorder::default());
        let path = Arc::new(LanePath::new(lane.clone()));
        let (tx, told) = mpsc::channel();
        let installer = Installer::start(path.clone(), || {}, move |s| tx.send(s.clone()).unwrap()).unwrap();
        Bench { lane, path, installer, told, state: State::default() }
    }

    fn groups(&mut self, names: &[&str]) -> u64 {
        let group = |(i, name): (usize, &&str)| Group {
            name: (*name).to_owned(),
            vips: vec![[192, 0, 2, i as u8 + 1].into()],
            inside_vips: vec![],
            snat: vec![],
            prefer: None,
            preempt: false,
        };
        let document = Document { groups: names.iter().enumerate().map(group).collect(), services: vec![] };
        let change = Change::Apply { document, if_revision: None, confirm_within_ms: None };
        let index = self.state.index + 1;
        self.state.apply(index, &Command::own(0, change)).unwrap();
        index
    }

    fn submit(&self) {
        self.installer.submit(Arc::new(self.state.clone()));
    }

    fn wait_for_index(&self, index: u64) {
        let end = std::time::Instant::now() + SOON;
        while self.path.installed_index() < index {
            assert!(std::time::Instant::now() < end, "index {index} was not installed");
            std::thread::yield_now();
        }
    }

    fn plans(&self) -> Vec<u64> {
        self.lane.plans.lock().unwrap().clone()
    }
}

#[test]
fn leases_and_announcements_pass_unchanged() {
    let bench = Bench::new();
    let lease = LeaseUpdate { epoch: 7, answer_until: Instant(10), forward_until: Instant(20) };
    bench.path.set_lease(GroupId(3), lease);
    bench.path.announce(GroupId(3));
    let expected = Lease { epoch: 7, answer_until: BootTime(10), forward_until: BootTime(20) };
    assert_eq!(*bench.lane.leases.lock().unwrap(), [(3, expected)]);
    assert_eq!(*bench.lane.announced.lock().unwrap(), [3]);
    assert_eq!(bench.path.forwards_until(), BootTime(20));
    bench.path.set_lease(GroupId(3), LeaseUpdate::default());
    assert_eq!(bench.path.forwards_until(), BootTime(0));
}

#[test]
fn the_index_follows_the_tables() {
    let mut bench = Bench::new();
    assert_eq!(bench.path.installed_index(), 0);
    let index = bench.groups(&["a"]);
    bench.submit();
    bench.wait_for_index(index);
    assert_eq!(bench.plans(), [index]);
}

#[test]
fn an_entry_that_changes_no_table_raises_the_index_alone() {
    let mut bench = Bench::new();
    let index = bench.groups(&["a"]);
    bench.submit();
    bench.wait_for_index(index);
    bench.state.advance(index + 5);
    bench.submit();
    bench.wait_for_index(index + 5);
    assert_eq!(bench.plans(), [index]);
}

#[test]
fn only_the_newest_of_what_waits_is_installed() {
    let mut bench = Bench::new();
    let lane = bench.lane.clone();
    let busy = lane.gate.lock().unwrap();
    bench.groups(&["a"]);
    bench.submit();
    // One of them may have been taken up before the next came; of those that wait only the last is installed.
    for names in [&["a", "b"][..], &["b"], &["c", "d"]] {
        bench.groups(names);
        bench.submit();
    }
    let last = bench.state.index;
    assert_eq!(bench.path.installed_index(), 0, "not before the lane has confirmed");
    drop(busy);
    bench.wait_for_index(last);
    let plans = bench.plans();
    assert!(plans.len() <= 2 && plans.last() == Some(&last), "{plans:?}, last {last}");
}

#[test]
fn a_refused_plan_leaves_the_index_and_is_offered_again() {
    let mut bench = Bench::new();
    let good = bench.groups(&["a"]);
    bench.submit();
    bench.wait_for_index(good);
    *bench.lane.refuse.lock().unwrap() = Some("no room".to_owned());
    let bad = bench.groups(&["a", "b"]);
    bench.submit();
    let told = bench.told.recv_timeout(SOON).unwrap();
    assert!(told.notices()[0].contains("no room") && told.refused.as_ref().unwrap().0 == bad, "{told:?}");
    assert_eq!(bench.installer.status(), told);
    assert_eq!(bench.path.installed_index(), good);
    *bench.lane.refuse.lock().unwrap() = None;
    bench.wait_for_index(bad);
    assert_eq!(bench.told.recv_timeout(SOON).unwrap(), InstallStatus::default());
    assert_eq!(bench.plans(), [good, bad]);
}

#[test]
fn an_older_state_is_not_taken() {
    let mut bench = Bench::new();
    bench.groups(&["a"]);
    let old = Arc::new(bench.state.clone());
    let index = bench.groups(&["b"]);
    bench.submit();
    bench.wait_for_index(index);
    bench.installer.submit(old);
    let index = bench.groups(&["c"]);
    bench.submit();
    bench.wait_for_index(index);
    assert_eq!(bench.plans().len(), 2);
}

#[test]
fn leases_are_told_with_their_group_and_epoch() {
    let path = LanePath::new(Arc::new(Recorder::default()));
    assert_eq!(path.leases(), []);
    let lease = |epoch, until| LeaseUpdate { epoch, answer_until: Instant(1), forward_until: Instant(until) };
    path.set_lease(GroupId(3), lease(1, 50));
    path.set_lease(GroupId(3), lease(2, 70));
    // The same cell.
    path.set_lease(GroupId(5), lease(9, 10));
    path.set_lease(GroupId(5 + MAX_GROUPS as u32), lease(4, 60));
    let held: Vec<_> = path.leases().iter().map(|l| (l.group.0, l.epoch, l.forward_until.0)).collect();
    assert_eq!(held, [(3, 2, 70), (5 + MAX_GROUPS as u32, 4, 60)]);
    assert_eq!(path.forwards_until(), BootTime(70));
}
