//! Every byte arrives, once and unchanged, over a line that does anything to packets and across
//! several changes of the session's keys.
//!
//! `OVERLAY_TEST_LINE_MB` is the size of the transfer each way (10000 for the full one, best with a
//! release build: `OVERLAY_TEST_BINARY=target/release/overlay`).

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::metrics::{scrape, value};
use crate::case::Case;
use crate::clock::now;
use crate::flow::Flow;
use crate::lab::{Host, Net};
use crate::line::{Faults, Line};
use crate::nat::Nat;
use crate::overlay::{Node, START_LIMIT, Server, find_peer};
use crate::ping;

pub(crate) fn cases() -> Vec<Case> {
    vec![Case::new(
        "line::a_lossy_reordering_doubling_line_changes_no_byte_across_rekeys",
        transfer,
    )]
}

/// What an ordinary run sends each way.
const DEFAULT_MB: u64 = 12;
/// It takes so long at the least: two changes of keys and a bit.
const LEAST: Duration = Duration::from_secs(12);
/// Nothing at all comes for so long: then it has failed.
const SILENCE: Duration = Duration::from_secs(30);
const BLOCK: usize = 1 << 16;
const FAULTS: Faults = Faults { lost: 3, doubled: 10, late: 10 };

fn transfer() {
    let setting = std::env::var("OVERLAY_TEST_LINE_MB");
    let megabytes: u64 = setting.map_or(DEFAULT_MB, |text| text.parse().expect("a number"));
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let hosts = ["alice", "bob"].map(|name| net.machine(name, Nat::None));
    let line = Line::join(&hosts[0], &hosts[1], FAULTS);
    let config = "rekey-after-s = 5\nmetrics = \"127.0.0.1:9586\"\n";
    let [mut alice, bob] = hosts.map(|host| {
        let mut node = Node::with_config(&net, &host, &host.name, config);
        node.up(&server.join());
        node.wait_connected();
        node
    });
    ping::assert_answers(&alice.host, &bob.ipv4());
    alice.wait_path("bob", "direct", START_LIMIT);
    let sessions = || value(&scrape(&alice.host, 9586), "overlay_handshakes_total");
    let (before, start) = (sessions(), now());
    // Numbered datagrams beside it: the line doubles some, and none may come twice.
    let flow = Flow::start(&alice.host, &bob.host, &bob.ipv4(), 1_000, 1);
    thread::scope(|scope| {
        scope.spawn(|| stream(&alice.host, &bob.host, &bob.ipv4(), megabytes, 1));
        scope.spawn(|| stream(&bob.host, &alice.host, &alice.ipv6(), megabytes, 2));
    });
    let took = start.elapsed();
    let arrived = flow.finish();
    let sessions = sessions() - before;
    let count = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
    let counts = &line.counts;
    eprintln!(
        "{megabytes} MB each way in {:.1} s, {sessions} handshakes, datagrams {:.4}; the line: {counts:?}",
        took.as_secs_f64(),
        arrived.part()
    );
    assert!(sessions >= 2.0, "{sessions} handshakes");
    for (node, peer) in [(&alice, "bob"), (&bob, "alice")] {
        let status = node.status().unwrap();
        assert_eq!(find_peer(&status, peer)["second_session"], true, "so much went both ways");
    }
    let carried = count(&counts.bytes);
    let most = 2 * megabytes * 1_000_000;
    // A machine with much else to do lets paths fall silent, and then the relay carries a part.
    assert!(carried >= most / 10 * 7, "the line carried {carried} of {most} bytes: {counts:?}");
    assert!([&counts.lost, &counts.doubled, &counts.late].iter().all(|seen| count(seen) > 10));
    let mut numbers = arrived.numbers.clone();
    numbers.sort_unstable();
    assert!(numbers.windows(2).all(|pair| pair[0] != pair[1]), "none comes twice");
    assert!(arrived.part() > 0.9, "{}", arrived.part());
    let replayed = |node: &Node| node.status().unwrap()["self"]["drops"]["replayed"].as_u64();
    assert!(replayed(&alice) > Some(0) && replayed(&bob) > Some(0), "the engine saw the doubles");
    alice.wait_path("bob", "direct", START_LIMIT);
}

/// Bytes that repeat nowhere near, the same at both ends.
struct Content(u64);

impl Content {
    fn fill(&mut self, block: &mut [u8]) {
        for word in block.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}

/// Sends so much over one connection, and compares every byte of it.
fn stream(from: &Host, to: &Host, address: &str, megabytes: u64, seed: u64) {
    let address: IpAddr = address.parse().unwrap();
    let listener = to.ns.enter(|| TcpListener::bind((address, 0)).unwrap());
    let remote = listener.local_addr().unwrap();
    let blocks = (megabytes * 1_000_000).div_ceil(BLOCK as u64);
    let receiver = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(SILENCE)).unwrap();
        let (mut wanted, mut got) = (vec![0; BLOCK], vec![0; BLOCK]);
        let mut content = Content(seed);
        for number in 0..blocks {
            content.fill(&mut wanted);
            stream.read_exact(&mut got).unwrap_or_else(|e| panic!("block {number}: {e}"));
            assert!(got == wanted, "block {number} of {blocks} has other bytes");
        }
        assert_eq!(stream.read(&mut got).unwrap(), 0, "and nothing more");
    });
    let mut stream = from.ns.enter(|| TcpStream::connect_timeout(&remote, SILENCE).unwrap());
    stream.set_write_timeout(Some(SILENCE)).unwrap();
    let (mut content, mut block) = (Content(seed), vec![0; BLOCK]);
    let start = now();
    for number in 0..blocks {
        content.fill(&mut block);
        stream.write_all(&block).unwrap();
        let due = LEAST.mul_f64(number as f64 / blocks as f64);
        thread::sleep(due.saturating_sub(start.elapsed()));
    }
    drop(stream);
    receiver.join().unwrap();
}
