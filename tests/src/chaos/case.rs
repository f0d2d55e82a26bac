//! The cases, and what must hold in each.

use std::time::Duration;

/// Something that happens to a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Case {
    /// The owner's process is killed.
    KillOwner,
    /// The owner is killed while its services are in transition.
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
}

/// What must hold beyond what always must: no two owners, one owner in the end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// Median of the longest gaps of the rounds.
    pub gap_median: Option<Duration>,
    /// Greatest gap.
    pub gap_max: Option<Duration>,
    /// Median of the datagrams lost.
    pub lost_median: Option<u64>,
    /// Whether no established connection may break, in the modes that need no state of the standby.
    pub connections_live: bool,
}

impl Case {
    /// All of them, in the order in which they are played and printed.
    pub const ALL: [Case; 24] = [
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
        Case::Switchover,
        Case::KillLeaderInApply,
        Case::DiskFull,
        Case::SlowDisk,
        Case::StoreCorrupt,
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
            Case::Switchover => "switchover",
            Case::KillLeaderInApply => "kill-leader-in-apply",
            Case::DiskFull => "disk-full",
            Case::SlowDisk => "slow-disk",
            Case::StoreCorrupt => "store-corrupt",
        }
    }

    /// The case called `name`.
    pub fn named(name: &str) -> Option<Case> {
        Case::ALL.into_iter().find(|c| c.name() == name)
    }

    /// What is done, for a reader.
    pub fn what(self) -> &'static str {
        match self {
            Case::KillOwner => "the owner's process is killed (SIGKILL); started again after a second",
            Case::KillOwnerInTransition => {
                "the same, just after a backend was drained; connections were made before that and since"
            }
            Case::KillLeader => {
                "right after a switchover, so that leader and owner are two nodes, the leader is killed; started again after a second"
            }
            Case::KillWitness => "the witness's process is killed; started again after a second",
            Case::KillBothInTurn => {
                "the owner is killed and comes back; then the one that took over is killed"
            }
            Case::PowerOff => {
                "the owner loses all links and its process at one instant; boots after a second"
            }
            Case::Stop100Ms => "the owner's process is stopped (SIGSTOP) for 0.1 s and goes on",
            Case::Stop1S => "the same for 1 s",
            Case::Stop3S => "the same for 3 s",
            Case::Stop10S => "the same for 10 s",
            Case::ServiceLink => "the owner's cable to the clients is out for 3 s",
            Case::ClusterLink => "the owner's cable to the other nodes is out for 3 s",
            Case::AllLinks => "all of the owner's cables are out for 3 s, its process goes on",
            Case::OwnerDeaf => {
                "for 3 s the owner hears nothing from the other nodes, on any network; they hear it"
            }
            Case::OwnerMute => "for 3 s the other nodes hear nothing from the owner; it hears them",
            Case::FullSplit => {
                "for 3 s owner and other nodes are cut off from each other, on every network; clients reach all of them"
            }
            Case::LinkFlap => "the owner's cable to the clients is out for 150 ms, six times, 350 ms apart",
            Case::BootAtOnce => "all nodes are killed and, half a second later, started at once",
            Case::RollingRestart => {
                "every node is ended in order (SIGTERM) and started again, one after the other"
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
        }
    }

    /// What must hold in it, for a cluster of three voters on `lane`.
    pub fn bounds(self) -> Bounds {
        let ms = |n| Some(Duration::from_millis(n));
        let live = Bounds { connections_live: true, ..Bounds::default() };
        match self {
            // The death of a process is told and should be noticed sooner ([`Case::goal`]); what is lost of that is a loss of power's time.
            Case::KillOwner | Case::PowerOff => Bounds { gap_median: ms(200), gap_max: ms(350), ..live },
            Case::Switchover | Case::KillWitness => Bounds { lost_median: Some(0), ..live },
            // Connections made since the change are known to the owner only, until standbys are told of them.
            Case::KillOwnerInTransition => Bounds { connections_live: false, ..Case::KillOwner.bounds() },
            // Nobody forwards for longer than TCP waits before it tries again.
            Case::BootAtOnce => Bounds::default(),
            _ => live,
        }
    }

    /// Median and greatest gap that are aimed at on `lane`: shown, not judged.
    pub fn goal(self, lane: &str) -> Option<(Duration, Duration)> {
        let median = if lane == "af_packet" { 60 } else { 15 };
        (self == Case::KillOwner).then(|| (Duration::from_millis(median), Duration::from_millis(200)))
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

/// What is not among the cases, and why.
pub const LEFT_OUT: [(&str, &str); 3] = [
    (
        "clock set back an hour",
        "Linux has no namespace for CLOCK_REALTIME, and a chaos run must not set the clock of the machine it is a guest on. Nothing \
         that decides about leases reads it: they live on CLOCK_BOOTTIME",
    ),
    ("memory pressure", "would take the memory from whatever else runs on the machine"),
    (
        "upgrade under load",
        "`rolling-restart` is the procedure; with one version there is nothing to upgrade to",
    ),
];

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
