//! Requests to and messages from the kernel's rtnetlink (rtnetlink(7)).

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    LinkAttribute, LinkFlags, LinkLayerType, LinkMessage, LinkXdp, State, XdpAttached,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteNextHopFlags, RouteType,
    RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::time::TimeVal;

use super::table::{Link, Neighbour, Route, Via, XdpState};

/// Bytes of a receive buffer: the kernel fills at most 32 KiB of a dump into one datagram (`netlink(7)`).
const RECEIVE_LEN: usize = 64 * 1024;
/// How long the kernel may take over an answer. It answers from memory; longer means that the socket is broken.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A dump that other changes keep interrupting is taken as it is after this many tries: the change itself brings another.
const DUMP_TRIES: usize = 4;

/// Something that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A link, and with it perhaps routes: the kernel does not announce IPv4 routes that vanish with their link.
    Links,
    /// An address.
    Addresses,
    /// A route.
    Routes,
    /// A neighbour; absent entry: no longer usable.
    Neighbour {
        /// Interface.
        index: u32,
        /// Address.
        address: IpAddr,
        /// What is known.
        entry: Option<Neighbour>,
    },
}

/// A socket that takes part in the kernel's announcements.
///
/// # Errors
/// As socket(2), bind(2).
pub fn subscribe() -> io::Result<Socket> {
    const GROUPS: [u32; 6] = [
        libc::RTNLGRP_LINK,
        libc::RTNLGRP_NEIGH,
        libc::RTNLGRP_IPV4_IFADDR,
        libc::RTNLGRP_IPV6_IFADDR,
        libc::RTNLGRP_IPV4_ROUTE,
        libc::RTNLGRP_IPV6_ROUTE,
    ];
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// Reads what the kernel has announced, without waiting; `false` when there was nothing.
///
/// # Errors
/// `ENOBUFS`: announcements were lost and everything has to be dumped again.
pub fn read_changes(socket: &Socket, changes: &mut Vec<Change>) -> io::Result<bool> {
    let mut buffer = Vec::with_capacity(RECEIVE_LEN);
    match socket.recv(&mut buffer, 0) {
        Ok(0) => return Ok(false),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(true),
        Err(e) => return Err(e),
    }
    for_each_message(&buffer, |_, payload| {
        if let NetlinkPayload::InnerMessage(message) = payload
            && let Some(change) = change_of(&message)
        {
            changes.push(change);
        }
    });
    Ok(true)
}

/// A socket for questions and requests.
#[derive(Debug)]
pub struct Requests {
    socket: Socket,
    sequence: u32,
}

impl Requests {
    /// Opens the socket.
    ///
    /// # Errors
    /// As socket(2), bind(2).
    pub fn new() -> io::Result<Requests> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let timeout = TimeVal::new(ANSWER_TIMEOUT.as_secs() as i64, 0);
        setsockopt(&socket, ReceiveTimeout, &timeout)?;
        Ok(Requests { socket, sequence: 0 })
    }

    /// All links.
    ///
    /// # Errors
    /// The kernel refuses or does not answer.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |m| match m {
            RouteNetlinkMessage::NewLink(m) => Some(link_of(&m)),
            _ => None,
        })
    }

    /// All addresses with their interface and prefix length.
    ///
    /// # Errors
    /// The kernel refuses or does not answer.
    pub fn addresses(&mut self) -> io::Result<Vec<(u32, IpAddr, u8)>> {
        self.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()), |m| match m {
            RouteNetlinkMessage::NewAddress(m) => address_of(&m),
            _ => None,
        })
    }

    /// Routes of the main table, both families. `prefer` says which interfaces a multipath route should leave by.
    ///
    /// # Errors
    /// The kernel refuses or does not answer.
    pub fn routes(&mut self, prefer: impl Fn(u32) -> bool) -> io::Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            routes.extend(self.dump(RouteNetlinkMessage::GetRoute(request), |m| match m {
                RouteNetlinkMessage::NewRoute(m) => route_of(&m, &prefer),
                _ => None,
            })?);
        }
        Ok(routes)
    }

    /// All neighbours with a usable address.
    ///
    /// # Errors
    /// The kernel refuses or does not answer.
    pub fn neighbours(&mut self) -> io::Result<Vec<(u32, IpAddr, Neighbour)>> {
        self.dump(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()), |m| match m {
            RouteNetlinkMessage::NewNeighbour(m) => {
                neighbour_of(&m).and_then(|(index, address, entry)| Some((index, address, entry?)))
            }
            _ => None,
        })
    }

    /// Tells the kernel that a neighbour is used, so that it resolves an unknown one and confirms a stale one by its own
    /// ARP or ND (`NTF_USE`).
    ///
    /// # Errors
    /// The kernel refuses, e.g. `EPERM` without `CAP_NET_ADMIN`, `ENOBUFS` when its table is full.
    pub fn use_neighbour(&mut self, index: u32, address: IpAddr) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = match address {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.header.ifindex = index;
        message.header.flags = NeighbourFlags::Use;
        message.header.state = NeighbourState::None;
        message.header.kind = RouteType::Unicast;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::from(address)));
        let sequence =
            self.send(RouteNetlinkMessage::NewNeighbour(message), NLM_F_REQUEST | NLM_F_CREATE | NLM_F_ACK)?;
        self.receive(sequence, |_| {}).map(|_| ())
    }

    /// Tells the kernel to do something.
    ///
    /// # Errors
    /// The kernel refuses or does not answer.
    pub fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let sequence = self.send(message, flags)?;
        self.receive(sequence, |_| {}).map(drop)
    }

    /// Asks for everything of a kind and keeps what `keep` makes of it.
    fn dump<T>(
        &mut self,
        question: RouteNetlinkMessage,
        mut keep: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let mut all = Vec::new();
        for _ in 0..DUMP_TRIES {
            all.clear();
            let sequence = self.send(question.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if self.receive(sequence, |m| all.extend(keep(m)))? {
                break;
            }
        }
        Ok(all)
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        Ok(self.sequence)
    }

    /// Reads answers until the last; whether they are a consistent whole.
    fn receive(&mut self, sequence: u32, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<bool> {
        let mut consistent = true;
        loop {
            let mut buffer = Vec::with_capacity(RECEIVE_LEN);
            match self.socket.recv(&mut buffer, 0) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            let mut end = None;
            for_each_message(&buffer, |header, payload| {
                // What is left of an earlier question that timed out.
                if header.sequence_number != sequence || end.is_some() {
                    return;
                }
                consistent &= header.flags & NLM_F_DUMP_INTR == 0;
                match payload {
                    NetlinkPayload::InnerMessage(message) => each(message),
                    NetlinkPayload::Done(_) => end = Some(Ok(())),
                    NetlinkPayload::Error(e) if e.code.is_none() => end = Some(Ok(())),
                    NetlinkPayload::Error(e) => end = Some(Err(e.to_io())),
                    NetlinkPayload::Overrun(_) => {
                        end = Some(Err(io::Error::from_raw_os_error(libc::ENOBUFS)))
                    }
                    _ => {}
                }
            });
            if let Some(end) = end {
                return end.map(|()| consistent);
            }
        }
    }
}

/// Walks the messages of a datagram. One that can't be understood is passed over: newer kernels may say more than we know.
fn for_each_message(
    mut bytes: &[u8],
    mut each: impl FnMut(&NetlinkHeader, NetlinkPayload<RouteNetlinkMessage>),
) {
    const HEADER_LEN: usize = 16;
    while let Some(len) = bytes.first_chunk::<4>().map(|b| u32::from_ne_bytes(*b) as usize) {
        if len < HEADER_LEN || len > bytes.len() {
            return;
        }
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes[..len]) {
            Ok(message) => each(&message.header, message.payload),
            Err(e) => tracing::debug!(error = %e, "netlink message not understood"),
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
}

fn change_of(message: &RouteNetlinkMessage) -> Option<Change> {
    match message {
        RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => Some(Change::Links),
        RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => Some(Change::Addresses),
        RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_) => Some(Change::Routes),
        RouteNetlinkMessage::NewNeighbour(m) => {
            neighbour_of(m).map(|(index, address, entry)| Change::Neighbour { index, address, entry })
        }
        RouteNetlinkMessage::DelNeighbour(m) => {
            neighbour_of(m).map(|(index, address, _)| Change::Neighbour { index, address, entry: None })
        }
        _ => None,
    }
}

fn link_of(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        ethernet,
        admin_up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        mtu: 0,
        gro_max_len: 0,
        xdp: XdpState::None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(mac) => link.mac = <[u8; 6]>::try_from(&mac[..]).ok(),
            LinkAttribute::GroMaxSize(len) | LinkAttribute::GroIpv4MaxSize(len) => {
                link.gro_max_len = link.gro_max_len.max(*len);
            }
            LinkAttribute::Xdp(facts) => {
                for fact in facts {
                    if let LinkXdp::Attached(attached) = fact {
                        link.xdp = match attached {
                            XdpAttached::None => XdpState::None,
                            XdpAttached::SocketBuffer => XdpState::Generic,
                            _ => XdpState::Native,
                        };
                    }
                }
            }
            // RFC 2863 `unknown` is what drivers without a notion of it report, dummy and loopback among them.
            LinkAttribute::OperState(state) => link.carrier &= matches!(state, State::Up | State::Unknown),
            _ => {}
        }
    }
    link
}

fn address_of(message: &AddressMessage) -> Option<(u32, IpAddr, u8)> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point interface `Address` is the other end's and `Local` is ours.
            AddressAttribute::Local(address) => found = Some(*address),
            AddressAttribute::Address(address) => found = found.or(Some(*address)),
            _ => {}
        }
    }
    found.map(|address| (message.header.index, address, message.header.prefix_len))
}

fn route_of(message: &RouteMessage, prefer: &impl Fn(u32) -> bool) -> Option<Route> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut network = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0u8; 4]),
        AddressFamily::Inet6 => IpAddr::from([0u8; 16]),
        _ => return None,
    };
    let (mut metric, mut out, mut gateway, mut paths) = (0, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Destination(address) => network = ip_of(address)?,
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::Oif(index) => out = Some(*index),
            RouteAttribute::MultiPath(hops) => paths = Some(hops),
            other => gateway = gateway.or(gateway_of(other)),
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || header.tos != 0 || header.source_prefix_length != 0 {
        return None;
    }
    let via = match header.kind {
        RouteType::Unicast => match (out, paths) {
            (Some(index), _) => via_of(index, gateway),
            (None, Some(hops)) => best_path(hops, prefer)?,
            (None, None) => return None,
        },
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit => Via::Nowhere,
        _ => return None,
    };
    Some(Route { network, prefix_len: header.destination_prefix_length, metric, via })
}

/// The path of a multipath route to use: one that is alive, by an interface of ours when there is one.
///
/// One and not all: spreading what one flow sends over several gateways would reorder it.
fn best_path(hops: &[RouteNextHop], prefer: &impl Fn(u32) -> bool) -> Option<Via> {
    let dead = RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown;
    let hop = hops
        .iter()
        .filter(|h| !h.flags.intersects(dead))
        .max_by_key(|h| (prefer(h.interface_index), std::cmp::Reverse(h.interface_index)))?;
    Some(via_of(hop.interface_index, hop.attributes.iter().find_map(gateway_of)))
}

fn via_of(index: u32, gateway: Option<IpAddr>) -> Via {
    match gateway {
        Some(address) => Via::Gateway { index, address },
        None => Via::Link { index },
    }
}

fn gateway_of(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(address) => ip_of(address),
        // An IPv4 route through an IPv6 gateway (RFC 5549).
        RouteAttribute::Via(RouteVia::Inet(a)) => Some((*a).into()),
        RouteAttribute::Via(RouteVia::Inet6(a)) => Some((*a).into()),
        _ => None,
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some((*a).into()),
        RouteAddress::Inet6(a) => Some((*a).into()),
        _ => None,
    }
}

fn neighbour_of(message: &NeighbourMessage) -> Option<(u32, IpAddr, Option<Neighbour>)> {
    // Bridge FDB entries come as messages of the same type with family AF_BRIDGE.
    if !matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6)
        || message.header.flags.contains(NeighbourFlags::Proxy)
    {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => address = Some(IpAddr::from(*a)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => address = Some(IpAddr::from(*a)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = <[u8; 6]>::try_from(&bytes[..]).ok(),
            _ => {}
        }
    }
    let stale = match message.header.state {
        NeighbourState::Stale => Some(true),
        NeighbourState::Reachable
        | NeighbourState::Delay
        | NeighbourState::Probe
        | NeighbourState::Permanent
        | NeighbourState::Noarp => Some(false),
        _ => None,
    };
    let entry = mac.zip(stale).map(|(mac, stale)| Neighbour { mac, stale });
    Some((message.header.ifindex, address?, entry))
}
