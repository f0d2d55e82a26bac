//! Scheduling, on paused time and with scripted answers.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// Answers as the script says, and writes down when it was asked.
#[derive(Default)]
struct Script {
    /// Failing backends.
    down: Mutex<Vec<BackendId>>,
    /// Time that an answer takes.
    takes: Mutex<Duration>,
    asked: Mutex<Vec<(BackendId, Instant)>>,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
}

struct UnderWay<'a>(&'a AtomicUsize);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Probe for Script {
    fn ask<'a>(&'a self, target: &'a Target) -> Pin<Box<dyn Future<Output = Answer> + Send + 'a>> {
        Box::pin(async move {
            lock(&self.asked).push((target.backend, Instant::now()));
            let now = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
            let _under_way = UnderWay(&self.under_way);
            self.most_under_way.fetch_max(now, Ordering::SeqCst);
            let takes = *lock(&self.takes);
            tokio::time::sleep(takes).await;
            let success = !lock(&self.down).contains(&target.backend);
            Answer { success, reason: if success { "fine" } else { "not fine" }.to_owned() }
        })
    }
}

struct Bench {
    script: Arc<Script>,
    checker: Checker,
    reports: Arc<Mutex<Vec<(u32, Health)>>>,
}

impl Bench {
    fn new() -> Bench {
        let script = Arc::new(Script::default());
        let reports = Arc::new(Mutex::new(Vec::new()));
        let sink = reports.clone();
        let report: Report = Arc::new(move |o: Observation| lock(&sink).push((o.backend.0, o.health)));
        let checker = Checker::new(Handle::current(), script.clone(), report, 7);
        Bench { script, checker, reports }
    }

    fn set_down(&self, ids: &[u32]) {
        *lock(&self.script.down) = ids.iter().map(|id| BackendId(*id)).collect();
    }

    fn reports(&self) -> Vec<(u32, Health)> {
        std::mem::take(&mut lock(&self.reports))
    }

    fn asked(&self, id: u32) -> Vec<Instant> {
        lock(&self.script.asked).iter().filter(|(b, _)| b.0 == id).map(|(_, at)| *at).collect()
    }
}

fn target(id: u32) -> Target {
    Target {
        backend: BackendId(id),
        name: format!("web/be{id}"),
        address: SocketAddr::from(([127, 0, 0, 1], 1000 + id as u16)),
        check: HealthCheck::default(),
        initial: Health::Unknown,
    }
}

async fn after(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

#[tokio::test(start_paused = true)]
async fn a_fresh_backend_is_up_well_within_an_interval() {
    let bench = Bench::new();
    bench.checker.set_targets(vec![target(1), target(2)]);
    after(100).await;
    let mut reports = bench.reports();
    reports.sort();
    assert_eq!(reports, [(1, Health::Up), (2, Health::Up)]);
    assert_eq!(bench.checker.status(BackendId(1)).unwrap().reason, "fine");
}

#[tokio::test(start_paused = true)]
async fn falls_and_rises_and_reports_only_changes() {
    let bench = Bench::new();
    bench.checker.set_targets(vec![target(1)]);
    after(5000).await;
    assert_eq!(bench.reports(), [(1, Health::Up)]);
    bench.set_down(&[1]);
    after(2500).await;
    assert_eq!(bench.reports(), [], "fall = 3");
    after(2000).await;
    assert_eq!(bench.reports(), [(1, Health::Down)]);
    assert_eq!(bench.checker.status(BackendId(1)).unwrap().reason, "not fine");
    bench.set_down(&[]);
    after(3500).await;
    assert_eq!(bench.reports(), [(1, Health::Up)]);
}

/// A node whose interface had been gone took good backends out when it owned the group again: its own failures of that time,
/// and of the second after it, in which its neighbours still had its old link-layer address, had counted.
#[tokio::test(start_paused = true)]
async fn failures_of_a_node_that_is_cut_off_or_settling_do_not_count() {
    let bench = Bench::new();
    bench.checker.set_targets(vec![target(1), target(2)]);
    after(5000).await;
    assert_eq!(bench.reports().len(), 2);
    bench.set_down(&[1, 2]);
    bench.checker.set_cut_off(true);
    after(20_000).await;
    assert_eq!(bench.reports(), []);
    let status = bench.checker.status(BackendId(1)).unwrap();
    assert_eq!((status.health, status.reason.as_str()), (Health::Up, "not fine"));
    bench.checker.set_cut_off(false);
    after(SETTLING.as_millis() as u64).await;
    bench.set_down(&[2]);
    after(2500).await;
    assert_eq!(bench.reports(), [], "what failed before counts for nothing now");
    after(2000).await;
    assert_eq!(bench.reports(), [(2, Health::Down)], "what fails after does");
    // A success is one at any time.
    bench.checker.set_cut_off(true);
    bench.set_down(&[]);
    after(5000).await;
    assert_eq!(bench.reports(), [(2, Health::Up)]);
}

#[tokio::test(start_paused = true)]
async fn intervals_are_jittered_and_kept() {
    let bench = Bench::new();
    *lock(&bench.script.takes) = Duration::from_millis(300);
    bench.checker.set_targets(vec![target(1)]);
    after(200_000).await;
    let asked = bench.asked(1);
    let gaps: Vec<_> = asked.windows(2).skip(1).map(|w| (w[1] - w[0]).as_millis()).collect();
    assert!(gaps.iter().all(|g| (899..=1102).contains(g)), "{gaps:?}");
    assert!(gaps.iter().any(|g| *g < 960) && gaps.iter().any(|g| *g > 1040), "{gaps:?}");
}

#[tokio::test(start_paused = true)]
async fn checks_spread_over_the_interval() {
    let bench = Bench::new();
    bench.checker.set_targets((1..=100).map(target).collect());
    after(3000).await;
    let start = bench.asked(1)[0];
    let mut tenths = [0; 10];
    for id in 1..=100 {
        for at in bench.asked(id) {
            let ms = (at - start).as_millis() as usize;
            if (1000..2000).contains(&ms) {
                tenths[(ms - 1000) / 100] += 1;
            }
        }
    }
    assert!(tenths.iter().all(|n| *n <= 30), "{tenths:?}");
}

#[tokio::test(start_paused = true)]
async fn no_more_than_the_limit_at_one_time() {
    let bench = Bench::new();
    *lock(&bench.script.takes) = Duration::from_secs(2);
    bench.checker.set_targets((1..=600).map(target).collect());
    after(20_000).await;
    assert_eq!(bench.script.most_under_way.load(Ordering::SeqCst), MAX_CONCURRENT);
    assert_eq!(bench.reports().len(), 600, "and everybody has a turn");
}

#[tokio::test(start_paused = true)]
async fn a_removed_backend_is_asked_no_more_and_its_probe_ends() {
    let bench = Bench::new();
    *lock(&bench.script.takes) = Duration::from_millis(400);
    bench.checker.set_targets(vec![target(1), target(2)]);
    after(100).await;
    assert_eq!(bench.script.under_way.load(Ordering::SeqCst), 2);
    bench.checker.set_targets(vec![target(2)]);
    after(10).await;
    assert_eq!(bench.script.under_way.load(Ordering::SeqCst), 1);
    after(5000).await;
    assert_eq!(bench.asked(1).len(), 1);
    assert_eq!(bench.reports(), [(2, Health::Up)]);
    assert_eq!(bench.checker.status(BackendId(1)), None);
}

#[tokio::test(start_paused = true)]
async fn an_unchanged_backend_is_not_disturbed() {
    let bench = Bench::new();
    bench.checker.set_targets(vec![target(1)]);
    for _ in 0..100 {
        after(20).await;
        bench.checker.set_targets(vec![Target { initial: Health::Up, ..target(1) }]);
    }
    assert!((2..=4).contains(&bench.asked(1).len()));
}

#[tokio::test(start_paused = true)]
async fn a_new_address_is_unknown_until_checked() {
    let bench = Bench::new();
    bench.checker.set_targets(vec![target(1)]);
    after(100).await;
    bench.reports();
    bench.set_down(&[1]);
    let moved = Target { address: SocketAddr::from(([127, 0, 0, 2], 80)), ..target(1) };
    bench.checker.set_targets(vec![moved]);
    assert_eq!(bench.reports(), [(1, Health::Unknown)]);
    after(4000).await;
    assert_eq!(bench.reports(), [(1, Health::Down)]);
}

#[tokio::test(start_paused = true)]
async fn another_question_keeps_the_verdict_until_it_has_decided() {
    let bench = Bench::new();
    bench.checker.set_targets(vec![target(1)]);
    after(100).await;
    bench.reports();
    bench.set_down(&[1]);
    let mut asked_otherwise = target(1);
    asked_otherwise.check.path = "/other".to_owned();
    bench.checker.set_targets(vec![asked_otherwise]);
    after(1500).await;
    assert_eq!(bench.checker.status(BackendId(1)).unwrap().health, Health::Up);
    after(2500).await;
    assert_eq!(bench.reports(), [(1, Health::Down)]);
}

#[tokio::test(start_paused = true)]
async fn a_verdict_taken_over_is_confirmed_or_counted_down() {
    let bench = Bench::new();
    bench.set_down(&[2]);
    let seeded = |id| Target { initial: Health::Up, ..target(id) };
    bench.checker.set_targets(vec![seeded(1), seeded(2)]);
    after(100).await;
    assert_eq!(bench.reports(), [(1, Health::Up)]);
    after(4000).await;
    assert_eq!(bench.reports(), [(2, Health::Down)]);
}

#[tokio::test(start_paused = true)]
async fn without_a_check_a_backend_is_up_and_never_asked() {
    let bench = Bench::new();
    let mut unchecked = target(1);
    unchecked.check.kind = CheckType::None;
    bench.checker.set_targets(vec![unchecked]);
    assert_eq!(bench.reports(), [(1, Health::Up)]);
    after(5000).await;
    assert!(bench.asked(1).is_empty());
}
