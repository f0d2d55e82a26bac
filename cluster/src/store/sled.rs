//! The store on disk.
//!
//! ```text
//! data_dir/lock                 locked while a process uses the directory
//! data_dir/store/log/           sled: Raft id, hard state, log entries, name of the snapshot file
//! data_dir/store/snapshot-<n>   snapshots, each written once
//! data_dir/store/written        number of the newest synced write
//! data_dir/store.bad-<n>/       a store set aside
//! ```
//!
//! # Durability
//!
//! sled's `flush` ends in `sync_file_range(2)` on Linux, which neither waits for the disk's own cache nor writes the
//! file's size. So after it comes an `fdatasync` of sled's file `db`, and an `fsync` of each file that sled has put into
//! `blobs/` (values too big for its log; ours are cut so that there are normally none). sled's `snap.*` files are
//! synced by sled; if power fails while one is renamed, `open` may refuse it, which is one of the reasons for setting a
//! store aside. All that belongs to one [`Persist`] is one sled batch, which sled recovers as a whole or not at all; a
//! snapshot's file is complete and synced before the batch that names it.
//!
//! What it costs: on a virtual machine's disk a vote took 4.2 ms (median of 200), of which 0.14 ms were sled's and the
//! rest `fdatasync`'s. A failover pays that twice, once for the candidate's own vote and once for its voter's.
//!
//! # Losing the end without noticing
//!
//! Where sled finds damage in its log, it takes what comes before for all there is. A voter that lost its newest vote so
//! would vote again. Therefore every write has a number, inside the batch, and once it is synced also in the file
//! `written`, which is not synced itself (that would double the cost of a vote) but gets to the disk within seconds. A
//! log that ends before that number has lost something.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use prost_raft::Message;
use raft::eraftpb::{Entry, Snapshot};

use super::record::{self, ENTRIES, HARD_STATE, RAFT_ID, SEQUENCE, SNAPSHOT};
use super::{Store, StoreError};
use crate::raft::{Persist, RaftId, Restored};

/// sled's page cache in bytes. Nothing is read after start, so it only has to hold what is being written.
const CACHE_BYTES: u64 = 16 << 20;
/// How long a lock that nobody may hold any more is waited for, and how often it is tried.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// See [`LOCK_PATIENCE`].
const LOCK_RETRY: Duration = Duration::from_millis(5);
/// Stores set aside that a directory may hold before a node refuses to start on it: a disk that eats one store after
/// the other needs a person.
const MAX_SET_ASIDE: usize = 16;

/// See the [module documentation](self).
pub struct SledStore {
    /// The store's own directory, `data_dir/store`.
    dir: PathBuf,
    data_dir: PathBuf,
    db: sled::Db,
    /// sled's log file, for the fsync that sled does not do.
    db_file: File,
    /// Index and number of pieces of every entry stored, without gaps.
    pieces: std::collections::VecDeque<(u64, u32)>,
    /// Number of the snapshot file in force; 0 before the first.
    snapshot_number: u64,
    blobs_synced: BTreeSet<std::ffi::OsString>,
    restored: Option<Restored>,
    /// Number of the newest write.
    sequence: u64,
    written: File,
    broken: Option<String>,
    /// Held until the store is closed.
    _lock: Flock<File>,
}

/// An opened store.
pub struct Opened {
    /// The store.
    pub store: SledStore,
    /// Where a store was set aside that could not be used, and why. The node then starts empty.
    pub set_aside: Vec<SetAside>,
}

/// A store that could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// Where it is now.
    pub path: PathBuf,
    /// What was wrong with it; empty when it was set aside before this start.
    pub reason: String,
}

/// Opens the store in `data_dir`, making the directory when it is missing. A store that can't be opened or fails its
/// check is set aside and an empty one is made.
///
/// # Errors
/// The directory can't be used, another process uses it, or the disk is full.
pub fn open(data_dir: &Path) -> Result<Opened, StoreError> {
    let lock = prepare(data_dir)?;
    let mut set_aside = earlier_set_aside(data_dir);
    let dir = data_dir.join("store");
    let reason = match open_checked(data_dir, &dir) {
        Ok(parts) => return Ok(Opened { store: parts.into_store(data_dir, lock), set_aside }),
        Err(StoreError::Damaged { reason, .. }) => reason,
        Err(other) => return Err(other),
    };
    if set_aside.len() >= MAX_SET_ASIDE {
        let reason = format!(
            "{MAX_SET_ASIDE} stores were set aside here already, and the newest is damaged again ({reason}); \
             look at the disk, then remove store.bad-*"
        );
        return Err(StoreError::Directory { path: data_dir.to_owned(), reason });
    }
    let path = (1..).map(|n| data_dir.join(format!("store.bad-{n}"))).find(|p| !p.exists());
    let path = path.expect("an unbounded range has a number that is not in use");
    let failed = |doing, e: io::Error| io_error(data_dir, doing, &e);
    fs::rename(&dir, &path).map_err(|e| failed("setting the damaged store aside", e))?;
    sync_dir(data_dir).map_err(|e| failed("setting the damaged store aside", e))?;
    set_aside.push(SetAside { path, reason });
    let parts = open_checked(data_dir, &dir)?;
    Ok(Opened { store: parts.into_store(data_dir, lock), set_aside })
}

fn prepare(data_dir: &Path) -> Result<Flock<File>, StoreError> {
    let refuse = |e: &io::Error| match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => StoreError::Full { path: data_dir.to_owned() },
        _ => StoreError::Directory {
            path: data_dir.to_owned(),
            reason: format!("{e}; it must be a directory that this process may write to"),
        },
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir).map_err(|e| refuse(&e))?;
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(data_dir.join("lock"));
    match Flock::lock(file.map_err(|e| refuse(&e))?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => Err(StoreError::Locked { path: data_dir.to_owned() }),
        Err((_, e)) => Err(refuse(&e.into())),
    }
}

fn earlier_set_aside(data_dir: &Path) -> Vec<SetAside> {
    let names = fs::read_dir(data_dir).into_iter().flatten().flatten();
    let bad = names.filter(|e| e.file_name().to_string_lossy().starts_with("store.bad-"));
    let mut found: Vec<_> = bad.map(|e| SetAside { path: e.path(), reason: String::new() }).collect();
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// A store that was opened and checked.
struct Parts {
    dir: PathBuf,
    db: sled::Db,
    db_file: File,
    pieces: std::collections::VecDeque<(u64, u32)>,
    snapshot_number: u64,
    sequence: u64,
    written: File,
    restored: Option<Restored>,
}

impl Parts {
    fn into_store(self, data_dir: &Path, lock: Flock<File>) -> SledStore {
        let Parts { dir, db, db_file, pieces, snapshot_number, sequence, written, restored } = self;
        SledStore {
            dir,
            data_dir: data_dir.to_owned(),
            db,
            db_file,
            pieces,
            snapshot_number,
            blobs_synced: BTreeSet::new(),
            restored,
            sequence,
            written,
            broken: None,
            _lock: lock,
        }
    }
}

/// Opens what is there, or makes an empty store, and reads all of it. sled may panic on files that it didn't write so:
/// that counts as damage, too.
fn open_checked(data_dir: &Path, dir: &Path) -> Result<Parts, StoreError> {
    let damaged = |reason: String| StoreError::Damaged { path: data_dir.to_owned(), reason };
    match catch_unwind(AssertUnwindSafe(|| open_unguarded(data_dir, dir))) {
        Ok(result) => result,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(damaged(format!("sled: {text}")))
        }
    }
}

fn open_unguarded(data_dir: &Path, dir: &Path) -> Result<Parts, StoreError> {
    let io = |doing| move |e: io::Error| io_error(data_dir, doing, &e);
    let damaged = |reason: String| StoreError::Damaged { path: data_dir.to_owned(), reason };
    let is_new = !dir.exists();
    fs::create_dir_all(dir).map_err(io("making the store"))?;
    let log_dir = dir.join("log");
    let config = sled::Config::new().path(&log_dir).cache_capacity(CACHE_BYTES).flush_every_ms(None);
    let db = open_unlocked(&config).map_err(|e| match e {
        sled::Error::Io(e)
            if matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData) =>
        {
            damaged(format!("sled: {e}"))
        }
        sled::Error::Io(e) => io_error(data_dir, "opening the log", &e),
        other => damaged(format!("sled: {other}")),
    })?;
    let db_file = File::open(log_dir.join("db")).map_err(io("opening the log"))?;
    let written =
        OpenOptions::new().create(true).truncate(false).read(true).write(true).open(dir.join("written"));
    let written = written.map_err(io("opening the log"))?;
    if is_new {
        // The names of the new files must survive a power failure as well as what is in them.
        db.flush().map_err(|e| sled_error(data_dir, "writing the log", &e))?;
        db_file.sync_all().map_err(io("writing the log"))?;
        for d in [&log_dir, dir, data_dir] {
            sync_dir(d).map_err(io("making the store"))?;
        }
        if let Some(parent) = data_dir.parent().filter(|p| !p.as_os_str().is_empty()) {
            // Not ours, and perhaps not readable for us; then it was there before.
            let _ = sync_dir(parent);
        }
    }
    let mut parts = Parts {
        dir: dir.to_owned(),
        db,
        db_file,
        pieces: Default::default(),
        snapshot_number: 0,
        sequence: 0,
        written,
        restored: None,
    };
    parts.read().map_err(damaged)?;
    Ok(parts)
}

/// Opens the log, waiting for sled's own lock: whoever still holds it has given up ours, so it is about to end. sled's
/// background threads keep the file open for a moment after the last handle is gone, and so does a child between fork and
/// exec.
fn open_unlocked(config: &sled::Config) -> sled::Result<sled::Db> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match config.open() {
            // sled has no kind for it.
            Err(sled::Error::Io(e))
                if e.to_string().contains("could not acquire lock") && Instant::now() < deadline =>
            {
                std::thread::sleep(LOCK_RETRY);
            }
            result => return result,
        }
    }
}

impl Parts {
    /// Reads and checks everything.
    fn read(&mut self) -> Result<(), String> {
        let entries = self.read_entries()?;
        let meta = |key: &[u8]| match self.db.get(key) {
            Ok(Some(value)) => record::unwrap(key, &value).map(|v| Some(v.to_vec())),
            Ok(None) => Ok(None),
            Err(e) => Err(format!("sled: {e}")),
        };
        let (raft_id, hard_state, named) = (meta(RAFT_ID)?, meta(HARD_STATE)?, meta(SNAPSHOT)?);
        self.sequence = match meta(SEQUENCE)? {
            Some(bytes) => {
                u64::from_be_bytes(bytes.try_into().map_err(|_| "the write's number has a wrong length")?)
            }
            None => 0,
        };
        if let Some(written) = read_written(&self.written).filter(|&written| written > self.sequence) {
            return Err(format!("the log ends with write {} and {written} were made", self.sequence));
        }
        let Some(raft_id) = raft_id else {
            return match entries.is_empty() && hard_state.is_none() && named.is_none() {
                true => Ok(()),
                false => Err("there is a log, and no Raft id that it belongs to".to_owned()),
            };
        };
        let raft_id: [u8; 8] = raft_id.try_into().map_err(|_| "the Raft id has a wrong length")?;
        let hard_state = record::decode_hard_state(&hard_state.unwrap_or_default())?;
        let mut snapshot = Snapshot::default();
        if let Some(named) = named {
            let (number, checksum) = SnapshotName::decode(&named)?;
            let path = snapshot_path(&self.dir, number);
            let bytes = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            if record::checksum(SNAPSHOT, &bytes) != checksum {
                return Err(format!("{}: wrong checksum", path.display()));
            }
            snapshot = Snapshot::decode(bytes.as_slice()).map_err(|e| format!("{}: {e}", path.display()))?;
            self.snapshot_number = number;
        }
        let covered = snapshot.get_metadata().index;
        if let (Some(first), Some(last)) = (entries.first(), entries.last()) {
            if first.index > covered + 1 {
                return Err(format!("the log begins at {} and the snapshot ends at {covered}", first.index));
            }
            if hard_state.commit > last.index.max(covered) {
                return Err(format!("{} is committed and the log ends at {}", hard_state.commit, last.index));
            }
        } else if hard_state.commit > covered {
            return Err(format!("{} is committed and the log is empty", hard_state.commit));
        }
        let raft_id = RaftId(u64::from_be_bytes(raft_id));
        self.restored = Some(Restored { raft_id, hard_state, snapshot, entries });
        Ok(())
    }

    fn read_entries(&mut self) -> Result<Vec<Entry>, String> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut bytes = Vec::new();
        let mut next_piece = 0;
        for item in self.db.scan_prefix(ENTRIES) {
            let (key, value) = item.map_err(|e| format!("sled: {e}"))?;
            let (index, piece) = record::entry_of_key(&key).ok_or("a key of no known form")?;
            let payload = record::unwrap(&key, &value)?;
            let (more, payload) = payload.split_first().ok_or("an empty piece")?;
            if piece != next_piece {
                return Err(format!("entry {index}: piece {piece} where {next_piece} was expected"));
            }
            bytes.extend_from_slice(payload);
            next_piece += 1;
            if *more != 0 {
                continue;
            }
            let entry = record::decode_entry(&bytes)?;
            if entry.index != index
                || entries.last().is_some_and(|last| last.index + 1 != index || last.term > entry.term)
            {
                return Err(format!("entry {} of term {} stands at {index}", entry.index, entry.term));
            }
            self.pieces.push_back((index, next_piece));
            entries.push(entry);
            bytes.clear();
            next_piece = 0;
        }
        if next_piece != 0 {
            return Err("the last entry is incomplete".to_owned());
        }
        Ok(entries)
    }
}

/// The number in the file `written`; absent when there is none, or it was being written as the power failed.
fn read_written(file: &File) -> Option<u64> {
    let mut bytes = [0; 12];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let (sum, number) = bytes.split_first_chunk::<4>()?;
    let sound = u32::from_be_bytes(*sum) == record::checksum(SEQUENCE, number);
    sound.then_some(u64::from_be_bytes(number.try_into().ok()?))
}

/// What the record under [`SNAPSHOT`] says: number of the file and its checksum.
struct SnapshotName;

impl SnapshotName {
    fn encode(number: u64, checksum: u32) -> Vec<u8> {
        [&number.to_be_bytes()[..], &checksum.to_be_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Result<(u64, u32), String> {
        let wrong = || "the snapshot's name has a wrong length".to_owned();
        let (number, checksum) = bytes.split_first_chunk::<8>().ok_or_else(wrong)?;
        Ok((u64::from_be_bytes(*number), u32::from_be_bytes(checksum.try_into().map_err(|_| wrong())?)))
    }
}

impl Store for SledStore {
    /// What was read when the store was opened. Gives it away: a second call finds nothing.
    fn load(&mut self) -> Result<Option<Restored>, StoreError> {
        Ok(self.restored.take())
    }

    fn write(&mut self, write: &Persist) -> Result<(), StoreError> {
        if let Some(reason) = &self.broken {
            return Err(StoreError::Broken(reason.clone()));
        }
        let result = self.try_write(write);
        if let Err(e) = &result {
            self.broken = Some(e.to_string());
        }
        result
    }
}

impl SledStore {
    fn try_write(&mut self, write: &Persist) -> Result<(), StoreError> {
        let data_dir = self.data_dir.clone();
        let mut batch = sled::Batch::default();
        let put = |batch: &mut sled::Batch, key: &[u8], payload: &[u8]| {
            batch.insert(key, record::wrap(key, payload))
        };
        if write.forget {
            for key in [RAFT_ID, HARD_STATE, SNAPSHOT] {
                batch.remove(key);
            }
        }
        if let Some(raft_id) = write.raft_id {
            put(&mut batch, RAFT_ID, &raft_id.0.to_be_bytes());
        }
        if let Some(hard_state) = &write.hard_state {
            put(&mut batch, HARD_STATE, &record::encode_hard_state(hard_state));
        }
        if let Some(snapshot) = &write.snapshot {
            let checksum = self
                .write_snapshot(snapshot, self.snapshot_number + 1)
                .map_err(|e| io_error(&data_dir, "writing a snapshot", &e))?;
            put(&mut batch, SNAPSHOT, &SnapshotName::encode(self.snapshot_number + 1, checksum));
        }
        let keep_from = if write.reset_log || write.forget { u64::MAX } else { write.drop_through + 1 };
        let keep_below = write.entries.first().map_or(u64::MAX, |e| e.index);
        let is_kept = |index: u64| index >= keep_from && index < keep_below;
        for &(index, pieces) in self.pieces.iter().filter(|(index, _)| !is_kept(*index)) {
            for piece in 0..pieces {
                batch.remove(&record::entry_key(index, piece));
            }
        }
        self.pieces.retain(|&(index, _)| is_kept(index));
        for entry in &write.entries {
            let pieces = record::pieces(entry);
            for (piece, payload) in (0u32..).zip(&pieces) {
                put(&mut batch, &record::entry_key(entry.index, piece), payload);
            }
            self.pieces.push_back((entry.index, pieces.len() as u32));
        }
        self.sequence += 1;
        put(&mut batch, SEQUENCE, &self.sequence.to_be_bytes());
        self.db.apply_batch(batch).map_err(|e| sled_error(&data_dir, "writing the log", &e))?;
        if write.sync || write.snapshot.is_some() {
            self.sync()?;
        }
        if write.snapshot.is_some() {
            self.snapshot_number += 1;
            // The one before is no longer named by anything on disk.
            let _ = fs::remove_file(snapshot_path(&self.dir, self.snapshot_number - 1));
        }
        Ok(())
    }

    /// Everything written so far is on disk when this returns.
    fn sync(&mut self) -> Result<(), StoreError> {
        let data_dir = self.data_dir.clone();
        self.db.flush().map_err(|e| sled_error(&data_dir, "writing the log", &e))?;
        let number = record::wrap(SEQUENCE, &self.sequence.to_be_bytes());
        self.sync_blobs()
            .and_then(|()| self.db_file.sync_data())
            .and_then(|()| self.written.write_all_at(&number, 0))
            .map_err(|e| io_error(&data_dir, "syncing the log", &e))
    }

    fn sync_blobs(&mut self) -> io::Result<()> {
        let dir = self.dir.join("log").join("blobs");
        let mut present = BTreeSet::new();
        for blob in fs::read_dir(&dir)? {
            let name = blob?.file_name();
            if !self.blobs_synced.contains(&name) {
                match File::open(dir.join(&name)) {
                    Ok(file) => file.sync_all()?,
                    // sled removes them in the background.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(e),
                }
            }
            present.insert(name);
        }
        if present.iter().any(|name| !self.blobs_synced.contains(name)) {
            sync_dir(&dir)?;
        }
        self.blobs_synced = present;
        Ok(())
    }

    fn write_snapshot(&self, snapshot: &Snapshot, number: u64) -> io::Result<u32> {
        let bytes = snapshot.encode_to_vec();
        let path = snapshot_path(&self.dir, number);
        let temporary = path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        sync_dir(&self.dir)?;
        Ok(record::checksum(SNAPSHOT, &bytes))
    }
}

fn snapshot_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("snapshot-{number}"))
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn io_error(data_dir: &Path, doing: &'static str, e: &io::Error) -> StoreError {
    let path = data_dir.to_owned();
    let full = matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
        || matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    if full { StoreError::Full { path } } else { StoreError::Io { path, doing, reason: in_words(e) } }
}

/// The system's words. sled hands on copies of its errors that have lost the system's number and of which the text is the
/// original's debug form: `Os { code: 5, kind: Uncategorized, message: "Input/output error" }`.
fn in_words(e: &io::Error) -> String {
    let text = e.to_string();
    match text.split_once("message: \"").and_then(|(_, rest)| rest.split_once('"')) {
        Some((message, _)) => message.to_owned(),
        None => text,
    }
}

fn sled_error(data_dir: &Path, doing: &'static str, e: &sled::Error) -> StoreError {
    match e {
        sled::Error::Io(e) => io_error(data_dir, doing, e),
        other => StoreError::Io { path: data_dir.to_owned(), doing, reason: other.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fault: the notice of a full disk showed `Os { code: 28, … }`.
    #[test]
    fn what_the_system_refused_is_told_in_words_also_through_a_copy_of_the_error() {
        let told = |code: i32| {
            let original = io::Error::from_raw_os_error(code);
            let copy = io::Error::new(original.kind(), format!("{original:?}"));
            let dir = Path::new("/var/lib/komainu");
            let first = io_error(dir, "writing the log", &original).to_string();
            (first, sled_error(dir, "writing the log", &sled::Error::Io(copy)).to_string())
        };
        let (first, copy) = told(libc::ENOSPC);
        assert_eq!(first, copy);
        assert_eq!(copy, "data_dir /var/lib/komainu: the disk is full; make room and restart this node");
        let (_, copy) = told(libc::EIO);
        assert!(copy.contains("writing the log: Input/output error") && !copy.contains("Os {"), "{copy}");
    }
}
