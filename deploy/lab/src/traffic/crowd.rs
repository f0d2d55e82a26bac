//! Many long-lived TCP connections to an echo server, on one thread: each exchanges a byte now and then.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, watch};

use crate::error::{LabError, Result};
use crate::host::Host;

/// Connections that are being opened at once: a burst of all of them would measure the servers' listen queues.
const OPENING: usize = 32;
/// How long one attempt to open a connection may take; a lost SYN is sent again after one second.
const OPEN_LIMIT: Duration = Duration::from_secs(3);
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);
/// Share of the interval over which the answers to a roll call are spread: all at once would be a burst of its own.
const CALL_SPREAD: f64 = 0.15;
/// Reasons kept in words.
const MAX_REASONS: usize = 4;

/// What becomes of one connection.
#[derive(Clone, Debug)]
enum Member {
    /// Nobody has opened it, or it was given up.
    Absent,
    /// Being opened.
    Opening,
    /// It stands; which connection it is, and the last call that it has answered.
    Alive { id: u64, answered: u64 },
    /// It ended although nobody closed it.
    Broken(String),
}

/// What a roll call found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roll {
    /// Connections that answered.
    pub alive: usize,
    /// Connections that had ended before they were closed.
    pub broken: usize,
    /// Connections that stood but gave no answer in time.
    pub silent: usize,
    /// The first reasons, in words.
    pub reasons: Vec<String>,
}

type Members = Arc<Mutex<Vec<Member>>>;

/// A number of connections. They close when dropped.
#[derive(Debug)]
pub struct Crowd {
    members: Members,
    calls: watch::Sender<u64>,
    orders: Option<mpsc::UnboundedSender<usize>>,
    thread: Option<JoinHandle<()>>,
}

impl Crowd {
    /// `size` connections from `host` to `target`, none of them open yet ([`Crowd::fill`]); each will exchange a byte
    /// every `interval`.
    ///
    /// # Errors
    /// No thread or event queue is to be had.
    pub fn start(host: &Host, target: SocketAddr, size: usize, interval: Duration) -> Result<Crowd> {
        let members: Members = Arc::new(Mutex::new(vec![Member::Absent; size]));
        let (calls, called) = watch::channel(0);
        let (orders, taken) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| LabError::system("start a crowd's runtime", e))?;
        let shared = members.clone();
        let thread = host.spawn("crowd", move || {
            runtime.block_on(serve(target, interval, &shared, called, taken));
            // Dropping the runtime drops every task with its socket.
        });
        Ok(Crowd { members, calls, orders: Some(orders), thread: Some(thread) })
    }

    /// Opens what is not open until all connections stand, at most `limit`.
    ///
    /// # Errors
    /// Some can't be opened in time.
    pub fn fill(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let mut missing = Vec::new();
            let mut opening = 0;
            for (number, member) in self.lock().iter_mut().enumerate() {
                match member {
                    Member::Absent | Member::Broken(_) => {
                        *member = Member::Opening;
                        missing.push(number);
                    }
                    Member::Opening => opening += 1,
                    Member::Alive { .. } => {}
                }
            }
            if missing.is_empty() && opening == 0 {
                return Ok(());
            }
            for number in &missing {
                let orders = self.orders.as_ref().expect("taken only when it ends");
                let _ = orders.send(*number);
            }
            if Instant::now() > deadline {
                return Err(LabError::Timeout {
                    what: "a crowd of connections to be open".to_owned(),
                    waited: limit,
                    last: format!("{} are not", missing.len() + opening),
                });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Asks every connection for a byte now and waits until each that stands has given one, at most `limit`.
    pub fn roll_call(&self, limit: Duration) -> Roll {
        let mut call = 0;
        self.calls.send_modify(|c| {
            *c += 1;
            call = *c;
        });
        let deadline = Instant::now() + limit;
        loop {
            let roll = self.count(call);
            if roll.silent == 0 || Instant::now() > deadline {
                return roll;
            }
            std::thread::sleep(POLL);
        }
    }

    /// Gives up every second connection, so that [`Crowd::fill`] opens others.
    pub fn close_every_second(&self) {
        for member in self.lock().iter_mut().step_by(2) {
            *member = Member::Absent;
        }
    }

    /// Gives up all connections, so that [`Crowd::fill`] opens others.
    pub fn close_all(&self) {
        self.lock().fill(Member::Absent);
    }

    /// Gives up the connections that stand but do not answer `call`s, so that [`Crowd::fill`] opens others.
    pub fn forget_silent(&self) {
        let call = *self.calls.borrow();
        for member in self.lock().iter_mut() {
            if matches!(member, Member::Alive { answered, .. } if *answered < call) {
                *member = Member::Absent;
            }
        }
    }

    fn count(&self, call: u64) -> Roll {
        let mut roll = Roll::default();
        for member in self.lock().iter() {
            match member {
                Member::Alive { answered, .. } if *answered >= call => roll.alive += 1,
                Member::Alive { .. } | Member::Opening => roll.silent += 1,
                Member::Broken(why) => {
                    roll.broken += 1;
                    if roll.reasons.len() < MAX_REASONS && !roll.reasons.contains(why) {
                        roll.reasons.push(why.clone());
                    }
                }
                Member::Absent => {}
            }
        }
        roll
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(
    target: SocketAddr,
    interval: Duration,
    members: &Members,
    called: watch::Receiver<u64>,
    mut orders: mpsc::UnboundedReceiver<usize>,
) {
    let doors = Arc::new(Semaphore::new(OPENING));
    let size = members.lock().unwrap_or_else(PoisonError::into_inner).len().max(1);
    let mut id = 0;
    while let Some(number) = orders.recv().await {
        id += 1;
        let (members, called, doors) = (members.clone(), called.clone(), doors.clone());
        // Spread over the interval.
        let phase = interval.mul_f64(number as f64 / size as f64);
        tokio::spawn(async move {
            let opened = {
                let _door = doors.acquire().await;
                tokio::time::timeout(OPEN_LIMIT, open(target)).await
            };
            let Ok(Ok(stream)) = opened else {
                set(&members, number, Member::Absent);
                return;
            };
            set(&members, number, Member::Alive { id, answered: 0 });
            let seat = Seat { members, number, id };
            if let Some(why) = talk(stream, &seat, called, interval, phase).await {
                seat.change(|member| *member = Member::Broken(why));
            }
        });
    }
}

fn set(members: &Members, number: usize, member: Member) {
    members.lock().unwrap_or_else(PoisonError::into_inner)[number] = member;
}

async fn open(target: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    // The greeting: a name and the end of the line.
    while stream.read_u8().await? != b'\n' {}
    Ok(stream)
}

/// The place of one connection, which may be given to another one.
struct Seat {
    members: Members,
    number: usize,
    id: u64,
}

impl Seat {
    /// Changes what is known of the connection; nothing when it was given up. Whether it still has the seat.
    fn change(&self, change: impl FnOnce(&mut Member)) -> bool {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let member = &mut members[self.number];
        let mine = matches!(member, Member::Alive { id, .. } if *id == self.id);
        if mine {
            change(member);
        }
        mine
    }
}

/// Talks until it breaks, and says why; nothing when it was given up.
async fn talk(
    mut stream: TcpStream,
    seat: &Seat,
    mut called: watch::Receiver<u64>,
    interval: Duration,
    phase: Duration,
) -> Option<String> {
    let mut wait = phase;
    loop {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = called.changed() => tokio::time::sleep(phase.mul_f64(CALL_SPREAD)).await,
        }
        wait = interval;
        let call = *called.borrow_and_update();
        let asked = Instant::now();
        if let Err(e) = exchange(&mut stream).await {
            return Some(format!("{e}, {} ms after a byte was sent", asked.elapsed().as_millis()));
        }
        let here = seat.change(|member| *member = Member::Alive { id: seat.id, answered: call });
        if !here {
            return None;
        }
    }
}

async fn exchange(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"?").await?;
    match stream.read_u8().await? {
        b'?' => Ok(()),
        other => Err(io::Error::other(format!("byte {other} came back"))),
    }
}
