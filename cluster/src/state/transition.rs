//! Opening, extending and ending a service's transition. The rules stand in the module's documentation.

use std::collections::BTreeMap;

use komainu_proto::domain::{BackendId, Protocol, UdpFlows};

use super::{MAX_BACKENDS, ServiceState, Transition};

/// Eligible weights of a service, those above 0 only.
pub(super) type Weights = BTreeMap<BackendId, u32>;

impl ServiceState {
    pub(super) fn weights(&self) -> Weights {
        self.backends.iter().map(|b| (b.id, self.weight(b))).filter(|&(_, weight)| weight > 0).collect()
    }

    /// To be called after every change that may touch eligibility, with the weights from before it.
    pub(super) fn follow_change(&mut self, before: &Weights, index: u64, wall_ms: u64) {
        let needs_none = before.is_empty() || self.forgets_flows();
        if self.weights() != *before {
            match &mut self.transition {
                Some(t) => {
                    t.changes = t.changes.saturating_add(1);
                    t.changed_index = index;
                    t.changed_ms = wall_ms;
                }
                // Where nobody was eligible no flow can be older than the change.
                None if needs_none => {}
                None => {
                    for backend in &mut self.backends {
                        backend.base_weight = before.get(&backend.id).copied().unwrap_or(0);
                    }
                    let t = Transition {
                        opened_index: index,
                        changed_index: index,
                        changed_ms: wall_ms,
                        changes: 1,
                    };
                    self.transition = Some(t);
                }
            }
        }
        if self.transition.is_none() || self.forgets_flows() {
            self.settle();
        }
        self.drop_useless_gone();
    }

    /// Ends the transition: what is in force becomes the base.
    pub(super) fn settle(&mut self) {
        self.transition = None;
        self.backends.retain(|b| !b.gone);
        let weights = self.weights();
        for backend in &mut self.backends {
            backend.base_weight = weights.get(&backend.id).copied().unwrap_or(0);
        }
    }

    /// Whether the service promises nothing to flows, so that a change needs no transition.
    fn forgets_flows(&self) -> bool {
        self.config.protocol == Protocol::Udp && self.config.udp_flows == UdpFlows::Hash
    }

    /// A backend that is gone serves only the base table; and the lane's tables have room for [`MAX_BACKENDS`].
    fn drop_useless_gone(&mut self) {
        self.backends.retain(|b| !b.gone || b.base_weight > 0);
        while self.backends.len() > MAX_BACKENDS {
            let Some(oldest) = self.backends.iter().filter(|b| b.gone).map(|b| b.id).min() else { break };
            self.backends.retain(|b| b.id != oldest);
        }
    }
}
