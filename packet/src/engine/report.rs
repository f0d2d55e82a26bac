//! What the engine tells of itself: flows, and where a flow would go.

use std::net::SocketAddr;

use crate::flow::ClientSide;
use crate::lane::{FlowFilter, FlowInfo, Trace};
use crate::plan::{DeadBackend, Mode, Protocol, Scheduler};
use crate::tables::{Service, Tables};
use crate::time::BootTime;

use super::core::Core;

impl Core {
    pub(crate) fn list(
        &self,
        tables: &Tables,
        filter: &FlowFilter,
        limit: usize,
        now: BootTime,
    ) -> Vec<FlowInfo> {
        let infos = self.flows.iter().filter_map(|flow| {
            // Flows of what is no longer in the plan wait for their idle time and concern nobody.
            let service = &tables.services()[usize::from(self.states.service(flow.service()).index?)];
            let backend = &service.backends[usize::from(self.states.backend(flow.backend).index?)];
            if filter.service.is_some_and(|id| id != service.id)
                || filter.backend.is_some_and(|id| id != backend.id)
            {
                return None;
            }
            let client = flow.client_side();
            let elsewhere = self.cache.as_ref().and_then(|cache| super::beside::seen_beside(&**cache, flow));
            let last_seen = flow.last_seen().max(elsewhere.unwrap_or_default());
            Some(FlowInfo {
                service: service.id,
                backend: backend.id,
                protocol: service.protocol,
                client: SocketAddr::new(client.client, client.client_port),
                snat: flow.backend_side().map(|b| SocketAddr::new(b.snat, b.snat_port)),
                state: flow.state().as_str(),
                idle: now.since(last_seen),
            })
        });
        infos.take(limit).collect()
    }

    pub(crate) fn trace(&self, tables: &Tables, service: u32, client: SocketAddr) -> Option<Trace> {
        let index = tables.services().iter().position(|s| s.id == service)?;
        let service = &tables.services()[index];
        let name = |backend: Option<u16>| {
            backend.map_or("no backend", |b| service.backends[usize::from(b)].name.as_str())
        };
        let id = |backend: Option<u16>| backend.map(|b| service.backends[usize::from(b)].id);
        let alive = |backend: Option<u16>| backend.filter(|&b| service.backends[usize::from(b)].alive);

        let hash = service.hash(client.ip(), client.port());
        let slot = service.slot(hash);
        let slot_number = service.slot_number(hash);
        let hashed = matches!(service.scheduler, Scheduler::Maglev | Scheduler::SourceIp);
        let new = if hashed { alive(slot.current) } else { None };
        let key = ClientSide {
            service: self.states.number(index as u16),
            client: client.ip(),
            client_port: client.port(),
        };
        let flow = self.flows.find(&key).map(|id| self.flows.get(id));
        let (holder, mut reason) = match flow {
            Some(flow) => {
                let backend = self.states.backend(flow.backend).index;
                (backend, format!("the flow is remembered on {} ({})", name(backend), flow.state().as_str()))
            }
            None if service.protocol == Protocol::Udp => {
                let why = if service.tracks_all { "is a new flow" } else { "goes where the hash says" };
                (slot.current, format!("the flow is not remembered; a datagram {why}"))
            }
            None if slot.in_transition() => {
                let backend = slot.base.or(slot.current);
                let was = name(backend);
                let is = name(slot.current);
                (
                    backend,
                    format!(
                        "slot {slot_number} is in transition from {was} to {is}: a flow that is not remembered is older and stays with {was}"
                    ),
                )
            }
            None if service.tracks_all => {
                let why = if service.mode == Mode::Nat { "mode nat" } else { "the scheduler" };
                (
                    slot.base,
                    format!("{why} remembers every flow and this one is unknown: slot {slot_number} decides"),
                )
            }
            None => (slot.current, format!("slot {slot_number} belongs to {}", name(slot.current))),
        };
        let (existing, policy) = existing(service, holder, new);
        if let Some(policy) = policy {
            reason = format!("{reason}; {policy}");
        }
        if !hashed {
            let how = if service.scheduler == Scheduler::RoundRobin {
                "whose turn it is"
            } else {
                "with fewest flows"
            };
            reason = format!("{reason}; a new flow goes to the backend {how}");
        }
        Some(Trace {
            existing: id(existing),
            new: id(new),
            slot: hashed.then_some(slot_number),
            remembered: flow.is_some(),
            reason,
        })
    }
}

/// Where the holder's flow goes by the dead-backend policy, and what to say of it.
fn existing(service: &Service, holder: Option<u16>, new: Option<u16>) -> (Option<u16>, Option<&'static str>) {
    let Some(backend) = holder else { return (None, Some("there is none")) };
    if service.backends[usize::from(backend)].alive {
        return (Some(backend), None);
    }
    match service.dead_backend {
        DeadBackend::Keep => (Some(backend), Some("which is dead; dead_backend = keep")),
        DeadBackend::Rehash => (new, Some("which is dead; dead_backend = rehash")),
        DeadBackend::Reset => (None, Some("which is dead; dead_backend = reset")),
    }
}
