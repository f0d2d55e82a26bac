//! What two balancers do on the service network beside forwarding: they hear each other ([`SegmentSocket`]), and each can find
//! out whether a gateway is there and somebody answers for an address ([`Sounder`]).
//!
//! Both work on layer 2, without an address of their own: they reach exactly as far as the announcement of a VIP does, which
//! is what is to be known.

mod socket;
mod sounding;

pub use socket::{ETHERTYPE, MAX_PAYLOAD, SegmentSocket};
pub use sounding::{Found, MAX_ASKED, Sounder};
