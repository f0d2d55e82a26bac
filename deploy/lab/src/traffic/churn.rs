//! A client that opens one TCP connection after the other at a steady pace, whether or not earlier ones have come about.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::error::{LabError, Result};
use crate::host::Host;

/// Failures kept in words; the rest is only counted.
const MAX_FAILURES_KEPT: usize = 8;
/// Attempts under way at once: what a long outage at the usual pace piles up, and a bound for descriptors.
const MAX_UNDER_WAY: usize = 2000;

/// What the client saw.
#[derive(Clone, Debug, Default)]
pub struct ChurnReport {
    /// Connections begun.
    pub begun: u64,
    /// Connections opened and greeted by a server.
    pub opened: u64,
    /// Connections refused, reset, or not greeted in time.
    pub failed: u64,
    /// The first failures, in words.
    pub failures: Vec<String>,
    /// Longest time in which no connection came about.
    pub longest_gap: Duration,
}

#[derive(Debug)]
struct State {
    report: ChurnReport,
    last: Instant,
    under_way: usize,
}

/// A running client. Stops when dropped.
#[derive(Debug)]
pub struct Churn {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Churn {
    /// Begins a connection to `target` every `interval`; each is given up after `patience`.
    ///
    /// # Errors
    /// No event queue is to be had.
    pub fn start(host: &Host, target: SocketAddr, interval: Duration, patience: Duration) -> Result<Churn> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| LabError::system("start a client's runtime", e))?;
        let state = State { report: ChurnReport::default(), last: Instant::now(), under_way: 0 };
        let state = Arc::new(Mutex::new(state));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (state.clone(), stop.clone());
        let thread = host.spawn("churn", move || {
            lock(&shared).last = Instant::now();
            runtime.block_on(async {
                let mut pace = tokio::time::interval(interval);
                pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
                while !stopped.load(Ordering::Relaxed) {
                    pace.tick().await;
                    let mut state = lock(&shared);
                    if state.under_way < MAX_UNDER_WAY {
                        state.under_way += 1;
                        state.report.begun += 1;
                        tokio::spawn(attempt(target, patience, shared.clone()));
                    }
                }
            });
        });
        Ok(Churn { state, stop, thread: Some(thread) })
    }

    /// Stops it, and what it saw. Connections still under way count as neither opened nor failed.
    pub fn stop(mut self) -> ChurnReport {
        self.halt();
        let state = lock(&self.state);
        let mut report = state.report.clone();
        report.longest_gap = report.longest_gap.max(state.last.elapsed());
        report
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.halt();
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn attempt(target: SocketAddr, patience: Duration, state: Arc<Mutex<State>>) {
    let result = match tokio::time::timeout(patience, open(target)).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("not greeted within {patience:?}"))),
    };
    let mut state = lock(&state);
    state.under_way -= 1;
    match result {
        Ok(()) => {
            state.report.opened += 1;
            let now = Instant::now();
            let gap = now - state.last;
            state.report.longest_gap = state.report.longest_gap.max(gap);
            state.last = now;
        }
        Err(e) => {
            state.report.failed += 1;
            if state.report.failures.len() < MAX_FAILURES_KEPT {
                state.report.failures.push(e.to_string());
            }
        }
    }
}

/// Connects, reads the greeting, closes.
async fn open(target: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(target).await?;
    while stream.read_u8().await? != b'\n' {}
    Ok(())
}
