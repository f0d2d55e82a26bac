//! The program, loaded: the room that its maps have, and its test runs.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use aya::maps::{MapData, RingBuf};
use aya::programs::{SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};

use super::maps::Maps;
use super::news::News;
use super::sys::{self, Ran};
use super::table;
use crate::plan::MAX_SERVICES;

/// The object for the XDP hook, for a loader of one's own.
pub static XDP_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/xdp.o"));
/// The object for the tc hook.
pub static TC_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tc.o"));

/// Where a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hook {
    /// At the driver, or right behind it (generic XDP).
    Xdp,
    /// At traffic control, ingress.
    Tc,
}

impl Hook {
    /// The word used in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Hook::Xdp => "xdp",
            Hook::Tc => "tc",
        }
    }
}

/// Room in the maps. It is taken when the program is loaded, except that of flows, whose table grows with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Backends' states (numbers below this): 592 bytes each and 64 more for each processor. What goes beyond goes up.
    pub backends: u32,
    /// Services' states.
    pub services: u32,
    /// Flows, 110 bytes each when there are so many. What goes beyond goes up.
    pub flows: u32,
    /// Flows that there is room for at first.
    pub first_flows: u32,
    /// Routes.
    pub routes: u32,
    /// Neighbours.
    pub neighbours: u32,
}

impl Default for Sizes {
    fn default() -> Sizes {
        Sizes {
            backends: 1 << 14,
            // Those in force, and as many that flows of an earlier plan still refer to.
            services: 2 * MAX_SERVICES as u32,
            flows: crate::engine::DEFAULT_MAX_FLOWS as u32,
            first_flows: 1 << 14,
            routes: 1 << 16,
            neighbours: 1 << 16,
        }
    }
}

/// Maglev tables of the plan in force and of the next one, each with its base table.
pub(super) const MAX_TABLES: u32 = 4 * MAX_SERVICES as u32 + 1;
/// Own addresses of the host. A host with more of them sends answers to the rest to user space.
const MAX_HOST_ADDRESSES: u32 = 4096;

/// Why the program or its maps can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The kernel refused the program.
    #[error("the kernel refused the program for {hook}: {reason}")]
    Refused {
        /// Hook.
        hook: &'static str,
        /// The loader's words and the verifier's log.
        reason: String,
    },
    /// A map could not be read or written.
    #[error("{doing}: {source}")]
    Map {
        /// What was being done.
        doing: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl KernelError {
    pub(super) fn map(doing: impl Into<String>) -> impl FnOnce(io::Error) -> KernelError {
        let doing = doing.into();
        move |source| KernelError::Map { doing, source }
    }
}

/// A loaded program. Dropping it closes programs and maps; what is attached by a pinned link stays.
#[derive(Debug)]
pub struct Kernel {
    hook: Hook,
    ebpf: Ebpf,
    maps: Arc<Maps>,
    news: Option<News>,
}

impl Kernel {
    /// Loads the program for `hook` with maps of these sizes. Nothing is attached, and without a plan and ports the program
    /// lets everything pass.
    ///
    /// # Errors
    /// The kernel refuses: the verifier's log is in the error.
    pub fn load(hook: Hook, sizes: Sizes) -> Result<Kernel, KernelError> {
        let object = match hook {
            Hook::Xdp => XDP_OBJECT,
            Hook::Tc => TC_OBJECT,
        };
        let refused = |reason: String| KernelError::Refused { hook: hook.as_str(), reason };
        let cpus = possible_cpus().map_err(KernelError::map("count the processors"))?;
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("slots", MAX_TABLES)
            .map_max_entries("pool", table::blocks(sizes.flows))
            .map_max_entries("backends", sizes.backends)
            .map_max_entries("seen", sizes.backends)
            .map_max_entries("traffic", sizes.backends.saturating_mul(cpus))
            .map_max_entries("tally", cpus)
            .map_max_entries("grants", cpus)
            .map_max_entries("services", sizes.services)
            .map_max_entries("routes", sizes.routes)
            .map_max_entries("neighbours", sizes.neighbours)
            .map_max_entries("host", MAX_HOST_ADDRESSES)
            .load(object)
            .map_err(|e| refused(words(&e)))?;
        let maps = Arc::new(Maps::new(&mut ebpf, sizes, cpus)?);
        let mut kernel = Kernel { hook, ebpf, maps, news: None };
        match hook {
            Hook::Xdp => kernel.xdp().map(Xdp::load),
            Hook::Tc => kernel.tc().map(SchedClassifier::load),
        }
        .unwrap_or(Ok(()))
        .map_err(|e| refused(words(&e)))?;
        // Mapped only after the program that writes into it is there.
        let ring = kernel.ebpf.take_map("news").ok_or_else(|| io::Error::other("the object has no such map"));
        let ring = ring.and_then(|map| RingBuf::<MapData>::try_from(map).map_err(io::Error::other));
        let ring = ring.map_err(KernelError::map("open the ring \"news\""))?;
        kernel.news = Some(News::new(ring, Arc::clone(&kernel.maps)));
        Ok(kernel)
    }

    /// What the program tells of its flows: once.
    pub fn take_news(&mut self) -> Option<News> {
        self.news.take()
    }

    /// Hook that it was loaded for.
    pub fn hook(&self) -> Hook {
        self.hook
    }

    /// Its maps.
    pub fn maps(&self) -> &Arc<Maps> {
        &self.maps
    }

    /// The program, to be attached; `None` when it was loaded for the other hook.
    pub fn xdp(&mut self) -> Option<&mut Xdp> {
        self.ebpf.program_mut(PROGRAM)?.try_into().ok()
    }

    /// The program, to be attached; `None` when it was loaded for the other hook.
    pub fn tc(&mut self) -> Option<&mut SchedClassifier> {
        self.ebpf.program_mut(PROGRAM)?.try_into().ok()
    }

    /// Descriptor of the program.
    ///
    /// # Errors
    /// It is not loaded.
    pub fn program_fd(&self) -> io::Result<BorrowedFd<'_>> {
        let program = self.ebpf.program(PROGRAM).ok_or_else(|| io::Error::other("no program"))?;
        program.fd().map(AsFd::as_fd).map_err(io::Error::other)
    }

    /// Runs the program `repeat` times on `frame` without sending anything; the mean time is in the answer. It comes by the
    /// interface with index 1 of the caller's namespace, so tests give that index to the port that they mean.
    /// `context`: `struct xdp_md` or `struct __sk_buff`.
    ///
    /// # Errors
    /// As `BPF_PROG_TEST_RUN`: `EINVAL` for a frame shorter than an Ethernet header, too.
    pub fn test_run(&self, frame: &[u8], context: Option<&[u8]>, repeat: u32) -> io::Result<Ran> {
        sys::test_run(self.program_fd()?, frame, context, repeat)
    }
}

/// Name of the program in both objects.
const PROGRAM: &str = "komainu";

/// An error with all that caused it.
pub(super) fn words(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        let more = e.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = e.source();
    }
    text
}

/// Processors that may ever come up: the program counts by their numbers.
fn possible_cpus() -> io::Result<u32> {
    // As "0-3,8-11".
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|n| n.parse::<u32>().ok());
    last.map(|n| n + 1).ok_or_else(|| io::Error::other(format!("unexpected list of processors {text:?}")))
}
