//! Results as JSON for other tools, and as a page for people.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// One line of `target/bench/results.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// `metric/path`.
    pub name: String,
    /// Unit of the values.
    pub unit: &'static str,
    /// Median.
    pub value: f64,
    /// Least.
    pub min: f64,
    /// Greatest.
    pub max: f64,
    /// Number of runs.
    pub runs: usize,
    /// Line that it is compared with.
    pub peer: Option<String>,
    /// Median of the ratios to the peer's value in the same round.
    pub ratio: Option<f64>,
}

impl Line {
    /// From the values of each round and, where there is a peer, its values of the same rounds.
    pub fn new(name: String, unit: &'static str, values: &[f64], peer: Option<(String, &[f64])>) -> Line {
        let ratio = peer.as_ref().map(|(_, theirs)| {
            median(&values.iter().zip(theirs.iter()).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>())
        });
        Line {
            name,
            unit,
            value: median(values),
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            runs: values.len(),
            peer: peer.map(|(name, _)| name),
            ratio,
        }
    }
}

/// The middle value; of an even number the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// Writes the JSON file.
///
/// # Errors
/// The file can't be written.
pub fn write_json(lines: &[Line], to: &Path) -> Result<()> {
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(to, serde_json::to_string_pretty(lines)? + "\n")
        .with_context(|| format!("write {}", to.display()))
}

/// The results as a table.
pub fn table(lines: &[Line]) -> String {
    let mut text = String::from(
        "| what | median | least | greatest | runs | compared with | ratio |\n|---|---:|---:|---:|---:|---|---:|\n",
    );
    for l in lines {
        let digits = if l.value < 100.0 { 2 } else { 0 };
        let _ = writeln!(
            text,
            "| `{}` | {:.digits$} {} | {:.digits$} | {:.digits$} | {} | {} | {} |",
            l.name,
            l.value,
            l.unit,
            l.min,
            l.max,
            l.runs,
            l.peer.as_ref().map(|p| format!("`{p}`")).unwrap_or_default(),
            l.ratio.map(|r| format!("{r:.2}")).unwrap_or_default(),
        );
    }
    text
}

/// The page `docs/benchmarks.md`.
pub fn page(lines: &[Line], command: &str) -> String {
    format!(
        "# Benchmarks\n\n\
         Written by `{command}`. {machine}\n\n\
         One client and one server in network namespaces, joined by veth pairs and bridges, talk through a third namespace. In \
         each round every path takes its turn, so that whatever else the machine does meets all of them alike; a ratio is the \
         median of the ratios within a round. Sender, receiver, the kernel's forwarding and the lane share the machine's \
         processors: a data path that needs more of them leaves less to the two ends.\n\n\
         - `kernel_forwarding`: a Linux router, both ways. `kernel_forwarding_one_way`: answers go straight to the client, as in \
         `dsr`.\n\
         - `direct`: no machine in between. `nftables_dnat`: the same router with a `dnat` rule (connection tracking). \
         `haproxy_tcp`: HAProxy in TCP mode, two threads, `splice-auto`.\n\
         - `af_packet_*`, `tc_*`: a lane, by mode.\n\
         - `tcp_bulk`: one connection, client to server, sent by `sendfile` as file servers do; `tcp_bulk_back`: server to client. All of TCP \
         here has the congestion control `reno`: `bbr`, which the machine may have, paces by timers, and in a virtual machine it is they \
         that would be measured. `udp_packets`: one flow of smallest frames, sent without any pacing, \
         counted where they arrive. `tcp_connections`: 8 clients that connect, exchange a byte, and reset.\n\
         - `program_ns/*`: nanoseconds that the program of the `xdp` lane takes for a packet beyond an empty program that sends it back \
         (`empty_program`, itself not subtracted), by `BPF_PROG_TEST_RUN`: no driver, no sending. Established TCP to a service with 100 \
         backends, the last number is that of flows; `new` are SYNs, of full NAT with all that making a flow takes (the \
         others are in the map with their clients' side); `new_goes_up` is what handing a SYN of full NAT to user space costs \
         the program; `in_transition`: one backend of the 100 is being drained, about 2 % of the slots have two backends, flows there are \
         remembered. `clock_*`: what one call of a helper takes; the lease is compared with `clock_boot`.\n\
         - `wire_packets`: smallest TCP frames of 10 000 established flows from a generator in the kernel, over one veth pair and \
         back, generator and data path on one processor (the lane in user space has its thread beside it). `xdp_tx_reflector` only swaps \
         MAC addresses in the driver. Paths above the driver get their frames through an XDP program that passes them. \
         `generator_and_counter`: without a data path, the counter in its place. `wire_packets_ns`: what a packet takes of a data path \
         beyond those two, which no balancer's processor has to do besides, in nanoseconds of the same round. \
         `wire_packets_200k`, `wire_packets_1m`: the same with 200 000 and a million flows to 64 servers, chosen by `nftables_dnat` by a \
         hash, too; for a million the kernel's table of connections is given room. `af_packet` is left out there: it would take minutes to learn a million.\n\
         - `wire_connections`: the same with one connection after the other, 64 servers: SYN, the server's answer (in `dsr` it goes \
         elsewhere), ACK, RST, no two alike for a lane, as many as arrive (768 on their way); counted by the ACKs. What a data path itself can take on, where in \
         `tcp_connections` the two ends have most of the work. `haproxy_tcp` has every processor, and both its ends are a program in the driver: the client that acknowledges and the server that answers.\n\
         - `syn_flood_ns`: the same for 10 000 established connections, without and with as many SYNs of 4 million clients between \
         them, a thousand in turn. `syn_flood_memory`: what 2 million SYNs, each of another client, take in memory besides; full NAT \
         remembers them as long as there is room for flows, and what was established before is there after.\n\
         - `flow_memory`: what a million established connections take, in the process and in the program's maps; `nftables_dnat`: the \
         kernel's own record of a connection (`/proc/slabinfo`) times a million.\n\
         - `plan_change`: from the call that installs a plan in which every one of 1 000 services with 100 backends each has another \
         table, to its being in force.\n\
         - `cpu_at_rest`: processor time of the lane's threads while a plan is in force, the lease is renewed and nothing is sent.\n\n\
         {table}",
        machine = machine(),
        table = table(lines)
    )
}

/// Processor, number of processors, kernel.
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("unknown processor", |m| m.trim_start_matches([':', '\t', ' ']));
    let count = cpus.lines().filter(|l| l.starts_with("processor")).count();
    let virtual_machine = if cpus.contains(" hypervisor") { ", in a virtual machine" } else { "" };
    format!(
        "Machine: {count} × {model}{virtual_machine}; Linux {}.",
        read("/proc/sys/kernel/osrelease").trim()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_taken_within_each_round() {
        // The machine was twice as fast in the second round: the ratio is the same.
        let line = Line::new("x".into(), "u", &[5.0, 10.0, 5.0], Some(("y".into(), &[10.0, 20.0, 10.0])));
        assert_eq!((line.value, line.min, line.max, line.ratio), (5.0, 5.0, 10.0, Some(0.5)));
    }

    #[test]
    fn the_median_of_an_even_number() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
    }
}
