//! Memory of a BPF array that the kernel shares with us (`BPF_F_MMAPABLE`): a write here is what the program reads next,
//! without a system call.
//!
//! Everything is read and written as whole 64-bit words, which neither side ever sees half written. What spans several words
//! has its own order of writing.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// A mapping, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: plain shared memory without thread affinity, accessed through atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above; the memory is never handed out but as `&[AtomicU64]`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `words` 64-bit words of a map's values.
    ///
    /// # Errors
    /// As mmap(2): the map is smaller, not an array, or was made without `BPF_F_MMAPABLE`.
    pub fn new(map: BorrowedFd<'_>, words: usize) -> io::Result<Mapping> {
        let len = words * size_of::<AtomicU64>();
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(Mapping { base, words })
    }

    /// The words.
    #[inline]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `base` is the page-aligned start of `words` words that stay mapped as long as `self`, all bit patterns are
        // valid, and everybody in this process accesses them atomically. The kernel's program does by whole words too.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; the slices handed out borrow from `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}
