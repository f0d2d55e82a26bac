//! Room in the kernel's table of connections for more than it has by default.
//!
//! The limit is one for the whole machine (kernel `Documentation/networking/nf_conntrack-sysctl.rst`, `nf_conntrack_max`) and
//! namespaces can't have a greater one, so that a benchmark of a million connections has to raise it, as whoever forwards so many does.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

const MAX: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
const BUCKETS: &str = "/proc/sys/net/netfilter/nf_conntrack_buckets";

/// A raised limit. What was before is there again when this is dropped, or when the process ends in whatever way.
#[derive(Debug)]
pub struct Room {
    /// Waits for its standard input to end, and puts back what was.
    keeper: Child,
}

impl Room {
    /// Makes room for `connections`, with as many buckets, which is what the kernel does by default. Nothing if there is room.
    ///
    /// # Errors
    /// Connection tracking isn't loaded, or the limit can't be set.
    pub fn make(connections: u32) -> Result<Option<Room>> {
        let read = |path: &str| -> Result<u32> {
            let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
            text.trim().parse().with_context(|| format!("{path} holds {text:?}"))
        };
        let (max, buckets) = (read(MAX)?, read(BUCKETS)?);
        if max >= connections {
            return Ok(None);
        }
        let script = format!("cat >/dev/null; echo {buckets} >{BUCKETS}; echo {max} >{MAX}");
        // In a process group of its own: an interrupt from the terminal is for the benchmark.
        let keeper = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("start what puts the limit back")?;
        let room = Room { keeper };
        for (path, value) in [(BUCKETS, connections.max(buckets)), (MAX, connections)] {
            fs::write(path, value.to_string()).with_context(|| format!("set {path} to {value}"))?;
        }
        Ok(Some(room))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        // It can't fail to end: it only reads and writes.
        let _ = self.keeper.wait();
    }
}
