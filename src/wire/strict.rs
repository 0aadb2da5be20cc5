//! Strict TOML: text to structs, with errors that point at the place and name the key that was
//! probably meant. For configuration files and access rules alike.

use std::fmt;

use serde::de::DeserializeOwned;

/// What is wrong in a text, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {mistake}")]
pub struct TextError {
    /// The line, counted from 1.
    pub line: usize,
    /// The column in characters, counted from 1.
    pub column: usize,
    /// What.
    pub mistake: Mistake,
}

impl TextError {
    /// A mistake at the byte `offset` of `text`.
    #[must_use]
    pub fn at(text: &str, offset: usize, mistake: Mistake) -> Self {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Self {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            mistake,
        }
    }
}

/// What is wrong.
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

/// Reads a text.
///
/// # Errors
/// When it is not TOML, holds an unknown key or a value that does not fit.
pub fn from_toml<T: DeserializeOwned>(text: &str) -> Result<T, TextError> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let offset = error.span().map_or(0, |span| span.start);
        TextError::at(text, offset, mistake(error.message()))
    })
}

/// The keys that a table of this type may have.
#[must_use]
pub fn known_keys<T: DeserializeOwned>() -> Vec<String> {
    match from_toml::<T>("\"\" = 0") {
        Err(TextError { mistake: Mistake::UnknownKey { known, .. }, .. }) => known,
        _ => Vec::new(),
    }
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

/// The known word that differs least, when it differs so little that it was probably meant.
#[must_use]
pub fn nearest<'a>(key: &str, known: &'a [String]) -> Option<&'a String> {
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
    use super::*;

    #[test]
    fn the_distance_counts_letters() {
        for (a, b, distance) in [("", "abc", 3), ("listen", "lisen", 1), ("abc", "acb", 2)] {
            assert_eq!(edit_distance(a, b), distance, "{a} {b}");
        }
    }
}
