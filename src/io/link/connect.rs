//! The node's side: resolve, connect, upgrade.

use std::error::Error as _;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::header::{CONNECTION, HOST, HeaderValue, UPGRADE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::early::{Offers, token_grace};
use super::noise::{Initiator, Secured};
use super::{Link, tune};
use crate::io::clock;
use crate::types::{PublicKey, SecretKey};
use crate::wire::frame::{Early, HANDSHAKE_HEADER, UPGRADE_PATH, UPGRADE_PROTOCOL};
use crate::wire::join::ServerAddr;

/// A TCP connection that takes longer is of no use to a virtual LAN.
const TCP_LIMIT: Duration = Duration::from_secs(5);
/// The upgrade is one round trip; the rest is for a busy server.
const UPGRADE_LIMIT: Duration = Duration::from_secs(5);
/// Head start of one resolved address over the next (RFC 8305 section 8).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Neither side sends longer segments (in bytes), whatever its own network takes: on the way there may be a narrow
/// link that drops what does not fit without a word, and TCP alone would send the same again for ever.
const LONGEST_SEGMENT: u32 = 1_024;

/// Why there is no link to the server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name of the server could not be looked up.
    #[error("cannot look up \"{host}\": {source}")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// The machine or the port does not answer.
    #[error("cannot connect to {address}: {source}")]
    Unreachable {
        /// The server.
        address: ServerAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// Silence.
    #[error("{address} did not answer within {} s ({waiting_for})", limit.as_secs())]
    TimedOut {
        /// The server.
        address: ServerAddr,
        /// What was waited for.
        waiting_for: &'static str,
        /// For how long.
        limit: Duration,
    },
    /// Something answers, and it is no overlay server.
    #[error("{address} is not an overlay server: {found}")]
    NotOurProtocol {
        /// The server.
        address: ServerAddr,
        /// What answered.
        found: String,
    },
    /// An overlay server, and not the one whose key we hold.
    #[error("the server at {address} does not have the key that the join line names")]
    WrongKey {
        /// The server.
        address: ServerAddr,
    },
    /// The connection ended during the upgrade.
    #[error("{address} closed the connection before it was set up")]
    Closed {
        /// The server.
        address: ServerAddr,
    },
}

/// Connects to the server as the holder of `machine_key`, and checks that the server holds one of
/// `server_keys` (tried in this order).
///
/// # Errors
/// When there is no such server; after ten seconds for each key at the latest.
pub async fn connect(
    server: &ServerAddr,
    server_keys: &[PublicKey],
    machine_key: &SecretKey,
) -> Result<Link, ConnectError> {
    let none = watch::Sender::<Offers>::default().subscribe();
    connect_by(&Way::default(), server, server_keys, machine_key, none).await
}

/// By which way a server is connected to.
#[derive(Debug, Clone, Default)]
pub struct Way {
    /// The only network interface to use; none for what the routes say.
    pub device: Option<String>,
    /// The server's address, where its name need not be looked up: whoever knows names may be behind
    /// another interface.
    pub address: Option<SocketAddr>,
}

/// The same by another way than the routes say, and with a hello in the first message, if there is a
/// token for that in time.
///
/// # Errors
/// As [`connect`].
pub async fn connect_by(
    way: &Way,
    server: &ServerAddr,
    server_keys: &[PublicKey],
    machine_key: &SecretKey,
    mut offers: watch::Receiver<Offers>,
) -> Result<Link, ConnectError> {
    for server_key in server_keys {
        let start = clock::now();
        let stream = match timeout(TCP_LIMIT, connect_tcp(way, server)).await {
            Ok(stream) => stream?,
            Err(_) => return Err(timed_out(server, "TCP connection", TCP_LIMIT)),
        };
        let grace = token_grace(clock::now().saturating_duration_since(start));
        let early = match stream.peer_addr() {
            // In time or never: the answer took as long as the connection.
            Ok(remote) => timeout(grace, Offers::early(&mut offers, remote.ip())).await.ok(),
            Err(_) => None,
        };
        let early = early.flatten().unwrap_or_default();
        match connect_early(stream, server, server_key, machine_key, &early).await {
            Err(ConnectError::WrongKey { .. }) => {}
            result => return result,
        }
    }
    Err(ConnectError::WrongKey { address: server.clone() })
}

/// The same over a TCP connection that is there already, and with one key.
///
/// # Errors
/// When the other end is no such server; after five seconds at the latest.
pub async fn connect_over(
    stream: TcpStream,
    server: &ServerAddr,
    server_key: &PublicKey,
    machine_key: &SecretKey,
) -> Result<Link, ConnectError> {
    connect_early(stream, server, server_key, machine_key, &[]).await
}

/// The same with this in the first message, which the server may act on (see
/// [`crate::wire::frame::Early`]).
///
/// # Errors
/// As [`connect_over`].
pub async fn connect_early(
    stream: TcpStream,
    server: &ServerAddr,
    server_key: &PublicKey,
    machine_key: &SecretKey,
    early: &[u8],
) -> Result<Link, ConnectError> {
    let (stream, behind, secured, taken) =
        timeout(UPGRADE_LIMIT, exchange_with(stream, server, server_key, machine_key, early))
            .await
            .unwrap_or_else(|_| Err(timed_out(server, "answer to the upgrade", UPGRADE_LIMIT)))?;
    let mut link = Link::start(stream, behind, secured)
        .map_err(|source| ConnectError::Unreachable { address: server.clone(), source })?;
    link.said = Early::parse(early).filter(|_| taken).map(|early| early.hello.to_vec());
    Ok(link)
}

fn timed_out(server: &ServerAddr, waiting_for: &'static str, limit: Duration) -> ConnectError {
    ConnectError::TimedOut { address: server.clone(), waiting_for, limit }
}

async fn connect_tcp(way: &Way, server: &ServerAddr) -> Result<TcpStream, ConnectError> {
    let resolve = |source| ConnectError::Resolve { host: server.host.clone(), source };
    let addrs: Vec<SocketAddr> = match server.literal().or(way.address) {
        Some(addr) => vec![addr],
        None => tokio::net::lookup_host((server.host.as_str(), server.port))
            .await
            .map_err(resolve)?
            .collect(),
    };
    let mut attempts = JoinSet::new();
    for (addr, number) in interleaved(addrs).into_iter().zip(0u32..) {
        let device = way.device.clone();
        attempts.spawn(async move {
            sleep(ATTEMPT_DELAY * number).await;
            let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            if let Some(device) = device {
                socket.bind_device(Some(device.as_bytes()))?;
            }
            setsockopt(&socket, sockopt::TcpMaxSeg, &LONGEST_SEGMENT)?;
            let stream = socket.connect(addr).await?;
            tune(&stream)?;
            Ok(stream)
        });
    }
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => failure = error,
            Err(error) => failure = error.into(),
        }
    }
    Err(ConnectError::Unreachable { address: server.clone(), source: failure })
}

/// The addresses in the resolver's order, with the families taking turns (RFC 8305 section 4).
fn interleaved(addrs: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let Some(first) = addrs.first().map(SocketAddr::is_ipv6) else {
        return addrs;
    };
    let count = addrs.len();
    let (ours, others): (Vec<_>, Vec<_>) =
        addrs.into_iter().partition(|addr| addr.is_ipv6() == first);
    let (mut ours, mut others) = (ours.into_iter(), others.into_iter());
    let mut order = Vec::with_capacity(count);
    while order.len() < count {
        order.extend(ours.next());
        order.extend(others.next());
    }
    order
}

/// Asks for the upgrade and reads the answer, over any kind of stream. Gives the stream back, with
/// what came right behind the answer.
///
/// # Errors
/// When the other end is no such server.
pub async fn exchange<S>(
    stream: S,
    server: &ServerAddr,
    server_key: &PublicKey,
    machine_key: &SecretKey,
) -> Result<(S, Vec<u8>, Secured), ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (stream, behind, secured, _) =
        exchange_with(stream, server, server_key, machine_key, &[]).await?;
    Ok((stream, behind, secured))
}

/// The same with this in the first message; tells whether it counts.
async fn exchange_with<S>(
    stream: S,
    server: &ServerAddr,
    server_key: &PublicKey,
    machine_key: &SecretKey,
    early: &[u8],
) -> Result<(S, Vec<u8>, Secured, bool), ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let wrong_key = |_| ConnectError::WrongKey { address: server.clone() };
    let (handshake, first) = Initiator::start(server_key, machine_key, early).map_err(wrong_key)?;
    let (stream, behind, answer) = ask(stream, server, &first).await?;
    let (secured, taken) = handshake.finish(answer.as_bytes()).map_err(wrong_key)?;
    Ok((stream, behind, secured, taken))
}

/// The part of it that is HTTP: asks for the upgrade with this handshake message. Gives the stream
/// back, what came right behind the answer, and the handshake message in it, which is not read.
///
/// # Errors
/// When the other end does not answer as such a server would.
pub async fn ask<S>(
    stream: S,
    server: &ServerAddr,
    first: &str,
) -> Result<(S, Vec<u8>, HeaderValue), ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let closed = || ConnectError::Closed { address: server.clone() };
    let (mut requests, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| http_error(server, &error))?;
    let exchange = async {
        let response = requests
            .send_request(request(server, first))
            .await
            .map_err(|error| http_error(server, &error))?;
        let answer = check(server, &response)?;
        let upgraded = hyper::upgrade::on(response).await.map_err(|_| closed())?;
        Ok((answer, upgraded))
    };
    // The connection carries the exchange: it has to be polled until the exchange is through.
    let (answer, upgraded) = match tokio::join!(connection.with_upgrades(), exchange) {
        // The exchange only saw an end; the connection knows why.
        (Err(error), Err(ConnectError::Closed { .. })) => return Err(http_error(server, &error)),
        (_, outcome) => outcome?,
    };
    let parts = upgraded.downcast::<TokioIo<S>>().map_err(|_| closed())?;
    Ok((parts.io.into_inner(), parts.read_buf.to_vec(), answer))
}

fn request(server: &ServerAddr, first: &str) -> Request<Empty<Bytes>> {
    Request::get(UPGRADE_PATH)
        .header(HOST, server.to_string())
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, UPGRADE_PROTOCOL)
        .header(HANDSHAKE_HEADER, first)
        .body(Empty::new())
        .expect("a checked host name and base64 make valid headers")
}

/// The server's handshake message, when `response` is the one that we hope for.
fn check<B>(server: &ServerAddr, response: &Response<B>) -> Result<HeaderValue, ConnectError> {
    let not_ours = |found: String| ConnectError::NotOurProtocol { address: server.clone(), found };
    match response.status() {
        StatusCode::SWITCHING_PROTOCOLS => response
            .headers()
            .get(HANDSHAKE_HEADER)
            .cloned()
            .ok_or_else(|| not_ours("it changed to another protocol".into())),
        StatusCode::MISDIRECTED_REQUEST if response.headers().contains_key(HANDSHAKE_HEADER) => {
            Err(ConnectError::WrongKey { address: server.clone() })
        }
        status => Err(not_ours(format!("it answered HTTP {status}"))),
    }
}

fn http_error(server: &ServerAddr, error: &hyper::Error) -> ConnectError {
    let failed = error.source().is_some_and(|source| source.is::<io::Error>());
    if failed || error.is_incomplete_message() || error.is_canceled() || error.is_closed() {
        ConnectError::Closed { address: server.clone() }
    } else {
        let found = "what it sent is not HTTP".into();
        ConnectError::NotOurProtocol { address: server.clone(), found }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_families_take_turns_in_the_resolvers_order() {
        let parse = |texts: &[&str]| -> Vec<SocketAddr> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        let resolved = parse(&["[2001:db8::1]:1", "[2001:db8::2]:1", "192.0.2.1:1"]);
        let order = parse(&["[2001:db8::1]:1", "192.0.2.1:1", "[2001:db8::2]:1"]);
        assert_eq!(interleaved(resolved), order);
        assert_eq!(interleaved(Vec::new()), Vec::new());
    }
}
