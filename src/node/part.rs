//! Peers of a large network. The server tells us only of those that we use: an address, a name or an
//! id that we do not know is asked for, and what wants to go there waits for the answer. A peer that
//! has been silent for long in both directions is let go of.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Node;
use super::peer::PeerControl;
use crate::dataplane::icmp::{self, Trouble};
use crate::dataplane::outbound;
use crate::types::{DropReason, NodeId};
use crate::wire::control::{ClientMessage, MAX_FIND};
use crate::wire::ip::IpView;

/// The server gets this long to answer: programs are to know within a second.
const PATIENCE: Duration = Duration::from_millis(900);
/// Nobody has this address: it is not asked for again for so long.
const UNKNOWN_FOR: Duration = Duration::from_secs(3);
/// Peers that are asked for at a time.
const MAX_WANTED: usize = 64;
/// Packets that wait for one of them.
const MAX_PACKETS: usize = 16;
/// Addresses of which is remembered that nobody has them.
const MAX_UNKNOWN: usize = 256;
/// A peer with which no packet was exchanged for so long is let go of.
const UNUSED_AFTER: Duration = Duration::from_secs(15 * 60);
/// How often that is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// What has been asked for and was not answered yet.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// By name, address or id.
    open: BTreeMap<String, Want>,
    unknown: VecDeque<(Instant, String)>,
    look_at: Option<Instant>,
}

#[derive(Debug)]
struct Want {
    until: Instant,
    packets: Vec<Vec<u8>>,
}

/// When a peer was used last.
#[derive(Debug)]
pub(super) struct UseRecord {
    at: Instant,
    bytes: u64,
    /// Whether the server has been told that it is not.
    released: bool,
}

impl UseRecord {
    pub(super) fn new(now: Instant) -> Self {
        Self { at: now, bytes: 0, released: false }
    }

    /// Takes what went to and fro so far, and says what the server is to be told.
    fn look(&mut self, bytes: u64, now: Instant) -> Option<Use> {
        if bytes != self.bytes {
            self.bytes = bytes;
            return self.touch(now).then_some(Use::Again);
        }
        let unused = now.saturating_duration_since(self.at) >= UNUSED_AFTER;
        (unused && !std::mem::replace(&mut self.released, unused)).then_some(Use::NoMore)
    }

    /// A new connection: the server takes every peer that we know for one that we use.
    fn renew(&mut self) {
        self.released = false;
    }

    /// It is used; whether the server believes that it is not.
    pub(super) fn touch(&mut self, now: Instant) -> bool {
        self.at = now;
        std::mem::take(&mut self.released)
    }
}

/// What the server is to be told of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Again,
    NoMore,
}

impl Wanted {
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.open.values().map(|want| want.until).chain(self.look_at).min()
    }

    fn is_unknown(&self, text: &str, now: Instant) -> bool {
        let fresh = |at: &Instant| now.saturating_duration_since(*at) < UNKNOWN_FOR;
        self.unknown.iter().any(|(at, unknown)| unknown == text && fresh(at))
    }

    fn note_unknown(&mut self, text: &str, now: Instant) {
        self.unknown.retain(|(_, unknown)| unknown != text);
        if self.unknown.len() >= MAX_UNKNOWN {
            self.unknown.pop_front();
        }
        self.unknown.push_back((now, text.into()));
    }
}

impl Node {
    /// Takes a packet to an address whose owner we do not know.
    pub(super) fn handle_peer_wanted(&mut self, packet: Vec<u8>, now: Instant) {
        let Ok(view) = IpView::parse(&packet) else { return };
        let text = view.dst.to_string();
        match self.netmap.find(&text) {
            Some(id) if self.peers.contains_key(&id) => return self.send_again([packet], now),
            // Its membership has ended: nothing may go there, and it would only come back here.
            Some(_) => return self.refuse_packet(&packet),
            None => {}
        }
        if !self.want_peer(&text, now) {
            return self.refuse_packet(&packet);
        }
        let kept = self.wanted.open.get_mut(&text).filter(|want| want.packets.len() < MAX_PACKETS);
        match kept {
            Some(want) => want.packets.push(packet),
            None => self.shared.drops().count(DropReason::QueueFull),
        }
    }

    /// Asks the server for the peer with this name, overlay address or id, unless that is under way.
    /// Returns whether there is an answer to wait for.
    pub fn want_peer(&mut self, text: &str, now: Instant) -> bool {
        if self.wanted.open.contains_key(text) {
            return true;
        }
        let possible = self.netmap.members.is_some() && !self.wanted.is_unknown(text, now);
        if !possible || self.wanted.open.len() >= MAX_WANTED {
            return false;
        }
        let want = Want { until: now + PATIENCE, packets: Vec::new() };
        self.wanted.open.insert(text.into(), want);
        self.ask_for(text);
        true
    }

    /// How many nodes the network has, when we know only the peers that we use.
    #[must_use]
    pub fn network_size(&self) -> Option<u32> {
        self.netmap.members
    }

    /// A peer talks to us by the relay whom we do not know: it was told of us and we were not yet.
    pub(super) fn handle_stranger(&mut self, id: NodeId, now: Instant) {
        self.want_peer(&id.to_string(), now);
    }

    /// Tells the server that we use a peer, or want to.
    pub(super) fn ask_for(&mut self, text: &str) {
        // What is asked for in one turn goes in one message.
        if let Some(find) = self.messages.back_mut().and_then(|message| message.find.as_mut())
            && find.len() < MAX_FIND
        {
            find.push(text.into());
        } else {
            let find = Some(vec![text.into()]);
            self.messages.push_back(ClientMessage { find, ..ClientMessage::default() });
        }
    }

    /// There is a new connection: what the old one did not answer is asked for again, and what was let
    /// go of by the old one is let go of again, since the hello says that we know it.
    pub(super) fn ask_again(&mut self) {
        self.peers.values_mut().for_each(|peer| peer.use_record.renew());
        let open: Vec<String> = self.wanted.open.keys().cloned().collect();
        for text in open {
            self.ask_for(&text);
        }
    }

    /// The server has told us of these peers: what waited for one goes. Whoever is told of us uses
    /// us, so its path is made at once.
    pub(super) fn handle_found_peers(&mut self, found: &[NodeId], now: Instant) {
        if self.netmap.members.is_none() {
            return;
        }
        self.wanted.look_at.get_or_insert(now + LOOK_INTERVAL);
        for id in found {
            self.note_use(*id, now);
        }
        let known = |text: &String, _: &mut Want| self.netmap.find(text).is_some();
        let found: Vec<(String, Want)> = self.wanted.open.extract_if(.., known).collect();
        for (_, want) in found {
            self.send_again(want.packets, now);
        }
    }

    /// Nobody in the network fits this text.
    pub(super) fn handle_unknown_peer(&mut self, text: &str, now: Instant) {
        // What we did not ask for is not remembered.
        if let Some(want) = self.wanted.open.remove(text) {
            self.wanted.note_unknown(text, now);
            want.packets.iter().for_each(|packet| self.refuse_packet(packet));
        }
    }

    /// Gives up what nobody has answered, and lets go of peers that nobody uses.
    pub(super) fn handle_wanted_timeout(&mut self, now: Instant) {
        let late = |_: &String, want: &mut Want| want.until <= now;
        let late: Vec<(String, Want)> = self.wanted.open.extract_if(.., late).collect();
        for packet in late.iter().flat_map(|(_, want)| &want.packets) {
            self.refuse_packet(packet);
        }
        if self.wanted.look_at.is_some_and(|at| at <= now) {
            self.wanted.look_at = self.netmap.members.map(|_| now + LOOK_INTERVAL);
            self.release_unused(now);
        }
    }

    fn release_unused(&mut self, now: Instant) {
        if !self.link_up {
            return;
        }
        let mut unused = Vec::new();
        let mut used = Vec::new();
        for (id, peer) in &mut self.peers {
            let bytes = bytes_of(peer);
            match peer.use_record.look(bytes, now) {
                Some(Use::NoMore) => unused.push(id.number()),
                Some(Use::Again) => used.push(id.to_string()),
                None => {}
            }
        }
        for texts in used.chunks(MAX_FIND) {
            let find = Some(texts.to_vec());
            self.messages.push_back(ClientMessage { find, ..ClientMessage::default() });
        }
        if !unused.is_empty() {
            let unused = Some(unused);
            self.messages.push_back(ClientMessage { unused, ..ClientMessage::default() });
        }
    }

    fn send_again(&mut self, packets: impl IntoIterator<Item = Vec<u8>>, now: Instant) {
        let mut notes = Vec::new();
        let table = self.shared.table();
        for packet in packets {
            let packet = [packet.as_slice()];
            outbound(&self.shared, &table, packet, now, &mut self.datagrams, &mut notes);
        }
        for note in notes {
            self.handle_note(note, now);
        }
    }

    fn refuse_packet(&mut self, packet: &[u8]) {
        self.shared.drops().count(DropReason::NoRoute);
        let dst = IpView::parse(packet).ok().map(|view| view.dst);
        let answer = dst.and_then(|dst| icmp::answer(packet, dst, Trouble::HostUnreachable));
        if let Some(answer) = answer {
            self.answer(answer, None);
        }
    }
}

/// What was exchanged with a peer.
fn bytes_of(peer: &PeerControl) -> u64 {
    let counters = &peer.fast.counters;
    let sent = counters.tx_bytes.load(Ordering::Relaxed);
    sent.wrapping_add(counters.rx_bytes.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::Note;
    use crate::node::Identity;
    use crate::testing::epoch;
    use crate::wire::control::{NetmapUpdate, ServerMessage, Standing, Welcome, WirePeer};

    #[test]
    fn a_peer_is_let_go_of_once_after_its_last_packet() {
        let minute = Duration::from_secs(60);
        let mut record = UseRecord::new(epoch());
        let looks = |record: &mut UseRecord, bytes, minutes: std::ops::Range<u32>| {
            minutes.filter_map(|at| record.look(bytes, epoch() + minute * at)).collect::<Vec<_>>()
        };
        assert_eq!(looks(&mut record, 0, 1..15), []);
        assert_eq!(looks(&mut record, 0, 15..40), [Use::NoMore], "said once");
        assert_eq!(looks(&mut record, 9, 40..55), [Use::Again]);
        assert_eq!(looks(&mut record, 9, 55..90), [Use::NoMore]);
        assert!(record.touch(epoch() + minute * 91) && !record.touch(epoch() + minute * 92));
    }

    const SERVER: &str = "198.51.100.7:443";

    /// A node that nobody has told anything, and a first message that tells it of a peer whose
    /// membership ends then.
    fn node_and_message(expires: Option<u64>) -> (Node, ServerMessage) {
        let key = crate::types::SecretKey::from_bytes([1; 32]);
        let settings = crate::node::NodeSettings::default();
        let node = Node::new(key, crate::node::Netmap::default(), settings, [7; 32], 1, epoch());
        let welcome = Welcome {
            version: 1,
            network: [7; 8],
            id: 1,
            name: "own".into(),
            ipv4: "10.77.0.1".parse().unwrap(),
            ipv6: "fd00:1:2::1".parse().unwrap(),
            ipv4_prefix_len: 20,
            ipv6_prefix_len: 48,
            relay_key: [9; 32],
            relay_port: None,
            second_port: None,
            observed: None,
            server_addresses: Vec::new(),
        };
        let range = Identity::from_welcome(&welcome).unwrap().range;
        let addrs = range.addresses(2).unwrap();
        let peer = WirePeer {
            id: 2,
            name: "bob".into(),
            node_key: [2; 32],
            ipv4: addrs.v4,
            ipv6: addrs.v6,
            online: false,
            candidates: Vec::new(),
            expires,
        };
        let update = NetmapUpdate {
            to: 1,
            peers: vec![peer],
            members: Some(1000),
            ..NetmapUpdate::default()
        };
        let message = ServerMessage {
            welcome: Some(welcome),
            standing: Some(Standing { now: 1_000, expires: None }),
            netmap: Some(update),
            ..ServerMessage::default()
        };
        (node, message)
    }

    #[test]
    fn who_was_let_go_of_before_a_reconnect_is_let_go_of_again() {
        let now = epoch();
        let (mut node, message) = node_and_message(None);
        let server = SERVER.parse().unwrap();
        let mut unused = |from: Duration| {
            node.handle_message(&message, server, now + from);
            let mut said = 0;
            for minute in 1..20 {
                node.handle_timeout(now + from + LOOK_INTERVAL * minute);
                while let Some(message) = node.poll_message() {
                    said += message.unused.map_or(0, |ids| ids.len());
                }
            }
            node.handle_link_down(now + from + LOOK_INTERVAL * 20);
            said
        };
        assert_eq!(unused(Duration::ZERO), 1);
        assert_eq!(unused(LOOK_INTERVAL * 30), 1, "the new hello has named it as known");
    }

    #[test]
    fn a_packet_to_a_peer_whose_membership_has_ended_is_refused() {
        let (mut node, message) = node_and_message(Some(999));
        node.handle_message(&message, SERVER.parse().unwrap(), epoch());
        let peer = NodeId::new(2).unwrap();
        assert!(node.netmap.peers.contains_key(&peer) && !node.peers.contains_key(&peer));
        let mut packet = vec![0; 28];
        (packet[0], packet[3], packet[8], packet[9]) = (0x45, 28, 64, 17);
        packet[12..16].copy_from_slice(&[10, 77, 0, 1]);
        packet[16..20].copy_from_slice(&[10, 77, 0, 2]);
        node.handle_note(Note::PeerWanted(packet), epoch());
        let refused = node.poll_packet().expect("who sends is told");
        // ICMP, and "host unreachable".
        assert_eq!((refused[9], &refused[20..22]), (1, &[3, 1][..]));
        assert!(node.poll_packet().is_none());
        let counts = node.shared.drops();
        assert_eq!(counts.of(DropReason::NoRoute), 1);
        assert_eq!(counts.of(DropReason::QueueFull), 0);
    }
}
