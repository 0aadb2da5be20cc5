//! What the user should do something about, in `self.warnings` of the status.

use std::time::Instant;

use super::Daemon;
use crate::io::link::ConnectError;

impl Daemon {
    /// All of it, in sentences.
    pub(super) fn warnings(&self, now: Instant) -> Vec<String> {
        let server = self.connect_error.as_ref().filter(|_| self.server.is_none());
        let mut warnings: Vec<String> = server.and_then(server_warning).into_iter().collect();
        if self.interface.as_ref().is_some_and(super::interface::Interface::is_off) {
            warnings.push(off_warning(&self.options.interface));
        }
        warnings.extend(self.rival_warnings(now));
        warnings.extend(self.standing_warnings(now));
        warnings.extend(self.uplink_warnings());
        warnings.extend(self.surroundings.warnings());
        warnings.extend(self.unrouted.warning());
        warnings
    }
}

/// Why the server is out of reach, where time alone does not help.
fn server_warning(error: &ConnectError) -> Option<String> {
    matches!(error, ConnectError::WrongKey { .. }).then(|| {
        format!(
            "{error}: another server answers there, or this one has lost its key; with its key \
             back, or a line of the server to be used, all is well: sudo overlay up JOINLINE"
        )
    })
}

/// An interface that somebody has switched off.
pub(super) fn off_warning(interface: &str) -> String {
    format!(
        "the interface {interface} was switched off: packets for the network go nowhere, those of \
         open IPv6 connections by other routes of this machine; type: sudo ip link set {interface} up"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_with_another_key_is_a_warning_and_one_that_is_away_is_none() {
        let address = || "192.0.2.7:41820".parse().unwrap();
        let warning = server_warning(&ConnectError::WrongKey { address: address() }).unwrap();
        assert!(warning.contains("192.0.2.7:41820 does not have the key"), "{warning}");
        assert_eq!(server_warning(&ConnectError::Closed { address: address() }), None);
    }
}
