//! The relay's limits: a node that floods loses what is over them, and the others nothing.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::case::Case;
use crate::clock::wait_for;
use crate::flow::Flow;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, PORT, START_LIMIT, Server, parse};
use crate::ping;

pub(crate) fn cases() -> Vec<Case> {
    vec![Case::timed("limits::a_flood_over_the_relays_limit_costs_nobody_else_anything", flood)]
}

fn status(server: &Server) -> Value {
    parse(&server.cli(&["status", "--json"]).success("server status"))
}

fn drops(status: &Value, reason: &str) -> u64 {
    status["drops"][reason].as_u64().unwrap_or_default()
}

/// Megabits in a second that the flood sends, a pair of others wants, and a limit lets through.
const FLOOD: u64 = 80;
const MODEST: u64 = 4;
const LIMIT: u64 = 20;
const SPAN: Duration = Duration::from_secs(2);
const BYTES: usize = 1_200;

fn flood() {
    let net = Net::new();
    let hub = net.machine("server", Nat::None);
    let address = format!("{}:{PORT}", hub.address);
    let config = format!("relay-node-mbit = {LIMIT}\n");
    let server = Server::start_at(&net, &hub, &[&address], &[&address], &config);
    let mut nodes = ["alice", "bob", "carol", "dave"]
        .map(|name| Node::start(&net, &net.machine(name, Nat::Symmetric), &server));
    for (from, to) in [(0, 1), (2, 3)] {
        ping::assert_answers(&nodes[from].host, &nodes[to].ipv4());
        let peer = nodes[to].name.clone();
        nodes[from].wait_path(&peer, "relay-udp", START_LIMIT);
    }
    let before = status(&server);
    assert_eq!(before["relay"]["node_limit"]["mbit"], LIMIT, "{before}");
    let run = |limit: &str, other: &str| {
        let before = status(&server);
        let start = |from: usize, to: usize, mbit| {
            Flow::start(&nodes[from].host, &nodes[to].host, &nodes[to].ipv4(), BYTES, mbit)
        };
        let (flood, modest) = (start(0, 1, FLOOD), start(2, 3, MODEST));
        std::thread::sleep(SPAN);
        let (flood, modest) = (flood.finish(), modest.finish());
        let after = status(&server);
        let dropped = drops(&after, limit) - drops(&before, limit);
        eprintln!(
            "{limit}: {:.2} of the flood and {:.3} of the others arrived, {dropped} dropped",
            flood.part(),
            modest.part()
        );
        assert!(modest.part() >= 0.99, "the other pair lost {:.3}", 1.0 - modest.part());
        assert_eq!((flood.out_of_order(), modest.out_of_order()), (0, 0), "the order is kept");
        // A burst beside the rate, and a machine that had not the time to send all of the flood.
        let carried = flood.numbers.len() as u64 * BYTES as u64;
        let most = LIMIT * 125_000 * (SPAN.as_secs() + 1);
        assert!(carried <= most, "{carried} bytes of the flood were carried, {most} at the most");
        assert!(carried >= most / 4, "{carried} bytes of the flood were carried, of {most}");
        assert!(dropped > 0, "what is over the limit is counted: {after}");
        assert_eq!(drops(&after, other), drops(&before, other), "{after}");
    };
    run("relay-node-limit", "relay-network-limit");
    let text = server.cli(&["status"]).success("server status");
    assert!(text.contains("relay-node-limit") && text.contains("20 Mbit/s"), "{text}");

    // Other limits without a restart: the network has one, of which half is for the quiet pair.
    let config = format!("relay-network-mbit = {LIMIT}\nmetrics = \"127.0.0.1:9587\"\n");
    std::fs::write(net.dir().join("server/server.toml"), config).unwrap();
    server.signal(Signal::SIGHUP);
    wait_for("the new limits hold", START_LIMIT, || {
        let relay = &status(&server)["relay"];
        (relay["network_limit"]["mbit"] == LIMIT && relay["node_limit"]["mbit"] == 10_000)
            .then_some(())
    });
    run("relay-network-limit", "relay-node-limit");
    let page = super::metrics::scrape(&hub, 9587);
    for reason in ["relay-node-limit", "relay-network-limit"] {
        let series = format!("overlay_dropped_packets_total{{reason=\"{reason}\"}}");
        assert!(super::metrics::value(&page, &series) > 0.0, "{page}");
    }

    // What comes while the server has no time to read is more than its socket holds.
    server.signal(Signal::SIGSTOP);
    let flood = crate::probe::open_socket(&nodes[0].host, ([0, 0, 0, 0], 0).into());
    for _ in 0..10_000 {
        // Not every one has to leave.
        let _ = flood.send_to(&[0; 1_200], (hub.address, PORT));
    }
    server.signal(Signal::SIGCONT);
    wait_for("what the kernel threw away is told", START_LIMIT, || {
        (drops(&status(&server), "receive-buffer-full") > 0).then_some(())
    });
}
