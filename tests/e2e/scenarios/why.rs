//! `overlay why` and `overlay history` where the matrix of NATs does not lead, and daemons that do
//! not answer.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::case::Case;
use crate::clock::{now, wait_for};
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{EXIT_LIMIT, Node, START_LIMIT, Server, assert_error, overlay, text};
use crate::ping::{self, Stream};
use crate::process::Daemon;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("why::udp_blocked_on_one_side_is_told_by_both", || blocked(false)),
        Case::new("why::udp_blocked_on_both_sides_is_told_by_both", || blocked(true)),
        Case::new("why::who_is_offline_or_removed_is_told", offline_and_removed),
        Case::new("why::one_home_without_a_way_inside_is_told", isolated_in_one_home),
        Case::new("why::a_firewall_of_one_machine_is_found", firewall),
        Case::new("why::a_peer_that_does_not_tell_its_half", silent_peer),
        Case::new("why::people_read_the_same", spoken),
        Case::new("history::a_black_holed_path_is_a_change_with_its_cause", black_hole),
        Case::new("commands::a_daemon_that_never_answers_is_6", hanging_daemon),
        Case::new("commands::status_during_the_first_enrolment_is_8", first_enrolment),
    ]
}

fn word(why: &Value) -> String {
    text(why, "/verdict/word")
}

fn blocked(both: bool) {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let [alice, bob] = ["alice", "bob"].map(|name| {
        let host = net.machine(name, Nat::PortRestricted);
        if both || name == "alice" {
            host.router.as_ref().unwrap().block_udp();
        }
        Node::start(&net, &host, &server)
    });
    let [here, there] =
        if both { ["udp-blocked-both"; 2] } else { ["udp-blocked-here", "udp-blocked-there"] };
    let why = alice.wait_verdict("bob", &[here], SETTLE_LIMIT);
    assert_eq!(why["here"]["udp"], false, "{why}");
    assert_eq!(why["there"]["udp"], !both, "{why}");
    assert!(text(&why, "/verdict/remedy").contains("on alice's"), "{why}");
    bob.wait_verdict("alice", &[there], SETTLE_LIMIT);
}

fn offline_and_removed() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = Node::start(&net, &net.machine("alice", Nat::None), &server);
    let mut bob = Node::start(&net, &net.machine("bob", Nat::None), &server);
    let ipv4 = bob.ipv4();
    alice.wait_verdict("bob", &["direct-public"], SETTLE_LIMIT);
    assert_eq!(bob.stop(), Some(0));
    let why = alice.wait_verdict("bob", &["offline"], SETTLE_LIMIT);
    assert_eq!(why["there"], Value::Null, "{why}");
    assert!(why["there_missing"].is_string(), "{why}");
    server.cli(&["remove", "bob"]).success("server remove");
    let why = alice.wait_verdict("bob", &["removed"], SETTLE_LIMIT);
    assert_eq!(why["peer"], Value::Null, "{why}");
    assert_eq!(word(&alice.why(&ipv4)), "removed", "it is still found by its address");
    for command in ["why", "history"] {
        assert_error(&alice.cli(&[command, "nobody"]), &[5], &["nobody"]);
    }
}

fn isolated_in_one_home() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let host = net.machine("alice", Nat::PortRestricted);
    let router = host.router.as_ref().unwrap();
    let other = net.at_home("bob", router, [192, 168, 1, 99].into());
    for host in [&host, &other] {
        let port = host.address.octets()[3];
        router.ns.ip(&format!("link set dev l{port} type bridge_slave isolated on"));
    }
    let alice = Node::start(&net, &host, &server);
    let bob = Node::start(&net, &other, &server);
    ping::assert_answers(&alice.host, &bob.ipv4());
    alice.wait_verdict("bob", &["same-nat-no-hairpin"], SETTLE_LIMIT);
    bob.wait_verdict("alice", &["same-nat-no-hairpin"], SETTLE_LIMIT);
}

fn firewall() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let host = net.machine("bob", Nat::None);
    host.ns.nft(&format!(
        "table inet host {{ chain input {{ type filter hook input priority 0; policy accept;
           meta l4proto udp ip saddr != {} drop
          }}
         }}",
        server.host.address
    ));
    // Costly ways are tried for half a minute, and the verdict waits for them.
    let config = "birthday-probing = false\n";
    let [alice, bob] = [net.machine("alice", Nat::None), host].map(|host| {
        let mut node = Node::with_config(&net, &host, &host.name, config);
        node.up(&server.join());
        node.wait_connected();
        node
    });
    ping::assert_answers(&alice.host, &bob.ipv4());
    let why = alice.wait_verdict("bob", &["firewall-there"], SETTLE_LIMIT);
    assert!(text(&why, "/verdict/remedy").contains("on bob"), "{why}");
    let why = bob.wait_verdict("alice", &["firewall-here"], SETTLE_LIMIT);
    assert!(text(&why, "/verdict/sentence").contains("alice hears bob"), "{why}");
}

fn silent_peer() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = Node::start(&net, &net.machine("alice", Nat::PortRestricted), &server);
    let mut bob = Node::start(&net, &net.machine("bob", Nat::PortRestricted), &server);
    alice.wait_verdict("bob", &["direct-punched"], SETTLE_LIMIT);
    bob.daemon().signal(Signal::SIGSTOP);
    // What was told a moment ago still counts.
    wait_for("bob tells nothing any more", SETTLE_LIMIT, || {
        let asked = now();
        let why = alice.why("bob");
        assert!(asked.elapsed() < Duration::from_secs(3), "took {:?}", asked.elapsed());
        (why["there"].is_null() && why["there_missing"].is_string()).then_some(())
    });
    assert!(alice.why("bob")["here"]["candidates"].is_array());
    bob.daemon().signal(Signal::SIGCONT);
    alice.wait_verdict("bob", &["direct-punched"], SETTLE_LIMIT);
}

fn spoken() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = Node::start(&net, &net.machine("alice", Nat::Symmetric), &server);
    let _bob = Node::start(&net, &net.machine("bob", Nat::Symmetric), &server);
    let why = alice.wait_verdict("bob", &["symmetric-both"], SETTLE_LIMIT);
    let printed = alice.cli(&["why", "bob"]).success("why");
    for part in ["/verdict/sentence", "/verdict/remedy"] {
        assert!(printed.contains(&text(&why, part)), "{printed}");
    }
    for said in ["alice: relay-udp", "bob: relay-udp", "CANDIDATE OF BOB", "symmetric"] {
        assert!(printed.contains(said), "{said}:\n{printed}");
    }
}

fn black_hole() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let mut alice = Node::start(&net, &net.machine("alice", Nat::PortRestricted), &server);
    let mut bob = Node::start(&net, &net.machine("bob", Nat::PortRestricted), &server);
    alice.wait_path("bob", "direct", SETTLE_LIMIT);
    bob.wait_path("alice", "direct", SETTLE_LIMIT);
    let stream = Stream::start(&net, &alice.host, &bob.ipv4());
    stream.wait_for_more(20);
    drop_between(&alice.host, &bob.host);
    alice.wait_path("bob", "relay-udp", SETTLE_LIMIT);
    stream.wait_for_more(20);
    stream.stop();

    let told = alice.cli(&["history", "bob", "--json"]).success("history");
    let history: Value = serde_json::from_str(&told).unwrap();
    let changes = history["changes"].as_array().expect("changes");
    let last = changes.last().expect("a change");
    assert!(text(last, "/from").starts_with("direct "), "{last}");
    assert_eq!(last["to"], "relay-udp", "{last}");
    assert_eq!(last["cause"], "the direct path went silent", "{last}");
    assert_eq!(changes[0]["from"], "none", "{history}");
    let first = ["the relay leads to the peer", "the first path answered"];
    assert!(first.contains(&text(&changes[0], "/cause").as_str()), "{history}");
    for times in ["direct_s", "relayed_s"] {
        assert!(history[times].as_f64().is_some_and(|time| time > 0.0), "{history}");
    }
    let paths = history["paths"].as_array().expect("paths");
    let direct = paths.iter().find(|path| path["path"] == last["from"]).expect("the direct path");
    assert!(direct["rtt_min_ms"].as_f64() <= direct["rtt_avg_ms"].as_f64(), "{direct}");
    let printed = alice.cli(&["history", "bob"]).success("history");
    assert!(printed.contains("the direct path went silent"), "{printed}");
}

/// Nothing passes between the two any more, except through others.
fn drop_between(host: &Host, other: &Host) {
    let router = host.router.as_ref().unwrap();
    let remote = other.router.as_ref().unwrap().wan;
    router.ns.nft(&format!(
        "table ip hole {{ chain forward {{ type filter hook forward priority -10; policy accept;
           ip saddr {remote} drop
           ip daddr {remote} drop
          }}
         }}"
    ));
}

fn hanging_daemon() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let mut alice = Node::start(&net, &net.machine("alice", Nat::None), &server);
    alice.daemon().signal(Signal::SIGSTOP);
    let asked = now();
    assert_error(&alice.cli(&["status"]), &[6], &["does not answer"]);
    assert!(asked.elapsed() < Duration::from_secs(12), "took {:?}", asked.elapsed());
    alice.daemon().signal(Signal::SIGCONT);
    alice.wait_connected();
}

fn first_enrolment() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let host = net.machine("alice", Nat::None);
    let join = server.join();
    // Connecting takes its time where nobody says no.
    host.ns.nft(&format!(
        "table inet silent {{ chain out {{ type filter hook output priority 0; policy accept;
           ip daddr {} drop
          }}
         }}",
        server.host.address
    ));
    let mut alice = Node::new(&net, &host);
    alice.up(&join);
    wait_for("the socket is there", START_LIMIT, || {
        (alice.cli(&["status"]).code != Some(3)).then_some(())
    });
    let asked = now();
    for command in [&["status"][..], &["status", "--json"], &["why", "bob"], &["ip"]] {
        assert_error(&alice.cli(command), &[8], &["not enrolled yet, connecting to"]);
    }
    assert!(asked.elapsed() < Duration::from_secs(5), "took {:?}", asked.elapsed());
    let said = alice.cli(&["status"]).stderr;
    assert!(said.contains(&server.host.address.to_string()), "{said}");
    // The daemon can be stopped meanwhile.
    let args = ["down", "--socket", &alice.socket()];
    let mut down = Daemon::start(overlay(&host, &args), &net.log_file("down"));
    assert_eq!(down.wait_exit(EXIT_LIMIT), Some(0), "{}", down.log());
    assert_eq!(alice.daemon().wait_exit(EXIT_LIMIT), Some(0));
}

/// A round of probes is over after five seconds, and blocked UDP is noticed sooner.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);
