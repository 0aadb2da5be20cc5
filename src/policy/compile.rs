//! From rules about groups to what each node lets in.

use std::collections::BTreeSet;

use super::file::{Mark, Marks, Policy, Protocol, Selection};
use crate::types::{NodeId, NodeName, Tag};
use crate::wire::filter::{KIND_ANY, KIND_ICMP, KIND_TCP, KIND_UDP, WireFilter, WireRule};

/// What rules are about: a node.
#[derive(Debug, Clone, Copy)]
pub struct Member<'m> {
    /// Its number.
    pub id: NodeId,
    /// Its name.
    pub name: &'m NodeName,
    /// Its tags.
    pub tags: &'m [Tag],
}

/// Rules about the nodes that there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    rules: Vec<CompiledRule>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct CompiledRule {
    /// None for every node.
    receivers: Option<BTreeSet<NodeId>>,
    rule: WireRule,
}

impl Policy {
    /// Finds out which nodes the rules are about.
    #[must_use]
    pub fn compile<'m>(&self, members: impl IntoIterator<Item = Member<'m>>) -> Compiled {
        let members: Vec<(NodeId, Marks)> = members
            .into_iter()
            .map(|member| {
                let tags = member.tags.iter().cloned().map(Mark::Tag);
                (member.id, tags.chain([Mark::Name(member.name.clone())]).collect())
            })
            .collect();
        let select = |selection: &Selection| match selection {
            Selection::Any => None,
            Selection::Marked(_) => Some(
                members
                    .iter()
                    .filter(|(_, marks)| selection.holds(marks))
                    .map(|(id, _)| *id)
                    .collect::<BTreeSet<NodeId>>(),
            ),
        };
        let rules = self.rules.iter().map(|rule| CompiledRule {
            receivers: select(&rule.to),
            rule: WireRule {
                kind: kind(rule.protocol),
                sources: select(&rule.from).map(|ids| runs(&ids)),
                ports: rule.ports.clone(),
            },
        });
        Compiled { rules: rules.collect() }
    }
}

impl Compiled {
    /// What `node` lets in. A rule that is about no other node is left out.
    #[must_use]
    pub fn filter_of(&self, node: NodeId) -> WireFilter {
        let rules = self
            .rules
            .iter()
            .filter(|rule| rule.receivers.as_ref().is_none_or(|ids| ids.contains(&node)))
            .filter(|rule| rule.rule.sources.as_ref().is_none_or(|sources| !sources.is_empty()))
            .map(|rule| rule.rule.clone());
        WireFilter { rules: Some(rules.collect()) }
    }
}

fn kind(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Any => KIND_ANY,
        Protocol::Icmp => KIND_ICMP,
        Protocol::Tcp => KIND_TCP,
        Protocol::Udp => KIND_UDP,
    }
}

/// Numbers in a row as first and last.
fn runs(ids: &BTreeSet<NodeId>) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for id in ids.iter().map(|id| id.number()) {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(id) => *last = id,
            _ => runs.push((id, id)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_node_gets_the_rules_that_are_about_it() {
        let policy = Policy::parse(
            "[groups]\nadmins = 'alice'\nweb = 'tag:web'\nnobody = []\n\
             [[rules]]\nfrom = 'admins'\nto = 'any'\nprotocol = 'any'\n\
             [[rules]]\nfrom = 'any'\nto = 'web'\nprotocol = 'tcp'\nports = [443, '8000-8100']\n\
             [[rules]]\nfrom = 'web'\nto = 'web'\nprotocol = 'icmp'\n\
             [[rules]]\nfrom = 'nobody'\nto = 'any'\nprotocol = 'any'\n",
        )
        .unwrap();
        let names: Vec<NodeName> =
            ["alice", "w1", "w2", "bob"].iter().map(|name| name.parse().unwrap()).collect();
        let web: Vec<Tag> = vec!["web".parse().unwrap()];
        let id = |number: u32| NodeId::new(number).unwrap();
        let member = |number: u32, tags| {
            let name = &names[number as usize - 1];
            Member { id: id(number), name, tags }
        };
        let all = [member(1, &[][..]), member(2, &web), member(3, &web), member(4, &[])];
        let compiled = policy.compile(all);
        let admins = WireRule { kind: KIND_ANY, sources: Some(vec![(1, 1)]), ports: None };
        let https =
            WireRule { kind: KIND_TCP, sources: None, ports: Some(vec![(443, 443), (8000, 8100)]) };
        let pings = WireRule { kind: KIND_ICMP, sources: Some(vec![(2, 3)]), ports: None };
        let rules = |number: u32| compiled.filter_of(id(number)).rules.unwrap();
        assert_eq!(rules(2), [admins.clone(), https, pings]);
        assert_eq!(rules(4), [admins]);
    }
}
