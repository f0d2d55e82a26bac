//! Where a node keeps what it promised and what was agreed.
//!
//! One trait, two implementations: [`MemoryStore`] for tests and simulations, which can lose what was not synced, and
//! [`SledStore`] for the disk. A store that can't be opened or fails its check is set aside by [`open`], never deleted:
//! the node then starts empty and comes back as a new Raft member.

mod memory;
mod record;
mod sled;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

pub use self::memory::MemoryStore;
pub use self::sled::{Opened, SetAside, SledStore, open};

use crate::raft::{Persist, Restored};

/// What the Raft thread writes to. Every call may take as long as the disk does.
pub trait Store: Send {
    /// What the store holds; absent when it is empty.
    ///
    /// # Errors
    /// The store can't be read, or what it holds contradicts itself.
    fn load(&mut self) -> Result<Option<Restored>, StoreError>;

    /// Carries out one write as a whole or not at all. With `sync`, it and all before it are on disk when this returns:
    /// a power failure then loses none of it.
    ///
    /// # Errors
    /// It was not carried out, or may not be on disk. After that the store refuses every further write: what it would
    /// find after a restart is not known, so the node must not promise or acknowledge anything more.
    fn write(&mut self, write: &Persist) -> Result<(), StoreError>;
}

/// Why the store did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory can't be used.
    #[error("data_dir {}: {reason}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Another process uses it.
    #[error("data_dir {}: another komainu is using it; stop that one, or give this one its own data_dir", path.display())]
    Locked {
        /// Which.
        path: PathBuf,
    },
    /// No room on the disk.
    #[error("data_dir {}: the disk is full; make room and restart this node", path.display())]
    Full {
        /// Which.
        path: PathBuf,
    },
    /// The system said no.
    #[error("data_dir {}: {doing}: {reason}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The system's answer.
        reason: String,
    },
    /// The store is not what was written.
    #[error("data_dir {}: damaged: {reason}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// An earlier write failed.
    #[error("an earlier write failed, nothing more is written: {0}")]
    Broken(String),
}
