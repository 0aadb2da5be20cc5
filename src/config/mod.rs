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

use crate::io::files::{self, FileError};

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

/// What is wrong in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mistake {
    /// A key that is not one of ours.
    UnknownKey {
        /// The key.
        key: String,
        /// The keys that are.
        known: Vec<String>,
        /// The one that was probably meant.
        nearest: Option<String>,
    },
    /// A value of the wrong kind, or text that is not TOML.
    Other(String),
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey { key, nearest: Some(nearest), .. } => {
                write!(f, "unknown key \"{key}\"; did you mean \"{nearest}\"?")
            }
            Self::UnknownKey { key, known, nearest: None } => {
                write!(f, "unknown key \"{key}\"; known keys are {}", known.join(", "))
            }
            Self::Other(message) => f.write_str(message),
        }
    }
}

/// Reads the text of a configuration file; `path` is only for the error.
///
/// # Errors
/// When it is not TOML, holds an unknown key or a value that does not fit.
pub fn load<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let offset = error.span().map_or(0, |span| span.start);
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let place = Place {
            path: path.to_path_buf(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        };
        ConfigError::Content { place, mistake: mistake(error.message()) }
    })
}

/// Reads a configuration file. A file that nobody asked for may be missing: then all is default.
///
/// # Errors
/// As [`load`], and when the file cannot be read.
pub fn load_file<T: DeserializeOwned + Default>(
    path: &Path,
    wanted: Wanted,
) -> Result<T, ConfigError> {
    match files::read(path)? {
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

/// Makes serde's sentence about an unknown key into a better one.
fn mistake(message: &str) -> Mistake {
    let mut quoted = message.split('`').skip(1).step_by(2).map(ToString::to_string);
    match (message.starts_with("unknown field"), quoted.next()) {
        (true, Some(key)) => {
            let known: Vec<String> = quoted.collect();
            let nearest = nearest(&key, &known).cloned();
            Mistake::UnknownKey { key, known, nearest }
        }
        _ => Mistake::Other(message.trim().replace('\n', "; ")),
    }
}

/// The known key that differs least, when it differs so little that it was probably meant.
fn nearest<'a>(key: &str, known: &'a [String]) -> Option<&'a String> {
    let key = key.replace('_', "-").to_lowercase();
    known
        .iter()
        .map(|candidate| (edit_distance(&key, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 3)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// How many letters must be put in, taken out or changed to get from `a` to `b` (Levenshtein).
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let change = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
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
    fn wrong_types_and_bad_toml_are_pointed_at_too() {
        let wrong_type = error("\nlisten = 5\n");
        assert!(wrong_type.starts_with("server.toml:2:10: invalid type"), "{wrong_type}");
        let wrong_value = error("listen = [\"nowhere\"]");
        assert!(wrong_value.starts_with("server.toml:1:"), "{wrong_value}");
        let no_toml = error("listen = [\n");
        assert!(no_toml.starts_with("server.toml:"), "{no_toml}");
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

    #[test]
    fn the_distance_counts_letters() {
        for (a, b, distance) in [("", "abc", 3), ("listen", "lisen", 1), ("abc", "acb", 2)] {
            assert_eq!(edit_distance(a, b), distance, "{a} {b}");
        }
    }
}
