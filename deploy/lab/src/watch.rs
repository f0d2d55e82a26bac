//! Who answers for a VIP, as the wire shows it.
//!
//! A listener on every port of the service segment's switch records each claim to a VIP: an ARP reply or a neighbour
//! advertisement, asked for or not. A prober asks for the VIP every few milliseconds, so that silence means something.
//! Two hosts that claim the same VIP at the same time are two owners, whatever either of them believes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{LabError, Result};
use crate::lab::Lab;
use crate::tap::{Take, Tap};
use crate::topology::SERVICE;

/// Name of the host that asks.
const PROBER: &str = "watch";
/// Claims that are kept: hours of probing.
const MAX_CLAIMS: usize = 2_000_000;
/// How often [`Watch::wait_asked`] looks.
const LOOK: Duration = Duration::from_millis(2);
/// How much later than a newer one a claim may be read: ports of the switch are read in one queue.
const REORDERED: Duration = Duration::from_millis(20);
/// A VIP that goes from A to B and is back at A in less time than this was held by both, unless A announced it when it
/// came back. Who goes on answering beside B may announce, too, in defence, but only once a second: then B's next answer,
/// which comes unannounced, shows the two.
const SHORTEST_RETURN: Duration = Duration::from_millis(60);
/// How long after its first answer a new owner has announced the VIP: the lane may answer before the announcement is on
/// the wire.
const ANNOUNCED: Duration = Duration::from_millis(25);

/// How a claim was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClaimKind {
    /// ARP reply to a question, or solicited neighbour advertisement.
    Answer,
    /// Gratuitous ARP request, sender and target the VIP.
    GarpRequest,
    /// Gratuitous ARP reply.
    GarpReply,
    /// Neighbour advertisement that nobody asked for.
    UnsolicitedNa,
    /// ARP request for another address with the VIP as its sender.
    ArpSender,
}

/// Somebody said on the wire that a VIP is at a MAC address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// When the kernel saw the frame enter the switch.
    pub at: Instant,
    /// Host whose port it came in by.
    pub host: String,
    /// VIP claimed.
    pub vip: IpAddr,
    /// MAC address that it claims the VIP is at.
    pub mac: [u8; 6],
    /// How.
    pub kind: ClaimKind,
}

/// A stretch of time in which two hosts claimed one VIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// The VIP.
    pub vip: IpAddr,
    /// First claim of the second host.
    pub from: Instant,
    /// Next claim of the first host.
    pub to: Instant,
    /// First host, then second.
    pub hosts: [String; 2],
}

/// A running listener with its prober. Ends when dropped.
#[derive(Debug)]
pub struct Watch {
    log: Arc<Mutex<WireLog>>,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Watch {
    /// Listens for claims to `vips` on the service segment and asks for each of them every `every` from the host
    /// `watch`; not at all when `every` is zero.
    ///
    /// # Errors
    /// A raw socket can't be opened.
    pub fn start(lab: &Lab, vips: &[IpAddr], every: Duration) -> Result<Watch> {
        let mut tap = Tap::open(lab, SERVICE, Take::Neighbours)?;
        let log = Arc::new(Mutex::new(WireLog { started: Instant::now(), claims: Vec::new() }));
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        let wanted: BTreeSet<IpAddr> = vips.iter().copied().collect();
        let (shared, stopped) = (log.clone(), stop.clone());
        threads.push(std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let Some(tapped) = tap.next() else { continue };
                let Some((vip, mac, kind)) = read_claim(tapped.frame) else { continue };
                if !wanted.contains(&vip) {
                    continue;
                }
                let claim = Claim { at: tapped.at, host: tapped.host.to_owned(), vip, mac, kind };
                let mut log = shared.lock().unwrap_or_else(PoisonError::into_inner);
                if log.claims.len() < MAX_CLAIMS {
                    log.claims.push(claim);
                }
            }
        }));
        if !every.is_zero() {
            let host = lab.host(PROBER);
            let link = host.on(SERVICE);
            let frames: Vec<Vec<u8>> = vips
                .iter()
                .map(|&vip| match (vip, host.v4(SERVICE), host.v6(SERVICE)) {
                    (IpAddr::V4(vip), IpAddr::V4(own), _) => arp_request(link.mac, own, vip),
                    (IpAddr::V6(vip), _, IpAddr::V6(own)) => neighbour_solicitation(link.mac, own, vip),
                    _ => unreachable!("v4() and v6() return their family"),
                })
                .collect();
            let index = link.index;
            let socket = host
                .run(open_sender)
                .map_err(|e| LabError::system("open a raw socket (needs CAP_NET_RAW)", e))?;
            let (stopped, asked) = (stop.clone(), rounds.clone());
            threads.push(host.spawn("prober", move || {
                crate::traffic::hurry();
                while !stopped.load(Ordering::Relaxed) {
                    for frame in &frames {
                        send_frame(&socket, index, frame);
                    }
                    asked.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(every);
                }
            }));
        }
        Ok(Watch { log, stop, rounds, threads })
    }

    /// Waits until every VIP has been asked for `rounds` times more: only then does silence mean something. Whether that
    /// happened within `limit`.
    pub fn wait_asked(&self, rounds: u64, limit: Duration) -> bool {
        let asked = || self.rounds.load(Ordering::Relaxed);
        let (enough, deadline) = (asked() + rounds, Instant::now() + limit);
        while asked() < enough {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    /// What was seen so far.
    pub fn log(&self) -> WireLog {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner).clone();
        log.claims.sort_by_key(|c| c.at);
        log
    }

    /// The newest claim to `vip` that was seen so far: who, and when.
    pub fn latest(&self, vip: IpAddr) -> Option<(String, Instant)> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.claims.iter().rev().find(|c| c.vip == vip).map(|c| (c.host.clone(), c.at))
    }

    /// Who claimed `vip` at or after `since`.
    pub fn claimants_since(&self, vip: IpAddr, since: Instant) -> BTreeSet<String> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        // Claims arrive nearly in the order of time.
        let recent = log.claims.iter().rev().take_while(|c| c.at + REORDERED >= since);
        recent.filter(|c| c.vip == vip && c.at >= since).map(|c| c.host.clone()).collect()
    }

    /// Stops; what was seen.
    pub fn stop(mut self) -> WireLog {
        self.halt();
        self.log()
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.halt();
    }
}

/// Claims in the order of time.
#[derive(Clone, Debug)]
pub struct WireLog {
    /// When listening began.
    pub started: Instant,
    /// All claims.
    pub claims: Vec<Claim>,
}

impl WireLog {
    /// Stretches in which two hosts claimed one VIP.
    pub fn overlaps(&self) -> Vec<Overlap> {
        let mut by_vip: BTreeMap<IpAddr, Vec<&Claim>> = BTreeMap::new();
        for claim in &self.claims {
            by_vip.entry(claim.vip).or_default().push(claim);
        }
        by_vip.values().flat_map(|claims| overlaps_of_one(claims)).collect()
    }

    /// Time in which two hosts claimed one VIP, in ms, rounded up.
    pub fn two_owners_ms(&self) -> u64 {
        let total: Duration = self.overlaps().iter().map(|o| o.to - o.from).sum();
        total.as_micros().div_ceil(1000) as u64
    }

    /// Fails with a readable account when two hosts ever claimed one VIP at the same time.
    ///
    /// # Panics
    /// Then.
    pub fn assert_one_owner(&self) {
        let overlaps = self.overlaps();
        assert!(
            overlaps.is_empty(),
            "two nodes answered for a VIP:\n{}\nthe claims around the first:\n{}",
            overlaps
                .iter()
                .map(|o| format!(
                    "{} by {} and {} for {:?}, {:?} after the start",
                    o.vip,
                    o.hosts[0],
                    o.hosts[1],
                    o.to - o.from,
                    o.from - self.started
                ))
                .collect::<Vec<_>>()
                .join("\n"),
            self.around(overlaps[0].from, Duration::from_millis(100))
        );
    }

    /// The claims within `reach` of `at`, one a line.
    pub fn around(&self, at: Instant, reach: Duration) -> String {
        let near = |c: &&Claim| c.at + reach >= at && c.at <= at + reach;
        self.claims
            .iter()
            .filter(near)
            .map(|c| {
                format!(
                    "{:>12?} {} {:?} {}",
                    c.at.saturating_duration_since(self.started),
                    c.vip,
                    c.kind,
                    c.host
                )
            })
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// Stretches of time in which a host claimed `vip` with no pause longer than `pause`, by their beginnings: host, first
    /// claim, last claim. Stretches of two hosts may overlap.
    pub fn stretches(&self, vip: IpAddr, pause: Duration) -> Vec<(String, Instant, Instant)> {
        let mut all: Vec<(String, Instant, Instant)> = Vec::new();
        for claim in self.claims.iter().filter(|c| c.vip == vip) {
            match all.iter_mut().rev().find(|s| s.0 == claim.host) {
                Some(stretch) if claim.at.saturating_duration_since(stretch.2) <= pause => {
                    stretch.2 = claim.at
                }
                _ => all.push((claim.host.clone(), claim.at, claim.at)),
            }
        }
        all
    }

    /// Longest time that any one VIP was claimed by two hosts, in ms, rounded up.
    pub fn worst_two_owners_ms(&self) -> u64 {
        let mut by_vip: BTreeMap<IpAddr, Duration> = BTreeMap::new();
        for overlap in self.overlaps() {
            *by_vip.entry(overlap.vip).or_default() += overlap.to - overlap.from;
        }
        by_vip.values().max().map_or(0, |worst| worst.as_micros().div_ceil(1000) as u64)
    }

    /// Last claim of `host`, to any VIP.
    pub fn last_claim_of(&self, host: &str) -> Option<&Claim> {
        self.claims.iter().rev().find(|c| c.host == host)
    }

    /// First claim of `host` at or after `at`.
    pub fn first_claim_of(&self, host: &str, at: Instant) -> Option<&Claim> {
        self.claims.iter().find(|c| c.host == host && c.at >= at)
    }

    /// Claims of `host` at or after `at`.
    pub fn claims_of_after(&self, host: &str, at: Instant) -> usize {
        self.claims.iter().filter(|c| c.host == host && c.at >= at).count()
    }

    /// Hosts that claimed anything.
    pub fn claimants(&self) -> BTreeSet<String> {
        self.claims.iter().map(|c| c.host.clone()).collect()
    }

    /// Announcements (claims nobody asked for) of `host` to `vip`, in order.
    pub fn announcements(&self, host: &str, vip: IpAddr) -> Vec<&Claim> {
        self.claims.iter().filter(|c| c.host == host && c.vip == vip && c.kind != ClaimKind::Answer).collect()
    }
}

fn overlaps_of_one(claims: &[&Claim]) -> Vec<Overlap> {
    struct Run<'a> {
        host: &'a str,
        first: Instant,
        last: Instant,
        /// The host announced the VIP as its run began.
        announced: bool,
    }
    let mut runs: Vec<Run<'_>> = Vec::new();
    for claim in claims {
        let unasked = claim.kind != ClaimKind::Answer;
        match runs.last_mut() {
            Some(run) if run.host == claim.host => {
                run.last = claim.at;
                run.announced |= unasked && claim.at - run.first <= ANNOUNCED;
            }
            _ => runs.push(Run { host: &claim.host, first: claim.at, last: claim.at, announced: unasked }),
        }
    }
    runs.windows(3)
        .filter(|w| w[0].host == w[2].host && w[2].first - w[0].last < SHORTEST_RETURN && !w[2].announced)
        .map(|w| Overlap {
            vip: claims[0].vip,
            from: w[1].first,
            to: w[2].first,
            hosts: [w[0].host.to_owned(), w[1].host.to_owned()],
        })
        .collect()
}

/// Reads a claim out of an Ethernet frame (RFC 826; RFC 4861 §4.4).
fn read_claim(frame: &[u8]) -> Option<(IpAddr, [u8; 6], ClaimKind)> {
    let ethertype = u16::from_be_bytes(*frame.get(12..14)?.first_chunk()?);
    let payload = &frame[14..];
    if i32::from(ethertype) == libc::ETH_P_ARP {
        if payload.get(..6)? != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        let operation = u16::from_be_bytes(*payload.get(6..8)?.first_chunk()?);
        let mac = *payload.get(8..14)?.first_chunk()?;
        let sender = Ipv4Addr::from(*payload.get(14..18)?.first_chunk::<4>()?);
        let target = Ipv4Addr::from(*payload.get(24..28)?.first_chunk::<4>()?);
        let kind = match (operation, sender == target) {
            (1, true) => ClaimKind::GarpRequest,
            (1, false) => ClaimKind::ArpSender,
            (2, true) => ClaimKind::GarpReply,
            (2, false) => ClaimKind::Answer,
            _ => return None,
        };
        return Some((sender.into(), mac, kind));
    }
    // IPv6 without extension headers, next header ICMPv6, type neighbour advertisement.
    if i32::from(ethertype) != libc::ETH_P_IPV6 || *payload.get(6)? != 58 || *payload.get(40)? != 136 {
        return None;
    }
    let solicited = *payload.get(44)? & 0x40 != 0;
    let target = Ipv6Addr::from(*payload.get(48..64)?.first_chunk::<16>()?);
    // Target link-layer address option, one unit of 8 bytes; else the sender is meant.
    let mac = match payload.get(64..72) {
        Some([2, 1, mac @ ..]) => *mac.first_chunk()?,
        _ => *frame.get(6..12)?.first_chunk()?,
    };
    Some((target.into(), mac, if solicited { ClaimKind::Answer } else { ClaimKind::UnsolicitedNa }))
}

fn arp_request(mac: [u8; 6], own: Ipv4Addr, vip: Ipv4Addr) -> Vec<u8> {
    let mut f = vec![0xff; 6];
    f.extend_from_slice(&mac);
    f.extend_from_slice(&[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    f.extend_from_slice(&mac);
    f.extend_from_slice(&own.octets());
    f.extend_from_slice(&[0; 6]);
    f.extend_from_slice(&vip.octets());
    f
}

fn neighbour_solicitation(mac: [u8; 6], own: Ipv6Addr, vip: Ipv6Addr) -> Vec<u8> {
    let [.., a, b, c] = vip.octets();
    // Solicited-node multicast address (RFC 4291 §2.7.1) and its Ethernet address (RFC 2464 §7).
    let group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c];
    let mut icmp = vec![135, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend_from_slice(&vip.octets());
    icmp.extend_from_slice(&[1, 1]);
    icmp.extend_from_slice(&mac);
    let mut pseudo = own.octets().to_vec();
    pseudo.extend_from_slice(&group);
    pseudo.extend_from_slice(&(icmp.len() as u32).to_be_bytes());
    pseudo.extend_from_slice(&[0, 0, 0, 58]);
    pseudo.extend_from_slice(&icmp);
    let mut sum: u32 = pseudo.chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    icmp[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());

    let mut f = vec![0x33, 0x33, 0xff, a, b, c];
    f.extend_from_slice(&mac);
    f.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
    f.extend_from_slice(&(icmp.len() as u16).to_be_bytes());
    f.extend_from_slice(&[58, 255]);
    f.extend_from_slice(&own.octets());
    f.extend_from_slice(&group);
    f.extend_from_slice(&icmp);
    f
}

fn open_sender() -> io::Result<OwnedFd> {
    // SAFETY: a plain system call; the descriptor it returns is ours alone. Protocol 0 receives nothing.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

fn send_frame(socket: &OwnedFd, index: u32, frame: &[u8]) {
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = index as i32;
    to.sll_halen = 6;
    to.sll_addr[..6].copy_from_slice(&frame[..6]);
    // SAFETY: both pointers are to live values of the lengths told. A link that is down refuses; the next probe comes.
    unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            std::mem::size_of::<libc::sockaddr_ll>() as u32,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(claims: &[(u64, &str)]) -> WireLog {
        let started = Instant::now();
        let claims = claims
            .iter()
            .map(|&(ms, host)| Claim {
                at: started + Duration::from_millis(ms),
                host: host.to_owned(),
                vip: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 100)),
                mac: [0; 6],
                kind: ClaimKind::Answer,
            })
            .collect();
        WireLog { started, claims }
    }

    #[test]
    fn a_change_of_owner_and_a_later_return_are_no_overlap() {
        assert_eq!(log(&[(0, "a"), (5, "a"), (6, "b"), (10, "b")]).two_owners_ms(), 0);
        assert_eq!(log(&[(0, "a"), (5, "b"), (205, "b"), (300, "a")]).two_owners_ms(), 0);
    }

    /// An owner that died tens of milliseconds after it was given the VIP, and of whose death was told, made this
    /// look like 50 ms of two owners.
    #[test]
    fn a_quick_return_that_is_announced_is_no_overlap() {
        let claims: Vec<(u64, &str)> = [(0, "a"), (4, "a")]
            .into_iter()
            .chain((6..50).step_by(4).map(|ms| (ms, "b")))
            .chain([(52, "a"), (53, "a"), (56, "a")])
            .collect();
        let mut quick = log(&claims);
        assert_eq!(quick.two_owners_ms(), 46, "nobody said that it took the VIP");
        let back =
            quick.claims.iter().position(|c| c.at - quick.started == Duration::from_millis(53)).unwrap();
        quick.claims[back].kind = ClaimKind::GarpRequest;
        assert_eq!(quick.two_owners_ms(), 0);
        // It must be the beginning of the return that is announced.
        let mut late = log(&[(0, "a"), (4, "b"), (10, "a"), (36, "a")]);
        late.claims[3].kind = ClaimKind::GarpReply;
        assert_eq!(late.two_owners_ms(), 6);
        // Who answers in between without having taken it is found all the same.
        let mut torn = log(&[(0, "a"), (4, "b"), (10, "a"), (14, "b"), (18, "a")]);
        torn.claims[2].kind = ClaimKind::GarpRequest;
        assert_eq!(torn.two_owners_ms(), 4 + 4);
    }

    #[test]
    fn claims_in_turns_are_an_overlap_of_their_length() {
        let both = log(&[(0, "a"), (5, "a"), (6, "b"), (10, "a"), (11, "b"), (15, "a"), (16, "b")]);
        assert_eq!(both.overlaps().len(), 4);
        // From b's first claim to the last of a's run that b interrupted, piece by piece.
        assert_eq!(both.two_owners_ms(), 4 + 1 + 4 + 1);
    }

    #[test]
    fn stretches_of_two_hosts_may_overlap_and_a_vip_of_two_counts_once() {
        let both = log(&[(0, "a"), (5, "a"), (6, "b"), (10, "a"), (11, "b"), (200, "b")]);
        let ms = |t: Instant| (t - both.started).as_millis();
        let vip = both.claims[0].vip;
        let seen: Vec<_> = both
            .stretches(vip, Duration::from_millis(50))
            .into_iter()
            .map(|(host, from, to)| (host, ms(from), ms(to)))
            .collect();
        assert_eq!(seen, [("a".to_owned(), 0, 10), ("b".to_owned(), 6, 11), ("b".to_owned(), 200, 200)]);
        let mut two = both.clone();
        two.claims
            .extend(both.claims.iter().map(|c| Claim { vip: "192.0.2.150".parse().unwrap(), ..c.clone() }));
        assert_eq!(two.worst_two_owners_ms(), both.two_owners_ms());
        assert_eq!(two.two_owners_ms(), 2 * both.two_owners_ms());
    }

    #[test]
    fn claims_are_read_from_frames() {
        let request = arp_request([2; 6], Ipv4Addr::new(192, 0, 2, 9), Ipv4Addr::new(192, 0, 2, 100));
        assert_eq!(request.len(), 42);
        assert_eq!(read_claim(&request), Some(("192.0.2.9".parse().unwrap(), [2; 6], ClaimKind::ArpSender)));
        let mut reply = request.clone();
        reply[21] = 2;
        assert_eq!(read_claim(&reply).unwrap().2, ClaimKind::Answer);
        assert_eq!(read_claim(&reply[..30]), None);
        assert_eq!(
            read_claim(&neighbour_solicitation(
                [2; 6],
                "fe80::1".parse().unwrap(),
                "2001:db8::100".parse().unwrap()
            )),
            None
        );
    }
}
