//! Programs on interfaces: pinned links where the kernel has them, so that a crash leaves the data path where it is for the
//! rest of its lease and a restart replaces it in one step.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use super::link::{Link, Point};
use super::pins;
use super::program::Hook;
use crate::netlink::{self, XdpState, traffic_control};

/// [`Attached::mode`] of an XDP program that runs behind the driver.
pub const GENERIC: &str = "generic";

/// A program on an interface. Dropping it takes it away.
#[derive(Debug)]
pub struct Attached {
    ifindex: u32,
    how: How,
}

#[derive(Debug)]
enum How {
    /// By a pinned link.
    Link { _link: Link, pin: PathBuf, point: Point },
    /// As a filter of the `clsact` queueing discipline, on kernels without links for that hook.
    Filter,
}

impl Attached {
    /// Puts `program` on an interface. What an earlier process left there is replaced in one step. `links`: whether a link holds
    /// it at the tc hook where the kernel has such links.
    ///
    /// # Errors
    /// What the kernel refused, in a sentence with what to do.
    pub fn new(
        hook: Hook,
        program: BorrowedFd<'_>,
        name: &str,
        ifindex: u32,
        links: bool,
    ) -> Result<Attached, String> {
        let refused = |doing: &str| {
            let doing = format!("interface \"{name}\": {doing}");
            move |e: io::Error| format!("{doing}: {e}")
        };
        let directory = pins::directory().map_err(refused("find the directory for its link"))?;
        let pin = pins::path(&directory, name, hook);
        let other = pins::path(&directory, name, if hook == Hook::Xdp { Hook::Tc } else { Hook::Xdp });
        let links = links || hook == Hook::Xdp;
        let adopted = if links { adopt(hook, program, ifindex, &pin) } else { None };
        let how = match adopted {
            Some((link, point)) => How::Link { _link: link, pin, point },
            None => {
                pins::unlink(&pin).map_err(refused("remove an old link"))?;
                let created = if links { create(hook, program, name, ifindex)? } else { None };
                match created {
                    Some((link, point)) => {
                        pin_in(&directory, &link, &pin).map_err(refused("pin its link"))?;
                        How::Link { _link: link, pin, point }
                    }
                    None => {
                        traffic_control::attach(ifindex, program)
                            .map_err(refused("attach a filter to clsact"))?;
                        How::Filter
                    }
                }
            }
        };
        // Left by a process that ran another lane.
        pins::unlink(&other).map_err(refused("remove the link of another lane"))?;
        Ok(Attached { ifindex, how })
    }

    /// Number of the interface.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// How it is attached, for `lane_mode`.
    pub fn mode(&self) -> &'static str {
        match &self.how {
            How::Link { point: Point::XdpNative, .. } => "native",
            How::Link { point: Point::XdpGeneric, .. } => GENERIC,
            How::Link { point: Point::Tcx, .. } => "tcx",
            How::Filter => "clsact",
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        match &self.how {
            How::Link { pin, .. } => {
                if let Err(e) = pins::unlink(pin) {
                    tracing::warn!(pin = %pin.display(), error = %e, "the program's link could not be removed");
                }
                if let Some(directory) = pin.parent() {
                    pins::tidy(directory);
                }
            }
            How::Filter => {
                // The interface may be gone, and the filter with it.
                let _ = traffic_control::detach(self.ifindex);
            }
        }
    }
}

/// Pins a link. Another process that tidies up may take the directory away while it is empty.
fn pin_in(directory: &Path, link: &Link, pin: &Path) -> io::Result<()> {
    const TRIES: usize = 16;
    let mut outcome = Ok(());
    for _ in 0..TRIES {
        pins::make(directory)?;
        outcome = link.pin(pin);
        match &outcome {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            _ => break,
        }
    }
    outcome
}

/// Takes over the link that an earlier process left, if it is on this interface still.
fn adopt(hook: Hook, program: BorrowedFd<'_>, ifindex: u32, pin: &Path) -> Option<(Link, Point)> {
    let link = Link::pinned(pin).ok()?;
    let point = match hook {
        Hook::Tc => Point::Tcx,
        // Native is preferred, and so an old generic one is not taken over where native can be had now: a driver does not
        // learn that while the machine runs.
        Hook::Xdp if xdp_state(ifindex) == XdpState::Native => Point::XdpNative,
        Hook::Xdp => Point::XdpGeneric,
    };
    if link.interface(point).ok()? != Some(ifindex) {
        return None;
    }
    link.update(program).ok()?;
    Some((link, point))
}

fn xdp_state(ifindex: u32) -> XdpState {
    let snapshot = netlink::read_once().unwrap_or_default();
    snapshot.links.iter().find(|l| l.index == ifindex).map_or(XdpState::None, |l| l.xdp)
}

/// `None`: by a filter.
fn create(
    hook: Hook,
    program: BorrowedFd<'_>,
    name: &str,
    ifindex: u32,
) -> Result<Option<(Link, Point)>, String> {
    let points: &[Point] = match hook {
        Hook::Xdp => &[Point::XdpNative, Point::XdpGeneric],
        Hook::Tc => &[Point::Tcx],
    };
    let mut error = None;
    for &point in points {
        match Link::create(program, ifindex, point) {
            Ok(link) => return Ok(Some((link, point))),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EEXIST)) && hook == Hook::Xdp => {
                return Err(format!(
                    "interface \"{name}\": another XDP program is attached (\"ip link set {name} xdp off\" and \
                     \"xdpgeneric off\", or end who attached it)"
                ));
            }
            // A kernel that doesn't know links for this hook.
            Err(e) if hook == Hook::Tc && e.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            Err(e) => {
                tracing::debug!(interface = name, ?point, error = %e, "can't attach here");
                error = Some(e);
            }
        }
    }
    Err(match error {
        Some(e) => format!("interface \"{name}\": the kernel refuses to attach the program: {e}"),
        None => format!("interface \"{name}\": there is no way to attach the program"),
    })
}
