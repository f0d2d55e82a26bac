//! The executor itself: set up, wait, silence, tell, end.

use std::io::{self, PipeReader, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::time::Duration;

use komainu_cluster::shell::be_prompt;
use komainu_cluster::will::{Letter, SAY_AGAIN_AFTER_MS, WillMemory};
use komainu_packet::lane::kernel::Silencer;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, signal};

use super::READY;
use super::tether::Tether;
use super::threads::Threads;

/// Waits for the end of process `daemon`, the parent, and does what is to be done then. `tether`: number of the descriptor of its
/// tether; `leases`: the program in the kernel has some.
pub fn run(daemon: i32, tether: RawFd, listen: IpAddr, leases: bool) -> ExitCode {
    let mut stderr = io::stderr();
    match Watch::set_up(daemon, tether, listen, leases) {
        Ok(watch) => {
            // Nobody reads it any more when the daemon is dead already.
            let _ = writeln!(stderr, "{READY}");
            watch.run();
            ExitCode::SUCCESS
        }
        Err(e) => {
            let _ = writeln!(stderr, "{e}");
            ExitCode::FAILURE
        }
    }
}

/// Pause between two looks at the threads of a daemon of which one has ended, and how often it is looked.
const LOOK_AGAIN: Duration = Duration::from_micros(200);
const LOOKS: usize = 2_000;

struct Watch {
    /// Readable when the daemon has ended, all of it.
    daemon: OwnedFd,
    /// Readable when a certain thread of it has ended: at once when the daemon was killed, where `daemon` takes until all of its
    /// sockets are closed.
    thread: PipeReader,
    threads: Threads,
    will: WillMemory,
    silencer: Option<Silencer>,
    socket: UdpSocket,
}

impl Watch {
    /// Gets everything that could be refused before it is needed.
    fn set_up(daemon: i32, tether: RawFd, listen: IpAddr, leases: bool) -> io::Result<Watch> {
        let told = |what: &'static str| move |e: io::Error| io::Error::other(format!("{what}: {e}"));
        for ignored in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
            // SAFETY: ignoring a signal runs no handler.
            unsafe { signal(ignored, SigHandler::SigIgn) }.map_err(io::Error::from)?;
        }
        // Where the machine doesn't allow it the daemon wasn't allowed it either, and has said so.
        let _ = be_prompt();
        let will = WillMemory::open(inherited(io::stdin().as_fd())?).map_err(told("the will"))?;
        let silencer = match leases {
            true => Some(Silencer::new(&inherited(io::stdout().as_fd())?).map_err(told("the leases"))?),
            false => None,
        };
        // Not the daemon's own address: the next one must be able to listen there at once.
        let socket = UdpSocket::bind(SocketAddr::new(listen, 0)).map_err(told("a socket"))?;
        socket.set_nonblocking(true)?;
        let thread = watch_tether(tether).map_err(told("the tether"))?;
        let threads = Threads::of(daemon);
        let watch = Watch { daemon: watch_parent(daemon)?, thread, threads, will, silencer, socket };
        // What is needed later is in memory now.
        drop(watch.will.read());
        Ok(watch)
    }

    fn run(&self) {
        if !self.wait() {
            return;
        }
        if let Some(silencer) = &self.silencer {
            silencer.silence();
        }
        let letters = self.will.read();
        if letters.is_empty() {
            return;
        }
        self.send(&letters);
        for pause in SAY_AGAIN_AFTER_MS {
            std::thread::sleep(Duration::from_millis(pause));
            self.send(&letters);
        }
    }

    /// Waits until no thread of the daemon will ever run again. False: that can't be told.
    fn wait(&self) -> bool {
        let mut looks = None;
        loop {
            let mut fds = vec![PollFd::new(self.daemon.as_fd(), PollFlags::POLLIN)];
            let timeout = match looks {
                // A thread has ended, and the others may be about to, or not.
                Some(1..) => PollTimeout::ZERO,
                Some(0) => PollTimeout::NONE,
                None => {
                    fds.push(PollFd::new(self.thread.as_fd(), PollFlags::POLLIN));
                    PollTimeout::NONE
                }
            };
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
            if fds[0].any() == Some(true) {
                return true;
            }
            if fds.get(1).is_some_and(|fd| fd.any() == Some(true)) {
                looks = Some(LOOKS);
            }
            if let Some(left @ 1..) = looks {
                if self.threads.have_ended() {
                    return true;
                }
                looks = Some(left - 1);
                std::thread::sleep(LOOK_AGAIN);
            }
        }
    }

    fn send(&self, letters: &[Letter]) {
        for letter in letters {
            // A network that is down refuses it now and may take the next one; after that nobody would wait for it any more.
            let _ = self.socket.send_to(&letter.sealed, letter.to);
        }
    }
}

/// A descriptor of one's own for what was inherited.
fn inherited(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fd.try_clone_to_owned()
}

/// A descriptor that is readable when whoever holds the tether has ended.
fn watch_tether(tether: RawFd) -> io::Result<PipeReader> {
    // SAFETY: the daemon says that this descriptor was left for us, and nobody else here has it.
    let tether = Tether::open(unsafe { OwnedFd::from_raw_fd(tether) })?;
    let (reader, writer) = io::pipe()?;
    std::thread::Builder::new().name("komainu-tether".to_owned()).spawn(move || {
        // Where it can't be told, the end of the whole daemon still can.
        if tether.wait().is_err() {
            std::mem::forget(writer);
        }
    })?;
    Ok(reader)
}

/// A descriptor that is readable when the parent has ended, all threads of it.
///
/// Whoever is still the parent afterwards was it when the descriptor was opened. An orphan says nothing of its parent: that one may be
/// just about to end, some thread of it still at work.
fn watch_parent(parent: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers in, a descriptor of our own or an error out.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, parent, 0) };
    let fd = match i32::try_from(fd) {
        // SAFETY: a fresh descriptor that nobody else has.
        Ok(fd) if fd >= 0 => unsafe { OwnedFd::from_raw_fd(fd) },
        _ => {
            let refused = io::Error::last_os_error();
            return Err(io::Error::other(format!("watch the daemon (pidfd_open): {refused}")));
        }
    };
    if nix::unistd::getppid().as_raw() != parent {
        return Err(io::Error::other("the daemon has ended meanwhile"));
    }
    Ok(fd)
}
