//! What the engine needs to know of the kernel's routing and neighbour tables.

use std::net::IpAddr;

use crate::engine::Port;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Where a packet to some address goes next, as the kernel's tables say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// The way is known.
    Resolved {
        /// Port to leave by.
        port: Port,
        /// The address itself when it is on the link, otherwise the router.
        next_hop: IpAddr,
        /// Ethernet address of `next_hop`.
        mac: Mac,
    },
    /// The neighbour has to be asked for first.
    Unresolved {
        /// Port to leave by.
        port: Port,
        /// Address to ask for.
        next_hop: IpAddr,
    },
    /// No route, or one that leaves by none of the lane's ports.
    NoRoute,
}

/// The kernel's routing and neighbour tables: the lane implements it from netlink, tests from a map.
///
/// Called for every forwarded frame: an implementation answers from memory and never waits.
pub trait NextHops {
    /// Where a packet to `destination` goes next.
    fn lookup(&self, destination: IpAddr) -> NextHop;
}

impl<T: NextHops + ?Sized> NextHops for &T {
    fn lookup(&self, destination: IpAddr) -> NextHop {
        (**self).lookup(destination)
    }
}
