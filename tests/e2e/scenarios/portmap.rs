//! Port mappings, by a real `miniupnpd` in the router's namespace.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::case::Case;
use crate::clock::{holds_for, wait_for};
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server, parse};
use crate::upnp::{Speaks, Upnpd};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for speaks in [Speaks::Upnp, Speaks::NatPmp, Speaks::Pcp] {
        let word = speaks.word();
        cases.push(Case::new(format!("portmap::{word}_alone_maps_renews_and_unmaps"), move || {
            life(speaks);
        }));
        cases.push(Case::new(format!("portmap::{word}_lost_is_mended_or_retracted"), move || {
            loss(speaks);
        }));
    }
    for other in [Nat::PortRestricted, Nat::Symmetric] {
        let name = format!("portmap::a_mapping_joins_symmetric_with_{other}");
        cases.push(Case::new(name, move || joins(other, false)));
        let name = format!("portmap::a_mapping_that_only_lets_in_joins_symmetric_with_{other}");
        cases.push(Case::new(name, move || joins(other, true)));
    }
    for other in [Nat::PortRestricted, Nat::Symmetric] {
        let name = format!("portmap::a_mapping_that_comes_late_joins_symmetric_with_{other}");
        cases.push(Case::new(name, move || joins_late(other)));
    }
    cases.push(Case::new("portmap::the_switch_turns_it_off", switched_off));
    cases.push(Case::new("portmap::a_node_that_does_not_get_in_leaves_none", not_let_in));
    cases
}

/// A machine at home behind a router that programs take for one on the internet.
fn at_home(net: &Net, name: &str, nat: Nat) -> Host {
    let mut host = net.machine(name, nat);
    net.move_router(&mut host);
    host
}

fn mapping(status: &Value) -> &Value {
    &status["self"]["port_mapping"]
}

fn wait_verified(node: &mut Node, limit: Duration) -> Value {
    let status =
        node.wait_status("a verified mapping", limit, |status| mapping(status)["verified"] == true);
    mapping(&status).clone()
}

fn life(speaks: Speaks) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let host = at_home(&net, "alice", Nat::Symmetric);
    let upnpd = Upnpd::start(&net, &host, speaks);
    let mut alice = Node::with_config(&net, &host, "alice", "port-mapping-lease-s = 20\n");
    alice.up(&server.join());
    alice.wait_connected();
    let report = wait_verified(&mut alice, FOUND);
    assert_eq!(report["state"], "mapped", "{report}");
    assert_eq!(report["protocol"], speaks.word(), "{report}");
    assert_eq!(report["public"], true, "{report}");
    let wan = host.router.as_ref().unwrap().wan.to_string();
    let external = report["external"].as_str().unwrap_or_default().to_owned();
    assert!(external.starts_with(&format!("{wan}:")), "{report}");
    assert_eq!(upnpd.mappings().len(), 1, "{:?}", upnpd.mappings());

    let netcheck = parse(&alice.cli(&["netcheck", "--json"]).success("netcheck"));
    assert_eq!(netcheck["nat"]["port_mapping"], serde_json::json!([speaks.word()]), "{netcheck}");
    assert_eq!(netcheck["nat"]["mapped"]["external"], external.as_str(), "{netcheck}");
    let spoken = alice.cli(&["netcheck"]).success("netcheck");
    assert!(spoken.contains(&external) && spoken.contains("verified"), "{spoken}");

    // Longer than the lease: it has been renewed.
    holds_for("the mapping is there", Duration::from_secs(24), || {
        std::thread::sleep(Duration::from_millis(500));
        upnpd.mappings().len() == 1
    });
    assert_eq!(wait_verified(&mut alice, FOUND)["external"], external.as_str());

    // What a killed node left is taken over by the next.
    alice.kill();
    assert_eq!(upnpd.mappings().len(), 1);
    alice.up_again();
    assert_eq!(wait_verified(&mut alice, FOUND)["external"], external.as_str());
    assert_eq!(upnpd.mappings().len(), 1, "{:?}", upnpd.mappings());

    assert_eq!(alice.stop(), Some(0));
    assert_eq!(upnpd.mappings(), Vec::<String>::new(), "removed on exit");
}

fn not_let_in() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let line = server.join();
    // The kernel still takes connections for it.
    server.signal(Signal::SIGSTOP);
    let host = at_home(&net, "alice", Nat::Symmetric);
    let upnpd = Upnpd::start(&net, &host, Speaks::Pcp);
    let mut alice = Node::new(&net, &host);
    alice.up(&line);
    wait_for("a mapping", FOUND, || (upnpd.mappings().len() == 1).then_some(()));
    assert_ne!(alice.stop(), None, "it ends by itself");
    assert_eq!(upnpd.mappings(), Vec::<String>::new(), "removed though nobody let it in");
    server.signal(Signal::SIGCONT);
}

fn loss(speaks: Speaks) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let host = at_home(&net, "alice", Nat::Symmetric);
    let mut upnpd = Upnpd::start(&net, &host, speaks);
    let mut alice = Node::start(&net, &host, &server);
    wait_verified(&mut alice, FOUND);

    // The router forgets the mapping, and so does its daemon.
    upnpd.stop();
    upnpd.run();
    wait_for("the mapping is made again", CHECKED, || (upnpd.mappings().len() == 1).then_some(()));
    wait_verified(&mut alice, FOUND);

    // The router forgets it, and does not give it back.
    upnpd.stop();
    alice.wait_status("the mapping is retracted", CHECKED, |status| {
        mapping(status)["state"] == "unmapped" && mapping(status)["external"].is_null()
    });
}

fn joins(other: Nat, forward_only: bool) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let mapped = at_home(&net, "alice", Nat::Symmetric);
    let upnpd = Upnpd::start(&net, &mapped, Speaks::All);
    if forward_only {
        upnpd.forward_only();
    }
    let mut alice = Node::start(&net, &mapped, &server);
    wait_verified(&mut alice, FOUND);
    let mut bob = Node::start(&net, &at_home(&net, "bob", other), &server);
    let (_, time) = wait_for("both are direct", DIRECT, || {
        let direct = bob.path_kind("alice") == "direct" && alice.path_kind("bob") == "direct";
        direct.then_some(())
    });
    eprintln!("symmetric with a mapping and {other}: direct {time:?} after the second was up");
    bob.wait_path("alice", "direct", DIRECT);
    // Longer than the wait for the next round: it stays so.
    holds_for("the pair is direct", Duration::from_secs(3), || {
        bob.path_kind("alice") == "direct" && alice.path_kind("bob") == "direct"
    });
}

/// The pair is relayed, and has tried to punch, before the router offers anything.
fn joins_late(other: Nat) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let mapped = at_home(&net, "alice", Nat::Symmetric);
    let mut bob = Node::start(&net, &at_home(&net, "bob", other), &server);
    let mut alice = Node::start(&net, &mapped, &server);
    bob.wait_path("alice", "relay-udp", Duration::from_secs(5));
    let _upnpd = Upnpd::start(&net, &mapped, Speaks::All);
    // Something about the network changes: the router is asked again at once.
    mapped.ns.ip("route add 198.51.100.0/24 via 192.168.1.1");
    wait_verified(&mut alice, FOUND);
    let (_, time) = wait_for("both are direct", LATE, || {
        let direct = bob.path_kind("alice") == "direct" && alice.path_kind("bob") == "direct";
        direct.then_some(())
    });
    eprintln!("symmetric with a late mapping and {other}: direct {time:?} after it was verified");
}

fn switched_off() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let host = at_home(&net, "alice", Nat::Symmetric);
    let upnpd = Upnpd::start(&net, &host, Speaks::All);
    let mut alice = Node::with_config(&net, &host, "alice", "port-mapping = false\n");
    alice.up(&server.join());
    let status = alice.wait_connected();
    assert!(mapping(&status).is_null(), "{status}");
    holds_for("the router is left alone", Duration::from_secs(2), || upnpd.mappings().is_empty());
    let netcheck = parse(&alice.cli(&["netcheck", "--json"]).success("netcheck"));
    assert!(netcheck["nat"]["port_mapping"].is_null(), "{netcheck}");
}

/// A router answers in milliseconds; when a busy machine misses the first two searches, the third
/// one has found it by then.
const FOUND: Duration = Duration::from_secs(15);
/// A mapping that works is checked every 30 s, and a check takes up to two.
const CHECKED: Duration = Duration::from_secs(45);
/// The router may remember the flow that was tried before.
const LATE: Duration = Duration::from_secs(60);
const DIRECT: Duration = Duration::from_secs(2);
