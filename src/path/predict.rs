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
const MAX_STEP: u32 = 15;

/// Where a NAT that counts stands, and how it counts: up or down, by one or by two (some keep the
/// parity of ports, for RTP).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counter {
    /// The newest mapping.
    pub newest: SocketAddr,
    down: bool,
    /// All distances between mappings were even. Flows of others in between make one larger, never
    /// odd where the NAT counts by two.
    even: bool,
}

impl Counter {
    /// What two mappings, made in this order, show; none when they do not look like neighbours.
    #[must_use]
    pub fn observe(first: SocketAddr, second: SocketAddr) -> Option<Self> {
        let distance = i32::from(second.port()) - i32::from(first.port());
        let near = (1..=MAX_STEP).contains(&distance.unsigned_abs());
        (near && first.ip() == second.ip()).then_some(Self {
            newest: second,
            down: distance < 0,
            even: distance % 2 == 0,
        })
    }

    /// Another mapping was made, perhaps long after the last one.
    #[must_use]
    pub fn advance(self, newest: SocketAddr) -> Self {
        let odd = (i32::from(newest.port()) - i32::from(self.newest.port())) % 2 != 0;
        Self { newest, even: self.even && !odd, ..self }
    }

    /// The candidates around the newest mapping, those ahead of it first, the next one first.
    #[must_use]
    pub fn window(&self) -> Vec<Candidate> {
        let step = if self.even { 2 } else { 1 };
        let step = if self.down { -step } else { step };
        let newest = i32::from(self.newest.port());
        let ahead = (1..=i32::from(WINDOW)).map(|place| newest + place * step);
        let behind = (1..=i32::from(BEHIND)).map(|place| newest - place * step);
        ahead
            .chain(behind)
            .filter_map(|port| u16::try_from(port).ok())
            .filter(|port| *port >= 1024)
            .map(|port| SocketAddr::new(self.newest.ip(), port))
            .map(|endpoint| Candidate::new(endpoint, CandidateKind::Predicted))
            .collect()
    }
}

/// Puts the predicted endpoints of a peer, in the order in which it has told them, into the order
/// in which they are first sent to: the window ahead before what is behind it, and by doubling if
/// so asked.
pub(crate) fn order<T>(mut told: Vec<T>, double: bool) -> Vec<T> {
    let window = usize::from(WINDOW);
    let behind = told.split_off(window.min(told.len()));
    let ahead = if double && told.len() == window { doubling(told) } else { told };
    ahead.into_iter().chain(behind).collect()
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
        let counts = |a, b| Counter::observe(at(a), at(b)).is_some();
        assert!(counts(40_000, 40_001) && counts(40_000, 40_015));
        assert!(counts(40_001, 40_000) && counts(40_015, 40_000), "downwards, too");
        assert!(!counts(40_000, 40_000), "one mapping for all");
        assert!(!counts(40_000, 40_016) && !counts(40_016, 40_000));
        let other = "203.0.113.11:40001".parse().unwrap();
        assert_eq!(Counter::observe(at(40_000), other), None);
    }

    #[test]
    fn the_next_ports_follow_the_way_that_the_nat_counts() {
        let ports = |counter: Counter| -> Vec<u16> {
            counter.window().iter().map(|candidate| candidate.endpoint.port()).collect()
        };
        let next = |a, b| ports(Counter::observe(at(a), at(b)).unwrap())[..3].to_vec();
        assert_eq!(next(40_000, 40_001), [40_002, 40_003, 40_004]);
        assert_eq!(next(40_001, 40_000), [39_999, 39_998, 39_997]);
        assert_eq!(next(40_000, 40_002), [40_004, 40_006, 40_008]);
        assert_eq!(next(40_002, 40_000), [39_998, 39_996, 39_994]);
        assert_eq!(next(40_000, 40_003), [40_004, 40_005, 40_006], "others were between");
        let seen = Counter::observe(at(40_000), at(40_002)).unwrap();
        assert_eq!(ports(seen.advance(at(40_008)))[0], 40_010, "still by two");
        assert_eq!(ports(seen.advance(at(40_009)))[0], 40_010, "by one after all");
        assert_eq!(ports(seen.advance(at(40_009)).advance(at(40_011)))[0], 40_012);
    }

    #[test]
    fn a_window_stays_among_the_ports_that_there_are() {
        let up = |port| Counter::observe(at(port - 1), at(port)).unwrap().window();
        assert_eq!(up(40_000).len(), usize::from(WINDOW + BEHIND));
        assert_eq!(up(u16::MAX).len(), usize::from(BEHIND));
        assert!(up(1024).iter().all(|candidate| candidate.endpoint.port() > 1024));
        let down = Counter::observe(at(1025), at(1024)).unwrap().window();
        assert_eq!(down.len(), usize::from(BEHIND));
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
