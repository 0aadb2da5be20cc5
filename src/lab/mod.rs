//! A small internet in one process: namespaces, TUNs, and NATs and links in userspace.
//!
//! ```text
//! start   the command: makes the user and PID namespace, waits, tidies up
//!   inside    first process in there: machines, internet, then the story of server and nodes
//!     machine     a network namespace with a TUN       node    the real overlay processes
//!     forwarder   TUN <-> internet <- nat <- packet    ping    the kernel's own ping
//! exec    joins the namespaces of a running lab
//! ```
//!
//! `nat`, `packet` and `internet` are pure: they know no clock, socket or task, so the simulator
//! uses the same NATs as the lab.

mod exec;
mod forwarder;
mod inside;
pub mod internet;
mod machine;
pub mod nat;
mod node;
pub mod packet;
mod ping;
mod report;
mod start;
mod state;
mod story;

pub use exec::{ExecRequest, NoLab, NoMachine, NotStarted, exec};
pub use inside::inside;
pub use start::{NamespacesForbidden, start};

use std::time::Duration;

use nat::NatKind;
use report::PathKind;

/// What kind of lab is wanted.
#[derive(Debug, Clone, PartialEq)]
pub struct LabOptions {
    /// The NAT of alice's home and of bob's.
    pub nats: [NatKind; 2],
    /// How long a packet takes on the line of a home, one way.
    pub delay: Duration,
    /// The part of the packets that the line of a home loses, in percent.
    pub loss_percent: f64,
    /// Alice's line drops UDP.
    pub block_udp: bool,
    /// End with an exit code and do not stay up.
    pub check: bool,
    /// Print one JSON object and no story.
    pub json: bool,
    /// Only the machines and the internet, no overlay.
    pub bare: bool,
}

/// Two port-restricted homes on perfect lines.
impl Default for LabOptions {
    fn default() -> Self {
        Self {
            nats: [NatKind::PortRestricted; 2],
            delay: Duration::ZERO,
            loss_percent: 0.0,
            block_udp: false,
            check: false,
            json: false,
            bare: false,
        }
    }
}

/// This program as it was called, for a person to type again: it may not be in the search path.
#[must_use]
pub fn program() -> String {
    let called = std::env::args_os().next().filter(|name| !name.is_empty());
    called.map_or_else(|| "overlay".into(), |name| name.to_string_lossy().into_owned())
}

impl LabOptions {
    /// The same options as words of the command line.
    fn to_args(&self) -> Vec<String> {
        let [alice, bob] = self.nats;
        let mut args = vec![
            format!("--nat={alice},{bob}"),
            format!("--delay={}", self.delay.as_secs_f64() * 1000.0),
            format!("--loss={}", self.loss_percent),
        ];
        let flags = [
            (self.block_udp, "--block-udp"),
            (self.check, "--check"),
            (self.json, "--json"),
            (self.bare, "--bare"),
        ];
        args.extend(flags.iter().filter(|(on, _)| *on).map(|(_, flag)| (*flag).to_owned()));
        args
    }

    /// The way that packets between alice and bob must take in the end.
    ///
    /// Every pair comes to a direct path but symmetric with symmetric: there neither side can know
    /// the port that the other one's packets will come from.
    fn expected_path(&self) -> PathKind {
        if self.block_udp {
            PathKind::RelayTcp
        } else if self.nats == [NatKind::Symmetric; 2] {
            PathKind::RelayUdp
        } else {
            PathKind::Direct
        }
    }

    /// Whether that path is found by chance only, and may not be found this time.
    fn is_left_to_chance(&self) -> bool {
        let [alice, bob] = self.nats;
        let hard = (NatKind::Symmetric, NatKind::PortRestricted);
        !self.block_udp && ((alice, bob) == hard || (bob, alice) == hard)
    }

    /// What a round trip between the homes takes on the lines alone.
    fn round_trip(&self) -> Duration {
        self.delay * 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_two_symmetric_ones_need_the_relay_and_one_with_a_port_filter_needs_luck() {
        for alice in NatKind::ALL {
            for bob in NatKind::ALL {
                let options = LabOptions { nats: [alice, bob], ..LabOptions::default() };
                let relayed = matches!((alice, bob), (NatKind::Symmetric, NatKind::Symmetric));
                let luck = matches!(
                    (alice, bob),
                    (NatKind::Symmetric, NatKind::PortRestricted)
                        | (NatKind::PortRestricted, NatKind::Symmetric)
                );
                let expected = if relayed { PathKind::RelayUdp } else { PathKind::Direct };
                assert_eq!(options.expected_path(), expected, "{alice} with {bob}");
                assert_eq!(options.is_left_to_chance(), luck, "{alice} with {bob}");
                let blocked = LabOptions { block_udp: true, ..options };
                assert_eq!(blocked.expected_path(), PathKind::RelayTcp);
            }
        }
    }
}
