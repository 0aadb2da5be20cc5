//! Access rules: who in the network may send what to whom.
//!
//! Follow a rule: the administrator writes a file ([`Policy::parse`], `file`), its own test cases
//! are tried ([`Policy::try_cases`], `cases`), the server compiles it for each node
//! ([`Policy::compile`], `compile`), the node makes a [`Filter`] of what it was sent and asks it
//! about every packet that comes in. The receiver decides, since a sender could lie.
//!
//! - `packet`: what a filter has to know of a packet, read in full or not at all
//! - `flows`: which flows this node started, so that their answers are let in
//! - `fragments`: which fragments belong to a packet that was let in
//! - `filter`: the verdict
//!
//! Without rules there is no filter and everybody may send everything.

mod cases;
mod compile;
mod file;
mod filter;
mod flows;
mod fragments;
mod packet;

pub use cases::CaseResult;
pub use compile::{Affected, Compiled, Member};
pub use file::{MAX_POLICY_BYTES, Policy};
pub use filter::{Filter, Verdict};
pub use flows::Flows;
pub use packet::{Evasion, Fragment, Packet, Transport};
