//! A TOML file read key by key.
//!
//! Every accessor notes what is wrong and goes on, so that all mistakes of a file are found in one run. A key that nobody
//! asked for is a mistake of its own: call [`Section::finish`] when everything has been asked.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::PathBuf;

use komainu_proto::domain::UnknownWord;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::mistake::{ConfigError, Mistake, nearest};

/// A file being read: its text and the mistakes so far.
pub struct Source<'a> {
    file: &'a str,
    text: &'a str,
    mistakes: RefCell<Vec<Mistake>>,
    /// Line of every field that was asked for, by path.
    lines: RefCell<BTreeMap<String, usize>>,
}

impl<'a> Source<'a> {
    /// A file named `file` in messages.
    pub fn new(file: &'a str, text: &'a str) -> Self {
        Source { file, text, mistakes: RefCell::default(), lines: RefCell::default() }
    }

    /// Reads the file through `read`, which gets its top-level table.
    ///
    /// # Errors
    /// All that is wrong: with the TOML itself, or noted by `read`.
    pub fn read<T>(self, read: impl FnOnce(&mut Section<'_>) -> Option<T>) -> Result<Read<T>, ConfigError> {
        let (root, errors) = DeTable::parse_recoverable(self.text);
        for error in &errors {
            self.note(
                error.span(),
                "",
                None,
                error.message().trim().to_owned(),
                "correct the TOML".to_owned(),
            );
        }
        let mut value = None;
        // Whatever a broken table says is not worth a second message.
        if errors.is_empty() {
            let mut section = Section {
                source: &self,
                table: root.get_ref(),
                path: String::new(),
                span: 0..0,
                known: Vec::new(),
            };
            value = read(&mut section);
            section.finish();
        }
        let mut mistakes = self.mistakes.into_inner();
        mistakes.sort_by_key(|m| m.line);
        match value {
            Some(value) if mistakes.is_empty() => Ok(Read { value, lines: self.lines.into_inner() }),
            _ => {
                assert!(!mistakes.is_empty(), "a reader that gives no value has noted why");
                Err(ConfigError { mistakes })
            }
        }
    }

    fn line(&self, span: &Range<usize>) -> usize {
        let start = span.start.min(self.text.len());
        self.text.as_bytes()[..start].iter().filter(|&&b| b == b'\n').count() + 1
    }

    fn note(
        &self,
        span: Option<Range<usize>>,
        field: &str,
        value: Option<String>,
        reason: String,
        action: String,
    ) {
        self.mistakes.borrow_mut().push(Mistake {
            file: self.file.to_owned(),
            line: span.map(|span| self.line(&span)),
            field: field.to_owned(),
            value,
            reason,
            action,
        });
    }
}

/// What a file said, and where.
#[derive(Debug)]
pub struct Read<T> {
    /// The content.
    pub value: T,
    /// Line of every field, by path (`service[0].backend[1].port`).
    pub lines: BTreeMap<String, usize>,
}

/// One table of a file.
pub struct Section<'a> {
    source: &'a Source<'a>,
    table: &'a DeTable<'a>,
    path: String,
    span: Range<usize>,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    /// The value of `key`; `None` when it is absent or wrong (then a mistake has been noted).
    pub fn optional<T: FromToml>(&mut self, key: &'static str) -> Option<T> {
        let value = self.get(key)?;
        let source = self.source;
        T::from_toml(value.get_ref(), &self.field(key), &mut |field, raw, reason, action| {
            source.note(Some(value.span()), field, Some(raw), reason, action);
        })
    }

    /// The value of `key`, which must be there.
    pub fn required<T: FromToml>(&mut self, key: &'static str, action: &str) -> Option<T> {
        if !self.has(key) {
            self.known(key);
            self.missing(key, action);
            return None;
        }
        self.optional(key)
    }

    /// The value of `key` or `default`. `None` only when it is wrong.
    pub fn or<T: FromToml>(&mut self, key: &'static str, default: T) -> Option<T> {
        if self.has(key) {
            self.optional(key)
        } else {
            self.known(key);
            Some(default)
        }
    }

    /// The table `[key]`, when it is there.
    pub fn section(&mut self, key: &'static str) -> Option<Section<'a>> {
        let value = self.get(key)?;
        match value.get_ref() {
            DeValue::Table(table) => Some(self.inner(table, self.field(key), value.span())),
            other => {
                let action = format!("write it as a table: [{}]", self.field(key));
                self.source.note(
                    Some(value.span()),
                    &self.field(key),
                    Some(show(other)),
                    "is not a table".to_owned(),
                    action,
                );
                None
            }
        }
    }

    /// The tables `[[key]]`, none when absent.
    pub fn sections(&mut self, key: &'static str) -> Vec<Section<'a>> {
        let Some(value) = self.get(key) else { return Vec::new() };
        let field = self.field(key);
        let DeValue::Array(array) = value.get_ref() else {
            let action = format!("write it as [[{}]]", strip_positions(&field));
            let reason = "is not a list of tables".to_owned();
            self.source.note(Some(value.span()), &field, Some(show(value.get_ref())), reason, action);
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (i, element) in array.iter().enumerate() {
            let field = format!("{field}[{i}]");
            match element.get_ref() {
                DeValue::Table(table) => sections.push(self.inner(table, field, element.span())),
                other => {
                    let action = format!("write it as [[{}]]", strip_positions(&field));
                    let reason = "is not a table".to_owned();
                    self.source.note(Some(element.span()), &field, Some(show(other)), reason, action);
                }
            }
        }
        sections
    }

    /// Whether `key` is written.
    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// Whether the value of `key` is a whole number.
    pub fn is_integer(&self, key: &str) -> bool {
        self.table.get(key).is_some_and(|value| value.get_ref().is_integer())
    }

    /// Notes that the value of `key` is wrong. A key that is absent is shown as its section.
    pub fn wrong(&self, key: &str, reason: impl Into<String>, action: impl Into<String>) {
        let value = self.table.get(key);
        let span = value.map_or_else(|| self.span.clone(), Spanned::span);
        let field = if key.is_empty() { self.path.clone() } else { self.field(key) };
        self.source.note(Some(span), &field, value.map(|v| show(v.get_ref())), reason.into(), action.into());
    }

    /// Notes that the file as a whole is of no use.
    pub fn empty(&self, reason: &str, action: &str) {
        self.source.note(None, "", None, reason.to_owned(), action.to_owned());
    }

    /// Notes that `key` is missing.
    pub fn missing(&self, key: &str, action: &str) {
        self.source.note(
            (!self.path.is_empty()).then(|| self.span.clone()),
            &self.field(key),
            None,
            "is missing".to_owned(),
            action.to_owned(),
        );
    }

    /// Number of mistakes noted so far, in the whole file.
    pub fn mistakes(&self) -> usize {
        self.source.mistakes.borrow().len()
    }

    /// Says that everything has been asked for: each other key is a mistake.
    pub fn finish(&mut self) {
        for (key, value) in self.table.iter() {
            let name: &str = key.get_ref();
            if self.known.contains(&name) {
                continue;
            }
            let action = match nearest(name, &self.known) {
                Some(meant) => format!("did you mean \"{meant}\"?"),
                None => format!("known here: {}", self.known.join(", ")),
            };
            let shown = match value.get_ref() {
                DeValue::Table(_) => None,
                DeValue::Array(array) if array.iter().any(|v| v.get_ref().is_table()) => None,
                other => Some(show(other)),
            };
            self.source.note(
                Some(key.span()),
                &self.field(name),
                shown,
                "is not a known key".to_owned(),
                action,
            );
        }
    }

    /// Path of `key`.
    pub fn field(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn inner(&self, table: &'a DeTable<'a>, path: String, span: Range<usize>) -> Section<'a> {
        self.source.lines.borrow_mut().insert(path.clone(), self.source.line(&span));
        Section { source: self.source, table, path, span, known: Vec::new() }
    }

    fn known(&mut self, key: &'static str) {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
    }

    fn get(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.known(key);
        let value = self.table.get(key)?;
        self.source.lines.borrow_mut().insert(self.field(key), self.source.line(&value.span()));
        Some(value)
    }
}

/// `cluster.peer[0]` → `cluster.peer`.
fn strip_positions(field: &str) -> String {
    field.split('.').map(|part| part.split('[').next().unwrap_or(part)).collect::<Vec<_>>().join(".")
}

/// A value for a message, as it stands in the file and at most this long.
const MAX_SHOWN: usize = 60;

fn show(value: &DeValue<'_>) -> String {
    let full = match value {
        DeValue::String(s) => format!("{s:?}"),
        DeValue::Integer(i) => i.to_string(),
        DeValue::Float(f) => f.to_string(),
        DeValue::Boolean(b) => b.to_string(),
        DeValue::Datetime(d) => d.to_string(),
        DeValue::Array(array) => {
            format!("[{}]", array.iter().map(|v| show(v.get_ref())).collect::<Vec<_>>().join(", "))
        }
        DeValue::Table(_) => "{…}".to_owned(),
    };
    match full.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &full[..end]),
        None => full,
    }
}

/// Notes a mistake: field, value as written, reason, action.
pub type Note<'n> = dyn FnMut(&str, String, String, String) + 'n;

/// A type that can stand as a value.
pub trait FromToml: Sized {
    /// The value, or a mistake noted.
    fn from_toml(value: &DeValue<'_>, field: &str, note: &mut Note<'_>) -> Option<Self>;
}

impl FromToml for String {
    fn from_toml(value: &DeValue<'_>, field: &str, note: &mut Note<'_>) -> Option<Self> {
        match value {
            DeValue::String(s) => Some(s.clone().into_owned()),
            other => {
                note(field, show(other), "is not a string".to_owned(), "put it in quotes".to_owned());
                None
            }
        }
    }
}

impl FromToml for bool {
    fn from_toml(value: &DeValue<'_>, field: &str, note: &mut Note<'_>) -> Option<Self> {
        match value {
            DeValue::Boolean(b) => Some(*b),
            other => {
                let action = "write true or false, without quotes".to_owned();
                note(field, show(other), "is neither true nor false".to_owned(), action);
                None
            }
        }
    }
}

macro_rules! integers {
    ($($t:ty),+) => { $(impl FromToml for $t {
        fn from_toml(value: &DeValue<'_>, field: &str, note: &mut Note<'_>) -> Option<Self> {
            let DeValue::Integer(integer) = value else {
                let action = "write it as a whole number, without quotes".to_owned();
                note(field, show(value), "is not a whole number".to_owned(), action);
                return None;
            };
            let number = <$t>::from_str_radix(integer.as_str(), integer.radix()).ok();
            if number.is_none() {
                note(field, show(value), "is out of range".to_owned(), format!("give 0..={}", <$t>::MAX));
            }
            number
        }
    })+ };
}
integers!(u16, u32, u64);

impl FromToml for PathBuf {
    fn from_toml(value: &DeValue<'_>, field: &str, note: &mut Note<'_>) -> Option<Self> {
        let path = PathBuf::from(String::from_toml(value, field, note)?);
        if path.is_absolute() {
            Some(path)
        } else {
            note(field, show(value), "is not an absolute path".to_owned(), "start it with /".to_owned());
            None
        }
    }
}

/// Types that are read from a string by `FromStr`, each with the reason and the advice for a string that isn't one.
macro_rules! from_strings {
    ($($t:ty: $reason:literal, $action:literal;)+) => { $(impl FromToml for $t {
        fn from_toml(value: &DeValue<'_>, field: &str, note: &mut Note<'_>) -> Option<Self> {
            let parsed = String::from_toml(value, field, note)?.parse().ok();
            if parsed.is_none() {
                note(field, show(value), $reason.to_owned(), $action.to_owned());
            }
            parsed
        }
    })+ };
}
from_strings! {
    IpAddr: "is not an IP address", "write an IPv4 or IPv6 address without prefix length";
    SocketAddr: "is not an address with a port", "write e.g. \"192.0.2.1:7800\" or \"[2001:db8::1]:7800\"";
}

impl<T: FromToml> FromToml for Vec<T> {
    fn from_toml(value: &DeValue<'_>, field: &str, note: &mut Note<'_>) -> Option<Self> {
        let DeValue::Array(array) = value else {
            note(field, show(value), "is not a list".to_owned(), "write it in brackets: [ … ]".to_owned());
            return None;
        };
        let elements: Vec<Option<T>> = array
            .iter()
            .enumerate()
            .map(|(i, element)| T::from_toml(element.get_ref(), &format!("{field}[{i}]"), note))
            .collect();
        elements.into_iter().collect()
    }
}

/// A word out of a fixed list, read from a string.
pub struct Word<T>(pub T);

impl<T: std::str::FromStr<Err = UnknownWord>> FromToml for Word<T> {
    fn from_toml(value: &DeValue<'_>, field: &str, note: &mut Note<'_>) -> Option<Self> {
        word(value, field, note, None).map(Word)
    }
}

/// A word out of a fixed list. `offered` stands in the advice instead of the whole list, where some words of it are
/// known but can't be had.
pub fn word<T: std::str::FromStr<Err = UnknownWord>>(
    value: &DeValue<'_>,
    field: &str,
    note: &mut Note<'_>,
    offered: Option<&str>,
) -> Option<T> {
    match String::from_toml(value, field, note)?.parse() {
        Ok(word) => Some(word),
        Err(UnknownWord { value: written, expected, .. }) => {
            let expected = offered.unwrap_or(&expected);
            let words: Vec<&str> = expected.split(" | ").collect();
            let action = match nearest(&written, &words) {
                Some(meant) => format!("did you mean \"{meant}\"? (one of {expected})"),
                None => format!("give one of {expected}"),
            };
            note(field, show(value), "is not a known word".to_owned(), action);
            None
        }
    }
}
