//! Asks a segment: is the gateway there, and does anybody answer for one of these addresses?
//!
//! The questions are probes (RFC 5227 §2.1.1, and the solicitations of duplicate address detection, RFC 4862 §5.4.2): from no
//! address, so that they leave no trace in anybody's cache. Whoever has an address must answer them.

use std::collections::BTreeSet;
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::wire::ethernet::{BROADCAST, Mac};
use crate::wire::{Net, arp, dissect, icmpv6, ndp, proto};

/// Addresses that one sounding asks for at most; the rest are not asked for.
pub const MAX_ASKED: usize = 1024;
/// How often each is asked for: one question may be lost. Their answers are waited for as long after the last as after each.
const ROUNDS: u32 = 4;
/// Frames sent without a pause: what a queue takes.
const BURST: usize = 64;
const PAUSE: Duration = Duration::from_millis(2);
/// Longest frame that is looked at; messages of ARP and neighbour discovery are shorter.
const MAX_FRAME: usize = 512;

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The gateway answered.
    pub gateway: bool,
    /// An address that another station answered for or announced, and which.
    pub claimed: Option<(IpAddr, Mac)>,
}

/// Asks a segment. Opened for some soundings that follow each other: the kernel takes up to tens of milliseconds to close sockets of
/// this kind, which nobody should wait for who wants an answer; and what has come meanwhile is taken for one.
#[derive(Debug)]
pub struct Sounder {
    ifindex: i32,
    sockets: [OwnedFd; 2],
}

impl Sounder {
    /// Opens it on `interface`, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// There is no such interface; `EPERM` without `CAP_NET_RAW`.
    pub fn open(interface: &str) -> io::Result<Sounder> {
        let ifindex = nix::net::if_::if_nametoindex(interface)? as i32;
        let sockets = [open(ifindex, libc::ETH_P_ARP)?, open(ifindex, libc::ETH_P_IPV6)?];
        Ok(Sounder { ifindex, sockets })
    }

    /// Asks, from the station `own`, for a gateway and for `addresses`, and listens, for `lasts` in all; with hundreds of addresses
    /// for longer. An answer to an earlier sounding's question counts, too: slow stations are heard in the next.
    ///
    /// # Errors
    /// The interface is gone or down.
    pub fn sound(
        &self,
        own: Mac,
        gateway: Option<IpAddr>,
        addresses: &[IpAddr],
        lasts: Duration,
    ) -> io::Result<Found> {
        let asked: BTreeSet<IpAddr> = addresses.iter().copied().take(MAX_ASKED).collect();
        let questions: Vec<Vec<u8>> = gateway.iter().chain(&asked).map(|a| question(*a, own)).collect();
        let mut found = Found::default();
        let every = lasts / ROUNDS;
        for _ in 0..ROUNDS {
            let mut until = Instant::now() + every;
            for (i, burst) in questions.chunks(BURST).enumerate() {
                if i > 0 {
                    listen(&self.sockets, PAUSE, own, gateway, &asked, &mut found);
                    until = Instant::now() + every;
                }
                for frame in burst {
                    send(self.sockets[0].as_fd(), self.ifindex, frame)?;
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            listen(&self.sockets, left, own, gateway, &asked, &mut found);
        }
        Ok(found)
    }
}

fn question(address: IpAddr, own: Mac) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => arp::Repr::request(a, None, own).frame(BROADCAST, own).to_vec(),
        IpAddr::V6(a) => {
            let to = ndp::solicited_node(a);
            let probe = ndp::Repr::Solicitation { target: a, source_mac: None };
            probe.frame(ndp::multicast_mac(to), own, Ipv6Addr::UNSPECIFIED, to)
        }
    }
}

/// Takes in what arrives within `limit`.
fn listen(
    sockets: &[OwnedFd; 2],
    limit: Duration,
    own: Mac,
    gateway: Option<IpAddr>,
    asked: &BTreeSet<IpAddr>,
    found: &mut Found,
) {
    let until = Instant::now() + limit;
    loop {
        for socket in sockets {
            let mut frame = [0; MAX_FRAME];
            while let Some(n) = receive(socket.as_fd(), &mut frame) {
                let Some((address, mac)) = claim(&frame[..n]).filter(|(_, mac)| *mac != own) else {
                    continue;
                };
                found.gateway |= gateway == Some(address);
                if asked.contains(&address) {
                    found.claimed = Some((address, mac));
                }
            }
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        let wait = PollTimeout::try_from(left.max(Duration::from_millis(1))).unwrap_or(PollTimeout::ZERO);
        let mut fds = sockets.each_ref().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN));
        // Interrupted or not: the next look finds out.
        let _ = poll(&mut fds, wait);
    }
}

/// Who says that it has which address.
fn claim(frame: &[u8]) -> Option<(IpAddr, Mac)> {
    let d = dissect(frame).ok()?;
    if let Net::Ip(ip) = &d.net {
        let Ok(Some(ndp::Repr::Advertisement { target, target_mac, .. })) = ndp::Repr::parse(frame, ip)
        else {
            return None;
        };
        return Some((target.into(), target_mac.unwrap_or(d.src)));
    }
    let message = arp::Repr::parse(frame.get(d.l3..)?).ok()?;
    Some((message.claimed()?.into(), message.sender_mac))
}

/// A socket that receives frames of one EtherType; of IPv6 neighbour advertisements only.
fn open(ifindex: i32, ethertype: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointer.
    let fd = unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just handed this descriptor to us and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if ethertype == libc::ETH_P_IPV6 {
        let mut program = advertisements_only();
        let head = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        set(fd.as_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &head)?;
        // Answers to a probe go to all nodes; a host that has no IPv6 of its own doesn't listen there.
        let mut group = [0; 8];
        group[..6].copy_from_slice(&ndp::multicast_mac(ndp::ALL_NODES));
        let request = libc::packet_mreq {
            mr_ifindex: ifindex,
            mr_type: libc::PACKET_MR_MULTICAST as u16,
            mr_alen: 6,
            mr_address: group,
        };
        set(fd.as_fd(), libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request)?;
    }
    let address = device(ifindex, ethertype as u16);
    // SAFETY: the pointer and length describe `address`, which outlives the call.
    let r = unsafe {
        libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}

/// A filter (filter.rst): IPv6 packets whose first header is ICMPv6, type 136. What came by extension headers is no
/// message of neighbour discovery that a careful host would take.
fn advertisements_only() -> [libc::sock_filter; 6] {
    const NEXT_HEADER: u32 = 14 + 6;
    const KIND: u32 = 14 + 40;
    let op = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |at| op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, at);
    let unless = |value: u8, skip| op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, value.into());
    [
        load(NEXT_HEADER),
        unless(proto::ICMPV6, 3),
        load(KIND),
        unless(icmpv6::kind::NEIGHBOUR_ADVERTISEMENT, 1),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ]
}

fn device(ifindex: i32, ethertype: u16) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ethertype.to_be(),
        sll_ifindex: ifindex,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    }
}

fn set<T>(fd: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: the pointer and length describe `value`, plain data that outlives the call.
    let r = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, (value as *const T).cast(), size_of::<T>() as u32)
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn send(fd: BorrowedFd<'_>, ifindex: i32, frame: &[u8]) -> io::Result<()> {
    let to = device(ifindex, 0);
    // SAFETY: both pointers are to live values of the lengths told, and the kernel keeps neither.
    let n = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            libc::MSG_DONTWAIT,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn receive(fd: BorrowedFd<'_>, frame: &mut [u8]) -> Option<usize> {
    // SAFETY: the pointer and length describe `frame`, which outlives the call.
    let n = unsafe { libc::recv(fd.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), libc::MSG_DONTWAIT) };
    usize::try_from(n).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHER: Mac = [2, 0, 0, 0, 0, 7];

    #[test]
    fn answers_and_announcements_are_claims_and_questions_are_none() {
        let v4 = std::net::Ipv4Addr::new(192, 0, 2, 100);
        let v6: Ipv6Addr = "2001:db8::100".parse().unwrap();
        for address in [IpAddr::V4(v4), IpAddr::V6(v6)] {
            assert_eq!(claim(&question(address, OTHER)), None);
        }
        let answer = arp::Repr::request(v4, None, [2; 6]).reply(OTHER).unwrap();
        assert_eq!(claim(&answer.frame([2; 6], OTHER)), Some((v4.into(), OTHER)));
        let probe = ndp::Repr::Solicitation { target: v6, source_mac: None };
        let (answer, to) = probe.answer(Ipv6Addr::UNSPECIFIED, OTHER, false).unwrap();
        let frame = answer.frame(ndp::multicast_mac(to), OTHER, v6, to);
        assert_eq!(claim(&frame), Some((v6.into(), OTHER)));
    }
}
