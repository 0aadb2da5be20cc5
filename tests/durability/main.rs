//! What a server and its nodes keep when processes are killed, power fails, disks are full and
//! files are damaged.
//!
//! The built program is killed and damaged from outside; the clients are the library's own control
//! connections. `OVERLAY_TEST_FULL=1` runs every test at full size (1,000 kills, 10,000 power
//! cuts), `OVERLAY_TEST_SEED` repeats a run.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    missing_docs,
    reason = "this whole crate is a test: it stops at the first surprise and prints to people"
)]

mod backups;
mod faults;
mod kills;
mod migration;
mod power;
mod server;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn main() -> ExitCode {
    let test = |name: &str, run: fn() -> Completion| Trial::ignorable_test(name, move || Ok(run()));
    let trials = vec![
        test("kills::acknowledged_is_kept_and_a_retry_is_the_same", kills::running),
        test("kills::a_first_start_that_is_killed_is_followed_by_one_that_works", kills::starting),
        test("power::what_was_acknowledged_was_on_disk", power::cuts),
        test("power::a_call_that_was_interrupted_is_seen", power::interrupted),
        test("migration::killed_at_every_step_it_goes_on", migration::killed),
        test("migration::a_newer_store_is_left_alone", migration::newer),
        test("faults::a_damaged_store_is_an_error_and_stays_as_it_is", faults::mutations),
        test("faults::an_empty_file_is_never_a_new_network", faults::empty),
        test("faults::a_full_disk_refuses_changes_and_nothing_else", faults::full),
        test("faults::a_directory_that_cannot_be_written_is_an_error", faults::read_only),
        test("backups::a_server_moves_with_its_backup", backups::moved),
        test("backups::a_restore_that_is_killed_can_be_repeated", backups::killed),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// `small`, or `full` when the whole is asked for.
fn size(small: usize, full: usize) -> usize {
    if std::env::var_os("OVERLAY_TEST_FULL").is_some_and(|value| value == "1") {
        full
    } else {
        small
    }
}

/// A generator whose seed is printed.
fn random() -> StdRng {
    let given = std::env::var("OVERLAY_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = given.unwrap_or_else(|| rand::rng().random());
    eprintln!("OVERLAY_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}
