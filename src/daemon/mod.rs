//! Where a core meets the world: the event loops of the two daemons.

pub mod exit;
pub mod node;
pub mod server;
