//! What a server tells Prometheus.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::StartError;
use super::core::{Core, Event};
use crate::io::metrics::{Durations, LoopbackAddr, MetricsServer, Page};
use crate::types::DropReason;

/// What the relay has taken to pass on, one way out.
#[derive(Debug, Default)]
pub(super) struct Relayed {
    pub(super) datagrams: AtomicU64,
    pub(super) bytes: AtomicU64,
}

impl Relayed {
    pub(super) fn add(&self, datagrams: usize, bytes: usize) {
        self.datagrams.fetch_add(datagrams as u64, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// What the core counts of its own work.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) started: u64,
    commits: Durations,
    failed_commits: u64,
}

impl Counts {
    pub(super) fn new(started: u64) -> Self {
        Self { started, ..Self::default() }
    }

    pub(super) fn committed(&mut self, took: Duration) {
        self.commits.add(took);
    }

    pub(super) fn failed(&mut self) {
        self.failed_commits += 1;
    }
}

/// Listens there, and asks the core for each page.
pub(super) fn start(
    at: LoopbackAddr,
    events: &mpsc::Sender<Event>,
) -> Result<MetricsServer, StartError> {
    let events = events.clone();
    let report = move || {
        let events = events.clone();
        async move {
            let (sender, receiver) = oneshot::channel();
            events.send(Event::Metrics { answer: sender }).await.ok()?;
            receiver.await.ok()
        }
    };
    MetricsServer::start(at, report)
        .map_err(|source| StartError::Metrics { address: at.to_string(), source })
}

impl Core {
    /// Everything that is counted, as it is now.
    pub(super) fn metrics(&self, waiting_events: usize) -> Page {
        let (hub, counts) = (self.hub(), self.counts());
        let mut page = Page::default();
        page.process(counts.started);
        let (members, online) = self.population();
        page.gauge("overlay_server_nodes", "Members of the network.")
            .value(&[("state", "online")], online)
            .value(&[("state", "offline")], members.saturating_sub(online));
        let (now, ever) = hub.connections();
        page.gauge("overlay_server_connections", "Control connections.").value(&[], now);
        page.counter(
            "overlay_server_handshakes_total",
            "Control connections whose first message was genuine, of members and others.",
        )
        .value(&[], ever);
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let mut family = page.counter(
            "overlay_relay_datagrams_total",
            "Datagrams taken to pass on, by the way out; the dropped ones among them count too.",
        );
        for (way, relayed) in hub.relayed() {
            family.value(&[("way", way)], read(&relayed.datagrams));
        }
        let mut family =
            page.counter("overlay_relay_bytes_total", "Bytes of the datagrams taken to pass on.");
        for (way, relayed) in hub.relayed() {
            family.value(&[("way", way)], read(&relayed.bytes));
        }
        let mut drops = page.counter("overlay_dropped_packets_total", "Datagrams that died here.");
        let counted = hub.drops();
        for reason in DropReason::ALL {
            drops.value(&[("reason", reason.as_str())], counted.of(*reason));
        }
        page.gauge("overlay_queue_length", "Entries that wait in a queue.")
            .value(&[("queue", "events")], waiting_events)
            .value(&[("queue", "control-links")], hub.waiting_on_links());
        page.gauge("overlay_queue_bytes", "Bytes that wait in a queue.")
            .value(&[("queue", "relay")], hub.waiting_bytes());
        page.durations(
            "overlay_store_commit_seconds",
            "How long a change took until it was on disk.",
            &counts.commits,
        );
        page.counter("overlay_store_commit_failures_total", "Changes that could not be stored.")
            .value(&[], counts.failed_commits);
        page
    }
}
