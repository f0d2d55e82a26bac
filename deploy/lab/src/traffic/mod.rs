//! Real servers and real clients, over the kernel's own TCP/IP, that count what they see.

pub mod churn;
pub mod crowd;
pub mod http;
pub mod pattern;
pub mod ping;
pub mod pinger;
pub mod server;
pub mod stream;

/// Asks that the calling thread runs soon after it is woken, so that a busy machine's servers answer as an idle one's do: what is in
/// flight when a VIP changes hands is a matter of the network then. Not real-time: a download must not keep others out.
pub(crate) fn promptly() {
    const NICE: i32 = -10;
    // SAFETY: takes no pointer; 0 is the calling thread. Without permission it stays as it is.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
    }
}

/// Asks for a real-time priority for the calling thread, so that what it measures is the network and not its own wait
/// for a processor. Without permission it stays as it is.
pub(crate) fn hurry() {
    let param = libc::sched_param { sched_priority: 5 };
    // SAFETY: the call reads the struct and changes the calling thread's scheduling, nothing else.
    unsafe {
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param);
    }
}
