//! How both sides see the ways between them: our own half, the peer's half asked for over disco,
//! and what follows from both.
//!
//! A peer that asks is answered on the path that our data to it takes, never to where the question
//! came from: a recorded question that is played back from elsewhere makes nobody send there. It is
//! answered a few times a second at most.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng;

use super::history::{History, PathChange};
use super::{Event, Node, PeerInfo};
use crate::path::side::{Facts, Outlook, Side, Tried};
use crate::path::verdict::{Pair, Presence, Verdict, verdict};
use crate::path::{Filtering, Mapping, PathAgent, ProbeOutcome, Via};
use crate::types::{CandidateKind, DropReason, NodeId, NodeName, OverlayAddrs, TxId};
use crate::wire::control::NetmapUpdate;
use crate::wire::disco::Message;
use crate::wire::report::{Report, WireFacts, WireTried};

/// A peer is told our half at most this often: several commands may ask at once.
const ANSWER_SPACING: Duration = Duration::from_millis(150);
/// Requests that were not answered yet are open for so long.
const ASK_LIFETIME: Duration = Duration::from_secs(5);
/// A peer's half that is older says nothing of this moment.
const FRESH: Duration = Duration::from_secs(3);
/// Removed peers that are remembered.
const MAX_REMOVED: usize = 32;

/// What is kept about one peer to explain its paths.
#[derive(Debug)]
pub(super) struct Insight {
    pub(super) history: History,
    asked: Option<(TxId, Instant)>,
    answered_at: Option<Instant>,
    heard: Option<(Instant, Side)>,
    pub(super) offline_since: Option<Instant>,
    was_online: bool,
}

/// A peer that is no member any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemovedPeer {
    /// Its id.
    pub id: NodeId,
    /// Its last name.
    pub name: NodeName,
    /// Its addresses.
    pub addrs: OverlayAddrs,
    /// When we were told.
    pub at: Instant,
    /// Its membership had come to its end.
    pub is_expired: bool,
}

/// Peers that were removed while this node ran, newest last.
#[derive(Debug, Default)]
pub(super) struct Removed(VecDeque<RemovedPeer>);

/// Both sides' views and what follows from them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// Our view.
    pub own: Side,
    /// The peer's, if it told us just now.
    pub peer: Option<Side>,
    /// What the server says of it.
    pub presence: Presence,
    /// What follows.
    pub verdict: Verdict,
}

impl Insight {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            history: History::new(now),
            asked: None,
            answered_at: None,
            heard: None,
            offline_since: None,
            was_online: false,
        }
    }

    /// Data goes another way.
    pub(super) fn note_path(
        &mut self,
        agent: &PathAgent,
        from: Option<Via>,
        to: Option<Via>,
        cause: &'static str,
        at: Instant,
    ) {
        let rtt = to.and_then(|via| agent.rtt_on(via));
        self.history.note_change(PathChange { at, from, to, cause, rtt });
    }

    /// Whether the server sees the peer.
    pub(super) fn note_presence(&mut self, online: bool, now: Instant) {
        if online {
            self.offline_since = None;
        } else if self.was_online {
            self.offline_since = Some(now);
        }
        self.was_online = online;
    }
}

impl Node {
    /// Asks a peer for its half; it comes as [`Event::Reported`]. Returns whether there was a way to
    /// ask.
    pub fn request_report(&mut self, id: NodeId, now: Instant) -> bool {
        let tx = TxId(self.rng.random());
        let Some(peer) = self.peers.get_mut(&id) else { return false };
        let Some(via) = peer.agent.choice().primary else { return false };
        peer.insight.asked = match peer.insight.asked {
            // A repeated question: the answer to either will do.
            Some((open, at)) if now.saturating_duration_since(at) < ASK_LIFETIME => {
                Some((open, at))
            }
            _ => Some((tx, now)),
        };
        let tx = peer.insight.asked.map_or(tx, |(open, _)| open);
        self.send_disco(id, via, &Message::ReportRequest { tx });
        true
    }

    /// A peer asks for our half.
    pub(super) fn handle_report_request(
        &mut self,
        id: NodeId,
        tx: TxId,
        now: Instant,
    ) -> Result<(), DropReason> {
        let peer = self.peers.get_mut(&id).ok_or(DropReason::BadDisco)?;
        let recent = |at: Instant| now.saturating_duration_since(at) < ANSWER_SPACING;
        if peer.insight.answered_at.is_some_and(recent) {
            return Err(DropReason::RateLimited);
        }
        let via = peer.agent.choice().primary.ok_or(DropReason::NoPath)?;
        peer.insight.answered_at = Some(now);
        let own = self.own_side(id, now).ok_or(DropReason::BadDisco)?;
        let body = to_wire(&own).encode();
        self.send_disco(id, via, &Message::Report { tx, body });
        Ok(())
    }

    /// A peer tells its half.
    pub(super) fn handle_report(
        &mut self,
        id: NodeId,
        tx: TxId,
        body: &[u8],
        now: Instant,
    ) -> Result<(), DropReason> {
        let insight = &mut self.peers.get_mut(&id).ok_or(DropReason::BadDisco)?.insight;
        if insight.asked.is_none_or(|(asked, _)| asked != tx) {
            return Err(DropReason::BadDisco);
        }
        let report = Report::decode(body).ok_or(DropReason::BadDisco)?;
        insight.asked = None;
        insight.heard = Some((now, from_wire(report)));
        self.events.push_back(Event::Reported(id));
        Ok(())
    }

    /// Both sides' views of the ways to a peer. The peer's is what it told within the last seconds.
    #[must_use]
    pub fn explain(
        &self,
        id: NodeId,
        has_route: impl Fn(SocketAddr) -> bool,
        now: Instant,
    ) -> Option<Explanation> {
        let peer = self.peers.get(&id)?;
        let info = self.netmap.peers.get(&id)?;
        let own_name = self.netmap.identity.as_ref()?.name.as_str();
        let mut own = self.own_side(id, now)?;
        for tried in own.tried.iter_mut().filter(|tried| tried.heard.is_none()) {
            tried.no_route = !has_route(tried.endpoint);
        }
        let fresh = |at: Instant| now.saturating_duration_since(at) < FRESH;
        // Without a path it cannot have told anything of this moment.
        let heard = peer.insight.heard.as_ref().filter(|(at, _)| fresh(*at) && own.path.is_some());
        let other = heard.map(|(_, side)| side.clone());
        let presence = match (self.is_present(id), self.link_up) {
            (_, false) => Presence::Unknown,
            (true, true) => Presence::Online,
            (false, true) => {
                let since = peer.insight.offline_since;
                Presence::Offline(since.map(|at| now.saturating_duration_since(at)))
            }
        };
        let verdict = verdict(&Pair {
            own_name,
            peer_name: info.name.as_str(),
            own: &own,
            peer: other.as_ref(),
            presence,
            since: now.saturating_duration_since(peer.agent.primary_since()),
        });
        Some(Explanation { own, peer: other, presence, verdict })
    }

    /// What is to be expected of the way to a peer; none when it has told nothing lately.
    #[must_use]
    pub fn outlook(&self, id: NodeId, own: &Facts, now: Instant) -> Option<Outlook> {
        let (at, side) = self.peers.get(&id)?.insight.heard.as_ref()?;
        (now.saturating_duration_since(*at) < FRESH * 2).then(|| own.outlook(&side.facts))
    }

    /// The history of the paths to a peer.
    #[must_use]
    pub fn history(&self, id: NodeId) -> Option<&History> {
        self.peers.get(&id).map(|peer| &peer.insight.history)
    }

    /// The peer that had this name, overlay address or id, and was removed while this node ran.
    #[must_use]
    pub fn find_removed(&self, text: &str) -> Option<&RemovedPeer> {
        let ip: Option<std::net::IpAddr> = text.parse().ok();
        let id: Option<NodeId> = text.parse().ok();
        self.removed.0.iter().rev().find(|peer| {
            ip.is_some_and(|ip| peer.addrs.contains(ip))
                || id == Some(peer.id)
                || peer.name.as_str().eq_ignore_ascii_case(text)
        })
    }

    /// Who is in the netmap, and not any more when `update` is applied.
    pub(super) fn leaving(&self, update: &NetmapUpdate, at: Instant) -> Vec<RemovedPeer> {
        let stays: Option<BTreeSet<u32>> =
            update.from.is_none().then(|| update.peers.iter().map(|peer| peer.id).collect());
        let leaves = |id: &NodeId| match &stays {
            Some(stays) => !stays.contains(&id.number()),
            None => update.removed.contains(&id.number()),
        };
        let peers = self.netmap.peers.iter().filter(|(id, _)| leaves(id));
        let removed = |(id, info): (&NodeId, &PeerInfo)| RemovedPeer {
            id: *id,
            name: info.name.clone(),
            addrs: info.addrs,
            at,
            is_expired: self.ends_by(info.expires, at),
        };
        peers.map(removed).collect()
    }

    /// These were removed.
    pub(super) fn note_removed(&mut self, leaving: Vec<RemovedPeer>) {
        self.removed.0.extend(leaving);
        let surplus = self.removed.0.len().saturating_sub(MAX_REMOVED);
        self.removed.0.drain(..surplus);
    }

    fn own_side(&self, id: NodeId, now: Instant) -> Option<Side> {
        let agent = &self.peers.get(&id)?.agent;
        let (facts, path, tried) = (self.facts(now), agent.choice().primary, agent.view(now));
        Some(Side { facts, path, tried })
    }
}

fn to_wire(side: &Side) -> Report {
    let facts = &side.facts;
    let (path, remote) = match side.path {
        None => (0, None),
        Some(Via::Direct { remote, .. }) => (1, Some(remote)),
        Some(Via::RelayUdp) => (2, None),
        Some(Via::RelayTcp) => (3, None),
    };
    let tried = side.tried.iter().map(|tried| WireTried {
        endpoint: tried.endpoint,
        kind: tried.kind.code(),
        outcome: match tried.outcome {
            ProbeOutcome::Untried => 0,
            ProbeOutcome::Probing => 1,
            ProbeOutcome::Answered => 2,
            ProbeOutcome::Silent => 3,
        },
        pings: tried.pings,
        rtt_us: tried.rtt.map(|rtt| u32::try_from(rtt.as_micros()).unwrap_or(u32::MAX)),
        heard_ms: tried.heard.map(|ago| u64::try_from(ago.as_millis()).unwrap_or(u64::MAX)),
    });
    Report {
        path,
        remote,
        facts: WireFacts {
            udp: facts.udp,
            mapping: facts.mapping.map(|mapping| match mapping {
                Mapping::None => 1,
                Mapping::EndpointIndependent => 2,
                Mapping::AddressAndPortDependent => 3,
            }),
            filtering: facts.filtering.map(|filtering| match filtering {
                Filtering::EndpointIndependentOrAddressDependent => 1,
                Filtering::AddressAndPortDependent => 2,
            }),
            counts: facts.counts,
            reflexive: facts.reflexive,
            ipv6: facts.ipv6,
            ipv4: facts.ipv4,
            port_mapped: facts.port_mapped,
            port: facts.port,
        },
        tried: tried.collect(),
    }
}

fn from_wire(report: Report) -> Side {
    let facts = report.facts;
    let path = match (report.path, report.remote) {
        (1, Some(remote)) => Some(Via::direct(remote)),
        (2, _) => Some(Via::RelayUdp),
        (3, _) => Some(Via::RelayTcp),
        _ => None,
    };
    let tried = report.tried.into_iter().map(|tried| Tried {
        endpoint: tried.endpoint,
        kind: CandidateKind::from_code(tried.kind),
        outcome: match tried.outcome {
            1 => ProbeOutcome::Probing,
            2 => ProbeOutcome::Answered,
            3 => ProbeOutcome::Silent,
            _ => ProbeOutcome::Untried,
        },
        pings: tried.pings,
        rtt: tried.rtt_us.map(|us| Duration::from_micros(us.into())),
        heard: tried.heard_ms.map(Duration::from_millis),
        no_route: false,
    });
    Side {
        path,
        facts: Facts {
            udp: facts.udp,
            mapping: facts.mapping.and_then(|code| match code {
                1 => Some(Mapping::None),
                2 => Some(Mapping::EndpointIndependent),
                3 => Some(Mapping::AddressAndPortDependent),
                _ => None,
            }),
            filtering: facts.filtering.and_then(|code| match code {
                1 => Some(Filtering::EndpointIndependentOrAddressDependent),
                2 => Some(Filtering::AddressAndPortDependent),
                _ => None,
            }),
            counts: facts.counts,
            reflexive: facts.reflexive,
            ipv6: facts.ipv6,
            ipv4: facts.ipv4,
            port_mapped: facts.port_mapped,
            port: facts.port,
        }
        .of_ipv4(),
        tried: tried.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_survives_the_way_to_the_peer() {
        let at = |text: &str| text.parse().unwrap();
        let tried = |endpoint: &str, outcome| Tried {
            endpoint: at(endpoint),
            kind: CandidateKind::PortMapped,
            outcome,
            pings: 7,
            rtt: Some(Duration::from_micros(1234)),
            heard: Some(Duration::from_millis(99)),
            no_route: false,
        };
        let remote = at("192.0.2.7:4");
        for path in [None, Some(Via::direct(remote)), Some(Via::RelayTcp)] {
            let side = Side {
                facts: Facts {
                    udp: Some(true),
                    mapping: Some(Mapping::EndpointIndependent),
                    filtering: Some(Filtering::AddressAndPortDependent),
                    counts: true,
                    reflexive: Some(at("203.0.113.1:9")),
                    ipv6: true,
                    ipv4: Some(false),
                    port_mapped: true,
                    port: Some(9),
                },
                path,
                tried: vec![
                    tried("192.0.2.7:4", ProbeOutcome::Answered),
                    tried("[2001:db8::1]:4", ProbeOutcome::Silent),
                ],
            };
            let read = Report::decode(&to_wire(&side).encode()).unwrap();
            assert_eq!(from_wire(read), side);
        }
    }
}
