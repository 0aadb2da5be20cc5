//! Hard NATs on the kernel's own: what is found by chance and what it costs, a forwarded port, a
//! pair that a router has spoiled.

use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::case::Case;
use crate::clock::{holds_for, wait_for};
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server};
use crate::ping;

/// Pairs that are tried side by side, each in namespaces of its own.
const PAIRS: usize = 4;
/// Of those, so many may take longer or fail: each one is direct in 12 s with 96 %.
const UNLUCKY: usize = 1;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::timed("hard::symmetric_finds_port_restricted_by_chance", || {
            by_chance(Nat::Symmetric, Nat::PortRestricted);
        }),
        Case::timed("hard::port_restricted_finds_symmetric_by_chance", || {
            by_chance(Nat::PortRestricted, Nat::Symmetric);
        }),
        Case::new("hard::switched_off_or_hopeless_pairs_stay_on_the_relay", left_alone),
        Case::timed("hard::a_spoiled_pair_moves_to_a_fresh_port", spoiled),
        Case::timed("hard::a_port_forwarded_by_hand_is_found_behind_a_symmetric_nat", forwarded),
    ]
}

/// Two nodes in one network, the second just started.
struct Pair {
    net: Net,
    _server: Server,
    hosts: [Host; 2],
    nodes: [Node; 2],
}

impl Pair {
    fn start(a: Nat, b: Nat, config: &str) -> Self {
        let net = Net::new();
        let server = Server::start(&net, &net.machine("server", Nat::None));
        let hosts = [net.machine("alice", a), net.machine("bob", b)];
        Self::up(net, server, hosts, config)
    }

    fn up(net: Net, server: Server, hosts: [Host; 2], config: &str) -> Self {
        let mut nodes = hosts.each_ref().map(|host| {
            let mut node = Node::with_config(&net, host, &host.name, config);
            node.up(&server.join());
            node
        });
        for node in &mut nodes {
            node.wait_connected();
        }
        Self { net, _server: server, hosts, nodes }
    }

    fn kinds(&self) -> [String; 2] {
        [self.nodes[0].path_kind("bob"), self.nodes[1].path_kind("alice")]
    }

    fn is_direct(&self) -> bool {
        self.kinds().iter().all(|kind| kind == "direct")
    }

    /// Waits from the start of the second node; tells how long it took.
    fn direct_within(&self, limit: Duration) -> Option<Duration> {
        while self.nodes[1].started.elapsed() < limit {
            if self.is_direct() {
                return Some(self.nodes[1].started.elapsed());
            }
            thread::sleep(Duration::from_millis(50));
        }
        None
    }

    /// What the costly ways of a node have cost, by word.
    fn cost(&self, node: usize, word: &str) -> u64 {
        let status: Value = self.nodes[node].status().expect("the node runs");
        let cost = &status["self"]["punching"][word];
        cost.as_u64().unwrap_or_else(|| panic!("{word} is counted: {status}"))
    }

    /// Entries of UDP flows in the table of a node's router.
    fn router_entries(&self, node: usize) -> usize {
        let router = self.hosts[node].router.as_ref().expect("it has a router");
        let list = router.ns.run("conntrack", &["-L", "-p", "udp"]).success("conntrack -L");
        list.lines().filter(|line| line.starts_with("udp")).count()
    }
}

fn by_chance(a: Nat, b: Nat) {
    let (hard, easy) = if a == Nat::Symmetric { (0, 1) } else { (1, 0) };
    let pairs: Vec<Option<Duration>> = thread::scope(|scope| {
        let pairs: Vec<_> = (0..PAIRS).map(|_| scope.spawn(|| chance(a, b, hard, easy))).collect();
        pairs.into_iter().map(|pair| pair.join().expect("the pair behaves")).collect()
    });
    let late = pairs.iter().filter(|took| took.is_none()).count();
    eprintln!("{a} with {b}: direct after {pairs:.1?}");
    assert!(late <= UNLUCKY, "{late} of {PAIRS} pairs were not direct in time");
}

fn chance(a: Nat, b: Nat, hard: usize, easy: usize) -> Option<Duration> {
    let pair = Pair::start(a, b, "");
    let alice = pair.nodes[0].ipv4();
    ping::assert_answers(&pair.hosts[1], &alice);
    assert_eq!(pair.kinds(), ["relay-udp", "relay-udp"], "the relay carries data at once");
    let stream = ping::Stream::start(&pair.net, &pair.hosts[1], &alice);
    let took = pair.direct_within(CHANCE_LIMIT);

    let (sockets, probes) = (pair.cost(hard, "sockets"), pair.cost(easy, "probes"));
    let entries = [pair.router_entries(hard), pair.router_entries(easy)];
    eprintln!(
        "{a} with {b}: direct after {took:.1?}, {sockets} sockets, {probes} probes; entries in the \
         NATs of the two sides: {entries:?}"
    );
    assert!(sockets <= 256 && probes <= 1024, "{sockets} sockets, {probes} probes");
    assert!(entries[0] <= 2 * 256 + FEW_ENTRIES, "{entries:?} entries");
    assert!(entries[1] <= 1024 + FEW_ENTRIES, "{entries:?} entries");
    if took.is_some() {
        assert_eq!((pair.cost(hard, "found"), pair.cost(easy, "found")), (1, 1));
        holds_for("the direct path", Duration::from_millis(500), || pair.is_direct());
        assert!((1..=3).contains(&pair.cost(hard, "sockets_open")), "the others are closed");
        assert_eq!(pair.cost(easy, "probes"), probes, "given up on success");
        stream.wait_for_more(5);
        stream.stop_without_loss();
    }
    took
}

fn left_alone() {
    let off = "birthday-probing = false\n";
    thread::scope(|scope| {
        scope.spawn(|| relayed(Nat::Symmetric, Nat::PortRestricted, off));
        scope.spawn(|| relayed(Nat::Symmetric, Nat::Symmetric, ""));
    });
}

fn relayed(a: Nat, b: Nat, config: &str) {
    let pair = Pair::start(a, b, config);
    let alice = pair.nodes[0].ipv4();
    let ping = || ping::assert_answers(&pair.hosts[1], &alice);
    ping();
    while pair.nodes[1].started.elapsed() < Duration::from_secs(6) {
        assert_eq!(pair.kinds(), ["relay-udp", "relay-udp"], "{a} with {b}");
        thread::sleep(Duration::from_millis(100));
    }
    ping();
    for node in 0..2 {
        let costs = ["birthday_runs", "sockets", "probes"].map(|word| pair.cost(node, word));
        assert_eq!(costs, [0, 0, 0], "{a} with {b}");
        assert!(pair.router_entries(node) <= FEW_ENTRIES, "{a} with {b}: no flood");
    }
}

/// A stranger's datagram to the endpoint that a node is about to use gets to its router first.
fn spoiled() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let hosts = ["alice", "bob"].map(|name| net.machine(name, Nat::OpenInput));
    let ports: [u16; 2] = [41_001, 41_002];
    let wans = hosts.each_ref().map(|host| host.router.as_ref().unwrap().wan);
    let nodes = [0, 1].map(|i: usize| {
        let config = format!("listen-port = {}\n", ports[i]);
        Node::with_config(&net, &hosts[i], &hosts[i].name, &config)
    });
    for i in 0..2 {
        // From the very endpoint that the other node has outside.
        let other = hosts[1 - i].router.as_ref().unwrap();
        let stranger = other.ns.enter(|| std::net::UdpSocket::bind((wans[1 - i], ports[1 - i])));
        let stranger = stranger.unwrap();
        stranger.send_to(b"spoiled", (wans[i], ports[i])).unwrap();
    }
    let mut pair = Pair { net, _server: server, hosts, nodes };
    let joins = [pair._server.join(), pair._server.join()];
    for (node, join) in pair.nodes.iter_mut().zip(&joins) {
        node.up(join);
    }
    let took = pair.direct_within(Duration::from_secs(10)).expect("a fresh port helps");
    let fresh = pair.cost(0, "fresh_ports") + pair.cost(1, "fresh_ports");
    eprintln!("spoiled on both sides: direct after {took:.1?}, {fresh} tries of a fresh port");
    assert!(fresh >= 1, "it was spoiled");
    ping::assert_answers(&pair.hosts[1], &pair.nodes[0].ipv4());
}

fn forwarded() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let hosts = [net.machine("alice", Nat::Symmetric), net.machine("bob", Nat::Symmetric)];
    let router = hosts[0].router.as_ref().unwrap();
    let inside = hosts[0].address;
    router.ns.nft(&format!(
        "add rule ip nat pre iifname \"wan\" udp dport 41830 dnat to {inside}:41830\n"
    ));
    let pair = Pair::up(net, server, hosts, "listen-port = 41830\n");
    let took = pair.direct_within(Duration::from_secs(5)).expect("the forwarded port is found");
    eprintln!("a forwarded port behind a symmetric NAT: direct after {took:.1?}");
    let (status, _) = wait_for("a status", Duration::from_secs(1), || pair.nodes[1].status());
    let path = &crate::overlay::find_peer(&status, "alice")["path"];
    let remote = format!("{}:41830", pair.hosts[0].router.as_ref().unwrap().wan);
    assert_eq!(path["remote"], remote, "{path}");
    assert!(path["why"].as_str().unwrap().contains("static"), "{path}");
}

/// From the start of the second node.
const CHANCE_LIMIT: Duration = Duration::from_secs(12);
/// What two nodes leave in a router that punch in the cheap ways, with room.
const FEW_ENTRIES: usize = 60;
