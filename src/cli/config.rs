//! `overlay config`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::fail::{self, Failure};
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
    let kind = check(file)?;
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
        _ => match node() {
            Err(ConfigError::OtherRole { .. }) => server(),
            checked => checked.or_else(|error| server().map_err(|_| error)),
        },
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let (code, help) = match &error {
            ConfigError::Missing { .. } => (
                fail::USAGE,
                "correct the path, or leave the file out: every setting has a default".into(),
            ),
            ConfigError::File(error) if error.is_permission() => (
                fail::PERMISSION,
                "type the same command with sudo, or let the user that runs this read the file"
                    .into(),
            ),
            ConfigError::File(_) => (
                fail::FAILED,
                "name a file that can be read, or none: every setting has a default".into(),
            ),
            ConfigError::Content { place, .. } => {
                let (line, path) = (place.line, place.path.display());
                (fail::USAGE, format!("edit line {line}, then: overlay config check {path}"))
            }
            ConfigError::OtherRole { place, reader, .. } => (
                fail::USAGE,
                format!(
                    "name the file of the {} (--config or OVERLAY_CONFIG); or take line {} out of \
                     this one",
                    reader.word(),
                    place.line
                ),
            ),
        };
        Self::caused_by("the configuration file cannot be used", &error, help).code(code)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::io::files::FileError;

    #[test]
    fn a_file_that_may_not_be_read_is_a_matter_of_rights() {
        let failure_of = |kind: io::ErrorKind| {
            let path = "/root/node.toml".into();
            let source = kind.into();
            Failure::from(ConfigError::from(FileError::Io { action: "read", path, source }))
        };
        let denied = failure_of(io::ErrorKind::PermissionDenied);
        assert_eq!(denied.exit_code(), fail::PERMISSION);
        assert!(denied.to_string().contains("cause: cannot read /root/node.toml"), "{denied}");
        assert!(denied.to_string().contains("with sudo"), "{denied}");
        assert_eq!(failure_of(io::ErrorKind::IsADirectory).exit_code(), fail::FAILED);
    }

    #[test]
    fn a_mistake_is_told_with_its_line_and_the_command_that_checks_it() {
        let error = config::load::<NodeConfig>(Path::new("node.toml"), "\nmtuu = 1\n").unwrap_err();
        let failure = Failure::from(error);
        assert_eq!(failure.exit_code(), fail::USAGE);
        let text = failure.to_string();
        assert!(text.contains("cause: node.toml:2:1: unknown key \"mtuu\""), "{text}");
        assert!(
            text.ends_with("help: edit line 2, then: overlay config check node.toml"),
            "{text}"
        );
    }
}
