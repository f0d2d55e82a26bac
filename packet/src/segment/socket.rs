//! Datagrams between two stations of a segment, in Ethernet frames of a type of their own.
//!
//! Frames go to a multicast address until the other's station is known, and again when nothing was heard of it for a while.
//! What they say, and whether it can be believed, is the business of those who send and open them.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::wire::ethernet::Mac;

/// Local Experimental EtherType 1 (IEEE Std 802, Table 2-1): never routed, and no product claims it.
pub const ETHERTYPE: u16 = 0x88b5;
/// Longest payload: an Ethernet frame of usual size less the length that stands before it.
pub const MAX_PAYLOAD: usize = 1500 - LENGTH;
/// Frames shorter than 60 bytes are padded, so the payload's length goes first.
const LENGTH: usize = 2;
/// Group address, locally administered: only those who ask for it are bothered.
const GROUP: Mac = [0x03, 0x4b, 0x6f, 0x6d, 0x61, 0x69];
/// How long a station that was heard is believed to be there.
const KNOWN_FOR: Duration = Duration::from_secs(1);

/// A socket on one interface. All methods may be called from any thread and none waits.
#[derive(Debug)]
pub struct SegmentSocket {
    fd: OwnedFd,
    ifindex: i32,
    peer: Mutex<Option<(Mac, Instant)>>,
}

impl SegmentSocket {
    /// Opens a socket on `interface`, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// There is no such interface; `EPERM` without `CAP_NET_RAW`.
    pub fn open(interface: &str) -> io::Result<SegmentSocket> {
        let ifindex = nix::net::if_::if_nametoindex(interface)? as i32;
        // SAFETY: takes no pointer.
        let fd = unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just handed this descriptor to us and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut group = [0; 8];
        group[..6].copy_from_slice(&GROUP);
        let request = libc::packet_mreq {
            mr_ifindex: ifindex,
            mr_type: libc::PACKET_MR_MULTICAST as u16,
            mr_alen: 6,
            mr_address: group,
        };
        option(fd.as_fd(), libc::PACKET_ADD_MEMBERSHIP, &request)?;
        let address = station(ifindex, GROUP);
        // SAFETY: the pointer and length describe `address`, which outlives the call.
        let r = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(SegmentSocket { fd, ifindex, peer: Mutex::default() })
    }

    /// Readable when a frame has arrived.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Sends a payload of at most [`MAX_PAYLOAD`] bytes. What can't be sent is lost like any frame.
    pub fn send(&self, payload: &[u8]) {
        let Ok(length) = u16::try_from(payload.len()) else { return };
        if payload.len() > MAX_PAYLOAD {
            return;
        }
        let known = *self.peer.lock().unwrap_or_else(PoisonError::into_inner);
        let to = known.filter(|(_, at)| at.elapsed() <= KNOWN_FOR).map_or(GROUP, |(mac, _)| mac);
        let address = station(self.ifindex, to);
        let mut frame = [0; LENGTH + MAX_PAYLOAD];
        frame[..LENGTH].copy_from_slice(&length.to_be_bytes());
        frame[LENGTH..LENGTH + payload.len()].copy_from_slice(payload);
        // SAFETY: both pointers are to live values of the lengths told, and the kernel keeps neither.
        unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                frame.as_ptr().cast(),
                LENGTH + payload.len(),
                libc::MSG_DONTWAIT,
                (&raw const address).cast(),
                ADDRESS_LEN,
            )
        };
    }

    /// The next payload: its length, and the station that sent it; absent when there is none.
    pub fn receive(&self, buffer: &mut [u8]) -> Option<(usize, Mac)> {
        let mut frame = [0u8; LENGTH + MAX_PAYLOAD];
        loop {
            let mut from = station(self.ifindex, GROUP);
            let mut from_len = ADDRESS_LEN;
            // SAFETY: the pointers and lengths describe `frame` and `from`, which outlive the call.
            let n = unsafe {
                libc::recvfrom(
                    self.fd.as_raw_fd(),
                    frame.as_mut_ptr().cast(),
                    frame.len(),
                    libc::MSG_DONTWAIT,
                    (&raw mut from).cast(),
                    &raw mut from_len,
                )
            };
            let Ok(n) = usize::try_from(n) else {
                // A link that went down is told once; then it goes on.
                if io::Error::last_os_error().raw_os_error() == Some(libc::ENETDOWN) {
                    continue;
                }
                return None;
            };
            let Some((payload, mac)) = payload(&frame[..n.min(frame.len())]).zip(from.sll_addr.first_chunk())
            else {
                continue;
            };
            let Some(to) = buffer.get_mut(..payload.len()) else { continue };
            to.copy_from_slice(payload);
            return Some((payload.len(), *mac));
        }
    }

    /// This station is the peer's: from now on frames go to it alone.
    pub fn heard(&self, mac: Mac) {
        *self.peer.lock().unwrap_or_else(PoisonError::into_inner) = Some((mac, Instant::now()));
    }
}

/// What stands in a frame behind its length, without the padding.
fn payload(frame: &[u8]) -> Option<&[u8]> {
    let (length, rest) = frame.split_first_chunk::<LENGTH>()?;
    rest.get(..usize::from(u16::from_be_bytes(*length)))
}

const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_ll>() as libc::socklen_t;

fn station(ifindex: i32, mac: Mac) -> libc::sockaddr_ll {
    let mut address = [0; 8];
    address[..6].copy_from_slice(&mac);
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ETHERTYPE.to_be(),
        sll_ifindex: ifindex,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: address,
    }
}

fn option<T>(fd: BorrowedFd<'_>, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the pointer and length describe `value`, plain data that outlives the call.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_PACKET,
            name,
            (value as *const T).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_left_out_and_what_is_cut_short_is_nothing() {
        assert_eq!(payload(&[0, 2, 7, 8, 0, 0, 0]), Some(&[7, 8][..]));
        assert_eq!(payload(&[0, 0, 0]), Some(&[][..]));
        for short in [&[][..], &[0], &[0, 2, 7]] {
            assert_eq!(payload(short), None);
        }
    }
}
