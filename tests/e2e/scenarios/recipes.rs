//! The lab checks itself: a NAT recipe that is not what it says must not pass for one.

use crate::case::Case;
use crate::lab::Net;
use crate::nat::Nat;
use crate::probe::{Reflectors, classify, punch};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Nat::ALL
        .into_iter()
        .map(|nat| Case::new(format!("recipes::{nat}_is_what_it_says"), move || classifies(nat)))
        .collect();
    cases.push(Case::new("recipes::blocked_udp_passes_tcp_only", blocked_udp_passes_tcp_only));
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
