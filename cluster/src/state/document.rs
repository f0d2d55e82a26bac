//! Putting a whole document in force: what stays what it was, what is new, what goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;

use komainu_proto::domain::{
    self, AdminState, Backend, BackendId, Document, Group, GroupId, Health, Service, ServiceId,
};

use super::change::{Command, DiffLine, Outcome, Refusal};
use super::events::{EventKind, cut};
use super::{
    BackendState, Context, Diff, GroupState, Held, Ids, MAX_HISTORY, MAX_HISTORY_ITEMS, Revision,
    ServiceState, State, validate,
};

/// Lease cells of a lane: living groups must differ modulo this.
const LEASE_CELLS: u32 = 256;

/// Old name by new name of those groups that only changed their name: a new name with addresses that exactly one
/// vanished group had. Without this a rename would take the group from its owner.
pub(super) fn renamed_groups<'a>(
    old: &'a [(String, Vec<IpAddr>)],
    new: &'a Document,
) -> BTreeMap<&'a str, &'a str> {
    let old_names: BTreeSet<&str> = old.iter().map(|(name, _)| name.as_str()).collect();
    let new_names: BTreeSet<&str> = new.groups.iter().map(|g| g.name.as_str()).collect();
    let vanished: Vec<_> = old.iter().filter(|(name, _)| !new_names.contains(name.as_str())).collect();
    let mut taken = BTreeSet::new();
    let mut renamed = BTreeMap::new();
    for group in new.groups.iter().filter(|g| !old_names.contains(g.name.as_str())) {
        let mut before =
            vanished.iter().filter(|(_, addresses)| group_addresses(group).any(|a| addresses.contains(&a)));
        if let (Some((name, _)), None) = (before.next(), before.next())
            && taken.insert(name.as_str())
        {
            renamed.insert(group.name.as_str(), name.as_str());
        }
    }
    renamed
}

/// Every address of a group as the document has it.
pub(super) fn group_addresses(group: &Group) -> impl Iterator<Item = IpAddr> + '_ {
    group.vips.iter().chain(&group.inside_vips).chain(&group.snat).copied()
}

impl State {
    /// Validates the document and puts it in force.
    pub(super) fn put_document(
        &mut self,
        command: &Command,
        document: &Document,
        how: &str,
    ) -> Result<Outcome, Refusal> {
        let warnings = validate(document, &Context::of(self)).map_err(Refusal::Invalid)?;
        let lines = diff(self, document);
        if lines.is_empty() {
            return Ok(Outcome { warnings, ..self.outcome(false) });
        }
        let before = self.document();
        let group_ids = self.put_groups(document);
        self.put_services(command, document, &group_ids);
        self.put_admin(command, document);
        let after = self.document();
        if after != before {
            self.revision += 1;
            self.remember(command, after, how);
        }
        let text = format!("revision {}: {how}, {} lines differ", self.revision, lines.len());
        self.event(command, EventKind::Document, "", text);
        Ok(Outcome { diff: Diff { lines, warnings: Vec::new() }, warnings, ..self.outcome(true) })
    }

    fn put_groups(&mut self, document: &Document) -> BTreeMap<String, GroupId> {
        let old = std::mem::take(&mut self.groups);
        let named: Vec<_> = old.iter().map(|g| (g.config.name.clone(), g.addresses().collect())).collect();
        let renamed = renamed_groups(&named, document);
        for config in &document.groups {
            let old_name = renamed.get(config.name.as_str()).copied().unwrap_or(&config.name);
            let group = match old.iter().find(|g| g.config.name == old_name) {
                Some(group) if group.config == *config => group.clone(),
                Some(group) => Arc::new(GroupState { config: config.clone(), ..GroupState::clone(group) }),
                None => {
                    let id = next_group_id(&mut self.ids, |id| {
                        let cell = |g: &Arc<GroupState>| g.id.0 % LEASE_CELLS == id % LEASE_CELLS;
                        old.iter().any(cell) || self.groups.iter().any(cell)
                    });
                    Arc::new(GroupState {
                        id,
                        config: config.clone(),
                        owner: None,
                        epoch: 0,
                        assigned_index: 0,
                        wanted: None,
                    })
                }
            };
            self.groups.push(group);
        }
        let index = self.index;
        for group in &old {
            let Some(node) = group.owner else { continue };
            let kept: BTreeSet<IpAddr> =
                self.group(group.id).map(|g| g.addresses().collect()).unwrap_or_default();
            let left = group.addresses().filter(|a| !kept.contains(a));
            self.held.extend(left.map(|address| Held { address, node, index }));
        }
        // An address that came back to where its holder answers for it anyway is not held any more.
        let groups = &self.groups;
        self.held.retain(|h| {
            !groups.iter().any(|g| g.owner == Some(h.node) && g.addresses().any(|a| a == h.address))
        });
        self.groups.iter().map(|g| (g.config.name.clone(), g.id)).collect()
    }

    fn put_services(&mut self, command: &Command, document: &Document, groups: &BTreeMap<String, GroupId>) {
        let endpoint = |s: &Service| (s.vip, s.port, s.protocol);
        let old = std::mem::take(&mut self.services);
        let new_names: BTreeSet<&str> = document.services.iter().map(|s| s.name.as_str()).collect();
        let by_name: BTreeMap<&str, &Arc<ServiceState>> =
            old.iter().map(|s| (s.config.name.as_str(), s)).collect();
        // A service that only changed its name is recognised by its endpoint.
        let by_endpoint: BTreeMap<_, _> = old
            .iter()
            .filter(|s| !new_names.contains(s.config.name.as_str()))
            .map(|s| (endpoint(&s.config), s))
            .collect();
        for config in &document.services {
            let group = groups.get(&config.group).copied().expect("validated: the service's group exists");
            let found = by_name.get(config.name.as_str()).or_else(|| by_endpoint.get(&endpoint(config)));
            let service = match found {
                Some(old) if old.group == group && old.document(false) == without_admin(config) => {
                    (*old).clone()
                }
                _ => {
                    let mut service = found.map_or_else(
                        || ServiceState {
                            id: next_service_id(&mut self.ids),
                            group,
                            config: Service { backends: Vec::new(), ..config.clone() },
                            backends: Vec::new(),
                            transition: None,
                        },
                        |old| ServiceState::clone(old),
                    );
                    let before = service.weights();
                    service.group = group;
                    put_backends(&mut service, config, &mut self.ids);
                    service.follow_change(&before, self.index, command.wall_ms);
                    Arc::new(service)
                }
            };
            self.services.push(service);
        }
    }

    /// Administrative states that the document sets expressly.
    fn put_admin(&mut self, command: &Command, document: &Document) {
        let mut wanted: Vec<(BackendId, AdminState)> = Vec::new();
        for (service, state) in document.services.iter().zip(&self.services) {
            for (backend, now) in service.backends.iter().zip(state.living()) {
                wanted.extend(backend.admin.filter(|&admin| admin != now.admin).map(|admin| (now.id, admin)));
            }
        }
        for (id, admin) in wanted {
            self.set_admin(command, id, admin, None);
        }
    }

    fn remember(&mut self, command: &Command, document: Document, how: &str) {
        self.history.push_back(Arc::new(Revision {
            revision: self.revision,
            document,
            who: cut(&command.who).to_owned(),
            wall_ms: command.wall_ms,
            how: how.to_owned(),
        }));
        let items = |r: &Arc<Revision>| {
            1 + r.document.groups.len()
                + r.document.services.iter().map(|s| 1 + s.backends.len()).sum::<usize>()
        };
        let mut total: usize = self.history.iter().map(items).sum();
        while self.history.len() > MAX_HISTORY || (total > MAX_HISTORY_ITEMS && self.history.len() > 1) {
            if let Some(oldest) = self.history.pop_front() {
                total -= items(&oldest);
            }
        }
    }
}

/// Matches the document's backends with those there are. The same server (address and port) under the same name, or
/// under a name that is new while the old one is gone, stays the same backend; so does one that went and comes back
/// before the service settled. Everything else is new, and its name keeps its administrative state.
fn put_backends(service: &mut ServiceState, config: &Service, ids: &mut Ids) {
    let was_checked = service.checked();
    service.config = Service { backends: Vec::new(), ..config.clone() };
    let mut old = std::mem::take(&mut service.backends);
    if !was_checked {
        // Without a check they were up; a check that begins now takes them as it finds them.
        for backend in &mut old {
            backend.health = Health::Up;
        }
    }
    let names: BTreeSet<&str> = config.backends.iter().map(|b| b.name.as_str()).collect();
    let admin_of: BTreeMap<String, _> =
        old.iter().filter(|b| !b.gone).map(|b| (b.config.name.clone(), (b.admin, b.drain))).collect();
    let same_server = |a: &Backend, b: &Backend| a.address == b.address && a.port == b.port;
    for wanted in &config.backends {
        let at = old
            .iter()
            .position(|b| b.config.name == wanted.name && same_server(&b.config, wanted))
            .or_else(|| {
                old.iter()
                    .position(|b| same_server(&b.config, wanted) && !names.contains(b.config.name.as_str()))
            });
        let mut backend = match at {
            Some(at) => old.remove(at),
            None => BackendState {
                id: next_backend_id(ids),
                config: wanted.clone(),
                admin: AdminState::Enabled,
                drain: None,
                health: Health::Unknown,
                reason: String::new(),
                health_since_ms: 0,
                base_weight: 0,
                gone: false,
            },
        };
        if backend.gone || at.is_none() {
            (backend.admin, backend.drain) =
                admin_of.get(&wanted.name).copied().unwrap_or((AdminState::Enabled, None));
        }
        if backend.gone {
            // Nobody has looked at it meanwhile.
            backend.health = Health::Unknown;
            backend.gone = false;
        }
        backend.config = Backend { admin: None, ..wanted.clone() };
        service.backends.push(backend);
    }
    for backend in &mut old {
        backend.gone = true;
        backend.drain = None;
    }
    service.backends.append(&mut old);
}

fn without_admin(service: &Service) -> Service {
    let backends = service.backends.iter().map(|b| Backend { admin: None, ..b.clone() });
    Service { backends: backends.collect(), ..service.clone() }
}

fn next_group_id(ids: &mut Ids, shares_cell: impl Fn(u32) -> bool) -> GroupId {
    loop {
        ids.group = ids.group.checked_add(1).expect("fewer than 2^32 groups in a cluster's life");
        if !shares_cell(ids.group) {
            return GroupId(ids.group);
        }
    }
}

fn next_service_id(ids: &mut Ids) -> ServiceId {
    ids.service = ids.service.checked_add(1).expect("fewer than 2^32 services in a cluster's life");
    ServiceId(ids.service)
}

fn next_backend_id(ids: &mut Ids) -> BackendId {
    ids.backend = ids.backend.checked_add(1).expect("fewer than 2^32 backends in a cluster's life");
    BackendId(ids.backend)
}

/// How `document` differs from what is in force, including administrative states that it sets expressly.
pub(super) fn diff(state: &State, document: &Document) -> Vec<DiffLine> {
    let mut out = Lines(Vec::new());
    let old = state.export();
    let old_groups: BTreeMap<&str, &Group> = old.groups.iter().map(|g| (g.name.as_str(), g)).collect();
    for group in &document.groups {
        let path = format!("group \"{}\"", group.name);
        match old_groups.get(group.name.as_str()) {
            None => out.line(path, None, Some(list(group_addresses(group)))),
            Some(old) => diff_group(&mut out, &path, old, group),
        }
    }
    for group in old.groups.iter().filter(|o| document.groups.iter().all(|g| g.name != o.name)) {
        out.line(format!("group \"{}\"", group.name), Some(list(group_addresses(group))), None);
    }
    let old_services: BTreeMap<&str, &Service> = old.services.iter().map(|s| (s.name.as_str(), s)).collect();
    for service in &document.services {
        let path = format!("service \"{}\"", service.name);
        match old_services.get(service.name.as_str()) {
            None => {
                out.line(path.clone(), None, Some(summary(service)));
                for backend in &service.backends {
                    out.line(
                        format!("{path}.backend \"{}\"", backend.name),
                        None,
                        Some(backend_summary(backend)),
                    );
                }
            }
            Some(old) => diff_service(&mut out, &path, old, service),
        }
    }
    let new_names: BTreeSet<&str> = document.services.iter().map(|s| s.name.as_str()).collect();
    for service in old.services.iter().filter(|s| !new_names.contains(s.name.as_str())) {
        out.line(format!("service \"{}\"", service.name), Some(summary(service)), None);
    }
    let order = |d: &Document| -> Vec<String> {
        d.groups.iter().map(|g| &g.name).chain(d.services.iter().map(|s| &s.name)).cloned().collect()
    };
    if out.0.is_empty() && order(&old) != order(document) {
        out.line("order".to_owned(), Some(order(&old).join(", ")), Some(order(document).join(", ")));
    }
    out.0
}

struct Lines(Vec<DiffLine>);

impl Lines {
    fn line(&mut self, path: String, from: Option<String>, to: Option<String>) {
        self.0.push(DiffLine { path, from, to });
    }

    fn field(&mut self, path: &str, field: &str, from: impl Display, to: impl Display) {
        let (from, to) = (from.to_string(), to.to_string());
        if from != to {
            self.line(format!("{path}.{field}"), Some(from), Some(to));
        }
    }
}

fn diff_group(out: &mut Lines, path: &str, old: &Group, new: &Group) {
    out.field(path, "vips", list(old.vips.iter()), list(new.vips.iter()));
    out.field(path, "inside_vips", list(old.inside_vips.iter()), list(new.inside_vips.iter()));
    out.field(path, "snat", list(old.snat.iter()), list(new.snat.iter()));
    out.field(path, "prefer", or_none(&old.prefer), or_none(&new.prefer));
    out.field(path, "preempt", old.preempt, new.preempt);
}

fn diff_service(out: &mut Lines, path: &str, old: &Service, new: &Service) {
    out.field(path, "group", &old.group, &new.group);
    out.field(path, "vip", old.vip, new.vip);
    out.field(path, "port", old.port, new.port);
    out.field(path, "protocol", old.protocol, new.protocol);
    out.field(path, "mode", old.mode, new.mode);
    out.field(path, "scheduler", old.scheduler, new.scheduler);
    out.field(path, "dead_backend", old.dead_backend, new.dead_backend);
    out.field(path, "udp_flows", old.udp_flows, new.udp_flows);
    out.field(path, "tcp_idle_ms", old.tcp_idle_ms, new.tcp_idle_ms);
    out.field(path, "udp_idle_ms", old.udp_idle_ms, new.udp_idle_ms);
    let (path_h, a, b) = (format!("{path}.health"), &old.health, &new.health);
    out.field(&path_h, "type", a.kind, b.kind);
    out.field(&path_h, "port", or_none(&a.port), or_none(&b.port));
    out.field(&path_h, "path", &a.path, &b.path);
    out.field(&path_h, "host", or_none(&a.host), or_none(&b.host));
    let statuses = |h: &domain::HealthCheck| format!("{}-{}", h.expect_status.0, h.expect_status.1);
    out.field(&path_h, "expect_status", statuses(a), statuses(b));
    out.field(&path_h, "tls_verify", a.tls_verify, b.tls_verify);
    out.field(&path_h, "interval_ms", a.interval_ms, b.interval_ms);
    out.field(&path_h, "timeout_ms", a.timeout_ms, b.timeout_ms);
    out.field(&path_h, "rise", a.rise, b.rise);
    out.field(&path_h, "fall", a.fall, b.fall);
    let old_backends: BTreeMap<&str, &Backend> = old.backends.iter().map(|b| (b.name.as_str(), b)).collect();
    let lines_before = out.0.len();
    for backend in &new.backends {
        let path = format!("{path}.backend \"{}\"", backend.name);
        match old_backends.get(backend.name.as_str()) {
            None => out.line(path, None, Some(backend_summary(backend))),
            Some(old) => {
                out.field(&path, "address", old.address, backend.address);
                out.field(&path, "port", old.port, backend.port);
                out.field(&path, "weight", old.weight, backend.weight);
                if let Some(admin) = backend.admin {
                    out.field(&path, "admin", old.admin.unwrap_or(AdminState::Enabled), admin);
                }
            }
        }
    }
    let new_names: BTreeSet<&str> = new.backends.iter().map(|b| b.name.as_str()).collect();
    for backend in old.backends.iter().filter(|b| !new_names.contains(b.name.as_str())) {
        out.line(format!("{path}.backend \"{}\"", backend.name), Some(backend_summary(backend)), None);
    }
    let names = |s: &Service| list(s.backends.iter().map(|b| b.name.clone()));
    if out.0.len() == lines_before {
        out.field(path, "backends", names(old), names(new));
    }
}

fn summary(s: &Service) -> String {
    let endpoint = std::net::SocketAddr::new(s.vip, s.port);
    format!("{endpoint}/{}, {}, {}, {} backends", s.protocol, s.mode, s.scheduler, s.backends.len())
}

fn backend_summary(b: &Backend) -> String {
    format!("{}, weight {}", std::net::SocketAddr::new(b.address, b.port), b.weight)
}

fn or_none<T: Display>(value: &Option<T>) -> String {
    value.as_ref().map_or("none".to_owned(), T::to_string)
}

fn list<T: Display>(items: impl Iterator<Item = T>) -> String {
    items.map(|i| i.to_string()).collect::<Vec<_>>().join(", ")
}
