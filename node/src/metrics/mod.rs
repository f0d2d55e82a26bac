//! The pages for machines: `/metrics` (Prometheus), `/healthz` (the process lives), `/readyz` (the node is a working
//! member).
//!
//! Nothing is counted here: everything is read when somebody asks, so that a node that nobody scrapes pays nothing.
//! `docs/metrics.md` lists the metrics; a test keeps it and [`families`] the same.

pub mod families;
pub mod sharing;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

pub use families::Snapshot;

/// What `/metrics` answers with (OpenMetrics 1.0).
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where the pages get what they show.
pub trait Source: Send + Sync + 'static {
    /// Everything that is exported, at this moment. May wait for the data path's thread for a moment.
    fn snapshot(&self) -> Snapshot;

    /// Why the node is not a working member of its cluster, a sentence each; empty when it is.
    fn unready(&self) -> Vec<String>;
}

/// Serves the pages until dropped.
///
/// # Errors
/// The listener broke.
pub async fn serve(listener: TcpListener, source: Arc<dyn Source>) -> std::io::Result<()> {
    axum::serve(listener, router(source)).await
}

/// Opens the listener.
///
/// # Errors
/// The address can't be listened on.
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// The pages, for whoever has a listener and further pages of his own.
pub fn router(source: Arc<dyn Source>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .with_state(source)
}

async fn metrics(Shared(source): Shared<Arc<dyn Source>>) -> Response {
    // Asks the data path's thread, so not on a thread that other tasks wait for.
    match tokio::task::spawn_blocking(move || encode(source.snapshot())).await {
        Ok(Ok(text)) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Ok(Err(_)) | Err(_) => {
            (StatusCode::INTERNAL_SERVER_ERROR, "the metrics can't be read\n").into_response()
        }
    }
}

async fn ready(Shared(source): Shared<Arc<dyn Source>>) -> Response {
    let reasons = source.unready();
    if reasons.is_empty() {
        return "ready\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", reasons.join("; "))).into_response()
}

/// The text form of a snapshot.
///
/// # Errors
/// None that happens: writing to memory.
pub fn encode(snapshot: Snapshot) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Once(snapshot)));
    let mut page = String::new();
    text::encode(&mut page, &registry)?;
    Ok(page)
}

#[derive(Debug)]
struct Once(Snapshot);

impl Collector for Once {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        families::all(&self.0).iter().try_for_each(|family| family.encode(&mut encoder))
    }
}

#[cfg(test)]
mod tests;
