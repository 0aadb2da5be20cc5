//! A small internet in one process: namespaces, TUNs, and NATs and links in userspace.
//!
//! ```text
//! command (terminal side) -> inside (first process of the lab) -> machine (namespaces, TUNs)
//!                                   |                               |
//!                                 story (what is shown)      forwarder <- internet <- nat, packet
//! ```
//!
//! `nat`, `packet` and `internet` are pure: they know no clock, socket or task, so the simulator
//! uses the same NATs as the lab.

pub mod nat;
pub mod packet;
