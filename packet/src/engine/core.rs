//! From frame to verdict: the first fork of the way.
//!
//! ```text
//! frame ─┬─ not to our MAC, not IP or ARP ────────────────────────────────▶ NotOurs
//!        ├─ ARP, neighbour discovery ─────────────────────────────────────▶ arp_nd
//!        ├─ later fragment ───────────────────────────────────────────────▶ fragment
//!        ├─ TCP, UDP ─┬─ to a service ───────────── select, (nat) ────────▶ forward
//!        │            ├─ to a SNAT address ───────────────────────────────▶ nat (answer)
//!        │            └─ from a nat-transparent backend ──────────────────▶ nat (answer)
//!        ├─ ICMP ─┬─ echo request to an address of ours ──────────────────▶ icmp (reply)
//!        │        └─ error about a packet of a flow of ours ──────────────▶ icmp_error
//!        └─ anything else: dropped when to an address of ours, else NotOurs
//! ```

use std::collections::VecDeque;
use std::net::IpAddr;

use crate::drops::Reason;
use crate::flow::{FlowTable, Segment};
use crate::lease::LeaseBoard;
use crate::neighbour::{Mac, NextHop, NextHops};
use crate::plan::Protocol;
use crate::tables::Tables;
use crate::time::BootTime;
use crate::wire::{self, Dissected, Fragment, IpInfo, Malformed, Net, Transport, bytes, ethernet};

use super::beside::FlowCache;
use super::counters::{Event, Tally};
use super::fragment::Fragments;
use super::frame::{Fence, FrameMut, Gso, Permission, Port, PortConfig, Verdict};
use super::limit::Limit;
use super::share::FlowOutbox;
use super::state::States;
use super::{Claim, EngineConfig};

/// Answers about frames that were dropped (RST, ICMP errors), a second. RFC 1812 §4.3.2.8 and RFC 4443 §2.4 (f) ask for a
/// limit and name none; this one is far above what clients of a working service cause and far below what a flood would.
const ANSWERS_PER_SECOND: u32 = 1000;

/// Everything but the tables, so that both can be borrowed at once.
pub(crate) struct Core {
    pub(crate) ports: [Option<PortConfig>; Port::COUNT],
    pub(crate) states: States,
    pub(crate) flows: FlowTable,
    pub(crate) fragments: Fragments,
    pub(crate) tally: Tally,
    pub(crate) new_flows: Limit,
    pub(crate) answers: Limit,
    pub(crate) reply: Vec<u8>,
    pub(crate) claims: VecDeque<Claim>,
    pub(crate) cache: Option<Box<dyn FlowCache>>,
    pub(crate) outbox: Option<Box<dyn FlowOutbox>>,
    /// Flows told of before their other side was heard.
    pub(crate) told_early: Limit,
    /// Flows with a lower SNAT port whose backend was not heard yet.
    pub(crate) half_open: u32,
}

/// What is the same for every step of one frame.
#[derive(Clone, Copy)]
pub(crate) struct Cx<'a> {
    pub(crate) tables: &'a Tables,
    pub(crate) leases: &'a LeaseBoard,
    pub(crate) hops: &'a dyn NextHops,
    pub(crate) port_in: Port,
    pub(crate) now: BootTime,
}

impl Cx<'_> {
    pub(crate) fn may_forward(&self, group: u32) -> Result<Fence, Stop> {
        let fence = Fence { group, permission: Permission::Forward };
        if fence.is_open(self.leases, self.now) { Ok(fence) } else { Err(Stop::Drop(Reason::NoLease)) }
    }

    pub(crate) fn may_answer(&self, group: u32) -> Result<Fence, Stop> {
        let fence = Fence { group, permission: Permission::Answer };
        if fence.is_open(self.leases, self.now) { Ok(fence) } else { Err(Stop::Drop(Reason::NoLease)) }
    }
}

/// Why a frame is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Not for the lane.
    NotOurs,
    /// Dropped in silence.
    Drop(Reason),
    /// Dropped, and its client gets an RST.
    Reset(Fence),
    /// Dropped, and its sender is told, from `from`.
    Error(Fence, IpAddr, IcmpError),
}

/// An ICMP error of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IcmpError {
    TtlExceeded,
    TooBig { mtu: u32 },
}

impl From<Reason> for Stop {
    fn from(reason: Reason) -> Stop {
        Stop::Drop(reason)
    }
}

impl From<Malformed> for Stop {
    fn from(malformed: Malformed) -> Stop {
        Stop::Drop(malformed.into())
    }
}

/// Where a frame leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) port: Port,
    pub(crate) next_hop: IpAddr,
    mac: Option<Mac>,
    pub(crate) mtu: u32,
}

impl Core {
    pub(crate) fn new(config: EngineConfig) -> Core {
        Core {
            flows: FlowTable::new(config.max_flows.min(super::MAX_FLOWS), config.seed),
            new_flows: Limit::new(config.new_flows_per_second),
            ports: [Some(config.service), config.inside],
            states: States::default(),
            fragments: Fragments::new(),
            tally: Tally::default(),
            answers: Limit::new(ANSWERS_PER_SECOND),
            reply: Vec::with_capacity(super::answer::REPLY_CAPACITY),
            claims: VecDeque::with_capacity(super::MAX_CLAIMS),
            cache: None,
            outbox: None,
            told_early: Limit::new(super::share::TOLD_EARLY_PER_SECOND),
            half_open: 0,
        }
    }

    /// Decides, rewrites, and counts the frame once.
    pub(crate) fn process(&mut self, cx: &Cx<'_>, frame: &mut FrameMut<'_>) -> Verdict {
        let stop = match wire::dissect(frame.bytes) {
            Ok(dissected) => match self.dispatch(cx, frame, &dissected) {
                Ok(verdict) => return verdict,
                Err(Stop::Reset(fence)) => self.send_reset(cx, frame, &dissected, fence),
                Err(Stop::Error(fence, from, error)) => {
                    return self.send_error(cx, frame, &dissected, fence, from, error);
                }
                Err(stop) => Err(stop),
            },
            Err(malformed) => Err(self.unusable(cx, frame, malformed)),
        };
        match stop {
            Ok(verdict) => verdict,
            Err(Stop::Drop(reason)) => {
                self.tally.drop(reason);
                Verdict::Drop(reason)
            }
            Err(_) => {
                self.tally.event(Event::NotOurs);
                Verdict::NotOurs
            }
        }
    }

    fn dispatch(&mut self, cx: &Cx<'_>, frame: &mut FrameMut<'_>, d: &Dissected) -> Result<Verdict, Stop> {
        let Some(port) = &self.ports[cx.port_in as usize] else { return Err(Stop::NotOurs) };
        let (own, to_us) = (port.mac, d.dst == port.mac);
        let to_many = ethernet::is_multicast(d.dst);
        if !to_us && !to_many {
            return Err(Stop::NotOurs);
        }
        let ip = match &d.net {
            Net::Ip(ip) => ip,
            Net::Arp => return self.arp(cx, frame.bytes, d, own),
            Net::Other => return Err(Stop::NotOurs),
        };
        if let Transport::Icmpv6 { kind, .. } = ip.transport
            && super::arp_nd::is_discovery(kind)
        {
            return self.discovery(cx, frame.bytes, d, ip, own);
        }
        if to_many {
            let ours = cx.tables.owned(ip.dst).is_some();
            return Err(if ours { Reason::LinkBroadcast.into() } else { Stop::NotOurs });
        }
        match ip.transport {
            Transport::Tcp { src_port, dst_port, flags, .. } => {
                let segment = Segment::from_tcp_flags(flags.0);
                self.ports_known(cx, frame, d, ip, Protocol::Tcp, (src_port, dst_port), segment)
            }
            Transport::Udp { src_port, dst_port } => {
                self.ports_known(cx, frame, d, ip, Protocol::Udp, (src_port, dst_port), Segment::Udp)
            }
            Transport::Icmp { kind, .. } | Transport::Icmpv6 { kind, .. } => {
                self.icmp(cx, frame, d, ip, kind)
            }
            Transport::None => self.later_fragment(cx, frame, d, ip),
            Transport::Other => {
                Err(if cx.tables.owned(ip.dst).is_some() { Reason::Protocol.into() } else { Stop::NotOurs })
            }
        }
    }

    /// TCP and UDP, the hot path.
    #[allow(clippy::too_many_arguments)]
    fn ports_known(
        &mut self,
        cx: &Cx<'_>,
        frame: &mut FrameMut<'_>,
        d: &Dissected,
        ip: &IpInfo,
        protocol: Protocol,
        (src_port, dst_port): (u16, u16),
        segment: Segment,
    ) -> Result<Verdict, Stop> {
        let t = cx.tables;
        if let Some(service) = t.service_at(ip.dst, dst_port, protocol) {
            return self.forward_request(cx, frame, d, ip, service, src_port, segment);
        }
        if let Some(owned) = t.owned(ip.dst) {
            if owned.snat {
                return self.answer_bound(cx, frame, d, ip, protocol, segment);
            }
            cx.may_forward(owned.group)?;
            return Err(Reason::NoService.into());
        }
        match t.transparent_backend(ip.src, src_port, protocol) {
            Some((service, backend)) if self.is_foreign(ip.dst) => {
                self.answer_transparent(cx, frame, d, ip, service, backend, segment)
            }
            _ => Err(Stop::NotOurs),
        }
    }

    /// A frame that can't be read. It is counted as dropped only when it was meant for an address of ours.
    fn unusable(&self, cx: &Cx<'_>, frame: &FrameMut<'_>, malformed: Malformed) -> Stop {
        let data = &*frame.bytes;
        let Some(port) = &self.ports[cx.port_in as usize] else { return Stop::NotOurs };
        let Ok((_, ethertype, l3)) = ethernet::Frame::new_checked(data).and_then(|f| f.tags()) else {
            return Stop::NotOurs;
        };
        let dst = match ethertype {
            ethernet::EtherType::IPV4 => IpAddr::from(bytes::array::<4>(data, l3 + 16)),
            ethernet::EtherType::IPV6 => IpAddr::from(bytes::array::<16>(data, l3 + 24)),
            _ => return Stop::NotOurs,
        };
        if bytes::array::<6>(data, 0) == port.mac && cx.tables.owned(dst).is_some() {
            malformed.into()
        } else {
            Stop::NotOurs
        }
    }

    /// Whether an address is neither the host's own nor one of many.
    pub(crate) fn is_foreign(&self, address: IpAddr) -> bool {
        let many = match address {
            IpAddr::V4(a) => a.is_broadcast() || a.is_multicast() || a.is_link_local() || a.is_unspecified(),
            IpAddr::V6(a) => a.is_multicast() || a.is_unicast_link_local() || a.is_unspecified(),
        };
        let own = self.ports.iter().flatten().flat_map(|p| &p.addresses).any(|&(own, _)| own == address);
        !many && !own && !address.is_loopback()
    }

    /// The way to `destination` for the frame that is being processed.
    #[inline]
    pub(crate) fn way(&self, cx: &Cx<'_>, d: &Dissected, destination: IpAddr) -> Result<Way, Reason> {
        let (port, next_hop, mac) = match cx.hops.lookup(destination) {
            NextHop::Resolved { port, next_hop, mac } => (port, next_hop, Some(mac)),
            NextHop::Unresolved { port, next_hop } => (port, next_hop, None),
            NextHop::NoRoute => return Err(Reason::NoRoute),
        };
        // A tag names a VLAN of the port that it came by.
        if port != cx.port_in && !d.vlan.is_empty() {
            return Err(Reason::Vlan);
        }
        let mtu = self.ports[port as usize].as_ref().ok_or(Reason::NoRoute)?.mtu;
        Ok(Way { port, next_hop, mac, mtu })
    }

    /// Addresses the rewritten frame and sends it on its way.
    #[inline]
    pub(crate) fn leave(&mut self, frame: &mut FrameMut<'_>, way: Way, fence: Fence) -> Verdict {
        let own = self.ports[way.port as usize].as_ref().map_or([0; 6], |p| p.mac);
        bytes::put(frame.bytes, 0, way.mac.unwrap_or([0; 6]));
        bytes::put(frame.bytes, 6, own);
        if way.mac.is_some() {
            Verdict::Forward { port: way.port, fence }
        } else {
            self.tally.event(Event::AwaitedNeighbour);
            Verdict::AwaitNeighbour { port: way.port, next_hop: way.next_hop, fence }
        }
    }
}

/// The largest packet that a frame becomes on the wire, how many there are, and their bytes of layer 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) largest: usize,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Size {
    /// Of the frame that is being processed.
    #[inline]
    pub(crate) fn of(frame: &FrameMut<'_>, ip: &IpInfo) -> Size {
        let len = ip.len();
        let whole = Size { largest: len, packets: 1, bytes: len as u64 };
        let segment = usize::from(frame.offload.gso_size);
        if frame.offload.gso == Gso::None || segment == 0 {
            return whole;
        }
        let header_len = match ip.transport {
            Transport::Tcp { header_len, .. } => header_len,
            Transport::Udp { .. } => wire::udp::HEADER_LEN,
            _ => return whole,
        };
        let headers = ip.l4 + header_len - ip.l3;
        let payload = len.saturating_sub(headers);
        if payload <= segment {
            return whole;
        }
        let packets = payload.div_ceil(segment);
        Size {
            largest: headers + segment,
            packets: packets as u64,
            bytes: (payload + packets * headers) as u64,
        }
    }
}

/// Whether the offload metadata goes with what the frame is. Checked before anything is rewritten by it.
pub(crate) fn check_offload(frame: &FrameMut<'_>, ip: &IpInfo) -> Result<(), Reason> {
    let offload = &frame.offload;
    if offload.needs_csum {
        let at = ip.checksum_at().ok_or(Reason::BadOffload)?;
        let start = usize::from(offload.csum_start);
        if start != ip.l4 || start + usize::from(offload.csum_offset) != at || ip.fragment != Fragment::Whole
        {
            return Err(Reason::BadOffload);
        }
    }
    let fits = match offload.gso {
        Gso::None => true,
        Gso::TcpV4 => !ip.is_v6() && matches!(ip.transport, Transport::Tcp { .. }),
        Gso::TcpV6 => ip.is_v6() && matches!(ip.transport, Transport::Tcp { .. }),
        Gso::UdpL4 => matches!(ip.transport, Transport::Udp { .. }),
    };
    if fits && (offload.gso == Gso::None || ip.fragment == Fragment::Whole) {
        Ok(())
    } else {
        Err(Reason::BadOffload)
    }
}
