//! How much the relay carries: for each node, and for the network in all.
//!
//! Token buckets, one for bytes and one for datagrams, count what a node sends before anything is
//! done with it. What is over a node's limit is its own loss. When the network is over its limit,
//! a node that sends no more than its part of it is still carried: the part is the limit divided by
//! the number of nodes that send, and only what others leave of theirs is for whoever comes first.
//!
//! A part that was saved up may be sent after others have used up all there was. The network then
//! has a debt, and nobody has more than its part until what is left over has paid it: were any of
//! it forgiven, who saves and who floods would together have more than the limit for ever. Nobody
//! stops counting as a sender meanwhile, so the parts never earn more than the limit and the debt
//! is never more than what was saved.
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
    /// Adds what has been earned at `rate`, of which `share` nodes have a part each, until this one
    /// holds a `FILL` of its part.
    fn fill(&mut self, rate: Throughput, share: f64, now: Instant) {
        let per_second = (f64::from(rate.mbit) * 125_000.0, f64::from(rate.datagrams));
        let most = (
            (per_second.0 / share * FILL.as_secs_f64()).max(LEAST_BYTES),
            (per_second.1 / share * FILL.as_secs_f64()).max(LEAST_DATAGRAMS),
        );
        let Some(before) = self.filled_at else {
            (self.bytes, self.datagrams) = most;
            self.filled_at = Some(now);
            return;
        };
        // Threads read the clock before they take turns here: no time is counted twice.
        self.filled_at = Some(before.max(now));
        let seconds = now.saturating_duration_since(before).as_secs_f64() / share;
        self.bytes = (self.bytes + per_second.0 * seconds).min(most.0);
        self.datagrams = (self.datagrams + per_second.1 * seconds).min(most.1);
    }

    /// How many datagrams of `bytes` each there are tokens for.
    fn room(&self, bytes: f64) -> f64 {
        (self.bytes / bytes).min(self.datagrams).max(0.0).floor()
    }

    /// Takes tokens; those that are not there are a debt.
    fn take(&mut self, datagrams: f64, bytes: f64) {
        self.bytes -= datagrams * bytes;
        self.datagrams -= datagrams;
    }

    fn forgive_debt(&mut self) {
        self.bytes = self.bytes.max(0.0);
        self.datagrams = self.datagrams.max(0.0);
    }

    fn in_debt(&self) -> bool {
        self.bytes < 0.0 || self.datagrams < 0.0
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

    /// Other limits from now on. A debt under the old ones could last for hours under new ones.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
        self.all.forgive_debt();
    }

    /// Decides about `datagrams` of `bytes` each (the last may be shorter) of one node.
    pub fn admit(
        &mut self,
        node: &mut Allowance,
        datagrams: usize,
        bytes: usize,
        now: Instant,
    ) -> Admitted {
        let Limits { node: own, network } = self.limits;
        self.all.fill(network, 1.0, now);
        let senders = self.count_sender(node, now);
        node.own.fill(own, 1.0, now);
        node.part.fill(network, senders, now);
        let number = |length: usize| f64::from(u32::try_from(length).unwrap_or(u32::MAX));
        let (wanted, bytes) = (number(datagrams), number(bytes.max(1)));
        let of_node = node.own.room(bytes).min(wanted);
        let of_network = node.part.room(bytes).max(self.all.room(bytes));
        let carried = of_node.min(of_network);
        node.own.take(carried, bytes);
        node.part.take(carried, bytes);
        // What it has of the others' parts it need not earn.
        node.part.forgive_debt();
        self.all.take(carried, bytes);
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
            self.epoch_began = Some(now);
            // Who stops counting may come back with a part saved up: not before the last is paid.
            if !self.all.in_debt() {
                let before = if passed < 2 * EPOCH { self.senders[0] } else { 0 };
                self.senders = [0, before];
                self.epoch += 1;
            }
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
    use proptest::prelude::*;

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

    /// How much the network may have at once: what it saves, and a part for each of so many nodes.
    fn burst(rate: Throughput, nodes: u32) -> (f64, f64) {
        let tenth = (f64::from(rate.mbit) * 12_500.0, f64::from(rate.datagrams) / 10.0);
        let parts = (0..=nodes).map(|number| f64::from(number.max(1)));
        parts.fold((0.0, 0.0), |(bytes, datagrams), number| {
            let part = ((tenth.0 / number).max(131_072.0), (tenth.1 / number).max(128.0));
            (bytes + part.0, datagrams + part.1)
        })
    }

    #[test]
    fn who_saves_and_who_floods_have_no_more_than_the_limit_together() {
        // One floods; each of the others is silent until its part is full, and sends it in one go.
        for count in [2, 3, 10, 40] {
            let limits = limits(10_000, 300);
            let mut meter = Meter::new(limits);
            let mut nodes: Vec<Allowance> = (0..count).map(|_| Allowance::default()).collect();
            let (mut sent, mut flooded, mut silent) = (0, 0, 1);
            for step in 0..10_000 {
                let now = epoch() + Duration::from_millis(step);
                for _ in 0..5 {
                    flooded += meter.admit(&mut nodes[0], 40, 1_400, now).datagrams * 1_400;
                }
                if step % 100 == 99 {
                    sent += meter.admit(&mut nodes[silent], 4_000, 1_400, now).datagrams * 1_400;
                    silent = silent % (nodes.len() - 1) + 1;
                }
            }
            let most = 375_000_000.0 + burst(limits.network, u32::try_from(count).unwrap()).0;
            let total = (sent + flooded) as f64;
            assert!(total <= most, "{count} nodes: {total} of {most}");
            assert!(total >= 0.98 * 375_000_000.0, "what they leave is carried: {total}");
            assert!(flooded * count >= 370_000_000, "a debt takes nobody's part: {flooded}");
        }
    }

    #[test]
    fn nodes_that_are_silent_together_save_no_more_than_the_limit() {
        // A part of 1 Mbit/s is 12,500 bytes a second, and 128 KiB may be saved up.
        let limits = limits(10_000, 1);
        let mut meter = Meter::new(limits);
        let mut nodes: Vec<Allowance> = (0..10).map(|_| Allowance::default()).collect();
        let mut sent = 0;
        for round in 0..40 {
            let now = epoch() + Duration::from_millis(2_500) * round;
            for node in &mut nodes {
                sent += meter.admit(node, 100, 1_400, now).datagrams * 1_400;
            }
        }
        let most = 100.0 * 125_000.0 + burst(limits.network, 10).0;
        assert!(sent as f64 <= most, "{sent} of {most}");
    }

    #[test]
    fn time_that_threads_read_in_another_order_is_counted_once() {
        let (mut meter, mut node) = (Meter::new(limits(10_000, 100)), Allowance::default());
        let mut sent = 0;
        for step in 0..4_000u64 {
            let late = if step % 2 == 1 { 2 } else { 0 };
            let now = epoch() + Duration::from_millis(10 + step - late);
            sent += meter.admit(&mut node, 40, 1_400, now).datagrams * 1_400;
        }
        // Four seconds at 100 Mbit/s are 50 MB.
        assert!((49_000_000..=51_300_000).contains(&sent), "{sent}");
    }

    /// A time, in ms, that a node is silent; trains that it then sends; datagrams and bytes of each.
    type Turn = (u64, usize, usize, usize);

    fn schedules() -> impl Strategy<Value = (Throughput, Vec<Vec<Turn>>)> {
        let silence = prop_oneof![4 => 0..5u64, 3 => 50..400u64, 1 => 900..3_000u64];
        let turn = (silence, prop_oneof![1..4usize, 1..200usize], 1..46usize, 64..1_400usize);
        let turns = prop::collection::vec(turn, 1..12);
        let senders = prop_oneof![Just(2usize), Just(3), Just(10)];
        let mbit = prop_oneof![1..20u32, 50..500u32];
        let rate = (mbit, prop_oneof![Just(100_000_000), 100..50_000u32])
            .prop_map(|(mbit, datagrams)| Throughput { mbit, datagrams });
        (rate, senders.prop_flat_map(move |n| prop::collection::vec(turns.clone(), n)))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        /// Whoever sends how and when: over any time the limit and one burst, and a node below its
        /// part loses nothing.
        #[test]
        fn no_order_of_bursts_exceeds_the_limit((network, nodes) in schedules()) {
            let wide = Throughput { mbit: 1_000_000, datagrams: 100_000_000 };
            let mut meter = Meter::new(Limits { node: wide, network });
            let count = u32::try_from(nodes.len()).unwrap() + 1;
            let mut steady = Allowance::default();
            let mut senders: Vec<_> =
                nodes.iter().map(|turns| (Allowance::default(), 0, turns[0].0)).collect();
            let rate = (f64::from(network.mbit) * 125_000.0, f64::from(network.datagrams));
            let burst = burst(network, count);
            // What is carried from any moment until now is the growth since the least of these.
            let (mut carried, mut least) = ((0.0, 0.0), (0.0f64, 0.0f64));
            let (mut offered, mut lost) = ((0.0, 0.0), 0);
            for ms in 0..6_000u64 {
                let now = epoch() + Duration::from_millis(ms);
                let earned = (rate.0 * ms as f64 / 1e3, rate.1 * ms as f64 / 1e3);
                least.0 = least.0.min(carried.0 - earned.0);
                least.1 = least.1.min(carried.1 - earned.1);
                for ((node, turn, at), turns) in senders.iter_mut().zip(&nodes) {
                    if ms < *at {
                        continue;
                    }
                    let (_, trains, datagrams, bytes) = turns[*turn % turns.len()];
                    for _ in 0..trains {
                        let admitted = meter.admit(node, datagrams, bytes, now).datagrams as f64;
                        carried.0 += admitted * bytes as f64;
                        carried.1 += admitted;
                    }
                    *turn += 1;
                    *at = ms + 1 + turns[*turn % turns.len()].0;
                }
                // As soon as it would still have sent less than its part.
                let part = 0.99 / f64::from(count);
                if offered.0 + 1_400.0 <= earned.0 * part && offered.1 + 1.0 <= earned.1 * part {
                    let admitted = meter.admit(&mut steady, 1, 1_400, now).datagrams;
                    lost += 1 - admitted;
                    offered = (offered.0 + 1_400.0, offered.1 + 1.0);
                    carried.0 += admitted as f64 * 1_400.0;
                    carried.1 += admitted as f64;
                }
                let over = (carried.0 - earned.0 - least.0, carried.1 - earned.1 - least.1);
                prop_assert!(over.0 <= burst.0 + 1.0, "{over:?} of {burst:?} at {ms}");
                prop_assert!(over.1 <= burst.1 + 1.0, "{over:?} of {burst:?} at {ms}");
            }
            prop_assert_eq!(lost, 0);
        }
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
