//! Tells the story to a reader or to a program.

use std::cell::Cell;
use std::io::{self, Write};
use std::time::Instant;

use serde_json::{Value, json};

use super::Summary;

/// Writes events to stdout as they happen. A reader who has gone does not stop the story: its end still cleans up.
#[derive(Debug)]
pub struct Teller {
    json: bool,
    started: Instant,
    went_well: Cell<bool>,
}

impl Teller {
    pub fn new(json: bool) -> Teller {
        Teller { json, started: Instant::now(), went_well: Cell::new(true) }
    }

    /// A heading.
    pub fn chapter(&self, title: &str) {
        if self.json { self.object("chapter", title, json!({})) } else { line(&format!("\n{title}")) }
    }

    /// Something that happened: a word for programs, a sentence for readers, and its figures.
    pub fn event(&self, word: &str, sentence: &str, figures: Value) {
        if self.json {
            self.object(word, sentence, figures);
        } else {
            let at = self.started.elapsed();
            line(&format!("  {:>3}.{:03} s  {sentence}", at.as_secs(), at.subsec_millis()));
        }
    }

    /// A picture, for readers only.
    pub fn picture(&self, text: &str) {
        if !self.json {
            line(text);
        }
    }

    /// Something that must hold. When it does not, the story goes on but ends badly.
    pub fn check(&self, holds: bool, otherwise: &str) {
        if !holds {
            self.failed(otherwise);
        }
    }

    /// Something went wrong.
    pub fn failed(&self, what: &str) {
        self.went_well.set(false);
        self.event("failed", &format!("WRONG: {what}"), json!({}));
    }

    pub fn all_went_well(&self) -> bool {
        self.went_well.get()
    }

    /// The figures.
    pub fn end(&self, s: &Summary) {
        if self.json {
            match serde_json::to_string(s) {
                Ok(text) => line(&text),
                Err(e) => eprintln!("komainu demo: {e}"),
            }
            return;
        }
        line(&format!(
            "\nowner killed with -9: clients waited {} ms    switchover: {} datagrams lost\n\
             dead backend taken out after {} ms          two owners at once: {} ms\n{} in {:.1} s",
            s.owner_killed_gap_ms,
            s.switchover_lost,
            s.backend_excluded_ms,
            s.two_owners_ms,
            if s.ok { "All went as it should," } else { "THE STORY WENT WRONG," },
            self.started.elapsed().as_secs_f64()
        ));
    }

    fn object(&self, word: &str, sentence: &str, figures: Value) {
        let mut object = json!({
            "event": word,
            "at_ms": self.started.elapsed().as_millis() as u64,
            "text": sentence,
        });
        if let (Some(object), Value::Object(figures)) = (object.as_object_mut(), figures) {
            object.extend(figures);
        }
        line(&object.to_string());
    }
}

fn line(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}
