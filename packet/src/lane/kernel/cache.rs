//! The program's copy of the flows that the engine remembers.
//!
//! Flows of full NAT are written only while they are steady: such a service remembers every flow, so a packet whose flow isn't
//! found goes up anyway, and a flood of SYNs writes nothing. Other services' flows are all written, steady or not: only then
//! can the program know that a flow is *not* remembered, and forward it by hash. A service of which a flow could not be
//! written (no room) is not conclusive any more until it remembers none.

use std::collections::HashMap;
use std::sync::Arc;

use super::abi::{self, BoundCell, BoundKey, FlowCell, FlowKey};
use super::program::Maps;
use crate::engine::FlowCache;
use crate::flow::Flow;
use crate::time::BootTime;

/// See the module.
#[derive(Debug)]
pub struct Cache {
    maps: Arc<Maps>,
    /// Services that remember flows: whether all that should be are written.
    complete: HashMap<u32, bool>,
}

impl Cache {
    /// The one writer of flows into `maps`.
    pub fn new(maps: Arc<Maps>) -> Cache {
        Cache { maps, complete: HashMap::new() }
    }

    fn write(&mut self, flow: &Flow) -> std::io::Result<()> {
        let client = flow.client_side();
        let bound = flow.backend_side();
        let key = FlowKey::from(&client);
        let steady = if flow.is_steady() { abi::FLOW_STEADY } else { 0 };
        let flags = steady | if bound.is_some() { abi::FLOW_BOUND } else { 0 };
        if let Some(bound) = &bound {
            if steady == 0 {
                return self.erase(flow);
            }
            let cell = BoundCell {
                last_seen: flow.last_seen().0,
                backend: flow.backend,
                service: flow.service(),
                client: key.client,
                client_port: key.client_port,
                flags,
                reserved: [0; 5],
            };
            self.maps.put_bound(&BoundKey::from(bound), &cell)?;
        }
        let cell = FlowCell {
            last_seen: flow.last_seen().0,
            backend: flow.backend,
            flags,
            reserved: 0,
            snat_port: bound.map_or([0; 2], |b| b.snat_port.to_be_bytes()),
            snat: bound.map_or([0; 16], |b| abi::wide(b.snat)),
        };
        self.maps.put_flow(&key, &cell)
    }

    fn erase(&self, flow: &Flow) -> std::io::Result<()> {
        // The backend's side last: what is found there names the client's.
        let removed = self.maps.remove_flow(&FlowKey::from(&flow.client_side()));
        if let Some(bound) = flow.backend_side() {
            self.maps.remove_bound(&BoundKey::from(&bound))?;
        }
        removed.map(drop)
    }

    fn tell(&self, service: u32) {
        let complete = self.complete.get(&service).copied();
        self.maps.set_memory(service, complete.is_some(), complete.unwrap_or(true));
    }
}

impl FlowCache for Cache {
    fn put(&mut self, flow: &Flow) {
        if let Err(error) = self.write(flow) {
            tracing::debug!(%error, "a flow could not be handed to the program");
            // Half of it may be there.
            let _ = self.erase(flow);
            if self.complete.insert(flow.service(), false) != Some(false) {
                self.tell(flow.service());
            }
        }
    }

    fn remove(&mut self, flow: &Flow) {
        if let Err(error) = self.erase(flow) {
            tracing::warn!(%error, "a flow could not be taken from the program");
        }
    }

    fn last_seen(&self, flow: &Flow) -> Option<BootTime> {
        let to_backend = self.maps.flow(&FlowKey::from(&flow.client_side())).ok().flatten();
        let bound = flow.backend_side();
        let to_client = bound.and_then(|b| self.maps.bound(&BoundKey::from(&b)).ok().flatten());
        let seen = [to_backend.map(|f| f.last_seen), to_client.map(|b| b.last_seen)];
        seen.into_iter().flatten().max().map(BootTime)
    }

    fn consult(&mut self, service: u32, consult: bool) {
        if consult {
            self.complete.insert(service, true);
        } else {
            self.complete.remove(&service);
        }
        self.tell(service);
    }
}
