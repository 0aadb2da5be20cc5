//! The server's side of the control stream: listen, limit, upgrade.
//!
//! A stranger costs one small task and two Diffie-Hellman operations, and is shown nothing: no
//! banner, no version, no page.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
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
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::link::{self, Answered, Link, LinkError, Responder};
use crate::types::{PublicKey, SecretKey, source_of};
use crate::wire::frame::{HANDSHAKE_HEADER, UPGRADE_PATH, UPGRADE_PROTOCOL};

/// From the first byte to the end of the upgrade.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Connections of one source (an IPv4 address or an IPv6 /64) that have not yet proved who they are.
const STRANGERS_PER_SOURCE: usize = 64;
/// Connections of all sources that have not yet proved who they are.
const STRANGERS: usize = 640;
/// One that came this lately is about to prove itself, and makes no room for others of its source.
const PROVING: Duration = Duration::from_millis(500);
/// A source may open so many connections at once: a large network behind one address comes back.
const CONNECTION_BURST: u32 = 1000;
/// And one more after each of these.
const CONNECTION_INTERVAL: Duration = Duration::from_millis(5);
/// Sources whose pace is known.
const RATED_SOURCES: usize = 4096;
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
    next: u64,
    /// When all connections of a source would have come at the steady pace.
    paid_until: HashMap<IpAddr, Instant>,
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
    fn is_in_time(&mut self, source: IpAddr, now: Instant) -> bool {
        if source.is_loopback() {
            return true;
        }
        if self.paid_until.len() >= RATED_SOURCES && !self.paid_until.contains_key(&source) {
            self.paid_until.retain(|_, at| *at > now);
            if self.paid_until.len() >= RATED_SOURCES {
                self.paid_until.clear();
            }
        }
        let paid_until = self.paid_until.entry(source).or_insert(now);
        let at = (*paid_until).max(now);
        if at > now + CONNECTION_INTERVAL * CONNECTION_BURST {
            return false;
        }
        *paid_until = at + CONNECTION_INTERVAL;
        true
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
        if !strangers.make_room(source, now) {
            return None;
        }
        let (number, told) = (strangers.next, Arc::new(Notify::new()));
        strangers.next += 1;
        strangers.total += 1;
        let stranger = Stranger { number, since: now, told: Arc::clone(&told) };
        strangers.by_source.entry(source).or_default().push_back(stranger);
        drop(strangers);
        Some(Admission { gate: Arc::clone(self), source, number, told })
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
    /// Waits until the place is needed for somebody else.
    pub async fn pushed_out(&self) {
        self.told.notified().await;
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut strangers = self.gate.lock();
        let Some(waiting) = strangers.by_source.get_mut(&self.source) else { return };
        let before = waiting.len();
        waiting.retain(|stranger| stranger.number != self.number);
        let gone = before - waiting.len();
        strangers.total -= gone;
        strangers.forget_if_empty(self.source);
    }
}

/// Makes a link of an accepted connection. Nothing that the other side says counts before its
/// first frame has arrived, since the handshake alone could be a replay; but for what the first
/// message of a handshake holds, if `is_new` vouches for it, given the key of who made it. That is
/// handed out beside the link.
///
/// # Errors
/// When it is not one of our nodes, or not in time.
pub async fn upgrade(
    stream: TcpStream,
    server_key: &SecretKey,
    is_new: impl Fn(PublicKey, &[u8]) -> bool,
) -> Result<(Link, Option<Vec<u8>>), UpgradeError> {
    link::tune(&stream)?;
    timeout(HANDSHAKE_LIMIT, upgrade_at_leisure(stream, server_key, is_new))
        .await
        .map_err(|_| UpgradeError::TimedOut)?
}

async fn upgrade_at_leisure(
    stream: TcpStream,
    server_key: &SecretKey,
    is_new: impl Fn(PublicKey, &[u8]) -> bool,
) -> Result<(Link, Option<Vec<u8>>), UpgradeError> {
    let outcome = Mutex::new(Err(UpgradeError::NotOurs));
    let service = service_fn(|mut request: Request<Incoming>| {
        let answered = answer(&request, server_key, &is_new);
        let response = match &answered {
            Ok(answered) => switching(answered),
            Err(UpgradeError::WrongKey) => misdirected(),
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
    let (on_upgrade, mut answered): (OnUpgrade, Answered) =
        outcome.into_inner().unwrap_or_else(PoisonError::into_inner)?;
    let parts =
        on_upgrade.await?.downcast::<TokioIo<TcpStream>>().map_err(|_| UpgradeError::NotOurs)?;
    let early = answered.early.take();
    Ok((link::accepted(parts.io.into_inner(), parts.read_buf.to_vec(), answered)?, early))
}

fn answer(
    request: &Request<Incoming>,
    key: &SecretKey,
    is_new: impl Fn(PublicKey, &[u8]) -> bool,
) -> Result<Answered, UpgradeError> {
    let headers = request.headers();
    let ours = request.method() == Method::GET
        && request.uri().path() == UPGRADE_PATH
        && has_token(headers, &UPGRADE, UPGRADE_PROTOCOL)
        && has_token(headers, &CONNECTION, "upgrade");
    let first = headers.get(HANDSHAKE_HEADER).filter(|_| ours).ok_or(UpgradeError::NotOurs)?;
    Responder::answer(first.as_bytes(), key, is_new).map_err(|_| UpgradeError::WrongKey)
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
        drop((inside, more, honest));
        assert_eq!(gate.lock().total, 0);
    }

    #[test]
    fn a_source_that_connects_too_often_waits_and_others_do_not() {
        let gate = Arc::new(Gate::default());
        let loud: IpAddr = "192.0.2.1".parse().unwrap();
        let count = |ip: IpAddr, now| (0..5000).filter(|_| gate.admit(ip, now).is_some()).count();
        assert_eq!(count(loud, epoch()), CONNECTION_BURST as usize + 1);
        assert_eq!(count(loud, epoch() + CONNECTION_INTERVAL * 3), 3);
        assert!(gate.admit("192.0.2.2".parse().unwrap(), epoch()).is_some());
        assert_eq!(count("127.0.0.1".parse().unwrap(), epoch()), 5000);
    }
}
