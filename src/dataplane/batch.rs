//! Buffers that carry packets from a packet function to a syscall.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use crate::types::{MAX_TRAIN_BYTES, MAX_TRAIN_DATAGRAMS, SocketId};

/// Where a run of datagrams goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Out of a UDP socket.
    Udp {
        /// To this endpoint.
        remote: SocketAddr,
        /// From this address of ours, when it matters.
        local: Option<IpAddr>,
        /// By this socket; of the main ones, by that of the endpoint's family.
        socket: SocketId,
    },
    /// As a relay frame on the control connection.
    Link,
}

impl Target {
    /// This endpoint, by the main socket.
    #[must_use]
    pub fn udp(remote: SocketAddr) -> Self {
        Self::Udp { remote, local: None, socket: SocketId::MAIN }
    }
}

/// Datagrams to one target, all of one length but for the last, which may be shorter: what UDP
/// generic segmentation offload can send in one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Where to.
    pub target: Target,
    /// Length of each datagram but the last.
    pub segment: usize,
    range: Range<usize>,
    segments: usize,
}

/// Datagrams to be sent, in order, in runs.
#[derive(Debug, Default)]
pub struct UdpBatch {
    buf: Vec<u8>,
    runs: Vec<Run>,
    used: usize,
    /// Where the last datagram begins.
    last: usize,
    /// Copies of some of them on other ways: apart, as between them they would end every run.
    copies: Option<Box<Self>>,
}

/// The memory that is passed over by [`UdpBatch::keep_open_run`] before it is used again: moving
/// bytes each time would cost a copy, and never doing it would leave the processor's cache.
const MAX_PASSED: usize = 256 << 10;

impl UdpBatch {
    /// Forgets all datagrams, keeps the memory.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.used = 0;
        if let Some(copies) = &mut self.copies {
            copies.clear();
        }
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Bytes waiting.
    #[must_use]
    pub fn len(&self) -> usize {
        self.used - self.runs.first().map_or(self.used, |run| run.range.start)
    }

    /// The runs that nothing joins any more: all but the last, and no copies. Forget them with
    /// [`Self::keep_open_run`].
    pub fn closed_runs(&self) -> impl Iterator<Item = (&Run, &[u8])> {
        self.own_runs().take(self.runs.len().saturating_sub(1))
    }

    /// Forgets all but the last run, which the next packets may join.
    pub fn keep_open_run(&mut self) {
        let Some(mut last) = self.runs.pop() else { return };
        self.runs.clear();
        if last.range.start > MAX_PASSED {
            self.buf.copy_within(last.range.clone(), 0);
            last.range = 0..last.range.len();
            self.used = last.range.end;
            self.last = self.used;
        }
        self.runs.push(last);
    }

    /// Adds one datagram that `write` puts into a buffer of at least `room` bytes; it returns the
    /// length, or an error, and then nothing is added.
    ///
    /// # Errors
    /// What `write` returns.
    pub fn push<E>(
        &mut self,
        target: Target,
        room: usize,
        write: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let start = self.used;
        if self.buf.len() < start + room {
            self.buf.resize(start + room, 0);
        }
        let len = write(&mut self.buf[start..start + room])?;
        self.used = start + len;
        self.last = start;
        if let Some(run) = self.runs.last_mut()
            && run.target == target
            && len <= run.segment
            && run.range.len() % run.segment == 0
            && run.range.len() + len <= MAX_TRAIN_BYTES
            && run.segments < MAX_TRAIN_DATAGRAMS
        {
            run.range.end += len;
            run.segments += 1;
        } else {
            self.runs.push(Run { target, segment: len, range: start..self.used, segments: 1 });
        }
        Ok(())
    }

    /// Adds a datagram that is there already.
    pub fn push_bytes(&mut self, target: Target, datagram: &[u8]) {
        let copied: Result<(), std::convert::Infallible> =
            self.push(target, datagram.len(), |room| {
                room.copy_from_slice(datagram);
                Ok(datagram.len())
            });
        match copied {
            Ok(()) => {}
            Err(never) => match never {},
        }
    }

    /// Adds a datagram that is there already, and leaves by itself: a train passes where none of its
    /// datagrams would, as a router judges it by what it was cut from.
    pub fn push_alone(&mut self, target: Target, datagram: &[u8]) {
        let (segment, start) = (datagram.len(), self.used);
        if self.buf.len() < start + segment {
            self.buf.resize(start + segment, 0);
        }
        self.buf[start..start + segment].copy_from_slice(datagram);
        self.used = start + segment;
        self.last = start;
        // As if it were full: nothing joins it.
        let (range, segments) = (start..self.used, MAX_TRAIN_DATAGRAMS);
        self.runs.push(Run { target, segment, range, segments });
    }

    /// Adds the last datagram once more, on another way, with `header` in place of its first `skip`
    /// bytes. Copies leave behind all the others.
    pub fn copy_last(&mut self, skip: usize, target: Target, header: &[u8]) {
        let body = &self.buf[(self.last + skip).min(self.used)..self.used];
        let copied: Result<(), std::convert::Infallible> =
            self.copies.get_or_insert_default().push(target, header.len() + body.len(), |room| {
                let (head, rest) = room.split_at_mut(header.len());
                head.copy_from_slice(header);
                rest.copy_from_slice(body);
                Ok(head.len() + rest.len())
            });
        match copied {
            Ok(()) => {}
            Err(never) => match never {},
        }
    }

    /// The runs, in order, each with its bytes; those of copies behind the others.
    pub fn runs(&self) -> impl Iterator<Item = (&Run, &[u8])> {
        let copies = self.copies.iter().flat_map(|copies| copies.own_runs());
        self.own_runs().chain(copies)
    }

    fn own_runs(&self) -> impl Iterator<Item = (&Run, &[u8])> {
        self.runs.iter().map(|run| (run, &self.buf[run.range.clone()]))
    }

    /// The single datagrams, in order.
    pub fn datagrams(&self) -> impl Iterator<Item = (Target, &[u8])> {
        self.runs().flat_map(|(run, bytes)| {
            bytes.chunks(run.segment.max(1)).map(|datagram| (run.target, datagram))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(port: u16) -> Target {
        Target::udp(SocketAddr::new([192, 0, 2, 1].into(), port))
    }

    #[test]
    fn equal_datagrams_to_one_target_form_a_run_and_a_shorter_one_ends_it() {
        let mut batch = UdpBatch::default();
        for len in [100, 100, 60, 100, 120] {
            batch.push_bytes(target(1), &vec![7; len]);
        }
        batch.push_bytes(target(2), &[8; 120]);
        let runs: Vec<_> = batch.runs().map(|(run, bytes)| (run.segment, bytes.len())).collect();
        assert_eq!(runs, [(100, 260), (100, 100), (120, 120), (120, 120)]);
        let lens: Vec<_> = batch.datagrams().map(|(_, datagram)| datagram.len()).collect();
        assert_eq!(lens, [100, 100, 60, 100, 120, 120]);
    }

    #[test]
    fn what_leaves_alone_joins_no_run_and_is_joined_by_none() {
        let mut batch = UdpBatch::default();
        batch.push_bytes(target(1), &[1; 100]);
        batch.push_alone(target(1), &[2; 100]);
        batch.push_bytes(target(1), &[3; 100]);
        batch.push_bytes(target(1), &[4; 100]);
        let runs: Vec<_> = batch.runs().map(|(run, bytes)| (run.segment, bytes.len())).collect();
        assert_eq!(runs, [(100, 100), (100, 100), (100, 200)]);
        let order: Vec<u8> = batch.datagrams().map(|(_, datagram)| datagram[0]).collect();
        assert_eq!(order, [1, 2, 3, 4]);
    }

    #[test]
    fn a_run_never_grows_over_what_one_call_can_send() {
        let mut batch = UdpBatch::default();
        for _ in 0..200 {
            batch.push_bytes(target(1), &[0; 1400]);
        }
        for (run, bytes) in batch.runs() {
            assert!(
                bytes.len() <= MAX_TRAIN_BYTES && bytes.len() / run.segment <= MAX_TRAIN_DATAGRAMS
            );
        }
        assert_eq!(batch.datagrams().count(), 200);
    }

    #[test]
    fn the_open_run_goes_on_when_the_closed_ones_have_left() {
        let mut batch = UdpBatch::default();
        let mut sent = Vec::new();
        for round in 0..1000u32 {
            batch.push_bytes(target(1), &round.to_be_bytes().repeat(350));
            if batch.len() > MAX_TRAIN_BYTES {
                sent.extend(batch.closed_runs().map(|(_, bytes)| bytes.to_vec()));
                batch.keep_open_run();
            }
            assert!(batch.len() <= 2 * MAX_TRAIN_BYTES && batch.used < MAX_PASSED * 2);
        }
        assert!(sent.iter().all(|run| run.len() == MAX_TRAIN_BYTES / 1400 * 1400), "full ones");
        sent.extend(batch.runs().map(|(_, bytes)| bytes.to_vec()));
        let expected: Vec<u8> = (0..1000u32).flat_map(|i| i.to_be_bytes().repeat(350)).collect();
        assert!(sent.concat() == expected, "every byte in its order");
    }

    #[test]
    fn copies_leave_behind_the_others_and_end_no_run() {
        let mut batch = UdpBatch::default();
        for number in 0..80u8 {
            batch.push_bytes(target(1), &[&[1, 2, 3], &[number; 97][..]].concat());
            batch.copy_last(3, target(2), &[9; 8]);
            if number == 70 {
                assert_eq!(batch.closed_runs().count(), 1, "no copies");
                batch.keep_open_run();
            }
        }
        let runs: Vec<_> = batch.runs().map(|(run, bytes)| (run.target, bytes.len())).collect();
        let one = |count: usize| (target(1), count * 100);
        assert_eq!(runs, [one(17), (target(2), 63 * 105), (target(2), 17 * 105)]);
        let (_, last) = batch.datagrams().last().expect("a copy");
        assert_eq!(last, [&[9; 8], &[79; 97][..]].concat());
        batch.clear();
        assert!(batch.is_empty() && batch.runs().count() == 0);
    }

    #[test]
    fn a_failed_write_leaves_no_trace() {
        let mut batch = UdpBatch::default();
        assert_eq!(batch.push(target(1), 10, |_| Err::<usize, _>("no")), Err("no"));
        assert!(batch.is_empty() && batch.datagrams().count() == 0);
    }
}
