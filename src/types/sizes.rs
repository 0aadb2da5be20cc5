//! Lengths that several layers must agree on.

/// The inner MTU that every path is expected to have, in fragments at the worst: IPv6 has no links
/// below it (RFC 8200 section 5).
pub const BASE_MTU: u16 = 1_280;
/// What WireGuard adds to an inner packet: 16 bytes of header and 16 of authentication tag.
pub const SEAL_OVERHEAD: u16 = 32;

/// Bytes of the longest train of datagrams to send in one call: with all headers one of 64 KiB is more
/// than devices take.
pub const MAX_TRAIN_BYTES: usize = 65_450;
/// Datagrams of the longest train to send in one call. Linux takes 128 since 6.9 and 64 before
/// (`UDP_MAX_SEGMENTS`), of which one of its headers took a part until 5.16.
pub const MAX_TRAIN_DATAGRAMS: usize = 63;
