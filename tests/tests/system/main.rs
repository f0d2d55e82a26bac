//! Tests of the real binary in network namespaces. They need root, and the binary: `cargo build -p komainu-node`.

// Helpers of tests: a failure to set up is a failure of the test.
#![allow(clippy::unwrap_used)]

mod backends;
mod cluster;
mod config;
mod demo;
mod executor;
mod failover;
mod grpc;
mod interface;
mod kernel;
mod mtu;
mod pair;
mod remote_admin;
mod standby;
mod stop;
mod traffic;
mod words;
