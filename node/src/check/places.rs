//! Directories that are written to, addresses that are listened on.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use komainu_proto::domain::Role;
use nix::sys::statfs::statfs;

use super::{Asker, Finding};
use crate::config::NodeConfig;
use crate::warm::flow_address;

/// File systems that don't outlive a reboot (statfs(2)).
const IN_MEMORY: &[(u32, &str)] = &[(0x0102_1994, "tmpfs"), (0x8584_58f6, "ramfs")];
/// File systems whose fsync is somebody else's promise (statfs(2)).
const REMOTE: &[(u32, &str)] = &[(0x6969, "NFS"), (0xff53_4d42, "CIFS"), (0xfe53_4d42, "SMB2")];
/// An fsync that takes longer holds up every agreed change noticeably.
const SLOW_SYNC: Duration = Duration::from_millis(50);
/// Name of the file written to try the directory.
const TRIAL: &str = ".komainu-check";

/// Whether a daemon answers on this node file's admin socket.
pub(super) fn daemon_is_running(config: &NodeConfig) -> bool {
    UnixStream::connect(config.socket()).is_ok()
}

/// Can the store and the socket be made where the node file wants them?
pub(super) fn directories(config: &NodeConfig, findings: &mut Vec<Finding>) {
    findings.push(match try_directory(&config.data_dir) {
        Ok(Tried { missing: true, at, .. }) => {
            Finding::ok("data_dir", format!("{} will be made in {}", config.data_dir.display(), at.display()))
        }
        Ok(tried) => durability(&config.data_dir, tried.synced_in),
        Err((at, error)) => unusable("data_dir", &at, &error),
    });
    findings.push(match try_directory(&config.run_dir) {
        Ok(_) => Finding::ok("run_dir", format!("{} can be written to", config.run_dir.display())),
        Err((at, error)) => unusable("run_dir", &at, &error),
    });
}

fn unusable(field: &str, at: &Path, error: &io::Error) -> Finding {
    let action = "let the user that komainu runs as write there, or name another directory";
    Finding::fail(field, format!("{} can't be written to: {error}", at.display()), action)
}

fn durability(dir: &Path, synced_in: Duration) -> Finding {
    let kind = statfs(dir).map_or(0, |s| s.filesystem_type().0 as u32);
    let known = |list: &[(u32, &'static str)]| list.iter().find(|(k, _)| *k == kind).map(|(_, name)| *name);
    let shown = dir.display();
    if let Some(name) = known(IN_MEMORY) {
        let text = format!(
            "{shown} is on {name}: after a reboot this node is a new member that must catch up first"
        );
        return Finding::warn("data_dir", text, "name a directory on a disk");
    }
    if let Some(name) = known(REMOTE) {
        let text = format!("{shown} is on {name}: what was agreed may be lost or late with the server");
        return Finding::warn("data_dir", text, "name a directory on a local disk");
    }
    if synced_in > SLOW_SYNC {
        let text = format!("{shown}: a write took {} ms to reach the disk", synced_in.as_millis());
        return Finding::warn("data_dir", text, "every change waits for that: use a faster disk");
    }
    Finding::ok("data_dir", format!("{shown} can be written to"))
}

struct Tried {
    /// The directory that was written to: the one asked for, or where it would be made.
    at: PathBuf,
    missing: bool,
    synced_in: Duration,
}

/// Writes, syncs and removes a file in `dir`, or in the nearest directory above it that exists. Makes no directory: an
/// operator who asks changes nothing.
fn try_directory(dir: &Path) -> Result<Tried, (PathBuf, io::Error)> {
    let at = dir.ancestors().find(|a| a.exists()).unwrap_or(Path::new(".")).to_owned();
    let started = Instant::now();
    let trial = at.join(format!("{TRIAL}.{}", std::process::id()));
    let written = File::create(&trial).and_then(|mut file| {
        file.write_all(b"trial\n")?;
        file.sync_all()
    });
    let synced_in = started.elapsed();
    let removed = fs::remove_file(&trial);
    match written.and(removed) {
        Ok(()) => Ok(Tried { missing: at != dir, at, synced_in }),
        Err(error) => Err((at, error)),
    }
}

/// Can every address be listened on?
pub(super) fn listeners(config: &NodeConfig, running: bool, asker: Asker, findings: &mut Vec<Finding>) {
    if running {
        let socket = config.socket();
        let socket = socket.display();
        findings.push(match asker {
            Asker::Operator => {
                Finding::ok("listeners", format!("a daemon is running here ({socket} answers): not tried"))
            }
            Asker::Daemon => Finding::fail(
                "run_dir",
                format!("another komainu is running here: {socket} answers"),
                "stop it first, or give this one its own run_dir",
            ),
        });
        return;
    }
    let tcp = |address| TcpListener::bind(address).map(drop);
    let udp = |address| UdpSocket::bind(address).map(drop);
    if let Some(cluster) = &config.cluster {
        listener("cluster.listen", cluster.listen, "TCP", tcp, findings);
        listener("cluster.listen", cluster.listen, "UDP", udp, findings);
        if let Some(flows) = flow_address(cluster.listen).filter(|_| config.role == Role::Balancer) {
            listener("cluster.listen", flows, "UDP", udp, findings);
        }
    }
    if let Some(admin) = &config.admin {
        listener("admin.listen", admin.listen, "TCP", tcp, findings);
    }
    if let Some(metrics) = config.metrics {
        listener("metrics.listen", metrics, "TCP", tcp, findings);
    }
}

fn listener(
    field: &str,
    address: SocketAddr,
    protocol: &str,
    bind: impl Fn(SocketAddr) -> io::Result<()>,
    findings: &mut Vec<Finding>,
) {
    findings.push(match bind(address) {
        Ok(()) => Finding::ok(field, format!("{address} ({protocol}) is free")),
        Err(error) => {
            let action = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    "stop what listens there (`ss -lpn` names it), or choose another port"
                }
                io::ErrorKind::AddrNotAvailable => {
                    "give this machine that address, or write one that it has (`ip address`)"
                }
                io::ErrorKind::PermissionDenied => {
                    "choose a port from 1024 up, or give the service CAP_NET_BIND_SERVICE"
                }
                _ => "choose another address",
            };
            Finding::fail(field, format!("{address} ({protocol}) can't be listened on: {error}"), action)
        }
    });
}
