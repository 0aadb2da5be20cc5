//! Direct paths that let questions through and lose data, or all of it in one direction.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::case::Case;
use crate::clock::now;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server};
use crate::ping::Stream;
use crate::scenarios::offload::content;

pub(crate) fn cases() -> Vec<Case> {
    let data = "udp length > 0 @th,64,8 4";
    let long = "meta length > 1000";
    let all = "meta length > 0";
    vec![
        Case::timed("failover::data_is_filtered_both_ways", move || failover(data, data)),
        Case::timed("failover::data_is_filtered_one_way", move || failover(data, "")),
        Case::timed("failover::what_is_long_disappears", move || failover(long, long)),
        Case::timed("failover::one_direction_is_blocked", move || failover("", all)),
        Case::timed("failover::random_loss_does_not_move_a_path", random_loss),
    ]
}

/// What the death of a path may cost.
const OUTAGE_LIMIT: Duration = Duration::from_secs(1);
const PATH_LIMIT: Duration = Duration::from_secs(20);
const PING_SPACING: Duration = Duration::from_millis(10);

struct Pair {
    net: Net,
    _server: Server,
    alice: Node,
    bob: Node,
}

fn direct_pair() -> Pair {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let [mut alice, mut bob] =
        ["alice", "bob"].map(|name| Node::start(&net, &net.machine(name, Nat::None), &server));
    alice.wait_path("bob", "direct", PATH_LIMIT);
    bob.wait_path("alice", "direct", PATH_LIMIT);
    Pair { net, _server: server, alice, bob }
}

/// Drops what comes straight from `from` and is as `rule` says; what comes by the server passes.
fn filter(at: &Host, from: &Host, rule: &str) {
    if !rule.is_empty() {
        let source = from.address;
        at.ns.nft(&format!(
            "table inet filtered {{\n chain input {{ type filter hook input priority 0; policy \
             accept;\n  ip saddr {source} meta l4proto udp {rule} drop\n }}\n}}\n"
        ));
    }
}

fn unfilter(at: &Host) {
    at.ns.nft("table inet filtered\ndelete table inet filtered\n");
}

/// A TCP connection that is in use all the time, and its longest silence.
pub(super) struct Connection {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<usize>,
    receiver: JoinHandle<(usize, Duration)>,
}

impl Connection {
    pub(super) fn start(from: &Host, to: &Host, address: &str) -> Self {
        let address: IpAddr = address.parse().unwrap();
        let listener = to.ns.enter(|| TcpListener::bind((address, 0)).unwrap());
        let remote = listener.local_addr().unwrap();
        let block = content(8_000);
        let expected = block.clone();
        let receiver = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATH_LIMIT)).unwrap();
            let (mut got, mut longest, mut last) = (0, Duration::ZERO, now());
            let mut buffer = vec![0; 65_536];
            loop {
                let len = stream.read(&mut buffer).expect("the connection lives");
                if len == 0 {
                    return (got, longest);
                }
                longest = longest.max(last.elapsed());
                last = now();
                for byte in &buffer[..len] {
                    assert_eq!(*byte, expected[got % expected.len()], "byte {got}");
                    got += 1;
                }
            }
        });
        let mut stream = from.ns.enter(|| TcpStream::connect_timeout(&remote, PATH_LIMIT).unwrap());
        stream.set_write_timeout(Some(PATH_LIMIT)).unwrap();
        stream.set_nodelay(true).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let sender = thread::spawn(move || {
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                stream.write_all(&block).expect("the connection lives");
                sent += block.len();
                thread::sleep(PING_SPACING);
            }
            sent
        });
        Self { stop, sender, receiver }
    }

    /// Ends it; nothing may be missing. Returns the longest silence.
    pub(super) fn finish(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        let (got, longest) = self.receiver.join().unwrap();
        assert_eq!(got, sent, "every byte arrives");
        longest
    }
}

/// Kills the path in the middle of traffic: at alice by `at_alice`, at bob by `at_bob`.
fn failover(at_alice: &str, at_bob: &str) {
    let Pair { net, _server, mut alice, mut bob } = direct_pair();
    let there = Connection::start(&alice.host, &bob.host, &bob.ipv4());
    let back = Connection::start(&bob.host, &alice.host, &alice.ipv6());
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());
    stream.wait_for_more(100);
    filter(&alice.host, &bob.host, at_alice);
    filter(&bob.host, &alice.host, at_bob);
    // Whoever sends into the hole leaves the path.
    let (node, peer) = if at_alice.is_empty() { (&mut alice, "bob") } else { (&mut bob, "alice") };
    node.wait_path(peer, "relay-udp", PATH_LIMIT);
    stream.wait_for_more(100);
    let lost = stream.stop().lost;
    let outage = match (lost.first(), lost.last()) {
        (Some(first), Some(last)) => PING_SPACING * (last - first + 1),
        _ => Duration::ZERO,
    };
    let silences = [there.finish(), back.finish()];
    eprintln!(
        "alice drops {at_alice:?}, bob drops {at_bob:?}: {} pings lost within {outage:?}, TCP silent \
         for {silences:.0?}",
        lost.len()
    );
    assert!(outage <= OUTAGE_LIMIT, "{lost:?}");
    assert!(silences.iter().all(|silence| *silence <= OUTAGE_LIMIT), "{silences:?}");

    // And back, when it works again.
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());
    let there = Connection::start(&alice.host, &bob.host, &bob.ipv4());
    stream.wait_for_more(20);
    unfilter(&alice.host);
    unfilter(&bob.host);
    alice.wait_path("bob", "direct", PATH_LIMIT);
    bob.wait_path("alice", "direct", PATH_LIMIT);
    stream.wait_for_more(50);
    stream.stop_without_loss();
    there.finish();
}

fn random_loss() {
    let Pair { net, _server, alice, bob } = direct_pair();
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());
    stream.wait_for_more(20);
    let changes = |node: &Node| node.log().matches("path changed").count();
    let before = (changes(&alice), changes(&bob));
    filter(&alice.host, &bob.host, "numgen random mod 100 < 5");
    filter(&bob.host, &alice.host, "numgen random mod 100 < 5");
    let connection = Connection::start(&alice.host, &bob.host, &bob.ipv6());
    thread::sleep(Duration::from_secs(8));
    connection.finish();
    let received = stream.stop();
    let total = received.packets + received.lost.len();
    eprintln!("5 % of loss each way: {} of {total} pings lost", received.lost.len());
    assert!(!received.lost.is_empty() && received.lost.len() * 5 < total);
    assert_eq!((changes(&alice), changes(&bob)), before, "no path has changed");
}
