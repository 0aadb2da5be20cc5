//! Metrics for Prometheus: one page over HTTP, on an address that only this machine reaches.
//!
//! A web page in a browser of this machine could ask, too, under a name that it lets point here
//! (DNS rebinding); so only names of this machine are answered. What is asked for at once, for how
//! long and in how many bytes is limited: a client that does it wrong costs nothing.

mod text;

pub use text::{Durations, Page};

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use hyper::http::uri::Authority;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Deserializer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use super::listen;

/// Where the page is.
const PATH: &str = "/metrics";
/// Of the text format, version 0.0.4.
const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Clients at once; more are hung up on.
const MAX_CONNECTIONS: usize = 8;
/// From the first byte of a client to its last.
const LIMIT: Duration = Duration::from_secs(5);
/// The least that the HTTP library takes; a scraper needs some hundred bytes.
const HEADER_BYTES: usize = 8 * 1024;
/// Headers in a request.
const MAX_HEADERS: usize = 32;
/// After an error like "too many open files", until the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An address and port that only this machine reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopbackAddr(SocketAddr);

/// Not such an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadLoopback {
    /// No address with a port.
    #[error("not an address with a port, like 127.0.0.1:9586")]
    Unreadable,
    /// Others could reach it.
    #[error(
        "{0} is not an address of this machine alone, like 127.0.0.1:9586; to read metrics from \
         elsewhere put a proxy or a tunnel before it"
    )]
    Reachable(SocketAddr),
}

impl FromStr for LoopbackAddr {
    type Err = BadLoopback;

    fn from_str(text: &str) -> Result<Self, BadLoopback> {
        let address: SocketAddr = text.parse().map_err(|_| BadLoopback::Unreadable)?;
        if address.ip().is_loopback() {
            Ok(Self(address))
        } else {
            Err(BadLoopback::Reachable(address))
        }
    }
}

impl fmt::Display for LoopbackAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for LoopbackAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Serves the page until this is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    address: SocketAddr,
    task: AbortHandle,
}

impl MetricsServer {
    /// Listens at `at`. Each question is answered by what `report` gives; by an error when that is
    /// nothing, or takes too long.
    ///
    /// # Errors
    /// When the kernel does not let us listen there.
    pub fn start<F, R>(at: LoopbackAddr, report: F) -> io::Result<Self>
    where
        F: Fn() -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Option<Page>> + Send + 'static,
    {
        let listener = listen::bind(at.0)?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(accept(listener, report)).abort_handle();
        tracing::info!(%address, "metrics can be read at {PATH}");
        Ok(Self { address, task })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept<F, R>(listener: TcpListener, report: F)
where
    F: Fn() -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Option<Page>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Aborts the connections when this task is aborted.
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept those who ask for metrics");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let report = report.clone();
        connections.spawn(async move {
            match timeout(LIMIT, serve(stream, report)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "metrics"),
                Err(_) => tracing::debug!("who asked for metrics was too slow"),
            }
            drop(place);
        });
    }
}

/// Answers one question for the page, over any kind of stream.
///
/// # Errors
/// When what comes is no HTTP, or the stream fails.
pub async fn serve<S, F, R>(stream: S, report: F) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Fn() -> R + Send + Sync,
    R: Future<Output = Option<Page>> + Send,
{
    let service = service_fn(|request: Request<Incoming>| {
        let refused = refusal(&request);
        let report = refused.is_none().then(&report);
        async {
            let page = match report {
                Some(report) => report.await,
                None => None,
            };
            Ok::<_, Infallible>(match (refused, page) {
                (Some(refused), _) => refused,
                (None, Some(page)) => plain(StatusCode::OK, FORMAT, page.into_text()),
                (None, None) => {
                    let busy = "the daemon does not answer\n".into();
                    plain(StatusCode::SERVICE_UNAVAILABLE, WORDS, busy)
                }
            })
        }
    });
    hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(HEADER_BYTES)
        .max_headers(MAX_HEADERS)
        .timer(TokioTimer::new())
        .header_read_timeout(LIMIT)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

/// What is said to a request that is not for the page.
fn refusal(request: &Request<Incoming>) -> Option<Response<Full<Bytes>>> {
    let say = |status, text: &str| Some(plain(status, WORDS, text.into()));
    if !names_this_machine(request.headers()) {
        return say(StatusCode::MISDIRECTED_REQUEST, "ask for 127.0.0.1, [::1] or localhost\n");
    }
    if request.uri().path() != PATH {
        return say(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    if request.method() != Method::GET {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, WORDS, "only GET\n".into());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
        return Some(response);
    }
    None
}

/// Whether the one `Host` header is a name that nobody else can let point here.
fn names_this_machine(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    let host: Option<Authority> = host.to_str().ok().and_then(|host| host.parse().ok());
    host.is_some_and(|host| {
        let name = host.host().trim_start_matches('[').trim_end_matches(']');
        name.eq_ignore_ascii_case("localhost")
            || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
    })
}

/// What is not the page.
const WORDS: &str = "text/plain; charset=utf-8";

fn plain(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    fn start() -> MetricsServer {
        let report = || async {
            let mut page = Page::default();
            page.gauge("up", "Whether it is.").value(&[], 1);
            Some(page)
        };
        MetricsServer::start("127.0.0.1:0".parse().unwrap(), report).unwrap()
    }

    async fn say(server: &MetricsServer, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        // It may hang up on us while we talk.
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn get(server: &MetricsServer, path: &str, host: &str) -> String {
        say(server, format!("GET {path} HTTP/1.1\r\n{host}\r\n").as_bytes()).await
    }

    #[test]
    fn only_an_address_of_this_machine_alone_will_do() {
        for good in ["127.0.0.1:9586", "127.1.2.3:1", "[::1]:9586"] {
            assert_eq!(good.parse::<LoopbackAddr>().unwrap().to_string(), good);
        }
        for bad in ["0.0.0.0:9586", "[::]:9586", "192.0.2.1:9586", "[::ffff:127.0.0.1]:9586"] {
            assert!(matches!(bad.parse::<LoopbackAddr>(), Err(BadLoopback::Reachable(_))), "{bad}");
        }
        for bad in ["localhost:9586", "127.0.0.1", "9586", ""] {
            assert_eq!(bad.parse::<LoopbackAddr>(), Err(BadLoopback::Unreadable), "{bad}");
        }
    }

    #[tokio::test]
    async fn the_page_is_given_to_those_who_ask_for_it_by_a_name_of_this_machine() {
        let server = start();
        for host in ["127.0.0.1", "127.0.0.1:9586", "LOCALHOST:1", "[::1]:9586"] {
            let answer = get(&server, "/metrics", &format!("Host: {host}\r\n")).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{host}: {answer}");
            assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
            assert!(answer.ends_with("\r\n\r\n# HELP up Whether it is.\n# TYPE up gauge\nup 1\n"));
        }
        let rebound =
            ["Host: evil.example\r\n", "Host: 127.0.0.1.evil.example\r\n", "", "Host:\r\n"];
        for host in rebound.into_iter().chain(["Host: localhost\r\nHost: evil.example\r\n"]) {
            let answer = get(&server, "/metrics", host).await;
            assert!(answer.starts_with("HTTP/1.1 421 "), "{host}: {answer}");
        }
        assert!(get(&server, "/", "Host: localhost\r\n").await.starts_with("HTTP/1.1 404 "));
        let post = b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
        let answer = say(&server, post).await;
        assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("allow: GET"), "{answer}");
    }

    #[tokio::test]
    async fn garbage_does_no_harm() {
        let server = start();
        let mut long = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: ".to_vec();
        long.resize(3 * HEADER_BYTES, b'x');
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1));
        for garbage in [&b"\x16\x03\x01\x02\x00\x01"[..], b"\r\n\r\n\r\nno", &long, many.as_bytes()]
        {
            let mut stream = TcpStream::connect(server.address()).await.unwrap();
            let _ = stream.write_all(garbage).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        }
        // Those who hold their places and say nothing are let go of.
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            silent.push(TcpStream::connect(server.address()).await.unwrap());
        }
        sleep(Duration::from_millis(100)).await;
        assert_eq!(get(&server, "/metrics", "Host: localhost\r\n").await, "", "there is no place");
        let mut byte = [0];
        let hung_up = timeout(LIMIT * 2, silent[0].read(&mut byte)).await.unwrap();
        assert!(matches!(hung_up, Ok(0) | Err(_)));
        sleep(Duration::from_millis(500)).await;
        assert!(get(&server, "/metrics", "Host: localhost\r\n").await.ends_with("up 1\n"));
    }

    #[tokio::test]
    async fn a_daemon_that_says_nothing_is_told_and_the_listener_goes_with_the_server() {
        let report = || async { None };
        let server = MetricsServer::start("127.0.0.1:0".parse().unwrap(), report).unwrap();
        let answer = get(&server, "/metrics", "Host: localhost\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        let address = server.address();
        drop(server);
        tokio::task::yield_now().await;
        sleep(Duration::from_millis(50)).await;
        assert!(TcpStream::connect(address).await.is_err());
    }
}
