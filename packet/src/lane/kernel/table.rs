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
//! How it grows: `growing`.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::mem::offset_of;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::abi::{
    self, BLOCK_FLOWS, Config, FlowCell, FlowKey, GRANT_CELLS, Grant, INDEX_SECRETS, Line, NOBODY, Plain,
    Tally,
};
use super::growing::Stage;
use super::index::{Index, slot};
use super::sys::{self, Mapped};
use crate::flow::BackendSide;
use crate::time::BootTime;

/// How long a cell is left alone that was taken out.
const REST: Duration = Duration::from_millis(500);
/// `INDEX_MIX` of `packet/bpf/table.h`.
const INDEX_MIX: u64 = 0x9e37_79b9_7f4a_7c15;
const WORD_OF_STATE: usize = 1;
const WORD_OF_SERVICE: usize = offset_of!(FlowCell, service) / 8;
const _: () = assert!(offset_of!(FlowCell, backend) == 8 && offset_of!(FlowCell, service).is_multiple_of(8));

/// Blocks of the pool that a table takes for so many flows: there are cells that rest, and cells that processors have.
pub(super) fn blocks(flows: u32) -> u32 {
    let cells = u64::from(flows) + u64::from(flows / 4) + 2 * GRANT_CELLS as u64;
    // Numbers of cells are 32 bits, less one for none.
    cells.min(u64::from(u32::MAX - 1)).div_ceil(u64::from(BLOCK_FLOWS)) as u32
}

/// See the module. Flows are written by one thread at a time.
#[derive(Debug)]
pub(super) struct FlowTable {
    pub(super) outer: Arc<Outer>,
    inner: Mutex<Inner>,
    pub(super) config: Arc<Mapped<Config>>,
    tally: Arc<Mapped<Tally>>,
    grants: Mapped<Grant>,
    secrets: [u64; INDEX_SECRETS],
    /// Flows that there is ever room for.
    pub(super) most: u32,
}

/// The maps of maps that programs look at.
#[derive(Debug)]
pub(super) struct Outer {
    pool: OwnedFd,
    pub(super) names: OwnedFd,
}

/// What only its writer knows.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) blocks: Vec<Block>,
    pub(super) index: Index,
    /// Its entry of `names`.
    pub(super) entry: u32,
    /// Flows that there is room for.
    pub(super) room: u32,
    pub(super) stage: Stage,
    /// The cell after the last one that was ever used.
    pub(super) fresh: u32,
    pub(super) free: Vec<u32>,
    resting: VecDeque<(u32, BootTime)>,
}

/// Cells of the pool.
#[derive(Debug)]
pub(super) struct Block {
    cells: Mapped<FlowCell>,
    map: OwnedFd,
}

impl Block {
    fn new() -> io::Result<Block> {
        let map = sys::create::<u32, FlowCell>("pool", sys::TYPE_ARRAY, BLOCK_FLOWS, sys::FLAG_MMAPABLE)?;
        Ok(Block { cells: Mapped::new(map.as_fd(), BLOCK_FLOWS)?, map })
    }

    /// So many more, behind `present` that there are.
    pub(super) fn add(outer: &Outer, present: u32, more: u32) -> io::Result<Vec<Block>> {
        let blocks = (0..more).map(|_| Block::new()).collect::<io::Result<Vec<Block>>>()?;
        for (at, block) in (present..).zip(&blocks) {
            put_map(&outer.pool, at, &block.map)?;
        }
        Ok(blocks)
    }
}

/// Puts a map into a map of maps. Returns when no program runs any more that began before: the kernel waits for that
/// (`maybe_wait_bpf_programs`).
pub(super) fn put_map(outer: &OwnedFd, at: u32, map: &OwnedFd) -> io::Result<()> {
    let fd: RawFd = map.as_raw_fd();
    sys::update(outer.as_fd(), &at, &fd, 0)
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

    pub(super) fn cells(&self) -> u32 {
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
        let secrets = std::array::from_fn(|_| RandomState::new().hash_one(BootTime::now().0));
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

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells programs where to look.
    pub(super) fn tell(&self, inner: &Inner) {
        let next = match &inner.stage {
            Stage::Telling { next, moves, .. } => Some((next.shift, *moves)),
            Stage::Copying { next, .. } => Some((next.shift, true)),
            _ => None,
        };
        if let Some(word) = self.config.word(0, offset_of!(Config, index)) {
            word.store(abi::index_word(inner.entry, inner.index.shift, next), Ordering::SeqCst);
        }
    }

    fn client_hash(&self, key: &FlowKey) -> u32 {
        let last = [key.service, u32::from(u16::from_le_bytes(key.client_port))];
        multilinear(&self.secrets, words(key.client).into_iter().chain(last))
    }

    fn answers_hash(&self, name: &BackendSide) -> u32 {
        let wide = |address: IpAddr| words(abi::wide(address));
        let last = [
            u32::from(name.snat_port.swap_bytes()) << 16 | u32::from(name.backend_port.swap_bytes()),
            u32::from(name.protocol),
        ];
        multilinear(&self.secrets, wide(name.backend).into_iter().chain(wide(name.snat)).chain(last))
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
    pub(super) fn used(&self, inner: &Inner) -> u32 {
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
                if let (Some(word), shift) = self.granted(cpu, at) {
                    let others = word.load(Ordering::Relaxed) & !(u64::from(u32::MAX) << shift);
                    word.store(others | u64::from(cell) << shift, Ordering::Relaxed);
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
        if let Some(number) = self.settled(|| inner.find_client(flow.client_hash, &key, None)) {
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
        let named = answers.zip(answers_hash);
        let taken = named.and_then(|(name, hash)| self.settled(|| inner.find_answered(hash, name, None)));
        let reserved =
            taken.filter(|number| inner.cell(*number).is_some_and(|there| there.service == NOBODY));
        let number = match reserved {
            Some(number) => number,
            None => {
                if let Some(number) = taken {
                    inner.remove(number);
                }
                self.cell_for(&mut inner)?
            }
        };
        inner.write(number, &flow);
        if let Some(hash) = answers_hash.filter(|_| reserved.is_none()) {
            self.enter(&mut inner, hash, number)?;
        }
        self.enter(&mut inner, flow.client_hash, number)?;
        // What the program made of these names meanwhile is not what the engine says.
        if let Some(other) = self.settled(|| inner.find_client(flow.client_hash, &key, Some(number))) {
            inner.remove(other);
        }
        if let Some((name, hash)) = named
            && let Some(other) = self.settled(|| inner.find_answered(hash, name, Some(number)))
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
        self.enter(&mut inner, hash, number)?;
        // The program may have done the same at the same time.
        if inner.find_answered(hash, name, Some(number)).is_some() {
            inner.remove(number);
            return Ok(false);
        }
        Ok(true)
    }

    /// Whether a program is just making a flow in that cell: it has one of its names already, and the cell is not yet taken, or not after
    /// all.
    fn is_in_hand(&self, number: u32) -> bool {
        (0..self.grants.len()).any(|cpu| {
            let (taken, given) =
                (self.taken(cpu), self.given(cpu).map_or(0, |given| given.load(Ordering::Acquire)));
            let (word, shift) = self.granted(cpu, taken);
            taken < given && word.is_some_and(|word| (word.load(Ordering::Relaxed) >> shift) as u32 == number)
        })
    }

    /// The word that names the n-th cell given to a processor, and where in it.
    fn granted(&self, cpu: u32, n: u64) -> (Option<&AtomicU64>, usize) {
        let place = offset_of!(Grant, cells) + 4 * (n % GRANT_CELLS as u64) as usize;
        (self.grants.word(cpu, place), place % 8 * 8)
    }

    /// What `find` finds, once no program has it in its hands: that takes it less than a microsecond, unless its processor is held up.
    fn settled(&self, find: impl Fn() -> Option<u32>) -> Option<u32> {
        loop {
            let number = find()?;
            if !self.is_in_hand(number) {
                return Some(number);
            }
            std::thread::yield_now();
        }
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

    /// Enters a cell by a name with this hash. Where there is no room for it, whatever is done, it is taken out.
    fn enter(&self, inner: &mut Inner, hash: u32, number: u32) -> io::Result<()> {
        while !inner.indices().0.put(slot(hash, number)) {
            let grown = if inner.room < self.most { self.grow_at_once(inner) } else { Err(no_room()) };
            if let Err(error) = grown {
                inner.remove(number);
                return Err(error);
            }
        }
        Ok(())
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
        let of_client =
            client.and_then(|key| self.settled(|| inner.find_client(self.client_hash(key), key, None)));
        if let Some(number) = of_client {
            inner.remove(number);
        }
        let answered = answers
            .and_then(|name| self.settled(|| inner.find_answered(self.answers_hash(name), name, None)));
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

/// The hash of a name, as the program reckons it.
fn multilinear(secrets: &[u64; INDEX_SECRETS], words: impl IntoIterator<Item = u32>) -> u32 {
    let [start, secrets @ ..] = secrets;
    let sum = secrets
        .iter()
        .zip(words)
        .fold(*start, |sum, (secret, word)| sum.wrapping_add(secret.wrapping_mul(u64::from(word))));
    ((sum ^ sum >> 32).wrapping_mul(INDEX_MIX) >> 32) as u32
}

fn no_room() -> io::Error {
    io::Error::from_raw_os_error(libc::E2BIG)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::atomic::AtomicBool;

    use super::super::abi::INDEX_PROBES;
    use super::super::program::{Hook, Kernel, Sizes};
    use super::*;

    /// With one secret in some eighty the names of all ports of an address filled some lines of the index, and a flow found no place.
    #[test]
    fn names_that_differ_in_the_port_alone_are_spread_over_all_lines() {
        const LINES: usize = 1 << 14;
        // The same in every run: of random ones one in some ten thousand is as bad by mere chance. SplitMix64 (Steele, Lea and
        // Flood, 2014).
        let mut state = 0u64;
        let mut secret = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        };
        for _ in 0..400 {
            let secrets = std::array::from_fn(|_| secret());
            let mut filled = vec![0u32; LINES];
            for port in 1024u16..49152 {
                let ports = u32::from(port.swap_bytes()) << 16 | 80;
                let hash = multilinear(&secrets, [0, 0, 0, 0, 0, 0, 0, 0, ports, 6]);
                filled[hash as usize >> (32 - 14)] += 1;
            }
            // 2.9 on average, 56 slots.
            let fullest = filled.windows(INDEX_PROBES as usize).map(|lines| lines.iter().sum::<u32>()).max();
            assert!(fullest < Some(56), "{fullest:?}, {secrets:x?}");
        }
    }

    /// The engine took the cell for its own while the program went on to make the flow in it.
    #[test]
    fn a_flow_that_a_program_has_in_its_hands_is_waited_for() {
        let kernel = Kernel::load(Hook::Xdp, Sizes::default()).unwrap_or_else(|e| panic!("{e}"));
        let table = kernel.maps().table();
        let name = BackendSide {
            protocol: 6,
            backend: Ipv4Addr::new(10, 0, 0, 1).into(),
            backend_port: 80,
            snat: Ipv4Addr::new(10, 0, 0, 2).into(),
            snat_port: 1024,
        };
        let hash = table.answers_hash(&name);
        table.grant(0, 1);
        // As the program when it has found a port and not yet told of it.
        let number = table.granted(0, 0).0.unwrap().load(Ordering::SeqCst) as u32;
        let half = || {
            let inner = table.inner();
            inner.write(
                number,
                &FlowCell {
                    flags: abi::FLOW_BOUND | abi::FLOW_KEPT,
                    snat: abi::wide(name.snat),
                    snat_port: name.snat_port.to_be_bytes(),
                    protocol: name.protocol,
                    answers_hash: hash,
                    ..FlowCell::zeroed()
                },
            );
            assert!(inner.index.put(slot(hash, number)));
        };
        // What the program does then.
        let withdraw = |index: &Index| assert!(index.take(slot(hash, number)));
        let taken = table.tally.word(0, offset_of!(Tally, taken)).unwrap();
        let commit = || taken.store(1, Ordering::SeqCst);
        for removed in [false, true] {
            half();
            // The table is locked meanwhile.
            let (index, done) = (Index::over(&table.inner().index), AtomicBool::new(false));
            std::thread::scope(|scope| {
                let remover = scope.spawn(|| {
                    let removed = table.remove(None, Some(&name));
                    done.store(true, Ordering::SeqCst);
                    removed
                });
                // Who waits has the table locked, look after look.
                let mut locked = 0;
                while locked < 1000 {
                    assert!(!done.load(Ordering::SeqCst), "it was not waited for");
                    locked = if table.inner.try_lock().is_err() { locked + 1 } else { 0 };
                    std::thread::yield_now();
                }
                if removed {
                    commit()
                } else {
                    withdraw(&index)
                }
                assert_eq!(remover.join().unwrap(), removed);
            });
            let resting = table.inner().resting.iter().any(|(cell, _)| *cell == number);
            assert_eq!(resting, removed, "whose is the cell?");
        }
    }
}
