//! The control stream: framed, encrypted messages between a node and the server over TCP.
//!
//! [`connect`] is the node's side, [`super::listen`] the server's; behind the handshake both are a
//! [`Link`]. A link carries control messages and, for nodes without UDP, relay datagrams. It knows
//! nothing of what the messages mean, and it never reconnects: that is its owner's decision.

mod backoff;
mod connect;
mod early;
mod noise;
mod outbox;
mod relay_batch;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::task::JoinHandle;

pub use backoff::Backoff;
pub use connect::{
    ConnectError, Way, ask, connect, connect_by, connect_early, connect_over, exchange,
};
pub use early::{Offers, token_grace};
pub use noise::{Answered, Secured};
pub(crate) use noise::{Responder, ephemeral};
pub use outbox::LinkSender;
pub use relay_batch::RelayBatch;

use crate::types::PublicKey;
use crate::wire::control::TICK_INTERVAL_S;
use crate::wire::frame::{Assembler, Frame, FrameError, LENGTH_LEN, MAC_LEN};
use noise::Opener;
use outbox::Outbox;

/// Data that nobody acknowledges for this long is the end of a connection: the kernel's own limit
/// is a quarter of an hour.
pub const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);
/// The server keeps a connection to a machine that has gone away or sleeps for this long: it sends a
/// tick, and TCP gives up on it.
pub const GIVEN_UP_AFTER: Duration =
    Duration::from_secs(TICK_INTERVAL_S).saturating_add(TCP_USER_TIMEOUT);
/// How long the end of a connection may take: the last messages out, the peer's end in.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// Room for one read; a link at rest keeps no more than this.
const READ_BYTES: usize = 16 * 1024;
/// Room for one read while more comes than that.
const BUSY_READ_BYTES: usize = 128 * 1024;
/// Relay datagrams that are handed over together, in bytes: two full trains.
const RELAYED_BYTES: usize = 128 * 1024;

/// An encrypted connection whose other end holds the secret half of [`Link::peer_key`].
#[derive(Debug)]
pub struct Link {
    /// Puts messages into the link's bounded queues.
    pub sender: LinkSender,
    /// Yields what arrives; dropping it ends the connection.
    pub receiver: LinkReceiver,
    /// Our address.
    pub local: SocketAddr,
    /// Their address.
    pub remote: SocketAddr,
    /// Who is there: for a node the server's static key, for the server the node's machine key.
    pub peer_key: PublicKey,
    /// The message of ours that the server has had with the handshake, and acts on.
    pub said: Option<Vec<u8>>,
}

/// What arrives on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inbound {
    /// A whole control message (see [`crate::wire::control`]).
    Control(Vec<u8>),
    /// A relay datagram, as it would be on UDP.
    Relay(Vec<u8>),
}

/// Why a link is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// One of the two ends closed it.
    #[error("the connection was closed")]
    Closed,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The kernel would not take our data for too long.
    #[error("the other side takes no data")]
    WriteTimedOut,
    /// A frame that does not decrypt: forged or damaged on the way.
    #[error("a frame of the connection was forged or damaged")]
    Forged,
    /// A frame that makes no sense.
    #[error("a frame of the connection is malformed: {0}")]
    Frame(#[from] FrameError),
    /// More control messages wait than a healthy connection ever has.
    #[error("too many control messages wait to be sent")]
    QueueFull,
}

impl Link {
    /// A link over `stream`, after the handshake; `early` are bytes that came right behind it.
    fn start(stream: TcpStream, early: Vec<u8>, secured: Secured) -> io::Result<Self> {
        let local = canonical(stream.local_addr()?);
        let remote = canonical(stream.peer_addr()?);
        let (read, write) = stream.into_split();
        let (sealer, opener) = secured.split();
        let outbox = Arc::new(Outbox::default());
        let writer = tokio::spawn(outbox::write_all(Arc::clone(&outbox), write, sealer));
        let receiver = LinkReceiver {
            stream: read,
            buffer: early,
            start: 0,
            opener,
            assembler: Assembler::default(),
            outbox: Arc::clone(&outbox),
            writer: Some(writer),
            ended: false,
            failed: None,
            stashed: None,
            filled: false,
        };
        let sender = LinkSender::new(outbox);
        let peer_key = secured.peer_key;
        Ok(Self { sender, receiver, local, remote, peer_key, said: None })
    }
}

/// The receiving half, and the owner of the connection.
#[derive(Debug)]
pub struct LinkReceiver {
    stream: OwnedReadHalf,
    buffer: Vec<u8>,
    /// Where in `buffer` the next frame starts.
    start: usize,
    opener: Opener,
    assembler: Assembler,
    outbox: Arc<Outbox>,
    /// Until it has ended.
    writer: Option<JoinHandle<Result<(), LinkError>>>,
    ended: bool,
    /// Why nothing comes behind what is in the buffer.
    failed: Option<LinkError>,
    /// What came behind relay datagrams that were taken together.
    stashed: Option<Result<Inbound, LinkError>>,
    /// The last read has brought as much as there was room for.
    filled: bool,
}

/// What a frame was.
enum Taken {
    /// A message, or a relay datagram by itself.
    Inbound(Inbound),
    /// A relay datagram that was added to others.
    Joined,
}

impl LinkReceiver {
    /// The next message. Cancel-safe: a dropped future loses nothing.
    ///
    /// # Errors
    /// When the link has ended, also because of its sending half; every later call says `Closed`.
    pub async fn next(&mut self) -> Result<Inbound, LinkError> {
        if self.ended {
            return Err(LinkError::Closed);
        }
        let result = self.next_unless_ended().await;
        if result.is_err() {
            self.ended = true;
            self.outbox.close();
        }
        result
    }

    async fn next_unless_ended(&mut self) -> Result<Inbound, LinkError> {
        loop {
            // Also what has come already is nothing to who has hung up.
            if self.outbox.is_hung_up() {
                return Err(LinkError::Closed);
            }
            if let Some(stashed) = self.stashed.take() {
                return stashed;
            }
            if let Some(inbound) = self.take_frame()? {
                return Ok(inbound);
            }
            if let Some(failed) = self.failed.take() {
                return Err(failed);
            }
            let Some(writer) = &mut self.writer else { return Err(LinkError::Closed) };
            self.buffer.reserve(if self.filled { BUSY_READ_BYTES } else { READ_BYTES });
            let room = self.buffer.capacity() - self.buffer.len();
            tokio::select! {
                biased;
                outcome = writer => {
                    self.writer = None;
                    let error = match outcome {
                        Ok(Err(error)) => error,
                        Ok(Ok(())) | Err(_) => LinkError::Closed,
                    };
                    if matches!(error, LinkError::Io(_)) {
                        // The other side may have said why, before it closed.
                        let _ = self.stream.try_read_buf(&mut self.buffer);
                    }
                    self.failed = Some(error);
                }
                read = self.stream.read_buf(&mut self.buffer) => {
                    let read = read?;
                    if read == 0 {
                        return Err(LinkError::Closed);
                    }
                    self.filled = read == room;
                }
            }
        }
    }

    /// Adds the relay datagrams that are here already, up to some limit, to those of which
    /// [`Self::next`] has given the first. Reads nothing from the socket.
    pub fn more_relayed(&mut self, batch: &mut RelayBatch) {
        while self.stashed.is_none() && batch.len() < RELAYED_BYTES {
            let taken = self.take_frame_into(Some(batch));
            match taken {
                Ok(Some(Taken::Joined)) => {}
                Ok(Some(Taken::Inbound(inbound))) => self.stashed = Some(Ok(inbound)),
                Ok(None) => return,
                Err(error) => self.stashed = Some(Err(error)),
            }
        }
    }

    /// Takes no messages of more bytes than this from now on; called before the first one.
    pub fn limit_messages(&mut self, bytes: usize) {
        self.assembler = Assembler::with_limit(bytes);
    }

    fn take_frame(&mut self) -> Result<Option<Inbound>, LinkError> {
        Ok(self.take_frame_into(None)?.and_then(|taken| match taken {
            Taken::Inbound(inbound) => Some(inbound),
            Taken::Joined => None,
        }))
    }

    /// Takes whole frames out of the buffer until one completes a message. A relay datagram goes to
    /// `batch`, if there is one.
    fn take_frame_into(
        &mut self,
        mut batch: Option<&mut RelayBatch>,
    ) -> Result<Option<Taken>, LinkError> {
        loop {
            let waiting = self.buffer.get(self.start..).unwrap_or_default();
            let Some((length, rest)) = waiting.split_first_chunk::<LENGTH_LEN>() else {
                break;
            };
            let length = usize::from(u16::from_be_bytes(*length));
            if length <= MAC_LEN {
                return Err(FrameError::Empty.into());
            }
            let Some(sealed) = rest.get(..length) else {
                break;
            };
            let plain = self.opener.open(sealed)?;
            self.start += LENGTH_LEN + length;
            let whole = match Frame::parse(plain)? {
                Some(Frame::ControlLast(body)) => {
                    self.assembler.push(body, true)?.map(Inbound::Control)
                }
                Some(Frame::ControlMore(body)) => {
                    self.assembler.push(body, false)?.map(Inbound::Control)
                }
                Some(Frame::Relay(body)) => match batch.as_deref_mut() {
                    Some(batch) => {
                        batch.push(body);
                        return Ok(Some(Taken::Joined));
                    }
                    None => Some(Inbound::Relay(body.to_vec())),
                },
                None => None,
            };
            if let Some(whole) = whole {
                return Ok(Some(Taken::Inbound(whole)));
            }
        }
        self.buffer.drain(..self.start);
        self.start = 0;
        if self.buffer.is_empty() && !self.filled && self.buffer.capacity() > 2 * READ_BYTES {
            self.buffer = Vec::new();
        }
        Ok(None)
    }

    /// Ends the connection in good order: what is queued goes out first, within two seconds.
    pub async fn close(mut self) {
        self.outbox.close();
        let end = async {
            if let Some(writer) = &mut self.writer {
                // The outcome does not matter: the connection ends in any case.
                let _ = writer.await;
            }
            // To close a socket with unread input resets it, and the reset may overtake our last
            // message; so what still comes is read away until the other side has closed too.
            let mut scratch = [0; 4096];
            while matches!(self.stream.read(&mut scratch).await, Ok(1..)) {}
        };
        // At the limit the drop below cuts the connection.
        let _ = tokio::time::timeout(CLOSE_LIMIT, end).await;
    }
}

impl Drop for LinkReceiver {
    fn drop(&mut self) {
        self.outbox.close();
        if let Some(writer) = &self.writer {
            writer.abort();
        }
    }
}

/// The settings of every control connection: small messages at once, death noticed in seconds.
pub(crate) fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_user_timeout(Some(TCP_USER_TIMEOUT))
}

/// IPv4 addresses of dual-stack sockets, written as IPv4.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// The link of the server's side, once the upgrade is through.
pub(crate) fn accepted(
    stream: TcpStream,
    early: Vec<u8>,
    answered: Answered,
) -> Result<Link, LinkError> {
    Ok(Link::start(stream, early, answered.secured)?)
}

#[cfg(test)]
mod tests;
