//! The simulator's world, played from bytes: the same world that `cargo test --test sim` plays from
//! seeds.
#![no_main]
#![allow(dead_code, unused_imports, reason = "the named scenarios use more of the world than this")]

use libfuzzer_sys::fuzz_target;

#[path = "../../../sim/check.rs"]
mod check;
#[path = "../../../sim/control_link.rs"]
mod control_link;
#[path = "../../../sim/edge.rs"]
mod edge;
#[path = "../../../sim/evil.rs"]
mod evil;
#[path = "../../../sim/host.rs"]
mod host;
#[path = "../../../sim/ledger.rs"]
mod ledger;
#[path = "../../../sim/link.rs"]
mod link;
#[path = "../../../sim/named.rs"]
mod named;
#[path = "../../../sim/oracle.rs"]
mod oracle;
#[path = "../../../sim/quiet.rs"]
mod quiet;
#[path = "../../../sim/routing.rs"]
mod routing;
#[path = "../../../sim/scenario.rs"]
mod scenario;
#[path = "../../../sim/server.rs"]
mod server;
#[path = "../../../sim/spot.rs"]
mod spot;
#[path = "../../../sim/transition.rs"]
mod transition;
#[path = "../../../sim/uplinks.rs"]
mod uplinks;
#[path = "../../../sim/world.rs"]
mod world;

fn epoch() -> std::time::Instant {
    static EPOCH: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    *EPOCH.get_or_init(std::time::Instant::now)
}

fuzz_target!(|bytes: &[u8]| scenario::Scenario::play_bytes(bytes, epoch()));
