//! The simulator: many nodes, one server, virtual time.
//!
//! ```text
//! main      random scenarios from seeds, and the seeds that once failed
//!   scenario    bytes -> who is there and what happens; what must be true at the end
//!   named       scenarios with a name and a time bound; hard: those of hard NATs
//!   bounds      how soon, in round trips      quiet    how much is sent when nothing happens
//!   large     networks of more nodes than everybody is told of
//!   alone     without a server
//!   filtered    paths that let questions through and no data
//!   rotation    node keys are renewed            dark     hosts with two uplinks
//!   evil      a relay that harms what it carries, and a server that names victims
//!   transition  what can happen              check    what must be true
//!     world       clock, flights, turns        oracle   which path must be found
//!       routing     lines, NATs, LANs            ledger   every inner packet, once, in time
//!       host, control_link    node core and data plane, as the daemon drives them
//!       uplinks         the interfaces of a host, their routes, and what is dark behind them
//!       server          server core and relay table over a store in memory
//!       edge, spot, link    NATs of the lab, IPv6, forwarded ports; latency, loss, doubles
//! ```
//!
//! Held at every step: no timer stands still and no turn is without end, queues and floods have
//! bounds, an inner packet comes out once, unchanged, at the right host, soon, and never between a
//! member and who has been removed. Held after 30 quiet seconds: every pair has the path that the
//! oracle knows and gets a packet through; who has a server wants to be woken in time.
//!
//! Known to be caught, because the program was broken on purpose to see it:
//!
//! | broken | caught by |
//! |---|---|
//! | a failed round of probes is never repeated | random scenarios: stuck |
//! | a ping does not trigger a check back | time bounds of `named` and `bounds` |
//! | doubt about a path leads to nothing | random scenarios: stuck |
//! | no keepalives | random scenarios: stuck |
//! | data leaves by the wrong socket | random scenarios, and most named ones |
//! | a removal is not carried out | random scenarios: a packet of no member |
//! | proofs of paths are due and not looked at | random scenarios: busy loop; `filtered` |
//! | IPv6 endpoints are not announced | random scenarios: stuck on the relay |
//! | the deadline of the next bind is forgotten | random scenarios: lost wake-up |
//! | forwarded ports are not announced | random scenarios: stuck on the relay |
//! | the end of a membership is not carried out | random scenarios: a packet of no member |
//! | calls to probe are ignored | random scenarios: stuck on the relay |
//!
//! `cargo test` also plays `tests/fuzz/corpus/scenario`, which the fuzz target of the same name
//! found; `tests/fuzz/Cargo.toml` has its command.
//!
//! `SIM_SEED=7 cargo test --test sim` replays one seed, `SIM_SCENARIOS=1000` sets how many are
//! tried. Nothing here reads a clock but this file, which takes the start of time once.

mod alone;
mod bounds;
mod check;
mod control_link;
mod dark;
mod edge;
mod evil;
mod filtered;
mod hard;
mod host;
mod lanes;
mod large;
mod ledger;
mod link;
mod named;
mod oracle;
mod quiet;
mod rotation;
mod routing;
mod scenario;
mod server;
mod spot;
mod transition;
mod uplinks;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

use scenario::{BASE_BYTES, END_BYTES, EXTRA_BYTES, Scenario, UPLINK_BYTES};

/// The start of virtual time.
#[expect(clippy::disallowed_methods, reason = "virtual time starts at some real instant")]
pub(crate) fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

/// Plays the scenario of a seed; a failure tells how to see it again.
#[expect(clippy::print_stderr, reason = "a failing seed is of no use when nobody sees it")]
fn play(seed: u64, bytes: usize) {
    let mut whole = [0; SCENARIO_BYTES];
    StdRng::seed_from_u64(seed).fill_bytes(&mut whole);
    let scenario = Scenario::from_bytes(&whole[..bytes]);
    let mut world = scenario.world(seed, epoch());
    let log = world.log();
    let played = catch_unwind(AssertUnwindSafe(|| scenario.play(&mut world)));
    if let Err(panic) = played {
        eprintln!("\nseed {seed} failed: SIM_SEED={seed} cargo test --test sim\n\n{scenario}");
        eprintln!("what happened last:\n{}\n", scenario::tail(&log));
        resume_unwind(panic);
    }
}

/// Enough for all that a scenario can have.
const SCENARIO_BYTES: usize = BASE_BYTES + EXTRA_BYTES + END_BYTES + UPLINK_BYTES;

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

/// Seeds that once found a mistake, when their scenarios had the first bytes only.
const EARLY_REGRESSIONS: &[u64] = &[3, 27, 28, 36, 46, 71, 199, 283, 296, 384, 386, 450, 469, 478];
/// The same for scenarios in which no membership ended.
const REGRESSIONS: &[u64] = &[578, 824, 1391];

#[test]
fn seeds_that_once_failed_pass() {
    for seed in EARLY_REGRESSIONS {
        play(*seed, BASE_BYTES);
    }
    for seed in REGRESSIONS {
        play(*seed, BASE_BYTES + EXTRA_BYTES);
    }
}

#[test]
fn the_scenarios_of_the_fuzzer_pass() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus/scenario");
    let mut files: Vec<_> = std::fs::read_dir(corpus)
        .expect("the corpus is committed")
        .map(|entry| entry.expect("it can be read").path())
        .collect();
    files.sort();
    assert!(files.len() >= 10, "the corpus is committed");
    for file in files {
        let bytes = std::fs::read(&file).expect("it can be read");
        let played = catch_unwind(|| Scenario::play_bytes(&bytes, epoch()));
        if let Err(panic) = played {
            eprintln!("\n{} failed:\n{}", file.display(), Scenario::from_bytes(&bytes));
            resume_unwind(panic);
        }
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "tells how long the scenarios took")]
fn random_scenarios_hold_what_the_oracle_says() {
    if let Some(seed) = number_from("SIM_SEED") {
        return play(seed, bytes_of(seed));
    }
    let scenarios = number_from("SIM_SCENARIOS").unwrap_or(SCENARIOS);
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(8));
    let start = Instant::now();
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            // The whole world of a scenario lives in one thread.
            scope.spawn(|| {
                let seeds = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
                seeds
                    .take_while(|seed| *seed < scenarios)
                    .for_each(|seed| play(seed, bytes_of(seed)));
            });
        }
    });
    let took = start.elapsed().as_secs_f64();
    println!("{scenarios} scenarios in {took:.1} s, {threads} threads");
}

/// Hosts have second uplinks in the first of them: enough to be a third of so many.
fn bytes_of(seed: u64) -> usize {
    if seed < WITH_UPLINKS { SCENARIO_BYTES } else { SCENARIO_BYTES - UPLINK_BYTES }
}

/// As many as there is time for beside the others.
const WITH_UPLINKS: u64 = 250;
/// What two cores play in less than a minute.
const SCENARIOS: u64 = 1_000;

#[test]
fn few_bytes_are_a_scenario_too() {
    for bytes in [&[][..], &[7], &[2, 3, 1, 9, 1]] {
        let scenario = Scenario::from_bytes(bytes);
        scenario.play(&mut scenario.world(1, epoch()));
    }
}
