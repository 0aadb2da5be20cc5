//! From rules about groups to what each node lets in.

use std::collections::BTreeSet;

use super::file::{Mark, Marks, Policy, Protocol, Selection};
use crate::types::{NodeId, NodeName, Tag};
use crate::wire::control::encode;
use crate::wire::filter::{KIND_ANY, KIND_ICMP, KIND_TCP, KIND_UDP, WireFilter, WireRule};

/// What an encoded filter has beside its rules, at the most.
const FRAME: usize = 16;

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

/// Rules about the nodes that there are. A node that comes, goes or is called something else costs what
/// it changes, not what there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    rules: Vec<CompiledRule>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct CompiledRule {
    to: Selected,
    from: Selected,
    /// The sources are those of `from`, unless that has changed since.
    rule: WireRule,
    /// As long it is, encoded.
    bytes: usize,
    stale: bool,
}

/// A selection, and the nodes in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Selected {
    selection: Selection,
    /// None for every node.
    nodes: Option<BTreeSet<NodeId>>,
}

/// Nodes for which the rules may say something else than before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Affected {
    everybody: bool,
    nodes: BTreeSet<NodeId>,
}

impl Affected {
    /// All that there are.
    #[must_use]
    pub fn everybody() -> Self {
        Self { everybody: true, nodes: BTreeSet::new() }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_nobody(&self) -> bool {
        !self.everybody && self.nodes.is_empty()
    }

    /// Whether this one is among them.
    #[must_use]
    pub fn holds(&self, node: NodeId) -> bool {
        self.everybody || self.nodes.contains(&node)
    }

    /// All of them by number; none when they are everybody.
    #[must_use]
    pub fn nodes(&self) -> Option<&BTreeSet<NodeId>> {
        (!self.everybody).then_some(&self.nodes)
    }

    /// And these.
    pub fn merge(&mut self, other: &Self) {
        self.everybody |= other.everybody;
        if self.everybody {
            self.nodes.clear();
        } else {
            self.nodes.extend(&other.nodes);
        }
    }

    fn add(&mut self, nodes: Option<&BTreeSet<NodeId>>) {
        match nodes {
            Some(nodes) if !self.everybody => self.nodes.extend(nodes),
            Some(_) => {}
            None => self.merge(&Self::everybody()),
        }
    }
}

impl CompiledRule {
    fn refresh(&mut self) {
        if std::mem::take(&mut self.stale) {
            self.rule.sources = self.from.nodes.as_ref().map(runs);
            self.bytes = encode(&self.rule).len();
        }
    }
}

impl Selected {
    fn new(selection: &Selection) -> Self {
        let nodes = matches!(selection, Selection::Marked(_)).then(BTreeSet::new);
        Self { selection: selection.clone(), nodes }
    }

    /// Takes a node with these marks, or one that is gone; whether that makes a difference.
    fn put(&mut self, node: NodeId, marks: Option<&Marks>) -> bool {
        let Some(nodes) = &mut self.nodes else { return false };
        if marks.is_some_and(|marks| self.selection.holds(marks)) {
            nodes.insert(node)
        } else {
            nodes.remove(&node)
        }
    }
}

impl Policy {
    /// The names that rules are about: what a node of such a name may do depends on it.
    #[must_use]
    pub fn names(&self) -> BTreeSet<NodeName> {
        let selections = self.rules.iter().flat_map(|rule| [&rule.from, &rule.to]);
        let marks = selections.filter_map(|selection| match selection {
            Selection::Any => None,
            Selection::Marked(marks) => Some(marks),
        });
        let name = |mark: &Mark| match mark {
            Mark::Name(name) => Some(name.clone()),
            Mark::Tag(_) => None,
        };
        marks.flatten().filter_map(name).collect()
    }

    /// The names and tags in groups that rules use and no member has; who joins later may.
    #[must_use]
    pub fn unknown<'m>(&self, members: impl IntoIterator<Item = Member<'m>>) -> Vec<String> {
        let mut known = BTreeSet::new();
        for Member { name, tags, .. } in members {
            known.insert(Mark::Name(name.clone()));
            known.extend(tags.iter().cloned().map(Mark::Tag));
        }
        let selections = self.rules.iter().flat_map(|rule| [&rule.from, &rule.to]);
        let marks: BTreeSet<&Mark> = selections
            .filter_map(|selection| match selection {
                Selection::Any => None,
                Selection::Marked(marks) => Some(marks),
            })
            .flatten()
            .collect();
        marks.difference(&known.iter().collect()).map(ToString::to_string).collect()
    }

    /// Finds out which nodes the rules are about.
    #[must_use]
    pub fn compile<'m>(&self, members: impl IntoIterator<Item = Member<'m>>) -> Compiled {
        let rules = self.rules.iter().map(|rule| CompiledRule {
            to: Selected::new(&rule.to),
            from: Selected::new(&rule.from),
            rule: WireRule {
                kind: kind(rule.protocol),
                sources: matches!(rule.from, Selection::Marked(_)).then(Vec::new),
                ports: rule.ports.clone(),
            },
            bytes: 0,
            stale: true,
        });
        let mut compiled = Compiled { rules: rules.collect() };
        for member in members {
            let marks = marks(member);
            for rule in &mut compiled.rules {
                rule.to.put(member.id, Some(&marks));
                rule.stale |= rule.from.put(member.id, Some(&marks));
            }
        }
        compiled
    }
}

fn marks(member: Member<'_>) -> Marks {
    let tags = member.tags.iter().cloned().map(Mark::Tag);
    tags.chain([Mark::Name(member.name.clone())]).collect()
}

impl Compiled {
    /// Takes a node that is new, or whose name or tags are.
    pub fn put(&mut self, member: Member<'_>) -> Affected {
        self.change(member.id, Some(&marks(member)))
    }

    /// A node is gone.
    pub fn remove(&mut self, node: NodeId) -> Affected {
        self.change(node, None)
    }

    fn change(&mut self, node: NodeId, marks: Option<&Marks>) -> Affected {
        let mut affected = Affected::default();
        for rule in &mut self.rules {
            if rule.to.put(node, marks) && !affected.everybody {
                affected.nodes.insert(node);
            }
            if rule.from.put(node, marks) {
                rule.stale = true;
                affected.add(rule.to.nodes.as_ref());
            }
        }
        affected
    }

    /// The rules that say what `node` lets in, by their places. Nodes with the same ones let in the
    /// same. A rule that is about no other node is left out.
    #[must_use]
    pub fn rules_of(&self, node: NodeId) -> Vec<usize> {
        let about =
            |selected: &Selected| selected.nodes.as_ref().is_none_or(|nodes| nodes.contains(&node));
        let some =
            |selected: &Selected| selected.nodes.as_ref().is_none_or(|nodes| !nodes.is_empty());
        let rules = self.rules.iter().enumerate();
        rules.filter(|(_, rule)| about(&rule.to) && some(&rule.from)).map(|(at, _)| at).collect()
    }

    /// What is let in by these rules, and how many of them are left out: the first ones that come to
    /// more than `limit` bytes, and what is behind them. Since rules only allow, less is let in then.
    #[must_use]
    pub fn filter_by(&mut self, rules: &[usize], limit: usize) -> (WireFilter, usize) {
        let (mut said, mut bytes) = (Vec::with_capacity(rules.len()), FRAME);
        for at in rules {
            let Some(rule) = self.rules.get_mut(*at) else { continue };
            rule.refresh();
            bytes += rule.bytes;
            if bytes > limit {
                break;
            }
            said.push(rule.rule.clone());
        }
        let left_out = rules.len() - said.len();
        (WireFilter { rules: Some(said) }, left_out)
    }

    /// What `node` lets in.
    #[must_use]
    pub fn filter_of(&mut self, node: NodeId) -> WireFilter {
        let rules = self.rules_of(node);
        self.filter_by(&rules, usize::MAX).0
    }

    /// How long the longest filter of these nodes is, encoded.
    #[must_use]
    pub fn longest(&mut self, nodes: impl IntoIterator<Item = NodeId>) -> usize {
        self.rules.iter_mut().for_each(CompiledRule::refresh);
        let bytes = |at: usize| self.rules.get(at).map_or(0, |rule| rule.bytes);
        let of = |node| FRAME + self.rules_of(node).into_iter().map(bytes).sum::<usize>();
        nodes.into_iter().map(of).max().unwrap_or(0)
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
        let mut compiled = policy.compile(all);
        let admins = WireRule { kind: KIND_ANY, sources: Some(vec![(1, 1)]), ports: None };
        let https =
            WireRule { kind: KIND_TCP, sources: None, ports: Some(vec![(443, 443), (8000, 8100)]) };
        let pings = WireRule { kind: KIND_ICMP, sources: Some(vec![(2, 3)]), ports: None };
        let mut rules = |number: u32| compiled.filter_of(id(number)).rules.unwrap();
        assert_eq!(rules(2), [admins.clone(), https, pings]);
        assert_eq!(rules(4), [admins]);
    }

    const GROUPS: &str = "[groups]\nweb = 'tag:web'\nops = ['tag:ops', 'boss']\n\
        [[rules]]\nfrom = 'ops'\nto = 'any'\nprotocol = 'any'\n\
        [[rules]]\nfrom = 'any'\nto = 'web'\nprotocol = 'tcp'\nports = [443]\n\
        [[rules]]\nfrom = 'web'\nto = 'web'\nprotocol = 'icmp'\n\
        [[rules]]\nfrom = 'web'\nto = 'ops'\nprotocol = 'udp'\nports = [514]\n";

    fn id(number: u32) -> NodeId {
        NodeId::new(number).unwrap()
    }

    #[test]
    fn who_comes_concerns_only_those_who_are_told_something_else() {
        let policy = Policy::parse(GROUPS).unwrap();
        let web: Vec<Tag> = vec!["web".parse().unwrap()];
        let names: Vec<NodeName> =
            (0..1_002).map(|number| format!("n{number}").parse().unwrap()).collect();
        let tags_of = |number: u32| if number <= 10 { &web[..] } else { &[] };
        let member = |number: u32| Member {
            id: id(number),
            name: &names[number as usize],
            tags: tags_of(number),
        };
        let mut compiled = policy.compile((1..=1_000).map(member));
        let nobody = compiled.put(member(1_001));
        assert!(nobody.is_nobody(), "it has no marks that a rule knows: {nobody:?}");
        let again = compiled.put(member(5));
        assert!(again.is_nobody(), "nothing about it has changed: {again:?}");
        let one_more = compiled.put(Member { tags: &web, ..member(1_001) });
        let mut told: Vec<u32> = (1..=10).chain([1_001]).collect();
        let nodes = one_more.nodes().unwrap();
        assert_eq!(nodes.iter().map(|id| id.number()).collect::<Vec<_>>(), told);
        let gone = compiled.remove(id(1_001));
        told.pop();
        assert!(told.iter().all(|number| gone.holds(id(*number))) && !gone.holds(id(11)));
        let boss: NodeName = "boss".parse().unwrap();
        let everybody = compiled.put(Member { name: &boss, ..member(7) });
        assert_eq!(everybody, Affected::everybody(), "all let it in");
    }

    #[test]
    fn a_filter_of_many_sources_and_rules_has_a_known_length_and_can_be_cut() {
        // Every other node is in the group, so that there are no runs.
        let rule = "[[rules]]\nfrom = 'web'\nto = 'any'\nprotocol = 'tcp'\nports = [443]\n";
        let text = format!("[groups]\nweb = 'tag:web'\n{}", rule.repeat(20));
        let web: Vec<Tag> = vec!["web".parse().unwrap()];
        let name: NodeName = "node".parse().unwrap();
        let tags = |number: u32| if number.is_multiple_of(2) { &web[..] } else { &[] };
        let member = |number| Member { id: id(number), name: &name, tags: tags(number) };
        let mut compiled = Policy::parse(&text).unwrap().compile((1..=600).map(member));
        let rules = compiled.rules_of(id(1));
        let (whole, left_out) = compiled.filter_by(&rules, usize::MAX);
        assert_eq!((rules.len(), left_out), (20, 0));
        let (bytes, longest) = (encode(&whole).len(), compiled.longest((1..=600).map(id)));
        assert!((bytes..=bytes + FRAME).contains(&longest), "{bytes} {longest}");
        for limit in [0, FRAME, bytes / 2, longest - 1, longest] {
            let (cut, left_out) = compiled.filter_by(&rules, limit);
            let said = cut.rules.clone().unwrap();
            assert_eq!(said.len() + left_out, 20);
            assert_eq!(left_out == 0, limit == longest);
            assert_eq!(said[..], whole.rules.as_ref().unwrap()[..said.len()], "the first ones");
            assert!(encode(&cut).len() <= limit.max(FRAME));
        }
    }

    proptest::proptest! {
        #[test]
        fn changes_one_by_one_come_to_the_same_as_all_anew(
            changes in proptest::collection::vec((1u32..12, 0u8..10), 1..60),
        ) {
            let policy = Policy::parse(GROUPS).unwrap();
            let [web, ops]: [Tag; 2] = ["web", "ops"].map(|tag| tag.parse().unwrap());
            let tags = [vec![], vec![web.clone()], vec![ops.clone()], vec![web, ops]];
            let mut there: std::collections::BTreeMap<u32, (NodeName, Vec<Tag>)> = Default::default();
            let mut compiled = policy.compile([]);
            for (number, kind) in changes {
                let before: Vec<WireFilter> =
                    (1..12).map(|other| compiled.filter_of(id(other))).collect();
                let affected = if kind >= 8 {
                    there.remove(&number);
                    compiled.remove(id(number))
                } else {
                    let name = if kind % 2 == 0 { "boss".into() } else { format!("n{number}") };
                    let marked = (name.parse().unwrap(), tags[usize::from(kind / 2)].clone());
                    let (name, tags) = there.entry(number).insert_entry(marked).into_mut();
                    compiled.put(Member { id: id(number), name, tags })
                };
                let members = there.iter();
                let members = members.map(|(at, (name, tags))| Member { id: id(*at), name, tags });
                let mut anew = policy.compile(members);
                for (other, before) in (1..12).zip(before) {
                    let now = compiled.filter_of(id(other));
                    proptest::prop_assert_eq!(&now, &anew.filter_of(id(other)));
                    proptest::prop_assert!(now == before || affected.holds(id(other)));
                }
            }
        }
    }
}
