//! A row of pings for the command line.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::local::{Request, ask, or_stopping, unknown_peer};
use super::report::millis;
use crate::io::clock;
use crate::io::local::{LocalConnection, LocalError, Reply};
use crate::path::Via;

/// How long one reply to a ping is waited for.
const REPLY_LIMIT: Duration = Duration::from_secs(2);
/// Between pings of a person.
const CALM: Duration = Duration::from_secs(1);
/// Between pings of somebody who waits for the direct path.
const EAGER: Duration = Duration::from_millis(100);

/// One ping, as it is told on the socket.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PingLine {
    /// Counted from 1.
    pub seq: u64,
    /// The peer's name, for people.
    pub name: String,
    /// Its overlay address, for people.
    pub ipv4: std::net::Ipv4Addr,
    /// Round trip in milliseconds; none when there was no reply.
    pub rtt_ms: Option<f64>,
    /// `direct`, `relay-udp` or `relay-tcp`; of no reply, the state of the path.
    pub kind: String,
    /// The endpoint.
    pub remote: Option<String>,
}

/// How often, and until when.
pub(super) struct PingPlan {
    pub(super) count: Option<u64>,
    pub(super) until_direct: bool,
    pub(super) limit: Option<Duration>,
}

/// Answers each ping as it comes back, or is lost, and ends the row.
pub(super) async fn ping(
    connection: &mut LocalConnection,
    requests: &mpsc::Sender<Request>,
    text: String,
    plan: PingPlan,
) -> Result<(), LocalError> {
    let find = |sender| Request::Find(text.clone(), sender);
    let id = match ask(requests, find).await {
        Some(Some((id, _))) => id,
        Some(None) => {
            let refusal = unknown_peer(requests, &text).await;
            return connection.answer(&Reply::<PingLine>::Error(refusal)).await;
        }
        None => return connection.answer(&or_stopping::<PingLine>(None)).await,
    };
    let started = clock::now();
    let end = plan.limit.map(|limit| started + limit);
    let mut seq = 0;
    while plan.count.is_none_or(|count| seq < count) {
        seq += 1;
        let sent_at = clock::now();
        let left = end.map(|end| end.saturating_duration_since(sent_at));
        if left == Some(Duration::ZERO) {
            break;
        }
        let wait = left.map_or(REPLY_LIMIT, |left| left.min(REPLY_LIMIT));
        let answer = match ask(requests, |sender| Request::Ping(id, sender)).await {
            Some(Some(pong)) => tokio::time::timeout(wait, pong).await.ok().and_then(Result::ok),
            // No path at this moment: as good as a lost ping, and nothing to wait for.
            Some(None) | None => None,
        };
        let mut line = match ask(requests, |sender| Request::Find(id.to_string(), sender)).await {
            Some(Some((_, line))) => line,
            Some(None) => break,
            None => return connection.answer(&or_stopping::<PingLine>(None)).await,
        };
        line.seq = seq;
        if let Some(answer) = answer {
            line.rtt_ms = Some(millis(answer.rtt));
            line.kind = answer.via.kind().into();
            if let Via::Direct { remote, .. } = answer.via {
                line.remote = Some(remote.to_string());
            }
        }
        let direct = answer.is_some_and(|answer| !answer.via.is_relay());
        connection.answer(&Reply::Ok(line)).await?;
        if plan.until_direct && direct || plan.count == Some(seq) {
            break;
        }
        let spacing = if plan.until_direct { EAGER } else { CALM };
        let next = sent_at + spacing;
        let next = end.map_or(next, |end| next.min(end));
        tokio::time::sleep_until(next.into()).await;
    }
    // An empty line of pings ends the row.
    connection.answer(&Reply::Ok(Option::<PingLine>::None)).await
}
