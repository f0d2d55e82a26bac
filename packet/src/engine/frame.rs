//! Frames as they come in and what becomes of them.

use std::net::IpAddr;

use crate::drops::Reason;
use crate::lease::LeaseBoard;
use crate::neighbour::Mac;
use crate::time::BootTime;

/// An interface of the lane, by what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Port {
    /// The network that the VIPs are on.
    Service = 0,
    /// The second network, for NAT.
    Inside = 1,
}

impl Port {
    /// Number of ports that a lane has at most.
    pub const COUNT: usize = 2;
}

/// What the engine knows of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Its Ethernet address: source of what leaves, and only frames to it are taken.
    pub mac: Mac,
    /// Its kernel index, for messages.
    pub ifindex: u32,
    /// Largest layer-3 packet that may leave, in bytes. IPv6 needs at least 1280.
    pub mtu: u32,
    /// Addresses with prefix length that the kernel has on it. Packets to them are the host's.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// Kind of a super-frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gso {
    /// An ordinary frame.
    #[default]
    None,
    /// TCP segments over IPv4 (`VIRTIO_NET_HDR_GSO_TCPV4`).
    TcpV4,
    /// TCP segments over IPv6 (`VIRTIO_NET_HDR_GSO_TCPV6`).
    TcpV6,
    /// UDP datagrams (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    UdpL4,
}

/// Offload metadata of a frame, as in `struct virtio_net_hdr` (virtio 1.2 §5.1.6). It leaves with the frame unchanged,
/// except that the engine clears it where it finished the checksum itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The checksum at `csum_start + csum_offset` is partial: it holds the pseudo-header's sum, and covers the frame
    /// from `csum_start` to its end when finished (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
    pub needs_csum: bool,
    /// Offset from the frame's first byte, in bytes.
    pub csum_start: u16,
    /// Offset from `csum_start`, in bytes.
    pub csum_offset: u16,
    /// Kind of super-frame.
    pub gso: Gso,
    /// Payload of each segment in bytes; 0 when `gso` is `None`.
    pub gso_size: u16,
    /// Length of the headers that each segment repeats, in bytes; a hint only.
    pub hdr_len: u16,
}

/// A frame to be rewritten in place.
#[derive(Debug)]
pub struct FrameMut<'a> {
    /// From the first byte of the Ethernet header to the end; no frame check sequence.
    pub bytes: &'a mut [u8],
    /// Its offload metadata.
    pub offload: Offload,
}

impl<'a> FrameMut<'a> {
    /// A frame without offload metadata.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        FrameMut { bytes, offload: Offload::default() }
    }
}

/// What a frame that leaves must be permitted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// [`crate::lease::Lease::may_forward`].
    Forward,
    /// [`crate::lease::Lease::may_answer`].
    Answer,
}

/// The lease under which a frame leaves. The lane asks again just before it sends, because frames wait in batches and
/// for neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    /// VIP group.
    pub group: u32,
    /// What is needed of its lease.
    pub permission: Permission,
}

impl Fence {
    /// Whether the lease still permits it at `now`.
    pub fn is_open(&self, leases: &LeaseBoard, now: BootTime) -> bool {
        let lease = leases.get(self.group);
        match self.permission {
            Permission::Forward => lease.may_forward(now),
            Permission::Answer => lease.may_answer(now),
        }
    }
}

/// What becomes of a frame. Exactly one for each, and each counted exactly once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The frame has been rewritten in place, Ethernet header included, and leaves by `port` with its offload metadata.
    Forward {
        /// Port to leave by.
        port: Port,
        /// Lease under which it leaves.
        fence: Fence,
    },
    /// The frame is done with. The answer stands in [`super::Engine::reply`] until the next call of `process`, is
    /// complete, without offload metadata, and leaves by `port`.
    Reply {
        /// Port to leave by.
        port: Port,
        /// Lease under which it leaves.
        fence: Fence,
    },
    /// As `Forward`, but the destination MAC is not known yet (bytes 0..6 are zero): the lane keeps the frame, bounded,
    /// asks for `next_hop`, writes the MAC and sends it, or drops it with [`Reason::NeighbourQueue`] or
    /// [`Reason::NeighbourUnresolved`].
    AwaitNeighbour {
        /// Port to leave by.
        port: Port,
        /// Address whose MAC is needed.
        next_hop: IpAddr,
        /// Lease under which it leaves.
        fence: Fence,
    },
    /// Not for the lane. The host's kernel has its own copy.
    NotOurs,
    /// Dropped.
    Drop(Reason),
}
