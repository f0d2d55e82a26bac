//! Timer wheel: when to look at which flow again.
//!
//! A packet only writes its flow's time of last use; the flow stays where it is in the wheel and is put off when its slot
//! comes round. So a packet costs no list operation, and a flow is looked at once in a whole turn at least.

/// Length of a tick: 2^28 ns, about 268 ms. Idle times are of whole seconds, so nobody sees it.
const TICK_SHIFT: u32 = 28;
/// Slots of a turn (about 275 s). Flows with longer idle times are looked at once a turn, which for a full table of 1 M
/// flows is 4 000 looks a second.
const SLOTS: usize = 1024;
/// End of a list.
pub(super) const NONE: u32 = u32::MAX;

/// Links of a flow in its slot's list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Links {
    prev: u32,
    next: u32,
    /// Tick that it waits for, its lower bits.
    pub(super) due: u32,
}

impl Links {
    pub(super) const UNLINKED: Links = Links { prev: NONE, next: NONE, due: 0 };
}

/// The wheel. Entries live elsewhere; `links` reaches them by number.
#[derive(Debug)]
pub(super) struct Wheel {
    heads: Box<[u32]>,
    /// First tick whose slot has not been emptied.
    cursor: u64,
}

/// Access to the links of an entry.
pub(super) trait HasLinks {
    fn links(&mut self, entry: u32) -> &mut Links;
}

impl Wheel {
    pub(super) fn new() -> Wheel {
        Wheel { heads: vec![NONE; SLOTS].into_boxed_slice(), cursor: 0 }
    }

    /// Tick in which `time_ns` lies.
    pub(super) fn tick_of(time_ns: u64) -> u64 {
        time_ns >> TICK_SHIFT
    }

    /// When the cursor's tick has passed wholly.
    pub(super) fn deadline_ns(&self) -> u64 {
        (self.cursor + 1) << TICK_SHIFT
    }

    /// Moves the cursor of an empty wheel, so that no empty turns have to be walked.
    pub(super) fn skip_to(&mut self, time_ns: u64) {
        self.cursor = self.cursor.max(Self::tick_of(time_ns));
    }

    /// Puts an unlinked entry where it is looked at after `deadline_ns`, or at the end of this turn if that is later.
    pub(super) fn schedule(&mut self, entries: &mut impl HasLinks, entry: u32, deadline_ns: u64) {
        let tick = Self::tick_of(deadline_ns).clamp(self.cursor, self.cursor + SLOTS as u64 - 1);
        self.link(entries, entry, tick);
    }

    fn link(&mut self, entries: &mut impl HasLinks, entry: u32, tick: u64) {
        let head = &mut self.heads[tick as usize % SLOTS];
        let next = *head;
        *head = entry;
        *entries.links(entry) = Links { prev: NONE, next, due: tick as u32 };
        if next != NONE {
            entries.links(next).prev = entry;
        }
    }

    /// Takes an entry out.
    pub(super) fn unlink(&mut self, entries: &mut impl HasLinks, entry: u32) {
        let Links { prev, next, due } = *entries.links(entry);
        if prev == NONE {
            self.heads[due as usize % SLOTS] = next;
        } else {
            entries.links(prev).next = next;
        }
        if next != NONE {
            entries.links(next).prev = prev;
        }
        *entries.links(entry) = Links::UNLINKED;
    }

    /// Whether an entry that waits for `due` would be looked at only after `deadline_ns`.
    pub(super) fn is_late(&self, due: u32, deadline_ns: u64) -> bool {
        let ahead = due.wrapping_sub(self.cursor as u32);
        Self::tick_of(deadline_ns) < self.cursor + u64::from(ahead)
    }

    /// Takes out an entry of a tick that has passed wholly before `now_ns`. Each step, found or not, costs one of `budget`.
    pub(super) fn pop(
        &mut self,
        entries: &mut impl HasLinks,
        now_ns: u64,
        budget: &mut usize,
    ) -> Option<u32> {
        let now = Self::tick_of(now_ns);
        while self.cursor < now && *budget > 0 {
            *budget -= 1;
            let head = self.heads[self.cursor as usize % SLOTS];
            if head != NONE {
                self.unlink(entries, head);
                return Some(head);
            }
            self.cursor += 1;
        }
        None
    }
}
