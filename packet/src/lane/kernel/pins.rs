//! Where links are pinned: `/sys/fs/bpf/komainu/net-<namespace>/<interface>.<hook>`.
//!
//! The directory is named after the network namespace (its inode number), because that is what an interface's name means
//! something in: nodes in several namespaces of one machine, each with its own `eth0`, don't meet.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::link::Link;
use super::program::Hook;

/// Where the bpffs is mounted, on every system that has one.
const BPFFS: &str = "/sys/fs/bpf";
/// Our part of it.
pub const OURS: &str = "/sys/fs/bpf/komainu";

/// The bpffs, mounted if it isn't.
///
/// # Errors
/// It is not there and can't be mounted.
pub fn mount_bpffs() -> io::Result<()> {
    if is_bpffs() {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700")).map_err(|e| {
        let e = io::Error::from(e);
        io::Error::new(
            e.kind(),
            format!(
                "no bpffs is mounted at {BPFFS}, and it can't be mounted: {e}; \"mount -t bpf bpf {BPFFS}\""
            ),
        )
    })
}

/// Whether a bpffs is mounted.
pub fn is_bpffs() -> bool {
    statfs(BPFFS).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC)
}

/// Directory of the calling thread's network namespace, whether it is there or not.
///
/// # Errors
/// The namespace can't be told.
pub fn directory() -> io::Result<PathBuf> {
    let namespace = std::fs::metadata("/proc/thread-self/ns/net")?.ino();
    Ok(Path::new(OURS).join(format!("net-{namespace}")))
}

/// Makes a directory, if it isn't there.
///
/// # Errors
/// As mkdir(2).
pub fn make(directory: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// Where the link of an interface is pinned. A dot, which a bpffs keeps for itself, is written as `+`.
pub fn path(directory: &Path, interface: &str, hook: Hook) -> PathBuf {
    let name = interface.replace('.', "+");
    directory.join(match hook {
        Hook::Xdp => format!("{name}-xdp"),
        Hook::Tc => format!("{name}-tc"),
    })
}

/// Removes what is pinned for `interfaces` in this namespace, both hooks; how many links that were.
///
/// # Errors
/// As unlink(2).
pub fn remove(interfaces: &[&str]) -> io::Result<usize> {
    let directory = directory()?;
    let mut removed = 0;
    for interface in interfaces {
        for hook in [Hook::Xdp, Hook::Tc] {
            removed += usize::from(unlink(&path(&directory, interface, hook))?);
        }
    }
    tidy(&directory);
    Ok(removed)
}

/// Whether anything is pinned for `interfaces` in this namespace.
pub fn any(interfaces: &[&str]) -> bool {
    let Ok(directory) = directory() else { return false };
    interfaces.iter().any(|i| [Hook::Xdp, Hook::Tc].iter().any(|hook| path(&directory, i, *hook).exists()))
}

/// Removes a pin; whether there was one.
///
/// # Errors
/// As unlink(2), but for one that isn't there.
pub fn unlink(path: &Path) -> io::Result<bool> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Removes directories in which nothing is left.
pub fn tidy(directory: &Path) {
    // Refused while something is in them.
    let _ = std::fs::remove_dir(directory);
    let _ = std::fs::remove_dir(OURS);
}

/// Removes links whose interface is gone, in every namespace: what is left of a machine's namespaces that ended without an
/// orderly stop. Nothing else holds the program and its tables then.
pub fn remove_defunct() {
    let Ok(directories) = std::fs::read_dir(OURS) else { return };
    for directory in directories.flatten() {
        let Ok(pins) = std::fs::read_dir(directory.path()) else { continue };
        for pin in pins.flatten() {
            if Link::pinned(&pin.path()).and_then(|l| l.is_defunct()).unwrap_or(false) {
                let _ = unlink(&pin.path());
            }
        }
        let _ = std::fs::remove_dir(directory.path());
    }
}
