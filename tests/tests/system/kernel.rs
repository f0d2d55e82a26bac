//! What only the lanes in the kernel can do wrong: go on by themselves for too long, or leave something behind.

use std::path::PathBuf;
use std::time::Duration;

use komainu_lab::Lab;
use komainu_lab::cluster::{Cluster, SOON, binary};
use komainu_lab::topology::{SERVICE, Standard};
use komainu_lab::traffic::stream::{StreamSpec, UdpStream};
use komainu_packet::lane::LaneKind;
use komainu_tests::{Bed, GROUP, Machine, udp, vip, web_document, with_lane};

use crate::standby::{METRICS, metric};

/// `lease_ms` where the node file says nothing, and what a busy machine adds.
const LEASE: Duration = Duration::from_millis(80);
const SLACK: Duration = Duration::from_millis(150);

/// Where the links of a host's namespace are pinned.
fn pins(bed: &Bed, host: &str) -> PathBuf {
    use std::os::unix::fs::MetadataExt;
    let namespace = bed.host(host).run(|| std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino());
    PathBuf::from(format!("/sys/fs/bpf/komainu/net-{namespace}"))
}

/// Names of a host's interfaces that a lane made.
fn devices(bed: &Bed, host: &str) -> Vec<String> {
    bed.host(host).run(|| {
        let all = nix::net::if_::if_nameindex().unwrap();
        let names = all.iter().map(|i| i.name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("komainu")).collect()
    })
}

fn on(lane: LaneKind, test: impl FnOnce(&mut Bed)) {
    with_lane(lane, || test(&mut Bed::web(Machine::Shared)));
}

const KERNEL: [LaneKind; 2] = [LaneKind::Tc, LaneKind::Xdp];

#[test]
fn status_and_check_say_lane_and_mode_and_why() {
    for (lane, mode) in
        [(LaneKind::AfPacket, "ring+vnet_hdr"), (LaneKind::Tc, "tcx"), (LaneKind::Xdp, "native")]
    {
        on(lane, |bed| {
            let node = bed.cluster.status("lb1").unwrap().node;
            assert_eq!((node.lane.as_str(), node.lane_mode.as_str()), (lane.as_str(), mode));
            assert_eq!(node.lane_reason, "as the node file says");
        });
    }
    // Where nobody asks for a lane: a veth has offloads to lose.
    let lab = Lab::build(&Standard { service_backends: 0, ..Standard::default() }.topology()).unwrap();
    let mut cluster = Cluster::with_lane(lab, binary().unwrap(), Some("auto")).unwrap();
    let file = cluster.node_file_of("lb1").display().to_string();
    let checked = cluster.local("lb1", &["check", "-c", &file]).unwrap();
    assert!(checked.status.success(), "{checked:?}");
    let line = checked.stdout.lines().find(|l| l.contains("lane")).unwrap_or_else(|| panic!("{checked:?}"));
    assert!(line.contains("tc: eth0 (veth)"), "{line}");
    assert!(checked.stdout.contains("tcx"), "{checked:?}");
    cluster.start_all().unwrap();
    cluster.wait_formed(SOON).unwrap();
    let node = cluster.status("lb1").unwrap().node;
    assert_eq!((node.lane.as_str(), node.lane_mode.as_str()), ("tc", "tcx"));
    assert!(node.lane_reason.contains("offloads"), "{node:?}");
    let shown = cluster.cli_ok("lb1", &["status"]).unwrap().stdout;
    assert!(shown.contains(&node.lane_reason), "{shown}");
}

/// Guards against a program that was never told of routes and neighbours which the kernel knew before its daemon started, and told
/// nobody of again: after a crash and a restart every answer to a client went through user space.
#[test]
fn a_restarted_daemon_forwards_in_the_kernel_again() {
    for lane in KERNEL {
        with_lane(lane, || {
            let mut bed = Bed::idle(Machine::Shared, Standard::default());
            for node in ["lb1", "lb2"] {
                bed.cluster.configure(node, &format!("[metrics]\nlisten = \"{METRICS}\"\n")).unwrap();
            }
            let owner = bed.form(web_document);
            let stream = bed.stream();
            bed.cluster.kill_9(&owner);
            bed.owner_other_than(&owner);
            bed.cluster.start(&owner).unwrap();
            bed.cluster.wait_formed(SOON).unwrap();
            bed.cluster.cli_ok("wit", &["switchover", GROUP, "--to", &owner]).unwrap();
            assert_eq!(bed.owner_other_than(&bed.other_than(&owner)), owner);
            stream.stop();
            let stream = bed.stream();
            let went_up = || metric(&bed, &owner, "komainu_lane_events_total{event=\"up_neighbour\"}");
            let before = went_up();
            assert!(stream.wait_answered(500, SOON));
            let up = went_up() - before;
            assert!(up < 100, "{up} of some 500 answers went through user space ({})", lane.as_str());
            stream.stop();
        });
    }
}

/// Guards against a lane in user space behind a program without a lease, which a crash of another lane had left: at XDP it kept
/// everything for the VIPs from packet sockets.
#[test]
fn another_lane_after_a_crash_takes_away_what_was_left() {
    on(LaneKind::Xdp, |bed| {
        for name in ["lb1", "lb2"] {
            let file = bed.cluster.node_file_of(name).to_owned();
            bed.cluster.kill_9(name);
            assert!(pins(bed, name).exists(), "the program went with its process");
            let text = std::fs::read_to_string(&file).unwrap();
            std::fs::write(&file, text.replace("lane = \"xdp\"", "lane = \"af_packet\"")).unwrap();
            bed.cluster.start(name).unwrap();
            bed.cluster.wait_formed(SOON).unwrap();
            assert_eq!(bed.cluster.status(name).unwrap().node.lane, "af_packet");
            assert!(!pins(bed, name).exists(), "{name}");
        }
        bed.owner();
        assert!(bed.stream().wait_answered(100, SOON));
    });
}

#[test]
fn an_orderly_stop_leaves_nothing() {
    for lane in KERNEL {
        on(lane, |bed| {
            let owner = bed.owner();
            assert!(pins(bed, &owner).exists(), "{lane:?}: nothing is pinned while it runs");
            assert_eq!(devices(bed, &owner).len(), usize::from(lane == LaneKind::Tc));
            assert!(bed.cluster.terminate(&owner, SOON).unwrap().success());
            assert!(!pins(bed, &owner).exists(), "{lane:?}");
            assert_eq!(devices(bed, &owner), Vec::<String>::new());
        });
    }
}

#[test]
fn a_killed_owner_forwards_no_longer_than_its_lease_and_what_it_leaves_is_taken_away() {
    for lane in KERNEL {
        on(lane, |bed| {
            let owner = bed.owner();
            // Whatever the others do: this client believes in the dead one.
            let believer = bed.host("watch");
            believer.set_neighbour(SERVICE, vip(0), bed.host(&owner).on(SERVICE).mac).unwrap();
            let stream = UdpStream::start(believer, udp(0), StreamSpec::default()).unwrap();
            assert!(stream.wait_answered(100, SOON), "{:?}", stream.report());
            let killed = bed.cluster.kill_9(&owner);
            bed.owner_other_than(&owner);
            std::thread::sleep(LEASE + SLACK + Duration::from_millis(500));
            let report = stream.stop();
            let silence = report.gaps.last().expect("it ended");
            assert!(
                silence.from <= killed + LEASE + SLACK && silence.lost >= 500,
                "{lane:?}: forwards without a lease, killed at {killed:?}: {report:?}"
            );
            let wire = bed.wire();
            let last = wire.last_claim_of(&owner).map_or(killed, |c| c.at);
            assert!(last <= killed + LEASE + SLACK, "{lane:?}: answered {:?} after its death", last - killed);

            assert!(pins(bed, &owner).exists(), "{lane:?}: the program went with its process");
            let file = bed.cluster.node_file_of(&owner).display().to_string();
            let cleaned = bed.cluster.local(&owner, &["cleanup", "-c", &file]).unwrap();
            assert!(cleaned.status.success(), "{cleaned:?}");
            assert!(!pins(bed, &owner).exists(), "{lane:?}");
        });
    }
}

#[test]
fn a_restart_takes_over_what_a_crash_left() {
    for lane in KERNEL {
        on(lane, |bed| {
            for _ in 0..2 {
                let owner = bed.owner();
                let stream = bed.stream();
                bed.cluster.kill_9(&owner);
                bed.cluster.start(&owner).unwrap();
                bed.cluster.wait_formed(SOON).unwrap();
                bed.owner();
                assert!(stream.wait_answered(300, SOON), "{lane:?}: {:?}", stream.report());
            }
            let pinned = std::fs::read_dir(pins(bed, "lb1")).unwrap().count();
            assert_eq!(pinned, 1, "{lane:?}");
        });
    }
}
