//! `overlay version`.

use clap::Args;
use serde::Serialize;

use super::{Done, print};
use crate::daemon::node::report::SCHEMA;
use crate::wire::control;

/// Arguments of `overlay version`.
#[derive(Debug, Clone, Args)]
#[command(about = "Version of this program and of the protocol it speaks")]
pub struct VersionArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Version {
    schema: u32,
    version: &'static str,
    protocol: u16,
}

/// Runs it.
///
/// # Errors
/// When stdout is gone.
pub fn run(args: &VersionArgs) -> Done {
    let version =
        Version { schema: SCHEMA, version: env!("CARGO_PKG_VERSION"), protocol: control::VERSION };
    if args.json {
        return print::json(&version);
    }
    print::line(format!("overlay {} (protocol {})", version.version, version.protocol))
}
