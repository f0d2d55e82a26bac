//! Every (state, event) of [`Pulse`], on literal instants.

use super::*;
use komainu_proto::domain::Role;

const G: GroupId = GroupId(1);
const E1: Ownership = Ownership { group: G, epoch: 1 };

fn at(ms: u64) -> Instant {
    // Away from zero, so that "never" and "long ago" differ.
    Instant((10_000 + ms) * 1_000_000)
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn id(n: u64) -> RaftId {
    RaftId::new(NodeId(n), 7)
}

fn address(n: u64) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n as u8], 7800))
}

fn identity(n: u64) -> NodeIdentity {
    let role = if n == 3 { Role::Witness } else { Role::Balancer };
    NodeIdentity { id: NodeId(n), name: format!("n{n}"), role, address: address(n) }
}

/// Node `n` of three, started at 0 ms.
fn node(n: u64) -> Pulse {
    let config = Config {
        identity: identity(n),
        version: "1".to_owned(),
        peers: (1..=3)
            .filter(|p| *p != n)
            .map(|p| crate::core::Peer { id: NodeId(p), address: address(p) })
            .collect(),
        timing: Timing::default(),
        instance: 100 + n,
        seed: 1,
        incarnation: 7,
        pair: crate::pair::Policy::Safety,
    };
    let mut p = Pulse::new(&config, id(n), 1, 3, 0, at(0));
    p.set_self_health(SelfHealth { links_up: true, gateway: None, forwarding: true, reason: String::new() });
    p
}

/// A beat of node `from`, sent when its clock (here the same as ours) shows `sent`.
fn beat(from: u64, sent: Instant) -> Beat {
    let mut other = node(from);
    other.advance(sent);
    match other.compose(NodeId(if from == 1 { 2 } else { 1 })) {
        Output::Send { beat, .. } => *beat,
        other => panic!("{other:?}"),
    }
}

/// A leader's beat.
fn leaders(from: u64, term: u64, sent: Instant) -> Beat {
    Beat { term, leading: true, ..beat(from, sent) }
}

/// A beat of `from` that acknowledges the leader's beat of `stamp`.
fn acknowledging(from: u64, sent: Instant, leader: u64, term: u64, stamp: Instant) -> Beat {
    Beat { echo: Some(Echo { instance: 100 + leader, stamp, term }), answer: true, ..beat(from, sent) }
}

fn hear(p: &mut Pulse, b: Beat, now: Instant) {
    let source = b.identity.address;
    p.handle_beat(source, b, now).expect("taken in");
}

fn drain(p: &mut Pulse) -> Vec<Output> {
    std::iter::from_fn(|| p.poll_output()).collect()
}

fn sent(outputs: &[Output], to: u64) -> Option<&Beat> {
    outputs.iter().find_map(|o| match o {
        Output::Send { to: t, beat, .. } if t.0 == to => Some(&**beat),
        _ => None,
    })
}

fn assigned(p: &mut Pulse, node: u64, epoch: u64) {
    let a = Assignment { node: Some(NodeId(node)), epoch, index: 5 };
    p.set_assignments([(G, a)].into(), 5);
    p.set_installed(5, p.now);
}

/// Node 1, leading in term 4 since 200 ms, having heard both others at 200 ms.
fn leading() -> Pulse {
    let mut p = node(1);
    hear(&mut p, beat(2, at(199)), at(200));
    hear(&mut p, beat(3, at(199)), at(200));
    p.lead(4, vec![id(1), id(2), id(3)], at(200));
    p.open(at(200));
    drain(&mut p);
    p
}

fn answers(p: &Pulse, now: Instant) -> bool {
    p.leases().any(|(_, l)| l.answer_until > now)
}

// --- promises -----------------------------------------------------------------------------------------------------

#[test]
fn nobody_votes_right_after_a_start() {
    let mut p = node(1);
    assert!(!p.may_promise(at(119)));
    assert!(p.may_promise(at(120)));
    assert_eq!(p.promise_free_at(), at(120));
    p.set_sole(true);
    assert!(p.may_promise(at(0)));
}

#[test]
fn nobody_votes_who_has_just_heard_a_leader() {
    let mut p = node(1);
    hear(&mut p, leaders(2, 3, at(500)), at(501));
    assert!(!p.may_promise(at(620)));
    assert!(p.may_promise(at(621)));
    assert_eq!(p.promise_free_at(), at(621));
}

#[test]
fn a_beat_of_one_who_does_not_lead_binds_nobody() {
    let mut p = node(1);
    hear(&mut p, beat(2, at(500)), at(501));
    assert!(p.may_promise(at(501)));
    assert_eq!(p.leader(), None);
}

#[test]
fn after_a_promise_lower_terms_are_neither_accepted_nor_acknowledged() {
    let mut p = node(1);
    hear(&mut p, leaders(2, 3, at(500)), at(501));
    p.promise(4);
    hear(&mut p, leaders(2, 3, at(700)), at(701));
    assert!(p.may_promise(at(701)), "the refused beat must not count");
    let out = drain(&mut p);
    assert_eq!(sent(&out, 2).expect("an answer").echo, None);
    hear(&mut p, leaders(2, 4, at(720)), at(721));
    assert!(!p.may_promise(at(721)));
}

#[test]
fn a_delayed_beat_binds_nobody_longer() {
    let mut p = node(1);
    hear(&mut p, leaders(2, 3, at(500)), at(501));
    let old = leaders(2, 3, at(400));
    assert_eq!(p.handle_beat(address(2), old, at(560)), Err(Ignored::Old));
    let same = leaders(2, 3, at(500));
    assert_eq!(p.handle_beat(address(2), same, at(560)), Err(Ignored::Old));
    assert!(p.may_promise(at(621)));
    assert_eq!(p.ignored().collect::<Vec<_>>(), [(Ignored::Old, 2)]);
}

#[test]
fn a_leader_votes_for_nobody_while_its_lease_runs() {
    let mut p = leading();
    hear(&mut p, acknowledging(2, at(302), 1, 4, at(300)), at(303));
    assert_eq!(p.lease_end(), at(380));
    assert!(!p.may_promise(at(379)));
    assert!(p.may_promise(at(380)));
    // Nor after it has stepped down.
    p.step_down();
    assert!(!p.may_promise(at(379)));
    assert!(p.may_promise(at(380)));
}

// --- the leader's lease -------------------------------------------------------------------------------------------

#[test]
fn the_lease_counts_from_the_sending_of_an_acknowledged_beat() {
    let mut p = leading();
    assert_eq!(p.lease_end(), Instant::default());
    hear(&mut p, acknowledging(3, at(302), 1, 4, at(300)), at(303));
    assert_eq!(p.lease_end(), at(380));
    // It is never shortened by an older acknowledgement.
    hear(&mut p, acknowledging(2, at(304), 1, 4, at(250)), at(305));
    assert_eq!(p.lease_end(), at(380));
}

#[test]
fn acknowledgements_of_another_term_process_or_time_count_for_nothing() {
    let mut p = leading();
    hear(&mut p, acknowledging(2, at(301), 1, 3, at(300)), at(302));
    hear(&mut p, acknowledging(2, at(303), 9, 4, at(300)), at(304));
    hear(&mut p, acknowledging(2, at(305), 1, 4, at(199)), at(306));
    hear(&mut p, acknowledging(2, at(307), 1, 4, at(900)), at(308));
    assert_eq!(p.lease_end(), Instant::default());
}

#[test]
fn an_acknowledgement_under_another_raft_id_is_no_voters() {
    let mut p = leading();
    // The node is back with another store: what the old one promised, this one knows nothing of.
    let mut b = acknowledging(2, at(400), 1, 4, at(390));
    b.from = RaftId::new(NodeId(2), 8);
    b.instance = 999;
    hear(&mut p, b, at(400));
    assert_eq!(p.lease_end(), Instant::default());
}

#[test]
fn a_higher_terms_leader_ends_leadership() {
    let mut p = leading();
    hear(&mut p, leaders(2, 4, at(300)), at(301));
    assert!(p.is_leading(), "there is one leader a term: this one");
    hear(&mut p, leaders(2, 5, at(302)), at(303));
    assert!(!p.is_leading());
    assert_eq!(p.leader(), Some((id(2), 5)));
}

#[test]
fn a_sole_voter_renews_by_itself() {
    let mut p = node(1);
    p.lead(4, vec![id(1)], at(10));
    assigned(&mut p, 1, 1);
    assert!(!answers(&p, at(10)), "not before its first entry is applied");
    p.open(at(20));
    assert!(answers(&p, at(20)));
    p.handle_timeout(at(50));
    assert_eq!(p.lease_end(), at(130));
}

// --- grants -------------------------------------------------------------------------------------------------------

#[test]
fn a_grant_ends_before_the_leaders_lease_does() {
    let mut p = leading();
    assigned(&mut p, 2, 1);
    // Node 2's beat of 302 (its clock) arrives at 303 (ours), so the grant may last 77 ms from its stamp on, less drift.
    hear(&mut p, acknowledging(2, at(302), 1, 4, at(300)), at(303));
    let out = drain(&mut p);
    let b = sent(&out, 2).expect("a beat");
    assert_eq!(b.grants, [E1]);
    let c = b.contact.expect("a limit");
    assert_eq!((c.instance, c.stamp), (102, at(302)));
    assert_eq!(c.lasts, Timing::default().on_another_clock(ms(77)));
    // The witness is told that it is in contact, and granted nothing.
    p.handle_timeout(at(310));
    let out = drain(&mut p);
    assert_eq!(sent(&out, 3).expect("a beat").grants, []);
}

#[test]
fn nothing_is_granted_without_a_lease_of_ones_own_or_before_the_term_is_open() {
    let mut p = leading();
    assigned(&mut p, 2, 1);
    p.handle_timeout(at(220));
    assert_eq!(sent(&drain(&mut p), 2).expect("a beat").grants, [], "no lease yet");

    let mut p = node(1);
    hear(&mut p, beat(2, at(199)), at(200));
    p.lead(4, vec![id(1), id(2), id(3)], at(200));
    assigned(&mut p, 2, 1);
    drain(&mut p);
    hear(&mut p, acknowledging(2, at(212), 1, 4, at(210)), at(213));
    p.handle_timeout(at(220));
    assert_eq!(sent(&drain(&mut p), 2).expect("a beat").grants, [], "older entries may say otherwise");
}

#[test]
fn a_silent_node_is_granted_nothing_more() {
    let mut p = leading();
    assigned(&mut p, 2, 1);
    // Node 3 keeps the lease alive, node 2 is silent since 200 ms.
    hear(&mut p, acknowledging(3, at(270), 1, 4, at(269)), at(270));
    p.handle_timeout(at(270));
    let out = drain(&mut p);
    let b = sent(&out, 2).expect("it is still beaten");
    assert_eq!((&b.grants[..], b.contact), (&[][..], None));
}

#[test]
fn a_grantee_needs_its_own_stamp_and_process() {
    let mut p = node(2);
    assigned(&mut p, 2, 1);
    let grant = |instance, stamp, sent| Beat {
        grants: vec![E1],
        contact: Some(Contact { instance, stamp, lasts: ms(70) }),
        ..leaders(1, 4, sent)
    };
    hear(&mut p, grant(999, at(300), at(301)), at(302));
    assert!(!answers(&p, at(302)), "meant for another process");
    hear(&mut p, grant(102, at(400), at(303)), at(304));
    assert!(!answers(&p, at(304)), "a stamp that it has not given yet");
    hear(&mut p, grant(102, Instant(1), at(305)), at(306));
    assert!(!answers(&p, at(306)), "a stamp from before its start");
    hear(&mut p, grant(102, at(300), at(307)), at(308));
    assert!(answers(&p, at(369)) && !answers(&p, at(370)));
}

#[test]
fn a_beat_of_a_lower_term_grants_nothing() {
    let mut p = node(2);
    assigned(&mut p, 2, 1);
    p.promise(5);
    let contact = Some(Contact { instance: 102, stamp: at(300), lasts: ms(70) });
    hear(&mut p, Beat { grants: vec![E1], contact, ..leaders(1, 4, at(301)) }, at(302));
    assert!(!answers(&p, at(302)));
}

#[test]
fn a_leader_that_steps_down_keeps_what_it_had_to_its_end() {
    let mut p = leading();
    assigned(&mut p, 1, 1);
    hear(&mut p, acknowledging(2, at(302), 1, 4, at(300)), at(303));
    assert!(answers(&p, at(303)));
    p.step_down();
    p.handle_timeout(at(340));
    assert!(answers(&p, at(379)) && !answers(&p, at(380)));
}

// --- hand-over ----------------------------------------------------------------------------------------------------

#[test]
fn a_revoked_group_is_free_once_its_owner_says_so_or_its_grant_is_over() {
    let granted = || {
        let mut p = leading();
        assigned(&mut p, 2, 1);
        hear(&mut p, acknowledging(2, at(302), 1, 4, at(300)), at(303));
        drain(&mut p);
        p.revoke(E1, at(304));
        p
    };
    let mut p = granted();
    assert!(!p.is_free(E1, at(304)));
    let out = drain(&mut p);
    let b = sent(&out, 2).expect("at once");
    assert_eq!((&b.grants[..], &b.releases[..]), (&[][..], &[E1][..]));
    hear(&mut p, Beat { released: vec![E1], ..beat(2, at(306)) }, at(307));
    assert!(p.is_free(E1, at(307)));

    let p = granted();
    assert!(!p.is_free(E1, at(379)));
    assert!(p.is_free(E1, at(380)), "the last grant was within the lease that ended then");
}

#[test]
fn another_process_cannot_give_up_what_the_first_was_granted() {
    let mut p = leading();
    assigned(&mut p, 2, 1);
    hear(&mut p, acknowledging(2, at(302), 1, 4, at(300)), at(303));
    drain(&mut p);
    p.revoke(E1, at(304));
    let other = Beat { instance: 999, released: vec![E1], ..beat(2, at(370)) };
    hear(&mut p, other, at(370));
    assert!(!p.is_free(E1, at(370)));
    assert!(p.is_free(E1, at(380)));
}

#[test]
fn an_owner_told_to_release_stops_before_it_says_so() {
    let mut p = node(2);
    assigned(&mut p, 2, 1);
    let contact = Some(Contact { instance: 102, stamp: at(300), lasts: ms(70) });
    hear(&mut p, Beat { grants: vec![E1], contact, ..leaders(1, 4, at(301)) }, at(302));
    drain(&mut p);
    hear(&mut p, Beat { releases: vec![E1], contact, ..leaders(1, 4, at(310)) }, at(311));
    let out = drain(&mut p);
    let lease = out
        .iter()
        .position(|o| matches!(o, Output::Lease { lease, .. } if lease.answer_until == Instant::default()));
    let told = out.iter().position(|o| matches!(o, Output::Send { beat, .. } if beat.released == [E1]));
    assert!(lease.expect("the lane is told") < told.expect("the leader is told"), "{out:?}");
    // And a late grant does not bring it back.
    hear(&mut p, Beat { grants: vec![E1], contact, ..leaders(1, 4, at(320)) }, at(321));
    assert!(!answers(&p, at(321)));
}

#[test]
fn the_leaders_own_group_is_free_only_when_its_lane_has_been_told() {
    let mut p = leading();
    assigned(&mut p, 1, 1);
    hear(&mut p, acknowledging(2, at(302), 1, 4, at(300)), at(303));
    drain(&mut p);
    p.revoke(E1, at(304));
    assert!(!p.is_free(E1, at(304)), "the lane has not been told");
    assert!(matches!(p.poll_output(), Some(Output::Prompt | Output::Lease { .. })));
    while p.in_hand.is_none() {
        p.poll_output();
    }
    assert!(!p.is_free(E1, at(304)), "the lane is being told");
    drain(&mut p);
    assert!(p.is_free(E1, at(304)));
}

// --- transfer -----------------------------------------------------------------------------------------------------

#[test]
fn a_leader_retires_only_when_nobody_but_its_successor_can_hold_a_grant() {
    let mut p = leading();
    assigned(&mut p, 2, 1);
    hear(&mut p, acknowledging(2, at(302), 1, 4, at(300)), at(303));
    drain(&mut p);
    assert!(!p.retire(NodeId(3), at(304)), "node 2 holds a grant");
    p.hold_grants(Some(NodeId(3)));
    assert!(p.retire(NodeId(3), at(380)));

    let mut p = leading();
    assigned(&mut p, 1, 1);
    hear(&mut p, acknowledging(2, at(302), 1, 4, at(300)), at(303));
    drain(&mut p);
    assert!(!p.retire(NodeId(2), at(304)), "it answers itself");
}

/// A hand-over that took longer than the lease, or whose one datagram was lost, left the groups without an owner.
#[test]
fn a_retired_leader_goes_on_granting_to_its_successor_and_to_nobody_else() {
    let mut p = leading();
    assigned(&mut p, 2, 1);
    assert!(p.retire(NodeId(2), at(304)));
    hear(&mut p, acknowledging(2, at(306), 1, 4, at(305)), at(307));
    hear(&mut p, acknowledging(3, at(306), 1, 4, at(305)), at(307));
    assert_eq!(p.lease_end(), at(305).after(Timing::default().longest_lease()));
    p.handle_timeout(at(320));
    let out = drain(&mut p);
    let b = sent(&out, 2).expect("a beat");
    assert!(b.leading && b.contact.is_some() && b.grants.len() == 1);
    // Neither itself nor a third one, whatever becomes of the transfer.
    assigned(&mut p, 3, 2);
    p.handle_timeout(at(340));
    let out = drain(&mut p);
    assert!(sent(&out, 3).expect("a beat").grants.is_empty());
    p.hold_grants(None);
    assigned(&mut p, 1, 3);
    p.handle_timeout(at(360));
    assert!(
        !drain(&mut p)
            .iter()
            .any(|o| matches!(o, Output::Lease { lease, .. } if lease.answer_until > at(360)))
    );
}

// --- beats --------------------------------------------------------------------------------------------------------

#[test]
fn a_beat_goes_to_every_peer_every_interval_and_none_is_made_up_for() {
    let mut p = node(1);
    p.handle_timeout(at(0));
    let out = drain(&mut p);
    assert!(sent(&out, 2).is_some() && sent(&out, 3).is_some());
    assert_eq!(p.next_deadline(), at(20));
    p.handle_timeout(at(10));
    assert_eq!(drain(&mut p), []);
    // Three seconds frozen.
    p.handle_timeout(at(3_007));
    assert_eq!(drain(&mut p).iter().filter(|o| matches!(o, Output::Send { .. })).count(), 2);
    assert_eq!(p.next_deadline(), at(3_027));
}

#[test]
fn a_leaders_beat_is_answered_at_once_and_an_answer_is_not() {
    let mut p = node(1);
    drain(&mut p);
    hear(&mut p, leaders(2, 4, at(30)), at(31));
    let out = drain(&mut p);
    let b = sent(&out, 2).expect("an answer");
    assert!(b.answer);
    assert_eq!(b.echo, Some(Echo { instance: 102, stamp: at(30), term: 4 }));
    assert!(sent(&out, 3).is_none());
    hear(&mut p, Beat { answer: true, ..leaders(2, 4, at(32)) }, at(33));
    assert!(sent(&drain(&mut p), 2).is_none());
}

#[test]
fn beats_that_are_not_taken_in() {
    let mut p = node(1);
    assert_eq!(p.handle_beat(address(1), beat(1, at(1)), at(2)), Err(Ignored::OwnId));
    let other = Beat { cluster: 9, ..beat(2, at(1)) };
    assert_eq!(p.handle_beat(address(2), other, at(2)), Err(Ignored::OtherCluster));
    for n in 4..200 {
        let _ = p.handle_beat(address(n), beat(n, at(1)), at(2));
    }
    assert!(p.peers().count() <= MAX_PEERS);
}

#[test]
fn only_observations_that_differ_travel_and_all_of_them_in_turn() {
    let mut p = node(1);
    let backends = 100;
    p.set_verdicts((1..=backends).map(|b| (BackendId(b), Some(Health::Up))).collect());
    for b in 1..=backends {
        let health = if b % 2 == 0 { Health::Down } else { Health::Up };
        p.set_observation(Observation {
            backend: BackendId(b),
            health,
            reason: "connection refused".to_owned(),
        });
    }
    let mut seen = BTreeSet::new();
    for n in 0..5 {
        p.handle_timeout(at(20 * n));
        let out = drain(&mut p);
        let b = sent(&out, 2).expect("a beat");
        assert!(
            b.observations.len() <= MAX_OBSERVATIONS
                && b.observations.iter().all(|o| o.health == Health::Down)
        );
        seen.extend(b.observations.iter().map(|o| o.backend));
    }
    assert_eq!(seen.len(), 50);
    // Once the verdict says the same, silence.
    p.set_verdicts((1..=backends).map(|b| (BackendId(b), Some(Health::Down))).collect());
    p.set_verdicts((1..=backends).filter(|b| b % 2 == 1).map(|b| (BackendId(b), Some(Health::Up))).collect());
    p.handle_timeout(at(200));
    assert_eq!(sent(&drain(&mut p), 2).expect("a beat").observations, []);
}

#[test]
fn what_concerns_ownership_wakes_the_raft_thread() {
    let mut p = node(1);
    hear(&mut p, beat(2, at(1)), at(2));
    drain(&mut p);
    hear(&mut p, beat(2, at(3)), at(4));
    assert!(!drain(&mut p).contains(&Output::Prompt), "nothing new");
    let unfit = SelfHealth { links_up: false, ..SelfHealth::default() };
    for news in [
        Beat { health: unfit, ..beat(2, at(5)) },
        Beat { resigning: true, ..beat(2, at(6)) },
        Beat { released: vec![E1], ..beat(2, at(7)) },
        leaders(2, 4, at(8)),
    ] {
        let now = news.sent;
        hear(&mut p, news, now);
        assert!(drain(&mut p).contains(&Output::Prompt));
    }
}

/// Whoever is alone and meets another that is: the lower line ends at once, but only when it is sure to have been heard.
#[test]
fn a_higher_line_that_has_heard_this_node_ends_its_leases_before_anything_is_said() {
    let mut p = node(1);
    p.set_line(8);
    p.set_assignments([(G, Assignment { node: Some(NodeId(1)), epoch: 1, index: 5 })].into(), 5);
    p.set_installed(5, at(0));
    p.lead(8, vec![id(1)], at(1));
    p.open(at(1));
    drain(&mut p);
    assert!(p.holds_anything(at(2)));
    let mut meet = |line, met, ms| {
        let other = Beat { line, met, ..beat(2, at(ms)) };
        assert_eq!(p.handle_beat(address(2), other, at(ms + 1)), Err(Ignored::OtherLine));
        let out = drain(&mut p);
        (out, p.yields_to(), p.holds_anything(at(ms + 2)))
    };
    // A lower line is answered, and our addresses are announced again.
    let (out, yields, holds) = meet(3, None, 10);
    assert!(out.contains(&Output::Announce { group: G }) && yields.is_none() && holds);
    assert_eq!(sent(&out, 2).unwrap().met.map(|e| (e.instance, e.stamp)), Some((102, at(10))));
    // A higher one may be a datagram of long ago, or an answer to another process.
    let echo = |instance, ms| Some(Echo { instance, stamp: at(ms), term: 8 });
    for (n, met) in [(0, None), (1, echo(100, 11)), (2, echo(101, 999))] {
        let (_, yields, holds) = meet(9, met, 20 + 2 * n);
        assert!(yields.is_none() && holds, "{met:?}");
    }
    let (out, yields, holds) = meet(9, echo(101, 11), 30);
    assert!(yields == Some((NodeId(2), 9)) && !holds);
    let ended = out.iter().position(|o| matches!(o, Output::Lease { .. })).unwrap();
    assert!(out.iter().position(|o| matches!(o, Output::Send { .. })).is_none_or(|said| ended < said));
    assert!(!p.may_promise(at(10_000)));
}

// --- the word of a death --------------------------------------------------------------------------------------------

/// Node `from`'s process `instance` has ended; its last grant to anybody else ran until `granted_until`.
fn death(from: u64, instance: u64, granted_until: Instant) -> Resign {
    Resign { from: id(from), instance, cluster: 1, granted_until }
}

/// Node 1, following node 2, which leads in term 3 and sent its newest beat at 500 ms.
fn following() -> Pulse {
    let mut p = node(1);
    hear(&mut p, leaders(2, 3, at(500)), at(501));
    assert!(!p.may_promise(at(502)));
    p
}

#[test]
fn a_dead_leader_that_had_granted_nothing_binds_nobody() {
    let mut p = following();
    assert!(p.handle_resign(death(2, 102, Instant(0)), at(503)));
    assert!(p.may_promise(at(503)) && p.promise_free_at() <= at(503));
    assert_eq!((p.leader(), p.bereaved_at()), (None, Some(at(503))));
    assert!(!p.peer(NodeId(2)).expect("known").alive);
    // Its last beats come late, and bind nobody either.
    let late = leaders(2, 3, at(502));
    assert_eq!(p.handle_beat(address(2), late, at(504)), Err(Ignored::Old));
    assert!(p.may_promise(at(504)));
    // It is said several times.
    assert!(!p.handle_resign(death(2, 102, Instant(0)), at(505)));
    // The next leader binds as every leader does.
    hear(&mut p, leaders(3, 4, at(510)), at(511));
    assert!(!p.may_promise(at(630)) && p.may_promise(at(631)));
    assert_eq!(p.bereaved_at(), None);
}

#[test]
fn a_dead_leader_binds_as_long_as_its_grants_to_others_may() {
    for granted_until in [at(500), at(580)] {
        let mut p = following();
        assert!(p.handle_resign(death(2, 102, granted_until), at(503)));
        assert!(!p.may_promise(at(620)) && p.may_promise(at(621)));
        assert_eq!(p.promise_free_at(), at(621));
        // Yet it is not waited for any longer than that.
        assert!(p.bereaved_at().is_some());
    }
    // The last one had ended when the newest beat was sent.
    let mut p = following();
    p.handle_resign(death(2, 102, at(499)), at(503));
    assert!(p.may_promise(at(503)));
}

#[test]
fn a_death_says_nothing_about_another_process_or_node() {
    for other in [death(2, 999, Instant(0)), death(3, 103, Instant(0)), death(9, 102, Instant(0))] {
        let mut p = following();
        hear(&mut p, beat(3, at(500)), at(501));
        p.handle_resign(other, at(503));
        assert!(!p.may_promise(at(503)), "{other:?}");
        assert!(p.peer(NodeId(2)).expect("known").alive, "{other:?}");
    }
    let mut p = following();
    assert!(
        !p.handle_resign(Resign { cluster: 2, ..death(2, 102, Instant(0)) }, at(503)),
        "another cluster's"
    );
    assert!(!p.may_promise(at(503)));
}

#[test]
fn a_death_does_not_shorten_what_is_owed_to_others() {
    // The wait after a start.
    let mut p = node(1);
    hear(&mut p, leaders(2, 3, at(50)), at(51));
    p.handle_resign(death(2, 102, Instant(0)), at(52));
    assert!(!p.may_promise(at(119)) && p.may_promise(at(120)));
    // A lease of one's own.
    let mut p = leading();
    hear(&mut p, acknowledging(2, at(250), 1, 4, at(249)), at(250));
    p.step_down();
    hear(&mut p, leaders(2, 5, at(260)), at(261));
    p.handle_resign(death(2, 102, Instant(0)), at(262));
    assert!(!p.may_promise(at(328)) && p.may_promise(at(329)));
}

#[test]
fn what_a_dead_process_was_granted_is_released_at_once() {
    let mut p = leading();
    hear(&mut p, acknowledging(2, at(250), 1, 4, at(249)), at(250));
    assigned(&mut p, 2, 1);
    assert_eq!(sent(&drain(&mut p), 2).expect("a beat").grants, [E1]);
    assert_eq!(p.last_grant_to(NodeId(2)), at(329));
    p.handle_resign(death(2, 999, Instant(0)), at(260));
    p.revoke(E1, at(260));
    assert!(!p.is_free(E1, at(260)), "another process's death");
    p.handle_resign(death(2, 102, Instant(0)), at(260));
    drain(&mut p);
    assert!(p.is_free(E1, at(260)) && p.last_grant_to(NodeId(2)) <= at(260));
    // The next process is heard at once, and what is granted to it is its own.
    hear(&mut p, Beat { instance: 555, ..acknowledging(2, at(265), 1, 4, at(255)) }, at(265));
    assert!(p.peer(NodeId(2)).expect("known").alive);
    assigned(&mut p, 2, 2);
    drain(&mut p);
    assert!(p.last_grant_to(NodeId(2)) > at(265));
    p.handle_resign(death(2, 102, Instant(0)), at(266));
    assert!(p.last_grant_to(NodeId(2)) > at(266), "said once more of the one before");
}

#[test]
fn the_will_knows_of_a_grant_before_the_grant_leaves() {
    let mut p = leading();
    hear(&mut p, acknowledging(2, at(250), 1, 4, at(249)), at(250));
    drain(&mut p);
    assigned(&mut p, 2, 1);
    let (mut until, mut granted) = (Instant(0), false);
    for o in drain(&mut p) {
        match o {
            Output::Will(will) => {
                assert_eq!((will.resign.instance, will.to.len()), (101, 2));
                until = will.resign.granted_until;
            }
            Output::Send { beat, .. } if !beat.grants.is_empty() => {
                granted = true;
                assert_eq!(until, at(329));
            }
            _ => {}
        }
    }
    assert!(granted);
    // What hasn't changed is not written again.
    p.handle_timeout(at(251));
    assert!(!drain(&mut p).iter().any(|o| matches!(o, Output::Will(_))));
}

#[test]
fn a_will_is_there_before_the_first_word() {
    let mut p = node(1);
    p.handle_timeout(at(0));
    let first = drain(&mut p).into_iter().find(|o| matches!(o, Output::Will(_) | Output::Send { .. }));
    assert!(matches!(first, Some(Output::Will(_))), "{first:?}");
}
