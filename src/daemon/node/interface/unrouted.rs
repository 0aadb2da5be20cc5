//! Routes to peers that the kernel did not take, until it does.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::types::OverlayAddrs;

/// All of them are tried again so long after the first one has failed.
const RETRY: Duration = Duration::from_secs(60);

/// The peers whose routes are not what their paths carry.
#[derive(Debug, Default)]
pub(in super::super) struct Unrouted {
    peers: BTreeMap<Ipv4Addr, (OverlayAddrs, u16)>,
    retry_at: Option<Instant>,
}

impl Unrouted {
    /// The route to a peer was to be made for packets of `mtu` bytes, with this result. The log has one
    /// line when it fails first, and one when it is right again.
    pub(super) fn note<E: std::fmt::Display>(
        &mut self,
        addrs: OverlayAddrs,
        mtu: u16,
        changed: Result<(), E>,
        now: Instant,
    ) {
        match changed {
            Ok(()) => {
                if self.peers.remove(&addrs.v4).is_some() {
                    tracing::info!(peer = %addrs.v4, "the route to a peer is right again");
                }
                if self.peers.is_empty() {
                    self.retry_at = None;
                }
            }
            Err(error) => {
                if self.peers.insert(addrs.v4, (addrs, mtu)).is_none() {
                    tracing::warn!(%error, peer = %addrs.v4, "the route to a peer could not be changed");
                }
                self.retry_at.get_or_insert(now + RETRY);
            }
        }
    }

    /// When they are to be tried again.
    pub(in super::super) fn due(&self) -> Option<Instant> {
        self.retry_at
    }

    /// The routes to try again now. What fails again has to be noted again.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<(OverlayAddrs, u16)> {
        if self.retry_at.is_none_or(|at| now < at) {
            return Vec::new();
        }
        self.retry_at = None;
        self.peers.values().copied().collect()
    }

    /// The interface has gone, with all its routes.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// What the user should know, if there is something.
    pub(in super::super) fn warning(&self) -> Option<String> {
        let (_, (addrs, _)) = self.peers.first_key_value()?;
        let others = match self.peers.len() - 1 {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        Some(format!(
            "the kernel does not take the routes to {}{others}: packets may be smaller than the path \
             allows, or get lost; it is tried again every minute (the reason is in the log)",
            addrs.v4
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    #[test]
    fn a_route_is_tried_again_each_minute_until_the_kernel_takes_it() {
        let peer = |number: u8| OverlayAddrs {
            v4: [10, 77, 0, number].into(),
            v6: format!("fd00::{number}").parse().unwrap(),
        };
        let (mut unrouted, mut now) = (Unrouted::default(), epoch());
        unrouted.note(peer(1), 1_400, Ok::<(), &str>(()), now);
        assert_eq!((unrouted.due(), unrouted.warning()), (None, None));
        unrouted.note(peer(1), 1_400, Err("busy"), now);
        unrouted.note(peer(2), 1_300, Err("busy"), now + RETRY / 2);
        assert_eq!(unrouted.due(), Some(now + RETRY), "a second failure does not put it off");
        assert!(unrouted.warning().unwrap().contains("10.77.0.1 and 1 more"));
        assert!(unrouted.take_due(now + RETRY / 2).is_empty());
        for _ in 0..3 {
            now += RETRY;
            assert_eq!(unrouted.take_due(now), [(peer(1), 1_400), (peer(2), 1_300)]);
            assert!(unrouted.take_due(now).is_empty(), "once");
            unrouted.note(peer(1), 1_400, Err("busy"), now);
            unrouted.note(peer(2), 1_300, Err("busy"), now);
        }
        // What the path carries now, and not what it did carry.
        unrouted.note(peer(2), 1_280, Err("busy"), now);
        unrouted.note(peer(1), 1_400, Ok::<(), &str>(()), now);
        now += RETRY;
        assert_eq!(unrouted.take_due(now), [(peer(2), 1_280)]);
        unrouted.note(peer(2), 1_280, Ok::<(), &str>(()), now);
        assert_eq!((unrouted.due(), unrouted.warning()), (None, None));
    }
}
