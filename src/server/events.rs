//! What the log says about a decision: who changed what.
//!
//! It is read off the changes themselves, so that no change can be made that is not in the log.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::expiry::lasting_event;
use super::records::{Change, InviteRecord, Key, MemberRecord, NetworkRecord, Record};
use super::{Act, ConnectionId, Decision, Server};
use crate::types::NodeId;

/// All kinds of lines; docs/operation.md lists them.
const KINDS: [&str; 21] = [
    "network-created",
    "network-restored",
    "range-changed",
    "network-expiry-set",
    "policy-set",
    "policy-cleared",
    "policy-cut",
    "node-joined",
    "node-removed",
    "node-renamed",
    "node-name-refused",
    "node-tagged",
    "node-key-changed",
    "node-expiry-set",
    "node-expires-soon",
    "node-expired",
    "node-cloned",
    "invite-made",
    "invite-used",
    "invite-revoked",
    "invite-not-accepted",
];

/// One line of the log. Kinds and fields are added, never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in Unix seconds.
    pub at: u64,
    /// What happened, like `node-joined`.
    pub kind: String,
    /// Who did it: an administrator by user id, a node, or the server itself.
    pub actor: String,
    /// To what, and what came of it.
    pub fields: BTreeMap<String, String>,
}

impl Event {
    /// An event without fields.
    #[must_use]
    pub fn new(at: u64, kind: &str, actor: &str) -> Self {
        debug_assert!(KINDS.contains(&kind), "{kind} is not in the list");
        Self { at, kind: kind.into(), actor: actor.into(), fields: BTreeMap::new() }
    }

    /// The same with one more field.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.fields.insert(name.into(), value.to_string());
        self
    }

    /// A new network.
    #[must_use]
    pub fn network_created(at: u64, network: &NetworkRecord) -> Self {
        let range = network.range;
        Self::new(at, "network-created", "server")
            .with("network", network.id)
            .with("ipv4", range.v4())
            .with("ipv6", range.v6())
    }

    /// A network as a backup of the time `made` has it, in which the log goes up to number `last`.
    #[must_use]
    pub fn network_restored(at: u64, made: &str, last: u64) -> Self {
        Self::new(at, "network-restored", "server")
            .with("backup-made", made)
            .with("backup-last", last)
    }
}

impl Server {
    /// What is to be written down with the changes of `decision`, which `administrator` has asked
    /// for if it was not a node.
    #[must_use]
    pub fn events(&self, decision: &Decision, administrator: &str, wall: u64) -> Vec<Event> {
        let actor = match &decision.act {
            Act::Welcome(arrival) => self.describe(arrival.connection, arrival.node()),
            Act::Rekey { connection, node, .. } => self.describe(*connection, *node),
            Act::Refuse { .. }
            | Act::Guessed { .. }
            | Act::Rival { .. }
            | Act::Expired { .. }
            | Act::Answer(_)
            | Act::Cut(_)
            | Act::Nothing => administrator.to_string(),
        };
        let event = |kind: &str| Event::new(wall, kind, &actor);
        let changes = decision.changes.iter().flat_map(|change| self.events_of(change, event));
        let changes = changes.chain(self.clone_event(&decision.act, event));
        let changes = changes.chain(self.cut_event(&decision.act, event));
        changes.chain(self.guess_event(&decision.act, event)).collect()
    }

    fn guess_event(&self, act: &Act, event: impl Fn(&str) -> Event) -> Option<Event> {
        let Act::Guessed { connection, tries } = act else { return None };
        let from = self.connections.get(connection)?.about.observed;
        Some(event("invite-not-accepted").with("tries", tries).with("last-from", from))
    }

    fn clone_event(&self, act: &Act, event: impl Fn(&str) -> Event) -> Option<Event> {
        let Act::Rival { connection, node, first: true } = act else { return None };
        let place = |connection| {
            let known = self.connections.get(connection);
            known.map_or_else(String::new, |known| known.about.observed.to_string())
        };
        let cloned = self.about(event("node-cloned"), &self.members.of(*node)?.record);
        let kept = self.online.get(node).map(place).unwrap_or_default();
        Some(cloned.with("kept", kept).with("refused", place(connection)))
    }

    fn describe(&self, connection: ConnectionId, node: NodeId) -> String {
        let from = self.connections.get(&connection).map(|known| known.about.observed);
        let from = from.map_or_else(|| "nowhere".to_string(), |from| from.to_string());
        format!("node {node} from {from}")
    }

    fn events_of(&self, change: &Change, event: impl Fn(&str) -> Event) -> Vec<Event> {
        let one = match (&change.key, &change.record) {
            (Key::Member(id), Some(Record::Member(new))) => {
                return self.member_events(*id, new, event);
            }
            (Key::Member(id), None) => {
                let member = self.members.of(*id).map(|member| &member.record);
                member.map(|member| self.about(event("node-removed"), member))
            }
            (Key::Invite(id), Some(Record::Invite(new))) => {
                invite_event(self.invites.of(*id).map(|invite| &invite.record), new, event)
            }
            (Key::Network, Some(Record::Network(new))) => Some(self.network_event(new, event)),
            (Key::Policy, Some(Record::Policy(new))) => {
                let cleared = || event("policy-cleared");
                let set = |text: &String| event("policy-set").with("bytes", text.len());
                Some(new.text.as_ref().map_or_else(cleared, set))
            }
            // One that ended long ago is tidied away; a record under another's key is none of ours.
            (Key::Invite(_), None) | (Key::Network | Key::Policy, None) => None,
            (Key::Member(_) | Key::Invite(_) | Key::Network | Key::Policy, Some(_)) => None,
        };
        Vec::from_iter(one)
    }

    fn network_event(&self, new: &NetworkRecord, event: impl Fn(&str) -> Event) -> Event {
        if self.network.record.members_last_s != new.members_last_s {
            return lasting_event(new.members_last_s, event);
        }
        let range = new.range;
        event("range-changed").with("ipv4", range.v4()).with("ipv6", range.v6())
    }

    /// One line for each difference: a node that comes back may have another key and another name.
    fn member_events(
        &self,
        id: NodeId,
        new: &MemberRecord,
        event: impl Fn(&str) -> Event,
    ) -> Vec<Event> {
        let Some(old) = self.members.of(id).map(|member| &member.record) else {
            let joined = event("node-joined").with("invite", new.invite);
            let joined = self.about(joined, new).with("machine-key", new.machine_key);
            return [joined].into_iter().chain(self.wish_event(None, new, event)).collect();
        };
        let mut events = Vec::from_iter(self.wish_event(Some(old), new, &event));
        if (&old.name, old.named) != (&new.name, new.named) {
            events.push(self.about(event("node-renamed"), new).with("old-name", &old.name));
        }
        if old.node_key != new.node_key {
            let changed = self.about(event("node-key-changed"), new);
            events.push(changed.with("old-key", old.node_key).with("new-key", new.node_key));
        }
        if old.tags != new.tags {
            let tags: Vec<String> = new.tags.iter().map(ToString::to_string).collect();
            events.push(self.about(event("node-tagged"), new).with("tags", tags.join(" ")));
        }
        events.extend(self.expiry_event(old, new, &event));
        // When it was last seen, or what it would like to be called, is no change of the network.
        events
    }

    /// A node would like to have a name that means rights, and gets another one.
    fn wish_event(
        &self,
        old: Option<&MemberRecord>,
        new: &MemberRecord,
        event: impl Fn(&str) -> Event,
    ) -> Option<Event> {
        let wish = new.wish.as_ref()?;
        let is_new = old.is_none_or(|old| old.wish.as_ref() != Some(wish));
        (is_new && !new.named && new.name != *wish && self.access.knows(wish)).then(|| {
            self.about(event("node-name-refused"), new)
                .with("wish", wish)
                .with(
                    "why",
                    "access rules know a node by that name: only an administrator gives it",
                )
                .with("help", format_args!("overlay server rename {} {wish}", new.name))
        })
    }

    pub(super) fn about(&self, event: Event, member: &MemberRecord) -> Event {
        let addresses = self.members.addresses(member);
        event
            .with("node", member.id)
            .with("name", &member.name)
            .with("ipv4", addresses.v4)
            .with("ipv6", addresses.v6)
    }
}

fn invite_event(
    old: Option<&InviteRecord>,
    new: &InviteRecord,
    event: impl Fn(&str) -> Event,
) -> Option<Event> {
    let Some(old) = old else {
        let made = event("invite-made").with("invite", new.id).with("uses", new.uses);
        return Some(made.with("expires", super::admin::rfc3339(new.expires)));
    };
    if new.revoked && !old.revoked {
        return Some(event("invite-revoked").with("invite", new.id).with("used", new.used));
    }
    (new.used != old.used).then(|| {
        let used = format!("{}/{}", new.used, new.uses);
        event("invite-used").with("invite", new.id).with("used", used)
    })
}

#[cfg(test)]
mod tests {
    use super::super::records::{Records, Versioned};
    use super::super::{Settings, admin::Request};
    use super::*;
    use crate::types::{NetworkId, OverlayRange, PublicKey};

    const RULES: &str = "[[rules]]\nfrom = \"any\"\nto = \"any\"\nprotocol = \"any\"\n";

    #[test]
    fn the_documentation_lists_the_kinds_of_lines() {
        let page = include_str!("../../docs/operation.md");
        let (_, log) = page.split_once("## The log of changes").unwrap();
        let list = log.split("\nA line is written").next().unwrap();
        let words = list.split('`').skip(1).step_by(2).filter(|word| word.contains('-'));
        let mut listed: Vec<&str> = words.collect();
        let mut kinds = KINDS.to_vec();
        listed.sort_unstable();
        kinds.sort_unstable();
        assert_eq!(listed, kinds);
    }

    #[test]
    fn every_change_of_the_administrator_leaves_one_line_and_a_look_leaves_none() {
        let range: OverlayRange =
            OverlayRange::new("10.77.0.0/20".parse().unwrap(), "fd00::/48".parse().unwrap())
                .unwrap();
        let record = NetworkRecord {
            id: NetworkId([1; 8]),
            range,
            created: 0,
            members_last_s: None,
            server_key: None,
        };
        let member = MemberRecord {
            id: NodeId::new(7).unwrap(),
            machine_key: PublicKey([1; 32]),
            node_key: PublicKey([2; 32]),
            name: "bob".parse().unwrap(),
            wish: None,
            host: 1,
            joined: 0,
            last_seen: 0,
            invite: crate::types::InviteId([0; 4]),
            tags: Vec::new(),
            key_since: 0,
            expires: None,
            expiry_noted: crate::server::records::ExpiryNoted::Nothing,
            named: false,
        };
        let records = Records {
            network: Versioned { rev: 1, record },
            members: vec![Versioned { rev: 2, record: member }],
            invites: Vec::new(),
            policy: None,
            highest_node: 7,
        };
        let settings = Settings {
            server_key: PublicKey([3; 32]),
            addresses: vec!["192.0.2.1".parse().unwrap()],
            whole_netmap_up_to: crate::server::WHOLE_NETMAP_UP_TO,
        };
        let mut server = Server::new(settings, records, [0; 32], crate::io::clock::now(), 0);
        let node = "bob".to_string();
        let rename = Request::Rename { node: node.clone(), name: "rob".parse().unwrap() };
        let cases = [
            (Request::Nodes, None),
            (Request::InviteList, None),
            (
                Request::Invite { uses: 1, ttl_s: 60, name: None, tags: Vec::new() },
                Some("invite-made"),
            ),
            (
                Request::Tag { node: node.clone(), tags: vec!["web".parse().unwrap()] },
                Some("node-tagged"),
            ),
            (Request::PolicySet { text: RULES.into() }, Some("policy-set")),
            (rename, Some("node-renamed")),
            (Request::Remove { node }, Some("node-removed")),
        ];
        for (request, expected) in cases {
            let asked = format!("{request:?}");
            let decision = server.decide(request, 5).unwrap();
            let events = server.events(&decision, "administrator uid 0", 5);
            let kinds: Vec<&str> = events.iter().map(|event| event.kind.as_str()).collect();
            assert_eq!(kinds, expected.into_iter().collect::<Vec<_>>(), "{asked}");
            for event in events {
                assert_eq!((event.at, event.actor.as_str()), (5, "administrator uid 0"));
                assert!(!event.fields.is_empty(), "{event:?}");
            }
        }
        let seen = server.decide_seen(9);
        assert!(server.events(&seen, "server", 9).is_empty(), "last seen is no event");
    }
}
