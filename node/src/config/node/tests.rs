//! Every kind of mistake in a node file, and what is said about it.

use super::*;

const GOOD: &str = r#"
id = 1
name = "lb1"
role = "balancer"
[service]
interface = "eth0"
[inside]
interface = "eth1"
[cluster]
listen = "192.0.2.1:7800"
secret_file = "/etc/komainu/cluster.key"
[[cluster.peer]]
id = 2
address = "192.0.2.2:7800"
[timing]
beat_ms = 20
lease_ms = 80
election_ms = [120, 180]
[admin]
listen = "0.0.0.0:7801"
cert_file = "/c"
key_file = "/k"
client_ca_file = "/ca"
[metrics]
listen = "127.0.0.1:7802"
[log]
format = "json"
filter = "info"
"#;

#[test]
fn a_full_file_is_read() {
    let config: NodeConfig = GOOD.parse().unwrap();
    assert_eq!(config.id, NodeId(1));
    assert_eq!(config.role, Role::Balancer);
    let service = config.service.as_ref().unwrap();
    assert_eq!((service.interface.as_str(), service.lane, service.gateway), ("eth0", LaneChoice::Auto, None));
    assert_eq!(config.inside_interface.as_deref(), Some("eth1"));
    assert_eq!(config.peers(), [Peer { id: NodeId(2), address: "192.0.2.2:7800".parse().unwrap() }]);
    assert_eq!(config.timing, Timing::default());
    assert_eq!(config.metrics, Some("127.0.0.1:7802".parse().unwrap()));
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.socket(), Path::new("/run/komainu/admin.sock"));
}

#[test]
fn a_witness_alone_needs_three_lines() {
    let config: NodeConfig = "id = 3\nname = \"w\"\nrole = \"witness\"\n".parse().unwrap();
    assert_eq!((config.service, config.cluster, config.admin), (None, None, None));
    assert_eq!(config.data_dir, Path::new("/var/lib/komainu"));
}

/// What to replace in the good file, by what, and then: line, field, value, part of the reason, part of the advice.
type Row = (&'static str, &'static str, usize, &'static str, &'static str, &'static str, &'static str);

const MISTAKES: &[Row] = &[
    ("id = 1\n", "id = 0\n", 2, "id", "0", "not a node id", "1..=65535"),
    ("id = 1\n", "id = 70000\n", 2, "id", "70000", "not a node id", "1..=65535"),
    ("id = 1\n", "id = \"1\"\n", 2, "id", "\"1\"", "whole number", "without quotes"),
    ("id = 1\n", "id = -1\n", 2, "id", "-1", "out of range", ""),
    ("id = 1\n", "# none\n", 0, "id", "", "missing", "add id"),
    ("\"lb1\"", "\"l b\"", 3, "name", "\"l b\"", "not a node name", "letters"),
    ("\"lb1\"", "7", 3, "name", "7", "not a string", "quotes"),
    (
        "\"balancer\"",
        "\"balancr\"",
        4,
        "role",
        "\"balancr\"",
        "not a known word",
        "did you mean \"balancer\"?",
    ),
    ("\"balancer\"", "\"witness\"", 5, "service", "", "no data path", "remove [service]"),
    (
        "interface = \"eth0\"",
        "interfaces = \"eth0\"",
        6,
        "service.interfaces",
        "\"eth0\"",
        "not a known key",
        "did you mean \"interface\"?",
    ),
    (
        "interface = \"eth0\"",
        "interface = \"a-name-too-long-for-it\"",
        6,
        "service.interface",
        "\"a-name-too-long-for-it\"",
        "name of an interface",
        "ip link",
    ),
    (
        "interface = \"eth0\"",
        "interface = \"eth0\"\nlane = \"dpdk\"",
        7,
        "service.lane",
        "\"dpdk\"",
        "not a known word",
        "one of auto",
    ),
    (
        "interface = \"eth0\"",
        "interface = \"eth0\"\ngateway = \"127.0.0.1\"",
        7,
        "service.gateway",
        "\"127.0.0.1\"",
        "gateway",
        "router",
    ),
    (
        "interface = \"eth0\"",
        "interface = \"eth0\"\ngateway = \"192.0.2.0/24\"",
        7,
        "service.gateway",
        "\"192.0.2.0/24\"",
        "not an IP address",
        "without prefix",
    ),
    ("\"eth1\"", "\"eth0\"", 8, "inside.interface", "\"eth0\"", "service interface already", "second"),
    (
        "\"192.0.2.1:7800\"",
        "\"192.0.2.1\"",
        10,
        "cluster.listen",
        "\"192.0.2.1\"",
        "address with a port",
        "e.g.",
    ),
    (
        "\"192.0.2.1:7800\"",
        "\"0.0.0.0:7800\"",
        10,
        "cluster.listen",
        "\"0.0.0.0:7800\"",
        "address of one node",
        "reach",
    ),
    ("\"192.0.2.1:7800\"", "\"192.0.2.1:0\"", 10, "cluster.listen", "\"192.0.2.1:0\"", "port 0", "7800"),
    (
        "\"192.0.2.1:7800\"",
        "\"192.0.2.2:7800\"",
        14,
        "cluster.peer[0].address",
        "\"192.0.2.2:7800\"",
        "own address",
        "other node's",
    ),
    (
        "\"/etc/komainu/cluster.key\"",
        "\"cluster.key\"",
        11,
        "cluster.secret_file",
        "\"cluster.key\"",
        "absolute",
        "/",
    ),
    ("secret_file = \"/etc/komainu/cluster.key\"\n", "", 9, "cluster.secret_file", "", "missing", "keygen"),
    ("id = 2", "id = 1", 13, "cluster.peer[0].id", "1", "own id", "other nodes"),
    (
        "[timing]",
        "[[cluster.peer]]\nid = 2\naddress = \"192.0.2.3:7800\"\n[timing]",
        16,
        "cluster.peer[1].id",
        "2",
        "twice",
        "own id",
    ),
    (
        "[timing]",
        "[[cluster.peer]]\nid = 3\naddress = \"192.0.2.2:7800\"\n[timing]",
        17,
        "cluster.peer[1].address",
        "\"192.0.2.2:7800\"",
        "twice",
        "own address",
    ),
    ("[timing]", "[cluster.witness]\n[timing]", 15, "cluster.witness", "", "not a known key", "known here"),
    ("lease_ms = 80", "lease_ms = 119", 17, "timing.lease_ms", "119", "two nodes", ""),
    ("lease_ms = 80", "lease_ms = 30", 17, "timing.lease_ms", "30", "at least 3 beats", ""),
    (
        "lease_ms = 80",
        "profile = \"quick\"",
        17,
        "timing.profile",
        "\"quick\"",
        "no profile",
        "\"default\" or \"fast\"",
    ),
    ("[120, 180]", "[120]", 18, "timing.election_ms", "[120]", "not a range", "[shortest, longest]"),
    ("[120, 180]", "[120, \"x\"]", 18, "timing.election_ms[1]", "\"x\"", "whole number", ""),
    ("cert_file = \"/c\"\n", "", 19, "admin.cert_file", "", "missing", "mutual TLS only"),
    ("key_file = \"/k\"\n", "", 19, "admin.key_file", "", "missing", "mutual TLS only"),
    ("client_ca_file = \"/ca\"\n", "", 19, "admin.client_ca_file", "", "missing", "mutual TLS only"),
    ("listen = \"0.0.0.0:7801\"\n", "", 19, "admin.listen", "", "missing", "local socket"),
    (
        "0.0.0.0:7801",
        "0.0.0.0:7800",
        20,
        "admin.listen",
        "\"0.0.0.0:7800\"",
        "taken by cluster.listen",
        "own port",
    ),
    (
        "127.0.0.1:7802",
        "127.0.0.1:7801",
        25,
        "metrics.listen",
        "\"127.0.0.1:7801\"",
        "taken by admin.listen",
        "own port",
    ),
    ("\"json\"", "\"jsn\"", 27, "log.format", "\"jsn\"", "not a known word", "did you mean \"json\"?"),
    ("filter = \"info\"", "filter = \"a=b=c\"", 28, "log.filter", "\"a=b=c\"", "not a filter", "e.g."),
    ("[metrics]", "[metric]", 24, "metric", "", "not a known key", "did you mean \"metrics\"?"),
    (
        "[metrics]\nlisten = \"127.0.0.1:7802\"",
        "metrics = 1",
        24,
        "admin.metrics",
        "1",
        "not a known key",
        "known here",
    ),
];

#[test]
fn every_mistake_names_line_field_value_reason_and_advice() {
    for (from, to, line, field, value, reason, action) in MISTAKES {
        assert!(GOOD.contains(from), "{from}");
        let error = NodeConfig::parse("node.toml", &GOOD.replacen(from, to, 1)).expect_err(to);
        let found =
            error.mistakes.iter().find(|m| m.field == *field).unwrap_or_else(|| panic!("{to}: {error}"));
        assert_eq!(found.file, "node.toml");
        assert_eq!(found.line.unwrap_or(0), *line, "{error}");
        assert_eq!(found.value.as_deref().unwrap_or(""), *value, "{error}");
        assert!(found.reason.contains(reason), "{error}");
        assert!(found.action.contains(action), "{error}");
    }
}

#[test]
fn all_mistakes_are_told_at_once() {
    let error = NodeConfig::parse("f", "id = 0\nname = 1\nrole = \"x\"\nfoo = 1\n[metrics]\nlisten = 1\n")
        .unwrap_err();
    let fields: Vec<&str> = error.mistakes.iter().map(|m| m.field.as_str()).collect();
    assert_eq!(fields, ["id", "name", "role", "foo", "metrics.listen"]);
}

#[test]
fn broken_toml_is_told_with_its_line() {
    let error = NodeConfig::parse("f", "id = 1\nname = \n").unwrap_err();
    assert_eq!(error.mistakes[0].line, Some(2));
    assert!(error.to_string().starts_with("f:2: "), "{error}");
}

#[test]
fn a_missing_node_file_says_so() {
    let error = NodeConfig::load(Path::new("/nonexistent/node.toml")).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/node.toml") && error.contains("can't be read"), "{error}");
}

#[test]
fn files_that_are_named_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.toml");
    std::fs::write(&path, GOOD.replace("/etc/komainu/cluster.key", "/nonexistent/key")).unwrap();
    let error = NodeConfig::load(&path).unwrap_err();
    let fields: Vec<&str> = error.mistakes.iter().map(|m| m.field.as_str()).collect();
    assert_eq!(fields, ["cluster.secret_file", "admin.cert_file", "admin.key_file", "admin.client_ca_file"]);
    for mistake in &error.mistakes {
        assert!(mistake.reason.contains("No such file"), "{mistake}");
    }
}
