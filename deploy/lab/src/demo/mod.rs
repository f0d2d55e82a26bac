//! `komainu demo`: the appliance on this one machine, told as it happens.

mod story;
mod teller;

use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use self::story::Story;
use self::teller::Teller;

/// How the demo is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The binary to run as nodes.
    pub binary: PathBuf,
    /// One JSON object an event instead of sentences.
    pub json: bool,
}

/// The figures at the end: the last line of `komainu demo --json`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Whether everything went as it should.
    pub ok: bool,
    /// Time without an answer that a client sending every millisecond saw when the owner was killed with -9, in ms.
    pub owner_killed_gap_ms: u64,
    /// Datagrams of that client lost by `komainu switchover`.
    pub switchover_lost: u64,
    /// Time in which two nodes answered for a VIP at once, in ms.
    pub two_owners_ms: u64,
    /// Time from the death of a backend until the cluster had taken it out, in ms.
    pub backend_excluded_ms: u64,
}

/// Plays the demo to its end, on stdout. Success when the story went as it should.
pub fn run(options: &Options) -> ExitCode {
    crate::clean_up_on_signals();
    let teller = Teller::new(options.json);
    let mut summary = Summary::default();
    let mut story = Story::new(&teller, options.binary.clone());
    let result = story.play(&mut summary);
    match &result {
        Ok(()) => {}
        Err(e) => {
            teller.failed(&e.to_string());
            story.show_logs();
        }
    }
    drop(story);
    summary.ok = result.is_ok() && teller.all_went_well();
    teller.end(&summary);
    if summary.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
