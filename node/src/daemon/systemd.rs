//! What systemd is told (sd_notify(3)). Without systemd there is nobody to tell, and nothing happens.

use std::time::Duration;

use komainu_cluster::shell::ClusterHandle;
use sd_notify::NotifyState;

/// Everything has been started. Not: the cluster has a leader. A first node alone would otherwise never be ready, and
/// the others wait for it.
pub(super) fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The node is handing over.
pub(super) fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("handing over")]);
}

/// The line in `systemctl status`.
pub(super) fn status(line: &str) {
    tell(&[NotifyState::Status(line)]);
}

/// Tells for ever that the node lives, twice in each of the manager's periods; returns at once where it asks for nothing.
///
/// The runtime shows by ticking, the cluster layer by answering, that they live. The data path is not asked: a node with a
/// broken one hands its groups over and stays in the quorum, where restarting it would help nobody.
pub(super) async fn watchdog(cluster: ClusterHandle) {
    let Some(period) = sd_notify::watchdog_enabled().filter(|p| *p > Duration::ZERO) else { return };
    let mut ticks = tokio::time::interval(period / 2);
    loop {
        ticks.tick().await;
        let cluster = cluster.clone();
        if tokio::task::spawn_blocking(move || drop(cluster.live())).await.is_ok() {
            tell(&[NotifyState::Watchdog]);
        }
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("systemd can't be told: {error}");
    }
}
