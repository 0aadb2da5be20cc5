//! `overlay config`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::fail::{Failure, PERMISSION, USAGE};
use super::{Done, print};
use crate::config::node::NodeConfig;
use crate::config::server::ServerConfig;
use crate::config::{self, ConfigError, Wanted};

/// Arguments of `overlay config`.
#[derive(Debug, Clone, Args)]
#[command(about = "Check configuration files")]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum ConfigCommand {
    /// Read a node.toml or server.toml as the daemon would, and say what is wrong
    Check {
        /// The file
        #[arg(value_name = "F")]
        file: PathBuf,
    },
}

/// Runs it.
///
/// # Errors
/// When the file is wrong.
pub fn run(args: &ConfigArgs) -> Done {
    let ConfigCommand::Check { file } = &args.command;
    let kind = check(file).map_err(|error| failure(&error))?;
    print::line(format!("{} is a good {kind} configuration", file.display()))
}

/// A file is what its name says; any other name may hold either.
fn check(file: &Path) -> Result<&'static str, ConfigError> {
    let node = || config::load_file::<NodeConfig>(file, Wanted::Explicitly).map(|_| "node");
    let server = || config::load_file::<ServerConfig>(file, Wanted::Explicitly).map(|_| "server");
    let name = file.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase());
    match name {
        Some(name) if name.contains("server") => server(),
        Some(name) if name.contains("node") => node(),
        _ => node().or_else(|error| server().map_err(|_| error)),
    }
}

/// How a wrong configuration file is told.
pub(super) fn failure(error: &ConfigError) -> Failure {
    let failure = Failure::new("the configuration file cannot be used").cause(error).code(USAGE);
    match error {
        ConfigError::Missing { .. } => failure.help("give another --config, or leave it out"),
        ConfigError::File(error) if error.is_permission() => failure
            .code(PERMISSION)
            .help("let the user that runs this read it, or give another --config"),
        ConfigError::File(_) => failure.help("give another --config"),
        ConfigError::Content { place, .. } => {
            failure.help(format!("edit it, then: overlay config check {}", place.path.display()))
        }
    }
}
