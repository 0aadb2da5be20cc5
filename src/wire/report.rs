//! What one node tells another about the ways between them: the body of a disco report.
//!
//! CBOR maps with numbered fields, by the rule of change of the control messages: numbers are
//! never used again, new fields are optional, unknown fields are skipped. A report fits a datagram
//! that every path carries; candidates that do not fit are left out, those at the end first.

use std::net::SocketAddr;

use minicbor::{Decode, Encode};

/// The longest body of a report, in bytes: with all headers it fits the IPv6 minimum.
pub const MAX_REPORT: usize = 1024;
/// More candidates than this are not read.
const MAX_TRIED: usize = 48;

/// One side's view of the ways to the other.
#[derive(Debug, Clone, Default, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct Report {
    /// Which way data takes: 0 none, 1 direct, 2 relay over UDP, 3 relay over TCP.
    #[n(0)]
    pub path: u8,
    /// Where a direct path leads.
    #[n(1)]
    pub remote: Option<SocketAddr>,
    /// The network in front of the sender.
    #[n(2)]
    pub facts: WireFacts,
    /// What was tried.
    #[n(3)]
    pub tried: Vec<WireTried>,
}

/// The network in front of a node, as far as it knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct WireFacts {
    /// Whether UDP reaches the server and comes back.
    #[n(0)]
    pub udp: Option<bool>,
    /// RFC 4787 mapping: 1 none, 2 endpoint-independent, 3 address and port-dependent.
    #[n(1)]
    pub mapping: Option<u8>,
    /// RFC 4787 filtering: 1 endpoint-independent or address-dependent, 2 address and
    /// port-dependent.
    #[n(2)]
    pub filtering: Option<u8>,
    /// Whether the NAT gives its ports in order.
    #[n(3)]
    pub counts: bool,
    /// Where the server sees the node.
    #[n(4)]
    pub reflexive: Option<SocketAddr>,
    /// Whether the node has a global IPv6 address.
    #[n(5)]
    pub ipv6: bool,
    /// Whether a router maps a port to it.
    #[n(6)]
    pub port_mapped: bool,
    /// Its own UDP port.
    #[n(7)]
    pub port: Option<u16>,
    /// Whether the node has an IPv4 address.
    #[n(8)]
    pub ipv4: Option<bool>,
}

/// A candidate of the other side, and how it answered.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct WireTried {
    /// Where.
    #[n(0)]
    pub endpoint: SocketAddr,
    /// See [`crate::types::CandidateKind::code`].
    #[n(1)]
    pub kind: u8,
    /// 0 untried, 1 probing, 2 answered, 3 silent.
    #[n(2)]
    pub outcome: u8,
    /// Pings sent to it.
    #[n(3)]
    pub pings: u32,
    /// Its smoothed round trip in microseconds.
    #[n(4)]
    pub rtt_us: Option<u32>,
    /// Milliseconds since anything was heard from it.
    #[n(5)]
    pub heard_ms: Option<u64>,
}

impl Report {
    /// The bytes of this report, [`MAX_REPORT`] at the most.
    #[must_use]
    pub fn encode(mut self) -> Vec<u8> {
        loop {
            let bytes = minicbor::to_vec(&self).expect("writing to memory cannot fail");
            if bytes.len() <= MAX_REPORT || self.tried.pop().is_none() {
                return bytes;
            }
        }
    }

    /// Reads a body; none when it makes no sense.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut report: Self = minicbor::decode(bytes).ok()?;
        report.tried.truncate(MAX_TRIED);
        Some(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(port: u16) -> WireTried {
        let endpoint = SocketAddr::new("2001:db8::7".parse().unwrap(), port);
        WireTried {
            endpoint,
            kind: 5,
            outcome: 3,
            pings: 70_000,
            rtt_us: Some(70_000),
            heard_ms: Some(70_000),
        }
    }

    #[test]
    fn a_report_survives_and_a_long_one_loses_its_end() {
        let facts = WireFacts { udp: Some(true), mapping: Some(3), ..WireFacts::default() };
        let report = Report { path: 2, facts, tried: vec![tried(1)], ..Report::default() };
        assert_eq!(Report::decode(&report.clone().encode()), Some(report.clone()));
        let long = Report { tried: (1..200).map(tried).collect(), ..report };
        let bytes = long.clone().encode();
        assert!(bytes.len() <= MAX_REPORT, "{} bytes", bytes.len());
        let read = Report::decode(&bytes).unwrap();
        assert!(read.tried.len() > 10, "{} candidates fit", read.tried.len());
        assert_eq!(read.tried, long.tried[..read.tried.len()]);
    }

    #[test]
    fn fields_of_a_newer_version_are_skipped() {
        // {0: 1, 2: {3: false, 5: true, 6: false, 9: "new"}, 3: [], 77: [1, 2]}
        let bytes = [
            0xa4, 0, 1, 2, 0xa4, 3, 0xf4, 5, 0xf5, 6, 0xf4, 9, 0x63, b'n', b'e', b'w', 3, 0x80,
            0x18, 77, 0x82, 1, 2,
        ];
        let report = Report::decode(&bytes).unwrap();
        assert_eq!((report.path, report.facts.ipv6), (1, true));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(0u8.., 0..300)) {
            let _ = Report::decode(&bytes);
        }
    }
}
