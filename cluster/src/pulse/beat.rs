//! The beat: what it says, and its form on the wire.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use komainu_proto::cluster as wire;
use komainu_proto::domain::{BackendId, GroupId, Health, NodeId};
use prost::Message as _;

use crate::api::{NodeIdentity, Observation, SelfHealth};
use crate::raft::RaftId;
use crate::time::Instant;
use crate::timing::Timing;

/// Longest beat in bytes before sealing: fits a datagram on every path that carries IPv6 (RFC 8200 §5), seal included.
pub const BEAT_MAX_BYTES: usize = 1200;
/// Observations of one beat.
pub const MAX_OBSERVATIONS: usize = 32;
/// Groups in each list of a beat: as many as a document can hold.
pub const MAX_OWNERSHIPS: usize = crate::state::MAX_GROUPS;
/// Followers of one beat: every other member.
const MAX_FOLLOWERS: usize = crate::state::MAX_MEMBERS;
/// Bytes of a name, version or reason that are sent; the rest is cut.
const MAX_TEXT: usize = 64;

/// The small periodic datagram that carries liveness, lease grants and gossip.
#[derive(Clone, Debug, PartialEq)]
pub struct Beat {
    /// Raft id of the sender.
    pub from: RaftId,
    /// Random number of the sender's process.
    pub instance: u64,
    /// Cluster that the sender's store belongs to; 0 while it is empty.
    pub cluster: u64,
    /// Sending time on the sender's clock.
    pub sent: Instant,
    /// Sent in answer to a beat.
    pub answer: bool,
    /// Newest term that the sender knows of.
    pub term: u64,
    /// The sender leads in that term.
    pub leading: bool,
    /// Leader as the sender knows it.
    pub leader: Option<RaftId>,
    /// The receiver's newest beat that the sender accepted from it as a leader.
    pub echo: Option<Echo>,
    /// Who the sender is; its id is in `from`.
    pub identity: Arc<NodeIdentity>,
    /// Version of the program.
    pub version: Arc<str>,
    /// Durations in force at the sender.
    pub timing: Timing,
    /// Log index that its replicated state has reached.
    pub applied: u64,
    /// Log index that its installed tables have reached.
    pub installed: u64,
    /// Whether it can own a group.
    pub health: SelfHealth,
    /// It is shutting down and wants its groups taken.
    pub resigning: bool,
    /// Empty nodes: who should found the cluster.
    pub support: Option<NodeId>,
    /// From a leader: how long the receiver is in contact, and its grants last.
    pub contact: Option<Contact>,
    /// Groups granted to the receiver until the end of `contact`.
    pub grants: Vec<Ownership>,
    /// Groups that the receiver must stop answering for.
    pub releases: Vec<Ownership>,
    /// Groups that the sender has stopped answering for for good.
    pub released: Vec<Ownership>,
    /// Leases that the sender holds, and what is left of them.
    pub held: Vec<(Ownership, Duration)>,
    /// What the sender's checks see where that differs from the replicated verdict.
    pub observations: Vec<Observation>,
    /// Nodes that have the remembered flows of the groups that the sender owns; absent: it sends them to nobody.
    pub followers: Option<Vec<NodeId>>,
    /// Groups of which the sender was told all remembered flows, by the owner that they have by the state at `applied`; a leader
    /// says nothing of it.
    pub told: Vec<GroupId>,
    /// The sender's line; see [`crate::pair`].
    pub line: u64,
    /// The receiver's newest beat that came from another line than the sender's: who yields must know that it was heard.
    pub met: Option<Echo>,
}

/// A group under an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ownership {
    /// Which group.
    pub group: GroupId,
    /// Ownership counter.
    pub epoch: u64,
}

/// Acknowledges a leader's beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    /// Instance of the leader's process.
    pub instance: u64,
    /// Its stamp.
    pub stamp: Instant,
    /// The term in which it was accepted.
    pub term: u64,
}

/// A time limit relative to the receiver's clock: until its own stamp plus a duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contact {
    /// Instance of the receiver's process.
    pub instance: u64,
    /// The receiver's own stamp.
    pub stamp: Instant,
    /// Time from that stamp on.
    pub lasts: Duration,
}

/// Why a datagram is no beat.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BeatError {
    /// Not a protobuf message of this kind.
    #[error("not a beat: {0}")]
    Wire(String),
    /// A field that no sender of any version writes.
    #[error("beat.{field}: {value}")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// Longer than a beat can be.
    #[error("a beat of {0} bytes")]
    Long(usize),
}

impl Beat {
    /// The beat on the wire, at most [`BEAT_MAX_BYTES`]: observations that don't fit are left out, which `kept` tells.
    pub fn encode(&self) -> (Vec<u8>, usize) {
        let mut w = self.to_wire();
        let mut len = w.encoded_len();
        let mut kept = 0;
        for o in self.observations.iter().take(MAX_OBSERVATIONS) {
            let one = wire::BeatObservation {
                backend: o.backend.0,
                health: o.health.as_str().to_owned(),
                reason: cut(&o.reason),
            };
            // Two bytes of tag and one or two of length go around it.
            let with = len + one.encoded_len() + 4;
            if with > BEAT_MAX_BYTES {
                break;
            }
            len = with;
            w.observations.push(one);
            kept += 1;
        }
        (w.encode_to_vec(), kept)
    }

    /// Reads a beat.
    ///
    /// # Errors
    /// It is none, or a field has a value that no sender writes.
    pub fn decode(data: &[u8]) -> Result<Beat, BeatError> {
        if data.len() > BEAT_MAX_BYTES {
            return Err(BeatError::Long(data.len()));
        }
        let w = wire::Beat::decode(data).map_err(|e| BeatError::Wire(e.to_string()))?;
        Beat::from_wire(w)
    }

    fn to_wire(&self) -> wire::Beat {
        wire::Beat {
            from: self.from.0,
            instance: self.instance,
            cluster: self.cluster,
            sent_ns: self.sent.0,
            answer: self.answer,
            term: self.term,
            leading: self.leading,
            leader: self.leader.map_or(0, |l| l.0),
            echo: self.echo.map(|e| wire::Echo { instance: e.instance, sent_ns: e.stamp.0, term: e.term }),
            name: cut(&self.identity.name),
            role: self.identity.role.as_str().to_owned(),
            address: self.identity.address.to_string(),
            version: cut(&self.version),
            timing: Some(wire::Timing {
                beat_us: self.timing.beat.as_micros() as u64,
                lease_us: self.timing.lease.as_micros() as u64,
                election_min_us: self.timing.election_min.as_micros() as u64,
                election_max_us: self.timing.election_max.as_micros() as u64,
                drift_ppm: self.timing.drift_ppm,
                grace_us: self.timing.grace.as_micros() as u64,
            }),
            applied: self.applied,
            installed: self.installed,
            health: Some(wire::SelfHealth {
                links_up: self.health.links_up,
                gateway: self.health.gateway,
                forwarding: self.health.forwarding,
                reason: cut(&self.health.reason),
            }),
            resigning: self.resigning,
            support: self.support.map_or(0, |n| n.0),
            contact: self.contact.map(|c| wire::Contact {
                instance: c.instance,
                stamp_ns: c.stamp.0,
                for_ns: c.lasts.as_nanos() as u64,
            }),
            grants: ownerships(self.grants.iter().copied()),
            releases: ownerships(self.releases.iter().copied()),
            released: ownerships(self.released.iter().copied()),
            held: ownerships(self.held.iter().map(|h| h.0)),
            held_left_ms: self.held.iter().take(MAX_OWNERSHIPS).map(|h| h.1.as_millis() as u32).collect(),
            observations: Vec::new(),
            followers: self.followers.as_ref().map(|nodes| wire::Followers {
                nodes: nodes.iter().take(MAX_FOLLOWERS).map(|n| n.0).collect(),
            }),
            told: self.told.iter().take(MAX_OWNERSHIPS).map(|g| g.0).collect(),
            line: self.line,
            met: self.met.map(|e| wire::Echo { instance: e.instance, sent_ns: e.stamp.0, term: e.term }),
        }
    }

    fn from_wire(w: wire::Beat) -> Result<Beat, BeatError> {
        let bad = |field, value: &dyn ToString| BeatError::Field { field, value: value.to_string() };
        let from = RaftId(w.from);
        if from.node().0 == 0 {
            return Err(bad("from", &w.from));
        }
        let address: SocketAddr = w.address.parse().map_err(|_| bad("address", &w.address))?;
        let role = w.role.parse().map_err(|_| bad("role", &w.role))?;
        let health = w.health.unwrap_or_default();
        let t = w.timing.ok_or_else(|| bad("timing", &"absent"))?;
        let held = pairs("held", w.held)?;
        if held.len() != w.held_left_ms.len() {
            return Err(bad("held_left_ms", &w.held_left_ms.len()));
        }
        if w.observations.len() > MAX_OBSERVATIONS {
            return Err(bad("observations", &w.observations.len()));
        }
        let observations = w.observations.into_iter().map(|o| {
            let health: Health = o.health.parse().map_err(|_| bad("observations.health", &o.health))?;
            Ok(Observation { backend: BackendId(o.backend), health, reason: o.reason })
        });
        Ok(Beat {
            from,
            instance: w.instance,
            cluster: w.cluster,
            sent: Instant(w.sent_ns),
            answer: w.answer,
            term: w.term,
            leading: w.leading,
            leader: (w.leader != 0).then_some(RaftId(w.leader)),
            echo: w.echo.map(|e| Echo { instance: e.instance, stamp: Instant(e.sent_ns), term: e.term }),
            identity: Arc::new(NodeIdentity { id: from.node(), name: w.name, role, address }),
            version: w.version.into(),
            timing: Timing {
                beat: Duration::from_micros(t.beat_us),
                lease: Duration::from_micros(t.lease_us),
                election_min: Duration::from_micros(t.election_min_us),
                election_max: Duration::from_micros(t.election_max_us),
                drift_ppm: t.drift_ppm,
                grace: Duration::from_micros(t.grace_us),
            },
            applied: w.applied,
            installed: w.installed,
            health: SelfHealth {
                links_up: health.links_up,
                gateway: health.gateway,
                forwarding: health.forwarding,
                reason: health.reason,
            },
            resigning: w.resigning,
            support: (w.support != 0).then_some(NodeId(w.support)),
            contact: w.contact.map(|c| Contact {
                instance: c.instance,
                stamp: Instant(c.stamp_ns),
                lasts: Duration::from_nanos(c.for_ns),
            }),
            grants: pairs("grants", w.grants)?,
            releases: pairs("releases", w.releases)?,
            released: pairs("released", w.released)?,
            held: held
                .into_iter()
                .zip(w.held_left_ms)
                .map(|(o, left)| (o, Duration::from_millis(u64::from(left))))
                .collect(),
            observations: observations.collect::<Result<_, BeatError>>()?,
            followers: w.followers.map(|f| f.nodes.into_iter().take(MAX_FOLLOWERS).map(NodeId).collect()),
            told: w.told.into_iter().take(MAX_OWNERSHIPS).map(GroupId).collect(),
            line: w.line,
            met: w.met.map(|e| Echo { instance: e.instance, stamp: Instant(e.sent_ns), term: e.term }),
        })
    }
}

/// The first [`MAX_TEXT`] bytes of a text, cut at a character's end.
fn cut(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

fn ownerships(list: impl Iterator<Item = Ownership>) -> Option<wire::Ownerships> {
    let (groups, epochs): (Vec<u32>, Vec<u64>) =
        list.take(MAX_OWNERSHIPS).map(|o| (o.group.0, o.epoch)).unzip();
    (!groups.is_empty()).then_some(wire::Ownerships { groups, epochs })
}

fn pairs(field: &'static str, list: Option<wire::Ownerships>) -> Result<Vec<Ownership>, BeatError> {
    let list = list.unwrap_or_default();
    if list.groups.len() != list.epochs.len() || list.groups.len() > MAX_OWNERSHIPS {
        return Err(BeatError::Field {
            field,
            value: format!("{} groups, {} epochs", list.groups.len(), list.epochs.len()),
        });
    }
    Ok(list
        .groups
        .into_iter()
        .zip(list.epochs)
        .map(|(g, epoch)| Ownership { group: GroupId(g), epoch })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use komainu_proto::domain::Role;
    use proptest::prelude::*;

    fn beat(ownerships: usize, observations: usize, text: &str) -> Beat {
        let owned: Vec<Ownership> = (0..ownerships)
            .map(|i| Ownership { group: GroupId(300 + i as u32), epoch: (64 << 12) + i as u64 })
            .collect();
        Beat {
            from: RaftId::new(NodeId(7), u64::MAX),
            instance: u64::MAX,
            cluster: u64::MAX,
            sent: Instant(u64::MAX),
            answer: true,
            term: 1 << 20,
            leading: true,
            leader: Some(RaftId::new(NodeId(7), u64::MAX)),
            echo: Some(Echo { instance: u64::MAX, stamp: Instant(u64::MAX), term: 1 << 20 }),
            identity: Arc::new(NodeIdentity {
                id: NodeId(7),
                name: text.to_owned(),
                role: Role::Balancer,
                address: "[2001:db8:1111:2222:3333:4444:5555:6666]:65535".parse().unwrap(),
            }),
            version: text.into(),
            timing: Timing::default(),
            applied: 1 << 40,
            installed: 1 << 40,
            health: SelfHealth {
                links_up: true,
                gateway: Some(false),
                forwarding: true,
                reason: text.to_owned(),
            },
            resigning: true,
            support: Some(NodeId(65535)),
            contact: Some(Contact {
                instance: u64::MAX,
                stamp: Instant(u64::MAX),
                lasts: Duration::from_millis(80),
            }),
            grants: owned.clone(),
            releases: owned[..ownerships / 8].to_vec(),
            released: owned[..ownerships / 8].to_vec(),
            held: owned.iter().take(ownerships / 2).map(|&o| (o, Duration::from_millis(60))).collect(),
            followers: Some(vec![NodeId(65_535); 15]),
            told: Vec::new(),
            line: 1 << 20,
            met: Some(Echo { instance: u64::MAX, stamp: Instant(u64::MAX), term: 1 << 20 }),
            observations: (0..observations)
                .map(|i| Observation {
                    backend: BackendId(i as u32),
                    health: Health::Down,
                    reason: text.to_owned(),
                })
                .collect(),
        }
    }

    #[test]
    fn survives_the_wire() {
        let b = beat(3, 2, "200 OK in 3 ms");
        let (bytes, kept) = b.encode();
        assert_eq!(kept, 2);
        assert_eq!(Beat::decode(&bytes).unwrap(), b);
    }

    #[test]
    fn stays_below_its_limit_with_every_list_full() {
        let b = beat(MAX_OWNERSHIPS, MAX_OBSERVATIONS, &"long name ".repeat(20));
        let (bytes, kept) = b.encode();
        assert!(bytes.len() <= BEAT_MAX_BYTES, "{}", bytes.len());
        assert!(kept < MAX_OBSERVATIONS);
        assert_eq!(Beat::decode(&bytes).unwrap().grants, b.grants);
    }

    /// What only a leader says is not there, and the other way round.
    #[test]
    fn a_followers_beat_stays_below_its_limit_with_every_list_full() {
        let full = beat(MAX_OWNERSHIPS, MAX_OBSERVATIONS, &"long name ".repeat(20));
        let told = full.grants.iter().map(|o| o.group).collect();
        let b =
            Beat { leading: false, contact: None, grants: Vec::new(), releases: Vec::new(), told, ..full };
        let (bytes, _) = b.encode();
        assert!(bytes.len() <= BEAT_MAX_BYTES, "{}", bytes.len());
        assert_eq!(Beat::decode(&bytes).unwrap().told, b.told);
    }

    #[test]
    fn refuses_lists_that_do_not_pair() {
        let mut w = beat(2, 0, "").to_wire();
        w.grants.as_mut().unwrap().epochs.pop();
        assert!(matches!(Beat::decode(&w.encode_to_vec()), Err(BeatError::Field { field: "grants", .. })));
    }

    proptest! {
        #[test]
        fn never_panics_on_any_datagram(data in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Beat::decode(&data);
        }
    }
}
