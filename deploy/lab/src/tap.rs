//! A listener on every port of a segment's switch: each frame once, where it enters, with the host it came from.

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use crate::error::{LabError, Result};
use crate::lab::Lab;

/// Which frames a tap takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Take {
    /// ARP and ICMPv6.
    Neighbours,
    /// Everything.
    All,
}

/// A frame as it entered the switch.
#[derive(Debug)]
pub(crate) struct Tapped<'a> {
    pub host: &'a str,
    /// When the kernel saw it.
    pub at: Instant,
    pub wall: SystemTime,
    pub frame: &'a [u8],
}

pub(crate) struct Tap {
    socket: OwnedFd,
    ports: BTreeMap<i32, String>,
    // The kernel stamps frames with wall time; the pair translates. Nobody steps the wall clock during a lab, and if
    // somebody does, times are off but never the order.
    epoch: (Instant, SystemTime),
    buffer: Vec<u8>,
}

/// Longest wait of one [`Tap::next`], so that whoever listens notices that it should stop.
const WAIT: Duration = Duration::from_millis(50);
/// Room for frames while the listener waits for a processor.
const RECEIVE_BUFFER: libc::c_int = 8 * 1024 * 1024;

impl Tap {
    pub fn open(lab: &Lab, segment: &str, take: Take) -> Result<Tap> {
        let ports: BTreeMap<i32, String> = lab
            .hosts()
            .flat_map(|(name, host)| host.interfaces().iter().map(move |l| (name, l)))
            .filter(|(_, l)| l.segment == segment)
            .map(|(name, l)| (l.port_index() as i32, name.to_owned()))
            .collect();
        let socket = lab
            .switch()
            .run(|| open_socket(take))
            .map_err(|e| LabError::system(format!("listen on segment {segment} (needs CAP_NET_RAW)"), e))?;
        Ok(Tap { socket, ports, epoch: (Instant::now(), SystemTime::now()), buffer: vec![0; 128 * 1024] })
    }

    /// The next frame, or nothing after a short wait.
    pub fn next(&mut self) -> Option<Tapped<'_>> {
        // SAFETY: all-zero is a valid value of these plain structs.
        let mut from: libc::sockaddr_ll = unsafe { mem::zeroed() };
        // SAFETY: as above.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        let mut control = [0_u64; 16];
        let mut part = libc::iovec { iov_base: self.buffer.as_mut_ptr().cast(), iov_len: self.buffer.len() };
        header.msg_name = (&raw mut from).cast();
        header.msg_namelen = mem::size_of::<libc::sockaddr_ll>() as u32;
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = mem::size_of_val(&control) as _;
        // SAFETY: every pointer in `header` is to a live local or to `self.buffer`, with its true length.
        let n = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut header, 0) };
        if n <= 0 || from.sll_pkttype == libc::PACKET_OUTGOING {
            return None;
        }
        let host = self.ports.get(&from.sll_ifindex)?;
        let wall = stamp(&header).unwrap_or_else(SystemTime::now);
        let at = match wall.duration_since(self.epoch.1) {
            Ok(later) => self.epoch.0 + later,
            Err(e) => self.epoch.0.checked_sub(e.duration()).unwrap_or(self.epoch.0),
        };
        Some(Tapped { host, at, wall, frame: &self.buffer[..n as usize] })
    }
}

/// The kernel's receive time among the control messages (socket(7), `SO_TIMESTAMPNS`).
fn stamp(header: &libc::msghdr) -> Option<SystemTime> {
    // SAFETY: `header` was filled by recvmsg and its control buffer is alive; the macros stay within it.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while !message.is_null() {
            if (*message).cmsg_level == libc::SOL_SOCKET && (*message).cmsg_type == libc::SCM_TIMESTAMPNS {
                let t: libc::timespec = std::ptr::read_unaligned(libc::CMSG_DATA(message).cast());
                return Some(SystemTime::UNIX_EPOCH + Duration::new(t.tv_sec as u64, t.tv_nsec as u32));
            }
            message = libc::CMSG_NXTHDR(header, message);
        }
    }
    None
}

fn open_socket(take: Take) -> io::Result<OwnedFd> {
    let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
    // SAFETY: a plain system call; the descriptor it returns is ours alone.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    set(&socket, libc::SO_TIMESTAMPNS, &1_i32)?;
    set(&socket, libc::SO_RCVBUFFORCE, &RECEIVE_BUFFER)?;
    let wait = libc::timeval { tv_sec: 0, tv_usec: WAIT.as_micros() as i64 };
    set(&socket, libc::SO_RCVTIMEO, &wait)?;
    if take == Take::Neighbours {
        // Classic BPF (kernel's networking/filter): ARP, or IPv6 whose next header is ICMPv6, up to 256 bytes.
        let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
        let (load_half, load_byte) = (0x28, 0x30);
        let (jump_equal, give) = (0x15, 0x06);
        let mut code = [
            op(load_half, 0, 0, 12),
            op(jump_equal, 3, 0, libc::ETH_P_ARP as u32),
            op(jump_equal, 0, 3, libc::ETH_P_IPV6 as u32),
            op(load_byte, 0, 0, 20),
            op(jump_equal, 0, 1, libc::IPPROTO_ICMPV6 as u32),
            op(give, 0, 0, 256),
            op(give, 0, 0, 0),
        ];
        let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
        set(&socket, libc::SO_ATTACH_FILTER, &program)?;
    }
    Ok(socket)
}

fn set<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: `value` lives through the call and its size is told.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (value as *const T).cast(),
            mem::size_of::<T>() as u32,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
