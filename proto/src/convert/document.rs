//! The cluster document: `komainu.admin.v1` ⇄ [`crate::domain`].
//!
//! Domain → wire can't fail. Wire → domain checks what a type can check (addresses, ports, words) and fills in
//! defaults; whether the document makes sense as a whole is the business of the cluster's state machine.

use std::net::IpAddr;

use super::ConvertError;
use crate::{admin as wire, domain};

/// Maps an enum both ways. The unspecified value becomes `$default`, or is refused where there is none.
macro_rules! words {
    ($domain:ident, $wire:ident, $field:literal, default $default:expr, { $($d:ident = $w:ident),+ $(,)? }) => {
        impl From<domain::$domain> for wire::$wire {
            fn from(value: domain::$domain) -> Self {
                match value { $(domain::$domain::$d => wire::$wire::$w),+ }
            }
        }

        impl TryFrom<wire::$wire> for domain::$domain {
            type Error = ConvertError;

            fn try_from(value: wire::$wire) -> Result<Self, ConvertError> {
                match value {
                    wire::$wire::Unspecified => Option::<domain::$domain>::from($default).ok_or_else(|| {
                        let words: Vec<&str> = domain::$domain::ALL.iter().map(|w| w.as_str()).collect();
                        ConvertError::new($field, "", format!("is missing: give one of {}", words.join(" | ")))
                    }),
                    $(wire::$wire::$w => Ok(domain::$domain::$d)),+
                }
            }
        }

        impl domain::$domain {
            /// From the number in a wire message.
            ///
            /// # Errors
            /// The number stands for no word that this version knows, or a word is missing that has no default.
            pub fn from_wire(number: i32) -> Result<Self, ConvertError> {
                wire::$wire::try_from(number)
                    .map_err(|_| ConvertError::new($field, number, "is not known to this version"))?
                    .try_into()
            }

            /// To the number in a wire message.
            pub fn to_wire(self) -> i32 {
                wire::$wire::from(self) as i32
            }
        }
    };
}

words!(Role, Role, "role", default None, { Balancer = Balancer, Witness = Witness });
words!(Protocol, Protocol, "protocol", default domain::Protocol::Tcp, { Tcp = Tcp, Udp = Udp });
words!(Mode, Mode, "mode", default None, {
    Nat = Nat, NatTransparent = NatTransparent, Dsr = Dsr, Tunnel = Tunnel,
});
words!(Scheduler, Scheduler, "scheduler", default domain::Scheduler::Maglev, {
    Maglev = Maglev, RoundRobin = RoundRobin, LeastConn = LeastConn, SourceIp = SourceIp,
});
words!(DeadBackend, DeadBackend, "dead_backend", default domain::DeadBackend::Reset, {
    Reset = Reset, Rehash = Rehash, Keep = Keep,
});
words!(UdpFlows, UdpFlows, "udp_flows", default domain::UdpFlows::Table, { Table = Table, Hash = Hash });
words!(AdminState, AdminState, "admin", default None, {
    Enabled = Enabled, Draining = Draining, Disabled = Disabled,
});
words!(Health, Health, "health", default domain::Health::Unknown, { Up = Up, Down = Down, Unknown = Unknown });
words!(CheckType, CheckType, "type", default domain::CheckType::Tcp, {
    Tcp = Tcp, Http = Http, Https = Https, Icmp = Icmp, Udp = Udp, Dns = Dns, Grpc = Grpc, None = None,
});

impl From<&domain::Document> for wire::Document {
    fn from(document: &domain::Document) -> Self {
        wire::Document {
            groups: document.groups.iter().map(Into::into).collect(),
            services: document.services.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<&wire::Document> for domain::Document {
    type Error = ConvertError;

    fn try_from(document: &wire::Document) -> Result<Self, ConvertError> {
        Ok(domain::Document {
            groups: document
                .groups
                .iter()
                .map(|g| g.try_into().map_err(|e: ConvertError| e.within(&format!("group[{}]", g.name))))
                .collect::<Result<_, _>>()?,
            services: document
                .services
                .iter()
                .map(|s| s.try_into().map_err(|e: ConvertError| e.within(&format!("service[{}]", s.name))))
                .collect::<Result<_, _>>()?,
        })
    }
}

impl From<&domain::Group> for wire::Group {
    fn from(group: &domain::Group) -> Self {
        wire::Group {
            name: group.name.clone(),
            vips: texts(&group.vips),
            inside_vips: texts(&group.inside_vips),
            snat: texts(&group.snat),
            prefer: group.prefer.clone(),
            preempt: group.preempt,
        }
    }
}

impl TryFrom<&wire::Group> for domain::Group {
    type Error = ConvertError;

    fn try_from(group: &wire::Group) -> Result<Self, ConvertError> {
        Ok(domain::Group {
            name: group.name.clone(),
            vips: addresses("vips", &group.vips)?,
            inside_vips: addresses("inside_vips", &group.inside_vips)?,
            snat: addresses("snat", &group.snat)?,
            prefer: group.prefer.clone(),
            preempt: group.preempt,
        })
    }
}

impl From<&domain::Service> for wire::Service {
    fn from(service: &domain::Service) -> Self {
        wire::Service {
            name: service.name.clone(),
            group: service.group.clone(),
            vip: service.vip.to_string(),
            port: service.port.into(),
            protocol: service.protocol.to_wire(),
            mode: service.mode.to_wire(),
            scheduler: service.scheduler.to_wire(),
            dead_backend: service.dead_backend.to_wire(),
            udp_flows: service.udp_flows.to_wire(),
            tcp_idle_ms: Some(service.tcp_idle_ms),
            udp_idle_ms: Some(service.udp_idle_ms),
            health: Some((&service.health).into()),
            backends: service.backends.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<&wire::Service> for domain::Service {
    type Error = ConvertError;

    fn try_from(service: &wire::Service) -> Result<Self, ConvertError> {
        let health = match &service.health {
            Some(health) => health.try_into().map_err(|e: ConvertError| e.within("health"))?,
            None => domain::HealthCheck::default(),
        };
        Ok(domain::Service {
            name: service.name.clone(),
            group: service.group.clone(),
            vip: address("vip", &service.vip)?,
            port: port("port", service.port)?,
            protocol: domain::Protocol::from_wire(service.protocol)?,
            mode: domain::Mode::from_wire(service.mode)?,
            scheduler: domain::Scheduler::from_wire(service.scheduler)?,
            dead_backend: domain::DeadBackend::from_wire(service.dead_backend)?,
            udp_flows: domain::UdpFlows::from_wire(service.udp_flows)?,
            tcp_idle_ms: service.tcp_idle_ms.unwrap_or(domain::DEFAULT_TCP_IDLE_MS),
            udp_idle_ms: service.udp_idle_ms.unwrap_or(domain::DEFAULT_UDP_IDLE_MS),
            health,
            backends: service
                .backends
                .iter()
                .map(|b| b.try_into().map_err(|e: ConvertError| e.within(&format!("backend[{}]", b.name))))
                .collect::<Result<_, _>>()?,
        })
    }
}

impl From<&domain::HealthCheck> for wire::HealthCheck {
    fn from(check: &domain::HealthCheck) -> Self {
        wire::HealthCheck {
            r#type: check.kind.to_wire(),
            port: check.port.map(Into::into),
            path: Some(check.path.clone()),
            host: check.host.clone(),
            expect_status_min: Some(check.expect_status.0.into()),
            expect_status_max: Some(check.expect_status.1.into()),
            tls_verify: check.tls_verify,
            interval_ms: Some(check.interval_ms),
            timeout_ms: Some(check.timeout_ms),
            rise: Some(check.rise),
            fall: Some(check.fall),
        }
    }
}

impl TryFrom<&wire::HealthCheck> for domain::HealthCheck {
    type Error = ConvertError;

    fn try_from(check: &wire::HealthCheck) -> Result<Self, ConvertError> {
        let default = domain::HealthCheck::default();
        Ok(domain::HealthCheck {
            kind: domain::CheckType::from_wire(check.r#type)?,
            port: check.port.map(|p| port("port", p)).transpose()?,
            path: check.path.clone().unwrap_or(default.path),
            host: check.host.clone(),
            expect_status: (
                status("expect_status_min", check.expect_status_min, default.expect_status.0)?,
                status("expect_status_max", check.expect_status_max, default.expect_status.1)?,
            ),
            tls_verify: check.tls_verify,
            interval_ms: check.interval_ms.unwrap_or(default.interval_ms),
            timeout_ms: check.timeout_ms.unwrap_or(default.timeout_ms),
            rise: check.rise.unwrap_or(default.rise),
            fall: check.fall.unwrap_or(default.fall),
        })
    }
}

impl From<&domain::Backend> for wire::Backend {
    fn from(backend: &domain::Backend) -> Self {
        wire::Backend {
            name: backend.name.clone(),
            address: backend.address.to_string(),
            port: backend.port.into(),
            weight: Some(backend.weight),
            admin: backend.admin.map_or(0, domain::AdminState::to_wire),
        }
    }
}

impl TryFrom<&wire::Backend> for domain::Backend {
    type Error = ConvertError;

    fn try_from(backend: &wire::Backend) -> Result<Self, ConvertError> {
        Ok(domain::Backend {
            name: backend.name.clone(),
            address: address("address", &backend.address)?,
            port: port("port", backend.port)?,
            weight: backend.weight.unwrap_or(domain::DEFAULT_WEIGHT),
            admin: match backend.admin {
                0 => None,
                number => Some(domain::AdminState::from_wire(number)?),
            },
        })
    }
}

fn texts(addresses: &[IpAddr]) -> Vec<String> {
    addresses.iter().map(IpAddr::to_string).collect()
}

fn addresses(field: &str, texts: &[String]) -> Result<Vec<IpAddr>, ConvertError> {
    texts.iter().map(|text| address(field, text)).collect()
}

fn address(field: &str, text: &str) -> Result<IpAddr, ConvertError> {
    text.parse().map_err(|_| ConvertError::new(field, text, "is not an IPv4 or IPv6 address"))
}

fn port(field: &str, number: u32) -> Result<u16, ConvertError> {
    u16::try_from(number)
        .ok()
        .filter(|&port| port != 0)
        .ok_or_else(|| ConvertError::new(field, number, "is not a port: give 1..=65535"))
}

fn status(field: &str, number: Option<u32>, default: u16) -> Result<u16, ConvertError> {
    match number {
        None => Ok(default),
        Some(number) => {
            u16::try_from(number).map_err(|_| ConvertError::new(field, number, "is not an HTTP status"))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    fn any_name() -> impl Strategy<Value = String> {
        "[a-z][a-z0-9-]{0,12}"
    }

    fn any_address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
    }

    fn any_addresses() -> impl Strategy<Value = Vec<IpAddr>> {
        proptest::collection::vec(any_address(), 0..3)
    }

    fn any_group() -> impl Strategy<Value = domain::Group> {
        (
            any_name(),
            any_addresses(),
            any_addresses(),
            any_addresses(),
            proptest::option::of(any_name()),
            any::<bool>(),
        )
            .prop_map(|(name, vips, inside_vips, snat, prefer, preempt)| domain::Group {
                name,
                vips,
                inside_vips,
                snat,
                prefer,
                preempt,
            })
    }

    fn any_check() -> impl Strategy<Value = domain::HealthCheck> {
        (
            (
                select(domain::CheckType::ALL),
                proptest::option::of(1..=u16::MAX),
                "/[a-z]{0,8}",
                proptest::option::of(any_name()),
                any::<(u16, u16)>(),
            ),
            (any::<bool>(), any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>()),
        )
            .prop_map(
                |(
                    (kind, port, path, host, expect_status),
                    (tls_verify, interval_ms, timeout_ms, rise, fall),
                )| {
                    domain::HealthCheck {
                        kind,
                        port,
                        path,
                        host,
                        expect_status,
                        tls_verify,
                        interval_ms,
                        timeout_ms,
                        rise,
                        fall,
                    }
                },
            )
    }

    fn any_backend() -> impl Strategy<Value = domain::Backend> {
        (
            any_name(),
            any_address(),
            1..=u16::MAX,
            any::<u32>(),
            proptest::option::of(select(domain::AdminState::ALL)),
        )
            .prop_map(|(name, address, port, weight, admin)| domain::Backend {
                name,
                address,
                port,
                weight,
                admin,
            })
    }

    fn any_service() -> impl Strategy<Value = domain::Service> {
        (
            (any_name(), any_name(), any_address(), 1..=u16::MAX),
            (
                select(domain::Protocol::ALL),
                select(domain::Mode::ALL),
                select(domain::Scheduler::ALL),
                select(domain::DeadBackend::ALL),
                select(domain::UdpFlows::ALL),
            ),
            (any::<u32>(), any::<u32>(), any_check(), proptest::collection::vec(any_backend(), 0..3)),
        )
            .prop_map(
                |(
                    (name, group, vip, port),
                    (protocol, mode, scheduler, dead_backend, udp_flows),
                    (tcp_idle_ms, udp_idle_ms, health, backends),
                )| {
                    domain::Service {
                        name,
                        group,
                        vip,
                        port,
                        protocol,
                        mode,
                        scheduler,
                        dead_backend,
                        udp_flows,
                        tcp_idle_ms,
                        udp_idle_ms,
                        health,
                        backends,
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn a_document_survives_the_wire(
            groups in proptest::collection::vec(any_group(), 0..3),
            services in proptest::collection::vec(any_service(), 0..3),
        ) {
            use prost::Message;
            let document = domain::Document { groups, services };
            let bytes = wire::Document::from(&document).encode_to_vec();
            let back = wire::Document::decode(bytes.as_slice()).expect("just encoded");
            prop_assert_eq!(domain::Document::try_from(&back).expect("came from a document"), document);
        }
    }

    fn service() -> wire::Service {
        wire::Service {
            name: "web".into(),
            vip: "192.0.2.100".into(),
            port: 80,
            mode: wire::Mode::Dsr as i32,
            backends: vec![wire::Backend {
                name: "be1".into(),
                address: "192.0.2.1".into(),
                port: 80,
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn absent_fields_take_their_default() {
        let service = domain::Service::try_from(&service()).unwrap();
        assert_eq!(service.protocol, domain::Protocol::Tcp);
        assert_eq!(service.scheduler, domain::Scheduler::Maglev);
        assert_eq!(service.health, domain::HealthCheck::default());
        assert_eq!(service.tcp_idle_ms, domain::DEFAULT_TCP_IDLE_MS);
        assert_eq!(service.backends[0].weight, domain::DEFAULT_WEIGHT);
        assert_eq!(service.backends[0].admin, None);
    }

    #[test]
    fn weight_zero_stays_zero() {
        let mut wire = service();
        wire.backends[0].weight = Some(0);
        assert_eq!(domain::Service::try_from(&wire).unwrap().backends[0].weight, 0);
    }

    #[test]
    fn a_mistake_names_field_and_value() {
        type Break = fn(&mut wire::Service);
        let rows: &[(Break, &str, &str)] = &[
            (|s| s.vip = "nonsense".into(), "service[web].vip", "nonsense"),
            (|s| s.port = 0, "service[web].port", "0"),
            (|s| s.port = 65536, "service[web].port", "65536"),
            (|s| s.mode = 0, "service[web].mode", ""),
            (|s| s.scheduler = 99, "service[web].scheduler", "99"),
            (|s| s.backends[0].address = "::1::".into(), "service[web].backend[be1].address", "::1::"),
            (|s| s.backends[0].port = 70000, "service[web].backend[be1].port", "70000"),
            (
                |s| s.health = Some(wire::HealthCheck { port: Some(0), ..Default::default() }),
                "service[web].health.port",
                "0",
            ),
        ];
        for (spoil, field, value) in rows {
            let mut wrong = service();
            spoil(&mut wrong);
            let document = wire::Document { groups: vec![], services: vec![wrong] };
            let error = domain::Document::try_from(&document).unwrap_err();
            assert_eq!((error.field.as_str(), error.value.as_str()), (*field, *value));
        }
    }
}
