//! The state of the cluster on a terminal.

use std::fmt::Write;

use komainu_proto::admin as wire;

use super::json::{admin, health, mode, protocol, role, scheduler};
use super::table::Table;
use super::time::{duration, moment};

/// The whole state, most important first.
pub fn status(status: &wire::StatusResponse) -> String {
    let mut out = String::new();
    if let Some(node) = &status.node {
        let lane = match node.lane.as_str() {
            "" => String::new(),
            lane => format!(", lane {lane} ({})", node.lane_mode),
        };
        line(
            &mut out,
            format_args!(
                "node     {} (id {}), {}, {}{lane}",
                node.name,
                node.id,
                role(node.role),
                node.version
            ),
        );
        if !node.lane_reason.is_empty() {
            line(&mut out, format_args!("         lane {}: {}", node.lane, node.lane_reason));
        }
        if !node.fit && !node.unfit_reason.is_empty() {
            line(&mut out, format_args!("         not fit to own a group: {}", node.unfit_reason));
        }
    }
    if let Some(cluster) = &status.cluster {
        let leader = if cluster.leader.is_some() { &cluster.leader_name } else { "none" };
        let solo = match (cluster.solo, cluster.solo_term.zip(cluster.solo_since_unix_ms)) {
            (true, Some((term, since))) => format!(", solo since {} (term {term})", moment(since)),
            (solo, _) => if solo { ", solo" } else { "" }.to_owned(),
        };
        line(
            &mut out,
            format_args!(
                "cluster  leader {leader}, term {}, revision {}, quorum {}{solo}",
                cluster.term, cluster.revision, cluster.quorum
            ),
        );
        if let Some(pending) = &cluster.pending_confirm {
            line(
                &mut out,
                format_args!(
                    "         revision {} waits to be confirmed: back to {} in {}",
                    pending.revision,
                    pending.rollback_to,
                    duration(pending.left_ms)
                ),
            );
        }
    }
    for notice in &status.notices {
        line(&mut out, format_args!("notice   {notice}"));
    }
    if let Some(cluster) = &status.cluster {
        block(&mut out, &members(&cluster.members));
    }
    block(&mut out, &groups(&status.groups));
    for service in &status.services {
        let _ = write!(out, "\n{}", self::service(service));
    }
    let drops: Vec<String> =
        status.drops.iter().filter(|d| d.value > 0).map(|d| format!("{} {}", d.name, d.value)).collect();
    if !drops.is_empty() {
        line(&mut out, format_args!("\ndropped by this node: {}", drops.join(", ")));
    }
    out
}

/// The members.
pub fn members(members: &[wire::Member]) -> Table {
    let mut table = Table::new(["NODE", "ID", "ROLE", "ALIVE", "LAST BEAT", "VOTES", "FIT", "ADDRESS"]);
    for member in members {
        table.row([
            member.name.clone(),
            member.id.to_string(),
            role(member.role).to_owned(),
            yes(member.alive),
            member.since_beat_ms.map_or_else(|| "-".to_owned(), duration),
            yes(member.voter),
            match member.fit {
                None => "-".to_owned(),
                Some(true) => "yes".to_owned(),
                Some(false) if member.unfit_reason.is_empty() => "no".to_owned(),
                Some(false) => format!("no: {}", member.unfit_reason),
            },
            member.address.clone(),
        ]);
    }
    table
}

fn groups(groups: &[wire::GroupStatus]) -> Table {
    let mut table = Table::new(["GROUP", "OWNER", "EPOCH", "LEASE", "LAG", "VIPS"]);
    for group in groups {
        table.row([
            group.name.clone(),
            group.owner.clone().unwrap_or_else(|| "none".to_owned()),
            group.epoch.to_string(),
            duration(group.lease_left_ms),
            group.standby_lag_flows.to_string(),
            group.vips.join(" "),
        ]);
    }
    table
}

/// One service with its backends.
pub fn service(service: &wire::ServiceStatus) -> String {
    let mut out = String::new();
    let vip = endpoint(&service.vip, service.port);
    let transition = if service.in_transition { ", in transition" } else { "" };
    let unknown = if service.counters_known { "" } else { ", counters not known (no owner answers)" };
    line(
        &mut out,
        format_args!(
            "service {}: {} {vip}, {}, {}, group {}{transition}{unknown}",
            service.name,
            protocol(service.protocol),
            mode(service.mode),
            scheduler(service.scheduler),
            service.group
        ),
    );
    let mut table = backend_table().indented(2);
    for backend in &service.backends {
        backend_row(&mut table, backend.name.clone(), backend);
    }
    if table.is_empty() {
        line(&mut out, format_args!("  no backends"));
    } else {
        let _ = write!(out, "{table}");
    }
    out
}

/// A table for [`backend_row`].
pub fn backend_table() -> Table {
    Table::new([
        "BACKEND",
        "ADDRESS",
        "WEIGHT",
        "ADMIN",
        "HEALTH",
        "FLOWS",
        "NEW",
        "PACKETS",
        "BYTES",
        "LAST CHECK",
    ])
}

/// Adds one backend.
pub fn backend_row(table: &mut Table, name: String, backend: &wire::BackendStatus) {
    let admin = match backend.drain_left_ms {
        Some(left) => format!("{} ({} left)", admin(backend.admin), duration(left)),
        None => admin(backend.admin).to_owned(),
    };
    table.row([
        name,
        endpoint(&backend.address, backend.port),
        backend.weight.to_string(),
        admin,
        health(backend.health).to_owned(),
        backend.flows.to_string(),
        backend.new_flows.to_string(),
        backend.packets.to_string(),
        backend.bytes.to_string(),
        backend.reason.clone(),
    ]);
}

/// `192.0.2.1:80`, `[2001:db8::1]:80`.
pub fn endpoint(address: &str, port: u32) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

fn yes(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = writeln!(out, "{text}");
}

fn block(out: &mut String, table: &Table) {
    if !table.is_empty() {
        let _ = write!(out, "\n{table}");
    }
}
