//! The daemon and the command line of Komainu.
//!
//! `main.rs` only dispatches; every module is declared here, so that each can be tested by itself and what one module
//! offers another is its public interface.
//!
//! | module | holds |
//! |---|---|
//! | [`admin`] | the admin API, served on the local socket and over mutual TLS |
//! | [`check`] | `komainu check`: is the node file right, can this machine do it? |
//! | [`cli`] | the command line: a client of the admin API |
//! | [`config`] | node file and cluster document: TOML in, resolved types out, all mistakes at once |
//! | [`daemon`] | `komainu run`: puts the parts together, stops in order |
//! | [`datapath`] | the lane as the cluster layer sees it; installs each new plan |
//! | [`executor`] | the small process that tells the others when the daemon has died |
//! | [`health`] | health checks: probes, rise/fall counting, scheduling |
//! | [`metrics`] | pages for machines: `/metrics`, `/healthz`, `/readyz` |
//! | [`pair`] | a pair without a third node: second way, sounding, what was set aside |
//! | [`planner`] | replicated state → plan for the lane |
//! | [`render`] | answers of the API as people and as programs read them |
//! | [`self_health`] | is this node fit to own a VIP group? |
//! | [`warm`] | exchanges flows with the other balancers, for the standby to know them |

pub mod admin;
pub mod check;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod executor;
pub mod health;
pub mod metrics;
pub mod pair;
pub mod planner;
pub mod render;
pub mod self_health;
pub mod warm;
