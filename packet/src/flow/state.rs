//! The states of a flow, as far as a balancer sees them.
//!
//! ```text
//!            SYN                       second side heard             FIN                    FIN of the other side
//!   (none) ───────▶ SynSent ──────────────────────────▶ Established ─────▶ Closing ─────────────────────────────▶ Closed
//!     │                                                  ▲    │                                                     ▲
//!     └── segment of a flow older than what we know ─────┘    └── RST from either side, from any state ────────────┘
//! ```
//!
//! A segment after an RST takes the flow back to `Established`: the RST's sequence number is not checked here (the ends do,
//! RFC 5961 §3), so a forged one may shorten a flow's idle time but must not end a flow that goes on. After both FINs only
//! a SYN goes on, as a new flow.
//!
//! "Second side heard" means: where both directions pass (full NAT) a packet from the backend; where only the client's
//! direction does, a segment without SYN from the client. Until then the flow is *unassured* and makes room for others when
//! the table is full: so a SYN flood replaces itself and no established flow.

use std::time::Duration;

use crate::plan::Protocol;

/// Idle time of a flow of which only the SYN was seen. Longer than the pause before the fourth retransmission of a SYN
/// (1 + 2 + 4 + 8 s, RFC 6298 §5), after which most clients have given up.
pub const SYN_SENT_IDLE: Duration = Duration::from_secs(30);
/// Idle time after one side's FIN: the other side may still be sending. In `dsr` the backend's FIN is never seen, so every
/// flow ends with this wait and a drain waits for it.
pub const CLOSING_IDLE: Duration = Duration::from_secs(20);
/// Idle time after an RST or both FINs: for retransmissions of the last segments.
pub const CLOSED_IDLE: Duration = Duration::from_secs(5);

/// State of a remembered flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// TCP: only SYNs from the client so far.
    SynSent,
    /// TCP: segments pass.
    Established,
    /// TCP: one side has sent a FIN.
    Closing,
    /// TCP: RST, or both FINs.
    Closed,
    /// UDP.
    Udp,
}

impl State {
    /// The word used in `flows`.
    pub fn as_str(self) -> &'static str {
        match self {
            State::SynSent => "syn_sent",
            State::Established => "established",
            State::Closing | State::Closed => "closing",
            State::Udp => "udp",
        }
    }

    /// The one in a byte of [`Progress::to_bits`].
    pub(crate) fn of_bits(bits: u8) -> Option<State> {
        match bits & 7 {
            0 => Some(State::SynSent),
            1 => Some(State::Established),
            2 => Some(State::Closing),
            3 => Some(State::Closed),
            4 => Some(State::Udp),
            _ => None,
        }
    }

    /// How long a flow in this state may be silent. `idle` is the service's own setting for its protocol.
    pub fn idle(self, idle: Duration) -> Duration {
        match self {
            State::SynSent => SYN_SENT_IDLE.min(idle),
            State::Established | State::Udp => idle,
            State::Closing => CLOSING_IDLE.min(idle),
            State::Closed => CLOSED_IDLE.min(idle),
        }
    }
}

/// What a packet says about its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Segment {
    /// TCP with SYN and without ACK: opens a flow.
    Syn,
    /// TCP with FIN.
    Fin,
    /// TCP with RST.
    Rst,
    /// Any other TCP segment.
    Tcp,
    /// A UDP datagram.
    Udp,
}

impl Segment {
    /// From the flags of a TCP header (its byte 13, RFC 9293 §3.1). RST outranks SYN outranks FIN.
    pub fn from_tcp_flags(flags: u8) -> Segment {
        const FIN: u8 = 0x01;
        const SYN: u8 = 0x02;
        const RST: u8 = 0x04;
        const ACK: u8 = 0x10;
        if flags & RST != 0 {
            Segment::Rst
        } else if flags & (SYN | ACK) == SYN {
            Segment::Syn
        } else if flags & FIN != 0 {
            Segment::Fin
        } else {
            Segment::Tcp
        }
    }
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the client to the backend.
    ToBackend,
    /// From the backend to the client.
    ToClient,
}

/// State with the marks that lead on from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) state: State,
    /// Not evicted to make room.
    pub(crate) assured: bool,
    client_fin: bool,
    backend_fin: bool,
    /// Both directions pass here.
    two_way: bool,
    pub(crate) answered: bool,
}

impl Progress {
    /// A flow whose first packet seen is `first`, from the client.
    pub(crate) fn new(first: Segment, two_way: bool) -> Progress {
        let mut progress = Progress {
            state: State::Established,
            assured: false,
            client_fin: false,
            backend_fin: false,
            two_way,
            answered: false,
        };
        match first {
            Segment::Syn => progress.state = State::SynSent,
            Segment::Udp => progress.state = State::Udp,
            Segment::Tcp => {}
            Segment::Fin => {
                progress.client_fin = true;
                progress.state = State::Closing;
            }
            Segment::Rst => progress.state = State::Closed,
        }
        progress
    }

    /// Takes note of a packet. `Segment::Syn` does not reopen: the caller forgets the flow where [`Self::reopens`] says so.
    pub(crate) fn advance(&mut self, segment: Segment, direction: Direction) {
        if direction == Direction::ToClient {
            self.answered = true;
        }
        let confirmed = if self.two_way { self.answered } else { segment != Segment::Syn };
        match segment {
            Segment::Rst => self.state = State::Closed,
            Segment::Udp => {}
            Segment::Fin => {
                match direction {
                    Direction::ToBackend => self.client_fin = true,
                    Direction::ToClient => self.backend_fin = true,
                }
                self.state = if self.client_fin && self.backend_fin { State::Closed } else { State::Closing };
            }
            Segment::Syn => {}
            Segment::Tcp => match self.state {
                State::SynSent if confirmed && direction == Direction::ToBackend => {
                    self.state = State::Established;
                }
                State::Closed if !(self.client_fin && self.backend_fin) => {
                    self.state =
                        if self.client_fin || self.backend_fin { State::Closing } else { State::Established };
                }
                _ => {}
            },
        }
        self.assured = match self.state {
            State::Established => confirmed || self.assured,
            State::Udp => confirmed,
            State::SynSent | State::Closing | State::Closed => false,
        };
    }

    /// Whether a plain segment or datagram, from whichever side, leaves everything as it is.
    #[inline]
    pub(crate) fn is_steady(&self) -> bool {
        let plain = if self.state == State::Udp { Segment::Udp } else { Segment::Tcp };
        [Direction::ToBackend, Direction::ToClient].into_iter().all(|direction| {
            let mut after = *self;
            after.advance(plain, direction);
            // Where only one direction passes, an answer says nothing.
            after.answered = if self.two_way { after.answered } else { self.answered };
            after == *self
        })
    }

    /// Whether a SYN from the client begins a new flow of the same name.
    pub(crate) fn reopens(&self) -> bool {
        matches!(self.state, State::Closing | State::Closed)
    }

    /// All of it but what follows from the service, in a byte that means the same to every node.
    pub(crate) fn to_bits(self) -> u8 {
        let state = match self.state {
            State::SynSent => 0,
            State::Established => 1,
            State::Closing => 2,
            State::Closed => 3,
            State::Udp => 4,
        };
        state
            | u8::from(self.client_fin) << 3
            | u8::from(self.backend_fin) << 4
            | u8::from(self.answered) << 5
            | u8::from(self.assured) << 6
    }

    /// What [`Progress::to_bits`] has made, for a flow of `protocol`. `None`: it has made no such thing.
    pub(crate) fn from_bits(bits: u8, two_way: bool, protocol: Protocol) -> Option<Progress> {
        let state = State::of_bits(bits).filter(|s| (*s == State::Udp) == (protocol == Protocol::Udp))?;
        let bit = |n: u8| bits >> n & 1 != 0;
        let settled = matches!(state, State::Established | State::Udp);
        let sound = bits >> 7 == 0 && (!bit(6) || settled);
        sound.then_some(Progress {
            state,
            assured: bit(6),
            client_fin: bit(3),
            backend_fin: bit(4),
            two_way,
            answered: bit(5),
        })
    }
}

/// For whoever keeps the state of a TCP flow elsewhere, both of whose directions pass (`packet/bpf/state.h`): what the state that `bits` stand
/// for becomes by a segment, and of the state before that: is it steady, does a SYN begin a new flow? `None`: there is no such
/// state.
pub fn two_way_step(bits: u8, segment: Segment, direction: Direction) -> Option<(u8, bool, bool)> {
    let protocol = if segment == Segment::Udp { Protocol::Udp } else { Protocol::Tcp };
    let before = Progress::from_bits(bits, true, protocol)?;
    let mut after = before;
    after.advance(segment, direction);
    Some((after.to_bits(), before.is_steady(), before.reopens()))
}

#[cfg(test)]
mod tests {
    use super::*;

    use Direction::{ToBackend, ToClient};

    fn after(first: Segment, two_way: bool, rest: &[(Segment, Direction)]) -> Progress {
        let mut progress = Progress::new(first, two_way);
        for (segment, direction) in rest {
            progress.advance(*segment, *direction);
        }
        progress
    }

    #[test]
    fn flags_in_their_rank() {
        assert_eq!(Segment::from_tcp_flags(0x02), Segment::Syn);
        assert_eq!(Segment::from_tcp_flags(0xc2), Segment::Syn, "with ECN set-up");
        assert_eq!(Segment::from_tcp_flags(0x12), Segment::Tcp, "SYN/ACK opens nothing");
        assert_eq!(Segment::from_tcp_flags(0x11), Segment::Fin);
        assert_eq!(Segment::from_tcp_flags(0x14), Segment::Rst);
        assert_eq!(Segment::from_tcp_flags(0x06), Segment::Rst);
        assert_eq!(Segment::from_tcp_flags(0x00), Segment::Tcp);
    }

    /// Every state against every segment and direction, for a flow that is seen both ways.
    #[test]
    fn every_state_and_segment() {
        use Segment::{Fin, Rst, Syn, Tcp};
        use State::{Closed, Closing, Established, SynSent};
        let ways: [(&[(Segment, Direction)], State); 4] = [
            (&[], SynSent),
            (&[(Tcp, ToClient), (Tcp, ToBackend)], Established),
            (&[(Tcp, ToClient), (Tcp, ToBackend), (Fin, ToBackend)], Closing),
            (&[(Rst, ToClient)], Closed),
        ];
        let expected = [
            // (Syn, Fin, Rst, Tcp) from the client, then from the backend
            [SynSent, Closing, Closed, SynSent, SynSent, Closing, Closed, SynSent],
            [Established, Closing, Closed, Established, Established, Closing, Closed, Established],
            [Closing, Closing, Closed, Closing, Closing, Closed, Closed, Closing],
            [Closed, Closing, Closed, Established, Closed, Closing, Closed, Established],
        ];
        for ((way, state), row) in ways.iter().zip(expected) {
            let mut column = row.iter();
            for direction in [ToBackend, ToClient] {
                for segment in [Syn, Fin, Rst, Tcp] {
                    let mut progress = after(Syn, true, way);
                    assert_eq!(progress.state, *state);
                    progress.advance(segment, direction);
                    assert_eq!(Some(&progress.state), column.next(), "{state:?} {segment:?} {direction:?}");
                }
            }
        }
    }

    #[test]
    fn a_byte_holds_all_of_it() {
        for two_way in [false, true] {
            for first in [Segment::Syn, Segment::Tcp, Segment::Fin, Segment::Rst] {
                for then in [Segment::Syn, Segment::Tcp, Segment::Fin, Segment::Rst] {
                    for direction in [ToBackend, ToClient] {
                        let progress = after(first, two_way, &[(then, direction), (Segment::Tcp, ToBackend)]);
                        let bits = progress.to_bits();
                        assert_eq!(Progress::from_bits(bits, two_way, Protocol::Tcp), Some(progress));
                        assert_eq!(Progress::from_bits(bits, two_way, Protocol::Udp), None);
                    }
                }
            }
        }
        let udp = after(Segment::Udp, false, &[(Segment::Udp, ToBackend)]);
        assert_eq!(Progress::from_bits(udp.to_bits(), false, Protocol::Udp), Some(udp));
        for bits in 0..=255 {
            if let Some(progress) = Progress::from_bits(bits, true, Protocol::Tcp) {
                assert_eq!(progress.to_bits(), bits);
            }
        }
    }

    #[test]
    fn a_flow_is_assured_when_its_other_side_was_heard() {
        assert!(
            !after(Segment::Syn, true, &[(Segment::Tcp, ToBackend); 3]).assured,
            "a blind ACK proves nothing"
        );
        assert!(after(Segment::Syn, true, &[(Segment::Tcp, ToClient), (Segment::Tcp, ToBackend)]).assured);
        assert!(after(Segment::Syn, false, &[(Segment::Tcp, ToBackend)]).assured);
        assert!(!after(Segment::Syn, false, &[(Segment::Syn, ToBackend)]).assured);
        assert!(!after(Segment::Udp, true, &[(Segment::Udp, ToBackend); 3]).assured);
        assert!(after(Segment::Udp, true, &[(Segment::Udp, ToClient)]).assured);
    }

    #[test]
    fn both_fins_end_it_and_a_late_segment_does_not_revive_it() {
        let fins = [(Segment::Tcp, ToClient), (Segment::Fin, ToClient), (Segment::Fin, ToBackend)];
        let mut progress = after(Segment::Syn, true, &fins);
        assert_eq!(progress.state, State::Closed);
        progress.advance(Segment::Tcp, ToClient);
        assert_eq!(progress.state, State::Closed);
        assert!(progress.reopens());
    }
}
