//! The sending half of a link: two bounded queues and the task that empties them.
//!
//! Control goes before relay, so a flood of data cannot delay a decision. A full control queue is
//! an error, since the other side would miss a change for ever; a full relay queue loses its oldest
//! datagram, as any router does.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::Notify;

use super::LinkError;
use super::noise::Sealer;
use crate::types::DropReason;
use crate::wire::frame::{Frame, MAX_BODY, MAX_MESSAGE, split_control};

/// Relay datagrams that may wait; more would only be delay.
const RELAY_QUEUE_DATAGRAMS: usize = 256;
/// Bytes of them that may wait: what a relay keeps for a node whose way by UDP is full
/// (`server::relay::queue`). All of the datagrams above, at the length of an Ethernet frame, are less.
const RELAY_QUEUE_BYTES: usize = 512 << 10;
/// Relay datagrams that are taken out of the queue at once, if they are no more bytes than one write: a
/// control message waits for no more.
const TAKEN_TOGETHER: usize = 32;
/// Control messages that may wait: a burst of changes in a network of thousands.
const CONTROL_QUEUE_MESSAGES: usize = 4096;
/// Bytes of control messages that may wait: two of the largest.
const CONTROL_QUEUE_BYTES: usize = 2 * MAX_MESSAGE;
/// Bytes that are sealed before they are written: one system call for many frames.
const WRITE_BYTES: usize = 64 * 1024;
/// A peer that takes no data for this long is gone.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Puts messages into a link's queues; never waits. Clones share the queues.
#[derive(Debug, Clone)]
pub struct LinkSender(Arc<Outbox>);

impl LinkSender {
    pub(super) fn new(outbox: Arc<Outbox>) -> Self {
        Self(outbox)
    }

    /// Queues a control message.
    ///
    /// # Errors
    /// When the link has ended, or so much waits already that it should.
    pub fn try_send_control(&self, message: Vec<u8>) -> Result<(), LinkError> {
        let mut queues = self.0.lock();
        if queues.closed {
            return Err(LinkError::Closed);
        }
        let bytes = queues.control_bytes + message.len();
        if message.len() > MAX_MESSAGE
            || bytes > CONTROL_QUEUE_BYTES
            || queues.control.len() >= CONTROL_QUEUE_MESSAGES
        {
            return Err(LinkError::QueueFull);
        }
        queues.control_bytes = bytes;
        queues.control.push_back(message);
        drop(queues);
        self.0.changed.notify_one();
        Ok(())
    }

    /// Queues a relay datagram; when the queue is full, the oldest makes room.
    ///
    /// # Errors
    /// The reason for which a datagram died, to be counted by the caller: this one, or with
    /// [`DropReason::QueueFull`] the oldest in the queue.
    pub fn try_send_relay(&self, datagram: &[u8]) -> Result<(), DropReason> {
        self.try_send_train(datagram, datagram.len()).map_err(|(reason, _)| reason)
    }

    /// Queues relay datagrams of `segment` bytes each (the last may be shorter) at once, so that
    /// they leave in one write; when the queue is full, the oldest make room.
    ///
    /// # Errors
    /// Why datagrams died and how many, to be counted by the caller: all of these, or with
    /// [`DropReason::QueueFull`] the oldest in the queue.
    pub fn try_send_train(
        &self,
        datagrams: &[u8],
        segment: usize,
    ) -> Result<(), (DropReason, usize)> {
        let segment = segment.max(1);
        let count = datagrams.len().div_ceil(segment);
        if segment.min(datagrams.len()) > MAX_BODY {
            return Err((DropReason::TooLarge, count));
        }
        let mut queues = self.0.lock();
        if queues.closed {
            return Err((DropReason::NoPath, count));
        }
        queues.relay.extend(datagrams.chunks(segment).map(<[u8]>::to_vec));
        queues.relay_bytes += datagrams.len();
        let mut lost = 0;
        while (queues.relay.len() > RELAY_QUEUE_DATAGRAMS || queues.relay_bytes > RELAY_QUEUE_BYTES)
            && queues.pop_relay().is_some()
        {
            lost += 1;
        }
        drop(queues);
        self.0.changed.notify_one();
        if lost > 0 { Err((DropReason::QueueFull, lost)) } else { Ok(()) }
    }

    /// Messages and datagrams that wait to be written.
    #[must_use]
    pub fn waiting(&self) -> usize {
        let queues = self.0.lock();
        queues.control.len() + queues.relay.len()
    }

    /// Takes no more messages, and receives none; when the queued ones are sent, the link ends.
    pub fn close(&self) {
        self.0.hung_up.store(true, Ordering::Relaxed);
        self.0.close();
    }

    /// Ends the link without sending what is queued: the other side does not keep up.
    pub fn abort(&self) {
        self.0.hung_up.store(true, Ordering::Relaxed);
        let mut queues = self.0.lock();
        *queues = Queues { closed: true, ..Queues::default() };
        drop(queues);
        self.0.changed.notify_one();
    }
}

#[derive(Debug, Default)]
pub(super) struct Outbox {
    queues: Mutex<Queues>,
    changed: Notify,
    hung_up: AtomicBool,
}

#[derive(Debug, Default)]
struct Queues {
    control: VecDeque<Vec<u8>>,
    control_bytes: usize,
    relay: VecDeque<Vec<u8>>,
    relay_bytes: usize,
    closed: bool,
}

impl Queues {
    fn pop_relay(&mut self) -> Option<Vec<u8>> {
        let datagram = self.relay.pop_front()?;
        self.relay_bytes -= datagram.len();
        Some(datagram)
    }
}

enum Queued {
    Control(Vec<u8>),
    Relay(Vec<Vec<u8>>),
}

impl Outbox {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queues> {
        // The queues are whole between any two statements, also after a panic elsewhere.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// Whether the link was ended by who has its sending half. A socket that has failed is something
    /// else: the other side may have said why.
    pub(super) fn is_hung_up(&self) -> bool {
        self.hung_up.load(Ordering::Relaxed)
    }

    /// The next message in order of importance, or what to do without one.
    fn pop(&self) -> Next {
        let mut queues = self.lock();
        if let Some(message) = queues.control.pop_front() {
            queues.control_bytes -= message.len();
            return Next::Send(Queued::Control(message));
        }
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while taken.len() < TAKEN_TOGETHER && bytes < WRITE_BYTES {
            let Some(datagram) = queues.pop_relay() else { break };
            bytes += datagram.len();
            taken.push(datagram);
        }
        if !taken.is_empty() {
            return Next::Send(Queued::Relay(taken));
        }
        if queues.closed { Next::End } else { Next::Wait }
    }
}

enum Next {
    Send(Queued),
    Wait,
    End,
}

/// Empties the queues into the socket until they are closed or the socket fails.
pub(super) async fn write_all(
    outbox: Arc<Outbox>,
    mut socket: OwnedWriteHalf,
    mut sealer: Sealer,
) -> Result<(), LinkError> {
    let result = write_until_closed(&outbox, &mut socket, &mut sealer).await;
    outbox.close();
    result
}

async fn write_until_closed(
    outbox: &Outbox,
    socket: &mut OwnedWriteHalf,
    sealer: &mut Sealer,
) -> Result<(), LinkError> {
    let mut bytes = Vec::new();
    loop {
        match outbox.pop() {
            Next::Send(Queued::Control(message)) => {
                for frame in split_control(&message) {
                    sealer.seal(&frame, &mut bytes)?;
                    flush(socket, &mut bytes, WRITE_BYTES).await?;
                }
            }
            Next::Send(Queued::Relay(datagrams)) => {
                for datagram in datagrams {
                    sealer.seal(&Frame::Relay(&datagram), &mut bytes)?;
                }
                flush(socket, &mut bytes, WRITE_BYTES).await?;
            }
            Next::Wait if bytes.is_empty() => outbox.changed.notified().await,
            Next::Wait => flush(socket, &mut bytes, 0).await?,
            Next::End => {
                flush(socket, &mut bytes, 0).await?;
                // The other side may have closed first; then there is nobody to tell.
                let _ = socket.shutdown().await;
                return Ok(());
            }
        }
    }
}

/// Writes `bytes` when there are more than `limit` of them.
async fn flush(
    socket: &mut OwnedWriteHalf,
    bytes: &mut Vec<u8>,
    limit: usize,
) -> Result<(), LinkError> {
    if bytes.len() <= limit {
        return Ok(());
    }
    match tokio::time::timeout(WRITE_LIMIT, socket.write_all(bytes)).await {
        Ok(result) => result?,
        Err(_) => return Err(LinkError::WriteTimedOut),
    }
    // A link at rest keeps no buffer: a server has thousands of them.
    if bytes.capacity() > WRITE_BYTES / 4 {
        *bytes = Vec::new();
    } else {
        bytes.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relayed_data_that_waits_is_bounded_in_datagrams_and_in_bytes() {
        let outbox = Arc::new(Outbox::default());
        let sender = LinkSender::new(Arc::clone(&outbox));
        let send = |mark: u8, len| match sender.try_send_relay(&vec![mark; len]) {
            Ok(()) => 0,
            Err(DropReason::QueueFull) => 1,
            Err(reason) => panic!("{reason:?}"),
        };
        let lost: usize = (0..100).map(|mark| send(mark, MAX_BODY)).sum();
        assert_eq!(sender.waiting() + lost, 100);
        assert_eq!(sender.waiting(), RELAY_QUEUE_BYTES / MAX_BODY);
        let Next::Send(Queued::Relay(taken)) = outbox.pop() else { panic!("data waits") };
        assert!(taken.len() <= WRITE_BYTES.div_ceil(MAX_BODY), "{} long ones", taken.len());
        assert_eq!(usize::from(taken[0][0]), lost, "the oldest are lost, and all were counted");
        while let Next::Send(Queued::Relay(taken)) = outbox.pop() {
            assert!(taken.last().unwrap()[0] < 100);
        }
        assert_eq!(sender.waiting(), 0);
        assert_eq!(outbox.lock().relay_bytes, 0);
        // Short ones go in as many as before.
        let lost: usize = (0..300).map(|_| send(7, 1_400)).sum();
        assert_eq!((lost, sender.waiting()), (300 - RELAY_QUEUE_DATAGRAMS, RELAY_QUEUE_DATAGRAMS));
        let Err((DropReason::QueueFull, lost)) = sender.try_send_train(&[8; 400_000], 40_000)
        else {
            panic!("there was no room for it");
        };
        assert!(lost > 80 && lost < RELAY_QUEUE_DATAGRAMS, "{lost}");
    }
}
