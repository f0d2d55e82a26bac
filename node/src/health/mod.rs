//! Health checks. Three things that know nothing of each other:
//!
//! * [`probe`]: one question to one backend, answered in words;
//! * [`rise_fall`]: a verdict out of answers, a pure counter;
//! * [`schedule`]: when to ask whom, and whom to tell.

use komainu_proto::domain::CheckType;

pub mod probe;
pub mod rise_fall;
pub mod schedule;

/// The kinds of check that this build can carry out. A document with another kind is refused.
pub const SUPPORTED: &[CheckType] = CheckType::ALL;
