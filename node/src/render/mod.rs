//! Answers of the API as people and as programs read them.
//!
//! | file | holds |
//! |---|---|
//! | [`json`] | the JSON forms: names and units are a promise to scripts |
//! | [`status`] | the state of the cluster on a terminal |
//! | [`table`] | aligned columns |
//! | [`time`] | durations and moments |

pub mod json;
pub mod status;
pub mod table;
pub mod time;
