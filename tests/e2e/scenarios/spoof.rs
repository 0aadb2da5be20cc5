//! Inner packets that lie about their sender.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::{Namespace, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server};
use crate::ping::{self, Stream};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("spoof::a_stranger_as_source_is_dropped_and_counted", || spoof(Source::Unused)),
        Case::new("spoof::another_member_as_source_is_dropped_and_counted", || {
            spoof(Source::Carol);
        }),
        Case::new("spoof::an_underlay_address_as_source_is_dropped_and_counted", || {
            spoof(Source::Underlay);
        }),
        Case::new("spoof::who_is_in_the_lan_of_a_node_gets_nothing_into_the_network", lan),
    ]
}

/// Whom the lying packets claim to come from.
#[derive(Clone, Copy)]
enum Source {
    Unused,
    Carol,
    Underlay,
}

fn spoof(source: Source) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let [alice, bob, carol] = ["alice", "bob", "carol"]
        .map(|name| Node::start(&net, &net.machine(name, Nat::None), &server));
    let (alice_ipv4, bob_ipv4) = (alice.ipv4(), bob.ipv4());
    let lie = match source {
        Source::Unused => unused_beside(&[&alice_ipv4, &bob_ipv4, &carol.ipv4()]),
        Source::Carol => carol.ipv4(),
        Source::Underlay => "198.51.100.7".to_owned(),
    };
    let interface = crate::overlay::text(&alice.status().unwrap(), "/self/interface");
    alice.host.ns.ip(&format!("addr add {lie}/32 dev {interface}"));
    bob.host.ns.nft(&format!(
        "table inet watch {{\n chain input {{ type filter hook input priority -300; policy accept;\n  \
         ip saddr {lie} counter comment \"lie\"\n  ip saddr {alice_ipv4} counter comment \"truth\"\n }}\n}}\n"
    ));
    ping::assert_answers(&alice.host, &bob_ipv4);
    let before = counted(&[&alice, &bob]);
    let stream = Stream::start(&net, &bob.host, &alice_ipv4);

    let args = ["-n", "-q", "-i", "0.02", "-c", "20", "-W", "1", "-I", &lie, &bob_ipv4];
    let output = alice.host.ns.run("ping", &args);
    assert_eq!(output.code, Some(1), "a lie is not answered\n{}", output.stdout);

    wait_for("every lie is counted as a drop", Duration::from_secs(3), || {
        (counted(&[&alice, &bob]) >= before + 20).then_some(())
    });
    assert_eq!(packets(&bob.host.ns, "lie"), 0, "no lying packet comes out at bob");
    stream.wait_for_more(20);
    stream.stop_without_loss();
    assert!(packets(&bob.host.ns, "truth") > 20, "the counter counts");
}

/// A node whose machine is a router as well, and a guest in its LAN.
fn lan() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let home = net.machine("alice", Nat::PortRestricted);
    let router = home.router.clone().expect("a home has a router");
    let guest = net.at_home("guest", &router, Ipv4Addr::new(192, 168, 1, 200));
    let alice = Node::start(&net, &home, &server);
    let bob = Node::start(&net, &net.machine("bob", Nat::None), &server);
    let (guest_ipv4, bob_ipv4) = (guest.address.to_string(), bob.ipv4());
    ping::assert_answers(&alice.host, &bob_ipv4);
    home.ns.sysctl("net/ipv4/ip_forward", "1");
    let watch = |ns: &Namespace, source: &str| {
        ns.nft(&format!(
            "table inet watch {{\n chain input {{ type filter hook prerouting priority -300; \
             policy accept;\n  ip saddr {source} counter comment \"foreign\"\n }}\n}}\n"
        ));
    };
    watch(&bob.host.ns, &guest_ipv4);
    watch(&guest.ns, &bob_ipv4);

    // Into the network: alice's kernel hands over what is not hers.
    guest.ns.ip(&format!("route add {bob_ipv4}/32 via {}", home.address));
    let before = counted(&[&alice, &bob]);
    let args = |target: &str| -> Vec<String> {
        "-n -q -i 0.02 -c 20 -W 1".split(' ').chain([target]).map(str::to_owned).collect()
    };
    let ping = |ns: &Namespace, target: &str| {
        let args = args(target);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let output = ns.run("ping", &args);
        assert_eq!(output.code, Some(1), "nobody answers\n{}", output.stdout);
    };
    ping(&guest.ns, &bob_ipv4);
    wait_for("every packet is counted as a drop", Duration::from_secs(3), || {
        (counted(&[&alice, &bob]) >= before + 20).then_some(())
    });
    assert_eq!(packets(&bob.host.ns, "foreign"), 0, "nothing of the guest comes out at bob");

    // And out of it: what is not for alice herself goes no further than her node.
    let interface = crate::overlay::text(&bob.status().unwrap(), "/self/interface");
    bob.host.ns.ip(&format!("route add {guest_ipv4}/32 dev {interface} src {bob_ipv4}"));
    ping(&bob.host.ns, &guest_ipv4);
    assert_eq!(packets(&guest.ns, "foreign"), 0, "nothing of bob comes out at the guest");
    ping::assert_answers(&alice.host, &bob_ipv4);
}

/// An address of the network that nobody has.
fn unused_beside(taken: &[&str]) -> String {
    let (prefix, _) = taken[0].rsplit_once('.').unwrap();
    let mut free = (1..=254).rev().map(|last| format!("{prefix}.{last}"));
    free.find(|address| !taken.contains(&address.as_str())).unwrap()
}

/// Drops for this reason; the sender's own node may be the first to notice.
fn counted(nodes: &[&Node]) -> u64 {
    let count = |node: &&Node| node.status().unwrap()["self"]["drops"]["spoofed-source"].as_u64();
    nodes.iter().filter_map(count).sum()
}

/// Packets that the counter with this comment has seen.
fn packets(ns: &Namespace, comment: &str) -> u64 {
    let rules = ns.run("nft", &["list", "table", "inet", "watch"]).success("nft list");
    let line = rules.lines().find(|line| line.contains(comment)).expect("the counter is there");
    let (_, rest) = line.split_once("packets ").unwrap();
    rest.split(' ').next().unwrap().parse().unwrap()
}
