//! A process of its own with a lane and its beat thread, for tests that stop or kill a process: `lane-child PORT LANE` serves
//! `komainu_tests::lane::dsr_plan(PORT)` on `eth0` of the namespace that it runs in, until it is killed.

use std::process::ExitCode;

use komainu_packet::lane::af_packet::AfPacketConfig;
use komainu_packet::lane::{self, LaneKind};
use komainu_tests::lane::{GROUP, Renewer, dsr_plan};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let port = args.next().and_then(|port| port.parse().ok());
    let kind = args.next().and_then(|word| {
        [LaneKind::AfPacket, LaneKind::Tc, LaneKind::Xdp].into_iter().find(|k| k.as_str() == word)
    });
    let (Some(port), Some(kind)) = (port, kind) else {
        eprintln!("usage: lane-child PORT af_packet|tc|xdp");
        return ExitCode::from(2);
    };
    let lane = match lane::start(kind, AfPacketConfig::new("eth0", None)) {
        Ok(lane) => lane,
        Err(error) => {
            eprintln!("lane: {error}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = lane.install(dsr_plan(port)) {
        eprintln!("plan: {error}");
        return ExitCode::FAILURE;
    }
    let _renewer = Renewer::start(lane.clone());
    lane.announce(GROUP);
    loop {
        std::thread::park();
    }
}
