//! Crowds of strangers on the control port, while members talk and new nodes join.
//!
//! `OVERLAY_TEST_CROWD` is the number of slow connections, `OVERLAY_TEST_REPLAYS` that of replayed
//! handshakes, `OVERLAY_TEST_REPLAYS_AT_ONCE` how many of them are under way at the same time.
//! `OVERLAY_TEST_HANDSHAKES_PPS` is how many there are a second in a flood of them, and
//! `OVERLAY_TEST_HANDSHAKES_S` for how long.

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
        Case::timed("crowd::a_flood_of_handshakes_keeps_nobody_out", handshakes),
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
    let mut times: Vec<Duration> =
        (0..10).map(|number| join_once(&net, &server, &newcomer, number)).collect();
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

/// Says `first` once for each of these numbers; how often it was taken for a new one.
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
        let mut answer = [0; 512];
        let length = stream.read(&mut answer).unwrap_or_default();
        // Half of them go on with what is no frame of that session.
        let _ = number.is_multiple_of(2).then(|| stream.write_all(&[0, 32, 7, 7, 7]));
        answer[..length].starts_with(b"HTTP/1.1 101")
    };
    host.ns.enter(|| numbers.filter(|number| says(*number)).count() as u64)
}

/// Two members that talk by the relay, and what one of them has said first on a connection.
struct Recorded {
    server: Server,
    alice: Node,
    bob: Node,
    mallory: Host,
    first: Vec<u8>,
}

impl Recorded {
    fn new(net: &Net) -> Self {
        let mut server = Server::start(net, &net.machine("server", Nat::None));
        let [mut alice, mut bob] = [("alice", Nat::Symmetric), ("bob", Nat::Symmetric)]
            .map(|(name, nat)| Node::start(net, &net.machine(name, nat), &server));
        ping::assert_answers(&bob.host, &alice.ipv4());
        server.stop();
        let listen = || TcpListener::bind((server.host.address, PORT)).unwrap();
        let first = attack::answer_with_noise(&server.host.ns.enter(listen));
        server.run();
        server.wait_ready();
        alice.wait_connected();
        bob.wait_connected();
        ping::assert_answers(&bob.host, &alice.ipv4());
        Self { server, alice, bob, mallory: many_addresses(net), first }
    }

    fn to(&self) -> SocketAddr {
        SocketAddr::from((self.server.host.address, PORT))
    }
}

/// What a node says first, and all that it says first on a connection, said again by a stranger.
fn replays() {
    let net = Net::new();
    let scene = Recorded::new(&net);
    let Recorded { server, alice, bob, mallory, first } = &scene;
    let state = || (events(server), connections(alice), connections(bob));
    let before = state();
    let log = net.log_file("server");
    let lines_before = fs::read_to_string(&log).unwrap().lines().count();
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());

    let (start, cpu) = (now(), cpu_seconds(server));
    let count = number("OVERLAY_TEST_REPLAYS", 2_000);
    let at_once = number("OVERLAY_TEST_REPLAYS_AT_ONCE", 1);
    let answered: u64 = thread::scope(|scope| {
        let replay = |numbers| scope.spawn(|| replay_some(mallory, scene.to(), first, numbers));
        let of = |worker| (worker..count).step_by(usize::try_from(at_once).unwrap());
        let workers: Vec<_> = (0..at_once).map(of).map(replay).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    let (took, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds(server) - cpu);
    stream.wait_for_more(50);
    stream.stop_without_loss();
    eprintln!(
        "{count} replayed handshakes, {:.0} a second, {answered} answered: {:.0} % of a processor",
        count as f64 / took,
        cpu / took * 100.0,
    );
    // From each address once: after that it is known.
    let sources = count.min(u64::from(ADDRESSES));
    assert!(answered > sources / 2 && answered <= sources, "{answered} looked genuine at first");
    assert_eq!(state(), before, "nothing was written, nobody was cut off");
    assert!(cpu < took, "less than one processor: {cpu:.1} s in {took:.1} s");
    let lines = fs::read_to_string(&log).unwrap().lines().count() - lines_before;
    assert!((lines as f64) < 10.0 * took.max(1.0), "{lines} lines of log in {took:.1} s");
}

/// A genuine first message at a rate, from many sources, each time on a connection of its own. Members
/// talk by the server's relay, and new ones join.
fn handshakes() {
    let net = Net::new();
    let scene = Recorded::new(&net);
    let Recorded { server, alice, bob, mallory, first } = &scene;
    let (to, newcomer) = (scene.to(), net.machine("carol", Nat::None));
    let rate = number("OVERLAY_TEST_HANDSHAKES_PPS", 500);
    let count = rate * number("OVERLAY_TEST_HANDSHAKES_S", 2);
    let join = |number: usize| join_once(&net, server, &newcomer, number);
    // A machine that does much else takes longer for it without a flood, too.
    let calm = (0..3).map(join).max().unwrap();
    let stream = Stream::start(&net, &bob.host, &alice.ipv4());
    stream.wait_for_more(20);

    let (start, cpu) = (now(), cpu_seconds(server));
    let due = |number: u64| Duration::from_secs_f64(number as f64 / rate as f64);
    let in_time = |number: u64| {
        thread::sleep(due(number).saturating_sub(start.elapsed()));
        number
    };
    let (answered, mut times) = thread::scope(|scope| {
        let flood = |worker: u64| {
            let numbers = (worker..count).step_by(FLOODERS).map(in_time);
            scope.spawn(move || replay_some(mallory, to, first, numbers))
        };
        let flooders: Vec<_> = (0..FLOODERS as u64).map(flood).collect();
        let mut times: Vec<Duration> = Vec::new();
        while flooders.iter().any(|flooder| !flooder.is_finished()) {
            times.push(join(3 + times.len()));
        }
        let answered: u64 = flooders.into_iter().map(|flooder| flooder.join().unwrap()).sum();
        (answered, times)
    });
    let (took, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds(server) - cpu);
    let heard = stream.stop();
    times.sort();
    let (middle, slowest) = (times[times.len() / 2], times[times.len() - 1]);
    eprintln!(
        "{:.0} handshakes a second, {answered} of {count} answered: {:.0} % of a processor, {} joins \
         took {:?} to {slowest:?} ({calm:?} before), {} of {} pings lost",
        count as f64 / took,
        cpu / took * 100.0,
        times.len(),
        times[0],
        heard.lost.len(),
        heard.packets + heard.lost.len(),
    );
    // From each address once, if it has come back in time to be counted.
    assert!((1..=u64::from(ADDRESSES)).contains(&answered), "{answered} looked genuine at first");
    assert!(cpu < took, "less than one processor: {cpu:.1} s in {took:.1} s");
    assert!(middle < (calm * 4).max(Duration::from_secs(2)), "joins take {times:?}");
    assert!(heard.lost.len() * 100 <= heard.packets, "lost {:?}", heard.lost);
}

/// How long a new node takes to come in.
fn join_once(net: &Net, server: &Server, host: &Host, number: usize) -> Duration {
    let mut node = Node::with_config(net, host, &format!("new{number}"), "");
    node.up(&server.join());
    node.wait_connected();
    let took = node.started.elapsed();
    assert_eq!(node.stop(), Some(0));
    took
}

fn events(server: &Server) -> usize {
    server.cli(&["events", "--json"]).success("server events").lines().count()
}

fn connections(node: &Node) -> usize {
    node.log().lines().filter(|line| line.contains("connected to the server")).count()
}

/// What Linux says to programs, whatever its own clock does.
const TICKS_PER_SECOND: f64 = 100.0;

/// Each waits for the answer to what it has said before it goes on.
const FLOODERS: usize = 16;
