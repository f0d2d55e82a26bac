//! A process's will: sealed datagrams that somebody else sends once it is dead.
//!
//! It lies in memory that both share and that outlives either. Two places and a word that says which of them is valid: a new will
//! is written into the other place and then put in force by that one word, so the process may be killed at any point of it and
//! leaves the old one or the new one, whole. Nobody reads while the writer lives. A checksum guards against what should not be
//! there all the same: a will that doesn't match it is no will.
//!
//! The reader needs no key: what it sends was sealed by the writer ([`crate::seal::Kind::Resign`]).

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

use crate::pulse::{MAX_PEERS, RESIGN_MAX_BYTES};
use crate::seal::OVERHEAD;

/// Pauses in ms after which whoever sends a will sends it again: loss on the cluster network is normal, and a receiver may be busy.
/// Short at first, because somebody waits for it, and over long before a service manager clears up.
pub const SAY_AGAIN_AFTER_MS: [u64; 5] = [1, 2, 4, 8, 16];

/// Bytes of one place: length, checksum, and a letter to every peer that there can be.
const PLACE_LEN: usize = HEADER_LEN + MAX_PEERS * MAX_LETTER_LEN;
/// The longest letter: two lengths, an IPv6 address with zone and port as text, the sealed datagram.
const MAX_LETTER_LEN: usize = 2 + 64 + RESIGN_MAX_BYTES + OVERHEAD;
/// Length and CRC-32 of what follows.
const HEADER_LEN: usize = 8;
/// The word that says which place is valid stands before the first one, in a cache line of its own.
const FIRST_PLACE: usize = 64;
const LEN: usize = FIRST_PLACE + 2 * PLACE_LEN;

/// Values of that word: no will, or a place's number plus 1.
const NONE: u64 = 0;

/// A datagram to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// Where to.
    pub to: SocketAddr,
    /// Sealed.
    pub sealed: Vec<u8>,
}

/// See the [module documentation](self).
pub struct WillMemory {
    base: NonNull<u8>,
    fd: OwnedFd,
}

// SAFETY: the memory is shared with another process anyway. The word is atomic; a place is written only while the word does not
// name it, by one writer at a time (`put`), and read only when there is no writer any more (`read`).
unsafe impl Send for WillMemory {}
// SAFETY: as above.
unsafe impl Sync for WillMemory {}

impl fmt::Debug for WillMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WillMemory").field("fd", &self.fd).finish_non_exhaustive()
    }
}

impl WillMemory {
    /// Memory without a will, for the process that will write one. Its descriptor is closed on exec.
    ///
    /// # Errors
    /// The system gives no memory.
    pub fn new() -> io::Result<WillMemory> {
        let fd = memfd_create(c"komainu-will", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&fd, LEN as i64)?;
        WillMemory::over(fd)
    }

    /// The memory behind a descriptor that was inherited.
    ///
    /// # Errors
    /// It is no such memory.
    pub fn open(fd: OwnedFd) -> io::Result<WillMemory> {
        let len = fstat(&fd)?.st_size;
        if usize::try_from(len) != Ok(LEN) {
            return Err(io::Error::other(format!("a will takes {LEN} bytes, these are {len}")));
        }
        WillMemory::over(fd)
    }

    fn over(fd: OwnedFd) -> io::Result<WillMemory> {
        let len = NonZeroUsize::new(LEN).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours; the file behind it is that long.
        let base = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &fd, 0)?
        };
        Ok(WillMemory { base: base.cast(), fd })
    }

    /// What whoever is to read it inherits.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Puts a will in the place of the one before. One writer at a time. False: it doesn't fit, and none is in force now.
    pub fn put(&self, letters: &[Letter]) -> bool {
        let mut body = Vec::with_capacity(PLACE_LEN);
        for letter in letters {
            let to = letter.to.to_string();
            let (Ok(to_len), Ok(sealed_len)) = (u8::try_from(to.len()), u8::try_from(letter.sealed.len()))
            else {
                self.revoke();
                return false;
            };
            body.extend_from_slice(&[to_len, sealed_len]);
            body.extend_from_slice(to.as_bytes());
            body.extend_from_slice(&letter.sealed);
        }
        if body.len() > PLACE_LEN - HEADER_LEN {
            self.revoke();
            return false;
        }
        let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        let free = if self.valid().load(Ordering::Relaxed) == 1 { 1 } else { 0 };
        // SAFETY: `bytes` fits a place (checked above), the place lies inside the mapping, and the word does not name it.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.place(free).as_ptr(), bytes.len());
        }
        // All of the place before the word: a process that dies in between leaves the old will.
        self.valid().store(free as u64 + 1, Ordering::Release);
        true
    }

    /// There is nothing to be said any more.
    pub fn revoke(&self) {
        self.valid().store(NONE, Ordering::Release);
    }

    /// The will. To be called when its writer is dead. Empty: there is none, or it is damaged.
    pub fn read(&self) -> Vec<Letter> {
        let place = match self.valid().load(Ordering::Acquire) {
            1 => 0,
            2 => 1,
            _ => return Vec::new(),
        };
        // SAFETY: the place lies inside the mapping, which lives as long as `self`, and nobody writes any more.
        let bytes = unsafe { std::slice::from_raw_parts(self.place(place).as_ptr(), PLACE_LEN) };
        decode(bytes).unwrap_or_default()
    }

    fn valid(&self) -> &AtomicU64 {
        // SAFETY: the mapping begins at a page, is longer than a word and lives as long as `self`.
        unsafe { self.base.cast::<AtomicU64>().as_ref() }
    }

    fn place(&self, number: usize) -> NonNull<u8> {
        // SAFETY: both places lie inside the mapping.
        unsafe { self.base.add(FIRST_PLACE + number * PLACE_LEN) }
    }
}

impl Drop for WillMemory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `over` made, and nothing refers to it any more. What could fail is nothing.
        let _ = unsafe { munmap(self.base.cast(), LEN) };
    }
}

fn decode(place: &[u8]) -> Option<Vec<Letter>> {
    let (len, rest) = place.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let mut body = rest.get(..u32::from_le_bytes(*len) as usize)?;
    if crc32fast::hash(body) != u32::from_le_bytes(*sum) {
        return None;
    }
    let mut letters = Vec::new();
    while let Some((&[to_len, sealed_len], rest)) = body.split_first_chunk::<2>() {
        let (to, rest) = rest.split_at_checked(usize::from(to_len))?;
        let (sealed, rest) = rest.split_at_checked(usize::from(sealed_len))?;
        letters.push(Letter { to: std::str::from_utf8(to).ok()?.parse().ok()?, sealed: sealed.to_owned() });
        body = rest;
    }
    body.is_empty().then_some(letters)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letters(n: usize, byte: u8) -> Vec<Letter> {
        let letter = |i: usize| Letter {
            to: format!("[fe80:1111:2222:3333:4444:5555:6666:{i}%4294967295]:65535").parse().unwrap(),
            sealed: vec![byte; RESIGN_MAX_BYTES + OVERHEAD],
        };
        (1..=n).map(letter).collect()
    }

    /// As another process sees it.
    fn heir(memory: &WillMemory) -> WillMemory {
        WillMemory::open(memory.fd().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn the_newest_will_is_read_by_whoever_shares_the_memory() {
        let memory = WillMemory::new().unwrap();
        let heir = heir(&memory);
        assert!(heir.read().is_empty());
        for byte in 1..6 {
            assert!(memory.put(&letters(MAX_PEERS, byte)), "a letter to every peer fits");
            assert_eq!(heir.read(), letters(MAX_PEERS, byte));
        }
        assert!(memory.put(&letters(2, 9)));
        assert_eq!(heir.read(), letters(2, 9));
        memory.revoke();
        assert!(heir.read().is_empty());
    }

    #[test]
    fn a_will_that_was_not_finished_leaves_the_one_before() {
        let memory = WillMemory::new().unwrap();
        memory.put(&letters(2, 1));
        // What a writer that dies in the middle of it has done.
        let next = memory.place(1);
        // SAFETY: the place is that long, and nobody else has this memory.
        unsafe { next.as_ptr().write_bytes(0xff, PLACE_LEN) };
        assert_eq!(heir(&memory).read(), letters(2, 1));
    }

    #[test]
    fn a_damaged_will_is_none() {
        let memory = WillMemory::new().unwrap();
        memory.put(&letters(2, 1));
        let flip = |at: usize| {
            // SAFETY: inside the place, and nobody else has this memory.
            unsafe { *memory.place(0).as_ptr().add(at) ^= 1 };
        };
        for at in [0, 4, HEADER_LEN, HEADER_LEN + 70] {
            flip(at);
            assert!(heir(&memory).read().is_empty(), "byte {at}");
            flip(at);
        }
        assert_eq!(heir(&memory).read(), letters(2, 1));
        memory.valid().store(77, Ordering::Relaxed);
        assert!(heir(&memory).read().is_empty());
    }

    #[test]
    fn what_does_not_fit_is_no_will() {
        let memory = WillMemory::new().unwrap();
        memory.put(&letters(1, 1));
        assert!(!memory.put(&letters(2 * MAX_PEERS, 1)));
        assert!(heir(&memory).read().is_empty());
        let other = memfd_create(c"other", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(WillMemory::open(other).is_err());
    }
}
