//! Total reads and writes of big-endian fields: past the end, a read gives zero and a write does nothing.

/// `N` bytes at `at`.
#[inline]
pub fn array<const N: usize>(data: &[u8], at: usize) -> [u8; N] {
    data.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

/// The byte at `at`.
#[inline]
pub fn u8(data: &[u8], at: usize) -> u8 {
    data.get(at).copied().unwrap_or(0)
}

/// The 16-bit field at `at`.
#[inline]
pub fn u16(data: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(data, at))
}

/// The 32-bit field at `at`.
#[inline]
pub fn u32(data: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(data, at))
}

/// Bytes from `from` to `to`, as many as there are.
#[inline]
pub fn range(data: &[u8], from: usize, to: usize) -> &[u8] {
    data.get(from..to.min(data.len())).unwrap_or(&[])
}

/// Bytes from `from` to `to`, as many as there are.
#[inline]
pub fn range_mut(data: &mut [u8], from: usize, to: usize) -> &mut [u8] {
    let to = to.min(data.len());
    data.get_mut(from..to).unwrap_or(&mut [])
}

/// Writes `value` at `at`.
#[inline]
pub fn put<const N: usize>(data: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(field) = data.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<N>()) {
        *field = value;
    }
}

/// Writes the byte at `at`.
#[inline]
pub fn put_u8(data: &mut [u8], at: usize, value: u8) {
    put(data, at, [value]);
}

/// Writes the 16-bit field at `at`.
#[inline]
pub fn put_u16(data: &mut [u8], at: usize, value: u16) {
    put(data, at, value.to_be_bytes());
}

/// Writes the 32-bit field at `at`.
#[inline]
pub fn put_u32(data: &mut [u8], at: usize, value: u32) {
    put(data, at, value.to_be_bytes());
}

/// Writes `value` from `at` on, whole or not at all.
#[inline]
pub fn put_slice(data: &mut [u8], at: usize, value: &[u8]) {
    if let Some(field) = data.get_mut(at..).and_then(|rest| rest.get_mut(..value.len())) {
        field.copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn past_the_end_is_zero_and_untouched() {
        let mut data = [1, 2, 3];
        assert_eq!(super::u16(&data, 1), 0x0203);
        assert_eq!(super::u16(&data, 2), 0);
        assert_eq!(super::u32(&data, usize::MAX), 0);
        super::put_u16(&mut data, 2, 0xffff);
        super::put_slice(&mut data, 4, &[9]);
        assert_eq!(data, [1, 2, 3]);
        super::put_u16(&mut data, 0, 0x0908);
        assert_eq!(data, [9, 8, 3]);
        assert_eq!(super::range(&data, 1, 9), [8, 3]);
        assert!(super::range(&data, 4, 9).is_empty() && super::range(&data, 2, 1).is_empty());
    }
}
