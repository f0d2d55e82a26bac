//! Replicated state → what the lane is to do.
//!
//! A pure function without any knowledge of this machine, so that every node derives the same tables at the same index:
//! that is what lets a standby send a flow it has never seen to the backend that the owner chose. What depends on the
//! machine (is a `dsr` backend really on our segment?) is [`off_segment`], which only tells.

use std::net::IpAddr;
use std::time::Duration;

use komainu_cluster::state::{BackendState, GroupState, ServiceState, State};
use komainu_packet::plan::{
    BackendPlan, DeadBackend, GroupPlan, Mode, Plan, Protocol, Scheduler, ServicePlan,
};
use komainu_proto::domain;

/// A plan and what could not become part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planned {
    /// For the lane. Its revision is the state's log index.
    pub plan: Plan,
    /// Services left out because this version can't forward them, one sentence each: a newer member of the cluster may
    /// know a mode that this one doesn't, and all other services go on.
    pub omitted: Vec<String>,
}

/// Derives the plan of a state.
pub fn plan(state: &State) -> Planned {
    let mut omitted = Vec::new();
    let mut services = Vec::with_capacity(state.services.len());
    for service in &state.services {
        match mode(service.config.mode) {
            Some(mode) => services.push(service_plan(service, mode)),
            None => omitted.push(format!(
                "service \"{}\": this version can't forward in mode \"{}\": upgrade this node",
                service.config.name, service.config.mode
            )),
        }
    }
    let groups = state.groups.iter().map(|g| group_plan(g)).collect();
    Planned { plan: Plan { revision: state.index, groups, services }, omitted }
}

/// Backends of `dsr` services that lie in none of the node's own prefixes (address and length), one sentence each.
///
/// In `dsr` only the destination MAC is rewritten (design of the mode), so a backend behind a router never sees the
/// frame as its own: the router would send the VIP back.
pub fn off_segment(state: &State, own: &[(IpAddr, u8)]) -> Vec<String> {
    let dsr = state.services.iter().filter(|s| s.config.mode == domain::Mode::Dsr);
    dsr.flat_map(|s| s.living().map(move |b| (s, b)))
        .filter(|(_, b)| !own.iter().any(|(address, len)| same_prefix(*address, b.config.address, *len)))
        .map(|(s, b)| {
            format!(
                "{}/{}: {} shares no segment with this node, so mode \"dsr\" can't reach it; \"nat\" can",
                s.config.name, b.config.name, b.config.address
            )
        })
        .collect()
}

fn group_plan(group: &GroupState) -> GroupPlan {
    let config = &group.config;
    GroupPlan {
        id: group.id.0,
        name: config.name.clone(),
        vips: config.vips.clone(),
        inside_vips: config.inside_vips.clone(),
        snat: config.snat.clone(),
    }
}

fn service_plan(service: &ServiceState, mode: Mode) -> ServicePlan {
    let config = &service.config;
    ServicePlan {
        id: service.id.0,
        name: config.name.clone(),
        group: service.group.0,
        vip: config.vip,
        port: config.port,
        protocol: match config.protocol {
            domain::Protocol::Tcp => Protocol::Tcp,
            domain::Protocol::Udp => Protocol::Udp,
        },
        mode,
        scheduler: match config.scheduler {
            domain::Scheduler::Maglev => Scheduler::Maglev,
            domain::Scheduler::SourceIp => Scheduler::SourceIp,
            domain::Scheduler::RoundRobin => Scheduler::RoundRobin,
            domain::Scheduler::LeastConn => Scheduler::LeastConn,
        },
        dead_backend: match config.dead_backend {
            domain::DeadBackend::Reset => DeadBackend::Reset,
            domain::DeadBackend::Rehash => DeadBackend::Rehash,
            domain::DeadBackend::Keep => DeadBackend::Keep,
        },
        track_udp: config.udp_flows == domain::UdpFlows::Table,
        tcp_idle: Duration::from_millis(config.tcp_idle_ms.into()),
        udp_idle: Duration::from_millis(config.udp_idle_ms.into()),
        backends: service.backends.iter().map(|b| backend_plan(service, b)).collect(),
        consult_all_slots: service.consult_all_slots(),
    }
}

fn backend_plan(service: &ServiceState, backend: &BackendState) -> BackendPlan {
    BackendPlan {
        id: backend.id.0,
        name: backend.config.name.clone(),
        address: backend.config.address,
        port: backend.config.port,
        weight: service.weight(backend),
        base_weight: service.base_weight(backend),
        alive: service.alive(backend),
    }
}

fn mode(mode: domain::Mode) -> Option<Mode> {
    match mode {
        domain::Mode::Nat => Some(Mode::Nat),
        domain::Mode::NatTransparent => Some(Mode::NatTransparent),
        domain::Mode::Dsr => Some(Mode::Dsr),
        domain::Mode::Tunnel => None,
    }
}

/// Whether two addresses agree in their first `len` bits.
fn same_prefix(a: IpAddr, b: IpAddr, len: u8) -> bool {
    let (a, b, width) = match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits()), u128::from(b.to_bits()), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
        _ => return false,
    };
    // A shift by the whole width (len 0) leaves nothing to differ.
    (a ^ b).checked_shr(width - u32::from(len).min(width)).unwrap_or(0) == 0
}

#[cfg(test)]
mod tests;
