//! Counters of what became of frames.

use crate::drops::{Drops, Reason};

/// Declares [`Event`] with the word of each.
macro_rules! events {
    ($($(#[$meta:meta])* $variant:ident = $word:literal),+ $(,)?) => {
        /// What happened, other than drops. The order is that of the counters.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Event { $($(#[$meta])* $variant),+ }

        impl Event {
            /// Every event, in the order of the counters.
            pub const ALL: &'static [Event] = &[$(Event::$variant),+];

            /// The word used in counters, `status` and metrics.
            pub fn as_str(self) -> &'static str {
                match self { $(Event::$variant => $word),+ }
            }
        }
    };
}

events! {
    /// Frame: not for the lane.
    NotOurs = "not_ours",
    /// Frame: forwarded to a backend.
    Forwarded = "forwarded",
    /// Frame: forwarded from a backend to a client.
    Returned = "returned",
    /// Frame: an ICMP error delivered to the end that it concerns.
    IcmpErrorForwarded = "icmp_error_forwarded",
    /// Frame: an ICMP echo request answered.
    EchoAnswered = "echo_answered",
    /// Frame: an ARP request answered.
    ArpAnswered = "arp_answered",
    /// Frame: a neighbour solicitation answered.
    NdAnswered = "nd_answered",
    /// Frame: a segment to a dead backend answered by RST.
    ResetSent = "reset_sent",
    /// Frame: somebody else claims an address of ours.
    ForeignClaim = "foreign_claim",
    /// Besides: an ICMP error was sent about a frame that was dropped.
    IcmpErrorSent = "icmp_error_sent",
    /// Besides: a frame was handed to the lane to wait for its neighbour.
    AwaitedNeighbour = "awaited_neighbour",
    /// Besides: a flow that nobody has confirmed yet was forgotten to make room.
    FlowEvicted = "flow_evicted",
    /// Besides: a frame was forwarded although its flow could not be remembered.
    FlowNotRemembered = "flow_not_remembered",
}

/// Counters of an engine, other than those of backends.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    drops: Drops,
    events: [u64; Event::ALL.len()],
}

impl Tally {
    pub(crate) fn drop(&mut self, reason: Reason) {
        self.drops.count(reason);
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.events[event as usize] += 1;
    }

    pub(crate) fn drops(&self) -> Vec<(&'static str, u64)> {
        self.drops.iter().map(|(reason, n)| (reason.as_str(), n)).collect()
    }

    pub(crate) fn events(&self) -> Vec<(&'static str, u64)> {
        Event::ALL.iter().map(|&event| (event.as_str(), self.events[event as usize])).collect()
    }
}
