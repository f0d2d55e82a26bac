//! The daemon and the command line of Komainu.
//!
//! `main.rs` only dispatches; every module is declared here, so that each can be tested by itself and what one module
//! offers another is its public interface.
//!
//! | module | holds |
//! |---|---|
//! | [`health`] | health checks: probes, rise/fall counting, scheduling |

pub mod health;
