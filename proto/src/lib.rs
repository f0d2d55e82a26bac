//! Domain types, wire types and the conversion between them.
//!
//! - [`domain`]: what the cluster agrees on, as plain Rust types. No wire type leaks into `cluster` or `node` logic.
//! - [`admin`], [`cluster`]: generated code of `komainu.admin.v1` and `komainu.cluster.v1`.
//! - [`convert`]: wire ⇄ domain, the only place where the two meet.
//! - [`refusal`]: structured reasons of a refused call, inside a gRPC status.

pub mod convert;
pub mod domain;
pub mod refusal;

/// Generated from `komainu/admin/v1`: the public API.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, rust_2018_idioms)]
pub mod admin {
    tonic::include_proto!("komainu.admin.v1");
}

/// Generated from `komainu/cluster/v1`: what nodes say to each other.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, rust_2018_idioms)]
pub mod cluster {
    tonic::include_proto!("komainu.cluster.v1");
}

/// Encoded `FileDescriptorSet` of every `.proto` file, for the reflection service.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("komainu");
