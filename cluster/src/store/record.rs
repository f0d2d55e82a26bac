//! Keys and values of the log database: every value carries a checksum of its own, over its key too, so that a value
//! that ends up under another key is noticed as well.

use prost_raft::Message;
use raft::eraftpb::{Entry, HardState};

/// What this node is: its Raft id.
pub(super) const RAFT_ID: &[u8] = b"m/raft_id";
/// Term, vote, commit index.
pub(super) const HARD_STATE: &[u8] = b"m/hard_state";
/// Which snapshot file is in force.
pub(super) const SNAPSHOT: &[u8] = b"m/snapshot";
/// Number of the newest write.
pub(super) const SEQUENCE: &[u8] = b"m/sequence";
/// Pieces of log entries.
pub(super) const ENTRIES: &[u8] = b"e/";
/// Longest piece of an entry. sled moves bigger values out into files of their own, one more thing to sync.
pub(super) const PIECE_LEN: usize = 16 << 10;

/// Key of a piece of an entry: index, then number of the piece, so that they are read back in order.
pub(super) fn entry_key(index: u64, piece: u32) -> [u8; 14] {
    let mut key = [0; 14];
    key[..2].copy_from_slice(ENTRIES);
    key[2..10].copy_from_slice(&index.to_be_bytes());
    key[10..].copy_from_slice(&piece.to_be_bytes());
    key
}

/// Index and piece of a key made by [`entry_key`].
pub(super) fn entry_of_key(key: &[u8]) -> Option<(u64, u32)> {
    let rest: &[u8; 12] = key.strip_prefix(ENTRIES)?.try_into().ok()?;
    let (index, piece) = rest.split_at(8);
    Some((u64::from_be_bytes(index.try_into().ok()?), u32::from_be_bytes(piece.try_into().ok()?)))
}

/// A value with its checksum.
pub(super) fn wrap(key: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 4);
    out.extend_from_slice(&checksum(key, payload).to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// The payload of a value.
pub(super) fn unwrap<'a>(key: &[u8], value: &'a [u8]) -> Result<&'a [u8], String> {
    match value.split_first_chunk::<4>() {
        Some((sum, payload)) if u32::from_be_bytes(*sum) == checksum(key, payload) => Ok(payload),
        _ => Err(format!("wrong checksum under {}", key.escape_ascii())),
    }
}

/// CRC-32 (IEEE 802.3) of key and payload.
pub(super) fn checksum(key: &[u8], payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(key);
    crc.update(payload);
    crc.finalize()
}

/// Pieces of an entry, in order; at least one. The first byte of each says whether more follow.
pub(super) fn pieces(entry: &Entry) -> Vec<Vec<u8>> {
    let bytes = entry.encode_to_vec();
    let count = bytes.len().div_ceil(PIECE_LEN).max(1);
    (0..count)
        .map(|i| {
            let piece = &bytes[i * PIECE_LEN..bytes.len().min((i + 1) * PIECE_LEN)];
            [&[u8::from(i + 1 < count)][..], piece].concat()
        })
        .collect()
}

pub(super) fn decode_entry(bytes: &[u8]) -> Result<Entry, String> {
    Entry::decode(bytes).map_err(|e| format!("a log entry: {e}"))
}

pub(super) fn encode_hard_state(hard_state: &HardState) -> Vec<u8> {
    hard_state.encode_to_vec()
}

pub(super) fn decode_hard_state(bytes: &[u8]) -> Result<HardState, String> {
    HardState::decode(bytes).map_err(|e| format!("the hard state: {e}"))
}
