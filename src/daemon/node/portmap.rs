//! Joins the keeper of our port mapping to the router, the core and the clock.

use std::time::{Duration, Instant};

use blake2::digest::consts::U16;
use blake2::digest::{KeyInit, Mac};
use tokio::sync::mpsc;

use super::report::PortMappingReport;
use super::threads::Ports;
use super::{Daemon, NodeOptions};
use crate::io::clock;
use crate::io::os::Route;
use crate::io::portmap::{self, Asker, Keeper, KnockAnswer, Nonce, Order, Outcome, Standing};
use crate::node::Knocked;
use crate::types::SecretKey;

/// One job runs at a time; one that nobody waits for may end beside it.
const QUEUE: usize = 8;
/// The end of the node waits for the router this long.
const FAREWELL_LIMIT: Duration = Duration::from_millis(500);

/// The port mapping of this node.
pub(super) struct PortMapping {
    keeper: Keeper,
    asker: Asker,
    port: u16,
    sender: mpsc::Sender<Outcome>,
    outcomes: mpsc::Receiver<Outcome>,
}

impl PortMapping {
    /// The port mapping to ask the router for, when there is an IPv4 port and somebody to stay for
    /// it.
    pub(super) fn wanted(
        options: &NodeOptions,
        ports: &Ports,
        machine: &SecretKey,
    ) -> Option<Self> {
        let lease = options.port_mapping.filter(|_| !options.enrol_only)?;
        let local = ports.udp_v4.as_ref()?.local_addr().ok()?;
        Some(Self::new(local.port(), lease, machine))
    }

    /// Keeps the IPv4 UDP `port` mapped with leases of this length.
    fn new(port: u16, lease: Duration, machine: &SecretKey) -> Self {
        let (sender, outcomes) = mpsc::channel(QUEUE);
        let asker = Asker::new(nonce(machine));
        Self { keeper: Keeper::new(port, lease), asker, port, sender, outcomes }
    }

    /// What there is, for the command line.
    pub(super) fn report(&self) -> PortMappingReport {
        let keeper = &self.keeper;
        let mapping = keeper.mapping().map(|(_, mapping)| mapping);
        PortMappingReport {
            state: match keeper.standing() {
                Standing::NoGateway => "no-gateway",
                Standing::Searching => "searching",
                Standing::Unmapped => "unmapped",
                Standing::Mapped => "mapped",
            }
            .into(),
            protocols: keeper
                .answered()
                .map(|all| all.iter().map(|protocol| protocol.as_str().into()).collect()),
            protocol: mapping.map(|mapping| mapping.protocol.as_str().into()),
            external: mapping.map(|mapping| mapping.external.to_string()),
            public: mapping.map(|mapping| mapping.is_public()),
            verified: mapping.map(|_| keeper.verified()),
            lease_s: mapping.and_then(|mapping| mapping.lease).map(|lease| lease.as_secs()),
            error: keeper.error().map(ToString::to_string),
        }
    }
}

/// The same in every run of this node, so that a mapping of the last one can be taken over; and
/// a secret, so that nobody else can remove it.
fn nonce(machine: &SecretKey) -> Nonce {
    let key = machine.expose();
    let mut mac = <blake2::Blake2sMac<U16> as KeyInit>::new((&*key).into());
    mac.update(b"overlay 1 PCP mapping nonce");
    let bytes = mac.finalize().into_bytes();
    let word = |at: usize| bytes.iter().skip(at).take(4).fold(0, |n, b| n << 8 | u32::from(*b));
    [word(0), word(4), word(8)]
}

/// Waits for the end of a job. Cancel-safe.
pub(super) async fn next(mapping: Option<&mut PortMapping>) -> Outcome {
    if let Some(mapping) = mapping
        && let Some(outcome) = mapping.outcomes.recv().await
    {
        return outcome;
    }
    std::future::pending().await
}

impl Daemon {
    /// Packets leave by these ways now.
    pub(super) fn handle_ways_out(&mut self, ways: &[Route], now: Instant) {
        if let Some(mapping) = &mut self.port_mapping {
            mapping.keeper.handle_network(portmap::gateway_of(ways), now);
        }
    }

    /// We were asleep, and may be elsewhere.
    pub(super) fn handle_portmap_sleep(&mut self, now: Instant) {
        if let Some(mapping) = &mut self.port_mapping {
            mapping.keeper.handle_sleep(now);
        }
    }

    /// The router was asked.
    pub(super) fn handle_portmap_outcome(&mut self, outcome: Outcome) {
        let Some(mapping) = &mut self.port_mapping else { return };
        let before = mapping.keeper.external();
        if let Err(error) = &outcome.result {
            tracing::debug!(error, "the router gave no port mapping");
        }
        mapping.keeper.handle_outcome(outcome, clock::now());
        let after = mapping.keeper.mapping();
        match (before, after) {
            (None, Some((_, mapping))) => tracing::info!(external = %mapping.external,
                protocol = %mapping.protocol, public = mapping.is_public(),
                "the router forwards a port to us"),
            (Some(external), None) => {
                tracing::info!(%external, "the router does not forward a port any more");
            }
            _ => {}
        }
    }

    pub(super) fn handle_knocked(&mut self, knocked: Knocked, now: Instant) {
        let answer = match knocked {
            Knocked::ServerHeard => KnockAnswer::ServerHeard,
            Knocked::Arrived(at) => KnockAnswer::Arrived(at),
        };
        if let Some(mapping) = &mut self.port_mapping {
            mapping.keeper.handle_knock(answer, now);
        }
    }

    /// Carries out what the keeper wants, and tells the core what there is.
    pub(super) fn drive_portmap(&mut self, now: Instant) {
        let Some(mapping) = &mut self.port_mapping else { return };
        while let Some(order) = mapping.keeper.poll(now) {
            match order {
                Order::Start(job) => {
                    let (sender, asker) = (mapping.sender.clone(), mapping.asker.clone());
                    tokio::spawn(async move {
                        let outcome = portmap::run(job, asker).await;
                        let _ = sender.send(outcome).await;
                    });
                }
                Order::Knock(port) => {
                    if !self.node.knock(port) {
                        mapping.keeper.handle_knock(KnockAnswer::Unasked, now);
                    }
                }
                Order::Remove(gateway, old) => {
                    let asker = mapping.asker.clone();
                    tokio::spawn(portmap::remove(gateway, mapping.port, old, asker));
                }
            }
        }
        self.node.handle_mapped(mapping.keeper.endpoints(), now);
    }

    pub(super) fn portmap_deadline(&self) -> Option<Instant> {
        self.port_mapping.as_ref().and_then(|mapping| mapping.keeper.poll_timeout())
    }

    /// Waits for what is being asked of the router, half a second at the most: it may be a mapping, which
    /// nobody would remove.
    pub(super) async fn settle_portmap(&mut self) {
        let settled = async {
            while self.port_mapping.as_ref().is_some_and(|mapping| mapping.keeper.is_busy()) {
                let outcome = next(self.port_mapping.as_mut()).await;
                self.handle_portmap_outcome(outcome);
            }
        };
        let _ = tokio::time::timeout(FAREWELL_LIMIT, settled).await;
    }

    /// Removes the mapping: the daemon ends. Waits half a second at the most.
    pub(super) async fn end_portmap(&mut self) {
        let Some(mapping) = self.port_mapping.take() else { return };
        if let Some((gateway, held)) = mapping.keeper.mapping() {
            let removing = portmap::remove(gateway, mapping.port, held, mapping.asker);
            if tokio::time::timeout(FAREWELL_LIMIT, removing).await.is_err() {
                tracing::debug!("the router did not answer; the mapping ends with its lease");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nonce_is_the_same_in_every_run_and_another_on_every_machine() {
        let [a, b] = [1, 2].map(|byte| SecretKey::from_bytes([byte; 32]));
        assert_eq!(nonce(&a), nonce(&a));
        assert_ne!(nonce(&a), nonce(&b));
    }
}
