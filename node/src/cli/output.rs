//! Lines on stdout that survive a closed pipe.

use std::io::{self, Write};

use serde::Serialize;

use super::CliError;

/// Where a command's result goes, and in which form.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
}

impl Output {
    /// For people, or JSON and nothing else.
    pub fn new(json: bool) -> Self {
        Output { json }
    }

    /// Whether JSON is wanted.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Writes `text` as it is.
    ///
    /// # Errors
    /// [`CliError::Closed`] when nobody reads any more, or why it can't be written.
    pub fn text(&self, text: &str) -> Result<(), CliError> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(closed)
    }

    /// Writes a line.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub fn line(&self, line: &str) -> Result<(), CliError> {
        self.text(&format!("{line}\n"))
    }

    /// Writes `value` as JSON: indented for one, on one line for one of a stream.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub fn value(&self, value: &impl Serialize, stream: bool) -> Result<(), CliError> {
        let text = if stream { serde_json::to_string(value) } else { serde_json::to_string_pretty(value) }
            .map_err(|error| CliError::new(format!("can't write JSON: {error}")))?;
        self.line(&text)
    }

    /// Says something on stderr that is not the result: progress, a hint.
    pub fn progress(&self, line: &str) {
        let _ = writeln!(io::stderr().lock(), "{line}");
    }

    /// Writes `value` as JSON where that is wanted, else `text()`.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub fn either(&self, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), CliError> {
        if self.json { self.value(value, false) } else { self.text(&text()) }
    }
}

fn closed(error: io::Error) -> CliError {
    match error.kind() {
        io::ErrorKind::BrokenPipe => CliError::Closed,
        _ => CliError::new(format!("stdout: can't be written: {error}; see where it leads to")),
    }
}
