//! What counts of sent and arrived datagrams say.

use super::*;
use crate::testing::epoch;

const MS: Duration = Duration::from_millis(1);
const RTT: Duration = Duration::from_millis(20);

/// A sender on a path, its clock, and what has arrived at the other end.
struct Flow {
    delivery: Delivery,
    now: Instant,
    sent: SizeCounts,
    arrived: SizeCounts,
    pings: u8,
}

impl Flow {
    fn new() -> Self {
        let (sent, arrived) = (SizeCounts::default(), SizeCounts::default());
        Self { delivery: Delivery::default(), now: epoch(), sent, arrived, pings: 0 }
    }

    /// Two hundred milliseconds of traffic, of which `kept` datagrams of each class arrive, and
    /// a ping at the end, that is answered or not.
    fn step(&mut self, sent: [u32; 3], kept: [u32; 3], answered: bool) -> Suspicion {
        self.now += 100 * MS;
        self.sent.add(SizeCounts(sent));
        self.delivery.handle_sent(self.sent, self.now);
        self.now += 100 * MS;
        let tx = TxId([self.pings; 12]);
        self.pings = self.pings.wrapping_add(1);
        self.delivery.handle_ping(tx, self.now);
        self.delivery.handle_sent(self.sent, self.now);
        self.arrived.add(SizeCounts(kept));
        if answered {
            self.delivery.handle_pong(tx, Some(self.arrived), self.now + RTT);
        }
        self.delivery.suspicion(RTT, self.now + RTT)
    }

    fn doubles(&self) -> bool {
        self.delivery.wants_duplicate(RTT, self.now + RTT)
    }
}

#[test]
fn what_arrives_is_no_cause_for_doubt_though_some_is_lost() {
    let mut flow = Flow::new();
    for round in 0..200 {
        let kept = if round % 2 == 0 { [9, 10, 0] } else { [10, 9, 0] };
        assert_eq!(flow.step([10, 10, 0], kept, true), Suspicion::None);
        assert!(!flow.doubles());
    }
    assert_eq!(flow.delivery.loss_permille(), Some(50));
}

#[test]
fn data_of_one_size_that_does_not_arrive_is_doubled_at_once_and_then_given_up() {
    for kept in [[0, 0, 0], [10, 0, 0], [0, 10, 0]] {
        let mut flow = Flow::new();
        flow.step([10, 10, 0], [10, 10, 0], true);
        assert_ne!(flow.step([10, 10, 0], kept, true), Suspicion::Dead);
        assert!(flow.doubles(), "{kept:?}");
        let dead = (0..8).any(|_| flow.step([10, 10, 0], kept, true) == Suspicion::Dead);
        assert!(dead, "{kept:?}");
    }
}

#[test]
fn large_datagrams_alone_are_a_matter_of_the_mtu() {
    let mut flow = Flow::new();
    flow.step([5, 0, 5], [5, 0, 5], true);
    for _ in 0..10 {
        assert_ne!(flow.step([5, 0, 5], [5, 0, 0], true), Suspicion::Dead);
    }
    assert!(flow.delivery.large_missing());
    flow.delivery.forgive_large();
    assert!(!flow.delivery.large_missing());
}

#[test]
fn a_death_in_the_middle_of_a_burst_is_noticed_by_the_first_retransmission() {
    let mut flow = Flow::new();
    flow.step([50, 50, 50], [50, 50, 50], true);
    flow.step([50, 50, 50], [45, 45, 45], true);
    assert!(!flow.doubles() && !flow.delivery.large_missing());
    flow.step([0, 0, 0], [0, 0, 0], true);
    assert!(!flow.doubles() && !flow.delivery.large_missing(), "only a pause");
    flow.step([1, 1, 1], [0, 0, 0], true);
    assert!(flow.doubles() && flow.delivery.large_missing(), "a retransmission is lost, too");
}

#[test]
fn full_datagrams_that_do_not_arrive_are_long_ones_that_are_missing() {
    let mut flow = Flow::new();
    flow.step([5, 50, 0], [5, 50, 0], true);
    assert!(!flow.delivery.long_missing());
    flow.step([5, 2, 0], [5, 0, 0], true);
    flow.step([5, 1, 0], [5, 0, 0], true);
    assert!(flow.delivery.long_missing() && !flow.delivery.large_missing());
}

#[test]
fn one_lost_retransmission_of_a_large_datagram_is_enough_to_double() {
    let mut flow = Flow::new();
    flow.step([0, 0, 50], [0, 0, 50], true);
    flow.step([0, 0, 1], [0, 0, 0], true);
    assert!(flow.doubles() && !flow.delivery.large_missing());
}

#[test]
fn one_lost_datagram_of_a_quiet_pair_is_forgotten() {
    let mut flow = Flow::new();
    flow.step([5, 5, 0], [5, 5, 0], true);
    flow.step([0, 1, 0], [0, 0, 0], true);
    assert!(flow.doubles());
    for _ in 0..8 {
        assert_ne!(flow.step([1, 0, 0], [1, 0, 0], true), Suspicion::Dead);
    }
    assert!(!flow.doubles(), "it has been forgotten");
}

#[test]
fn questions_without_answers_are_doubt_whatever_arrives() {
    let mut flow = Flow::new();
    flow.step([10, 0, 0], [10, 0, 0], true);
    let mut seen = Vec::new();
    for _ in 0..8 {
        seen.push((flow.step([10, 0, 0], [10, 0, 0], false), flow.doubles()));
    }
    assert!(!seen[0].1 && seen[2].1, "{seen:?}");
    assert_eq!(seen[7].0, Suspicion::Dead);
    assert_eq!(flow.step([10, 0, 0], [10, 0, 0], true), Suspicion::None);
}

#[test]
fn a_third_of_all_data_lost_is_too_much() {
    let mut flow = Flow::new();
    let dead = (0..25).any(|_| flow.step([10, 0, 0], [6, 0, 0], true) == Suspicion::Dead);
    assert!(dead, "{:?}", flow.delivery.loss_permille());
    assert_eq!(flow.delivery.loss_permille(), Some(400));
    let mut flow = Flow::new();
    for _ in 0..25 {
        assert_eq!(flow.step([10, 0, 0], [8, 0, 0], true), Suspicion::None);
    }
}

#[test]
fn a_path_that_is_full_is_not_left() {
    let mut flow = Flow::new();
    for _ in 0..25 {
        assert_eq!(flow.step([9_000, 0, 0], [2_000, 0, 0], true), Suspicion::None);
        assert!(!flow.doubles());
    }
    assert_eq!(flow.delivery.loss_permille(), Some(777), "it is told all the same");
    for _ in 0..25 {
        assert_eq!(flow.step([10, 0, 0], [10, 0, 0], true), Suspicion::None);
        assert!(!flow.doubles(), "nor remembered afterwards");
    }
    for (sent, arrived) in [(3_000, 100), (9_000, 1_000), (9_000, 1_000), (3_000, 100)] {
        flow.step([sent, 0, 0], [arrived, 0, 0], true);
        assert!(!flow.doubles(), "it begins and ends between two reports");
    }
    let dead = (0..25).any(|_| flow.step([900, 0, 0], [200, 0, 0], true) == Suspicion::Dead);
    assert!(dead, "the same loss where little is sent");
}

#[test]
fn a_peer_that_counts_anew_has_lost_nothing() {
    let mut flow = Flow::new();
    for _ in 0..5 {
        flow.step([10, 10, 0], [10, 10, 0], true);
    }
    flow.arrived = SizeCounts::default();
    for _ in 0..5 {
        assert_eq!(flow.step([10, 10, 0], [10, 10, 0], true), Suspicion::None);
        assert!(!flow.doubles());
    }
}

#[test]
fn unanswered_questions_in_a_flood_are_repeated_before_they_are_believed() {
    let mut flow = Flow::new();
    for _ in 0..2 {
        flow.step([9_000, 0, 0], [4_000, 0, 0], true);
    }
    assert!(flow.delivery.floods());
    flow.step([9_000, 0, 0], [4_000, 0, 0], false);
    let asked_at = flow.now;
    let next = flow.delivery.next_at(MS).unwrap();
    assert!(next <= asked_at + ASK_FLOOD_SPACING, "asked again at once");
    for late in [200, 390] {
        assert!(!flow.delivery.wants_duplicate(MS, asked_at + late * MS), "after {late} ms");
    }
    assert!(flow.delivery.wants_duplicate(MS, asked_at + DOUBLE_FLOOD_AFTER), "it is silent");
    // The same silence where little is sent.
    let mut flow = Flow::new();
    for answered in [true, true, false] {
        flow.step([900, 0, 0], [400, 0, 0], answered);
    }
    assert!(!flow.delivery.floods() && flow.delivery.wants_duplicate(MS, flow.now + 200 * MS));
}

#[test]
fn a_path_that_starts_over_has_nothing_to_prove_of_what_was_sent_before() {
    let mut flow = Flow::new();
    for _ in 0..20 {
        flow.step([10, 10, 0], [0, 0, 0], true);
    }
    flow.delivery.start_over();
    flow.delivery.begin_proof();
    flow.step([0, 0, 0], [0, 0, 0], true);
    assert_eq!(flow.delivery.sent_in_proof(), 0);
    flow.step([1, 0, 0], [1, 0, 0], true);
    assert_eq!((flow.delivery.sent_in_proof(), flow.delivery.proofs()), (1, 1));
}
