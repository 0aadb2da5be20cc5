//! Guessing the next external ports of a NAT that hands them out in order.
//!
//! Behind a NAT that maps by destination (RFC 4787 section 4.1) the port that a peer has to send to
//! comes into being with our first datagram to it, and nobody sees it but the peer's own NAT. Where
//! ports are given in order, two mappings made one after the other show it, and the newest one
//! shows where the next ones are.
//!
//! When both sides are behind such NATs, each one's port depends on how many others it has sent to
//! before: with `x` and `y` the places in the two windows, one side's datagram for place `y` leaves
//! by place `a + rank(y)`, the other's for `x` by `b + rank(x)`, with `a` and `b` the few flows that
//! came between. Both in plain order would never meet unless `a + b = 0`. So one side sends in
//! plain order and the other by [`doubling`], for which `x - rank(x)` takes every value once: one
//! pair meets, whatever `a + b` up to half a window.

use std::net::SocketAddr;

use crate::types::{Candidate, CandidateKind};

/// Ports ahead of the newest mapping that are announced; odd, for [`doubling`].
pub const WINDOW: u16 = 13;
/// Ports behind it: mappings that we made just before we looked.
const BEHIND: u16 = 3;
/// Two mappings made in a row that are further apart than this show no order.
const MAX_STEP: u16 = 15;

/// Whether two mappings, made in this order, look like neighbours.
#[must_use]
pub fn is_sequential(first: SocketAddr, second: SocketAddr) -> bool {
    let step = second.port().wrapping_sub(first.port());
    first.ip() == second.ip() && (1..=MAX_STEP).contains(&step)
}

/// The candidates around the newest mapping, those ahead of it first.
#[must_use]
pub fn window(newest: SocketAddr) -> Vec<Candidate> {
    let ahead = (1..=WINDOW).filter_map(|step| newest.port().checked_add(step));
    let behind = (1..=BEHIND).filter_map(|step| newest.port().checked_sub(step));
    ahead
        .chain(behind)
        .filter(|port| *port >= 1024)
        .map(|port| Candidate::new(SocketAddr::new(newest.ip(), port), CandidateKind::Predicted))
        .collect()
}

/// Puts the predicted endpoints of a peer, sorted by port, into the order in which they are first
/// sent to: the window ahead before what is behind it, and by doubling if so asked.
pub(crate) fn order<T>(mut sorted: Vec<T>, double: bool) -> Vec<T> {
    let window = usize::from(WINDOW);
    let ahead = sorted.split_off(sorted.len().saturating_sub(window));
    let ahead = if double && ahead.len() == window { doubling(ahead) } else { ahead };
    ahead.into_iter().chain(sorted).collect()
}

/// The order in which item `i` of `n` (odd) stands at place `2 i mod n`.
fn doubling<T>(items: Vec<T>) -> Vec<T> {
    let count = items.len();
    let mut placed: Vec<(usize, T)> =
        items.into_iter().enumerate().map(|(i, item)| (2 * i % count, item)).collect();
    placed.sort_by_key(|(place, _)| *place);
    placed.into_iter().map(|(_, item)| item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(port: u16) -> SocketAddr {
        SocketAddr::new("203.0.113.10".parse().unwrap(), port)
    }

    #[test]
    fn neighbours_are_told_from_strangers() {
        assert!(is_sequential(at(40_000), at(40_001)) && is_sequential(at(40_000), at(40_015)));
        assert!(!is_sequential(at(40_000), at(40_000)), "one mapping for all");
        assert!(!is_sequential(at(40_000), at(40_016)) && !is_sequential(at(40_001), at(40_000)));
    }

    #[test]
    fn a_window_stays_among_the_ports_that_there_are() {
        assert_eq!(window(at(40_000)).len(), usize::from(WINDOW + BEHIND));
        assert_eq!(window(at(u16::MAX)).len(), usize::from(BEHIND));
        assert!(window(at(1024)).iter().all(|candidate| candidate.endpoint.port() > 1024));
    }

    #[test]
    fn one_pair_of_ports_meets_whatever_came_between() {
        let places: Vec<usize> = (0..usize::from(WINDOW)).collect();
        let rank = |order: &[usize], place| order.iter().position(|it| *it == place).unwrap();
        let (plain, doubled) = (order(places.clone(), false), order(places.clone(), true));
        for a in 0..=3 {
            for b in 0..=3 {
                let meets =
                    |x: usize, y: usize| a + rank(&plain, y) == x && b + rank(&doubled, x) == y;
                let met = places.iter().any(|x| places.iter().any(|y| meets(*x, *y)));
                assert!(met, "{a} and {b} flows between");
            }
        }
    }
}
