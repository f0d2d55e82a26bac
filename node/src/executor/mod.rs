//! The executor: a small process that outlives the daemon by a moment, and tells the other nodes when it has died.
//!
//! | file | holds |
//! |---|---|
//! | `keeper` | the daemon's side: starts it, starts another when it ends, dismisses it at an orderly end |
//! | `process` | the executor itself |
//! | `tether` | tells at once that a thread of another process has ended |
//! | `threads` | whether a process has a thread that may run again |
//!
//! **Why.** Silence is told from slowness by waiting; the kernel knows of a death at once. What dies can't speak, so somebody else
//! must. The process that was started stays the daemon (its signals, its watchdog, `kill -9` of its pid are what they were); the
//! executor is its child, the same program under a hidden command, in a process group of its own, deaf to signals that end a
//! service, with its memory locked and real-time priority where the machine allows.
//!
//! **What it does.** It waits until *no* thread of the daemon will ever run again: nothing is sent, and no lease renewed, from then
//! on. A thread of the daemon holds a lock that the kernel lets go of when it ends (`tether`); then it looks at all threads
//! (`/proc/PID/task/*/stat`). That every one has ended for good, and all of
//! its descriptors are closed, is told later (pidfd_open(2)): each packet socket takes the kernel some 10 ms to close, a device to which
//! frames go up 20 ms and more, together more than a lease. Then, in this order: it takes the answering of ARP and neighbour discovery from the
//! program in the kernel ([`komainu_packet::lane::kernel::Silencer`]), which goes on forwarding for what is left of the lease, as in
//! an orderly hand-over; it sends each node what the daemon has left for it in its will ([`komainu_cluster::will`]), a few times,
//! because datagrams get lost; it ends. What that message means is told in `cluster/src/pulse/resign.rs`.
//!
//! **What it can't do.** It has no key and seals nothing: it can say only what the daemon has sealed, and that only once the daemon
//! is dead. Where it is killed together with the daemon, or there is none, everything is as if the machine had lost its power: the
//! leases run out and an election follows.
//!
//! **What it inherits.** Its standard input is the will's memory, its standard output the leases of the program in the kernel (or
//! nothing), a further descriptor the tether's memory, its standard error a pipe on which it says that it is ready, or why it can't be.

mod keeper;
mod process;
mod tether;
mod threads;

pub use keeper::Executor;
pub use process::run;

/// What it says when it is set up.
const READY: &str = "ready";
