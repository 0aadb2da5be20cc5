//! The lab checks itself: a NAT recipe that is not what it says must not pass for one.

use std::time::Duration;

use crate::attack::{self, Recorder};
use crate::case::Case;
use crate::lab::Net;
use crate::nat::Nat;
use crate::ping::{self, Stream};
use crate::probe::{Reflectors, classify, punch};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Nat::ALL
        .into_iter()
        .map(|nat| Case::new(format!("recipes::{nat}_is_what_it_says"), move || classifies(nat)))
        .collect();
    cases.push(Case::new("recipes::blocked_udp_passes_tcp_only", blocked_udp_passes_tcp_only));
    cases.push(Case::new("recipes::a_ping_stream_notices_one_lost_packet", stream_notices_loss));
    cases.push(Case::new("recipes::a_recorder_sees_payloads_as_sent", recorder_sees_payloads));
    cases.push(Case::new("recipes::a_dual_stack_home_is_closed_to_strangers", ipv6_home));
    cases.push(Case::new("recipes::punching_joins_the_pairs_of_the_table", punching_table));
    cases
}

fn classifies(nat: Nat) {
    let net = Net::new();
    let server = net.machine("server", Nat::None);
    let client = net.machine("client", nat);
    let reflectors = Reflectors::open(&server);
    assert_eq!(classify(&client, &reflectors), nat);

    // The kind is a property of the router and not of what it happens to remember.
    if let Some(router) = &client.router {
        router.forget_flows();
    }
    assert_eq!(classify(&client, &reflectors), nat, "after the router forgot its flows");
}

fn blocked_udp_passes_tcp_only() {
    let net = Net::new();
    let server = net.machine("server", Nat::None);
    let client = net.machine("client", Nat::PortRestricted);
    let reflectors = Reflectors::open(&server);
    let listener = server.ns.enter(|| std::net::TcpListener::bind((server.address, 7001)).unwrap());
    client.router.as_ref().unwrap().block_udp();

    let socket = crate::probe::open_socket(&client, ([0, 0, 0, 0], 0).into());
    assert!(!reflectors.hears(&socket), "UDP is blocked");
    let stream = client.ns.enter(|| std::net::TcpStream::connect((server.address, 7001)));
    assert!(stream.is_ok() && listener.accept().is_ok(), "TCP passes");
}

fn punching_table() {
    let net = Net::new();
    let server = net.machine("server", Nat::None);
    let reflectors = Reflectors::open(&server);
    let left = Nat::ALL.map(|nat| (nat, net.machine(&format!("left-{nat}"), nat)));
    let right = Nat::ALL.map(|nat| (nat, net.machine(&format!("right-{nat}"), nat)));
    for (a, alice) in &left {
        for (b, bob) in &right {
            let joined = punch(alice, bob, &reflectors);
            assert_eq!(joined, a.can_be_punched(*b), "{a} with {b}");
        }
    }
}

fn stream_notices_loss() {
    let net = Net::new();
    let [alice, bob] = ["alice", "bob"].map(|name| net.machine(name, Nat::None));
    let stream = Stream::start(&net, &alice, &bob.address.to_string());
    stream.wait_for_more(20);
    let received = stream.stop_without_loss();
    assert!(received.packets >= 20);

    // The thirtieth request dies.
    bob.ns.nft(
        "table inet lossy {\n chain input { type filter hook input priority 0; policy accept;\n  \
         icmp type echo-request numgen inc mod 1000 30 drop\n }\n}\n",
    );
    let stream = Stream::start(&net, &alice, &bob.address.to_string());
    stream.wait_for_more(50);
    assert_eq!(stream.stop().lost, [31]);
    ping::assert_silent(&alice, "203.0.113.250");
}

fn recorder_sees_payloads() {
    let net = Net::new();
    let [alice, bob] = ["alice", "bob"].map(|name| net.machine(name, Nat::None));
    let recorder = Recorder::open(&bob, 7001);
    let sent = [b"first".to_vec(), b"second".to_vec()];
    for port in [7001, 7002] {
        attack::flood(&alice, (bob.address, port).into(), &sent);
    }
    assert_eq!(recorder.record(Duration::from_millis(100)), sent);
}

fn ipv6_home() {
    let net = Net::new();
    let server = net.machine("server", Nat::None);
    let outside = net.add_ipv6(&server).to_string();
    let [alice, bob] = ["alice", "bob"].map(|name| net.machine(name, Nat::Symmetric));
    let [_, inside] = [&alice, &bob].map(|host| net.add_ipv6(host).to_string());
    ping::assert_answers(&alice, &outside);
    ping::assert_silent(&server, &inside);
    ping::assert_silent(&alice, &inside);
}
