//! `overlay netcheck`: the kind of NAT, in words.

use crate::case::Case;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, Server, parse};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Nat::ALL
        .into_iter()
        .map(|nat| Case::new(format!("netcheck::{nat}_is_told"), move || told(nat)))
        .collect();
    cases.push(Case::new("netcheck::blocked_udp_is_told", blocked_udp));
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
    assert_is_sentence(&report);
}

fn assert_is_sentence(report: &serde_json::Value) {
    let verdict = report["verdict"].as_str().unwrap_or_default();
    assert!(verdict.split(' ').count() > 3, "a sentence: {report}");
}
