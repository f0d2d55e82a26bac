//! Warm standby: the thread that exchanges flows between this node's data path and those of the other balancers.
//!
//! The protocol is [`komainu_cluster::flowsync`], the flows are the lane's ([`FlowSharing`]); here are the socket, the clock,
//! and what says which flows are whose: the replicated state (services and their groups, balancers and their addresses) and
//! the leases ([`LanePath::leases`]). A socket and thread of its own, at ordinary priority: no flood of flows delays a beat.

mod thread;

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use komainu_cluster::flowsync::{Owned, PeerStatus};
use komainu_cluster::seal::{Key, Sealer};
use komainu_cluster::shell::View;
use komainu_cluster::state::MAX_MEMBERS;
use komainu_proto::domain::NodeId;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::watch;

use crate::datapath::LanePath;

/// The flows' UDP port is the cluster's port plus this, on the same address.
pub const PORT_OFFSET: u16 = 1;
/// How long new tables wait for standbys to have the flows that they turn into exceptions. A few round trips; a standby that
/// is dead or slow costs no more than this.
const FLUSH_WAIT: Duration = Duration::from_millis(50);
/// How long a lease waits for flows that came by the tables just installed to be taken over.
const CATCH_UP_WAIT: Duration = Duration::from_millis(20);
/// Requests that wait for the thread: there is one installer.
const MAX_REQUESTS: usize = 8;

/// Datagrams, bytes and flows since start.
#[derive(Debug, Default)]
pub struct Totals {
    /// Datagrams sent.
    pub sent: AtomicU64,
    /// Their bytes, seal included, UDP and IP headers not.
    pub sent_bytes: AtomicU64,
    /// Datagrams received and taken in.
    pub received: AtomicU64,
    /// Their bytes.
    pub received_bytes: AtomicU64,
    /// Datagrams refused: another key, played back, not readable.
    pub refused: AtomicU64,
    /// News of flows taken over from other nodes.
    pub adopted: AtomicU64,
    /// News that could not be: no such service or backend here, or this node knows better.
    pub rejected: AtomicU64,
    /// Flows that found the table full.
    pub full: AtomicU64,
}

/// The exchange as others see it.
#[derive(Debug)]
pub struct Warm {
    shared: Arc<Shared>,
    requests: SyncSender<Request>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    wake: EventFd,
    stop: AtomicBool,
    peers: Mutex<Vec<PeerStatus>>,
    /// Ids of the peers that have caught up, 0 for none. Read by the beat thread, which never waits for a lock.
    followers: [AtomicU64; MAX_MEMBERS],
    /// Groups of which all flows were told. For the beat thread, too.
    told: ArcSwap<Vec<Owned>>,
    totals: Totals,
}

/// What the installer waits for.
#[derive(Debug)]
enum Request {
    /// Everything that has happened so far is with the standbys that are in step.
    Flush(SyncSender<()>),
    /// What waits for tables of that index is taken over.
    CatchUp(u64, SyncSender<()>),
}

/// The address by which a node exchanges flows, from the one by which it is a member; absent where there is no such port.
pub fn flow_address(member: SocketAddr) -> Option<SocketAddr> {
    let port = member.port().checked_add(PORT_OFFSET).filter(|_| member.port() != 0)?;
    Some(SocketAddr::new(member.ip(), port))
}

impl Warm {
    /// Starts the thread. `None`: the lane does not share flows, or the node stands alone.
    ///
    /// # Errors
    /// The address can't be listened on, or the system gives no thread.
    pub fn start(
        id: NodeId,
        listen: SocketAddr,
        secret: &Key,
        path: &Arc<LanePath>,
        view: watch::Receiver<Arc<View>>,
    ) -> std::io::Result<Option<Warm>> {
        let Some(address) = flow_address(listen).filter(|_| path.lane().sharing().is_some()) else {
            return Ok(None);
        };
        let socket = UdpSocket::bind(address).map_err(|e| {
            std::io::Error::new(e.kind(), format!("{address} (UDP, flows for the standby): {e}"))
        })?;
        socket.set_nonblocking(true)?;
        let sealer = Sealer::new(secret).map_err(std::io::Error::other)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared {
            wake,
            stop: AtomicBool::new(false),
            peers: Mutex::default(),
            followers: Default::default(),
            told: ArcSwap::default(),
            totals: Totals::default(),
        });
        let (requests, asked): (_, Receiver<Request>) = sync_channel(MAX_REQUESTS);
        let worker =
            thread::Worker::new(id, socket, sealer, Arc::clone(path), view, Arc::clone(&shared), asked);
        let thread =
            std::thread::Builder::new().name("komainu-flows".to_owned()).spawn(move || worker.run())?;
        Ok(Some(Warm { shared, requests, thread: Mutex::new(Some(thread)) }))
    }

    /// How far the other balancers have followed.
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.shared.peers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Nodes that have all flows of the groups that this one owns, but for what is under way. Never waits.
    pub fn followers(&self) -> Vec<NodeId> {
        let ids = self.shared.followers.iter().map(|id| id.load(Ordering::Relaxed));
        ids.filter(|id| *id != 0).map(NodeId).collect()
    }

    /// Groups of which this node was told all flows, and under which epoch. Never waits.
    pub fn told(&self) -> Vec<Owned> {
        self.shared.told.load().to_vec()
    }

    /// What was sent and taken over.
    pub fn totals(&self) -> &Totals {
        &self.shared.totals
    }

    /// The change barrier: returns when the standbys that are in step have every flow that was told so far, or after
    /// [`FLUSH_WAIT`].
    pub fn flush(&self) {
        self.ask(Request::Flush, FLUSH_WAIT);
    }

    /// Returns when flows that waited for tables of `index` are taken over, or after [`CATCH_UP_WAIT`].
    pub fn catch_up(&self, index: u64) {
        self.ask(|answer| Request::CatchUp(index, answer), CATCH_UP_WAIT);
    }

    fn ask(&self, request: impl FnOnce(SyncSender<()>) -> Request, limit: Duration) {
        let (answer, answered) = sync_channel(1);
        if self.requests.try_send(request(answer)).is_ok() {
            let _ = self.shared.wake.write(1);
            let _ = answered.recv_timeout(limit);
        }
    }

    /// Ends the thread. Idempotent.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let _ = self.shared.wake.write(1);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic has ended the process.
            let _ = thread.join();
        }
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_have_the_port_after_the_clusters() {
        let address = |s: &str| s.parse::<SocketAddr>().unwrap();
        assert_eq!(flow_address(address("192.0.2.1:7800")), Some(address("192.0.2.1:7801")));
        assert_eq!(flow_address(address("[2001:db8::1]:7800")), Some(address("[2001:db8::1]:7801")));
        assert_eq!(flow_address(address("192.0.2.1:65535")), None);
        assert_eq!(flow_address(address("127.0.0.1:0")), None, "a node that stands alone");
    }
}
