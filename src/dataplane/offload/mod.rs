//! Trains of packets that cross the TUN interface in one piece.
//!
//! A kernel that segments late hands over up to 64 KiB of one flow as a single *super-packet* with
//! a virtio header in front. [`split`] makes the packets of it that the wire wants; [`merge`] makes
//! a super-packet of packets that came in a row. Both leave every bit of every packet as it would
//! have been without them: `split(merge(packets)) == packets`. Nothing is sealed or routed here.

pub(super) mod checksum;
mod header;
pub(super) mod merge;
mod split;

pub use header::{FrameHeader, Segmentation, SegmentationKind, VIRTIO_HEADER_LEN};
pub use merge::MergeKinds;
pub use split::Segments;

#[cfg(test)]
mod tests;
