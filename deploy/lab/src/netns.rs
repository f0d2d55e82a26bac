//! Network namespaces that die with their owner.
//!
//! A namespace is held by a file descriptor and by nothing else: no name under `/run/netns`, no process. When the lab
//! is dropped, panics or is killed with -9, the kernel closes the descriptor and takes the namespace with its
//! interfaces, addresses and routes with it (namespaces(7)), so there is nothing to clean up after a crash. Processes
//! inside would keep it alive; [`crate::process`] makes them die with their parent.
//!
//! To look around in a namespace while a lab runs: `nsenter --net=/proc/PID/fd/N`; [`Namespace::path`] says which.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{LabError, Result};

/// A network namespace. Clones share it; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: Arc<str>,
    fd: Arc<OwnedFd>,
}

impl Namespace {
    /// Makes an empty namespace in which only `lo` exists, down. `name` is for messages and thread names.
    ///
    /// # Errors
    /// The process lacks CAP_SYS_ADMIN, or the system is out of descriptors.
    pub fn create(name: &str) -> Result<Namespace> {
        let doing = format!("make a network namespace for {name}");
        // On a thread of its own: unshare(2) moves the calling thread, which is then thrown away.
        let fd = on_thread(name, || -> Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET).map_err(LabError::nix(doing.clone()))?;
            let file = File::open("/proc/thread-self/ns/net").map_err(|e| LabError::system(doing, e))?;
            Ok(OwnedFd::from(file))
        })?;
        Ok(Namespace { name: name.into(), fd: Arc::new(fd) })
    }

    /// The name given when it was made.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path by which other tools of the same machine can enter it while this process lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()).into()
    }

    /// Moves the calling thread into the namespace, for the rest of its life.
    ///
    /// # Errors
    /// The process lacks CAP_SYS_ADMIN.
    pub fn enter(&self) -> Result<()> {
        setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(LabError::nix(format!("enter the network namespace of {}", self.name)))
    }

    /// Runs `f` on a new thread inside the namespace and waits for it. Sockets that `f` opens stay in the namespace
    /// wherever they are used afterwards.
    ///
    /// # Panics
    /// When `f` panics, with its payload; or when the namespace can't be entered although it could be made.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        on_thread(&self.name, || {
            self.enter().expect("whoever made the namespace may enter it");
            f()
        })
    }

    /// Starts a thread inside the namespace. `what` becomes part of the thread's name.
    pub fn spawn<R: Send + 'static>(
        &self,
        what: &str,
        f: impl FnOnce() -> R + Send + 'static,
    ) -> thread::JoinHandle<R> {
        let ns = self.clone();
        thread::Builder::new()
            .name(format!("{what}@{}", self.name))
            .spawn(move || {
                ns.enter().expect("whoever made the namespace may enter it");
                f()
            })
            .expect("the system has a thread to give")
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn shared_fd(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }
}

fn on_thread<R: Send>(name: &str, f: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name(format!("lab@{name}"))
            .spawn_scoped(scope, f)
            .expect("the system has a thread to give");
        match handle.join() {
            Ok(r) => r,
            Err(payload) => std::panic::resume_unwind(payload),
        }
    })
}
