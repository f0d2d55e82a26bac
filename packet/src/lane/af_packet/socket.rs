//! One packet socket on one interface: ring to receive from, batches to send.
//!
//! pnet lists interfaces, but its datalink channel can't carry what a real NIC needs: it has no virtio-net header (so it
//! would take super-frames apart nowhere and send partial checksums out), copies each frame through a buffer, sends one frame
//! a system call, and sees its own output. So the socket is used itself.
//!
//! Settings and why:
//! - `PACKET_VNET_HDR`: offload metadata in front of every frame, both ways.
//! - `PACKET_IGNORE_OUTGOING`: what the host itself sends is not for us and would be copied for nothing.
//! - `PACKET_MR_ALLMULTI`: the kernel has no address on which it would join a VIP's solicited-node group.
//! - No `PACKET_QDISC_BYPASS`: past the queueing discipline, the kernel drops a super-frame that the device can't segment
//!   itself instead of segmenting it, and any frame that finds the device's queue full (`__dev_direct_xmit`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{setsockopt, sockopt};

use super::filter::Interest;
use super::ring::{RxRing, Slot};
use super::sys::{self, Piece, SendBatch};
use crate::lane::LaneError;

/// Bytes that may be on their way out of a socket: a batch of super-frames with what the kernel adds to each.
const SEND_BUFFER: usize = 16 << 20;

/// Where a socket stands.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Name of the interface.
    pub name: &'a str,
    /// Its number: frames leave by it.
    pub index: u32,
    /// Number of the device by which frames come: the same, or the one by which a program hands them up.
    pub listen: u32,
}

/// An open socket.
#[derive(Debug)]
pub struct PacketSocket {
    name: String,
    index: u32,
    /// Whether frames come by another device than they leave by.
    handed_up: bool,
    ring: RxRing,
    batch: SendBatch,
    fd: OwnedFd,
    ring_full: u64,
}

/// What became of the frames given to [`PacketSocket::send`].
#[derive(Debug, Default)]
pub struct Sent {
    /// Frames that the kernel took.
    pub sent: usize,
    /// Frames that it refused.
    pub failed: usize,
    /// Why it refused the last of them.
    pub error: Option<io::Error>,
}

impl PacketSocket {
    /// Opens a socket on an interface. Nothing passes its filter yet.
    ///
    /// # Errors
    /// The interface or the kernel refuses something: says what.
    pub fn open(place: &Place<'_>, slots: usize) -> Result<PacketSocket, LaneError> {
        let Place { name, index, listen } = *place;
        let failed = |doing: &str| {
            let doing = format!("interface \"{name}\": {doing}");
            move |source| LaneError::System { doing, source }
        };
        let fd = sys::packet_socket().map_err(failed("open a packet socket (needs CAP_NET_RAW)"))?;
        let option = |name, value| sys::set_packet_option(fd.as_fd(), name, value);
        option(libc::PACKET_VNET_HDR, 1).map_err(failed(
            "PACKET_VNET_HDR refused: without it super-frames and partial checksums can't be forwarded",
        ))?;
        option(libc::PACKET_IGNORE_OUTGOING, 1)
            .map_err(failed("PACKET_IGNORE_OUTGOING refused (needs Linux 4.20)"))?;
        let mut nothing = Interest::default().program(false);
        sys::attach_filter(fd.as_fd(), &mut nothing).map_err(failed("attach a filter"))?;
        let ring = RxRing::new(fd.as_fd(), slots).map_err(failed("set up the receive ring"))?;
        if setsockopt(&fd, sockopt::SndBufForce, &SEND_BUFFER).is_err() {
            setsockopt(&fd, sockopt::SndBuf, &SEND_BUFFER)
                .map_err(|e| failed("enlarge the send buffer")(e.into()))?;
        }
        let all_multicast = libc::packet_mreq {
            mr_ifindex: index as i32,
            mr_type: libc::PACKET_MR_ALLMULTI as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        sys::set_option(fd.as_fd(), libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &all_multicast)
            .map_err(failed("receive all multicast"))?;
        sys::bind(fd.as_fd(), listen).map_err(failed("bind the packet socket"))?;
        // Without an address frames leave by the device that the socket is bound to.
        let handed_up = listen != index;
        let batch = SendBatch::new(handed_up.then_some(index));
        Ok(PacketSocket { name: name.to_owned(), index, handed_up, ring, batch, fd, ring_full: 0 })
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface's number when the socket was opened.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The receive ring.
    pub fn ring(&mut self) -> &mut RxRing {
        &mut self.ring
    }

    /// See [`RxRing::piece`].
    pub fn piece(&self, slot: &Slot, len: usize) -> Piece {
        self.ring.piece(slot, len)
    }

    /// Lets through what `interest` says from now on.
    ///
    /// # Errors
    /// The kernel refuses the program.
    pub fn set_interest(&self, interest: &Interest) -> io::Result<()> {
        sys::attach_filter(self.fd.as_fd(), &mut interest.program(self.handed_up))
    }

    /// Frames lost since the socket was opened because the ring was full.
    pub fn ring_full(&mut self) -> u64 {
        if let Ok((_, lost)) = sys::take_statistics(self.fd.as_fd()) {
            self.ring_full += u64::from(lost);
        }
        self.ring_full
    }

    /// Takes the error pending on the socket.
    pub fn take_error(&self) -> Option<io::Error> {
        sys::take_error(self.fd.as_fd())
    }

    /// Sends frames, each a virtio-net header and what follows it, without ever waiting. A frame that the kernel refuses
    /// does not hold up those behind it.
    ///
    /// # Safety
    /// Every piece must describe memory that is readable and that nobody writes during the call.
    pub unsafe fn send(&mut self, pieces: &[Piece]) -> Sent {
        let mut outcome = Sent::default();
        let mut rest = pieces;
        while !rest.is_empty() {
            // SAFETY: the caller's promise for `pieces` holds for its tail.
            match unsafe { self.batch.send(self.fd.as_fd(), rest) } {
                Ok(n) => {
                    outcome.sent += n;
                    rest = &rest[n.min(rest.len())..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    // These concern the interface or the socket, so the rest would fare no better.
                    let all = matches!(
                        e.raw_os_error(),
                        Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV | libc::EAGAIN)
                    );
                    let n = if all { rest.len() } else { 1 };
                    outcome.failed += n;
                    outcome.error = Some(e);
                    rest = &rest[n..];
                }
            }
        }
        outcome
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}
