//! Narrow links and wide ones: what fits is found out, used, and told to who sends more.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server, find_peer};
use crate::process;
use crate::scenarios::offload::streams_are_equal;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = [1_124, 1_280, 1_420, 1_500, 9_000]
        .into_iter()
        .map(|link| Case::new(format!("mtu::links_of_{link}_carry_bulk"), move || bulk(link)))
        .collect();
    for link in [1_124, 1_280, 1_340] {
        let name = format!("mtu::a_relayed_pair_with_a_link_of_{link}_carries_bulk");
        cases.push(Case::new(name, move || relayed(link)));
    }
    let name = "mtu::a_relayed_pair_with_a_link_that_only_trains_pass_carries_bulk";
    cases.push(Case::new(name, relayed_by_trains));
    for link in [1_280, 1_340] {
        let name = format!("mtu::ipv6_links_of_{link}_carry_bulk");
        cases.push(Case::new(name, move || by_ipv6(link)));
    }
    cases.push(Case::new("mtu::a_sender_of_too_much_is_told", sender_is_told));
    cases.push(Case::new("mtu::a_fixed_mtu_is_an_upper_bound", fixed));
    cases
}

/// What goes around an inner packet on an IPv4 path.
const OVERHEAD: u16 = 60;
const LIMIT: Duration = Duration::from_secs(10);

struct Pair {
    net: Net,
    server: Server,
    alice: Node,
    bob: Node,
}

/// Two homes whose way to the internet takes packets of up to `link` bytes; what is wider than
/// Ethernet is so everywhere.
fn pair(link: u16, args: &[&str]) -> Pair {
    let net = Net::new();
    let hosts = ["server", "alice", "bob"].map(|name| {
        net.machine(name, if name == "server" { Nat::None } else { Nat::PortRestricted })
    });
    if link > 1_500 {
        net.set_internet_mtu(link);
    }
    for host in &hosts {
        let set = |ns: &crate::lab::Namespace, dev: &str| {
            ns.ip(&format!("link set dev {dev} mtu {link}"));
        };
        match &host.router {
            None => set(&host.ns, "eth0"),
            Some(router) => {
                set(&router.ns, "wan");
                if link > 1_500 {
                    set(&router.ns, &format!("l{}", host.address.octets()[3]));
                    set(&router.ns, "lan");
                    set(&host.ns, "eth0");
                }
            }
        }
    }
    let server = Server::start(&net, &hosts[0]);
    let [mut alice, mut bob] = [&hosts[1], &hosts[2]].map(|host| {
        let mut node = Node::new(&net, host);
        node.add_args(args);
        node.up(&server.join());
        node
    });
    alice.wait_path("bob", "direct", LIMIT);
    bob.wait_path("alice", "direct", LIMIT);
    Pair { net, server, alice, bob }
}

/// The same by relay.
const RELAY_OVERHEAD: u16 = OVERHEAD + 8;

/// Two nodes that have nothing but the relay.
fn relayed_pair() -> Pair {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let [mut alice, mut bob] =
        ["alice", "bob"].map(|name| Node::start(&net, &net.machine(name, Nat::Symmetric), &server));
    for (node, peer) in [(&mut alice, "bob"), (&mut bob, "alice")] {
        node.wait_path(peer, "relay-udp", LIMIT);
    }
    Pair { net, server, alice, bob }
}

/// All that two symmetric NATs have is the relay, and the way between it and one of them loses what is
/// longer than `link`, and fragments, without a word.
fn relayed(link: u16) {
    let Pair { net: _net, server, mut alice, mut bob } = relayed_pair();
    // What the kernel cuts late would look too long to the rules.
    for host in [&server.host, &alice.host, &bob.host] {
        host.ns.ip("link set dev eth0 gso_max_segs 1");
    }
    let router = bob.host.router.as_ref().expect("it is behind a NAT");
    router.ns.nft(&format!(
        "table ip hole {{
           chain in {{
             type filter hook prerouting priority -450; policy accept;
             iifname \"wan\" meta length > {link} drop
             iifname \"wan\" ip frag-off & 0x3fff != 0 drop
           }}
           chain out {{
             type filter hook postrouting priority 450; policy accept;
             oifname \"wan\" meta length > {link} drop
           }}
         }}
         "
    ));
    streams_are_equal(&alice.host, &bob.host, bob.ipv4().parse().unwrap());
    streams_are_equal(&bob.host, &alice.host, alice.ipv4().parse().unwrap());
    let inner = link - RELAY_OVERHEAD;
    wait_mtu(&mut alice, "bob", inner);
    wait_mtu(&mut bob, "alice", inner);
    // IPv6 has no narrower links than 1280: what does not fit goes by the control connections.
    streams_are_equal(&alice.host, &bob.host, bob.ipv6().parse().unwrap());
    streams_are_equal(&bob.host, &alice.host, alice.ipv6().parse().unwrap());
    assert_eq!(ping_whole(&alice.host, &bob.ipv6(), 1_280).0, Some(0));
    assert_eq!(ping_whole(&alice.host, &bob.ipv4(), inner).0, Some(0));
    // A route that knows nothing of the path, as a forwarded packet has none.
    let host = &alice.host;
    host.ns.ip(&format!("route replace {}/32 dev overlay0 mtu 1280", bob.ipv4()));
    let (_, said) = ping_whole(host, &bob.ipv4(), 1_280);
    assert!(said.to_lowercase().contains(&format!("mtu = {inner}")), "{said}");
    assert_eq!(alice.path_kind("bob"), "relay-udp");
}

/// The link of one of them is narrow and loses what is too long without a word; but the kernel does not look at
/// the datagrams of a train that comes in by it.
fn relayed_by_trains() {
    const LINK: u16 = 1_280;
    let Pair { net: _net, server: _server, mut alice, bob } = relayed_pair();
    let router = bob.host.router.as_ref().expect("it is behind a NAT");
    router.ns.ip(&format!("link set dev wan mtu {LINK}"));
    router.ns.nft(
        "table ip mute {
           chain out {
             type filter hook output priority 0; policy accept;
             meta l4proto icmp drop
           }
         }
         ",
    );
    streams_are_equal(&alice.host, &bob.host, bob.ipv4().parse().unwrap());
    streams_are_equal(&bob.host, &alice.host, alice.ipv4().parse().unwrap());
    wait_mtu(&mut alice, "bob", LINK - RELAY_OVERHEAD);
}

/// What goes around an inner packet on an IPv6 path.
const IPV6_OVERHEAD: u16 = 80;

/// Two machines that have only IPv6 for each other, by links that a full packet is too long for.
fn by_ipv6(link: u16) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let hosts = ["alice", "bob"].map(|name| net.machine(name, Nat::None));
    let [mut alice, mut bob] = [(0, 1), (1, 0)].map(|(own, far)| {
        let host = &hosts[own];
        net.add_ipv6(host);
        host.ns.ip(&format!("link set dev eth0 mtu {link}"));
        host.ns.nft(&format!(
            "table ip lone {{
               chain in {{
                 type filter hook input priority 0; policy accept;
                 ip saddr {} drop
               }}
             }}
             ",
            hosts[far].address
        ));
        Node::start(&net, host, &server)
    });
    for (node, peer) in [(&mut alice, "bob"), (&mut bob, "alice")] {
        node.wait_path(peer, "direct", LIMIT);
        wait_mtu(node, peer, link - IPV6_OVERHEAD);
    }
    for (from, to) in [(&alice, &bob), (&bob, &alice)] {
        streams_are_equal(&from.host, &to.host, to.ipv6().parse().unwrap());
        streams_are_equal(&from.host, &to.host, to.ipv4().parse().unwrap());
        // IPv6 has no narrower links: the outer datagram is cut.
        assert_eq!(ping_whole(&from.host, &to.ipv6(), 1_280).0, Some(0));
    }
    let status = alice.status().unwrap();
    let path = &find_peer(&status, "bob")["path"];
    assert!(path["kind"] == "direct" && path["remote"].to_string().contains('['), "{path}");
}

fn wait_mtu(node: &mut Node, peer: &str, mtu: u16) {
    node.wait_status(&format!("the path to {peer} carries {mtu}"), LIMIT, |status| {
        find_peer(status, peer)["path"]["mtu"] == mtu
    });
}

/// Bulk both ways in both families starts at once, when little is known, and again when all is.
fn bulk(link: u16) {
    let Pair { net, server: _server, mut alice, mut bob } = pair(link, &[]);
    let inner = link - OVERHEAD;
    let [there, back] = [bob.ipv4(), alice.ipv6()].map(|address| address.parse().unwrap());
    // Packets of full length all the while: nothing that the kernel is told of the path on the way to
    // what it carries may stay.
    let mut pings = alice.host.ns.command("ping");
    let payload = (inner - 28).to_string();
    pings.args(["-n", "-q", "-M", "do", "-s", &payload, "-i", "0.001", &bob.ipv4()]);
    let mut pings = process::Daemon::start(pings, &net.log_file("pings"));
    streams_are_equal(&alice.host, &bob.host, there);
    streams_are_equal(&bob.host, &alice.host, back);
    wait_mtu(&mut alice, "bob", link - OVERHEAD);
    wait_mtu(&mut bob, "alice", link - OVERHEAD);
    streams_are_equal(&alice.host, &bob.host, bob.ipv6().parse().unwrap());
    streams_are_equal(&bob.host, &alice.host, alice.ipv4().parse().unwrap());
    // The kernel knows it, too, and a packet of that size passes whole.
    let route = || alice.host.ns.ip(&format!("route get {there}"));
    wait_for("the route's MTU", LIMIT, || route().contains(&format!("mtu {inner}")).then_some(()));
    pings.signal(Signal::SIGINT);
    pings.wait_exit(LIMIT);
    assert!(route().contains(&format!("mtu {inner}")), "{}", route());
    assert_eq!(ping_whole(&alice.host, &bob.ipv4(), inner).0, Some(0));
    if link < 1_340 {
        // IPv6 has no narrower links: the outer datagram is cut.
        assert_eq!(ping_whole(&alice.host, &bob.ipv6(), 1_280).0, Some(0));
    }
    if link == 1_500 {
        // Another MTU of the machine's own link is heard of, and not found out after minutes.
        for own in [1_280, 1_500] {
            alice.host.ns.ip(&format!("link set dev eth0 mtu {own}"));
            wait_mtu(&mut alice, "bob", own - OVERHEAD);
        }
    }
}

/// Three pings of `len` bytes that must not be cut; the exit code and what was said.
fn ping_whole(host: &Host, address: &str, len: u16) -> (Option<i32>, String) {
    let headers = if address.contains(':') { 48 } else { 28 };
    let payload = (len - headers).to_string();
    let mut command = host.ns.command("ping");
    command.args(["-n", "-M", "do", "-s", &payload, "-i", "0.1", "-c", "3", "-w", "3", address]);
    let output = process::run(command, Duration::from_secs(20));
    (output.code, output.stdout + &output.stderr)
}

fn sender_is_told() {
    let Pair { net: _net, server: _server, mut alice, bob } = pair(1_420, &[]);
    wait_mtu(&mut alice, "bob", 1_360);
    for (address, length, mark) in
        [(bob.ipv4(), "32", "mtu = 1360"), (bob.ipv6(), "128", "mtu=1360")]
    {
        // A route that knows nothing of the path, as a forwarded packet has none.
        let family = if length == "32" { "-4" } else { "-6" };
        let host = &alice.host;
        host.ns.ip(&format!("{family} route replace {address}/{length} dev overlay0 mtu 1440"));
        let (_, said) = ping_whole(host, &address, 1_440);
        assert!(said.to_lowercase().contains(mark), "{said}");
    }
    let status = alice.status().unwrap();
    assert!(find_peer(&status, "bob")["too_big"].as_u64() >= Some(2), "{status}");
    // A wider link comes: the interface is as wide, and the path is what it is.
    assert_eq!(status["self"]["mtu"], 1_440);
    alice.host.ns.ip("link set dev eth0 mtu 1600");
    alice.wait_status("a wider interface", LIMIT, |status| status["self"]["mtu"] == 1_540);
    assert!(alice.host.ns.ip("-o link show dev overlay0").contains("mtu 1540"));
    wait_mtu(&mut alice, "bob", 1_360);
}

fn fixed() {
    let Pair { net: _net, server: _server, mut alice, bob } = pair(1_500, &["--mtu", "1380"]);
    wait_mtu(&mut alice, "bob", 1_380);
    assert_eq!(alice.status().unwrap()["self"]["mtu"], 1_380);
    assert_eq!(ping_whole(&alice.host, &bob.ipv4(), 1_380).0, Some(0));
    assert!(alice.host.ns.ip("-o link show dev overlay0").contains("mtu 1380"));
}
