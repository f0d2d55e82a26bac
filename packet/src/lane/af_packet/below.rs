//! The seam to a program in the kernel that handles most frames before they reach this lane.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::engine::{Engine, Port, PortConfig};
use crate::lane::{Counters, LaneError};
use crate::time::BootTime;

use super::hops::Hops;

/// A program below: it handles what it can, and hands up the frames that the engine must see. All calls come from the
/// engine's thread; dropping it takes the program away.
pub trait Below: Send {
    /// Device by which the frames of a port come up; `None`: the port's interface itself.
    fn comes_up_by(&self, port: Port) -> Option<u32>;

    /// Follows interfaces that came, went or changed; absent: gone. Called before the first frame too.
    ///
    /// # Errors
    /// Why the program can't run on one of them, in a sentence. It is called again later.
    fn follow(&mut self, ports: [Option<&PortConfig>; Port::COUNT]) -> Result<(), String>;

    /// Puts the engine's tables, which are in force there already, in force in the program.
    ///
    /// # Errors
    /// What was in force in the program stays.
    fn install(&mut self, engine: &Engine, hops: &Hops) -> Result<(), LaneError>;

    /// Has the engine learn what the program did with flows so far. Called before each frame and whenever flows are asked for or
    /// forgotten; costs next to nothing when there is no news.
    fn learn(&mut self, engine: &mut Engine, now: BootTime);

    /// Called before the engine's thread sleeps: how long at most; `None`: as long as it likes, for news will wake it by
    /// [`Below::wakes`].
    fn doze(&mut self, now: BootTime) -> Option<Duration>;

    /// Readable when there is news; `None` while nobody has to wait for it.
    fn wakes(&self) -> Option<BorrowedFd<'_>>;

    /// The kernel's routes or neighbours have changed.
    fn hops_changed(&mut self, engine: &Engine, hops: &Hops, now: BootTime);

    /// Does what is due.
    fn attend(&mut self, engine: &mut Engine, hops: &Hops, now: BootTime);

    /// When [`Below::attend`] has something to do next.
    fn next_deadline(&self) -> BootTime;

    /// The engine's counters with the program's.
    fn counters(&mut self, engine: &Engine, now: BootTime) -> Counters;
}
