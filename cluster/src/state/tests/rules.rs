//! Every rule of a document: what breaks it is refused with its place, and nothing else is.

use super::*;

/// Breaks the good document and expects exactly this problem (place, and a part of the text).
fn case(break_it: impl FnOnce(&mut Document), path: &str, text: &str) {
    let mut d = document();
    break_it(&mut d);
    let problems = Machine::new().problems(&d);
    assert_eq!(problems.len(), 1, "{path}: {problems:#?}");
    assert!(problems[0].starts_with(&format!("{path}: ")), "{path}: {problems:#?}");
    assert!(problems[0].contains(text), "{text}: {problems:#?}");
}

const WEB: &str = "service[0] \"web\"";
const BE1: &str = "service[0] \"web\".backend[0] \"be1\"";
const GROUP: &str = "group[0] \"web\"";

#[test]
fn the_good_document_is_good() {
    assert_eq!(validate(&document(), &Context::default()), Ok(vec![]));
}

#[test]
fn groups() {
    case(|d| d.groups[0].snat[0] = ip("127.0.0.1"), &format!("{GROUP}.snat[0]"), "loopback");
    case(|d| d.groups[0].vips[1] = ip("ff02::1"), &format!("{GROUP}.vips[1]"), "multicast");
    case(|d| d.groups[0].vips[1] = ip("fe80::1"), &format!("{GROUP}.vips[1]"), "link-local");
    case(|d| d.groups[0].vips[1] = ip("::"), &format!("{GROUP}.vips[1]"), "unspecified");
    case(|d| d.groups[0].vips[1] = ip("255.255.255.255"), &format!("{GROUP}.vips[1]"), "reserved");
    case(
        |d| d.groups[0].inside_vips[0] = ip("192.0.2.100"),
        &format!("{GROUP}.inside_vips[0]"),
        "vips[0] is the same address",
    );
    case(|d| d.groups.push(group("web", 9)), "group[1] \"web\".name", "group[0] has the same name");
    let twice = |d: &mut Document| d.groups.push(Group { vips: vec![ip("192.0.2.100")], ..group("two", 9) });
    case(twice, "group[1] \"two\".vips[0]", "group[0] \"web\".vips[0] is the same address");
    case(
        |d| d.groups.push(Group { vips: vec![], ..group("two", 9) }),
        "group[1] \"two\".vips",
        "serves nothing",
    );
    let many = |d: &mut Document| d.groups.extend((1..=64u8).map(|i| group(&format!("g{i}"), i)));
    case(many, "group", "at most 64");
}

#[test]
fn names() {
    for name in ["", "-a", "a b", "a/b", "é", &"x".repeat(64)] {
        case(
            |d| d.services[0].backends[0].name = name.to_owned(),
            &format!("service[0] \"web\".backend[0] {name:?}.name"),
            "not a name",
        );
    }
    case(
        |d| d.services[0].backends[1].name = "be1".into(),
        "service[0] \"web\".backend[1] \"be1\".name",
        "backend[0] has the same",
    );
    let twice = |d: &mut Document| {
        let again = Service { port: 81, ..d.services[0].clone() };
        d.services.push(again);
    };
    case(twice, "service[1] \"web\".name", "service[0] has the same name");
}

#[test]
fn services() {
    case(|d| d.services[0].group = "wab".into(), &format!("{WEB}.group"), "name one of: web");
    case(
        |d| d.services[0].vip = ip("192.0.2.9"),
        &format!("{WEB}.vip"),
        "not a VIP of group \"web\" (192.0.2.100, 2001:db8::64)",
    );
    case(|d| d.services[0].port = 0, &format!("{WEB}.port"), "1 to 65535");
    let twice = |d: &mut Document| {
        let again = Service { name: "two".into(), ..d.services[0].clone() };
        d.services.push(again);
    };
    case(twice, "service[1] \"two\"", "service \"web\" has the same vip, port and protocol");
    case(|d| d.services[0].mode = Mode::Tunnel, &format!("{WEB}.mode"), "use nat, nat-transparent or dsr");
    case(|d| d.groups[0].snat = vec![ip("2001:db8::99")], &format!("{WEB}.mode"), "no IPv4 address in snat");
    let transparent = |d: &mut Document| {
        d.services[0].mode = Mode::NatTransparent;
        d.groups[0].inside_vips.clear();
    };
    case(transparent, &format!("{WEB}.mode"), "no IPv4 address in inside_vips");
    case(|d| d.services[0].tcp_idle_ms = 999, &format!("{WEB}.tcp_idle_ms"), "1000 to 86400000");
    case(|d| d.services[0].udp_idle_ms = 3_600_001, &format!("{WEB}.udp_idle_ms"), "1000 to 3600000");
}

#[test]
fn backends() {
    case(|d| d.services[0].backends[0].port = 0, &format!("{BE1}.port"), "1 to 65535");
    case(|d| d.services[0].backends[0].weight = 1001, &format!("{BE1}.weight"), "0 to 1000");
    case(|d| d.services[0].backends[0].address = ip("0.0.0.0"), &format!("{BE1}.address"), "unspecified");
    case(
        |d| d.services[0].backends[0].address = ip("2001:db8::7"),
        &format!("{BE1}.address"),
        "it is IPv6 and the VIP",
    );
    case(
        |d| d.services[0].backends[0].address = ip("192.0.2.100"),
        &format!("{BE1}.address"),
        "group[0] \"web\".vips[0] is the same",
    );
    case(
        |d| d.services[0].backends[0].address = ip("198.51.100.100"),
        &format!("{BE1}.address"),
        "snat[0] is the same",
    );
    case(
        |d| d.services[0].backends[1] = backend("be2", 1),
        "service[0] \"web\".backend[1] \"be2\"",
        "backend \"be1\" of this service",
    );
    let many = |d: &mut Document| {
        let more =
            (0..998u32).map(|i| Backend { name: format!("x{i}"), port: 9000 + i as u16, ..backend("", 9) });
        d.services[0].backends.extend(more);
    };
    case(many, &format!("{WEB}.backend"), "at most 1000");
    let dsr = |d: &mut Document| {
        d.services[0].mode = Mode::Dsr;
        for b in &mut d.services[0].backends[1..] {
            b.port = 80;
        }
    };
    case(dsr, &format!("{BE1}.port"), "must be the service's (80)");
}

#[test]
fn dsr_backends_must_be_on_the_segment_that_the_node_knows() {
    let mut d = document();
    d.services[0].mode = Mode::Dsr;
    for (i, b) in d.services[0].backends.iter_mut().enumerate() {
        (b.port, b.address) = (80, ip(&format!("192.0.2.{}", 120 + 4 * i)));
    }
    let context = |len| Context::default().with_segments(vec![(ip("10.0.0.0"), 8), (ip("192.0.2.99"), len)]);
    assert_eq!(validate(&d, &Context::default()), Ok(vec![]));
    assert_eq!(validate(&d, &context(24)), Ok(vec![]));
    let problems = validate(&d, &context(27)).expect_err("128 is outside");
    assert_eq!(problems.len(), 1);
    assert!(problems[0].path.contains("be3") && problems[0].action.contains("tunnel"), "{problems:?}");
}

#[test]
fn a_transparent_backend_belongs_to_one_service() {
    let share = |d: &mut Document, mode| {
        d.services[0].mode = Mode::NatTransparent;
        d.services.push(Service {
            mode,
            backends: vec![backend("other", 1)],
            ..service("two", "web", 100, 81)
        });
    };
    let text = "service \"web\" has the same backend";
    case(|d| share(d, Mode::NatTransparent), "service[1] \"two\".backend[0] \"other\"", text);
    let mut d = document();
    share(&mut d, Mode::Nat);
    assert_eq!(validate(&d, &Context::default()), Ok(vec![]), "full NAT has another way back");
}

#[test]
fn health() {
    let h = |field: &str| format!("{WEB}.health.{field}");
    case(|d| d.services[0].health.port = Some(0), &h("port"), "1 to 65535");
    case(|d| d.services[0].health.path = "x".into(), &h("path"), "start it with /");
    case(|d| d.services[0].health.path = "/a b\r\nX: y".into(), &h("path"), "no blanks");
    case(|d| d.services[0].health.host = Some(String::new()), &h("host"), "host name");
    case(|d| d.services[0].health.expect_status = (300, 200), &h("expect_status"), "300-200");
    case(|d| d.services[0].health.rise = 0, &h("rise"), "1 to 100");
    case(|d| d.services[0].health.fall = 101, &h("fall"), "1 to 100");
    case(|d| d.services[0].health.timeout_ms = 5, &h("timeout_ms"), "10 to 60000");
    case(|d| d.services[0].health.timeout_ms = 1001, &h("timeout_ms"), "longer than interval_ms (1000)");
    case(|d| d.services[0].health.interval_ms = 3_600_001, &h("interval_ms"), "50 to 3600000");
}

#[test]
fn everything_wrong_is_said_at_once() {
    let mut d = document();
    d.groups[0].vips[0] = ip("127.0.0.1");
    d.services[0].port = 0;
    d.services[0].backends[0].weight = 5000;
    d.services[0].health.rise = 0;
    let problems = Machine::new().problems(&d);
    // The VIP of the service is none any more: that is one more.
    assert_eq!(problems.len(), 5, "{problems:#?}");
}
