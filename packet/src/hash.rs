//! The hashes that choose a backend or a SNAT port: seeded, 32 bits, made of 32-bit word operations only.
//!
//! They are part of the contract between lanes (the eBPF program computes them in C, bit for bit alike) and between
//! nodes (a standby sends a flow to the same backend as the owner did), so they never change; the known answers in the
//! tests are that contract. The mixing steps and the order in which words enter are those of `hashword()` in Bob
//! Jenkins' lookup3 (public domain, <https://burtleburtle.net/bob/c/lookup3.c>). They keep flows apart; they are no
//! defence against a client that knows the seed and chooses its ports.
//!
//! Addresses enter as one (IPv4) or four (IPv6) words in network order, i.e. as big-endian numbers; two ports as one
//! word, the first in the upper half.

use std::net::IpAddr;

/// Starting value of lookup3.
const START: u32 = 0xdead_beef;

/// Hash of a flow: client address and port, VIP and port, L4 protocol (its IANA number).
pub fn flow(seed: u32, client: IpAddr, client_port: u16, vip: IpAddr, port: u16, proto: u8) -> u32 {
    let ports = two_ports(client_port, port);
    let seed = seed ^ u32::from(proto);
    match (client, vip) {
        (IpAddr::V4(client), IpAddr::V4(vip)) => words(&[client.to_bits(), vip.to_bits(), ports], seed),
        (client, vip) => {
            let (c, v) = (address_words(client), address_words(vip));
            words(&[c[0], c[1], c[2], c[3], v[0], v[1], v[2], v[3], ports], seed)
        }
    }
}

/// Hash of the client address alone, for the scheduler `source_ip`.
pub fn client(seed: u32, client: IpAddr) -> u32 {
    match client {
        IpAddr::V4(client) => words(&[client.to_bits()], seed),
        IpAddr::V6(_) => words(&address_words(client), seed),
    }
}

/// Hash from which full NAT derives the first candidate for its SNAT address and port, so that a node that takes over
/// in the middle of a flow finds nearly always the same.
pub fn snat(seed: u32, client: IpAddr, client_port: u16, service: u32, backend: u32) -> u32 {
    let port = u32::from(client_port);
    match client {
        IpAddr::V4(client) => words(&[client.to_bits(), port, service, backend], seed),
        IpAddr::V6(_) => {
            let c = address_words(client);
            words(&[c[0], c[1], c[2], c[3], port, service, backend], seed)
        }
    }
}

/// The `index` of `0..size` that `hash` falls on, by multiplication: as even as a remainder, and no division.
pub fn scale(hash: u32, size: u32) -> u32 {
    ((u64::from(hash) * u64::from(size)) >> 32) as u32
}

/// lookup3's `hashword()` over any number of words.
pub fn words(key: &[u32], seed: u32) -> u32 {
    let start = START.wrapping_add((key.len() as u32) << 2).wrapping_add(seed);
    let (mut a, mut b, mut c) = (start, start, start);
    let mut rest = key;
    // The last one to three words enter the final step instead of a round.
    while let [x, y, z, more @ ..] = rest {
        a = a.wrapping_add(*x);
        b = b.wrapping_add(*y);
        c = c.wrapping_add(*z);
        rest = more;
        if rest.is_empty() {
            return last(a, b, c);
        }
        (a, b, c) = round(a, b, c);
    }
    match *rest {
        [x] => last(a.wrapping_add(x), b, c),
        [x, y] => last(a.wrapping_add(x), b.wrapping_add(y), c),
        // Only an empty key comes here.
        _ => c,
    }
}

fn address_words(address: IpAddr) -> [u32; 4] {
    let bits = match address {
        IpAddr::V4(a) => a.to_ipv6_mapped().to_bits(),
        IpAddr::V6(a) => a.to_bits(),
    };
    [(bits >> 96) as u32, (bits >> 64) as u32, (bits >> 32) as u32, bits as u32]
}

fn two_ports(first: u16, second: u16) -> u32 {
    u32::from(first) << 16 | u32::from(second)
}

/// `mix()` of lookup3: reversible, so no two triples collide here.
#[inline]
fn round(mut a: u32, mut b: u32, mut c: u32) -> (u32, u32, u32) {
    macro_rules! step {
        ($x:ident, $y:ident, $z:ident, $turn:literal) => {
            $x = $x.wrapping_sub($z) ^ $z.rotate_left($turn);
            $z = $z.wrapping_add($y);
        };
    }
    step!(a, b, c, 4);
    step!(b, c, a, 6);
    step!(c, a, b, 8);
    step!(a, b, c, 16);
    step!(b, c, a, 19);
    step!(c, a, b, 4);
    (a, b, c)
}

/// `final()` of lookup3.
#[inline]
fn last(mut a: u32, mut b: u32, mut c: u32) -> u32 {
    c = (c ^ b).wrapping_sub(b.rotate_left(14));
    a = (a ^ c).wrapping_sub(c.rotate_left(11));
    b = (b ^ a).wrapping_sub(a.rotate_left(25));
    c = (c ^ b).wrapping_sub(b.rotate_left(16));
    a = (a ^ c).wrapping_sub(c.rotate_left(4));
    b = (b ^ a).wrapping_sub(a.rotate_left(14));
    (c ^ b).wrapping_sub(b.rotate_left(24))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    const V4: (IpAddr, IpAddr) =
        (IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)), IpAddr::V4(Ipv4Addr::new(192, 0, 2, 100)));
    const V6: (IpAddr, IpAddr) = (
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 7)),
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100)),
    );

    /// The contract with every other lane and with every release: these numbers never change.
    #[test]
    fn known_answers() {
        assert_eq!(words(&[], 0), 0xdead_beef);
        let answers = [
            words(&[0], 0),
            words(&[1, 2], 3),
            words(&[1, 2, 3], 0),
            words(&[1, 2, 3, 4], 0x1234_5678),
            words(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 0xffff_ffff),
            flow(0, V4.0, 40_000, V4.1, 80, 6),
            flow(1, V4.0, 40_000, V4.1, 80, 6),
            flow(0, V4.0, 40_000, V4.1, 80, 17),
            flow(0, V6.0, 40_000, V6.1, 80, 6),
            client(5, V4.0),
            client(5, V6.0),
            snat(9, V4.0, 40_000, 3, 4),
            snat(9, V6.0, 40_000, 3, 4),
        ];
        assert_eq!(answers, ANSWERS, "{answers:#010x?}");
    }

    const ANSWERS: [u32; 13] = [
        0x0493_96b8,
        0x2527_81b5,
        0xa461_58f5,
        0x2d00_1f70,
        0xa933_bafd,
        0xa985_789c,
        0xcee8_8c50,
        0x3687_45e9,
        0x1979_a192,
        0xe46c_7043,
        0x5711_8dad,
        0x58f7_2e5d,
        0x49bf_5bd0,
    ];

    /// Chi-square of `counts` against evenness.
    fn chi_square(counts: &[u32]) -> f64 {
        let mean = counts.iter().sum::<u32>() as f64 / counts.len() as f64;
        counts.iter().map(|&n| (f64::from(n) - mean).powi(2) / mean).sum()
    }

    #[test]
    fn flows_that_differ_little_spread_evenly() {
        // 1021 cells: the statistic has mean 1020 and deviation √2040 ≈ 45. The keys are fixed, so this can't flap.
        const CELLS: usize = 1021;
        let limit = 1020.0 + 5.0 * 45.2;
        let mut by_port = vec![0; CELLS];
        let mut by_client_v4 = vec![0; CELLS];
        let mut by_client_v6 = vec![0; CELLS];
        let mut by_source = vec![0; CELLS];
        let mut by_snat = vec![0; CELLS];
        for n in 0..60_000u32 {
            let v4 = IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + n));
            let v6 = IpAddr::V6(Ipv6Addr::from_bits((0x2001_0db8u128 << 96) + (u128::from(n) << 64) + 1));
            let port = (n % 60_000 + 1024) as u16;
            by_port[scale(flow(7, V4.0, port, V4.1, 80, 6), CELLS as u32) as usize] += 1;
            by_client_v4[scale(flow(7, v4, 40_000, V4.1, 80, 6), CELLS as u32) as usize] += 1;
            by_client_v6[scale(flow(7, v6, 40_000, V6.1, 443, 6), CELLS as u32) as usize] += 1;
            by_source[scale(client(7, v4), CELLS as u32) as usize] += 1;
            by_snat[scale(snat(7, V4.0, port, 1, n % 3), CELLS as u32) as usize] += 1;
        }
        for (name, counts) in [
            ("port", by_port),
            ("v4 client", by_client_v4),
            ("v6 client", by_client_v6),
            ("source_ip", by_source),
            ("snat", by_snat),
        ] {
            assert!(chi_square(&counts) < limit, "{name}: {}", chi_square(&counts));
        }
    }

    #[test]
    fn every_input_bit_flips_every_output_bit_about_half_of_the_time() {
        const ROUNDS: u32 = 2000;
        // Nine words: the longest key in use (IPv6 flow).
        for len in [1usize, 3, 4, 7, 9] {
            for bit in 0..len * 32 {
                let mut flips = [0u32; 32];
                for n in 0..ROUNDS {
                    let mut key: Vec<u32> =
                        (0..len as u32).map(|i| (n * 16 + i).wrapping_mul(0x9e37_79b1)).collect();
                    let before = words(&key, 1);
                    key[bit / 32] ^= 1 << (bit % 32);
                    let changed = before ^ words(&key, 1);
                    for (out, flip) in flips.iter_mut().enumerate() {
                        *flip += changed >> out & 1;
                    }
                }
                for (out, &flip) in flips.iter().enumerate() {
                    let share = f64::from(flip) / f64::from(ROUNDS);
                    assert!(
                        (0.40..0.60).contains(&share),
                        "{len} words: bit {bit} flips bit {out} in {share}"
                    );
                }
            }
        }
    }

    proptest! {
        #[test]
        fn scale_stays_inside_and_rises(a in any::<u32>(), b in any::<u32>(), size in 1u32..200_000) {
            prop_assert!(scale(a, size) < size);
            prop_assert!(a > b || scale(a, size) <= scale(b, size));
        }
    }
}
