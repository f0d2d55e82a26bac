//! The log: on stderr, for people or for machines.
//!
//! The node file's `[log]` decides; the environment goes before it, for whoever looks for a fault without touching the
//! file: `KOMAINU_LOG` (a filter like `info,komainu_cluster=debug`) and `KOMAINU_LOG_FORMAT` (`human` or `json`).

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::node::{Log, LogFormat};

/// Variable that names a filter.
pub const FILTER_VARIABLE: &str = "KOMAINU_LOG";
/// Variable that names a form.
pub const FORMAT_VARIABLE: &str = "KOMAINU_LOG_FORMAT";

/// Starts logging. A second call (tests) changes nothing.
pub fn start(log: &Log) {
    let filter = std::env::var(FILTER_VARIABLE).ok().and_then(|text| EnvFilter::try_new(text).ok());
    // The file's filter was checked when it was read.
    let filter = filter.unwrap_or_else(|| EnvFilter::new(&log.filter));
    let format = std::env::var(FORMAT_VARIABLE).ok().and_then(|word| word.parse().ok()).unwrap_or(log.format);
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let _ = match format {
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
        LogFormat::Human => {
            let layer = layer.with_ansi(std::io::stderr().is_terminal());
            // The journal has the time already.
            match std::env::var_os("JOURNAL_STREAM") {
                Some(_) => registry.with(layer.without_time()).try_init(),
                None => registry.with(layer).try_init(),
            }
        }
    };
}
