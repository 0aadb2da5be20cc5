//! The test cases of a policy file, tried by the same compiler and filter that the network uses.

use super::compile::Member;
use super::file::{Case, Expect, Mark, Marks, Policy, Protocol};
use super::filter::Filter;
use crate::types::{NodeId, NodeName, Tag};

/// What came out of one test case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaseResult {
    /// Where it starts in the file, counted from 1.
    pub line: usize,
    /// The question, in words.
    pub question: String,
    /// What it expects: `allow` or `refuse`.
    pub expected: &'static str,
    /// Whether that is so.
    pub passed: bool,
}

impl Policy {
    /// Tries all test cases of the file.
    #[must_use]
    pub fn try_cases(&self) -> Vec<CaseResult> {
        self.cases.iter().map(|case| self.try_case(case)).collect()
    }

    fn try_case(&self, case: &Case) -> CaseResult {
        let allowed = self.allows(case);
        let port = case.port.map(|port| format!("/{port}")).unwrap_or_default();
        let (from, to) = (words(&case.from), words(&case.to));
        CaseResult {
            line: case.line,
            question: format!("{from} to {to}: {}{port}", case.protocol),
            expected: if case.expect == Expect::Allow { "allow" } else { "refuse" },
            passed: allowed == (case.expect == Expect::Allow),
        }
    }

    fn allows(&self, case: &Case) -> bool {
        // Two nodes of one network; a node without a name in the case has one that no group knows.
        let (sender, receiver) = (Stand::new(&case.from, 1), Stand::new(&case.to, 2));
        let mut compiled = self.compile([sender.member(), receiver.member()]);
        let Some(filter) = Filter::new(&compiled.filter_of(receiver.id)) else { return true };
        match case.protocol {
            Protocol::Any => filter.admits_everything(sender.id),
            Protocol::Icmp => filter.admits_icmp(sender.id),
            Protocol::Tcp => case.port.is_some_and(|port| filter.admits_tcp(sender.id, port)),
            Protocol::Udp => case.port.is_some_and(|port| filter.admits_udp(sender.id, port)),
        }
    }
}

fn words(marks: &Marks) -> String {
    let words: Vec<String> = marks.iter().map(ToString::to_string).collect();
    words.join("+")
}

/// A node that stands for those in a case.
struct Stand {
    id: NodeId,
    name: NodeName,
    tags: Vec<Tag>,
}

impl Stand {
    fn new(marks: &Marks, number: u32) -> Self {
        let mut tags = Vec::new();
        let mut name = None;
        for mark in marks {
            match mark {
                Mark::Name(given) => name = Some(given.clone()),
                Mark::Tag(tag) => tags.push(tag.clone()),
            }
        }
        let name = name.unwrap_or_else(|| NodeName::from_hostname("").with_suffix(u32::MAX));
        Self { id: NodeId::new(number).expect("it is not zero"), name, tags }
    }

    fn member(&self) -> Member<'_> {
        Member { id: self.id, name: &self.name, tags: &self.tags }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_pass_and_fail_as_the_rules_say() {
        let policy = Policy::parse(
            "[groups]\nadmins = ['alice', 'tag:admin']\nweb = 'tag:web'\n\
             [[rules]]\nfrom = 'admins'\nto = 'web'\nprotocol = 'tcp'\nports = 22\n\
             [[tests]]\nfrom = 'alice'\nto = 'tag:web'\nprotocol = 'tcp'\nport = 22\nexpect = 'allow'\n\
             [[tests]]\nfrom = ['bob', 'tag:admin']\nto = 'tag:web'\nprotocol = 'tcp'\nport = 22\nexpect = 'allow'\n\
             [[tests]]\nfrom = 'alice'\nto = 'bob'\nprotocol = 'tcp'\nport = 22\nexpect = 'refuse'\n\
             [[tests]]\nfrom = 'alice'\nto = 'tag:web'\nprotocol = 'udp'\nport = 22\nexpect = 'refuse'\n\
             [[tests]]\nfrom = 'alice'\nto = 'tag:web'\nprotocol = 'icmp'\nexpect = 'refuse'\n\
             [[tests]]\nfrom = 'alice'\nto = 'tag:web'\nprotocol = 'tcp'\nport = 23\nexpect = 'allow'\n",
        )
        .unwrap();
        let results = policy.try_cases();
        let passed: Vec<bool> = results.iter().map(|result| result.passed).collect();
        assert_eq!(passed, [true, true, true, true, true, false]);
        let last = &results[5];
        assert_eq!((last.question.as_str(), last.expected), ("alice to tag:web: tcp/23", "allow"));
        assert_eq!(last.line, 38);
    }
}
