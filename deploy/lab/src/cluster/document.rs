//! Cluster documents for the lab.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

/// A cluster document in the making; [`Document::to_toml`] gives the file.
#[derive(Clone, Debug, Default)]
pub struct Document {
    groups: Vec<Group>,
    services: Vec<Service>,
}

/// A VIP group.
#[derive(Clone, Debug, Default)]
pub struct Group {
    /// Name.
    pub name: String,
    /// VIPs.
    pub vips: Vec<IpAddr>,
    /// Inside VIPs.
    pub inside_vips: Vec<IpAddr>,
    /// SNAT addresses.
    pub snat: Vec<IpAddr>,
    /// Preferred node.
    pub prefer: Option<String>,
}

/// A virtual service.
#[derive(Clone, Debug)]
pub struct Service {
    /// Name.
    pub name: String,
    /// Name of its group.
    pub group: String,
    /// VIP and port.
    pub at: SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Forwarding mode.
    pub mode: &'static str,
    /// Further lines of the service's table, e.g. `dead_backend = "keep"`.
    pub extra: String,
    /// Lines of the health check's table.
    pub health: String,
    /// Backends by name.
    pub backends: Vec<(String, SocketAddr)>,
}

/// A quick HTTP check of `/healthz` on `port` of each backend: a death is noticed within about half a second, and a busy
/// machine has as long before a living backend is taken for dead.
pub fn quick_check(port: u16) -> String {
    format!(
        "type = \"http\"\npath = \"/healthz\"\nport = {port}\ninterval_ms = 160\ntimeout_ms = 160\nrise = 2\nfall = 3\n"
    )
}

impl Document {
    /// Its services.
    pub fn services(&self) -> &[Service] {
        &self.services
    }

    /// The same, to be changed.
    pub fn services_mut(&mut self) -> &mut [Service] {
        &mut self.services
    }

    /// Adds a group.
    #[must_use]
    pub fn group(mut self, group: Group) -> Document {
        self.groups.push(group);
        self
    }

    /// Adds a service.
    #[must_use]
    pub fn service(mut self, service: Service) -> Document {
        self.services.push(service);
        self
    }

    /// The file.
    pub fn to_toml(&self) -> String {
        let mut t = String::new();
        let list = |ips: &[IpAddr]| {
            let quoted: Vec<String> = ips.iter().map(|ip| format!("\"{ip}\"")).collect();
            format!("[{}]", quoted.join(", "))
        };
        for g in &self.groups {
            let _ = writeln!(t, "[[group]]\nname = \"{}\"\nvips = {}", g.name, list(&g.vips));
            if !g.inside_vips.is_empty() {
                let _ = writeln!(t, "inside_vips = {}", list(&g.inside_vips));
            }
            if !g.snat.is_empty() {
                let _ = writeln!(t, "snat = {}", list(&g.snat));
            }
            if let Some(prefer) = &g.prefer {
                let _ = writeln!(t, "prefer = \"{prefer}\"");
            }
        }
        for s in &self.services {
            let _ = writeln!(
                t,
                "[[service]]\nname = \"{}\"\ngroup = \"{}\"\nvip = \"{}\"\nport = {}\nprotocol = \"{}\"\nmode = \"{}\"\n{}",
                s.name,
                s.group,
                s.at.ip(),
                s.at.port(),
                s.protocol,
                s.mode,
                s.extra
            );
            let _ = writeln!(t, "[service.health]\n{}", s.health);
            for (name, at) in &s.backends {
                let _ = writeln!(
                    t,
                    "[[service.backend]]\nname = \"{name}\"\naddress = \"{}\"\nport = {}",
                    at.ip(),
                    at.port()
                );
            }
        }
        t
    }
}
