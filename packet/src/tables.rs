//! Compiled tables: what a [`Plan`] means for packets. Immutable; an engine swaps them as a whole.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::Port;
use crate::hash;
use crate::maglev::{Maglev, Member};
use crate::plan::{
    DeadBackend, GroupPlan, MAX_BACKENDS, MAX_GROUPS, MAX_SERVICES, Mode, Plan, Protocol, Scheduler,
    ServicePlan,
};
use crate::wire::proto;

/// Seed of every hash that chooses a backend or a SNAT port. One number for all nodes and releases: a standby must choose
/// as the owner did.
pub const HASH_SEED: u32 = 0x6b6d_696e;

/// Addresses of one group. Bounded so that a plan can't make the answerer's table as large as it likes.
pub const MAX_GROUP_ADDRESSES: usize = 256;

/// Why a plan can't be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} is {value}: {reason}")]
pub struct PlanError {
    /// Where: group, service, backend and field, in words.
    pub what: String,
    /// The value there.
    pub value: String,
    /// Why it can't be.
    pub reason: String,
}

/// A compiled plan.
#[derive(Debug, Default)]
pub struct Tables {
    revision: u64,
    services: Vec<Service>,
    by_id: FastMap<u32, u16>,
    by_vip: FastMap<(IpAddr, u16, Protocol), u16>,
    by_backend: FastMap<(IpAddr, u16, Protocol), (u16, u16)>,
    transparent: FastMap<IpAddr, ()>,
    owned: FastMap<IpAddr, Owned>,
}

/// An address that is answered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owned {
    /// VIP group.
    pub group: u32,
    /// Clients use it.
    pub vip: bool,
    /// Backends route back through it.
    pub inside: bool,
    /// Source of full NAT.
    pub snat: bool,
}

/// A virtual service.
#[derive(Debug)]
pub struct Service {
    /// Cluster-wide number.
    pub id: u32,
    /// Name for messages.
    pub name: String,
    /// VIP group.
    pub group: u32,
    /// Virtual IP address.
    pub vip: IpAddr,
    /// Port.
    pub port: u16,
    /// Layer-4 protocol.
    pub protocol: Protocol,
    /// Forwarding mode.
    pub mode: Mode,
    /// Scheduler.
    pub scheduler: Scheduler,
    /// Dead-backend policy.
    pub dead_backend: DeadBackend,
    /// Idle time of its protocol.
    pub idle: Duration,
    /// Every flow is remembered.
    pub tracks_all: bool,
    /// Every slot consults the flow table.
    pub consult_all_slots: bool,
    /// Backends, in the plan's order.
    pub backends: Vec<Backend>,
    /// SNAT addresses of its family (`nat`).
    pub snat: Vec<IpAddr>,
    /// Source of ICMP errors to its backends: the inside VIP where there is one, else the VIP.
    pub inside: IpAddr,
    current: Arc<Table>,
    /// Absent while the service is settled.
    base: Option<Arc<Table>>,
}

/// A backend of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Cluster-wide number.
    pub id: u32,
    /// Name for messages.
    pub name: String,
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// Weight in the current table.
    pub weight: u32,
    /// Whether flows that it already has may still be sent to it.
    pub alive: bool,
}

/// A Maglev table with what it was built from.
#[derive(Debug)]
pub(crate) struct Table {
    members: Vec<Member>,
    maglev: Maglev,
}

impl Table {
    pub(crate) fn maglev(&self) -> &Maglev {
        &self.maglev
    }
}

/// What the tables say about a hash: indices into [`Service::backends`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Backend of new flows.
    pub current: Option<u16>,
    /// Backend of flows older than the change; the same as `current` where the slot is not in transition, none where the
    /// base table was empty.
    pub base: Option<u16>,
}

impl Slot {
    /// Whether the slot is in transition.
    pub fn in_transition(&self) -> bool {
        self.current != self.base
    }
}

impl Protocol {
    /// IANA number.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => proto::TCP,
            Protocol::Udp => proto::UDP,
        }
    }

    /// By IANA number.
    pub fn from_number(number: u8) -> Option<Protocol> {
        match number {
            proto::TCP => Some(Protocol::Tcp),
            proto::UDP => Some(Protocol::Udp),
            _ => None,
        }
    }
}

impl Service {
    /// The hash that chooses this client's slot.
    #[inline]
    pub fn hash(&self, client: IpAddr, client_port: u16) -> u32 {
        match self.scheduler {
            Scheduler::SourceIp => hash::client(HASH_SEED, client),
            _ => hash::flow(HASH_SEED, client, client_port, self.vip, self.port, self.protocol.number()),
        }
    }

    /// The slot that `hash` falls on.
    #[inline]
    pub fn slot(&self, hash: u32) -> Slot {
        let current = self.current.maglev.lookup(hash);
        let base = match &self.base {
            None => current,
            Some(base) => base.maglev.lookup(hash),
        };
        Slot { current, base }
    }

    /// Number of the slot in the current table, for display.
    pub fn slot_number(&self, hash: u32) -> u32 {
        self.current.maglev.slot(hash)
    }

    /// Whether the tables alone lead some flows elsewhere than they go: there are slots in transition, or its scheduler has state.
    pub(crate) fn has_exceptions(&self) -> bool {
        self.base.is_some() || !matches!(self.scheduler, Scheduler::Maglev | Scheduler::SourceIp)
    }

    /// The table in force.
    pub(crate) fn current(&self) -> &Arc<Table> {
        &self.current
    }

    /// The table of before; absent while the service is settled.
    pub(crate) fn base(&self) -> Option<&Arc<Table>> {
        self.base.as_ref()
    }

    /// Whether there is a base table that differs from the current one.
    pub fn in_transition(&self) -> bool {
        self.base.is_some()
    }
}

impl Tables {
    /// Compiles `plan`; `previous` lends its Maglev tables where nothing changed.
    ///
    /// # Errors
    /// The plan contradicts itself or exceeds a limit.
    pub fn compile(plan: Plan, previous: Option<&Tables>) -> Result<Tables, PlanError> {
        let mut tables = Tables { revision: plan.revision, ..Tables::default() };
        if plan.groups.len() > MAX_GROUPS {
            return Err(refuse("number of VIP groups", plan.groups.len(), format!("at most {MAX_GROUPS}")));
        }
        if plan.services.len() > MAX_SERVICES {
            return Err(refuse("number of services", plan.services.len(), format!("at most {MAX_SERVICES}")));
        }
        let mut cells = HashMap::new();
        for group in &plan.groups {
            if let Some(other) = cells.insert(group.id as usize % MAX_GROUPS, group) {
                let reason = format!("it shares a lease cell with group \"{}\"", other.name);
                return Err(refuse(&format!("group \"{}\" id", group.name), group.id, reason));
            }
            tables.add_group(group)?;
        }
        let groups: HashMap<u32, &GroupPlan> = plan.groups.iter().map(|g| (g.id, g)).collect();
        let old: HashMap<u32, &Service> =
            previous.iter().flat_map(|t| &t.services).map(|s| (s.id, s)).collect();
        let mut ids = HashMap::new();
        for service in plan.services {
            if let Some(other) = ids.insert(service.id, service.name.clone()) {
                let reason = format!("it is also that of \"{other}\"");
                return Err(refuse(&format!("service \"{}\" id", service.name), service.id, reason));
            }
            tables.add_service(service, &groups, &old)?;
        }
        Ok(tables)
    }

    /// Revision of the plan.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The services, in the plan's order.
    pub fn services(&self) -> &[Service] {
        &self.services
    }

    /// Index of the service with that id.
    pub fn index_of(&self, service: u32) -> Option<u16> {
        self.by_id.get(&service).copied()
    }

    /// Index of the service at an address.
    #[inline]
    pub fn service_at(&self, vip: IpAddr, port: u16, protocol: Protocol) -> Option<u16> {
        self.by_vip.get(&(vip, port, protocol)).copied()
    }

    /// Indices of the `nat-transparent` service and its backend that an answer comes from.
    #[inline]
    pub fn transparent_backend(&self, address: IpAddr, port: u16, protocol: Protocol) -> Option<(u16, u16)> {
        self.by_backend.get(&(address, port, protocol)).copied()
    }

    /// Whether some `nat-transparent` service has a backend at that address.
    pub fn is_transparent_backend(&self, address: IpAddr) -> bool {
        self.transparent.contains_key(&address)
    }

    /// What an address is to us.
    #[inline]
    pub fn owned(&self, address: IpAddr) -> Option<&Owned> {
        self.owned.get(&address)
    }

    /// Every address that is answered for.
    pub fn addresses(&self) -> impl Iterator<Item = (IpAddr, &Owned)> {
        self.owned.iter().map(|(&address, owned)| (address, owned))
    }

    fn add_group(&mut self, group: &GroupPlan) -> Result<(), PlanError> {
        let all = group.vips.len() + group.inside_vips.len() + group.snat.len();
        if all > MAX_GROUP_ADDRESSES {
            let what = format!("group \"{}\" number of addresses", group.name);
            return Err(refuse(&what, all, format!("at most {MAX_GROUP_ADDRESSES}")));
        }
        self.own(group, "vips", &group.vips, |o| o.vip = true)?;
        self.own(group, "inside_vips", &group.inside_vips, |o| o.inside = true)?;
        self.own(group, "snat", &group.snat, |o| o.snat = true)
    }

    fn own(
        &mut self,
        group: &GroupPlan,
        field: &str,
        addresses: &[IpAddr],
        mark: fn(&mut Owned),
    ) -> Result<(), PlanError> {
        for &address in addresses {
            let what = format!("group \"{}\" {field}", group.name);
            if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
                return Err(refuse(&what, address, "no machine can have it".to_owned()));
            }
            let nothing = Owned { group: group.id, vip: false, inside: false, snat: false };
            let owned = self.owned.entry(address).or_insert(nothing);
            if owned.group != group.id {
                return Err(refuse(&what, address, "it belongs to another group too".to_owned()));
            }
            mark(owned);
        }
        Ok(())
    }

    fn add_service(
        &mut self,
        plan: ServicePlan,
        groups: &HashMap<u32, &GroupPlan>,
        old: &HashMap<u32, &Service>,
    ) -> Result<(), PlanError> {
        let name = format!("service \"{}\"", plan.name);
        let Some(group) = groups.get(&plan.group) else {
            return Err(refuse(&format!("{name} group"), plan.group, "there is no such group".to_owned()));
        };
        if !group.vips.contains(&plan.vip) {
            return Err(refuse(&format!("{name} vip"), plan.vip, "its group has no such VIP".to_owned()));
        }
        if plan.port == 0 {
            return Err(refuse(&format!("{name} port"), 0, "1..=65535".to_owned()));
        }
        if plan.backends.len() > MAX_BACKENDS {
            let reason = format!("at most {MAX_BACKENDS}");
            return Err(refuse(&format!("{name} number of backends"), plan.backends.len(), reason));
        }
        let same_family = |a: &&IpAddr| a.is_ipv4() == plan.vip.is_ipv4();
        let snat: Vec<IpAddr> = match plan.mode {
            Mode::Nat => group.snat.iter().filter(same_family).copied().collect(),
            Mode::Dsr | Mode::NatTransparent => Vec::new(),
        };
        if plan.mode == Mode::Nat && snat.is_empty() {
            let family = if plan.vip.is_ipv4() { "IPv4" } else { "IPv6" };
            let reason = format!("group \"{}\" has no {family} address in snat", group.name);
            return Err(refuse(&format!("{name} mode"), "nat", reason));
        }
        let index = self.services.len() as u16;
        match self.by_vip.entry((plan.vip, plan.port, plan.protocol)) {
            Entry::Occupied(other) => {
                let other = &self.services[usize::from(*other.get())].name;
                let reason = format!("service \"{other}\" has the same address, port and protocol");
                return Err(refuse(
                    &format!("{name} vip and port"),
                    format_args!("{} {}", plan.vip, plan.port),
                    reason,
                ));
            }
            Entry::Vacant(free) => {
                free.insert(index);
            }
        }
        self.check_backends(&plan, &name, index)?;

        let members = |weight: fn(&crate::plan::BackendPlan) -> u32| -> Vec<Member> {
            plan.backends.iter().map(|b| Member { id: b.id, weight: weight(b) }).collect()
        };
        let (current, base) = (members(|b| b.weight), members(|b| b.base_weight));
        let before = old.get(&plan.id);
        let known: Vec<&Arc<Table>> =
            before.iter().flat_map(|s| [Some(&s.current), s.base.as_ref()]).flatten().collect();
        let in_transition = current != base;
        let current = table(current, &known);
        let base = in_transition.then(|| table(base, &known));

        let stateful = matches!(plan.scheduler, Scheduler::RoundRobin | Scheduler::LeastConn);
        let tracked_udp = plan.protocol == Protocol::Udp && plan.track_udp;
        self.by_id.insert(plan.id, self.services.len() as u16);
        self.services.push(Service {
            id: plan.id,
            group: plan.group,
            vip: plan.vip,
            port: plan.port,
            protocol: plan.protocol,
            mode: plan.mode,
            scheduler: plan.scheduler,
            dead_backend: plan.dead_backend,
            idle: match plan.protocol {
                Protocol::Tcp => plan.tcp_idle,
                Protocol::Udp => plan.udp_idle,
            },
            tracks_all: stateful || tracked_udp || plan.mode == Mode::Nat,
            consult_all_slots: plan.consult_all_slots,
            backends: plan
                .backends
                .iter()
                .map(|b| Backend {
                    id: b.id,
                    name: b.name.clone(),
                    address: b.address,
                    port: b.port,
                    weight: b.weight,
                    alive: b.alive,
                })
                .collect(),
            snat,
            inside: group.inside_vips.iter().find(same_family).copied().unwrap_or(plan.vip),
            current,
            base,
            name: plan.name,
        });
        Ok(())
    }

    fn check_backends(&mut self, plan: &ServicePlan, name: &str, index: u16) -> Result<(), PlanError> {
        let mut ids = HashMap::new();
        for (number, backend) in plan.backends.iter().enumerate() {
            let name = format!("{name} backend \"{}\"", backend.name);
            if let Some(other) = ids.insert(backend.id, &backend.name) {
                return Err(refuse(
                    &format!("{name} id"),
                    backend.id,
                    format!("it is also that of \"{other}\""),
                ));
            }
            if backend.port == 0 {
                return Err(refuse(&format!("{name} port"), 0, "1..=65535".to_owned()));
            }
            if backend.address.is_ipv4() != plan.vip.is_ipv4() {
                let reason = format!("it is not of the same family as the VIP {}", plan.vip);
                return Err(refuse(&format!("{name} address"), backend.address, reason));
            }
            if self.owned.contains_key(&backend.address) {
                let reason = "it is an address that the balancers answer for".to_owned();
                return Err(refuse(&format!("{name} address"), backend.address, reason));
            }
            if plan.mode == Mode::Dsr && backend.port != plan.port {
                let reason = format!("mode dsr rewrites no port: it must be the service's {}", plan.port);
                return Err(refuse(&format!("{name} port"), backend.port, reason));
            }
            if plan.mode == Mode::NatTransparent {
                let key = (backend.address, backend.port, plan.protocol);
                if let Some((other, _)) = self.by_backend.insert(key, (index, number as u16)) {
                    let other =
                        self.services.get(usize::from(other)).map_or(plan.name.as_str(), |s| s.name.as_str());
                    let reason = format!(
                        "its answers could not be told from those to service \"{other}\", also nat-transparent"
                    );
                    return Err(refuse(&format!("{name} address and port"), backend.address, reason));
                }
                self.transparent.insert(backend.address, ());
            }
        }
        Ok(())
    }
}

impl Owned {
    /// Port that the address is answered for on; `None`: wherever it is asked for (a SNAT address of a network that the
    /// node itself has no address on).
    pub fn port(
        &self,
        address: IpAddr,
        inside: Option<&[(IpAddr, u8)]>,
        service: &[(IpAddr, u8)],
    ) -> Option<Port> {
        let Some(inside) = inside else { return Some(Port::Service) };
        if self.vip {
            return Some(Port::Service);
        }
        if self.inside {
            return Some(Port::Inside);
        }
        let on =
            |addresses: &[(IpAddr, u8)]| addresses.iter().any(|&(own, len)| same_network(own, len, address));
        match (on(service), on(inside)) {
            (true, false) => Some(Port::Service),
            (false, true) => Some(Port::Inside),
            _ => None,
        }
    }
}

/// Whether `address` lies in the network that `own/len` names.
fn same_network(own: IpAddr, len: u8, address: IpAddr) -> bool {
    match (own, address) {
        (IpAddr::V4(own), IpAddr::V4(address)) => {
            let differing = own.to_bits() ^ address.to_bits();
            differing.leading_zeros() >= u32::from(len).min(32)
        }
        (IpAddr::V6(own), IpAddr::V6(address)) => {
            let differing = own.to_bits() ^ address.to_bits();
            differing.leading_zeros() >= u32::from(len).min(128)
        }
        _ => false,
    }
}

/// The table for `members`, lent by `known` where it has been built already.
fn table(members: Vec<Member>, known: &[&Arc<Table>]) -> Arc<Table> {
    if let Some(table) = known.iter().find(|t| t.members == members) {
        return Arc::clone(table);
    }
    let maglev = Maglev::new(HASH_SEED, &members);
    Arc::new(Table { members, maglev })
}

fn refuse(what: &str, value: impl std::fmt::Display, reason: String) -> PlanError {
    PlanError { what: what.to_owned(), value: value.to_string(), reason }
}

/// A map keyed by addresses of the plan. Its keys are the operator's, so no defence against chosen keys is needed, and the
/// hasher may be the cheapest that spreads.
pub(crate) type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<FastHasher>>;

/// Multiplies and rotates, eight bytes at a time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FastHasher(u64);

impl FastHasher {
    #[inline]
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(26) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl Hasher for FastHasher {
    #[inline]
    fn finish(&self) -> u64 {
        // The map takes bits from both ends; the product's upper half is the better one.
        self.0 ^ self.0 >> 32
    }

    #[inline]
    fn write(&mut self, data: &[u8]) {
        let (words, rest) = data.as_chunks::<8>();
        for word in words {
            self.add(u64::from_le_bytes(*word));
        }
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.add(u64::from_le_bytes(last));
        }
    }

    #[inline]
    fn write_u16(&mut self, n: u16) {
        self.add(u64::from(n));
    }

    #[inline]
    fn write_usize(&mut self, n: usize) {
        self.add(n as u64);
    }

    #[inline]
    fn write_isize(&mut self, n: isize) {
        self.add(n as u64);
    }
}

#[cfg(test)]
mod tests;
