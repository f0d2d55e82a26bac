//! Bytes that anybody can make and check again: what a download must consist of, in what order.

use std::sync::OnceLock;

/// Length of the block that repeats. A prime, so that a lost, doubled or swapped segment of any size that protocols
/// use shows.
const BLOCK: usize = 1_048_573;

fn block() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        // xorshift64 (Marsaglia 2003): any fixed sequence without a short period will do.
        let mut x = 0x9e37_79b9_7f4a_7c15_u64;
        (0..BLOCK)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                (x >> 24) as u8
            })
            .collect()
    })
}

/// The pattern from `offset` on, at most `limit` bytes: never empty when `limit` isn't 0.
pub fn at(offset: u64, limit: u64) -> &'static [u8] {
    let start = (offset % BLOCK as u64) as usize;
    let rest = &block()[start..];
    &rest[..rest.len().min(usize::try_from(limit).unwrap_or(usize::MAX))]
}

/// Offset of the first byte of `data` that is not the pattern's, when `data` starts at `offset`.
pub fn mismatch(offset: u64, data: &[u8]) -> Option<u64> {
    let mut done = 0;
    while done < data.len() {
        let want = at(offset + done as u64, (data.len() - done) as u64);
        let got = &data[done..done + want.len()];
        if want != got {
            let first = want.iter().zip(got).position(|(a, b)| a != b).unwrap_or_default();
            return Some(offset + (done + first) as u64);
        }
        done += want.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_matches_and_a_changed_or_shifted_one_does_not() {
        let offset = BLOCK as u64 * 3 - 10;
        let mut copy = Vec::new();
        while copy.len() < 5000 {
            copy.extend_from_slice(at(offset + copy.len() as u64, 5000 - copy.len() as u64));
        }
        assert_eq!(mismatch(offset, &copy), None);
        assert_eq!(mismatch(offset + 1448, &copy), Some(offset + 1448));
        copy[4000] ^= 1;
        assert_eq!(mismatch(offset, &copy), Some(offset + 4000));
    }
}
