//! What is kept for a peer that cannot be reached: not much, and not for long.

use std::time::Duration;

use overlay::lab::nat::NatKind::PortRestricted;

use crate::named::running;

#[test]
fn what_waits_for_a_path_is_bounded_and_not_kept_for_long() {
    let mut world = running(&[PortRestricted; 2]);
    world.kill_server();
    world.set_partitioned(0, 1, true);
    // Until both ways are known to be dead.
    for _ in 0..30 {
        world.ping(0, 1, 100);
        world.run_for(Duration::from_secs(1));
    }
    let kept_too_long: Vec<u64> = (0..200).filter_map(|_| world.ping(0, 1, 100)).collect();
    world.run_for(Duration::from_secs(4));
    let kept: Vec<u64> = (0..200).filter_map(|_| world.ping(0, 1, 100)).collect();
    assert_eq!(kept.len(), 200, "they are sent, and go nowhere");
    world.set_partitioned(0, 1, false);
    // The ledger fails on a packet that comes out after more than four seconds.
    world.run_for(Duration::from_secs(60));
    let arrived =
        |pings: &[u64]| pings.iter().filter(|it| world.ledger.ping(**it).took().is_some()).count();
    assert_eq!(arrived(&kept_too_long), 0);
    assert!(arrived(&kept) <= 64, "the queue of one peer: {}", arrived(&kept));
}
