//! What two machines send while nobody uses their network.

use std::thread;
use std::time::Duration;

use crate::case::Case;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server};
use crate::ping;

pub(crate) fn cases() -> Vec<Case> {
    vec![Case::new("idle::a_direct_pair_sends_a_keepalive_now_and_then", direct_pair)]
}

/// A new path has been measured after this: its full packet, its spare ways, its relay.
const SETTLING: Duration = Duration::from_secs(12);
/// Long against the time between keepalives: half as many seconds between them would be seen.
const WINDOW: Duration = Duration::from_secs(55);
/// What [`WINDOW`] has room for at one in 25 s, wherever in it the first one is.
const TO_PEER: u64 = 3;
/// The same for the relay at one bind in 20 s, which its server answers.
const TO_SERVER: u64 = 4;
/// A search for a port mapping in three protocols; the window has room for the fourth one only.
const TO_ROUTER: u64 = 12;
/// Of a datagram with its IP and UDP headers, in bytes.
const SMALL: u64 = 150;

/// Datagrams and their bytes that left a machine.
#[derive(Debug, Clone, Copy)]
struct Sent {
    datagrams: u64,
    bytes: u64,
}

/// Counts the UDP that `host` sends: to the server, to its router and the group of routers, and to
/// anybody else, who can only be the peer.
fn count(host: &Host, server: &Host) {
    host.ns.nft(&format!(
        "table inet idle {{\n counter server {{ }}\n counter peer {{ }}\n counter router {{ }}\n chain out {{\n  \
         type filter hook postrouting priority 300; policy accept;\n  oifname != \"eth0\" return\n  \
         meta l4proto != udp return\n  ip daddr {} counter name server return\n  \
         ip daddr {{ 192.168.1.1, 239.255.255.250 }} counter name router return\n  \
         counter name peer\n }}\n}}\n",
        server.address
    ));
}

fn read(host: &Host, name: &str) -> Sent {
    let text = host.ns.run("nft", &["list", "counter", "inet", "idle", name]).success("nft list");
    let words: Vec<&str> = text.split_whitespace().collect();
    let after = |word: &str| -> u64 {
        let at = words.iter().position(|it| *it == word).expect("a counter");
        words[at + 1].parse().unwrap()
    };
    Sent { datagrams: after("packets"), bytes: after("bytes") }
}

fn direct_pair() {
    let net = Net::new();
    let place = net.machine("server", Nat::None);
    let server = Server::start(&net, &place);
    let [mut alice, mut bob] = ["alice", "bob"].map(|name| {
        let host = net.machine(name, Nat::PortRestricted);
        count(&host, &place);
        Node::start(&net, &host, &server)
    });
    alice.wait_path("bob", "direct", Duration::from_secs(5));
    bob.wait_path("alice", "direct", Duration::from_secs(5));
    ping::assert_answers(&bob.host, &alice.ipv4());
    thread::sleep(SETTLING);

    let all = || {
        [&alice, &bob].map(|node| ["server", "peer", "router"].map(|name| read(&node.host, name)))
    };
    let before = all();
    thread::sleep(WINDOW);
    let after = all();
    for (side, node) in [&alice, &bob].into_iter().enumerate() {
        assert_eq!(node.path_kind(["bob", "alice"][side]), "direct");
        let [to_server, to_peer, to_router] = [0, 1, 2].map(|to: usize| Sent {
            datagrams: after[side][to].datagrams - before[side][to].datagrams,
            bytes: after[side][to].bytes - before[side][to].bytes,
        });
        eprintln!(
            "{} in {WINDOW:?}: {to_server:?} to the server, {to_peer:?} to the peer, {to_router:?} to the router",
            node.name
        );
        assert!((1..=TO_PEER).contains(&to_peer.datagrams), "{}: {to_peer:?}", node.name);
        assert!((1..=TO_SERVER).contains(&to_server.datagrams), "{}: {to_server:?}", node.name);
        assert!(to_router.datagrams <= TO_ROUTER, "{}: {to_router:?}", node.name);
        for sent in [to_peer, to_server] {
            assert!(sent.bytes <= sent.datagrams * SMALL, "{}: {sent:?}", node.name);
        }
    }
    ping::assert_answers(&bob.host, &alice.ipv4());
}
