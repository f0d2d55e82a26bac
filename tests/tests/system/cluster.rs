//! Documents, members and disks.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use komainu_lab::cluster::{Cluster, NodeSpec, SOON, binary, wait_for};
use komainu_lab::topology::Standard;
use komainu_lab::traffic::http::requests;
use komainu_lab::watch::Watch;
use komainu_lab::{Lab, standard};
use komainu_tests::{Bed, GROUP, Machine, PATIENCE, PROBE, http, lane_word, vip, web_document};

fn export(bed: &Bed, name: &str) -> String {
    bed.cluster.cli_ok(name, &["export"]).unwrap().stdout
}

#[test]
fn a_whole_cluster_stopped_and_started_keeps_its_document() {
    let mut bed = Bed::web(Machine::Shared);
    bed.cluster.cli_ok("lb1", &["backend", "drain", "web/be2"]).unwrap();
    let before = export(&bed, "lb1");
    let revision = bed.cluster.status("lb1").unwrap().cluster.revision;
    // Once by death, once in order.
    for gently in [false, true] {
        for name in bed.cluster.names() {
            if gently {
                bed.cluster.terminate(&name, SOON).unwrap();
            } else {
                bed.cluster.kill_9(&name);
            }
        }
        bed.cluster.start_all().unwrap();
        bed.cluster.wait_formed(SOON).unwrap();
        for name in bed.cluster.names() {
            bed.cluster.wait_status(&name, "the document", SOON, |s| s.cluster.revision >= revision).unwrap();
            assert_eq!(export(&bed, &name), before, "as {name} has it");
        }
        bed.owner();
        bed.cluster.wait_all_up(SOON).unwrap();
        let tally = requests(bed.client(), http(0), 40, PATIENCE);
        assert_eq!((tally.failed, tally.of("be2")), (0, 0), "{tally:?}");
    }
}

#[test]
fn a_node_killed_in_a_loop_while_writing_loses_no_acknowledged_change() {
    let mut bed = Bed::web(Machine::Shared);
    let acknowledged = AtomicU32::new(0);
    let tried = AtomicU32::new(0);
    let stop = AtomicBool::new(false);
    let socket_of = |name: &str| format!("unix:{}/{name}/run/admin.sock", bed.cluster.lab.dir().display());
    let sockets = ["lb1", "lb2", "wit"].map(socket_of);
    let binary = binary().unwrap();
    std::thread::scope(|scope| {
        // Weights rise, so that the last one that was acknowledged is the least that may be found at the end.
        let writer = scope.spawn(|| {
            for weight in 1..=1000_u32 {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let via = &sockets[weight as usize % sockets.len()];
                tried.store(weight, Ordering::SeqCst);
                let done = std::process::Command::new(&binary)
                    .args(["backend", "weight", "web/be1", &weight.to_string(), "--node", via])
                    .output()
                    .unwrap();
                if done.status.success() {
                    acknowledged.store(weight, Ordering::SeqCst);
                }
            }
        });
        for round in 0..9 {
            let victim = ["lb1", "lb2", "wit"][round % 3];
            let before = acknowledged.load(Ordering::SeqCst);
            wait_for("changes to go on", SOON, || {
                let now = acknowledged.load(Ordering::SeqCst);
                if now > before || tried.load(Ordering::SeqCst) >= 1000 {
                    Ok(())
                } else {
                    Err(format!("{now}"))
                }
            })
            .unwrap();
            bed.cluster.kill_9(victim);
            bed.cluster.start(victim).unwrap();
            bed.cluster.wait_formed(SOON).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    });
    // And all at once.
    for name in bed.cluster.names() {
        bed.cluster.kill_9(&name);
    }
    bed.cluster.start_all().unwrap();
    bed.cluster.wait_formed(SOON).unwrap();
    let (least, most) = (acknowledged.load(Ordering::SeqCst), tried.load(Ordering::SeqCst));
    assert!(least > 5, "only {least} changes were acknowledged");
    for name in bed.cluster.names() {
        wait_for(&format!("{name} to have the last change"), SOON, || {
            let weight = weight_of_be1(&bed, &name);
            if (least..=most).contains(&weight) {
                Ok(())
            } else {
                Err(format!("{weight}, not {least}..={most}"))
            }
        })
        .unwrap();
    }
}

fn weight_of_be1(bed: &Bed, name: &str) -> u32 {
    let all: serde_json::Value = bed.cluster.cli_json(name, &["backend", "list", "web"]).unwrap();
    let backends = all.as_array().or_else(|| all["backends"].as_array()).expect("a list of backends");
    let be1 = backends.iter().find(|b| b["name"] == "be1").expect("be1");
    be1["weight"].as_u64().expect("a number") as u32
}

#[test]
fn a_node_without_peers_serves_alone_and_keeps_its_document() {
    let alone = Standard { balancers: 1, witness: false, ..Standard::default() };
    let mut bed = Bed::start(Machine::Shared, alone, web_document);
    for _ in 0..2 {
        let status = bed.cluster.status("lb1").unwrap();
        assert_eq!(status.cluster.quorum, "single", "{status:?}");
        for family in [0, 1] {
            let tally = requests(bed.client(), http(family), 30, PATIENCE);
            assert!(tally.failed == 0 && tally.per_backend.len() == 3, "{tally:?}");
        }
        bed.cluster.kill_9("lb1");
        bed.cluster.start("lb1").unwrap();
        bed.cluster.wait_formed(SOON).unwrap();
        bed.owner();
        bed.cluster.wait_all_up(SOON).unwrap();
    }
}

#[test]
fn any_node_takes_reads_and_changes() {
    let bed = Bed::web(Machine::Shared);
    for (i, name) in ["lb1", "lb2", "wit"].into_iter().enumerate() {
        let weight = (i + 2).to_string();
        bed.cluster.cli_ok(name, &["backend", "weight", "web/be1", &weight]).unwrap();
        for reader in ["lb1", "lb2", "wit"] {
            wait_for(&format!("{reader} to see what {name} was told"), SOON, || {
                let seen = weight_of_be1(&bed, reader).to_string();
                if seen == weight { Ok(()) } else { Err(seen) }
            })
            .unwrap();
        }
        for args in [
            &["service", "list"][..],
            &["service", "show", "web"],
            &["backend", "list"],
            &["node", "list"],
            &["flows"],
            &["events"],
            &["history"],
            &["export"],
            &["status"],
            &["trace", "--service", "web", "--from", "192.0.2.10:40000"],
        ] {
            bed.cluster.cli_ok(name, args).unwrap();
            if args == ["events"] {
                // One object a line: with --follow there is no end.
                let lines = bed.cluster.cli_ok(name, &["events", "--json"]).unwrap().stdout;
                assert!(
                    lines.lines().all(|l| serde_json::from_str::<serde_json::Value>(l).is_ok()),
                    "{lines}"
                );
            } else {
                let _: serde_json::Value = bed.cluster.cli_json(name, args).unwrap();
            }
        }
    }
}

#[test]
fn trace_tells_where_a_flow_goes() {
    let bed = Bed::web(Machine::Shared);
    let target = http(0);
    for _ in 0..10 {
        let (local, backend) = bed.client().run(|| {
            use std::io::{Read, Write};
            let mut stream = std::net::TcpStream::connect_timeout(&target, PATIENCE).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(b"GET /whoami HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            let backend = answer.lines().find_map(|l| l.strip_prefix("X-Backend: ")).unwrap().to_owned();
            (stream.local_addr().unwrap(), backend)
        });
        let args = ["trace", "--service", "web", "--from", &local.to_string()];
        let trace: serde_json::Value = bed.cluster.cli_json("wit", &args).unwrap();
        assert_eq!(trace["new"], backend.as_str(), "{trace} for {local}");
    }
}

#[test]
fn nodes_leave_and_join_while_the_others_serve() {
    let three = Standard { balancers: 3, witness: true, ..Standard::default() };
    let lab = Lab::build(&three.topology()).unwrap();
    let _servers = standard::servers(&lab).unwrap();
    let watch = Watch::start(&lab, &[vip(0), vip(1)], PROBE).unwrap();
    let mut cluster = Cluster::empty(lab, binary().unwrap(), lane_word().as_deref()).unwrap();
    let founders = [("lb1", 1), ("lb2", 2), ("wit", 3)];
    let peers_of = |own: &str| -> Vec<(String, u64)> {
        founders.iter().filter(|(h, _)| *h != own).map(|(h, id)| ((*h).to_owned(), *id)).collect()
    };
    for (host, id) in founders {
        let spec = NodeSpec {
            host: host.into(),
            id,
            witness: host == "wit",
            peers: peers_of(host),
            extra: String::new(),
        };
        cluster.add(&spec).unwrap();
    }
    cluster.start_all().unwrap();
    cluster.wait_formed(SOON).unwrap();
    let document = web_document(&cluster.lab);
    cluster.apply("lb1", &document).unwrap();
    cluster.wait_owner(GROUP, SOON).unwrap();
    cluster.wait_all_up(SOON).unwrap();
    let stream = komainu_lab::traffic::stream::UdpStream::start(
        cluster.lab.host("client"),
        komainu_tests::udp(0),
        komainu_lab::traffic::stream::StreamSpec::default(),
    )
    .unwrap();
    assert!(stream.wait_answered(200, SOON));

    // lb3 joins.
    let address = cluster.cluster_address("lb3").to_string();
    let spec =
        NodeSpec { host: "lb3".into(), id: 4, witness: false, peers: peers_of("lb3"), extra: String::new() };
    cluster.add(&spec).unwrap();
    cluster.start("lb3").unwrap();
    cluster.cli_ok("wit", &["node", "join", "4", "lb3", &address]).unwrap();
    cluster.wait_formed(SOON).unwrap();
    cluster.wait_all_up(SOON).unwrap();

    // It can own.
    cluster.cli_ok("lb1", &["switchover", GROUP, "--to", "lb3"]).unwrap();
    wait_for("lb3 to own", SOON, || match cluster.wait_owner(GROUP, SOON) {
        Ok(owner) if owner == "lb3" => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    assert!(stream.wait_answered(200, SOON));

    // lb1 leaves, and what it served goes on. It may be the leader, and leave before it can say that it is done: the command must
    // not say then that there is no such member.
    cluster.cli_ok("wit", &["node", "leave", "lb1"]).unwrap();
    for name in ["lb2", "lb3", "wit"] {
        cluster
            // It still runs and is heard, but has no vote any more.
            .wait_status(name, "lb1 to be gone", SOON, |s| {
                s.cluster.members.iter().all(|m| m.name != "lb1" || !m.voter)
            })
            .unwrap();
    }
    cluster.kill_9("lb1");
    assert_eq!(cluster.wait_owner(GROUP, SOON).unwrap(), "lb3");
    // The rest still can lose one.
    cluster.kill_9("lb3");
    assert_eq!(cluster.wait_owner(GROUP, SOON).unwrap(), "lb2");
    assert!(stream.wait_answered(200, SOON));
    watch.stop().assert_one_owner();
}

#[test]
fn a_node_that_lost_its_disk_comes_back_as_a_new_member() {
    let mut bed = Bed::web(Machine::Shared);
    let owner = bed.owner();
    let victim = bed.other_than(&owner);
    bed.cluster.kill_9(&victim);
    bed.cluster.lose_disk(&victim).unwrap();
    bed.cluster.start(&victim).unwrap();
    bed.cluster.wait_formed(SOON).unwrap();
    assert_eq!(export(&bed, &victim), export(&bed, &owner));
    bed.cluster.wait_all_up(SOON).unwrap();
    bed.cluster.kill_9(&owner);
    assert_eq!(bed.owner_other_than(&owner), victim);
    assert!(bed.stream().wait_answered(100, SOON));
}

#[test]
fn a_cluster_without_a_majority_serves_until_its_lease_ends_and_then_nobody() {
    let mut bed = Bed::web(Machine::Shared);
    let owner = bed.owner();
    let other = bed.other_than(&owner);
    let stream = bed.stream();
    bed.cluster.kill_9("wit");
    bed.cluster.kill_9(&other);
    wait_for("silence", SOON, || {
        let claims = bed.claims_in(75);
        if claims == 0 { Ok(()) } else { Err(format!("{claims} claims")) }
    })
    .unwrap();
    bed.cluster.start("wit").unwrap();
    assert_eq!(bed.owner(), owner);
    assert!(stream.wait_answered(300, SOON));
}
