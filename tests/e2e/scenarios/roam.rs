//! The network under a node changes while packets flow: how long it takes until they flow again.

use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::case::Case;
use crate::clock::now;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server};
use crate::ping::{self, Stream};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, run: fn()| Case::timed(format!("roam::{name}"), run);
    vec![
        case("another_address", another_address),
        case("the_default_route_moves", default_route_moves),
        case("an_interface_goes_and_comes_back", interface_goes),
        case("a_dead_uplink_is_left_when_its_route_goes", dead_uplink),
        case("one_router_reboots", || routers_reboot(&[0])),
        case("the_other_router_reboots", || routers_reboot(&[1])),
        case("both_routers_reboot", || routers_reboot(&[0, 1])),
        case("a_relayed_pair_survives_both_routers", relayed_routers_reboot),
        case("a_process_that_stood_still", stood_still),
        case("a_storm_of_interfaces_is_no_change", storm),
    ]
}

/// What can be seen on the machine itself costs so much: the figures are 50 ms and half a round
/// trip, and two pings more for the ping in flight at each end.
const SEEN_LIMIT: usize = 7;
/// What cannot be seen there: a second.
const UNSEEN_LIMIT: usize = 100;
const PATH_LIMIT: Duration = Duration::from_secs(5);

struct Pair {
    net: Net,
    _server: Server,
    alice: Node,
    bob: Node,
}

impl Pair {
    fn new(nat: Nat, kind: &str) -> Self {
        Self::with(nat, kind, |_, _| ())
    }

    /// `prepare` changes alice's machine before her node starts.
    fn with(nat: Nat, kind: &str, prepare: impl Fn(&Net, &Host)) -> Self {
        Self::configured(nat, kind, "", prepare)
    }

    /// The same with this configuration of both nodes.
    fn configured(nat: Nat, kind: &str, config: &str, prepare: impl Fn(&Net, &Host)) -> Self {
        let net = Net::new();
        let server = Server::start(&net, &net.machine("server", Nat::None));
        let [mut alice, mut bob] = ["alice", "bob"].map(|name| {
            let host = net.machine(name, nat);
            if name == "alice" {
                prepare(&net, &host);
            }
            let mut node = Node::with_config(&net, &host, name, config);
            node.up(&server.join());
            node.wait_connected();
            node
        });
        ping::assert_answers(&bob.host, &alice.ipv4());
        alice.wait_path("bob", kind, PATH_LIMIT);
        bob.wait_path("alice", kind, PATH_LIMIT);
        Self { net, _server: server, alice, bob }
    }

    /// Does `event` under a ping stream each way; tells how many pings of each were lost, the
    /// first one being alice's, and waits until both paths are of this kind again.
    fn lost_in(&mut self, kind: &str, event: impl FnOnce(&Self)) -> [usize; 2] {
        let out = Stream::start(&self.net, &self.alice.host, &self.bob.ipv4());
        let back = Stream::start(&self.net, &self.bob.host, &self.alice.ipv6());
        out.wait_for_more(100);
        back.wait_for_more(100);
        event(self);
        let changed = now();
        self.alice.wait_path("bob", kind, PATH_LIMIT);
        self.bob.wait_path("alice", kind, PATH_LIMIT);
        eprintln!("{kind} on both sides {:.0?} after the event", changed.elapsed());
        out.wait_for_more(100);
        back.wait_for_more(100);
        [out, back].map(|stream| stream.stop().lost.len())
    }
}

fn assert_lost(what: &str, lost: [usize; 2], limit: usize) {
    eprintln!("{what}: {} and {} pings at 10 ms lost, bound {limit}", lost[0], lost[1]);
    assert!(lost.iter().all(|lost| *lost <= limit), "{what}: lost {lost:?}, bound {limit}");
}

fn another_address() {
    let mut pair = Pair::with(Nat::PortRestricted, "direct", |_, host| {
        host.ns.sysctl("net/ipv4/conf/all/promote_secondaries", "1");
    });
    let lost = pair.lost_in("direct", |pair| {
        let host = &pair.alice.host;
        host.ns.ip("addr add 192.168.1.77/24 dev eth0");
        host.ns.ip(&format!("addr del {}/24 dev eth0", host.address));
    });
    assert_lost("another address", lost, SEEN_LIMIT);
}

/// A second way out, by the router of another home.
fn second_way_out(net: &Net, host: &Host) {
    let other = net.machine("neighbour", Nat::PortRestricted);
    net.second_home(host, other.router.as_ref().expect("a home"), "eth1");
    host.ns.ip("route replace default via 192.168.1.1 dev eth0 metric 100");
    host.ns.ip("route del default metric 0");
}

fn default_route_moves() {
    let mut pair = Pair::with(Nat::PortRestricted, "direct", second_way_out);
    let lost = pair.lost_in("direct", |pair| {
        pair.alice.host.ns.ip("route add default via 192.168.1.1 dev eth1 metric 50");
    });
    assert_lost("the default route moves", lost, SEEN_LIMIT);
}

fn interface_goes() {
    let mut pair = Pair::with(Nat::PortRestricted, "direct", |net, host| {
        second_way_out(net, host);
        host.ns.ip("route add default via 192.168.1.1 dev eth1 metric 200");
    });
    let lost = pair.lost_in("direct", |pair| {
        pair.alice.host.ns.ip("link set eth0 down");
    });
    assert_lost("an interface goes", lost, SEEN_LIMIT);
    let lost = pair.lost_in("direct", |pair| {
        pair.alice.host.ns.ip("link set eth0 up");
        pair.alice.host.ns.ip("route add default via 192.168.1.1 dev eth0 metric 100");
    });
    assert_lost("and comes back", lost, SEEN_LIMIT);
}

/// Two default routes of which the node is to use the preferred one only, whose router lets nothing
/// through any more. Nobody tells the machine, so it keeps sending there; what monitors its uplinks takes the route away, and then
/// everything comes back by the other one, from a state in which nothing has worked for a while.
fn dead_uplink() {
    let preferred_only = "all-uplinks = false\n";
    let mut pair = Pair::configured(Nat::PortRestricted, "direct", preferred_only, |net, host| {
        second_way_out(net, host);
        host.ns.ip("route add default via 192.168.1.1 dev eth1 metric 200");
    });
    let router = pair.alice.host.router.as_ref().expect("alice is at home");
    router.ns.nft(
        "table inet dead {\n chain forward { type filter hook forward priority -10; policy drop;\n \
         }\n}\n",
    );
    let alice_ipv4 = pair.alice.ipv4();
    ping::assert_silent(&pair.bob.host, &alice_ipv4);
    // Long enough that the server, the relay and the path have been given up.
    thread::sleep(Duration::from_secs(15));
    ping::assert_silent(&pair.bob.host, &alice_ipv4);

    pair.alice.host.ns.ip("route del default via 192.168.1.1 dev eth0 metric 100");
    let gone = now();
    let back = ping::first_answer(&pair.bob.host, &alice_ipv4, gone, PATH_LIMIT);
    eprintln!("answers by the other uplink {back:.0?} after the route went");
    pair.alice.wait_path("bob", "direct", PATH_LIMIT);
    pair.bob.wait_path("alice", "direct", PATH_LIMIT);
}

fn reboot(pair: &Pair, rebooted: &[usize], first_port: u16) {
    for side in rebooted {
        let node = [&pair.alice, &pair.bob][*side];
        let router = node.host.router.as_ref().expect("both are at home");
        router.reboot_with_ports(first_port + 1_000 * u16::try_from(*side).unwrap());
    }
}

fn routers_reboot(rebooted: &[usize]) {
    let mut pair = Pair::new(Nat::PortRestricted, "direct");
    for first_port in [30_000, 35_000] {
        let lost = pair.lost_in("direct", |pair| {
            reboot(pair, rebooted, first_port);
            // The nodes think for a while that the path is what it was.
            thread::sleep(Duration::from_millis(1_500));
        });
        assert_lost(&format!("routers of {rebooted:?} reboot"), lost, UNSEEN_LIMIT);
    }
}

fn relayed_routers_reboot() {
    let mut pair = Pair::new(Nat::Symmetric, "relay-udp");
    let lost = pair.lost_in("relay-udp", |pair| {
        for node in [&pair.alice, &pair.bob] {
            node.host.router.as_ref().expect("both are at home").forget_flows();
        }
        thread::sleep(Duration::from_millis(1_500));
    });
    assert_lost("both routers of a relayed pair reboot", lost, UNSEEN_LIMIT);
}

fn stood_still() {
    let mut pair = Pair::new(Nat::PortRestricted, "direct");
    let (alice_ipv4, bob_ipv4) = (pair.alice.ipv4(), pair.bob.ipv4());
    let stream = Stream::start(&pair.net, &pair.bob.host, &alice_ipv4);
    stream.wait_for_more(20);
    pair.alice.daemon().signal(Signal::SIGSTOP);
    thread::sleep(Duration::from_secs(20));
    pair.alice.daemon().signal(Signal::SIGCONT);
    let awake = now();
    let first = ping::first_answer(&pair.alice.host, &bob_ipv4, awake, AWAKE_LIMIT);
    stream.wait_for_more(1);
    let other = awake.elapsed();
    eprintln!("after 20 s of standing still: answers to one side {first:.0?}, other {other:.0?}");
    pair.alice.wait_path("bob", "direct", PATH_LIMIT);
    pair.bob.wait_path("alice", "direct", PATH_LIMIT);
    eprintln!("direct on both sides {:.0?} after it", awake.elapsed());
    assert!(other <= AWAKE_LIMIT, "answers again after {other:?}");
    let said = pair.alice.log().matches("awake again").count();
    assert_eq!(said, 1, "the node has noticed that it stood still");
}

/// A round trip and a tenth of a second, and the start of two processes that measure it.
const AWAKE_LIMIT: Duration = Duration::from_millis(300);

/// Interfaces that have nothing to do with us come and go, hundreds of them.
fn storm() {
    let mut pair = Pair::new(Nat::PortRestricted, "direct");
    let stream = Stream::start(&pair.net, &pair.bob.host, &pair.alice.ipv4());
    stream.wait_for_more(20);
    let ns = &pair.alice.host.ns;
    for number in 0..60 {
        ns.ip(&format!("link add guest{number} type veth peer name inner{number}"));
        ns.ip(&format!("addr add 10.200.{number}.1/32 dev guest{number}"));
        ns.ip(&format!("link set guest{number} up"));
        ns.ip(&format!("link del guest{number}"));
    }
    stream.wait_for_more(20);
    stream.stop_without_loss();
    for (node, peer) in [(&pair.alice, "bob"), (&pair.bob, "alice")] {
        assert_eq!(node.path_kind(peer), "direct");
        let moves = node.log().matches("path changed").count();
        assert!(moves <= 4, "{}: the path has changed {moves} times", node.name);
    }
    // A network that lies in the overlay's range is no change of the way out, and yet told.
    let overlay = pair.alice.ipv4();
    let (range, _) = overlay.rsplit_once('.').expect("an IPv4 address");
    let ns = &pair.alice.host.ns;
    ns.ip("link add wifi type veth peer name air");
    ns.ip(&format!("addr add {range}.201/29 dev wifi"));
    ns.ip("link set wifi up");
    let told = |status: &serde_json::Value| {
        let warnings = status["self"]["warnings"].to_string();
        warnings.contains(&format!("{range}.201/29 on wifi"))
    };
    pair.alice.wait_status("a warning of the collision", PATH_LIMIT, told);
    pair.alice.host.ns.ip("link del wifi");
    pair.alice.wait_status("no warning any more", PATH_LIMIT, |status| !told(status));
    assert_eq!(pair.alice.log().matches("201/29 on wifi").count(), 1, "it is told once");
}
