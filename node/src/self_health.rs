//! Is this node fit to own a VIP group? Links, data path, gateway.
//!
//! The cluster layer carries the answer on beats; the leader moves groups away from a node that isn't fit while that
//! node still lives. A death of the whole node needs none of this: there the lease runs out.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use komainu_cluster::api::SelfHealth;
use komainu_packet::lane::{LinkInfo, SharedLane};
use komainu_proto::domain::{CheckType, Health, HealthCheck};
use tokio::time::MissedTickBehavior;

use crate::health::probe::NetProbe;
use crate::health::rise_fall::RiseFall;

/// Time between two looks at the links: a pulled cable costs the detection, a hand-over and an announcement, so it
/// should be of the order of a lease. The lane answers from memory.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// Time between two questions to the gateway. With [`GATEWAY_FALL`] a dead gateway is noticed in 1.5 s; faster would
/// move groups because of one lost echo.
const GATEWAY_EVERY: Duration = Duration::from_millis(500);
/// Time that the gateway has to answer.
const GATEWAY_TIMEOUT_MS: u32 = 400;
/// Answers in a row that make the gateway reachable again.
const GATEWAY_RISE: u32 = 2;
/// Silences in a row that make the gateway unreachable.
const GATEWAY_FALL: u32 = 3;

/// Looks at the lane, and tells every change of the verdict until dropped (or aborted: nothing is held across an await).
///
/// `gateway` is asked by ICMP echo. Until its first answer or [`GATEWAY_FALL`] silences it counts as unknown, which
/// makes nobody unfit.
pub async fn watch(lane: SharedLane, gateway: Option<IpAddr>, told: impl Fn(SelfHealth)) {
    let gateway_health = Arc::new(AtomicU8::new(Health::Unknown as u8));
    let ask = ask_gateway(gateway, gateway_health.clone());
    let look = async {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = None;
        loop {
            ticks.tick().await;
            let now = assess(&lane.links(), lane.forwarding(), gateway.map(|g| (g, load(&gateway_health))));
            if before.as_ref() != Some(&now) {
                told(now.clone());
                before = Some(now);
            }
        }
    };
    tokio::join!(ask, look);
}

/// The verdict from what is known.
fn assess(
    links: &[LinkInfo],
    forwarding: Result<(), String>,
    gateway: Option<(IpAddr, Health)>,
) -> SelfHealth {
    let down: Vec<_> = links.iter().filter(|l| !l.up).map(|l| l.name.as_str()).collect();
    let gateway_dead = gateway.filter(|(_, health)| *health == Health::Down);
    let mut reasons = Vec::new();
    if !down.is_empty() {
        reasons.push(format!("no link on {}", down.join(", ")));
    }
    if let Some((address, _)) = gateway_dead {
        reasons.push(format!("gateway {address} does not answer"));
    }
    let works = forwarding.is_ok();
    reasons.extend(forwarding.err().map(|reason| format!("the data path does not forward: {reason}")));
    SelfHealth {
        links_up: down.is_empty(),
        gateway: gateway.map(|_| gateway_dead.is_none()),
        forwarding: works,
        reason: reasons.join("; "),
    }
}

/// Asks for ever; returns at once when there is nobody to ask.
async fn ask_gateway(gateway: Option<IpAddr>, verdict: Arc<AtomicU8>) {
    let Some(gateway) = gateway else { return };
    let probe = NetProbe::without_roots();
    let check =
        HealthCheck { kind: CheckType::Icmp, timeout_ms: GATEWAY_TIMEOUT_MS, ..HealthCheck::default() };
    let mut counter = RiseFall::new(GATEWAY_RISE, GATEWAY_FALL, Health::Unknown);
    let mut ticks = tokio::time::interval(GATEWAY_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let answer = probe.ask(SocketAddr::new(gateway, 0), &check).await;
        if let Some(health) = counter.record(answer.success) {
            tracing::info!(%gateway, %health, reason = answer.reason, "gateway");
            verdict.store(health as u8, Ordering::Relaxed);
        }
    }
}

fn load(verdict: &AtomicU8) -> Health {
    let value = verdict.load(Ordering::Relaxed);
    Health::ALL.iter().copied().find(|h| *h as u8 == value).unwrap_or(Health::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, up: bool) -> LinkInfo {
        LinkInfo { name: name.to_owned(), up, mac: None, addresses: vec![] }
    }

    const GATEWAY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 254));

    #[test]
    fn fit_when_nothing_speaks_against_it() {
        for gateway in [None, Some((GATEWAY, Health::Up)), Some((GATEWAY, Health::Unknown))] {
            let health = assess(&[link("eth0", true)], Ok(()), gateway);
            assert!(health.fit() && health.reason.is_empty(), "{health:?}");
            assert_eq!(health.gateway, gateway.map(|_| true));
        }
    }

    #[test]
    fn every_reason_makes_unfit_and_is_named() {
        let up = [link("eth0", true), link("eth1", true)];
        let one_down = [link("eth0", true), link("eth1", false)];
        for (links, fault, gateway, reason) in [
            (&one_down, None, None, "no link on eth1"),
            (&up, Some("its receiver ended"), None, "the data path does not forward: its receiver ended"),
            (&up, None, Some((GATEWAY, Health::Down)), "gateway 192.0.2.254 does not answer"),
            (
                &one_down,
                None,
                Some((GATEWAY, Health::Down)),
                "no link on eth1; gateway 192.0.2.254 does not answer",
            ),
        ] {
            let health = assess(links, fault.map_or(Ok(()), |f: &str| Err(f.to_owned())), gateway);
            assert!(!health.fit(), "{health:?}");
            assert_eq!(health.reason, reason);
        }
    }

    #[test]
    fn health_survives_its_atomic() {
        for health in Health::ALL {
            assert_eq!(load(&AtomicU8::new(*health as u8)), *health);
        }
    }
}
