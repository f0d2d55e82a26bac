//! A flood of SYNs beside established connections, through the program: what one of their packets costs without and with it.
//!
//! Between any two thousand packets of 10 000 established connections come as many SYNs of 4 million clients, so what the flood
//! takes of the processor's caches is missing to the others. The flood's own packets are not in the figures.

use anyhow::Result;
use komainu_packet::lane::kernel::abi::Bench;
use komainu_packet::lane::kernel::harness::Harness;
use komainu_packet::plan::Mode;

use super::program::{ACK, Bed, FLOWS, SYN, XDP_TX, packet, run, run_all};
use super::report::Line;

/// What every line of this part begins with.
pub const METRIC: &str = "syn_flood_ns";
const ESTABLISHED: u32 = FLOWS[1];
const FLOOD: u32 = FLOWS[3];
/// Flows that a flood can have the program make: `MAX_HALF_OPEN` of the engine.
const HALF_OPEN: u32 = 8192;
/// Room in maps that have grown once.
const GROWN: u32 = 1 << 16;
/// Packets between two of the flood's turns.
const SLICE: u32 = 1000;
/// Such turns in a round: before each the kernel waits some milliseconds for its other programs.
const MOST_SLICES: u32 = 150;

/// Measures in `runs` rounds of about `packets` packets each.
///
/// # Errors
/// The kernel refuses the program, or the program does something else than it should.
pub fn measure(runs: usize, packets: u32) -> Result<Vec<Line>> {
    let harness = Harness::load()?;
    let mut lines = Vec::new();
    for (mode, name) in [(Mode::Dsr, "dsr"), (Mode::NatTransparent, "nat_transparent"), (Mode::Nat, "nat")] {
        // What a flood can put into the maps of full NAT is there from its beginning on, and the maps have grown for it.
        let (calm_bed, flooded_bed) =
            (Bed::new(mode, false, false)?, Bed::with_room(mode, false, false, GROWN)?);
        calm_bed.remember(0..ESTABLISHED)?;
        flooded_bed.remember(0..ESTABLISHED)?;
        let nothing = harness.program("nothing")?;
        let established = Bench { runs: 0, flows: ESTABLISHED, v4: 1, frame: packet(false, ACK) };
        let flood = Bench { runs: 0, flows: FLOOD, v4: 1, frame: packet(false, SYN) };
        flooded_bed.grant(HALF_OPEN.into())?;
        run_all(&harness, &flood, flooded_bed.program()?, 2 * HALF_OPEN)?;
        let slices = (packets / SLICE).clamp(1, MOST_SLICES);
        let round = |flooded: bool| -> Result<f64> {
            let (mut floor, mut cost) = (0.0, 0.0);
            let program = if flooded { flooded_bed.program()? } else { calm_bed.program()? };
            for _ in 0..slices {
                for (program, sum) in [(nothing, &mut floor), (program, &mut cost)] {
                    if flooded {
                        run_all(&harness, &flood, program, SLICE)?;
                    }
                    *sum += run(&harness, &established, program, SLICE, XDP_TX)?;
                }
            }
            Ok((cost - floor) / f64::from(slices))
        };
        let (mut calm, mut flooded) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            calm.push(round(false)?);
            flooded.push(round(true)?);
        }
        let calm_name = format!("{METRIC}/{name}/established");
        lines.push(Line::new(calm_name.clone(), "ns", &calm, None));
        let name = format!("{METRIC}/{name}/established_in_flood");
        lines.push(Line::new(name, "ns", &flooded, Some((calm_name, &calm))));
    }
    Ok(lines)
}
