//! Both datagrams on the wire, before sealing.
//!
//! Numbers are LEB128 (`v`), addresses and ports in network order. First byte of both: [`VERSION`].
//!
//! | report | |
//! |---|---|
//! | v | node that sends it |
//! | 16 bytes | session of the receiver as the sender knows it; zeros: not at all |
//! | v v | generation that comes in from the receiver (0: none), and how many of its datagrams are applied |
//! | 8 bytes | bit `i`: the datagram `applied + i` has arrived and waits |
//!
//! | data | |
//! |---|---|
//! | v v v | node that sends it, generation, number in it |
//! | v | log index of the sender's tables |
//! | 1 byte | 1: the generation begins, and the next field is there; 2: with this datagram all flows have been told; 4: a report is wanted at once |
//! | v, (v v)… | groups with their epochs |
//! | … | changes, to the end |
//!
//! A change is a byte of flags ([`flag`]), then what they don't say to be as in the change before it, in the order service (v),
//! client, its port; for a known flow backend (v), progress (1 byte), SNAT address, SNAT port. The end of a flow
//! that has a SNAT port says service, backend, SNAT address and port instead: over IPv6 4 bytes and not 19.
//!
//! An address is 4 bytes of IPv4; or of IPv6 a byte that says how many leading bytes, 15 at most, are those of the address in the
//! same field before it (`::` where there was none, or one of IPv4), and then the others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use komainu_proto::domain::{BackendId, GroupId, NodeId, ServiceId};

use super::{Binding, Change, MAX_LEN, Name, Owned, Record};
use crate::seal::Session;

const VERSION: u8 = 3;
const BEGINS: u8 = 1;
const COMPLETE: u8 = 2;
const URGENT: u8 = 4;
/// Leading bytes of an IPv6 address that are not said again: an address that is the same whole has a flag for that.
const MAX_SAME: usize = 15;
/// Groups in one datagram: as many as a document can hold.
const MAX_SCOPE: usize = crate::state::MAX_GROUPS;
/// Longest change: flags, three numbers of up to five bytes less one, two IPv6 addresses, two ports, progress.
const MAX_CHANGE_LEN: usize = 1 + 5 + 17 + 2 + 5 + 1 + 17 + 2;

/// Flags of a change.
mod flag {
    /// The flow is gone; the fields after the client's port are missing, or with [`SNAT`] those of client and progress.
    pub const GONE: u8 = 1;
    pub const SAME_SERVICE: u8 = 1 << 1;
    pub const SAME_CLIENT: u8 = 1 << 2;
    pub const SAME_BACKEND: u8 = 1 << 3;
    pub const SAME_PROGRESS: u8 = 1 << 4;
    pub const SNAT: u8 = 1 << 5;
    pub const SAME_SNAT: u8 = 1 << 6;
    /// Addresses that are there are IPv6.
    pub const V6: u8 = 1 << 7;
}

/// Why a datagram can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Of another version.
    #[error("it is of version {0}")]
    Version(u8),
    /// It ends in the middle of something.
    #[error("it is cut off")]
    Short,
    /// A value that no sender writes.
    #[error("its field {0} holds what no sender writes")]
    Field(&'static str),
}

/// What a node tells of what comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Who tells.
    pub from: NodeId,
    /// The receiver's session as the sender knows it.
    pub to: Option<Session>,
    /// Which of the receiver's generations comes in; 0: none.
    pub generation: u64,
    /// How many of its datagrams are applied.
    pub applied: u64,
    /// Bit `i`: datagram `applied + i` has arrived.
    pub arrived: u64,
}

/// Flows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// Whose.
    pub from: NodeId,
    /// Which generation.
    pub generation: u64,
    /// Its number in it, from 0.
    pub number: u64,
    /// Log index of the sender's tables.
    pub index: u64,
    /// The generation's groups; in its first datagram.
    pub begins: Option<Vec<Owned>>,
    /// With this datagram all flows have been told.
    pub complete: bool,
    /// The sender waits for its acknowledgement.
    pub urgent: bool,
    /// What happened.
    pub changes: Vec<Change>,
}

impl Report {
    /// On the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        put_number(&mut out, self.from.0);
        out.extend_from_slice(&self.to.map_or([0; 16], |s| s.0));
        put_number(&mut out, self.generation);
        put_number(&mut out, self.applied);
        out.extend_from_slice(&self.arrived.to_be_bytes());
        out
    }

    /// From the wire.
    ///
    /// # Errors
    /// It is none.
    pub fn decode(bytes: &[u8]) -> Result<Report, WireError> {
        let mut r = Reader::new(bytes)?;
        let from = NodeId(r.number()?);
        let to: [u8; 16] = r.array()?;
        let report = Report {
            from,
            to: (to != [0; 16]).then_some(Session(to)),
            generation: r.number()?,
            applied: r.number()?,
            arrived: u64::from_be_bytes(r.array()?),
        };
        if r.rest.is_empty() { Ok(report) } else { Err(WireError::Field("end")) }
    }
}

impl Data {
    /// From the wire.
    ///
    /// # Errors
    /// It is none.
    pub fn decode(bytes: &[u8]) -> Result<Data, WireError> {
        let mut r = Reader::new(bytes)?;
        let (from, generation, number, index) = (NodeId(r.number()?), r.number()?, r.number()?, r.number()?);
        let [marks] = r.array()?;
        if marks & !(BEGINS | COMPLETE | URGENT) != 0 || generation == 0 {
            return Err(WireError::Field("marks"));
        }
        let begins = if marks & BEGINS != 0 { Some(r.scope()?) } else { None };
        if begins.is_some() != (number == 0) {
            return Err(WireError::Field("number"));
        }
        let mut changes = Vec::new();
        let mut context = Context::default();
        while !r.rest.is_empty() {
            changes.push(r.change(&mut context)?);
        }
        let (complete, urgent) = (marks & COMPLETE != 0, marks & URGENT != 0);
        Ok(Data { from, generation, number, index, begins, complete, urgent, changes })
    }
}

/// A data datagram that is being written.
#[derive(Debug)]
pub(super) struct Writer {
    out: Vec<u8>,
    marks_at: usize,
    context: Context,
}

impl Writer {
    /// The datagram with that number of a generation; the first one names its groups.
    pub(super) fn new(from: NodeId, generation: u64, number: u64, index: u64, scope: &[Owned]) -> Writer {
        let mut out = Vec::with_capacity(MAX_LEN);
        out.push(VERSION);
        for n in [from.0, generation, number, index] {
            put_number(&mut out, n);
        }
        let marks_at = out.len();
        out.push(if number == 0 { BEGINS } else { 0 });
        if number == 0 {
            put_number(&mut out, scope.len() as u64);
            for owned in scope {
                put_number(&mut out, u64::from(owned.group.0));
                put_number(&mut out, owned.epoch);
            }
        }
        Writer { out, marks_at, context: Context::default() }
    }

    /// Whether any change fits.
    pub(super) fn has_room(&self) -> bool {
        self.out.len() + MAX_CHANGE_LEN <= MAX_LEN
    }

    /// Adds a change; there must be room.
    pub(super) fn put(&mut self, change: &Change) {
        let same = |is: bool, flag: u8| if is { flag } else { 0 };
        let c = &self.context;
        let (name, record) = match change {
            Change::Known(record) => (record.name, Some(record)),
            Change::Gone(name) => (*name, None),
            Change::Unbound(binding) => {
                let flags = flag::GONE
                    | flag::SNAT
                    | same(c.service == Some(binding.service), flag::SAME_SERVICE)
                    | same(c.backend == Some(binding.backend), flag::SAME_BACKEND)
                    | same(c.snat == Some(binding.snat.ip()), flag::SAME_SNAT)
                    | same(binding.snat.is_ipv6(), flag::V6);
                self.put_binding(flags, binding);
                self.context.note(change);
                return;
            }
        };
        let mut flags = same(c.service == Some(name.service), flag::SAME_SERVICE)
            | same(c.client == Some(name.client.ip()), flag::SAME_CLIENT)
            | same(name.client.is_ipv6(), flag::V6);
        match record {
            None => flags |= flag::GONE,
            Some(r) => {
                flags |= same(c.backend == Some(r.backend), flag::SAME_BACKEND)
                    | same(c.progress == Some(r.progress), flag::SAME_PROGRESS);
                if let Some(snat) = r.snat {
                    flags |= flag::SNAT | same(c.snat == Some(snat.ip()), flag::SAME_SNAT);
                }
            }
        }
        let out = &mut self.out;
        out.push(flags);
        if flags & flag::SAME_SERVICE == 0 {
            put_number(out, u64::from(name.service.0));
        }
        if flags & flag::SAME_CLIENT == 0 {
            put_address(out, name.client.ip(), self.context.client);
        }
        out.extend_from_slice(&name.client.port().to_be_bytes());
        if let Some(r) = record {
            if flags & flag::SAME_BACKEND == 0 {
                put_number(out, u64::from(r.backend.0));
            }
            if flags & flag::SAME_PROGRESS == 0 {
                out.push(r.progress);
            }
            if let Some(snat) = r.snat {
                if flags & flag::SAME_SNAT == 0 {
                    put_address(out, snat.ip(), self.context.snat);
                }
                out.extend_from_slice(&snat.port().to_be_bytes());
            }
        }
        self.context.note(change);
    }

    fn put_binding(&mut self, flags: u8, binding: &Binding) {
        let out = &mut self.out;
        out.push(flags);
        if flags & flag::SAME_SERVICE == 0 {
            put_number(out, u64::from(binding.service.0));
        }
        if flags & flag::SAME_BACKEND == 0 {
            put_number(out, u64::from(binding.backend.0));
        }
        if flags & flag::SAME_SNAT == 0 {
            put_address(out, binding.snat.ip(), self.context.snat);
        }
        out.extend_from_slice(&binding.snat.port().to_be_bytes());
    }

    /// The datagram.
    pub(super) fn finish(mut self, complete: bool, urgent: bool) -> Vec<u8> {
        let marks = if complete { COMPLETE } else { 0 } | if urgent { URGENT } else { 0 };
        self.out[self.marks_at] |= marks;
        self.out
    }
}

/// What the next change may refer to. Each datagram begins without, so that it can be read alone.
#[derive(Debug, Default)]
struct Context {
    service: Option<ServiceId>,
    client: Option<IpAddr>,
    backend: Option<BackendId>,
    progress: Option<u8>,
    snat: Option<IpAddr>,
}

impl Context {
    fn note(&mut self, change: &Change) {
        self.service = Some(change.service());
        match change {
            Change::Gone(name) => self.client = Some(name.client.ip()),
            Change::Unbound(binding) => {
                self.backend = Some(binding.backend);
                self.snat = Some(binding.snat.ip());
            }
            Change::Known(record) => {
                self.client = Some(record.name.client.ip());
                self.backend = Some(record.backend);
                self.progress = Some(record.progress);
                self.snat = record.snat.map(|s| s.ip()).or(self.snat);
            }
        }
    }
}

fn put_number(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn put_address(out: &mut Vec<u8>, address: IpAddr, before: Option<IpAddr>) {
    match address {
        IpAddr::V4(a) => out.extend_from_slice(&a.octets()),
        IpAddr::V6(a) => {
            let (a, before) = (a.octets(), v6_octets(before));
            let same = a.iter().zip(&before).take(MAX_SAME).take_while(|(a, b)| a == b).count();
            out.push(same as u8);
            out.extend_from_slice(&a[same..]);
        }
    }
}

/// What an IPv6 address is told by.
fn v6_octets(before: Option<IpAddr>) -> [u8; 16] {
    match before {
        Some(IpAddr::V6(a)) => a.octets(),
        Some(IpAddr::V4(_)) | None => [0; 16],
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Result<Reader<'a>, WireError> {
        match bytes {
            [VERSION, rest @ ..] => Ok(Reader { rest }),
            [other, ..] => Err(WireError::Version(*other)),
            [] => Err(WireError::Short),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (array, rest) = self.rest.split_first_chunk::<N>().ok_or(WireError::Short)?;
        self.rest = rest;
        Ok(*array)
    }

    fn number(&mut self) -> Result<u64, WireError> {
        let mut n = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            n |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(n);
            }
        }
        Err(WireError::Field("number"))
    }

    fn small(&mut self, field: &'static str) -> Result<u32, WireError> {
        u32::try_from(self.number()?).map_err(|_| WireError::Field(field))
    }

    fn address(&mut self, v6: bool, before: Option<IpAddr>) -> Result<IpAddr, WireError> {
        if !v6 {
            return Ok(Ipv4Addr::from(self.array::<4>()?).into());
        }
        let same = usize::from(self.array::<1>()?[0]);
        if same > MAX_SAME {
            return Err(WireError::Field("address"));
        }
        let mut octets = v6_octets(before);
        let (own, rest) = self.rest.split_at_checked(octets.len() - same).ok_or(WireError::Short)?;
        octets[same..].copy_from_slice(own);
        self.rest = rest;
        Ok(Ipv6Addr::from(octets).into())
    }

    fn port(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn scope(&mut self) -> Result<Vec<Owned>, WireError> {
        let len = self.number()?;
        if len > MAX_SCOPE as u64 {
            return Err(WireError::Field("groups"));
        }
        (0..len).map(|_| Ok(Owned { group: GroupId(self.small("group")?), epoch: self.number()? })).collect()
    }

    fn change(&mut self, context: &mut Context) -> Result<Change, WireError> {
        let [flags] = self.array()?;
        let has = |flag: u8| flags & flag != 0;
        let service = match (has(flag::SAME_SERVICE), context.service) {
            (false, _) => ServiceId(self.small("service")?),
            (true, Some(service)) => service,
            (true, None) => return Err(WireError::Field("service")),
        };
        let v6 = has(flag::V6);
        let change = if has(flag::GONE) && has(flag::SNAT) {
            if has(flag::SAME_CLIENT) || has(flag::SAME_PROGRESS) {
                return Err(WireError::Field("flags"));
            }
            let backend = self.backend(has(flag::SAME_BACKEND), context)?;
            let snat = self.snat(has(flag::SAME_SNAT), v6, context)?;
            Change::Unbound(Binding { service, backend, snat })
        } else {
            let address = match (has(flag::SAME_CLIENT), context.client) {
                (false, _) => self.address(v6, context.client)?,
                (true, Some(address)) if address.is_ipv6() == v6 => address,
                (true, _) => return Err(WireError::Field("client")),
            };
            let name = Name { service, client: SocketAddr::new(address, self.port()?) };
            if has(flag::GONE) {
                Change::Gone(name)
            } else {
                let backend = self.backend(has(flag::SAME_BACKEND), context)?;
                let progress = match (has(flag::SAME_PROGRESS), context.progress) {
                    (false, _) => self.array::<1>()?[0],
                    (true, Some(progress)) => progress,
                    (true, None) => return Err(WireError::Field("progress")),
                };
                let snat = match has(flag::SNAT) {
                    true => Some(self.snat(has(flag::SAME_SNAT), v6, context)?),
                    false => None,
                };
                Change::Known(Record { name, backend, snat, progress })
            }
        };
        context.note(&change);
        Ok(change)
    }

    fn backend(&mut self, same: bool, context: &Context) -> Result<BackendId, WireError> {
        match (same, context.backend) {
            (false, _) => Ok(BackendId(self.small("backend")?)),
            (true, Some(backend)) => Ok(backend),
            (true, None) => Err(WireError::Field("backend")),
        }
    }

    fn snat(&mut self, same: bool, v6: bool, context: &Context) -> Result<SocketAddr, WireError> {
        let address = match (same, context.snat) {
            (false, _) => self.address(v6, context.snat)?,
            (true, Some(address)) => address,
            (true, None) => return Err(WireError::Field("snat")),
        };
        Ok(SocketAddr::new(address, self.port()?))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn any_name()(service in 0u32..3, v6: bool, address in 0u8..3, port: u16) -> Name {
            let ip: IpAddr = match v6 {
                true => Ipv6Addr::from(u128::from(address)).into(),
                false => Ipv4Addr::new(198, 51, 100, address).into(),
            };
            Name { service: ServiceId(service), client: SocketAddr::new(ip, port) }
        }
    }

    prop_compose! {
        pub fn any_change()(
            name in any_name(), gone: bool, by_name: bool, backend in 0u32..300, snat in prop::option::of((0u8..2, any::<u16>())),
            progress in 0u8..3,
        ) -> Change {
            let snat = snat.map(|(last, port)| {
                let ip: IpAddr = match name.client.is_ipv6() {
                    true => Ipv6Addr::from(u128::from(last) << 64).into(),
                    false => Ipv4Addr::new(192, 0, 2, last).into(),
                };
                SocketAddr::new(ip, port)
            });
            let record = Record { name, backend: BackendId(backend), snat, progress };
            match (gone, by_name) {
                (true, true) => Change::Gone(name),
                (true, false) => record.ended(),
                (false, _) => Change::Known(record),
            }
        }
    }

    fn write(scope: &[Owned], number: u64, changes: &[Change]) -> (Vec<u8>, usize) {
        let mut writer = Writer::new(NodeId(7), 3, number, 1 << 40, scope);
        let mut written = 0;
        for change in changes {
            if !writer.has_room() {
                break;
            }
            writer.put(change);
            written += 1;
        }
        (writer.finish(true, number == 0), written)
    }

    proptest! {
        #[test]
        fn data_survives_the_wire(changes in prop::collection::vec(any_change(), 0..200), number in 0u64..2) {
            let scope = [Owned { group: GroupId(1), epoch: 400 }, Owned { group: GroupId(300), epoch: 2 }];
            let (bytes, written) = write(&scope, number, &changes);
            prop_assert!(bytes.len() <= MAX_LEN);
            let data = Data::decode(&bytes).unwrap();
            prop_assert_eq!(&data.changes[..], &changes[..written]);
            prop_assert_eq!(data.urgent, number == 0);
            prop_assert_eq!(data.begins, (number == 0).then(|| scope.to_vec()));
            prop_assert_eq!((data.from, data.generation, data.number, data.index, data.complete),
                (NodeId(7), 3, number, 1 << 40, true));
        }

        #[test]
        fn a_report_survives_the_wire(from: u16, to: [u8; 16], generation: u64, applied: u64, arrived: u64) {
            let to = (to != [0; 16]).then_some(Session(to));
            let report = Report { from: NodeId(from.into()), to, generation, applied, arrived };
            prop_assert_eq!(Report::decode(&report.encode()), Ok(report));
        }

        #[test]
        fn no_datagram_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Some(first) = bytes.first_mut() {
                *first &= 1;
            }
            let _ = Report::decode(&bytes);
            let _ = Data::decode(&bytes);
        }
    }

    /// What the issue of this protocol promises: below 32 bytes for a flow of `nat`, its beginning and end, headers included.
    #[test]
    fn a_flow_of_nat_takes_less_than_32_bytes() {
        let v4 = |n: u16| IpAddr::from([198, 51, (n >> 8) as u8, n as u8]);
        let v6 = |n: u16| IpAddr::from([0x2001, 0xdb8, n, 7, 0x1234, 5, 6, n]);
        let snats: [IpAddr; 2] = ["192.0.2.101".parse().unwrap(), "2001:db8::101".parse().unwrap()];
        for (client, snat, most) in [(&v4 as &dyn Fn(u16) -> IpAddr, snats[0], 18.0), (&v6, snats[1], 31.0)] {
            let record = |n: u16| Record {
                name: Name { service: ServiceId(5), client: SocketAddr::new(client(n), 40_000 + n) },
                backend: BackendId(u32::from(n % 3)),
                snat: Some(SocketAddr::new(snat, 2000 + n)),
                progress: 0x61,
            };
            let mut flows = 0;
            let mut writer = Writer::new(NodeId(1), 9, 1000, 100_000, &[]);
            while writer.has_room() {
                writer.put(&Change::Known(record(flows)));
                if writer.has_room() {
                    writer.put(&record(flows).ended());
                }
                flows += 1;
            }
            // The seal, UDP and IPv6.
            let bytes = writer.finish(false, false).len() + crate::seal::OVERHEAD + 8 + 40;
            let each = bytes as f64 / f64::from(flows);
            println!("{snat}: {each} bytes");
            assert!(each < most, "{snat}: {each}");
        }
    }
}
