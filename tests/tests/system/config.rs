//! Mistakes are refused with the field named, and change nothing.

use komainu_lab::Lab;
use komainu_lab::Standard;
use komainu_lab::cluster::document::Service;
use komainu_lab::cluster::{Cluster, NodeSpec, SOON, binary};
use komainu_lab::traffic::http::requests;
use komainu_tests::{Bed, Machine, PATIENCE, changed, http, lane_word, web_document};

type Change = fn(&mut Service);

/// A mistake, and words that the refusal must hold.
const SERVICE_MISTAKES: &[(&str, Change, &[&str])] = &[
    (
        "a VIP that is not the group's",
        |s| s.at.set_ip("192.0.2.99".parse().expect("an address")),
        &["vip", "192.0.2.99"],
    ),
    ("a group that is not there", |s| s.group = "nowhere".into(), &["group", "nowhere"]),
    ("an unknown mode", |s| s.mode = "natt", &["mode", "natt"]),
    ("a mode of later", |s| s.mode = "tunnel", &["mode", "tunnel"]),
    ("an unknown protocol", |s| s.protocol = "sctp", &["protocol", "sctp"]),
    ("an unknown scheduler", |s| s.extra = "scheduler = \"random\"".into(), &["scheduler", "random"]),
    ("an unknown policy", |s| s.extra = "dead_backend = \"panic\"".into(), &["dead_backend", "panic"]),
    ("an unknown field", |s| s.extra = "weigth = 3".into(), &["weigth"]),
    ("a port of 0", |s| s.at.set_port(0), &["port"]),
    ("the port of another service", |s| s.at.set_port(80), &["80"]),
    ("another port in dsr", |s| s.mode = "dsr", &["port", "8080"]),
    (
        "a backend of the other family",
        |s| s.backends[0].1.set_ip("2001:db8::b".parse().expect("an address")),
        &["address", "2001:db8::b"],
    ),
    ("two backends of one name", |s| s.backends[1].0 = s.backends[0].0.clone(), &["be1"]),
    ("the name of another service", |s| s.name = "web".into(), &["name", "web"]),
    ("an empty name", |s| s.name = String::new(), &["name"]),
    ("an unknown check", |s| s.health = "type = \"telnet\"".into(), &["health", "telnet"]),
    ("an interval out of range", |s| s.health = "interval_ms = 1".into(), &["interval_ms", "1"]),
    (
        "a timeout beyond the interval",
        |s| s.health = "interval_ms = 100\ntimeout_ms = 200".into(),
        &["timeout_ms", "200"],
    ),
    ("a rise of 0", |s| s.health = "rise = 0".into(), &["rise", "0"]),
    ("a number where a word belongs", |s| s.health = "type = 3".into(), &["type"]),
];

#[test]
fn a_document_with_a_mistake_is_refused_by_name_and_the_old_one_stays() {
    let bed = Bed::web(Machine::Shared);
    let before = bed.cluster.cli_ok("lb1", &["export"]).unwrap().stdout;
    let revision = bed.cluster.status("lb1").unwrap().cluster.revision;
    let refused = |what: &str, toml: &str, words: &[&str]| {
        let output = bed.cluster.try_apply("lb2", toml).unwrap();
        assert_eq!(output.status.code(), Some(1), "{what}: {output:?}");
        for word in words {
            assert!(output.stderr.contains(word), "{what}: no \"{word}\" in: {}", output.stderr);
        }
    };
    // The unchanged one is fine: what is refused below is refused for its mistake.
    let good = changed(&bed.cluster.lab, |_| {});
    bed.cluster.cli_ok("lb1", &["apply", "--dry-run", "-f", &write(&bed, "good.toml", &good)]).unwrap();
    for (what, change, words) in SERVICE_MISTAKES {
        refused(what, &changed(&bed.cluster.lab, change), words);
    }
    let base = web_document(&bed.cluster.lab).to_toml();
    let replaced = |from: &str, to: &str| {
        assert!(base.contains(from), "{from} in {base}");
        base.replacen(from, to, 1)
    };
    refused("not TOML at all", "[[group", &[]);
    refused(
        "a VIP that is no address",
        &replaced("vips = [\"192.0.2.100\"", "vips = [\"192.0.2.300\""),
        &["vips", "192.0.2.300"],
    );
    refused(
        "a multicast VIP",
        &replaced("vips = [\"192.0.2.100\"", "vips = [\"192.0.2.100\", \"224.0.0.1\""),
        &["vips", "224.0.0.1"],
    );
    refused(
        "a VIP twice",
        &replaced("vips = [\"192.0.2.100\"", "vips = [\"192.0.2.100\", \"192.0.2.100\""),
        &["192.0.2.100"],
    );
    refused(
        "full NAT without addresses to come from",
        &base.lines().filter(|l| !l.starts_with("snat")).collect::<Vec<_>>().join("\n"),
        &["snat"],
    );
    let stale = bed
        .cluster
        .cli(
            "lb1",
            &["apply", "-f", &write(&bed, "good.toml", &good), "--if-revision", &(revision + 7).to_string()],
        )
        .unwrap();
    assert_eq!(stale.status.code(), Some(1), "{stale:?}");
    assert!(stale.stderr.contains(&revision.to_string()), "{stale:?}");

    assert_eq!(bed.cluster.cli_ok("wit", &["export"]).unwrap().stdout, before);
    assert_eq!(bed.cluster.status("lb1").unwrap().cluster.revision, revision);
    let tally = requests(bed.client(), http(0), 30, PATIENCE);
    assert_eq!(tally.failed, 0, "{tally:?}");
}

fn write(bed: &Bed, name: &str, text: &str) -> String {
    let path = bed.cluster.lab.dir().join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn verbs_with_mistakes_are_refused_and_wrong_usage_is_told_apart() {
    let bed = Bed::web(Machine::Shared);
    for (args, word) in [
        (&["backend", "drain", "web/nobody"][..], "nobody"),
        (&["backend", "weight", "nothing/be1", "3"], "nothing"),
        (&["backend", "weight", "web/be1", "1001"], "1001"),
        (&["backend", "add", "web/be9", "[2001:db8::9]:80"], "2001:db8::9"),
        (&["switchover", "nogroup"], "nogroup"),
        (&["switchover", "web", "--to", "wit"], "wit"),
        (&["service", "show", "nothing"], "nothing"),
        (&["node", "leave", "lb9"], "lb9"),
    ] {
        let output = bed.cluster.cli("lb1", args).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        assert!(output.stderr.contains(word), "{args:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
    }
    for args in [&["backend", "drain", "web"][..], &["nonsense"], &["apply"]] {
        let output = bed.cluster.cli("lb1", args).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
    }
}

#[test]
fn a_node_file_with_a_mistake_is_refused_by_check_and_by_run() {
    let lab = Lab::build(&Standard { service_backends: 0, ..Standard::default() }.topology()).unwrap();
    let mut cluster = Cluster::empty(lab, binary().unwrap(), None).unwrap();
    cluster
        .add(&NodeSpec {
            host: "lb1".into(),
            id: 1,
            witness: false,
            peers: vec![("lb2".into(), 2)],
            extra: String::new(),
        })
        .unwrap();
    let file = cluster.node_file_of("lb1").to_owned();
    let good = std::fs::read_to_string(&file).unwrap();
    let path = file.display().to_string();
    let check = |cluster: &Cluster, text: &str| {
        std::fs::write(&file, text).unwrap();
        cluster.local("lb1", &["check", "-c", &path]).unwrap()
    };
    let output = check(&cluster, &good);
    assert!(output.status.success(), "{output:?}\n{good}");
    let replaced = |from: &str, to: &str| {
        assert!(good.contains(from), "{from} in {good}");
        good.replacen(from, to, 1)
    };
    let cases: Vec<(String, &[&str])> = vec![
        (replaced("id = 1", "id = 0"), &["id"]),
        (replaced("role = \"balancer\"", "role = \"boss\""), &["role", "boss"]),
        (replaced("interface = \"eth0\"", "interface = \"eth7\""), &["eth7"]),
        (replaced("interface = \"eth0\"", "interface = \"eth0\"\nlane = \"warp\""), &["lane", "warp"]),
        (replaced("name = \"lb1\"", "nmae = \"lb1\""), &["nmae"]),
        (replaced("cluster.key", "cluster.nokey"), &["secret_file", "nokey"]),
        (
            format!("{good}\n[timing]\nbeat_ms = 20\nlease_ms = 130\nelection_ms = [120, 180]\n"),
            &["lease_ms"],
        ),
        (format!("{good}\n[timing]\nbeat_ms = 0\n"), &["beat_ms"]),
        (format!("{good}\n[admin]\nlisten = \"0.0.0.0:7801\"\n"), &["admin", "TLS"]),
        (format!("{good}\n[metrics]\nlisten = \"nowhere\"\n"), &["metrics", "nowhere"]),
    ];
    for (text, words) in cases {
        let output = check(&cluster, &text);
        assert_eq!(output.status.code(), Some(1), "{output:?}\n{text}");
        let named = |said: &str| words.iter().all(|w| said.contains(w));
        assert!(named(&output.stdout), "not all of {words:?} in: {}\n{text}", output.stdout);
        cluster.start("lb1").unwrap();
        let ended = cluster.process("lb1").wait(SOON);
        assert!(ended.is_some_and(|s| s.code() == Some(1)), "run: {ended:?}\n{text}");
        let said = cluster.log_of("lb1");
        assert!(named(&said), "not all of {words:?} in: {said}\n{text}");
        cluster.kill_9("lb1");
    }
}

#[test]
fn a_balancer_whose_kernel_would_forward_too_refuses_to_start() {
    let lab = Lab::build(&Standard { service_backends: 0, ..Standard::default() }.topology()).unwrap();
    let mut cluster = Cluster::with_lane(lab, binary().unwrap(), lane_word().as_deref()).unwrap();
    cluster.lab.host("lb1").sysctl("ipv4/ip_forward", "1").unwrap();
    cluster.start("lb1").unwrap();
    let ended = cluster.process("lb1").wait(SOON);
    assert!(ended.is_some_and(|s| s.code() == Some(1)), "{ended:?}");
    assert!(
        cluster.log_of("lb1").contains("ip_forward") || cluster.log_of("lb1").contains("forwarding"),
        "{}",
        cluster.log_of("lb1")
    );
}
