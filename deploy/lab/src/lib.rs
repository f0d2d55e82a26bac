//! A lab of network namespaces on one machine: the stage of `komainu demo`, of the system tests and of the benchmarks.
//!
//! - [`topology`]: what a lab consists of, as data; [`Standard`] is the usual one. [`Lab::build`] makes it.
//! - [`Host::run`], [`Host::spawn`], [`Host::start`]: code, threads and processes inside a host.
//! - [`Lab::cut`], [`Lab::unplug`], [`Process::signal`], …: faults.
//! - [`traffic`]: real servers and real clients that count what they see; [`watch`]: who answers for a VIP on the wire.
//! - [`cluster`]: the real binary in the lab, driven through its CLI.
//! - [`demo`]: the story of `komainu demo`.
//!
//! Nothing stays behind, whatever way the process ends: namespaces are held by descriptors ([`netns`]), processes die
//! with their parent ([`process`]), and the one directory is removed by the next lab if this one could not.

#[allow(unsafe_code)]
mod bpf;
pub mod cluster;
pub mod demo;
pub mod error;
mod host;
mod lab;
mod net;
pub mod netns;
pub mod pcap;
pub mod process;
pub mod standard;
mod tap;
pub mod topology;
pub mod traffic;
pub mod watch;
mod workdir;

pub use error::{LabError, Result};
pub use host::{Host, Interface, mac_string};
pub use lab::Lab;
pub use process::Process;
pub use topology::{Standard, Topology, addr};
pub use workdir::clean_up_on_signals;
