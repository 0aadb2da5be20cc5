//! The server's side of the control stream: listen, limit, upgrade.
//!
//! A stranger costs one small task and two Diffie-Hellman operations, and is shown nothing: no
//! banner, no version, no page.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::hash::Hash;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, UPGRADE};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::link::{self, Answered, Link, LinkError, Responder};
use super::said::Said;
use crate::types::{Account, PublicKey, Rate, SecretKey, source_of};
use crate::wire::frame::{HANDSHAKE_HEADER, UPGRADE_PATH, UPGRADE_PROTOCOL};

/// From the first byte to the end of the upgrade.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Connections of one source (an IPv4 address or an IPv6 /64) that have not yet proved who they are.
const STRANGERS_PER_SOURCE: usize = 64;
/// Connections of all sources that have not yet proved who they are.
const STRANGERS: usize = 384;
/// So many of those that make room may still be on their way out.
const LEAVING: usize = 32;
/// One that came this lately is about to prove itself, and makes no room for others of its source.
const PROVING: Duration = Duration::from_millis(500);
/// Connections that a source may open: a large network behind one address comes back at once.
const CONNECTIONS: Rate = Rate::per_second(200, 1000);
/// Sources whose pace is known, and members that have had their place back.
const RATED_SOURCES: usize = 4096;
/// How often a member has its connection back in the count of its source.
const RETURNS: Rate = Rate::new(1, Duration::from_secs(10));
/// The least that the HTTP library takes; our request needs 400 bytes.
const HEADER_BYTES: usize = 8 * 1024;
/// Connections that the kernel keeps while we are busy: all nodes of a network at once.
const BACKLOG: i32 = 4096;

/// Why a connection did not become a link.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Not HTTP.
    #[error("not understood: {0}")]
    Http(#[from] hyper::Error),
    /// HTTP, and no upgrade to our protocol.
    #[error("a request that is not ours")]
    NotOurs,
    /// The handshake is for another key, or garbage.
    #[error("a handshake for another server key")]
    WrongKey,
    /// A handshake that was answered already.
    #[error("a handshake that this source has begun before")]
    SaidBefore,
    /// Too slow.
    #[error("the handshake took too long")]
    TimedOut,
    /// The connection ended at once.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// Opens a listening TCP socket. A wildcard IPv6 address takes IPv4 too.
///
/// # Errors
/// What the kernel says: address in use, not permitted, not ours.
pub fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(!addr.ip().is_unspecified())?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Counts the connections that have not yet proved who they are. Of too many the oldest has to go:
/// an honest one needs two round trips, and one that says nothing would hold its place for long.
#[derive(Debug, Default)]
pub struct Gate {
    strangers: Mutex<Strangers>,
}

#[derive(Debug, Default)]
struct Strangers {
    /// Oldest first.
    by_source: BTreeMap<IpAddr, VecDeque<Stranger>>,
    total: usize,
    /// Pushed out, and not gone yet.
    leaving: usize,
    next: u64,
    /// Connections of each source.
    connections: HashMap<IpAddr, Account>,
    /// Connections that each member has had back.
    returns: HashMap<PublicKey, Account>,
}

#[derive(Debug)]
struct Stranger {
    number: u64,
    since: Instant,
    told: Arc<Notify>,
}

impl Strangers {
    /// The oldest connection of this source has to go.
    fn push_out(&mut self, source: IpAddr) {
        let Some(oldest) = self.by_source.get_mut(&source).and_then(VecDeque::pop_front) else {
            return;
        };
        oldest.told.notify_one();
        self.total -= 1;
        self.leaving += 1;
        self.forget_if_empty(source);
    }

    /// Makes room for one more of `source`, if there is none; tells whether there is room now.
    fn make_room(&mut self, source: IpAddr, now: Instant) -> bool {
        let is_proving = |waiting: &VecDeque<Stranger>| {
            waiting.front().is_some_and(|it| now.saturating_duration_since(it.since) < PROVING)
        };
        if let Some(own) = self.by_source.get(&source).filter(|it| it.len() >= STRANGERS_PER_SOURCE)
        {
            if is_proving(own) {
                return false;
            }
            self.push_out(source);
        } else if self.total >= STRANGERS {
            // Of those that are there most, the one that has been for longest.
            let rank = |waiting: &VecDeque<Stranger>| {
                (waiting.len(), Reverse(waiting.front().map(|it| it.number)))
            };
            let most = self.by_source.iter().max_by_key(|(_, waiting)| rank(waiting));
            let Some((most, waiting)) = most else { return false };
            if waiting.len() == 1 && is_proving(waiting) {
                return false;
            }
            self.push_out(*most);
        }
        true
    }

    fn forget_if_empty(&mut self, source: IpAddr) {
        if self.by_source.get(&source).is_some_and(VecDeque::is_empty) {
            self.by_source.remove(&source);
        }
    }

    /// Whether a source may connect again already: each connection may cost two Diffie-Hellman
    /// operations. This machine itself has no limit.
    fn is_in_time(&self, source: IpAddr, now: Instant) -> bool {
        let late = |had: &Account| !had.has(CONNECTIONS, 1, now);
        source.is_loopback() || !self.connections.get(&source).is_some_and(late)
    }

    /// One more connection of this source.
    fn pay(&mut self, source: IpAddr, now: Instant) {
        make_room_in(&mut self.connections, &source, now);
        self.connections.entry(source).or_default().take(CONNECTIONS, 1, now);
    }

    /// It was a member's, so it does not count. One that comes again and again does.
    fn give_back(&mut self, source: IpAddr, member: PublicKey, now: Instant) {
        make_room_in(&mut self.returns, &member, now);
        let again = self.returns.entry(member).or_default().take(RETURNS, 1, now);
        if let Some(had) = self.connections.get_mut(&source).filter(|_| again) {
            had.give_back(CONNECTIONS, 1);
        }
    }
}

/// Keeps such a table from growing without end: what is over is forgotten, and at the worst all.
fn make_room_in<K: Eq + Hash>(table: &mut HashMap<K, Account>, key: &K, now: Instant) {
    if table.len() < RATED_SOURCES || table.contains_key(key) {
        return;
    }
    table.retain(|_, had| !had.is_settled(now));
    if table.len() >= RATED_SOURCES {
        table.clear();
    }
}

impl Gate {
    /// Lets a connection from `remote` in, unless that source has had too many lately, or all that
    /// are there have come just now.
    pub fn admit(self: &Arc<Self>, remote: IpAddr, now: Instant) -> Option<Admission> {
        let source = source_of(remote);
        let mut strangers = self.lock();
        if !strangers.is_in_time(source, now) {
            return None;
        }
        // Who finds no room has cost nothing, and may ask again.
        if !strangers.make_room(source, now) {
            return None;
        }
        strangers.pay(source, now);
        let (number, told) = (strangers.next, Arc::new(Notify::new()));
        strangers.next += 1;
        strangers.total += 1;
        let stranger = Stranger { number, since: now, told: Arc::clone(&told) };
        strangers.by_source.entry(source).or_default().push_back(stranger);
        drop(strangers);
        Some(Admission { gate: Arc::clone(self), source, number, told })
    }

    /// Whether those that were pushed out have to get their turn before more come: they hold memory
    /// until then.
    pub fn is_crowded(&self) -> bool {
        self.lock().leaving > LEAVING
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Strangers> {
        // The counts change together, with nothing between them that could panic.
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the [`Gate`]'s count; dropped when the connection has proved itself or ended.
#[derive(Debug)]
pub struct Admission {
    gate: Arc<Gate>,
    source: IpAddr,
    number: u64,
    told: Arc<Notify>,
}

impl Admission {
    /// What the connection has cost its source, to be given back when it turns out to be a member's.
    #[must_use]
    pub fn fare(&self) -> Fare {
        Fare { gate: Arc::clone(&self.gate), source: self.source }
    }

    /// Waits until the place is needed for somebody else.
    pub async fn pushed_out(&self) {
        self.told.notified().await;
    }
}

/// What a connection counts for its source.
#[derive(Debug)]
pub struct Fare {
    gate: Arc<Gate>,
    source: IpAddr,
}

impl Fare {
    /// The connection is that of a member.
    pub fn give_back(self, member: PublicKey, now: Instant) {
        self.gate.lock().give_back(self.source, member, now);
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut strangers = self.gate.lock();
        let waiting = strangers.by_source.get_mut(&self.source);
        let gone = waiting.map_or(0, |waiting| {
            let before = waiting.len();
            waiting.retain(|stranger| stranger.number != self.number);
            before - waiting.len()
        });
        strangers.total -= gone;
        strangers.leaving -= usize::from(gone == 0);
        strangers.forget_if_empty(self.source);
    }
}

/// Makes a link of an accepted connection. Nothing that the other side says counts before its
/// first frame has arrived, since the handshake alone could be a replay; but for what the first
/// message of a handshake holds, if `is_new` vouches for it, given the key of who made it. That is
/// handed out beside the link. A first message that its source has in `said` is not answered again.
///
/// # Errors
/// When it is not one of our nodes, or not in time.
pub async fn upgrade(
    stream: TcpStream,
    server_key: &SecretKey,
    said: &Said,
    is_new: impl Fn(PublicKey, &[u8]) -> bool,
) -> Result<(Link, Option<Vec<u8>>), UpgradeError> {
    link::tune(&stream)?;
    let source = stream.peer_addr()?.ip();
    let (stream, early, mut answered) =
        timeout(HANDSHAKE_LIMIT, exchange_with(stream, server_key, (said, source), is_new))
            .await
            .map_err(|_| UpgradeError::TimedOut)??;
    let said = answered.early.take();
    Ok((link::accepted(stream, early, answered)?, said))
}

/// Reads the request for an upgrade and answers it, over any kind of stream. Gives the stream back,
/// with what came right behind the request.
///
/// # Errors
/// When it is no request of one of our nodes.
pub async fn exchange<S>(
    stream: S,
    server_key: &SecretKey,
) -> Result<(S, Vec<u8>, Answered), UpgradeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let nobody = (&Said::default(), Ipv4Addr::UNSPECIFIED.into());
    exchange_with(stream, server_key, nobody, |_, _| false).await
}

async fn exchange_with<S>(
    stream: S,
    server_key: &SecretKey,
    said: (&Said, IpAddr),
    is_new: impl Fn(PublicKey, &[u8]) -> bool,
) -> Result<(S, Vec<u8>, Answered), UpgradeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let outcome = Mutex::new(Err(UpgradeError::NotOurs));
    let service = service_fn(|mut request: Request<Incoming>| {
        let answered = answer(&request, server_key, said, &is_new);
        let response = match &answered {
            Ok(answered) => switching(answered),
            Err(UpgradeError::WrongKey) => misdirected(),
            Err(UpgradeError::SaidBefore) => plain(StatusCode::TOO_EARLY, "said before\n"),
            Err(_) => not_found(),
        };
        let result = answered.map(|answered| (hyper::upgrade::on(&mut request), answered));
        *outcome.lock().unwrap_or_else(PoisonError::into_inner) = result;
        async { Ok::<_, Infallible>(response) }
    });
    hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(HEADER_BYTES)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), &service)
        .with_upgrades()
        .await?;
    let (on_upgrade, answered): (OnUpgrade, Answered) =
        outcome.into_inner().unwrap_or_else(PoisonError::into_inner)?;
    let parts = on_upgrade.await?.downcast::<TokioIo<S>>().map_err(|_| UpgradeError::NotOurs)?;
    Ok((parts.io.into_inner(), parts.read_buf.to_vec(), answered))
}

fn answer(
    request: &Request<Incoming>,
    key: &SecretKey,
    (said, source): (&Said, IpAddr),
    is_new: impl Fn(PublicKey, &[u8]) -> bool,
) -> Result<Answered, UpgradeError> {
    let headers = request.headers();
    let ours = request.method() == Method::GET
        && request.uri().path() == UPGRADE_PATH
        && has_token(headers, &UPGRADE, UPGRADE_PROTOCOL)
        && has_token(headers, &CONNECTION, "upgrade");
    let first = headers.get(HANDSHAKE_HEADER).filter(|_| ours).ok_or(UpgradeError::NotOurs)?;
    let ephemeral = link::ephemeral(first.as_bytes()).ok_or(UpgradeError::WrongKey)?;
    if said.is_known(source, &ephemeral) {
        return Err(UpgradeError::SaidBefore);
    }
    let answered = Responder::answer(first.as_bytes(), key, is_new);
    let answered = answered.map_err(|_| UpgradeError::WrongKey)?;
    // What opens with our key: noise would only push out what was said.
    said.note(source, &ephemeral);
    Ok(answered)
}

/// Whether a header that is a list of words has this word (RFC 9110 section 7.6.1).
fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|word| word.trim().eq_ignore_ascii_case(token))
}

fn switching(answered: &Answered) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, "upgrade".parse().expect("a word is a header value"));
    headers.insert(UPGRADE, UPGRADE_PROTOCOL.parse().expect("a word is a header value"));
    headers.insert(HANDSHAKE_HEADER, answered.text.parse().expect("base64 is a header value"));
    response
}

/// Says "an overlay server, but not with that key": the empty handshake header marks it as ours.
fn misdirected() -> Response<Full<Bytes>> {
    let mut response = plain(StatusCode::MISDIRECTED_REQUEST, "another key\n");
    let empty = "".parse().expect("nothing is a header value");
    response.headers_mut().insert(HANDSHAKE_HEADER, empty);
    response
}

fn not_found() -> Response<Full<Bytes>> {
    plain(StatusCode::NOT_FOUND, "nothing here\n")
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let kind = "text/plain; charset=utf-8".parse().expect("a word is a header value");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::link::Backoff;
    use crate::testing::epoch;

    fn is_pushed_out(admission: &Admission) -> bool {
        let strangers = admission.gate.lock();
        let waiting = strangers.by_source.get(&admission.source);
        !waiting.is_some_and(|all| all.iter().any(|it| it.number == admission.number))
    }

    #[test]
    fn strangers_are_counted_by_source_and_forgotten_when_they_leave() {
        let gate = Arc::new(Gate::default());
        let admit = |ip: &str, now| gate.admit(ip.parse().unwrap(), now);
        let mut inside: Vec<_> = (0..STRANGERS_PER_SOURCE)
            .map(|_| admit("2001:db8:1:2::1", epoch()).expect("a free place"))
            .collect();
        let neighbour = "2001:db8:1:2:ffff::9";
        assert!(admit(neighbour, epoch()).is_none(), "the same /64 is the same source");
        let elsewhere = admit("192.0.2.1", epoch());
        assert!(elsewhere.is_some() && !inside.iter().any(is_pushed_out));
        inside.push(admit(neighbour, epoch() + PROVING).expect("the oldest makes room"));
        let out: Vec<bool> = inside.iter().map(is_pushed_out).collect();
        assert!(out[0] && !out[1..].contains(&true), "the oldest of the same /64: {out:?}");
        inside.clear();
        drop(elsewhere);
        assert!(gate.lock().by_source.is_empty(), "nothing is kept of who has left");
        assert_eq!(gate.lock().total, 0);
    }

    #[test]
    fn who_is_there_most_makes_room_for_the_others() {
        let gate = Arc::new(Gate::default());
        let source = |i: usize| IpAddr::from([10, 0, (i / 32) as u8, 1]);
        let inside: Vec<_> = (0..STRANGERS + 500)
            .filter_map(|i| gate.admit(source(i % STRANGERS), epoch()))
            .collect();
        assert_eq!(inside.len(), STRANGERS + 500);
        assert_eq!(gate.lock().total, STRANGERS);
        let honest = gate.admit("192.0.2.1".parse().unwrap(), epoch()).expect("a place");
        let more: Vec<_> =
            (0..2 * STRANGERS).filter_map(|i| gate.admit(source(i % STRANGERS), epoch())).collect();
        assert!(!is_pushed_out(&honest), "one of one is not pushed out");
        assert_eq!(gate.lock().total, STRANGERS);
        assert!(gate.is_crowded(), "who was pushed out is still there");
        drop((inside, more, honest));
        let left = gate.lock();
        assert_eq!((left.total, left.leaving), (0, 0));
    }

    #[test]
    fn a_source_that_connects_too_often_waits_and_others_do_not() {
        let gate = Arc::new(Gate::default());
        let loud: IpAddr = "192.0.2.1".parse().unwrap();
        let count = |ip: IpAddr, now| (0..5000).filter(|_| gate.admit(ip, now).is_some()).count();
        assert_eq!(count(loud, epoch()), CONNECTIONS.burst() as usize);
        assert_eq!(count(loud, epoch() + Duration::from_millis(15)), 3);
        assert!(gate.admit("192.0.2.2".parse().unwrap(), epoch()).is_some());
        assert_eq!(count("127.0.0.1".parse().unwrap(), epoch()), 5000);
    }

    /// Until `nodes` behind one address are back at a server that has restarted, each with a round
    /// trip of 100 ms between its request and its first message.
    fn return_of(nodes: u16) -> Duration {
        enum Step {
            Ask,
            Prove(Admission),
        }
        let gate = Arc::new(Gate::default());
        let source: IpAddr = "192.0.2.1".parse().unwrap();
        let mut backoffs: Vec<Backoff> = (0..nodes).map(|_| Backoff::default()).collect();
        let mut steps: BTreeMap<(Duration, u16), Step> = BTreeMap::new();
        for (node, backoff) in (0..nodes).zip(&mut backoffs) {
            steps.insert((backoff.next_wait(), node), Step::Ask);
        }
        let mut last = Duration::ZERO;
        while let Some(((at, node), step)) = steps.pop_first() {
            last = at;
            match step {
                Step::Ask => match gate.admit(source, epoch() + at) {
                    Some(place) => {
                        steps.insert((at + Duration::from_millis(100), node), Step::Prove(place));
                    }
                    None => {
                        let wait = backoffs[usize::from(node)].next_wait();
                        steps.insert((at + wait, node), Step::Ask);
                    }
                },
                Step::Prove(place) => {
                    assert!(!is_pushed_out(&place), "an honest one is not pushed out");
                    let mut key = [0; 32];
                    key[..2].copy_from_slice(&node.to_be_bytes());
                    place.fare().give_back(PublicKey(key), epoch() + at);
                }
            }
        }
        last
    }

    #[test]
    fn a_thousand_nodes_behind_one_address_are_back_in_seconds() {
        for (nodes, seconds) in [(64, 1), (1_000, 8), (5_000, 25)] {
            let took = return_of(nodes);
            eprintln!("{nodes} nodes: {took:?}");
            assert!(took < Duration::from_secs(seconds), "{nodes} nodes need {took:?}");
        }
    }

    #[test]
    fn a_member_that_comes_again_and_again_counts_and_strangers_always_do() {
        let gate = Arc::new(Gate::default());
        let loud: IpAddr = "192.0.2.1".parse().unwrap();
        let come = |key: Option<u8>| {
            let place = gate.admit(loud, epoch())?.fare();
            if let Some(key) = key {
                place.give_back(PublicKey([key; 32]), epoch());
            }
            Some(())
        };
        // Each of a hundred members comes ten times, and has one of them back.
        let members = (0..1_000).filter_map(|i| come(Some((i % 100) as u8))).count();
        let strangers = (0..5_000).filter_map(|_| come(None)).count();
        assert_eq!((members, strangers), (1_000, CONNECTIONS.burst() as usize - 900));
    }
}
