//! The smallest program that cuts a cable for one sender only.
//!
//! A switch port drops frames by source MAC, in a `clsact` egress filter on the port. Why not something simpler: a
//! filter inside the host would come too late (packet sockets are served before the ingress hook), bridge VLANs would
//! turn every known unicast into a flood, and `flower`, `gact`, `netem` or nftables are kernel modules or tools that a
//! small machine lacks. An eBPF classifier needs nothing but the kernel (`CONFIG_NET_CLS_BPF`, `CONFIG_NET_SCH_INGRESS`).
//!
//! And a program that lets everything pass, and the switch that turns checksums by the "device" off: both are what an XDP program
//! on a veth interface needs of those around it ([`load_pass_program`], [`transmit_checksums_off`]).
//!
//! Opcodes as in the kernel's `Documentation/bpf/standardization/instruction-set.rst`.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::{LabError, Result};

/// Frames of one sender that a port does not pass on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DropRule {
    /// Source address of the frames.
    pub mac: [u8; 6],
    /// Share dropped in units of 1/2^32, `u32::MAX` drops all.
    pub threshold: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Insn {
    code: u8,
    regs: u8,
    off: i16,
    imm: i32,
}

const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn { code, regs: dst | (src << 4), off, imm }
}

const MOV64_REG: u8 = 0xbf;
const MOV64_IMM: u8 = 0xb7;
const LD_ABS_H: u8 = 0x28;
const LD_ABS_W: u8 = 0x20;
const JNE32_IMM: u8 = 0x56;
const JGT32_IMM: u8 = 0x26;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const HELPER_GET_PRANDOM_U32: i32 = 7;
/// `TC_ACT_UNSPEC`: go on as if the filter were not there.
const PASS: i32 = -1;
/// `TC_ACT_SHOT`: drop.
const SHOT: i32 = 2;

fn program(rules: &[DropRule]) -> Vec<Insn> {
    let mut code = vec![
        // LD_ABS takes the packet from r6.
        insn(MOV64_REG, 6, 1, 0, 0),
        insn(LD_ABS_H, 0, 0, 0, 6),
        insn(MOV64_REG, 7, 0, 0, 0),
        insn(LD_ABS_W, 0, 0, 0, 8),
        insn(MOV64_REG, 8, 0, 0, 0),
    ];
    for rule in rules {
        let m = rule.mac;
        let high = i32::from(u16::from_be_bytes([m[0], m[1]]));
        let low = u32::from_be_bytes([m[2], m[3], m[4], m[5]]) as i32;
        let certain = rule.threshold == u32::MAX;
        let body = if certain { 2 } else { 4 };
        code.push(insn(JNE32_IMM, 7, 0, body + 1, high));
        code.push(insn(JNE32_IMM, 8, 0, body, low));
        if !certain {
            code.push(insn(CALL, 0, 0, 0, HELPER_GET_PRANDOM_U32));
            code.push(insn(JGT32_IMM, 0, 0, 2, rule.threshold as i32));
        }
        code.push(insn(MOV64_IMM, 0, 0, 0, SHOT));
        code.push(insn(EXIT, 0, 0, 0, 0));
    }
    code.push(insn(MOV64_IMM, 0, 0, 0, PASS));
    code.push(insn(EXIT, 0, 0, 0, 0));
    code
}

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` reads (bpf(2)).
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
/// `XDP_FLAGS_DRV_MODE`.
const XDP_NATIVE: u32 = 1 << 2;
/// `XDP_PASS`.
const XDP_PASS: i32 = 2;

/// Loads the program that drops frames by `rules`.
pub(crate) fn load_drop_program(rules: &[DropRule]) -> Result<OwnedFd> {
    load(BPF_PROG_TYPE_SCHED_CLS, &program(rules), "load the filter that cuts a link")
}

/// Loads an XDP program that lets everything pass. An interface whose peer sends frames back from an XDP program of its own
/// receives them only when it has one too.
pub(crate) fn load_pass_program() -> Result<OwnedFd> {
    let code = [insn(MOV64_IMM, 0, 0, 0, XDP_PASS), insn(EXIT, 0, 0, 0, 0)];
    load(BPF_PROG_TYPE_XDP, &code, "load the program that lets everything pass")
}

/// The part of `union bpf_attr` that `BPF_LINK_CREATE` reads.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// Puts an XDP program into the driver of an interface of the calling thread's namespace. It stays until the descriptor is
/// closed.
pub(crate) fn attach_xdp(program: &OwnedFd, ifindex: u32) -> Result<OwnedFd> {
    let prog_fd = program.as_raw_fd() as u32;
    let mut attr = LinkCreate { prog_fd, target_ifindex: ifindex, attach_type: BPF_XDP, flags: XDP_NATIVE };
    // SAFETY: `attr` has the layout that the command reads, of the size told, and holds no pointer.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw mut attr, std::mem::size_of::<LinkCreate>())
    };
    if fd < 0 {
        return Err(LabError::last_os("attach an XDP program"));
    }
    // SAFETY: the kernel just gave this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Has an interface of the calling thread's namespace compute checksums before frames leave it (`ethtool -K … tx off`): an XDP
/// program sees no other.
pub(crate) fn transmit_checksums_off(interface: &str) -> Result<()> {
    const ETHTOOL_STXCSUM: u32 = 0x17;
    let mut value = EthtoolValue { command: ETHTOOL_STXCSUM, data: 0 };
    // SAFETY: `ifreq` is plain data for which all zero bytes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(interface.bytes()) {
        *to = from as _;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))
        .map_err(|e| LabError::system("open a socket", e))?;
    // SAFETY: `request` and the `value` it points at outlive the call; the command reads one `ethtool_value`.
    let r = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if r < 0 { Err(LabError::last_os("turn transmit checksums off")) } else { Ok(()) }
}

fn load(prog_type: u32, code: &[Insn], doing: &str) -> Result<OwnedFd> {
    let mut attr = ProgLoad {
        prog_type,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: c"MIT".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: `attr` has the layout that the command reads, of the size told; the pointers in it live until after the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw mut attr, std::mem::size_of::<ProgLoad>())
    };
    if fd < 0 {
        return Err(LabError::last_os(doing));
    }
    // SAFETY: the kernel just gave this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
