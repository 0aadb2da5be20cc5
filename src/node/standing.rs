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
    /// Whether the server has told it in this run.
    is_told: bool,
    /// When the next membership ends.
    ends_at: Option<Instant>,
    /// When the time is written down again, and looked at who is to be warned.
    note_at: Option<Instant>,
}

impl Calendar {
    pub(super) fn next_at(&self) -> Option<Instant> {
        [self.ends_at, self.note_at].into_iter().flatten().min()
    }
}

/// In seconds.
const REMOVAL_SLACK_S: u64 = 3;
/// While a membership has an end, the time is written down so often.
const NOTE_INTERVAL: Duration = Duration::from_secs(3600);
/// What our clock says has passed between two runs, in seconds, is believed up to 30 days. More is
/// rather a clock that was set, and must end nothing while the server cannot be asked.
const PLAUSIBLE_S: u64 = 30 * 86_400;

impl Node {
    /// Guesses the server's time at a start, from what it was when the netmap was saved and what our
    /// clock, which shows `own` Unix seconds, says has passed since, if that is plausible. A clock that
    /// was set back gives no time back.
    pub fn guess_server_time(&mut self, own: u64, now: Instant) {
        let Some(saved) = self.netmap.clocks else { return };
        let passed = own.checked_sub(saved.own).filter(|passed| *passed <= PLAUSIBLE_S);
        self.set_server_time(saved.server.saturating_add(passed.unwrap_or(0)), now);
    }

    /// The machine was suspended, and our timers stood still, for so long.
    pub fn handle_sleep(&mut self, away: Duration, now: Instant) {
        self.peers.values_mut().for_each(|peer| peer.insight.history.handle_sleep(away));
        if let Some(time) = self.server_time(now) {
            self.set_server_time(time.saturating_add(away.as_secs()), now);
        }
    }

    /// Takes `seconds` since 1970 as the server's time, until the server tells it.
    fn set_server_time(&mut self, seconds: u64, now: Instant) {
        self.calendar.server = Some((seconds, now));
        self.look_at_expiry(now);
    }

    /// The server's time in seconds since 1970, if it is known.
    #[must_use]
    pub fn server_time(&self, now: Instant) -> Option<u64> {
        let (seconds, at) = self.calendar.server?;
        Some(seconds.saturating_add(now.saturating_duration_since(at).as_secs()))
    }

    /// Whether our own membership has ended.
    #[must_use]
    pub fn is_expired(&self, now: Instant) -> bool {
        self.has_passed(self.netmap.expires, now)
    }

    /// Whether the server has said in this run that our membership has ended.
    #[must_use]
    pub fn is_told_expired(&self, now: Instant) -> bool {
        self.calendar.is_told && self.is_expired(now)
    }

    /// The server says what time it is, and when our membership ends.
    pub(super) fn handle_standing(&mut self, standing: &Standing, now: Instant) {
        self.netmap.expires = standing.expires;
        self.calendar.is_told = true;
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

    /// Whether this end is the likely reason for a removal that we hear of now: we count whole seconds,
    /// and the server's may be a little ahead.
    pub(super) fn ends_by(&self, ends: Option<u64>, now: Instant) -> bool {
        self.has_passed(ends.map(|ends| ends.saturating_sub(REMOVAL_SLACK_S)), now)
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
            // The peer may have kept its keys for us, which we have dropped.
            if let Some(peer) = self.peers.get_mut(id) {
                peer.session_wanted = true;
            }
        }
        if !(over.is_empty() && back.is_empty()) {
            self.publish();
            self.events.push_back(Event::Standing);
            // A clock that is set back before the next start must not take that back.
            self.events.push_back(Event::Save);
        }
        for id in back {
            self.update_peer(id, now);
        }
        let ends = self.netmap.peers.values().map(|info| info.expires);
        let ends: Vec<u64> = ends.chain([self.netmap.expires]).flatten().collect();
        let note_at = self.calendar.note_at.unwrap_or(now + NOTE_INTERVAL);
        self.calendar.note_at = (!ends.is_empty()).then_some(note_at);
        self.calendar.ends_at = self.calendar.server.and_then(|(seconds, at)| {
            let ahead = ends.into_iter().filter(|ends| Some(*ends) > self.server_time(now));
            // What is too far ahead for the clock does not come.
            ahead.filter_map(|ends| at.checked_add(Duration::from_secs(ends - seconds))).min()
        });
    }

    pub(super) fn handle_expiry_timeout(&mut self, now: Instant) {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(self.calendar.note_at) {
            self.calendar.note_at = Some(now + NOTE_INTERVAL);
            self.events.push_back(Event::Standing);
            self.events.push_back(Event::Save);
        }
        if due(self.calendar.ends_at) {
            self.look_at_expiry(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::{Clocks, Identity, Netmap, NodeSettings};
    use crate::testing::epoch;
    use crate::types::{NetworkId, OverlayRange, SecretKey};
    use crate::wire::control::{NetmapUpdate, ServerMessage, WirePeer};

    const T: u64 = 1_800_000_000;
    const DAY: u64 = 86_400;

    fn range() -> OverlayRange {
        let ipv6 = "fd00:1:2::/48".parse().unwrap();
        OverlayRange::new("10.77.0.0/20".parse().unwrap(), ipv6).unwrap()
    }

    fn start(netmap: Netmap) -> Node {
        let key = SecretKey::from_bytes([7; 32]);
        Node::new(key, netmap, NodeSettings::default(), [1; 32], 0, epoch())
    }

    fn say(node: &mut Node, message: ServerMessage, now: Instant) {
        node.handle_message(&message, "192.0.2.1:41820".parse().unwrap(), now);
    }

    fn peer(expires: Option<u64>) -> WirePeer {
        let addrs = range().addresses(2).unwrap();
        WirePeer {
            id: 2,
            name: "bob".into(),
            node_key: SecretKey::from_bytes([9; 32]).public().0,
            ipv4: addrs.v4,
            ipv6: addrs.v6,
            online: true,
            candidates: Vec::new(),
            expires,
        }
    }

    fn told(own: Option<u64>, of_peer: Option<u64>) -> ServerMessage {
        ServerMessage {
            standing: Some(Standing { now: T, expires: own }),
            netmap: Some(NetmapUpdate { to: 1, peers: vec![peer(of_peer)], ..Default::default() }),
            ..Default::default()
        }
    }

    /// A member that the server told this.
    fn node(own: Option<u64>, of_peer: Option<u64>) -> Node {
        let identity = Identity {
            network: NetworkId([9; 8]),
            id: NodeId::new(1).unwrap(),
            name: "alice".parse().unwrap(),
            addrs: range().addresses(1).unwrap(),
            range: range(),
        };
        let mut node = start(Netmap { identity: Some(identity), ..Netmap::default() });
        say(&mut node, told(own, of_peer), epoch());
        while node.poll_event().is_some() {}
        node
    }

    fn after(seconds: u64) -> Instant {
        epoch() + Duration::from_secs(seconds)
    }

    fn has_peer(node: &Node) -> bool {
        node.peers.contains_key(&NodeId::new(2).unwrap())
    }

    /// Another run of a node that saved at `saved_at`, when its clock said `T`, which shows `shown` now; the server
    /// is away.
    fn run_again(node: &Node, saved_at: Instant, shown: u64) -> Node {
        let mut netmap = node.netmap().clone();
        let server = node.server_time(saved_at).unwrap();
        netmap.clocks = Some(Clocks { server, own: T });
        let mut node = start(netmap);
        node.guess_server_time(shown, epoch());
        node
    }

    fn events(node: &mut Node) -> Vec<Event> {
        std::iter::from_fn(|| node.poll_event()).collect()
    }

    #[test]
    fn a_peer_is_dropped_at_its_time_without_the_server_and_taken_back_with_more() {
        let mut node = node(None, Some(T + 100));
        node.handle_link_down(epoch());
        assert!(node.poll_timeout().is_some_and(|(at, _)| at <= after(100)));
        node.handle_timeout(after(99));
        assert!(has_peer(&node));
        node.handle_timeout(after(100));
        assert!(!has_peer(&node) && node.peers_by_key.is_empty());
        let events = events(&mut node);
        assert!(events.iter().any(|event| matches!(event, Event::Standing)), "the log says it");
        assert!(events.iter().any(|event| matches!(event, Event::Save)), "the time is kept");
        assert!(!node.is_expired(after(100)), "we are a member");

        let update = NetmapUpdate { to: 2, peers: vec![peer(None)], ..Default::default() };
        say(&mut node, ServerMessage { netmap: Some(update), ..Default::default() }, after(200));
        assert!(has_peer(&node));
    }

    #[test]
    fn an_expired_node_talks_to_nobody_until_the_server_gives_it_more_time() {
        let mut node = node(Some(T + 100), None);
        node.handle_timeout(after(100));
        assert!(node.is_expired(after(100)) && node.is_told_expired(after(100)));
        assert!(!has_peer(&node));
        say(&mut node, told(Some(T + 500), None), after(100));
        assert!(has_peer(&node) && !node.is_expired(after(100)));
    }

    #[test]
    fn a_clock_that_is_set_between_two_runs_ends_nothing_and_lets_nobody_in() {
        let before = node(Some(T + 400 * DAY), Some(T + 10 * DAY));
        let started = |saved_s, shown| has_peer(&run_again(&before, after(saved_s), shown));
        assert!(started(0, T + 9 * DAY), "it was off for nine days");
        assert!(!started(0, T + 11 * DAY), "it was off for eleven");
        assert!(started(0, T + 4_000 * DAY), "years ahead: the clock was set");
        assert!(started(0, 0) && started(0, u64::MAX), "no clock at all");
        assert!(!started(10 * DAY, T - 4_000 * DAY), "what is over is over, the clock set back");
        let mut again = run_again(&before, epoch(), T + 4_000 * DAY);
        again.handle_timeout(after(10 * DAY));
        assert!(!has_peer(&again), "the time that it runs itself counts");
        assert!(!again.is_told_expired(after(10 * DAY)));

        // A wrong guess lasts until the server says better.
        let mut again = run_again(&before, epoch(), T + 20 * DAY);
        assert!(!has_peer(&again));
        say(&mut again, told(Some(T + 400 * DAY), Some(T + 10 * DAY)), epoch());
        assert!(has_peer(&again));
    }

    #[test]
    fn time_that_the_machine_was_suspended_counts() {
        let mut node = node(None, Some(T + 100));
        node.handle_sleep(Duration::from_secs(100), after(1));
        assert!(!has_peer(&node));
    }

    #[test]
    fn ends_and_times_that_make_no_sense_do_no_harm() {
        let mut node = node(Some(u64::MAX), Some(u64::MAX));
        node.handle_timeout(after(DAY));
        assert!(has_peer(&node));
        let standing = Some(Standing { now: u64::MAX, expires: None });
        say(&mut node, ServerMessage { standing, ..Default::default() }, after(DAY));
        assert_eq!(node.server_time(after(2 * DAY)), Some(u64::MAX));
        assert!(!has_peer(&node));
    }

    #[test]
    fn while_there_is_an_end_the_time_is_written_down_every_hour() {
        let saves = |mut node: Node| {
            let mut hours = (1..=5).map(|hour| {
                node.handle_timeout(after(hour * 3600));
                events(&mut node).iter().any(|event| matches!(event, Event::Standing))
            });
            hours.by_ref().filter(|said| *said).count()
        };
        assert_eq!(saves(node(None, Some(T + 90 * DAY))), 5);
        assert_eq!(saves(node(None, None)), 0, "no end, no work");
    }
}
