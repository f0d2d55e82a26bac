//! Replicated state, leases, ownership, beats.
//!
//! Cores are synchronous state machines without socket, clock, task or randomness of their own; the shell beside them
//! owns threads, sockets, disk and clock. `ARCHITECTURE.md` tells the three lives and names the files in order.

pub mod api;
pub mod core;
pub mod director;
pub mod flowsync;
mod handover;
pub mod pair;
pub mod pulse;
pub mod raft;
pub mod rules;
pub mod seal;
pub mod shell;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod state;
pub mod store;
pub mod time;
pub mod timing;
pub mod will;
