//! What people type: one file per subcommand.
