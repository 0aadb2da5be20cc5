//! Names of nodes: letters, digits and hyphens only (RFC 1123 section 2.1), so that a name can
//! never be more than a name in a file, a zone or a shell.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is no node name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("a node name cannot be empty")]
    Empty,
    /// Over 63 bytes.
    #[error("a node name has at most 63 characters, this one has {len}")]
    TooLong {
        /// The length found.
        len: usize,
    },
    /// Not a letter, digit or inner hyphen.
    #[error("a node name holds letters a-z, digits and inner hyphens, not {found:?}")]
    BadCharacter {
        /// The first character that does not fit.
        found: char,
    },
    /// Could be mistaken for an id.
    #[error("\"{text}\" looks like a node id; choose a name with another letter in it")]
    LooksLikeId {
        /// The text.
        text: String,
    },
}

/// The name of a node: 1 to 63 of `a-z 0-9 -`, unique in its network, lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

impl NodeName {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Makes a name of whatever a machine is called: the first label, other characters as hyphens.
    #[must_use]
    pub fn from_hostname(hostname: &str) -> Self {
        let label = hostname.split('.').next().unwrap_or_default();
        let mapped: String = label
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
            .take(63)
            .collect();
        let trimmed = mapped.trim_matches('-');
        trimmed
            .parse()
            .or_else(|_| format!("node-{trimmed}").parse())
            .unwrap_or_else(|_| Self("node".to_string()))
    }

    /// This name with `-number` behind it, shortened where needed.
    #[must_use]
    pub fn with_suffix(&self, number: u32) -> Self {
        let suffix = format!("-{number}");
        let stem = &self.0[..self.0.len().min(63 - suffix.len())];
        Self(format!("{}{suffix}", stem.trim_end_matches('-')))
    }
}

impl FromStr for NodeName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > 63 {
            return Err(NameError::TooLong { len: text.len() });
        }
        if let Some(found) = text.chars().find(|c| !c.is_ascii_alphanumeric() && *c != '-') {
            return Err(NameError::BadCharacter { found });
        }
        if text.starts_with('-') || text.ends_with('-') {
            return Err(NameError::BadCharacter { found: '-' });
        }
        if text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(NameError::LooksLikeId { text: text.into() });
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl TryFrom<String> for NodeName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_more_than_names_are_refused() {
        for bad in ["", "-a", "a-", "a b", "a/b", "..", "a\"", "a\u{202e}b", "deadbeef", "a.b"] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
        assert!("x".repeat(64).parse::<NodeName>().is_err());
        assert_eq!("Bob-2".parse::<NodeName>().unwrap().as_str(), "bob-2");
    }

    #[test]
    fn any_hostname_becomes_a_name() {
        for (hostname, name) in [
            ("laptop.example.org", "laptop"),
            ("My_Box", "my-box"),
            ("", "node"),
            ("---", "node"),
            ("deadbeef", "node-deadbeef"),
        ] {
            assert_eq!(NodeName::from_hostname(hostname).as_str(), name);
        }
    }

    #[test]
    fn a_suffix_never_makes_a_name_too_long() {
        let long: NodeName = "x".repeat(63).parse().unwrap();
        assert_eq!(long.with_suffix(12).as_str().len(), 63);
        assert_eq!("a".parse::<NodeName>().unwrap().with_suffix(2).as_str(), "a-2");
    }
}
