//! What the kernel and the NIC leave undone on a frame, and how it travels with the frame.
//!
//! A frame from a veth or virtio interface, or one that GRO has put together, may be a super-frame of up to 64 KiB whose
//! checksum field holds the pseudo-header's sum only. The virtio-net header in front of it (`PACKET_VNET_HDR`) says so,
//! and handed back on sending it makes the kernel or the NIC finish the work. So super-frames pass whole, and no frame is
//! sent out with a checksum that nobody has computed.

use std::io;

use super::sys;
use crate::engine::{Gso, Offload};

/// Length of `struct virtio_net_hdr` (virtio 1.2 §5.1.6, without `num_buffers`).
pub const VNET_HDR_LEN: usize = 10;

const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_GTSO: u32 = 0x1e;
const ETHTOOL_GGSO: u32 = 0x23;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETHTOOL_GGRO: u32 = 0x2b;
/// `ETH_FLAG_LRO`.
const FLAG_LRO: u32 = 1 << 15;

/// Offloads of an interface, as ethtool shows them. `None` where the driver doesn't say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Large receive offload: puts segments together in a way that can't be undone. Never compatible with forwarding.
    pub lro: Option<bool>,
    /// Generic receive offload.
    pub gro: Option<bool>,
    /// Generic segmentation offload.
    pub gso: Option<bool>,
    /// TCP segmentation offload.
    pub tso: Option<bool>,
    /// Transmit checksums by the device.
    pub tx_checksum: Option<bool>,
}

impl Offloads {
    /// Asks the driver.
    pub fn read(interface: &str) -> Offloads {
        let flag = |command| sys::ethtool_value(interface, command, 0).ok().map(|v| v != 0);
        Offloads {
            lro: sys::ethtool_value(interface, ETHTOOL_GFLAGS, 0).ok().map(|v| v & FLAG_LRO != 0),
            gro: flag(ETHTOOL_GGRO),
            gso: flag(ETHTOOL_GGSO),
            tso: flag(ETHTOOL_GTSO),
            tx_checksum: flag(ETHTOOL_GTXCSUM),
        }
    }

    /// One line for logs, e.g. `gro on, gso on, tso on, tx-checksum on, lro off`.
    pub fn describe(&self) -> String {
        let word = |v: Option<bool>| match v {
            Some(true) => "on",
            Some(false) => "off",
            None => "unknown",
        };
        format!(
            "gro {}, gso {}, tso {}, tx-checksum {}, lro {}",
            word(self.gro),
            word(self.gso),
            word(self.tso),
            word(self.tx_checksum),
            word(self.lro)
        )
    }
}

/// Turns large receive offload off. Its super-frames carry no segment size, so they could not be taken apart again.
///
/// # Errors
/// The driver refuses.
pub fn disable_lro(interface: &str) -> io::Result<()> {
    let flags = sys::ethtool_value(interface, ETHTOOL_GFLAGS, 0)?;
    sys::ethtool_value(interface, ETHTOOL_SFLAGS, flags & !FLAG_LRO).map(|_| ())
}

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const F_NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`.
const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`: the segments carry congestion bits that segmentation has to treat with care (RFC 3168).
const GSO_ECN: u8 = 0x80;

/// Reads the virtio-net header of a received frame. `None`: a kind of super-frame that can't be forwarded.
///
/// Fields are in the host's byte order: the header never leaves the machine (`PACKET_VNET_HDR` is the legacy layout).
pub fn decode(head: &[u8; VNET_HDR_LEN]) -> Option<Offload> {
    let [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1] = *head;
    let gso = match gso_type & !GSO_ECN {
        0 => Gso::None,
        GSO_TCPV4 => Gso::TcpV4,
        GSO_TCPV6 => Gso::TcpV6,
        GSO_UDP_L4 => Gso::UdpL4,
        _ => return None,
    };
    Some(Offload {
        needs_csum: flags & F_NEEDS_CSUM != 0,
        csum_start: u16::from_ne_bytes([c0, c1]),
        csum_offset: u16::from_ne_bytes([o0, o1]),
        gso,
        gso_size: u16::from_ne_bytes([s0, s1]),
        hdr_len: u16::from_ne_bytes([h0, h1]),
    })
}

/// Writes the header of a frame to send over the one it was received with.
pub fn encode(offload: &Offload, head: &mut [u8; VNET_HDR_LEN]) {
    let ecn = head[1] & GSO_ECN;
    *head = [0; VNET_HDR_LEN];
    if offload.needs_csum {
        head[0] = F_NEEDS_CSUM;
        head[6..8].copy_from_slice(&offload.csum_start.to_ne_bytes());
        head[8..10].copy_from_slice(&offload.csum_offset.to_ne_bytes());
    }
    head[1] = match offload.gso {
        Gso::None => 0,
        Gso::TcpV4 => GSO_TCPV4 | ecn,
        Gso::TcpV6 => GSO_TCPV6 | ecn,
        Gso::UdpL4 => GSO_UDP_L4,
    };
    if offload.gso != Gso::None {
        head[2..4].copy_from_slice(&offload.hdr_len.to_ne_bytes());
        head[4..6].copy_from_slice(&offload.gso_size.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_leaves_as_it_came() {
        let mut head = [1, GSO_TCPV4 | GSO_ECN, 0, 0, 0, 0, 0, 0, 0, 0];
        head[2..4].copy_from_slice(&66u16.to_ne_bytes());
        head[4..6].copy_from_slice(&1448u16.to_ne_bytes());
        head[6..8].copy_from_slice(&34u16.to_ne_bytes());
        head[8..10].copy_from_slice(&16u16.to_ne_bytes());
        let offload = decode(&head).unwrap();
        assert_eq!((offload.gso, offload.gso_size, offload.csum_start), (Gso::TcpV4, 1448, 34));
        let before = head;
        encode(&offload, &mut head);
        assert_eq!(head, before);
    }

    #[test]
    fn received_validity_is_not_promised_to_the_next_link() {
        // VIRTIO_NET_HDR_F_DATA_VALID.
        let mut head = [2, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let offload = decode(&head).unwrap();
        encode(&offload, &mut head);
        assert_eq!(head, [0; VNET_HDR_LEN]);
    }

    #[test]
    fn a_finished_checksum_leaves_no_request() {
        let mut head = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0];
        let mut offload = decode(&head).unwrap();
        offload.needs_csum = false;
        encode(&offload, &mut head);
        assert_eq!(head, [0; VNET_HDR_LEN]);
    }

    #[test]
    fn an_unknown_kind_of_super_frame_is_refused() {
        // VIRTIO_NET_HDR_GSO_UDP: IP fragments of a datagram, made by no kernel since 4.14.
        assert_eq!(decode(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
