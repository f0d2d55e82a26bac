//! Domain types, wire types and the conversion between them.
//!
//! - [`domain`]: what the cluster agrees on, as plain Rust types. No wire type leaks into `cluster` or `node` logic.
//! - [`admin`], [`cluster`]: generated code of `komainu.admin.v1` and `komainu.cluster.v1`.
//! - [`convert`]: wire ⇄ domain, the only place where the two meet.

pub mod domain;
