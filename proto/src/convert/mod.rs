//! Wire ⇄ domain, the only place where the two meet.

pub mod document;

/// A wire message that says nothing sensible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}{}", if value.is_empty() { String::new() } else { format!(" (got \"{value}\")") })]
pub struct ConvertError {
    /// Path of the field, e.g. `service[web].backend[be1].port`.
    pub field: String,
    /// The value as received; empty when one is missing.
    pub value: String,
    /// What is wrong.
    pub reason: String,
}

impl ConvertError {
    /// An error at `field`.
    pub fn new(field: impl Into<String>, value: impl ToString, reason: impl Into<String>) -> Self {
        ConvertError { field: field.into(), value: value.to_string(), reason: reason.into() }
    }

    /// The same error, seen from one level further out.
    pub fn within(mut self, outer: &str) -> Self {
        self.field = if self.field.is_empty() { outer.to_owned() } else { format!("{outer}.{}", self.field) };
        self
    }
}
