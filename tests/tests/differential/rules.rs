//! What the program may leave to the engine. A program that leaves more fails, be the outcome the same or not.

use komainu_packet::drops::Reason;
use komainu_packet::engine::Verdict;
use komainu_packet::lane::kernel::abi::Up;
use komainu_packet::wire::{Fragment, IpInfo, Net, Transport, dissect};

/// What is known of a frame that went up.
pub struct Facts<'a> {
    /// The frame as it came.
    pub frame: &'a [u8],
    /// What became of it in the engine alone.
    pub verdict: Verdict,
    /// Counters of drops that the frame moved in the engine alone.
    pub dropped: Vec<Reason>,
    /// Whether the engine alone reported that somebody claims an address of ours.
    pub claimed: bool,
    /// Of a packet to a service or an answer from one's flow: whether its flow was remembered, and known to the program as steady.
    pub remembered: bool,
    /// Known to the program as steady.
    pub steady: bool,
    /// Every flow of its service is remembered, or its slot is in transition.
    pub must_be_remembered: bool,
    /// Its service has a dead backend, or a flow whose backend is gone.
    pub dead_backend: bool,
    /// The program keeps its flow's state.
    pub kept: bool,
    /// And the flow is closing.
    pub closing: bool,
    /// New flows of its service are made by the program.
    pub makes: bool,
    /// The way that it would take is not resolved, or there is none.
    pub unresolved: bool,
}

/// Whether the program was right to leave the frame to the engine for that reason.
pub fn may_go_up(up: Up, facts: &Facts<'_>) -> bool {
    let ip = match dissect(facts.frame).map(|d| d.net) {
        Ok(Net::Ip(ip)) => Some(ip),
        _ => None,
    };
    let ip = ip.as_ref();
    match up {
        Up::Malformed => ip.is_none(),
        Up::Fragment => !ip.is_some_and(|ip| ip.fragment == Fragment::Whole && !has_extras(facts.frame, ip)),
        Up::Options => ip.is_none_or(|ip| has_extras(facts.frame, ip)),
        Up::Icmp => {
            ip.is_none_or(|ip| matches!(ip.transport, Transport::Icmp { .. } | Transport::Icmpv6 { .. }))
        }
        Up::Vlan => dissect(facts.frame).is_ok_and(|d| !d.vlan.is_empty()),
        Up::Discovery => is_odd_discovery(facts),
        Up::Claim => facts.claimed,
        Up::Ttl => facts.dropped.contains(&Reason::TtlExceeded),
        Up::TooBig => facts.dropped.contains(&Reason::TooBig),
        Up::Neighbour => facts.unresolved,
        // Of a kept flow only the SYN that begins another one, where that is not made in the same place.
        Up::Segment => facts.remembered && !is_plain(ip) && (!facts.kept || facts.closing && opens(ip)),
        Up::Flow => facts.must_be_remembered && !facts.remembered && !(facts.makes && opens(ip)),
        Up::Unsteady => facts.remembered && !facts.steady && !facts.kept,
        Up::DeadBackend => facts.dead_backend,
        // How many there may be is looked at in the end.
        Up::Note => facts.kept || facts.makes,
        // There is room in this test, and a plan.
        Up::Room | Up::Unready => false,
    }
}

/// Options or extension headers.
fn has_extras(frame: &[u8], ip: &IpInfo) -> bool {
    let plain = if ip.is_v6() { 40 } else { 20 };
    ip.l4 - ip.l3 != plain || (ip.is_v6() && frame[ip.l3 + 6] != ip.proto)
}

fn is_plain(ip: Option<&IpInfo>) -> bool {
    match ip.map(|ip| &ip.transport) {
        Some(Transport::Tcp { flags, .. }) => !flags.fin() && !flags.rst() && !flags.opens(),
        _ => true,
    }
}

/// Whether a frame begins a flow where there is none.
pub fn begins(frame: &[u8]) -> bool {
    matches!(dissect(frame).map(|d| d.net), Ok(Net::Ip(ip)) if opens(Some(&ip)))
}

/// A SYN without RST, or a datagram.
fn opens(ip: Option<&IpInfo>) -> bool {
    match ip.map(|ip| &ip.transport) {
        Some(Transport::Tcp { flags, .. }) => flags.opens() && !flags.rst(),
        Some(Transport::Udp { .. }) => true,
        _ => false,
    }
}

/// Neighbour discovery and ARP other than a question that has one answer.
fn is_odd_discovery(facts: &Facts<'_>) -> bool {
    match dissect(facts.frame).map(|d| d.net) {
        // From a sender that can't be answered.
        Ok(Net::Arp) => matches!(facts.verdict, Verdict::Drop(Reason::BadField)),
        Ok(Net::Ip(ip)) => {
            let solicitation = matches!(ip.transport, Transport::Icmpv6 { kind: 135, .. });
            let from_nowhere = ip.src.is_unspecified();
            let one_option = ip.l4_len() == 32;
            !solicitation
                || from_nowhere
                || !one_option
                || facts.frame[ip.l4 + 24] != 1
                || ip.src.is_multicast()
                || facts.frame[ip.l4 + 26] & 1 != 0
                || facts.frame[ip.l4 + 26..ip.l4 + 32] == [0; 6]
                || matches!(facts.verdict, Verdict::Drop(_))
        }
        _ => true,
    }
}
