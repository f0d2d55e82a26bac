//! Every kind of mistake in a cluster document that is seen before the cluster looks at it, and the round trip.

use proptest::prelude::*;
use proptest::sample::select;

use super::*;

const GOOD: &str = r#"
[[group]]
name = "web"
vips = ["192.0.2.100", "2001:db8::100"]
snat = ["192.0.2.101"]

[[service]]
name = "web"
group = "web"
vip = "192.0.2.100"
port = 80
mode = "nat"
[service.health]
type = "http"
path = "/healthz"
[[service.backend]]
name = "be1"
address = "192.0.2.11"
port = 8080
[[service.backend]]
name = "be2"
address = "192.0.2.12"
port = 8080
weight = 0
"#;

#[test]
fn defaults_are_filled_in() {
    let document = parse("s.toml", GOOD).unwrap().document;
    let service = &document.services[0];
    assert_eq!(service.protocol, Protocol::Tcp);
    assert_eq!(service.scheduler, Scheduler::Maglev);
    assert_eq!(service.tcp_idle_ms, DEFAULT_TCP_IDLE_MS);
    assert_eq!(service.health.kind, CheckType::Http);
    assert_eq!(service.health.expect_status, (200, 399));
    assert_eq!((service.backends[0].weight, service.backends[1].weight), (1, 0));
    assert_eq!(service.backends[0].admin, None);
    assert!(!document.groups[0].preempt);
}

#[test]
fn one_status_is_a_range_of_one() {
    let text = GOOD.replace("path = \"/healthz\"", "expect_status = 204");
    assert_eq!(parse("s", &text).unwrap().document.services[0].health.expect_status, (204, 204));
}

/// What to replace, by what; line, field, value, part of the reason, part of the advice.
type Row = (&'static str, &'static str, usize, &'static str, &'static str, &'static str, &'static str);

const MISTAKES: &[Row] = &[
    ("name = \"web\"\nvips", "vips", 2, "group[0].name", "", "missing", "add name"),
    (
        "vips = [",
        "vip = [",
        4,
        "group[0].vip",
        "[\"192.0.2.100\", \"2001:db8::100\"]",
        "not a known key",
        "did you mean \"vips\"?",
    ),
    ("2001:db8::100", "2001:db8::10g", 4, "group[0].vips[1]", "\"2001:db8::10g\"", "not an IP address", ""),
    ("[\"192.0.2.101\"]", "\"192.0.2.101\"", 5, "group[0].snat", "\"192.0.2.101\"", "not a list", "brackets"),
    (
        "snat = ",
        "preempt = \"yes\"\nsnat = ",
        5,
        "group[0].preempt",
        "\"yes\"",
        "neither true nor false",
        "true or false",
    ),
    ("port = 80\n", "port = 0\n", 11, "service[0].port", "0", "not a port", "1..=65535"),
    ("port = 80\n", "port = 65536\n", 11, "service[0].port", "65536", "out of range", "0..=65535"),
    (
        "mode = \"nat\"",
        "mode = \"natt\"",
        12,
        "service[0].mode",
        "\"natt\"",
        "not a known word",
        "did you mean \"nat\"? (one of nat | nat-transparent | dsr)",
    ),
    (
        "mode = \"nat\"",
        "mode = \"bridge\"",
        12,
        "service[0].mode",
        "\"bridge\"",
        "not a known word",
        "give one of nat | nat-transparent | dsr",
    ),
    ("mode = \"nat\"", "", 7, "service[0].mode", "", "missing", "add mode"),
    ("type = \"http\"", "type = \"ftp\"", 14, "service[0].health.type", "\"ftp\"", "not a known word", ""),
    ("path = \"/healthz\"", "rise = 1.5", 15, "service[0].health.rise", "1.5", "whole number", ""),
    ("path = \"/healthz\"", "port = 0", 15, "service[0].health.port", "0", "not a port", "leave it out"),
    (
        "path = \"/healthz\"",
        "expect_status = [200]",
        15,
        "service[0].health.expect_status",
        "[200]",
        "not a range",
        "[lowest, highest]",
    ),
    (
        "path = \"/healthz\"",
        "intervall_ms = 1",
        15,
        "service[0].health.intervall_ms",
        "1",
        "not a known key",
        "did you mean \"interval_ms\"?",
    ),
    (
        "\"192.0.2.12\"",
        "\"be2.example\"",
        22,
        "service[0].backend[1].address",
        "\"be2.example\"",
        "not an IP address",
        "",
    ),
    ("weight = 0", "weight = -1", 24, "service[0].backend[1].weight", "-1", "out of range", ""),
    (
        "weight = 0",
        "admin = \"drain\"",
        24,
        "service[0].backend[1].admin",
        "\"drain\"",
        "not a known word",
        "did you mean \"draining\"?",
    ),
    ("[[service]]", "[[services]]", 7, "services", "", "not a known key", "did you mean \"service\"?"),
];

#[test]
fn every_mistake_names_line_field_value_reason_and_advice() {
    for (from, to, line, field, value, reason, action) in MISTAKES {
        assert!(GOOD.contains(from), "{from}");
        let error = match from {
            // The sub-tables follow their parent's name.
            &"[[service]]" => parse("s.toml", &GOOD.replace("service", "services")),
            from => parse("s.toml", &GOOD.replacen(from, to, 1)),
        }
        .expect_err(to);
        let found =
            error.mistakes.iter().find(|m| m.field == *field).unwrap_or_else(|| panic!("{to}: {error}"));
        assert_eq!(found.line, Some(*line), "{error}");
        assert_eq!(found.value.as_deref().unwrap_or(""), *value, "{error}");
        assert!(found.reason.contains(reason), "{error}");
        assert!(found.action.contains(action), "{error}");
    }
}

#[test]
fn an_empty_file_is_no_document_unless_it_says_so() {
    for text in ["", "# all commented out\n"] {
        let error = parse("s.toml", text).unwrap_err().to_string();
        assert!(error.starts_with("s.toml: says nothing") && error.contains("group = []"), "{error}");
    }
    assert_eq!(parse("s.toml", "group = []").unwrap().document, Document::default());
}

#[test]
fn a_field_finds_its_line() {
    let lines = parse("s.toml", GOOD).unwrap().lines;
    assert_eq!(lines.find("service[0] \"web\".backend[1] \"be2\".weight"), Some(24));
    assert_eq!(lines.find("service[0].vip"), Some(10));
    // Not written: the table that it would stand in.
    assert_eq!(lines.find("service[0] \"web\".backend[0] \"be1\".weight"), Some(16));
    assert_eq!(lines.find("nonsense.name"), None);
}

fn any_name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z][a-z0-9-]{0,12}", Just("quote\" and \\ and ü".to_owned())]
}

fn any_addresses() -> impl Strategy<Value = Vec<IpAddr>> {
    proptest::collection::vec(
        prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)],
        1..3,
    )
}

prop_compose! {
    fn any_group()(name in any_name(), vips in any_addresses(), inside_vips in any_addresses(), snat in any_addresses(),
        prefer in proptest::option::of(any_name()), preempt in any::<bool>()) -> Group
    {
        Group { name, vips, inside_vips, snat, prefer, preempt }
    }
}

prop_compose! {
    fn any_health()(kind in select(CheckType::ALL), port in proptest::option::of(1..=u16::MAX), path in any_name(),
        host in proptest::option::of(any_name()), expect_status in any::<(u16, u16)>(), tls_verify in any::<bool>(),
        times in any::<(u32, u32, u32, u32)>()) -> HealthCheck
    {
        let (interval_ms, timeout_ms, rise, fall) = times;
        HealthCheck { kind, port, path, host, expect_status, tls_verify, interval_ms, timeout_ms, rise, fall }
    }
}

prop_compose! {
    fn any_backend()(name in any_name(), addresses in any_addresses(), port in 1..=u16::MAX, weight in any::<u32>(),
        admin in proptest::option::of(select(AdminState::ALL))) -> Backend
    {
        Backend { name, address: addresses[0], port, weight, admin }
    }
}

prop_compose! {
    fn any_service()(names in (any_name(), any_name()), vips in any_addresses(), port in 1..=u16::MAX,
        words in (select(Protocol::ALL), select(Mode::ALL), select(Scheduler::ALL), select(DeadBackend::ALL),
            select(UdpFlows::ALL)),
        idle in any::<(u32, u32)>(), health in any_health(),
        backends in proptest::collection::vec(any_backend(), 0..3)) -> Service
    {
        let ((name, group), (protocol, mode, scheduler, dead_backend, udp_flows)) = (names, words);
        let (tcp_idle_ms, udp_idle_ms) = idle;
        Service { name, group, vip: vips[0], port, protocol, mode, scheduler, dead_backend, udp_flows, tcp_idle_ms,
            udp_idle_ms, health, backends }
    }
}

proptest! {
    #[test]
    fn what_is_exported_applies_again(
        groups in proptest::collection::vec(any_group(), 0..3),
        services in proptest::collection::vec(any_service(), 0..3),
    ) {
        let document = Document { groups, services };
        let text = to_toml(&document);
        let back = parse("export", &text).map_err(|e| TestCaseError::fail(format!("{e}\n{text}")))?;
        prop_assert_eq!(back.document, document);
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "[\\[\\]a-z=\" \n.0-9]{0,200}") {
        let _ = parse("any", &text);
    }
}
