//! Tags: words that an administrator puts on nodes, so that a rule can mean many of them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A text that is no tag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is no tag: 1 to {MAX_LEN} letters a-z, digits and inner hyphens")]
pub struct TagError {
    text: String,
}

/// The length of a DNS label, like that of a name.
const MAX_LEN: usize = 63;

/// What is written in front of a tag where a name could stand too.
const PREFIX: &str = "tag:";

/// A tag: 1 to 63 of `a-z 0-9 -`, lower case. Written with or without `tag:` in front.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tag(String);

impl Tag {
    /// The tag without `tag:` in front.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `text` is written as a tag and cannot be a name.
    #[must_use]
    pub fn is_marked(text: &str) -> bool {
        text.starts_with(PREFIX)
    }
}

impl FromStr for Tag {
    type Err = TagError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let word = text.strip_prefix(PREFIX).unwrap_or(text);
        let fits = (1..=MAX_LEN).contains(&word.len())
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !word.starts_with('-')
            && !word.ends_with('-');
        if fits {
            Ok(Self(word.to_ascii_lowercase()))
        } else {
            Err(TagError { text: text.chars().take(MAX_LEN).collect() })
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.0)
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl TryFrom<String> for Tag {
    type Error = TagError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Tag> for String {
    fn from(tag: Tag) -> Self {
        tag.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_a_word_with_or_without_its_mark() {
        for text in ["web", "tag:web", "WEB", "tag:Web"] {
            assert_eq!(text.parse::<Tag>().unwrap().to_string(), "tag:web");
        }
        let long = "a".repeat(64);
        for text in ["", "tag:", "-a", "a-", "a b", "a;rm", "tag:tag:a", "\u{e4}", &long] {
            assert!(text.parse::<Tag>().is_err(), "{text:?}");
        }
    }
}
