//! What tests and benchmarks put around the program.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use aya::programs::Xdp;
use aya::{Ebpf, EbpfLoader};

use super::abi::Bench;
use super::maps::{descriptor, mapped};
use super::program::{KernelError, words};
use super::sys::{self, Mapped, Ran};

/// The object, for a loader of one's own.
pub static HARNESS_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/harness.o"));

/// What tests and benchmarks put around the program (`packet/bpf/harness.c`).
#[derive(Debug)]
pub struct Harness {
    ebpf: Ebpf,
    bench: Mapped<Bench>,
    measured: OwnedFd,
}

impl Harness {
    /// Loads every program of the harness.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn load() -> Result<Harness, KernelError> {
        let refused = |reason: String| KernelError::Refused { hook: "tests", reason };
        let mut ebpf = EbpfLoader::new().load(HARNESS_OBJECT).map_err(|e| refused(words(&e)))?;
        for (_, program) in ebpf.programs_mut() {
            let program: &mut Xdp = program.try_into().map_err(|e| refused(words(&e)))?;
            program.load().map_err(|e| refused(words(&e)))?;
        }
        let open = |name: &str| {
            let map = ebpf.map(name).ok_or_else(|| io::Error::other("the object has no such map"));
            map.and_then(descriptor).map_err(KernelError::map(format!("open the map \"{name}\"")))
        };
        let bench = mapped(&open("bench")?, 1)?;
        let measured = open("measured")?;
        Ok(Harness { ebpf, bench, measured })
    }

    /// Descriptor of one of its programs.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn program(&self, name: &str) -> io::Result<BorrowedFd<'_>> {
        let program =
            self.ebpf.program(name).ok_or_else(|| io::Error::other(format!("no program {name}")))?;
        program.fd().map(AsFd::as_fd).map_err(io::Error::other)
    }

    /// Runs one of its programs.
    ///
    /// # Errors
    /// As `BPF_PROG_TEST_RUN`.
    pub fn run(&self, name: &str, frame: &[u8], repeat: u32) -> io::Result<Ran> {
        sys::test_run(self.program(name)?, frame, None, repeat)
    }

    /// Has `vary` call `program` with the packets that `bench` describes.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn measure(&self, program: BorrowedFd<'_>, bench: &Bench) -> io::Result<()> {
        self.bench.write(0, bench);
        sys::update(self.measured.as_fd(), &0u32, &program.as_raw_fd(), 0)
    }
}
