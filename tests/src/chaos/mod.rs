//! `make chaos`: what a pair of balancers does when machines, cables and disks fail, measured from outside.
//!
//! - [`case`]: what is done to it, and what must hold then.
//! - [`contender`]: who it is done to. [`komainu`]: three voters of the real binary, on a lane; [`keepalived`]: the peer.
//! - [`play`]: the cases, step by step. [`round`]: one playing of a case, with everything that is measured meanwhile.
//! - [`report`]: distributions, `target/chaos/results.json`, `docs/failover.md`.

pub mod case;
pub mod contender;
pub mod keepalived;
pub mod komainu;
pub mod play;
pub mod report;
pub mod round;

pub use case::Case;
pub use contender::Contender;
pub use round::{Measure, Round};
