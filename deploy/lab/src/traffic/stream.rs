//! A client that sends one datagram a millisecond and knows of each whether, when and by whom it was answered.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::server::{ECHO_HEAD, MAX_DATAGRAM};
use crate::error::{LabError, Result};
use crate::host::Host;

/// Datagrams that one stream can count: more than an hour at one a millisecond.
const MAX_SENT: usize = 4_000_000;
/// Time that an answer may be late before the datagram counts as lost.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

/// How long before an event a datagram may have been sent that was lost by it: the way there and back on a busy machine.
const UNDER_WAY: Duration = Duration::from_millis(50);

/// How a stream sends.
#[derive(Clone, Copy, Debug)]
pub struct StreamSpec {
    /// Time between datagrams.
    pub interval: Duration,
    /// Sockets used in turn, each a flow of its own (1..=64).
    pub flows: usize,
    /// Bytes of payload, 8..=8000. What does not fit the path goes in fragments.
    pub size: usize,
}

impl Default for StreamSpec {
    fn default() -> Self {
        StreamSpec { interval: Duration::from_millis(1), flows: 1, size: 64 }
    }
}

/// A running stream. Stops when dropped.
#[derive(Debug)]
pub struct UdpStream {
    state: Arc<Mutex<State>>,
    stop_sending: Arc<AtomicBool>,
    stop_receiving: Arc<AtomicBool>,
    sender: Option<JoinHandle<()>>,
    receivers: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    sent: Vec<Instant>,
    // Number of the answering backend + 1; 0 where nobody has answered.
    answered_by: Vec<u16>,
    backends: Vec<String>,
    duplicates: u64,
}

impl UdpStream {
    /// Starts sending from `host` to `target`.
    ///
    /// # Errors
    /// A socket can't be opened.
    pub fn start(host: &Host, target: SocketAddr, spec: StreamSpec) -> Result<UdpStream> {
        let sockets = host.run(|| {
            (0..spec.flows.clamp(1, 64))
                .map(|_| {
                    let any: SocketAddr = if target.is_ipv4() {
                        (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
                    } else {
                        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
                    };
                    let socket = UdpSocket::bind(any)?;
                    socket.connect(target)?;
                    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
                    Ok(Arc::new(socket))
                })
                .collect::<std::io::Result<Vec<_>>>()
                .map_err(|e| LabError::system(format!("open a stream to {target}"), e))
        })?;
        let state = Arc::new(Mutex::new(State::default()));
        let stop_sending = Arc::new(AtomicBool::new(false));
        let stop_receiving = Arc::new(AtomicBool::new(false));
        let receivers = sockets
            .iter()
            .map(|socket| {
                let (socket, state, stop) = (socket.clone(), state.clone(), stop_receiving.clone());
                host.spawn("answers", move || receive(&socket, &state, &stop))
            })
            .collect();
        let sender = {
            let (state, stop) = (state.clone(), stop_sending.clone());
            host.spawn("stream", move || send(&sockets, &state, &stop, spec))
        };
        Ok(UdpStream { state, stop_sending, stop_receiving, sender: Some(sender), receivers })
    }

    /// Waits until `count` more datagrams have been answered, at most `limit`. Whether they were.
    pub fn wait_answered(&self, count: u64, limit: Duration) -> bool {
        let answered = || self.lock().answered_by.iter().filter(|&&b| b != 0).count() as u64;
        let goal = answered() + count;
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if answered() >= goal {
                return true;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }

    /// What was seen so far, without what may still be under way.
    pub fn report(&self) -> StreamReport {
        let state = self.lock();
        let now = Instant::now();
        let settled = state.sent.partition_point(|&at| now.duration_since(at) > ANSWER_LIMIT);
        StreamReport::new(&state, settled)
    }

    /// Stops sending, waits for late answers, and returns what was seen.
    pub fn stop(mut self) -> StreamReport {
        self.halt();
        let state = self.lock();
        StreamReport::new(&state, state.sent.len())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn halt(&mut self) {
        self.stop_sending.store(true, Ordering::Relaxed);
        let Some(sender) = self.sender.take() else { return };
        let _ = sender.join();
        let deadline = Instant::now() + ANSWER_LIMIT;
        while Instant::now() < deadline {
            let state = self.lock();
            let tail = &state.answered_by
                [state.answered_by.len().saturating_sub(ANSWER_LIMIT.as_millis() as usize)..];
            let done = tail.iter().all(|&b| b != 0);
            drop(state);
            if done {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.stop_receiving.store(true, Ordering::Relaxed);
        for receiver in self.receivers.drain(..) {
            let _ = receiver.join();
        }
    }
}

impl Drop for UdpStream {
    fn drop(&mut self) {
        self.halt();
    }
}

fn send(sockets: &[Arc<UdpSocket>], state: &Mutex<State>, stop: &AtomicBool, spec: StreamSpec) {
    super::hurry();
    let mut payload = vec![0; spec.size.clamp(ECHO_HEAD, MAX_DATAGRAM)];
    let mut next = Instant::now();
    for number in 0..MAX_SENT {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        payload[..ECHO_HEAD].copy_from_slice(&(number as u64).to_be_bytes());
        {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.sent.push(Instant::now());
            state.answered_by.push(0);
        }
        // An ICMP error about an earlier datagram surfaces here; this one was not sent then, so once more.
        let socket = &sockets[number % sockets.len()];
        if socket.send(&payload).is_err() {
            let _ = socket.send(&payload);
        }
        next += spec.interval;
        let now = Instant::now();
        if next > now {
            std::thread::sleep(next - now);
        } else if now - next > spec.interval * 5 {
            // The machine was busy: going on from here beats a burst.
            next = now;
        }
    }
}

fn receive(socket: &UdpSocket, state: &Mutex<State>, stop: &AtomicBool) {
    let mut buf = vec![0; MAX_DATAGRAM + 256];
    while !stop.load(Ordering::Relaxed) {
        let Ok(n) = socket.recv(&mut buf) else { continue };
        let Some((head, rest)) = buf[..n].split_first_chunk::<ECHO_HEAD>() else { continue };
        let number = u64::from_be_bytes(*head) as usize;
        let name: String = rest.iter().skip_while(|b| **b == 0).map(|&b| char::from(b)).collect();
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let backend = match state.backends.iter().position(|b| *b == name) {
            Some(at) => at,
            None => {
                state.backends.push(name);
                state.backends.len() - 1
            }
        };
        match state.answered_by.get_mut(number) {
            Some(slot) if *slot == 0 => *slot = backend as u16 + 1,
            Some(_) => state.duplicates += 1,
            None => {}
        }
    }
}

/// Datagrams in a row that nobody answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// When the last answered datagram before it was sent.
    pub from: Instant,
    /// Time from there until the next answered datagram was sent.
    pub length: Duration,
    /// Datagrams lost in it.
    pub lost: u64,
}

/// What a stream saw.
#[derive(Clone, Debug)]
pub struct StreamReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams answered at least once.
    pub answered: u64,
    /// Answers beyond the first.
    pub duplicates: u64,
    /// Answers by backend.
    pub per_backend: BTreeMap<String, u64>,
    /// Gaps in order of time. One that reaches the end of the stream is among them.
    pub gaps: Vec<Gap>,
}

impl StreamReport {
    fn new(state: &State, settled: usize) -> StreamReport {
        let mut report = StreamReport {
            sent: settled as u64,
            answered: 0,
            duplicates: state.duplicates,
            per_backend: BTreeMap::new(),
            gaps: Vec::new(),
        };
        let mut last: Option<usize> = None;
        let mut gap = |from: Option<usize>, to: usize| {
            let first_lost = from.map_or(0, |f| f + 1);
            if first_lost < to {
                let start = state.sent[from.unwrap_or(0)];
                let end = state.sent.get(to).copied().unwrap_or(state.sent[to - 1]);
                report.gaps.push(Gap { from: start, length: end - start, lost: (to - first_lost) as u64 });
            }
        };
        let mut answered = 0;
        let mut counts = vec![0_u64; state.backends.len()];
        for (number, &by) in state.answered_by[..settled].iter().enumerate() {
            if by == 0 {
                continue;
            }
            answered += 1;
            counts[usize::from(by) - 1] += 1;
            gap(last, number);
            last = Some(number);
        }
        gap(last, settled);
        report.answered = answered;
        report.per_backend = state.backends.iter().cloned().zip(counts).filter(|(_, n)| *n > 0).collect();
        report
    }

    /// Datagrams that nobody answered.
    pub fn lost(&self) -> u64 {
        self.sent - self.answered
    }

    /// The longest gap; zero when nothing was lost.
    pub fn longest_gap(&self) -> Duration {
        self.gaps.iter().map(|g| g.length).max().unwrap_or_default()
    }

    /// The longest gap that began at or after `at`, allowing for datagrams that were under way then.
    pub fn longest_gap_after(&self, at: Instant) -> Duration {
        let at = at.checked_sub(UNDER_WAY).unwrap_or(at);
        self.gaps.iter().filter(|g| g.from >= at).map(|g| g.length).max().unwrap_or_default()
    }

    /// Datagrams lost in gaps that began between `from` and `to`.
    pub fn lost_between(&self, from: Instant, to: Instant) -> u64 {
        let from = from.checked_sub(UNDER_WAY).unwrap_or(from);
        self.gaps.iter().filter(|g| g.from >= from && g.from <= to).map(|g| g.lost).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(answered: &[u16]) -> State {
        let start = Instant::now();
        State {
            sent: (0..answered.len() as u64).map(|i| start + Duration::from_millis(i)).collect(),
            answered_by: answered.to_vec(),
            backends: vec!["be1".into(), "be2".into()],
            duplicates: 0,
        }
    }

    #[test]
    fn gaps_run_from_the_last_answered_to_the_next_answered() {
        let state = state(&[1, 0, 0, 2, 1, 0, 1]);
        let report = StreamReport::new(&state, 7);
        assert_eq!((report.sent, report.answered, report.lost()), (7, 4, 3));
        let gaps: Vec<_> = report.gaps.iter().map(|g| (g.length.as_millis(), g.lost)).collect();
        assert_eq!(gaps, [(3, 2), (2, 1)]);
        assert_eq!(report.per_backend, BTreeMap::from([("be1".into(), 3), ("be2".into(), 1)]));
    }

    #[test]
    fn a_stream_that_ends_unanswered_ends_in_a_gap_and_one_without_answers_is_one() {
        let report = StreamReport::new(&state(&[1, 1, 0, 0]), 4);
        assert_eq!(report.gaps.len(), 1);
        assert_eq!((report.gaps[0].lost, report.longest_gap().as_millis()), (2, 2));
        let report = StreamReport::new(&state(&[0, 0, 0]), 3);
        assert_eq!((report.gaps.len(), report.gaps[0].lost), (1, 3));
    }
}
