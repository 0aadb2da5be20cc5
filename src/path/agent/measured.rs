//! What an agent has measured: round trips, loss, and how long a packet a path carries.

use std::time::{Duration, Instant};

use rand::Rng;

use super::{PathAgent, PathTransmit};
use crate::path::Via;
use crate::types::{BASE_MTU, TxId};

impl PathAgent {
    /// The smoothed round trip on the primary.
    #[must_use]
    pub fn rtt(&self) -> Option<Duration> {
        match self.primary?.place() {
            Some(place) => self.endpoints.get(&place)?.prober.srtt(),
            None => self.relay_prober.srtt(),
        }
    }

    /// Of a thousand datagrams sent on this path in the last seconds, so many did not arrive.
    #[must_use]
    pub fn loss_permille(&self, via: Via) -> Option<u16> {
        match via.place() {
            Some(place) => self.endpoints.get(&place)?.delivery.loss_permille(),
            None => self.relay_delivery.loss_permille(),
        }
    }

    /// Data goes by the relay: does it carry full packets?
    pub(super) fn note_relay_mtu(&mut self, now: Instant) {
        if self.relay.is_some() && self.primary == self.relay {
            self.relay_mtu.want(self.relay_delivery.long_missing(), now);
            self.ask_for_relay_mtu(now);
        }
    }

    /// Sends the questions about the relay that are due.
    pub(super) fn ask_for_relay_mtu(&mut self, now: Instant) {
        let sizes = self.relay_mtu.take_due(self.relay_prober.srtt(), now);
        let Some(via) = self.relay else { return };
        for inner in sizes {
            let tx = TxId(self.rng.random());
            self.relay_mtu.asked(tx, inner);
            self.transmits.push_back(PathTransmit::Sized { via, tx, inner, whole: false });
        }
    }

    /// The longest inner packet that the primary carries uncut.
    #[must_use]
    pub fn mtu(&self, now: Instant) -> u16 {
        let Some(place) = self.primary.and_then(Via::place) else {
            return self.relay_mtu.mtu();
        };
        let endpoint = self.endpoints.get(&place);
        endpoint.and_then(|endpoint| endpoint.mtu.found(now)).unwrap_or(BASE_MTU)
    }
}
