//! Hands what `raft` logs through `slog` on to `tracing`, later: `raft` is called while the lock of [`crate::pulse::Pulse`]
//! is held, and whoever writes a log line may wait for a disk or a terminal.

use std::cell::RefCell;

use slog::{Drain, KV, Logger, Never, OwnedKVList, Record, o};

/// Lines that wait. One call of `raft` logs a handful.
const MAX_WAITING: usize = 256;

thread_local! {
    static WAITING: RefCell<Vec<(tracing::Level, String)>> = const { RefCell::new(Vec::new()) };
}

struct ToTracing;

/// The logger that `raft` is given.
pub(crate) fn logger() -> Logger {
    Logger::root(ToTracing, o!())
}

/// Writes the lines that wait on this thread. Not to be called with a lock held.
pub(crate) fn flush() {
    for (level, line) in WAITING.take() {
        match level {
            tracing::Level::ERROR => tracing::error!(target: "komainu::raft", "{line}"),
            tracing::Level::DEBUG => tracing::debug!(target: "komainu::raft", "{line}"),
            _ => tracing::trace!(target: "komainu::raft", "{line}"),
        }
    }
}

impl Drain for ToTracing {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        // What `raft` calls info happens at every vote; operators get the events of the replicated state instead.
        let level = if record.level().is_at_least(slog::Level::Error) {
            tracing::Level::ERROR
        } else if record.level().is_at_least(slog::Level::Warning) {
            tracing::Level::DEBUG
        } else {
            tracing::Level::TRACE
        };
        let wanted = match level {
            tracing::Level::ERROR => true,
            tracing::Level::DEBUG => tracing::enabled!(target: "komainu::raft", tracing::Level::DEBUG),
            _ => tracing::enabled!(target: "komainu::raft", tracing::Level::TRACE),
        };
        if wanted {
            WAITING.with_borrow_mut(|lines| {
                if lines.len() < MAX_WAITING {
                    lines.push((level, format!("{}{}", record.msg(), fields(record, values))));
                }
            });
        }
        Ok(())
    }
}

/// ` key=value …`
fn fields(record: &Record<'_>, values: &OwnedKVList) -> String {
    struct Text(String);
    impl slog::Serializer for Text {
        fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
            use std::fmt::Write as _;
            write!(self.0, " {key}={value}").map_err(slog::Error::from)
        }
    }
    let mut text = Text(String::new());
    // A value that can't be written as text is left out.
    let _ = record.kv().serialize(record, &mut text);
    let _ = values.serialize(record, &mut text);
    text.0
}
