//! Memberships that end at a time that the administrator has set.
//!
//! An expired node stays a member: its key, name and address are kept, and more time makes it what it
//! was at once. Until then it is in nobody's netmap, the relay does not know it, and its control
//! connection stands only so that it can be told when it is let in again. Time is the server's; the
//! netmap carries the end of each membership, so that peers keep to it without the server too.

use std::collections::BTreeSet;

use super::admin::{Answer, NewMembers, RequestError, SCHEMA, rfc3339};
use super::events::Event;
use super::records::{Change, ExpiryNoted, MemberRecord, NetworkRecord, Record};
use super::relay::RelayChange;
use super::{Act, ConnectionId, Decision, Output, Server};
use crate::types::NodeId;
use crate::wire::control::{EXPIRY_WARNING_S, RefusedCode, ServerMessage, Standing};

/// A membership is extended by ten years at most.
const MAX_S: u64 = 10 * 366 * 86_400;

/// When something has to be noted of a member's end.
#[derive(Debug, Default)]
pub(super) struct Expiries(BTreeSet<(u64, NodeId)>);

impl Expiries {
    pub(super) fn change(&mut self, before: Option<&MemberRecord>, after: Option<&MemberRecord>) {
        let due = |member: &MemberRecord| {
            let at = match member.expiry_noted {
                ExpiryNoted::Nothing => member.expires?.saturating_sub(EXPIRY_WARNING_S),
                ExpiryNoted::Soon => member.expires?,
                ExpiryNoted::Over => return None,
            };
            Some((at, member.id))
        };
        if let Some(due) = before.and_then(due) {
            self.0.remove(&due);
        }
        self.0.extend(after.and_then(due));
    }
}

/// Turns down a time that makes no sense.
fn check(in_s: Option<u64>) -> Result<(), RequestError> {
    match in_s {
        Some(in_s) if !(1..=MAX_S).contains(&in_s) => Err(RequestError::BadExpiry),
        _ => Ok(()),
    }
}

/// The line in the log for another time that the memberships of new nodes last.
pub(super) fn lasting_event(members_last_s: Option<u64>, event: impl Fn(&str) -> Event) -> Event {
    let lasting = members_last_s.map_or_else(|| "for ever".into(), |last| format!("{last} s"));
    event("network-expiry-set").with("members-last", lasting)
}

impl MemberRecord {
    /// Whether its time is over, and that is written down.
    pub(super) fn is_over(&self) -> bool {
        self.expiry_noted == ExpiryNoted::Over
    }
}

impl Server {
    /// When [`Self::decide_expiry`] has something to write down, in Unix seconds.
    #[must_use]
    pub fn expiry_due(&self) -> Option<u64> {
        self.expiries.0.first().map(|(at, _)| *at)
    }

    /// Writes down whose membership ends soon, and whose has ended, which ends it.
    pub fn decide_expiry(&mut self, wall: u64) -> Decision {
        let note = |(_, node): &(u64, NodeId)| {
            let record = self.members.of(*node)?.record.clone();
            let over = record.expires? <= wall;
            let expiry_noted = if over { ExpiryNoted::Over } else { ExpiryNoted::Soon };
            Some(self.members.write(MemberRecord { expiry_noted, ..record }))
        };
        let due = self.expiries.0.iter().take_while(|(at, _)| *at <= wall);
        Decision { changes: due.filter_map(note).collect(), act: Act::Nothing }
    }

    pub(super) fn decide_expire(
        &mut self,
        node: &str,
        in_s: Option<u64>,
        wall: u64,
    ) -> Result<Decision, RequestError> {
        check(in_s)?;
        let mut record = self.member(node)?;
        record.expires = in_s.map(|in_s| wall.saturating_add(in_s));
        record.expiry_noted = ExpiryNoted::Nothing;
        let answer = Answer::Expiring(self.node_info(&record, wall));
        Ok(Decision { changes: vec![self.members.write(record)], act: Act::Answer(answer) })
    }

    /// How long the memberships of nodes last that join from now on. Those that are there keep their
    /// ends.
    pub(super) fn decide_expire_new(&self, in_s: Option<u64>) -> Result<Decision, RequestError> {
        check(in_s)?;
        let network = &self.network;
        let record = NetworkRecord { members_last_s: in_s, ..network.record.clone() };
        let answer = Answer::ExpiringNew(NewMembers { schema: SCHEMA, members_last_s: in_s });
        let changed = record != network.record;
        let change = Change::put(Record::Network(record), network.rev);
        Ok(Decision {
            changes: Vec::from_iter(changed.then_some(change)),
            act: Act::Answer(answer),
        })
    }

    /// The line in the log for a change of a member's end, if that is what changed.
    pub(super) fn expiry_event(
        &self,
        old: &MemberRecord,
        new: &MemberRecord,
        event: impl Fn(&str) -> Event,
    ) -> Option<Event> {
        let ends = new.expires.map_or_else(|| "never".to_string(), rfc3339);
        let kind = match (old.expires == new.expires, new.expiry_noted) {
            (true, noted) if noted == old.expiry_noted => return None,
            (true, ExpiryNoted::Soon) => "node-expires-soon",
            (true, ExpiryNoted::Over) => "node-expired",
            (true, ExpiryNoted::Nothing) | (false, _) => "node-expiry-set",
        };
        Some(self.about(event(kind), new).with("expires", ends))
    }

    /// A member's time is over: nobody talks to it any more.
    pub(super) fn shut_out(&mut self, record: &MemberRecord, wall: u64) {
        let node = record.id;
        self.distribution.remove(node);
        self.outputs.push_back(Output::Relay(RelayChange::Removed(node)));
        if let Some(connection) = self.online.remove(&node) {
            self.seen.insert(node, wall);
            self.outputs.push_back(Output::Relay(RelayChange::Offline { node, connection }));
            self.keep_waiting(connection, record, wall);
        }
    }

    /// An expired member waits on its connection until it has more time; on the newest one alone.
    pub(super) fn keep_waiting(
        &mut self,
        connection: ConnectionId,
        record: &MemberRecord,
        wall: u64,
    ) {
        for older in self.waiting(record.id) {
            if older != connection {
                if let Some(known) = self.connections.get_mut(&older) {
                    known.expired = None;
                }
                self.refuse(older, RefusedCode::Replaced);
            }
        }
        if let Some(known) = self.connections.get_mut(&connection) {
            (known.node, known.expired) = (None, Some(record.id));
            // It has ended also when the clock has been set back since.
            let expires = record.expires.map(|ends| ends.min(wall));
            self.tell_standing(connection, expires, wall);
        }
    }

    /// Says on the connections of expired members that the server is alive.
    pub(super) fn tick_waiting(&mut self) {
        let waiting = self.connections.iter().filter(|(_, known)| known.expired.is_some());
        let waiting: Vec<ConnectionId> = waiting.map(|(connection, _)| *connection).collect();
        let tick = Some(self.distribution.epoch());
        for connection in waiting {
            self.send(connection, &ServerMessage { tick, ..Default::default() });
        }
    }

    /// A member has more time, or its end is another: it comes back, or is told.
    pub(super) fn follow_expiry(&mut self, old: &MemberRecord, new: &MemberRecord, wall: u64) {
        if old.is_over() {
            // It makes a new connection at once.
            for connection in self.waiting(new.id) {
                self.outputs.push_back(Output::Close { connection });
            }
        } else if let (true, Some(connection)) =
            (old.expires != new.expires, self.online.get(&new.id).copied())
        {
            self.tell_standing(connection, new.expires, wall);
        }
    }

    /// The connections on which an expired member waits.
    pub(super) fn waiting(&self, node: NodeId) -> Vec<ConnectionId> {
        let known = self.connections.iter().filter(|(_, known)| known.expired == Some(node));
        known.map(|(connection, _)| *connection).collect()
    }

    fn tell_standing(&mut self, connection: ConnectionId, expires: Option<u64>, wall: u64) {
        let standing = Some(Standing { now: wall, expires });
        self.send(connection, &ServerMessage { standing, ..Default::default() });
    }
}
