//! Cluster document ⇄ TOML.
//!
//! Reading checks what a value can be by itself; whether the document makes sense as a whole is decided by the
//! cluster's state machine, the same for files, small verbs and other clients of the API. Its problems name fields by
//! position, and [`Lines`] finds the line for each.

use std::collections::BTreeMap;
use std::net::IpAddr;

use komainu_proto::domain::{
    AdminState, Backend, CheckType, DEFAULT_TCP_IDLE_MS, DEFAULT_UDP_IDLE_MS, DEFAULT_WEIGHT, DeadBackend,
    Document, Group, HealthCheck, Mode, Protocol, Scheduler, Service, UdpFlows,
};
use serde::Serialize;
use toml::de::DeValue;

use super::mistake::ConfigError;
use super::reader::{self, FromToml, Note, Section, Source, Word};

/// A cluster document as read from a file.
#[derive(Debug)]
pub struct Parsed {
    /// The document with every default filled in.
    pub document: Document,
    /// Where each field stands in the file.
    pub lines: Lines,
}

/// Line of every field of a file.
#[derive(Clone, Debug, Default)]
pub struct Lines(BTreeMap<String, usize>);

impl Lines {
    /// Line of a field given by position (`service[0].backend[1].port`); names in between (`service[0] "web".…`) are
    /// allowed. Of a field that is not written, the line of the innermost table that is.
    pub fn find(&self, field: &str) -> Option<usize> {
        let mut path = strip_names(field);
        loop {
            if let Some(line) = self.0.get(&path) {
                return Some(*line);
            }
            path.truncate(path.rfind(['.', '['])?);
        }
    }
}

/// `service[0] "web".port` → `service[0].port`.
fn strip_names(field: &str) -> String {
    let mut path = String::with_capacity(field.len());
    let mut quoted = false;
    for c in field.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' => {}
            c if !quoted => path.push(c),
            _ => {}
        }
    }
    path
}

/// Reads a cluster document.
///
/// # Errors
/// Everything that is wrong with the file.
pub fn parse(file: &str, text: &str) -> Result<Parsed, ConfigError> {
    let read = Source::new(file, text).read(|root| {
        // A file that was cut off or mixed up must not take everything down.
        if !root.has("group") && !root.has("service") {
            root.empty(
                "says nothing: it has neither [[group]] nor [[service]]",
                "give a cluster document; one that is to remove everything says group = []",
            );
        }
        let groups: Vec<Option<Group>> = root.sections("group").into_iter().map(group).collect();
        let services: Vec<Option<Service>> = root.sections("service").into_iter().map(service).collect();
        Some(Document {
            groups: groups.into_iter().collect::<Option<_>>()?,
            services: services.into_iter().collect::<Option<_>>()?,
        })
    })?;
    Ok(Parsed { document: read.value, lines: Lines(read.lines) })
}

fn group(mut section: Section<'_>) -> Option<Group> {
    let name: Option<String> = section.required("name", "add name = \"…\"");
    let vips: Option<Vec<IpAddr>> = section.required("vips", "add vips = [\"…\"]");
    let inside_vips = section.or("inside_vips", Vec::new());
    let snat = section.or("snat", Vec::new());
    let prefer = optional(&mut section, "prefer");
    let preempt = section.or("preempt", false);
    section.finish();
    Some(Group {
        name: name?,
        vips: vips?,
        inside_vips: inside_vips?,
        snat: snat?,
        prefer: prefer?,
        preempt: preempt?,
    })
}

/// A mode. `tunnel` is known, so that it can be refused with a reason, but nobody is advised to write it.
struct ModeWord(Mode);

impl FromToml for ModeWord {
    fn from_toml(value: &DeValue<'_>, field: &str, note: &mut Note<'_>) -> Option<Self> {
        reader::word(value, field, note, Some("nat | nat-transparent | dsr")).map(ModeWord)
    }
}

fn service(mut section: Section<'_>) -> Option<Service> {
    let name: Option<String> = section.required("name", "add name = \"…\"");
    let group: Option<String> = section.required("group", "add group = \"…\", the name of a [[group]]");
    let vip: Option<IpAddr> = section.required("vip", "add vip = \"…\", one of the group's vips");
    let port = port(&mut section, "port");
    let protocol = section.or("protocol", Word(Protocol::Tcp));
    let mode: Option<ModeWord> =
        section.required("mode", "add mode = \"nat\", \"nat-transparent\" or \"dsr\"");
    let scheduler = section.or("scheduler", Word(Scheduler::Maglev));
    let dead_backend = section.or("dead_backend", Word(DeadBackend::Reset));
    let udp_flows = section.or("udp_flows", Word(UdpFlows::Table));
    let tcp_idle_ms = section.or("tcp_idle_ms", DEFAULT_TCP_IDLE_MS);
    let udp_idle_ms = section.or("udp_idle_ms", DEFAULT_UDP_IDLE_MS);
    let health = match section.section("health") {
        Some(section) => health(section),
        None => Some(HealthCheck::default()),
    };
    let backends: Vec<Option<Backend>> = section.sections("backend").into_iter().map(backend).collect();
    section.finish();
    Some(Service {
        name: name?,
        group: group?,
        vip: vip?,
        port: port?,
        protocol: protocol?.0,
        mode: mode?.0,
        scheduler: scheduler?.0,
        dead_backend: dead_backend?.0,
        udp_flows: udp_flows?.0,
        tcp_idle_ms: tcp_idle_ms?,
        udp_idle_ms: udp_idle_ms?,
        health: health?,
        backends: backends.into_iter().collect::<Option<_>>()?,
    })
}

fn health(mut section: Section<'_>) -> Option<HealthCheck> {
    let default = HealthCheck::default();
    let kind = section.or("type", Word(default.kind));
    let own_port = optional(&mut section, "port");
    if own_port == Some(Some(0)) {
        section.wrong("port", "is not a port", "give 1..=65535, or leave it out for the backend's own");
    }
    let path = section.or("path", default.path);
    let host = optional(&mut section, "host");
    let expect_status = expect_status(&mut section, default.expect_status);
    let tls_verify = section.or("tls_verify", default.tls_verify);
    let interval_ms = section.or("interval_ms", default.interval_ms);
    let timeout_ms = section.or("timeout_ms", default.timeout_ms);
    let rise = section.or("rise", default.rise);
    let fall = section.or("fall", default.fall);
    section.finish();
    Some(HealthCheck {
        kind: kind?.0,
        port: own_port?,
        path: path?,
        host: host?,
        expect_status: expect_status?,
        tls_verify: tls_verify?,
        interval_ms: interval_ms?,
        timeout_ms: timeout_ms?,
        rise: rise?,
        fall: fall?,
    })
}

/// `expect_status = 200` or `[200, 399]`.
fn expect_status(section: &mut Section<'_>, default: (u16, u16)) -> Option<(u16, u16)> {
    if section.is_integer("expect_status") {
        return section.optional("expect_status").map(|status| (status, status));
    }
    let range = section.or("expect_status", vec![default.0, default.1])?;
    match range[..] {
        [min, max] => Some((min, max)),
        _ => {
            section.wrong("expect_status", "is not a range", "write one status, or [lowest, highest]");
            None
        }
    }
}

fn backend(mut section: Section<'_>) -> Option<Backend> {
    let name: Option<String> = section.required("name", "add name = \"…\"");
    let address: Option<IpAddr> = section.required("address", "add address = \"…\"");
    let port = port(&mut section, "port");
    let weight = section.or("weight", DEFAULT_WEIGHT);
    let admin: Option<Option<Word<AdminState>>> = optional(&mut section, "admin");
    section.finish();
    Some(Backend {
        name: name?,
        address: address?,
        port: port?,
        weight: weight?,
        admin: admin?.map(|word| word.0),
    })
}

fn port(section: &mut Section<'_>, key: &'static str) -> Option<u16> {
    let port: u16 = section.required(key, "add port = N")?;
    if port == 0 {
        section.wrong(key, "is not a port", "give 1..=65535");
        return None;
    }
    Some(port)
}

/// `Some(None)` when absent, `None` when wrong.
fn optional<T: super::reader::FromToml>(section: &mut Section<'_>, key: &'static str) -> Option<Option<T>> {
    let written = section.has(key);
    match section.optional(key) {
        Some(value) => Some(Some(value)),
        None if written => None,
        None => Some(None),
    }
}

/// Writes a document so that [`parse`] gives the same document back.
pub fn to_toml(document: &Document) -> String {
    if document.groups.is_empty() && document.services.is_empty() {
        return "group = []\nservice = []\n".to_owned();
    }
    let raw = RawDocument {
        group: document.groups.iter().map(RawGroup::from).collect(),
        service: document.services.iter().map(RawService::from).collect(),
    };
    toml::to_string_pretty(&raw).expect("tables with string keys and no map among the values before them")
}

#[derive(Serialize)]
struct RawDocument<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    group: Vec<RawGroup<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    service: Vec<RawService<'a>>,
}

#[derive(Serialize)]
struct RawGroup<'a> {
    name: &'a str,
    vips: &'a [IpAddr],
    #[serde(skip_serializing_if = "<[IpAddr]>::is_empty")]
    inside_vips: &'a [IpAddr],
    #[serde(skip_serializing_if = "<[IpAddr]>::is_empty")]
    snat: &'a [IpAddr],
    #[serde(skip_serializing_if = "Option::is_none")]
    prefer: Option<&'a str>,
    preempt: bool,
}

impl<'a> From<&'a Group> for RawGroup<'a> {
    fn from(group: &'a Group) -> Self {
        RawGroup {
            name: &group.name,
            vips: &group.vips,
            inside_vips: &group.inside_vips,
            snat: &group.snat,
            prefer: group.prefer.as_deref(),
            preempt: group.preempt,
        }
    }
}

#[derive(Serialize)]
struct RawService<'a> {
    name: &'a str,
    group: &'a str,
    vip: IpAddr,
    port: u16,
    protocol: Protocol,
    mode: Mode,
    scheduler: Scheduler,
    dead_backend: DeadBackend,
    udp_flows: UdpFlows,
    tcp_idle_ms: u32,
    udp_idle_ms: u32,
    health: RawHealth<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    backend: Vec<RawBackend<'a>>,
}

impl<'a> From<&'a Service> for RawService<'a> {
    fn from(service: &'a Service) -> Self {
        RawService {
            name: &service.name,
            group: &service.group,
            vip: service.vip,
            port: service.port,
            protocol: service.protocol,
            mode: service.mode,
            scheduler: service.scheduler,
            dead_backend: service.dead_backend,
            udp_flows: service.udp_flows,
            tcp_idle_ms: service.tcp_idle_ms,
            udp_idle_ms: service.udp_idle_ms,
            health: (&service.health).into(),
            backend: service.backends.iter().map(RawBackend::from).collect(),
        }
    }
}

#[derive(Serialize)]
struct RawHealth<'a> {
    r#type: CheckType,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<&'a str>,
    expect_status: [u16; 2],
    tls_verify: bool,
    interval_ms: u32,
    timeout_ms: u32,
    rise: u32,
    fall: u32,
}

impl<'a> From<&'a HealthCheck> for RawHealth<'a> {
    fn from(check: &'a HealthCheck) -> Self {
        RawHealth {
            r#type: check.kind,
            port: check.port,
            path: &check.path,
            host: check.host.as_deref(),
            expect_status: [check.expect_status.0, check.expect_status.1],
            tls_verify: check.tls_verify,
            interval_ms: check.interval_ms,
            timeout_ms: check.timeout_ms,
            rise: check.rise,
            fall: check.fall,
        }
    }
}

#[derive(Serialize)]
struct RawBackend<'a> {
    name: &'a str,
    address: IpAddr,
    port: u16,
    weight: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    admin: Option<AdminState>,
}

impl<'a> From<&'a Backend> for RawBackend<'a> {
    fn from(backend: &'a Backend) -> Self {
        RawBackend {
            name: &backend.name,
            address: backend.address,
            port: backend.port,
            weight: backend.weight,
            admin: backend.admin,
        }
    }
}

#[cfg(test)]
mod tests;
