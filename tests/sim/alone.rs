//! Without a server: what direct paths do when there is nothing else.

use std::time::Duration;

use overlay::lab::nat::NatKind::PortRestricted;

use crate::named::{running, talk};

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_path_that_answers_again_carries_at_once_what_has_no_other_way() {
    let mut world = running(&[PortRestricted; 2]);
    world.kill_server();
    talk(&mut world, Duration::from_secs(10), 20 * MS);
    for blackout in 0..8 {
        world.set_partitioned(0, 1, true);
        talk(&mut world, Duration::from_secs(1), 20 * MS);
        world.set_partitioned(0, 1, false);
        // Both sides ask every 200 ms or so.
        talk(&mut world, 500 * MS, 20 * MS);
        let pings = talk(&mut world, Duration::from_millis(8_500), 20 * MS);
        world.run_for(100 * MS);
        let lost = pings.iter().filter(|it| world.ledger.ping(**it).took().is_none()).count();
        assert_eq!(lost, 0, "of {} packets after blackout {blackout}", pings.len());
    }
}
