//! A hash map of the program's that grows with what is in it.
//!
//! The kernel's hash maps are as wide as the most that they may ever hold. A million flows' map is 16 MB of buckets, and with ten
//! thousand of them in it nearly every packet finds its bucket neither in the processor's caches nor its address in the
//! translation buffer: that was most of what a packet of full NAT cost. So the map that the program looks into begins small, and
//! when it is full a larger one takes its place, with all that was in it. The program writes nothing into it meanwhile
//! ([`abi::CONFIG_FROZEN`]): what would have to be written goes up and waits.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::abi::{self, Config, Plain};
use super::maps::set_flags;
use super::sys::{self, Mapped};

/// How many times larger the next one is. It is written while packets that come up wait: 1 µs for an entry.
const GROWTH: u32 = 4;
/// Entries copied at once.
const BATCH: usize = 4096;

/// See the module. All of its users agree on who writes.
#[derive(Debug)]
pub(super) struct Growing<K, V> {
    /// A map of maps with one entry, which the program looks at.
    outer: OwnedFd,
    name: &'static str,
    inner: Mutex<Inner>,
    most: u32,
    config: Arc<Mapped<Config>>,
    of: PhantomData<fn() -> (K, V)>,
}

#[derive(Debug)]
struct Inner {
    map: OwnedFd,
    room: u32,
}

impl<K: Plain, V: Plain> Growing<K, V> {
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
        let inner = Mutex::new(Inner { map, room });
        Ok(Growing { outer, name, inner, most: most.max(1), config, of: PhantomData })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an entry. `E2BIG` when there are as many as there may be.
    pub(super) fn put(&self, key: &K, value: &V) -> io::Result<()> {
        self.write(|inner| sys::update(inner.map.as_fd(), key, value, 0))
    }

    /// Writes an entry unless there is one of that name; whether it was written. `E2BIG` as above.
    pub(super) fn put_new(&self, key: &K, value: &V) -> io::Result<bool> {
        match self.write(|inner| sys::update(inner.map.as_fd(), key, value, sys::UPDATE_NEW)) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Writes many entries at once; some may have been written when it fails.
    pub(super) fn put_all(&self, keys: &[K], values: &[V]) -> io::Result<()> {
        self.write(|inner| sys::update_batch(inner.map.as_fd(), keys, values))
    }

    fn write(&self, write: impl Fn(&Inner) -> io::Result<()>) -> io::Result<()> {
        let mut inner = self.inner();
        loop {
            match write(&inner) {
                Err(e) if e.raw_os_error() == Some(libc::E2BIG) && inner.room < self.most => {
                    set_flags(&self.config, abi::CONFIG_FROZEN, abi::CONFIG_FROZEN);
                    let larger = self.larger(&inner);
                    set_flags(&self.config, abi::CONFIG_FROZEN, 0);
                    *inner = larger?;
                }
                done => return done,
            }
        }
    }

    /// A larger map with the same entries, where the program looks already. What the program wrote into entries meanwhile is lost:
    /// when a flow was last seen, of the time that this takes.
    fn larger(&self, inner: &Inner) -> io::Result<Inner> {
        let room = inner.room.saturating_mul(GROWTH).min(self.most);
        let map = create::<K, V>(self.name, room)?;
        // A write to a map of maps returns when every program that ran before has ended (`Filler::swap`): none writes any more.
        sys::update(self.outer.as_fd(), &0u32, &inner.map.as_raw_fd(), 0)?;
        let (mut keys, mut values) = (vec![K::zeroed(); BATCH], vec![V::zeroed(); BATCH]);
        let mut cursor = None;
        loop {
            let (n, next) = sys::lookup_batch(inner.map.as_fd(), cursor, &mut keys, &mut values)?;
            sys::update_batch(map.as_fd(), &keys[..n], &values[..n])?;
            cursor = next;
            if cursor.is_none() {
                break;
            }
        }
        sys::update(self.outer.as_fd(), &0u32, &map.as_raw_fd(), 0)?;
        tracing::debug!(map = self.name, room, "a larger map");
        Ok(Inner { map, room })
    }

    /// An entry as it stands.
    pub(super) fn get(&self, key: &K) -> io::Result<Option<V>> {
        sys::lookup(self.inner().map.as_fd(), key)
    }

    /// Removes an entry; `false` when there was none.
    pub(super) fn remove(&self, key: &K) -> io::Result<bool> {
        sys::delete(self.inner().map.as_fd(), key)
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
        let inner = self.inner();
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
