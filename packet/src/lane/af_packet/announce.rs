//! Announcements under way: one schedule for each port, fed by the plan, the node and what is seen on the wire.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use super::command::Shared;
use crate::announce::{Announcement, Announcer};
use crate::engine::{Claim, Fence, OwnedAddress, Permission, Port};
use crate::lease::LeaseBoard;
use crate::plan::MAX_GROUPS;
use crate::time::BootTime;

const PORTS: [Port; Port::COUNT] = [Port::Service, Port::Inside];
/// Time between two messages about foreign claims.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// Schedules and what they need to know.
#[derive(Debug, Default)]
pub struct Announcements {
    schedules: [Announcer; Port::COUNT],
    /// Addresses under the plan in force, by group and port.
    addresses: BTreeMap<u32, [Vec<IpAddr>; Port::COUNT]>,
    /// Addresses that are next hops for others.
    routers: HashSet<IpAddr>,
    /// Groups whose announcement was asked for.
    started: HashSet<u32>,
    due: Vec<Announcement>,
    sent: u64,
    complained_at: Option<BootTime>,
}

impl Announcements {
    /// Announcements made since start.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Takes over the addresses of a new plan. A group under way goes on with those that are left, and begins with those
    /// that are new.
    pub fn set_addresses(&mut self, owned: Vec<OwnedAddress>, routers: HashSet<IpAddr>, now: BootTime) {
        self.routers = routers;
        self.addresses.clear();
        for o in owned {
            let lists = self.addresses.entry(o.group).or_default();
            for port in PORTS.into_iter().filter(|p| o.port.is_none_or(|only| only == *p)) {
                lists[port as usize].push(o.address);
            }
        }
        let addresses = &self.addresses;
        let schedules = &mut self.schedules;
        self.started.retain(|group| {
            let lists = addresses.get(group);
            for (p, schedule) in schedules.iter_mut().enumerate() {
                schedule.update(*group, lists.map(|l| l[p].clone()).unwrap_or_default(), now);
            }
            lists.is_some()
        });
    }

    /// Starts what was asked for.
    pub fn take_requests(&mut self, shared: &Shared, now: BootTime) {
        shared.take_announcements(|cell| {
            for (group, lists) in &self.addresses {
                if *group as usize % MAX_GROUPS != cell {
                    continue;
                }
                self.started.insert(*group);
                for (p, schedule) in self.schedules.iter_mut().enumerate() {
                    let left_out = schedule.start(*group, lists[p].iter().copied(), now);
                    if left_out > 0 {
                        tracing::warn!(
                            group,
                            addresses = left_out,
                            "too many addresses to announce them all"
                        );
                    }
                }
            }
        });
    }

    /// Somebody else claims an address of ours: it is announced again.
    pub fn defend(&mut self, claim: &Claim, now: BootTime) {
        let again = self.schedules[claim.port as usize].foreign_claim(claim.address, now);
        if self.complained_at.is_none_or(|t| now.since(t) >= COMPLAIN_EVERY) {
            self.complained_at = Some(now);
            let [a, b, c, d, e, f] = claim.mac;
            tracing::warn!(
                address = %claim.address,
                mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"),
                announced_again = again,
                "another station claims an address that this node holds the lease for"
            );
        }
    }

    /// Hands out the frames that are due. Those without a lease are skipped, and their schedule goes on: a lease that was
    /// lost for a moment and came back under the same epoch is not announced anew by the node.
    pub fn due(
        &mut self,
        now: BootTime,
        leases: &LeaseBoard,
        mac: impl Fn(Port) -> Option<[u8; 6]>,
        mut send: impl FnMut(Port, Fence, Vec<u8>),
    ) {
        for port in PORTS {
            let schedule = &mut self.schedules[port as usize];
            if schedule.next_deadline().is_none_or(|t| t > now) {
                continue;
            }
            let Some(mac) = mac(port) else { continue };
            schedule.due(now, &mut self.due);
            for announcement in self.due.drain(..) {
                let fence = Fence { group: announcement.group, permission: Permission::Answer };
                if fence.is_open(leases, now) {
                    self.sent += 1;
                    send(port, fence, announcement.frame(mac, self.routers.contains(&announcement.address)));
                }
            }
        }
    }

    /// When [`Announcements::due`] has something next.
    pub fn next_deadline(&self) -> Option<BootTime> {
        self.schedules.iter().filter_map(Announcer::next_deadline).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Lease;
    use nix::sys::eventfd::EventFd;

    fn ip(s: &str) -> IpAddr {
        s.parse().unwrap()
    }

    fn at(ms: u64) -> BootTime {
        BootTime(ms * 1_000_000)
    }

    struct Bench {
        announcements: Announcements,
        shared: Shared,
    }

    impl Bench {
        fn new() -> Bench {
            let mut announcements = Announcements::default();
            announcements.set_addresses(
                vec![
                    OwnedAddress { group: 7, address: ip("192.0.2.100"), port: Some(Port::Service) },
                    OwnedAddress { group: 7, address: ip("10.0.0.100"), port: Some(Port::Inside) },
                    OwnedAddress { group: 8, address: ip("192.0.2.101"), port: None },
                ],
                HashSet::from([ip("10.0.0.100")]),
                at(0),
            );
            Bench { announcements, shared: Shared::new(EventFd::new().unwrap(), std::sync::Arc::default()) }
        }

        fn lease(&self, group: u32, until: BootTime) {
            self.shared.leases.set(group, Lease { epoch: 1, answer_until: until, forward_until: until });
        }

        fn frames(&mut self, now: BootTime) -> Vec<(Port, u32)> {
            let mut out = Vec::new();
            let leases = &self.shared.leases;
            self.announcements.due(
                now,
                leases,
                |_| Some([2; 6]),
                |port, fence, _| out.push((port, fence.group)),
            );
            out
        }
    }

    #[test]
    fn a_group_is_announced_on_the_ports_of_its_addresses_once_asked_for() {
        let mut b = Bench::new();
        b.lease(7, at(100_000));
        b.lease(8, at(100_000));
        assert_eq!(b.frames(at(1)), []);
        b.shared.request_announcement(7);
        b.announcements.take_requests(&b.shared, at(1));
        // Request form and reply form each.
        assert_eq!(
            b.frames(at(1)),
            [(Port::Service, 7), (Port::Service, 7), (Port::Inside, 7), (Port::Inside, 7)]
        );
        b.shared.request_announcement(8);
        b.announcements.take_requests(&b.shared, at(2));
        assert_eq!(b.frames(at(2)).len(), 4);
    }

    #[test]
    fn without_a_lease_nothing_is_announced_and_with_it_again_the_schedule_goes_on() {
        let mut b = Bench::new();
        b.lease(7, at(1000));
        b.shared.request_announcement(7);
        b.announcements.take_requests(&b.shared, at(1));
        assert_eq!(b.frames(at(1)).len(), 4);
        assert_eq!(b.frames(at(1500)), []);
        b.lease(7, at(100_000));
        assert_eq!(b.frames(at(3000)).len(), 4);
    }

    #[test]
    fn what_the_plan_no_longer_holds_is_no_longer_announced() {
        let mut b = Bench::new();
        b.lease(7, at(100_000));
        b.shared.request_announcement(7);
        b.announcements.take_requests(&b.shared, at(1));
        b.announcements.set_addresses(
            vec![OwnedAddress { group: 7, address: ip("192.0.2.100"), port: Some(Port::Service) }],
            HashSet::new(),
            at(2),
        );
        assert!(b.frames(at(10_000)).iter().all(|(port, _)| *port == Port::Service));
        b.announcements.set_addresses(vec![], HashSet::new(), at(10_001));
        assert_eq!(b.announcements.next_deadline(), None);
    }
}
