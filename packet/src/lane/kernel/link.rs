//! BPF links: what holds a program on an interface (bpf(2), `linux/bpf.h`). Pinned in a bpffs, a link outlives the process, and
//! another program can be put into it without a moment in which there is none.

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const OBJ_GET_INFO: u32 = 15;
const LINK_CREATE: u32 = 28;
const LINK_UPDATE: u32 = 29;

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// In the driver.
    XdpNative,
    /// Right after the driver, where the driver knows no XDP (`XDP_FLAGS_SKB_MODE`).
    XdpGeneric,
    /// At the traffic-control hook, by a link (Linux 6.6).
    Tcx,
}

impl Point {
    /// `BPF_XDP`, `BPF_TCX_INGRESS`.
    fn attach_type(self) -> u32 {
        match self {
            Point::XdpNative | Point::XdpGeneric => 37,
            Point::Tcx => 46,
        }
    }

    /// `XDP_FLAGS_DRV_MODE`, `XDP_FLAGS_SKB_MODE`.
    fn flags(self) -> u32 {
        match self {
            Point::XdpNative => 1 << 2,
            Point::XdpGeneric => 1 << 1,
            Point::Tcx => 0,
        }
    }

    /// `BPF_LINK_TYPE_XDP`, `BPF_LINK_TYPE_TCX`.
    fn link_type(self) -> u32 {
        match self {
            Point::XdpNative | Point::XdpGeneric => 6,
            Point::Tcx => 11,
        }
    }
}

/// A link.
#[derive(Debug)]
pub struct Link(OwnedFd);

#[repr(C)]
struct Create {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct Update {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct Info {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The beginning of `struct bpf_link_info`; `ifindex` stands there for links of both kinds.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    _pad: u32,
    ifindex: u32,
    _rest: [u32; 3],
}

impl Link {
    /// Puts `program` on an interface. The link ends when it is dropped, unless it is pinned.
    ///
    /// # Errors
    /// As bpf(2): `EBUSY` when a program is there that isn't held by a link, `EEXIST` when one is that is, `EOPNOTSUPP` where
    /// the driver knows no XDP.
    pub fn create(program: BorrowedFd<'_>, ifindex: u32, point: Point) -> io::Result<Link> {
        let mut attributes = Create {
            prog_fd: number(program),
            target_ifindex: ifindex,
            attach_type: point.attach_type(),
            flags: point.flags(),
        };
        // SAFETY: the attributes hold no pointer.
        unsafe { bpf_fd(LINK_CREATE, &mut attributes) }.map(Link)
    }

    /// Whether the kernel knows links of `point`'s kind. Nothing is attached.
    pub fn is_known(program: BorrowedFd<'_>, point: Point) -> bool {
        // No interface has that number: a kernel that gets so far as to look for it knows the rest.
        let outcome = Link::create(program, 0, point);
        outcome.is_err_and(|e| e.raw_os_error() == Some(libc::ENODEV))
    }

    /// The link pinned at `path`.
    ///
    /// # Errors
    /// `ENOENT` when there is none; what is there is no link.
    pub fn pinned(path: &Path) -> io::Result<Link> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut attributes = Object { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
        // SAFETY: `path` ends with 0 and outlives the call.
        unsafe { bpf_fd(OBJ_GET, &mut attributes) }.map(Link)
    }

    /// Pins it, so that it outlives the process.
    ///
    /// # Errors
    /// As bpf(2): `EEXIST`, or `path` is not in a bpffs.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut attributes =
            Object { pathname: path.as_ptr() as u64, bpf_fd: number(self.0.as_fd()), file_flags: 0 };
        // SAFETY: `path` ends with 0 and outlives the call.
        unsafe { bpf(OBJ_PIN, &mut attributes) }.map(drop)
    }

    /// Puts another program into it in one step.
    ///
    /// # Errors
    /// As bpf(2): `ENOLINK` when the interface is gone.
    pub fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attributes = Update {
            link_fd: number(self.0.as_fd()),
            new_prog_fd: number(program),
            flags: 0,
            old_prog_fd: 0,
        };
        // SAFETY: the attributes hold no pointer.
        unsafe { bpf(LINK_UPDATE, &mut attributes) }.map(drop)
    }

    /// Number of the interface that it holds a program of `point`'s kind on; `None`: the interface is gone, or the link is of
    /// another kind.
    ///
    /// # Errors
    /// It is no link.
    pub fn interface(&self, point: Point) -> io::Result<Option<u32>> {
        let info = self.info()?;
        Ok((info.kind == point.link_type() && info.ifindex != 0).then_some(info.ifindex))
    }

    /// Whether its interface is gone, so that it holds nothing any more.
    ///
    /// # Errors
    /// It is no link.
    pub fn is_defunct(&self) -> io::Result<bool> {
        Ok(self.info()?.ifindex == 0)
    }

    fn info(&self) -> io::Result<LinkInfo> {
        let mut info = LinkInfo::default();
        let mut attributes = Info {
            bpf_fd: number(self.0.as_fd()),
            info_len: size_of::<LinkInfo>() as u32,
            info: std::ptr::from_mut(&mut info) as u64,
        };
        // SAFETY: `info` is as long as said and outlives the call.
        unsafe { bpf(OBJ_GET_INFO, &mut attributes) }?;
        Ok(info)
    }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

/// # Safety
/// `attributes` must be a prefix of `union bpf_attr` for this command, and the pointers in it valid for the call.
unsafe fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's promise; the kernel takes what is missing of the union as zero.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as i32) }
}

/// # Safety
/// As [`bpf`], of a command that gives a descriptor.
unsafe fn bpf_fd<T>(command: u32, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attributes) }?;
    // SAFETY: the kernel has just handed this descriptor to us and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
