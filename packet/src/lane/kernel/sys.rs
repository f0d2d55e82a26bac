//! The bpf(2) calls that the loader has no word for, and memory that is shared with the program.

use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::abi::Plain;

// Commands of bpf(2), from <linux/bpf.h>.
const MAP_CREATE: u32 = 0;
const MAP_UPDATE: u32 = 2;
const MAP_DELETE: u32 = 3;
const MAP_NEXT_KEY: u32 = 4;
const PROG_TEST_RUN: u32 = 10;
const MAP_UPDATE_BATCH: u32 = 26;

/// `BPF_MAP_TYPE_ARRAY`.
pub const TYPE_ARRAY: u32 = 2;
/// `BPF_F_MMAPABLE`.
pub const FLAG_MMAPABLE: u32 = 1 << 10;
/// `BPF_F_INNER_MAP`.
pub const FLAG_INNER: u32 = 1 << 12;

fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: `attributes` is a prefix of `union bpf_attr` for this command, whose pointers are valid for the call; the kernel
    // takes what is missing as zero.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as i32) }
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

/// Creates a map of keys `K` and values `V`.
///
/// # Errors
/// As bpf(2).
pub fn create<K: Plain, V: Plain>(
    name: &str,
    map_type: u32,
    entries: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut map_name = [0; 16];
    for (to, from) in map_name[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let mut attributes = Create {
        map_type,
        key_size: size_of::<K>() as u32,
        value_size: size_of::<V>() as u32,
        max_entries: entries,
        map_flags: flags,
        inner_map_fd: 0,
        numa_node: 0,
        map_name,
    };
    let fd = bpf(MAP_CREATE, &mut attributes)?;
    // SAFETY: the kernel has just handed this descriptor to us and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[repr(C)]
struct Element {
    fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Writes an entry.
///
/// # Errors
/// As bpf(2): `E2BIG` when the map is full, `EEXIST`, `ENOENT` by `flags`.
pub fn update<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &V, flags: u64) -> io::Result<()> {
    let mut a = Element { fd: fd(map), _pad: 0, key: address(key), value: address(value), flags };
    bpf(MAP_UPDATE, &mut a).map(drop)
}

/// Removes an entry; `false` when there was none.
///
/// # Errors
/// As bpf(2), other than that there is none.
pub fn delete<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut a = Element { fd: fd(map), _pad: 0, key: address(key), value: 0, flags: 0 };
    match bpf(MAP_DELETE, &mut a) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The key after `key`, or the first.
///
/// # Errors
/// As bpf(2), other than that there is none.
pub fn next_key<K: Plain>(map: BorrowedFd<'_>, key: Option<&K>) -> io::Result<Option<K>> {
    let mut next = K::zeroed();
    let at = std::ptr::from_mut(&mut next) as u64;
    let mut a = Element { fd: fd(map), _pad: 0, key: key.map_or(0, address), value: at, flags: 0 };
    match bpf(MAP_NEXT_KEY, &mut a) {
        Ok(_) => Ok(Some(next)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Writes many entries at once.
///
/// # Errors
/// As bpf(2); some may have been written.
pub fn update_batch<K: Plain, V: Plain>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> io::Result<()> {
    let count = keys.len().min(values.len()) as u32;
    if count == 0 {
        return Ok(());
    }
    let mut a = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count,
        map_fd: fd(map),
        elem_flags: 0,
        flags: 0,
    };
    bpf(MAP_UPDATE_BATCH, &mut a).map(drop)
}

#[repr(C)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    _pad: u32,
}

/// What a test run gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// What the program returned.
    pub action: u32,
    /// The frame as it left it.
    pub frame: Vec<u8>,
    /// Nanoseconds a run, the mean of all.
    pub ns: u32,
}

/// Runs a program `repeat` times on `frame` (`BPF_PROG_TEST_RUN`). `context`: the program's context, as its type has it.
///
/// # Errors
/// As bpf(2): `EINVAL` for a frame shorter than an Ethernet header, too.
pub fn test_run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    context: Option<&[u8]>,
    repeat: u32,
) -> io::Result<Ran> {
    // The program may make a frame longer, by an option of an answer at most.
    let mut out = vec![0u8; frame.len() + 256];
    let mut a = TestRun {
        prog_fd: fd(program),
        retval: 0,
        data_size_in: frame.len() as u32,
        data_size_out: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        duration: 0,
        ctx_size_in: context.map_or(0, |c| c.len() as u32),
        ctx_size_out: 0,
        ctx_in: context.map_or(0, |c| c.as_ptr() as u64),
        ctx_out: 0,
        flags: 0,
        cpu: 0,
        batch_size: 0,
        _pad: 0,
    };
    bpf(PROG_TEST_RUN, &mut a)?;
    out.truncate(a.data_size_out as usize);
    Ok(Ran { action: a.retval, frame: out, ns: a.duration })
}

/// `struct xdp_md`.
#[repr(C)]
struct XdpMd {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

const TEST_XDP_LIVE_FRAMES: u32 = 2;
/// Frames that the kernel makes before it hands them over.
const LIVE_BATCH: u32 = 64;

/// Has the kernel make `frames` copies of `frame` and treat them by what the XDP program says of each, as if they had come in by
/// `interface` (`BPF_F_TEST_XDP_LIVE_FRAMES`, Linux 5.18).
///
/// # Errors
/// As bpf(2).
pub fn run_live(program: BorrowedFd<'_>, frame: &[u8], interface: u32, frames: u32) -> io::Result<()> {
    let context = XdpMd {
        data: 0,
        data_end: frame.len() as u32,
        data_meta: 0,
        ingress_ifindex: interface,
        rx_queue_index: 0,
        egress_ifindex: 0,
    };
    let mut a = TestRun {
        prog_fd: fd(program),
        retval: 0,
        data_size_in: frame.len() as u32,
        data_size_out: 0,
        data_in: frame.as_ptr() as u64,
        data_out: 0,
        repeat: frames,
        duration: 0,
        ctx_size_in: size_of::<XdpMd>() as u32,
        ctx_size_out: 0,
        ctx_in: address(&context),
        ctx_out: 0,
        flags: TEST_XDP_LIVE_FRAMES,
        cpu: 0,
        batch_size: LIVE_BATCH,
        _pad: 0,
    };
    bpf(PROG_TEST_RUN, &mut a).map(drop)
}

fn fd(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

/// An array that is shared with the program. Every access is of whole 64-bit words, so none sees half of one.
#[derive(Debug)]
pub struct Mapped<T> {
    base: NonNull<AtomicU64>,
    entries: u32,
    of: PhantomData<fn() -> T>,
}

// SAFETY: all access is by atomic words, or by raw pointers whose users vouch for themselves.
unsafe impl<T> Send for Mapped<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Mapped<T> {}

impl<T: Plain> Mapped<T> {
    const WORDS: usize = {
        assert!(size_of::<T>().is_multiple_of(8), "the kernel keeps entries at multiples of 8 bytes");
        size_of::<T>() / 8
    };

    /// Maps the array `map`, which has `entries` entries and was created with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn new(map: BorrowedFd<'_>, entries: u32) -> io::Result<Mapped<T>> {
        let len = Self::bytes(entries);
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches no memory of ours.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(p.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(Mapped { base, entries, of: PhantomData })
    }

    fn bytes(entries: u32) -> usize {
        entries as usize * size_of::<T>()
    }

    /// Number of entries.
    pub fn len(&self) -> u32 {
        self.entries
    }

    /// Never: an array has entries.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Its first byte, for who lays cells of his own over it. The memory lives as long as `self`.
    pub fn as_ptr(&self) -> *mut T {
        self.base.as_ptr().cast()
    }

    /// Words of the entry at `index`; `None` beyond the end.
    pub fn words(&self, index: u32) -> Option<&[AtomicU64]> {
        if index >= self.entries {
            return None;
        }
        // SAFETY: `index` is inside the mapping, which lives as long as `self` and is page-aligned; words are written by atomic
        // stores or by the program's aligned ones.
        Some(unsafe {
            std::slice::from_raw_parts(self.base.as_ptr().add(index as usize * Self::WORDS), Self::WORDS)
        })
    }

    /// The entry at `index`, each word of it whole; `None` beyond the end.
    pub fn read(&self, index: u32) -> Option<T> {
        let words = self.words(index)?;
        let mut value = T::zeroed();
        let to = std::ptr::from_mut(&mut value).cast::<u64>();
        for (i, word) in words.iter().enumerate() {
            // SAFETY: `value` is `WORDS` words long; it may be less aligned than a word.
            unsafe { to.add(i).write_unaligned(word.load(Ordering::Relaxed)) };
        }
        Some(value)
    }

    /// Writes the entry at `index` word by word; `false` beyond the end.
    pub fn write(&self, index: u32, value: &T) -> bool {
        let Some(words) = self.words(index) else { return false };
        let from = std::ptr::from_ref(value).cast::<u64>();
        for (i, word) in words.iter().enumerate() {
            // SAFETY: as in `read`.
            let new = unsafe { from.add(i).read_unaligned() };
            if word.load(Ordering::Relaxed) != new {
                word.store(new, Ordering::Release);
            }
        }
        true
    }

    /// The word at byte `at` of the entry at `index`.
    pub fn word(&self, index: u32, at: usize) -> Option<&AtomicU64> {
        self.words(index)?.get(at / 8)
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.entries as usize * size_of::<T>()) };
    }
}
