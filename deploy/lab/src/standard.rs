//! Servers and services that fit the standard topology, for whoever does not need special ones.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::cluster::document::{Group, Service, quick_check};
use crate::error::Result;
use crate::lab::Lab;
use crate::topology::{INSIDE, SERVICE, addr};
use crate::traffic::server::{Listen, Server};

/// HTTP port of the backends under their own addresses.
pub const BACKEND_HTTP: u16 = 8080;
/// HTTP port of services; `dsr` backends listen on it under the VIP and under their own addresses too.
pub const HTTP: u16 = 80;
/// Echo port, TCP and UDP (RFC 862).
pub const ECHO: u16 = 7;

/// Starts a server in every `be…` and `bi…` of the lab, by name: HTTP on 8080, echo on 7 on all own addresses, and for
/// `be…` also HTTP on 80 and echo on the VIPs that it holds on `lo`.
///
/// # Errors
/// An address can't be listened on.
pub fn servers(lab: &Lab) -> Result<BTreeMap<String, Server>> {
    let mut servers = BTreeMap::new();
    for (name, host) in lab.hosts().filter(|(name, _)| name.starts_with("be") || name.starts_with("bi")) {
        let on_service = name.starts_with("be");
        let segment = if on_service { SERVICE } else { INSIDE };
        let mut listens = Vec::new();
        let own = [host.v4(segment), host.v6(segment)];
        let vips = if on_service { addr::service(addr::VIP).to_vec() } else { Vec::new() };
        for ip in own {
            listens.push(Listen::Http((ip, BACKEND_HTTP).into()));
        }
        for ip in own.into_iter().chain(vips) {
            listens.push(Listen::Http((ip, HTTP).into()));
            listens.push(Listen::TcpEcho((ip, ECHO).into()));
            listens.push(Listen::UdpEcho((ip, ECHO).into()));
        }
        servers.insert(name.to_owned(), Server::start(host, name, &listens)?);
    }
    Ok(servers)
}

/// The group `web` with both VIPs, SNAT addresses of both families, and inside VIPs where there is an inside.
pub fn group(lab: &Lab) -> Group {
    let inside = lab.segments().iter().any(|s| s == INSIDE);
    Group {
        name: "web".to_owned(),
        vips: addr::service(addr::VIP).to_vec(),
        inside_vips: if inside { addr::inside(addr::VIP).to_vec() } else { Vec::new() },
        snat: addr::service(addr::SNAT).to_vec(),
        prefer: None,
    }
}

/// A service of group `web` in the usual shape: every backend of the kind that `mode` needs, on `backend_port`, checked
/// by HTTP.
pub fn service(
    lab: &Lab,
    name: &str,
    vip: IpAddr,
    port: u16,
    protocol: &'static str,
    mode: &'static str,
    backend_port: u16,
) -> Service {
    let (prefix, segment) = if mode == "nat-transparent" { ("bi", INSIDE) } else { ("be", SERVICE) };
    let backends = lab
        .hosts()
        .filter(|(host, _)| host.starts_with(prefix))
        .map(|(host, h)| {
            let ip = if vip.is_ipv4() { h.v4(segment) } else { h.v6(segment) };
            (host.to_owned(), SocketAddr::new(ip, backend_port))
        })
        .collect();
    Service {
        name: name.to_owned(),
        group: "web".to_owned(),
        at: (vip, port).into(),
        protocol,
        mode,
        extra: String::new(),
        health: quick_check(BACKEND_HTTP),
        backends,
    }
}
