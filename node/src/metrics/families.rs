//! The metrics: their definitions, and their values out of a [`Snapshot`].

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use komainu_cluster::shell::View;
use komainu_cluster::state::{BackendState, ServiceState};
use komainu_packet::lane::{BackendCounters, Counters};
use komainu_proto::domain::{AdminState, BackendId, Health, NodeId};
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::Unit;

use super::sharing::SharingSnapshot;
use crate::health::schedule::CheckStatus;

/// Everything that is exported, at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The cluster as this node knows it.
    pub view: View,
    /// The data path; absent on a witness.
    pub data_path: Option<DataPathSnapshot>,
    /// What this node's checks have seen.
    pub checks: Vec<CheckStatus>,
    /// Whether this node could own a VIP group.
    pub fit: bool,
    /// Time since the daemon was started.
    pub uptime: Duration,
    /// Version of the program.
    pub version: &'static str,
}

/// The data path at one moment.
#[derive(Clone, Debug)]
pub struct DataPathSnapshot {
    /// Lane.
    pub lane: &'static str,
    /// How it is attached.
    pub mode: String,
    /// Its counters.
    pub counters: Counters,
    /// Log index that its tables were derived from.
    pub installed_index: u64,
    /// Whether it refused the newest tables.
    pub refused: bool,
    /// What it exchanges with the other balancers; absent where nothing is.
    pub sharing: Option<SharingSnapshot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

/// A metric as it is defined: name without the suffixes that unit and kind give it.
#[derive(Debug)]
pub(super) struct Definition {
    name: &'static str,
    unit: Option<Unit>,
    kind: Kind,
    pub(super) labels: &'static [&'static str],
    help: &'static str,
}

impl Definition {
    pub(super) fn counter(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Definition {
        Definition { name, unit: None, kind: Kind::Counter, labels, help }
    }

    pub(super) fn gauge(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Definition {
        Definition { name, unit: None, kind: Kind::Gauge, labels, help }
    }

    fn of(self, unit: Unit) -> Definition {
        Definition { unit: Some(unit), ..self }
    }

    /// The name under which a time series is found.
    #[cfg(test)]
    pub(super) fn full_name(&self) -> String {
        let unit = self.unit.as_ref().map_or(String::new(), |u| format!("_{}", u.as_str()));
        format!("{}{unit}{}", self.name, if self.kind == Kind::Counter { "_total" } else { "" })
    }
}

/// A metric with its values.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) definition: Definition,
    /// Label values in the definition's order, and the value.
    samples: Vec<(Vec<String>, f64)>,
}

impl Family {
    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if self.samples.is_empty() {
            return Ok(());
        }
        let d = &self.definition;
        let kind = match d.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
        };
        let mut metric = encoder.encode_descriptor(d.name, d.help, d.unit.as_ref(), kind)?;
        for (values, value) in &self.samples {
            let labels: Vec<(&str, &str)> =
                d.labels.iter().copied().zip(values.iter().map(String::as_str)).collect();
            if labels.is_empty() {
                write_value(&mut metric, d.kind, *value)?;
            } else {
                write_value(&mut metric.encode_family(&labels)?, d.kind, *value)?;
            }
        }
        Ok(())
    }
}

fn write_value(metric: &mut MetricEncoder<'_>, kind: Kind, value: f64) -> Result<(), fmt::Error> {
    // Whole numbers are written as such up to where f64 holds them exactly: 2^53.
    let whole = value.fract() == 0.0 && (0.0..9.0e15).contains(&value);
    let no_exemplar: Option<&Exemplar<Vec<(String, String)>, f64>> = None;
    match (kind, whole) {
        (Kind::Counter, true) => metric.encode_counter(&(value as u64), no_exemplar),
        (Kind::Counter, false) => metric.encode_counter(&value, no_exemplar),
        (Kind::Gauge, true) => metric.encode_gauge(&(value as u64)),
        (Kind::Gauge, false) => metric.encode_gauge(&value),
    }
}

/// Every metric with its values; without values where there is nothing to say.
pub(super) fn all(s: &Snapshot) -> Vec<Family> {
    let mut families = Vec::new();
    node(s, &mut families);
    cluster(s, &mut families);
    groups(s, &mut families);
    backends(s, &mut families);
    data_path(s, &mut families);
    super::sharing::families(s, &mut families);
    checks(s, &mut families);
    families
}

/// Collects the samples of one metric.
pub(super) fn family(
    definition: Definition,
    samples: impl IntoIterator<Item = (Vec<String>, f64)>,
    into: &mut Vec<Family>,
) {
    let samples: Vec<_> = samples.into_iter().collect();
    debug_assert!(samples.iter().all(|(values, _)| values.len() == definition.labels.len()));
    into.push(Family { definition, samples });
}

fn one(value: f64) -> [(Vec<String>, f64); 1] {
    [(Vec::new(), value)]
}

pub(super) fn bool_value(b: bool) -> f64 {
    f64::from(u8::from(b))
}

fn node(s: &Snapshot, into: &mut Vec<Family>) {
    let build = Definition::gauge("komainu_build_info", &["version"], "Always 1; which program runs.");
    family(build, [(vec![s.version.to_owned()], 1.0)], into);
    let info = Definition::gauge(
        "komainu_node_info",
        &["node", "role", "lane", "lane_mode"],
        "Always 1; which node this is and how it forwards.",
    );
    let (lane, mode) = s.data_path.as_ref().map_or(("", ""), |d| (d.lane, d.mode.as_str()));
    let node = &s.view.node;
    let labels = vec![node.name.clone(), node.role.to_string(), lane.to_owned(), mode.to_owned()];
    family(info, [(labels, 1.0)], into);
    let uptime =
        Definition::gauge("komainu_uptime", &[], "Time since the daemon was started.").of(Unit::Seconds);
    family(uptime, one(s.uptime.as_secs_f64()), into);
    let fit = Definition::gauge("komainu_node_fit", &[], "1 while this node could own a VIP group.");
    family(fit, one(bool_value(s.fit)), into);
}

fn cluster(s: &Snapshot, into: &mut Vec<Family>) {
    let view = &s.view;
    let mut gauge = |name, help, value| family(Definition::gauge(name, &[], help), one(value), into);
    gauge("komainu_raft_term", "Raft's term as this node knows it.", view.term as f64);
    gauge("komainu_raft_has_leader", "1 while this node knows a leader.", bool_value(view.leader.is_some()));
    gauge(
        "komainu_raft_is_leader",
        "1 while this node leads.",
        bool_value(view.leader == Some(view.node.id)),
    );
    gauge("komainu_raft_is_voter", "1 while this node has a vote.", bool_value(view.voter));
    gauge(
        "komainu_raft_applied_index",
        "Log index of the newest entry that this node has applied.",
        view.state.index as f64,
    );
    gauge("komainu_document_revision", "Configuration counter.", view.state.revision as f64);
    gauge("komainu_solo", "1 while this node goes on alone in a pair.", bool_value(view.solo));
    let others = || view.members.iter().filter(|m| m.node.id != view.node.id);
    let alive = Definition::gauge("komainu_member_alive", &["node"], "1 while beats of that node arrive.");
    family(alive, others().map(|m| (vec![m.node.name.clone()], bool_value(m.alive))), into);
    let since =
        Definition::gauge("komainu_member_since_beat", &["node"], "Time since that node's newest beat.")
            .of(Unit::Seconds);
    let ages = others().filter_map(|m| Some((vec![m.node.name.clone()], m.since_beat?.as_secs_f64())));
    family(since, ages, into);
}

fn groups(s: &Snapshot, into: &mut Vec<Family>) {
    let state = &s.view.state;
    let name_of = |node: NodeId| match s.view.members.iter().find(|m| m.node.id == node) {
        Some(member) => member.node.name.clone(),
        None => node.0.to_string(),
    };
    let owner = Definition::gauge(
        "komainu_group_owner",
        &["group", "node"],
        "1 for the node that the cluster has given the VIP group to.",
    );
    let owners =
        state.groups.iter().filter_map(|g| Some((vec![g.config.name.clone(), name_of(g.owner?)], 1.0)));
    family(owner, owners, into);
    let epoch = Definition::gauge("komainu_group_epoch", &["group"], "Ownership counter of the VIP group.");
    family(epoch, state.groups.iter().map(|g| (vec![g.config.name.clone()], g.epoch as f64)), into);
    let lease = Definition::gauge(
        "komainu_lease_left",
        &["group"],
        "Time that this node's own lease on the VIP group still runs; 0 without one.",
    )
    .of(Unit::Seconds);
    let own: HashMap<_, _> =
        s.view.leases.iter().filter(|l| l.node == s.view.node.id).map(|l| (l.group, l.left)).collect();
    let left = state.groups.iter().map(|g| {
        let left = own.get(&g.id).copied().unwrap_or_default();
        (vec![g.config.name.clone()], left.as_secs_f64())
    });
    family(lease, left, into);
}

fn backends(s: &Snapshot, into: &mut Vec<Family>) {
    const LABELS: &[&str] = &["service", "backend"];
    let services = &s.view.state.services;
    let each = |value: &dyn Fn(&ServiceState, &BackendState) -> f64| -> Vec<(Vec<String>, f64)> {
        let all = services.iter().flat_map(|s| s.living().map(move |b| (s, b)));
        all.map(|(s, b)| (vec![s.config.name.clone(), b.config.name.clone()], value(s, b))).collect()
    };
    let up = Definition::gauge("komainu_backend_up", LABELS, "1 while the cluster's verdict is up.");
    family(up, each(&|s, b| bool_value(s.health(b) == Health::Up)), into);
    let weight = Definition::gauge(
        "komainu_backend_weight",
        LABELS,
        "Share of new flows in force: 0 while draining, disabled or not up.",
    );
    family(weight, each(&|s, b| f64::from(s.weight(b))), into);
    let admin = Definition::gauge(
        "komainu_backend_admin",
        &["service", "backend", "admin"],
        "1 for the administrative state in force.",
    );
    let living = services.iter().flat_map(|s| s.living().map(move |b| (s, b)));
    let states = living.flat_map(|(s, b)| {
        AdminState::ALL.iter().map(move |state| {
            let labels = vec![s.config.name.clone(), b.config.name.clone(), state.to_string()];
            (labels, bool_value(b.admin == *state))
        })
    });
    family(admin, states, into);

    let counters: HashMap<(u32, u32), BackendCounters> =
        s.data_path.iter().flat_map(|d| &d.counters.backends).map(|c| ((c.service, c.backend), *c)).collect();
    let mut counted = |definition: Definition, of: fn(&BackendCounters) -> u64| {
        let values =
            each(&|s, b| counters.get(&(s.id.0, b.id.0)).map_or(0.0, |c: &BackendCounters| of(c) as f64));
        // A witness forwards nothing: no zeros that look like silence.
        family(definition, if s.data_path.is_some() { values } else { Vec::new() }, into);
    };
    let counter = Definition::counter;
    counted(counter("komainu_backend_packets", LABELS, "Packets that this node sent to the backend."), |c| {
        c.packets
    });
    let bytes = "Bytes of layer 3 that this node sent to the backend.";
    counted(counter("komainu_backend", LABELS, bytes).of(Unit::Bytes), |c| c.bytes);
    let packets = "Packets from the backend that this node sent to clients (not in dsr).";
    counted(counter("komainu_backend_return_packets", LABELS, packets), |c| c.return_packets);
    let bytes = "Bytes of layer 3 from the backend that this node sent to clients (not in dsr).";
    counted(counter("komainu_backend_return", LABELS, bytes).of(Unit::Bytes), |c| c.return_bytes);
    let flows = "New flows: TCP SYNs and new UDP flows that this node sent to the backend.";
    counted(counter("komainu_backend_new_flows", LABELS, flows), |c| c.new_flows);
    let flows = "Flows at this moment, as far as this node can see them.";
    counted(Definition::gauge("komainu_backend_flows", LABELS, flows), |c| c.active);
    let flows = "Flows that this node remembers.";
    counted(Definition::gauge("komainu_backend_remembered_flows", LABELS, flows), |c| c.flows);
}

fn data_path(s: &Snapshot, into: &mut Vec<Family>) {
    let d = s.data_path.as_ref();
    let named = |of: &[(&'static str, u64)]| -> Vec<(Vec<String>, f64)> {
        of.iter().map(|(name, value)| (vec![(*name).to_owned()], *value as f64)).collect()
    };
    let drops =
        Definition::counter("komainu_drops", &["reason"], "Frames that this node dropped, by reason.");
    family(drops, d.map_or(Vec::new(), |d| named(&d.counters.drops)), into);
    let events = Definition::counter(
        "komainu_lane_events",
        &["event"],
        "Other events of the data path: ARP and ND answered, announcements sent, foreign claims seen, …",
    );
    family(events, d.map_or(Vec::new(), |d| named(&d.counters.events)), into);
    let optional = |value: Option<f64>| value.map(|v| (Vec::new(), v));
    let flows = Definition::gauge("komainu_flows", &[], "Flows that this node remembers.");
    family(flows, optional(d.map(|d| d.counters.flows as f64)), into);
    let index = Definition::gauge(
        "komainu_installed_index",
        &[],
        "Log index that the data path's tables were derived from.",
    );
    family(index, optional(d.map(|d| d.installed_index as f64)), into);
    let refused = Definition::gauge(
        "komainu_install_refused",
        &[],
        "1 while the data path goes on with older tables because it refused the newest.",
    );
    family(refused, optional(d.map(|d| bool_value(d.refused))), into);
}

fn checks(s: &Snapshot, into: &mut Vec<Family>) {
    let names: HashMap<BackendId, (String, String)> = (s.view.state.services.iter())
        .flat_map(|s| s.living().map(move |b| (b.id, (s.config.name.clone(), b.config.name.clone()))))
        .collect();
    let checked: Vec<_> = (s.checks.iter())
        .filter_map(|c| names.get(&c.backend).map(|(service, b)| (vec![service.clone(), b.clone()], c)))
        .collect();
    let total = Definition::counter(
        "komainu_checks",
        &["service", "backend", "result"],
        "Health checks that this node made.",
    );
    let results = checked.iter().flat_map(|(labels, c)| {
        [("passed", c.passed), ("failed", c.failed)].map(|(result, count)| {
            let labels = labels.iter().cloned().chain([result.to_owned()]).collect();
            (labels, count as f64)
        })
    });
    family(total, results, into);
    let took = Definition::counter(
        "komainu_check_duration",
        &["service", "backend"],
        "Time that this node's health checks took, all together; divided by their number it is the mean.",
    )
    .of(Unit::Seconds);
    family(took, checked.iter().map(|(l, c)| (l.clone(), c.took_total.as_secs_f64())), into);
    let seen = Definition::gauge(
        "komainu_check_up",
        &["service", "backend"],
        "1 while this node's own checks say up; komainu_backend_up is the cluster's verdict.",
    );
    family(seen, checked.iter().map(|(l, c)| (l.clone(), bool_value(c.health == Health::Up))), into);
}
