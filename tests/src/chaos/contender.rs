//! Whoever keeps a VIP alive with two balancers.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use komainu_lab::Lab;
use komainu_lab::cluster::{Cluster, Document};

/// A way to forward, and where clients find it.
#[derive(Clone, Debug)]
pub struct Target {
    /// `nat`, `dsr`, `nat-transparent`.
    pub mode: String,
    /// TCP echo and UDP echo.
    pub at: SocketAddr,
}

/// A pair of balancers, perhaps with a witness, in a lab of its own.
pub trait Contender {
    /// Where it stands.
    fn lab(&self) -> &Lab;

    /// Every node, balancers first.
    fn nodes(&self) -> Vec<String>;

    /// Addresses that no two nodes may answer for; the first is the VIP that clients use.
    fn addresses(&self) -> Vec<IpAddr>;

    /// Where clients are served. Datagrams and new connections go to the first.
    fn targets(&self) -> Vec<Target>;

    /// Starts what does not run and waits until everything is well. The owner then.
    ///
    /// # Errors
    /// It does not become well.
    fn settle(&mut self) -> Result<String>;

    /// Waits, for a bounded time, until nothing is left in flight of earlier changes.
    fn calm(&mut self, owner: &str);

    /// Kills a node's process with SIGKILL. The instant before.
    fn kill(&mut self, node: &str) -> Instant;

    /// The same, and nothing of it is left that could tell of its death.
    fn kill_silently(&mut self, node: &str) -> Instant {
        self.kill(node)
    }

    /// Stops a node's process.
    fn pause(&self, node: &str);

    /// Lets it go on.
    fn resume(&self, node: &str);

    /// Ends a node in order and waits for its end.
    ///
    /// # Errors
    /// It does not end.
    fn end(&mut self, node: &str) -> Result<()>;

    /// Starts a node.
    ///
    /// # Errors
    /// It can't be started.
    fn boot(&mut self, node: &str) -> Result<()>;

    /// Takes from a dead node's host what a loss of power would: whatever the kernel still has of it.
    ///
    /// # Errors
    /// It can't be taken away.
    fn forget(&mut self, node: &str) -> Result<()>;

    /// How long it is left alone after a fault before the fault is mended, at least.
    fn slowness(&self) -> Duration;

    /// Whether nobody need answer while a node is missing.
    fn waits_for_mending(&self) -> bool {
        false
    }

    /// Undoes what cases do to more than the nodes' processes. Everything is well when it is called.
    ///
    /// # Errors
    /// It can't be undone.
    fn renew(&mut self) -> Result<()> {
        Ok(())
    }

    /// What forwards, in words; absent where there is no choice.
    fn lane(&self) -> Option<String> {
        None
    }

    /// Komainu's cluster, when it is one.
    fn cluster(&mut self) -> Option<&mut Cluster>;

    /// Komainu's document; with a further service, `extra`, on `port` when given.
    fn document(&self, port: Option<u16>) -> Option<Document>;

    /// Backends that the document does not have but could have: `SERVICE/NAME` and their addresses.
    fn spares(&self) -> Vec<(String, SocketAddr)> {
        Vec::new()
    }

    /// The end of every node's log.
    fn last_words(&self) -> String;
}
