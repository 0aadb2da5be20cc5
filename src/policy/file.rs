//! The file that an administrator writes, read strictly.
//!
//! `[groups]` names nodes and tags, each `[[rules]]` allows something from groups to groups, each
//! `[[tests]]` is a question with its answer. What makes no sense is an error with its place.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use toml::Spanned;

use crate::types::{NodeName, Tag};
use crate::wire::strict::{self, Mistake, TextError, nearest};

/// The longest text: thousands of rules.
pub const MAX_POLICY_BYTES: usize = 100_000;
/// The group of all members.
const ANY: &str = "any";

/// Access rules, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    pub(super) rules: Vec<Rule>,
    pub(super) cases: Vec<Case>,
    /// What is allowed and hardly meant, with its line.
    warnings: Vec<String>,
}

/// Something that is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) from: Selection,
    pub(super) to: Selection,
    pub(super) protocol: Protocol,
    /// First and last of each run; none for all.
    pub(super) ports: Option<Vec<(u16, u16)>>,
}

/// A question with its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) line: usize,
    pub(super) from: Marks,
    pub(super) to: Marks,
    pub(super) protocol: Protocol,
    pub(super) port: Option<u16>,
    pub(super) expect: Expect,
}

/// What a node is known by: its name, its tags.
pub(super) type Marks = BTreeSet<Mark>;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mark {
    Name(NodeName),
    Tag(Tag),
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Tag(tag) => tag.fmt(f),
        }
    }
}

/// Some of the nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Selection {
    Any,
    /// Those with at least one of these marks.
    Marked(Marks),
}

impl Selection {
    pub(super) fn holds(&self, node: &Marks) -> bool {
        match self {
            Self::Any => true,
            Self::Marked(marks) => !marks.is_disjoint(node),
        }
    }

    fn is_nobody(&self) -> bool {
        matches!(self, Self::Marked(marks) if marks.is_empty())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Protocol {
    Any,
    Icmp,
    Tcp,
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "any",
            Self::Icmp => "icmp",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl Protocol {
    fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Expect {
    Allow,
    Refuse,
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Allow { "allow" } else { "refuse" })
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawPolicy {
    #[serde(default)]
    groups: BTreeMap<Spanned<String>, Spanned<Words>>,
    #[serde(default)]
    rules: Vec<RawRule>,
    #[serde(default)]
    tests: Vec<Spanned<RawCase>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawRule {
    from: Spanned<Words>,
    to: Spanned<Words>,
    protocol: Protocol,
    ports: Option<Spanned<PortRuns>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawCase {
    from: Spanned<Words>,
    to: Spanned<Words>,
    protocol: Protocol,
    port: Option<Spanned<u16>>,
    expect: Expect,
}

impl Policy {
    /// Reads the text of a policy file.
    ///
    /// # Errors
    /// When it is not TOML, too long, or something in it makes no sense; with the place.
    pub fn parse(text: &str) -> Result<Self, TextError> {
        let other = |message: String| Mistake::Other(message);
        if text.len() > MAX_POLICY_BYTES {
            let message = format!("a policy has at most {MAX_POLICY_BYTES} bytes");
            return Err(TextError::at(text, 0, other(message)));
        }
        let raw: RawPolicy = strict::from_toml(text)?;
        let reader = Reader { text, groups: read_groups(text, &raw.groups)? };
        let rules: Vec<Rule> =
            raw.rules.iter().map(|rule| reader.rule(rule)).collect::<Result<_, _>>()?;
        let cases = raw.tests.iter().map(|case| reader.case(case)).collect::<Result<_, _>>()?;
        let warnings: Vec<String> = raw
            .rules
            .iter()
            .zip(&rules)
            .flat_map(|(raw, rule)| {
                let empty = [("from", &raw.from, &rule.from), ("to", &raw.to, &rule.to)];
                empty.into_iter().filter(|(.., selection)| selection.is_nobody()).map(
                    |(key, words, _)| {
                        let line = line_of(text, words);
                        format!(
                            "line {line}: the rule matches nobody: there is nobody in its \"{key}\""
                        )
                    },
                )
            })
            .collect();
        Ok(Self { rules, cases, warnings })
    }

    /// Like [`Self::parse`], for rules that are new. What was set once has to be read as it was, so some
    /// mistakes are none there.
    ///
    /// # Errors
    /// As [`Self::parse`], and when a group has "any" in it, which is no node there.
    pub fn parse_new(text: &str) -> Result<Self, TextError> {
        let policy = Self::parse(text)?;
        let raw: RawPolicy = strict::from_toml(text)?;
        match raw.groups.values().find(|words| words.get_ref().0.iter().any(|word| word == ANY)) {
            None => Ok(policy),
            Some(words) => {
                let message = "\"any\" is every member, and no node that could be in a group; write \
                               from = \"any\" or to = \"any\" in the rule";
                Err(mistake(text, words, message.into()))
            }
        }
    }

    /// What is allowed and hardly meant, such as a rule that matches nobody, in sentences.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// How many rules there are.
    #[must_use]
    pub fn rule_count(&self) -> usize {
        self.rules.len()
    }

    /// How many test cases there are.
    #[must_use]
    pub fn case_count(&self) -> usize {
        self.cases.len()
    }
}

/// Where it stands, counted from 1.
fn line_of<T>(text: &str, spanned: &Spanned<T>) -> usize {
    TextError::at(text, spanned.span().start, Mistake::Other(String::new())).line
}

fn mistake<T>(text: &str, spanned: &Spanned<T>, message: String) -> TextError {
    TextError::at(text, spanned.span().start, Mistake::Other(message))
}

fn read_groups(
    text: &str,
    raw: &BTreeMap<Spanned<String>, Spanned<Words>>,
) -> Result<BTreeMap<String, Marks>, TextError> {
    let mut groups = BTreeMap::new();
    for (name, words) in raw {
        let word = name.get_ref();
        if word == ANY {
            let message = "the group \"any\" is every member and cannot be defined".into();
            return Err(mistake(text, name, message));
        }
        // A group is called like a tag: no blanks, no dots, nothing that could be something else.
        if Tag::is_marked(word) || word.parse::<Tag>().map(String::from).as_ref() != Ok(word) {
            let message =
                format!("\"{word}\" is no name for a group: letters a-z, digits, hyphens");
            return Err(mistake(text, name, message));
        }
        groups.insert(word.clone(), marks(text, words)?);
    }
    Ok(groups)
}

/// Names and tags.
fn marks(text: &str, words: &Spanned<Words>) -> Result<Marks, TextError> {
    let mark = |word: &String| -> Result<Mark, String> {
        if Tag::is_marked(word) {
            word.parse().map(Mark::Tag).map_err(|error: crate::types::TagError| error.to_string())
        } else {
            let named = word.parse().map(Mark::Name);
            named.map_err(|error: crate::types::NameError| format!("\"{word}\": {error}"))
        }
    };
    let marks = words.get_ref().0.iter().map(mark).collect::<Result<Marks, String>>();
    marks.map_err(|message| mistake(text, words, message))
}

struct Reader<'t> {
    text: &'t str,
    groups: BTreeMap<String, Marks>,
}

impl Reader<'_> {
    fn rule(&self, raw: &RawRule) -> Result<Rule, TextError> {
        if let Some(ports) = &raw.ports
            && !raw.protocol.has_ports()
        {
            let message = format!("the protocol \"{}\" has no ports", raw.protocol);
            return Err(mistake(self.text, ports, message));
        }
        Ok(Rule {
            from: self.selection(&raw.from)?,
            to: self.selection(&raw.to)?,
            protocol: raw.protocol,
            ports: raw.ports.as_ref().map(|ports| ports.get_ref().0.clone()),
        })
    }

    fn selection(&self, words: &Spanned<Words>) -> Result<Selection, TextError> {
        let mut all = Marks::new();
        for word in &words.get_ref().0 {
            if word == ANY {
                return Ok(Selection::Any);
            }
            let group = self.groups.get(word).ok_or_else(|| {
                // "any" is nobody's guess: it would let everybody in.
                let known: Vec<String> = self.groups.keys().cloned().collect();
                let message = match nearest(word, &known) {
                    Some(nearest) => {
                        format!("there is no group \"{word}\"; did you mean \"{nearest}\"?")
                    }
                    None => {
                        let known = [known, vec![ANY.to_string()]].concat().join(", ");
                        format!(
                            "there is no group \"{word}\"; groups are {known}; nodes and tags get \
                             into one under [groups]: NAME = [\"{word}\"]"
                        )
                    }
                };
                mistake(self.text, words, message)
            })?;
            all.extend(group.iter().cloned());
        }
        Ok(Selection::Marked(all))
    }

    fn case(&self, raw: &Spanned<RawCase>) -> Result<Case, TextError> {
        let case = raw.get_ref();
        let line = line_of(self.text, raw);
        match (&case.port, case.protocol.has_ports()) {
            (Some(port), false) => {
                let message = format!("the protocol \"{}\" has no ports", case.protocol);
                return Err(mistake(self.text, port, message));
            }
            (None, true) => {
                let message = format!("a test of \"{}\" needs a port", case.protocol);
                return Err(mistake(self.text, raw, message));
            }
            _ => {}
        }
        let node = |words: &Spanned<Words>| {
            let marks = marks(self.text, words)?;
            let names = marks.iter().filter(|mark| matches!(mark, Mark::Name(_))).count();
            if names > 1 {
                let message = "a test is about one node: one name at most, and tags".into();
                return Err(mistake(self.text, words, message));
            }
            Ok(marks)
        };
        Ok(Case {
            line,
            from: node(&case.from)?,
            to: node(&case.to)?,
            protocol: case.protocol,
            port: case.port.as_ref().map(|port| *port.get_ref()),
            expect: case.expect,
        })
    }
}

/// One word, or a list of them.
#[derive(Debug)]
struct Words(Vec<String>);

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WordsVisitor;
        impl<'de> Visitor<'de> for WordsVisitor {
            type Value = Words;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or a list of texts")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Words, E> {
                Ok(Words(vec![word.to_string()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Words, A::Error> {
                let mut words = Vec::new();
                while let Some(word) = items.next_element()? {
                    words.push(word);
                }
                Ok(Words(words))
            }
        }
        deserializer.deserialize_any(WordsVisitor)
    }
}

/// One port or run of ports, or a list of them: `22`, `"8000-8100"`, `[22, "8000-8100"]`.
#[derive(Debug)]
struct PortRuns(Vec<(u16, u16)>);

/// What is wrong with a run of ports.
const BAD_PORTS: &str =
    "a port is a number from 0 to 65535, a run of ports a text like \"8000-8100\"";

impl<'de> Deserialize<'de> for PortRuns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RunsVisitor;
        impl<'de> Visitor<'de> for RunsVisitor {
            type Value = PortRuns;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port, a text like \"8000-8100\", or a list of them")
            }

            fn visit_i64<E: de::Error>(self, port: i64) -> Result<PortRuns, E> {
                let port = u16::try_from(port).map_err(|_| E::custom(BAD_PORTS))?;
                Ok(PortRuns(vec![(port, port)]))
            }

            fn visit_str<E: de::Error>(self, run: &str) -> Result<PortRuns, E> {
                let (first, last) = run.split_once('-').unwrap_or((run, run));
                match (first.trim().parse(), last.trim().parse()) {
                    (Ok(first), Ok(last)) if first <= last => Ok(PortRuns(vec![(first, last)])),
                    _ => Err(E::custom(BAD_PORTS)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<PortRuns, A::Error> {
                let mut runs = Vec::new();
                while let Some(PortRuns(some)) = items.next_element()? {
                    runs.extend(some);
                }
                if runs.is_empty() {
                    return Err(de::Error::custom(
                        "an empty list of ports allows nothing; leave `ports` out for all of them",
                    ));
                }
                Ok(PortRuns(runs))
            }
        }
        deserializer.deserialize_any(RunsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Policy::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_example_is_a_good_policy_whose_tests_pass() {
        let policy = Policy::parse(include_str!("../../config/policy.toml")).unwrap();
        assert!(policy.rule_count() > 2 && policy.case_count() > 2);
        assert!(policy.try_cases().iter().all(|case| case.passed), "{:?}", policy.try_cases());
    }

    #[test]
    fn a_rule_for_nobody_is_a_warning_and_any_in_a_group_an_error_of_new_rules() {
        let text = "[groups]\nnone = []\nall = ['alice']\n[[rules]]\nfrom = []\nto = 'any'\n\
                    protocol = 'any'\n[[rules]]\nfrom = ['all', 'none']\nto = 'none'\n\
                    protocol = 'any'\n";
        let policy = Policy::parse_new(text).unwrap();
        assert_eq!(
            policy.warnings(),
            [
                "line 5: the rule matches nobody: there is nobody in its \"from\"",
                "line 10: the rule matches nobody: there is nobody in its \"to\"",
            ]
        );
        let text = "[groups]\nx = ['alice', 'any']\n";
        let said = Policy::parse_new(text).unwrap_err().to_string();
        assert!(said.starts_with("line 2, column 5: \"any\" is every member"), "{said}");
        // A server that has such rules goes on with them: there may even be a node of that name.
        assert_eq!(Policy::parse(text).unwrap().warnings(), [""; 0]);
        assert_eq!(
            Policy::parse_new(include_str!("../../config/policy.toml")).unwrap().warnings(),
            [""; 0]
        );
    }

    #[test]
    fn mistakes_are_pointed_at() {
        let rule = "[groups]\nadmins = [\"alice\"]\n[[rules]]\nto = \"any\"\n";
        let with = |rest: &str| error(&format!("{rule}{rest}\n"));
        for (said, wanted) in [
            (
                error("[grups]\n"),
                "line 1, column 2: unknown key \"grups\"; did you mean \"groups\"?",
            ),
            (
                with("form = 'admins'"),
                "line 5, column 1: unknown key \"form\"; did you mean \"from\"?",
            ),
            (
                with("from = 'admin'\nprotocol = 'tcp'"),
                "line 5, column 8: there is no group \"admin\"; did you mean \"admins\"?",
            ),
            (
                with("from = 'a'\nprotocol = 'tcp'"),
                "line 5, column 8: there is no group \"a\"; groups are admins, any; nodes and tags get \
                 into one under [groups]: NAME = [\"a\"]",
            ),
            (with("from = 'any'\nprotocol = 'tpc'"), "line 6, column 12: unknown variant `tpc`"),
            (
                with("from = 'any'\nprotocol = 'icmp'\nports = 1"),
                "line 7, column 9: the protocol \"icmp\" has no ports",
            ),
            (
                with("from = 'any'\nprotocol = 'tcp'\nports = [70000]"),
                "line 7, column 10: a port is",
            ),
            (with("from = 'any'\nprotocol = 'tcp'\nports = '9-8'"), "line 7, column 9: a port is"),
            (with("from = 'any'\nprotocol = 'tcp'\nports = []"), "line 7, column 9: an empty list"),
            (error("[groups]\nany = []\n"), "line 2, column 1: the group \"any\""),
            (error("[groups]\n\"a b\" = []\n"), "line 2, column 1: \"a b\" is no name for a group"),
            (error("[groups]\na = ['x;y']\n"), "line 2, column 5: \"x;y\": a node name holds"),
            (error("[groups]\na = ['tag:']\n"), "line 2, column 5: \"tag:\" is no tag"),
            (with("protocol = 'tcp'"), "missing field `from`"),
            (
                error("[[tests]]\nfrom='a'\nto='b'\nprotocol='tcp'\nexpect='allow'\n"),
                "line 1, column 1: a test of \"tcp\" needs a port",
            ),
        ] {
            assert!(said.contains(wanted), "{said}\nwanted: {wanted}");
        }
        assert!(error(&"#".repeat(MAX_POLICY_BYTES + 1)).contains("at most 100000 bytes"));
    }

    #[test]
    fn one_word_and_a_list_mean_the_same() {
        let text = |from: &str, ports: &str| {
            format!(
                "[groups]\nadmins = \"alice\"\n[[rules]]\nfrom = {from}\nto = \"any\"\n\
                 protocol = \"tcp\"\nports = {ports}\n"
            )
        };
        let short = Policy::parse(&text("\"admins\"", "22")).unwrap();
        assert_eq!(short, Policy::parse(&text("[\"admins\"]", "[\"22-22\"]")).unwrap());
    }
}
