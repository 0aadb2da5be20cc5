//! The simulator: many nodes, one server, virtual time.
//!
//! ```text
//! main      random scenarios from seeds, and the seeds that once failed
//!   scenario    bytes -> who is there and what happens; what must be true at the end
//!   named       scenarios with a name and a time bound; hard: those of hard NATs
//!   bounds      how soon, in round trips      quiet    how much is sent when nothing happens
//!     world       clock, flights, turns        oracle   which path must be found
//!       routing     lines, NATs, LANs            ledger   every inner packet, once
//!       host, uplink    node core and data plane, as the daemon drives them
//!       server          server core and relay table over a store in memory
//!       edge, link      the NAT of the lab; latency, loss, doubles, reordering
//! ```
//!
//! `SIM_SEED=7 cargo test --test sim` replays one seed, `SIM_SCENARIOS=1000` sets how many are
//! tried. Nothing here reads a clock but this file, which takes the start of time once.

mod bounds;
mod edge;
mod hard;
mod host;
mod ledger;
mod link;
mod named;
mod oracle;
mod quiet;
mod routing;
mod scenario;
mod server;
mod uplink;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::OnceLock;
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

use scenario::Scenario;

/// The start of virtual time.
#[expect(clippy::disallowed_methods, reason = "virtual time starts at some real instant")]
pub(crate) fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

/// Plays the scenario of a seed; a failure tells how to see it again.
#[expect(clippy::print_stderr, reason = "a failing seed is of no use when nobody sees it")]
fn play(seed: u64) {
    let mut bytes = [0; SCENARIO_BYTES];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    let scenario = Scenario::from_bytes(&bytes);
    let mut world = scenario.world(seed, epoch());
    let log = world.log();
    let played = catch_unwind(AssertUnwindSafe(|| scenario.play(&mut world)));
    if let Err(panic) = played {
        eprintln!("\nseed {seed} failed: SIM_SEED={seed} cargo test --test sim\n\n{scenario}");
        eprintln!("what happened last:\n{}\n", scenario::tail(&log));
        resume_unwind(panic);
    }
}

/// Enough bytes for six hosts and ten steps.
const SCENARIO_BYTES: usize = 96;

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

/// Seeds that once found a mistake.
const REGRESSIONS: &[u64] = &[3, 27, 28, 36, 46, 71, 199, 283, 296, 384, 386, 450, 469, 478];

#[test]
fn seeds_that_once_failed_pass() {
    for seed in REGRESSIONS {
        play(*seed);
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "tells how long the scenarios took")]
fn random_scenarios_hold_what_the_oracle_says() {
    if let Some(seed) = number_from("SIM_SEED") {
        return play(seed);
    }
    let scenarios = number_from("SIM_SCENARIOS").unwrap_or(SCENARIOS);
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(8));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            // The whole world of a scenario lives in one thread.
            scope.spawn(move || (thread as u64..scenarios).step_by(threads).for_each(play));
        }
    });
    let took = start.elapsed().as_secs_f64();
    println!("{scenarios} scenarios in {took:.1} s, {threads} threads");
}

/// What two cores play in about 20 seconds without optimisation.
const SCENARIOS: u64 = 300;

#[test]
fn few_bytes_are_a_scenario_too() {
    for bytes in [&[][..], &[7], &[2, 3, 1, 9, 1]] {
        let scenario = Scenario::from_bytes(bytes);
        scenario.play(&mut scenario.world(1, epoch()));
    }
}
