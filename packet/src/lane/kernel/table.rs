//! The program's table of flows: `packet/bpf/table.h`.
//!
//! Not one of the kernel's hash maps, which were most of what full NAT cost: each flow took two of their entries, one for each of its
//! names, each of them allocated, and each look into them went through three cache lines by way of a hash that had to be asked of a
//! helper. Here a flow is one cache line in a *pool*, and both of its names are slots of an *index*, seven and their number to a cache
//! line. Both are arrays that user space has before its eyes, so that it writes and takes out flows without a system call.
//!
//! Who may do what:
//!   - a *cell* of the pool is handed from owner to owner: free, given to a processor for the flows that it makes
//!     ([`FlowTable::grant`]), in the index, resting, free. Only user space takes flows out of the index. A cell rests for [`REST`] before
//!     it is used again: a program that has just found it may be held up (a virtual processor without time), and must not find
//!     another flow in it. What it writes there meanwhile is lost, and nobody misses it;
//!   - a slot of the index is taken and given back by compare and exchange, by whoever comes.
//!
//! The index grows beside the one in use: with ten thousand flows in one for a million nearly every packet would find its line in none
//! of the processor's caches. So it begins small, and is doubled before it is full ([`FlowTable::begin`], [`FlowTable::proceed`]):
//!   1. a larger one is made, and more cells, on a thread of its own, for the kernel takes milliseconds for what it is asked there;
//!   2. programs are told of it, and look for names in both. Those that have not heard of it yet are waited for, again on such a thread:
//!      they would not find a name in the larger one, and might give it to another flow;
//!   3. new names go into the larger one. Those that have not heard of that are waited for as well;
//!   4. what the old one holds is copied, piece by piece, between frames;
//!   5. the larger one is in force. Once no program looks at the old one any more, it is gone.
//!
//! At no time is there anything that a program can't find, or can't write.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::mem::offset_of;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::abi::{
    self, BLOCK_FLOWS, Config, FlowCell, FlowKey, GRANT_CELLS, Grant, INDEX_PROBES, INDEX_SECRETS,
    LINE_SLOTS, Line, NOBODY, Plain, Tally,
};
use super::sys::{self, Mapped};
use crate::flow::BackendSide;
use crate::time::BootTime;

/// How long a cell is left alone that was taken out.
const REST: Duration = Duration::from_millis(500);
/// How many times larger the next index is.
const GROWTH: u32 = 2;
/// Lines that are copied at once, some tens of microseconds: frames that come up wait so long.
const COPIED_AT_ONCE: u32 = 512;
/// A program makes so many flows before user space says how many more, so there should be room for them.
const ROOM_LEFT: u32 = GRANT_CELLS as u32;

const WORD_OF_STATE: usize = 1;
const WORD_OF_SERVICE: usize = offset_of!(FlowCell, service) / 8;
const _: () = assert!(offset_of!(FlowCell, backend) == 8 && offset_of!(FlowCell, service).is_multiple_of(8));

/// Blocks of the pool that a table takes for so many flows: there are cells that rest, and cells that processors have.
pub(super) fn blocks(flows: u32) -> u32 {
    let cells = u64::from(flows) + u64::from(flows / 4) + 2 * GRANT_CELLS as u64;
    // Numbers of cells are 32 bits, less one for none.
    cells.min(u64::from(u32::MAX - 1)).div_ceil(u64::from(BLOCK_FLOWS)) as u32
}

/// How far a table has grown, see [`FlowTable::proceed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// It doesn't.
    None,
    /// The kernel is waited for.
    Waiting,
    /// There is something to be done.
    Copying,
}

/// See the module. Flows are written by one thread at a time.
#[derive(Debug)]
pub(super) struct FlowTable {
    outer: Arc<Outer>,
    inner: Mutex<Inner>,
    config: Arc<Mapped<Config>>,
    tally: Arc<Mapped<Tally>>,
    grants: Mapped<Grant>,
    secrets: [u64; INDEX_SECRETS],
    most: u32,
}

/// The maps of maps that programs look at.
#[derive(Debug)]
struct Outer {
    pool: OwnedFd,
    names: OwnedFd,
}

#[derive(Debug)]
struct Inner {
    blocks: Vec<Block>,
    index: Index,
    /// Its entry of `names`.
    entry: u32,
    /// Flows that there is room for.
    room: u32,
    stage: Stage,
    /// The cell after the last one that was ever used.
    fresh: u32,
    free: Vec<u32>,
    resting: VecDeque<(u32, BootTime)>,
}

#[derive(Debug)]
enum Stage {
    Quiet,
    Making(JoinHandle<io::Result<Larger>>),
    /// Programs are being told of it, and if it `moves`, that names go there now.
    Telling {
        next: Index,
        room: u32,
        moves: bool,
        told: JoinHandle<io::Result<()>>,
    },
    /// Lines below `at` have been copied.
    Copying {
        next: Index,
        room: u32,
        at: u32,
    },
    /// The old one may still be looked at.
    Leaving {
        left: JoinHandle<io::Result<()>>,
    },
}

#[derive(Debug)]
struct Larger {
    index: Index,
    blocks: Vec<Block>,
    room: u32,
}

/// Cells of the pool.
#[derive(Debug)]
struct Block {
    cells: Mapped<FlowCell>,
    map: OwnedFd,
}

impl Block {
    fn new() -> io::Result<Block> {
        let map = sys::create::<u32, FlowCell>("pool", sys::TYPE_ARRAY, BLOCK_FLOWS, sys::FLAG_MMAPABLE)?;
        Ok(Block { cells: Mapped::new(map.as_fd(), BLOCK_FLOWS)?, map })
    }

    /// So many more, behind `present` that there are.
    fn add(outer: &Outer, present: u32, more: u32) -> io::Result<Vec<Block>> {
        let blocks = (0..more).map(|_| Block::new()).collect::<io::Result<Vec<Block>>>()?;
        for (at, block) in (present..).zip(&blocks) {
            put_map(&outer.pool, at, &block.map)?;
        }
        Ok(blocks)
    }
}

/// Puts a map into a map of maps. Returns when no program runs any more that began before: the kernel waits for that
/// (`maybe_wait_bpf_programs`).
fn put_map(outer: &OwnedFd, at: u32, map: &OwnedFd) -> io::Result<()> {
    let fd: RawFd = map.as_raw_fd();
    sys::update(outer.as_fd(), &at, &fd, 0)
}

/// Where names stand.
#[derive(Debug)]
struct Index {
    lines: Mapped<Line>,
    map: OwnedFd,
    shift: u32,
}

impl Index {
    /// One for so many flows: full, four of seven slots are taken.
    fn new(flows: u32) -> io::Result<Index> {
        let lines = (flows / 2).clamp(INDEX_PROBES, 1 << 30).next_power_of_two();
        let map = Index::create(lines)?;
        Ok(Index { lines: Mapped::new(map.as_fd(), lines)?, map, shift: 32 - lines.trailing_zeros() })
    }

    fn create(lines: u32) -> io::Result<OwnedFd> {
        sys::create::<u32, Line>("names", sys::TYPE_ARRAY, lines, sys::FLAG_MMAPABLE | sys::FLAG_INNER)
    }

    /// The words of a line: names displaced, slots.
    fn line(&self, hash: u32, probe: u32) -> &[AtomicU64] {
        let at = (hash >> self.shift).wrapping_add(probe) & (self.lines.len() - 1);
        self.lines.words(at).unwrap_or(&[])
    }

    /// The cells whose flows have that hash.
    fn cells(&self, hash: u32) -> impl Iterator<Item = u32> {
        let displaced = self.line(hash, 0).first().is_some_and(|n| n.load(Ordering::SeqCst) != 0);
        let lines = (0..if displaced { INDEX_PROBES } else { 1 }).map(move |probe| self.line(hash, probe));
        let slots = lines.flat_map(|line| line.iter().skip(1)).map(|slot| slot.load(Ordering::SeqCst));
        slots.filter(move |slot| *slot as u32 != 0 && (slot >> 32) as u32 == hash).map(|slot| slot as u32 - 1)
    }

    /// Puts a slot where its hash says; `false`: no line there has room.
    fn put(&self, slot: u64) -> bool {
        let hash = (slot >> 32) as u32;
        let home = &self.line(hash, 0)[0];
        for probe in 0..INDEX_PROBES {
            // Said before: whoever looks for it must not stop at the first line.
            if probe > 0 {
                home.fetch_add(1, Ordering::SeqCst);
            }
            let exchange =
                |at: &AtomicU64| at.compare_exchange(0, slot, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            if self.line(hash, probe).iter().skip(1).any(exchange) {
                return true;
            }
            if probe > 0 {
                home.fetch_sub(1, Ordering::SeqCst);
            }
        }
        false
    }

    /// Takes a slot out; `false`: it is not there.
    fn take(&self, slot: u64) -> bool {
        let hash = (slot >> 32) as u32;
        for probe in 0..INDEX_PROBES {
            let exchange =
                |at: &AtomicU64| at.compare_exchange(slot, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            if self.line(hash, probe).iter().skip(1).any(exchange) {
                if probe > 0 {
                    self.line(hash, 0)[0].fetch_sub(1, Ordering::SeqCst);
                }
                return true;
            }
        }
        false
    }

    fn slots(&self, line: u32) -> [u64; LINE_SLOTS] {
        self.lines.read(line).map_or([0; LINE_SLOTS], |line| line.slots)
    }
}

fn slot(hash: u32, cell: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(cell + 1)
}

impl Inner {
    fn cell(&self, number: u32) -> Option<FlowCell> {
        self.blocks.get((number / BLOCK_FLOWS) as usize)?.cells.read(number % BLOCK_FLOWS)
    }

    fn words(&self, number: u32) -> &[AtomicU64] {
        let block = self.blocks.get((number / BLOCK_FLOWS) as usize);
        block.and_then(|block| block.cells.words(number % BLOCK_FLOWS)).unwrap_or(&[])
    }

    /// The index into which new names go, and that in which they may stand besides.
    fn indices(&self) -> (&Index, Option<&Index>) {
        match &self.stage {
            Stage::Telling { next, moves: false, .. } => (&self.index, Some(next)),
            Stage::Telling { next, .. } | Stage::Copying { next, .. } => (next, Some(&self.index)),
            _ => (&self.index, None),
        }
    }

    /// The cell of the flow of that hash for which `is` holds.
    fn find(&self, hash: u32, but: Option<u32>, is: impl Fn(&FlowCell) -> bool) -> Option<u32> {
        let (index, other) = self.indices();
        let mut cells = index.cells(hash).chain(other.into_iter().flat_map(|index| index.cells(hash)));
        cells.find(|cell| Some(*cell) != but && self.cell(*cell).is_some_and(|flow| is(&flow)))
    }

    fn find_client(&self, hash: u32, key: &FlowKey, but: Option<u32>) -> Option<u32> {
        self.find(hash, but, |flow| {
            (flow.client, flow.service, flow.client_port) == (key.client, key.service, key.client_port)
        })
    }

    /// Names that differ in the backend alone have other hashes. A backend's cell may not say yet or any more which it was.
    fn find_answered(&self, hash: u32, name: &BackendSide, but: Option<u32>) -> Option<u32> {
        let (snat, port) = (abi::wide(name.snat), name.snat_port.to_be_bytes());
        self.find(hash, but, |flow| {
            let bound = flow.flags & abi::FLOW_BOUND != 0;
            bound && (flow.snat, flow.snat_port, flow.protocol) == (snat, port, name.protocol)
        })
    }

    /// A cell that nobody has.
    fn take_cell(&mut self) -> Option<u32> {
        if self.free.is_empty() && !self.resting.is_empty() {
            let now = BootTime::now();
            while let Some((cell, since)) = self.resting.front()
                && now.since(*since) >= REST
            {
                self.free.push(*cell);
                self.resting.pop_front();
            }
        }
        self.free.pop().or_else(|| {
            let fresh = (self.fresh < self.cells()).then_some(self.fresh)?;
            self.fresh += 1;
            Some(fresh)
        })
    }

    fn cells(&self) -> u32 {
        (self.blocks.len() as u32).saturating_mul(BLOCK_FLOWS)
    }

    /// Cells that are neither free nor resting.
    fn given(&self) -> u32 {
        self.fresh - self.free.len() as u32 - self.resting.len() as u32
    }

    /// Takes a flow out by all of its names.
    fn remove(&mut self, number: u32) {
        let Some(flow) = self.cell(number) else { return };
        let (index, other) = self.indices();
        for index in std::iter::once(index).chain(other) {
            if flow.service != NOBODY {
                index.take(slot(flow.client_hash, number));
            }
            if flow.flags & abi::FLOW_BOUND != 0 {
                index.take(slot(flow.answers_hash, number));
            }
        }
        // Whoever has just found it: neither steady nor kept.
        if let Some(word) = self.words(number).get(WORD_OF_STATE) {
            word.store(u64::from(NOBODY), Ordering::SeqCst);
        }
        self.resting.push_back((number, BootTime::now()));
    }

    fn write(&self, number: u32, flow: &FlowCell) {
        // The service last: without one, whoever finds the flow leaves it to the engine.
        let words = self.words(number);
        let from: [u64; 8] = bytes_to_words(flow);
        for (at, word) in words.iter().enumerate().filter(|(at, _)| *at != WORD_OF_SERVICE) {
            word.store(from[at], Ordering::Release);
        }
        if let Some(word) = words.get(WORD_OF_SERVICE) {
            word.store(from[WORD_OF_SERVICE], Ordering::SeqCst);
        }
    }
}

fn bytes_to_words(flow: &FlowCell) -> [u64; 8] {
    // SAFETY: both are plain data of 64 bytes, and every bit pattern of the latter is valid.
    unsafe { std::mem::transmute_copy(flow) }
}

impl FlowTable {
    /// Puts a first index for `first` flows, and their cells, into the maps. It grows up to `most`.
    pub(super) fn new(
        pool: OwnedFd,
        names: OwnedFd,
        (first, most): (u32, u32),
        config: Arc<Mapped<Config>>,
        tally: Arc<Mapped<Tally>>,
        grants: Mapped<Grant>,
    ) -> io::Result<FlowTable> {
        let most = most.max(1);
        let room = first.clamp(1, most);
        let outer = Outer { pool, names };
        let blocks = Block::add(&outer, 0, blocks(room))?;
        let index = Index::new(room)?;
        put_map(&outer.names, 0, &index.map)?;
        // What nobody outside knows: each has keys of its own.
        let secrets = std::array::from_fn(|_| RandomState::new().hash_one(BootTime::now().0) | 1);
        let table = FlowTable {
            outer: Arc::new(outer),
            inner: Mutex::new(Inner {
                blocks,
                index,
                entry: 0,
                room,
                stage: Stage::Quiet,
                fresh: 0,
                free: Vec::new(),
                resting: VecDeque::new(),
            }),
            config,
            tally,
            grants,
            secrets,
            most,
        };
        for (at, secret) in secrets.iter().enumerate() {
            if let Some(word) = table.config.word(0, offset_of!(Config, secrets) + 8 * at) {
                word.store(*secret, Ordering::Relaxed);
            }
        }
        table.tell(&table.inner());
        Ok(table)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells programs where to look.
    fn tell(&self, inner: &Inner) {
        let next = match &inner.stage {
            Stage::Telling { next, moves, .. } => Some((next.shift, *moves)),
            Stage::Copying { next, .. } => Some((next.shift, true)),
            _ => None,
        };
        if let Some(word) = self.config.word(0, offset_of!(Config, index)) {
            word.store(abi::index_word(inner.entry, inner.index.shift, next), Ordering::SeqCst);
        }
    }

    fn multilinear(&self, words: impl IntoIterator<Item = u32>) -> u32 {
        let mut secrets = self.secrets.iter();
        let start = secrets.next().copied().unwrap_or(0);
        let sum = secrets
            .zip(words)
            .fold(start, |sum, (secret, word)| sum.wrapping_add(secret.wrapping_mul(u64::from(word))));
        (sum >> 32) as u32
    }

    fn client_hash(&self, key: &FlowKey) -> u32 {
        let last = [key.service, u32::from(u16::from_le_bytes(key.client_port))];
        self.multilinear(words(key.client).into_iter().chain(last))
    }

    fn answers_hash(&self, name: &BackendSide) -> u32 {
        let wide = |address: IpAddr| words(abi::wide(address));
        let last = [
            u32::from(name.snat_port.swap_bytes()) << 16 | u32::from(name.backend_port.swap_bytes()),
            u32::from(name.protocol),
        ];
        self.multilinear(wide(name.backend).into_iter().chain(wide(name.snat)).chain(last))
    }

    /// Cells that processors have for flows that they make.
    fn held(&self) -> u32 {
        let held = (0..self.grants.len()).map(|cpu| {
            let given = self.given(cpu).map_or(0, |given| given.load(Ordering::Relaxed));
            given.saturating_sub(self.taken(cpu)) as u32
        });
        held.sum()
    }

    fn given(&self, cpu: u32) -> Option<&AtomicU64> {
        self.grants.word(cpu, offset_of!(Grant, given))
    }

    fn taken(&self, cpu: u32) -> u64 {
        self.tally.word(cpu, offset_of!(Tally, taken)).map_or(0, |taken| taken.load(Ordering::Acquire))
    }

    /// Flows in the table, names that are only taken included.
    fn used(&self, inner: &Inner) -> u32 {
        inner.given().saturating_sub(self.held())
    }

    /// Says how many flows a processor may have made since the program was loaded; more than before, or fewer. It has as many cells for
    /// them as there are.
    pub(super) fn grant(&self, cpu: u32, most: u64) {
        let Some(given) = self.given(cpu) else { return };
        let Some(allowed) = self.grants.word(cpu, offset_of!(Grant, most)) else { return };
        let made =
            self.tally.word(cpu, offset_of!(Tally, made)).map_or(0, |made| made.load(Ordering::Acquire));
        let to = self.taken(cpu) + most.saturating_sub(made).min(GRANT_CELLS as u64);
        let mut at = given.load(Ordering::Relaxed);
        if at < to {
            let mut inner = self.inner();
            while at < to
                && inner.given() < inner.room
                && let Some(cell) = inner.take_cell()
            {
                let place = offset_of!(Grant, cells) + 4 * (at % GRANT_CELLS as u64) as usize;
                if let Some(word) = self.grants.word(cpu, place) {
                    let upper = place % 8 * 8;
                    let others = word.load(Ordering::Relaxed) & !(u64::from(u32::MAX) << upper);
                    word.store(others | u64::from(cell) << upper, Ordering::Relaxed);
                }
                at += 1;
            }
            given.store(at, Ordering::Release);
        }
        allowed.store(most, Ordering::Release);
    }

    /// Writes a flow, with its name on the backend's side if it has one there; the cell's hashes are reckoned. Another flow of one of these
    /// names is gone. `E2BIG` when there are as many as there may be.
    pub(super) fn put(&self, flow: &FlowCell, answers: Option<&BackendSide>) -> io::Result<()> {
        let key = key_of(flow);
        let answers_hash = answers.map(|name| self.answers_hash(name));
        let flow = FlowCell {
            client_hash: self.client_hash(&key),
            answers_hash: answers_hash.unwrap_or(0),
            protocol: answers.map_or(0, |name| name.protocol),
            ..*flow
        };
        let mut inner = self.inner();
        if let Some(number) = inner.find_client(flow.client_hash, &key, None) {
            let is = |f: &FlowCell| {
                (f.backend, f.flags & abi::FLOW_BOUND, f.snat, f.snat_port, f.answers_hash, f.protocol)
            };
            if inner.cell(number).is_some_and(|there| is(&there) == is(&flow)) {
                let from = bytes_to_words(&flow);
                for (word, new) in inner.words(number).iter().zip(from).take(WORD_OF_STATE + 1) {
                    word.store(new, Ordering::SeqCst);
                }
                return Ok(());
            }
            inner.remove(number);
        }
        let taken = answers.zip(answers_hash).and_then(|(name, hash)| inner.find_answered(hash, name, None));
        let reserved =
            taken.filter(|number| inner.cell(*number).is_some_and(|there| there.service == NOBODY));
        if let Some(number) = reserved {
            inner.write(number, &flow);
            if !self.enter(&mut inner, flow.client_hash, number)? {
                inner.remove(number);
                return Err(no_room());
            }
            return Ok(());
        }
        if let Some(number) = taken {
            inner.remove(number);
        }
        let number = self.cell_for(&mut inner)?;
        inner.write(number, &flow);
        let entered = match answers_hash {
            Some(hash) => self.enter(&mut inner, hash, number)?,
            None => true,
        };
        if !entered || !self.enter(&mut inner, flow.client_hash, number)? {
            inner.remove(number);
            return Err(no_room());
        }
        // What the program made of these names meanwhile is not what the engine says.
        if let Some(other) = inner.find_client(flow.client_hash, &key, Some(number)) {
            inner.remove(other);
        }
        if let Some((name, hash)) = answers.zip(answers_hash)
            && let Some(other) = inner.find_answered(hash, name, Some(number))
        {
            inner.remove(other);
        }
        Ok(())
    }

    /// Takes a name on the backend's side for a flow that is about to be put; `false`: there is a flow of that name.
    pub(super) fn reserve(&self, name: &BackendSide) -> io::Result<bool> {
        let hash = self.answers_hash(name);
        let mut inner = self.inner();
        if inner.find_answered(hash, name, None).is_some() {
            return Ok(false);
        }
        let number = self.cell_for(&mut inner)?;
        let flow = FlowCell {
            backend: NOBODY,
            flags: abi::FLOW_BOUND | abi::FLOW_KEPT,
            snat_port: name.snat_port.to_be_bytes(),
            snat: abi::wide(name.snat),
            service: NOBODY,
            protocol: name.protocol,
            answers_hash: hash,
            ..FlowCell::zeroed()
        };
        inner.write(number, &flow);
        if !self.enter(&mut inner, hash, number)? {
            inner.remove(number);
            return Err(no_room());
        }
        // The program may have done the same at the same time.
        if inner.find_answered(hash, name, Some(number)).is_some() {
            inner.remove(number);
            return Ok(false);
        }
        Ok(true)
    }

    /// A cell for one more flow; makes room where there is none.
    fn cell_for(&self, inner: &mut Inner) -> io::Result<u32> {
        loop {
            let used = self.used(inner);
            if used >= self.most {
                return Err(no_room());
            }
            if used < inner.room
                && let Some(cell) = inner.take_cell()
            {
                return Ok(cell);
            }
            if inner.room >= self.most {
                return Err(no_room());
            }
            self.grow_at_once(inner)?;
        }
    }

    /// Enters a cell by a name with this hash; `false` when there is no room for it, whatever is done.
    fn enter(&self, inner: &mut Inner, hash: u32, number: u32) -> io::Result<bool> {
        while !inner.indices().0.put(slot(hash, number)) {
            if inner.room >= self.most {
                return Ok(false);
            }
            self.grow_at_once(inner)?;
        }
        Ok(true)
    }

    /// The flow of a client.
    pub(super) fn get(&self, key: &FlowKey) -> Option<FlowCell> {
        let inner = self.inner();
        inner.find_client(self.client_hash(key), key, None).and_then(|number| inner.cell(number))
    }

    /// The flow that a backend's answers are of, or a name that is only taken.
    pub(super) fn answered(&self, name: &BackendSide) -> Option<FlowCell> {
        let inner = self.inner();
        inner.find_answered(self.answers_hash(name), name, None).and_then(|number| inner.cell(number))
    }

    /// Takes out what has one of these names; whether there was anything.
    pub(super) fn remove(&self, client: Option<&FlowKey>, answers: Option<&BackendSide>) -> bool {
        let mut inner = self.inner();
        let of_client = client.and_then(|key| inner.find_client(self.client_hash(key), key, None));
        if let Some(number) = of_client {
            inner.remove(number);
        }
        let answered = answers.and_then(|name| inner.find_answered(self.answers_hash(name), name, None));
        if let Some(number) = answered {
            inner.remove(number);
        }
        of_client.is_some() || answered.is_some()
    }

    /// Counts what there is: names of clients, names of answers.
    pub(super) fn count(&self) -> (usize, usize) {
        let inner = self.inner();
        let (mut clients, mut answers) = (0, 0);
        for slot in inner.all_slots() {
            let Some(flow) = inner.cell(slot as u32 - 1) else { continue };
            let of_client = flow.service != NOBODY && (slot >> 32) as u32 == flow.client_hash;
            *(if of_client { &mut clients } else { &mut answers }) += 1;
        }
        (clients, answers)
    }

    /// Takes out every flow. No program may be running that makes some.
    pub(super) fn clear(&self) -> io::Result<()> {
        let mut inner = self.inner();
        while !matches!(inner.stage, Stage::Quiet) {
            self.step(&mut inner, true)?;
        }
        let cells: HashSet<u32> = inner.all_slots().into_iter().map(|slot| slot as u32 - 1).collect();
        for line in 0..inner.index.lines.len() {
            inner.index.lines.write(line, &Line::zeroed());
        }
        inner.free.extend(cells);
        while let Some((cell, _)) = inner.resting.pop_front() {
            inner.free.push(cell);
        }
        Ok(())
    }

    // Growth.

    /// Whether it is time to grow: there will soon be no room for what programs may make.
    pub(super) fn is_short(&self) -> bool {
        let inner = self.inner();
        if inner.room >= self.most || !matches!(inner.stage, Stage::Quiet) {
            return false;
        }
        let left = inner.room.saturating_sub(self.used(&inner));
        let cells = inner.cells() - inner.fresh + inner.free.len() as u32;
        left < (inner.room / 4).max(ROOM_LEFT.min(inner.room / 2)) || cells < ROOM_LEFT.min(inner.room / 2)
    }

    /// Begins to grow, unless it does already or may not.
    pub(super) fn begin(&self) -> io::Result<()> {
        self.begin_in(&mut self.inner())
    }

    fn begin_in(&self, inner: &mut Inner) -> io::Result<()> {
        if inner.room >= self.most || !matches!(inner.stage, Stage::Quiet) {
            return Ok(());
        }
        let room = inner.room.saturating_mul(GROWTH).min(self.most);
        let (present, entry) = (inner.blocks.len() as u32, inner.entry ^ 1);
        let outer = Arc::clone(&self.outer);
        inner.stage = Stage::Making(beside(move || {
            let index = Index::new(room)?;
            let blocks = Block::add(&outer, present, blocks(room).saturating_sub(present))?;
            put_map(&outer.names, entry, &index.map)?;
            Ok(Larger { index, blocks, room })
        })?);
        Ok(())
    }

    /// Does the next piece. When it fails it no longer grows, and nothing is lost.
    pub(super) fn proceed(&self) -> io::Result<Growth> {
        self.step(&mut self.inner(), false)
    }

    fn grow_at_once(&self, inner: &mut Inner) -> io::Result<()> {
        let room = inner.room;
        self.begin_in(inner)?;
        while inner.room == room {
            self.begin_in(inner)?;
            self.step(inner, true)?;
        }
        Ok(())
    }

    /// `wait`: for the kernel, too.
    fn step(&self, inner: &mut Inner, wait: bool) -> io::Result<Growth> {
        let waits = match &inner.stage {
            Stage::Quiet => return Ok(Growth::None),
            Stage::Making(thread) => !thread.is_finished(),
            Stage::Telling { told: thread, .. } | Stage::Leaving { left: thread, .. } => {
                !thread.is_finished()
            }
            Stage::Copying { .. } => false,
        };
        if waits && !wait {
            return Ok(Growth::Waiting);
        }
        match std::mem::replace(&mut inner.stage, Stage::Quiet) {
            Stage::Quiet => {}
            Stage::Making(thread) => {
                let Larger { index, blocks, room } = join(thread)?;
                inner.blocks.extend(blocks);
                self.tell_of(inner, index, room, false)?;
            }
            Stage::Telling { next, room, moves, told } => {
                let waited = join(told);
                if moves {
                    if let Err(error) = waited {
                        tracing::warn!(%error, "programs that began before a table of flows was enlarged were not waited for");
                    }
                    inner.stage = Stage::Copying { next, room, at: 0 };
                } else {
                    let told = waited.and_then(|()| self.tell_of(inner, next, room, true));
                    // Nothing stands in the larger one yet.
                    self.tell(inner);
                    told?;
                }
            }
            Stage::Copying { next, room, at } => {
                let end = at.saturating_add(COPIED_AT_ONCE).min(inner.index.lines.len());
                let slots =
                    (at..end).flat_map(|line| inner.index.slots(line)).filter(|slot| *slot as u32 != 0);
                let lost = slots.filter(|slot| !next.put(*slot)).count();
                if lost > 0 {
                    tracing::warn!(
                        lost,
                        "names of flows found no place in a larger index: their packets pass through user space"
                    );
                }
                if end < inner.index.lines.len() {
                    inner.stage = Stage::Copying { next, room, at: end };
                    return Ok(Growth::Copying);
                }
                self.put_in_force(inner, next, room)?;
            }
            Stage::Leaving { left, .. } => {
                if let Err(e) = join(left) {
                    tracing::debug!(error = %e, "an old index of flows takes memory until the next one");
                }
            }
        }
        Ok(if matches!(inner.stage, Stage::Quiet) { Growth::None } else { Growth::Copying })
    }

    /// Tells programs of a larger index, and begins to wait for those that have not heard of it.
    fn tell_of(&self, inner: &mut Inner, next: Index, room: u32, moves: bool) -> io::Result<()> {
        let (outer, entry, map) = (Arc::clone(&self.outer), inner.entry ^ 1, next.map.try_clone()?);
        let (go, went) = std::sync::mpsc::channel();
        // There first, so that nothing has been said when it can't be.
        let told = beside(move || match went.recv() {
            Ok(()) => put_map(&outer.names, entry, &map),
            Err(_) => Ok(()),
        })?;
        inner.stage = Stage::Telling { next, room, moves, told };
        self.tell(inner);
        // The thread is there until it has heard.
        let _ = go.send(());
        Ok(())
    }

    fn put_in_force(&self, inner: &mut Inner, next: Index, room: u32) -> io::Result<()> {
        inner.index = next;
        let old_entry = inner.entry;
        inner.entry ^= 1;
        inner.room = room;
        self.tell(inner);
        tracing::debug!(room, "a larger table of flows");
        let outer = Arc::clone(&self.outer);
        let (map, entry) = (inner.index.map.try_clone()?, inner.entry);
        let left = beside(move || {
            put_map(&outer.names, entry, &map)?;
            // Nobody looks at the old one now, and it goes with the last who has it.
            put_map(&outer.names, old_entry, &Index::create(1)?)
        });
        // Without such a thread the old one stays until the next takes its place.
        if let Ok(left) = left {
            inner.stage = Stage::Leaving { left };
        }
        Ok(())
    }
}

impl Inner {
    /// Each once.
    fn all_slots(&self) -> HashSet<u64> {
        let (index, other) = self.indices();
        let indices = std::iter::once(index).chain(other);
        let lines = indices.flat_map(|index| (0..index.lines.len()).flat_map(|line| index.slots(line)));
        lines.filter(|slot| *slot as u32 != 0).collect()
    }
}

fn key_of(flow: &FlowCell) -> FlowKey {
    FlowKey { client: flow.client, service: flow.service, client_port: flow.client_port, reserved: 0 }
}

/// An address as the program reads it.
fn words(address: [u8; 16]) -> [u32; 4] {
    let (words, _) = address.as_chunks::<4>();
    std::array::from_fn(|i| u32::from_le_bytes(words[i]))
}

fn no_room() -> io::Error {
    io::Error::from_raw_os_error(libc::E2BIG)
}

fn beside<T: Send + 'static>(
    f: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<JoinHandle<io::Result<T>>> {
    std::thread::Builder::new().name("komainu-grow".to_owned()).spawn(f)
}

fn join<T>(thread: JoinHandle<io::Result<T>>) -> io::Result<T> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}
