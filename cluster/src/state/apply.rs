//! Applying one command.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use komainu_proto::domain::{AdminState, BackendId, Document, GroupId, NodeId, Role, ServiceId};

use crate::api::NodeIdentity;

use super::change::{Change, Command, Outcome, Refusal, Verdict};
use super::events::{EventKind, cut};
use super::{
    Drain, Joining, Leaving, MAX_MEMBERS, MAX_RESULTS, MAX_VERDICTS, Member, PendingConfirm, ProposalResult,
    ServiceState, State, Wanted,
};

/// Limits of `confirm_within`: shorter than a second nobody can confirm; an hour is a maintenance window.
const CONFIRM_MS: std::ops::RangeInclusive<u64> = 1_000..=3_600_000;
/// Limits of a drain's deadline.
const DRAIN_MS: std::ops::RangeInclusive<u64> = 1_000..=7 * 86_400_000;
/// Lines of a diff and problems kept in a remembered result: a retry's answer may be abridged, a snapshot must not grow.
const MAX_RESULT_LINES: usize = 64;

impl State {
    /// Applies the command at `index` of the log.
    ///
    /// A command with the id of one that was applied already gets that one's answer and changes nothing.
    ///
    /// # Errors
    /// The command is refused. All is as it was, but for [`State::index`] and the remembered result: a refusal stands in
    /// the log like everything else.
    ///
    /// # Panics
    /// When `index` does not rise: the log was applied out of order, and going on would make this node differ from the
    /// others.
    pub fn apply(&mut self, index: u64, command: &Command) -> Result<Outcome, Refusal> {
        self.advance(index);
        if let Some(known) = command.id.and_then(|id| self.result(id)) {
            return known.clone();
        }
        let mut next = self.clone();
        let result = next.change(command);
        if let Ok(outcome) = &result {
            next.follow_solo(command, outcome.changed);
            *self = next;
        }
        if let Some(id) = command.id {
            self.results.push_back(Arc::new(ProposalResult { id, result: abridge(&result) }));
            while self.results.len() > MAX_RESULTS {
                self.results.pop_front();
            }
        }
        result
    }

    /// Takes note of a log entry without a command (a new leader's first).
    ///
    /// # Panics
    /// When `index` does not rise.
    pub fn advance(&mut self, index: u64) {
        assert!(index > self.index, "log entry {index} applied after {}", self.index);
        self.index = index;
    }

    fn change(&mut self, command: &Command) -> Result<Outcome, Refusal> {
        match &command.change {
            Change::Apply { document, if_revision, confirm_within_ms } => {
                self.change_apply(command, document, *if_revision, *confirm_within_ms)
            }
            Change::Confirm { revision } => {
                self.waiting(*revision)?;
                self.pending = None;
                self.event(command, EventKind::Document, "", format!("revision {revision} confirmed"));
                Ok(self.outcome(true))
            }
            Change::Rollback { revision } => {
                let pending = self.waiting(*revision)?;
                self.pending = None;
                self.put_document(command, &pending.previous, &format!("rollback of {revision}"))
            }
            Change::Restore { revision } => {
                self.not_waiting()?;
                let document = match self.revision(*revision) {
                    Some(found) => found.document.clone(),
                    None => {
                        let known = self.history.iter().map(|r| r.revision.to_string());
                        return Err(unknown("revision", &revision.to_string(), known));
                    }
                };
                self.put_document(command, &document, &format!("restore of {revision}"))
            }
            Change::ServiceAdd { service } => {
                if self.service_named(&service.name).is_some() {
                    return Err(Refusal::Exists { what: "service".to_owned(), value: service.name.clone() });
                }
                let how = format!("service add {}", service.name);
                self.edit(command, &how, |document| document.services.push(service.clone()))
            }
            Change::ServiceRemove { service } => {
                self.find_service(service)?;
                let how = format!("service remove {service}");
                self.edit(command, &how, |document| document.services.retain(|s| s.name != *service))
            }
            Change::BackendAdd { service, backend } => {
                if self.find_service(service)?.backend_named(&backend.name).is_some() {
                    let value = format!("{service}/{}", backend.name);
                    return Err(Refusal::Exists { what: "backend".to_owned(), value });
                }
                let how = format!("backend add {service}/{}", backend.name);
                self.edit(command, &how, |document| {
                    for s in document.services.iter_mut().filter(|s| s.name == *service) {
                        s.backends.push(backend.clone());
                    }
                })
            }
            Change::BackendRemove { service, backend } => {
                self.find_backend(service, backend)?;
                let how = format!("backend remove {service}/{backend}");
                self.edit(command, &how, |document| {
                    for s in document.services.iter_mut().filter(|s| s.name == *service) {
                        s.backends.retain(|b| b.name != *backend);
                    }
                })
            }
            Change::BackendWeight { service, backend, weight } => {
                self.find_backend(service, backend)?;
                let how = format!("backend weight {service}/{backend} {weight}");
                self.edit(command, &how, |document| {
                    let services = document.services.iter_mut().filter(|s| s.name == *service);
                    for b in services.flat_map(|s| &mut s.backends).filter(|b| b.name == *backend) {
                        b.weight = *weight;
                    }
                })
            }
            Change::BackendAdmin { service, backend, admin, deadline_ms } => {
                self.change_admin(command, service, backend, *admin, *deadline_ms)
            }
            Change::Switchover { group, to } => self.change_wanted(command, group, *to),
            Change::DrainExpired { backend, started_index } => {
                self.change_expired(command, *backend, *started_index)
            }
            Change::Health { verdicts } => self.change_health(command, verdicts),
            Change::Assign { group, node, epoch } => self.change_owner(command, *group, Some(*node), *epoch),
            Change::Release { group, epoch } => self.change_owner(command, *group, None, *epoch),
            Change::Settle { service, changed_index } => self.change_settle(*service, *changed_index),
            Change::Free { node, up_to_index } => {
                let before = self.held.len();
                self.held.retain(|h| h.node != *node || h.index > *up_to_index);
                Ok(self.outcome(self.held.len() != before))
            }
            Change::MemberPut { member } => self.change_member(command, member),
            Change::MemberRemove { raft_id } => {
                let Some(at) = self.members.iter().position(|m| m.raft_id == *raft_id) else {
                    return Ok(self.outcome(false));
                };
                let member = self.members.remove(at);
                let text = format!("left the cluster (raft id {raft_id:#x})");
                let node = member.node.id;
                let wish = self.leaving.iter().position(|l| l.node == node);
                let wish = wish.filter(|_| self.members.iter().all(|m| m.node.id != node));
                let asked = asked_by(command, wish.map(|at| self.leaving.remove(at).who));
                self.event(&asked, EventKind::Member, &member.node.name, text);
                Ok(self.outcome(true))
            }
            Change::NodeJoin { node } => self.change_joining(command, node),
            Change::NodeLeave { node } => self.change_leaving(command, *node),
            Change::SetAside { node, file } => {
                let name = self.node_name(Some(*node));
                let text = format!("set aside what was changed there while the pair was split: {file}");
                self.event(command, EventKind::Document, &name, text);
                Ok(self.outcome(true))
            }
        }
    }

    fn change_apply(
        &mut self,
        command: &Command,
        document: &Document,
        if_revision: Option<u64>,
        confirm_within_ms: Option<u64>,
    ) -> Result<Outcome, Refusal> {
        if let Some(expected) = if_revision.filter(|&r| r != self.revision) {
            return Err(Refusal::Revision { expected, actual: self.revision });
        }
        self.not_waiting()?;
        if let Some(ms) = confirm_within_ms {
            in_range("confirm_within", ms, &CONFIRM_MS)?;
        }
        let previous = self.previous_for_rollback(document);
        let outcome = self.put_document(command, document, "apply")?;
        if let (Some(within_ms), true) = (confirm_within_ms, outcome.changed) {
            let revision = self.revision;
            let (started_index, started_ms) = (self.index, command.wall_ms);
            self.pending =
                Some(Arc::new(PendingConfirm { revision, previous, within_ms, started_index, started_ms }));
            let text =
                format!("revision {revision} is rolled back in {} s unless confirmed", within_ms / 1000);
            self.event(command, EventKind::Document, "", text);
        }
        Ok(outcome)
    }

    /// The document in force, with the administrative states that `document` would change or take away.
    fn previous_for_rollback(&self, document: &Document) -> Document {
        let mut previous = self.document();
        for (service, state) in previous.services.iter_mut().zip(&self.services) {
            let new = document.services.iter().find(|s| s.name == service.name);
            for (backend, now) in service.backends.iter_mut().zip(state.living()) {
                let stays = new
                    .and_then(|s| s.backends.iter().find(|b| b.name == backend.name))
                    .is_some_and(|b| b.admin.is_none_or(|admin| admin == now.admin));
                backend.admin = (!stays).then_some(now.admin);
            }
        }
        previous
    }

    fn edit(
        &mut self,
        command: &Command,
        how: &str,
        edit: impl FnOnce(&mut Document),
    ) -> Result<Outcome, Refusal> {
        self.not_waiting()?;
        let mut document = self.document();
        edit(&mut document);
        self.put_document(command, &document, how)
    }

    fn change_admin(
        &mut self,
        command: &Command,
        service: &str,
        backend: &str,
        admin: AdminState,
        deadline_ms: Option<u64>,
    ) -> Result<Outcome, Refusal> {
        let id = self.find_backend(service, backend)?;
        if let Some(ms) = deadline_ms {
            in_range("deadline", ms, &DRAIN_MS)?;
            if admin != AdminState::Draining {
                return Err(Refusal::Value {
                    field: "deadline".to_owned(),
                    value: format!("{ms} ms"),
                    reason: format!("only a drain has a deadline, not \"{admin}\"; leave it out"),
                });
            }
        }
        Ok(self.set_admin(command, id, admin, deadline_ms))
    }

    /// Sets the administrative state of a backend that exists.
    pub(super) fn set_admin(
        &mut self,
        command: &Command,
        id: BackendId,
        admin: AdminState,
        deadline_ms: Option<u64>,
    ) -> Outcome {
        let (index, wall_ms) = (self.index, command.wall_ms);
        let mut event = None;
        self.with_backend_service(id, wall_ms, |service| {
            let name = service.config.name.clone();
            let Some(backend) = service.backends.iter_mut().find(|b| b.id == id) else { return };
            let was = (backend.admin, backend.drain.and_then(|d| d.deadline_ms));
            if was == (admin, deadline_ms) && deadline_ms.is_none() {
                return;
            }
            backend.admin = admin;
            backend.drain = (admin == AdminState::Draining).then_some(Drain {
                deadline_ms,
                started_index: index,
                started_ms: wall_ms,
            });
            let mut text = format!("{} -> {admin}", was.0);
            if let Some(ms) = deadline_ms {
                text += &format!(", disabled in {} s", ms.div_ceil(1000));
            }
            event = Some((format!("{name}/{}", backend.config.name), text));
        });
        let changed = event.is_some();
        if let Some((subject, text)) = event {
            self.event(command, EventKind::Admin, &subject, text);
        }
        self.outcome(changed)
    }

    fn change_expired(
        &mut self,
        command: &Command,
        id: BackendId,
        started_index: u64,
    ) -> Result<Outcome, Refusal> {
        let drain = self.backend(id).filter(|(_, b)| !b.gone).and_then(|(_, b)| b.drain);
        if drain.is_none_or(|d| d.started_index != started_index || d.deadline_ms.is_none()) {
            let detail = format!("the drain that began at index {started_index} is over");
            return Err(Refusal::Superseded { what: format!("backend {}", id.0), detail });
        }
        Ok(self.set_admin(command, id, AdminState::Disabled, None))
    }

    fn change_wanted(
        &mut self,
        command: &Command,
        name: &str,
        to: Option<NodeId>,
    ) -> Result<Outcome, Refusal> {
        let Some(at) = self.groups.iter().position(|g| g.config.name == name) else {
            return Err(unknown("group", name, self.groups.iter().map(|g| g.config.name.clone())));
        };
        let owner = self.groups[at].owner;
        let balancers: Vec<&Member> = self.members.iter().filter(|m| m.node.role == Role::Balancer).collect();
        let text = match to {
            Some(node) => match balancers.iter().find(|m| m.node.id == node) {
                Some(member) => format!("wanted on {}", member.node.name),
                None => {
                    let known = balancers.iter().map(|m| format!("{} ({})", m.node.id.0, m.node.name));
                    return Err(unknown("balancer", &node.0.to_string(), known));
                }
            },
            None if balancers.iter().any(|m| Some(m.node.id) != owner) => "wanted on another node".to_owned(),
            None => {
                return Err(Refusal::Value {
                    field: "group".to_owned(),
                    value: name.to_owned(),
                    reason: "there is no other balancer to move it to; join one first".to_owned(),
                });
            }
        };
        if to.is_some() && to == owner && self.stays(at) {
            return Ok(self.outcome(false));
        }
        let not = if to.is_none() { owner } else { None };
        Arc::make_mut(&mut self.groups[at]).wanted = Some(Wanted { node: to, not, index: self.index });
        self.event(command, EventKind::Owner, name, text);
        Ok(self.outcome(true))
    }

    /// Whether a group stays with its owner without anybody's wish: nobody wants it elsewhere, and no other node may take it.
    fn stays(&self, at: usize) -> bool {
        let group = &self.groups[at];
        let name = group.owner.and_then(|owner| self.member(owner)).map(|m| &m.node.name);
        match group.wanted {
            Some(wanted) => wanted.node.is_some() && wanted.node == group.owner,
            None => !group.config.preempt || group.config.prefer.as_ref().is_none_or(|p| Some(p) == name),
        }
    }

    fn change_owner(
        &mut self,
        command: &Command,
        id: GroupId,
        node: Option<NodeId>,
        epoch: u64,
    ) -> Result<Outcome, Refusal> {
        let superseded = |what: String, detail: String| Err(Refusal::Superseded { what, detail });
        let Some(at) = self.groups.iter().position(|g| g.id == id) else {
            return superseded(format!("group {}", id.0), "it was removed".to_owned());
        };
        let group = &self.groups[at];
        let name = group.config.name.clone();
        let expected = group.epoch + u64::from(node.is_some());
        if epoch != expected || (node.is_none() && group.owner.is_none()) {
            let detail =
                format!("epoch {epoch} given, {expected} expected, owner {:?}", group.owner.map(|n| n.0));
            return superseded(format!("group \"{name}\""), detail);
        }
        let text = match node {
            Some(node) => match self.member(node) {
                Some(m) if m.node.role == Role::Balancer => {
                    format!("given to {}, epoch {epoch}", m.node.name)
                }
                _ => {
                    let known = self.members.iter().filter(|m| m.node.role == Role::Balancer);
                    return Err(unknown("balancer", &node.0.to_string(), known.map(|m| m.node.name.clone())));
                }
            },
            None => format!("released by {}, epoch {epoch}", self.node_name(group.owner)),
        };
        let index = self.index;
        let group = Arc::make_mut(&mut self.groups[at]);
        group.owner = node;
        group.epoch = epoch;
        if let Some(node) = node {
            group.assigned_index = index;
            group.wanted = match group.wanted {
                // It went elsewhere: the wish could not be kept, and must not pull the group back later.
                Some(Wanted { node: Some(wanted), .. }) if wanted != node => None,
                // "Anywhere else" is fulfilled, and from now on means "there".
                Some(w) if w.not != Some(node) => Some(Wanted { node: Some(node), not: None, ..w }),
                _ => None,
            };
        }
        self.event(command, EventKind::Owner, &name, text);
        Ok(self.outcome(true))
    }

    fn change_health(&mut self, command: &Command, verdicts: &[Verdict]) -> Result<Outcome, Refusal> {
        if verdicts.len() > MAX_VERDICTS {
            return Err(Refusal::Value {
                field: "verdicts".to_owned(),
                value: verdicts.len().to_string(),
                reason: format!("more than {MAX_VERDICTS} in one command; send several"),
            });
        }
        let by_id: BTreeMap<BackendId, &Verdict> = verdicts.iter().map(|v| (v.backend, v)).collect();
        let mut events = Vec::new();
        for at in 0..self.services.len() {
            let news = |s: &ServiceState| {
                let differs =
                    |b: &super::BackendState| by_id.get(&b.id).is_some_and(|v| v.health != b.health);
                s.living().any(differs)
            };
            if !news(&self.services[at]) {
                continue;
            }
            self.with_service(at, command.wall_ms, |service| {
                for backend in service.backends.iter_mut().filter(|b| !b.gone) {
                    let Some(verdict) = by_id.get(&backend.id).filter(|v| v.health != backend.health) else {
                        continue;
                    };
                    let text = format!("{} -> {}: {}", backend.health, verdict.health, cut(&verdict.reason));
                    events.push((format!("{}/{}", service.config.name, backend.config.name), text));
                    backend.health = verdict.health;
                    backend.reason = cut(&verdict.reason).to_owned();
                    backend.health_since_ms = command.wall_ms;
                }
            });
        }
        let changed = !events.is_empty();
        for (subject, text) in events {
            self.event(command, EventKind::Health, &subject, text);
        }
        Ok(self.outcome(changed))
    }

    fn change_settle(&mut self, id: ServiceId, changed_index: u64) -> Result<Outcome, Refusal> {
        let at = self.services.iter().position(|s| s.id == id);
        let open = at.and_then(|at| self.services[at].transition).map(|t| t.changed_index);
        match at {
            Some(at) if open == Some(changed_index) => {
                Arc::make_mut(&mut self.services[at]).settle();
                Ok(self.outcome(true))
            }
            _ => Err(Refusal::Superseded {
                what: format!("transition of service {}", id.0),
                detail: format!("newest change at {open:?}, not {changed_index}"),
            }),
        }
    }

    fn change_member(&mut self, command: &Command, member: &Member) -> Result<Outcome, Refusal> {
        let node = &member.node;
        let others = || self.members.iter().filter(|m| m.node.id != node.id);
        if let Some(other) = others().find(|m| m.node.name == node.name) {
            return Err(Refusal::Value {
                field: "name".to_owned(),
                value: node.name.clone(),
                reason: format!("node {} has this name; give this node another one", other.node.id.0),
            });
        }
        if let Some(other) = others().find(|m| m.node.address == node.address) {
            return Err(Refusal::Value {
                field: "address".to_owned(),
                value: node.address.to_string(),
                reason: format!("node {} \"{}\" has this address", other.node.id.0, other.node.name),
            });
        }
        let at = self.members.binary_search_by_key(&member.raft_id, |m| m.raft_id);
        let vote = if member.voter { "votes" } else { "catches up, no vote yet" };
        let mut asked = Cow::Borrowed(command);
        let text = match at {
            Ok(at) if self.members[at] == *member => return Ok(self.outcome(false)),
            Ok(at) => {
                self.members[at] = member.clone();
                format!("now {} at {}, {vote}", node.role, node.address)
            }
            Err(_) if self.members.len() >= MAX_MEMBERS => {
                return Err(Refusal::Value {
                    field: "member".to_owned(),
                    value: node.name.clone(),
                    reason: format!("there are {MAX_MEMBERS} members already; remove one first (node leave)"),
                });
            }
            Err(at) => {
                self.members.insert(at, member.clone());
                let wish = self.joining.iter().position(|j| j.node.id == node.id);
                asked = asked_by(command, wish.map(|at| self.joining.remove(at).who));
                format!("joined as {} at {}, {vote} (raft id {:#x})", node.role, node.address, member.raft_id)
            }
        };
        self.event(&asked, EventKind::Member, &node.name, text);
        Ok(self.outcome(true))
    }

    fn change_joining(&mut self, command: &Command, node: &NodeIdentity) -> Result<Outcome, Refusal> {
        self.leaving.retain(|l| l.node != node.id);
        let others = self.joining.iter().filter(|j| j.node.id != node.id).count();
        if self.members.len() + others >= MAX_MEMBERS {
            return Err(Refusal::Value {
                field: "member".to_owned(),
                value: node.name.clone(),
                reason: format!("there are {MAX_MEMBERS} members already, those who are to join included"),
            });
        }
        let wish = Joining { node: node.clone(), who: cut(&command.who).to_owned() };
        if self.joining.contains(&wish) || self.members.iter().any(|m| m.node == *node) {
            return Ok(self.outcome(false));
        }
        self.joining.retain(|j| j.node.id != node.id);
        self.joining.push(wish);
        let text = format!("to join as {} at {}", node.role, node.address);
        self.event(command, EventKind::Member, &node.name, text);
        Ok(self.outcome(true))
    }

    fn change_leaving(&mut self, command: &Command, node: NodeId) -> Result<Outcome, Refusal> {
        let wishes = self.joining.len();
        let name = self.joining.iter().find(|j| j.node.id == node).map(|j| j.node.name.clone());
        self.joining.retain(|j| j.node.id != node);
        let Some(member) = self.member(node).map(|m| m.node.name.clone()) else {
            if let Some(name) = name {
                self.event(command, EventKind::Member, &name, "not to join any more".to_owned());
            }
            return Ok(self.outcome(self.joining.len() != wishes));
        };
        if self.leaving.iter().any(|l| l.node == node) {
            return Ok(self.outcome(false));
        }
        self.leaving.push(Leaving { node, who: cut(&command.who).to_owned() });
        self.event(command, EventKind::Member, &member, "to leave the cluster".to_owned());
        Ok(self.outcome(true))
    }

    /// Changes one service and follows what that does to its eligible weights.
    pub(super) fn with_service(&mut self, at: usize, wall_ms: u64, change: impl FnOnce(&mut ServiceState)) {
        let index = self.index;
        let service = Arc::make_mut(&mut self.services[at]);
        let before = service.weights();
        change(service);
        service.follow_change(&before, index, wall_ms);
    }

    fn with_backend_service(&mut self, id: BackendId, wall_ms: u64, change: impl FnOnce(&mut ServiceState)) {
        if let Some(at) = self.services.iter().position(|s| s.living().any(|b| b.id == id)) {
            self.with_service(at, wall_ms, change);
        }
    }

    pub(super) fn outcome(&self, changed: bool) -> Outcome {
        Outcome { index: self.index, revision: self.revision, changed, ..Outcome::default() }
    }

    pub(super) fn node_name(&self, node: Option<NodeId>) -> String {
        match node.map(|id| (id, self.member(id))) {
            Some((_, Some(member))) => member.node.name.clone(),
            Some((id, None)) => format!("node {}", id.0),
            None => "nobody".to_owned(),
        }
    }

    fn not_waiting(&self) -> Result<(), Refusal> {
        match &self.pending {
            Some(pending) => Err(Refusal::AwaitingConfirm { revision: pending.revision }),
            None => Ok(()),
        }
    }

    fn waiting(&self, revision: u64) -> Result<Arc<PendingConfirm>, Refusal> {
        match &self.pending {
            Some(pending) if pending.revision == revision => Ok(pending.clone()),
            other => {
                let waiting = other.as_ref().map_or("none".to_owned(), |p| p.revision.to_string());
                Err(Refusal::NotAwaiting { revision, waiting })
            }
        }
    }

    fn find_service(&self, name: &str) -> Result<&ServiceState, Refusal> {
        self.service_named(name)
            .map(Arc::as_ref)
            .ok_or_else(|| unknown("service", name, self.services.iter().map(|s| s.config.name.clone())))
    }

    fn find_backend(&self, service: &str, backend: &str) -> Result<BackendId, Refusal> {
        let found = self.find_service(service)?;
        found.backend_named(backend).map(|b| b.id).ok_or_else(|| {
            let known = found.living().map(|b| format!("{service}/{}", b.config.name));
            unknown("backend", &format!("{service}/{backend}"), known)
        })
    }
}

/// At most this many names are offered where one was not found.
const MAX_OFFERED: usize = 10;

fn unknown(what: &str, value: &str, known: impl Iterator<Item = String>) -> Refusal {
    let mut known: Vec<String> = known.take(MAX_OFFERED + 1).collect();
    if known.is_empty() {
        known.push("(there is none)".to_owned());
    } else if known.len() > MAX_OFFERED {
        known[MAX_OFFERED] = "…".to_owned();
    }
    Refusal::Unknown { what: what.to_owned(), value: value.to_owned(), known: known.join(", ") }
}

fn in_range(field: &str, ms: u64, range: &std::ops::RangeInclusive<u64>) -> Result<(), Refusal> {
    if range.contains(&ms) {
        return Ok(());
    }
    Err(Refusal::Value {
        field: field.to_owned(),
        value: format!("{ms} ms"),
        reason: format!("it must be between {} s and {} s", range.start() / 1000, range.end() / 1000),
    })
}

fn abridge(result: &Result<Outcome, Refusal>) -> Result<Outcome, Refusal> {
    let mut result = result.clone();
    match &mut result {
        Ok(outcome) => {
            outcome.diff.lines.truncate(MAX_RESULT_LINES);
            outcome.warnings.truncate(MAX_RESULT_LINES);
        }
        Err(Refusal::Invalid(problems)) => problems.truncate(MAX_RESULT_LINES),
        Err(_) => {}
    }
    result
}

/// The command that carries out an operator's wish, in that operator's name.
fn asked_by(command: &Command, who: Option<String>) -> Cow<'_, Command> {
    match who {
        Some(who) => Cow::Owned(Command { who, ..command.clone() }),
        None => Cow::Borrowed(command),
    }
}
