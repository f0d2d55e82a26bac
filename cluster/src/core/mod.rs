//! The whole node as one synchronous machine, without socket, clock, task, disk or randomness of its own.
//!
//! Two parts, because one of them must never wait: [`crate::pulse::Pulse`] (beats, leases, promises) belongs to the beat
//! thread, [`Core`] (Raft, ownership decisions, membership) to the Raft thread, and whatever both need goes through the
//! `Mutex<Pulse>` that the Raft thread holds while it calls `Core`, never across I/O.
//!
//! ```text
//! beat thread:  lock { handle_beat / handle_timeout / set_* ; drain poll_output } -> lane, UDP
//! Raft thread:  lock { core.handle_*(&mut pulse, …) ; drain pulse.poll_output } -> lane
//!               drain core.poll_output -> UDP, gRPC, store (fsync) -> core.handle_persisted(&mut pulse, n)
//! ```
//!
//! Outputs of `Pulse` that write leases are carried out before anything that `Core` puts out in the same call.

mod api;

pub use api::{Config, Failure, Now, Output, Peer, Request, Ticket, Via};
