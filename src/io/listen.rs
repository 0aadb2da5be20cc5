//! The server's side of the control stream: listen, limit, upgrade.
//!
//! A stranger costs one small task and two Diffie-Hellman operations, and is shown nothing: no
//! banner, no version, no page.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, UPGRADE};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::link::{self, Answered, Link, LinkError, Responder};
use crate::types::{SecretKey, source_of};
use crate::wire::frame::{HANDSHAKE_HEADER, UPGRADE_PATH, UPGRADE_PROTOCOL};

/// From the first byte to the end of the upgrade.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Connections of one source (an IPv4 address or an IPv6 /64) that have not yet proved who they are.
const STRANGERS_PER_SOURCE: usize = 64;
/// Connections of all sources that have not yet proved who they are.
const STRANGERS: usize = 1024;
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

/// Counts the connections that have not yet proved who they are, and refuses too many of them.
#[derive(Debug, Default)]
pub struct Gate {
    strangers: Mutex<Strangers>,
}

#[derive(Debug, Default)]
struct Strangers {
    by_source: BTreeMap<IpAddr, usize>,
    total: usize,
}

impl Gate {
    /// Lets a connection from `remote` in, unless there are too many.
    pub fn admit(self: &Arc<Self>, remote: IpAddr) -> Option<Admission> {
        let source = source_of(remote);
        let mut strangers = self.lock();
        if strangers.total >= STRANGERS {
            return None;
        }
        let count = strangers.by_source.entry(source).or_default();
        if *count >= STRANGERS_PER_SOURCE {
            return None;
        }
        *count += 1;
        strangers.total += 1;
        drop(strangers);
        Some(Admission { gate: Arc::clone(self), source })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Strangers> {
        // The two counts change together, with nothing between them that could panic.
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the [`Gate`]'s count; dropped when the connection has proved itself or ended.
#[derive(Debug)]
pub struct Admission {
    gate: Arc<Gate>,
    source: IpAddr,
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut strangers = self.gate.lock();
        strangers.total = strangers.total.saturating_sub(1);
        if let Some(count) = strangers.by_source.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                strangers.by_source.remove(&self.source);
            }
        }
    }
}

/// Makes a link of an accepted connection. Nothing that the other side says counts before its
/// first frame has arrived: the handshake alone could be a replay.
///
/// # Errors
/// When it is not one of our nodes, or not in time.
pub async fn upgrade(stream: TcpStream, server_key: &SecretKey) -> Result<Link, UpgradeError> {
    link::tune(&stream)?;
    timeout(HANDSHAKE_LIMIT, upgrade_at_leisure(stream, server_key))
        .await
        .map_err(|_| UpgradeError::TimedOut)?
}

async fn upgrade_at_leisure(
    stream: TcpStream,
    server_key: &SecretKey,
) -> Result<Link, UpgradeError> {
    let outcome = Mutex::new(Err(UpgradeError::NotOurs));
    let service = service_fn(|mut request: Request<Incoming>| {
        let answered = answer(&request, server_key);
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
    let (on_upgrade, answered): (OnUpgrade, Answered) =
        outcome.into_inner().unwrap_or_else(PoisonError::into_inner)?;
    let parts =
        on_upgrade.await?.downcast::<TokioIo<TcpStream>>().map_err(|_| UpgradeError::NotOurs)?;
    Ok(link::accepted(parts.io.into_inner(), parts.read_buf.to_vec(), answered)?)
}

fn answer(request: &Request<Incoming>, key: &SecretKey) -> Result<Answered, UpgradeError> {
    let headers = request.headers();
    let ours = request.method() == Method::GET
        && request.uri().path() == UPGRADE_PATH
        && has_token(headers, &UPGRADE, UPGRADE_PROTOCOL)
        && has_token(headers, &CONNECTION, "upgrade");
    let first = headers.get(HANDSHAKE_HEADER).filter(|_| ours).ok_or(UpgradeError::NotOurs)?;
    Responder::answer(first.as_bytes(), key).map_err(|_| UpgradeError::WrongKey)
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

    #[test]
    fn strangers_are_counted_by_source_and_forgotten_when_they_leave() {
        let gate = Arc::new(Gate::default());
        let home: IpAddr = "2001:db8:1:2::1".parse().unwrap();
        let neighbour: IpAddr = "2001:db8:1:2:ffff::9".parse().unwrap();
        let elsewhere: IpAddr = "192.0.2.1".parse().unwrap();
        let mut inside: Vec<_> =
            (0..STRANGERS_PER_SOURCE).map(|_| gate.admit(home).expect("a free place")).collect();
        assert!(gate.admit(neighbour).is_none(), "the same /64 is the same source");
        assert!(gate.admit(elsewhere).is_some());
        inside.pop();
        assert!(gate.admit(neighbour).is_some());
        inside.clear();
        assert!(gate.lock().by_source.is_empty(), "nothing is kept of who has left");
        assert_eq!(gate.lock().total, 0);
    }

    #[test]
    fn all_sources_together_have_a_limit_too() {
        let gate = Arc::new(Gate::default());
        let source = |i: usize| IpAddr::from([10, 0, (i / 32) as u8, 1]);
        let inside: Vec<_> = (0..STRANGERS).filter_map(|i| gate.admit(source(i))).collect();
        assert_eq!(inside.len(), STRANGERS);
        assert!(gate.admit("192.0.2.1".parse().unwrap()).is_none());
    }
}
