//! Configuration files: strict, every key optional, errors that point at the place.
//!
//! An unknown key is an error, since a misspelt setting that is silently ignored costs an evening.
//! Flags and environment are the business of `cli`, which lays them over what is read here.

pub mod node;
pub mod paths;
pub mod server;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use self::paths::Role;
use crate::io::files::{self, FileError};
pub use crate::wire::strict::Mistake;
use crate::wire::strict::{self, TextError};

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It was asked for, and is not there.
    #[error("there is no configuration file {}", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// Its content is wrong.
    #[error("{place}: {mistake}")]
    Content {
        /// Where.
        place: Place,
        /// What.
        mistake: Mistake,
    },
    /// It is the file of the other daemon, or has a setting of it.
    #[error("{place}: \"{key}\" is a setting of a {}, and this is read as the file of a {}",
        whose.word(), reader.word())]
    OtherRole {
        /// Where.
        place: Place,
        /// The setting.
        key: String,
        /// Who has it.
        whose: Role,
        /// Who does not.
        reader: Role,
    },
}

/// What one of the two daemons reads from its file.
pub trait Config: DeserializeOwned + Default {
    /// Whose it is.
    const ROLE: Role;
    /// The other daemon's.
    type Other: Config;
}

/// A place in a text file, lines and columns counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// The line.
    pub line: usize,
    /// The column, in characters.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.path.display(), self.line, self.column)
    }
}

/// Reads the text of a configuration file; `path` is only for the error.
///
/// # Errors
/// When it is not TOML, holds an unknown key or one of the other daemon, or a value that does not fit.
pub fn load<T: Config>(path: &Path, text: &str) -> Result<T, ConfigError> {
    strict::from_toml(text).map_err(|TextError { line, column, mistake }| {
        let place = Place { path: path.to_path_buf(), line, column };
        match mistake {
            Mistake::UnknownKey { key, .. } if strict::known_keys::<T::Other>().contains(&key) => {
                ConfigError::OtherRole { place, key, whose: T::Other::ROLE, reader: T::ROLE }
            }
            mistake => ConfigError::Content { place, mistake },
        }
    })
}

/// Reads a configuration file. A file that nobody asked for may be missing: then all is default.
///
/// # Errors
/// As [`load`], and when the file cannot be read.
pub fn load_file<T: Config>(path: &Path, wanted: Wanted) -> Result<T, ConfigError> {
    match files::read_text(path)? {
        Some(bytes) => load(path, &String::from_utf8_lossy(&bytes)),
        None if wanted == Wanted::IfThere => Ok(T::default()),
        None => Err(ConfigError::Missing { path: path.to_path_buf() }),
    }
}

/// Whether a missing file is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The user named it.
    Explicitly,
    /// It is the default place.
    IfThere,
}

#[cfg(test)]
mod tests {
    use super::node::NodeConfig;
    use super::server::ServerConfig;
    use super::*;

    fn error(text: &str) -> String {
        load::<ServerConfig>(Path::new("server.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn a_misspelt_key_is_pointed_at_with_the_right_one() {
        assert_eq!(
            error("# comment\n  lisen = [\"[::]:1\"]\n"),
            "server.toml:2:3: unknown key \"lisen\"; did you mean \"listen\"?"
        );
        assert_eq!(
            error("public_addr = []\n"),
            "server.toml:1:1: unknown key \"public_addr\"; did you mean \"public-addr\"?"
        );
        let far = error("colour = 1");
        assert!(far.contains("known keys are listen, public-addr"), "{far}");
    }

    #[test]
    fn the_file_of_the_other_daemon_is_known_by_its_keys() {
        assert_eq!(
            error("socket = \"/run/x.sock\"\nmtu = 1400\n"),
            "server.toml:2:1: \"mtu\" is a setting of a node, and this is read as the file of a server"
        );
        let nodes = load::<NodeConfig>(Path::new("x.toml"), "listen = []").unwrap_err();
        assert_eq!(
            nodes.to_string(),
            "x.toml:1:1: \"listen\" is a setting of a server, and this is read as the file of a node"
        );
        // What both have tells nothing.
        assert!(load::<NodeConfig>(Path::new("x.toml"), "socket = \"/run/x.sock\"").is_ok());
    }

    #[test]
    fn wrong_types_and_bad_toml_are_pointed_at_too() {
        let wrong_type = error("\nlisten = 5\n");
        assert!(wrong_type.starts_with("server.toml:2:10: invalid type"), "{wrong_type}");
        let wrong_value = error("listen = [\"nowhere\"]");
        assert!(wrong_value.starts_with("server.toml:1:"), "{wrong_value}");
        let no_toml = error("listen = [\n");
        assert!(no_toml.starts_with("server.toml:"), "{no_toml}");
    }

    #[test]
    fn metrics_for_others_are_refused_with_the_place_and_the_reason() {
        let said = error("\nmetrics = \"0.0.0.0:9586\"\n");
        assert!(said.starts_with("server.toml:2:11: "), "{said}");
        assert!(said.contains("0.0.0.0:9586 is not an address of this machine alone"), "{said}");
    }

    #[test]
    fn only_a_file_that_was_asked_for_must_exist() {
        let nowhere = Path::new("/nonexistent/server.toml");
        assert_eq!(
            load_file::<ServerConfig>(nowhere, Wanted::IfThere).unwrap(),
            ServerConfig::default()
        );
        assert!(matches!(
            load_file::<ServerConfig>(nowhere, Wanted::Explicitly),
            Err(ConfigError::Missing { .. })
        ));
    }
}
