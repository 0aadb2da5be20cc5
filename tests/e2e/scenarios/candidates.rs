//! Which addresses a node announces, and by which of its networks it answers.

use std::time::Duration;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server, find_peer};
use crate::ping::{self, Stream};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, run: fn()| Case::new(format!("candidates::{name}"), run);
    vec![
        case("only_useful_addresses_are_announced", useful_addresses),
        case("of_many_addresses_sixteen_are_announced", many_addresses),
        case("two_overlay_networks_on_one_host_stay_apart", two_networks),
        case("an_answer_leaves_by_the_address_that_was_asked", answer_from_asked_address),
    ]
}

const PATH_LIMIT: Duration = Duration::from_secs(5);

/// The endpoints that `name` has announced, as `peer` keeps them for a start without the server,
/// once there are `count` of them.
fn announced(peer: &Node, name: &str, count: usize) -> Vec<String> {
    let file = peer.dir.join("state/netmap.json");
    let read = || -> Option<Vec<String>> {
        let netmap = crate::overlay::parse(&std::fs::read_to_string(&file).ok()?);
        let peers = netmap["peers"].as_object()?;
        let info = peers.values().find(|peer| peer["name"] == name)?;
        let all = info["candidates"].as_array()?;
        all.iter().map(|it| it["endpoint"].as_str().map(str::to_owned)).collect()
    };
    let what = format!("{name} has announced {count} endpoints, not {:?}", read());
    wait_for(&what, PATH_LIMIT, || read().filter(|all| all.len() == count)).0
}

/// What stands on a machine with containers, virtual machines and other tunnels.
fn clutter(host: &Host) {
    let ns = &host.ns;
    for words in [
        // A bridge of containers, with one in it.
        "link add docker0 type bridge",
        "addr add 172.17.0.1/16 dev docker0",
        "link set docker0 up",
        "link add veth1 type veth peer name inside1",
        "link set veth1 master docker0 up",
        "link set inside1 up",
        // A bridge without anything.
        "link add virbr0 type bridge",
        "addr add 192.168.122.1/24 dev virbr0",
        "link set virbr0 up",
        // The one address of a container network.
        "link add cilium0 type veth peer name cilium1",
        "addr add 10.0.0.77/32 dev cilium0",
        "link set cilium0 up",
        "link set cilium1 up",
        // Another VPN, and one more with Ethernet in it.
        "tuntap add vpn0 mode tun",
        "addr add 10.8.0.6/24 dev vpn0",
        "addr add fd00:8::6/64 dev vpn0 nodad",
        "link set vpn0 up",
        "tuntap add vpn1 mode tap",
        "addr add 10.147.17.9/24 dev vpn1",
        "link set vpn1 up",
    ] {
        ns.ip(words);
    }
}

fn useful_addresses() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = net.machine("alice", Nat::PortRestricted);
    clutter(&alice);
    let bob = net.at_home("bob", alice.router.as_ref().unwrap(), [192, 168, 1, 99].into());
    let mut left = Node::start(&net, &alice, &server);
    let mut right = Node::start(&net, &bob, &server);
    ping::assert_answers(&bob, &left.ipv4());
    right.wait_path("alice", "direct", PATH_LIMIT);
    left.wait_path("bob", "direct", PATH_LIMIT);
    let candidates = announced(&right, "alice", 2);
    let home = alice.router.as_ref().unwrap();
    let allowed = [format!("{}:", alice.address), format!("{}:", home.wan)];
    for candidate in &candidates {
        assert!(allowed.iter().any(|it| candidate.starts_with(it)), "{candidate}: {candidates:?}");
    }
}

fn many_addresses() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = net.machine("alice", Nat::PortRestricted);
    for number in 0..40 {
        alice.ns.ip(&format!("addr add 10.66.{number}.1/24 dev eth0"));
    }
    let bob = net.at_home("bob", alice.router.as_ref().unwrap(), [192, 168, 1, 99].into());
    let left = Node::start(&net, &alice, &server);
    let mut right = Node::start(&net, &bob, &server);
    ping::assert_answers(&bob, &left.ipv4());
    right.wait_path("alice", "direct", PATH_LIMIT);
    // Sixteen of the machine, one of its router.
    announced(&right, "alice", 17);
}

/// Two servers, and two machines that are in both of their networks: each network's packets stay
/// out of the other one.
fn two_networks() {
    let net = Net::new();
    let host = net.machine("server", Nat::None);
    let other = net.machine("other", Nat::None);
    let first = Server::start(&net, &host);
    let second = {
        let address = format!("{}:{}", other.address, crate::overlay::PORT);
        let mut server = Server::prepare(&net, &other, "second", &[&address], &[&address], "");
        server.run();
        server.wait_ready();
        server
    };
    let hosts = ["alice", "bob"].map(|name| net.machine(name, Nat::PortRestricted));
    let mut nodes = Vec::new();
    for (number, server) in [&first, &second].into_iter().enumerate() {
        for host in &hosts {
            let name = format!("{}{number}", host.name);
            let mut node = Node::with_config(&net, host, &name, "");
            node.add_args(&["--interface", &format!("overlay{number}")]);
            node.up(&server.join());
            node.wait_connected();
            nodes.push(node);
        }
    }
    for number in 0..2 {
        let (alice, bob) = (number * 2, number * 2 + 1);
        let peer = format!("bob{number}");
        let address = nodes[bob].ipv4();
        ping::assert_answers(&hosts[0], &address);
        nodes[alice].wait_path(&peer, "direct", PATH_LIMIT);
        for (from, name) in [(bob, format!("alice{number}")), (alice, peer)] {
            let candidates = announced(&nodes[from], &name, 2);
            let foreign: Vec<&String> = candidates
                .iter()
                .filter(|it| !it.starts_with("192.168.1.") && !it.starts_with("203.0.113."))
                .collect();
            assert!(foreign.is_empty(), "{name} announces addresses of an overlay: {foreign:?}");
        }
        let stream = Stream::start(&net, &hosts[0], &address);
        stream.wait_for_more(20);
        stream.stop_without_loss();
    }
}

/// A public machine with two addresses on two cards, and a peer that may talk to the second one
/// only: whoever answers from the first is not understood.
fn answer_from_asked_address() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = net.machine("alice", Nat::None);
    let second = net.second_uplink(&alice, "eth1");
    let bob = net.machine("bob", Nat::PortRestricted);
    let first = alice.address;
    bob.router.as_ref().unwrap().ns.nft(&format!(
        "table ip wall {{\n chain forward {{ type filter hook forward priority -5; policy accept;\n  \
         meta l4proto udp ip daddr {first} drop\n  meta l4proto udp ip saddr {first} drop\n }}\n}}\n"
    ));
    let left = Node::start(&net, &alice, &server);
    let mut right = Node::start(&net, &bob, &server);
    ping::assert_answers(&bob, &left.ipv4());
    right.wait_path("alice", "direct", PATH_LIMIT);
    let status = right.status().unwrap();
    let remote = find_peer(&status, "alice")["path"]["remote"].as_str().unwrap().to_owned();
    assert!(remote.starts_with(&format!("{second}:")), "by the second card: {remote}");
    let stream = Stream::start(&net, &bob, &left.ipv4());
    stream.wait_for_more(100);
    stream.stop_without_loss();
}
