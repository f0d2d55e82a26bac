//! Frames on their way out, gathered so that one system call sends many.

use std::io;

use super::offload::VNET_HDR_LEN;
use super::ring::Slot;
use super::socket::PacketSocket;
use super::sys::Piece;
use crate::engine::{Fence, Port};
use crate::lease::LeaseBoard;
use crate::time::BootTime;

/// Frames sent at once. Larger batches save little more of the system call's cost, and hold their ring slots longer.
pub const MAX_BATCH: usize = 64;

/// The sockets of a lane by port; absent while its interface is gone.
pub type Sockets = [Option<PacketSocket>; Port::COUNT];

/// Frames to send.
#[derive(Debug, Default)]
pub struct Batch {
    items: Vec<Item>,
    /// Frames that do not lie in a ring, each behind its virtio-net header.
    made: Vec<u8>,
    pieces: Vec<Piece>,
}

#[derive(Debug)]
struct Item {
    egress: Port,
    fence: Fence,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// In the ring that it came by, rewritten in place.
    Slot { ingress: Port, slot: Slot },
    /// In `made`.
    Made { start: usize, len: usize },
}

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Flushed {
    /// Frames that the kernel took.
    pub sent: usize,
    /// Frames whose lease had ended.
    pub lease_ended: usize,
    /// Frames that the kernel refused, or whose interface is gone.
    pub failed: usize,
    /// Why, for the last of them.
    pub error: Option<io::Error>,
}

impl Batch {
    /// Whether it is time to [`Batch::flush`].
    pub fn is_full(&self) -> bool {
        self.items.len() >= MAX_BATCH
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Adds a frame that was rewritten in its ring slot. The slot must not be released before the next flush.
    pub fn push_slot(&mut self, ingress: Port, slot: Slot, egress: Port, fence: Fence) {
        self.items.push(Item { egress, fence, source: Source::Slot { ingress, slot } });
    }

    /// Adds a complete frame without offload metadata.
    pub fn push_frame(&mut self, frame: &[u8], egress: Port, fence: Fence) {
        let start = self.made.len();
        self.made.extend_from_slice(&[0; VNET_HDR_LEN]);
        self.made.extend_from_slice(frame);
        self.items.push(Item {
            egress,
            fence,
            source: Source::Made { start, len: frame.len() + VNET_HDR_LEN },
        });
    }

    /// Adds a frame behind its virtio-net header.
    pub fn push_with_header(&mut self, bytes: &[u8], egress: Port, fence: Fence) {
        let start = self.made.len();
        self.made.extend_from_slice(bytes);
        self.items.push(Item { egress, fence, source: Source::Made { start, len: bytes.len() } });
    }

    /// Sends everything that its lease still permits at `now`, the time at which this is called.
    ///
    /// The lease is looked at here again because time may have passed since the engine did: the process may have been
    /// stopped, or the whole machine paused.
    pub fn flush(&mut self, sockets: &mut Sockets, leases: &LeaseBoard, now: BootTime) -> Flushed {
        let mut flushed = Flushed::default();
        if self.is_empty() {
            return flushed;
        }
        for egress in [Port::Service, Port::Inside] {
            self.pieces.clear();
            for item in self.items.iter().filter(|i| i.egress == egress) {
                if !item.fence.is_open(leases, now) {
                    flushed.lease_ended += 1;
                    continue;
                }
                self.pieces.push(match &item.source {
                    Source::Made { start, len } => {
                        Piece { base: self.made[*start..*start + *len].as_ptr(), len: *len }
                    }
                    Source::Slot { ingress, slot } => match &sockets[*ingress as usize] {
                        Some(socket) => socket.piece(slot, slot.len()),
                        None => continue,
                    },
                });
            }
            let Some(socket) = &mut sockets[egress as usize] else {
                flushed.failed += self.pieces.len();
                continue;
            };
            if self.pieces.is_empty() {
                continue;
            }
            // SAFETY: the pieces lie in `made`, which nobody touches before the call returns, or in ring slots that were
            // taken and are released only after the flush.
            let sent = unsafe { socket.send(&self.pieces) };
            flushed.sent += sent.sent;
            flushed.failed += sent.failed;
            flushed.error = sent.error.or(flushed.error);
        }
        self.items.clear();
        self.made.clear();
        flushed
    }
}
