//! When the owner of an address announces it, and the frames that it does so with.
//!
//! ```text
//!            start                    FAST_SENDS sent             REFRESH
//!   (none) ────────→ Fast: now, then ───────────────→ Refresh: ←──────────┐
//!                    each REPEAT                      each REFRESH ───────┘
//!          a foreign claim, in either: once more, REPEAT after the last one at the earliest
//! ```
//!
//! At once, because every millisecond until the switches and the neighbours know the new owner is outage. Repeated,
//! because a frame gets lost; [`REPEAT`] apart, because switches and routers that throttle gratuitous ARP accept one
//! update of an address each second. Refreshed for ever, because a switch forgets a station that it hasn't heard for
//! its ageing time (300 s is usual, IEEE 802.1Q table 8-6) long before a router's ARP entry expires, and floods or
//! loses what is for it; a VIP whose service answers by another way (`dsr`) is never heard otherwise.
//!
//! IPv4 addresses are announced in the request form (RFC 5227 §2.3) and in the reply form, each of which some hosts
//! ignore. IPv6 addresses by an unsolicited neighbour advertisement with override to all nodes (RFC 4861 §7.2.6). A
//! router that has no entry yet may make one from it (RFC 9131 §6.1.2), so the first packet back needs no solicitation.
//! RFC 9131 §5 would have the advertisement go to all routers without override: that is for addresses still unverified;
//! ours has moved from another station and must replace what caches hold.
//!
//! This is a schedule without clock and socket: the caller asks [`Announcer::due`] at [`Announcer::next_deadline`], and
//! checks the lease before each frame that it sends. One announcer for each interface.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::time::BootTime;
use crate::wire::ethernet::{BROADCAST, Mac};
use crate::wire::{arp, ndp};

/// Least time between two announcements of an address: above the second that throttles count in.
pub const REPEAT: Duration = Duration::from_millis(1100);
/// Announcements of an IPv4 address before it goes over to refreshing: over 5.5 s, longer than a spanning tree port
/// that goes straight to forwarding, or a link aggregation, takes to settle.
pub const FAST_SENDS_V4: u8 = 6;
/// The same for IPv6: RFC 4861 §7.2.6 allows `MAX_NEIGHBOR_ADVERTISEMENT` = 3.
pub const FAST_SENDS_V6: u8 = 3;
/// Time between refreshes: four fit into the usual ageing time of 300 s, so three may get lost.
pub const REFRESH: Duration = Duration::from_secs(60);
/// Defences [`REPEAT`] apart against foreign claims that go on; after them one each [`DEFEND_INTERVAL`], so that two
/// stations that both insist don't flood the network (RFC 5227 §2.4 (c)).
pub const FAST_DEFENCES: u8 = 5;
/// See [`FAST_DEFENCES`]. Claims this far apart are separate incidents.
pub const DEFEND_INTERVAL: Duration = Duration::from_secs(10);
/// Frames that one call of [`Announcer::due`] asks for at most, and then none for [`PACE`]: 6400 a second, which
/// neither fills a send queue nor trips a switch's storm control, and tells of 300 addresses within 100 ms.
pub const MAX_FRAMES_PER_CALL: usize = 64;
/// See [`MAX_FRAMES_PER_CALL`].
pub const PACE: Duration = Duration::from_millis(10);
/// Addresses that one announcer keeps: 64 for each of 256 groups; their refreshes alone are 550 frames a second.
pub const MAX_ADDRESSES: usize = 16_384;

/// How an address is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// ARP request for the address by the address.
    ArpRequest,
    /// ARP reply that nobody asked for.
    ArpReply,
    /// Unsolicited neighbour advertisement.
    NeighbourAdvertisement,
}

/// An announcement to be sent now, if the lease permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Announcement {
    /// VIP group whose lease it needs.
    pub group: u32,
    /// The address.
    pub address: IpAddr,
    /// Form.
    pub form: Form,
}

impl Announcement {
    /// The frame, untagged, from the station `mac`. `router`: the address is a next hop for others (an inside VIP),
    /// which an advertisement must say (RFC 4861 §4.4), else hosts stop using it as one. Of no meaning in IPv4.
    pub fn frame(&self, mac: Mac, router: bool) -> Vec<u8> {
        match (self.address, self.form) {
            (IpAddr::V4(address), Form::ArpReply) => arp_reply(address, mac).to_vec(),
            (IpAddr::V4(address), _) => arp_request(address, mac).to_vec(),
            (IpAddr::V6(address), _) => neighbour_advertisement(address, mac, router),
        }
    }
}

/// A gratuitous ARP frame in the request form.
pub fn arp_request(address: Ipv4Addr, mac: Mac) -> [u8; arp::FRAME_LEN] {
    arp::Repr::announcement(address, mac).frame(BROADCAST, mac)
}

/// A gratuitous ARP frame in the reply form.
pub fn arp_reply(address: Ipv4Addr, mac: Mac) -> [u8; arp::FRAME_LEN] {
    arp::Repr::unsolicited_reply(address, mac).frame(BROADCAST, mac)
}

/// A frame with an unsolicited neighbour advertisement.
pub fn neighbour_advertisement(address: Ipv6Addr, mac: Mac, router: bool) -> Vec<u8> {
    let to = ndp::multicast_mac(ndp::ALL_NODES);
    ndp::Repr::announcement(address, mac, router).frame(to, mac, address, ndp::ALL_NODES)
}

/// The schedule of one interface.
#[derive(Debug, Default)]
pub struct Announcer {
    entries: BTreeMap<IpAddr, Entry>,
    /// The same addresses by when they are due.
    queue: BTreeSet<(BootTime, IpAddr)>,
    /// Nothing is due before: a full batch was handed out.
    paced_until: BootTime,
}

#[derive(Debug)]
struct Entry {
    group: u32,
    /// When it is due; the key in `queue`.
    next: BootTime,
    last_sent: Option<BootTime>,
    /// Announcements that are still to follow [`REPEAT`] apart, the next one included.
    fast_left: u8,
    last_claim: Option<BootTime>,
    /// Defences in the present incident.
    defences: u8,
}

impl Announcer {
    /// A schedule without addresses.
    pub fn new() -> Self {
        Self::default()
    }

    /// Announces `addresses` of `group` from now on, each from the beginning of its schedule, and none of the group's
    /// that it announced before and that are not among them. An address belongs to the group that was started last.
    ///
    /// Returns how many addresses were left out because of [`MAX_ADDRESSES`].
    pub fn start(&mut self, group: u32, addresses: impl IntoIterator<Item = IpAddr>, now: BootTime) -> usize {
        self.stop(group);
        addresses.into_iter().filter(|&address| !self.add(group, address, now)).count()
    }

    /// Makes `addresses` those of `group`: new ones are announced from now on, known ones keep their schedule, others
    /// are no longer announced. For a plan that changes while the group is owned.
    ///
    /// Returns how many addresses were left out because of [`MAX_ADDRESSES`].
    pub fn update(
        &mut self,
        group: u32,
        addresses: impl IntoIterator<Item = IpAddr>,
        now: BootTime,
    ) -> usize {
        let wanted: BTreeSet<IpAddr> = addresses.into_iter().collect();
        self.remove(|entry, address| entry.group == group && !wanted.contains(address));
        let known = |entries: &BTreeMap<IpAddr, Entry>, a| entries.get(a).is_some_and(|e| e.group == group);
        wanted
            .iter()
            .filter(|&address| !known(&self.entries, address) && !self.add(group, *address, now))
            .count()
    }

    /// Announces no address of `group` any more.
    pub fn stop(&mut self, group: u32) {
        self.remove(|entry, _| entry.group == group);
    }

    /// Somebody else was seen to claim `address`. Returns whether it will be announced once more because of that.
    pub fn foreign_claim(&mut self, address: IpAddr, now: BootTime) -> bool {
        let Some(entry) = self.entries.get_mut(&address) else { return false };
        if entry.last_claim.is_none_or(|last| now.since(last) >= DEFEND_INTERVAL) {
            entry.defences = 0;
        }
        let gap = if entry.defences < FAST_DEFENCES { REPEAT } else { DEFEND_INTERVAL };
        entry.last_claim = Some(now);
        let at = entry.last_sent.map_or(now, |last| last.after(gap)).max(now);
        // It may be due before that anyway: that one is the defence.
        if at < entry.next {
            entry.defences = entry.defences.saturating_add(1);
            self.reschedule(address, at);
        }
        true
    }

    /// Appends what is to be sent at `now` to `out`, at most [`MAX_FRAMES_PER_CALL`] frames, and counts it as sent.
    pub fn due(&mut self, now: BootTime, out: &mut Vec<Announcement>) {
        if now < self.paced_until {
            return;
        }
        let full = out.len() + MAX_FRAMES_PER_CALL;
        while let Some(&(at, address)) = self.queue.first() {
            if at > now {
                return;
            }
            let forms: &[Form] = match address {
                IpAddr::V4(_) => &[Form::ArpRequest, Form::ArpReply],
                IpAddr::V6(_) => &[Form::NeighbourAdvertisement],
            };
            if out.len() + forms.len() > full {
                self.paced_until = now.after(PACE);
                return;
            }
            let Some(entry) = self.entries.get_mut(&address) else {
                self.queue.pop_first();
                continue;
            };
            out.extend(forms.iter().map(|&form| Announcement { group: entry.group, address, form }));
            entry.last_sent = Some(now);
            entry.fast_left = entry.fast_left.saturating_sub(1);
            // From now, not from when it was due: late ones stay apart too.
            let next = now.after(if entry.fast_left > 0 { REPEAT } else { REFRESH });
            self.reschedule(address, next);
        }
    }

    /// When [`due`](Self::due) has something next; none without addresses.
    pub fn next_deadline(&self) -> Option<BootTime> {
        self.queue.first().map(|&(at, _)| at.max(self.paced_until))
    }

    /// Addresses that are announced.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no address is announced.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn add(&mut self, group: u32, address: IpAddr, now: BootTime) -> bool {
        if let Some(old) = self.entries.remove(&address) {
            self.queue.remove(&(old.next, address));
        } else if self.entries.len() >= MAX_ADDRESSES {
            return false;
        }
        let fast_left = if address.is_ipv4() { FAST_SENDS_V4 } else { FAST_SENDS_V6 };
        let entry = Entry { group, next: now, last_sent: None, fast_left, last_claim: None, defences: 0 };
        self.entries.insert(address, entry);
        self.queue.insert((now, address));
        true
    }

    fn remove(&mut self, which: impl Fn(&Entry, &IpAddr) -> bool) {
        let queue = &mut self.queue;
        self.entries.retain(|address, entry| {
            let gone = which(entry, address);
            if gone {
                queue.remove(&(entry.next, *address));
            }
            !gone
        });
    }

    fn reschedule(&mut self, address: IpAddr, at: BootTime) {
        if let Some(entry) = self.entries.get_mut(&address) {
            self.queue.remove(&(entry.next, address));
            entry.next = at;
            self.queue.insert((at, address));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: Mac = [0x02, 0, 0, 0, 0, 0x01];

    fn v4(n: u32) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from_bits(0xc000_0200 + n))
    }

    fn v6(n: u16) -> IpAddr {
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n))
    }

    fn ms(ms: u64) -> BootTime {
        BootTime(1_000_000_000_000).after(Duration::from_millis(ms))
    }

    /// Jumps from deadline to deadline until `end`; what was sent when, in ms.
    fn run(announcer: &mut Announcer, end: u64) -> Vec<(u64, Announcement)> {
        let mut sent = Vec::new();
        while let Some(now) = announcer.next_deadline().filter(|at| *at <= ms(end)) {
            let mut out = Vec::new();
            announcer.due(now, &mut out);
            assert!(out.len() <= MAX_FRAMES_PER_CALL);
            sent.extend(out.into_iter().map(|a| (now.since(ms(0)).as_millis() as u64, a)));
        }
        sent
    }

    fn times(sent: &[(u64, Announcement)], form: Form) -> Vec<u64> {
        sent.iter().filter(|(_, a)| a.form == form).map(|(at, _)| *at).collect()
    }

    #[test]
    fn at_once_then_repeated_then_refreshed() {
        let mut announcer = Announcer::new();
        assert_eq!(announcer.start(7, [v4(100), v6(100)], ms(0)), 0);
        let sent = run(&mut announcer, 130_000);
        let arp = [0, 1100, 2200, 3300, 4400, 5500, 65_500, 125_500];
        assert_eq!(times(&sent, Form::ArpRequest), arp);
        assert_eq!(times(&sent, Form::ArpReply), arp);
        assert_eq!(times(&sent, Form::NeighbourAdvertisement), [0, 1100, 2200, 62_200, 122_200]);
        assert!(sent.iter().all(|(_, a)| a.group == 7));
    }

    #[test]
    fn a_stopped_group_is_silent_and_others_are_not() {
        let mut announcer = Announcer::new();
        announcer.start(1, [v4(1), v4(2)], ms(0));
        announcer.start(2, [v4(3)], ms(0));
        announcer.stop(1);
        assert!(run(&mut announcer, 10_000).iter().all(|(_, a)| a.group == 2));
        announcer.stop(2);
        assert!(announcer.is_empty());
        assert_eq!(announcer.next_deadline(), None);
    }

    #[test]
    fn an_update_announces_what_is_new_and_drops_what_is_gone() {
        let mut announcer = Announcer::new();
        announcer.start(1, [v4(1), v4(2)], ms(0));
        run(&mut announcer, 20_000);
        announcer.update(1, [v4(2), v4(3)], ms(20_000));
        let sent = run(&mut announcer, 24_000);
        assert!(sent.iter().all(|(_, a)| a.address == v4(3)));
        assert_eq!(times(&sent, Form::ArpRequest), [20_000, 21_100, 22_200, 23_300]);
        assert_eq!(announcer.len(), 2);
    }

    #[test]
    fn a_foreign_claim_is_answered_at_once_but_not_in_a_rush() {
        let mut announcer = Announcer::new();
        announcer.start(1, [v4(1)], ms(0));
        run(&mut announcer, 10_000);
        assert!(announcer.foreign_claim(v4(1), ms(10_000)));
        assert_eq!(times(&run(&mut announcer, 10_000), Form::ArpRequest), [10_000]);
        assert!(announcer.foreign_claim(v4(1), ms(10_100)));
        assert!(announcer.foreign_claim(v4(1), ms(10_200)));
        assert_eq!(times(&run(&mut announcer, 12_000), Form::ArpRequest), [11_100]);
        assert!(!announcer.foreign_claim(v4(9), ms(10_000)), "not ours");
    }

    #[test]
    fn two_stations_that_insist_do_not_flood() {
        let mut announcer = Announcer::new();
        announcer.start(1, [v4(1)], ms(0));
        run(&mut announcer, 10_000);
        let mut sent = Vec::new();
        for at in (10_000..70_000).step_by(100) {
            announcer.foreign_claim(v4(1), ms(at));
            sent.extend(times(&run(&mut announcer, at), Form::ArpRequest));
        }
        // Five defences in about 5 s, then one each 10 s.
        assert!((9..=12).contains(&sent.len()), "{sent:?}");
        // The other gives up: the next incident is answered at once again.
        run(&mut announcer, 200_000);
        announcer.foreign_claim(v4(1), ms(200_000));
        assert!(times(&run(&mut announcer, 200_000), Form::ArpRequest).contains(&200_000));
    }

    #[test]
    fn many_addresses_are_paced() {
        let mut announcer = Announcer::new();
        announcer.start(1, (0..300).map(v4), ms(0));
        let sent = run(&mut announcer, 1000);
        assert_eq!(sent.len(), 600);
        assert_eq!(sent.last().unwrap().0, 90);
    }

    #[test]
    fn addresses_are_bounded() {
        let mut announcer = Announcer::new();
        let many = MAX_ADDRESSES as u32 + 5;
        assert_eq!(announcer.start(1, (0..many).map(v4), ms(0)), 5);
        assert_eq!(announcer.len(), MAX_ADDRESSES);
    }

    #[test]
    fn the_frames() {
        let Ok(vip) = "192.0.2.100".parse::<Ipv4Addr>() else { unreachable!() };
        let form = |form| Announcement { group: 1, address: vip.into(), form }.frame(MAC, false);
        let head = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4];
        let request =
            [&head[..], &[0, 1, 2, 0, 0, 0, 0, 1, 192, 0, 2, 100, 0, 0, 0, 0, 0, 0, 192, 0, 2, 100]];
        let reply = [&head[..], &[0, 2, 2, 0, 0, 0, 0, 1, 192, 0, 2, 100, 2, 0, 0, 0, 0, 1, 192, 0, 2, 100]];
        assert_eq!(form(Form::ArpRequest), request.concat());
        assert_eq!(form(Form::ArpReply), reply.concat());

        let na = Announcement { group: 1, address: v6(0x100), form: Form::NeighbourAdvertisement };
        let frame = na.frame(MAC, true);
        assert_eq!(
            crate::wire::Pretty(&frame).to_string(),
            "02:00:00:00:00:01 > 33:33:00:00:00:01, IP6 2001:db8::100 > ff02::1: \
             NDP 2001:db8::100 is-at 02:00:00:00:00:01 [router, override]"
        );
        assert_eq!(frame.len(), 86);
    }

    proptest! {
        #[test]
        fn no_address_is_announced_twice_within_the_repeat_time(
            claims in proptest::collection::vec((0u64..20_000, 0u32..4), 0..200),
        ) {
            let mut announcer = Announcer::new();
            announcer.start(1, (0..4).map(v4), ms(0));
            let mut claims = claims;
            claims.sort_unstable();
            let mut last = BTreeMap::new();
            let mut check = |sent: Vec<(u64, Announcement)>| {
                for (at, a) in sent.into_iter().filter(|(_, a)| a.form == Form::ArpRequest) {
                    if let Some(before) = last.insert(a.address, at) {
                        prop_assert!(at - before >= 1100, "{} at {} and {}", a.address, before, at);
                    }
                }
                Ok(())
            };
            for (at, who) in claims {
                check(run(&mut announcer, at))?;
                announcer.foreign_claim(v4(who), ms(at));
            }
            check(run(&mut announcer, 30_000))?;
        }
    }
}
