//! More of the matrix: two NATs in a row, two nodes behind one NAT, IPv6, and half a pair without
//! UDP.

use std::time::Duration;

use crate::case::Case;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, PORT, Server, find_peer};
use crate::ping::{self, Stream};
use crate::topology::server_endpoints;

use super::matrix::{PATH_LIMIT, check_pair, check_verdicts};
use Nat::{AddressRestricted, FullCone, None, OpenInput, PortRestricted, Sequential, Symmetric};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // Two NATs in a row are together as strict as the stricter one.
    for (home, provider, other, kind) in [
        (PortRestricted, PortRestricted, None, "direct"),
        (PortRestricted, PortRestricted, FullCone, "direct"),
        (PortRestricted, PortRestricted, PortRestricted, "direct"),
        (PortRestricted, PortRestricted, Symmetric, "relay-udp"),
        (PortRestricted, FullCone, PortRestricted, "direct"),
        (PortRestricted, AddressRestricted, PortRestricted, "direct"),
        (FullCone, Symmetric, FullCone, "direct"),
        (FullCone, Symmetric, PortRestricted, "relay-udp"),
    ] {
        let name = format!("matrix::{home}_behind_{provider}_with_{other}");
        cases.push(Case::new(name, move || behind_provider(home, provider, other, kind)));
    }
    cases.push(Case::new("matrix::a_provider_on_both_sides", two_providers));
    for (what, home, hairpin, kind, word) in [
        ("with_hairpin", PortRestricted, true, "direct", "direct-punched"),
        ("without_hairpin", PortRestricted, false, "relay-udp", "same-nat-no-hairpin"),
        ("by_inner_addresses", None, false, "direct", "direct-lan"),
    ] {
        let name = format!("matrix::two_customers_of_one_provider_{what}");
        cases.push(Case::new(name, move || two_customers(home, hairpin, kind, word)));
    }
    for hairpin in [true, false] {
        let what = if hairpin { "with" } else { "without" };
        let name = format!("matrix::one_home_{what}_hairpin_talks_inside_it");
        cases.push(Case::new(name, move || one_home(hairpin)));
    }
    cases.push(Case::new("matrix::one_home_and_one_port_for_both", one_port));
    cases.push(Case::new("matrix::open-input_with_sequential", || {
        plain(OpenInput, Sequential, "direct");
    }));
    cases.push(Case::new("matrix::sequential_with_open-input", || {
        plain(Sequential, OpenInput, "direct");
    }));
    cases.push(Case::new("matrix::ipv6_only_pair", ipv6_only));
    cases.push(Case::new("matrix::dual_stack_goes_on_when_ipv4_breaks", dual_stack));
    cases.push(Case::new("matrix::udp_blocked_on_the_first_side", || half_blocked(true)));
    cases.push(Case::new("matrix::udp_blocked_on_the_second_side", || half_blocked(false)));
    cases
}

struct Place {
    net: Net,
    server: Server,
}

fn place() -> Place {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", None));
    Place { net, server }
}

fn behind_provider(home: Nat, provider: Nat, other: Nat, kind: &str) {
    let Place { net, server } = place();
    let carrier = net.provider("carrier", provider, false);
    let alice = net.customer("alice", home, &carrier);
    let bob = net.machine("bob", other);
    let what = format!("{home} behind {provider} with {other}");
    let nodes = check_pair(&what, &net, &server, [&alice, &bob], (kind, PATH_LIMIT));
    let both = if provider == Symmetric { Symmetric } else { PortRestricted };
    check_verdicts(&nodes, [both.verdict(other, kind), other.verdict(both, kind)]);
}

fn two_providers() {
    let Place { net, server } = place();
    let [alice, bob] = [("alice", "east"), ("bob", "west")].map(|(name, provider)| {
        let carrier = net.provider(provider, PortRestricted, false);
        net.customer(name, PortRestricted, &carrier)
    });
    let what = "provider with provider";
    let nodes = check_pair(what, &net, &server, [&alice, &bob], ("direct", PATH_LIMIT));
    check_verdicts(&nodes, ["direct-punched"; 2]);
}

fn two_customers(home: Nat, hairpin: bool, kind: &str, word: &str) {
    let Place { net, server } = place();
    let carrier = net.provider("carrier", FullCone, hairpin);
    let alice = net.customer("alice", home, &carrier);
    let bob = net.customer("bob", home, &carrier);
    let what = format!("customers, {home}, hairpin {hairpin}");
    let nodes = check_pair(&what, &net, &server, [&alice, &bob], (kind, PATH_LIMIT));
    check_verdicts(&nodes, [word; 2]);
}

/// Asserts that data of `node` to `peer` stays in the home.
fn assert_inside(node: &mut Node, peer: &str, host: &Host) {
    let inside = format!("{}:", host.address);
    node.wait_status("the path stays inside", Duration::from_secs(1), |status| {
        let remote = find_peer(status, peer)["path"]["remote"].as_str().unwrap_or_default();
        remote.starts_with(&inside)
    });
}

fn one_home(hairpin: bool) {
    let Place { net, server } = place();
    let alice = if hairpin {
        net.hairpin_machine("alice", FullCone)
    } else {
        net.machine("alice", PortRestricted)
    };
    let bob = net.at_home("bob", alice.router.as_ref().unwrap(), [192, 168, 1, 99].into());
    let what = format!("one home, hairpin {hairpin}");
    let mut nodes = check_pair(&what, &net, &server, [&alice, &bob], ("direct", PATH_LIMIT));
    assert_inside(&mut nodes[0], "bob", &bob);
    assert_inside(&mut nodes[1], "alice", &alice);
    check_verdicts(&nodes, ["direct-lan"; 2]);
}

/// Two machines of one home and somebody elsewhere, and the user has given all the same port.
fn one_port() {
    let Place { net, server } = place();
    let alice = net.machine("alice", PortRestricted);
    let bob = net.at_home("bob", alice.router.as_ref().unwrap(), [192, 168, 1, 99].into());
    let carol = net.machine("carol", PortRestricted);
    let [mut left, mut right, mut far] = [&alice, &bob, &carol].map(|host| {
        let mut node = Node::new(&net, host);
        node.add_args(&["--listen-port", "41000"]);
        node.up(&server.join());
        node.wait_connected();
        node
    });
    for (node, peer) in [(&mut left, "bob"), (&mut right, "alice")] {
        node.wait_path(peer, "direct", PATH_LIMIT);
    }
    assert_inside(&mut left, "bob", &bob);
    assert_inside(&mut right, "alice", &alice);
    for peer in ["alice", "bob"] {
        far.wait_path(peer, "direct", PATH_LIMIT);
    }
    left.wait_path("carol", "direct", PATH_LIMIT);
    right.wait_path("carol", "direct", PATH_LIMIT);
    for node in [&left, &right] {
        ping::assert_answers(&far.host, &node.ipv4());
    }
}

fn plain(a: Nat, b: Nat, kind: &str) {
    let Place { net, server } = place();
    let (alice, bob) = (net.machine("alice", a), net.machine("bob", b));
    let what = format!("{a} with {b}");
    let limit = Duration::from_secs(3);
    let nodes = check_pair(&what, &net, &server, [&alice, &bob], (kind, limit));
    check_verdicts(&nodes, [a.verdict(b, kind), b.verdict(a, kind)]);
}

fn ipv6_only() {
    let net = Net::new();
    let host = net.machine("server", None);
    let ipv6 = net.add_ipv6(&host);
    let endpoints = server_endpoints(Option::None, ipv6, PORT);
    let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
    let server = Server::start_at(&net, &host, &endpoints, &endpoints, "");
    let [alice, bob] = ["alice", "bob"].map(|name| {
        let host = net.machine(name, PortRestricted);
        net.add_ipv6(&host);
        net.remove_ipv4(&host);
        host
    });
    let nodes = check_pair("IPv6 only", &net, &server, [&alice, &bob], ("direct", PATH_LIMIT));
    check_verdicts(&nodes, ["direct-ipv6"; 2]);
}

/// Both families work; when the one in use breaks, data is on the other within a second, whatever
/// was preferred before.
fn dual_stack() {
    let net = Net::new();
    let host = net.machine("server", None);
    let ipv6 = net.add_ipv6(&host);
    let endpoints = server_endpoints(Some(host.address), ipv6, PORT);
    let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
    let server = Server::start_at(&net, &host, &endpoints, &endpoints, "");
    let [alice, bob] = ["alice", "bob"].map(|name| {
        let host = net.machine(name, PortRestricted);
        net.add_ipv6(&host);
        host
    });
    let [mut left, mut right] =
        check_pair("dual stack", &net, &server, [&alice, &bob], ("direct", PATH_LIMIT));
    let stream = Stream::start(&net, &right.host, &left.ipv4());
    stream.wait_for_more(50);
    alice.router.as_ref().unwrap().ns.nft(
        "table ip noudp {\n chain forward { type filter hook forward priority -5; policy accept;\n  \
         meta l4proto udp drop\n }\n}\n",
    );
    for (node, peer) in [(&mut left, "bob"), (&mut right, "alice")] {
        node.wait_status("direct over IPv6", Duration::from_secs(5), |status| {
            let path = &find_peer(status, peer)["path"];
            let remote = path["remote"].as_str().unwrap_or_default();
            path["kind"] == "direct" && remote.starts_with('[')
        });
    }
    stream.wait_for_more(50);
    let lost = stream.stop().lost.len();
    eprintln!("IPv4 breaks: {lost} packets at 10 ms lost before IPv6 took over");
    assert!(lost <= 100, "{lost} packets at 10 ms were lost");
    check_verdicts(&[left, right], ["direct-ipv6"; 2]);
}

/// The relay takes TCP on one leg and UDP on the other, and each node shows its own.
fn half_blocked(first: bool) {
    let Place { net, server } = place();
    let hosts = ["alice", "bob"].map(|name| net.machine(name, PortRestricted));
    hosts[usize::from(!first)].router.as_ref().unwrap().block_udp();
    let mut alice = Node::start(&net, &hosts[0], &server);
    let mut bob = Node::new(&net, &hosts[1]);
    bob.up(&server.join());
    let limit = Duration::from_secs(5);
    let answer = ping::first_answer(&bob.host, &alice.ipv4(), bob.started, limit);
    let mut kinds = ["relay-udp"; 2];
    kinds[usize::from(!first)] = "relay-tcp";
    bob.wait_path("alice", kinds[1], limit);
    alice.wait_path("bob", kinds[0], limit);
    let settled = bob.started.elapsed();
    let what = ["port-restricted with UDP blocked", "UDP blocked with port-restricted"];
    let [what, kind] = [what[usize::from(first)], &kinds.join("/")];
    eprintln!("{what}: first answer after {answer:.0?}, {kind} both ways after {settled:.0?}");
    if std::env::var_os("OVERLAY_E2E_TIMES_ONLY").is_some() {
        return;
    }
    let there = Stream::start(&net, &bob.host, &alice.ipv4());
    let back = Stream::start(&net, &alice.host, &bob.ipv6());
    there.wait_for_more(100);
    back.wait_for_more(100);
    there.stop_without_loss();
    back.stop_without_loss();
    assert_eq!(alice.path_kind("bob"), kinds[0]);
    assert_eq!(bob.path_kind("alice"), kinds[1]);
    let mut words = ["udp-blocked-there"; 2];
    words[usize::from(!first)] = "udp-blocked-here";
    check_verdicts(&[alice, bob], words);
}
