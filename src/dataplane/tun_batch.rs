//! Packets on their way from a packet function to the TUN interface.
//!
//! Packets stay where they were opened; a train is a list of them, and only its headers are
//! written anew. So the packets of a train are still there, should the kernel refuse it.

use std::ops::Range;

use super::offload::merge::{Merger, Place, train_head};
use super::offload::{FrameHeader, MergeKinds, SegmentationKind, VIRTIO_HEADER_LEN};

/// Ends the list of a train.
const END: usize = usize::MAX;
/// In front of every packet that is no train.
const PLAIN: [u8; VIRTIO_HEADER_LEN] = [0; VIRTIO_HEADER_LEN];

/// IP packets to be written to the TUN interface, those of one flow in their order.
#[derive(Debug, Default)]
pub struct TunBatch {
    buf: Vec<u8>,
    used: usize,
    packets: Vec<Packet>,
    items: Vec<Item>,
    heads: Vec<u8>,
    kinds: MergeKinds,
    merger: Merger,
}

#[derive(Debug)]
struct Packet {
    range: Range<usize>,
    /// Not written again when the packet is part of a train.
    headers_len: usize,
    next: usize,
}

/// A packet or a train.
#[derive(Debug)]
struct Item {
    first: usize,
    last: usize,
    payload_len: usize,
    /// Of a train, once it is finished.
    head: Range<usize>,
}

impl TunBatch {
    /// Forgets all packets, keeps the memory. From here on, packets of `kinds` form trains.
    pub fn clear(&mut self, kinds: MergeKinds) {
        self.packets.clear();
        self.items.clear();
        self.heads.clear();
        self.used = 0;
        if self.kinds == kinds {
            self.merger.clear();
        } else {
            self.kinds = kinds;
            self.merger = Merger::new(kinds);
        }
    }

    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Bytes waiting.
    #[must_use]
    pub fn len(&self) -> usize {
        self.used
    }

    /// Adds one packet that `write` puts into a buffer of `room` bytes; `Ok(0)` adds nothing.
    ///
    /// # Errors
    /// What `write` returns; then nothing is added.
    pub fn push<E>(
        &mut self,
        room: usize,
        write: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let start = self.used;
        if self.buf.len() < start + room {
            self.buf.resize(start + room, 0);
        }
        let len = write(&mut self.buf[start..start + room])?;
        if len == 0 {
            return Ok(());
        }
        let range = start..start + len;
        self.used = range.end;
        let number = self.packets.len();
        self.packets.push(Packet { range: range.clone(), headers_len: 0, next: END });
        if self.kinds == MergeKinds::default() {
            self.start_item(number);
            return Ok(());
        }
        match self.merger.offer(&self.buf, range.clone()) {
            Place::New => {
                let item = self.start_item(number);
                self.merger.opened(range, item);
            }
            Place::Join { item, headers_len } => {
                let item = &mut self.items[item];
                if item.first == item.last {
                    let first = &mut self.packets[item.first];
                    first.headers_len = headers_len;
                    item.payload_len = first.range.len() - headers_len;
                }
                self.packets[number].headers_len = headers_len;
                self.packets[item.last].next = number;
                item.last = number;
                item.payload_len += len - headers_len;
            }
        }
        Ok(())
    }

    fn start_item(&mut self, number: usize) -> usize {
        self.items.push(Item { first: number, last: number, payload_len: 0, head: 0..0 });
        self.items.len() - 1
    }

    /// Writes the headers of all trains. Packets added later are not part of them.
    pub fn finish(&mut self) {
        self.merger.clear();
        for item in self.items.iter_mut().filter(|item| item.first != item.last) {
            let packet = |number: usize| &self.buf[self.packets[number].range.clone()];
            let (first, last) = (packet(item.first), packet(item.last));
            let start = self.heads.len();
            train_head(first, last, item.payload_len, &mut self.heads);
            item.head = start..self.heads.len();
        }
    }

    /// What to write, after [`Self::finish`].
    pub fn frames(&self) -> impl Iterator<Item = Frame<'_>> {
        self.items.iter().map(|item| Frame { batch: self, item })
    }

    /// The packets as they came.
    pub fn packets(&self) -> impl Iterator<Item = &[u8]> {
        self.packets.iter().map(|packet| &self.buf[packet.range.clone()])
    }
}

/// One write: a packet, or a train.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'b> {
    batch: &'b TunBatch,
    item: &'b Item,
}

impl<'b> Frame<'b> {
    /// Whether it is more than one packet.
    #[must_use]
    pub fn is_train(&self) -> bool {
        self.item.first != self.item.last
    }

    /// The virtio header, and behind it the headers of a train.
    #[must_use]
    pub fn head(&self) -> &'b [u8] {
        if self.is_train() { &self.batch.heads[self.item.head.clone()] } else { &PLAIN }
    }

    /// What kind of train it is.
    #[must_use]
    pub fn kind(&self) -> Option<SegmentationKind> {
        let header = FrameHeader::decode(self.head().first_chunk()?).ok()?;
        header.segmentation.map(|segmentation| segmentation.kind)
    }

    /// What comes behind the head, piece by piece.
    pub fn pieces(&self) -> impl Iterator<Item = &'b [u8]> {
        let batch = self.batch;
        self.numbers().map(|number| {
            let packet = &batch.packets[number];
            &batch.buf[packet.range.start + packet.headers_len..packet.range.end]
        })
    }

    /// The packets as they came.
    pub fn packets(&self) -> impl Iterator<Item = &'b [u8]> {
        let batch = self.batch;
        self.numbers().map(|number| &batch.buf[batch.packets[number].range.clone()])
    }

    fn numbers(&self) -> impl Iterator<Item = usize> {
        let batch = self.batch;
        std::iter::successors(Some(self.item.first), move |number| {
            Some(batch.packets[*number].next).filter(|next| *next != END)
        })
    }
}
