//! The device by which the `tc` program hands frames up.
//!
//! Packet sockets see a frame before the ingress hook does, so one that listened on the interface itself would see what the
//! program handles too. The program redirects what it leaves to the engine to a TAP device instead, super-frames and partial
//! checksums included. Nobody reads the device's other end, and it ends with the process: then the redirection fails, which
//! is a drop.

use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// `_IOW('T', 202, int)` (linux/if_tun.h).
const TUNSETIFF: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
/// Largest that the driver allows: 65535 less an Ethernet header. Redirection asks for no MTU, but whoever looks should see
/// that it does not bound anything.
const MTU: c_int = 65_521;
/// The kernel puts the lowest free number in.
const NAME: &[u8] = b"komainu%d";

/// The device; it goes when this is dropped.
#[derive(Debug)]
pub struct Tap {
    /// Kernel's number of it.
    pub index: u32,
    /// Name.
    pub name: String,
    _file: File,
}

impl Tap {
    /// Makes one in the caller's network namespace.
    ///
    /// # Errors
    /// No `/dev/net/tun`, or the kernel refuses (`EPERM` without `CAP_NET_ADMIN`).
    pub fn new() -> io::Result<Tap> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").map_err(|e| {
            io::Error::new(e.kind(), format!("/dev/net/tun: {e} (\"modprobe tun\" where it is a module)"))
        })?;
        let mut request = request(NAME);
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
        ioctl(&file, TUNSETIFF, &mut request)?;
        let name: Vec<u8> = request.ifr_name.iter().take_while(|b| **b != 0).map(|b| *b as u8).collect();
        let name = String::from_utf8(name).map_err(io::Error::other)?;

        // Before it is up, or the kernel gives it an address and has something to say there. Not to be had where /proc/sys is
        // read-only; then that is said to nobody.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just handed this descriptor to us and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let named = || self::request(name.as_bytes());
        let mut mtu = named();
        mtu.ifr_ifru.ifru_mtu = MTU;
        ioctl(&socket, libc::SIOCSIFMTU as libc::Ioctl, &mut mtu)?;
        let mut up = named();
        up.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_NOARP) as i16;
        ioctl(&socket, libc::SIOCSIFFLAGS as libc::Ioctl, &mut up)?;
        let index = nix::net::if_::if_nametoindex(name.as_str())?;
        Ok(Tap { index, name, _file: file })
    }
}

fn request(name: &[u8]) -> libc::ifreq {
    // SAFETY: `ifreq` is plain data for which all zero bytes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name) {
        *to = *from as _;
    }
    request
}

fn ioctl(fd: &impl AsFd, command: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: `request` outlives the call; the commands used here read and write one `ifreq`.
    let r = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), command, std::ptr::from_mut(request)) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
