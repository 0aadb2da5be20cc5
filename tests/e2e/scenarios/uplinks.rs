//! A machine with two default routes, and the internet behind the preferred one goes dark while its
//! link and its route stay.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde_json::Value;

use crate::case::Case;
use crate::clock::{now, wait_for};
use crate::lab::{Host, Net, Router};
use crate::nat::Nat;
use crate::overlay::{Node, Server, find_peer};
use crate::ping::{self, Stream};
use crate::scenarios::failover::Connection;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, run: fn()| Case::timed(format!("uplinks::{name}"), run);
    vec![
        case("a_dark_uplink_costs_a_direct_peer_less_than_a_second", direct_peer),
        case("a_dark_uplink_costs_a_relayed_peer_a_moment", relayed_peer),
        case("a_node_starts_behind_a_dark_uplink", starts_in_the_dark),
        case("uplinks_come_and_go_and_tunnels_are_none", come_and_go),
    ]
}

/// What a silently dead uplink may cost.
pub(super) const OUTAGE_LIMIT: Duration = Duration::from_secs(1);
pub(super) const PATH_LIMIT: Duration = Duration::from_secs(10);
/// The preferred uplink has to work for a while before it is used again.
const RETURN_LIMIT: Duration = Duration::from_secs(40);
const PING_SPACING: Duration = Duration::from_millis(10);

/// A home with two routers: alice's own by `eth0`, preferred, and by `eth1` that of a second home,
/// which also has the address range 192.168.2.0/24.
pub(super) struct Home {
    pub(super) net: Net,
    pub(super) server: Server,
    pub(super) alice: Host,
    pub(super) second: Router,
}

impl Home {
    pub(super) fn new(nat: Nat) -> Self {
        let net = Net::new();
        let server = Server::start(&net, &net.machine("server", Nat::None));
        let alice = net.machine("alice", nat);
        let second = net.machine("neighbour", nat).router.expect("a home");
        add_uplink(&net, &alice, &second);
        Self { net, server, alice, second }
    }

    pub(super) fn node(&self, name: &str, nat: Nat) -> Node {
        Node::start(&self.net, &self.net.machine(name, nat), &self.server)
    }

    pub(super) fn first(&self) -> &Router {
        self.alice.router.as_ref().expect("alice is at home")
    }
}

/// Joins a machine at home to this router, too, by `eth1`; `eth0` is preferred.
pub(super) fn add_uplink(net: &Net, host: &Host, second: &Router) {
    net.second_home(host, second, "eth1");
    second.ns.ip("addr add 192.168.2.1/24 dev lan");
    host.ns.ip("addr flush dev eth1");
    host.ns.ip("addr add 192.168.2.210/24 dev eth1");
    host.ns.ip("route replace default via 192.168.1.1 dev eth0 metric 100");
    host.ns.ip("route del default metric 0");
    host.ns.ip("route add default via 192.168.2.1 dev eth1 metric 200");
}

/// Lets nothing through this router any more; its own addresses still answer.
pub(super) fn darken(router: &Router) {
    router.ns.nft(
        "table inet dark {\n chain forward { type filter hook forward priority -10; policy drop;\n \
         }\n}\n",
    );
}

fn lighten(router: &Router) {
    router.ns.nft("table inet dark\ndelete table inet dark\n");
}

/// Waits until the server was seen to answer by both uplinks.
pub(super) fn wait_both_answer(node: &mut Node) {
    node.wait_status("both uplinks answer", PATH_LIMIT, |status| {
        let uplinks = status["self"]["uplinks"].as_array().cloned().unwrap_or_default();
        uplinks.len() == 2 && uplinks.iter().all(|uplink| uplink["state"] == "answers")
    });
}

/// Waits until data to `peer` goes this way, by this uplink.
pub(super) fn wait_by(
    node: &mut Node,
    peer: &str,
    kind: &str,
    uplink: Option<&str>,
    limit: Duration,
) {
    let what = format!("{kind} to {peer} by {uplink:?}");
    node.wait_status(&what, limit, |status| {
        let path = &find_peer(status, peer)["path"];
        path["kind"] == kind && path["uplink"].as_str() == uplink
    });
}

/// Waits until a candidate of this kind has answered, on the way to `peer`.
pub(super) fn wait_answered(node: &Node, peer: &str, wanted: impl Fn(&Value) -> bool) {
    wait_for("an answer by the further uplink", PATH_LIMIT, || {
        let why = node.why(peer);
        let candidates = why["here"]["candidates"].as_array().cloned().unwrap_or_default();
        candidates.iter().any(|it| it["outcome"] == "answered" && wanted(it)).then_some(())
    });
}

/// The time between the first and the last ping that was lost.
pub(super) fn outage(stream: Stream) -> Duration {
    let lost = stream.stop().lost;
    match (lost.first(), lost.last()) {
        (Some(first), Some(last)) => PING_SPACING * (last - first + 1),
        _ => Duration::ZERO,
    }
}

fn direct_peer() {
    let home = Home::new(Nat::PortRestricted);
    let mut alice = Node::start(&home.net, &home.alice, &home.server);
    let mut bob = home.node("bob", Nat::PortRestricted);
    let beside = home.net.at_home("carol", &home.second, Ipv4Addr::new(192, 168, 1, 77));
    beside.ns.ip("addr add 192.168.2.77/24 dev eth0");
    let mut carol = Node::start(&home.net, &beside, &home.server);
    let (alice_ipv4, bob_ipv4, carol_ipv4) = (alice.ipv4(), bob.ipv4(), carol.ipv4());
    ping::assert_answers(&bob.host, &alice_ipv4);
    wait_by(&mut alice, "bob", "direct", None, PATH_LIMIT);
    bob.wait_path("alice", "direct", PATH_LIMIT);
    alice.wait_path("carol", "direct", PATH_LIMIT);
    carol.wait_path("alice", "direct", PATH_LIMIT);
    wait_both_answer(&mut alice);
    let uplink_of_alice = home.second.wan.to_string();
    wait_answered(&bob, "alice", |it| {
        it["kind"] == "uplink"
            && it["endpoint"].as_str().is_some_and(|at| at.starts_with(&uplink_of_alice))
    });

    let neighbour = Stream::start(&home.net, &alice.host, &carol_ipv4);
    let out = Stream::start(&home.net, &alice.host, &bob_ipv4);
    let back = Stream::start(&home.net, &bob.host, &alice_ipv4);
    let tcp = Connection::start(&alice.host, &bob.host, &bob_ipv4);
    out.wait_for_more(100);
    back.wait_for_more(100);
    darken(home.first());
    let dark = now();
    wait_by(&mut alice, "bob", "direct", Some("eth1"), PATH_LIMIT);
    eprintln!("direct by the second uplink {:.0?} after the first went dark", dark.elapsed());
    alice.wait_status("the server by eth1", PATH_LIMIT, |status| {
        status["server"]["state"] == "connected" && status["server"]["uplink"] == "eth1"
    });
    eprintln!("server by the second uplink {:.0?} after it", dark.elapsed());
    out.wait_for_more(100);
    back.wait_for_more(100);
    let outages = [outage(out), outage(back)];
    let silent = tcp.finish();
    eprintln!("a dark uplink, direct peer: no pings for {outages:?}, TCP silent for {silent:.0?}");
    assert!(outages.iter().all(|it| *it <= OUTAGE_LIMIT), "{outages:?}");
    // TCP sends again after 0.2, 0.6 and 1.4 s.
    assert!(silent <= 2 * OUTAGE_LIMIT, "{silent:?}");
    let history = alice.cli(&["history", "bob"]).success("history");
    assert!(history.contains("by eth1"), "{history}");

    // And back, when it works again.
    let out = Stream::start(&home.net, &alice.host, &bob_ipv4);
    let back = Stream::start(&home.net, &bob.host, &alice_ipv4);
    let tcp = Connection::start(&bob.host, &alice.host, &alice_ipv4);
    out.wait_for_more(20);
    lighten(home.first());
    let light = now();
    wait_by(&mut alice, "bob", "direct", None, RETURN_LIMIT);
    eprintln!("direct by the preferred uplink {:.1?} after it worked again", light.elapsed());
    let first = home.first().wan.to_string();
    bob.wait_status("data goes to the preferred uplink", RETURN_LIMIT, |status| {
        let remote = &find_peer(status, "alice")["path"]["remote"];
        remote.as_str().is_some_and(|remote| remote.starts_with(&first))
    });
    alice.wait_status("the server by the preferred one", RETURN_LIMIT, |status| {
        status["server"]["state"] == "connected" && status["server"]["uplink"].is_null()
    });
    out.wait_for_more(50);
    out.stop_without_loss();
    back.stop_without_loss();
    tcp.finish();
    neighbour.stop_without_loss();
}

fn relayed_peer() {
    let home = Home::new(Nat::Symmetric);
    let mut alice = Node::start(&home.net, &home.alice, &home.server);
    let mut bob = home.node("bob", Nat::Symmetric);
    let (alice_ipv4, bob_ipv4) = (alice.ipv4(), bob.ipv4());
    ping::assert_answers(&bob.host, &alice_ipv4);
    wait_by(&mut alice, "bob", "relay-udp", None, PATH_LIMIT);
    bob.wait_path("alice", "relay-udp", PATH_LIMIT);
    wait_both_answer(&mut alice);
    let back = Stream::start(&home.net, &bob.host, &alice_ipv4);
    let tcp = Connection::start(&alice.host, &bob.host, &bob_ipv4);
    back.wait_for_more(100);
    darken(home.first());
    wait_by(&mut alice, "bob", "relay-udp", Some("eth1"), PATH_LIMIT);
    back.wait_for_more(50);
    let (outage, silent) = (outage(back), tcp.finish());
    eprintln!("a dark uplink, relayed peer: no pings for {outage:?}, TCP silent for {silent:.0?}");
    let limit = 3 * OUTAGE_LIMIT;
    assert!(outage <= limit && silent <= limit, "{outage:?} {silent:?}");
    let back = Stream::start(&home.net, &bob.host, &alice_ipv4);
    lighten(home.first());
    wait_by(&mut alice, "bob", "relay-udp", None, RETURN_LIMIT);
    back.wait_for_more(50);
    let lost = back.stop().lost.len();
    eprintln!("the relay by the preferred uplink again: {lost} pings lost");
    assert!(lost <= 5, "{lost} pings lost");
}

fn starts_in_the_dark() {
    let home = Home::new(Nat::PortRestricted);
    let mut bob = home.node("bob", Nat::PortRestricted);
    darken(home.first());
    let mut alice = Node::start(&home.net, &home.alice, &home.server);
    eprintln!("connected {:.1?} after the start", alice.started.elapsed());
    let (alice_ipv4, started) = (alice.ipv4(), alice.started);
    ping::first_answer(&bob.host, &alice_ipv4, started, PATH_LIMIT);
    wait_by(&mut alice, "bob", "direct", Some("eth1"), PATH_LIMIT);
    bob.wait_path("alice", "direct", PATH_LIMIT);
    lighten(home.first());
    wait_by(&mut alice, "bob", "direct", None, RETURN_LIMIT);
}

fn come_and_go() {
    let home = Home::new(Nat::PortRestricted);
    let ns = &home.alice.ns;
    ns.ip("route del default via 192.168.2.1 dev eth1 metric 200");
    let mut alice = Node::start(&home.net, &home.alice, &home.server);
    let mut bob = home.node("bob", Nat::PortRestricted);
    let (alice_ipv4, bob_ipv4) = (alice.ipv4(), bob.ipv4());
    ping::assert_answers(&bob.host, &alice_ipv4);
    alice.wait_path("bob", "direct", PATH_LIMIT);
    bob.wait_path("alice", "direct", PATH_LIMIT);
    let uplinks = |status: &Value| -> Vec<String> {
        let uplinks = status["self"]["uplinks"].as_array().cloned().unwrap_or_default();
        let name = |it: &Value| it["interface"].as_str().unwrap_or_default().to_owned();
        uplinks.iter().map(name).collect()
    };
    assert!(uplinks(&alice.status().unwrap()).is_empty(), "there is one");

    let stream = Stream::start(&home.net, &bob.host, &alice_ipv4);
    stream.wait_for_more(20);
    ns.ip("tuntap add vpn0 mode tun");
    ns.ip("addr add 10.99.0.1/24 dev vpn0");
    ns.ip("link set vpn0 up");
    ns.ip("route add default dev vpn0 metric 150");
    ns.ip("route add default via 192.168.2.1 dev eth1 metric 200");
    wait_both_answer(&mut alice);
    assert_eq!(uplinks(&alice.status().unwrap()), ["eth0", "eth1"], "no tunnel of others");
    let netcheck = alice.cli(&["netcheck", "--json"]).success("netcheck");
    let netcheck = crate::overlay::parse(&netcheck);
    let probes = netcheck["uplinks"].as_array().cloned().unwrap_or_default();
    assert_eq!(probes.len(), 2, "{netcheck}");
    let seen: Vec<String> = probes.iter().map(|it| it["endpoint"].to_string()).collect();
    let wans = [home.first().wan, home.second.wan];
    for (seen, wan) in seen.iter().zip(wans) {
        assert!(seen.contains(&wan.to_string()), "{netcheck}");
    }
    wait_answered(&bob, "alice", |it| it["kind"] == "uplink");
    ns.ip("route del default via 192.168.2.1 dev eth1 metric 200");
    alice.wait_status("one uplink is no choice", PATH_LIMIT, |status| uplinks(status).is_empty());
    stream.wait_for_more(20);
    stream.stop_without_loss();
    ns.ip("link del vpn0");
    let moves = alice.log().matches("path changed").count();
    assert!(moves <= 4, "the path has changed {moves} times:\n{}", alice.log());

    // The second one becomes the preferred one, and the only one, under traffic: what was proved by it
    // stays, and carries the data until the main socket has a path of its own.
    ns.ip("route add default via 192.168.2.1 dev eth1 metric 200");
    wait_both_answer(&mut alice);
    wait_answered(&bob, "alice", |it| it["kind"] == "uplink");
    let stream = Stream::start(&home.net, &alice.host, &bob_ipv4);
    stream.wait_for_more(100);
    ns.ip("route del default via 192.168.1.1 dev eth0 metric 100");
    stream.wait_for_more(100);
    wait_by(&mut alice, "bob", "direct", None, RETURN_LIMIT);
    let lost = stream.stop().lost.len();
    eprintln!("the preferred default route goes: {lost} pings lost");
    let history = alice.cli(&["history", "bob"]).success("history");
    assert!(history.contains("by eth1"), "{history}");
    assert!(lost <= 3, "{lost} pings lost");
}
