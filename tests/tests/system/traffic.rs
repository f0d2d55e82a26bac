//! Real traffic through every mode.

use std::net::SocketAddr;
use std::time::Duration;

use komainu_lab::cluster::{Document, SOON, wait_for};
use komainu_lab::standard::{self, BACKEND_HTTP, ECHO, HTTP};
use komainu_lab::topology::Standard;
use komainu_lab::traffic::http::{download, requests};
use komainu_lab::traffic::ping::ping;
use komainu_lab::traffic::pinger::Pingers;
use komainu_lab::traffic::stream::{StreamSpec, UdpStream};
use komainu_lab::{Host, Lab};
use komainu_tests::{Bed, Machine, PATIENCE, vip};

pub(crate) const MODES: [&str; 3] = ["nat", "nat-transparent", "dsr"];
/// Ports of the services of a mode. `dsr` can't change ports, so its services have those of the backends.
pub(crate) const fn ports(mode: &str) -> (u16, u16) {
    match mode.as_bytes() {
        b"nat" => (8081, 71),
        b"dsr" => (HTTP, ECHO),
        _ => (8082, 72),
    }
}

pub(crate) const WITH_INSIDE_AND_FAR: Standard =
    Standard { service_backends: 3, inside_backends: 2, far: true, balancers: 2, witness: true };

/// HTTP, TCP echo and UDP echo in every mode and both families.
pub(crate) fn all_modes(lab: &Lab) -> Document {
    let mut document = Document::default().group(standard::group(lab));
    for mode in MODES {
        let (http, echo) = ports(mode);
        let backend_http = if mode == "dsr" { HTTP } else { BACKEND_HTTP };
        for (family, word) in ["v4", "v6"].into_iter().enumerate() {
            for (name, port, protocol, backend_port) in [
                ("http", http, "tcp", backend_http),
                ("talk", echo, "tcp", ECHO),
                ("echo", echo, "udp", ECHO),
            ] {
                let name = format!("{name}-{mode}-{word}");
                document = document.service(standard::service(
                    lab,
                    &name,
                    vip(family),
                    port,
                    protocol,
                    mode,
                    backend_port,
                ));
            }
        }
    }
    document
}

/// Every mode, family and protocol from `client`; each service must reach every one of its backends.
fn check_all(bed: &Bed, client: &Host) {
    for mode in MODES {
        let (http, echo) = ports(mode);
        let backends = if mode == "nat-transparent" { 2 } else { 3 };
        for family in [0, 1] {
            let what = format!("{mode} to {} from {}", vip(family), client.name());
            let tally = requests(client, (vip(family), http).into(), 60, PATIENCE);
            assert_eq!(tally.failed, 0, "{what}: {tally:?}");
            assert_eq!(tally.per_backend.len(), backends, "{what}: {tally:?}");

            let at: SocketAddr = (vip(family), echo).into();
            let talks = Pingers::start(client, at, 4, Duration::from_millis(2), PATIENCE)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(talks.wait_answered(20, SOON), "{what}: {:?}", talks.report());
            let ends = talks.stop();
            assert!(ends.iter().all(|c| c.broken.is_none()), "{what}: {ends:?}");

            let spec = StreamSpec { flows: 24, ..StreamSpec::default() };
            let stream = UdpStream::start(client, at, spec).unwrap();
            assert!(stream.wait_answered(300, SOON), "{what}: {:?}", stream.report());
            let report = stream.stop();
            assert_eq!(report.per_backend.len(), backends, "{what}: {report:?}");
            assert!(report.lost() * 20 <= report.sent, "{what}: {report:?}");
            assert_eq!(report.duplicates, 0, "{what}: {report:?}");
        }
    }
    bed.wire().assert_one_owner();
}

fn every_mode_moves_tcp_and_udp_over_both_families() {
    let bed = Bed::start(Machine::Shared, WITH_INSIDE_AND_FAR, all_modes);
    check_all(&bed, bed.client());
    check_all(&bed, bed.host("far"));
}

fn a_download_of_100_mib_arrives_whole_in_every_mode() {
    let bed = Bed::start(Machine::Shared, WITH_INSIDE_AND_FAR, all_modes);
    for mode in MODES {
        for family in [0, 1] {
            let at: SocketAddr = (vip(family), ports(mode).0).into();
            let took = bed
                .client()
                .run(|| download(at, 100 << 20, Duration::from_secs(60)))
                .unwrap_or_else(|e| panic!("{mode} to {at}: {e}"));
            println!("{mode} {at}: 100 MiB in {took:?}");
        }
    }
}

fn the_vip_answers_echo_requests() {
    let bed = Bed::start(Machine::Shared, Standard { far: true, ..Standard::default() }, |lab| {
        komainu_tests::web_document(lab)
    });
    for from in ["client", "far"] {
        for family in [0, 1] {
            for size in [0, 56, 1400] {
                bed.host(from)
                    .run(|| ping(vip(family), 1, size, PATIENCE))
                    .unwrap_or_else(|e| panic!("{size} bytes from {from} to {}: {e}", vip(family)));
            }
        }
    }
}

fn datagrams_in_fragments_are_answered_in_every_mode() {
    let bed = Bed::start(Machine::Shared, WITH_INSIDE_AND_FAR, all_modes);
    for mode in MODES {
        for family in [0, 1] {
            let at: SocketAddr = (vip(family), ports(mode).1).into();
            // Three fragments each way.
            let spec = StreamSpec { flows: 8, size: 4000, interval: Duration::from_millis(5) };
            let stream = UdpStream::start(bed.client(), at, spec).unwrap();
            assert!(stream.wait_answered(60, SOON), "{mode} to {at}: {:?}", stream.report());
            let report = stream.stop();
            assert!(report.lost() * 10 <= report.sent, "{mode} to {at}: {report:?}");
        }
    }
}

fn every_packet_is_counted_where_it_went() {
    let bed = Bed::web(Machine::Shared);
    let owner = bed.owner();
    let tally = requests(bed.client(), komainu_tests::http(0), 30, PATIENCE);
    assert_eq!(tally.failed, 0, "{tally:?}");
    wait_for("counters to show the requests", SOON, || {
        let status = bed.cluster.status(&owner).map_err(|e| e.to_string())?;
        let counted: Vec<_> = tally
            .per_backend
            .keys()
            .filter(|b| status.backend("web", b).is_some_and(|b| b.packets > 0))
            .collect();
        if counted.len() == tally.per_backend.len() { Ok(()) } else { Err(format!("only {counted:?}")) }
    })
    .unwrap();
}

komainu_tests::system_on_every_lane!(
    every_mode_moves_tcp_and_udp_over_both_families,
    a_download_of_100_mib_arrives_whole_in_every_mode,
    the_vip_answers_echo_requests,
    datagrams_in_fragments_are_answered_in_every_mode,
    every_packet_is_counted_where_it_went,
);
