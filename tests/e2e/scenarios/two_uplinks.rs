//! Several uplinks in other places than one home with IPv4: with IPv6, with one family by each, with a
//! strict reverse path filter, and on both sides.

use serde_json::Value;

use crate::case::Case;
use crate::lab::{Host, Net, Router};
use crate::nat::Nat;
use crate::overlay::{Node, Server, find_peer};
use crate::ping::{self, Stream};
use crate::scenarios::uplinks::{
    Home, OUTAGE_LIMIT, PATH_LIMIT, add_uplink, darken, outage, wait_answered, wait_both_answer,
    wait_by,
};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, run: fn()| Case::timed(format!("two_uplinks::{name}"), run);
    vec![
        case("of_ipv6_stand_in_for_each_other", ipv6),
        case("of_one_family_each_stand_in_for_each_other", mixed),
        case("behind_a_strict_filter_are_told_of_and_harm_nobody", strict_filter),
        case("on_both_sides_go_dark_and_lose_a_route", both_sides),
    ]
}

/// The port of servers with several addresses.
const PORT: u16 = 443;

/// A server with IPv6, and with IPv4 if that is wanted.
fn server_with_ipv6(net: &Net, ipv4: bool) -> Server {
    let host = net.machine("server", Nat::None);
    let ipv6 = net.add_ipv6(&host);
    let ipv4 = ipv4.then_some(host.address);
    let addresses = crate::topology::server_endpoints(ipv4, ipv6, PORT);
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    Server::start_at(net, &host, &addresses, &addresses, "")
}

/// A machine at home, and the router of a second home.
fn two_homes(net: &Net, name: &str, nat: Nat) -> (Host, Router) {
    let host = net.machine(name, nat);
    let second = net.machine(&format!("{name}-second"), nat).router.expect("a home");
    (host, second)
}

/// The address that data to `peer` goes to.
fn remote(node: &Node, peer: &str) -> String {
    let status = node.status().expect("the node runs");
    find_peer(&status, peer)["path"]["remote"].as_str().unwrap_or_default().to_owned()
}

fn first(host: &Host) -> &Router {
    host.router.as_ref().expect("it is at home")
}

fn ipv6() {
    let net = Net::new();
    let server = server_with_ipv6(&net, false);
    // No pair is joined by IPv4.
    let (host, second) = two_homes(&net, "alice", Nat::Symmetric);
    net.second_home(&host, &second, "eth1");
    host.ns.ip("-4 addr flush dev eth1");
    net.add_ipv6_by(&host, first(&host), "eth0", 100);
    net.add_ipv6_by(&host, &second, "eth1", 200);
    let peer = net.machine("bob", Nat::Symmetric);
    net.add_ipv6(&peer);
    let mut alice = Node::start(&net, &host, &server);
    let mut bob = Node::start(&net, &peer, &server);
    let (alice_ipv4, bob_ipv4) = (alice.ipv4(), bob.ipv4());
    ping::assert_answers(&bob.host, &alice_ipv4);
    wait_by(&mut alice, "bob", "direct", None, PATH_LIMIT);
    bob.wait_path("alice", "direct", PATH_LIMIT);
    wait_both_answer(&mut alice);
    wait_answered(&bob, "alice", |it| it["kind"] == "uplink");

    let out = Stream::start(&net, &alice.host, &bob_ipv4);
    let back = Stream::start(&net, &bob.host, &alice_ipv4);
    out.wait_for_more(100);
    darken(first(&host));
    wait_by(&mut alice, "bob", "direct", Some("eth1"), PATH_LIMIT);
    alice.wait_status("the server by eth1", PATH_LIMIT, |status| {
        status["server"]["state"] == "connected" && status["server"]["uplink"] == "eth1"
    });
    out.wait_for_more(50);
    assert!(remote(&alice, "bob").starts_with("[2001:db8:"), "{}", remote(&alice, "bob"));
    let outages = [outage(out), outage(back)];
    eprintln!("a dark uplink of IPv6: no pings for {outages:?}");
    assert!(outages.iter().all(|it| *it <= OUTAGE_LIMIT), "{outages:?}");
}

fn mixed() {
    let net = Net::new();
    let server = server_with_ipv6(&net, true);
    let (host, second) = two_homes(&net, "alice", Nat::PortRestricted);
    net.second_home(&host, &second, "eth1");
    host.ns.ip("-4 addr flush dev eth1");
    net.add_ipv6_by(&host, &second, "eth1", 0);
    let peer = net.machine("bob", Nat::PortRestricted);
    net.add_ipv6(&peer);
    let mut alice = Node::start(&net, &host, &server);
    let mut bob = Node::start(&net, &peer, &server);
    let bob_ipv4 = bob.ipv4();
    ping::assert_answers(&alice.host, &bob_ipv4);
    wait_by(&mut alice, "bob", "direct", None, PATH_LIMIT);
    bob.wait_path("alice", "direct", PATH_LIMIT);
    let answered = |family: &'static str| {
        move |it: &Value| {
            it["endpoint"].as_str().is_some_and(|at| at.starts_with('[') == (family == "ipv6"))
        }
    };
    wait_answered(&alice, "bob", answered("ipv4"));
    wait_answered(&alice, "bob", answered("ipv6"));

    let stream = Stream::start(&net, &alice.host, &bob_ipv4);
    stream.wait_for_more(100);
    let by_ipv6 = remote(&alice, "bob").starts_with('[');
    darken(if by_ipv6 { &second } else { first(&host) });
    alice.wait_status("the path by the other family", PATH_LIMIT, |status| {
        let path = &find_peer(status, "bob")["path"];
        let remote = path["remote"].as_str().unwrap_or_default();
        path["kind"] == "direct" && remote.starts_with('[') != by_ipv6
    });
    alice.wait_status("the server by the other family", PATH_LIMIT, |status| {
        let address = status["server"]["address"].as_str().unwrap_or_default();
        status["server"]["state"] == "connected" && address.starts_with('[') != by_ipv6
    });
    stream.wait_for_more(50);
    let outage = outage(stream);
    eprintln!("IPv6 in use: {by_ipv6}; its uplink goes dark: no pings for {outage:?}");
    assert!(outage <= OUTAGE_LIMIT, "{outage:?}");
}

fn strict_filter() {
    let home = Home::new(Nat::PortRestricted);
    for interface in ["all", "eth0", "eth1"] {
        home.alice.ns.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "1");
    }
    let mut alice = Node::start(&home.net, &home.alice, &home.server);
    let mut bob = home.node("bob", Nat::PortRestricted);
    let alice_ipv4 = alice.ipv4();
    ping::assert_answers(&bob.host, &alice_ipv4);
    wait_by(&mut alice, "bob", "direct", None, PATH_LIMIT);
    bob.wait_path("alice", "direct", PATH_LIMIT);
    let stream = Stream::start(&home.net, &bob.host, &alice_ipv4);
    let remedy = "net.ipv4.conf.eth1.rp_filter=2";
    let status = alice.wait_status("a warning with its remedy", PATH_LIMIT, |status| {
        let warnings = status["self"]["warnings"].as_array().cloned().unwrap_or_default();
        warnings.iter().any(|it| it.as_str().is_some_and(|it| it.contains(remedy)))
    });
    let states: Vec<String> = status["self"]["uplinks"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|it| it["state"].to_string())
        .collect();
    assert_eq!(states, ["\"answers\"", "\"silent\""], "{status}");
    let netcheck = crate::overlay::parse(&alice.cli(&["netcheck", "--json"]).success("netcheck"));
    let strict: Vec<bool> = netcheck["uplinks"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|it| it["strict_filter"] == true)
        .collect();
    assert_eq!(strict, [false, true], "{netcheck}");
    stream.wait_for_more(20);
    stream.stop_without_loss();

    // What the warning asks for is enough.
    alice.host.ns.sysctl("net/ipv4/conf/eth1/rp_filter", "2");
    let stream = Stream::start(&home.net, &alice.host, &bob.ipv4());
    stream.wait_for_more(20);
    darken(home.first());
    wait_by(&mut alice, "bob", "direct", Some("eth1"), PATH_LIMIT);
    stream.wait_for_more(50);
    let outage = outage(stream);
    eprintln!("a dark uplink after the filter was loosened: no pings for {outage:?}");
    // Nothing was proved by it before.
    assert!(outage <= 3 * OUTAGE_LIMIT, "{outage:?}");
    let status = alice.status().expect("it runs");
    let warnings = status["self"]["warnings"].to_string();
    assert!(!warnings.contains(remedy), "{warnings}");
}

fn both_sides() {
    let home = Home::new(Nat::PortRestricted);
    let (bobs, bobs_second) = two_homes(&home.net, "bob", Nat::PortRestricted);
    add_uplink(&home.net, &bobs, &bobs_second);
    let mut alice = Node::start(&home.net, &home.alice, &home.server);
    let mut bob = Node::start(&home.net, &bobs, &home.server);
    let (alice_ipv4, bob_ipv4) = (alice.ipv4(), bob.ipv4());
    ping::assert_answers(&bob.host, &alice_ipv4);
    wait_by(&mut alice, "bob", "direct", None, PATH_LIMIT);
    wait_by(&mut bob, "alice", "direct", None, PATH_LIMIT);
    for (node, peer) in [(&mut alice, "bob"), (&mut bob, "alice")] {
        wait_both_answer(node);
        wait_answered(node, peer, |it| it["kind"] == "uplink");
    }
    let out = Stream::start(&home.net, &alice.host, &bob_ipv4);
    let back = Stream::start(&home.net, &bob.host, &alice_ipv4);
    out.wait_for_more(100);
    back.wait_for_more(100);
    darken(home.first());
    darken(first(&bobs));
    wait_by(&mut alice, "bob", "direct", Some("eth1"), PATH_LIMIT);
    wait_by(&mut bob, "alice", "direct", Some("eth1"), PATH_LIMIT);
    out.wait_for_more(50);
    back.wait_for_more(50);
    let outages = [outage(out), outage(back)];
    eprintln!("both preferred uplinks go dark: no pings for {outages:?}");
    assert!(outages.iter().all(|it| *it <= OUTAGE_LIMIT), "{outages:?}");
    let uplink_of_bob = bobs_second.wan.to_string();
    assert!(remote(&alice, "bob").starts_with(&uplink_of_bob), "{}", remote(&alice, "bob"));

    // The dark one loses its route: the other one is the preferred one, and no further one any more.
    alice.wait_status("the server by eth1", PATH_LIMIT, |status| {
        status["server"]["state"] == "connected" && status["server"]["uplink"] == "eth1"
    });
    let stream = Stream::start(&home.net, &bob.host, &alice_ipv4);
    stream.wait_for_more(20);
    alice.host.ns.ip("route del default via 192.168.1.1 dev eth0 metric 100");
    alice.wait_status("the server by the only uplink", PATH_LIMIT, |status| {
        status["server"]["state"] == "connected"
            && status["server"]["uplink"].is_null()
            && status["self"]["uplinks"].as_array().is_none_or(Vec::is_empty)
    });
    stream.wait_for_more(50);
    let lost = stream.stop().lost.len();
    assert!(lost <= 3, "{lost} pings lost");
}
