//! Peers beside each other: one that takes nothing holds up no other, and a flow keeps its order.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::case::Case;
use crate::flow::{Arrived, Flow};
use crate::lab::Net;
use crate::line::{Faults, Line};
use crate::nat::Nat;
use crate::overlay::{Node, Server};
use crate::ping;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::timed("fair::a_peer_that_stands_still_holds_up_no_other", || stalled(Way::Direct)),
        Case::timed("fair::a_relayed_peer_that_stands_still_holds_up_no_other", || {
            stalled(Way::RelayUdp);
        }),
        Case::timed("fair::a_peer_that_takes_no_tcp_from_the_relay_holds_up_no_other", || {
            stalled(Way::RelayTcp);
        }),
        Case::timed("fair::a_peer_behind_a_slow_line_holds_up_no_other", slow_line),
        Case::timed("fair::no_flow_is_reordered_while_the_threads_take_turns", order),
    ]
}

/// How alice reaches the peer that stands still.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Direct,
    RelayUdp,
    RelayTcp,
}

const LIMIT: Duration = Duration::from_secs(20);
/// Megabits in a second to the peer that takes nothing, and to the other.
const FLOOD: u64 = 60;
const MODEST: u64 = 8;
const BYTES: usize = 1_200;
const SPAN: Duration = Duration::from_secs(2);

/// Server and three nodes; alice has talked to both others.
fn three(nat: Nat, block_bob: bool, kinds: [&str; 2]) -> (Net, Server, [Node; 3]) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let mut nodes = ["alice", "bob", "carol"].map(|name| {
        let host = net.machine(name, nat);
        if block_bob && name == "bob" {
            host.router.as_ref().expect("bob is at home").block_udp();
        }
        Node::start(&net, &host, &server)
    });
    for (number, kind) in [(1, kinds[0]), (2, kinds[1])] {
        ping::assert_answers(&nodes[0].host, &nodes[number].ipv4());
        let name = nodes[number].name.clone();
        nodes[0].wait_path(&name, kind, LIMIT);
    }
    (net, server, nodes)
}

fn assert_kept(what: &str, arrived: &Arrived) {
    eprintln!("{what}: {:.4} of the other flow arrived", arrived.part());
    assert!(arrived.part() >= 0.9, "{what}: {:.4} arrived", arrived.part());
    assert_eq!(arrived.out_of_order(), 0, "{what}: in order, once");
}

fn stalled(way: Way) {
    let (what, nat, kind) = match way {
        Way::Direct => ("direct", Nat::None, "direct"),
        Way::RelayUdp => ("relayed", Nat::Symmetric, "relay-udp"),
        // Alice sends by UDP; the relay has only bob's control connection.
        Way::RelayTcp => ("relayed by TCP", Nat::Symmetric, "relay-udp"),
    };
    let (_net, _server, mut nodes) = three(nat, way == Way::RelayTcp, [kind; 2]);
    let [alice, bob, carol] = &mut nodes;
    let flood = Flow::start(&alice.host, &bob.host, &bob.ipv4(), BYTES, FLOOD);
    let modest = Flow::start(&alice.host, &carol.host, &carol.ipv4(), BYTES, MODEST);
    std::thread::sleep(SPAN / 4);
    bob.daemon().signal(Signal::SIGSTOP);
    std::thread::sleep(SPAN);
    let modest = modest.finish();
    bob.daemon().signal(Signal::SIGCONT);
    flood.finish();
    assert_kept(what, &modest);
}

/// Bob is behind another line of alice's, which is slow and has a deep queue.
fn slow_line() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let hosts = ["alice", "bob", "carol"].map(|name| net.machine(name, Nat::None));
    let line = Line::join(&hosts[0], &hosts[1], Faults::NONE);
    let mut nodes = hosts.map(|host| Node::start(&net, &host, &server));
    for peer in [1, 2] {
        ping::assert_answers(&nodes[0].host, &nodes[peer].ipv4());
        let name = nodes[peer].name.clone();
        nodes[0].wait_path(&name, "direct", LIMIT);
    }
    let [alice, bob, carol] = &nodes;
    line.slow_down(Duration::from_millis(4));
    let flood = Flow::start(&alice.host, &bob.host, &bob.ipv4(), BYTES, FLOOD);
    let modest = Flow::start(&alice.host, &carol.host, &carol.ipv4(), BYTES, MODEST);
    std::thread::sleep(SPAN);
    let modest = modest.finish();
    line.slow_down(Duration::ZERO);
    flood.finish();
    assert_kept("slow line", &modest);
}

/// Load comes and goes, so that the interface is handed from thread to thread and back.
fn order() {
    let (_net, _server, nodes) = three(Nat::None, false, ["direct"; 2]);
    let [alice, bob, _] = &nodes;
    let flow = Flow::start(&alice.host, &bob.host, &bob.ipv4(), 300, 6);
    let back = Flow::start(&bob.host, &alice.host, &alice.ipv4(), 300, 6);
    for _ in 0..8 {
        let burst = Flow::start(&alice.host, &bob.host, &bob.ipv6(), BYTES, 100);
        std::thread::sleep(Duration::from_millis(60));
        let burst = burst.finish();
        assert_eq!(burst.out_of_order(), 0, "a burst");
    }
    let (flow, back) = (flow.finish(), back.finish());
    assert_eq!((flow.out_of_order(), back.out_of_order()), (0, 0));
    assert!(flow.part() > 0.9 && back.part() > 0.9, "{} and {}", flow.part(), back.part());
}
