//! Remembered flows: a bounded table with two keys, and the states that a flow goes through.
//!
//! Most flows are never here (see "Backend choice" in `ARCHITECTURE.md`): the table holds what the hash alone can't tell.

mod index;
mod state;
mod table;
mod wheel;

pub use state::{CLOSED_IDLE, Direction, SYN_SENT_IDLE, Segment, State, two_way_step};
pub use table::{BackendSide, ClientSide, Flow, FlowId, FlowTable, Inserted, NewFlow, TableFull, Touched};
