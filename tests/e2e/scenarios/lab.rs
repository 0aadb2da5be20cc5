//! `overlay lab`: the whole product on one machine, with nothing but itself.

use std::time::Duration;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{assert_error, binary, path};
use crate::process::{self, Daemon, Output};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("lab::check_passes", || passes(&[])),
        Case::new("lab::check_passes_with_udp_blocked", || passes(&["--block-udp"])),
        Case::new("lab::check_passes_on_a_slow_and_lossy_net", || {
            passes(&["--delay", "20", "--loss", "2"]);
        }),
        Case::new("lab::outlives_its_server_and_its_nodes", outlives),
        Case::new("lab::forbidden_namespaces_are_explained", forbidden),
    ];
    for (a, b) in [(Nat::None, Nat::FullCone), (Nat::Symmetric, Nat::PortRestricted)] {
        let kinds = format!("{a},{b}");
        cases.push(Case::new(format!("lab::check_passes_for_{a}_with_{b}"), move || {
            passes(&["--nat", &kinds]);
        }));
    }
    cases
}

/// No other program can be found, as on a machine that has none of them.
const NO_PROGRAMS: &str = "PATH=/nonexistent";

fn passes(flags: &[&str]) {
    let net = Net::new();
    let host = net.machine("laptop", Nat::None);
    let before = host.ns.interfaces();
    let folder = format!("XDG_RUNTIME_DIR={}", path(net.dir()));
    let mut command = host.ns.command("env");
    command.args([NO_PROGRAMS, &folder, &binary(), "lab", "--check"]).args(flags);
    let Output { code, stdout, stderr } = process::run(command, LAB_LIMIT);
    assert_eq!(code, Some(0), "lab --check {flags:?}\n{stdout}\n{stderr}");
    assert_eq!(host.ns.interfaces(), before, "nothing is left behind");
}

/// Server and nodes can be stopped and started again by hand while the lab stays up.
fn outlives() {
    let net = Net::new();
    let host = net.machine("laptop", Nat::None);
    let folder = format!("XDG_RUNTIME_DIR={}", path(net.dir()));
    let mut command = host.ns.command("env");
    // It stays up for as long as somebody holds its terminal.
    command.args([&folder, &binary(), "lab", "--nat", "none"]);
    let lab = Daemon::start(command, &net.log_file("lab"));
    let inside = |machine: &str, args: &[&str]| {
        let mut command = host.ns.command("env");
        command.args([&folder, &binary(), "lab", "exec", machine, "--"]).args(args);
        command
    };
    let run = |machine: &str, args: &[&str]| process::run(inside(machine, args), LAB_LIMIT);
    wait_for("the lab is up", LAB_LIMIT, || lab.log().contains("Ctrl-C").then_some(()));
    run("bob", &["overlay", "down"]).success("overlay down");
    wait_for("the end is told", LAB_LIMIT, || lab.log().contains("bob has ended").then_some(()));
    let again = Daemon::start(inside("bob", &["overlay", "up"]), &net.log_file("bob"));
    wait_for("bob is back", LAB_LIMIT, || {
        (run("alice", &["overlay", "ping", "bob", "-c", "1"]).code == Some(0)).then_some(())
    });
    drop((again, lab));
}

fn forbidden() {
    let net = Net::new();
    let host = net.machine("laptop", Nat::None);
    let script = "echo 0 >/proc/sys/user/max_user_namespaces && \
                  exec setpriv --bounding-set -all --inh-caps -all \"$0\" lab --check";
    let mut command = host.ns.command("unshare");
    command.args(["--user", "--map-root-user", "sh", "-ec", script, &binary()]);
    let output = process::run(command, LAB_LIMIT);
    assert_error(&output, &[1, 4], &["max_user_namespaces", "userns", "user namespace"]);
    assert!(output.stderr.contains("sudo"), "the way with sudo is named:\n{}", output.stderr);
}

/// The lab shows a relayed and then a direct path, which is a matter of seconds.
const LAB_LIMIT: Duration = Duration::from_secs(40);
