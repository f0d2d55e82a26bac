//! The daemon's outside, on the real binary: what systemd, scripts and signals see of it. A witness alone serves for
//! that, for it needs neither root nor an interface.
#![allow(clippy::unwrap_used, reason = "helpers of a test: what can't be unwrapped is its failure")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longest that anything here may take; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

struct Bench {
    dir: tempfile::TempDir,
    metrics: SocketAddr,
}

impl Bench {
    fn new() -> Bench {
        // Free a moment ago; nobody else on this machine picks the same one meanwhile.
        let metrics = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let bench = Bench { dir: tempfile::tempdir().unwrap(), metrics };
        bench.write("node.toml", &bench.node_file());
        bench
    }

    fn node_file(&self) -> String {
        let (dir, metrics) = (self.dir.path().display(), self.metrics);
        format!(
            "id = 3\nname = \"w\"\nrole = \"witness\"\ndata_dir = \"{dir}/data\"\nrun_dir = \"{dir}/run\"\n\
             [metrics]\nlisten = \"{metrics}\"\n"
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn command(&self, word: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_komainu"));
        command.arg(word).arg("-c").arg(self.path("node.toml"));
        command.env_remove("NOTIFY_SOCKET").env_remove("WATCHDOG_USEC").env_remove("JOURNAL_STREAM");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A daemon, and the socket on which it tells systemd things.
    fn start(&self, configure: impl FnOnce(&mut Command)) -> (Daemon, Notified) {
        let socket = UnixDatagram::bind(self.path("notify")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut command = self.command("run");
        command.env("NOTIFY_SOCKET", self.path("notify"));
        configure(&mut command);
        let child = command.spawn().unwrap();
        (Daemon(child), Notified(socket))
    }

    fn page(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.metrics).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn socket(&self) -> PathBuf {
        self.path("run/admin.sock")
    }
}

/// Killed at the end, also of a test that fails.
struct Daemon(Child);

impl Daemon {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }

    /// Exit status and log.
    fn end(mut self) -> (Option<i32>, String) {
        let mut log = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (self.0.wait().unwrap().code(), log)
    }

    fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Notified(UnixDatagram);

impl Notified {
    /// Waits until a message has this line.
    fn wait_for(&self, line: &str) {
        let end = Instant::now() + PATIENCE;
        let mut message = [0; 1024];
        while Instant::now() < end {
            let len = self.0.recv(&mut message).unwrap_or_else(|e| panic!("{line} was never told: {e}"));
            if String::from_utf8_lossy(&message[..len]).lines().any(|l| l == line) {
                return;
            }
        }
        panic!("{line} was never told");
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn tells_systemd_answers_and_ends_in_order() {
    let bench = Bench::new();
    let (mut daemon, notified) = bench.start(|_| {});
    notified.wait_for("READY=1");
    assert!(bench.page("/healthz").starts_with("HTTP/1.1 200 "));
    eventually("ready as its own leader", || bench.page("/readyz").starts_with("HTTP/1.1 200 "));
    notified.wait_for("STATUS=witness; leader w");
    let metrics = bench.page("/metrics");
    assert!(metrics.contains("komainu_raft_is_leader 1\n"), "{metrics}");
    assert!(metrics.contains("komainu_node_info{node=\"w\",role=\"witness\""), "{metrics}");

    daemon.signal(Signal::SIGHUP);
    assert!(bench.page("/healthz").starts_with("HTTP/1.1 200 "));
    assert!(daemon.is_running(), "SIGHUP ends nothing");

    daemon.signal(Signal::SIGTERM);
    notified.wait_for("STOPPING=1");
    let (code, log) = daemon.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("SIGHUP: nothing to do") && log.contains("stopped"), "{log}");
    assert!(!bench.socket().exists());
}

#[test]
fn keeps_the_watchdog_quiet() {
    let bench = Bench::new();
    let (daemon, notified) = bench.start(|c| {
        c.env("WATCHDOG_USEC", "200000");
    });
    for _ in 0..3 {
        notified.wait_for("WATCHDOG=1");
    }
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.end().0, Some(0), "SIGINT stops in order, too");
}

#[test]
fn a_killed_one_leaves_nothing_in_the_way() {
    let bench = Bench::new();
    let (mut daemon, notified) = bench.start(|_| {});
    notified.wait_for("READY=1");
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
    std::fs::remove_file(bench.path("notify")).unwrap();
    let (daemon, notified) = bench.start(|_| {});
    notified.wait_for("READY=1");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn a_second_one_refuses_and_the_first_goes_on() {
    let bench = Bench::new();
    let (mut daemon, notified) = bench.start(|_| {});
    notified.wait_for("READY=1");
    let second = bench.command("run").output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("another komainu is running here"), "{}", stderr(&second));
    assert!(daemon.is_running());
    UnixStream::connect(bench.socket()).expect("the first one's socket is still its own");
    let check = bench.command("check").output().unwrap();
    assert_eq!(
        check.status.code(),
        Some(0),
        "asking is no fault: {}",
        String::from_utf8_lossy(&check.stdout)
    );
}

#[test]
fn every_line_of_the_json_log_is_json() {
    let bench = Bench::new();
    bench.write("node.toml", &format!("{}[log]\nformat = \"json\"\n", bench.node_file()));
    let (daemon, notified) = bench.start(|c| {
        c.env("KOMAINU_LOG", "debug");
    });
    notified.wait_for("READY=1");
    daemon.signal(Signal::SIGTERM);
    let (code, log) = daemon.end();
    assert_eq!(code, Some(0));
    let lines: Vec<serde_json::Value> =
        log.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{l}: {e}"))).collect();
    assert!(lines.iter().any(|l| l["message"] == "started" && l["name"] == "w"), "{log}");
    assert!(lines.iter().any(|l| l["level"] == "DEBUG"), "the environment goes before the file");
}

#[test]
fn a_wrong_file_is_refused_with_field_value_and_line() {
    let bench = Bench::new();
    bench.write("node.toml", &bench.node_file().replace("id = 3", "id = 0"));
    for word in ["run", "check"] {
        let output = bench.command(word).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{word}");
        let said = format!("{}{}", stderr(&output), String::from_utf8_lossy(&output.stdout));
        assert!(said.contains("node.toml:1") && said.contains("id = 0"), "{word}: {said}");
    }
    assert!(!bench.path("data").exists() && !bench.path("run").exists(), "and nothing was made");
}

#[test]
fn check_as_json_is_json_and_its_exit_says_the_same() {
    let bench = Bench::new();
    let ask = |bench: &Bench| {
        let output = bench.command("check").arg("--json").output().unwrap();
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), json)
    };
    let (code, json) = ask(&bench);
    assert_eq!((code, &json["ok"]), (Some(0), &serde_json::json!(true)), "{json}");
    let _taken = TcpListener::bind(bench.metrics).unwrap();
    let (code, json) = ask(&bench);
    assert_eq!((code, &json["ok"]), (Some(1), &serde_json::json!(false)), "{json}");
    let failed = |f: &&serde_json::Value| f["level"] == "fail";
    let failures: Vec<_> = json["findings"].as_array().unwrap().iter().filter(failed).collect();
    assert_eq!(failures.len(), 1, "{json}");
    assert_eq!(failures[0]["subject"], "metrics.listen");
}

#[test]
fn a_taken_metrics_port_keeps_it_from_starting_and_is_said_once() {
    let bench = Bench::new();
    let _taken = TcpListener::bind(bench.metrics).unwrap();
    let output = bench.command("run").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let last = BufReader::new(&output.stderr[..]).lines().last().unwrap().unwrap();
    assert!(last.contains("metrics.listen") && last.contains("can't be listened on"), "{}", stderr(&output));
    assert!(!has_store(&bench.path("data")), "no store was made");
}

fn has_store(data_dir: &Path) -> bool {
    data_dir.exists() && std::fs::read_dir(data_dir).unwrap().next().is_some()
}
