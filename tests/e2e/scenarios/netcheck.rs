//! `overlay netcheck`: the kind of NAT, in words.

use std::time::Duration;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, START_LIMIT, Server, find_peer, parse};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Nat::ALL
        .into_iter()
        .map(|nat| Case::new(format!("netcheck::{nat}_is_told"), move || told(nat)))
        .collect();
    cases.push(Case::new("netcheck::blocked_udp_is_told", blocked_udp));
    cases.push(Case::new("netcheck::every_peer_has_a_forecast", forecasts));
    cases.push(Case::new("netcheck::a_narrow_link_is_measured", narrow));
    cases
}

/// The words that fit; two ports of one server address cannot tell some kinds apart.
fn fitting(nat: Nat) -> &'static [&'static str] {
    match nat {
        Nat::None => &["none"],
        Nat::FullCone | Nat::AddressRestricted => {
            &["full-cone", "address-restricted", "full-cone-or-address-restricted"]
        }
        Nat::PortRestricted | Nat::OpenInput => &["port-restricted"],
        Nat::Symmetric | Nat::Sequential | Nat::Decrementing | Nat::ByTwo => &["symmetric"],
    }
}

fn told(nat: Nat) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = Node::start(&net, &net.machine("alice", nat), &server);
    let report = parse(&alice.cli(&["netcheck", "--json"]).success("netcheck"));
    let kind = report["nat"]["kind"].as_str().unwrap_or_default();
    assert!(fitting(nat).contains(&kind), "{nat} is called {kind}: {report}");
    assert_eq!(report["udp"], true, "{report}");
    for key in ["mapping", "filtering"] {
        assert!(report["nat"][key].is_string(), "{report}");
    }
    let servers = report["servers"].as_array().expect("servers");
    assert!(servers[0]["rtt_ms"].as_f64().is_some_and(|rtt| rtt < 1000.0), "{report}");
    assert_eq!(servers[0]["udp_blocked"], false, "{report}");
    assert_eq!(servers[0]["path_mtu"], 1500, "{report}");
    assert_is_sentence(&report);

    let spoken = alice.cli(&["netcheck"]).success("netcheck");
    let verdict = report["verdict"].as_str().unwrap();
    assert!(spoken.contains(verdict), "people read the same verdict:\n{spoken}");
}

fn blocked_udp() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let host = net.machine("alice", Nat::PortRestricted);
    host.router.as_ref().unwrap().block_udp();
    let alice = Node::start(&net, &host, &server);
    let report = parse(&alice.cli(&["netcheck", "--json"]).success("netcheck"));
    assert_eq!(report["udp"], false, "{report}");
    assert_eq!(report["nat"]["kind"], "udp-blocked", "{report}");
    assert_eq!(report["servers"][0]["udp_blocked"], true, "{report}");
    assert_is_sentence(&report);
}

fn forecasts() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let kinds = [
        ("public", Nat::None),
        ("cone", Nat::FullCone),
        ("ordinary", Nat::PortRestricted),
        ("counting", Nat::Sequential),
        ("random", Nat::Symmetric),
        ("other", Nat::Symmetric),
    ];
    let mut nodes = kinds.map(|(name, nat)| Node::start(&net, &net.machine(name, nat), &server));
    let mut gone = Node::start(&net, &net.machine("gone", Nat::None), &server);
    assert_eq!(gone.stop(), Some(0));
    for node in &mut nodes {
        node.wait_status("gone is offline", START_LIMIT, |status| {
            find_peer(status, "gone")["path"]["kind"] == "offline"
        });
    }
    let expected = [
        ("public", &[("cone", "direct"), ("random", "direct"), ("gone", "offline")][..]),
        ("cone", &[("public", "direct"), ("ordinary", "direct"), ("random", "direct")]),
        (
            "ordinary",
            &[
                ("public", "direct"),
                ("cone", "direct"),
                ("counting", "direct-after-prediction"),
                ("random", "relay-unless-guessed"),
            ],
        ),
        ("counting", &[("ordinary", "direct-after-prediction"), ("random", "relay")]),
        (
            "random",
            &[("public", "direct"), ("ordinary", "relay-unless-guessed"), ("other", "relay")],
        ),
    ];
    for (name, peers) in expected {
        let node = nodes.iter().find(|node| node.name == name).expect("a node");
        for (peer, forecast) in peers {
            // A question to a peer may get lost, and is asked anew with the next command.
            wait_for(&format!("{name} expects {forecast} of {peer}"), FORECAST_LIMIT, || {
                let report = parse(&node.cli(&["netcheck", "--json"]).success("netcheck"));
                let all = report["forecast"].as_array().expect("a forecast").clone();
                let told = all.iter().find(|it| it["name"] == *peer).expect("the peer").clone();
                assert!(told["reason"].is_string(), "{told}");
                (told["forecast"] == *forecast).then_some(())
            });
        }
    }
}

fn narrow() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let host = net.machine("alice", Nat::PortRestricted);
    host.router.as_ref().unwrap().ns.ip("link set dev wan mtu 1400");
    let alice = Node::start(&net, &host, &server);
    let report = parse(&alice.cli(&["netcheck", "--json"]).success("netcheck"));
    assert_eq!(report["servers"][0]["path_mtu"], 1400, "{report}");
}

/// A measurement takes two seconds.
const FORECAST_LIMIT: Duration = Duration::from_secs(15);

fn assert_is_sentence(report: &serde_json::Value) {
    let verdict = report["verdict"].as_str().unwrap_or_default();
    assert!(verdict.split(' ').count() > 3, "a sentence: {report}");
}
