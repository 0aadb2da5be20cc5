//! How much the relay carries: for each node, and for the network in all.
//!
//! Token buckets, one for bytes and one for datagrams, count what a node sends before anything is
//! done with it. What is over a node's limit is its own loss. When the network is over its limit,
//! a node that sends no more than its part of it is still carried: the part is the limit divided by
//! the number of nodes that send, and only what others leave of theirs is for whoever comes first.
//!
//! An `Account` of `types` would not do: it saves time up, and what time is worth to a node changes
//! with the number of those that send.

use std::time::{Duration, Instant};

use crate::types::DropReason;

/// How long a bucket takes to fill: so much may come at once after a silence.
const FILL: Duration = Duration::from_millis(100);
/// A bucket holds two full trains at least, or what is sent in trains would never fit.
const LEAST_BYTES: f64 = 131_072.0;
/// The same in datagrams.
const LEAST_DATAGRAMS: f64 = 128.0;
/// A node that has sent nothing for one to two of these does not count among those that send.
const EPOCH: Duration = Duration::from_secs(1);

/// So much in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throughput {
    /// Megabits (1,000,000 bits) of datagrams with their relay headers.
    pub mbit: u32,
    /// Datagrams.
    pub datagrams: u32,
}

/// The limits of a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// What one node may send.
    pub node: Throughput,
    /// What all of them may send.
    pub network: Throughput,
}

/// More than a machine of today forwards, so that nobody meets them who has not set others.
impl Default for Limits {
    fn default() -> Self {
        Self {
            node: Throughput { mbit: 10_000, datagrams: 2_000_000 },
            network: Throughput { mbit: 40_000, datagrams: 8_000_000 },
        }
    }
}

/// Tokens for bytes and datagrams. It starts full.
#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    bytes: f64,
    datagrams: f64,
    filled_at: Option<Instant>,
}

impl Bucket {
    /// Adds what has been earned at `rate`, of which `share` nodes have a part each.
    fn fill(&mut self, rate: Throughput, share: f64, now: Instant) {
        let per_second = (f64::from(rate.mbit) * 125_000.0, f64::from(rate.datagrams));
        let most = (
            (per_second.0 * FILL.as_secs_f64()).max(LEAST_BYTES),
            (per_second.1 * FILL.as_secs_f64()).max(LEAST_DATAGRAMS),
        );
        let Some(before) = self.filled_at.replace(now) else {
            (self.bytes, self.datagrams) = most;
            return;
        };
        let seconds = now.saturating_duration_since(before).as_secs_f64() / share;
        self.bytes = (self.bytes + per_second.0 * seconds).min(most.0);
        self.datagrams = (self.datagrams + per_second.1 * seconds).min(most.1);
    }

    /// How many datagrams of `bytes` each there are tokens for.
    fn room(&self, bytes: f64) -> f64 {
        (self.bytes / bytes).min(self.datagrams).max(0.0).floor()
    }

    /// Takes tokens, down to `least` of what a full one holds.
    fn take(&mut self, datagrams: f64, bytes: f64) {
        self.bytes -= datagrams * bytes;
        self.datagrams -= datagrams;
    }

    fn not_below(&mut self, bytes: f64, datagrams: f64) {
        self.bytes = self.bytes.max(bytes);
        self.datagrams = self.datagrams.max(datagrams);
    }
}

/// What one node may send.
#[derive(Debug, Default)]
pub struct Allowance {
    own: Bucket,
    /// Its part of the network's limit.
    part: Bucket,
    /// The last epoch in which it sent.
    epoch: u64,
}

/// What of a train is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// So many datagrams from its start.
    pub datagrams: usize,
    /// Why the others are not.
    pub refused: DropReason,
}

/// What all nodes may send together.
#[derive(Debug)]
pub struct Meter {
    limits: Limits,
    all: Bucket,
    epoch_began: Option<Instant>,
    epoch: u64,
    /// Nodes that have sent in this epoch, and in the one before.
    senders: [u32; 2],
}

impl Default for Meter {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Meter {
    /// A meter with these limits.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        // A node that has never sent stands in epoch 0.
        Self { limits, all: Bucket::default(), epoch_began: None, epoch: 1, senders: [0; 2] }
    }

    /// The limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Other limits from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Decides about `datagrams` of `bytes` each (the last may be shorter) of one node.
    pub fn admit(
        &mut self,
        node: &mut Allowance,
        datagrams: usize,
        bytes: usize,
        now: Instant,
    ) -> Admitted {
        let senders = self.count_sender(node, now);
        let Limits { node: own, network } = self.limits;
        node.own.fill(own, 1.0, now);
        node.part.fill(network, senders, now);
        self.all.fill(network, 1.0, now);
        let number = |length: usize| f64::from(u32::try_from(length).unwrap_or(u32::MAX));
        let (wanted, bytes) = (number(datagrams), number(bytes.max(1)));
        let of_node = node.own.room(bytes).min(wanted);
        let of_network = node.part.room(bytes).max(self.all.room(bytes));
        let carried = of_node.min(of_network);
        node.own.take(carried, bytes);
        node.part.take(carried, bytes);
        node.part.not_below(0.0, 0.0);
        self.all.take(carried, bytes);
        // A debt is what nodes have sent of their parts after others had taken more than theirs.
        self.all.not_below(-LEAST_BYTES, -LEAST_DATAGRAMS);
        let refused = if of_node < wanted && of_node <= of_network {
            DropReason::RelayNodeLimit
        } else {
            DropReason::RelayNetworkLimit
        };
        // It is whole, and neither negative nor more than `datagrams`.
        Admitted { datagrams: carried as usize, refused }
    }

    /// How many nodes are sending, this one among them.
    fn count_sender(&mut self, node: &mut Allowance, now: Instant) -> f64 {
        let began = *self.epoch_began.get_or_insert(now);
        let passed = now.saturating_duration_since(began);
        if passed >= EPOCH {
            let before = if passed < 2 * EPOCH { self.senders[0] } else { 0 };
            self.senders = [0, before];
            self.epoch += 1;
            self.epoch_began = Some(now);
        }
        if node.epoch != self.epoch {
            node.epoch = self.epoch;
            self.senders[0] = self.senders[0].saturating_add(1);
        }
        f64::from(self.senders[0].max(self.senders[1]).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    fn limits(node_mbit: u32, network_mbit: u32) -> Limits {
        let plenty = 100_000_000;
        Limits {
            node: Throughput { mbit: node_mbit, datagrams: plenty },
            network: Throughput { mbit: network_mbit, datagrams: plenty },
        }
    }

    /// Bytes carried of each node, which offers so many trains of 40 datagrams every millisecond.
    fn carried(limits: Limits, trains: &[usize], ms: u64) -> Vec<usize> {
        let mut meter = Meter::new(limits);
        let mut nodes: Vec<Allowance> = trains.iter().map(|_| Allowance::default()).collect();
        let mut bytes = vec![0; trains.len()];
        for step in 0..ms {
            let now = epoch() + Duration::from_millis(step);
            for (number, offered) in trains.iter().enumerate() {
                for _ in 0..*offered {
                    let admitted = meter.admit(&mut nodes[number], 40, 1_400, now);
                    bytes[number] += admitted.datagrams * 1_400;
                }
            }
        }
        bytes
    }

    #[test]
    fn a_node_is_carried_up_to_its_rate_and_a_burst() {
        // 100 Mbit/s for two seconds are 25 MB; 448 Mbit/s are offered.
        let sent = carried(limits(100, 10_000), &[1], 2_000)[0];
        let most = 25_000_000 + 1_250_000;
        assert!((25_000_000 - 60_000..=most).contains(&sent), "{sent}");
        // 1,000 Mbit/s for two seconds are 250 MB, of which all that is offered is carried.
        assert_eq!(carried(limits(1_000, 10_000), &[1], 2_000)[0], 2_000 * 40 * 1_400);
    }

    #[test]
    fn datagrams_are_counted_beside_bytes_and_the_reason_is_told() {
        let rate = Throughput { mbit: 10_000, datagrams: 10_000 };
        let wide = Limits::default();
        let start = epoch();
        for (limits, reason) in [
            (Limits { node: rate, ..wide }, DropReason::RelayNodeLimit),
            (Limits { network: rate, ..wide }, DropReason::RelayNetworkLimit),
        ] {
            let (mut meter, mut node) = (Meter::new(limits), Allowance::default());
            let first = meter.admit(&mut node, 1_500, 64, start);
            assert_eq!(first, Admitted { datagrams: 1_000, refused: reason });
            let later = start + Duration::from_millis(10);
            assert_eq!(meter.admit(&mut node, 500, 64, later).datagrams, 100);
            assert_eq!(meter.admit(&mut node, 1, 64, later).datagrams, 0);
        }
    }

    #[test]
    fn a_flood_leaves_each_other_node_its_part_of_the_network() {
        // 300 Mbit/s for three nodes; one floods with 2,240 Mbit/s, the others want 45 each.
        let limits = limits(10_000, 300);
        let mut meter = Meter::new(limits);
        let mut nodes = [Allowance::default(), Allowance::default(), Allowance::default()];
        let (mut flooded, mut lost) = (0, 0);
        for step in 0..5_000u64 {
            let now = epoch() + Duration::from_millis(step);
            for _ in 0..5 {
                flooded += meter.admit(&mut nodes[0], 40, 1_400, now).datagrams * 1_400;
            }
            for node in &mut nodes[1..] {
                lost += 4 - meter.admit(node, 4, 1_400, now).datagrams;
            }
        }
        assert_eq!(lost, 0, "they send less than a third each");
        // Five seconds at 300 Mbit/s, less what the others had.
        let left = 187_500_000 - 2 * 5_000 * 4 * 1_400;
        assert!(flooded >= left * 9 / 10, "what they leave is carried: {flooded} of {left}");
        assert!(flooded <= left + left / 10, "and no more: {flooded} of {left}");
    }

    #[test]
    fn nodes_that_all_want_more_get_the_same() {
        let sent = carried(limits(10_000, 400), &[1, 2, 4, 8], 5_000);
        let total: usize = sent.iter().sum();
        let fair = 400 / 8 * 5_000_000 / 4;
        assert!(sent.iter().all(|bytes| *bytes >= fair * 9 / 10), "{sent:?} of {fair} each");
        assert!(total <= 4 * fair + 4 * fair / 10, "{total}");
    }

    #[test]
    fn who_has_stopped_leaves_its_part_to_the_others() {
        let mut meter = Meter::new(limits(10_000, 100));
        let (mut one, mut other) = (Allowance::default(), Allowance::default());
        let start = epoch();
        meter.admit(&mut other, 40, 1_400, start);
        let mut sent = 0;
        for step in 0..6_000u64 {
            let now = start + Duration::from_millis(step);
            let admitted = meter.admit(&mut one, 40, 1_400, now).datagrams * 1_400;
            sent += if step >= 3_000 { admitted } else { 0 };
        }
        assert!(sent >= 37_500_000 * 98 / 100, "three seconds at 100 Mbit/s: {sent}");
    }

    #[test]
    fn other_limits_hold_from_then_on() {
        let (mut meter, mut node) = (Meter::new(limits(1, 10_000)), Allowance::default());
        let start = epoch();
        while meter.admit(&mut node, 40, 1_400, start).datagrams > 0 {}
        meter.set_limits(limits(1_000, 10_000));
        let later = start + Duration::from_millis(10);
        assert_eq!(meter.admit(&mut node, 800, 1_400, later).datagrams, 800);
    }
}
