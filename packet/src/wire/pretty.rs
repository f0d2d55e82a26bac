//! A frame in one line, much as tcpdump prints it: for traces and for messages of failed tests.

use std::fmt;
use std::net::IpAddr;

use super::dissect::{Fragment, IpInfo, Net, Transport, dissect};
use super::{arp, bytes, ethernet, icmpv4, icmpv6, ndp, tcp};

/// Displays a frame.
pub struct Pretty<'a>(pub &'a [u8]);

impl fmt::Display for Pretty<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frame = match dissect(self.0) {
            Ok(frame) => frame,
            Err(reason) => {
                if let Ok(header) = ethernet::Frame::new_checked(self.0) {
                    write!(f, "{} > {}, ", ethernet::show(header.src()), ethernet::show(header.dst()))?;
                }
                return write!(f, "malformed: {reason} ({} bytes)", self.0.len());
            }
        };
        write!(f, "{} > {}", ethernet::show(frame.src), ethernet::show(frame.dst))?;
        for vlan in frame.vlan.ids() {
            write!(f, ", vlan {vlan}")?;
        }
        match frame.net {
            Net::Arp => match arp::Repr::parse(bytes::range(self.0, frame.l3, usize::MAX)) {
                Ok(repr) => write!(f, ", {repr}"),
                Err(reason) => write!(f, ", ARP malformed: {reason}"),
            },
            Net::Other => write!(f, ", {}", frame.ethertype),
            Net::Ip(ip) => {
                f.write_str(", ")?;
                show_ip(f, self.0, &ip)
            }
        }
    }
}

fn show_ip(f: &mut fmt::Formatter<'_>, frame: &[u8], ip: &IpInfo) -> fmt::Result {
    f.write_str(if ip.is_v6() { "IP6 " } else { "IP " })?;
    match ip.ports() {
        Some((src, dst)) => write!(f, "{} > {}: ", with_port(ip.src, src), with_port(ip.dst, dst))?,
        None => write!(f, "{} > {}: ", ip.src, ip.dst)?,
    }
    let data = bytes::range(frame, ip.l4, ip.end);
    match ip.transport {
        Transport::Tcp { flags, header_len, .. } => {
            write!(f, "TCP {flags}")?;
            if let Ok(segment) = tcp::Segment::new_checked(data) {
                write!(f, " seq {}", segment.seq())?;
                if flags.ack() {
                    write!(f, " ack {}", segment.ack())?;
                }
            }
            write!(f, ", length {}", data.len().saturating_sub(header_len))?;
        }
        Transport::Udp { .. } => {
            write!(f, "UDP, length {}", data.len().saturating_sub(super::udp::HEADER_LEN))?
        }
        Transport::Icmp { kind, .. } => match icmpv4::Repr::parse(data) {
            Ok(repr) => write!(f, "{repr}")?,
            Err(reason) => write!(f, "ICMP {} ({reason})", icmpv4::kind_name(kind))?,
        },
        Transport::Icmpv6 { kind, .. } => match (ndp::Repr::parse(frame, ip), ip.v6()) {
            (Ok(Some(repr)), _) => write!(f, "{repr}")?,
            (Ok(None), Some((src, dst))) => match icmpv6::Repr::parse(data, src, dst) {
                Ok(repr) => write!(f, "{repr}")?,
                Err(reason) => write!(f, "ICMP6 {} ({reason})", icmpv6::kind_name(kind))?,
            },
            (Err(reason), _) => write!(f, "ICMP6 {} ({reason})", icmpv6::kind_name(kind))?,
            (Ok(None), None) => f.write_str("ICMP6")?,
        },
        Transport::None => write!(f, "protocol {}, length {}", ip.proto, data.len())?,
        Transport::Other => write!(f, "protocol {}, length {}", ip.proto, data.len())?,
    }
    match ip.fragment {
        Fragment::Whole => Ok(()),
        Fragment::First { id } => write!(f, " (first fragment of {id:#x})"),
        Fragment::Later { id, offset, .. } => write!(f, " (fragment of {id:#x} at {offset})"),
    }
}

/// `address.port`, as tcpdump writes it for both families.
fn with_port(address: IpAddr, port: u16) -> String {
    format!("{address}.{port}")
}
