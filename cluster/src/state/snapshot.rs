//! The whole state as bytes: what a node gets that is too far behind for the log.

use super::change::DecodeError;
use super::{Ids, State};

/// First byte of an encoded state.
const STATE_FORMAT: u8 = 1;

impl State {
    /// The state as bytes. Equal states give equal bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![STATE_FORMAT];
        serde_json::to_writer(&mut out, self)
            .expect("a state has no map keys but strings and writes to memory");
        out
    }

    /// Reads what [`State::encode`] wrote.
    ///
    /// # Errors
    /// The bytes are of a newer format, or damaged.
    pub fn decode(data: &[u8]) -> Result<State, DecodeError> {
        let state: State = match data.split_first() {
            Some((&STATE_FORMAT, rest)) => {
                serde_json::from_slice(rest).map_err(|e| DecodeError::Damaged(e.to_string()))?
            }
            Some((&format, _)) => return Err(DecodeError::Format { format, known: STATE_FORMAT }),
            None => return Err(DecodeError::Damaged("it is empty".to_owned())),
        };
        if state.ids < state.highest_ids() {
            return Err(DecodeError::Damaged("it uses numbers that it has not given out".to_owned()));
        }
        Ok(state)
    }

    fn highest_ids(&self) -> Ids {
        Ids {
            group: self.groups.iter().map(|g| g.id.0).max().unwrap_or(0),
            service: self.services.iter().map(|s| s.id.0).max().unwrap_or(0),
            backend: self.services.iter().flat_map(|s| &s.backends).map(|b| b.id.0).max().unwrap_or(0),
        }
    }
}

impl PartialOrd for Ids {
    fn partial_cmp(&self, other: &Ids) -> Option<std::cmp::Ordering> {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let each = [
            self.group.cmp(&other.group),
            self.service.cmp(&other.service),
            self.backend.cmp(&other.backend),
        ];
        match (each.contains(&Less), each.contains(&Greater)) {
            (false, false) => Some(Equal),
            (true, false) => Some(Less),
            (false, true) => Some(Greater),
            (true, true) => None,
        }
    }
}
