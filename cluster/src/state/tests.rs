//! Tests of the replicated state machine.

mod document;
mod lives;
mod properties;
mod rules;

use std::net::IpAddr;

use komainu_proto::domain::{
    AdminState, Backend, CheckType, DeadBackend, Document, Group, Health, HealthCheck, Mode, NodeId,
    Protocol, Role, Scheduler, Service, UdpFlows,
};

use super::*;

/// Wall clock at the beginning of each test.
const WALL_MS: u64 = 1_700_000_000_000;

/// A state and the index of its log.
#[derive(Clone, Debug, Default)]
struct Machine {
    state: State,
    wall_ms: u64,
}

impl Machine {
    /// Two balancers and a witness.
    fn new() -> Machine {
        let mut m = Machine { state: State::default(), wall_ms: WALL_MS };
        for (id, role) in [(1, Role::Balancer), (2, Role::Balancer), (3, Role::Witness)] {
            m.ok(Change::MemberPut { member: member(id, role) });
        }
        m
    }

    /// The same with [`document`] in force and everybody up.
    fn running() -> Machine {
        let mut m = Machine::new();
        m.apply_document(document());
        m.all_up();
        m
    }

    fn apply(&mut self, change: Change) -> Result<Outcome, Refusal> {
        self.wall_ms += 10;
        let command = Command { id: None, who: "admin".to_owned(), wall_ms: self.wall_ms, change };
        let read_back = Command::decode(&command.encode()).expect("reads what it wrote");
        assert_eq!(read_back, command);
        self.state.apply(self.state.index + 1, &command)
    }

    fn ok(&mut self, change: Change) -> Outcome {
        self.apply(change).unwrap_or_else(|e| panic!("refused: {e}"))
    }

    fn refused(&mut self, change: Change) -> Refusal {
        let before = self.state.clone();
        let refusal = self.apply(change).expect_err("is refused");
        let after = State { index: before.index, ..self.state.clone() };
        assert_eq!(after, before, "a refused change changes nothing");
        refusal
    }

    fn apply_document(&mut self, document: Document) -> Outcome {
        self.ok(Change::Apply { document, if_revision: None, confirm_within_ms: None })
    }

    fn problems(&self, document: &Document) -> Vec<String> {
        self.state.check(document).expect_err("is refused").iter().map(Problem::to_string).collect()
    }

    fn health(&mut self, name: &str, health: Health) {
        let backend = self.backend(name).id;
        self.ok(Change::Health { verdicts: vec![Verdict { backend, health, reason: "seen".to_owned() }] });
    }

    fn all_up(&mut self) {
        let ids: Vec<_> = self.state.services.iter().flat_map(|s| s.living()).map(|b| b.id).collect();
        let up = |backend| Verdict { backend, health: Health::Up, reason: "200 OK".to_owned() };
        self.ok(Change::Health { verdicts: ids.into_iter().map(up).collect() });
    }

    fn admin(&mut self, name: &str, admin: AdminState) -> Outcome {
        self.ok(Change::BackendAdmin {
            service: "web".into(),
            backend: name.into(),
            admin,
            deadline_ms: None,
        })
    }

    fn web(&self) -> &ServiceState {
        self.state.service_named("web").expect("it is there")
    }

    fn backend(&self, name: &str) -> &BackendState {
        self.web().backend_named(name).expect("it is there")
    }

    /// Weights in force and base weights of `web`, by name.
    fn weights(&self) -> Vec<(&str, u32, u32)> {
        let web = self.web();
        web.backends.iter().map(|b| (b.config.name.as_str(), web.weight(b), web.base_weight(b))).collect()
    }

    fn settle(&mut self) {
        let (service, open) = (self.web().id, self.web().transition.expect("is open"));
        self.ok(Change::Settle { service, changed_index: open.changed_index });
    }

    fn assign(&mut self, group: &str, node: u64) -> Outcome {
        let g = self.state.group_named(group).expect("it is there");
        let (group, epoch) = (g.id, g.epoch + 1);
        self.ok(Change::Assign { group, node: NodeId(node), epoch })
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn member(id: u64, role: Role) -> Member {
    let address = format!("192.0.2.{id}:7800").parse().expect("an address");
    let node = NodeIdentity { id: NodeId(id), name: format!("lb{id}"), role, address };
    Member { raft_id: id | 0x70000, node, voter: true }
}

fn group(name: &str, last: u8) -> Group {
    Group {
        name: name.to_owned(),
        vips: vec![ip(&format!("192.0.2.{last}")), ip(&format!("2001:db8::{last:x}"))],
        inside_vips: vec![ip(&format!("10.0.0.{last}"))],
        snat: vec![ip(&format!("198.51.100.{last}"))],
        prefer: None,
        preempt: false,
    }
}

fn backend(name: &str, last: u8) -> Backend {
    Backend {
        name: name.to_owned(),
        address: ip(&format!("203.0.113.{last}")),
        port: 8080,
        weight: 1,
        admin: None,
    }
}

fn service(name: &str, group: &str, vip: u8, port: u16) -> Service {
    Service {
        name: name.to_owned(),
        group: group.to_owned(),
        vip: ip(&format!("192.0.2.{vip}")),
        port,
        protocol: Protocol::Tcp,
        mode: Mode::Nat,
        scheduler: Scheduler::Maglev,
        dead_backend: DeadBackend::Reset,
        udp_flows: UdpFlows::Table,
        tcp_idle_ms: 60_000,
        udp_idle_ms: 30_000,
        health: HealthCheck { kind: CheckType::Http, ..HealthCheck::default() },
        backends: vec![backend("be1", 1), backend("be2", 2), backend("be3", 3)],
    }
}

/// One group, one service `web` with three backends.
pub(crate) fn document() -> Document {
    Document { groups: vec![group("web", 100)], services: vec![service("web", "web", 100, 80)] }
}
