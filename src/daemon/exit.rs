//! The exit codes of all commands. Daemons name them too, when they refuse what a command asks.

/// It worked.
pub const OK: u8 = 0;
/// It did not work.
pub const FAILED: u8 = 1;
/// The command line or configuration makes no sense.
pub const USAGE: u8 = 2;
/// The daemon that should answer does not run.
pub const NOT_RUNNING: u8 = 3;
/// This user may not do that.
pub const PERMISSION: u8 = 4;
/// No peer or node of that name, address or id.
pub const UNKNOWN_PEER: u8 = 5;
/// No reply.
pub const NO_REPLY: u8 = 6;
/// Replies, and all of them relayed.
pub const ONLY_RELAYED: u8 = 7;
/// This machine is in no network.
pub const NOT_ENROLLED: u8 = 8;
