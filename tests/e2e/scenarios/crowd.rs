//! Crowds of strangers on the control port, while members talk and new nodes join.
//!
//! `OVERLAY_TEST_CROWD` is the number of slow connections, `OVERLAY_TEST_REPLAYS` that of replayed
//! handshakes, `OVERLAY_TEST_REPLAYS_AT_ONCE` how many of them are under way at the same time.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::flood::number;
use crate::attack;
use crate::case::Case;
use crate::clock::now;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, PORT, Server};
use crate::ping::{self, Stream};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::timed("crowd::slow_connections_keep_nobody_out", slow_connections),
        Case::new("crowd::replayed_handshakes_change_nothing", replays),
    ]
}

/// Addresses that a stranger has: half of a /24 that nobody else uses.
const FIRST_ADDRESS: u8 = 100;
const ADDRESSES: u8 = 80;

fn many_addresses(net: &Net) -> Host {
    let mallory = net.machine("mallory", Nat::None);
    for last in FIRST_ADDRESS..FIRST_ADDRESS + ADDRESSES {
        mallory.ns.ip(&format!("addr add 203.0.113.{last}/24 dev eth0"));
    }
    mallory
}

/// One connection from the `number`th of those addresses.
fn connect_from(number: u64, to: SocketAddr) -> Option<TcpStream> {
    let last = FIRST_ADDRESS + (number % u64::from(ADDRESSES)) as u8;
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).ok()?;
    socket.bind(&SocketAddr::from((Ipv4Addr::new(203, 0, 113, last), 0)).into()).ok()?;
    socket.connect_timeout(&to.into(), Duration::from_millis(300)).ok()?;
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(true).ok()?;
    Some(stream)
}

/// Connections that say one byte a second, and are opened again when they end.
fn crowd(
    host: &Host,
    to: SocketAddr,
    count: u64,
    over: &Arc<AtomicBool>,
    opened: &Arc<AtomicU64>,
) -> thread::JoinHandle<()> {
    let (host, over, opened) = (host.clone(), Arc::clone(over), Arc::clone(opened));
    thread::spawn(move || {
        host.ns.enter(|| {
            let mut streams: Vec<Option<TcpStream>> = (0..count).map(|_| None).collect();
            let mut byte = b"GET /overlay HTTP/1.1\r\nX: aaaaaaaaaaaa".iter().cycle();
            while !over.load(Ordering::Relaxed) {
                let round = now();
                let said = [*byte.next().unwrap()];
                for (number, stream) in streams.iter_mut().enumerate() {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    let alive = stream.as_mut().is_some_and(|stream| {
                        !matches!(stream.read(&mut [0; 512]), Ok(0))
                            && stream.write_all(&said).is_ok()
                    });
                    if !alive {
                        *stream = connect_from(number as u64, to);
                        opened.fetch_add(u64::from(stream.is_some()), Ordering::Relaxed);
                    }
                }
                thread::sleep(Duration::from_secs(1).saturating_sub(round.elapsed()));
            }
        });
    })
}

fn memory_bytes(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.process_id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a resident size");
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Processor time of the server so far.
fn cpu_seconds(server: &Server) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", server.process_id())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().map(|&at: &usize| fields[at].parse::<u64>().unwrap()).sum();
    ticks as f64 / TICKS_PER_SECOND
}

fn slow_connections() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let [alice, bob] = [("alice", Nat::Symmetric), ("bob", Nat::Symmetric)]
        .map(|(name, nat)| Node::start(&net, &net.machine(name, nat), &server));
    ping::assert_answers(&bob.host, &alice.ipv4());
    let newcomer = net.machine("carol", Nat::None);
    let mallory = many_addresses(&net);
    let before = memory_bytes(&server);
    let log = net.log_file("server");
    let lines_before = fs::read_to_string(&log).unwrap().lines().count();

    let (over, opened) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let count = number("OVERLAY_TEST_CROWD", 2_000);
    let to = SocketAddr::from((server.host.address, PORT));
    let crowd = crowd(&mallory, to, count, &over, &opened);
    let start = now();
    while opened.load(Ordering::Relaxed) < count {
        assert!(start.elapsed() < Duration::from_secs(60), "the crowd comes");
        thread::sleep(Duration::from_millis(10));
    }
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());
    let mut times: Vec<Duration> = (0..10)
        .map(|number| {
            let mut node = Node::with_config(&net, &newcomer, &format!("new{number}"), "");
            node.up(&server.join());
            node.wait_connected();
            let took = node.started.elapsed();
            assert_eq!(node.stop(), Some(0));
            took
        })
        .collect();
    times.sort();
    let grown = memory_bytes(&server).saturating_sub(before);
    over.store(true, Ordering::Relaxed);
    crowd.join().unwrap();
    stream.wait_for_more(50);
    stream.stop_without_loss();
    let latest = times[times.len() - 1];
    eprintln!(
        "{} slow connections, {} opened: joins took {:?} to {latest:?}, the server grew by {} KiB",
        count,
        opened.load(Ordering::Relaxed),
        times[0],
        grown / 1024,
    );
    assert!(latest < Duration::from_secs(2), "a join takes {latest:?}");
    assert!(grown < 20 << 20, "the server grew by {grown} bytes");
    let lines = fs::read_to_string(&log).unwrap().lines().count() - lines_before;
    // Ten joins leave an invite each.
    assert!(lines <= 30, "{lines} lines of log");
}

/// Says `first` once for each of these numbers; how often it was answered.
fn replay_some(
    host: &Host,
    to: SocketAddr,
    first: &[u8],
    numbers: impl Iterator<Item = u64> + Send,
) -> u64 {
    let says = |number: u64| {
        let Some(mut stream) = connect_from(number, to) else { return false };
        let _ = stream.set_nonblocking(false);
        let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
        let _ = stream.write_all(first);
        let answered = matches!(stream.read(&mut [0; 512]), Ok(1..));
        // Half of them go on with what is no frame of that session.
        let _ = number.is_multiple_of(2).then(|| stream.write_all(&[0, 32, 7, 7, 7]));
        answered
    };
    host.ns.enter(|| numbers.filter(|number| says(*number)).count() as u64)
}

/// What a node says first, and all that it says first on a connection, said again by a stranger.
fn replays() {
    let net = Net::new();
    let mut server = Server::start(&net, &net.machine("server", Nat::None));
    let [mut alice, mut bob] = [("alice", Nat::Symmetric), ("bob", Nat::Symmetric)]
        .map(|(name, nat)| Node::start(&net, &net.machine(name, nat), &server));
    ping::assert_answers(&bob.host, &alice.ipv4());
    let to = SocketAddr::from((server.host.address, PORT));
    server.stop();
    let listener = server.host.ns.enter(|| TcpListener::bind(to).unwrap());
    let first = attack::answer_with_noise(&listener);
    drop(listener);
    server.run();
    server.wait_ready();
    alice.wait_connected();
    bob.wait_connected();
    ping::assert_answers(&bob.host, &alice.ipv4());
    let mallory = many_addresses(&net);
    let state = || (events(&server), connections(&alice), connections(&bob));
    let before = state();
    let log = net.log_file("server");
    let lines_before = fs::read_to_string(&log).unwrap().lines().count();
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());

    let (start, cpu) = (now(), cpu_seconds(&server));
    let count = number("OVERLAY_TEST_REPLAYS", 2_000);
    let at_once = number("OVERLAY_TEST_REPLAYS_AT_ONCE", 1);
    let answered: u64 = thread::scope(|scope| {
        let (host, first) = (&mallory, first.as_slice());
        let replay = |numbers| scope.spawn(move || replay_some(host, to, first, numbers));
        let of = |worker| (worker..count).step_by(usize::try_from(at_once).unwrap());
        let workers: Vec<_> = (0..at_once).map(of).map(replay).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    let (took, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds(&server) - cpu);
    stream.wait_for_more(50);
    stream.stop_without_loss();
    eprintln!(
        "{count} replayed handshakes, {:.0} a second, {answered} answered: {:.0} % of a processor",
        count as f64 / took,
        cpu / took * 100.0,
    );
    assert!(answered > count / 2, "{answered} of {count} looked genuine at first");
    assert_eq!(state(), before, "nothing was written, nobody was cut off");
    assert!(cpu < took, "less than one processor: {cpu:.1} s in {took:.1} s");
    let lines = fs::read_to_string(&log).unwrap().lines().count() - lines_before;
    assert!((lines as f64) < 10.0 * took.max(1.0), "{lines} lines of log in {took:.1} s");
}

fn events(server: &Server) -> usize {
    server.cli(&["events", "--json"]).success("server events").lines().count()
}

fn connections(node: &Node) -> usize {
    node.log().lines().filter(|line| line.contains("connected to the server")).count()
}

/// What Linux says to programs, whatever its own clock does.
const TICKS_PER_SECOND: f64 = 100.0;
