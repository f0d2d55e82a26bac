//! The same tests for every store, and those that only a disk needs.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use raft::eraftpb::{Entry, HardState, Snapshot};

use super::*;
use crate::raft::RaftId;

fn entry(index: u64, term: u64, len: usize) -> Entry {
    Entry { index, term, data: vec![index as u8; len], ..Entry::default() }
}

fn hard(term: u64, vote: u64, commit: u64) -> Option<HardState> {
    Some(HardState { term, vote, commit })
}

fn snapshot(index: u64, term: u64, len: usize) -> Option<Snapshot> {
    let mut s = Snapshot { data: vec![7; len], ..Snapshot::default() };
    s.mut_metadata().index = index;
    s.mut_metadata().term = term;
    Some(s)
}

fn first() -> Persist {
    let (raft_id, hard_state) = (Some(RaftId(0x1_0001)), hard(1, 0, 0));
    Persist { number: 1, raft_id, hard_state, snapshot: snapshot(0, 0, 10), sync: true, ..Persist::default() }
}

fn appended(entries: Vec<Entry>) -> Persist {
    Persist { entries, sync: true, ..Persist::default() }
}

fn reopened(dir: &Path) -> (SledStore, Restored) {
    let mut opened = open(dir).expect("opens");
    assert_eq!(opened.set_aside, []);
    let restored = opened.store.load().expect("loads").expect("is not empty");
    (opened.store, restored)
}

fn indices(restored: &Restored) -> Vec<(u64, u64)> {
    restored.entries.iter().map(|e| (e.index, e.term)).collect()
}

#[test]
fn a_new_store_is_empty() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut opened = open(&dir.path().join("made/on/the/way")).expect("opens");
    assert_eq!(opened.store.load().expect("loads"), None);
}

#[test]
fn what_was_forgotten_is_gone_and_the_store_lives_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut disk = open(dir.path()).expect("opens").store;
    let mut memory = MemoryStore::new();
    let forget = Persist { forget: true, sync: true, ..Persist::default() };
    for write in [first(), appended(vec![entry(1, 1, 10), entry(2, 1, 100_000)]), forget] {
        disk.write(&write).expect("writes");
        memory.write(&write).expect("writes");
    }
    memory.lose_unsynced();
    assert_eq!(memory.load().expect("reads"), None);
    drop(disk);
    let opened = open(dir.path()).expect("opens");
    assert!(opened.set_aside.is_empty());
    let mut disk = opened.store;
    assert_eq!(disk.load().expect("reads"), None);
    disk.write(&first()).expect("writes");
    drop(disk);
    assert_eq!(reopened(dir.path()).1.raft_id, RaftId(0x1_0001));
}

#[test]
fn what_was_written_is_there_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut store = open(dir.path()).expect("opens").store;
    store.write(&first()).expect("writes");
    store.write(&appended(vec![entry(1, 1, 10), entry(2, 1, 100_000), entry(3, 1, 0)])).expect("writes");
    store.write(&Persist { hard_state: hard(2, 7, 1), sync: true, ..Persist::default() }).expect("writes");
    drop(store);
    let (mut store, restored) = reopened(dir.path());
    assert_eq!(restored.raft_id, RaftId(0x1_0001));
    assert_eq!(restored.hard_state, HardState { term: 2, vote: 7, commit: 1 });
    assert_eq!(restored.entries, vec![entry(1, 1, 10), entry(2, 1, 100_000), entry(3, 1, 0)]);
    // A conflicting tail is replaced, also by shorter entries than were there.
    store.write(&appended(vec![entry(2, 2, 1)])).expect("writes");
    drop(store);
    let (mut store, restored) = reopened(dir.path());
    assert_eq!(restored.entries, vec![entry(1, 1, 10), entry(2, 2, 1)]);
    let compact = Persist { snapshot: snapshot(2, 2, 3_000_000), drop_through: 1, ..Persist::default() };
    store.write(&Persist { hard_state: hard(2, 7, 2), ..compact }).expect("writes");
    drop(store);
    let (mut store, restored) = reopened(dir.path());
    assert_eq!(
        (restored.snapshot.clone(), indices(&restored)),
        (snapshot(2, 2, 3_000_000).expect("made"), vec![(2, 2)])
    );
    let installed = Persist {
        snapshot: snapshot(9, 3, 5),
        reset_log: true,
        hard_state: hard(3, 0, 9),
        ..Persist::default()
    };
    store.write(&Persist { entries: vec![entry(10, 3, 1)], ..installed }).expect("writes");
    drop(store);
    let (store, restored) = reopened(dir.path());
    assert_eq!(
        (restored.snapshot.clone(), indices(&restored)),
        (snapshot(9, 3, 5).expect("made"), vec![(10, 3)])
    );
    drop(store);
    let snapshots = fs::read_dir(dir.path().join("store")).expect("lists").flatten();
    let names: Vec<_> =
        snapshots.map(|e| e.file_name()).filter(|n| n.to_string_lossy().starts_with("snap")).collect();
    assert_eq!(names.len(), 1, "older snapshots are removed: {names:?}");
}

#[test]
fn a_second_process_is_told_that_it_is_locked_out() {
    let dir = tempfile::tempdir().expect("a directory");
    let _first = open(dir.path()).expect("opens");
    let error = open(dir.path()).map(drop).expect_err("is locked").to_string();
    assert!(error.contains("another komainu is using it"), "{error}");
}

#[test]
fn a_directory_that_is_none_is_refused_with_its_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    fs::write(&file, b"x").expect("writes");
    let error = open(&file).map(drop).expect_err("is refused").to_string();
    assert!(error.contains("file: ") && error.contains("must be a directory"), "{error}");
}

/// Whatever is done to the files, the node starts: on what was there, or on an empty store with the old one set aside.
#[test]
fn a_damaged_store_is_set_aside_and_never_deleted() {
    let damage: [fn(&Path); 5] = [
        |store| fs::write(store.join("snapshot-1"), b"nonsense").expect("writes"),
        |store| fs::remove_file(store.join("snapshot-1")).expect("removes"),
        |store| {
            for file in fs::read_dir(store.join("log")).expect("lists").flatten() {
                if file.file_name().to_string_lossy().starts_with("snap.") {
                    fs::write(file.path(), b"nonsense").expect("writes");
                }
            }
        },
        |store| fs::write(store.join("log/db"), vec![0xa5; 600_000]).expect("writes"),
        |store| {
            let path = store.join("log/db");
            let mut bytes = fs::read(&path).expect("reads");
            let found = bytes.windows(8).rposition(|w| w == [2u8; 8]).expect("the entry's data is in there");
            bytes[found] ^= 0xff;
            fs::write(&path, bytes).expect("writes");
        },
    ];
    for (i, damage) in damage.iter().enumerate() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut store = open(dir.path()).expect("opens").store;
        store.write(&first()).expect("writes");
        store.write(&appended(vec![entry(1, 1, 10), entry(2, 1, 1000)])).expect("writes");
        store
            .write(&Persist { hard_state: hard(1, 0, 2), sync: true, ..Persist::default() })
            .expect("writes");
        drop(store);
        drop(open(dir.path()).expect("opens again"));
        damage(&dir.path().join("store"));
        let mut opened = open(dir.path()).expect("opens all the same");
        assert_eq!(opened.store.load().expect("loads"), None, "damage {i}");
        let [aside] = opened.set_aside.as_slice() else { panic!("damage {i}: {:?}", opened.set_aside) };
        assert_eq!(aside.path, dir.path().join("store.bad-1"));
        assert!(!aside.reason.is_empty() && aside.path.join("log/db").exists(), "damage {i}: {aside:?}");
        // The empty one is usable, and what was set aside goes on being reported.
        opened.store.write(&first()).expect("writes");
        drop(opened);
        assert_eq!(open(dir.path()).expect("opens").set_aside.len(), 1);
    }
}

/// Files of a store and what `kill -9` leaves of it: what is in them while it is open.
fn left_behind() -> (Vec<(PathBuf, Vec<u8>)>, Restored) {
    let dir = quick_directory();
    let mut store = open(dir.path()).expect("opens").store;
    store.write(&first()).expect("writes");
    store.write(&appended(vec![entry(1, 1, 10), entry(2, 1, 100)])).expect("writes");
    store.write(&Persist { hard_state: hard(2, 7, 1), sync: true, ..Persist::default() }).expect("writes");
    let compact = Persist { snapshot: snapshot(1, 1, 30), drop_through: 1, ..Persist::default() };
    store.write(&Persist { hard_state: hard(2, 7, 2), ..compact }).expect("writes");
    store.write(&appended(vec![entry(3, 2, 50)])).expect("writes");
    let mut files = Vec::new();
    let mut directories = vec![dir.path().join("store")];
    while let Some(directory) = directories.pop() {
        for file in fs::read_dir(directory).expect("lists").flatten() {
            let path = file.path();
            if path.is_dir() {
                directories.push(path);
            } else {
                let name = path.strip_prefix(dir.path()).expect("is in there").to_owned();
                files.push((name, fs::read(&path).expect("reads")));
            }
        }
    }
    files.sort();
    let expected = Restored {
        raft_id: RaftId(0x1_0001),
        hard_state: HardState { term: 2, vote: 7, commit: 2 },
        snapshot: snapshot(1, 1, 30).expect("made"),
        entries: vec![entry(2, 1, 100), entry(3, 2, 50)],
    };
    (files, expected)
}

/// In memory, where there is such a place: the syncs of hundreds of stores are not what is tested.
fn quick_directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

/// Cut off or changed at whatever point, what was acknowledged is there as a whole, or the store is set aside: never is less
/// taken for all there is, and never anything else for what was written.
#[test]
fn a_store_cut_or_changed_at_any_point_is_whole_or_set_aside() {
    let (files, expected) = left_behind();
    assert!(files.iter().any(|(name, _)| name.ends_with("log/db")), "{files:?}");
    let (mut whole, mut aside) = (0, 0);
    for (i, (name, bytes)) in files.iter().enumerate() {
        // sled writes its log ahead with zeros; one point beyond what it holds stands for all of them.
        let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 2).min(bytes.len());
        for at in 0..used {
            for cut in [true, false] {
                let mut damaged = bytes.clone();
                if cut {
                    damaged.truncate(at);
                } else {
                    damaged[at] ^= 1 << (at % 8);
                }
                let dir = quick_directory();
                for (j, (name, bytes)) in files.iter().enumerate() {
                    let path = dir.path().join(name);
                    fs::create_dir_all(path.parent().expect("has one")).expect("makes it");
                    fs::write(path, if i == j { &damaged } else { bytes }).expect("writes");
                }
                let what = format!("{} {} at {at}", name.display(), if cut { "cut" } else { "changed" });
                let mut opened = open(dir.path()).unwrap_or_else(|e| panic!("{what}: {e}"));
                match opened.store.load().unwrap_or_else(|e| panic!("{what}: {e}")) {
                    Some(restored) => {
                        assert_eq!(restored, expected, "{what}");
                        assert_eq!(opened.set_aside, [], "{what}");
                        whole += 1;
                    }
                    None => {
                        let [aside_at] = opened.set_aside.as_slice() else {
                            panic!("{what}: nothing set aside")
                        };
                        assert!(!aside_at.reason.is_empty(), "{what}");
                        aside += 1;
                    }
                }
            }
        }
    }
    println!("{whole} times all of it was there, {aside} times it was set aside");
    assert!(whole > 0 && aside > 0);
}

#[test]
fn after_a_failed_write_nothing_more_is_written() {
    let mut store = MemoryStore::new();
    store.write(&first()).expect("writes");
    store.fail_next_write("disk full");
    assert!(store.write(&appended(vec![entry(1, 1, 1)])).is_err());
    assert!(matches!(store.write(&appended(vec![entry(1, 1, 1)])), Err(StoreError::Broken(_))));
    store.restart();
    assert_eq!(store.load().expect("loads").expect("is not empty").entries, vec![]);
}

#[test]
fn memory_loses_what_was_not_synced_and_only_that() {
    let mut store = MemoryStore::new();
    store.write(&first()).expect("writes");
    store.write(&appended(vec![entry(1, 1, 1)])).expect("writes");
    store.write(&Persist { sync: false, ..appended(vec![entry(2, 1, 1)]) }).expect("writes");
    store.lose_unsynced();
    assert_eq!(indices(&store.load().expect("loads").expect("is not empty")), vec![(1, 1)]);
}

/// One step of a store's life: how many entries to append, how far back they replace, how much to compact.
#[derive(Clone, Debug)]
enum Step {
    Append { back: u64, count: u64, len: usize },
    Compact { keep: u64 },
    Install { ahead: u64 },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..3, 1u64..6, prop_oneof![0usize..100, 15_000usize..40_000])
            .prop_map(|(back, count, len)| Step::Append { back, count, len }),
        1 => (0u64..4).prop_map(|keep| Step::Compact { keep }),
        1 => (1u64..5).prop_map(|ahead| Step::Install { ahead }),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// The store on disk holds what the one in memory does, whenever it is reopened.
    #[test]
    fn disk_and_memory_agree(steps in prop::collection::vec(step(), 1..20)) {
        let dir = tempfile::tempdir().expect("a directory");
        let mut disk = open(dir.path()).expect("opens").store;
        let mut memory = MemoryStore::new();
        disk.write(&first()).expect("writes");
        memory.write(&first()).expect("writes");
        let (mut snap, mut last, mut term) = (0u64, 0u64, 1u64);
        for step in steps.into_iter().chain([Step::Reopen]) {
            let write = match step {
                Step::Append { back, count, len } => {
                    term += u64::from(back > 0);
                    let from = last.saturating_sub(back).max(snap) + 1;
                    last = from + count - 1;
                    appended((from..=last).map(|i| entry(i, term, len)).collect())
                }
                Step::Compact { keep } => {
                    snap = last;
                    let drop_through = last.saturating_sub(keep);
                    Persist { snapshot: snapshot(snap, term, 50), drop_through, ..Persist::default() }
                }
                Step::Install { ahead } => {
                    last += ahead;
                    snap = last;
                    Persist { snapshot: snapshot(snap, term, 50), reset_log: true, ..Persist::default() }
                }
                Step::Reopen => {
                    drop(disk);
                    let (reopened, restored) = reopened(dir.path());
                    disk = reopened;
                    prop_assert_eq!(Some(restored), memory.load().expect("loads"));
                    continue;
                }
            };
            disk.write(&write).expect("writes");
            memory.write(&write).expect("writes");
        }
    }
}

/// Set for the process that [`a_writer_killed_at_any_moment_loses_nothing_acknowledged`] kills.
const WRITER_DIR: &str = "KOMAINU_TEST_WRITER_DIR";

/// Not a test by itself: writes without end and says what is on disk.
#[test]
fn writer() {
    let Some(dir) = std::env::var_os(WRITER_DIR) else { return };
    let opened = open(Path::new(&dir)).expect("opens");
    assert_eq!(opened.set_aside, []);
    let mut store = opened.store;
    let restored = store.load().expect("loads");
    let mut last = restored.as_ref().map_or(0, |r| r.entries.last().map_or(0, |e| e.index));
    last = last.max(restored.as_ref().map_or(0, |r| r.snapshot.get_metadata().index));
    if restored.is_none() {
        store.write(&first()).expect("writes");
    }
    loop {
        let from = last + 1;
        last += 1 + last % 3;
        let mut write = appended((from..=last).map(|i| entry(i, 1, (i as usize * 37) % 40_000)).collect());
        write.hard_state = hard(last, last, 0);
        if last.is_multiple_of(5) {
            write.snapshot = snapshot(from - 1, 1, 1000);
            write.drop_through = from.saturating_sub(4);
        }
        store.write(&write).expect("writes");
        println!("on disk {last}");
    }
}

#[test]
fn a_writer_killed_at_any_moment_loses_nothing_acknowledged() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    let dir = tempfile::tempdir().expect("a directory");
    let mut acknowledged = 0;
    for round in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["store::tests::writer", "--exact", "--nocapture", "--test-threads=1"])
            .env(WRITER_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut seen = 0;
        for line in lines.by_ref() {
            let line = line.expect("reads");
            let Some((_, number)) = line.split_once("on disk ") else { continue };
            acknowledged = number.parse().expect("a number");
            seen += 1;
            if seen > round * 3 {
                break;
            }
        }
        child.kill().expect("kills with SIGKILL");
        child.wait().expect("ends");
        // What it said between the last line that was read and its end.
        for line in lines.map_while(Result::ok) {
            let number = line.split_once("on disk ").and_then(|(_, n)| n.parse().ok());
            acknowledged = number.unwrap_or(acknowledged);
        }
        let (store, restored) = reopened(dir.path());
        assert!(restored.hard_state.term >= acknowledged, "round {round}: {acknowledged} was acknowledged");
        let last = restored.entries.last().map_or(restored.snapshot.get_metadata().index, |e| e.index);
        assert_eq!(last, restored.hard_state.term, "a write is there as a whole");
        for e in &restored.entries {
            assert_eq!(*e, entry(e.index, 1, (e.index as usize * 37) % 40_000));
        }
        drop(store);
    }
    assert!(acknowledged > 0);
}
