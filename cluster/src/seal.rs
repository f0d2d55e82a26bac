//! Sealing what nodes say to each other: the shared key, authenticated encryption, and the guard against replays.
//!
//! XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03) with one key for the cluster. The nonce is 16 random bytes drawn by the
//! process (its *session*) and a counter, so it never repeats under one key without any state on disk. What a message is
//! for ([`Kind`]) and whatever else both sides must agree on goes in as associated data: a sealed beat can't be passed off
//! as an answer. A cluster is recognised by its key; two clusters must not share one.
//!
//! Layout: version (1), kind (1), session (16), counter (8, big endian), ciphertext with tag (16).

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};

/// First line of a key file, up to the key.
const KEY_PREFIX: &str = "komainu-key-1:";
const KEY_LEN: usize = 32;
/// Longest key file that is read: a wrong path must not pull a disk image into memory.
const MAX_KEY_FILE_LEN: u64 = 4096;
const VERSION: u8 = 1;
const SESSION_LEN: usize = 16;
const HEADER_LEN: usize = 2 + SESSION_LEN + 8;
/// Bytes that sealing adds.
pub const OVERHEAD: usize = HEADER_LEN + 16;
/// Messages that may overtake each other: far more than a network reorders, one word of memory.
const WINDOW: u64 = 64;
/// Sessions remembered by a [`ReplayGuard`]: every restart of a peer makes one. The longest unheard-of goes first.
const MAX_SESSIONS: usize = 256;

/// The cluster's secret. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; KEY_LEN]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The system said no.
    #[error("key file {}: {source}; make one with `komainu keygen`", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Others can read it.
    #[error("key file {}: mode is {mode:04o}, others can read it; run: chmod 600 {}", path.display(), path.display())]
    Mode {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not a key.
    #[error("key file {}: {reason}; make one with `komainu keygen`", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// No randomness.
    #[error("the system gives no random numbers: {0}")]
    Random(String),
}

impl Key {
    /// Draws a new key.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn generate() -> Result<Key, KeyError> {
        let mut bytes = [0; KEY_LEN];
        random(&mut bytes)?;
        Ok(Key(bytes))
    }

    /// A key from its bytes, for tests and simulations.
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Key {
        Key(bytes)
    }

    /// The text of a key file: what `komainu keygen` prints.
    pub fn to_text(&self) -> String {
        let hex: String = self.0.iter().map(|b| format!("{b:02x}")).collect();
        format!("{KEY_PREFIX}{hex}\n")
    }

    /// Reads the text of a key file. Blank lines and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub fn from_text(text: &str) -> Result<Key, &'static str> {
        let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return Err("it must hold one line with one key");
        };
        let hex = line.strip_prefix(KEY_PREFIX).ok_or("it does not begin with \"komainu-key-1:\"")?;
        if hex.len() != 2 * KEY_LEN || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err("after the prefix there must be 64 hexadecimal digits");
        }
        let mut key = [0; KEY_LEN];
        for (byte, pair) in key.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(pair).map_err(|_| "it is not text")?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| "it is not hexadecimal")?;
        }
        Ok(Key(key))
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// It can't be read, others can read it too, or it holds no key.
    pub fn load(path: &Path) -> Result<Key, KeyError> {
        let io = |source| KeyError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let mode = file.metadata().map_err(io)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Mode { path: path.to_owned(), mode });
        }
        let mut text = String::new();
        file.take(MAX_KEY_FILE_LEN).read_to_string(&mut text).map_err(io)?;
        Key::from_text(&text).map_err(|reason| KeyError::Format { path: path.to_owned(), reason })
    }

    /// Writes a new key file with mode 0600. An existing file is never overwritten: nodes that still have the old key
    /// would be cut off.
    ///
    /// # Errors
    /// The file exists or can't be written.
    pub fn save(&self, path: &Path) -> Result<(), KeyError> {
        let io = |source| KeyError::Io { path: path.to_owned(), source };
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io)?;
        file.write_all(self.to_text().as_bytes()).and_then(|()| file.sync_all()).map_err(io)
    }
}

/// What a sealed message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// A beat (datagram).
    Beat = 1,
    /// A Raft message that may be lost (datagram).
    Vote = 2,
    /// A piece of a Raft message (stream).
    Stream = 3,
    /// A forwarded proposal or a query.
    Request = 4,
    /// The answer to one.
    Answer = 5,
    /// Flows for a standby (datagram).
    Flows = 6,
    /// What of them has come in (datagram).
    FlowReport = 7,
    /// The last word about a process that has ended (datagram).
    Resign = 8,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        use Kind::{Answer, Beat, FlowReport, Flows, Request, Resign, Stream, Vote};
        [Beat, Vote, Stream, Request, Answer, Flows, FlowReport, Resign]
            .into_iter()
            .find(|&k| k as u8 == byte)
    }
}

/// Names a process: drawn anew at every start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Session(pub [u8; SESSION_LEN]);

/// Seals and opens. One for a process: the counter must not be shared by two.
pub struct Sealer {
    cipher: XChaCha20Poly1305,
    session: Session,
    counter: AtomicU64,
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("session", &self.session).finish_non_exhaustive()
    }
}

/// What was inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// What it is for.
    pub kind: Kind,
    /// The process that sealed it.
    pub session: Session,
    /// Its counter: no two messages of a session share one.
    pub counter: u64,
    /// The message.
    pub plain: Vec<u8>,
}

/// Why something could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Too short, or of another version.
    #[error("it is no sealed message of this version")]
    Form,
    /// Of another kind than expected here.
    #[error("it is of another kind")]
    Kind,
    /// Sealed with another key, for another purpose, or changed on the way.
    #[error("it was sealed with another key, or changed on the way")]
    Forged,
    /// Seen before, or too old to tell.
    #[error("it was seen before")]
    Replayed,
}

impl Sealer {
    /// A sealer with a session of its own.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn new(key: &Key) -> Result<Sealer, KeyError> {
        let mut session = [0; SESSION_LEN];
        random(&mut session)?;
        Ok(Sealer {
            cipher: XChaCha20Poly1305::new(&key.0.into()),
            session: Session(session),
            counter: AtomicU64::new(0),
        })
    }

    /// This process's session.
    pub fn session(&self) -> Session {
        self.session
    }

    /// Seals `plain`. `context` is what both sides must agree on beyond the kind; it is not sent.
    pub fn seal(&self, kind: Kind, context: &[u8], plain: &[u8]) -> Vec<u8> {
        let counter = self.counter.fetch_add(1, Ordering::Relaxed);
        let mut out = Vec::with_capacity(plain.len() + OVERHEAD);
        out.extend_from_slice(&[VERSION, kind as u8]);
        out.extend_from_slice(&self.session.0);
        out.extend_from_slice(&counter.to_be_bytes());
        let aad = associated(kind, context);
        let sealed = self
            .cipher
            .encrypt(XNonce::from_slice(&out[2..HEADER_LEN]), Payload { msg: plain, aad: &aad })
            .expect("a message is far shorter than 256 GiB");
        out.extend_from_slice(&sealed);
        out
    }

    /// Opens what another process, or this one, has sealed with the same key, kind and context.
    ///
    /// # Errors
    /// It was not.
    pub fn open(&self, kind: Kind, context: &[u8], sealed: &[u8]) -> Result<Opened, OpenError> {
        match self.peek(sealed)? {
            k if k == kind => {}
            _ => return Err(OpenError::Kind),
        }
        let (header, body) = sealed.split_at_checked(HEADER_LEN).ok_or(OpenError::Form)?;
        let aad = associated(kind, context);
        let plain = self
            .cipher
            .decrypt(XNonce::from_slice(&header[2..]), Payload { msg: body, aad: &aad })
            .map_err(|_| OpenError::Forged)?;
        let session = Session(header[2..2 + SESSION_LEN].try_into().map_err(|_| OpenError::Form)?);
        let counter = u64::from_be_bytes(header[2 + SESSION_LEN..].try_into().map_err(|_| OpenError::Form)?);
        Ok(Opened { kind, session, counter, plain })
    }

    /// What a sealed message claims to be for. Nothing is verified yet.
    ///
    /// # Errors
    /// It is no sealed message of this version.
    pub fn peek(&self, sealed: &[u8]) -> Result<Kind, OpenError> {
        match sealed {
            [VERSION, kind, ..] if sealed.len() >= OVERHEAD => Kind::from_byte(*kind).ok_or(OpenError::Kind),
            _ => Err(OpenError::Form),
        }
    }
}

fn associated(kind: Kind, context: &[u8]) -> Vec<u8> {
    [b"komainu", &[VERSION, kind as u8][..], context].concat()
}

fn random(into: &mut [u8]) -> Result<(), KeyError> {
    getrandom::fill(into).map_err(|e| KeyError::Random(e.to_string()))
}

/// Remembers which counters of which sessions were seen.
#[derive(Debug, Default)]
pub struct ReplayGuard {
    sessions: BTreeMap<Session, Window>,
    clock: u64,
}

/// The highest counter seen, and which of the [`WINDOW`] up to it (bit 0: the highest itself).
#[derive(Debug)]
struct Window {
    highest: u64,
    seen: u64,
    used: u64,
}

impl ReplayGuard {
    /// Accepts each message once.
    ///
    /// # Errors
    /// [`OpenError::Replayed`]: seen before, or so old that it can't be told.
    pub fn accept(&mut self, message: &Opened) -> Result<(), OpenError> {
        self.clock += 1;
        let (counter, used) = (message.counter, self.clock);
        if let Some(window) = self.sessions.get_mut(&message.session) {
            window.used = used;
            return window.accept(counter);
        }
        if self.sessions.len() >= MAX_SESSIONS
            && let Some(oldest) = self.sessions.iter().min_by_key(|(_, w)| w.used).map(|(s, _)| *s)
        {
            self.sessions.remove(&oldest);
        }
        self.sessions.insert(message.session, Window { highest: counter, seen: 1, used });
        Ok(())
    }
}

impl Window {
    fn accept(&mut self, counter: u64) -> Result<(), OpenError> {
        if counter > self.highest {
            let ahead = counter - self.highest;
            self.seen = if ahead < WINDOW { self.seen << ahead } else { 0 } | 1;
            self.highest = counter;
            return Ok(());
        }
        let behind = self.highest - counter;
        if behind >= WINDOW || self.seen & (1 << behind) != 0 {
            return Err(OpenError::Replayed);
        }
        self.seen |= 1 << behind;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealer(key: u8) -> Sealer {
        Sealer::new(&Key::from_bytes([key; 32])).expect("randomness")
    }

    #[test]
    fn opens_what_was_sealed() {
        let (a, b) = (sealer(1), sealer(1));
        let sealed = a.seal(Kind::Beat, b"x", b"hello");
        assert_eq!(sealed.len(), 5 + OVERHEAD);
        let opened = b.open(Kind::Beat, b"x", &sealed).expect("opens");
        assert_eq!(
            (opened.plain.as_slice(), opened.session, opened.counter),
            (&b"hello"[..], a.session(), 0)
        );
    }

    #[test]
    fn refuses_another_key_kind_context_and_every_changed_byte() {
        let a = sealer(1);
        let sealed = a.seal(Kind::Request, b"x", b"hello");
        assert_eq!(sealer(2).open(Kind::Request, b"x", &sealed), Err(OpenError::Forged));
        assert_eq!(a.open(Kind::Request, b"y", &sealed), Err(OpenError::Forged));
        assert_eq!(a.open(Kind::Answer, b"x", &sealed), Err(OpenError::Kind));
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(a.open(Kind::Request, b"x", &changed).is_err(), "byte {at}");
            assert!(a.open(Kind::Request, b"x", &sealed[..at]).is_err(), "length {at}");
        }
    }

    #[test]
    fn never_repeats_a_nonce() {
        let a = sealer(1);
        let nonces: std::collections::BTreeSet<_> =
            (0..1000).map(|_| a.seal(Kind::Beat, b"", b"")[2..HEADER_LEN].to_vec()).collect();
        assert_eq!(nonces.len(), 1000);
        assert_ne!(a.session(), sealer(1).session());
    }

    #[test]
    fn each_message_is_accepted_once_also_out_of_order() {
        let session = Session([7; 16]);
        let message = |counter| Opened { kind: Kind::Beat, session, counter, plain: Vec::new() };
        let mut guard = ReplayGuard::default();
        for counter in [5, 3, 4, 70, 69, 10, 200] {
            assert_eq!(guard.accept(&message(counter)), Ok(()), "{counter}");
            assert_eq!(guard.accept(&message(counter)), Err(OpenError::Replayed), "{counter} again");
        }
        assert_eq!(guard.accept(&message(136)), Err(OpenError::Replayed), "too old to tell");
        assert_eq!(guard.accept(&message(137)), Ok(()), "the oldest that can be told");
    }

    #[test]
    fn remembers_a_bounded_number_of_sessions() {
        let mut guard = ReplayGuard::default();
        for i in 0..1000u16 {
            let mut session = [0; 16];
            session[..2].copy_from_slice(&i.to_be_bytes());
            let message =
                Opened { kind: Kind::Beat, session: Session(session), counter: 0, plain: Vec::new() };
            guard.accept(&message).expect("new");
        }
        assert_eq!(guard.sessions.len(), MAX_SESSIONS);
    }

    #[test]
    fn a_key_survives_its_file_and_its_mode_is_checked() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("cluster.key");
        let key = Key::generate().expect("randomness");
        key.save(&path).expect("saved");
        assert_eq!(Key::load(&path).expect("loaded"), key);
        assert!(matches!(key.save(&path), Err(KeyError::Io { .. })), "never overwritten");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("chmod");
        let error = Key::load(&path).expect_err("others can read it").to_string();
        assert!(error.contains("0640") && error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn text_that_is_no_key_is_refused() {
        let good = Key::from_bytes([0xab; 32]).to_text();
        assert!(Key::from_text(&format!("# made today\n\n{good}")).is_ok());
        let hex = good.trim().strip_prefix(KEY_PREFIX).expect("prefix");
        let bad = [
            String::new(),
            hex.to_owned(),
            good[..70].to_owned(),
            format!("{good}{good}"),
            good.replace("ab", "é"),
        ];
        for text in bad {
            assert!(Key::from_text(&text).is_err(), "{text}");
        }
    }
}
