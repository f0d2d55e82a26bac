//! A hash map of the program's that grows with what is in it.
//!
//! The kernel's hash maps are as wide as the most that they may ever hold. A million flows' map is 16 MB of buckets, and with ten
//! thousand of them in it nearly every packet finds its bucket neither in the processor's caches nor its address in the
//! translation buffer: that was most of what a packet of full NAT cost. So the map that the program looks into begins small, and
//! before it is full a larger one takes its place, with all that was in it:
//!
//!   1. [`Growing::begin`]: the larger map is there, and nobody looks at it;
//!   2. [`Growing::proceed`], piece by piece, between frames: entries are copied while the program goes on with the old map. Whatever
//!      is written to or taken from that meanwhile is noted ([`Growing::changed`]; the program tells of it), and copied again;
//!   3. for the last of it the program writes nothing ([`abi::CONFIG_FROZEN`]): what would have to be written goes up and waits, for
//!      the time that the kernel takes to say that no program runs that began before (`Maps::finish_growing`).
//!
//! When a map is full before that is done, its writer copies all of it at once while the program writes nothing.

use std::collections::HashSet;
use std::hash::Hash;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::abi::{self, Config, Plain};
use super::maps::set_flags;
use super::sys::{self, Mapped};

/// How many times larger the next one is.
const GROWTH: u32 = 4;
/// Entries copied at once, 1 µs for each: frames that come up wait so long.
const BATCH: usize = 1024;
/// Pieces after which what changed is no longer copied again before the end: it changes as fast as that.
const ROUNDS: u32 = 64;

/// See the module. All of its users agree on who writes.
#[derive(Debug)]
pub(super) struct Growing<K, V> {
    /// A map of maps with one entry, which the program looks at.
    outer: OwnedFd,
    name: &'static str,
    inner: Mutex<Inner<K, V>>,
    most: u32,
    config: Arc<Mapped<Config>>,
}

#[derive(Debug)]
struct Inner<K, V> {
    map: OwnedFd,
    room: u32,
    next: Option<Next<K, V>>,
}

/// The larger map while it is filled.
#[derive(Debug)]
struct Next<K, V> {
    map: OwnedFd,
    room: u32,
    copied: Copied,
    rounds: u32,
    /// Entries of the old map that have changed since they may have been copied.
    changed: HashSet<K>,
    keys: Vec<K>,
    values: Vec<V>,
}

#[derive(Debug)]
enum Copied {
    /// Nothing yet, or as far as the kernel calls it.
    To(Option<u32>),
    /// Every entry, once.
    All,
}

impl<K: Plain + Eq + Hash, V: Plain> Next<K, V> {
    fn new(name: &str, room: u32) -> io::Result<Next<K, V>> {
        let (keys, values) = (vec![K::zeroed(); BATCH], vec![V::zeroed(); BATCH]);
        let map = create::<K, V>(name, room)?;
        Ok(Next { map, room, copied: Copied::To(None), rounds: 0, changed: HashSet::new(), keys, values })
    }

    /// Copies the next entries, if there are some that were not.
    fn copy_some(&mut self, from: &OwnedFd) -> io::Result<()> {
        if let Copied::To(at) = self.copied {
            let (n, at) = sys::lookup_batch(from.as_fd(), at, &mut self.keys, &mut self.values)?;
            sys::update_batch(self.map.as_fd(), &self.keys[..n], &self.values[..n])?;
            self.copied = at.map_or(Copied::All, |at| Copied::To(Some(at)));
        }
        Ok(())
    }

    /// Copies entries again that have changed, `most` of them.
    fn copy_changed(&mut self, from: &OwnedFd, most: usize) -> io::Result<()> {
        let some: Vec<K> = self.changed.iter().take(most).copied().collect();
        for key in some {
            match sys::lookup::<K, V>(from.as_fd(), &key)? {
                Some(value) => sys::update(self.map.as_fd(), &key, &value, 0)?,
                None => drop(sys::delete(self.map.as_fd(), &key)?),
            }
            self.changed.remove(&key);
        }
        Ok(())
    }
}

impl<K, V> Inner<K, V> {
    fn note(&mut self, key: &K)
    where
        K: Copy + Eq + Hash,
    {
        if let Some(next) = &mut self.next {
            next.changed.insert(*key);
        }
    }
}

impl<K: Plain + Eq + Hash, V: Plain> Growing<K, V> {
    /// Puts a first map with room for `first` entries into `outer`. It grows up to `most`.
    pub(super) fn new(
        outer: OwnedFd,
        name: &'static str,
        (first, most): (u32, u32),
        config: Arc<Mapped<Config>>,
    ) -> io::Result<Growing<K, V>> {
        let room = first.min(most).max(1);
        let map = create::<K, V>(name, room)?;
        sys::update(outer.as_fd(), &0u32, &map.as_raw_fd(), 0)?;
        let inner = Mutex::new(Inner { map, room, next: None });
        Ok(Growing { outer, name, inner, most: most.max(1), config })
    }

    fn inner(&self) -> MutexGuard<'_, Inner<K, V>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For how many entries there is room without growing, and whether it may grow.
    pub(super) fn room(&self) -> (u32, bool) {
        let inner = self.inner();
        (inner.room, inner.room < self.most)
    }

    /// Begins to grow, unless it does already or may not.
    pub(super) fn begin(&self) -> io::Result<()> {
        let mut inner = self.inner();
        if inner.next.is_none() && inner.room < self.most {
            inner.next = Some(Next::new(self.name, self.next_room(&inner))?);
        }
        Ok(())
    }

    fn next_room(&self, inner: &Inner<K, V>) -> u32 {
        inner.room.saturating_mul(GROWTH).min(self.most)
    }

    /// Notes that the program has written to that entry.
    pub(super) fn changed(&self, key: &K) {
        self.inner().note(key);
    }

    /// Copies a piece. Whether hardly anything is left to be copied; also when it does not grow.
    pub(super) fn proceed(&self) -> io::Result<bool> {
        let Inner { map, next: Some(next), .. } = &mut *self.inner() else { return Ok(true) };
        next.copy_some(map)?;
        if matches!(next.copied, Copied::To(_)) {
            return Ok(false);
        }
        next.copy_changed(map, BATCH)?;
        next.rounds += 1;
        Ok(next.changed.is_empty() || next.rounds > ROUNDS)
    }

    /// Returns when no program runs any more that began before the call.
    pub(super) fn fence(&self) -> io::Result<()> {
        // A write to a map of maps does (`Filler::swap`).
        sys::update(self.outer.as_fd(), &0u32, &self.inner().map.as_raw_fd(), 0)
    }

    /// Copies what is left, and has the program look at the larger map. The program writes nothing meanwhile, and what it wrote before
    /// has been noted.
    pub(super) fn finish(&self) -> io::Result<()> {
        let mut inner = self.inner();
        let Inner { map, next, .. } = &mut *inner;
        // Whatever happens, the old map is complete.
        let Some(mut next) = next.take() else { return Ok(()) };
        while let Copied::To(_) = next.copied {
            next.copy_some(map)?;
        }
        next.copy_changed(map, usize::MAX)?;
        sys::update(self.outer.as_fd(), &0u32, &next.map.as_raw_fd(), 0)?;
        tracing::debug!(map = self.name, room = next.room, "a larger map");
        (inner.map, inner.room) = (next.map, next.room);
        Ok(())
    }

    /// Gives up to grow.
    pub(super) fn abandon(&self) {
        self.inner().next = None;
    }

    /// Writes an entry. `E2BIG` when there are as many as there may be.
    pub(super) fn put(&self, key: &K, value: &V) -> io::Result<()> {
        self.write(&[*key], |map| sys::update(map.as_fd(), key, value, 0))
    }

    /// Writes an entry unless there is one of that name; whether it was written. `E2BIG` as above.
    pub(super) fn put_new(&self, key: &K, value: &V) -> io::Result<bool> {
        match self.write(&[*key], |map| sys::update(map.as_fd(), key, value, sys::UPDATE_NEW)) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Writes many entries at once; some may have been written when it fails.
    pub(super) fn put_all(&self, keys: &[K], values: &[V]) -> io::Result<()> {
        self.write(keys, |map| sys::update_batch(map.as_fd(), keys, values))
    }

    fn write(&self, keys: &[K], write: impl Fn(&OwnedFd) -> io::Result<()>) -> io::Result<()> {
        let mut inner = self.inner();
        loop {
            match write(&inner.map) {
                Err(e) if e.raw_os_error() == Some(libc::E2BIG) && inner.room < self.most => {
                    self.grow_at_once(&mut inner)?;
                }
                done => {
                    keys.iter().for_each(|key| inner.note(key));
                    return done;
                }
            }
        }
    }

    /// A larger map with the same entries, where the program looks already. What the program wrote into entries meanwhile is lost:
    /// when a flow was last seen, of the time that this takes.
    fn grow_at_once(&self, inner: &mut Inner<K, V>) -> io::Result<()> {
        // What was copied may have changed since in ways that nobody has been told of yet.
        inner.next = None;
        let frozen_before = self.config.read(0).is_some_and(|c| c.flags & abi::CONFIG_FROZEN != 0);
        set_flags(&self.config, abi::CONFIG_FROZEN, abi::CONFIG_FROZEN);
        let larger = (|| {
            let mut next = Next::<K, V>::new(self.name, self.next_room(inner))?;
            sys::update(self.outer.as_fd(), &0u32, &inner.map.as_raw_fd(), 0)?;
            while let Copied::To(_) = next.copied {
                next.copy_some(&inner.map)?;
            }
            sys::update(self.outer.as_fd(), &0u32, &next.map.as_raw_fd(), 0)?;
            io::Result::Ok(next)
        })();
        if !frozen_before {
            set_flags(&self.config, abi::CONFIG_FROZEN, 0);
        }
        let larger = larger?;
        tracing::debug!(map = self.name, room = larger.room, "a larger map, at once");
        (inner.map, inner.room) = (larger.map, larger.room);
        Ok(())
    }

    /// An entry as it stands.
    pub(super) fn get(&self, key: &K) -> io::Result<Option<V>> {
        sys::lookup(self.inner().map.as_fd(), key)
    }

    /// Removes an entry; `false` when there was none.
    pub(super) fn remove(&self, key: &K) -> io::Result<bool> {
        let mut inner = self.inner();
        let removed = sys::delete(inner.map.as_fd(), key);
        inner.note(key);
        removed
    }

    /// Counts the entries, one by one.
    pub(super) fn len(&self) -> io::Result<usize> {
        let inner = self.inner();
        let mut n = 0;
        let mut at: Option<K> = sys::next_key(inner.map.as_fd(), None)?;
        while let Some(key) = at {
            n += 1;
            at = sys::next_key(inner.map.as_fd(), Some(&key))?;
        }
        Ok(n)
    }

    /// Removes every entry. The next key is asked for while the last one is still there: behind one that is gone the kernel starts
    /// anew, and all of it would take the square of the time.
    pub(super) fn clear(&self) -> io::Result<()> {
        let mut inner = self.inner();
        inner.next = None;
        let map = inner.map.as_fd();
        let mut at: Option<K> = sys::next_key(map, None)?;
        while let Some(key) = at {
            at = sys::next_key(map, Some(&key))?;
            sys::delete(map, &key)?;
        }
        Ok(())
    }
}

fn create<K: Plain, V: Plain>(name: &str, room: u32) -> io::Result<OwnedFd> {
    sys::create::<K, V>(name, sys::TYPE_HASH, room, sys::FLAG_NO_PREALLOC)
}
