//! `make chaos`: what a pair of balancers does when machines, cables and disks fail, measured from outside.
//!
//! - [`case`]: what is done to it, and what must hold then.
//! - [`contender`]: who it is done to. [`komainu`]: a cluster of the real binary, on a lane, of a [`shape`]; [`keepalived`]: the peer.
//! - [`play`]: the cases, step by step; [`squeeze`] takes memory away, [`preload`] makes disks slow and clocks wrong. [`round`]: one playing of a case, with everything that is measured meanwhile.
//! - [`report`]: distributions, `target/chaos/results.json`; [`page`]: `docs/failover.md`.

pub mod case;
pub mod contender;
pub mod keepalived;
pub mod komainu;
pub mod page;
pub mod play;
pub mod preload;
pub mod report;
pub mod round;
pub mod shape;
pub mod squeeze;

pub use case::Case;
pub use contender::Contender;
pub use round::{Measure, Round};
pub use shape::Shape;
