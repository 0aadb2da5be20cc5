//! systemd: install, restart, survive, uninstall; on a real one.

use std::time::Duration;

use crate::case::{Case, Needs};
use crate::clock::{now, wait_for};
use crate::container::Container;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, assert_error, parse, text};
use crate::ping;
use crate::process::Output;

pub(crate) fn cases() -> Vec<Case> {
    [
        Case::new("service::a_container_boots_with_the_program", boots),
        Case::new("service::server_and_node_install_restart_and_uninstall", install),
        Case::new("service::a_bad_join_line_installs_nothing", bad_join_line),
    ]
    .map(|case| case.needs(Needs::Systemd))
    .into()
}

/// The room itself: what the other tests take for granted.
fn boots() {
    let net = Net::new();
    let container = Container::boot(&net, &net.machine("alice", Nat::None));
    container.ok(&["test", "-x", "/usr/local/bin/overlay"]);
    container.ok(&["test", "-c", "/dev/net/tun"]);
    assert_eq!(container.ok(&["systemctl", "--failed", "--quiet"]), "", "failed units");
    assert_eq!(container.ok(&["hostname"]).trim(), "alice");
    assert!(container.ok(&["ip", "-o", "addr"]).contains("203.0.113."), "it is in the lab");
}

fn install() {
    let net = Net::new();
    let hub = net.machine("hub", Nat::None);
    let home = net.machine("alice", Nat::PortRestricted);
    let server = Container::boot(&net, &hub);
    let node = Container::boot(&net, &home);

    let printed = server.ok(&["overlay", "service", "install", "server"]);
    assert!(printed.contains(&hub.address.to_string()), "its address is printed:\n{printed}");
    let invite = || {
        let json = server.ok(&["overlay", "server", "invite", "--json"]);
        text(&parse(&json), "/join")
    };
    let printed = node.ok(&["overlay", "service", "install", "node", &invite()]);
    let alice_ipv4 = node.ok(&["overlay", "ip"]).lines().next().unwrap().trim().to_owned();
    assert!(printed.contains(&alice_ipv4), "its address is printed:\n{printed}");

    let mut bob = Node::new(&net, &net.machine("bob", Nat::PortRestricted));
    bob.up(&invite());
    bob.wait_connected();
    ping::assert_answers(&bob.host, &alice_ipv4);
    ping::assert_answers(&home, &bob.ipv4());

    for (container, unit) in [(&server, SERVER_UNIT), (&node, NODE_UNIT)] {
        container.ok(&["systemctl", "restart", unit]);
        assert_eq!(container.ok(&["systemctl", "is-active", unit]).trim(), "active");
        assert_eq!(container.ok(&["systemctl", "is-enabled", unit]).trim(), "enabled");
    }
    let addresses = node.ok(&["ip", "-o", "addr", "show", "dev", "overlay0"]);
    assert!(addresses.contains(&alice_ipv4), "ready means that the address is there");
    ping::first_answer(&bob.host, &alice_ipv4, now(), Duration::from_secs(10));
    bob.wait_connected();

    dies_and_comes_back(&node);
    ping::first_answer(&bob.host, &alice_ipv4, now(), Duration::from_secs(10));

    assert_exposure(&server, SERVER_UNIT, 1.5);
    assert_exposure(&node, NODE_UNIT, 2.0);
    node.ok(&["overlay", "service", "status", "node"]);
    server.ok(&["overlay", "service", "status", "server"]);
    let again = node.run(&["overlay", "up"]);
    assert_eq!(again.code, Some(0), "the service already runs: {again:?}");

    node.ok(&["overlay", "service", "uninstall", "node"]);
    assert_not_installed(&node, NODE_UNIT);
    assert!(!node.ok(&["ip", "-o", "link"]).contains("overlay0"), "the interface is gone");
    server.ok(&["overlay", "service", "uninstall", "server"]);
    assert_not_installed(&server, SERVER_UNIT);
}

/// Kills the node and waits until systemd has another one ready.
fn dies_and_comes_back(node: &Container) {
    let process = || node.ok(&["systemctl", "show", "-P", "MainPID", NODE_UNIT]).trim().to_owned();
    let before = process();
    node.ok(&["systemctl", "kill", "--kill-who=main", "--signal=KILL", NODE_UNIT]);
    wait_for("systemd starts the node again", Duration::from_secs(20), || {
        let active = node.run(&["systemctl", "is-active", NODE_UNIT]).stdout;
        (active.trim() == "active" && process() != before).then_some(())
    });
}

fn assert_exposure(container: &Container, unit: &str, limit: f32) {
    let report = container.ok(&["systemd-analyze", "security", "--no-pager", unit]);
    let line = report.lines().find(|line| line.contains("Overall exposure level")).unwrap();
    let after = line.split_once(&format!("{unit}: ")).expect("unit and level").1;
    let level: f32 = after.split(' ').next().unwrap().parse().unwrap();
    eprintln!("systemd-analyze security {unit}: {level} (at most {limit})");
    assert!(level <= limit, "{unit} is exposed at {level}, {limit} is allowed\n{report}");
}

fn bad_join_line() {
    let net = Net::new();
    let container = Container::boot(&net, &net.machine("alice", Nat::None));
    let bad = container.run(&["overlay", "service", "install", "node", "ovl1_abcdefgh"]);
    assert_error(&bad, &[1, 2], &["join line", "checksum"]);
    assert_not_installed(&container, NODE_UNIT);
    let output = container.run(&["overlay", "service", "install", "node"]);
    assert_error(&output, &[8], &["join line", "enrol", "invite"]);
    assert_not_installed(&container, NODE_UNIT);
}

fn assert_not_installed(container: &Container, unit: &str) {
    let Output { code, stdout, .. } = container.run(&["systemctl", "cat", unit]);
    assert_ne!(code, Some(0), "{unit} is still there:\n{stdout}");
    assert_ne!(container.run(&["systemctl", "is-active", unit]).stdout.trim(), "active");
}

const SERVER_UNIT: &str = "overlay-server.service";
const NODE_UNIT: &str = "overlay-node.service";
