use super::*;
use crate::plan::BackendPlan;

fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

fn group(id: u32) -> GroupPlan {
    GroupPlan {
        id,
        name: format!("g{id}"),
        vips: vec![ip("192.0.2.100"), ip("2001:db8::100")],
        inside_vips: vec![ip("10.0.0.1")],
        snat: vec![ip("192.0.2.101")],
    }
}

fn backend(id: u32, address: &str) -> BackendPlan {
    BackendPlan {
        id,
        name: format!("be{id}"),
        address: ip(address),
        port: 80,
        weight: 1,
        base_weight: 1,
        alive: true,
    }
}

fn service(id: u32, port: u16) -> ServicePlan {
    ServicePlan {
        id,
        name: format!("s{id}"),
        group: 1,
        vip: ip("192.0.2.100"),
        port,
        protocol: Protocol::Tcp,
        mode: Mode::NatTransparent,
        scheduler: Scheduler::Maglev,
        dead_backend: DeadBackend::Reset,
        track_udp: true,
        tcp_idle: Duration::from_secs(900),
        udp_idle: Duration::from_secs(60),
        backends: vec![backend(1, "10.0.0.11"), backend(2, "10.0.0.12")],
        consult_all_slots: false,
    }
}

fn plan() -> Plan {
    Plan { revision: 3, groups: vec![group(1)], services: vec![service(1, 80)] }
}

fn refused(change: impl FnOnce(&mut Plan)) -> String {
    let mut plan = plan();
    change(&mut plan);
    Tables::compile(plan, None).unwrap_err().to_string()
}

#[test]
fn addresses_services_and_answers_are_found() {
    let tables = Tables::compile(plan(), None).unwrap();
    assert_eq!(tables.revision(), 3);
    assert_eq!(tables.service_at(ip("192.0.2.100"), 80, Protocol::Tcp), Some(0));
    assert_eq!(tables.service_at(ip("192.0.2.100"), 80, Protocol::Udp), None);
    assert_eq!(tables.transparent_backend(ip("10.0.0.12"), 80, Protocol::Tcp), Some((0, 1)));
    assert!(
        tables.is_transparent_backend(ip("10.0.0.11")) && !tables.is_transparent_backend(ip("10.0.0.13"))
    );
    assert_eq!(tables.services()[0].inside, ip("10.0.0.1"));
    assert!(tables.owned(ip("192.0.2.100")).unwrap().vip);
    assert!(tables.owned(ip("192.0.2.102")).is_none());
}

#[test]
fn contradictions_are_refused_with_the_field_named() {
    let cases: [(&str, String); 9] = [
        (
            "snat",
            refused(|p| {
                p.services[0].mode = Mode::Nat;
                p.groups[0].snat.clear();
            }),
        ),
        ("same address, port", refused(|p| p.services.push(service(2, 80)))),
        ("could not be told", refused(|p| p.services.push(service(2, 81)))),
        ("same family", refused(|p| p.services[0].backends[0].address = ip("2001:db8::1"))),
        ("no such VIP", refused(|p| p.services[0].vip = ip("192.0.2.7"))),
        ("no such group", refused(|p| p.services[0].group = 2)),
        (
            "rewrites no port",
            refused(|p| {
                p.services[0].mode = Mode::Dsr;
                p.services[0].backends[0].port = 8080;
            }),
        ),
        (
            "lease cell",
            refused(|p| {
                p.groups.push(GroupPlan {
                    vips: vec![],
                    inside_vips: vec![],
                    snat: vec![],
                    ..group(1 + MAX_GROUPS as u32)
                })
            }),
        ),
        ("balancers answer for", refused(|p| p.services[0].backends[0].address = ip("192.0.2.101"))),
    ];
    for (part, message) in cases {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn a_settled_service_has_one_table_and_a_change_keeps_the_other() {
    let settled = Tables::compile(plan(), None).unwrap();
    assert!(!settled.services()[0].in_transition());

    let mut drained = plan();
    drained.services[0].backends[1].weight = 0;
    let moving = Tables::compile(drained, Some(&settled)).unwrap();
    let service = &moving.services()[0];
    assert!(service.in_transition());
    assert!(Arc::ptr_eq(service.base.as_ref().unwrap(), &settled.services()[0].current), "not built twice");
    for hash in (0..u32::MAX).step_by(1 << 20) {
        let slot = service.slot(hash);
        assert_eq!(slot.current, Some(0));
        assert_eq!(slot.base, settled.services()[0].slot(hash).current);
    }
}

#[test]
fn an_address_is_answered_for_where_it_belongs() {
    let tables = Tables::compile(plan(), None).unwrap();
    let service = [(ip("192.0.2.1"), 24)];
    let inside = [(ip("10.0.0.2"), 24)];
    let port = |address: &str| tables.owned(ip(address)).unwrap().port(ip(address), Some(&inside), &service);
    assert_eq!(port("192.0.2.100"), Some(Port::Service));
    assert_eq!(port("10.0.0.1"), Some(Port::Inside));
    assert_eq!(port("192.0.2.101"), Some(Port::Service), "by its network");
    let owned = tables.owned(ip("10.0.0.1")).unwrap();
    assert_eq!(owned.port(ip("10.0.0.1"), None, &service), Some(Port::Service), "there is no other");
}
