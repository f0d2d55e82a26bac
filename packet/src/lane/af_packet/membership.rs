//! Solicited-node groups of the IPv6 addresses that are answered for.
//!
//! A switch that watches MLD delivers a solicitation only to those who have joined the address's solicited-node group
//! (RFC 4861 §7.2.1, RFC 4541 §3). The kernel would join for an address of its own; for ours it is asked to join by a socket
//! that receives nothing, because it is bound to no port.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr, UdpSocket};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// The groups joined now.
#[derive(Debug, Default)]
pub struct Memberships {
    /// Absent before the first IPv6 address.
    socket: Option<UdpSocket>,
    joined: HashSet<(u32, Ipv6Addr)>,
}

impl Memberships {
    /// Joins the groups of `addresses` (interface number, address) and leaves those of others.
    ///
    /// Without a membership the address still works wherever switches don't watch MLD, so failures are told, not fatal.
    pub fn set(&mut self, addresses: impl IntoIterator<Item = (u32, IpAddr)>) {
        let wanted: HashSet<(u32, Ipv6Addr)> = addresses
            .into_iter()
            .filter_map(|(index, address)| match address {
                IpAddr::V6(a) => Some((index, solicited_node(a))),
                IpAddr::V4(_) => None,
            })
            .collect();
        if wanted == self.joined {
            return;
        }
        if let Err(e) = self.change(&wanted) {
            tracing::warn!(error = %e, "solicited-node groups could not all be joined: behind a switch that watches MLD, \
                 IPv6 addresses may not be found");
        }
    }

    fn change(&mut self, wanted: &HashSet<(u32, Ipv6Addr)>) -> io::Result<()> {
        if self.socket.is_none() {
            let fd = socket(AddressFamily::Inet6, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
            self.socket = Some(UdpSocket::from(fd));
        }
        let Some(socket) = &self.socket else { return Ok(()) };
        let mut outcome = Ok(());
        let gone: Vec<_> = self.joined.difference(wanted).copied().collect();
        for (index, group) in gone {
            // Fails when the interface is gone, and then so is the membership.
            let _ = socket.leave_multicast_v6(&group, index);
            self.joined.remove(&(index, group));
        }
        let new: Vec<_> = wanted.difference(&self.joined).copied().collect();
        for (index, group) in new {
            match socket.join_multicast_v6(&group, index) {
                Ok(()) => {
                    self.joined.insert((index, group));
                }
                Err(e) => outcome = Err(e),
            }
        }
        outcome
    }
}

/// The solicited-node group of an address (RFC 4291 §2.7.1).
fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_of_an_address() {
        // The example of RFC 4291 §2.7.1.
        let address: Ipv6Addr = "4037::01:800:200e:8c6c".parse().unwrap();
        assert_eq!(solicited_node(address), "ff02::1:ff0e:8c6c".parse::<Ipv6Addr>().unwrap());
    }
}
