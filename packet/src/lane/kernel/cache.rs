//! The program's copy of the flows that the engine remembers.
//!
//! Flows of full NAT with a lower SNAT port are *kept*: the program makes such flows itself (`packet/bpf/make.h`) and takes them
//! through their states, so all of them are written, steady or not, and a name on the backend's side is theirs who enters it
//! first. How many of them a flood can make is bounded by the engine (`engine/kept.rs`).
//!
//! Other flows of full NAT are written only while they are steady: such a service remembers every flow, so a packet whose flow isn't
//! found goes up anyway, and a flood of SYNs writes nothing. Other services' flows are all written, steady or not: only then
//! can the program know that a flow is *not* remembered, and forward it by hash. A service of which a flow could not be
//! written (no room) is not conclusive any more until it remembers none.
//!
//! A service that remembers some of its flows only has a filter, which says of which hashes they are, so that a packet of any
//! other flow costs no look into a table that may be large.

use std::collections::HashMap;
use std::sync::Arc;

use super::abi::{self, FlowCell, FlowKey, Plain};
use super::maps::{Maps, Memory};
use crate::engine::{FlowCache, Reservation, SNAT_PORT_UPPER};
use crate::flow::{BackendSide, ClientSide, Flow};
use crate::time::BootTime;

/// Places of the counts in a [`Filter`]: the upper bits of a hash.
const HASH_BITS: u32 = 16;

/// Which flows of a service may be remembered, so that the packets of the rest need not look for theirs.
#[derive(Debug)]
struct Filter {
    number: u32,
    /// Flows remembered, by their hash.
    counts: Box<[u32]>,
}

/// What a service remembers.
#[derive(Debug)]
struct Remembered {
    /// Whether all that should be are written.
    complete: bool,
    /// Absent where every flow is remembered, and when there are too many such services.
    filter: Option<Filter>,
    flows: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Cache {
    maps: Arc<Maps>,
    services: HashMap<u32, Remembered>,
    free_filters: Vec<u32>,
}

impl Cache {
    /// The one writer of flows into `maps`.
    pub fn new(maps: Arc<Maps>) -> Cache {
        Cache { maps, services: HashMap::new(), free_filters: (0..abi::FILTERS).rev().collect() }
    }

    /// Counts a flow for its service's filter. The first one begins it, so that it misses none.
    fn count(&mut self, flow: &Flow, hash: u32) {
        let Some(service) = self.services.get_mut(&flow.service()) else { return };
        service.flows += 1;
        // In full NAT every flow is remembered.
        if service.flows == 1
            && flow.backend_side().is_none()
            && let Some(number) = self.free_filters.pop()
        {
            self.maps.clear_filter(number);
            let counts = vec![0; 1 << HASH_BITS].into_boxed_slice();
            service.filter = Some(Filter { number, counts });
            self.tell(flow.service());
        }
        self.filter(flow, hash, |count| count + 1);
    }

    fn discount(&mut self, flow: &Flow, hash: u32) {
        self.filter(flow, hash, |count| count.saturating_sub(1));
        if let Some(service) = self.services.get_mut(&flow.service()) {
            service.flows = service.flows.saturating_sub(1);
        }
    }

    fn filter(&mut self, flow: &Flow, hash: u32, change: impl Fn(u32) -> u32) {
        let service = self.services.get_mut(&flow.service());
        let Some(filter) = service.and_then(|s| s.filter.as_mut()) else { return };
        let Some(count) = filter.counts.get_mut((hash >> (32 - HASH_BITS)) as usize) else { return };
        let before = std::mem::replace(count, change(*count));
        if (before == 0) != (*count == 0) {
            self.maps.set_filter(filter.number, hash, *count > 0);
        }
    }

    fn write(&mut self, flow: &Flow) -> std::io::Result<()> {
        let client = flow.client_side();
        let bound = flow.backend_side();
        let key = FlowKey::from(&client);
        let flag = |on: bool, flag: u8| if on { flag } else { 0 };
        let kept = is_kept(flow);
        let flags = flag(flow.is_steady(), abi::FLOW_STEADY)
            | flag(bound.is_some(), abi::FLOW_BOUND)
            | flag(kept, abi::FLOW_KEPT);
        if !is_written(flow) {
            self.erase(flow);
            return Ok(());
        }
        let cell = FlowCell {
            last_seen: flow.last_seen().0,
            backend: flow.backend,
            flags: flags | flag(kept, flow.version() << abi::FLOW_VERSION_SHIFT),
            progress: flag(kept, flow.progress_bits()),
            snat_port: bound.map_or([0; 2], |b| b.snat_port.to_be_bytes()),
            snat: bound.map_or([0; 16], |b| abi::wide(b.snat)),
            client: key.client,
            service: key.service,
            client_port: key.client_port,
            ..FlowCell::zeroed()
        };
        self.maps.put_flow(&cell, bound.as_ref())
    }

    fn erase(&self, flow: &Flow) {
        self.maps.remove_flow(&FlowKey::from(&flow.client_side()), flow.backend_side().as_ref());
    }

    fn tell(&self, service: u32) {
        let memory = match self.services.get(&service) {
            None => Memory::None,
            Some(of) => {
                Memory::Some { conclusive: of.complete, filter: of.filter.as_ref().map(|f| f.number) }
            }
        };
        self.maps.set_memory(service, memory);
    }
}

/// Whether the program keeps the flow's state.
fn is_kept(flow: &Flow) -> bool {
    flow.bound_port().is_some_and(|(_, port)| port < SNAT_PORT_UPPER)
}

/// Whether the program knows a flow that is as this one is now.
fn is_written(flow: &Flow) -> bool {
    flow.is_steady() || flow.bound_port().is_none() || is_kept(flow)
}

impl FlowCache for Cache {
    fn remember(&mut self, flow: &Flow, hash: u32) {
        self.count(flow, hash);
        if is_written(flow) {
            self.change(flow);
        }
    }

    fn change(&mut self, flow: &Flow) {
        if let Err(error) = self.write(flow) {
            tracing::debug!(%error, "a flow could not be handed to the program");
            // As it was before it may be there.
            self.erase(flow);
            if let Some(service) = self.services.get_mut(&flow.service())
                && std::mem::replace(&mut service.complete, false)
            {
                self.tell(flow.service());
            }
        }
    }

    fn forget(&mut self, flow: &Flow, hash: u32) {
        if is_written(flow) {
            self.erase(flow);
        }
        self.discount(flow, hash);
    }

    fn keeps(&self, flow: &Flow) -> bool {
        is_kept(flow)
    }

    fn reserve(&mut self, name: &BackendSide) -> Reservation {
        // A packet that finds it finds no flow behind it, and goes up.
        match self.maps.reserve_name(name) {
            Ok(true) => Reservation::Made,
            Ok(false) => Reservation::Taken,
            Err(error) => {
                tracing::debug!(%error, "a SNAT port could not be reserved in the program");
                Reservation::NoRoom
            }
        }
    }

    fn release(&mut self, name: &BackendSide) {
        self.maps.release_name(name);
    }

    fn made(&mut self, flow: &Flow, hash: u32) {
        self.count(flow, hash);
    }

    fn replaced(&mut self, flow: &Flow, hash: u32) {
        self.discount(flow, hash);
    }

    fn refuse(&mut self, client: &ClientSide, backend: &BackendSide) {
        self.maps.remove_flow(&FlowKey::from(client), Some(backend));
    }

    fn last_seen(&self, flow: &Flow) -> Option<BootTime> {
        self.maps.flow(&FlowKey::from(&flow.client_side())).map(|there| BootTime(there.last_seen))
    }

    fn consult(&mut self, service: u32, consult: bool) {
        let before = if consult {
            self.services.insert(service, Remembered { complete: true, filter: None, flows: 0 })
        } else {
            self.services.remove(&service)
        };
        // Nobody may look into a filter that is another service's.
        self.tell(service);
        self.free_filters.extend(before.and_then(|s| s.filter).map(|f| f.number));
    }
}
