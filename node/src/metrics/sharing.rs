//! What is exchanged with the other balancers: flows on their way to and from the standby.

use std::sync::atomic::{AtomicU64, Ordering};

use komainu_cluster::flowsync::PeerStatus;

use super::families::{Definition, Family, Snapshot, bool_value, family};
use crate::warm::Warm;

/// The exchange at one moment.
#[derive(Clone, Debug, Default)]
pub struct SharingSnapshot {
    /// How far the others have followed.
    pub peers: Vec<PeerStatus>,
    /// Datagrams by what became of them.
    pub datagrams: [(&'static str, u64); 3],
    /// Bytes sent and received.
    pub bytes: [(&'static str, u64); 2],
    /// News of flows by what became of them.
    pub flows: [(&'static str, u64); 3],
}

impl SharingSnapshot {
    /// At this moment.
    pub fn of(warm: &Warm) -> SharingSnapshot {
        let t = warm.totals();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SharingSnapshot {
            peers: warm.peers(),
            datagrams: [("sent", get(&t.sent)), ("received", get(&t.received)), ("refused", get(&t.refused))],
            bytes: [("sent", get(&t.sent_bytes)), ("received", get(&t.received_bytes))],
            flows: [("adopted", get(&t.adopted)), ("rejected", get(&t.rejected)), ("full", get(&t.full))],
        }
    }
}

pub(super) fn families(s: &Snapshot, into: &mut Vec<Family>) {
    let sharing = s.data_path.as_ref().and_then(|d| d.sharing.as_ref());
    let peers = |value: fn(&PeerStatus) -> Option<f64>| -> Vec<(Vec<String>, f64)> {
        let all = sharing.iter().flat_map(|sharing| &sharing.peers);
        let named = all.filter_map(|p| {
            let name = s.view.members.iter().find(|m| m.node.id == p.node)?.node.name.clone();
            Some((vec![name], value(p)?))
        });
        named.collect()
    };
    let named = |of: fn(&SharingSnapshot) -> &[(&'static str, u64)]| -> Vec<(Vec<String>, f64)> {
        let all = sharing.iter().flat_map(|sharing| of(sharing));
        all.map(|(name, value)| (vec![(*name).to_owned()], *value as f64)).collect()
    };
    let node: &[&str] = &["node"];
    let caught_up = Definition::gauge(
        "komainu_flow_sync_caught_up",
        node,
        "1 while that balancer has all flows of the groups that this node owns, but for the lag; 0 also while this node owns nothing.",
    );
    family(caught_up, peers(|p| Some(bool_value(p.caught_up))), into);
    let lag = Definition::gauge(
        "komainu_flow_sync_lag_flows",
        node,
        "Changes of flows that the balancer does not have yet; no series while it has not caught up.",
    );
    family(lag, peers(|p| p.lag.map(|lag| lag as f64)), into);
    let full = Definition::counter(
        "komainu_flow_sync_full",
        node,
        "Times that all flows were sent to the balancer.",
    );
    family(full, peers(|p| Some(p.restarts as f64)), into);
    let resent = Definition::counter(
        "komainu_flow_sync_resent_datagrams",
        node,
        "Datagrams that were sent to the balancer again.",
    );
    family(resent, peers(|p| Some(p.resent as f64)), into);
    let datagrams = Definition::counter(
        "komainu_flow_sync_datagrams",
        &["what"],
        "Datagrams of the exchange of flows, both of flows and of acknowledgements.",
    );
    family(datagrams, named(|s| &s.datagrams), into);
    let bytes = Definition::counter(
        "komainu_flow_sync_bytes",
        &["what"],
        "Bytes of these datagrams, without UDP and IP headers.",
    );
    family(bytes, named(|s| &s.bytes), into);
    let flows = Definition::counter(
        "komainu_flow_sync_flows",
        &["what"],
        "News of flows from other balancers, by what became of them.",
    );
    family(flows, named(|s| &s.flows), into);
}
