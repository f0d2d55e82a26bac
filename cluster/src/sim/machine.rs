//! One simulated machine: clock, disk, lane, and the process on it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use komainu_proto::domain::{GroupId, NodeId, Role};

use super::warm::Warm;
use crate::api::{LeaseUpdate, NodeIdentity};
use crate::core::{Config, Core, Now, Peer};
use crate::flowsync::model::Table;
use crate::pair::Policy;
use crate::pulse::{Pulse, Will};
use crate::raft::{Persist, RaftId};
use crate::store::{MemoryStore, Store};
use crate::time::Instant;
use crate::timing::Timing;

/// True time in ns.
pub type Time = u64;

/// A machine.
pub struct Machine {
    /// Who it is.
    pub identity: NodeIdentity,
    /// Its node file's peers.
    pub peers: Vec<Peer>,
    /// Durations.
    pub timing: Timing,
    /// True time at which its clock showed `boot_offset`.
    pub booted_at: Time,
    /// What its clock showed then.
    pub boot_offset: u64,
    /// How fast its clock runs, in ppm of true time.
    pub drift_ppm: i64,
    /// What is on disk.
    pub disk: MemoryStore,
    /// How long every write takes, where that is not the weather's.
    pub slow_fsync: Option<Time>,
    /// Every write fails from now on.
    pub disk_full: bool,
    /// Leases in the lane: they stay there when the process dies.
    pub lane: BTreeMap<GroupId, LeaseUpdate>,
    /// Flows in the lane.
    pub flows: Table,
    /// The process.
    pub process: Option<Process>,
    /// Counts processes: what was meant for an earlier one is lost.
    pub generation: u64,
    /// What its executor is to say when its process has died.
    pub will: Option<Will>,
    /// Counts how often it lost power, and every process on it with it, executors too.
    pub power: u64,
    /// Its wall clock is off by this.
    pub wall_offset_ms: i64,
    /// The whole machine stands still since then, and its clock with it.
    pub halted_since: Option<Time>,
    /// Whether it led when it stood still last.
    pub led_when_halted: bool,
    /// When it went on after it had stood still.
    pub went_on_at: Option<Time>,
    /// Frozen until then: nothing is handled.
    pub paused_until: Time,
    /// What has arrived while frozen.
    pub backlog: VecDeque<super::world::Arrival>,
    /// The deadline that is in the queue.
    pub wake_at: Option<Time>,
    /// Index of the tables in its lane.
    pub installed: u64,
    /// Fit to own a group.
    pub fit: bool,
    /// What it does as one of a pair.
    pub pair: Policy,
    /// Whether it went on alone, by the state that it applied last.
    pub solo: bool,
    /// The sounding under way.
    pub sounding: Option<SoundingUnderWay>,
}

/// A node asks the service network about its peer.
#[derive(Clone, Copy, Debug)]
pub struct SoundingUnderWay {
    /// By its own clock.
    pub began: Instant,
    /// Questions that are still to be asked.
    pub left: u32,
    /// An address that another machine answered for.
    pub claimed: Option<std::net::IpAddr>,
}

/// A running process.
pub struct Process {
    /// Raft side.
    pub core: Core,
    /// Beat side.
    pub pulse: Arc<Mutex<Pulse>>,
    /// The exchange of flows, where there are any.
    pub warm: Option<Warm>,
    /// Writes not yet on disk, in order, with the true time at which each will be.
    pub writing: VecDeque<(Persist, Time)>,
    /// Index of the state that was last announced to the planner.
    pub planned: u64,
    /// Index of the state that was last looked at.
    pub applied: u64,
    /// What the transcript says of it: leads, term, voters.
    pub told: (bool, u64, Vec<String>),
}

/// Address of a simulated node.
pub fn address(id: u64) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, id as u8], 7800))
}

impl Machine {
    /// A machine that is switched on and has no process yet.
    pub fn new(id: u64, role: Role, all: &[u64], timing: Timing) -> Machine {
        Machine {
            identity: NodeIdentity { id: NodeId(id), name: format!("n{id}"), role, address: address(id) },
            peers: all
                .iter()
                .filter(|n| **n != id)
                .map(|&n| Peer { id: NodeId(n), address: address(n) })
                .collect(),
            timing,
            booted_at: 0,
            boot_offset: 1_000_000_000 * id,
            drift_ppm: 0,
            disk: MemoryStore::new(),
            slow_fsync: None,
            disk_full: false,
            lane: BTreeMap::new(),
            flows: Table::default(),
            process: None,
            generation: 0,
            will: None,
            power: 0,
            wall_offset_ms: 0,
            halted_since: None,
            led_when_halted: false,
            went_on_at: None,
            paused_until: 0,
            backlog: VecDeque::new(),
            wake_at: None,
            installed: 0,
            fit: true,
            pair: Policy::Safety,
            solo: false,
            sounding: None,
        }
    }

    /// What its clock shows at true time `t`.
    pub fn clock(&self, t: Time) -> Instant {
        let t = self.halted_since.map_or(t, |since| t.min(since));
        let passed = i128::from(t - self.booted_at);
        let shown = passed + passed * i128::from(self.drift_ppm) / 1_000_000;
        Instant(self.boot_offset + shown as u64)
    }

    /// True time at which its clock shows `at`, rounded up; not before `now`.
    pub fn when(&self, at: Instant, now: Time) -> Time {
        let shown = i128::from(at.0.saturating_sub(self.boot_offset));
        let passed = shown * 1_000_000 / (1_000_000 + i128::from(self.drift_ppm)) + 1;
        (self.booted_at + passed as u64).max(now)
    }

    /// Its clock runs at another speed from now on.
    pub fn set_drift(&mut self, t: Time, ppm: i64) {
        if self.halted_since.is_none() {
            self.boot_offset = self.clock(t).0;
            self.booted_at = t;
            self.drift_ppm = ppm;
        }
    }

    /// It stands still no more. Its clock goes on where it stood.
    pub fn go_on(&mut self, t: Time) {
        if self.halted_since.is_some() {
            self.led_when_halted = self.process.as_ref().is_some_and(|p| p.core.is_leader());
            self.boot_offset = self.clock(t).0;
            self.booted_at = t;
            self.halted_since = None;
            self.went_on_at = Some(t);
        }
    }

    /// Whether it may take itself for an owner, or for a leader that grants, although it isn't one any more: its clock has stood still,
    /// which no promise allows for. For less than a lease after it went on.
    pub fn is_excused(&self, t: Time) -> bool {
        let lease = self.timing.longest_lease().as_nanos() as Time;
        self.went_on_at.is_some_and(|at| t < at + lease + lease / 50)
    }

    /// Both clocks.
    pub fn now(&self, t: Time) -> Now {
        let wall_ms = (1_700_000_000_000 + t / 1_000_000).saturating_add_signed(self.wall_offset_ms);
        Now { at: self.clock(t), wall_ms }
    }

    /// Starts the process.
    pub fn start(&mut self, t: Time, seed: u64) {
        self.generation += 1;
        self.will = None;
        // A lane that is started permits nothing and knows nothing.
        self.lane.clear();
        self.flows = Table::default();
        self.installed = 0;
        self.sounding = None;
        let core = self.core(self.disk.clone(), t, seed);
        let pulse = core.pulse();
        pulse.lock().expect("no panic").set_self_health(crate::api::SelfHealth {
            links_up: self.fit,
            gateway: None,
            forwarding: true,
            reason: String::new(),
        });
        self.process = Some(Process {
            core,
            pulse,
            warm: None,
            writing: VecDeque::new(),
            planned: 0,
            applied: 0,
            told: (false, 0, Vec::new()),
        });
        self.wake_at = None;
        self.paused_until = 0;
        self.backlog.clear();
    }

    /// Who would vote by what a process finds here that is started after the power has failed at true time `t`.
    pub fn voters_on_disk(&self, t: Time) -> BTreeSet<RaftId> {
        let mut disk = self.disk.clone();
        disk.lose_unsynced();
        let mut core = self.core(disk, t, 1);
        while core.poll_output().is_some() {}
        core.voters().collect()
    }

    fn core(&self, mut disk: MemoryStore, t: Time, seed: u64) -> Core {
        let config = Config {
            identity: self.identity.clone(),
            version: "sim".to_owned(),
            peers: self.peers.clone(),
            timing: self.timing,
            instance: seed,
            seed: seed ^ 0x5555,
            incarnation: seed ^ 0xaaaa,
            pair: self.pair,
        };
        let restored = disk.load().expect("memory can be read");
        Core::start(config, restored, self.now(t)).expect("the store is in order")
    }

    /// Whether its lane answers for the group at true time `t`.
    pub fn answers(&self, group: GroupId, t: Time) -> Option<u64> {
        let lease = self.lane.get(&group)?;
        if self.halted_since.is_some() {
            return None;
        }
        (lease.answer_until > self.clock(t)).then_some(lease.epoch)
    }
}
