//! The packet engine and its lanes.
//!
//! What goes in: a [`plan::Plan`] (what to forward, a whole picture at one revision), leases (written into the lane at
//! every renewal, compared with the clock for every packet), frames. What comes out: frames, counters, flows.
//! This crate knows nothing of gRPC, tokio, Raft or the cluster crate.

pub mod announce;
pub mod checksum;
pub mod drops;
pub mod engine;
pub mod flow;
pub mod hash;
pub mod lane;
pub mod lease;
pub mod maglev;
pub mod neighbour;
pub mod netlink;
pub mod plan;
pub mod segment;
pub mod tables;
pub mod time;
pub mod wire;
