//! Frames that wait until the kernel has resolved their next hop.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::engine::{Fence, Port};
use crate::time::BootTime;

/// Frames that wait for one next hop: what arrives before the kernel has resolved it. A new owner has to resolve the clients
/// on its segment, and on a busy machine that took 85 ms, in which 53 of the datagrams that came one a millisecond were lost
/// while 32 could wait.
pub const MAX_FRAMES_PER_HOP: usize = 256;
/// Next hops that are waited for at once. More are a scan of unused addresses.
pub const MAX_HOPS: usize = 256;
/// Bytes that wait in all: a frame may be a 64 KiB super-frame.
pub const MAX_BYTES: usize = 8 << 20;
/// A neighbour that has not answered by then will not: the kernel gives up after three tries, one a second
/// (`net.ipv4.neigh.*.{mcast_solicit,retrans_time_ms}`).
pub const PATIENCE: Duration = Duration::from_secs(3);
/// Time after which the kernel is asked again, should it have forgotten or refused.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// A frame that waits.
#[derive(Debug, PartialEq, Eq)]
pub struct Parked {
    /// Virtio-net header and frame; the first six bytes of the frame are to be the neighbour's address.
    pub bytes: Vec<u8>,
    /// Lease under which it leaves.
    pub fence: Fence,
}

/// All that wait.
#[derive(Debug, Default)]
pub struct Park {
    hops: HashMap<(Port, IpAddr), Waiting>,
    bytes: usize,
}

#[derive(Debug)]
struct Waiting {
    frames: VecDeque<(BootTime, Parked)>,
    ask_at: BootTime,
}

impl Park {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.hops.is_empty()
    }

    /// Takes a frame in, if there is room; whether there was.
    pub fn add(&mut self, port: Port, next_hop: IpAddr, frame: Parked, now: BootTime) -> bool {
        let known = self.hops.contains_key(&(port, next_hop));
        if self.bytes + frame.bytes.len() > MAX_BYTES || (!known && self.hops.len() >= MAX_HOPS) {
            return false;
        }
        let hop = self
            .hops
            .entry((port, next_hop))
            .or_insert_with(|| Waiting { frames: VecDeque::new(), ask_at: now });
        if hop.frames.len() >= MAX_FRAMES_PER_HOP {
            return false;
        }
        self.bytes += frame.bytes.len();
        hop.frames.push_back((now, frame));
        true
    }

    /// Next hops that the kernel is to be asked for now.
    pub fn due(&mut self, now: BootTime) -> Vec<(Port, IpAddr)> {
        let mut due = Vec::new();
        for (key, hop) in &mut self.hops {
            if hop.ask_at <= now {
                hop.ask_at = now.after(ASK_AGAIN);
                due.push(*key);
            }
        }
        due
    }

    /// Takes out what waits for next hops that `resolve` knows now, in the order of arrival at each.
    pub fn release(
        &mut self,
        mut resolve: impl FnMut(Port, IpAddr) -> Option<[u8; 6]>,
        mut each: impl FnMut(Port, [u8; 6], Parked),
    ) {
        self.hops.retain(|(port, next_hop), hop| {
            let Some(mac) = resolve(*port, *next_hop) else { return true };
            for (_, frame) in hop.frames.drain(..) {
                self.bytes -= frame.bytes.len();
                each(*port, mac, frame);
            }
            false
        });
    }

    /// Drops what has waited too long; how many.
    pub fn expire(&mut self, now: BootTime) -> usize {
        let mut dropped = 0;
        self.hops.retain(|_, hop| {
            while let Some((since, frame)) = hop.frames.front()
                && since.after(PATIENCE) <= now
            {
                self.bytes -= frame.bytes.len();
                hop.frames.pop_front();
                dropped += 1;
            }
            !hop.frames.is_empty()
        });
        dropped
    }

    /// When [`Park::due`] or [`Park::expire`] has something to do next.
    pub fn next_deadline(&self) -> Option<BootTime> {
        self.hops
            .values()
            .flat_map(|hop| {
                let oldest = hop.frames.front().map(|(since, _)| since.after(PATIENCE));
                [Some(hop.ask_at), oldest]
            })
            .flatten()
            .min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Permission;

    const FENCE: Fence = Fence { group: 1, permission: Permission::Forward };

    fn frame(tag: u8) -> Parked {
        Parked { bytes: vec![tag; 100], fence: FENCE }
    }

    fn hop(i: usize) -> IpAddr {
        IpAddr::V4((0x0a00_0000 + i as u32).into())
    }

    fn at(ms: u64) -> BootTime {
        BootTime(ms * 1_000_000)
    }

    #[test]
    fn frames_leave_in_order_once_their_hop_is_known() {
        let mut park = Park::default();
        for tag in 0..3 {
            assert!(park.add(Port::Service, hop(1), frame(tag), at(0)));
        }
        assert!(park.add(Port::Service, hop(2), frame(9), at(0)));
        let mut out = Vec::new();
        park.release(|_, h| (h == hop(1)).then_some([7; 6]), |_, mac, f| out.push((mac, f.bytes[0])));
        assert_eq!(out, [([7; 6], 0), ([7; 6], 1), ([7; 6], 2)]);
        assert!(!park.is_empty());
    }

    #[test]
    fn the_kernel_is_asked_at_once_and_again_each_second() {
        let mut park = Park::default();
        park.add(Port::Inside, hop(1), frame(0), at(0));
        assert_eq!(park.due(at(0)), [(Port::Inside, hop(1))]);
        park.add(Port::Inside, hop(1), frame(0), at(10));
        assert_eq!(park.due(at(999)), []);
        assert_eq!(park.next_deadline(), Some(at(1000)));
        assert_eq!(park.due(at(1000)), [(Port::Inside, hop(1))]);
    }

    #[test]
    fn patience_ends() {
        let mut park = Park::default();
        park.add(Port::Service, hop(1), frame(0), at(0));
        park.add(Port::Service, hop(1), frame(1), at(500));
        assert_eq!(park.expire(at(2999)), 0);
        assert_eq!(park.expire(at(3000)), 1);
        assert_eq!(park.expire(at(3500)), 1);
        assert!(park.is_empty());
        assert_eq!(park.next_deadline(), None);
        assert_eq!(park.bytes, 0);
    }

    #[test]
    fn every_bound_holds() {
        let mut park = Park::default();
        let taken = (0..1000).filter(|_| park.add(Port::Service, hop(0), frame(0), at(0))).count();
        assert_eq!(taken, MAX_FRAMES_PER_HOP);
        let hops = (1..1000).filter(|i| park.add(Port::Service, hop(*i), frame(0), at(0))).count();
        assert_eq!(hops, MAX_HOPS - 1);

        let mut park = Park::default();
        let giant = || Parked { bytes: vec![0; 65_000], fence: FENCE };
        let taken = (0..1000).filter(|i| park.add(Port::Service, hop(i % 100), giant(), at(0))).count();
        assert_eq!(taken, MAX_BYTES / 65_000);
    }
}
