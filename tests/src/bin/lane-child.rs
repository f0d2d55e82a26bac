//! A process of its own with a lane and its beat thread, for tests that stop a process: `lane-child PORT` serves
//! `komainu_tests::lane::dsr_plan(PORT)` on `eth0` of the namespace that it runs in, until it is killed.

use std::process::ExitCode;
use std::sync::Arc;

use komainu_packet::lane::Lane;
use komainu_packet::lane::af_packet::{AfPacketConfig, AfPacketLane};
use komainu_tests::lane::{GROUP, Renewer, dsr_plan};

fn main() -> ExitCode {
    let Some(port) = std::env::args().nth(1).and_then(|port| port.parse().ok()) else {
        eprintln!("usage: lane-child PORT");
        return ExitCode::from(2);
    };
    let lane = match AfPacketLane::start(AfPacketConfig::new("eth0", None)) {
        Ok(lane) => Arc::new(lane),
        Err(error) => {
            eprintln!("lane: {error}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = lane.install(dsr_plan(port)) {
        eprintln!("plan: {error}");
        return ExitCode::FAILURE;
    }
    let _renewer = Renewer::start(Arc::clone(&lane));
    lane.announce(GROUP);
    loop {
        std::thread::park();
    }
}
