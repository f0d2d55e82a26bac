//! The packet engine: `(frame, tables, flows, now) → verdict`. No socket, no clock, no thread.
//!
//! A lane calls, in this order and from one thread at a time:
//! 1. [`Engine::new`], [`Engine::set_port`] whenever an interface changes;
//! 2. [`Engine::install`] (or [`compile`] elsewhere and [`Engine::swap`] here) for each new plan;
//! 3. [`Engine::process`] for each frame, acts on the [`Verdict`], and asks [`Fence::is_open`] again just before it sends;
//! 4. [`Engine::poll_claim`] after each batch, and announces again what was claimed;
//! 5. [`Engine::tick`] when [`Engine::next_deadline`] has come.

mod answer;
mod arp_nd;
mod beside;
mod core;
mod counters;
mod forward;
mod fragment;
mod frame;
mod icmp;
mod kept;
mod limit;
mod nat;
mod report;
mod rewrite;
mod select;
mod share;
mod sketch;
mod state;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

pub use self::beside::{FlowCache, Passed, REGISTERS, Reservation, Windows};
pub use self::counters::Event;
pub use self::frame::{Fence, FrameMut, Gso, Offload, Permission, Port, PortConfig, Verdict};
pub use self::kept::Kept;
pub use self::nat::{SNAT_PORT_MAX, SNAT_PORT_MIN, SNAT_PORT_UPPER};
pub use self::share::{Adopted, FlowBinding, FlowName, FlowNews, FlowOutbox, FlowRecord, SHARE_BUDGET};

use self::core::{Core, Cx};
use crate::drops::Reason;
use crate::lane::{Counters, FlowFilter, FlowInfo, Trace};
use crate::lease::LeaseBoard;
use crate::neighbour::{Mac, NextHops};
use crate::plan::Plan;
use crate::tables::{PlanError, Tables};
use crate::time::BootTime;

/// Settings of an engine that do not change while it runs.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Interface on the network that the VIPs are on.
    pub service: PortConfig,
    /// Interface on the second network, when there is one.
    pub inside: Option<PortConfig>,
    /// Most flows remembered at once, 1..=[`MAX_FLOWS`]; about 130 bytes each, taken from the system as they come.
    pub max_flows: usize,
    /// Most flows remembered anew each second. A flood costs a table write for each packet below this and none above.
    pub new_flows_per_second: u32,
    /// Secret of this process: keys the flow table's hash, so that nobody outside can choose colliding flows.
    /// Backend choice does not depend on it.
    pub seed: u64,
}

/// Largest flow table: an entry is named by 32 bits with room for the index at half load.
pub const MAX_FLOWS: usize = 1 << 26;
/// Flow table of a lane that was told nothing else: 1 M flows, about 130 MB when full.
pub const DEFAULT_MAX_FLOWS: usize = 1 << 20;
/// New flows per second of a lane that was told nothing else: about what one core follows of the fastest lane, so that a flood has no more.
pub const DEFAULT_NEW_FLOWS_PER_SECOND: u32 = 500_000;
/// Foreign claims that wait for [`Engine::poll_claim`]. Each address waits at most once, so more than the VIPs of a
/// busy pair are not needed; a flood of claims loses the rest and they come again.
pub const MAX_CLAIMS: usize = 64;

/// Somebody else claims an address that this node holds the lease for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// VIP group that the address belongs to.
    pub group: u32,
    /// The address.
    pub address: IpAddr,
    /// Who claims it.
    pub mac: Mac,
    /// Where it was seen.
    pub port: Port,
}

/// An address that the engine answers ARP/ND for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnedAddress {
    /// VIP group that it belongs to.
    pub group: u32,
    /// The address.
    pub address: IpAddr,
    /// Port that it is answered for and announced on; `None`: every port.
    pub port: Option<Port>,
}

/// Flows and ticks that one [`Engine::tick`] looks at: some tens of microseconds, so that no frame waits long.
const TICK_BUDGET: usize = 1000;

/// The packet engine. See the module for the order of calls.
pub struct Engine {
    leases: Arc<LeaseBoard>,
    tables: Arc<Tables>,
    core: Core,
}

/// Compiles a plan. Independent of any engine, so that it can be done outside the packet thread; `previous` lends its
/// Maglev tables where nothing changed.
///
/// # Errors
/// The plan contradicts itself or exceeds a limit.
pub fn compile(plan: Plan, previous: Option<&Tables>) -> Result<Tables, PlanError> {
    Tables::compile(plan, previous)
}

impl Engine {
    /// An engine without a plan: everything is [`Verdict::NotOurs`].
    pub fn new(config: EngineConfig, leases: Arc<LeaseBoard>) -> Engine {
        Engine { leases, tables: Arc::new(Tables::default()), core: Core::new(config) }
    }

    /// Compiles `plan` and puts it in force as a whole. Flows and counters of what stays survive.
    ///
    /// # Errors
    /// The plan contradicts itself or exceeds a limit; what was in force stays.
    pub fn install(&mut self, plan: Plan, now: BootTime) -> Result<(), PlanError> {
        let tables = compile(plan, Some(&self.tables))?;
        self.swap(Arc::new(tables), now);
        Ok(())
    }

    /// Puts compiled tables in force as a whole. Flows and counters of what stays survive.
    pub fn swap(&mut self, tables: Arc<Tables>, _now: BootTime) {
        self.core.states.swap(&self.tables, &tables);
        self.tables = tables;
    }

    /// The tables in force.
    pub fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }

    /// Takes over changed facts of an interface (address, MTU).
    pub fn set_port(&mut self, port: Port, config: PortConfig) {
        self.core.ports[port as usize] = Some(config);
    }

    /// What is known of a port.
    pub fn port(&self, port: Port) -> Option<&PortConfig> {
        self.core.ports[port as usize].as_ref()
    }

    /// Addresses to answer for and to announce, with their ports, under the plan in force.
    pub fn owned(&self) -> Vec<OwnedAddress> {
        let owned = self.tables.addresses().map(|(address, owned)| OwnedAddress {
            group: owned.group,
            address,
            port: self.core.answering_port(owned, address),
        });
        owned.collect()
    }

    /// Decides about `frame`, which came in by `port`, and rewrites it in place.
    pub fn process(
        &mut self,
        frame: &mut FrameMut<'_>,
        port: Port,
        now: BootTime,
        hops: &dyn NextHops,
    ) -> Verdict {
        let cx = Cx { tables: &self.tables, leases: &self.leases, hops, port_in: port, now };
        self.core.process(&cx, frame)
    }

    /// The answer that the last [`Verdict::Reply`] spoke of: a whole Ethernet frame.
    pub fn reply(&self) -> &[u8] {
        &self.core.reply
    }

    /// Next claim of somebody else for an address that this node holds the lease for.
    pub fn poll_claim(&mut self) -> Option<Claim> {
        self.core.claims.pop_front()
    }

    /// Counts a frame that the lane itself had to drop after the engine's verdict.
    pub fn count_drop(&mut self, reason: Reason) {
        self.core.tally.drop(reason);
    }

    /// Forgets what has idled out. Bounded work; call again while [`Engine::next_deadline`] is not after `now`.
    pub fn tick(&mut self, now: BootTime) {
        let mut budget = TICK_BUDGET;
        let (tables, leases) = (&self.tables, &self.leases);
        // A flow whose service is in no plan concerns nobody.
        let owns = |states: &state::States, service| {
            share::group_of(states, tables, service).map(|group| leases.get(group).may_forward(now))
        };
        while let Some(flow) = self.core.expire(now, &mut budget, owns) {
            self.core.gone(&flow);
        }
    }

    /// When [`Engine::tick`] has something to do next; `None` while nothing is remembered.
    pub fn next_deadline(&self) -> Option<BootTime> {
        self.core.flows.next_deadline()
    }

    /// Counters since the engine was made.
    pub fn counters(&self, now: BootTime) -> Counters {
        Counters {
            backends: self.core.states.counters(&self.tables, |_, own| own.seen.estimate(now)),
            drops: self.core.tally.drops(),
            events: self.core.tally.events(),
            flows: self.core.flows.len() as u64,
        }
    }

    /// Flows that are remembered.
    pub fn flow_count(&self) -> usize {
        self.core.flows.len()
    }

    /// Remembered flows that match, at most `limit`, in no order.
    pub fn flows(&self, filter: &FlowFilter, limit: usize, now: BootTime) -> Vec<FlowInfo> {
        self.core.list(&self.tables, filter, limit, now)
    }

    /// Where a flow from `client` to service `service` would go now, and why; `None` when there is no such service.
    pub fn trace(&self, service: u32, client: SocketAddr, _now: BootTime) -> Option<Trace> {
        self.core.trace(&self.tables, service, client)
    }

    /// The board that leases are read from.
    pub fn leases(&self) -> &Arc<LeaseBoard> {
        &self.leases
    }
}
