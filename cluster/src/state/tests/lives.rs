//! Transitions, drains, ownership, confirmations: one thing after the other.

use std::time::Duration;

use super::*;
use crate::time::Instant;

#[test]
fn a_backend_takes_flows_only_after_its_first_verdict() {
    let mut m = Machine::new();
    m.apply_document(document());
    assert_eq!(m.weights(), [("be1", 0, 0), ("be2", 0, 0), ("be3", 0, 0)]);
    assert!(m.web().living().all(|b| m.web().alive(b)), "nothing says that they are dead");
    // Where nobody was eligible there is no older flow, so the first verdicts need no transition.
    m.all_up();
    assert_eq!(m.weights(), [("be1", 1, 1), ("be2", 1, 1), ("be3", 1, 1)]);
    assert_eq!(m.web().transition, None);
}

#[test]
fn without_a_check_backends_are_up() {
    let mut m = Machine::new();
    let mut d = document();
    d.services[0].health.kind = CheckType::None;
    m.apply_document(d.clone());
    assert_eq!(m.weights(), [("be1", 1, 1), ("be2", 1, 1), ("be3", 1, 1)]);
    // A check that begins takes them as it finds them: nobody loses service by being watched.
    d.services[0].health.kind = CheckType::Tcp;
    m.apply_document(d);
    assert_eq!(m.weights(), [("be1", 1, 1), ("be2", 1, 1), ("be3", 1, 1)]);
}

#[test]
fn changes_open_a_transition_extend_it_and_settling_ends_it() {
    let mut m = Machine::running();
    m.health("be1", Health::Down);
    assert_eq!(m.weights(), [("be1", 0, 1), ("be2", 1, 1), ("be3", 1, 1)]);
    assert!(!m.web().consult_all_slots());
    assert!(!m.web().alive(m.backend("be1")));
    m.ok(Change::BackendWeight { service: "web".into(), backend: "be2".into(), weight: 7 });
    assert_eq!(m.weights(), [("be1", 0, 1), ("be2", 7, 1), ("be3", 1, 1)]);
    assert!(m.web().consult_all_slots(), "flows from in between may be remembered anywhere");
    // Back where it was: still open, because flows of the time in between are remembered.
    m.ok(Change::BackendWeight { service: "web".into(), backend: "be2".into(), weight: 1 });
    m.health("be1", Health::Up);
    assert_eq!(m.weights(), [("be1", 1, 1), ("be2", 1, 1), ("be3", 1, 1)]);
    assert!(m.web().transition.is_some());
    let stale = m.web().transition.expect("open").changed_index - 1;
    let service = m.web().id;
    assert!(matches!(
        m.refused(Change::Settle { service, changed_index: stale }),
        Refusal::Superseded { .. }
    ));
    m.settle();
    assert_eq!(m.web().transition, None);
    assert!(matches!(
        m.refused(Change::Settle { service, changed_index: stale }),
        Refusal::Superseded { .. }
    ));
}

#[test]
fn a_removed_backend_stays_in_the_base_table_until_the_service_settles() {
    let mut m = Machine::running();
    let be2 = m.backend("be2").id;
    m.ok(Change::BackendRemove { service: "web".into(), backend: "be2".into() });
    assert_eq!(m.weights(), [("be1", 1, 1), ("be3", 1, 1), ("be2", 0, 1)]);
    let gone = m.web().backends.last().expect("it is there");
    assert!(gone.gone && !m.web().alive(gone));
    assert_eq!(m.state.document().services[0].backends.len(), 2);
    // The same server under the same name comes back as the same backend, and has to be looked at again.
    m.ok(Change::BackendAdd { service: "web".into(), backend: backend("be2", 2) });
    assert_eq!((m.backend("be2").id, m.backend("be2").health), (be2, Health::Unknown));
    m.health("be2", Health::Up);
    m.settle();
    m.ok(Change::BackendRemove { service: "web".into(), backend: "be2".into() });
    m.settle();
    assert_eq!(m.web().backends.len(), 2);
    m.ok(Change::BackendAdd { service: "web".into(), backend: backend("be2", 2) });
    assert_ne!(m.backend("be2").id, be2, "numbers are never used again");
}

#[test]
fn another_address_is_another_backend_under_the_same_maintenance() {
    let mut m = Machine::running();
    m.admin("be1", AdminState::Disabled);
    let (be1, be2) = (m.backend("be1").id, m.backend("be2").id);
    let mut d = m.state.document();
    d.services[0].backends[0].address = ip("203.0.113.77");
    d.services[0].backends[1].name = "renamed".to_owned();
    m.apply_document(d);
    assert_ne!(m.backend("be1").id, be1);
    assert_eq!((m.backend("be1").admin, m.backend("be1").health), (AdminState::Disabled, Health::Unknown));
    assert_eq!((m.backend("renamed").id, m.backend("renamed").health), (be2, Health::Up), "the same server");
}

#[test]
fn datagrams_that_nobody_remembers_need_no_transition() {
    let mut m = Machine::new();
    let mut d = document();
    d.services[0].protocol = Protocol::Udp;
    d.services[0].udp_flows = UdpFlows::Hash;
    m.apply_document(d);
    m.all_up();
    m.health("be1", Health::Down);
    assert_eq!(m.weights(), [("be1", 0, 0), ("be2", 1, 1), ("be3", 1, 1)]);
    assert_eq!(m.web().transition, None);
}

#[test]
fn a_drain_keeps_flows_and_ends_disabled_at_its_deadline() {
    let mut m = Machine::running();
    let drain = |deadline_ms| Change::BackendAdmin {
        service: "web".into(),
        backend: "be1".into(),
        admin: AdminState::Draining,
        deadline_ms,
    };
    m.ok(drain(Some(5_000)));
    assert_eq!(m.weights()[0], ("be1", 0, 1));
    assert!(m.web().alive(m.backend("be1")), "its flows go on");
    let first = m.backend("be1").drain.expect("drains").started_index;
    m.ok(drain(Some(9_000)));
    let (backend, second) = (m.backend("be1").id, m.backend("be1").drain.expect("drains").started_index);
    assert!(matches!(
        m.refused(Change::DrainExpired { backend, started_index: first }),
        Refusal::Superseded { .. }
    ));
    m.ok(Change::DrainExpired { backend, started_index: second });
    assert_eq!((m.backend("be1").admin, m.backend("be1").drain), (AdminState::Disabled, None));
    assert!(!m.web().alive(m.backend("be1")));
    // Applying the same file again does not end somebody's maintenance; saying so expressly does.
    let mut d = document();
    assert!(!m.apply_document(d.clone()).changed);
    d.services[0].backends[0].admin = Some(AdminState::Enabled);
    let outcome = m.apply_document(d);
    assert_eq!(
        outcome.diff.lines[0].to_string(),
        "~ service \"web\".backend \"be1\".admin: disabled -> enabled"
    );
    assert_eq!((m.backend("be1").admin, outcome.revision), (AdminState::Enabled, 1));
}

#[test]
fn deadlines_have_limits_and_only_drains_have_them() {
    let mut m = Machine::running();
    let admin = |admin, deadline_ms| Change::BackendAdmin {
        service: "web".into(),
        backend: "be1".into(),
        admin,
        deadline_ms: Some(deadline_ms),
    };
    for (change, text) in [
        (admin(AdminState::Draining, 10), "deadline: 10 ms: it must be between 1 s and 604800 s"),
        (admin(AdminState::Enabled, 5_000), "deadline: 5000 ms: only a drain has a deadline"),
    ] {
        let refusal = m.refused(change).to_string();
        assert!(refusal.contains(text), "{refusal}");
    }
}

#[test]
fn names_that_stand_for_nothing_are_refused_with_those_there_are() {
    let mut m = Machine::running();
    let remove = |service: &str, backend: &str| Change::BackendRemove {
        service: service.into(),
        backend: backend.into(),
    };
    assert_eq!(
        m.refused(remove("wob", "be1")).to_string(),
        "service: \"wob\": there is none; name one of: web"
    );
    let refusal = m.refused(remove("web", "be9")).to_string();
    assert_eq!(refusal, "backend: \"web/be9\": there is none; name one of: web/be1, web/be2, web/be3");
    let refusal = m.refused(Change::BackendAdd { service: "web".into(), backend: backend("be1", 9) });
    assert!(matches!(refusal, Refusal::Exists { .. }));
    let refusal =
        m.refused(Change::BackendWeight { service: "web".into(), backend: "be1".into(), weight: 1001 });
    let Refusal::Invalid(problems) = refusal else { panic!("{refusal}") };
    assert_eq!(problems[0].path, "service[0] \"web\".backend[0] \"be1\".weight");
    assert_eq!(
        m.refused(Change::Restore { revision: 9 }).to_string(),
        "revision: \"9\": there is none; name one of: 1"
    );
}

#[test]
fn an_apply_can_be_conditional_and_every_revision_restored() {
    let mut m = Machine::running();
    let mut d = document();
    d.services[0].port = 81;
    let apply = |document: &Document, if_revision| Change::Apply {
        document: document.clone(),
        if_revision: Some(if_revision),
        confirm_within_ms: None,
    };
    assert_eq!(m.refused(apply(&d, 7)), Refusal::Revision { expected: 7, actual: 1 });
    assert_eq!(m.ok(apply(&d, 1)).revision, 2);
    assert_eq!(m.ok(Change::Restore { revision: 1 }).revision, 3);
    assert_eq!(m.state.document(), document());
    assert_eq!(m.web().id.0, 1, "the service is the same all the time");
    let how: Vec<_> = m.state.history.iter().map(|r| r.how.as_str()).collect();
    assert_eq!(how, ["apply", "apply", "restore of 1"]);
}

#[test]
fn what_is_not_confirmed_is_rolled_back_with_the_administrative_states_that_it_changed() {
    let mut m = Machine::running();
    m.admin("be2", AdminState::Disabled);
    let mut d = m.state.document();
    d.services[0].backends.remove(1);
    d.services[0].backends[0].admin = Some(AdminState::Disabled);
    let within =
        |document: Document| Change::Apply { document, if_revision: None, confirm_within_ms: Some(60_000) };
    assert_eq!(m.ok(within(d.clone())).revision, 2);
    assert_eq!(m.refused(within(document())), Refusal::AwaitingConfirm { revision: 2 });
    let refusal =
        m.refused(Change::BackendWeight { service: "web".into(), backend: "be1".into(), weight: 3 });
    assert_eq!(refusal, Refusal::AwaitingConfirm { revision: 2 });
    assert!(matches!(m.refused(Change::Confirm { revision: 1 }), Refusal::NotAwaiting { .. }));
    // Drains go on meanwhile.
    m.admin("be3", AdminState::Draining);
    m.ok(Change::Rollback { revision: 2 });
    assert_eq!(m.state.document(), document());
    let states: Vec<_> = m.web().living().map(|b| b.admin).collect();
    assert_eq!(states, [AdminState::Enabled, AdminState::Disabled, AdminState::Draining]);
    // And one that is confirmed stays.
    m.ok(within(d));
    let revision = m.state.revision;
    m.ok(Change::Confirm { revision });
    assert!(matches!(m.refused(Change::Rollback { revision }), Refusal::NotAwaiting { .. }));
    assert_eq!(m.web().living().count(), 2);
}

#[test]
fn ownership_moves_by_epochs() {
    let mut m = Machine::running();
    let id = m.state.groups[0].id;
    let owner = |m: &Machine| (m.state.groups[0].owner.map(|n| n.0), m.state.groups[0].epoch);
    m.assign("web", 1);
    assert_eq!((owner(&m), m.state.groups[0].assigned_index), ((Some(1), 1), m.state.index));
    let assign = |node, epoch| Change::Assign { group: id, node: NodeId(node), epoch };
    for stale in [assign(2, 1), assign(2, 3), Change::Release { group: id, epoch: 2 }] {
        assert!(matches!(m.refused(stale), Refusal::Superseded { .. }));
    }
    let refusal = m.refused(assign(3, 2)).to_string();
    assert_eq!(refusal, "balancer: \"3\": there is none; name one of: lb1, lb2", "a witness owns nothing");
    m.ok(Change::Release { group: id, epoch: 1 });
    assert_eq!(owner(&m), (None, 1));
    assert!(matches!(m.refused(Change::Release { group: id, epoch: 1 }), Refusal::Superseded { .. }));
    m.assign("web", 2);
    assert_eq!(owner(&m), (Some(2), 2));
}

#[test]
fn a_switchover_holds_until_the_group_has_to_go_elsewhere() {
    let mut m = Machine::running();
    m.assign("web", 1);
    let wanted = |m: &Machine| m.state.groups[0].wanted.map(|w| (w.node.map(|n| n.0), w.not.map(|n| n.0)));
    let to = |node: Option<u64>| Change::Switchover { group: "web".into(), to: node.map(NodeId) };
    assert!(matches!(m.refused(to(Some(3))), Refusal::Unknown { .. }));
    m.ok(to(None));
    assert_eq!(wanted(&m), Some((None, Some(1))));
    m.assign("web", 2);
    assert_eq!(wanted(&m), Some((Some(2), None)), "it is to stay there");
    m.assign("web", 1);
    assert_eq!(wanted(&m), None, "it had to go, and is not pulled back");
    m.ok(to(Some(2)));
    m.assign("web", 2);
    assert_eq!(wanted(&m), Some((Some(2), None)));
}

/// Fault: it recorded an event although nothing happened.
#[test]
fn a_switchover_to_the_owner_changes_nothing_unless_it_makes_it_stay() {
    let mut m = Machine::running();
    m.assign("web", 1);
    let to = |node: u64| Change::Switchover { group: "web".into(), to: Some(NodeId(node)) };
    let events = m.state.events.len();
    assert!(!m.ok(to(1)).changed);
    assert_eq!((m.state.groups[0].wanted, m.state.events.len()), (None, events));
    // It takes back another wish.
    assert!(m.ok(to(2)).changed);
    assert!(m.ok(to(1)).changed);
    assert!(!m.ok(to(1)).changed, "said already");
    // It holds the group against a preferred node that may take it.
    let mut m = Machine::running();
    m.assign("web", 1);
    let mut preempted = document();
    preempted.groups[0].prefer = Some("lb2".into());
    preempted.groups[0].preempt = true;
    m.ok(Change::Apply { document: preempted, if_revision: None, confirm_within_ms: None });
    assert!(m.ok(to(1)).changed);
}

#[test]
fn an_address_changes_groups_only_when_its_owner_has_let_go() {
    let mut m = Machine::running();
    m.assign("web", 1);
    let mut moved = document();
    moved.groups[0].vips.pop();
    moved.groups.push(Group {
        vips: vec![ip("2001:db8::64")],
        inside_vips: vec![],
        snat: vec![],
        ..group("two", 9)
    });
    let problems = m.problems(&moved);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    assert!(
        problems[0].starts_with(
            "group[1] \"two\".vips[0]: 2001:db8::64: it is in group \"web\" now, and lb1 answers"
        )
    );
    let mut without = moved.clone();
    without.groups.pop();
    m.apply_document(without);
    let index = m.state.index;
    assert_eq!(m.state.held, [Held { address: ip("2001:db8::64"), node: NodeId(1), index }]);
    assert!(
        m.problems(&moved)[0]
            .contains("lb1 was its owner and may still answer for it; try again in a moment")
    );
    m.ok(Change::Free { node: NodeId(1), up_to_index: index - 1 });
    assert_eq!(m.state.held.len(), 1);
    m.ok(Change::Free { node: NodeId(1), up_to_index: index });
    m.apply_document(moved);
    assert_eq!(m.state.groups.len(), 2);
    // Back to whoever still answers for it is no change of hands.
    let mut without = m.state.document();
    without.groups[0].vips.clear();
    without.groups[0].vips.push(ip("192.0.2.200"));
    without.services.clear();
    m.apply_document(without);
    let mut back = m.state.document();
    back.groups[0].vips = vec![ip("192.0.2.100")];
    m.apply_document(back);
    assert_eq!(m.state.held.iter().map(|h| h.address).collect::<Vec<_>>(), [ip("192.0.2.200")]);
}

#[test]
fn a_renamed_group_keeps_its_owner_and_a_renamed_service_its_flows() {
    let mut m = Machine::running();
    m.assign("web", 1);
    let mut d = document();
    d.groups[0].name = "front".to_owned();
    d.services[0].group = "front".to_owned();
    d.services[0].name = "site".to_owned();
    m.apply_document(d);
    let group = &m.state.groups[0];
    assert_eq!((group.id.0, group.owner, group.epoch), (1, Some(NodeId(1)), 1));
    let site = m.state.service_named("site").expect("it is there");
    assert_eq!((site.id.0, site.group.0, site.transition), (1, 1, None));
    assert!(site.living().all(|b| b.health == Health::Up));
    assert_eq!(m.state.held, []);
}

#[test]
fn living_groups_never_share_a_lease_cell() {
    let mut m = Machine::new();
    m.apply_document(Document { groups: vec![group("first", 1)], services: vec![] });
    for i in 0..300u16 {
        let mut d = Document { groups: vec![group("first", 1), group("other", 2)], services: vec![] };
        d.groups[1].name = format!("g{i}");
        m.apply_document(d);
        m.apply_document(Document { groups: vec![group("first", 1)], services: vec![] });
    }
    let mut d = Document { groups: vec![group("first", 1), group("last", 2)], services: vec![] };
    d.groups[1].name = "last".to_owned();
    m.apply_document(d);
    let ids: Vec<_> = m.state.groups.iter().map(|g| g.id.0).collect();
    assert!(ids[1] > 256 && ids[1] % 256 != ids[0] % 256, "{ids:?}");
}

#[test]
fn a_retried_proposal_gets_the_first_answer_and_changes_nothing() {
    let mut m = Machine::running();
    let mut propose = |sequence, weight| {
        let change = Change::BackendWeight { service: "web".into(), backend: "be1".into(), weight };
        let id = Some(ProposalId { session: 7, sequence });
        let command = Command { id, who: "admin".into(), wall_ms: 5, change };
        m.state.apply(m.state.index + 1, &command)
    };
    let first = propose(1, 5).expect("is accepted");
    propose(2, 6).expect("is accepted");
    assert_eq!(propose(1, 5), Ok(first), "and it does not undo what came after");
    let refusal = propose(3, 5000).expect_err("is refused");
    assert_eq!(propose(3, 5000), Err(refusal));
    assert_eq!(m.backend("be1").config.weight, 6);
}

#[test]
fn members_come_change_and_go() {
    let mut m = Machine::new();
    let put = |id, f: fn(&mut Member)| {
        let mut member = member(id, Role::Balancer);
        f(&mut member);
        Change::MemberPut { member }
    };
    assert!(m.refused(put(9, |m| m.node.name = "lb1".into())).to_string().contains("node 1 has this name"));
    let refusal = m.refused(put(9, |m| m.node.address = "192.0.2.1:7800".parse().expect("an address")));
    assert!(refusal.to_string().contains("node 1 \"lb1\" has this address"));
    // A node that lost its disk is there twice for a while.
    m.ok(put(1, |m| (m.raft_id, m.voter) = (0x990001, false)));
    assert_eq!(m.state.members.len(), 4);
    assert_eq!(m.state.member(NodeId(1)).map(|m| m.raft_id), Some(0x70001));
    m.ok(Change::MemberRemove { raft_id: 0x70001 });
    assert_eq!(m.state.member(NodeId(1)).map(|m| m.raft_id), Some(0x990001));
    assert!(!m.ok(Change::MemberRemove { raft_id: 0x70001 }).changed);
}

#[test]
fn an_unknown_preference_is_a_warning() {
    let mut m = Machine::new();
    let mut d = document();
    d.groups[0].prefer = Some("lb9".to_owned());
    let outcome = m.apply_document(d);
    assert_eq!(outcome.warnings.len(), 1);
    assert_eq!(outcome.warnings[0].path, "group[0] \"web\".prefer");
}

#[test]
fn timers_run_on_the_monotonic_clock_and_on_the_wall_clock_only_across_a_restart() {
    let mut m = Machine::running();
    let at = |s: u64| Instant(1_000_000_000_000 + s * 1_000_000_000);
    let mut timers = Timers::new();
    m.ok(Change::BackendAdmin {
        service: "web".into(),
        backend: "be1".into(),
        admin: AdminState::Draining,
        deadline_ms: Some(100_000),
    });
    let (backend, started) = (m.backend("be1").id, m.backend("be1").drain.expect("drains"));
    let expired = Change::DrainExpired { backend, started_index: started.started_index };
    assert_eq!(timers.observe(&m.state, at(0), None), Due { changes: vec![], next: Some(at(100)) });
    assert_eq!(timers.drain_left(&m.state, backend, at(30)), Some(Duration::from_secs(70)));
    // The transition's 60 s are over, but the drain holds it open.
    assert_eq!(timers.observe(&m.state, at(99), None).changes, []);
    assert_eq!(
        timers.observe(&m.state, at(100), None),
        Due { changes: vec![expired.clone()], next: Some(at(101)) }
    );
    assert_eq!(timers.observe(&m.state, at(100), None).changes, [], "asked already");
    assert_eq!(
        timers.observe(&m.state, at(101), None).changes,
        std::slice::from_ref(&expired),
        "asked again"
    );
    // A restart: the wall clock tells how much has passed, and is not believed beyond the deadline.
    for (wall_ms, due) in [
        (started.started_ms + 40_000, at(60)),
        (started.started_ms - 3_600_000, at(100)),
        (started.started_ms + 3_600_000_000, at(1)),
    ] {
        let restarted = Timers::new().observe(&m.state, at(0), Some(wall_ms));
        assert_eq!(restarted.next, Some(due));
    }
    m.ok(expired);
    let due = timers.observe(&m.state, at(102), None);
    assert!(matches!(due.changes[..], [Change::Settle { .. }]), "{due:?}");
    for change in due.changes {
        m.ok(change);
    }
    assert_eq!(timers.observe(&m.state, at(103), None), Due::default());
    assert_eq!(timers.drain_left(&m.state, backend, at(103)), None);
}

#[test]
fn an_unconfirmed_apply_becomes_due() {
    let mut m = Machine::new();
    m.ok(Change::Apply { document: document(), if_revision: None, confirm_within_ms: Some(30_000) });
    let mut timers = Timers::new();
    assert_eq!(timers.observe(&m.state, Instant(0), None).next, Some(Instant(30_000_000_000)));
    let due = timers.observe(&m.state, Instant(30_000_000_000), None);
    assert_eq!(due.changes, [Change::Rollback { revision: 1 }]);
    m.ok(due.changes[0].clone());
    assert_eq!(m.state.document(), Document::default());
}
