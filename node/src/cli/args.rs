//! The commands and their options as clap sees them.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::config::node::DEFAULT_FILE;
use clap::{Args, Parser, Subcommand};
use komainu_proto::domain::{CheckType, DeadBackend, Mode, Protocol, Role, Scheduler};

/// A highly available layer-4 load balancer.
#[derive(Debug, Parser)]
#[command(name = "komainu", version, propagate_version = true, max_term_width = 110)]
pub struct Cli {
    /// Which node, and in which form.
    #[command(flatten)]
    pub client: ClientArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command that asks a node.
#[derive(Clone, Debug, Default, Args)]
pub struct ClientArgs {
    /// Node to ask: unix:/path/to/admin.sock or https://host:port [default: the local admin socket]
    #[arg(long, global = true, env = "KOMAINU_NODE", value_name = "ADDR")]
    pub node: Option<String>,
    /// Certificates (PEM) that the node's certificate must descend from; for https
    #[arg(long, global = true, env = "KOMAINU_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Client certificate (PEM); for https
    #[arg(long, global = true, env = "KOMAINU_CERT", value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// Private key (PEM) of the client certificate; for https
    #[arg(long, global = true, env = "KOMAINU_KEY", value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Print JSON on stdout and nothing else
    #[arg(long, global = true)]
    pub json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the node: the daemon
    Run {
        /// Node file
        #[arg(short, long, value_name = "FILE", default_value = DEFAULT_FILE)]
        config: PathBuf,
    },
    /// Is the node file right, and can this machine do what it asks?
    Check {
        /// Node file
        #[arg(short, long, value_name = "FILE", default_value = DEFAULT_FILE)]
        config: PathBuf,
    },
    /// What the daemon starts beside itself; not for people
    #[command(hide = true)]
    Executor {
        /// Process id of the daemon
        #[arg(long)]
        process: i32,
        /// Number of the descriptor of its tether
        #[arg(long)]
        tether: i32,
        /// Address that it listens on for its peers
        #[arg(long)]
        listen: IpAddr,
        /// Standard output is the leases of a program in the kernel
        #[arg(long)]
        leases: bool,
    },
    /// Take away what a daemon that is gone left in the kernel: programs on its interfaces (what systemd's ExecStopPost runs)
    Cleanup {
        /// Node file
        #[arg(short, long, value_name = "FILE", default_value = DEFAULT_FILE)]
        config: PathBuf,
    },
    /// Show the whole appliance on this one machine, in network namespaces; needs root and no configuration
    Demo,
    /// Make a cluster secret
    Keygen {
        /// File to write, readable by its owner only; stdout when absent
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Put a cluster document in force
    Apply(ApplyArgs),
    /// Make permanent what was applied with --confirm-within
    Confirm {
        /// Revision to confirm [default: the one that waits]
        revision: Option<u64>,
    },
    /// Take back at once what was applied with --confirm-within
    Rollback {
        /// Revision to take back [default: the one that waits]
        revision: Option<u64>,
    },
    /// Print the cluster document as it stands
    Export {
        /// Revision to print [default: the one in force]
        #[arg(long, value_name = "N")]
        revision: Option<u64>,
    },
    /// List the revisions that can be restored
    History,
    /// Put the document of an older revision in force again, as a new revision
    Restore {
        /// Revision to restore
        revision: u64,
        /// Refuse unless this is the revision in force
        #[arg(long, value_name = "N")]
        if_revision: Option<u64>,
        /// Only say what would change
        #[arg(long)]
        dry_run: bool,
    },
    /// Show the state of the cluster
    Status {
        /// Show it again every second
        #[arg(long)]
        watch: bool,
    },
    /// Look at and change virtual services
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Look at and change backends
    #[command(subcommand)]
    Backend(BackendCommand),
    /// Hand a VIP group over to another node, and wait until it is done
    Switchover {
        /// Name of the group
        group: String,
        /// Name of the node that is to own it [default: any other fit balancer]
        #[arg(long, value_name = "NODE")]
        to: Option<String>,
        /// Give up waiting after this time
        #[arg(long, value_parser = duration, default_value = "15s", value_name = "TIME")]
        timeout: Duration,
    },
    /// Look at and change the members of the cluster
    #[command(subcommand)]
    Node(NodeCommand),
    /// List remembered flows
    Flows {
        /// Only of this service
        #[arg(long, value_name = "S")]
        service: Option<String>,
        /// Only of this backend
        #[arg(long, value_name = "B")]
        backend: Option<String>,
        /// At most this many
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=65536), value_name = "N")]
        limit: u32,
    },
    /// Where would this flow go, and why?
    Trace {
        /// Name of the service
        #[arg(long, value_name = "S")]
        service: String,
        /// Client's address and port
        #[arg(long, value_name = "IP:PORT")]
        from: SocketAddr,
    },
    /// List what happened
    Events {
        /// Go on with what happens from now on
        #[arg(long)]
        follow: bool,
    },
    /// Version of the asked node
    Version,
    /// Print completions for a shell
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
}

/// Options of `apply`.
#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// File with the cluster document; - for stdin
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// Only say what would change
    #[arg(long)]
    pub dry_run: bool,
    /// Refuse unless this is the revision in force
    #[arg(long, value_name = "N")]
    pub if_revision: Option<u64>,
    /// Roll back unless `komainu confirm` comes within this time (1s to 1h)
    #[arg(long, value_parser = duration, value_name = "TIME")]
    pub confirm_within: Option<Duration>,
}

/// `service …`
#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// List the virtual services
    List,
    /// Show one virtual service
    Show {
        /// Name
        service: String,
    },
    /// Add a virtual service
    Add(ServiceAddArgs),
    /// Remove a virtual service
    Remove {
        /// Name
        service: String,
    },
}

/// Options of `service add`.
#[derive(Debug, Args)]
pub struct ServiceAddArgs {
    /// Name
    pub service: String,
    /// Group that the VIP belongs to
    #[arg(long)]
    pub group: String,
    /// Virtual IP address, one of the group's
    #[arg(long)]
    pub vip: std::net::IpAddr,
    /// Port
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// tcp | udp
    #[arg(long, default_value_t = Protocol::Tcp)]
    pub protocol: Protocol,
    /// nat | nat-transparent | dsr
    #[arg(long)]
    pub mode: Mode,
    /// maglev | round_robin | least_conn | source_ip
    #[arg(long, default_value_t = Scheduler::Maglev)]
    pub scheduler: Scheduler,
    /// reset | rehash | keep
    #[arg(long, default_value_t = DeadBackend::Reset)]
    pub dead_backend: DeadBackend,
    /// Health check: tcp | http | https | icmp | udp | dns | grpc | none
    #[arg(long, default_value_t = CheckType::Tcp)]
    pub check: CheckType,
    /// http, https: path that is asked for
    #[arg(long, default_value = "/", value_name = "PATH")]
    pub check_path: String,
    /// Backend; may be given several times
    #[arg(long = "backend", value_name = "NAME=IP:PORT")]
    pub backends: Vec<NamedBackend>,
}

/// `backend …`
#[derive(Debug, Subcommand)]
pub enum BackendCommand {
    /// List backends
    List {
        /// Only of this service
        service: Option<String>,
    },
    /// Add a backend
    Add {
        /// SERVICE/BACKEND
        backend: BackendName,
        /// Address and port
        #[arg(value_name = "IP:PORT")]
        address: SocketAddr,
        /// Share of new flows relative to the others, 0 to 1000
        #[arg(long, default_value_t = 1)]
        weight: u32,
    },
    /// Remove a backend at once; drain it first to spare its flows
    Remove {
        /// SERVICE/BACKEND
        backend: BackendName,
    },
    /// Let a backend take new flows
    Enable {
        /// SERVICE/BACKEND
        backend: BackendName,
    },
    /// Take everything from a backend at once
    Disable {
        /// SERVICE/BACKEND
        backend: BackendName,
    },
    /// Give a backend no new flows and let those that it has end
    Drain {
        /// SERVICE/BACKEND
        backend: BackendName,
        /// Disable the backend after this time
        #[arg(long, value_parser = duration, value_name = "TIME")]
        deadline: Option<Duration>,
        /// Wait until no flow is left or the deadline has passed
        #[arg(long)]
        wait: bool,
    },
    /// Change a backend's weight
    Weight {
        /// SERVICE/BACKEND
        backend: BackendName,
        /// Share of new flows relative to the others, 0 to 1000; 0 takes no new flows
        weight: u32,
    },
}

/// `node …`
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the members
    List,
    /// Admit a node that has been started with this cluster's nodes in its node file
    Join {
        /// Its number, unique and never used before
        #[arg(value_parser = clap::value_parser!(u64).range(1..=65535))]
        id: u64,
        /// Its name
        name: String,
        /// Its address for peer gRPC and beats
        #[arg(value_name = "IP:PORT")]
        address: SocketAddr,
        /// balancer | witness
        #[arg(long, default_value_t = Role::Balancer)]
        role: Role,
    },
    /// Remove a node for good
    Leave {
        /// Its name
        // Not `node`: that is the id of the global option.
        #[arg(value_name = "NODE")]
        name: String,
    },
    /// Make the asked node of a pair go on alone, whose peer is silent on every path. Tells first what is risked
    Force {
        /// Do it: without, only what is risked is told
        #[arg(long)]
        yes: bool,
    },
}

/// `SERVICE/BACKEND`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendName {
    /// Name of the service.
    pub service: String,
    /// Name of the backend.
    pub backend: String,
}

impl FromStr for BackendName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((service, backend)) if !service.is_empty() && !backend.is_empty() => {
                Ok(BackendName { service: service.to_owned(), backend: backend.to_owned() })
            }
            _ => Err("write it as SERVICE/BACKEND".to_owned()),
        }
    }
}

impl std::fmt::Display for BackendName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.service, self.backend)
    }
}

/// `NAME=IP:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedBackend {
    /// Name of the backend.
    pub name: String,
    /// Address and port.
    pub address: SocketAddr,
}

impl FromStr for NamedBackend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write it as NAME=IP:PORT".to_owned();
        let (name, address) = text.split_once('=').ok_or_else(wrong)?;
        Ok(NamedBackend { name: name.to_owned(), address: address.parse().map_err(|_| wrong())? })
    }
}

/// `500ms`, `90s`, `5m`, `1h`, or a sequence of those.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "write it as e.g. 500ms, 90s, 5m or 1h30m".to_owned();
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let ms: u64 = match &rest[..unit] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        rest = &rest[unit..];
        total = total
            .checked_add(Duration::from_millis(number.checked_mul(ms).ok_or_else(wrong)?))
            .ok_or_else(wrong)?;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("komainu").chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_documented_form_is_understood() {
        for line in [
            "demo",
            "demo --json",
            "keygen",
            "keygen -o /tmp/key",
            "apply -f services.toml",
            "apply -f - --dry-run --if-revision 3 --confirm-within 60s",
            "confirm",
            "confirm 4",
            "rollback",
            "export",
            "export --revision 3 --json",
            "history --json",
            "restore 3 --dry-run",
            "status",
            "status --json --watch",
            "status --node unix:/run/komainu/admin.sock",
            "--node https://lb1:7801 --ca ca.pem --cert c.pem --key k.pem status",
            "service list",
            "service show web",
            "service add web --group g --vip 192.0.2.1 --port 80 --mode nat --backend be1=192.0.2.2:80",
            "service remove web",
            "backend list",
            "backend list web",
            "backend add web/be1 192.0.2.11:80 --weight 0",
            "backend add web/be1 [2001:db8::1]:80",
            "backend remove web/be1",
            "backend enable web/be1",
            "backend disable web/be1",
            "backend drain web/be1 --deadline 5m --wait",
            "backend weight web/be1 3",
            "switchover web",
            "switchover web --to lb2",
            "node list",
            "node join 4 lb4 192.0.2.4:7800 --role witness",
            "node leave lb4",
            "node leave lb4 --node unix:/run/komainu/admin.sock",
            "node force",
            "node force --yes",
            "flows --service web --backend be1 --json",
            "trace --service web --from 198.51.100.7:40000",
            "events --follow --json",
            "version",
            "completions bash",
        ] {
            parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn wrong_usage_ends_with_two() {
        for line in [
            "",
            "nonsense",
            "apply",
            "backend drain web",
            "backend drain /be1",
            "backend drain web/be1 --deadline 5",
            "backend weight web/be1 many",
            "backend weight web/be1 -1",
            "service add web --group g --vip x --port 80 --mode nat",
            "service add web --group g --vip 192.0.2.1 --port 0 --mode nat",
            "service add web --group g --vip 192.0.2.1 --port 80 --mode natt",
            "trace --service web --from 192.0.2.1",
            "node join 0 lb4 192.0.2.4:7800",
            "flows --limit 0",
        ] {
            assert_eq!(parse(line).expect_err(line).exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("2d"), Ok(Duration::from_secs(172_800)));
        for wrong in ["", "5", "m", "5x", "5m3", "-1s", "99999999999999999999s", "18446744073709551615h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
