//! What happened to the cluster, for operators and the audit log.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Command, MAX_EVENTS, MAX_REASON_LEN, State};

/// Kind of an [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// The document changed, or waits for a confirmation, or was confirmed.
    Document,
    /// A backend's administrative state changed.
    Admin,
    /// A backend's health changed.
    Health,
    /// A group's owner changed, or an operator wants it elsewhere.
    Owner,
    /// A node joined, left, or changed.
    Member,
}

impl EventKind {
    /// The word used in CLI, JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            EventKind::Document => "document",
            EventKind::Admin => "admin",
            EventKind::Health => "health",
            EventKind::Owner => "owner",
            EventKind::Member => "member",
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Log index of its command. Several events may share one.
    pub index: u64,
    /// The proposer's wall clock, ms since 1970.
    pub wall_ms: u64,
    /// Who asked.
    pub who: String,
    /// Kind.
    pub kind: EventKind,
    /// What it is about, by name: a group, `service/backend`, a node; empty for the document.
    pub subject: String,
    /// What happened, in words.
    pub text: String,
}

impl State {
    pub(super) fn event(&mut self, command: &Command, kind: EventKind, subject: &str, text: String) {
        self.events.push_back(Arc::new(Event {
            index: self.index,
            wall_ms: command.wall_ms,
            who: cut(&command.who).to_owned(),
            kind,
            subject: subject.to_owned(),
            text,
        }));
        while self.events.len() > MAX_EVENTS {
            self.events.pop_front();
        }
    }
}

/// At most [`MAX_REASON_LEN`] bytes of `text`, cut at a character's end.
pub(super) fn cut(text: &str) -> &str {
    if text.len() <= MAX_REASON_LEN {
        return text;
    }
    let mut end = MAX_REASON_LEN;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
