//! End-to-end tests: the built binary in network namespaces behind the kernel's own NAT.
//!
//! Black box. The binary is driven by its documented commands and judged by its JSON, its exit
//! codes and the packets that arrive; nothing of the library is used here. The run first puts
//! itself into namespaces of its own (`sandbox`), so that it works as root and as a plain user,
//! touches no network of the machine, and leaves nothing behind however it ends.
//!
//! `lab` and `topology` build a small internet, `nat` its routers, `overlay` starts servers and nodes in it,
//! `scenarios` are the tests by subject.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "this whole crate is a test: it stops at the first surprise and prints to people"
)]

mod attack;
mod capture;
mod case;
mod clock;
mod container;
mod flow;
mod lab;
mod line;
mod nat;
mod overlay;
mod pair;
mod ping;
mod probe;
mod process;
mod sandbox;
mod scenarios;
mod spoofer;
mod steady;
mod topology;
mod upnp;

use std::process::ExitCode;

use libtest_mimic::Arguments;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Most of a test's time is waiting; more at once would disturb the times that are measured.
    arguments.test_threads.get_or_insert(2);

    if std::env::var_os("OVERLAY_TEST_SKIP_E2E").is_some_and(|value| value == "1") {
        eprintln!("e2e: not run, as OVERLAY_TEST_SKIP_E2E asks");
        return ExitCode::SUCCESS;
    }
    let cases = scenarios::all();
    if arguments.list {
        return case::run(&arguments, cases, &sandbox::Limits::none());
    }
    match sandbox::enter() {
        sandbox::Entry::Inside(limits) => case::run(&arguments, cases, &limits),
        sandbox::Entry::Done(code) => code,
        sandbox::Entry::Impossible(limits) => case::run(&arguments, cases, &limits),
    }
}
