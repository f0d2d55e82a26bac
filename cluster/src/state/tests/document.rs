//! Differences between documents, history, snapshots, formats.

use super::*;

fn lines(m: &Machine, d: &Document) -> Vec<String> {
    m.state.check(d).expect("is good").lines.iter().map(DiffLine::to_string).collect()
}

#[test]
fn a_difference_is_told_by_name_and_field() {
    let m = Machine::running();
    assert_eq!(lines(&m, &document()), [""; 0]);
    let mut d = document();
    d.groups[0].preempt = true;
    d.services[0].backends[0].weight = 5;
    d.services[0].backends.pop();
    d.services[0].health.rise = 5;
    d.services.push(Service { backends: vec![backend("x", 9)], ..service("two", "web", 100, 443) });
    assert_eq!(
        lines(&m, &d),
        [
            "~ group \"web\".preempt: false -> true",
            "~ service \"web\".health.rise: 2 -> 5",
            "~ service \"web\".backend \"be1\".weight: 1 -> 5",
            "- service \"web\".backend \"be3\": 203.0.113.3:8080, weight 1",
            "+ service \"two\": 192.0.2.100:443/tcp, nat, maglev, 1 backends",
            "+ service \"two\".backend \"x\": 203.0.113.9:8080, weight 1",
        ]
    );
    let mut d = document();
    d.services[0].backends.reverse();
    assert_eq!(lines(&m, &d), ["~ service \"web\".backends: be1, be2, be3 -> be3, be2, be1"]);
    assert_eq!(lines(&m, &Document::default()).len(), 2);
}

#[test]
fn every_difference_has_a_line() {
    // Whatever differs must show, or an apply would be taken for one that changes nothing.
    let edits: [fn(&mut Document); 23] = [
        |d| d.groups[0].vips.swap(0, 1),
        |d| d.groups[0].inside_vips.clear(),
        |d| d.groups[0].snat.push(ip("198.51.100.7")),
        |d| d.groups[0].prefer = Some("lb1".into()),
        |d| d.services[0].vip = ip("2001:db8::64"),
        |d| d.services[0].protocol = Protocol::Udp,
        |d| d.services[0].mode = Mode::NatTransparent,
        |d| d.services[0].scheduler = Scheduler::SourceIp,
        |d| d.services[0].dead_backend = DeadBackend::Keep,
        |d| d.services[0].udp_flows = UdpFlows::Hash,
        |d| d.services[0].tcp_idle_ms = 5000,
        |d| d.services[0].udp_idle_ms = 5000,
        |d| d.services[0].health.kind = CheckType::Icmp,
        |d| d.services[0].health.port = Some(9),
        |d| d.services[0].health.path = "/x".into(),
        |d| d.services[0].health.host = Some("x".into()),
        |d| d.services[0].health.expect_status = (200, 200),
        |d| d.services[0].health.tls_verify = true,
        |d| d.services[0].health.interval_ms = 2000,
        |d| d.services[0].health.timeout_ms = 100,
        |d| d.services[0].health.fall = 9,
        |d| d.services[0].backends[0].address = ip("203.0.113.9"),
        |d| d.services[0].backends[0].port = 9,
    ];
    let m = Machine::running();
    for (i, edit) in edits.iter().enumerate() {
        let mut d = document();
        edit(&mut d);
        assert!(!super::super::document::diff(&m.state, &d).is_empty(), "edit {i}");
    }
}

#[test]
fn export_tells_what_is_in_maintenance_and_can_be_applied_again() {
    let mut m = Machine::running();
    m.admin("be2", AdminState::Draining);
    let exported = m.state.export();
    let states: Vec<_> = exported.services[0].backends.iter().map(|b| b.admin).collect();
    assert_eq!(states, [None, Some(AdminState::Draining), None]);
    assert!(!m.apply_document(exported).changed);
}

#[test]
fn history_events_and_results_are_bounded() {
    let mut m = Machine::running();
    for i in 0..2000u32 {
        let change = Change::BackendWeight { service: "web".into(), backend: "be1".into(), weight: i % 7 };
        let id = Some(ProposalId { session: 1, sequence: u64::from(i) });
        let command = Command { id, who: "x".repeat(500), wall_ms: 1, change };
        m.state.apply(m.state.index + 1, &command).expect("is accepted");
    }
    assert_eq!(
        (m.state.history.len(), m.state.events.len(), m.state.results.len()),
        (MAX_HISTORY, MAX_EVENTS, MAX_RESULTS)
    );
    assert_eq!(m.state.history.back().map(|r| r.revision), Some(m.state.revision));
    assert!(m.state.events.iter().all(|e| e.who.len() <= MAX_REASON_LEN));
}

#[test]
fn what_a_newer_version_wrote_is_refused_not_guessed_at() {
    let m = Machine::running();
    let mut bytes = m.state.encode();
    assert_eq!(State::decode(&bytes).expect("reads"), m.state);
    bytes[0] = 9;
    let error = State::decode(&bytes).expect_err("is refused").to_string();
    assert!(error.contains("format 9") && error.contains("upgrade"), "{error}");
    assert!(State::decode(b"").is_err() && State::decode(b"\x01{").is_err());
    assert!(Command::decode(b"").is_err() && Command::decode(b"\x01{}").is_err());
    assert!(matches!(Command::decode(b"\x02{}"), Err(DecodeError::Format { format: 2, known: 1 })));
}

#[test]
#[should_panic(expected = "log entry 4 applied after 4")]
fn applying_out_of_order_ends_the_process() {
    let mut state = State { index: 4, ..State::default() };
    state.advance(4);
}
