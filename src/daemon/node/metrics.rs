//! What a node tells Prometheus.

use std::collections::BTreeMap;

use tokio::sync::mpsc;

use super::local::{Request, ask};
use super::{Daemon, StartError};
use crate::dataplane::Traffic;
use crate::io::clock;
use crate::io::metrics::{LoopbackAddr, MetricsServer, Page};
use crate::types::DropReason;

/// Listens there, and asks the control task for each page.
pub(super) fn start(
    at: LoopbackAddr,
    requests: &mpsc::Sender<Request>,
) -> Result<MetricsServer, StartError> {
    let requests = requests.clone();
    let report = move || {
        let requests = requests.clone();
        async move { ask(&requests, Request::Metrics).await }
    };
    MetricsServer::start(at, report)
        .map_err(|source| StartError::Metrics { address: at.to_string(), source })
}

fn traffic(
    page: &mut Page,
    direction: [&'static str; 2],
    [packets, bytes]: [&str; 2],
    it: &Traffic,
) {
    let [packets_name, bytes_name] = direction;
    let mut family = page.counter(packets_name, packets);
    for (path, packets, _) in it.by_path() {
        family.value(&[("path", path)], packets);
    }
    let mut family = page.counter(bytes_name, bytes);
    for (path, _, bytes) in it.by_path() {
        family.value(&[("path", path)], bytes);
    }
}

impl Daemon {
    /// Everything that is counted, as it is now.
    pub(super) fn metrics(&self) -> Page {
        self.ports.count_unread();
        let (now, own, shared) = (clock::now(), self.node.self_status(), self.node.shared());
        let mut page = Page::default();
        page.process(self.started);
        traffic(
            &mut page,
            ["overlay_outbound_packets_total", "overlay_outbound_bytes_total"],
            ["Packets sent to peers.", "Bytes of packets sent to peers, as programs sent them."],
            shared.sent(),
        );
        traffic(
            &mut page,
            ["overlay_inbound_packets_total", "overlay_inbound_bytes_total"],
            ["Packets let in from peers.", "Bytes of packets let in, as programs receive them."],
            shared.received(),
        );
        let mut drops = page.counter("overlay_dropped_packets_total", "Packets that died here.");
        for reason in DropReason::ALL {
            drops.value(&[("reason", reason.as_str())], shared.drops().of(*reason));
        }
        let states = ["direct", "relay-udp", "relay-tcp", "connecting", "offline"];
        let mut peers: BTreeMap<&str, usize> = states.into_iter().map(|state| (state, 0)).collect();
        for peer in self.node.peer_statuses(now) {
            *peers.entry(peer.path.as_str()).or_default() += 1;
        }
        let mut family = page.gauge("overlay_peers", "Peers by what a packet would take now.");
        for (state, count) in peers {
            family.value(&[("state", state)], count);
        }
        page.counter("overlay_handshakes_total", "WireGuard handshakes that made a session.")
            .value(&[], self.node.handshakes());
        page.gauge("overlay_queue_length", "Entries that wait in a queue.")
            .value(&[("queue", "notes")], self.notes.len())
            .value(&[("queue", "requests")], self.requests.len())
            .value(&[("queue", "control-link")], self.ports.link().map_or(0, |link| link.waiting()))
            .value(&[("queue", "packets-without-session")], self.node.waiting_packets());
        page.gauge("overlay_server_connected", "Whether there is a connection to the server.")
            .value(&[], u8::from(own.link_up));
        if let Some(rtt) = own.server_rtt.filter(|_| own.link_up) {
            page.gauge("overlay_server_rtt_seconds", "Round trip to the server's relay.")
                .value(&[], rtt.as_secs_f64());
        }
        page
    }
}
