//! What a thread on which leases depend needs around it.

use std::io;

use nix::sys::mman::{MlockAllFlags, mlockall};

/// Real-time priority of the beat thread: above everything without real-time priority, below the kernel's own threads
/// that serve interrupts (50).
const BEAT_PRIORITY: i32 = 40;

/// Niceness of the Raft thread: it shares a lock with the beat thread, and must not be put aside by other work while it
/// holds it. Not real time: applying a big document may take long, and the data path must get its share meanwhile.
const RAFT_NICENESS: i32 = -20;

/// Ends the process when the thread that holds it panics. A process that goes on without its beat thread or its Raft
/// thread would look alive and do nothing; a dead one is replaced by its peer.
#[derive(Debug)]
pub(super) struct AbortOnPanic(pub &'static str);

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(thread = self.0, "a thread that must not fail has panicked: ending the process");
            std::process::abort();
        }
    }
}

/// Gives the calling thread real-time priority and locks the process's memory, as far as this machine allows. Answers
/// with what it did not allow, for operators.
pub fn be_prompt() -> Vec<String> {
    let mut notes = Vec::new();
    if let Err(e) = real_time() {
        notes.push(format!(
            "the beat thread has no real-time priority ({e}): on a busy machine a lease may run out; grant CAP_SYS_NICE"
        ));
    }
    if let Err(e) = lock_memory() {
        notes.push(format!(
            "memory is not locked ({e}): a machine that swaps may let a lease run out; grant CAP_IPC_LOCK"
        ));
    }
    notes
}

/// Gives the calling thread as big a share of a busy machine as there is. Where that is not allowed the beat thread
/// isn't allowed its priority either, and has said so.
pub(super) fn be_quick() {
    // SAFETY: `gettid` and `setpriority` take and return plain numbers.
    unsafe {
        let thread = libc::gettid();
        libc::setpriority(libc::PRIO_PROCESS, thread as libc::id_t, RAFT_NICENESS);
    }
}

fn real_time() -> io::Result<()> {
    let param = libc::sched_param { sched_priority: BEAT_PRIORITY };
    // SAFETY: pid 0 is the calling thread, and `param` outlives the call, which only reads it.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &param) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn lock_memory() -> io::Result<()> {
    // Without CAP_IPC_LOCK the lock counts against RLIMIT_MEMLOCK, and every allocation beyond it would fail from then
    // on (mlock(2)): better no lock than that.
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK)?;
    if soft != libc::RLIM_INFINITY && !has_ipc_lock() {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    // On fault: what was never used need not be in memory, and thread stacks are big.
    mlockall(
        MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | MlockAllFlags::from_bits_retain(MCL_ONFAULT),
    )?;
    Ok(())
}

/// mlockall(2): lock pages as they are faulted in.
const MCL_ONFAULT: libc::c_int = 4;
/// Bit of CAP_IPC_LOCK in a capability mask (capability.h).
const CAP_IPC_LOCK: u32 = 14;

fn has_ipc_lock() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let mask = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << CAP_IPC_LOCK) != 0
}
