//! The Internet checksum: whole (RFC 1071), and updated for a change of some fields (RFC 1624, equation 3).
//!
//! The hot path never sums a payload: it describes what it changed as a [`Delta`] and applies that to the checksum
//! field. An L4 checksum field holds one of two things, told apart by the offload metadata that came with the frame;
//! [`L4Sum`] names them and knows how each is updated.
//!
//! Nothing here can panic: sums are kept in wrapping-free 64-bit words over at most 64 KiB of data, and slices are read
//! through iterators.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A ones-complement sum in the making, not folded and not inverted.
///
/// Kept in 64 bits: each addition is of at most 32 bits, so 2^32 of them fit, far more than any frame holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// The sum of nothing.
    pub const ZERO: Sum = Sum(0);

    /// Adds `data`, which must start at an even offset of what is summed; an odd last byte is padded with zero
    /// (RFC 1071 §1).
    pub fn bytes(self, data: &[u8]) -> Sum {
        let mut sum = self.0;
        // Words of 32 bits: the sum of 16-bit words is the sum of 32-bit words folded (RFC 1071 §2 (C)).
        let (words, rest) = data.as_chunks::<4>();
        for word in words {
            sum += u64::from(u32::from_be_bytes(*word));
        }
        match *rest {
            [a] => sum += u64::from(u16::from_be_bytes([a, 0])),
            [a, b] => sum += u64::from(u16::from_be_bytes([a, b])),
            [a, b, c] => sum += u64::from(u32::from_be_bytes([a, b, c, 0])),
            _ => {}
        }
        Sum(sum)
    }

    /// Adds a 16-bit word.
    pub fn u16(self, word: u16) -> Sum {
        Sum(self.0 + u64::from(word))
    }

    /// Adds a 32-bit word at an even offset.
    pub fn u32(self, word: u32) -> Sum {
        Sum(self.0 + u64::from(word))
    }

    /// The pseudo-header of TCP, UDP and ICMPv6: RFC 9293 §3.1 and RFC 768 for IPv4, RFC 8200 §8.1 for IPv6. ICMPv4 has
    /// none. `len` is the length of the L4 header and payload in bytes.
    ///
    /// Addresses of different families have no pseudo-header; each is added as it is.
    pub fn pseudo_header(src: IpAddr, dst: IpAddr, proto: u8, len: u32) -> Sum {
        Sum::ZERO.address(src).address(dst).u32(u32::from(proto)).u32(len)
    }

    /// Adds an address.
    pub fn address(self, address: IpAddr) -> Sum {
        match address {
            IpAddr::V4(a) => self.u32(a.to_bits()),
            IpAddr::V6(a) => self.bytes(&a.octets()),
        }
    }

    /// Folded to 16 bits, not inverted: what a checksum field holds under partial checksums.
    pub fn fold(self) -> u16 {
        // Three folds reach 16 bits from any 64: 64 → 33 → 18 → 17 → 16.
        let mut sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum as u16
    }

    /// The checksum: folded and inverted.
    pub fn checksum(self) -> u16 {
        !self.fold()
    }
}

/// The checksum of `data` (RFC 1071): 0 when `data` holds a right checksum.
pub fn checksum(data: &[u8]) -> u16 {
    Sum::ZERO.bytes(data).checksum()
}

/// What a change of fields does to a checksum that covers them: the sum of `~m + m'` of RFC 1624, equation 3.
///
/// Deltas add up, so a rewrite of several fields touches the checksum once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(u64);

impl Delta {
    /// Nothing changed.
    pub const NONE: Delta = Delta(0);

    /// A 16-bit field (at an even offset) changed from `old` to `new`.
    pub fn u16(old: u16, new: u16) -> Delta {
        Delta(u64::from(!old) + u64::from(new))
    }

    /// A 32-bit field (at an even offset) changed.
    pub fn u32(old: u32, new: u32) -> Delta {
        Delta(u64::from(!old) + u64::from(new))
    }

    /// A 128-bit field (at an even offset) changed.
    pub fn u128(old: u128, new: u128) -> Delta {
        let mut sum = 0;
        for shift in [0, 32, 64, 96] {
            sum += u64::from(!((old >> shift) as u32)) + u64::from((new >> shift) as u32);
        }
        Delta(sum)
    }

    /// An IPv4 address changed.
    pub fn v4(old: Ipv4Addr, new: Ipv4Addr) -> Delta {
        Delta::u32(old.to_bits(), new.to_bits())
    }

    /// An IPv6 address changed.
    pub fn v6(old: Ipv6Addr, new: Ipv6Addr) -> Delta {
        Delta::u128(old.to_bits(), new.to_bits())
    }

    /// An address changed. Between families too: an absent word counts as zero.
    pub fn address(old: IpAddr, new: IpAddr) -> Delta {
        match (old, new) {
            (IpAddr::V4(old), IpAddr::V4(new)) => Delta::v4(old, new),
            (IpAddr::V6(old), IpAddr::V6(new)) => Delta::v6(old, new),
            (old, new) => {
                Delta(u64::from(!Sum::ZERO.address(old).fold())).and(Delta(Sum::ZERO.address(new).0))
            }
        }
    }

    /// `self` and `other` both happened.
    #[must_use]
    pub fn and(self, other: Delta) -> Delta {
        Delta(self.0 + other.0)
    }

    /// A covered run of bytes changed from `old` to `new`; both start at an even offset. For headers, not payloads.
    pub fn bytes(old: &[u8], new: &[u8]) -> Delta {
        Delta(u64::from(!Sum::ZERO.bytes(old).fold()) + Sum::ZERO.bytes(new).0)
    }

    /// The new value of a checksum field (RFC 1624, equation 3: `HC' = ~(~HC + ~m + m')`).
    pub fn apply(self, field: u16) -> u16 {
        Sum(u64::from(!field) + self.0).checksum()
    }

    /// The new value of a field that holds a folded sum that was not inverted.
    pub fn apply_to_sum(self, field: u16) -> u16 {
        Sum(u64::from(field) + self.0).fold()
    }
}

/// What the L4 checksum field of a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum L4Sum {
    /// The checksum over pseudo-header, header and payload, as on the wire.
    Complete,
    /// The folded sum of the pseudo-header alone, not inverted: the device, or the kernel when it segments, adds the
    /// rest (`VIRTIO_NET_HDR_F_NEEDS_CSUM`, the kernel's `CHECKSUM_PARTIAL`). Ports and payload are not in it.
    Partial,
}

impl L4Sum {
    /// The new value of a TCP or ICMPv6 checksum `field` after the pseudo-header changed by `pseudo` (addresses,
    /// length) and header or payload by `body` (ports).
    pub fn update(self, field: u16, pseudo: Delta, body: Delta) -> u16 {
        match self {
            L4Sum::Complete => pseudo.and(body).apply(field),
            L4Sum::Partial => pseudo.apply_to_sum(field),
        }
    }

    /// The same for UDP, where 0 on the wire means "no checksum" and a computed 0 is sent as 0xffff (RFC 768). A field
    /// without a checksum stays without; in IPv6 that is not a legal datagram (RFC 8200 §8.1), see
    /// [`udp_checksum_missing`].
    pub fn update_udp(self, field: u16, pseudo: Delta, body: Delta) -> u16 {
        match self {
            L4Sum::Complete if field == 0 => 0,
            L4Sum::Complete => udp_nonzero(pseudo.and(body).apply(field)),
            L4Sum::Partial => pseudo.apply_to_sum(field),
        }
    }
}

/// Whether a UDP checksum field says that there is none: legal in IPv4 (RFC 768), not in IPv6 (RFC 8200 §8.1).
pub fn udp_checksum_missing(field: u16, sum: L4Sum) -> bool {
    sum == L4Sum::Complete && field == 0
}

/// A computed UDP checksum as it is sent: 0xffff for 0 (RFC 768).
pub fn udp_nonzero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_example_of_rfc_1071() {
        // RFC 1071 §3: the words 0001 f203 f4f5 f6f7 sum to ddf2.
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::ZERO.bytes(&data).fold(), 0xddf2);
        assert_eq!(checksum(&data), !0xddf2);
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // RFC 1624 §4: HC = DD2F, m = 5555, m' = 3285 gives 0000 by equation 3 (equation 2 would give FFFF).
        assert_eq!(Delta::u16(0x5555, 0x3285).apply(0xdd2f), 0x0000);
    }

    #[test]
    fn a_udp_checksum_of_zero_is_sent_as_ones_and_an_absent_one_stays_absent() {
        let to_zero = Delta::u16(0x5555, 0x3285);
        assert_eq!(L4Sum::Complete.update_udp(0xdd2f, Delta::NONE, to_zero), 0xffff);
        assert_eq!(L4Sum::Complete.update_udp(0, to_zero, to_zero), 0);
        assert!(udp_checksum_missing(0, L4Sum::Complete) && !udp_checksum_missing(0, L4Sum::Partial));
    }

    #[test]
    fn the_sum_of_the_longest_frame_does_not_overflow() {
        let data = vec![0xff; 65_535 + 18];
        assert_eq!(Sum::ZERO.bytes(&data).fold(), Sum::ZERO.u16(0xffff).u16(0xff00).fold());
    }

    /// The definition, word by word.
    fn slow_sum(data: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    fn address_pair() -> impl Strategy<Value = (IpAddr, IpAddr)> {
        prop_oneof![
            any::<(Ipv4Addr, Ipv4Addr)>().prop_map(|(a, b)| (a.into(), b.into())),
            any::<(Ipv6Addr, Ipv6Addr)>().prop_map(|(a, b)| (a.into(), b.into())),
        ]
    }

    proptest! {
        #[test]
        fn sum_equals_its_definition(data in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(Sum::ZERO.bytes(&data).fold(), slow_sum(&data));
        }

        #[test]
        fn an_updated_checksum_equals_a_recomputed_one(
            mut data in proptest::collection::vec(any::<u8>(), 40..200),
            word in any::<u16>(), long in any::<u32>(), wide in any::<u128>(),
        ) {
            // Data of zeros only has two right checksums; a packet is never that.
            data[39] |= 1;
            let before = checksum(&data);
            let delta = Delta::u16(u16::from_be_bytes([data[0], data[1]]), word)
                .and(Delta::u32(u32::from_be_bytes(data[2..6].try_into().unwrap()), long))
                .and(Delta::u128(u128::from_be_bytes(data[6..22].try_into().unwrap()), wide));
            data[0..2].copy_from_slice(&word.to_be_bytes());
            data[2..6].copy_from_slice(&long.to_be_bytes());
            data[6..22].copy_from_slice(&wide.to_be_bytes());
            prop_assert_eq!(delta.apply(before), checksum(&data));
        }

        #[test]
        fn bytes_delta_equals_a_recomputation(
            old in proptest::collection::vec(any::<u8>(), 20), new in proptest::collection::vec(any::<u8>(), 20),
        ) {
            let whole = |part: &[u8]| Sum::ZERO.u16(1).bytes(part).checksum();
            prop_assert_eq!(Delta::bytes(&old, &new).apply(whole(&old)), whole(&new));
        }

        #[test]
        fn both_kinds_of_l4_sum_follow_a_nat(
            (old_src, new_src) in address_pair(), port in any::<u16>(), new_port in any::<u16>(),
            payload in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let dst = old_src;
            let len = payload.len() as u32 + 2;
            let full = |src, port: u16| Sum::pseudo_header(src, dst, 6, len).u16(port).bytes(&payload).checksum();
            let partial = |src| Sum::pseudo_header(src, dst, 6, len).fold();
            let (pseudo, body) = (Delta::address(old_src, new_src), Delta::u16(port, new_port));
            prop_assert_eq!(L4Sum::Complete.update(full(old_src, port), pseudo, body), full(new_src, new_port));
            prop_assert_eq!(L4Sum::Partial.update(partial(old_src), pseudo, body), partial(new_src));
            prop_assert_eq!(L4Sum::Partial.update_udp(partial(old_src), pseudo, body), partial(new_src));
            let udp = L4Sum::Complete.update_udp(udp_nonzero(full(old_src, port)), pseudo, body);
            prop_assert_eq!(udp, udp_nonzero(full(new_src, new_port)));
        }
    }
}
