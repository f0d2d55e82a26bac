//! Why a frame was dropped: every reason has a name and a counter.

use crate::wire::Malformed;

/// Declares [`Reason`] with the word of each, used alike in counters, `status` and metrics.
macro_rules! reasons {
    ($($(#[$meta:meta])* $variant:ident = $word:literal),+ $(,)?) => {
        /// Why a frame was dropped. The order is that of the counters; new reasons go to the end of their part.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Reason { $($(#[$meta])* $variant),+ }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant),+];

            /// The word used in counters, `status` and metrics.
            pub fn as_str(self) -> &'static str {
                match self { $(Reason::$variant => $word),+ }
            }
        }
    };
}

reasons! {
    /// The node holds no lease for the VIP group that the frame belongs to.
    NoLease = "no_lease",
    /// TCP or UDP to one of our addresses, but to no virtual service.
    NoService = "no_service",
    /// The service has no backend that may take the flow.
    NoBackend = "no_backend",
    /// The flow's backend is dead and the dead-backend policy says to drop.
    DeadBackend = "dead_backend",
    /// An answer to a SNAT address that belongs to no flow.
    NoBinding = "no_binding",
    /// No free SNAT port was found for a new flow.
    NoSnatPort = "no_snat_port",
    /// The flow must be remembered and the flow table is full of established flows.
    FlowTableFull = "flow_table_full",
    /// The flow must be remembered and more new flows came than may be remembered each second.
    FlowRate = "flow_rate",
    /// The kernel has no route to the next destination.
    NoRoute = "no_route",
    /// `dsr` to a backend that is not on the segment: its frames can't be addressed by MAC.
    OffLink = "off_link",
    /// TTL or hop limit used up (NAT modes route; RFC 1812 §5.3.1, RFC 8200 §3).
    TtlExceeded = "ttl_exceeded",
    /// Larger than the next link's MTU; the sender is told by ICMP.
    TooBig = "too_big",
    /// A later fragment whose first fragment has not been seen, or too long ago.
    FragmentBeforeFirst = "fragment_before_first",
    /// [`Malformed::Truncated`]
    Truncated = "truncated",
    /// [`Malformed::BadVersion`]
    BadVersion = "bad_version",
    /// [`Malformed::BadHeaderLength`]
    BadHeaderLength = "bad_header_length",
    /// [`Malformed::BadTotalLength`]
    BadTotalLength = "bad_total_length",
    /// [`Malformed::BadHeaderChecksum`]
    BadHeaderChecksum = "bad_header_checksum",
    /// [`Malformed::BadFragment`]
    BadFragment = "bad_fragment",
    /// [`Malformed::TinyFragment`]
    TinyFragment = "tiny_fragment",
    /// [`Malformed::TooManyExtensions`]
    TooManyExtensions = "too_many_extensions",
    /// [`Malformed::SourceRouted`]
    SourceRouted = "source_routed",
    /// [`Malformed::Jumbogram`]
    Jumbogram = "jumbogram",
    /// [`Malformed::BadUdpLength`]
    BadUdpLength = "bad_udp_length",
    /// [`Malformed::BadField`]
    BadField = "bad_field",
    /// [`Malformed::BadChecksum`]
    BadChecksum = "bad_checksum",
    /// Offload metadata that contradicts the frame.
    BadOffload = "bad_offload",
    /// To one of our IP addresses in a broadcast or multicast frame (RFC 1122 §3.3.6).
    LinkBroadcast = "link_broadcast",
    /// A protocol that is not balanced, to one of our addresses.
    Protocol = "protocol",
    /// An ICMP error about a packet that belongs to no flow of ours.
    IcmpUnmatched = "icmp_unmatched",
    /// An ICMP message of a kind that is neither answered nor delivered, to one of our addresses.
    IcmpUnsupported = "icmp_unsupported",
    /// A VLAN-tagged frame that would leave by another port.
    Vlan = "vlan",
    /// An answer was due (RST, ICMP), and more were due than may be sent each second.
    AnswerRate = "answer_rate",
    /// Counted by the lane: too many frames wait for a neighbour to be resolved.
    NeighbourQueue = "neighbour_queue",
    /// Counted by the lane: the neighbour did not answer in time.
    NeighbourUnresolved = "neighbour_unresolved",
    /// Counted by the lane: the lease ended between decision and sending.
    LeaseEnded = "lease_ended",
    /// Counted by the lane: the interface took no more frames, or refused this one.
    Send = "send",
}

impl From<Malformed> for Reason {
    fn from(malformed: Malformed) -> Reason {
        match malformed {
            Malformed::Truncated => Reason::Truncated,
            Malformed::BadVersion => Reason::BadVersion,
            Malformed::BadHeaderLength => Reason::BadHeaderLength,
            Malformed::BadTotalLength => Reason::BadTotalLength,
            Malformed::BadHeaderChecksum => Reason::BadHeaderChecksum,
            Malformed::BadFragment => Reason::BadFragment,
            Malformed::TinyFragment => Reason::TinyFragment,
            Malformed::TooManyExtensions => Reason::TooManyExtensions,
            Malformed::SourceRouted => Reason::SourceRouted,
            Malformed::Jumbogram => Reason::Jumbogram,
            Malformed::BadUdpLength => Reason::BadUdpLength,
            Malformed::BadField => Reason::BadField,
            Malformed::BadChecksum => Reason::BadChecksum,
        }
    }
}

/// One counter for each [`Reason`].
#[derive(Clone, Debug)]
pub struct Drops([u64; Reason::ALL.len()]);

impl Default for Drops {
    fn default() -> Self {
        Drops([0; Reason::ALL.len()])
    }
}

impl Drops {
    /// Counts one frame.
    pub fn count(&mut self, reason: Reason) {
        self.0[reason as usize] += 1;
    }

    /// Frames counted for `reason`.
    pub fn get(&self, reason: Reason) -> u64 {
        self.0[reason as usize]
    }

    /// Every reason with its count, in the order of [`Reason::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        Reason::ALL.iter().map(|&reason| (reason, self.get(reason)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_frame_is_counted_under_its_own_word() {
        for malformed in Malformed::ALL {
            assert_eq!(Reason::from(malformed).as_str(), malformed.as_str());
        }
    }

    #[test]
    fn each_reason_has_a_word_and_a_counter_of_its_own() {
        let mut words: Vec<_> = Reason::ALL.iter().map(|r| r.as_str()).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), Reason::ALL.len());

        let mut drops = Drops::default();
        drops.count(Reason::Send);
        drops.count(Reason::NoLease);
        drops.count(Reason::NoLease);
        assert_eq!(drops.iter().map(|(_, n)| n).sum::<u64>(), 3);
        assert_eq!((drops.get(Reason::NoLease), drops.get(Reason::Send)), (2, 1));
    }
}
