//! A flood of SYNs beside established connections, through the program: what one of their packets costs without and with it.
//!
//! Between any two thousand packets of 10 000 established connections come as many SYNs of 4 million clients, so what the flood
//! takes of the processor's caches is missing to the others. The flood's own packets are not in the figures.

use anyhow::Result;
use komainu_packet::lane::kernel::abi::Bench;
use komainu_packet::lane::kernel::harness::Harness;
use komainu_packet::plan::Mode;

use super::program::{ACK, Bed, FLOWS, SYN, XDP_PASS, XDP_TX, packet, run};
use super::report::Line;

/// What every line of this part begins with.
pub const METRIC: &str = "syn_flood_ns";
const ESTABLISHED: u32 = FLOWS[1];
const FLOOD: u32 = FLOWS[3];
/// Packets between two of the flood's turns.
const SLICE: u32 = 1000;

/// Measures in `runs` rounds of about `packets` packets each.
///
/// # Errors
/// The kernel refuses the program, or the program does something else than it should.
pub fn measure(runs: usize, packets: u32) -> Result<Vec<Line>> {
    let harness = Harness::load()?;
    let mut lines = Vec::new();
    for (mode, name) in [(Mode::Dsr, "dsr"), (Mode::NatTransparent, "nat_transparent"), (Mode::Nat, "nat")] {
        let bed = Bed::new(mode, false, false)?;
        bed.remember(0..ESTABLISHED)?;
        let program = bed.program()?;
        let nothing = harness.program("nothing")?;
        let established = Bench { runs: 0, flows: ESTABLISHED, v4: 1, frame: packet(false, ACK) };
        let flood = Bench { runs: 0, flows: FLOOD, v4: 1, frame: packet(false, SYN) };
        // A SYN of full NAT is the engine's.
        let up = if mode == Mode::Nat { XDP_PASS } else { XDP_TX };
        let slices = (packets / SLICE).max(1);
        let round = |flooded: bool| -> Result<f64> {
            let (mut floor, mut cost) = (0.0, 0.0);
            for _ in 0..slices {
                for (program, flood_becomes, sum) in [(nothing, XDP_TX, &mut floor), (program, up, &mut cost)]
                {
                    if flooded {
                        run(&harness, &flood, program, SLICE, flood_becomes)?;
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
