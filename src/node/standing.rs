//! Memberships that end: ours, and those of peers. The server ends them; where it cannot be reached,
//! each node keeps to what it knows of them, by the server's time as far as that is known.

use std::time::{Duration, Instant};

use super::{Event, Node};
use crate::types::NodeId;
use crate::wire::control::Standing;

/// What is known of time.
#[derive(Debug, Default)]
pub(super) struct Calendar {
    /// The server's time in Unix seconds at some instant.
    server: Option<(u64, Instant)>,
    /// When the next membership ends.
    pub(super) next_at: Option<Instant>,
}

impl Node {
    /// Takes `seconds` since 1970 as the server's time, until the server tells it.
    pub fn set_server_time(&mut self, seconds: u64, now: Instant) {
        self.calendar.server = Some((seconds, now));
        self.look_at_expiry(now);
    }

    /// The server's time in seconds since 1970, if it is known.
    #[must_use]
    pub fn server_time(&self, now: Instant) -> Option<u64> {
        let (seconds, at) = self.calendar.server?;
        Some(seconds + now.saturating_duration_since(at).as_secs())
    }

    /// Whether our own membership has ended.
    #[must_use]
    pub fn is_expired(&self, now: Instant) -> bool {
        self.has_passed(self.netmap.expires, now)
    }

    /// The server says what time it is, and when our membership ends.
    pub(super) fn handle_standing(&mut self, standing: &Standing, now: Instant) {
        self.netmap.expires = standing.expires;
        self.set_server_time(standing.now, now);
        self.events.push_back(Event::Save);
        self.events.push_back(Event::Standing);
    }

    /// Whether nobody may talk to this peer any more, or we to nobody.
    pub(super) fn is_over(&self, id: NodeId, now: Instant) -> bool {
        let ends = self.netmap.peers.get(&id).and_then(|info| info.expires);
        self.has_passed(ends, now) || self.is_expired(now)
    }

    fn has_passed(&self, ends: Option<u64>, now: Instant) -> bool {
        ends.zip(self.server_time(now)).is_some_and(|(ends, time)| ends <= time)
    }

    /// Drops whose time is over, and takes back who has more.
    pub(super) fn look_at_expiry(&mut self, now: Instant) {
        let ids: Vec<NodeId> = self.netmap.peers.keys().copied().collect();
        let (over, good): (Vec<_>, Vec<_>) = ids.into_iter().partition(|id| self.is_over(*id, now));
        let over: Vec<_> = over.into_iter().filter(|id| self.peers.contains_key(id)).collect();
        let back: Vec<_> = good.into_iter().filter(|id| !self.peers.contains_key(id)).collect();
        for id in &over {
            self.drop_peer(*id);
        }
        for id in &back {
            self.make_peer(*id, now);
        }
        if !(over.is_empty() && back.is_empty()) {
            self.publish();
            self.events.push_back(Event::Standing);
        }
        for id in back {
            self.update_peer(id, now);
        }
        let ends = self.netmap.peers.values().map(|info| info.expires);
        let ends = ends.chain([self.netmap.expires]).flatten();
        self.calendar.next_at = self.calendar.server.and_then(|(seconds, at)| {
            let ahead = ends.filter(|ends| Some(*ends) > self.server_time(now));
            ahead.map(|ends| at + Duration::from_secs(ends - seconds)).min()
        });
    }

    pub(super) fn handle_expiry_timeout(&mut self, now: Instant) {
        if self.calendar.next_at.is_some_and(|at| at <= now) {
            self.look_at_expiry(now);
        }
    }
}
