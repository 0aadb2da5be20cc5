//! Where a core meets the world: the event loops of the two daemons.

pub mod exit;
pub mod server;
