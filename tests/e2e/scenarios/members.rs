//! Members of the network as the server and the nodes name them.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::case::Case;
use crate::clock::{now, wait_for};
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, PORT, Server, assert_error, find_peer, text};
use crate::ping::{self, Stream};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("members::nodes_are_listed", listed),
        Case::new("members::a_rename_reaches_everybody", renamed),
        Case::new("members::a_removed_node_is_cut_off_and_told", removed),
        Case::new("members::a_removal_names_whom_it_waits_for", acknowledged),
        Case::new("members::a_removed_node_stays_out_when_all_restart", stays_out),
        Case::new("members::who_was_removed_hears_so_with_its_old_join_line_too", old_line),
        Case::new("members::a_cloned_machine_is_named_on_all_sides", cloned),
        Case::new("members::a_node_that_left_is_shown_offline", offline),
        Case::new("members::name_address_and_id_mean_the_same", all_names),
        Case::new("members::two_nodes_of_one_name_can_be_told_apart", one_name),
        Case::new("members::the_server_answers_from_the_address_asked", several_addresses),
    ]
}

struct Trio {
    net: Net,
    server: Server,
    nodes: [Node; 3],
}

fn trio() -> Trio {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let nodes = ["alice", "bob", "carol"]
        .map(|name| Node::start(&net, &net.machine(name, Nat::PortRestricted), &server));
    Trio { net, server, nodes }
}

fn listed() {
    let Trio { server, nodes, net: _net } = trio();
    let list = server.nodes();
    assert_eq!(list["schema"], 1, "{list}");
    let list = list["nodes"].as_array().expect("nodes");
    assert_eq!(list.len(), 3);
    for node in &nodes {
        let status = node.status().unwrap();
        let entry = list.iter().find(|entry| entry["name"] == node.name.as_str());
        let entry = entry.expect("every node is in the list");
        for key in ["id", "ipv4", "ipv6"] {
            assert_eq!(entry[key], status["self"][key], "{key} of {}", node.name);
        }
        assert_eq!(entry["online"], true);
    }
    let table = server.cli(&["nodes"]).success("nodes");
    assert!(nodes.iter().all(|node| table.contains(&node.ipv4())), "{table}");
}

fn renamed() {
    let Trio { server, nodes: [mut alice, bob, _carol], net } = trio();
    let bob_ipv4 = bob.ipv4();
    ping::assert_answers(&alice.host, &bob_ipv4);
    let stream = Stream::start(&net, &alice.host, &bob_ipv4);
    stream.wait_for_more(10);
    server.cli(&["rename", "bob", "robert"]).success("rename");
    let status = alice.wait_status("bob is robert", Duration::from_secs(5), |status| {
        !find_peer(status, "robert").is_null()
    });
    assert!(find_peer(&status, "bob").is_null(), "{status}");
    assert_eq!(find_peer(&status, "robert")["ipv4"], bob_ipv4.as_str());
    alice.cli(&["ping", "robert", "-c", "1"]).success("ping by the new name");
    assert_error(&alice.cli(&["ping", "bob", "-c", "1"]), &[5], &["bob"]);
    assert_error(&server.cli(&["rename", "nobody", "x"]), &[5], &["nobody"]);
    stream.stop_without_loss();
}

fn removed() {
    let Trio { server, nodes: [mut alice, mut bob, mut carol], net } = trio();
    let addresses = [&alice, &bob, &carol].map(Node::ipv4);
    ping::assert_answers(&carol.host, &addresses[0]);
    ping::assert_answers(&carol.host, &addresses[1]);
    ping::assert_answers(&alice.host, &addresses[1]);
    let others = Stream::start(&net, &alice.host, &addresses[1]);
    let cut = Stream::start(&net, &carol.host, &addresses[0]);
    cut.wait_for_more(20);

    server.cli(&["remove", "carol"]).success("remove");
    for node in [&mut alice, &mut bob] {
        node.wait_status("carol is gone", Duration::from_secs(3), |status| {
            find_peer(status, "carol").is_null()
        });
    }
    ping::assert_silent(&carol.host, &addresses[0]);
    ping::assert_silent(&alice.host, &addresses[2]);
    wait_for("carol is told", Duration::from_secs(5), || {
        let _ = carol.daemon().exit();
        carol.log().to_lowercase().contains("removed").then_some(())
    });
    others.wait_for_more(20);
    others.stop_without_loss();
    drop(cut);

    // A removed node cannot come back by a restart.
    drop(carol);
    let host = net.machine("dave", Nat::PortRestricted);
    let mut dave = Node::start(&net, &host, &server);
    ping::assert_answers(&dave.host, &addresses[0]);
    assert!(find_peer(&dave.wait_connected(), "carol").is_null());
    assert_error(&server.cli(&["remove", "carol"]), &[5], &["carol"]);
}

/// A process that stands still is online for the server, and cannot have dropped anything.
fn acknowledged() {
    let Trio { server, nodes: [alice, mut bob, carol], net } = trio();
    let dave = Node::start(&net, &net.machine("dave", Nat::None), &server);
    let dave_ipv4 = dave.ipv4();
    let remove = |name: &str| -> Value {
        let printed = server.cli(&["remove", name, "--json"]).success("remove");
        serde_json::from_str(&printed).expect("JSON")
    };
    let removal = remove("dave");
    assert_eq!(removal["schema"], 1, "{removal}");
    assert_eq!(removal["removed"]["ipv4"], dave_ipv4.as_str(), "{removal}");
    assert_eq!((&removal["acknowledged"], &removal["online"]), (&3.into(), &3.into()), "{removal}");
    assert_eq!(removal["waiting"], Value::Array(Vec::new()));

    bob.daemon().signal(Signal::SIGSTOP);
    let started = now();
    let printed = server.cli(&["remove", "carol"]).success("remove");
    assert!(printed.contains("1 of 2 nodes have acknowledged, waiting for bob"), "{printed}");
    assert!(started.elapsed() < Duration::from_secs(4), "it does not wait for ever");
    bob.daemon().signal(Signal::SIGCONT);
    bob.wait_status("carol is gone", Duration::from_secs(5), |status| {
        find_peer(status, "carol").is_null()
    });
    drop(carol);

    assert_eq!(bob.stop(), Some(0));
    let gone = || server.nodes()["nodes"][1]["online"] == false;
    wait_for("bob is offline", Duration::from_secs(5), || gone().then_some(()));
    let printed = server.cli(&["remove", "alice"]).success("remove");
    assert!(printed.contains("no other node is online"), "{printed}");
    assert!(printed.contains("bob will learn it when it comes back"), "{printed}");
    drop(alice);
}

/// Nobody was there when it was removed, and all start from what they have on disk.
fn stays_out() {
    let Trio { mut server, nodes: [mut alice, mut bob, mut carol], net: _net } = trio();
    let addresses = [&alice, &bob, &carol].map(Node::ipv4);
    for node in [&mut alice, &mut bob, &mut carol] {
        node.kill();
    }
    server.cli(&["remove", "carol"]).success("remove");
    server.kill();
    server.run();
    server.wait_ready();
    for node in [&mut carol, &mut alice, &mut bob] {
        node.up_again();
    }
    for node in [&mut alice, &mut bob] {
        node.wait_connected();
        node.wait_status("carol is gone", Duration::from_secs(5), |status| {
            find_peer(status, "carol").is_null()
        });
    }
    ping::assert_answers(&alice.host, &addresses[1]);
    ping::assert_silent(&carol.host, &addresses[0]);
    ping::assert_silent(&alice.host, &addresses[2]);
    wait_for("carol is told", Duration::from_secs(5), || {
        carol.log().to_lowercase().contains("removed").then_some(())
    });
}

/// Removed while nobody told it, with a join line at every start, as a container has one.
fn old_line() {
    let net = Net::new();
    let mut server = Server::start(&net, &net.machine("server", Nat::None));
    let host = net.machine("carol", Nat::None);
    let mut carol = Node::new(&net, &host);
    let old = server.join();
    carol.up(&old);
    carol.wait_connected();
    // It stands still meanwhile, and finds its connection gone.
    carol.daemon().signal(Signal::SIGSTOP);
    server.kill();
    server.run();
    server.wait_ready();
    server.cli(&["remove", "carol"]).success("remove");
    carol.daemon().signal(Signal::SIGCONT);
    let told = "was removed from its network";
    assert_eq!(carol.daemon().wait_exit(Duration::from_secs(20)), Some(8));
    assert!(carol.log().contains(told), "{}", carol.log());

    let assert_no_member = |node: &Node, line: &str| {
        let said = node.up_to_end(line);
        assert_error(&said, &[1], &["already used"]);
        for word in ["this machine is no member", "was removed", "overlay server invite"] {
            assert!(said.stderr.contains(word), "{word}: {}", said.stderr);
        }
    };
    assert_no_member(&carol, &old);
    std::fs::remove_dir_all(carol.dir.join("state")).unwrap();
    assert_no_member(&carol, &old);

    // The same while it is off, with a line that is used up, one that is not, and with none.
    let newer = server.join();
    carol.up(&newer);
    carol.wait_connected();
    assert_eq!(carol.stop(), Some(0));
    server.cli(&["remove", "carol"]).success("remove");
    assert_error(&carol.up_to_end(&newer), &[8], &[told]);
    carol.up(&server.join());
    carol.wait_connected();
    assert_eq!(carol.stop(), Some(0));
    server.cli(&["remove", "carol"]).success("remove");
    carol.up(&server.join());
    carol.wait_connected();
    assert_eq!(carol.stop(), Some(0));
    server.cli(&["remove", "carol"]).success("remove");
    assert_error(&carol.up_to_end(""), &[8], &[told]);
}

/// The state directory of one machine starts on another one as well.
fn cloned() {
    let Trio { server, nodes: [mut alice, mut bob, _carol], net } = trio();
    let host = net.machine("copy", Nat::PortRestricted);
    let mut copy = Node::new(&net, &host);
    let (from, to) = (alice.dir.join("state"), copy.dir.join("state"));
    let copied = std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
    copy.call_itself("alice");
    copy.up_again();
    let entry = || {
        let list = server.nodes();
        let nodes = list["nodes"].as_array().expect("nodes").clone();
        nodes.into_iter().find(|node| node["name"] == "alice").expect("alice is a member")
    };
    wait_for("the clone is found", Duration::from_secs(10), || {
        (entry()["cloned"] == true).then_some(())
    });
    assert!(server.cli(&["nodes"]).success("nodes").contains("CLONED"));
    let events = server.cli(&["events", "--json"]).success("events");
    assert_eq!(events.matches("node-cloned").count(), 1, "{events}");
    for node in [&mut alice, &mut copy] {
        let status = node.wait_status("it is warned", Duration::from_secs(5), |status| {
            status["self"]["warnings"][0].is_string()
        });
        let warning = text(&status, "/self/warnings/0");
        assert!(warning.contains("keys of this one") && warning.contains("JOINLINE"), "{warning}");
        assert!(node.cli(&["status"]).success("status").contains(&warning));
        assert!(node.log().contains("keys of this one"));
    }
    // The network keeps quiet about it: one of the two stays connected.
    let joined = server.nodes()["nodes"].as_array().map(Vec::len);
    assert_eq!(joined, Some(3));
    assert_eq!(entry()["online"], true);
    assert_eq!(find_peer(&bob.wait_connected(), "alice")["online"], true);
    // When one is gone, the other is the node.
    copy.kill();
    alice.wait_status("it is let in again", Duration::from_secs(70), |status| {
        status["server"]["state"] == "connected"
    });
    ping::assert_answers(&bob.host, &alice.ipv4());
}

fn offline() {
    let Trio { nodes: [mut alice, mut bob, _carol], net: _net, server: _server } = trio();
    assert_eq!(bob.stop(), Some(0));
    let status = alice.wait_status("bob is offline", Duration::from_secs(5), |status| {
        find_peer(status, "bob")["online"] == false
    });
    assert_eq!(text(find_peer(&status, "bob"), "/path/kind"), "offline");
    bob.up_again();
    alice.wait_status("bob is online", Duration::from_secs(5), |status| {
        find_peer(status, "bob")["online"] == true
    });
    ping::assert_answers(&alice.host, &bob.ipv4());
}

fn all_names() {
    let Trio { nodes: [alice, bob, _carol], net: _net, server } = trio();
    let status = bob.status().unwrap();
    let names = ["/self/name", "/self/id", "/self/ipv4", "/self/ipv6"].map(|at| text(&status, at));
    ping::assert_answers(&alice.host, &names[2]);
    for name in &names {
        alice.cli(&["ping", name, "-c", "1"]).success("ping");
        let printed = alice.cli(&["ip", name]).success("ip PEER");
        assert!(printed.contains(&names[2]) && printed.contains(&names[3]), "{name}: {printed}");
    }
    let own = alice.cli(&["ip"]).success("ip");
    assert!(own.contains(&alice.ipv4()) && own.contains(&alice.ipv6()), "{own}");
    server.cli(&["rename", &names[1], "by-id"]).success("rename by id");
    server.cli(&["rename", &names[2], "by-address"]).success("rename by address");
}

fn one_name() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let first = Node::start(&net, &net.machine("alice", Nat::None), &server);
    let host = net.machine("alice2", Nat::None);
    let mut second = Node::new(&net, &host);
    second.call_itself("alice");
    second.up(&server.join());
    let status = second.wait_connected();
    let names = [text(&first.status().unwrap(), "/self/name"), text(&status, "/self/name")];
    assert_ne!(names[0], names[1], "the server keeps names apart");
    assert_ne!(first.ipv4(), second.ipv4());
    ping::assert_answers(&second.host, &first.ipv4());
}

/// The server listens on wildcard sockets; nodes know it by its second address only, and their
/// NATs let nothing in that comes from the first.
fn several_addresses() {
    let net = Net::new();
    let host = net.machine("server", Nat::None);
    host.ns.ip("addr add 203.0.113.150/24 dev eth0");
    let server = Server::start_at(
        &net,
        &host,
        &[&format!("0.0.0.0:{PORT}")],
        &[&format!("203.0.113.150:{PORT}")],
        "",
    );
    let [mut alice, mut bob] = [("alice", Nat::Symmetric), ("bob", Nat::PortRestricted)]
        .map(|(name, nat)| Node::start(&net, &net.machine(name, nat), &server));
    ping::assert_answers(&bob.host, &alice.ipv4());
    ping::assert_answers(&alice.host, &bob.ipv6());
    alice.wait_path("bob", "relay-udp", Duration::from_secs(5));
    bob.wait_path("alice", "relay-udp", Duration::from_secs(5));
    let status = alice.wait_connected();
    assert_eq!(text(&status, "/server/address"), format!("203.0.113.150:{PORT}"));
}
