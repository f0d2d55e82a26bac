//! A capture of a segment in a file, for a look at a failure with tcpdump or Wireshark.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::SystemTime;

use crate::error::{LabError, Result};
use crate::lab::Lab;
use crate::tap::{Take, Tap};

/// Bytes kept of a frame: all headers.
const SNAP_LENGTH: usize = 160;
/// Frames in one file; then the capture stops. About 350 MB.
const MAX_FRAMES: usize = 2_000_000;

/// A running capture. Ends when dropped.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Records each frame on `segment` once, at the port it enters by.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn start(lab: &Lab, segment: &str, path: &Path) -> Result<Capture> {
        let failed = |e| LabError::system(format!("write {}", path.display()), e);
        let mut out = BufWriter::new(File::create(path).map_err(failed)?);
        out.write_all(&file_header()).map_err(failed)?;
        let mut tap = Tap::open(lab, segment, Take::All)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut frames = 0;
            while !stopped.load(Ordering::Relaxed) && frames < MAX_FRAMES {
                let Some(tapped) = tap.next() else { continue };
                frames += 1;
                if out.write_all(&record(tapped.wall, tapped.frame)).is_err() {
                    return;
                }
            }
            let _ = out.flush();
        });
        Ok(Capture { stop, thread: Some(thread) })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The classic format with nanoseconds (draft-ietf-opsawg-pcap-05, section 4), link type Ethernet.
fn file_header() -> [u8; 24] {
    let mut h = [0; 24];
    h[..4].copy_from_slice(&0xa1b2_3c4d_u32.to_le_bytes());
    h[4..6].copy_from_slice(&2_u16.to_le_bytes());
    h[6..8].copy_from_slice(&4_u16.to_le_bytes());
    h[16..20].copy_from_slice(&(SNAP_LENGTH as u32).to_le_bytes());
    h[20..24].copy_from_slice(&1_u32.to_le_bytes());
    h
}

fn record(at: SystemTime, frame: &[u8]) -> Vec<u8> {
    let at = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let kept = &frame[..frame.len().min(SNAP_LENGTH)];
    let mut r = Vec::with_capacity(16 + kept.len());
    for word in [at.as_secs() as u32, at.subsec_nanos(), kept.len() as u32, frame.len() as u32] {
        r.extend_from_slice(&word.to_le_bytes());
    }
    r.extend_from_slice(kept);
    r
}
