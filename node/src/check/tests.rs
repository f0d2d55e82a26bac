//! The findings, for files and machines that are wrong on purpose.

use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::UnixListener;

use super::*;

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench { dir: tempfile::tempdir().unwrap() }
    }

    /// A witness: it needs no interface, so the same on every machine.
    fn config(&self, more: &str) -> NodeConfig {
        let dir = self.dir.path().display();
        format!(
            "id = 3\nname = \"w\"\nrole = \"witness\"\ndata_dir = \"{dir}/data\"\nrun_dir = \"{dir}/run\"\n{more}"
        )
        .parse()
        .unwrap()
    }
}

fn find<'a>(report: &'a Report, subject: &str) -> Vec<&'a Finding> {
    report.findings.iter().filter(|f| f.subject == subject).collect()
}

#[test]
fn a_witness_on_a_sound_machine_is_ok_and_nothing_is_left_behind() {
    let bench = Bench::new();
    let report = check(&bench.config(""), Asker::Operator);
    assert!(report.ok(), "{report}");
    assert_eq!(std::fs::read_dir(bench.dir.path()).unwrap().count(), 0);
    assert!(find(&report, "data_dir")[0].text.contains("will be made"));
}

#[test]
fn mistakes_of_the_file_are_findings() {
    let bench = Bench::new();
    let file = bench.dir.path().join("node.toml");
    std::fs::write(&file, "id = 0\nname = \"lb1\"\nrole = \"balancr\"\n").unwrap();
    let report = check_file(&file);
    assert!(!report.ok());
    assert!(report.findings.len() >= 2, "{report}");
    assert!(report.findings.iter().all(|f| f.level == Level::Fail && f.subject == "node file"));
    let missing = check_file(&bench.dir.path().join("none.toml"));
    assert!(missing.failures().any(|f| f.text.contains("can't be read")), "{missing}");
}

#[test]
fn a_taken_port_is_named() {
    let bench = Bench::new();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let config = bench.config(&format!(
        "[cluster]\nlisten = \"{}\"\n[metrics]\nlisten = \"{}\"\n",
        udp.local_addr().unwrap(),
        tcp.local_addr().unwrap()
    ));
    let report = check(&config, Asker::Operator);
    assert_eq!(report.failures().count(), 2, "{report}");
    assert!(
        find(&report, "cluster.listen").iter().any(|f| f.level == Level::Fail && f.text.contains("(UDP)"))
    );
    assert!(find(&report, "metrics.listen")[0].text.contains("can't be listened on"));
    assert!(!find(&report, "metrics.listen")[0].action.is_empty());
}

#[test]
fn an_address_of_another_machine_is_named() {
    let bench = Bench::new();
    let report = check(&bench.config("[metrics]\nlisten = \"203.0.113.1:7802\"\n"), Asker::Operator);
    assert!(find(&report, "metrics.listen")[0].action.contains("ip address"), "{report}");
}

#[test]
fn a_running_daemon_is_no_fault_to_an_operator_and_one_to_another_daemon() {
    let bench = Bench::new();
    let config = bench.config("");
    std::fs::create_dir(&config.run_dir).unwrap();
    let _socket = UnixListener::bind(config.socket()).unwrap();
    assert!(check(&config, Asker::Operator).ok());
    let report = check(&config, Asker::Daemon);
    assert!(report.failures().any(|f| f.text.contains("another komainu is running")), "{report}");
}

#[test]
fn a_place_that_is_no_directory_is_named() {
    let bench = Bench::new();
    let config = bench.config("");
    std::fs::write(&config.data_dir, "a file").unwrap();
    let report = check(&config, Asker::Operator);
    assert!(report.failures().any(|f| f.subject == "data_dir"), "{report}");
}

#[test]
fn a_missing_interface_is_named_with_those_that_exist() {
    let bench = Bench::new();
    let config: NodeConfig = bench_balancer(&bench);
    let report = check(&config, Asker::Operator);
    assert!(
        report.failures().any(|f| f.subject == "interface nosuch0" && f.text.contains("does not exist")),
        "{report}"
    );
}

fn bench_balancer(bench: &Bench) -> NodeConfig {
    let dir = bench.dir.path().display();
    format!(
        "id = 1\nname = \"lb1\"\nrole = \"balancer\"\ndata_dir = \"{dir}/data\"\nrun_dir = \"{dir}/run\"\n\
         [service]\ninterface = \"nosuch0\"\n"
    )
    .parse()
    .unwrap()
}

#[test]
fn both_forms_say_the_same() {
    let report = Report {
        choice: None,
        findings: vec![Finding::ok("clock", "runs"), Finding::fail("data_dir", "is full", "make room")],
    };
    assert_eq!(report.to_string(), "ok    clock: runs\nfail  data_dir: is full; make room\n");
    let json = report.to_json();
    assert_eq!(json["ok"], false);
    assert_eq!(json["findings"][1]["level"], "fail");
    assert_eq!(json["findings"][1]["action"], "make room");
}
