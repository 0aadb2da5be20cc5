//! Answers about paths: why each is what it is, what became of it, and what is to be expected. The
//! types are a part of the JSON contract: fields are added, never renamed or removed.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::Daemon;
use super::local::{self, ask, unknown_peer};
use super::netcheck::facts_of;
use super::report::{Forecast, Netcheck, PeerReport, SCHEMA, millis};
use crate::io::clock;
use crate::io::local::Reply;
use crate::io::udp::has_route;
use crate::node::{PathKind, PeerStatus};
use crate::path::side::{Facts, Outlook, Side};
use crate::path::verdict::{Pair, Presence, verdict};
use crate::path::{Filtering, Mapping, ProbeOutcome, Via};
use crate::types::NodeId;

/// The peer's half is asked for so often, in case a datagram is lost,
const ATTEMPTS: u32 = 3;
/// and waited for so long each time.
const PATIENCE: Duration = Duration::from_millis(350);
/// Peers that are asked for a forecast.
const MAX_ASKED: usize = 64;

/// `overlay why --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Why {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// The peer, as in `overlay status`; none when it was removed.
    pub peer: Option<PeerReport>,
    /// The peer's name.
    pub name: String,
    /// What it comes to.
    pub verdict: VerdictReport,
    /// Our view.
    pub here: Option<SideReport>,
    /// The peer's view; none when it does not tell it.
    pub there: Option<SideReport>,
    /// Why the peer's view is missing.
    pub there_missing: Option<String>,
}

/// The verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictReport {
    /// A word for programs.
    pub word: String,
    /// A sentence.
    pub sentence: String,
    /// What to do about it.
    pub remedy: String,
}

/// One side's view.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SideReport {
    /// Whose.
    pub name: String,
    /// `direct`, `relay-udp`, `relay-tcp` or `none`.
    pub path: String,
    /// Where a direct path leads.
    pub remote: Option<String>,
    /// Whether UDP reaches the server; none when that is not known yet, or the server is away.
    pub udp: Option<bool>,
    /// Whether there is a global IPv6 address.
    pub ipv6: bool,
    /// Where the server sees this side.
    pub reflexive: Option<String>,
    /// The network in front of it.
    pub nat: SideNat,
    /// The other side's candidates that it knows.
    pub candidates: Vec<CandidateReport>,
}

/// The NAT of one side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideNat {
    /// RFC 4787 mapping behaviour, or `unknown`.
    pub mapping: String,
    /// RFC 4787 filtering behaviour, or `unknown`.
    pub filtering: String,
    /// The classical name, `udp-blocked` or `unknown`.
    pub kind: String,
    /// Whether it gives its ports in order.
    pub counts: bool,
    /// Whether it maps a port for this node.
    pub port_mapped: bool,
}

/// One candidate and what came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CandidateReport {
    /// Where.
    pub endpoint: String,
    /// `host`, `reflexive`, `peer-reflexive`, `port-mapped`, `predicted`, `static` or `uplink`.
    pub kind: String,
    /// `untried`, `probing`, `answered` or `silent`.
    pub outcome: String,
    /// Pings sent to it.
    pub pings: u32,
    /// Smoothed round trip in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Seconds since anything authenticated came from it.
    pub heard_s: Option<f64>,
    /// Whether the asked node has no route there; false in the half of a peer, which does not tell it.
    #[serde(default)]
    pub no_route: bool,
}

/// `overlay history --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HistoryReport {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// The peer's name.
    pub name: String,
    /// Seconds since 1970 when this history starts: with the daemon, or with the peer.
    pub since: u64,
    /// Seconds with a direct path.
    pub direct_s: f64,
    /// Seconds on the relay.
    pub relayed_s: f64,
    /// Seconds without any path.
    pub without_s: f64,
    /// The last changes, oldest first.
    pub changes: Vec<ChangeReport>,
    /// The paths that answered, the newest answer first.
    pub paths: Vec<PathStatistics>,
}

/// A change of path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChangeReport {
    /// Seconds since 1970, with milliseconds.
    pub at: f64,
    /// The path before, or `none`.
    pub from: String,
    /// The path after, or `none`.
    pub to: String,
    /// Why.
    pub cause: String,
    /// Smoothed round trip on the new path at that time, in milliseconds.
    pub rtt_ms: Option<f64>,
}

/// What was measured on one path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PathStatistics {
    /// The path.
    pub path: String,
    /// Round trips measured.
    pub samples: u64,
    /// The shortest, in milliseconds.
    pub rtt_min_ms: f64,
    /// Their mean, in milliseconds.
    pub rtt_avg_ms: f64,
    /// Share of lost packets when it was measured last, 0 to 1; none when it never was.
    pub loss: Option<f64>,
    /// Seconds since the newest answer.
    pub last_s: f64,
}

/// What these answers need of the control task.
pub(super) enum Request {
    /// Ask a peer for its half; the second sender is told when it came.
    Half(NodeId, oneshot::Sender<()>),
    /// The peers with a path, first those on the relay: what the two networks do matters most for them.
    Online(oneshot::Sender<Vec<NodeId>>),
    Find(String, oneshot::Sender<Option<NodeId>>),
    Why(NodeId, oneshot::Sender<Option<Why>>),
    Removed(String, oneshot::Sender<Option<Why>>),
    History(NodeId, oneshot::Sender<Option<HistoryReport>>),
    /// From what was measured here, and of those who were asked.
    Forecast(Box<Facts>, Vec<NodeId>, oneshot::Sender<Vec<Forecast>>),
}

type Requests = mpsc::Sender<local::Request>;

async fn explain<T>(
    requests: &Requests,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Option<T> {
    ask(requests, |sender| local::Request::Explain(request(sender))).await
}

/// The answer to `overlay why`; none when the daemon ends.
pub(super) async fn why(requests: &Requests, text: String) -> Option<Reply<Why>> {
    let found = explain(requests, |sender| Request::Find(text.clone(), sender)).await?;
    let Some(id) = found else {
        let removed = explain(requests, |sender| Request::Removed(text.clone(), sender)).await?;
        return Some(or_unknown(removed, requests, &text).await);
    };
    ask_half(requests, id).await;
    let why = explain(requests, |sender| Request::Why(id, sender)).await?;
    Some(or_unknown(why, requests, &text).await)
}

/// The answer to `overlay history`; none when the daemon ends.
pub(super) async fn history(requests: &Requests, text: String) -> Option<Reply<HistoryReport>> {
    let found = explain(requests, |sender| Request::Find(text.clone(), sender)).await?;
    let history = match found {
        Some(id) => explain(requests, |sender| Request::History(id, sender)).await?,
        None => None,
    };
    Some(or_unknown(history, requests, &text).await)
}

async fn or_unknown<T>(answer: Option<T>, requests: &Requests, text: &str) -> Reply<T> {
    match answer {
        Some(answer) => Reply::Ok(answer),
        None => Reply::Error(unknown_peer(requests, text).await),
    }
}

/// Asks a peer for its half, and waits for it or until it is clear that it tells nothing.
async fn ask_half(requests: &Requests, id: NodeId) {
    for _ in 0..ATTEMPTS {
        let (sender, receiver) = oneshot::channel();
        let request = local::Request::Explain(Request::Half(id, sender));
        if requests.send(request).await.is_err() {
            return;
        }
        if timeout(PATIENCE, receiver).await.is_ok() {
            // It came, or there is no way to ask.
            return;
        }
    }
}

/// Asks peers that are online for their halves, at the same time. Returns whom it has asked.
pub(super) async fn ask_all(requests: &Requests) -> Vec<NodeId> {
    let mut peers = explain(requests, Request::Online).await.unwrap_or_default();
    peers.truncate(MAX_ASKED);
    let asking = peers.iter().copied().map(|id| {
        let requests = requests.clone();
        async move { ask_half(&requests, id).await }
    });
    tokio::task::JoinSet::from_iter(asking).join_all().await;
    peers
}

/// What is to be expected of each peer, from what was measured here and what the peers told.
pub(super) async fn forecast(
    requests: &Requests,
    report: &Netcheck,
    asked: Vec<NodeId>,
) -> Vec<Forecast> {
    let own = Box::new(facts_of(report));
    explain(requests, |sender| Request::Forecast(own, asked, sender)).await.unwrap_or_default()
}

impl Daemon {
    pub(super) fn handle_explain(&mut self, request: Request, now: Instant) {
        // A command that went away meanwhile does not take its answer; that is no error.
        match request {
            Request::Half(id, came) => {
                for waiting in self.halves.values_mut() {
                    waiting.retain(|sender| !sender.is_closed());
                }
                self.halves.retain(|_, waiting| !waiting.is_empty());
                if self.node.request_report(id, now) {
                    self.halves.entry(id).or_default().push(came);
                }
            }
            Request::Online(reply) => {
                let _ = reply.send(relayed_first(&self.node.peer_statuses(now)));
            }
            Request::Find(text, reply) => {
                let _ = reply.send(self.node.netmap().find(&text));
            }
            Request::Why(id, reply) => {
                let _ = reply.send(self.why(id, now));
            }
            Request::Removed(text, reply) => {
                let _ = reply.send(self.why_removed(&text, now));
            }
            Request::History(id, reply) => {
                let _ = reply.send(self.history(id, now));
            }
            Request::Forecast(measured, asked, reply) => {
                let _ = reply.send(self.forecasts(&measured, &asked, now));
            }
        }
    }

    fn own_name(&self) -> String {
        let identity = self.node.netmap().identity.as_ref();
        identity.map(|identity| identity.name.to_string()).unwrap_or_default()
    }

    fn why(&self, id: NodeId, now: Instant) -> Option<Why> {
        let status = self.node.peer_status(id, now)?;
        let explanation = self.node.explain(id, has_route, now)?;
        let name = status.name.to_string();
        let there_missing = explanation.peer.is_none().then(|| match status.path {
            PathKind::Via(_) => {
                format!("{name} did not answer within a second; older versions never do")
            }
            PathKind::Connecting | PathKind::Offline => "there is no way to ask it".into(),
        });
        Some(Why {
            schema: SCHEMA,
            verdict: VerdictReport {
                word: explanation.verdict.word.as_str().into(),
                sentence: explanation.verdict.sentence,
                remedy: explanation.verdict.remedy,
            },
            here: Some(side_report(self.own_name(), &explanation.own)),
            there: explanation.peer.map(|side| side_report(name.clone(), &side)),
            there_missing,
            peer: Some(status.into()),
            name,
        })
    }

    fn why_removed(&self, text: &str, now: Instant) -> Option<Why> {
        let removed = self.node.find_removed(text)?;
        let ago = now.saturating_duration_since(removed.at);
        let verdict = verdict(&Pair {
            own_name: &self.own_name(),
            peer_name: removed.name.as_str(),
            own: &Side::default(),
            peer: None,
            presence: match removed.is_expired {
                true => Presence::Expired(ago),
                false => Presence::Removed(ago),
            },
            since: ago,
        });
        Some(Why {
            schema: SCHEMA,
            peer: None,
            name: removed.name.to_string(),
            verdict: VerdictReport {
                word: verdict.word.as_str().into(),
                sentence: verdict.sentence,
                remedy: verdict.remedy,
            },
            here: None,
            there: None,
            there_missing: Some("it is no member of the network any more".into()),
        })
    }

    fn history(&self, id: NodeId, now: Instant) -> Option<HistoryReport> {
        let history = self.node.history(id)?;
        let name = self.node.peer_info(id)?.name.to_string();
        let wall = clock::wall().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let at = |then: Instant| wall.saturating_sub(now.saturating_duration_since(then));
        let times = history.times(now);
        let mut paths = history.paths().to_vec();
        paths.sort_by_key(|path| std::cmp::Reverse(path.last));
        Some(HistoryReport {
            schema: SCHEMA,
            name,
            since: at(history.started()).as_secs(),
            direct_s: seconds(times.direct),
            relayed_s: seconds(times.relayed),
            without_s: seconds(times.without),
            changes: history
                .changes()
                .map(|change| ChangeReport {
                    at: seconds(at(change.at)),
                    from: self.show_path(change.from),
                    to: self.show_path(change.to),
                    cause: change.cause.into(),
                    rtt_ms: change.rtt.map(millis),
                })
                .collect(),
            paths: paths
                .iter()
                .map(|path| PathStatistics {
                    path: self.show_path(Some(path.via)),
                    samples: path.samples,
                    rtt_min_ms: millis(path.rtt_min),
                    rtt_avg_ms: millis(path.rtt_avg),
                    loss: path.loss,
                    last_s: seconds(now.saturating_duration_since(path.last)),
                })
                .collect(),
        })
    }

    fn forecasts(&self, measured: &Facts, asked: &[NodeId], now: Instant) -> Vec<Forecast> {
        let seen = self.node.facts(now);
        let own = Facts {
            mapping: measured.mapping.or(seen.mapping),
            filtering: measured.filtering.or(seen.filtering),
            udp: measured.udp,
            ..seen
        };
        let peers = self.node.peer_statuses(now);
        let forecast = |peer: &PeerStatus| {
            let outlook = self.node.outlook(peer.id, &own, now);
            let (word, reason) = expect(peer.path, outlook, asked.contains(&peer.id));
            Forecast {
                id: peer.id.to_string(),
                name: peer.name.to_string(),
                forecast: word.into(),
                reason,
                path: peer.into(),
            }
        };
        peers.iter().map(forecast).collect()
    }
}

/// Who has a path, those on the relay first.
fn relayed_first(peers: &[PeerStatus]) -> Vec<NodeId> {
    let (mut first, mut then) = (Vec::new(), Vec::new());
    for peer in peers {
        match peer.path {
            PathKind::Via(Via::Direct { .. }) => then.push(peer.id),
            PathKind::Via(Via::RelayUdp | Via::RelayTcp) => first.push(peer.id),
            PathKind::Connecting | PathKind::Offline => {}
        }
    }
    first.append(&mut then);
    first
}

/// What is to be expected of a peer with this path, and why: from what the two networks allow, if the
/// peer was asked and has told that.
fn expect(path: PathKind, outlook: Option<Outlook>, asked: bool) -> (&'static str, String) {
    let is_direct = matches!(path, PathKind::Via(Via::Direct { .. }));
    let unknown = Outlook::Unknown.as_str();
    match (path, outlook) {
        (PathKind::Offline, _) => ("offline", "it is not there".into()),
        // What works needs no permission.
        (_, Some(Outlook::NoUdp) | None) if is_direct => ("direct", "it is direct now".into()),
        (_, Some(outlook)) => (outlook.as_str(), outlook.reason().into()),
        (PathKind::Via(_), None) if !asked => {
            (unknown, format!("it was not asked: only {MAX_ASKED} peers are, at one time"))
        }
        (_, None) => (unknown, "it does not tell what its network does".into()),
    }
}

fn side_report(name: String, side: &Side) -> SideReport {
    let facts = &side.facts;
    let candidates = side.tried.iter().map(|tried| CandidateReport {
        endpoint: tried.endpoint.to_string(),
        kind: tried.kind.as_str().into(),
        outcome: match tried.outcome {
            ProbeOutcome::Untried => "untried",
            ProbeOutcome::Probing => "probing",
            ProbeOutcome::Answered => "answered",
            ProbeOutcome::Silent => "silent",
        }
        .into(),
        pings: tried.pings,
        rtt_ms: tried.rtt.map(millis),
        heard_s: tried.heard.map(seconds),
        no_route: tried.no_route,
    });
    SideReport {
        name,
        path: side.path.map_or("none", Via::kind).into(),
        remote: match side.path {
            Some(Via::Direct { remote, .. }) => Some(remote.to_string()),
            Some(Via::RelayUdp | Via::RelayTcp) | None => None,
        },
        udp: facts.udp,
        ipv6: facts.ipv6,
        reflexive: facts.reflexive.map(|endpoint| endpoint.to_string()),
        nat: SideNat {
            mapping: facts.mapping.map_or("unknown", Mapping::as_str).into(),
            filtering: facts.filtering.map_or("unknown", Filtering::as_str).into(),
            kind: facts.kind().into(),
            counts: facts.counts,
            port_mapped: facts.port_mapped,
        },
        candidates: candidates.collect(),
    }
}

/// Seconds with three decimals.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::node::netcheck::UDP_BLOCKED;
    use crate::types::SocketId;

    fn direct() -> PathKind {
        let remote = "203.0.113.9:4000".parse().unwrap();
        PathKind::Via(Via::Direct { remote, local: None, socket: SocketId::MAIN })
    }

    #[test]
    fn a_path_that_is_there_counts_more_than_what_was_measured() {
        let no_udp = Some(Outlook::NoUdp);
        assert_eq!(expect(direct(), no_udp, true).0, "direct");
        assert_eq!(expect(PathKind::Via(Via::RelayTcp), no_udp, true).0, "relay-tcp");
        assert_eq!(expect(PathKind::Offline, no_udp, true).0, "offline");
        assert_eq!(expect(direct(), None, false).0, "direct");
    }

    #[test]
    fn who_was_not_asked_is_not_said_to_keep_silent() {
        let relayed = PathKind::Via(Via::RelayUdp);
        let (word, reason) = expect(relayed, None, false);
        assert!(word == "unknown" && reason.contains("not asked"), "{reason}");
        let (word, reason) = expect(relayed, None, true);
        assert!(word == "unknown" && reason.contains("does not tell"), "{reason}");
    }

    #[test]
    fn silence_of_a_server_that_is_away_does_not_block_udp() {
        let report = |kind: &str| Netcheck {
            schema: SCHEMA,
            udp: false,
            ipv4: None,
            ipv6: None,
            nat: super::super::report::NatReport {
                mapping: "unknown".into(),
                filtering: "unknown".into(),
                kind: kind.into(),
                hairpin: None,
                port_mapping: None,
                mapped: None,
            },
            servers: Vec::new(),
            uplinks: Vec::new(),
            verdict: String::new(),
            forecast: Vec::new(),
        };
        assert_eq!(facts_of(&report("unknown")).udp, None);
        assert_eq!(facts_of(&report(UDP_BLOCKED)).udp, Some(false));
    }
}
