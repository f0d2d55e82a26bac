//! Whether a process has a thread that may run again.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::PathBuf;

/// Bit of the kernel's flags of a thread, field 9 of `/proc/PID/stat` (proc_pid_stat(5)): it is on its way out and never returns to the
/// program (`PF_EXITING` of the kernel's `include/linux/sched.h`).
const EXITING: u64 = 0x4;
/// Place of the flags behind the name, which is in parentheses.
const FLAGS_BEHIND_NAME: usize = 6;

/// The threads of a process.
#[derive(Debug)]
pub(super) struct Threads {
    /// `/proc/PID/task`.
    directory: PathBuf,
}

impl Threads {
    /// Those of process `pid`, which must not have been waited for while this is asked: its number could be another's then.
    pub(super) fn of(pid: i32) -> Threads {
        Threads { directory: format!("/proc/{pid}/task").into() }
    }

    /// Whether none of them will ever run again. False where it can't be told.
    ///
    /// A thread may make another one between the reading of the list and its own end. So they are looked at twice: the other one would be
    /// new in the second list. (A process that is being killed makes no threads, see copy_process() in the kernel's `kernel/fork.c`.)
    pub(super) fn have_ended(&self) -> bool {
        let Some(first) = self.all_ending() else { return false };
        self.all_ending().is_some_and(|second| second.is_subset(&first))
    }

    /// All of them, if all are on their way out.
    fn all_ending(&self) -> Option<BTreeSet<OsString>> {
        let entries = fs::read_dir(&self.directory).ok()?;
        let threads: BTreeSet<OsString> =
            entries.map(|e| Some(e.ok()?.file_name())).collect::<Option<_>>()?;
        let ending = |thread: &OsString| match fs::read_to_string(self.directory.join(thread).join("stat")) {
            Ok(stat) => is_ending(&stat),
            Err(e) => is_gone(&e),
        };
        // The first thread is there until somebody waits for the process: without any this is no list.
        (!threads.is_empty() && threads.iter().all(ending)).then_some(threads)
    }
}

fn is_gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
}

/// By the line of `/proc/PID/task/TID/stat`. The name may have anything in it, parentheses too.
fn is_ending(stat: &str) -> bool {
    let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(FLAGS_BEHIND_NAME));
    flags.and_then(|f| f.parse::<u64>().ok()).is_some_and(|flags| flags & EXITING != 0)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_line_is_read_whatever_the_name() {
        let line = |name: &str, flags: u64| format!("12 ({name}) S 1 12 12 0 -1 {flags} 7 0 4 0");
        assert!(is_ending(&line("x", 0x40_4144)));
        assert!(!is_ending(&line("x", 0x40_4140)));
        assert!(is_ending(&line("a) 4 (b", 4)));
        assert!(!is_ending(&line("a) 4 4 4 4 4 4 4 (b", 0)));
        for broken in ["", "12", "12 (x", "12 (x) S 1", "12 (x) S 1 12 12 0 -1 much 7"] {
            assert!(!is_ending(broken), "{broken}");
        }
    }

    #[test]
    fn a_living_process_has_threads_and_a_dead_one_that_nobody_waited_for_has_none() {
        assert!(!Threads::of(std::process::id() as i32).have_ended());
        let mut child = Command::new("sleep").arg("100").stdin(Stdio::null()).spawn().expect("a process");
        let threads = Threads::of(child.id() as i32);
        assert!(!threads.have_ended());
        child.kill().expect("it can be killed");
        let begun = Instant::now();
        while !threads.have_ended() {
            assert!(begun.elapsed() < Duration::from_secs(10), "it does not end");
            std::thread::yield_now();
        }
        child.wait().expect("it has ended");
        // Nobody knows who has its number now.
        assert!(!threads.have_ended());
    }
}
