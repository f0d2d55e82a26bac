//! Which frames the kernel copies into the ring: a classic BPF program made from the plan
//! (`Documentation/networking/filter.rst`).
//!
//! The host's own traffic would otherwise be copied to user space only to be found not ours. The program lets more through
//! than is needed rather than less: the engine decides. A plan is changed in three steps: a filter for the old and the new
//! plan together, the new tables, a filter for the new plan alone.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::plan::{Mode, Plan};

/// Addresses of one family up to which the program compares one by one. Beyond, everything addressed to the interface is
/// let through: a longer chain costs more than it saves, and programs end at 4096 instructions (`BPF_MAXINSNS`).
const MAX_ADDRESSES: usize = 200;

/// What is let through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Whether anything is: without a plan nothing is, not even ARP.
    any: bool,
    /// Destinations: VIPs, inside VIPs, SNAT addresses.
    destinations: BTreeSet<IpAddr>,
    /// Sources: backends whose answers to clients come through us.
    sources: BTreeSet<IpAddr>,
}

impl Interest {
    /// What a plan needs.
    pub fn of(plan: &Plan) -> Interest {
        let mut interest = Interest { any: !plan.groups.is_empty(), ..Interest::default() };
        for group in &plan.groups {
            interest.destinations.extend(group.vips.iter().chain(&group.inside_vips).chain(&group.snat));
        }
        for service in plan.services.iter().filter(|s| s.mode == Mode::NatTransparent) {
            interest.sources.extend(service.backends.iter().map(|b| b.address));
        }
        interest
    }

    /// What either needs.
    pub fn union(&self, other: &Interest) -> Interest {
        Interest {
            any: self.any || other.any,
            destinations: self.destinations.union(&other.destinations).copied().collect(),
            sources: self.sources.union(&other.sources).copied().collect(),
        }
    }

    /// The program. `handed_up`: for the device by which a program hands frames up, which are all to other machines there: the
    /// device has an address of its own.
    pub fn program(&self, handed_up: bool) -> Vec<libc::sock_filter> {
        let mut p = Program::default();
        if !self.any {
            p.ret(DROP);
            return p.0;
        }
        if !handed_up {
            // Frames to other machines are seen when somebody has set the interface to promiscuous mode.
            p.load(Width::Byte, ancillary(libc::SKF_AD_PKTTYPE));
            p.ret_if_equal(PACKET_OTHERHOST, DROP);
        }
        // Tagged frames belong to another network; tag 0 only carries a priority (IEEE 802.1Q §9.6).
        p.load(Width::Byte, ancillary(libc::SKF_AD_VLAN_TAG_PRESENT));
        p.skip_if_equal(0, 3);
        p.load(Width::Byte, ancillary(libc::SKF_AD_VLAN_TAG));
        p.skip_unless_any_bit(0x0fff, 1);
        p.ret(DROP);

        p.load(Width::Half, 12);
        p.ret_if_equal(u32::from(ETHERTYPE_ARP), ACCEPT);
        let v4 = self.family(IpAddr::is_ipv4);
        let v6 = self.family(IpAddr::is_ipv6);
        p.section(u32::from(ETHERTYPE_IPV4), |p| {
            if self.through(IpAddr::is_ipv4) {
                // ICMP errors about what a backend sent to a client come from any router on the way.
                p.load(Width::Byte, 14 + 9);
                p.ret_if_equal(u32::from(PROTOCOL_ICMP), ACCEPT);
            }
            p.addresses(14 + 16, &v4.0);
            p.addresses(14 + 12, &v4.1);
        });
        p.section(u32::from(ETHERTYPE_IPV6), |p| {
            p.load(Width::Byte, 14 + 6);
            if self.through(IpAddr::is_ipv6) {
                p.ret_if_equal(u32::from(PROTOCOL_ICMPV6), ACCEPT);
            } else {
                // Neighbour discovery, types 133..=137 (RFC 4861 §4), whatever it is addressed to.
                p.skip_unless_equal(u32::from(PROTOCOL_ICMPV6), 4);
                p.load(Width::Byte, 14 + 40);
                p.skip_if_less(133, 2);
                p.skip_if_greater(137, 1);
                p.ret(ACCEPT);
            }
            p.addresses(14 + 24, &v6.0);
            p.addresses(14 + 8, &v6.1);
        });
        p.ret(DROP);
        p.0
    }

    /// Destinations and sources of one family.
    fn family(&self, is: fn(&IpAddr) -> bool) -> (Vec<IpAddr>, Vec<IpAddr>) {
        let of = |set: &BTreeSet<IpAddr>| set.iter().copied().filter(is).collect();
        (of(&self.destinations), of(&self.sources))
    }

    /// Whether answers to clients pass through us in this family.
    fn through(&self, is: fn(&IpAddr) -> bool) -> bool {
        self.sources.iter().any(is)
    }
}

const DROP: u32 = 0;
const ACCEPT: u32 = u32::MAX;
const PACKET_OTHERHOST: u32 = 3;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_ICMPV6: u8 = 58;

fn ancillary(which: i32) -> u32 {
    (libc::SKF_AD_OFF + which) as u32
}

#[derive(Clone, Copy)]
enum Width {
    Byte,
    Half,
    Word,
}

/// A program being written. Conditional jumps reach 255 instructions, so each comparison carries its own return.
#[derive(Default)]
struct Program(Vec<libc::sock_filter>);

impl Program {
    fn push(&mut self, code: u32, jt: u8, jf: u8, k: u32) {
        self.0.push(libc::sock_filter { code: code as u16, jt, jf, k });
    }

    fn load(&mut self, width: Width, at: u32) {
        let size = match width {
            Width::Byte => libc::BPF_B,
            Width::Half => libc::BPF_H,
            Width::Word => libc::BPF_W,
        };
        self.push(libc::BPF_LD | size | libc::BPF_ABS, 0, 0, at);
    }

    fn ret(&mut self, value: u32) {
        self.push(libc::BPF_RET | libc::BPF_K, 0, 0, value);
    }

    fn jump(&mut self, test: u32, k: u32, when_true: u8, when_false: u8) {
        self.push(libc::BPF_JMP | test | libc::BPF_K, when_true, when_false, k);
    }

    fn skip_if_equal(&mut self, k: u32, count: u8) {
        self.jump(libc::BPF_JEQ, k, count, 0);
    }

    fn skip_unless_equal(&mut self, k: u32, count: u8) {
        self.jump(libc::BPF_JEQ, k, 0, count);
    }

    fn skip_unless_any_bit(&mut self, k: u32, count: u8) {
        self.jump(libc::BPF_JSET, k, 0, count);
    }

    fn skip_if_less(&mut self, k: u32, count: u8) {
        self.jump(libc::BPF_JGE, k, 0, count);
    }

    fn skip_if_greater(&mut self, k: u32, count: u8) {
        self.jump(libc::BPF_JGT, k, count, 0);
    }

    fn ret_if_equal(&mut self, k: u32, value: u32) {
        self.skip_unless_equal(k, 1);
        self.ret(value);
    }

    /// Runs `body` for frames whose EtherType, already loaded, is `ethertype`, and drops those it doesn't accept.
    fn section(&mut self, ethertype: u32, body: impl FnOnce(&mut Program)) {
        let mut inner = Program::default();
        body(&mut inner);
        inner.ret(DROP);
        self.skip_if_equal(ethertype, 1);
        self.push(libc::BPF_JMP | libc::BPF_JA, 0, 0, inner.0.len() as u32);
        self.0.append(&mut inner.0);
    }

    /// Accepts when the address at `at` is one of them.
    fn addresses(&mut self, at: u32, addresses: &[IpAddr]) {
        if addresses.len() > MAX_ADDRESSES {
            self.ret(ACCEPT);
            return;
        }
        if addresses.iter().any(IpAddr::is_ipv4) {
            self.load(Width::Word, at);
        }
        for address in addresses {
            match address {
                IpAddr::V4(a) => self.ret_if_equal(a.to_bits(), ACCEPT),
                IpAddr::V6(a) => {
                    let words = a.octets();
                    for (i, word) in words.chunks_exact(4).enumerate() {
                        let word = u32::from_be_bytes([word[0], word[1], word[2], word[3]]);
                        self.load(Width::Word, at + 4 * i as u32);
                        // Over this address's remaining words and its return.
                        self.skip_unless_equal(word, 2 * (3 - i as u8) + 1);
                    }
                    self.ret(ACCEPT);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::GroupPlan;

    /// Runs a program as the kernel would (filter.rst); ancillary loads read `pkttype` and no VLAN.
    fn run(program: &[libc::sock_filter], frame: &[u8], pkttype: u32, vlan: Option<u16>) -> u32 {
        let (mut pc, mut a) = (0usize, 0u32);
        loop {
            let i = &program[pc];
            pc += 1;
            let code = u32::from(i.code);
            match code & 7 {
                libc::BPF_LD => {
                    a = if i.k == ancillary(libc::SKF_AD_PKTTYPE) {
                        pkttype
                    } else if i.k == ancillary(libc::SKF_AD_VLAN_TAG_PRESENT) {
                        u32::from(vlan.is_some())
                    } else if i.k == ancillary(libc::SKF_AD_VLAN_TAG) {
                        u32::from(vlan.unwrap_or(0))
                    } else {
                        let len = match code & 0x18 {
                            libc::BPF_B => 1,
                            libc::BPF_H => 2,
                            _ => 4,
                        };
                        // A load beyond the frame ends the program with 0.
                        let Some(bytes) = frame.get(i.k as usize..i.k as usize + len) else { return 0 };
                        bytes.iter().fold(0, |v, b| v << 8 | u32::from(*b))
                    };
                }
                libc::BPF_JMP => {
                    let hit = match code & 0xf0 {
                        libc::BPF_JA => {
                            pc += i.k as usize;
                            continue;
                        }
                        libc::BPF_JEQ => a == i.k,
                        libc::BPF_JGT => a > i.k,
                        libc::BPF_JGE => a >= i.k,
                        libc::BPF_JSET => a & i.k != 0,
                        other => panic!("jump {other:#x}"),
                    };
                    pc += usize::from(if hit { i.jt } else { i.jf });
                }
                libc::BPF_RET => return i.k,
                other => panic!("class {other:#x}"),
            }
        }
    }

    fn v4(src: [u8; 4], dst: [u8; 4], protocol: u8) -> Vec<u8> {
        let mut f = vec![0; 60];
        f[12..14].copy_from_slice(&ETHERTYPE_IPV4.to_be_bytes());
        f[23] = protocol;
        f[26..30].copy_from_slice(&src);
        f[30..34].copy_from_slice(&dst);
        f
    }

    fn v6(src: &str, dst: &str, next: u8, icmp_type: u8) -> Vec<u8> {
        let mut f = vec![0; 80];
        f[12..14].copy_from_slice(&ETHERTYPE_IPV6.to_be_bytes());
        f[20] = next;
        f[22..38].copy_from_slice(&src.parse::<std::net::Ipv6Addr>().unwrap().octets());
        f[38..54].copy_from_slice(&dst.parse::<std::net::Ipv6Addr>().unwrap().octets());
        f[54] = icmp_type;
        f
    }

    fn arp() -> Vec<u8> {
        let mut f = vec![0; 60];
        f[12..14].copy_from_slice(&ETHERTYPE_ARP.to_be_bytes());
        f
    }

    fn interest(destinations: &[&str], sources: &[&str]) -> Interest {
        let set = |l: &[&str]| l.iter().map(|a| a.parse().unwrap()).collect();
        Interest { any: true, destinations: set(destinations), sources: set(sources) }
    }

    #[test]
    fn without_a_plan_nothing_passes() {
        let p = Interest::of(&Plan::default()).program(false);
        assert_eq!(run(&p, &arp(), 0, None), DROP);
    }

    #[test]
    fn only_our_addresses_and_address_resolution_pass() {
        let p = interest(&["192.0.2.9", "192.0.2.10", "2001:db8::9", "2001:db8::10"], &[]).program(false);
        assert_eq!(run(&p, &arp(), 1, None), ACCEPT);
        for last in [9, 10] {
            assert_eq!(run(&p, &v4([1, 2, 3, 4], [192, 0, 2, last], 6), 0, None), ACCEPT);
        }
        assert_eq!(run(&p, &v4([1, 2, 3, 4], [192, 0, 2, 11], 6), 0, None), DROP);
        assert_eq!(run(&p, &v4([192, 0, 2, 9], [1, 2, 3, 4], 6), 0, None), DROP);
        for to in ["2001:db8::9", "2001:db8::10"] {
            assert_eq!(run(&p, &v6("2001:db8::1", to, 17, 0), 0, None), ACCEPT);
        }
        assert_eq!(run(&p, &v6("2001:db8::1", "2001:db8::11", 17, 0), 0, None), DROP);
        assert_eq!(run(&p, &v6("fe80::1", "ff02::1:ff00:9", 58, 135), 2, None), ACCEPT);
        assert_eq!(run(&p, &v6("fe80::1", "ff02::1", 58, 136), 2, None), ACCEPT);
        for icmp_type in [128, 132, 138] {
            assert_eq!(run(&p, &v6("fe80::1", "2001:db8::11", 58, icmp_type), 0, None), DROP);
        }
        assert_eq!(run(&p, &[0; 8], 0, None), DROP);
    }

    #[test]
    fn answers_of_transparent_backends_and_errors_about_them_pass() {
        let p = interest(&["192.0.2.9", "2001:db8::9"], &["10.0.0.5", "2001:db8:1::5"]).program(false);
        assert_eq!(run(&p, &v4([10, 0, 0, 5], [1, 2, 3, 4], 6), 0, None), ACCEPT);
        assert_eq!(run(&p, &v4([10, 0, 0, 6], [1, 2, 3, 4], 6), 0, None), DROP);
        assert_eq!(run(&p, &v4([10, 0, 0, 6], [1, 2, 3, 4], PROTOCOL_ICMP), 0, None), ACCEPT);
        assert_eq!(run(&p, &v6("2001:db8:1::5", "2001:db8::77", 6, 0), 0, None), ACCEPT);
        assert_eq!(run(&p, &v6("2001:db8:1::6", "2001:db8::77", 6, 0), 0, None), DROP);
        assert_eq!(run(&p, &v6("2001:db8:1::6", "2001:db8::77", 58, 2), 0, None), ACCEPT);
    }

    #[test]
    fn frames_to_other_machines_and_other_vlans_do_not_pass() {
        let p = interest(&["192.0.2.9"], &[]).program(false);
        let ours = v4([1, 2, 3, 4], [192, 0, 2, 9], 6);
        assert_eq!(run(&p, &ours, PACKET_OTHERHOST, None), DROP);
        // The device by which frames are handed up has another address than the interface that they came by.
        let handed_up = interest(&["192.0.2.9"], &[]).program(true);
        assert_eq!(run(&handed_up, &ours, PACKET_OTHERHOST, None), ACCEPT);
        assert_eq!(run(&p, &ours, 0, Some(5)), DROP);
        assert_eq!(run(&p, &ours, 0, Some(0xe000)), ACCEPT);
    }

    #[test]
    fn a_long_list_opens_its_family_and_the_program_stays_within_limits() {
        let group = GroupPlan {
            id: 1,
            name: "g".to_owned(),
            vips: (0..4000u32).map(|i| IpAddr::V4((0x0a00_0000 + i).into())).collect(),
            inside_vips: (0..MAX_ADDRESSES as u128).map(|i| IpAddr::V6((1 << 120 | i).into())).collect(),
            snat: vec![],
        };
        let p = Interest::of(&Plan { revision: 1, groups: vec![group], services: vec![] }).program(false);
        assert!(p.len() <= libc::BPF_MAXINSNS as usize);
        assert_eq!(run(&p, &v4([1, 2, 3, 4], [9, 9, 9, 9], 6), 0, None), ACCEPT);
        assert_eq!(run(&p, &v6("2001:db8::1", "2001:db8::2", 6, 0), 0, None), DROP);
    }

    #[test]
    fn a_union_lets_through_what_either_does() {
        let both = interest(&["192.0.2.9"], &[]).union(&interest(&["192.0.2.10"], &["10.0.0.5"]));
        assert_eq!(both, interest(&["192.0.2.9", "192.0.2.10"], &["10.0.0.5"]));
    }
}
