//! A lab's directory, which goes with the lab, or with the next one after a crash.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{LabError, Result};

/// The one thing of a lab that outlives a crash: a directory. Its name says who made it, so that the next lab can tell
/// whether the owner still lives.
#[derive(Debug)]
pub(crate) struct WorkDir {
    path: PathBuf,
    keep: AtomicBool,
}

/// Directories of this process's labs, for [`clean_up_on_signals`].
static DIRS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// From now on SIGINT, SIGTERM and SIGHUP end the process after its labs' directories are removed. Everything else of a
/// lab goes with the process by itself.
pub fn clean_up_on_signals() {
    use tokio::signal::unix::{SignalKind, signal};
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let waiting = std::thread::Builder::new().name("lab-signals".to_owned()).spawn(|| {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
                return;
            };
            let number = runtime.block_on(async {
                let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = (
                    signal(SignalKind::interrupt()),
                    signal(SignalKind::terminate()),
                    signal(SignalKind::hangup()),
                ) else {
                    return std::future::pending().await;
                };
                tokio::select! {
                    _ = interrupt.recv() => libc::SIGINT,
                    _ = terminate.recv() => libc::SIGTERM,
                    _ = hangup.recv() => libc::SIGHUP,
                }
            });
            for dir in DIRS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                let _ = std::fs::remove_dir_all(dir);
            }
            // As a shell reports a death by that signal.
            std::process::exit(128 + number);
        });
        drop(waiting);
    });
}

const DIR_PREFIX: &str = "komainu-lab-";

impl WorkDir {
    /// Makes one, and removes those of labs that crashed.
    pub(crate) fn create() -> Result<WorkDir> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let base = std::env::temp_dir();
        remove_leftovers(&base);
        let pid = std::process::id();
        let started = start_time(pid).unwrap_or_default();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("{DIR_PREFIX}{pid}-{started}-{number}"));
        std::fs::create_dir(&path).map_err(|e| LabError::system(format!("make {}", path.display()), e))?;
        DIRS.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        Ok(WorkDir { path, keep: AtomicBool::new(false) })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// It is not removed, but renamed ([`kept_path`]).
    pub(crate) fn keep(&self) {
        self.keep.store(true, Ordering::Relaxed);
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if self.keep.load(Ordering::Relaxed) {
            // A kept directory must not look like a leftover to the next lab.
            let _ = std::fs::rename(&self.path, kept_path(&self.path));
        } else {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Where a kept directory ends up.
pub(crate) fn kept_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    path.with_file_name(format!("komainu-failed-{}", name.trim_start_matches(DIR_PREFIX)))
}

fn remove_leftovers(base: &Path) {
    let Ok(entries) = std::fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|n| n.strip_prefix(DIR_PREFIX)) else { continue };
        let mut parts = rest.split('-').map(str::parse::<u64>);
        let (Some(Ok(pid)), Some(Ok(started)), Some(Ok(_)), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        // A process id is given out again; the start time tells the two apart.
        if start_time(pid as u32) != Some(started) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// When a process started, in clock ticks since boot (proc_pid_stat(5), field 22); `None` when there is none.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses that may hold spaces.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}
