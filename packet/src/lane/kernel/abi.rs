//! Keys and values of the program's maps, as `packet/bpf/abi.h` lays them out: see there what they mean and who writes them. A
//! test compares sizes and offsets with the types in the compiled program.

use std::net::{IpAddr, Ipv6Addr};

use crate::drops::Reason;
use crate::engine::{Event, Port};
use crate::flow::ClientSide;
use crate::neighbour::Mac;
use crate::plan::MAX_GROUPS;

/// Plain data: `repr(C)`, without padding, every bit pattern of it valid.
///
/// # Safety
/// All of that must be so.
pub unsafe trait Plain: Copy + 'static {
    /// All bits zero.
    fn zeroed() -> Self {
        // SAFETY: every bit pattern is valid.
        unsafe { std::mem::zeroed() }
    }

    /// From as many bytes; `None` when they are not.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        // SAFETY: so many bytes are there, they may be unaligned, and every bit pattern is valid.
        (bytes.len() == size_of::<Self>()).then(|| unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
    }
}

// SAFETY: integers and arrays of them.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for [u8; 16] {}
// SAFETY: a descriptor's number.
unsafe impl Plain for i32 {}

/// Declares a `repr(C)` structure whose fields fill it, with its size.
macro_rules! plain {
    ($($(#[$meta:meta])* $name:ident: $size:literal { $($(#[$field_meta:meta])* $field:ident: $type:ty),+ $(,)? })+) => { $(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type),+ }

        const _: () = assert!(size_of::<$name>() == $size);
        // No padding: the fields are as long as the whole.
        const _: () = assert!(0 $(+ size_of::<$type>())+ == $size);
        // SAFETY: `repr(C)`, made of integers and arrays of them, and without padding as just asserted.
        unsafe impl Plain for $name {}

        impl $name {
            /// Name of its type in C with its size and the fields' names and offsets.
            pub const LAYOUT: Layout = Layout {
                name: stringify!($name),
                size: $size,
                fields: &[$((stringify!($field), std::mem::offset_of!($name, $field))),+],
            };
        }
    )+

        /// Every structure.
        pub const LAYOUTS: &[Layout] = &[$($name::LAYOUT),+];
    };
}

/// How a structure lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Name in Rust; in C it is the same in lower case with underscores.
    pub name: &'static str,
    /// Size in bytes.
    pub size: usize,
    /// Names and offsets in bytes.
    pub fields: &'static [(&'static str, usize)],
}

/// Lease cells.
pub const LEASES: u32 = MAX_GROUPS as u32;
/// Slots of one element of a Maglev table.
pub const SLOTS_PER_LINE: usize = 16;
/// Filters.
pub const FILTERS: u32 = 256;
/// Lines of one.
pub const FILTER_LINES: u32 = 128;
/// Cells that are looked at for a [`Place`].
pub const PLACE_PROBES: u32 = 16;
/// Secrets that a hash of a flow's name takes at most.
pub const INDEX_SECRETS: usize = 11;
/// Cells of a block of the pool.
pub const BLOCK_FLOWS: u32 = 1 << 16;
/// Slots of a [`Line`].
pub const LINE_SLOTS: usize = 7;
/// Lines in which a name may stand.
pub const INDEX_PROBES: u32 = 8;
/// Cells that a processor has been given at a time, at most.
pub const GRANT_CELLS: usize = 8192;
/// Registers of a window of [`Seen`].
pub const REGISTERS: usize = 256;
/// Room in [`Tally`].
pub const TALLY_EVENTS: usize = 16;
/// Room in [`Tally`].
pub const TALLY_DROPS: usize = 48;
/// Room in [`Tally`].
pub const TALLY_UP: usize = 32;
const _: () = assert!(Event::ALL.len() <= TALLY_EVENTS && Reason::ALL.len() <= TALLY_DROPS);

plain! {
    /// `struct port`: an interface.
    PortCell: 32 {
        /// [`mac_word`] of its address; 0 while there is no such port.
        mac: u64,
        /// Kernel index.
        ifindex: u32,
        /// `tc`: index of the device to which frames go up; 0: none.
        up: u32,
        /// Largest layer-3 packet that may leave by it, in bytes.
        mtu: u32,
        /// Zero.
        reserved: [u32; 3],
    }
    /// `struct config`.
    Config: 256 {
        /// By [`Port`].
        ports: [PortCell; Port::COUNT],
        /// Entries of `backends`.
        backends: u32,
        /// Entries of `services`.
        services: u32,
        /// `CONFIG_*`.
        flags: u32,
        /// Zero.
        reserved0: u32,
        /// How old a reading of the clock may be, in nanoseconds; 0: it is read for every packet.
        slack: u64,
        /// The plan in force, see [`plan_word`].
        plan: u64,
        /// Where flows are found, see [`index_word`].
        index: u64,
        /// Zero.
        reserved: [u64; 3],
        /// What the hashes of flows' names are made with.
        secrets: [u64; INDEX_SECRETS],
        /// Zero.
        reserved1: [u64; 5],
    }
    /// `struct place`: key of a generation's table.
    Place: 20 {
        /// Address.
        address: [u8; 16],
        /// Port in network order, or 0.
        port: [u8; 2],
        /// L4 protocol, or 0.
        protocol: u8,
        /// `KIND_*`.
        kind: u8,
    }
    /// `struct record`: what stands at a place.
    Record: 96 {
        /// VIP group.
        group: u32,
        /// Number of the service's state.
        service: u32,
        /// Number of the backend's state, of an answer.
        backend: u32,
        /// `RECORD_*`.
        flags: u16,
        /// `MODE_*`.
        mode: u8,
        /// Port on which an owned address is answered for, or `PORT_ANY`.
        port: u8,
        /// Index of the current table in `slots`.
        current: u32,
        /// Its number of slots; 0: none.
        current_size: u32,
        /// Index of the base table in `slots`.
        base: u32,
        /// Its number of slots; 0: none.
        base_size: u32,
        /// VIP of an answer's service.
        vip: [u8; 16],
        /// Its port in network order.
        vip_port: [u8; 2],
        /// Zero.
        reserved0: u16,
        /// The service's cluster-wide number.
        id: u32,
        /// A closing flow that was silent for so long is not opened again by the program, in nanoseconds.
        reopen: u64,
        /// The first SNAT address of a service with [`RECORD_MAKES`].
        snat: [u8; 16],
        /// How many it has.
        snat_count: u32,
        /// Index of the table of them in `slots`, where it has more than one: a word of an address in each slot.
        snats: u32,
        /// Zero.
        reserved: u64,
    }
    /// `struct place_entry`: a cell of a generation's table.
    PlaceEntry: 128 {
        /// What stands here.
        place: Place,
        /// Whether anything does.
        used: u32,
        /// Zero.
        reserved0: u64,
        /// What is to be known of it.
        record: Record,
    }
    /// `struct slot_line`: sixteen slots of a Maglev table.
    SlotLine: 64 {
        /// `SLOT_*`.
        slots: [u32; SLOTS_PER_LINE],
    }
    /// `struct backend`, by the number of the engine's state.
    BackendCell: 64 {
        /// [`Hop::word`].
        hop: u64,
        /// Address.
        address: [u8; 16],
        /// Port in network order.
        port: [u8; 2],
        /// `BACKEND_*`.
        flags: u8,
        /// Zero.
        reserved0: u8,
        /// Number of its service's state.
        service: u32,
        /// Its cluster-wide number.
        id: u32,
        /// Zero.
        reserved1: u32,
        /// Zero.
        reserved: [u64; 3],
    }
    /// `struct service`, by the number of the engine's state.
    ServiceCell: 64 {
        /// `SERVICE_*`.
        flags: u32,
        /// VIP group.
        group: u32,
        /// VIP.
        vip: [u8; 16],
        /// Port in network order.
        port: [u8; 2],
        /// Zero.
        reserved0: u16,
        /// Number of its filter + 1; 0: none.
        filter: u32,
        /// Zero.
        reserved: [u32; 8],
    }
    /// `struct filter_line`: which flows of a service may be remembered.
    FilterLine: 64 {
        /// By the upper 16 bits of their hash.
        bits: [u64; 8],
    }
    /// `struct lease`: as `lease.rs` lays out its cells.
    LeaseCell: 64 {
        /// Group + 1; 0 of an empty cell.
        group: u64,
        /// Epoch of the ownership.
        epoch: u64,
        /// Nanoseconds of `CLOCK_BOOTTIME`.
        answer_until: u64,
        /// Nanoseconds of `CLOCK_BOOTTIME`.
        forward_until: u64,
        /// Zero.
        reserved: [u64; 4],
    }
    /// `struct flow_key`.
    FlowKey: 24 {
        /// Client's address.
        client: [u8; 16],
        /// Number of the service's state.
        service: u32,
        /// Client's port in network order.
        client_port: [u8; 2],
        /// Zero.
        reserved: u16,
    }
    /// `struct flow`.
    FlowCell: 64 {
        /// Nanoseconds of `CLOCK_BOOTTIME`.
        last_seen: u64,
        /// Number of the backend's state.
        backend: u32,
        /// `FLOW_*`, and above them the version.
        flags: u8,
        /// Of a kept flow [`crate::flow::Flow::progress_bits`].
        progress: u8,
        /// SNAT port in network order.
        snat_port: [u8; 2],
        /// SNAT address.
        snat: [u8; 16],
        /// Client's address.
        client: [u8; 16],
        /// Number of the service's state, or [`NOBODY`].
        service: u32,
        /// Client's port in network order.
        client_port: [u8; 2],
        /// L4 protocol, of a bound flow.
        protocol: u8,
        /// Zero.
        reserved: u8,
        /// Of the name on the client's side.
        client_hash: u32,
        /// Of the name on the backend's side.
        answers_hash: u32,
    }
    /// `struct line`: of the index.
    Line: 64 {
        /// Names that stand behind this line.
        displaced: u64,
        /// A name's hash, and in the lower half the number of the flow's cell + 1.
        slots: [u64; LINE_SLOTS],
    }
    /// `struct route_key`: of the longest-prefix match.
    RouteKey: 20 {
        /// Bits that count, of 128.
        prefix_len: u32,
        /// Network.
        address: [u8; 16],
    }
    /// `struct neighbour_key`.
    NeighbourKey: 20 {
        /// Address on the link.
        address: [u8; 16],
        /// [`Port`] that it is on.
        port: u32,
    }
    /// `struct traffic`: what passed a backend on one processor.
    Traffic: 64 {
        /// Packets sent to the backend; a super-frame counts as its segments.
        packets: u64,
        /// Bytes of layer 3 sent to it.
        bytes: u64,
        /// Packets from the backend to clients.
        return_packets: u64,
        /// Bytes of layer 3 from it to clients.
        return_bytes: u64,
        /// New flows.
        new_flows: u64,
        /// Zero.
        reserved: [u64; 3],
    }
    /// `struct seen`: flows that are not remembered, as in `engine/sketch.rs`.
    Seen: 528 {
        /// End of the window that is being filled, in nanoseconds of `CLOCK_BOOTTIME`.
        until: u64,
        /// Its number.
        window: u64,
        /// Registers, those of the newest window at `window & 1`.
        registers: [[u8; REGISTERS]; 2],
    }
    /// `struct clock`: a reading of the clock.
    Clock: 64 {
        /// Nanoseconds of `CLOCK_BOOTTIME`.
        now: u64,
        /// Jiffies before it was read.
        ticks: u64,
        /// Frames that it has served.
        uses: u64,
        /// Zero.
        reserved: [u64; 5],
    }
    /// `struct tally`: what became of frames on one processor.
    Tally: 1024 {
        /// Its last reading of the clock.
        clock: Clock,
        /// In the order of [`Event::ALL`].
        events: [u64; TALLY_EVENTS],
        /// In the order of [`Reason::ALL`].
        drops: [u64; TALLY_DROPS],
        /// In the order of [`Up::ALL`].
        up: [u64; TALLY_UP],
        /// Flows made.
        made: u64,
        /// Cells taken for them.
        taken: u64,
        /// Zero.
        reserved: [u64; 22],
    }
    /// `struct grant`: how many flows a processor may have made since the program was loaded, and in which cells.
    Grant: 32832 {
        /// So many.
        most: u64,
        /// Cells written so far.
        given: u64,
        /// Zero.
        reserved: [u64; 6],
        /// The n-th at n modulo their number.
        cells: [u32; GRANT_CELLS],
    }
    /// `struct news`: what happened to a kept flow.
    News: 64 {
        /// Its name.
        flow: FlowKey,
        /// Nanoseconds of `CLOCK_BOOTTIME`.
        now: u64,
        /// Number of the backend's state.
        backend: u32,
        /// Of [`FlowCell`].
        flags: u8,
        /// Of [`FlowCell`].
        progress: u8,
        /// SNAT port in network order.
        snat_port: [u8; 2],
        /// SNAT address.
        snat: [u8; 16],
        /// Processor.
        cpu: u32,
        /// `NEWS_*`.
        kind: u32,
    }
}

/// `struct bench` of `packet/bpf/harness.c`: packets of many flows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bench {
    /// Runs so far.
    pub runs: u64,
    /// Flows; the client of each has another port, and after 50 000 another address.
    pub flows: u32,
    /// 1: IPv4; 0: IPv6.
    pub v4: u32,
    /// The packet.
    pub frame: [u8; 96],
}

const _: () = assert!(size_of::<Bench>() == 112);
// SAFETY: `repr(C)`, integers and arrays of them, 8 + 2 × 4 + 96 bytes: no padding.
unsafe impl Plain for Bench {}

/// Every flow of `nat` whose answers may come is in the table.
pub const CONFIG_BOUND_COMPLETE: u32 = 1;
/// There are nat-transparent services of IPv4.
pub const CONFIG_THROUGH_V4: u32 = 2;
/// There are nat-transparent services of IPv6.
pub const CONFIG_THROUGH_V6: u32 = 4;
/// The next piece of news wakes who waits for it.
pub const CONFIG_WAKE: u32 = 16;

/// A VIP with port and protocol.
pub const KIND_SERVICE: u8 = 0;
/// An address that is answered for.
pub const KIND_OWNED: u8 = 1;
/// A nat-transparent backend with port and protocol.
pub const KIND_ANSWER: u8 = 2;
/// The address of one.
pub const KIND_BACKEND: u8 = 3;

/// [`crate::plan::Mode::Dsr`].
pub const MODE_DSR: u8 = 0;
/// [`crate::plan::Mode::Nat`].
pub const MODE_NAT: u8 = 1;
/// [`crate::plan::Mode::NatTransparent`].
pub const MODE_NAT_TRANSPARENT: u8 = 2;

/// The backend of a new flow is chosen by hash.
pub const RECORD_HASHED: u16 = 0x0001;
/// By a hash of the client's address alone.
pub const RECORD_SOURCE_IP: u16 = 0x0002;
/// Every flow is remembered.
pub const RECORD_TRACKS_ALL: u16 = 0x0004;
/// The dead-backend policy is `keep`.
pub const RECORD_KEEP: u16 = 0x0008;
/// Everything for this service goes up.
pub const RECORD_UP: u16 = 0x0010;
/// New flows are made by the program.
pub const RECORD_MAKES: u16 = 0x0020;
/// Clients use the address.
pub const RECORD_VIP: u16 = 0x0100;
/// Backends route through it.
pub const RECORD_INSIDE: u16 = 0x0200;
/// It is a source of full NAT.
pub const RECORD_SNAT: u16 = 0x0400;
/// [`Record::port`] of an address that is answered for on every port.
pub const PORT_ANY: u8 = 2;

/// Number of the backend's state + 1; 0 for nobody.
pub const SLOT_NUMBER: u32 = 0x00ff_ffff;
/// New flows may go to it.
pub const SLOT_ALIVE: u32 = 0x4000_0000;
/// Of the current table: the base table may say another backend.
pub const SLOT_MOVED: u32 = 0x8000_0000;

/// In the tables in force.
pub const BACKEND_IN_PLAN: u8 = 0x01;
/// Its flows may be sent to it.
pub const BACKEND_ALIVE: u8 = 0x02;

/// In the tables in force.
pub const SERVICE_IN_PLAN: u32 = 1;
/// Flows of it are remembered.
pub const SERVICE_CONSULT: u32 = 2;
/// All of its remembered flows are in the table, steady or not.
pub const SERVICE_CONCLUSIVE: u32 = 4;

/// A plain segment or datagram of either side changes nothing of it but when it was last seen.
pub const FLOW_STEADY: u8 = 0x01;
/// Its backend knows it by a SNAT address and port.
pub const FLOW_BOUND: u8 = 0x02;
/// The program keeps its state.
pub const FLOW_KEPT: u8 = 0x04;
/// Above these flags: counts the changes of its state.
pub const FLOW_VERSION_SHIFT: u32 = 3;

/// [`News::kind`]: a flow was made, in the place of a closing one of the same name if there was one.
pub const NEWS_OPENED: u32 = 0;
/// [`News::kind`]: the state of a flow has changed.
pub const NEWS_CHANGED: u32 = 1;
/// [`FlowCell::service`], and the backend, of a name that is taken for a flow which is not there yet.
pub const NOBODY: u32 = u32::MAX;

/// [`Config::index`]: names may stand in a larger index beside that in force, too.
pub const INDEX_GROWS: u64 = 2;
/// [`Config::index`]: new names go there.
pub const INDEX_MOVES: u64 = 4;

/// An address as the maps hold it.
pub fn wide(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

/// The address that [`wide`] made this of.
pub fn narrow(octets: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(octets).to_canonical()
}

/// A MAC in the low bytes of a word.
pub fn mac_word(mac: Mac) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}

/// [`Config::plan`]: the entry of `generation` that a plan stands in, how far a hash is shifted to number the cells of its table,
/// and what the hash begins with.
pub fn plan_word(entry: u32, shift: u32, seed: u32) -> u64 {
    u64::from(entry) | u64::from(shift) << 8 | u64::from(seed) << 32
}

/// [`Config::index`]: the entry of `names` in force, how far a hash is shifted to number its lines; and while it grows how far for those
/// at the other entry, and whether new names go there.
pub fn index_word(entry: u32, shift: u32, next: Option<(u32, bool)>) -> u64 {
    let next = next.map_or(0, |(shift, moves)| {
        u64::from(shift) << 16 | INDEX_GROWS | if moves { INDEX_MOVES } else { 0 }
    });
    u64::from(entry) | u64::from(shift) << 8 | next
}

/// The way to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// Nothing is known: packets go up.
    Unknown,
    /// There is no way: packets are dropped (`no_route`).
    None,
    /// It leaves by `port`, for `mac`.
    Known {
        /// Port to leave by.
        port: Port,
        /// Next hop's address.
        mac: Mac,
        /// Whether the next hop is the address itself.
        on_link: bool,
    },
    /// Of a route: addresses of this network are on the link of `port`, their MACs in `neighbours`.
    OnLink {
        /// Port to leave by.
        port: Port,
    },
}

impl Hop {
    const KNOWN: u8 = 1;
    const ON_LINK: u8 = 2;
    const NONE: u8 = 4;

    /// As the maps hold it.
    pub fn word(self) -> u64 {
        let (mac, port, flags) = match self {
            Hop::Unknown => ([0; 6], 0, 0),
            Hop::None => ([0; 6], 0, Self::NONE),
            Hop::Known { port, mac, on_link } => {
                (mac, port as u8, Self::KNOWN | if on_link { Self::ON_LINK } else { 0 })
            }
            Hop::OnLink { port } => ([0; 6], port as u8, Self::ON_LINK),
        };
        mac_word(mac) | u64::from(port) << 48 | u64::from(flags) << 56
    }

    /// What `lookup` says of `destination`.
    pub fn of(destination: IpAddr, lookup: crate::neighbour::NextHop) -> Hop {
        use crate::neighbour::NextHop;
        match lookup {
            NextHop::Resolved { port, next_hop, mac } => {
                Hop::Known { port, mac, on_link: next_hop == destination }
            }
            NextHop::Unresolved { .. } => Hop::Unknown,
            NextHop::NoRoute => Hop::None,
        }
    }
}

impl From<&ClientSide> for FlowKey {
    fn from(side: &ClientSide) -> FlowKey {
        FlowKey {
            client: wide(side.client),
            service: side.service,
            client_port: side.client_port.to_be_bytes(),
            reserved: 0,
        }
    }
}

/// Declares [`Up`] with the word of each.
macro_rules! ups {
    ($($(#[$meta:meta])* $variant:ident = $word:literal),+ $(,)?) => {
        /// Why the program left a frame of ours to the engine. The order is that of `enum up` in `packet/bpf/verdict.h`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Up { $($(#[$meta])* $variant),+ }

        impl Up {
            /// Every class, in the order of the counters.
            pub const ALL: &'static [Up] = &[$(Up::$variant),+];

            /// The word for it.
            pub fn as_str(self) -> &'static str {
                match self { $(Up::$variant => $word),+ }
            }

            /// The word used in the counters of events.
            pub fn event(self) -> &'static str {
                match self { $(Up::$variant => concat!("up_", $word)),+ }
            }
        }
    };
}

ups! {
    /// Headers that don't fit the frame or each other: the engine names the reason.
    Malformed = "malformed",
    /// A fragment.
    Fragment = "fragment",
    /// IPv4 options or IPv6 extension headers.
    Options = "options",
    /// ICMP other than a plain neighbour solicitation.
    Icmp = "icmp",
    /// A VLAN tag.
    Vlan = "vlan",
    /// ARP or neighbour discovery that is no plain question.
    Discovery = "discovery",
    /// Somebody else claims an address of ours.
    Claim = "claim",
    /// TTL or hop limit used up.
    Ttl = "ttl",
    /// Larger than the way's MTU.
    TooBig = "too_big",
    /// The way is not known to the program.
    Neighbour = "neighbour",
    /// A segment that changes the state of a remembered flow: SYN, FIN, RST.
    Segment = "segment",
    /// A flow that is to be remembered, or may be remembered without being known here.
    Flow = "flow",
    /// A remembered flow that a plain segment still changes.
    Unsteady = "unsteady",
    /// The backend is dead, and the policy for it is the engine's.
    DeadBackend = "dead_backend",
    /// What the maps had no room for.
    Room = "room",
    /// The program lacks something that it needs: before the first plan.
    Unready = "unready",
    /// A flow that the program could not write down: it may make no more for now, found no free port nearby or no room, or its flow
    /// is another than it would make.
    Note = "note",
}
const _: () = assert!(Up::ALL.len() <= TALLY_UP);
