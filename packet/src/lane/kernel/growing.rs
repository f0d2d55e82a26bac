//! The table of flows grows.
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

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::abi::GRANT_CELLS;
use super::index::Index;
use super::table::{Block, FlowTable, Inner, blocks, put_map};

/// How many times larger the next index is.
const GROWTH: u32 = 2;
/// Lines that are copied at once, some tens of microseconds: frames that come up wait so long.
const COPIED_AT_ONCE: u32 = 512;
/// A program makes so many flows before user space says how many more, so there should be room for them.
const ROOM_LEFT: u32 = GRANT_CELLS as u32;

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

/// How far it has got.
#[derive(Debug)]
pub(super) enum Stage {
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
pub(super) struct Larger {
    index: Index,
    blocks: Vec<Block>,
    room: u32,
}

impl FlowTable {
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

    pub(super) fn grow_at_once(&self, inner: &mut Inner) -> io::Result<()> {
        let room = inner.room;
        self.begin_in(inner)?;
        while inner.room == room {
            self.begin_in(inner)?;
            self.step(inner, true)?;
        }
        Ok(())
    }

    /// `wait`: for the kernel, too.
    pub(super) fn step(&self, inner: &mut Inner, wait: bool) -> io::Result<Growth> {
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
                self.put_in_force(inner, next, room);
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

    /// The larger index is in force, whatever else fails: names stand there that the old one does not have.
    fn put_in_force(&self, inner: &mut Inner, next: Index, room: u32) {
        let map = next.map.try_clone();
        inner.index = next;
        let old_entry = inner.entry;
        inner.entry ^= 1;
        inner.room = room;
        self.tell(inner);
        tracing::debug!(room, "a larger table of flows");
        let (outer, entry) = (Arc::clone(&self.outer), inner.entry);
        let left = map.and_then(|map| {
            beside(move || {
                put_map(&outer.names, entry, &map)?;
                // Nobody looks at the old one now, and it goes with the last who has it.
                put_map(&outer.names, old_entry, &Index::create(1)?)
            })
        });
        match left {
            Ok(left) => inner.stage = Stage::Leaving { left },
            Err(error) => {
                tracing::debug!(%error, "an old index of flows takes memory until the next one");
            }
        }
    }
}

fn beside<T: Send + 'static>(
    f: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<JoinHandle<io::Result<T>>> {
    std::thread::Builder::new().name("komainu-grow".to_owned()).spawn(f)
}

fn join<T>(thread: JoinHandle<io::Result<T>>) -> io::Result<T> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}
