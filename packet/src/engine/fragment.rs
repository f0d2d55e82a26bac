//! Fragments follow their first fragment: its decision is remembered for a short while, in a table of fixed size.
//!
//! A later fragment that comes before the first is dropped (`fragment_before_first`); senders send the first one first.
//! Nothing is ever reassembled, so nothing can be made to wait or grow.

use std::net::IpAddr;
use std::time::Duration;

use crate::drops::Reason;
use crate::time::BootTime;
use crate::wire::{Dissected, Fragment, IpInfo, bytes};

use super::core::{Core, Cx, Size, Stop};
use super::counters::Event;
use super::frame::{FrameMut, Verdict};
use super::rewrite::{self, Ends};

/// Sets of the table. 1024 × 4 packets in flight at once: at 3 s each enough for more fragmented packets a second than
/// balanced services see, in 400 kB.
const SETS: usize = 1024;
/// Packets of one set; the oldest makes room.
const WAYS: usize = 4;
/// How long a first fragment is remembered. Its siblings follow at once or not at all; an identification of 16 bits may come
/// again within seconds (RFC 6864 §4), so longer would be wrong rather than generous.
const LIFETIME: Duration = Duration::from_secs(3);

/// Which packet a fragment belongs to (RFC 791 §3.2, RFC 8200 §4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    src: IpAddr,
    dst: IpAddr,
    id: u32,
    proto: u8,
}

/// Where the fragments of a packet go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// To a backend or a client.
    Forward {
        /// VIP group.
        group: u32,
        /// State of the backend and its life.
        backend: (u32, u32),
        /// From the client to the backend.
        to_backend: bool,
        /// Whether it is routed: one hop less.
        routed: bool,
        /// New addresses.
        src: Option<IpAddr>,
        dst: Option<IpAddr>,
        /// Where it goes.
        towards: IpAddr,
    },
    /// Back to the sender of an echo request.
    Echo {
        /// VIP group.
        group: u32,
    },
}

#[derive(Clone, Copy, Debug)]
struct Known {
    key: Key,
    until: BootTime,
    route: Route,
}

/// First fragments that were seen lately.
#[derive(Debug)]
pub(crate) struct Fragments {
    sets: Vec<[Option<Known>; WAYS]>,
}

impl Fragments {
    pub(crate) fn new() -> Fragments {
        Fragments { sets: Vec::new() }
    }

    fn set(&mut self, key: &Key) -> &mut [Option<Known>; WAYS] {
        // Most nodes never see a fragment: the table is made for the first.
        if self.sets.is_empty() {
            self.sets = vec![[None; WAYS]; SETS];
        }
        let fold = |a: IpAddr| match a {
            IpAddr::V4(a) => a.to_bits(),
            IpAddr::V6(a) => {
                let bits = a.to_bits();
                (bits ^ bits >> 32 ^ bits >> 64 ^ bits >> 96) as u32
            }
        };
        let hash = fold(key.src).rotate_left(7) ^ fold(key.dst) ^ key.id ^ u32::from(key.proto);
        &mut self.sets[(hash.wrapping_mul(0x9e37_79b1) >> 16) as usize % SETS]
    }

    fn insert(&mut self, key: Key, route: Route, now: BootTime) {
        let known = Known { key, until: now.after(LIFETIME), route };
        let set = self.set(&key);
        let place = set
            .iter()
            .position(|k| k.is_some_and(|k| k.key == key))
            .or_else(|| (0..WAYS).min_by_key(|&way| set[way].map_or(BootTime(0), |k| k.until)));
        if let Some(place) = place {
            set[place] = Some(known);
        }
    }

    fn find(&mut self, key: &Key, now: BootTime) -> Option<Route> {
        if self.sets.is_empty() {
            return None;
        }
        self.set(key).iter().flatten().find(|k| k.key == *key && now < k.until).map(|k| k.route)
    }
}

impl Core {
    /// Remembers where the fragments of a packet go, if `ip` is the first of them.
    #[inline]
    pub(crate) fn note_fragment(&mut self, ip: &IpInfo, now: BootTime, route: impl FnOnce(&Core) -> Route) {
        if let Fragment::First { id } = ip.fragment {
            let route = route(self);
            self.fragments.insert(Key { src: ip.src, dst: ip.dst, id, proto: ip.proto }, route, now);
        }
    }

    /// A fragment other than the first.
    pub(crate) fn later_fragment(
        &mut self,
        cx: &Cx<'_>,
        frame: &mut FrameMut<'_>,
        d: &Dissected,
        ip: &IpInfo,
    ) -> Result<Verdict, Stop> {
        let key = Key { src: ip.src, dst: ip.dst, id: ip.fragment.id().unwrap_or(0), proto: ip.proto };
        let Some(route) = self.fragments.find(&key, cx.now) else {
            let ours = cx.tables.owned(ip.dst).is_some()
                || cx.tables.is_transparent_backend(ip.src) && self.is_foreign(ip.dst);
            return Err(if ours { Reason::FragmentBeforeFirst.into() } else { Stop::NotOurs });
        };
        if frame.offload.needs_csum {
            return Err(Reason::BadOffload.into());
        }
        match route {
            Route::Echo { group } => {
                let fence = cx.may_forward(group)?;
                self.turn_around(frame.bytes, d, ip);
                self.tally.event(Event::EchoAnswered);
                Ok(Verdict::Forward { port: cx.port_in, fence })
            }
            Route::Forward { group, backend: (number, life), to_backend, routed, src, dst, towards } => {
                let fence = cx.may_forward(group)?;
                if routed && ip.ttl <= 1 {
                    return Err(Reason::TtlExceeded.into());
                }
                let way = self.way(cx, d, towards)?;
                if !routed && way.next_hop != towards {
                    return Err(Reason::OffLink.into());
                }
                let size = Size::of(frame, ip);
                if size.largest > way.mtu as usize {
                    return Err(Reason::TooBig.into());
                }
                let end = |address: Option<IpAddr>| address.map(|a| (a, 0));
                rewrite::rewrite(frame.bytes, ip, &frame.offload, Ends { src: end(src), dst: end(dst) });
                if routed {
                    rewrite::decrement_ttl(frame.bytes, ip);
                }
                self.count(number, life, size, to_backend);
                Ok(self.leave(frame, way, fence))
            }
        }
    }

    /// Counts a forwarded packet with its backend, if that still lives, and as an event.
    #[inline]
    pub(crate) fn count(&mut self, number: u32, life: u32, size: Size, to_backend: bool) {
        let state = self.states.backend_mut(number);
        if state.life == life {
            if to_backend {
                state.packets += size.packets;
                state.bytes += size.bytes;
            } else {
                state.return_packets += size.packets;
                state.return_bytes += size.bytes;
            }
        }
        self.tally.event(if to_backend { Event::Forwarded } else { Event::Returned });
    }

    /// Sends a packet back to where it came from: addresses and MACs exchanged, a fresh TTL.
    pub(crate) fn turn_around(&mut self, data: &mut [u8], d: &Dissected, ip: &IpInfo) {
        // Exchanging addresses changes no sum.
        let _ = rewrite::put_addresses(data, ip.l3, ip.is_v6(), Some(ip.dst), Some(ip.src));
        rewrite::set_ttl(data, ip, super::answer::TTL);
        bytes::put(data, 0, d.src);
        bytes::put(data, 6, d.dst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_fragments_grows_nothing_and_old_ones_are_not_found() {
        let mut fragments = Fragments::new();
        let key = |id| Key { src: [192, 0, 2, 1].into(), dst: [192, 0, 2, 2].into(), id, proto: 17 };
        for id in 0..100_000 {
            fragments.insert(key(id), Route::Echo { group: id }, BootTime(1));
        }
        assert_eq!(fragments.sets.len(), SETS);
        assert_eq!(fragments.find(&key(99_999), BootTime(2)), Some(Route::Echo { group: 99_999 }));
        assert_eq!(fragments.find(&key(99_999), BootTime(1).after(LIFETIME)), None);
        let kept = (0..100_000).filter(|&id| fragments.find(&key(id), BootTime(2)).is_some()).count();
        assert!(kept > SETS * WAYS / 2, "{kept}: ids spread over the sets");
    }
}
