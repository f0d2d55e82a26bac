//! The hash table of everything that a packet asks a plan for, laid out here for the program to find its way in
//! (`packet/bpf/select.h`, `find_place`).

use super::abi::{PLACE_PROBES, Place, Record};

/// Layouts that are tried at one size. With a table at most half full the first is nearly always good enough.
const SEEDS: u32 = 8;
const SMALLEST: u32 = 16;

/// Where everything stands.
#[derive(Debug)]
pub(super) struct Layout {
    /// What the hash begins with.
    pub(super) seed: u32,
    /// How far it is shifted.
    pub(super) shift: u32,
    /// Index of the entry in each cell.
    pub(super) cells: Vec<Option<u32>>,
}

impl Layout {
    /// Lays out entries of different places.
    pub(super) fn of(entries: &[(Place, Record)]) -> Layout {
        let least = (2 * entries.len()).next_power_of_two().max(SMALLEST as usize);
        let mut bits = least.trailing_zeros();
        loop {
            if let Some(layout) = (0..SEEDS).find_map(|seed| Layout::with(entries, bits, seed)) {
                return layout;
            }
            bits += 1;
        }
    }

    fn with(entries: &[(Place, Record)], bits: u32, seed: u32) -> Option<Layout> {
        let shift = 64 - bits;
        // Room behind the last cell, so that nothing has to go on at the first.
        let mut cells = vec![None; (1 << bits) + PLACE_PROBES as usize];
        for (index, (place, _)) in entries.iter().enumerate() {
            let first = cell_of(seed, shift, place);
            let cell = (first..first + PLACE_PROBES).find(|at| cells[*at as usize].is_none())?;
            cells[cell as usize] = Some(index as u32);
        }
        Some(Layout { seed, shift, cells })
    }
}

/// `hash_place` in `packet/bpf/hash.h`.
pub(super) fn cell_of(seed: u32, shift: u32, place: &Place) -> u32 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = place.address;
    let first = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let second = u64::from_le_bytes([i, j, k, l, m, n, o, p]);
    let [low, high] = place.port;
    let last = u32::from_le_bytes([low, high, place.protocol, place.kind]);
    let last = u64::from(last) ^ u64::from(seed) << 32 ^ u64::from(seed);
    let hash = first.wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ second.wrapping_mul(0xc2b2_ae3d_27d4_eb4f)
        ^ last.wrapping_mul(0x1656_67b1_9e37_79f9);
    ((hash ^ hash >> 32).wrapping_mul(0xff51_afd7_ed55_8ccd) >> shift) as u32
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::super::abi::{KIND_ANSWER, KIND_BACKEND, KIND_SERVICE, Plain, wide};
    use super::*;

    fn places(n: u32) -> Vec<(Place, Record)> {
        let entries = (0..n).map(|i| {
            let address = match i % 3 {
                0 => wide(Ipv4Addr::from_bits(0x0a00_0000 + i / 24).into()),
                1 => wide(Ipv4Addr::from_bits(0x0a01_0000 + (i << 8)).into()),
                _ => wide(Ipv6Addr::from_bits((0xfd00 << 112) + u128::from(i)).into()),
            };
            let kind = [KIND_SERVICE, KIND_ANSWER, KIND_BACKEND][(i / 3 % 3) as usize];
            let port = (80 + (i / 9 % 8) as u16).to_be_bytes();
            (Place { address, port, protocol: 6, kind }, Record { service: i, ..Record::zeroed() })
        });
        entries.collect()
    }

    /// As the program looks.
    fn find(layout: &Layout, entries: &[(Place, Record)], place: &Place) -> Option<(u32, u32)> {
        let first = cell_of(layout.seed, layout.shift, place);
        for probe in 0..PLACE_PROBES {
            let index = layout.cells[(first + probe) as usize]?;
            if entries[index as usize].0 == *place {
                return Some((index, probe));
            }
        }
        None
    }

    #[test]
    fn everything_is_found_and_nothing_else() {
        for n in [0, 1, 2, 7, 100, 1000, 50_000] {
            let entries = places(n);
            let layout = Layout::of(&entries);
            let mut probes = 0;
            for (index, (place, _)) in entries.iter().enumerate() {
                let (found, probe) = find(&layout, &entries, place).unwrap();
                assert_eq!(found, index as u32);
                probes += probe;
                let absent = Place { protocol: 17, ..*place };
                assert_eq!(find(&layout, &entries, &absent), None);
            }
            assert!(probes <= n, "{probes} probes beyond the first for {n} places");
            assert!(layout.cells.len() <= 4 * entries.len() + 64, "{} cells for {n}", layout.cells.len());
        }
    }
}
