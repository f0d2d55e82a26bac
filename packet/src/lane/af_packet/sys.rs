//! The system calls of the packet socket: the one place, with `ring`, where this lane is `unsafe`.
//!
//! Constants and layouts: packet(7), `linux/if_packet.h`, `linux/virtio_net.h`, `linux/ethtool.h`.

use std::ffi::c_int;
use std::io;
use std::mem::{size_of, size_of_val};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// Opens a raw packet socket that receives nothing until [`bind`].
///
/// # Errors
/// `EPERM` without `CAP_NET_RAW`.
pub fn packet_socket() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointer.
    let fd = unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just handed this descriptor to us and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds the socket to one interface and to every EtherType: from now on it receives.
///
/// # Errors
/// The interface is gone or down.
pub fn bind(fd: BorrowedFd<'_>, ifindex: u32) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: ifindex as c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the pointer and length describe `address`, which outlives the call.
    let r = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets a socket option to a plain value.
///
/// # Errors
/// As setsockopt(2).
pub fn set_option<T: Copy>(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: &T) -> io::Result<()> {
    // SAFETY: the pointer and length describe `value`, a plain value that outlives the call.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (value as *const T).cast(),
            size_of_val(value) as libc::socklen_t,
        )
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets an integer option of a packet socket.
///
/// # Errors
/// As setsockopt(2).
pub fn set_packet_option(fd: BorrowedFd<'_>, name: c_int, value: c_int) -> io::Result<()> {
    set_option(fd, libc::SOL_PACKET, name, &value)
}

/// Puts a classic BPF program in front of the socket, replacing the one before it in one step.
///
/// # Errors
/// The kernel's checker refuses the program.
pub fn attach_filter(fd: BorrowedFd<'_>, program: &mut [libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let head = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    set_option(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &head)
}

/// Frames that the socket saw and lost since the last call: `(seen, lost)`. The kernel resets both (packet(7),
/// `PACKET_STATISTICS`).
///
/// # Errors
/// As getsockopt(2).
pub fn take_statistics(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the pointer and length describe `stats`, which the kernel fills with two integers.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut stats).cast(),
            &raw mut len,
        )
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok((stats.tp_packets, stats.tp_drops)) }
}

/// Takes the error that the socket has pending (`SO_ERROR`), e.g. `ENETDOWN` after its interface went down.
pub fn take_error(fd: BorrowedFd<'_>) -> Option<io::Error> {
    let mut code: c_int = 0;
    let mut len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the pointer and length describe `code`.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            (&raw mut code).cast(),
            &raw mut len,
        )
    };
    match (r, code) {
        (0, 0) => None,
        (0, code) => Some(io::Error::from_raw_os_error(code)),
        _ => Some(io::Error::last_os_error()),
    }
}

/// Memory that the kernel shares with us, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory without thread affinity; whoever owns the `Mapping` is its only user in this
// process.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of the socket's ring.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn new(fd: BorrowedFd<'_>, len: usize) -> io::Result<Mapping> {
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches no memory of ours.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd.as_raw_fd(),
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(p.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(Mapping { base, len })
    }

    /// Start of the mapping.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; no reference into it outlives its owner.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A piece of memory to send, as the kernel wants it described.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// First byte.
    pub base: *const u8,
    /// Bytes.
    pub len: usize,
}

// SAFETY: an address and a length; it takes an unsafe call to make use of them.
unsafe impl Send for Piece {}

/// Reusable arrays for sendmmsg(2).
#[derive(Debug)]
pub struct SendBatch {
    /// Where frames leave, if not by the device that the socket is bound to.
    to: Option<libc::sockaddr_ll>,
    pieces: Vec<libc::iovec>,
    heads: Vec<libc::mmsghdr>,
}

// SAFETY: the pointers in the arrays are written and read only within one call of `send`.
unsafe impl Send for SendBatch {}

impl SendBatch {
    /// Arrays for a socket whose frames leave by the device numbered `ifindex`; `None`: the one that it is bound to.
    pub fn new(ifindex: Option<u32>) -> SendBatch {
        let to = ifindex.map(|index| libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            // As on a socket that is bound to it: the kernel takes the frame's own EtherType.
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: index as c_int,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0; 8],
        });
        SendBatch { to, pieces: Vec::new(), heads: Vec::new() }
    }

    /// Sends every piece as one frame, without ever waiting. Returns the number of frames sent from the front; an error
    /// is that of the first frame.
    ///
    /// # Safety
    /// Every piece must describe memory that is readable and that nobody writes during the call.
    ///
    /// # Errors
    /// As sendmsg(2) for the first frame.
    pub unsafe fn send(&mut self, fd: BorrowedFd<'_>, pieces: &[Piece]) -> io::Result<usize> {
        self.pieces.clear();
        self.heads.clear();
        self.pieces.extend(
            pieces.iter().map(|p| libc::iovec { iov_base: p.base.cast_mut().cast(), iov_len: p.len }),
        );
        for piece in &mut self.pieces {
            // SAFETY: `msghdr` is plain data for which all zero bytes mean "no address, no control data".
            let mut head: libc::msghdr = unsafe { std::mem::zeroed() };
            if let Some(to) = &mut self.to {
                head.msg_name = std::ptr::from_mut(to).cast();
                head.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            }
            head.msg_iov = piece;
            head.msg_iovlen = 1;
            self.heads.push(libc::mmsghdr { msg_hdr: head, msg_len: 0 });
        }
        // SAFETY: `heads` holds as many entries as said; each points at one entry of `pieces`, which is not resized
        // (nor is `to` moved) before the call returns, and the caller vouches for the memory that they describe.
        let n = unsafe {
            libc::sendmmsg(
                fd.as_raw_fd(),
                self.heads.as_mut_ptr(),
                self.heads.len() as u32,
                libc::MSG_DONTWAIT as _,
            )
        };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }
}

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Runs an ethtool command that takes and gives one 32-bit value.
///
/// # Errors
/// `EOPNOTSUPP` where the driver doesn't know the command, `EPERM` without `CAP_NET_ADMIN` (changes only).
pub fn ethtool_value(interface: &str, command: u32, data: u32) -> io::Result<u32> {
    let mut value = EthtoolValue { command, data };
    // SAFETY: commands of this kind read and write exactly one `ethtool_value`.
    unsafe { ethtool(interface, (&raw mut value).cast()) }?;
    Ok(value.data)
}

/// Runs an ethtool command.
///
/// # Safety
/// `command` must point at what its command reads and writes.
unsafe fn ethtool(interface: &str, command: *mut libc::c_char) -> io::Result<()> {
    // SAFETY: `ifreq` is plain data for which all zero bytes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = interface.as_bytes();
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = *from as _;
    }
    request.ifr_ifru.ifru_data = command;
    // SAFETY: takes no pointer.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just handed this descriptor to us and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: `request` outlives the call, and so does what `command` points at, by the caller's promise.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The first fields of `struct ethtool_drvinfo`, and room for the others.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    _rest: [u8; 160],
}

/// Name of an interface's driver (`ETHTOOL_GDRVINFO`).
///
/// # Errors
/// `EOPNOTSUPP` where the driver doesn't say.
pub fn driver_name(interface: &str) -> io::Result<String> {
    const ETHTOOL_GDRVINFO: u32 = 0x3;
    let mut info = DriverInfo { command: ETHTOOL_GDRVINFO, driver: [0; 32], _rest: [0; 160] };
    // SAFETY: the command reads and writes one `ethtool_drvinfo`, of 196 bytes.
    unsafe { ethtool(interface, (&raw mut info).cast()) }?;
    let name = info.driver.iter().take_while(|b| **b != 0).copied().collect();
    String::from_utf8(name).map_err(io::Error::other)
}

/// Niceness of the thread that forwards: frames wait for it while its own share of a processor is small.
const NICE: i32 = -10;
/// Slice that the thread asks for, in nanoseconds: the least that the scheduler grants. A short slice is an early deadline,
/// so the thread runs soon after a frame has woken it, also on a machine that is busy (sched(7), EEVDF).
const SLICE_NS: u64 = 100_000;

/// Makes the calling thread run soon after it is woken. Not a real-time thread: under a flood it must not keep the beat
/// thread or the operator out.
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE`: the thread then competes as any other.
pub fn prefer_this_thread() -> io::Result<()> {
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: NICE,
        sched_priority: 0,
        sched_runtime: SLICE_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the pointer describes `attributes`, which outlives the call and says its own size; thread 0 is the caller.
    let r = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
