//! A lock in shared memory that a thread of the daemon holds for as long as it lives: the kernel lets go of it for a thread that ends,
//! before it takes back anything that the process had (robust futexes, the kernel's `Documentation/locking/robust-futexes.rst`).

use std::ffi::c_int;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

const LEN: usize = size_of::<libc::pthread_mutex_t>();

/// See the [module documentation](self).
#[derive(Debug)]
pub(super) struct Tether {
    mutex: NonNull<libc::pthread_mutex_t>,
    fd: OwnedFd,
}

// SAFETY: the mutex is made for threads of several processes; nothing else is in the memory.
unsafe impl Send for Tether {}
// SAFETY: as above.
unsafe impl Sync for Tether {}

impl Tether {
    /// One that nobody holds yet. Programs that this process starts inherit its descriptor ([`Tether::number`]).
    ///
    /// # Errors
    /// The system gives no memory, or knows no such locks.
    pub(super) fn new() -> io::Result<Tether> {
        let fd = memfd_create(c"komainu-tether", MFdFlags::empty())?;
        ftruncate(&fd, LEN as i64)?;
        let tether = Tether::over(fd)?;
        let mut kind = std::mem::MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
        let kind = kind.as_mut_ptr();
        // SAFETY: the attributes are initialised by the first call before the others use them; the mutex lies in memory that is mapped,
        // large enough, aligned as a page is, and that nobody else has seen yet.
        unsafe {
            check(libc::pthread_mutexattr_init(kind))?;
            check(libc::pthread_mutexattr_setpshared(kind, libc::PTHREAD_PROCESS_SHARED))?;
            check(libc::pthread_mutexattr_setrobust(kind, libc::PTHREAD_MUTEX_ROBUST))?;
            check(libc::pthread_mutex_init(tether.mutex.as_ptr(), kind))?;
            check(libc::pthread_mutexattr_destroy(kind))?;
        }
        Ok(tether)
    }

    /// The one behind a descriptor that was inherited.
    ///
    /// # Errors
    /// It is no such memory.
    pub(super) fn open(fd: OwnedFd) -> io::Result<Tether> {
        let len = fstat(&fd)?.st_size;
        if usize::try_from(len) != Ok(LEN) {
            return Err(io::Error::other(format!("a tether takes {LEN} bytes, these are {len}")));
        }
        Tether::over(fd)
    }

    fn over(fd: OwnedFd) -> io::Result<Tether> {
        let len = NonZeroUsize::new(LEN).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours; the file behind it is that long.
        let base = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &fd, 0)?
        };
        Ok(Tether { mutex: base.cast(), fd })
    }

    /// The descriptor's number, which is the same in whatever inherits it.
    pub(super) fn number(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// This thread holds it until it ends.
    ///
    /// # Errors
    /// Somebody holds it.
    pub(super) fn hold(&self) -> io::Result<()> {
        // SAFETY: a mutex that was initialised, in memory that is mapped for as long as `self` lives.
        check(unsafe { libc::pthread_mutex_trylock(self.mutex.as_ptr()) })
    }

    /// Waits until the thread that holds it has ended.
    ///
    /// # Errors
    /// Nobody held it, or it can't be told.
    pub(super) fn wait(&self) -> io::Result<()> {
        // SAFETY: as above.
        match unsafe { libc::pthread_mutex_lock(self.mutex.as_ptr()) } {
            libc::EOWNERDEAD | libc::ENOTRECOVERABLE => Ok(()),
            0 => Err(io::Error::other("nobody held it")),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

impl Drop for Tether {
    fn drop(&mut self) {
        // A thread that holds a robust mutex has its address in a list that the kernel follows when it ends, so the memory of one that is
        // held stays. What is not held can't be in that list.
        // SAFETY: as above; and it is unmapped once, where nobody refers to it any more.
        unsafe {
            if libc::pthread_mutex_trylock(self.mutex.as_ptr()) == 0 {
                libc::pthread_mutex_unlock(self.mutex.as_ptr());
                let _ = munmap(self.mutex.cast(), LEN);
            }
        }
    }
}

fn check(error: c_int) -> io::Result<()> {
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn whoever_waits_goes_on_when_the_holder_has_ended() {
        let tether = Arc::new(Tether::new().unwrap());
        let other = Tether::open(tether.fd.try_clone().unwrap()).unwrap();
        let (end, ended) = channel::<()>();
        let (held, is_held) = channel();
        let holding = Arc::clone(&tether);
        let holder = std::thread::spawn(move || {
            held.send(holding.hold()).unwrap();
            let _ = ended.recv();
        });
        is_held.recv().unwrap().unwrap();
        assert!(tether.hold().is_err(), "it is held");
        let (say, said) = channel();
        let waiter = std::thread::spawn(move || {
            let _ = say.send(other.wait());
        });
        assert!(said.try_recv().is_err(), "the holder lives");
        drop(end);
        said.recv().unwrap().unwrap();
        holder.join().unwrap();
        waiter.join().unwrap();
        // And whoever comes later is told, too.
        tether.wait().unwrap();
    }

    #[test]
    fn what_nobody_holds_and_what_is_none_are_told() {
        let tether = Tether::new().unwrap();
        assert!(tether.wait().is_err());
        let other = memfd_create(c"something", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(Tether::open(other).is_err());
    }
}
