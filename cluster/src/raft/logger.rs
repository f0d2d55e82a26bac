//! Hands what `raft` logs through `slog` on to `tracing`.

use slog::{Drain, KV, Logger, Never, OwnedKVList, Record, o};

struct ToTracing;

/// The logger that `raft` is given.
pub(crate) fn logger() -> Logger {
    Logger::root(ToTracing, o!())
}

impl Drain for ToTracing {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        // What `raft` calls info happens at every vote; operators get the events of the replicated state instead.
        let level = record.level();
        if level.is_at_least(slog::Level::Error) {
            tracing::error!(target: "komainu::raft", "{}{}", record.msg(), fields(record, values));
        } else if level.is_at_least(slog::Level::Warning) {
            tracing::debug!(target: "komainu::raft", "{}{}", record.msg(), fields(record, values));
        } else if level.is_at_least(slog::Level::Info)
            && tracing::enabled!(target: "komainu::raft", tracing::Level::TRACE)
        {
            tracing::trace!(target: "komainu::raft", "{}{}", record.msg(), fields(record, values));
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
