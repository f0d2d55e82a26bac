//! The receive ring that the kernel fills (TPACKET_V2; `Documentation/networking/packet_mmap.rst`).
//!
//! Version 2 and not 3: version 3 hands over whole blocks, and a block that is not full only when a timer of at least a
//! millisecond has run out. That is more than the whole time a frame may spend here. The price is a slot large enough for
//! the largest super-frame for every frame, however small.
//!
//! A slot holds, in this order: `tpacket2_hdr`, `sockaddr_ll`, room for headers that are put in front, the virtio-net
//! header, the frame. Header and frame touch, so a frame that was rewritten in place leaves from where it lies: the piece to
//! send begins at the virtio-net header.
//!
//! Slots are handed out in order and given back in order, all at once, when the batch they belong to has left.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use super::offload::VNET_HDR_LEN;
use super::sys::{self, Mapping, Piece};

/// Bytes of a block, a power of two. More than the page allocator hands out in one piece, so that it comes from vmalloc,
/// page by page: of what it hands out in one piece the kernel clears the whole ring without letting anybody else run where
/// it is built without preemption (`CONFIG_PREEMPT_NONE`). In a virtual machine whose host had taken the memory back that
/// was 50 to 100 ms, in which not even a real-time thread renewed a lease.
const BLOCK_LEN: usize = 8 << 20;
/// The most that the page allocator hands out: `MAX_PAGE_ORDER` is 10 (`include/linux/mmzone.h`), with pages of 4 KiB.
const PAGE_ALLOCATOR_MAX: usize = 4096 << 10;
const _: () = assert!(BLOCK_LEN > PAGE_ALLOCATOR_MAX);
/// Slots in a block: the most for which a slot holds 64 KiB, a link-layer header with a VLAN tag, and the headers in front.
pub const SLOTS_PER_BLOCK: usize = 127;
/// Bytes of a slot, a multiple of `TPACKET_ALIGNMENT`.
pub const SLOT_LEN: usize = BLOCK_LEN / SLOTS_PER_BLOCK / libc::TPACKET_ALIGNMENT * libc::TPACKET_ALIGNMENT;
/// Bytes kept free in front of the virtio-net header, so that a VLAN tag or an outer header can be put in place.
pub const HEADROOM: usize = 64;
/// Largest frame, link-layer header included, that fits in a slot for certain: a 64 KiB packet with an Ethernet header.
pub const MAX_FRAME_LEN: usize = 65536 + 14;

const _: () = assert!(SLOT_LEN >= MAX_FRAME_LEN + libc::TPACKET2_HDRLEN + 16 + 16 + HEADROOM + VNET_HDR_LEN);

/// A frame in the ring, valid until [`RxRing::release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Offset of the frame's first byte in the mapping.
    start: usize,
    /// Bytes of the frame that are in the slot.
    len: usize,
    /// Whether the frame was longer than the slot.
    pub truncated: bool,
    /// Priority and VLAN number that the kernel took out of the frame.
    pub vlan: Option<u16>,
}

impl Slot {
    /// Length of the frame in bytes.
    pub fn len(&self) -> usize {
        self.len
    }
}

/// The ring.
#[derive(Debug)]
pub struct RxRing {
    map: Mapping,
    slots: usize,
    /// Next slot to look at.
    next: usize,
    /// Slots before `next` that are still ours.
    held: usize,
}

impl RxRing {
    /// Sets the ring up on a socket that is not bound yet. `slots` is rounded up to whole blocks.
    ///
    /// # Errors
    /// The kernel has not enough memory, or refuses a setting.
    pub fn new(fd: BorrowedFd<'_>, slots: usize) -> io::Result<RxRing> {
        sys::set_packet_option(fd, libc::PACKET_VERSION, libc::tpacket_versions::TPACKET_V2 as _)?;
        sys::set_packet_option(fd, libc::PACKET_RESERVE, HEADROOM as _)?;
        let blocks = slots.div_ceil(SLOTS_PER_BLOCK).max(1);
        let slots = blocks * SLOTS_PER_BLOCK;
        let request = libc::tpacket_req {
            tp_block_size: BLOCK_LEN as u32,
            tp_block_nr: blocks as u32,
            tp_frame_size: SLOT_LEN as u32,
            tp_frame_nr: slots as u32,
        };
        sys::set_option(fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        Ok(RxRing { map: Mapping::new(fd, blocks * BLOCK_LEN)?, slots, next: 0, held: 0 })
    }

    /// Takes the next frame, if the kernel has filled one.
    pub fn take(&mut self) -> Option<Slot> {
        if self.held == self.slots {
            return None;
        }
        let base = self.slot_base(self.next);
        if self.status(base).load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            return None;
        }
        // SAFETY: `base` is the start of a slot, aligned to TPACKET_ALIGNMENT, and every slot starts with this header. The
        // status bit says that the kernel has finished writing it and leaves it alone until we give it back.
        let head: libc::tpacket2_hdr = unsafe { self.at(base).cast::<libc::tpacket2_hdr>().read() };
        self.next = (self.next + 1) % self.slots;
        self.held += 1;

        let mac = usize::from(head.tp_mac);
        // What the kernel writes is trusted to describe the slot, but an offset is bounded all the same: a wrong one must
        // not become a wild pointer.
        let room = SLOT_LEN.saturating_sub(mac);
        let len =
            if mac < VNET_HDR_LEN + libc::TPACKET2_HDRLEN { 0 } else { (head.tp_snaplen as usize).min(room) };
        let vlan = (head.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(head.tp_vlan_tci);
        Some(Slot { start: base + mac.min(SLOT_LEN), len, truncated: head.tp_len > head.tp_snaplen, vlan })
    }

    /// The virtio-net header and the frame of a slot that was taken and not released yet.
    pub fn parts(&mut self, slot: &Slot) -> (&mut [u8; VNET_HDR_LEN], &mut [u8]) {
        assert!(
            slot.start >= VNET_HDR_LEN && slot.start + slot.len <= self.map.len(),
            "a slot's frame lies within the ring"
        );
        // SAFETY: checked to lie within the mapping; header and frame do not overlap; the slot is ours until `release`,
        // and `&mut self` makes these the only references into the ring.
        unsafe {
            let frame = self.at(slot.start);
            let head = frame.sub(VNET_HDR_LEN);
            (
                &mut *head.as_ptr().cast::<[u8; VNET_HDR_LEN]>(),
                std::slice::from_raw_parts_mut(frame.as_ptr(), slot.len),
            )
        }
    }

    /// The memory to send for a slot: virtio-net header and the first `len` bytes of the frame. Valid until
    /// [`RxRing::release`].
    pub fn piece(&self, slot: &Slot, len: usize) -> Piece {
        assert!(slot.start >= VNET_HDR_LEN && len <= slot.len && slot.start + slot.len <= self.map.len());
        // SAFETY: stays within the mapping, as just checked.
        let base = unsafe { self.at(slot.start).sub(VNET_HDR_LEN) };
        Piece { base: base.as_ptr(), len: len + VNET_HDR_LEN }
    }

    /// Gives every slot that was taken back to the kernel. Slots taken before are no longer valid.
    pub fn release(&mut self) {
        let first = (self.next + self.slots - self.held) % self.slots;
        for i in 0..self.held {
            let base = self.slot_base((first + i) % self.slots);
            self.status(base).store(libc::TP_STATUS_KERNEL, Ordering::Release);
        }
        self.held = 0;
    }

    /// Offset of a slot in the mapping: slots don't cross blocks.
    fn slot_base(&self, index: usize) -> usize {
        index / SLOTS_PER_BLOCK * BLOCK_LEN + index % SLOTS_PER_BLOCK * SLOT_LEN
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        debug_assert!(offset <= self.map.len());
        // SAFETY: callers pass offsets within the mapping or its end.
        unsafe { self.map.base().add(offset) }
    }

    fn status(&self, slot_base: usize) -> &AtomicU32 {
        // SAFETY: the first field of a slot is the 32-bit status word, aligned to 16; the kernel and we access it by atomic
        // loads and stores only.
        unsafe { AtomicU32::from_ptr(self.at(slot_base).cast::<u32>().as_ptr()) }
    }
}
