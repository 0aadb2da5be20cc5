//! What people type: one file per subcommand.

pub mod fail;
pub mod server;
