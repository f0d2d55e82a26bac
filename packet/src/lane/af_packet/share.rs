//! Flows that are shared with other nodes: the engine's news on their way out, and the questions of whoever exchanges them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::engine::{Adopted, Engine, FlowNews, FlowOutbox, FlowRecord};
use crate::time::BootTime;

/// News that wait, some 80 bytes each. At the default limit of new flows a second it bridges 160 ms in which nobody takes
/// them; what is lost after that is made up for by sending all flows again.
const MAX_NEWS: usize = 1 << 15;

/// News of flows, on their way from the engine's thread to the one that exchanges them with other nodes.
#[derive(Debug)]
pub struct News {
    queue: Receiver<FlowNews>,
    shared: Arc<Bell>,
}

/// What is worth being woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Awaited {
    /// [`FlowNews::Exception`] only.
    Exceptions = 1,
    /// Any news.
    Any = 2,
}

#[derive(Debug)]
struct Bell {
    lost: AtomicBool,
    /// Of what comes before the next [`News::take`], whether there is an exception.
    exceptions: AtomicBool,
    /// An [`Awaited`]; 0: nothing.
    awaited: AtomicU8,
    wake: EventFd,
}

/// The engine's end.
struct Outbox {
    queue: Sender<FlowNews>,
    bell: Arc<Bell>,
}

impl News {
    /// Both ends.
    ///
    /// # Errors
    /// The system gives no event descriptor.
    pub(super) fn new() -> std::io::Result<(News, Box<dyn FlowOutbox>)> {
        let (sender, queue) = bounded(MAX_NEWS);
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let bell = Arc::new(Bell {
            lost: AtomicBool::new(false),
            exceptions: AtomicBool::new(false),
            awaited: AtomicU8::new(0),
            wake,
        });
        Ok((News { queue, shared: Arc::clone(&bell) }, Box::new(Outbox { queue: sender, bell })))
    }

    /// Takes news, oldest first, at most `most`.
    pub fn take(&self, most: usize, into: &mut Vec<FlowNews>) {
        // First: what comes in between is taken, or rings for nothing.
        self.shared.exceptions.store(false, Ordering::SeqCst);
        let before = into.len();
        into.extend(self.queue.try_iter().take(most));
        if into.len() - before >= most {
            self.shared.exceptions.store(true, Ordering::SeqCst);
        }
    }

    /// News that wait.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Whether some were lost since the last call, because nobody took them. All flows must be sent again then; what is lost
    /// after this call is told by the next.
    pub fn take_lost(&self) -> bool {
        self.shared.lost.swap(false, Ordering::SeqCst)
    }

    /// Has the next news of that kind make [`News::fd`] readable, once. True: some are there already, and nothing was asked for.
    pub fn arm(&self, awaited: Awaited) -> bool {
        self.shared.awaited.store(awaited as u8, Ordering::SeqCst);
        let there = match awaited {
            Awaited::Exceptions => self.shared.exceptions.load(Ordering::SeqCst),
            Awaited::Any => !self.queue.is_empty(),
        };
        if there {
            self.shared.awaited.store(0, Ordering::SeqCst);
        }
        there
    }

    /// Makes [`News::fd`] unreadable again.
    pub fn disarm(&self) {
        self.shared.awaited.store(0, Ordering::SeqCst);
        let _ = self.shared.wake.read();
    }

    /// Readable when there is news, see [`News::arm`].
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }
}

impl FlowOutbox for Outbox {
    fn tell(&mut self, news: FlowNews) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(news) {
            self.bell.lost.store(true, Ordering::SeqCst);
        }
        let exception = matches!(news, FlowNews::Exception(_));
        if exception {
            self.bell.exceptions.store(true, Ordering::SeqCst);
        }
        let least = if exception { Awaited::Exceptions } else { Awaited::Any } as u8;
        if self.bell.awaited.load(Ordering::SeqCst) >= least
            && self.bell.awaited.swap(0, Ordering::SeqCst) != 0
        {
            let _ = self.bell.wake.write(1);
        }
    }
}

/// What whoever exchanges flows asks of the engine's thread.
#[derive(Debug)]
pub enum Share {
    /// Flows of these groups from a place on.
    Shared(Arc<[u32]>, usize, Sender<(Vec<FlowRecord>, Option<usize>)>),
    /// Take over, under a mark.
    Adopt(Vec<FlowNews>, u32, Sender<Adopted>),
    /// Forget what did not come with a mark, from a place on.
    Sweep(Arc<[u32]>, u32, usize, Sender<Option<usize>>),
}

impl Share {
    /// Does it. Whoever asked may have given up waiting: then nobody reads the answer.
    pub fn carry_out(self, engine: &mut Engine, now: BootTime) {
        match self {
            Share::Shared(groups, from, answer) => {
                let mut records = Vec::new();
                let next = engine.shared(&groups, from, &mut records);
                let _ = answer.send((records, next));
            }
            Share::Adopt(news, mark, answer) => {
                let _ = answer.send(engine.adopt(&news, mark, now));
            }
            Share::Sweep(groups, mark, from, answer) => {
                let _ = answer.send(engine.sweep(&groups, mark, from, now));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::FlowName;

    fn news(port: u16) -> FlowNews {
        FlowNews::Gone(FlowName { service: 1, client: ([192, 0, 2, 1], port).into() })
    }

    #[test]
    fn whoever_waits_is_woken_once_and_a_loss_is_told() {
        let (inbox, mut outbox) = News::new().unwrap();
        assert!(!inbox.arm(Awaited::Any));
        outbox.tell(news(1));
        outbox.tell(news(2));
        assert_eq!(inbox.shared.wake.read().unwrap(), 1);
        assert!(inbox.arm(Awaited::Any), "there is news already");
        let mut taken = Vec::new();
        inbox.take(1, &mut taken);
        assert_eq!(taken, [news(1)]);
        assert!(!inbox.take_lost());
        for port in 0..=MAX_NEWS as u32 {
            outbox.tell(news(port as u16));
        }
        assert!(inbox.take_lost() && !inbox.take_lost());
        assert_eq!(inbox.waiting(), MAX_NEWS);
    }

    #[test]
    fn whoever_waits_for_exceptions_is_woken_for_nothing_else() {
        let exception = FlowNews::Exception(FlowRecord {
            name: FlowName { service: 1, client: ([192, 0, 2, 1], 3).into() },
            backend: 1,
            snat: None,
            progress: 0,
        });
        let (inbox, mut outbox) = News::new().unwrap();
        outbox.tell(news(1));
        assert!(!inbox.arm(Awaited::Exceptions));
        outbox.tell(news(2));
        assert!(inbox.shared.wake.read().is_err(), "not for that");
        outbox.tell(exception);
        assert_eq!(inbox.shared.wake.read().unwrap(), 1);
        assert!(inbox.arm(Awaited::Exceptions), "there is one already");
        inbox.take(MAX_NEWS, &mut Vec::new());
        assert!(!inbox.arm(Awaited::Exceptions));
    }
}
