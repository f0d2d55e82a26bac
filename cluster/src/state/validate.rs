//! Is a document right? Everything that is wrong with it is said at once, each with its place, its value, the reason
//! and what to do.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::IpAddr;

use komainu_proto::domain::{Backend, Document, Group, HealthCheck, Mode, NodeId, Protocol, Service};

use super::document::{group_addresses, renamed_groups};
use super::{
    MAX_BACKENDS, MAX_BACKENDS_TOTAL, MAX_GROUP_ADDRESSES, MAX_GROUPS, MAX_SERVICES, Problem, State,
};

/// Longest name: fits a DNS label, and a column of a terminal.
const MAX_NAME_LEN: usize = 63;
/// Longest request path and Host header of a check.
const MAX_CHECK_TEXT_LEN: usize = 1024;
/// Highest weight; a Maglev table has at least 100 slots for each unit of a backend's mean weight only below it.
const MAX_WEIGHT: u32 = 1000;
/// Modes that this version can forward.
const MODES: &str = "nat, nat-transparent or dsr";

/// What a document is judged against, beside itself.
#[derive(Clone, Debug, Default)]
pub struct Context {
    groups: Vec<(String, Vec<IpAddr>)>,
    owners: BTreeMap<String, NodeId>,
    held: Vec<(IpAddr, NodeId)>,
    nodes: BTreeMap<NodeId, String>,
    segments: Option<Vec<(IpAddr, u8)>>,
}

impl Context {
    /// The context of a state. Without a state (`Context::default()`) only the document itself is judged.
    pub fn of(state: &State) -> Self {
        Context {
            groups: state.groups.iter().map(|g| (g.config.name.clone(), g.addresses().collect())).collect(),
            owners: state.groups.iter().filter_map(|g| Some((g.config.name.clone(), g.owner?))).collect(),
            held: state.held.iter().map(|h| (h.address, h.node)).collect(),
            nodes: state.members.iter().map(|m| (m.node.id, m.node.name.clone())).collect(),
            segments: None,
        }
    }

    /// Also require that the backends of `dsr` services lie in one of these prefixes (address and length) together with
    /// the VIP: what a node knows of its own segments, and the replicated state doesn't.
    pub fn with_segments(self, prefixes: Vec<(IpAddr, u8)>) -> Self {
        Context { segments: Some(prefixes), ..self }
    }

    fn node_name(&self, node: NodeId) -> String {
        self.nodes.get(&node).cloned().unwrap_or_else(|| format!("node {}", node.0))
    }
}

/// Judges a document.
///
/// # Errors
/// Everything that is wrong. Otherwise the answer is what looks wrong but is accepted.
pub fn validate(document: &Document, context: &Context) -> Result<Vec<Problem>, Vec<Problem>> {
    let mut v = Validator { document, context, problems: Vec::new(), warnings: Vec::new() };
    v.limits();
    v.groups();
    v.addresses();
    v.services();
    v.shared_transparent_backends();
    if v.problems.is_empty() { Ok(v.warnings) } else { Err(v.problems) }
}

struct Validator<'a> {
    document: &'a Document,
    context: &'a Context,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
}

fn problem(
    path: impl Into<String>,
    value: impl Display,
    reason: impl Into<String>,
    action: impl Into<String>,
) -> Problem {
    Problem { path: path.into(), value: value.to_string(), reason: reason.into(), action: action.into() }
}

impl Validator<'_> {
    fn refuse(
        &mut self,
        path: &str,
        value: impl Display,
        reason: impl Into<String>,
        action: impl Into<String>,
    ) {
        self.problems.push(problem(path, value, reason, action));
    }

    fn limits(&mut self) {
        let d = self.document;
        let total = d.services.iter().map(|s| s.backends.len()).sum();
        let all = [
            ("group", d.groups.len(), MAX_GROUPS, "groups"),
            ("service", d.services.len(), MAX_SERVICES, "services"),
            ("service.backend", total, MAX_BACKENDS_TOTAL, "backends in all services together"),
        ];
        for (path, count, most, what) in all {
            if count > most {
                self.refuse(
                    path,
                    count,
                    format!("there can be at most {most} {what}"),
                    "use several clusters",
                );
            }
        }
    }

    fn groups(&mut self) {
        let mut names = BTreeMap::new();
        for (i, group) in self.document.groups.iter().enumerate() {
            let path = group_path(i, group);
            self.name(&format!("{path}.name"), &group.name);
            if let Some(first) = names.insert(group.name.as_str(), i) {
                self.duplicate_name(&format!("{path}.name"), &group.name, &format!("group[{first}]"));
            }
            if group.vips.is_empty() {
                self.refuse(
                    &format!("{path}.vips"),
                    "[]",
                    "a group without a VIP serves nothing",
                    "name at least one address",
                );
            }
            let count = group_addresses(group).count();
            if count > MAX_GROUP_ADDRESSES {
                let reason =
                    format!("vips, inside_vips and snat together can be at most {MAX_GROUP_ADDRESSES}");
                self.refuse(&path, count, reason, "spread them over several groups");
            }
            if let Some(prefer) = &group.prefer
                && !self.context.nodes.values().any(|name| name == prefer)
            {
                let known: Vec<_> = self.context.nodes.values().cloned().collect();
                let action = format!("name one of: {}, or let a node of this name join", known.join(", "));
                let path = format!("{path}.prefer");
                self.warnings.push(problem(path, prefer, "no member of the cluster has this name", action));
            }
        }
    }

    /// Each address of a group is usable, is there once, and is nobody else's.
    fn addresses(&mut self) {
        let renamed = renamed_groups(&self.context.groups, self.document);
        let mut used: BTreeMap<IpAddr, String> = BTreeMap::new();
        for (i, group) in self.document.groups.iter().enumerate() {
            let path = group_path(i, group);
            let old_name = renamed.get(group.name.as_str()).copied().unwrap_or(&group.name);
            for (field, addresses) in
                [("vips", &group.vips), ("inside_vips", &group.inside_vips), ("snat", &group.snat)]
            {
                for (j, &address) in addresses.iter().enumerate() {
                    let path = format!("{path}.{field}[{j}]");
                    self.usable(&path, address);
                    if let Some(first) = used.insert(address, path.clone()) {
                        let action = "an address has one use in one group: leave one of them out";
                        self.refuse(&path, address, format!("{first} is the same address"), action);
                    }
                    self.free(&path, address, old_name);
                }
            }
        }
        let backends = self.document.services.iter().enumerate().flat_map(|(i, service)| {
            let path = service_path(i, service);
            service.backends.iter().enumerate().map(move |(j, b)| (backend_path(&path, j, b), b.address))
        });
        for (path, address) in backends.collect::<Vec<_>>() {
            if let Some(other) = used.get(&address) {
                let reason =
                    format!("{other} is the same address, and the balancer itself answers for that one");
                self.refuse(&format!("{path}.address"), address, reason, "give the server's own address");
            }
        }
    }

    /// No other group's owner may still answer for the address.
    fn free(&mut self, path: &str, address: IpAddr, old_name: &str) {
        let context = self.context;
        let owner = context.owners.get(old_name);
        for (name, _) in context.groups.iter().filter(|(name, a)| name != old_name && a.contains(&address)) {
            if let Some(&node) = context.owners.get(name) {
                let reason =
                    format!("it is in group \"{name}\" now, and {} answers for it", context.node_name(node));
                self.refuse(
                    path,
                    address,
                    reason,
                    "remove it there and apply, then add it here and apply again",
                );
            }
        }
        for &(_, node) in context.held.iter().filter(|(a, node)| *a == address && owner != Some(node)) {
            let reason = format!("{} was its owner and may still answer for it", context.node_name(node));
            self.refuse(path, address, reason, "try again in a moment");
        }
    }

    fn services(&mut self) {
        let mut names = BTreeMap::new();
        let mut endpoints = BTreeMap::new();
        for (i, service) in self.document.services.iter().enumerate() {
            let path = service_path(i, service);
            self.name(&format!("{path}.name"), &service.name);
            if let Some(first) = names.insert(service.name.as_str(), i) {
                self.duplicate_name(&format!("{path}.name"), &service.name, &format!("service[{first}]"));
            }
            self.port(&format!("{path}.port"), service.port);
            if let Some(first) =
                endpoints.insert((service.vip, service.port, service.protocol), &service.name)
            {
                let endpoint = std::net::SocketAddr::new(service.vip, service.port);
                let value = format!("{endpoint}/{}", service.protocol);
                let reason = format!("service \"{first}\" has the same vip, port and protocol");
                self.refuse(
                    &path,
                    value,
                    reason,
                    "change one of the three, or put the backends into one service",
                );
            }
            self.mode(&path, service);
            let idle = [
                ("tcp_idle_ms", service.tcp_idle_ms, 86_400_000),
                ("udp_idle_ms", service.udp_idle_ms, 3_600_000),
            ];
            for (field, value, most) in idle {
                self.range(&format!("{path}.{field}"), value, 1_000, most);
            }
            self.health(&format!("{path}.health"), service);
            self.backends(&path, service);
        }
    }

    fn mode(&mut self, path: &str, service: &Service) {
        let document = self.document;
        if service.mode == Mode::Tunnel {
            let reason = "this version can't encapsulate yet";
            self.refuse(&format!("{path}.mode"), service.mode, reason, format!("use {MODES}"));
        }
        let Some((i, group)) = document.groups.iter().enumerate().find(|(_, g)| g.name == service.group)
        else {
            let known: Vec<_> = document.groups.iter().map(|g| g.name.as_str()).take(10).collect();
            let action = format!("name one of: {}, or add the group", known.join(", "));
            self.refuse(&format!("{path}.group"), quoted(&service.group), "there is no such group", action);
            return;
        };
        let group_path = group_path(i, group);
        if !group.vips.contains(&service.vip) {
            let vips: Vec<_> = group.vips.iter().map(IpAddr::to_string).collect();
            let reason = format!("it is not a VIP of group \"{}\" ({})", group.name, vips.join(", "));
            self.refuse(
                &format!("{path}.vip"),
                service.vip,
                reason,
                format!("use one of those, or add it to {group_path}.vips"),
            );
        }
        let family = family(service.vip);
        let lacks = |addresses: &[IpAddr]| !addresses.iter().any(|a| a.is_ipv4() == service.vip.is_ipv4());
        if service.mode == Mode::Nat && lacks(&group.snat) {
            let reason = format!("group \"{}\" has no {family} address in snat to send from", group.name);
            self.refuse(
                &format!("{path}.mode"),
                service.mode,
                reason,
                format!("add one to {group_path}.snat"),
            );
        }
        if service.mode == Mode::NatTransparent && lacks(&group.inside_vips) {
            let reason = format!(
                "group \"{}\" has no {family} address in inside_vips for the backends to route their answers through",
                group.name
            );
            self.refuse(
                &format!("{path}.mode"),
                service.mode,
                reason,
                format!("add one to {group_path}.inside_vips"),
            );
        }
    }

    fn backends(&mut self, path: &str, service: &Service) {
        if service.backends.len() > MAX_BACKENDS {
            let reason = format!("a service can have at most {MAX_BACKENDS} backends");
            self.refuse(&format!("{path}.backend"), service.backends.len(), reason, "use several services");
        }
        let mut names = BTreeMap::new();
        let mut servers = BTreeMap::new();
        for (j, backend) in service.backends.iter().enumerate() {
            let path = backend_path(path, j, backend);
            self.name(&format!("{path}.name"), &backend.name);
            if let Some(first) = names.insert(backend.name.as_str(), j) {
                self.duplicate_name(&format!("{path}.name"), &backend.name, &format!("backend[{first}]"));
            }
            self.usable(&format!("{path}.address"), backend.address);
            self.port(&format!("{path}.port"), backend.port);
            if let Some(first) = servers.insert((backend.address, backend.port), &backend.name) {
                let server = std::net::SocketAddr::new(backend.address, backend.port);
                let reason = format!("backend \"{first}\" of this service is the same server");
                self.refuse(
                    &path,
                    server,
                    reason,
                    "leave one out; to give it a bigger share raise its weight",
                );
            }
            if backend.address.is_ipv4() != service.vip.is_ipv4() {
                let reason = format!(
                    "it is {} and the VIP {} is {}",
                    family(backend.address),
                    service.vip,
                    family(service.vip)
                );
                self.refuse(
                    &format!("{path}.address"),
                    backend.address,
                    reason,
                    "use a backend address of the VIP's family",
                );
            }
            if backend.weight > MAX_WEIGHT {
                let reason = format!("a weight is 0 to {MAX_WEIGHT}");
                self.refuse(
                    &format!("{path}.weight"),
                    backend.weight,
                    reason,
                    "only the ratio counts: scale all of them down",
                );
            }
            if service.mode == Mode::Dsr {
                self.dsr_backend(&path, service, backend);
            }
        }
    }

    fn dsr_backend(&mut self, path: &str, service: &Service, backend: &Backend) {
        if backend.port != service.port {
            let reason =
                format!("in dsr the port is not rewritten, so it must be the service's ({})", service.port);
            self.refuse(&format!("{path}.port"), backend.port, reason, "use that port, or mode nat");
        }
        let Some(segments) = &self.context.segments else { return };
        let on_segment = |&(prefix, len): &(IpAddr, u8)| {
            in_prefix(backend.address, prefix, len) && in_prefix(service.vip, prefix, len)
        };
        if !segments.iter().any(on_segment) {
            let reason = format!(
                "in dsr a backend must be on the segment of the VIP {}: only the MAC address is rewritten",
                service.vip
            );
            self.refuse(
                &format!("{path}.address"),
                backend.address,
                reason,
                "use nat or nat-transparent, or tunnel once it is available",
            );
        }
    }

    fn health(&mut self, path: &str, service: &Service) {
        let h: &HealthCheck = &service.health;
        if h.port == Some(0) {
            self.port(&format!("{path}.port"), 0);
        }
        self.range(&format!("{path}.interval_ms"), h.interval_ms, 50, 3_600_000);
        self.range(&format!("{path}.timeout_ms"), h.timeout_ms, 10, 60_000);
        if h.timeout_ms > h.interval_ms {
            let reason = format!("it is longer than interval_ms ({})", h.interval_ms);
            self.refuse(&format!("{path}.timeout_ms"), h.timeout_ms, reason, "make it at most the interval");
        }
        self.range(&format!("{path}.rise"), h.rise, 1, 100);
        self.range(&format!("{path}.fall"), h.fall, 1, 100);
        let odd = |text: &str| text.len() > MAX_CHECK_TEXT_LEN || !text.chars().all(|c| c.is_ascii_graphic());
        if !h.path.starts_with('/') || odd(&h.path) {
            let action = format!(
                "start it with / and use at most {MAX_CHECK_TEXT_LEN} printable ASCII characters, no blanks"
            );
            self.refuse(&format!("{path}.path"), quoted(&h.path), "it is not a request path", action);
        }
        if let Some(host) = &h.host
            && (host.is_empty() || odd(host))
        {
            let action = "give a host name, or leave it out to use the backend's address";
            self.refuse(&format!("{path}.host"), quoted(host), "it is not a host name", action);
        }
        let (low, high) = h.expect_status;
        if !(100..=599).contains(&low) || !(100..=599).contains(&high) || low > high {
            let reason = "it is not a range of HTTP statuses";
            self.refuse(
                &format!("{path}.expect_status"),
                format!("{low}-{high}"),
                reason,
                "use two of 100..=599, the lower first",
            );
        }
    }

    /// The way back of a `nat-transparent` flow is found by the backend's endpoint alone.
    fn shared_transparent_backends(&mut self) {
        let mut seen: BTreeMap<(IpAddr, u16, Protocol), &str> = BTreeMap::new();
        let document = self.document;
        let transparent =
            document.services.iter().enumerate().filter(|(_, s)| s.mode == Mode::NatTransparent);
        for (i, service) in transparent {
            let path = service_path(i, service);
            let mut own = BTreeSet::new();
            for (j, backend) in service.backends.iter().enumerate() {
                let server = (backend.address, backend.port, service.protocol);
                if !own.insert(server) {
                    continue;
                }
                if let Some(first) = seen.insert(server, &service.name) {
                    let endpoint = std::net::SocketAddr::new(backend.address, backend.port);
                    let reason = format!(
                        "service \"{first}\" has the same backend: in nat-transparent the answer's way back could not be told apart"
                    );
                    let action = "let the server listen on another port for one of them, or use mode nat";
                    let value = format!("{endpoint}/{}", service.protocol);
                    self.refuse(&backend_path(&path, j, backend), value, reason, action);
                }
            }
        }
    }

    fn name(&mut self, path: &str, name: &str) {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let starts_well = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if name.len() > MAX_NAME_LEN || !starts_well || !name.chars().all(allowed) {
            let action =
                format!("use 1 to {MAX_NAME_LEN} of A-Z a-z 0-9 - _ . and begin with a letter or digit");
            self.refuse(path, quoted(name), "it is not a name", action);
        }
    }

    fn duplicate_name(&mut self, path: &str, name: &str, first: &str) {
        self.refuse(path, quoted(name), format!("{first} has the same name"), "give each its own name");
    }

    fn port(&mut self, path: &str, port: u16) {
        if port == 0 {
            self.refuse(path, port, "0 is not a port", "use 1 to 65535");
        }
    }

    fn range(&mut self, path: &str, value: u32, least: u32, most: u32) {
        if !(least..=most).contains(&value) {
            self.refuse(path, value, "it is out of range", format!("use {least} to {most}"));
        }
    }

    /// The address can stand for one host on a network.
    fn usable(&mut self, path: &str, address: IpAddr) {
        let reason = match address {
            _ if address.is_unspecified() => "it is the unspecified address",
            _ if address.is_loopback() => "it is a loopback address",
            _ if address.is_multicast() => "it is a multicast address",
            IpAddr::V4(a) if a.octets()[0] == 0 => "it stands for this network (RFC 1122, section 3.2.1.3)",
            IpAddr::V4(a) if a.octets()[0] >= 240 => "it is reserved (RFC 1112, section 4)",
            IpAddr::V6(a) if a.to_ipv4_mapped().is_some() => "it is an IPv4-mapped address",
            IpAddr::V6(a) if a.is_unicast_link_local() => {
                "it is a link-local address, which means nothing beyond one link"
            }
            _ => return,
        };
        self.refuse(path, address, reason, "use a unicast address");
    }
}

fn group_path(i: usize, group: &Group) -> String {
    format!("group[{i}] {}", quoted(&group.name))
}

fn service_path(i: usize, service: &Service) -> String {
    format!("service[{i}] {}", quoted(&service.name))
}

fn backend_path(service_path: &str, j: usize, backend: &Backend) -> String {
    format!("{service_path}.backend[{j}] {}", quoted(&backend.name))
}

/// The text in quotes; long or unprintable text is made harmless for a terminal.
fn quoted(text: &str) -> String {
    let short: String = text.chars().take(MAX_NAME_LEN + 1).collect();
    if short.len() < text.len() { format!("{:?}", short + "…") } else { format!("{text:?}") }
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn in_prefix(address: IpAddr, prefix: IpAddr, len: u8) -> bool {
    match (address, prefix) {
        (IpAddr::V4(a), IpAddr::V4(p)) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(len.min(32))).unwrap_or(0);
            (a.to_bits() ^ p.to_bits()) & mask == 0
        }
        (IpAddr::V6(a), IpAddr::V6(p)) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(len.min(128))).unwrap_or(0);
            (a.to_bits() ^ p.to_bits()) & mask == 0
        }
        _ => false,
    }
}
