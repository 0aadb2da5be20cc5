//! A new configuration for a node that runs.

use super::portmap::PortMapping;
use super::{Daemon, NodeOptions};
use crate::io::clock;
use crate::io::metrics::{LoopbackAddr, MetricsServer};
use crate::io::service::reload::{notify_reloaded, notify_reloading, warn_of_unapplied};

impl Daemon {
    /// Somebody asks to read the configuration again.
    pub(super) async fn handle_reload(&mut self) {
        // Before that the service manager waits for something else.
        if self.ready {
            notify_reloading();
        }
        if let Some(new) = self.reload.read() {
            self.apply_options(new).await;
        }
        if self.ready {
            notify_reloaded();
        }
    }

    async fn apply_options(&mut self, new: NodeOptions) {
        let old = self.configured.clone();
        warn_of_unapplied(&[
            ("name", new.name != old.name),
            ("state-dir", new.state_dir != old.state_dir),
            ("socket", new.socket != old.socket),
            ("interface", new.interface != old.interface),
            ("listen-port", new.listen_port != old.listen_port),
            ("mtu", new.mtu != old.mtu),
            ("rekey-after-s", new.settings.rekey_after != old.settings.rekey_after),
            ("second-session", new.settings.second_lane_from != old.settings.second_lane_from),
            ("tun-offload", new.offloads.tun != old.offloads.tun),
            ("udp-gso", new.offloads.udp_gso != old.offloads.udp_gso),
            ("udp-gro", new.offloads.udp_gro != old.offloads.udp_gro),
            ("realtime", new.realtime != old.realtime),
        ]);
        let settings = &mut self.options.settings;
        settings.birthday_probing = new.settings.birthday_probing;
        settings.eager_peers = new.settings.eager_peers;
        self.node.set_wishes(settings.birthday_probing, settings.eager_peers);
        if new.port_mapping != self.options.port_mapping {
            self.options.port_mapping = new.port_mapping;
            self.remake_port_mapping().await;
        }
        if new.all_uplinks != self.options.all_uplinks {
            self.options.all_uplinks = new.all_uplinks;
            self.surroundings.rescan_at = Some(clock::now());
        }
        if new.metrics != self.options.metrics {
            self.serve_metrics(new.metrics);
        }
        self.options.rotate_key_after = new.rotate_key_after;
        tracing::info!("the configuration was read again");
    }

    async fn remake_port_mapping(&mut self) {
        self.end_portmap().await;
        self.node.handle_mapped(Vec::new(), clock::now());
        match self.state.keys() {
            Ok(keys) => {
                self.port_mapping = PortMapping::wanted(&self.options, &self.ports, &keys.machine);
                self.handle_ways_out(&self.surroundings.ways_out(), clock::now());
            }
            Err(error) => tracing::error!(%error, "no port mapping without the node's keys"),
        }
    }

    fn serve_metrics(&mut self, wished: Option<LoopbackAddr>) {
        let start = |at| super::metrics::start(at, &self.request_sender);
        match wished.map(start).transpose() {
            Ok(server) => {
                self.metrics = server;
                self.options.metrics = wished;
            }
            // It is tried again at the next reload.
            Err(error) => {
                let at = self.metrics.as_ref().map(MetricsServer::address);
                tracing::error!(%error, still_at = ?at, "metrics cannot be moved");
            }
        }
    }
}
