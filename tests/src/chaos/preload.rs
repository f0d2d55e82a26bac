//! Bad disks and wrong clocks for a process that knows nothing of them: libraries that stand before the system's (`LD_PRELOAD`, ld.so(8)).

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// File beside a node's data whose number of milliseconds every sync waits.
pub const DELAY_FILE: &str = "sync-delay-ms";
/// Environment variable that names the file which a [`WallClock`] is set by.
pub const CLOCK_VARIABLE: &str = "KOMAINU_CHAOS_CLOCK";
/// That file, in the lab's directory.
const CLOCK_FILE: &str = "wall-clock";

/// What stands before the system's library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preload {
    /// `fsync`, `fdatasync` and `sync_file_range` wait as many milliseconds as stand in [`DELAY_FILE`] beside the file's directory
    /// tree; nothing stands there at first.
    SlowSync,
    /// `CLOCK_REALTIME` is what a [`WallClock`] says; every other clock is the kernel's.
    WallClock,
}

impl Preload {
    /// Compiles it into `dir`.
    ///
    /// # Errors
    /// There is no C compiler, or it refuses.
    pub fn build(self, dir: &Path) -> Result<PathBuf> {
        let (name, text) = match self {
            Preload::SlowSync => ("slow_sync", SLOW_SYNC),
            Preload::WallClock => ("wall_clock", WALL_CLOCK),
        };
        let dir = std::path::absolute(dir)?;
        let source = dir.join(name).with_extension("c");
        let library = source.with_extension("so");
        fs::write(&source, text)?;
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(&library)
            .arg(&source)
            .arg("-ldl")
            .status()
            .context("run cc")?;
        if !status.success() {
            bail!("cc refused {}: {status}", source.display());
        }
        Ok(library)
    }
}

/// The wall clock of one process, among those that have [`Preload::WallClock`].
#[derive(Debug)]
pub struct WallClock {
    file: fs::File,
}

impl WallClock {
    /// The file by which clocks are set, all of them right; to be there before a process is that reads it.
    ///
    /// # Errors
    /// It can't be written.
    pub fn create(dir: &Path) -> Result<PathBuf> {
        let file = std::path::absolute(dir)?.join(CLOCK_FILE);
        fs::write(&file, [0; 24]).with_context(|| format!("write {}", file.display()))?;
        Ok(file)
    }

    /// Whoever sets them.
    ///
    /// # Errors
    /// [`WallClock::create`] was not called for that directory.
    pub fn open(dir: &Path) -> Result<WallClock> {
        let path = dir.join(CLOCK_FILE);
        let file = fs::File::options().read(true).write(true).open(&path);
        Ok(WallClock { file: file.with_context(|| format!("open {}", path.display()))? })
    }

    /// Sets the clock of `pid` back.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn set_back(&self, pid: i32, by: Duration) -> Result<()> {
        let mut words = [0; 24];
        words[8..16].copy_from_slice(&(-(by.as_secs() as i64)).to_ne_bytes());
        self.file.write_all_at(&words, 0)?;
        // The process last: from now on it holds.
        Ok(self.file.write_all_at(&i64::from(pid).to_ne_bytes(), 0)?)
    }

    /// Sets it right. How often it was asked for while it was wrong.
    ///
    /// # Errors
    /// The file can't be read or written.
    pub fn set_right(&self) -> Result<u64> {
        self.file.write_all_at(&[0; 8], 0)?;
        let mut asked = [0; 8];
        self.file.read_exact_at(&mut asked, 16)?;
        Ok(u64::from_ne_bytes(asked))
    }
}

/// Reads the number anew at each call: the test writes it while the node runs.
const SLOW_SYNC: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void wait_for_disk(int fd) {
    char link[64], path[PATH_MAX], number[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 32);
    if (n <= 0) return;
    path[n] = 0;
    for (char *slash; (slash = strrchr(path, '/')) && slash != path;) {
        strcpy(slash, "/sync-delay-ms");
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file >= 0) {
            n = read(file, number, sizeof number - 1);
            close(file);
            if (n <= 0) return;
            number[n] = 0;
            long ms = atol(number);
            struct timespec t = {ms / 1000, ms % 1000 * 1000000};
            nanosleep(&t, NULL);
            return;
        }
        *slash = 0;
    }
}

int fsync(int fd) {
    wait_for_disk(fd);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int fdatasync(int fd) {
    wait_for_disk(fd);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
}
int sync_file_range(int fd, off64_t offset, off64_t length, unsigned flags) {
    wait_for_disk(fd);
    return ((int (*)(int, off64_t, off64_t, unsigned))dlsym(RTLD_NEXT, "sync_file_range"))(fd, offset, length, flags);
}
"#;

/// The file is three words: the process, the seconds that are added to its clock, how often it asked meanwhile.
const WALL_CLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct wall { int64_t pid, seconds, asked; };
static volatile struct wall *wall;
static int (*real_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("KOMAINU_CHAOS_CLOCK");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof *wall, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    real_gettime = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    if (at != MAP_FAILED) wall = at;
}

static int64_t wrong_by(void) {
    if (!wall || wall->pid == 0 || wall->pid != getpid()) return 0;
    __sync_fetch_and_add(&wall->asked, 1);
    return wall->seconds;
}

int clock_gettime(clockid_t id, struct timespec *t) {
    int failed = real_gettime ? real_gettime(id, t) : (int)syscall(SYS_clock_gettime, id, t);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += wrong_by();
    return failed;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"#;
