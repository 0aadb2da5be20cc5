//! Many packets per system call change no byte, with every switch in every position.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;

use crate::case::Case;
use crate::clock::{now, wait_for};
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server};

const SWITCHES: [&str; 4] = ["tun-offload", "udp-gso", "udp-gro", "realtime"];
/// More than a TCP window, less than a second of a debug build.
const TRANSFER_BYTES: usize = 6_000_000;
const LIMIT: Duration = Duration::from_secs(20);
/// Longer than the time over which loss is measured, and then given up.
const FLOOD: Duration = Duration::from_secs(4);
/// Short packets, so that a slow build sends many more than the path takes.
const FLOOD_BYTES: usize = 64;
const FULL_PER_SECOND: u32 = 5_000;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("offload::all_on_changes_no_byte", || same_bytes(&[], &[])),
        Case::new("offload::no_tun_offload_changes_no_byte", || {
            same_bytes(&["tun-offload"], &["tun-offload"]);
        }),
        Case::new("offload::no_udp_gso_changes_no_byte", || {
            same_bytes(&["udp-gso"], &["udp-gso"]);
        }),
        Case::new("offload::no_udp_gro_changes_no_byte", || {
            same_bytes(&["udp-gro"], &["udp-gro"]);
        }),
        Case::new("offload::one_side_without_any_changes_no_byte", || {
            same_bytes(&[], &SWITCHES);
        }),
        Case::new("offload::both_sides_without_any_change_no_byte", || {
            same_bytes(&SWITCHES, &SWITCHES);
        }),
        Case::timed("offload::a_flood_stays_on_its_path", flood_stays_on_its_path),
    ]
}

/// Each side with these switches off.
fn same_bytes(off_at_alice: &[&str], off_at_bob: &[&str]) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let [mut alice, bob] = [("alice", off_at_alice), ("bob", off_at_bob)]
        .map(|(name, off)| start(&net, &server, name, off));
    alice.wait_path("bob", "direct", LIMIT);
    for (address, own) in [(bob.ipv4(), alice.ipv4()), (bob.ipv6(), alice.ipv6())] {
        let address: IpAddr = address.parse().unwrap();
        streams_are_equal(&alice.host, &bob.host, address);
        streams_are_equal(&bob.host, &alice.host, own.parse().unwrap());
        datagrams_are_equal(&alice.host, &bob.host, address);
    }
}

fn start(net: &Net, server: &Server, name: &str, off: &[&str]) -> Node {
    let config: String = off.iter().map(|switch| format!("{switch} = false\n")).collect();
    let mut node = Node::with_config(net, &net.machine(name, Nat::None), name, &config);
    node.up(&server.join());
    let status = node.wait_connected();
    let shown = |key: &str| status["self"]["offloads"][key] == Value::Bool(true);
    let is_off = |switch: &str| off.contains(&switch);
    // Every kernel that these tests run on has these three.
    assert_eq!(shown("tun_tso"), !is_off("tun-offload"), "{status}");
    assert_eq!(shown("udp_gso"), !is_off("udp-gso"), "{status}");
    assert_eq!(shown("udp_gro"), !is_off("udp-gro"), "{status}");
    assert!(!shown("tun_uso") || !is_off("tun-offload"), "{status}");
    assert_realtime(&mut node, realtime_is_allowed() && !is_off("realtime"));
    node
}

/// Whether this machine lets a program of ours have it: the kernel is asked in another way.
pub(super) fn realtime_is_allowed() -> bool {
    let probe = Command::new("chrt").args(["--rr", "1", "true"]).status().unwrap();
    probe.success() && thread::available_parallelism().unwrap().get() > 1
}

/// What the node says of its packet threads, and what the kernel does.
fn assert_realtime(node: &mut Node, expected: bool) {
    let process = node.daemon().id();
    node.wait_status("its packet threads run", LIMIT, |status| {
        status["self"]["realtime"] == Value::Bool(expected) && packet_threads(process).len() == 2
    });
    wait_for("ordinary threads, as nothing goes on", LIMIT, || {
        (packet_threads(process) == [libc::SCHED_OTHER; 2]).then_some(())
    });
}

/// The scheduling policies of the threads that move packets; no other thread has one of its own.
fn packet_threads(process: u32) -> Vec<i32> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let Ok(stat) = fs::read_to_string(task.unwrap().path().join("stat")) else { continue };
        let (name, fields) = stat.split_once('(').unwrap().1.rsplit_once(')').unwrap();
        // The policy is field 41 of proc_pid_stat(5); the third field comes first here.
        let policy: i32 = fields.split_whitespace().nth(38).unwrap().parse().unwrap();
        let policy = policy & !libc::SCHED_RESET_ON_FORK;
        if ["tun-to-udp", "udp-to-tun"].contains(&name) {
            found.push(policy);
        } else {
            assert_eq!(policy, libc::SCHED_OTHER, "{stat}");
        }
    }
    found
}

/// A program that sends more than the path takes loses some of it. That is no reason to send all of
/// it twice, or by the relay.
fn flood_stays_on_its_path() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let [mut alice, bob] = [("alice", &["udp-gso"][..]), ("bob", &[])]
        .map(|(name, off)| start(&net, &server, name, off));
    alice.wait_path("bob", "direct", LIMIT);
    let process = alice.daemon().id();
    let far = bob.host.ns.enter(|| UdpSocket::bind((bob.ipv4(), 0)).unwrap());
    let near = alice.host.ns.enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    near.connect(far.local_addr().unwrap()).unwrap();
    // A new path is proved with copies of what is sent, so some is sent before it counts.
    for _ in 0..50 {
        near.send(&[0; FLOOD_BYTES]).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    // Only the length of the flood's datagrams: questions about the path get through.
    let len = FLOOD_BYTES + 28 + 32 + 8;
    bob.host.ns.nft(&format!(
        "table inet full {{\n chain input {{ type filter hook input priority 0; policy accept;\n  \
         udp length {len} limit rate over {FULL_PER_SECOND}/second burst 200 packets counter drop\n }}\n}}\n"
    ));
    let counters = || {
        (
            counter(&bob, "/self/drops/replayed"),
            counter(&alice, "/peers/0/tx_bytes"),
            counter(&bob, "/peers/0/rx_bytes"),
        )
    };
    let before = counters();
    setsockopt(&near, sockopt::UdpGsoSegment, &i32::try_from(FLOOD_BYTES).unwrap()).unwrap();
    let since = now();
    let mut ahead = false;
    while since.elapsed() < FLOOD {
        for _ in 0..1_000 {
            near.send(&[0; 16 * FLOOD_BYTES]).unwrap();
        }
        ahead |= packet_threads(process).contains(&libc::SCHED_RR);
    }
    assert_eq!(ahead, realtime_is_allowed(), "threads ahead of ordinary programs");
    thread::sleep(Duration::from_millis(300));
    let after = counters();
    let (sent, arrived) = (after.1 - before.1, after.2 - before.2);
    assert_eq!(alice.path_kind("bob"), "direct", "{}", alice.log());
    assert!(arrived * 2 < sent, "{arrived} of {sent} bytes: no flood");
    assert_eq!(after.0 - before.0, 0, "copies; {}", alice.log());
}

fn counter(node: &Node, pointer: &str) -> u64 {
    let status = node.status().expect("the node answers");
    status.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}

/// Bytes that repeat nowhere near.
pub(super) fn content(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

pub(super) fn streams_are_equal(from: &Host, to: &Host, address: IpAddr) {
    let sent = content(TRANSFER_BYTES);
    let listener = to.ns.enter(|| TcpListener::bind((address, 0)).unwrap());
    let remote = listener.local_addr().unwrap();
    let receiver = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        got
    });
    let mut stream = from.ns.enter(|| TcpStream::connect_timeout(&remote, LIMIT).unwrap());
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    // Odd cuts make segments of all sizes.
    for piece in sent.chunks(77_777) {
        stream.write_all(piece).unwrap();
    }
    drop(stream);
    let got = receiver.join().unwrap();
    assert!(got == sent, "{remote}: {} of {} bytes, or other ones", got.len(), sent.len());
}

fn datagrams_are_equal(from: &Host, to: &Host, address: IpAddr) {
    let far = to.ns.enter(|| UdpSocket::bind((address, 0)).unwrap());
    let any: SocketAddr =
        if address.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let near = from.ns.enter(|| UdpSocket::bind(any).unwrap());
    near.connect(far.local_addr().unwrap()).unwrap();
    for socket in [&near, &far] {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
    }
    let bytes = content(70_000);
    let mut buffer = vec![0; 70_000];
    for len in (0..2_700).step_by(101).chain([1_231, 1_232, 1_233, 9_001]) {
        // Several in a row, so that there is something to merge.
        for _ in 0..3 {
            near.send(&bytes[..len]).unwrap();
        }
        for _ in 0..3 {
            let (got, remote) = far.recv_from(&mut buffer).unwrap();
            assert!(buffer[..got] == bytes[..len], "{len} bytes became {got}, or other ones");
            far.send_to(&buffer[..got], remote).unwrap();
            let got = near.recv(&mut buffer).unwrap();
            assert!(buffer[..got] == bytes[..len], "{len} bytes came back as {got}");
        }
    }
}
