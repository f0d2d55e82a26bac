//! A program at the traffic-control hook of kernels that have no links for it (before Linux 6.6): a filter of the `clsact`
//! queueing discipline, in direct action (tc-bpf(8)).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};

use super::wire::Requests;

/// Name of the filter, and of nobody else's.
const NAME: &str = "komainu";
/// Our filter comes first, and a filter of this priority and handle is ours.
const PRIORITY: u32 = 1;
const HANDLE: u16 = 0x6b6d;

/// Puts `program` in front of what comes in by an interface, in one step in place of an earlier one of ours.
///
/// # Errors
/// As the kernel refuses it.
pub fn attach(ifindex: u32, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut kernel = Requests::new()?;
    let mut qdisc = TcMessage::with_index(ifindex as i32);
    qdisc.header.parent = TcHandle::CLSACT;
    qdisc.header.handle = TcHandle { major: 0xffff, minor: 0 };
    qdisc.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    let create = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    match kernel.ask(RouteNetlinkMessage::NewQueueDiscipline(qdisc), create) {
        Err(e) if e.raw_os_error() != Some(libc::EEXIST) => return Err(e),
        // There already: ours from before, or somebody else's, which it then shares.
        _ => {}
    }
    let mut filter = filter(ifindex);
    filter.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
            TcOption::Bpf(TcFilterBpfOption::ProgName(NAME.to_owned())),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]),
    ];
    let replace = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    kernel.ask(RouteNetlinkMessage::NewTrafficFilter(filter), replace)
}

/// Takes our program away. The queueing discipline stays: others may have filters there, and without any it does nothing.
///
/// # Errors
/// As the kernel refuses it: there is none.
pub fn detach(ifindex: u32) -> io::Result<()> {
    Requests::new()?.ask(RouteNetlinkMessage::DelTrafficFilter(filter(ifindex)), NLM_F_REQUEST | NLM_F_ACK)
}

fn filter(ifindex: u32) -> TcMessage {
    let mut filter = TcMessage::with_index(ifindex as i32);
    filter.header.parent = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };
    filter.header.handle = TcHandle { major: 0, minor: HANDLE };
    // Protocol ETH_P_ALL in network byte order.
    filter.header.info = PRIORITY << 16 | u32::from((libc::ETH_P_ALL as u16).to_be());
    filter.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    filter
}
