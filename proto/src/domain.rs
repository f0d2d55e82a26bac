//! What the cluster agrees on: the cluster document and the state that belongs to it.
//!
//! Two kinds of state are never mixed: what the operator wants ([`AdminState`]) and what the checks saw ([`Health`]).

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Number of a node as its node file states it; unique in the cluster and never reused. Range 1..=65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u64);

/// Number that the cluster gives a VIP group when it first sees its name. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GroupId(pub u32);

/// Number that the cluster gives a virtual service when it first sees its name. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServiceId(pub u32);

/// Number that the cluster gives a backend (`service/backend`) when it first sees its name. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BackendId(pub u32);

/// Declares an enum with one lower-case word for each variant, used alike in files, CLI, JSON and logs. The calling crate
/// depends on `serde`.
#[macro_export]
macro_rules! words {
    ($(#[$meta:meta])* $name:ident, $what:literal { $($(#[$vmeta:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ::serde::Serialize, ::serde::Deserialize)]
        pub enum $name { $($(#[$vmeta])* #[serde(rename = $word)] $variant),+ }

        impl $name {
            /// Every value, in the order of the documentation.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The word used in files, CLI, JSON and logs.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word),+ }
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result { f.write_str(self.as_str()) }
        }

        impl ::std::str::FromStr for $name {
            type Err = $crate::domain::UnknownWord;

            fn from_str(s: &str) -> Result<Self, $crate::domain::UnknownWord> {
                match s {
                    $($word => Ok($name::$variant),)+
                    _ => Err($crate::domain::UnknownWord {
                        what: $what,
                        value: s.to_owned(),
                        expected: [$($word),+].join(" | "),
                    }),
                }
            }
        }
    };
}

/// A word that is none of those allowed at its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is \"{value}\", expected {expected}")]
pub struct UnknownWord {
    /// What the word stands for.
    pub what: &'static str,
    /// The word as given.
    pub value: String,
    /// The words allowed.
    pub expected: String,
}

words! {
    /// Part that a node plays.
    Role, "role" {
        /// Has a data path and can own VIP groups.
        Balancer = "balancer",
        /// Votes only.
        Witness = "witness",
    }
}

words! {
    /// Layer-4 protocol of a virtual service.
    Protocol, "protocol" {
        /// Transmission Control Protocol (RFC 9293).
        Tcp = "tcp",
        /// User Datagram Protocol (RFC 768).
        Udp = "udp",
    }
}

words! {
    /// How a virtual service's packets reach its backends.
    Mode, "mode" {
        /// Full NAT: the source becomes a SNAT address of the group, the destination the backend.
        Nat = "nat",
        /// Only the destination is rewritten; backends route back through the group's inside VIP.
        NatTransparent = "nat-transparent",
        /// Direct server return: only the destination MAC is rewritten.
        Dsr = "dsr",
        /// Encapsulated to backends anywhere.
        Tunnel = "tunnel",
    }
}

words! {
    /// How a virtual service chooses a backend for a new flow.
    Scheduler, "scheduler" {
        /// Maglev consistent hashing (Eisenbud et al., NSDI 2016, §3.4).
        Maglev = "maglev",
        /// In turn, by weight.
        RoundRobin = "round_robin",
        /// Fewest flows relative to weight.
        LeastConn = "least_conn",
        /// By the client address alone.
        SourceIp = "source_ip",
    }
}

words! {
    /// What happens to a flow whose backend is dead.
    DeadBackend, "dead_backend" {
        /// A TCP RST to the client; other protocols are dropped.
        Reset = "reset",
        /// The flow is given to the current backend of its slot.
        Rehash = "rehash",
        /// The flow stays with its backend, which may come back.
        Keep = "keep",
    }
}

words! {
    /// Whether flows of a UDP service are remembered.
    UdpFlows, "udp_flows" {
        /// Remembered, with an idle timeout.
        Table = "table",
        /// Not remembered: each datagram goes where the hash says.
        Hash = "hash",
    }
}

words! {
    /// What the operator wants of a backend.
    AdminState, "admin" {
        /// Takes new flows.
        Enabled = "enabled",
        /// Keeps its flows and takes no new ones.
        Draining = "draining",
        /// Takes nothing.
        Disabled = "disabled",
    }
}

words! {
    /// What the checks saw of a backend.
    Health, "health" {
        /// Enough checks in a row succeeded.
        Up = "up",
        /// Enough checks in a row failed.
        Down = "down",
        /// Not enough checks yet.
        Unknown = "unknown",
    }
}

words! {
    /// Kind of a health check.
    CheckType, "health.type" {
        /// A TCP connection is accepted.
        Tcp = "tcp",
        /// HTTP GET answers with an expected status.
        Http = "http",
        /// The same over TLS.
        Https = "https",
        /// ICMP or ICMPv6 echo is answered.
        Icmp = "icmp",
        /// A UDP datagram is answered, or at least not refused.
        Udp = "udp",
        /// A DNS query is answered.
        Dns = "dns",
        /// The standard gRPC health service says SERVING.
        Grpc = "grpc",
        /// No check: always up.
        None = "none",
    }
}

/// Idle time of an established TCP flow when the document gives none: 15 minutes, as in the kernel's IPVS.
pub const DEFAULT_TCP_IDLE_MS: u32 = 900_000;
/// Idle time of a UDP flow when the document gives none.
pub const DEFAULT_UDP_IDLE_MS: u32 = 60_000;
/// Weight of a backend when the document gives none.
pub const DEFAULT_WEIGHT: u32 = 1;

/// The cluster document: the one thing that operators edit and the cluster replicates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// VIP groups, unique by name.
    pub groups: Vec<Group>,
    /// Virtual services, unique by name.
    pub services: Vec<Service>,
}

/// VIPs that move together; the unit of ownership.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Unique name.
    pub name: String,
    /// Addresses that clients use.
    pub vips: Vec<IpAddr>,
    /// Addresses on the inside network that backends of `nat-transparent` services route back through.
    pub inside_vips: Vec<IpAddr>,
    /// Source addresses of `nat` services.
    pub snat: Vec<IpAddr>,
    /// Name of the node that should own the group when it can.
    pub prefer: Option<String>,
    /// Whether the preferred node takes the group back from a healthy owner.
    pub preempt: bool,
}

/// VIP + protocol + port with a forwarding mode, a scheduler and a health check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Unique name.
    pub name: String,
    /// Name of the group that `vip` belongs to.
    pub group: String,
    /// One of the group's VIPs.
    pub vip: IpAddr,
    /// Destination port, 1..=65535.
    pub port: u16,
    /// Layer-4 protocol.
    pub protocol: Protocol,
    /// Forwarding mode.
    pub mode: Mode,
    /// Scheduler.
    pub scheduler: Scheduler,
    /// Dead-backend policy.
    pub dead_backend: DeadBackend,
    /// Whether UDP flows are remembered. No meaning for TCP.
    pub udp_flows: UdpFlows,
    /// Idle time in ms after which an established TCP flow is forgotten, 1 s..=24 h.
    pub tcp_idle_ms: u32,
    /// Idle time in ms after which a UDP flow is forgotten, 1 s..=1 h.
    pub udp_idle_ms: u32,
    /// Health check.
    pub health: HealthCheck,
    /// Real servers, unique by name within the service.
    pub backends: Vec<Backend>,
}

/// How backends of a service are checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// Kind.
    pub kind: CheckType,
    /// Port to check; the backend's own when absent.
    pub port: Option<u16>,
    /// `http`/`https`: request path, starting with `/`.
    pub path: String,
    /// `http`/`https`: Host header and TLS server name; the backend's address when absent.
    pub host: Option<String>,
    /// `http`/`https`: statuses that count as success, inclusive range.
    pub expect_status: (u16, u16),
    /// `https`: whether the certificate is verified.
    pub tls_verify: bool,
    /// Time between checks in ms, 50..=3 600 000.
    pub interval_ms: u32,
    /// Time after which a check has failed in ms, 10..=60 000 and at most `interval_ms`.
    pub timeout_ms: u32,
    /// Successes in a row that make a backend up, 1..=100.
    pub rise: u32,
    /// Failures in a row that make a backend down, 1..=100.
    pub fall: u32,
}

/// A real server of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Name, unique within the service.
    pub name: String,
    /// Address; same family as the service's VIP.
    pub address: IpAddr,
    /// Port, 1..=65535. Equals the service's port in `dsr`.
    pub port: u16,
    /// Share of new flows relative to the others, 0..=1000. 0 takes no new flows.
    pub weight: u32,
    /// Administrative state to set. Absent: keep what is in force (`enabled` for a new backend), so that applying a
    /// file again does not end somebody's maintenance.
    pub admin: Option<AdminState>,
}

impl Default for HealthCheck {
    fn default() -> Self {
        HealthCheck {
            kind: CheckType::Tcp,
            port: None,
            path: "/".to_owned(),
            host: None,
            expect_status: (200, 399),
            tls_verify: false,
            interval_ms: 1000,
            timeout_ms: 500,
            rise: 2,
            fall: 3,
        }
    }
}
