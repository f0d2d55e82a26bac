//! The cases, and what must hold in each.

use std::time::Duration;

use super::shape::Shape;

/// Something that happens to a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Case {
    /// The owner's process is killed.
    KillOwner,
    /// The owner is killed while its services are in transition: a backend was drained and another one added.
    KillOwnerInTransition,
    /// The leader's process is killed while another node is the owner.
    KillLeader,
    /// The witness's process is killed.
    KillWitness,
    /// The owner is killed; it comes back; the one that took over is killed.
    KillBothInTurn,
    /// The owner loses its links and its process at one instant.
    PowerOff,
    /// The owner's process is stopped for 0.1 s.
    Stop100Ms,
    /// … 1 s.
    Stop1S,
    /// … 3 s.
    Stop3S,
    /// … 10 s.
    Stop10S,
    /// The owner's cable to the clients is pulled.
    ServiceLink,
    /// The owner's cable to the other nodes is pulled.
    ClusterLink,
    /// All of the owner's cables are pulled; its process goes on.
    AllLinks,
    /// What the other nodes send to the owner is lost.
    OwnerDeaf,
    /// What the owner sends to the other nodes is lost.
    OwnerMute,
    /// The owner and the other nodes don't hear each other; clients reach all of them.
    FullSplit,
    /// The owner's cable to the clients goes off and on.
    LinkFlap,
    /// All nodes are killed and start at the same moment.
    BootAtOnce,
    /// Every node is ended in order and started again, one after the other.
    RollingRestart,
    /// The same, and what is started is another file.
    Upgrade,
    /// The group changes hands on order.
    Switchover,
    /// The leader is killed while it takes in a document.
    KillLeaderInApply,
    /// The owner's disk is full when the document changes.
    DiskFull,
    /// Every sync of the owner's disk takes long.
    SlowDisk,
    /// The owner is killed and its store is damaged before it starts again.
    StoreCorrupt,
    /// The owner shares little memory with a process that takes all of it.
    MemoryPressure,
    /// The owner's wall clock is set back.
    ClockBack,
}

/// What must hold beyond what always must: one owner in the end, and never two.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// Two owners are what the operator has chosen for this case, and one of them ends within this time after the fault was mended.
    pub two_owners_end: Option<Duration>,
    /// Median of the longest gaps of the rounds.
    pub gap_median: Option<Duration>,
    /// Greatest gap.
    pub gap_max: Option<Duration>,
    /// Median of the datagrams lost.
    pub lost_median: Option<u64>,
    /// Whether no established connection may break.
    pub connections_live: bool,
}

impl Case {
    /// All of them, in the order in which they are played and printed.
    pub const ALL: [Case; 27] = [
        Case::KillOwner,
        Case::KillOwnerInTransition,
        Case::KillLeader,
        Case::KillWitness,
        Case::KillBothInTurn,
        Case::PowerOff,
        Case::Stop100Ms,
        Case::Stop1S,
        Case::Stop3S,
        Case::Stop10S,
        Case::ServiceLink,
        Case::ClusterLink,
        Case::AllLinks,
        Case::OwnerDeaf,
        Case::OwnerMute,
        Case::FullSplit,
        Case::LinkFlap,
        Case::BootAtOnce,
        Case::RollingRestart,
        Case::Upgrade,
        Case::Switchover,
        Case::KillLeaderInApply,
        Case::DiskFull,
        Case::SlowDisk,
        Case::StoreCorrupt,
        Case::MemoryPressure,
        Case::ClockBack,
    ];

    /// The word for it on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Case::KillOwner => "kill-owner",
            Case::KillOwnerInTransition => "kill-owner-in-transition",
            Case::KillLeader => "kill-leader",
            Case::KillWitness => "kill-witness",
            Case::KillBothInTurn => "kill-both-in-turn",
            Case::PowerOff => "power-off",
            Case::Stop100Ms => "stop-100ms",
            Case::Stop1S => "stop-1s",
            Case::Stop3S => "stop-3s",
            Case::Stop10S => "stop-10s",
            Case::ServiceLink => "service-link",
            Case::ClusterLink => "cluster-link",
            Case::AllLinks => "all-links",
            Case::OwnerDeaf => "owner-deaf",
            Case::OwnerMute => "owner-mute",
            Case::FullSplit => "full-split",
            Case::LinkFlap => "link-flap",
            Case::BootAtOnce => "boot-at-once",
            Case::RollingRestart => "rolling-restart",
            Case::Upgrade => "upgrade",
            Case::Switchover => "switchover",
            Case::KillLeaderInApply => "kill-leader-in-apply",
            Case::DiskFull => "disk-full",
            Case::SlowDisk => "slow-disk",
            Case::StoreCorrupt => "store-corrupt",
            Case::MemoryPressure => "memory-pressure",
            Case::ClockBack => "clock-back",
        }
    }

    /// The case called `name`.
    pub fn named(name: &str) -> Option<Case> {
        Case::ALL.into_iter().find(|c| c.name() == name)
    }

    /// What is done, for a reader.
    pub fn what(self) -> &'static str {
        match self {
            Case::KillOwner => "the owner's process is killed (SIGKILL); started again after 0.6 s",
            Case::KillOwnerInTransition => {
                "the same, just after a backend was drained and another one added; half of the connections were made before that, half since"
            }
            Case::KillLeader => {
                "right after a switchover, so that leader and owner are two nodes, the leader is killed; started again after 0.6 s"
            }
            Case::KillWitness => "the witness's process is killed; started again after 0.6 s",
            Case::KillBothInTurn => {
                "the owner is killed and comes back; then the one that took over is killed"
            }
            Case::PowerOff => "the owner loses all links and its process at one instant; boots after 0.6 s",
            Case::Stop100Ms => "the owner's process is stopped (SIGSTOP) for 0.1 s and goes on",
            Case::Stop1S => "the same for 1 s",
            Case::Stop3S => "the same for 3 s",
            Case::Stop10S => "the same for 10 s",
            Case::ServiceLink => "the owner's cable to the clients is out for 2 s",
            Case::ClusterLink => "the owner's cable to the other nodes is out for 2 s",
            Case::AllLinks => "all of the owner's cables are out for 2 s, its process goes on",
            Case::OwnerDeaf => {
                "for 2 s the owner hears nothing from the other nodes, on any network; they hear it"
            }
            Case::OwnerMute => "for 2 s the other nodes hear nothing from the owner; it hears them",
            Case::FullSplit => {
                "for 2 s owner and other nodes are cut off from each other, on every network; clients reach all of them"
            }
            Case::LinkFlap => "the owner's cable to the clients is out for 150 ms, six times, 350 ms apart",
            Case::BootAtOnce => "all nodes are killed and, half a second later, started at once",
            Case::RollingRestart => {
                "every node is ended in order (SIGTERM) and started again, one after the other"
            }
            Case::Upgrade => {
                "the same, and what is started is another file: a copy of the same version, put in place before"
            }
            Case::Switchover => "`komainu switchover`",
            Case::KillLeaderInApply => {
                "the leader is killed within 60 ms of the beginning of a `komainu apply`; every node must have the same document then, and the new one if it was acknowledged"
            }
            Case::DiskFull => {
                "the owner's data directory (a file system of its own) is full, and the document is changed; after 2 s there is room again and the node is killed and started"
            }
            Case::SlowDisk => {
                "for 2 s every sync of the owner's files takes 300 ms longer (a library put before the system's), and the document is changed"
            }
            Case::StoreCorrupt => {
                "the owner is killed, bytes all over its store are changed, it is started again"
            }
            Case::MemoryPressure => {
                "for 2 s the owner shares 64 MiB for whatever it still needs (a memory cgroup) with a process that takes all it can get \
                 and is killed by the kernel for it, again and again"
            }
            Case::ClockBack => {
                "the owner's wall clock is set back by an hour (a library put before the system's), the document is changed, and after 2 s the clock is put right"
            }
        }
    }

    /// What must hold in it, for a cluster of this kind.
    pub fn bounds(self, shape: Shape) -> Bounds {
        let ms = |n| Some(Duration::from_millis(n));
        let live = Bounds { connections_live: true, ..Bounds::default() };
        let bounds = match self {
            // The death of a process is told and should be noticed sooner ([`Case::goal`]); what is lost of that is a loss of power's time.
            Case::KillOwner | Case::PowerOff => Bounds { gap_median: ms(200), gap_max: ms(350), ..live },
            Case::Switchover | Case::KillWitness | Case::ClockBack => Bounds { lost_median: Some(0), ..live },
            Case::KillOwnerInTransition => Case::KillOwner.bounds(shape),
            // Nobody forwards for longer than TCP waits before it tries again.
            Case::BootAtOnce => Bounds::default(),
            _ => live,
        };
        match shape {
            Shape::Three => bounds,
            Shape::Pair if self == Case::FullSplit => Bounds { two_owners_end: ms(1000), ..bounds },
            Shape::Pair => bounds,
            // It answers again when its peer does.
            Shape::PairSafety => Bounds { gap_median: None, gap_max: None, ..bounds },
        }
    }

    /// Median and greatest gap that three voters aim at on `lane`, with the `fast` durations or the default ones: shown, not
    /// judged.
    pub fn goal(self, lane: &str, fast: bool) -> Option<(Duration, Option<Duration>)> {
        let ms = Duration::from_millis;
        match self {
            Case::KillOwner => Some((ms(if lane == "af_packet" { 60 } else { 15 }), Some(ms(200)))),
            Case::PowerOff if fast => Some((ms(60), None)),
            _ => None,
        }
    }

    /// Whether it can be done to a cluster of this kind.
    pub fn suits(self, shape: Shape) -> bool {
        let of_three = matches!(
            self,
            // The leader of a pair is its owner, and it has no witness; and where every change must be on both disks, nothing can be
            // changed while one of them is bad.
            Case::KillLeader
                | Case::KillWitness
                | Case::KillLeaderInApply
                | Case::DiskFull
                | Case::SlowDisk
                | Case::StoreCorrupt
                // The change is made through the witness.
                | Case::ClockBack
        );
        shape == Shape::Three || !of_three
    }

    /// Whether backends come and go in it, so that each round begins with the backends of the first.
    pub fn changes_backends(self) -> bool {
        self == Case::KillOwnerInTransition
    }

    /// Whether it shows the difference between the two policies of a pair.
    pub fn tells_policies_apart(self) -> bool {
        matches!(
            self,
            Case::KillOwner
                | Case::KillBothInTurn
                | Case::PowerOff
                | Case::Stop1S
                | Case::AllLinks
                | Case::OwnerDeaf
                | Case::OwnerMute
                | Case::FullSplit
        )
    }

    /// Whether it can be done to a pair of keepalived.
    pub fn suits_keepalived(self) -> bool {
        matches!(
            self,
            Case::KillOwner
                | Case::KillBothInTurn
                | Case::PowerOff
                | Case::Stop100Ms
                | Case::Stop1S
                | Case::Stop3S
                | Case::Stop10S
                | Case::ServiceLink
                | Case::ClusterLink
                | Case::AllLinks
                | Case::OwnerDeaf
                | Case::OwnerMute
                | Case::FullSplit
                | Case::LinkFlap
                | Case::BootAtOnce
                | Case::RollingRestart
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_found_by_its_name() {
        for case in Case::ALL {
            assert_eq!(Case::named(case.name()), Some(case));
        }
    }
}
