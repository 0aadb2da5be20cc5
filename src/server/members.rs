//! The nodes of the network: who they are, found by any of their marks.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::addresses;
use super::records::{Change, Key, MemberRecord, Record, Versioned};
use crate::types::{NodeId, NodeName, OverlayAddrs, OverlayRange, PublicKey};

/// All members, with an index for every mark that is unique.
#[derive(Debug)]
pub(super) struct Members {
    range: OverlayRange,
    by_id: BTreeMap<NodeId, Versioned<MemberRecord>>,
    by_machine_key: BTreeMap<PublicKey, NodeId>,
    by_node_key: BTreeMap<PublicKey, NodeId>,
    by_name: BTreeMap<NodeName, NodeId>,
    by_host: BTreeMap<u32, NodeId>,
    highest: u32,
}

impl Members {
    pub(super) fn new(
        range: OverlayRange,
        members: Vec<Versioned<MemberRecord>>,
        highest: u32,
    ) -> Self {
        let mut all = Self {
            range,
            by_id: BTreeMap::new(),
            by_machine_key: BTreeMap::new(),
            by_node_key: BTreeMap::new(),
            by_name: BTreeMap::new(),
            by_host: BTreeMap::new(),
            highest,
        };
        for member in members {
            all.put(member);
        }
        all
    }

    pub(super) fn put(&mut self, member: Versioned<MemberRecord>) {
        self.remove(member.record.id);
        let record = &member.record;
        self.by_machine_key.insert(record.machine_key, record.id);
        self.by_node_key.insert(record.node_key, record.id);
        self.by_name.insert(record.name.clone(), record.id);
        self.by_host.insert(record.host, record.id);
        self.highest = self.highest.max(record.id.number());
        self.by_id.insert(record.id, member);
    }

    pub(super) fn remove(&mut self, id: NodeId) -> Option<MemberRecord> {
        let record = self.by_id.remove(&id)?.record;
        self.by_machine_key.remove(&record.machine_key);
        self.by_node_key.remove(&record.node_key);
        self.by_name.remove(&record.name);
        self.by_host.remove(&record.host);
        Some(record)
    }

    pub(super) fn of(&self, id: NodeId) -> Option<&Versioned<MemberRecord>> {
        self.by_id.get(&id)
    }

    pub(super) fn with_machine_key(&self, key: &PublicKey) -> Option<&Versioned<MemberRecord>> {
        self.of(*self.by_machine_key.get(key)?)
    }

    pub(super) fn with_node_key(&self, key: &PublicKey) -> Option<NodeId> {
        self.by_node_key.get(key).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &MemberRecord> {
        self.by_id.values().map(|member| &member.record)
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// A number that no node has or had.
    pub(super) fn free_id(&self) -> Option<NodeId> {
        self.highest.checked_add(1).and_then(NodeId::new)
    }

    pub(super) fn free_host(&self) -> Option<u32> {
        addresses::free_host(&self.range, &self.by_host)
    }

    /// The overlay addresses of a member. Host numbers are checked when they are given and the
    /// range never changes while there are members, so there always are some.
    pub(super) fn addresses(&self, member: &MemberRecord) -> OverlayAddrs {
        self.range.addresses(member.host).unwrap_or(OverlayAddrs {
            v4: self.range.v4().network(),
            v6: self.range.v6().network(),
        })
    }

    /// `wish`, or with a number behind it when another node than `except` has that name, or it is
    /// not to be had.
    pub(super) fn free_name(
        &self,
        wish: &NodeName,
        except: Option<NodeId>,
        is_barred: impl Fn(&NodeName) -> bool,
    ) -> NodeName {
        let is_free = |name: &NodeName| {
            let owner = self.by_name.get(name);
            owner.is_none_or(|owner| Some(*owner) == except) && !is_barred(name)
        };
        if is_free(wish) {
            return wish.clone();
        }
        let numbered = (2u32..).map(|number| wish.with_suffix(number)).find(is_free);
        numbered.unwrap_or_else(|| wish.clone())
    }

    pub(super) fn name_owner(&self, name: &NodeName) -> Option<NodeId> {
        self.by_name.get(name).copied()
    }

    /// The member that a person means: by name, overlay address or id.
    pub(super) fn find(&self, text: &str) -> Option<&Versioned<MemberRecord>> {
        if let Ok(ip) = text.parse::<IpAddr>() {
            return self.of(*self.by_host.get(&self.range.host_of(ip)?)?);
        }
        let by_name = text.parse::<NodeName>().ok().and_then(|name| self.by_name.get(&name));
        match by_name {
            Some(id) => self.of(*id),
            None => self.of(text.parse().ok()?),
        }
    }

    /// The change that writes `record` over what is there for the same node.
    pub(super) fn write(&self, record: MemberRecord) -> Change {
        let expected = self.of(record.id).map_or(0, |member| member.rev);
        Change::put(Record::Member(record), expected)
    }

    pub(super) fn delete(&self, id: NodeId) -> Option<Change> {
        Some(Change::delete(Key::Member(id), self.of(id)?.rev))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::InviteId;

    fn member(number: u32, name: &str) -> Versioned<MemberRecord> {
        let key = PublicKey([u8::try_from(number).unwrap(); 32]);
        let record = MemberRecord {
            id: NodeId::new(number).unwrap(),
            machine_key: key,
            node_key: key,
            name: name.parse().unwrap(),
            wish: None,
            host: number,
            joined: 0,
            last_seen: 0,
            invite: InviteId([0; 4]),
            tags: Vec::new(),
            key_since: 0,
            expires: None,
            expiry_noted: crate::server::records::ExpiryNoted::Nothing,
            named: false,
        };
        Versioned { rev: 1, record }
    }

    fn members() -> Members {
        let range = OverlayRange::new(
            "10.77.0.0/20".parse().unwrap(),
            "fd12:3456:789a::/48".parse().unwrap(),
        );
        Members::new(range.unwrap(), vec![member(1, "bob"), member(2, "bob-2")], 7)
    }

    #[test]
    fn names_stay_unique_by_a_number_behind_them() {
        let members = members();
        let bob = "bob".parse().unwrap();
        let free = |except, is_barred: fn(&NodeName) -> bool| {
            members.free_name(&bob, except, is_barred).to_string()
        };
        assert_eq!(free(None, |_| false), "bob-3");
        assert_eq!(free(NodeId::new(1), |_| false), "bob", "it is its own");
        assert_eq!(free(None, |name| name.as_str() == "bob-3"), "bob-4");
    }

    #[test]
    fn a_member_is_found_by_every_mark_until_it_is_removed() {
        let mut members = members();
        for text in ["bob", "BOB", "10.77.0.1", "fd12:3456:789a::1", "00000001"] {
            assert_eq!(members.find(text).unwrap().record.id.number(), 1, "{text}");
        }
        members.remove(NodeId::new(1).unwrap());
        for text in ["bob", "10.77.0.1", "00000001", "nobody", ""] {
            assert!(members.find(text).is_none(), "{text}");
        }
        assert_eq!(members.free_host(), Some(1), "its address is free");
        assert_eq!(members.free_id(), NodeId::new(8), "no number is given twice");
    }
}
