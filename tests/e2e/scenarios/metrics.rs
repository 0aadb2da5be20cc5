//! What Prometheus is told by a server and a node, and who else is told nothing.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::case::Case;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, PORT, START_LIMIT, Server, assert_error};
use crate::ping;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("metrics::both_daemons_are_scraped_and_counters_rise", scraped),
        Case::new("metrics::an_address_that_others_reach_is_refused", refused),
    ]
}

/// What the daemon at this loopback port answers to some bytes.
fn say(host: &Host, port: u16, bytes: &[u8]) -> String {
    host.ns.enter(|| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // It may hang up on garbage with a reset.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    })
}

pub(super) fn scrape(host: &Host, port: u16) -> String {
    let request = format!("GET /metrics HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n");
    let answer = say(host, port, request.as_bytes());
    let (head, page) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_well_formed(page);
    page.to_owned()
}

/// Every value belongs to the family above it, has a number, and is there once.
fn assert_well_formed(page: &str) {
    let (mut family, mut seen) = (String::new(), std::collections::BTreeSet::new());
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split(' ').next().unwrap().to_owned();
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(series.starts_with(&family), "{series} is not of {family}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(seen.insert(series.to_owned()), "{series} is there twice");
        }
    }
    assert!(seen.len() > 20, "{page}");
}

/// The value of one series.
pub(super) fn value(page: &str, series: &str) -> f64 {
    let found = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("no {series} in\n{page}")).parse().unwrap()
}

fn scraped() {
    let net = Net::new();
    let hub = net.machine("server", Nat::None);
    let address = format!("{}:{PORT}", hub.address);
    let config = "metrics = \"127.0.0.1:9587\"\n";
    let server = Server::start_at(&net, &hub, &[&address], &[&address], config);
    assert_eq!(value(&scrape(&hub, 9587), "overlay_server_nodes{state=\"online\"}"), 0.0);

    let home = net.machine("alice", Nat::PortRestricted);
    let mut alice = Node::with_config(&net, &home, "alice", "metrics = \"127.0.0.1:9586\"\n");
    alice.up(&server.join());
    alice.wait_connected();
    let bob = Node::start(&net, &net.machine("bob", Nat::PortRestricted), &server);
    alice.wait_path("bob", "direct", START_LIMIT);

    let before = scrape(&home, 9586);
    ping::assert_answers(&home, &bob.ipv4());
    // Nobody has this one.
    let nobody = alice.ipv4().rsplit_once('.').unwrap().0.to_owned() + ".250";
    home.ns.command("ping").args(["-c1", "-W1", &nobody]).output().unwrap();
    let after = scrape(&home, 9586);
    for series in [
        "overlay_outbound_packets_total{path=\"direct_v4\"}",
        "overlay_outbound_bytes_total{path=\"direct_v4\"}",
        "overlay_inbound_bytes_total{path=\"direct_v4\"}",
        "overlay_dropped_packets_total{reason=\"no-route\"}",
    ] {
        assert!(value(&after, series) > value(&before, series), "{series}\n{before}\n{after}");
    }
    assert_eq!(value(&after, "overlay_peers{state=\"direct\"}"), 1.0);
    assert_eq!(value(&after, "overlay_server_connected"), 1.0);
    assert!(value(&after, "overlay_handshakes_total") >= 1.0);

    // Garbage, and a browser that was told another name for this machine.
    for (host, port) in [(&home, 9586), (&hub, 9587)] {
        say(host, port, b"\x16\x03\x01\x02\x00\x01\r\n\r\n");
        let rebound = say(host, port, b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n");
        assert!(rebound.starts_with("HTTP/1.1 421 "), "{rebound}");
    }
    let page = scrape(&hub, 9587);
    assert_eq!(value(&page, "overlay_server_nodes{state=\"online\"}"), 2.0);
    assert_eq!(value(&page, "overlay_server_connections"), 2.0);
    assert!(value(&page, "overlay_store_commit_seconds_count") >= 2.0);
    assert!(value(&page, "process_start_time_seconds") > 1e9);
    let passed_on = value(&page, "overlay_relay_datagrams_total{way=\"udp\"}");
    assert!(passed_on >= 1.0, "the first words of two nodes go by the relay\n{page}");
    scrape(&home, 9586);
}

fn refused() {
    let net = Net::new();
    let hub = net.machine("server", Nat::None);
    let address = format!("{}:{PORT}", hub.address);
    let config = "metrics = \"0.0.0.0:9587\"\n";
    let server = Server::prepare(&net, &hub, "server", &[&address], &[&address], config);
    assert_error(&server.run_to_end(), &[2], &["this machine alone"]);
    let node = Node::with_config(&net, &hub, "alice", "\nmetrics = \"[::]:9586\"\n");
    let output = node.up_to_end("");
    assert_error(&output, &[2], &["this machine alone"]);
    assert!(output.stderr.contains("node.toml:2:11"), "{}", output.stderr);
}
