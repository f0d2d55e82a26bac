//! The two files: the node file (what only this machine knows) and the cluster document (what the cluster agrees on).
//!
//! | file | holds |
//! |---|---|
//! | [`mistake`] | what is wrong with a file: where, which value, why, what to do |
//! | [`reader`] | a TOML table read key by key; every mistake is noted, none stops the reading |
//! | [`node`] | the node file, resolved and checked |
//! | [`files`] | certificates and keys that the node file or the command line names |
//! | [`document`] | cluster document ⇄ TOML |
//!
//! As written and as resolved are two things: a [`reader::Section`] is the file as written, with lines; what comes out of
//! [`node::NodeConfig::parse`] and [`document::parse`] has every default filled in and nothing left to question.

pub mod document;
#[cfg(test)]
mod examples;
pub mod files;
pub mod mistake;
pub mod node;
pub mod reader;

pub use mistake::{ConfigError, Mistake};
pub use node::NodeConfig;
