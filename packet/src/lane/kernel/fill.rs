//! Puts compiled tables into the program's maps: a generation at a time.
//!
//! The order of writes makes every packet see one plan or the other: backends and services first (they are looked at by
//! number, and numbers that the old plan does not name nobody looks at), then the Maglev tables at places that nobody names
//! yet, then the table of places with one write, and only when no program can still be reading the old one are the
//! old Maglev tables given back. Whether a backend *of a remembered flow* is alive stands with the backend, not in the
//! generation: such a packet may see the new answer a moment before the rest of the plan.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::abi::{
    self, BackendCell, Hop, Place, PlaceEntry, Plain, Record, SLOTS_PER_LINE, ServiceCell, SlotLine,
};
use super::maps::Maps;
use super::places::Layout;
use super::program::{KernelError, MAX_TABLES};
use super::sys::{self, Mapped};
use crate::engine::{Engine, OwnedAddress, Port, SNAT_PORT_MIN, SNAT_PORT_UPPER};
use crate::flow::CLOSED_IDLE;
use crate::hash;
use crate::maglev::Maglev;
use crate::plan::{DeadBackend, Mode, Scheduler};
use crate::tables::{Service, Table, Tables};

/// What a generation is made of: the tables in force with the engine's numbers for them.
#[derive(Clone, Debug)]
pub struct Snapshot {
    tables: Arc<Tables>,
    services: Vec<(u32, Box<[u32]>)>,
    owned: Vec<OwnedAddress>,
}

impl Snapshot {
    /// Of the plan in force in `engine`. It depends on the plan and on the interfaces' addresses.
    pub fn of(engine: &Engine) -> Snapshot {
        let tables = Arc::clone(engine.tables());
        let numbers = tables.services().iter().enumerate().map(|(index, service)| {
            let index = index as u16;
            let backends = (0..service.backends.len() as u16).map(|b| engine.backend_number(index, b));
            (engine.service_number(index), backends.collect())
        });
        let services = numbers.collect();
        Snapshot { services, owned: engine.owned(), tables }
    }

    /// Every backend with the number of its state.
    pub fn backends(&self) -> impl Iterator<Item = (u32, IpAddr)> + '_ {
        self.tables.services().iter().zip(&self.services).flat_map(|(service, (_, numbers))| {
            service.backends.iter().zip(numbers).map(|(b, &number)| (number, b.address))
        })
    }
}

/// What was installed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// Services all of whose packets go up, because the maps have no room for their numbers or tables: the program should be
    /// loaded anew with larger maps.
    pub without_room: usize,
    /// Maglev tables written; the rest were those of before.
    pub tables_written: usize,
}

/// The one writer of generations.
#[derive(Debug)]
pub struct Filler {
    maps: Arc<Maps>,
    /// Tables in the map `slots`, by number of the service's state.
    filled: HashMap<u32, Filled>,
    free: Vec<u32>,
    /// What the generation in force names.
    services: HashSet<u32>,
    backends: HashSet<u32>,
    /// Entry of `generation` that the plan in force stands in.
    entry: u32,
    /// Takes the place of tables that nobody names any more.
    nothing: Option<OwnedFd>,
}

/// A service's Maglev tables as they were written, with what they were made of.
#[derive(Clone, Debug)]
struct Filled {
    current: Arc<Table>,
    base: Option<Arc<Table>>,
    /// Of each backend: its number and whether new flows may go to it.
    backends: Box<[(u32, bool)]>,
    current_at: u32,
    base_at: u32,
    /// SNAT addresses that the program makes flows with, and the place of the table of them where they are several.
    sources: Box<[IpAddr]>,
    sources_at: Option<u32>,
}

impl Filled {
    fn is_of(&self, service: &Service, backends: &[(u32, bool)], sources: &[IpAddr]) -> bool {
        let same_base = match (&self.base, service.base()) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        Arc::ptr_eq(&self.current, service.current())
            && same_base
            && *self.backends == *backends
            && *self.sources == *sources
    }

    fn places(&self) -> impl Iterator<Item = u32> {
        let base = self.base.as_ref().map(|_| self.base_at);
        [Some(self.current_at), base, self.sources_at].into_iter().flatten()
    }
}

/// An entry of `generation` that no program looks at: it is written to wait for them.
const WAITING_ENTRY: u32 = 2;

/// The program opens no closing flow again that the engine may forget within so long: by then it has learned of it.
const REOPEN_MARGIN: Duration = Duration::from_secs(1);

/// SNAT addresses of a service that the program makes flows with: their lower ports are counted in 32 bits. More than a group can have.
const MAX_SOURCES: usize = 1024;

/// Tables written at once: each holds a descriptor until then.
const BATCH: usize = 128;

impl Filler {
    /// A writer for maps that no other writes generations to.
    pub fn new(maps: Arc<Maps>) -> Filler {
        Filler {
            maps,
            filled: HashMap::new(),
            free: (0..MAX_TABLES).rev().collect(),
            services: HashSet::new(),
            backends: HashSet::new(),
            entry: 0,
            nothing: None,
        }
    }

    /// Puts `snapshot` in force as a whole. `hop` says the way to a backend. When this returns, every packet that comes is
    /// treated by it. It waits for the kernel (some milliseconds up to tens).
    ///
    /// # Errors
    /// A map could not be written; what was in force stays, except that backends may know their new ways already.
    pub fn install(
        &mut self,
        snapshot: &Snapshot,
        hop: &dyn Fn(IpAddr) -> Hop,
    ) -> Result<Installed, KernelError> {
        let mut installed = Installed::default();
        let sizes = self.maps.sizes();
        let (mut services, mut backends) = (HashSet::new(), HashSet::new());
        let mut entries: Vec<(Place, Record)> = Vec::new();
        let mut filled = HashMap::new();
        let mut writer = Writer::new(Arc::clone(&self.maps));

        for (service, (number, numbers)) in snapshot.tables.services().iter().zip(&snapshot.services) {
            let number = *number;
            let fits = number < sizes.services && numbers.iter().all(|&n| n < sizes.backends);
            if fits {
                services.insert(number);
                self.maps.set_service(number, &service_cell(service));
                for (backend, &n) in service.backends.iter().zip(numbers) {
                    let alive = if backend.alive { abi::BACKEND_ALIVE } else { 0 };
                    let cell = BackendCell {
                        hop: hop(backend.address).word(),
                        address: abi::wide(backend.address),
                        port: backend.port.to_be_bytes(),
                        flags: abi::BACKEND_IN_PLAN | alive,
                        service: number,
                        id: backend.id,
                        ..BackendCell::zeroed()
                    };
                    self.maps.set_backend(n, &cell);
                    backends.insert(n);
                }
            }
            let pairs: Box<[(u32, bool)]> =
                service.backends.iter().zip(numbers).map(|(b, &n)| (n, b.alive)).collect();
            let sources = made_from(&snapshot.tables, service);
            let tables = match self.filled.get(&number).filter(|f| f.is_of(service, &pairs, sources)) {
                _ if !fits => None,
                Some(same) => Some(same.clone()),
                None => self.write_tables(&mut writer, service, pairs, sources, &mut installed)?,
            };
            installed.without_room += usize::from(tables.is_none());
            entries.push((service_place(service), record(service, number, tables.as_ref())));
            if service.mode == Mode::NatTransparent {
                answers(service, number, numbers, fits, &mut entries);
            }
            if let Some(tables) = tables {
                filled.insert(number, tables);
            }
        }
        for owned in &snapshot.owned {
            entries.push(owned_entry(&snapshot.tables, owned));
        }
        let through = |v4| {
            let services = snapshot.tables.services();
            services.iter().any(|s| s.mode == Mode::NatTransparent && s.vip.is_ipv4() == v4)
        };
        self.maps.set_through(through(true), through(false));
        let written = writer.flush().and_then(|()| self.swap(entries));
        if let Err(e) = written {
            // What was written stands at places that nobody names; they are free again.
            let kept: HashSet<u32> = self.filled.values().flat_map(Filled::places).collect();
            self.free.extend(filled.values().flat_map(Filled::places).filter(|at| !kept.contains(at)));
            return Err(e);
        }

        // From here on no program sees the old generation.
        for &number in self.backends.difference(&backends) {
            if let Some(cell) = self.maps.backend(number) {
                self.maps.set_backend(number, &BackendCell { flags: 0, ..cell });
            }
        }
        for &number in self.services.difference(&services) {
            if let Some(cell) = self.maps.service(number) {
                self.maps.set_service(number, &ServiceCell { flags: 0, ..cell });
            }
        }
        (self.services, self.backends) = (services, backends);
        let kept: HashSet<u32> = filled.values().flat_map(Filled::places).collect();
        let old: Vec<u32> =
            self.filled.values().flat_map(Filled::places).filter(|at| !kept.contains(at)).collect();
        self.filled = filled;
        self.give_back(old)?;
        Ok(installed)
    }

    /// Writes the tables of a service to free places; `None` when there are none.
    fn write_tables(
        &mut self,
        writer: &mut Writer,
        service: &Service,
        backends: Box<[(u32, bool)]>,
        sources: &[IpAddr],
        installed: &mut Installed,
    ) -> Result<Option<Filled>, KernelError> {
        let several = sources.len() > 1;
        let wanted = 1 + usize::from(service.in_transition()) + usize::from(several);
        if self.free.len() < wanted {
            return Ok(None);
        }
        let current = service.current();
        let base = service.base();
        let mut place = || self.free.pop().expect("counted above");
        let current_at = place();
        let base_at = if base.is_some() { place() } else { 0 };
        let sources_at = several.then(&mut place);
        let slot = |maglev: &Maglev, i: u32| {
            maglev.at(i).and_then(|b| backends.get(usize::from(b))).map_or(0, |&(number, alive)| {
                (number + 1) & abi::SLOT_NUMBER | if alive { abi::SLOT_ALIVE } else { 0 }
            })
        };
        let maglev = current.maglev();
        writer.write(current_at, maglev.size(), |i| {
            let moved = base.is_some_and(|base| has_moved(maglev, base.maglev(), i));
            slot(maglev, i) | if moved { abi::SLOT_MOVED } else { 0 }
        })?;
        installed.tables_written += wanted;
        if let Some(base) = base {
            writer.write(base_at, base.maglev().size(), |i| slot(base.maglev(), i))?;
        }
        if let Some(at) = sources_at {
            let words: Vec<u32> = sources.iter().flat_map(|a| words_of(*a)).collect();
            writer.write(at, words.len() as u32, |i| words[i as usize])?;
        }
        let (current, base) = (Arc::clone(current), base.cloned());
        Ok(Some(Filled { current, base, backends, current_at, base_at, sources: sources.into(), sources_at }))
    }

    /// The one write that puts a generation in force. Returns when no program sees the old one any more.
    fn swap(&mut self, entries: Vec<(Place, Record)>) -> Result<(), KernelError> {
        let doing = || KernelError::map("write the plan into the program's maps");
        // Of equal places the last counts: backends may share an address.
        let mut places: HashMap<Place, Record> = HashMap::with_capacity(entries.len());
        places.extend(entries);
        let entries: Vec<(Place, Record)> = places.into_iter().collect();
        let layout = Layout::of(&entries);
        let cells = layout.cells.len() as u32;
        let flags = sys::FLAG_MMAPABLE | sys::FLAG_INNER;
        let table =
            sys::create::<u32, PlaceEntry>("places", sys::TYPE_ARRAY, cells, flags).map_err(doing())?;
        let mapped: Mapped<PlaceEntry> = Mapped::new(table.as_fd(), cells).map_err(doing())?;
        for (at, index) in (0..).zip(&layout.cells) {
            if let Some(index) = index {
                let (place, record) = entries[*index as usize];
                mapped.write(at, &PlaceEntry { place, record, used: 1, ..PlaceEntry::zeroed() });
            }
        }
        // A packet that has read the old word finds the old table where it was.
        let entry = self.entry ^ 1;
        sys::update(self.maps.generation.as_fd(), &entry, &table.as_raw_fd(), 0).map_err(doing())?;
        self.maps.set_plan(abi::plan_word(entry, layout.shift, layout.seed));
        self.entry = entry;
        // A write to a map of maps returns only when every program that ran before has ended (maybe_wait_bpf_programs() in
        // kernel/bpf/syscall.c); from here on none sees the old plan.
        sys::update(self.maps.generation.as_fd(), &WAITING_ENTRY, &table.as_raw_fd(), 0).map_err(doing())
    }

    fn give_back(&mut self, places: Vec<u32>) -> Result<(), KernelError> {
        if places.is_empty() {
            return Ok(());
        }
        let doing = || KernelError::map("give Maglev tables back");
        let nothing = match self.nothing.take() {
            Some(nothing) => nothing,
            None => create_table(1).map_err(doing())?,
        };
        let values = vec![nothing.as_raw_fd(); places.len()];
        put_tables(&self.maps, &places, &values).map_err(doing())?;
        self.nothing = Some(nothing);
        self.free.extend(places);
        Ok(())
    }
}

/// Collects tables, and writes them by the batch: each write to a map of maps waits for all programs that run.
struct Writer {
    maps: Arc<Maps>,
    places: Vec<u32>,
    tables: Vec<OwnedFd>,
}

impl Writer {
    fn new(maps: Arc<Maps>) -> Writer {
        Writer { maps, places: Vec::new(), tables: Vec::new() }
    }

    /// Writes a table of `size` slots for the place `at`.
    fn write(&mut self, at: u32, size: u32, slot: impl Fn(u32) -> u32) -> Result<(), KernelError> {
        let doing = || KernelError::map("write a Maglev table into the program's maps");
        let lines = size.div_ceil(SLOTS_PER_LINE as u32).max(1);
        let table = create_table(lines).map_err(doing())?;
        let mapped: Mapped<SlotLine> = Mapped::new(table.as_fd(), lines).map_err(doing())?;
        for line in 0..lines {
            let mut value = SlotLine::zeroed();
            for (i, to) in value.slots.iter_mut().enumerate() {
                let i = line * SLOTS_PER_LINE as u32 + i as u32;
                if i < size {
                    *to = slot(i);
                }
            }
            mapped.write(line, &value);
        }
        self.places.push(at);
        self.tables.push(table);
        if self.tables.len() >= BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), KernelError> {
        let values: Vec<i32> = self.tables.iter().map(AsRawFd::as_raw_fd).collect();
        put_tables(&self.maps, &self.places, &values)
            .map_err(KernelError::map("hand Maglev tables to the program"))?;
        self.places.clear();
        self.tables.clear();
        Ok(())
    }
}

fn create_table(lines: u32) -> io::Result<OwnedFd> {
    sys::create::<u32, SlotLine>("slots", sys::TYPE_ARRAY, lines, sys::FLAG_MMAPABLE | sys::FLAG_INNER)
}

fn put_tables(maps: &Maps, places: &[u32], tables: &[i32]) -> io::Result<()> {
    match sys::update_batch(maps.slots.as_fd(), places, tables) {
        Err(e) if is_unsupported(&e) => {
            for (place, table) in places.iter().zip(tables) {
                sys::update(maps.slots.as_fd(), place, table, 0)?;
            }
            Ok(())
        }
        done => done,
    }
}

/// Whether a kernel before 5.13 or so knows no batches for this type of map: `ENOTSUPP` is the kernel's own number.
fn is_unsupported(e: &io::Error) -> bool {
    const ENOTSUPP: i32 = 524;
    matches!(e.raw_os_error(), Some(ENOTSUPP | libc::EOPNOTSUPP | libc::EINVAL))
}

/// Whether the base table has another backend for some hash that falls on slot `i` of the current one.
fn has_moved(current: &Maglev, base: &Maglev, i: u32) -> bool {
    if current.size() == base.size() {
        return current.at(i) != base.at(i);
    }
    let first = |i: u64| (i << 32).div_ceil(u64::from(current.size()));
    let (from, to) = (first(u64::from(i)), first(u64::from(i) + 1) - 1);
    let slot = |h: u64| hash::scale(h.min(u64::from(u32::MAX)) as u32, base.size());
    (slot(from)..=slot(to)).any(|j| base.at(j) != current.at(i))
}

fn service_cell(service: &Service) -> ServiceCell {
    ServiceCell {
        flags: abi::SERVICE_IN_PLAN,
        group: service.group,
        vip: abi::wide(service.vip),
        port: service.port.to_be_bytes(),
        ..ServiceCell::zeroed()
    }
}

fn service_place(service: &Service) -> Place {
    Place {
        address: abi::wide(service.vip),
        port: service.port.to_be_bytes(),
        protocol: service.protocol.number(),
        kind: abi::KIND_SERVICE,
    }
}

/// An address as the program reads it, word by word.
fn words_of(address: IpAddr) -> [u32; 4] {
    let bytes = abi::wide(address);
    std::array::from_fn(|i| {
        u32::from_ne_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
    })
}

fn record(service: &Service, number: u32, tables: Option<&Filled>) -> Record {
    let mut flags = 0;
    let mut set = |flag: u16, on: bool| flags |= if on { flag } else { 0 };
    set(abi::RECORD_HASHED, matches!(service.scheduler, Scheduler::Maglev | Scheduler::SourceIp));
    set(abi::RECORD_SOURCE_IP, service.scheduler == Scheduler::SourceIp);
    set(abi::RECORD_TRACKS_ALL, service.tracks_all);
    set(abi::RECORD_KEEP, service.dead_backend == DeadBackend::Keep);
    set(abi::RECORD_UP, tables.is_none());
    let sources = tables.map_or(&[][..], |t| &t.sources);
    set(abi::RECORD_MAKES, !sources.is_empty());
    let base = tables.and_then(|t| Some((t.base_at, t.base.as_ref()?.maglev().size())));
    Record {
        group: service.group,
        service: number,
        flags,
        mode: match service.mode {
            Mode::Dsr => abi::MODE_DSR,
            Mode::Nat => abi::MODE_NAT,
            Mode::NatTransparent => abi::MODE_NAT_TRANSPARENT,
        },
        current: tables.map_or(0, |t| t.current_at),
        current_size: tables.map_or(0, |t| t.current.maglev().size()),
        base: base.map_or(0, |b| b.0),
        base_size: base.map_or(0, |b| b.1),
        vip: abi::wide(service.vip),
        vip_port: service.port.to_be_bytes(),
        id: service.id,
        snat: sources.first().map_or([0; 16], |first| abi::wide(*first)),
        snat_count: sources.len() as u32,
        snats: tables.and_then(|t| t.sources_at).unwrap_or_default(),
        reopen: CLOSED_IDLE.min(service.idle).saturating_sub(REOPEN_MARGIN).as_nanos() as u64,
        ..Record::zeroed()
    }
}

/// The SNAT addresses of a service whose new flows the program makes, else none: full NAT, the backend chosen by hash, addresses that
/// have all the lower ports for it.
fn made_from<'a>(tables: &Tables, service: &'a Service) -> &'a [IpAddr] {
    let hashed = matches!(service.scheduler, Scheduler::Maglev | Scheduler::SourceIp);
    if !hashed || service.mode != Mode::Nat || service.snat.len() > MAX_SOURCES {
        return &[];
    }
    let has_services = |snat: &IpAddr| {
        let taken = |s: &Service| {
            s.vip == *snat
                && s.protocol == service.protocol
                && (SNAT_PORT_MIN..SNAT_PORT_UPPER).contains(&s.port)
        };
        tables.owned(*snat).is_some_and(|o| o.vip) && tables.services().iter().any(taken)
    };
    if service.snat.iter().any(has_services) { &[] } else { &service.snat }
}

/// The places that answers of a `nat-transparent` service come from.
fn answers(service: &Service, number: u32, numbers: &[u32], fits: bool, entries: &mut Vec<(Place, Record)>) {
    for (backend, &n) in service.backends.iter().zip(numbers) {
        let answer = Place {
            address: abi::wide(backend.address),
            port: backend.port.to_be_bytes(),
            protocol: service.protocol.number(),
            kind: abi::KIND_ANSWER,
        };
        let record = Record {
            group: service.group,
            service: number,
            backend: n,
            flags: if fits { 0 } else { abi::RECORD_UP },
            mode: abi::MODE_NAT_TRANSPARENT,
            vip: abi::wide(service.vip),
            vip_port: service.port.to_be_bytes(),
            ..Record::zeroed()
        };
        entries.push((answer, record));
        // Backends may share an address; a later entry replaces an equal one.
        let host = Place { port: [0; 2], protocol: 0, kind: abi::KIND_BACKEND, ..answer };
        entries.push((host, Record { group: service.group, ..Record::zeroed() }));
    }
}

fn owned_entry(tables: &Tables, owned: &OwnedAddress) -> (Place, Record) {
    let mut flags = 0;
    if let Some(o) = tables.owned(owned.address) {
        flags |= if o.vip { abi::RECORD_VIP } else { 0 };
        flags |= if o.inside { abi::RECORD_INSIDE } else { 0 };
        flags |= if o.snat { abi::RECORD_SNAT } else { 0 };
    }
    let place = Place { address: abi::wide(owned.address), port: [0; 2], protocol: 0, kind: abi::KIND_OWNED };
    let port = match owned.port {
        Some(Port::Service) => Port::Service as u8,
        Some(Port::Inside) => Port::Inside as u8,
        None => abi::PORT_ANY,
    };
    (place, Record { group: owned.group, flags, port, ..Record::zeroed() })
}
