//! Nothing of what programs say leaves the tunnel: the wire is captured from before the start until
//! after the removal, on every path, with connections in use all the time.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::capture::Capture;
use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("leak::the_wire_shows_only_the_protocol_on_every_path", every_path),
        Case::new("leak::the_capture_sees_what_is_in_the_open", planted),
    ]
}

const SECRET: &[u8] = b"the-quick-brown-secret-of-a-program";
const LIMIT: Duration = Duration::from_secs(20);

/// A TCP connection and datagrams between overlay addresses that say the secret all the time, whatever
/// becomes of the interface.
struct Talk {
    stop: Arc<AtomicBool>,
    heard: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Talk {
    fn start(from: &Host, to: &Host, own: &str, far: &str) -> Self {
        let [own, far] = [own, far].map(|address| address.parse::<IpAddr>().unwrap());
        let listener = to.ns.enter(|| TcpListener::bind((far, 0)).unwrap());
        let sink = to.ns.enter(|| UdpSocket::bind((far, 0)).unwrap());
        let near = from.ns.enter(|| UdpSocket::bind((own, 0)).unwrap());
        near.connect(sink.local_addr().unwrap()).unwrap();
        let remote = listener.local_addr().unwrap();
        let mut stream = from.ns.enter(|| TcpStream::connect_timeout(&remote, LIMIT).unwrap());
        stream.set_nonblocking(true).unwrap();
        stream.set_nodelay(true).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.set_read_timeout(Some(PAUSE)).unwrap();
        sink.set_read_timeout(Some(PAUSE)).unwrap();
        let (stop, heard) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let asked = Arc::clone(&stop);
        let sender = thread::spawn(move || {
            while !asked.load(Ordering::Relaxed) {
                // Without an interface these fail, and that is well.
                let _ = near.send(SECRET);
                let _ = stream.write(SECRET);
                thread::sleep(PAUSE);
            }
        });
        let (asked, told) = (Arc::clone(&stop), Arc::clone(&heard));
        let receiver = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while !asked.load(Ordering::Relaxed) {
                let by_udp = sink.recv(&mut buffer).is_ok();
                let by_tcp = accepted.read(&mut buffer).is_ok_and(|len| len > 0);
                told.fetch_add(u64::from(by_udp) + u64::from(by_tcp), Ordering::Relaxed);
            }
        });
        Self { stop, heard, threads: vec![sender, receiver] }
    }

    fn wait_for_more(&self, what: &str) {
        let before = self.heard.load(Ordering::Relaxed);
        wait_for(&format!("words arrive: {what}"), LIMIT, || {
            (self.heard.load(Ordering::Relaxed) >= before + 40).then_some(())
        });
    }

    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

const PAUSE: Duration = Duration::from_millis(4);

fn every_path() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let hosts = ["alice", "bob"].map(|name| net.machine(name, Nat::None));
    let everywhere = [&hosts[0], &hosts[1], &server.host];
    let captures = everywhere.map(|host| (host.name.clone(), Capture::start(host, SECRET)));
    let [mut alice, mut bob] = hosts.map(|host| {
        // Questions to a router are in the open, and no secret.
        let mut node = Node::with_config(&net, &host, &host.name, "port-mapping = false\n");
        node.up(&server.join());
        node.wait_connected();
        node
    });
    let v4 = Talk::start(&alice.host, &bob.host, &alice.ipv4(), &bob.ipv4());
    let v6 = Talk::start(&bob.host, &alice.host, &bob.ipv6(), &alice.ipv6());
    let wait = |what: &str| [&v4, &v6].iter().for_each(|talk| talk.wait_for_more(what));
    alice.wait_path("bob", "direct", LIMIT);
    wait("direct");

    let start = crate::clock::now();
    let note = |what: &str| eprintln!("{what} after {} ms", start.elapsed().as_millis());
    // The direct path dies under traffic, then UDP altogether, then all is well again.
    for (node, peer) in [(&alice, &bob), (&bob, &alice)] {
        cut(&node.host, &format!("ip saddr {}", peer.host.address));
    }
    alice.wait_path("bob", "relay-udp", LIMIT);
    wait("relayed by UDP");
    [&alice, &bob].iter().for_each(|node| cut(&node.host, "meta l4proto udp"));
    alice.wait_path("bob", "relay-tcp", LIMIT);
    wait("relayed by TCP");
    for node in [&alice, &bob] {
        node.host.ns.nft("table inet cut\ndelete table inet cut\n");
    }
    alice.wait_path("bob", "direct", LIMIT);
    wait("direct again");

    note("stop");
    // A node stops, is away for a while, and starts; another one is killed.
    assert_eq!(alice.stop(), Some(0));
    thread::sleep(Duration::from_millis(500));
    alice.up_again();
    alice.wait_connected();
    alice.wait_path("bob", "direct", LIMIT);
    v4.wait_for_more("after a restart");
    note("kill");
    bob.kill();
    thread::sleep(Duration::from_millis(500));
    bob.up_again();
    bob.wait_connected();
    bob.wait_path("alice", "direct", LIMIT);
    v4.wait_for_more("after a kill");

    note("remove");
    server.cli(&["remove", "bob"]).success("server remove");
    thread::sleep(Duration::from_secs(1));
    alice.stop();
    thread::sleep(Duration::from_millis(300));
    v4.finish();
    v6.finish();
    for (name, capture) in captures {
        let seen = capture.finish();
        assert!(seen.leaks.is_empty(), "at {name}: {:?}", seen.leaks);
        for kind in ["wireguard data", "disco", "relay", "relay control", "control link"] {
            // Direct datagrams do not pass the server.
            let elsewhere = name == "server" && ["wireguard data", "disco"].contains(&kind);
            assert!(elsewhere || seen.kinds.contains_key(kind), "{kind} at {name}: {seen:?}");
        }
        // Whether a handshake goes directly or by relay is a matter of what is known first.
        let handshakes = ["wireguard handshake", "relayed handshake"];
        let shaken = handshakes.iter().any(|kind| seen.kinds.contains_key(kind));
        assert!(shaken, "no handshake at {name}: {seen:?}");
        eprintln!("at {name}: {:?}", seen.kinds);
    }
}

/// Drops what comes in and meets `rule`.
fn cut(host: &Host, rule: &str) {
    host.ns.nft(&format!(
        "table inet cut {{\n chain input {{ type filter hook input priority 0; policy accept;\n  \
         iifname eth0 {rule} drop\n }}\n}}\n"
    ));
}

/// The capture is no blind witness: what is in the open is told, and so is what is of no kind.
fn planted() {
    let net = Net::new();
    let [alice, bob] = ["alice", "bob"].map(|name| net.machine(name, Nat::None));
    let say = |bytes: &[u8]| {
        let capture = Capture::start(&alice, SECRET);
        let socket = crate::probe::open_socket(&alice, ([0, 0, 0, 0], 0).into());
        socket.send_to(bytes, (bob.address, 9)).unwrap();
        thread::sleep(Duration::from_millis(100));
        capture.finish().leaks
    };
    let mut sealed = vec![4, 0, 0, 0];
    sealed.resize(96, 7);
    assert!(say(&sealed).is_empty(), "this looks like WireGuard");
    let leaks = say(&[&sealed, SECRET].concat());
    assert!(leaks.iter().any(|leak| leak.contains("the secret")), "{leaks:?}");
    let leaks = say(b"a word in the open");
    assert!(leaks.iter().any(|leak| leak.contains("of no kind")), "{leaks:?}");
    // An inner address on the wire, as when the route into the tunnel is missing.
    alice.ns.ip("addr add 10.9.9.9/32 dev lo");
    alice.ns.ip("route add 10.9.9.10/32 via 203.0.113.1 src 10.9.9.9");
    let capture = Capture::start(&alice, SECRET);
    let socket = crate::probe::open_socket(&alice, ([10, 9, 9, 9], 0).into());
    socket.send_to(&sealed, ("10.9.9.10", 9)).unwrap();
    thread::sleep(Duration::from_millis(100));
    let leaks = capture.finish().leaks;
    assert!(leaks.iter().any(|leak| leak.contains("overlay address")), "{leaks:?}");
}
