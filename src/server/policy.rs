//! The network's access rules: set, shown, and compiled for each node.
//!
//! Rules are kept as the text that the administrator wrote. What a node lets in is compiled when
//! the rules, a name, a tag or the membership changes, and sent to a node only when it is another
//! thing for that node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::admin::{Answer, RequestError, SCHEMA, rfc3339};
use super::events::Event;
use super::members::Members;
use super::records::{Change, MemberRecord, PolicyRecord, Record, Versioned};
use super::{Act, Decision, Server};
use crate::policy::{Affected, Compiled, Member, Policy};
use crate::types::{NodeId, NodeName, Tag};
use crate::wire::control::encode;
use crate::wire::filter::WireFilter;
use crate::wire::frame::MAX_MESSAGE;

/// Rules that say more than this to one node are not set: it is told all of it at every change.
const MAX_SET_BYTES: usize = 1 << 20;
/// A node is told no more than this, however many nodes have come since the rules were set: a message
/// that is too long would end its connection.
const MAX_TOLD_BYTES: usize = MAX_MESSAGE / 2;
/// More tags than anybody can keep in mind.
const MAX_TAGS: usize = 32;

/// `overlay server policy show --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyInfo {
    /// See [`SCHEMA`].
    pub schema: u32,
    /// The file as it was set; none when there are no access rules.
    pub text: Option<String>,
    /// When it was set or taken away (RFC 3339, UTC).
    pub set: Option<String>,
    /// How many rules there are.
    pub rules: usize,
    /// How many test cases there are.
    pub tests: usize,
    /// What is allowed and hardly meant, as far as the rules themselves say, and when they are set who is in
    /// a group and no member; in sentences.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// The rules, and what each node was told of them.
#[derive(Debug, Default)]
pub(super) struct Access {
    record: Option<Versioned<PolicyRecord>>,
    policy: Option<Policy>,
    /// See [`Policy::names`].
    names: BTreeSet<NodeName>,
    /// The rules about the members of this moment; none when that has to be found out.
    compiled: Option<Compiled>,
    /// What some rules say, encoded: many nodes are told the same.
    encoded: BTreeMap<Vec<usize>, Arc<[u8]>>,
    /// The encoded filter that each node has.
    told: BTreeMap<NodeId, Arc<[u8]>>,
    cut: Cut,
}

/// Whether somebody was not told all rules, since they are too long.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Cut {
    #[default]
    None,
    /// And that is to be written down.
    New(CutRules),
    Noted,
}

/// Rules that a node was not told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CutRules {
    /// The node; there may be others.
    pub(super) node: NodeId,
    /// How many.
    pub(super) left_out: usize,
}

impl Access {
    pub(super) fn new(record: Option<Versioned<PolicyRecord>>) -> Self {
        let mut access = Self::default();
        access.put(record);
        access
    }

    /// Takes other rules, or none.
    pub(super) fn put(&mut self, record: Option<Versioned<PolicyRecord>>) {
        // The text was read before it was stored, and when the store was.
        let text = record.as_ref().and_then(|record| record.record.text.as_deref());
        self.policy = text.map(|text| Policy::parse(text).expect("stored rules were checked"));
        self.names = self.policy.as_ref().map(Policy::names).unwrap_or_default();
        self.record = record;
        self.compiled = None;
        self.encoded.clear();
        self.cut = Cut::None;
    }

    /// Whether the rules know a node by this name.
    pub(super) fn knows(&self, name: &NodeName) -> bool {
        self.names.contains(name)
    }

    pub(super) fn forget(&mut self, node: NodeId) {
        self.told.remove(&node);
    }

    /// A member is new, or its name or tags are, or it is gone: for whom the rules may say something
    /// else now.
    pub(super) fn change(&mut self, node: NodeId, member: Option<&MemberRecord>) -> Affected {
        if self.policy.is_none() {
            return Affected::default();
        }
        let Some(compiled) = &mut self.compiled else { return Affected::everybody() };
        let affected = match member {
            Some(member) => compiled.put(about(member)),
            None => compiled.remove(node),
        };
        if !affected.is_nobody() {
            self.encoded.clear();
        }
        affected
    }

    /// What `node` lets in, encoded; none when there are no rules. It counts as told.
    pub(super) fn whole_for(&mut self, node: NodeId, members: &Members) -> Option<Arc<[u8]>> {
        let filter = self.filter_of(node, members);
        match &filter {
            Some(filter) => self.told.insert(node, filter.clone()),
            None => self.told.remove(&node),
        };
        filter
    }

    /// What `node` lets in, encoded, when it was told something else before.
    pub(super) fn news_for(&mut self, node: NodeId, members: &Members) -> Option<Arc<[u8]>> {
        match self.filter_of(node, members) {
            Some(filter) => {
                if self.told.get(&node) == Some(&filter) {
                    return None;
                }
                self.told.insert(node, filter.clone());
                Some(filter)
            }
            None => self.told.remove(&node).map(|_| encode(&WireFilter::default()).into()),
        }
    }

    fn filter_of(&mut self, node: NodeId, members: &Members) -> Option<Arc<[u8]>> {
        let policy = self.policy.as_ref()?;
        let compiled =
            self.compiled.get_or_insert_with(|| policy.compile(members.iter().map(about)));
        let rules = compiled.rules_of(node);
        if let Some(encoded) = self.encoded.get(&rules) {
            return Some(Arc::clone(encoded));
        }
        let (filter, left_out) = compiled.filter_by(&rules, MAX_TOLD_BYTES);
        if left_out > 0 && self.cut == Cut::None {
            self.cut = Cut::New(CutRules { node, left_out });
        }
        let encoded: Arc<[u8]> = encode(&filter).into();
        self.encoded.insert(rules, Arc::clone(&encoded));
        Some(encoded)
    }

    fn info(&self) -> PolicyInfo {
        let record = self.record.as_ref().map(|record| &record.record);
        PolicyInfo {
            schema: SCHEMA,
            text: record.and_then(|record| record.text.clone()),
            set: record.map(|record| rfc3339(record.set)),
            rules: self.policy.as_ref().map_or(0, Policy::rule_count),
            tests: self.policy.as_ref().map_or(0, Policy::case_count),
            warnings: self.policy.as_ref().map(|it| it.warnings().to_vec()).unwrap_or_default(),
        }
    }
}

/// A member as the rules see it.
fn about(member: &MemberRecord) -> Member<'_> {
    Member { id: member.id, name: &member.name, tags: &member.tags }
}

impl Server {
    /// Somebody came, went, or is called something else: the rules may mean other nodes.
    pub(super) fn follow_rules(&mut self, node: NodeId) {
        let member = self.members.of(node).map(|member| &member.record);
        let affected = self.access.change(node, member);
        if !affected.is_nobody() {
            self.distribution.set_rules_stale(&affected);
        }
    }

    /// Writes down, once for these rules, that a node is not told all of them.
    pub fn decide_cut(&mut self) -> Option<Decision> {
        let Cut::New(cut) = self.access.cut else { return None };
        self.access.cut = Cut::Noted;
        Some(Decision { changes: Vec::new(), act: Act::Cut(cut) })
    }

    /// The line in the log for that.
    pub(super) fn cut_event(&self, act: &Act, event: impl Fn(&str) -> Event) -> Option<Event> {
        let Act::Cut(CutRules { node, left_out }) = act else { return None };
        let cut = self.about(event("policy-cut"), &self.members.of(*node)?.record);
        let help = "the network has grown: set fewer rules, each with more ports or larger groups";
        Some(cut.with("left-out", left_out).with("help", help))
    }

    pub(super) fn decide_policy_show(&self) -> Decision {
        let answer = Answer::Policy(self.access.info());
        Decision { changes: Vec::new(), act: Act::Answer(answer) }
    }

    /// Sets the rules, whose own tests must pass.
    pub(super) fn decide_policy_set(
        &self,
        text: String,
        wall: u64,
    ) -> Result<Decision, RequestError> {
        let policy = Policy::parse_new(&text)
            .map_err(|error| RequestError::BadPolicy { reason: error.to_string() })?;
        if let Some(failed) = policy.try_cases().iter().find(|case| !case.passed) {
            let reason = format!(
                "the test in line {} fails: {}, expected {}",
                failed.line, failed.question, failed.expected
            );
            return Err(RequestError::BadPolicy { reason });
        }
        let mut compiled = policy.compile(self.members.iter().map(about));
        let longest = compiled.longest(self.members.iter().map(|member| member.id));
        if longest > MAX_SET_BYTES {
            let reason = format!(
                "they come to {longest} bytes for one node, and {MAX_SET_BYTES} are the most: each \
                 rule holds the list of nodes that it is from; make one rule of several with the \
                 same \"from\" and \"to\", with all their ports, or use the group \"any\""
            );
            return Err(RequestError::BadPolicy { reason });
        }
        let unknown = policy.unknown(self.members.iter().map(about));
        let warning = unknown_warning(&unknown);
        Ok(self.write_policy(PolicyRecord { text: Some(text), set: wall }, warning))
    }

    /// Takes the rules away: everybody may send everything again.
    pub(super) fn decide_policy_clear(&self, wall: u64) -> Decision {
        self.write_policy(PolicyRecord { text: None, set: wall }, None)
    }

    fn write_policy(&self, record: PolicyRecord, warning: Option<String>) -> Decision {
        let rev = self.access.record.as_ref().map_or(0, |record| record.rev);
        let mut answer = Access::new(Some(Versioned { rev, record: record.clone() })).info();
        answer.warnings.extend(warning);
        let changes = vec![Change::put(Record::Policy(record), rev)];
        Decision { changes, act: Act::Answer(Answer::Policy(answer)) }
    }

    /// Gives a node these tags and no others.
    pub(super) fn decide_tag(
        &self,
        node: &str,
        tags: Vec<Tag>,
        wall: u64,
    ) -> Result<Decision, RequestError> {
        let mut record: MemberRecord = self.member(node)?;
        record.tags = checked_tags(tags)?;
        let answer = Answer::Tagged(self.node_info(&record, wall));
        Ok(Decision { changes: vec![self.members.write(record)], act: Act::Answer(answer) })
    }
}

/// What is said of names and tags that no member has.
fn unknown_warning(unknown: &[String]) -> Option<String> {
    const NAMED: usize = 20;
    let more = match unknown.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let named = unknown.get(..NAMED).unwrap_or(unknown).join(", ");
    (!unknown.is_empty()).then(|| {
        format!("no member has this name or tag: {named}{more}; right if it is of one to come")
    })
}

/// Each tag once, in order.
pub(super) fn checked_tags(mut tags: Vec<Tag>) -> Result<Vec<Tag>, RequestError> {
    tags.sort_unstable();
    tags.dedup();
    if tags.len() > MAX_TAGS { Err(RequestError::TooManyTags) } else { Ok(tags) }
}
