//! Findings and how they are shown.

use std::fmt;

use komainu_packet::lane::kernel::Choice;
use serde::Serialize;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// The daemon starts, and something will not work as well as it could.
    Warn,
    /// The daemon does not start.
    Fail,
}

impl Level {
    fn as_str(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        }
    }
}

/// Something found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// What it is about: `interface eth0`, `data_dir`, `clock`, …
    pub subject: String,
    /// What was found.
    pub text: String,
    /// What to do; empty when nothing is to be done or `text` says it.
    pub action: String,
}

impl Finding {
    pub(super) fn ok(subject: impl Into<String>, text: impl Into<String>) -> Finding {
        Finding { level: Level::Ok, subject: subject.into(), text: text.into(), action: String::new() }
    }

    pub(super) fn warn(
        subject: impl Into<String>,
        text: impl Into<String>,
        action: impl Into<String>,
    ) -> Finding {
        Finding { level: Level::Warn, subject: subject.into(), text: text.into(), action: action.into() }
    }

    pub(super) fn fail(
        subject: impl Into<String>,
        text: impl Into<String>,
        action: impl Into<String>,
    ) -> Finding {
        Finding { level: Level::Fail, subject: subject.into(), text: text.into(), action: action.into() }
    }
}

/// One line: subject, text, action.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.text)?;
        if !self.action.is_empty() {
            write!(f, "; {}", self.action)?;
        }
        Ok(())
    }
}

/// Everything found, in the order of looking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The findings.
    pub findings: Vec<Finding>,
    /// The lane to run; absent on a witness, and where the node file is wrong.
    pub choice: Option<Choice>,
}

impl Report {
    /// Whether the daemon would start.
    pub fn ok(&self) -> bool {
        self.failures().next().is_none()
    }

    /// What keeps the daemon from starting.
    pub fn failures(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|f| f.level == Level::Fail)
    }

    /// `{"ok": …, "findings": [{"level", "subject", "text", "action"}]}`
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "ok": self.ok(), "findings": self.findings })
    }
}

/// One line a finding, level first.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{:<5} {finding}", finding.level.as_str())?;
        }
        Ok(())
    }
}
