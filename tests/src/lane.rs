//! A lane in a host of the lab, without daemon and cluster: plan, leases and announcements come from the test.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use komainu_lab::topology::addr;
use komainu_lab::{Host, Lab};
use komainu_packet::lane::af_packet::AfPacketConfig;
use komainu_packet::lane::{self, LaneError, LaneKind, SharedLane};
use komainu_packet::lease::Lease;
use komainu_packet::plan::{
    BackendPlan, DeadBackend, GroupPlan, Mode, Plan, Protocol, Scheduler, ServicePlan,
};
use komainu_packet::time::BootTime;

/// How long each lease is.
pub const LEASE: Duration = Duration::from_millis(200);
/// Time between renewals.
const RENEW_EVERY: Duration = Duration::from_millis(20);
/// The one group of a [`plan`].
pub const GROUP: u32 = 1;

/// Starts a lane in a host of the lab. For `xdp` the network is made fit for it.
///
/// # Errors
/// As [`lane::start`].
pub fn start(lab: &Lab, host: &str, kind: LaneKind, config: AfPacketConfig) -> Result<SharedLane, LaneError> {
    if kind == LaneKind::Xdp {
        lab.ready_for_xdp(&[host]).expect("the lab can be made fit for XDP");
    }
    lab.host(host).run(|| lane::start(kind, config))
}

/// Processor time that the threads of a host's lanes have used since they started (`/proc/PID/task/TID/schedstat`).
///
/// # Errors
/// The lists of this process's threads can't be read.
pub fn processor_time(host: &Host) -> io::Result<Duration> {
    let namespace = host.run(|| fs::metadata("/proc/thread-self/ns/net"))?.ino();
    let mut total = Duration::ZERO;
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        // A thread may end while the list is read.
        let (Ok(name), Ok(at)) = (fs::read_to_string(task.join("comm")), fs::metadata(task.join("ns/net")))
        else {
            continue;
        };
        if at.ino() == namespace && matches!(name.trim(), "komainu-lane" | "komainu-netlink") {
            let stat = fs::read_to_string(task.join("schedstat"))?;
            let ns = stat.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
            total += Duration::from_nanos(ns);
        }
    }
    Ok(total)
}

/// Makes of each function that takes a [`LaneKind`] one test for each lane.
#[macro_export]
macro_rules! on_every_lane {
    ($($name:ident),+ $(,)?) => {
        $crate::on_every_lane!(@lane af_packet, AfPacket, $($name),+);
        $crate::on_every_lane!(@lane tc, Tc, $($name),+);
        $crate::on_every_lane!(@lane xdp, Xdp, $($name),+);
    };
    (@lane $lane:ident, $kind:ident, $($name:ident),+) => {
        mod $lane {
            $(#[test]
            fn $name() {
                super::$name(komainu_packet::lane::LaneKind::$kind);
            })+
        }
    };
}

/// Renews the lease of [`GROUP`] until dropped, as the beat thread of a node with a quorum does: once it has missed its own
/// lease it does not take it back.
#[derive(Debug)]
pub struct Renewer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Renewer {
    /// Takes the lease and goes on renewing it.
    pub fn start(lane: SharedLane) -> Renewer {
        let stop = Arc::new(AtomicBool::new(false));
        let mut until = renew(&lane);
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::SeqCst) {
                std::thread::sleep(RENEW_EVERY);
                if BootTime::now() >= until {
                    return;
                }
                until = renew(&lane);
            }
        });
        Renewer { stop, thread: Some(thread) }
    }
}

impl Drop for Renewer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Writes a lease of [`LEASE`] from now; when it ends.
pub fn renew(lane: &SharedLane) -> BootTime {
    let until = BootTime::now().after(LEASE);
    lane.set_lease(GROUP, Lease { epoch: 1, answer_until: until, forward_until: until });
    until
}

/// A plan with one group.
pub fn plan(revision: u64, vips: &[IpAddr], inside_vips: &[IpAddr], snat: &[IpAddr]) -> Plan {
    Plan {
        revision,
        groups: vec![GroupPlan {
            id: GROUP,
            name: "group".to_owned(),
            vips: vips.to_vec(),
            inside_vips: inside_vips.to_vec(),
            snat: snat.to_vec(),
        }],
        services: Vec::new(),
    }
}

/// A plan for the standard topology: a UDP service on `port` of each VIP in mode `dsr`, with the first backend.
pub fn dsr_plan(port: u16) -> Plan {
    let vips = addr::service(addr::VIP);
    let mut made = plan(1, &vips, &[], &[]);
    for (vip, backend) in vips.into_iter().zip(addr::service(addr::FIRST_BACKEND)) {
        add_service(&mut made, vip, port, Protocol::Udp, Mode::Dsr, &[backend]);
    }
    made
}

/// Adds a service with backends at `backends`, all of the same weight, on the service's own port.
pub fn add_service(
    plan: &mut Plan,
    vip: IpAddr,
    port: u16,
    protocol: Protocol,
    mode: Mode,
    backends: &[IpAddr],
) {
    let id = plan.services.len() as u32 + 1;
    let backend = |(i, address): (usize, &IpAddr)| BackendPlan {
        id: id * 100 + i as u32,
        name: format!("be{i}"),
        address: *address,
        port,
        weight: 1,
        base_weight: 1,
        alive: true,
    };
    plan.services.push(ServicePlan {
        id,
        name: format!("service{id}"),
        group: GROUP,
        vip,
        port,
        protocol,
        mode,
        scheduler: Scheduler::Maglev,
        dead_backend: DeadBackend::Reset,
        track_udp: true,
        tcp_idle: Duration::from_secs(300),
        udp_idle: Duration::from_secs(30),
        backends: backends.iter().enumerate().map(backend).collect(),
        consult_all_slots: false,
    });
}
