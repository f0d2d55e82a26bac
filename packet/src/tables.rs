//! Compiled tables: what a [`Plan`] means for packets.

use crate::plan::Plan;

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

/// A compiled plan. Immutable.
#[derive(Debug, Default)]
pub struct Tables {
    revision: u64,
}

impl Tables {
    /// Compiles `plan`; `previous` lends its Maglev tables where nothing changed.
    ///
    /// # Errors
    /// The plan contradicts itself or exceeds a limit.
    pub fn compile(plan: Plan, _previous: Option<&Tables>) -> Result<Tables, PlanError> {
        Ok(Tables { revision: plan.revision })
    }

    /// Revision of the plan.
    pub fn revision(&self) -> u64 {
        self.revision
    }
}
