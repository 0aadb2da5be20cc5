//! What holds for every NAT and every history.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

/// One thing that happens at a NAT.
#[derive(Debug, Clone)]
enum Event {
    Send { host: u8, port: u16, remote: SocketAddr },
    Receive { remote: SocketAddr, port: u16 },
    Wait { seconds: u64 },
}

fn dependence() -> impl Strategy<Value = Dependence> {
    prop_oneof![
        Just(Dependence::EndpointIndependent),
        Just(Dependence::Address),
        Just(Dependence::AddressAndPort),
    ]
}

fn behaviour() -> impl Strategy<Value = NatBehaviour> {
    let allocation = prop_oneof![
        Just(PortAllocation::Preserving),
        Just(PortAllocation::Sequential),
        Just(PortAllocation::Random),
    ];
    let unsolicited = prop_oneof![
        Just(Unsolicited::Forgotten),
        Just(Unsolicited::Claims { timeout: Duration::from_secs(30) }),
    ];
    let flags = (any::<bool>(), any::<bool>());
    (dependence(), dependence(), allocation, unsolicited, flags).prop_map(
        |(mapping, filtering, port_allocation, unsolicited, (hairpinning, inbound_refresh))| {
            NatBehaviour {
                mapping,
                filtering,
                port_allocation,
                unsolicited,
                hairpinning,
                inbound_refresh,
                ..NatBehaviour::default()
            }
        },
    )
}

fn remote() -> impl Strategy<Value = SocketAddr> {
    (0..3_u8, 7000..7003_u16).prop_map(|(host, port)| ([198, 51, 100, host], port).into())
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..4_u8, 5000..5004_u16, remote())
            .prop_map(|(host, port, remote)| Event::Send { host, port, remote }),
        3 => (remote(), 4998..5006_u16).prop_map(|(remote, port)| Event::Receive { remote, port }),
        1 => (1..200_u64).prop_map(|seconds| Event::Wait { seconds }),
    ]
}

fn external() -> IpAddr {
    [203, 0, 113, 10].into()
}

fn flow(src: SocketAddr, dst: SocketAddr) -> Flow {
    Flow { protocol: Protocol::Udp, src, dst }
}

fn inside(host: u8, port: u16) -> SocketAddr {
    ([192, 168, 1, host], port).into()
}

proptest! {
    /// The heart of a NAT: an external endpoint belongs to one internal endpoint at a time.
    #[test]
    fn two_internal_endpoints_never_share_a_live_external_one(
        behaviour in behaviour(),
        events in prop::collection::vec(event(), 1..200),
        seed: u64,
    ) {
        let mut now = crate::testing::epoch();
        let timeout = behaviour.mapping_timeout;
        let mut nat = Nat::with_behaviour(behaviour, external(), seed);
        let mut owners: BTreeMap<SocketAddr, (SocketAddr, Instant)> = BTreeMap::new();
        for event in events {
            match event {
                Event::Send { host, port, remote } => {
                    let src = inside(host, port);
                    let Ok(Outbound::Forward(sent)) = nat.outbound(flow(src, remote), now) else {
                        continue;
                    };
                    prop_assert_eq!(sent.src.ip(), external());
                    prop_assert_eq!(sent.dst, remote, "a NAT changes no remote endpoint");
                    if let Some((owner, at)) = owners.insert(sent.src, (src, now)) {
                        prop_assert!(owner == src || now - at >= timeout,
                            "{owner} and {src} share {}", sent.src);
                    }
                }
                Event::Receive { remote, port } => {
                    let _ = nat.inbound(flow(remote, (external(), port).into()), now);
                }
                Event::Wait { seconds } => now += Duration::from_secs(seconds),
            }
        }
    }

    /// Endpoint-independent mapping: one internal endpoint, one external one, for all remotes.
    #[test]
    fn an_endpoint_independent_mapping_does_not_depend_on_the_remote(
        behaviour in behaviour(),
        remotes in prop::collection::vec(remote(), 1..50),
        seed: u64,
    ) {
        let now = crate::testing::epoch();
        let mapping = Dependence::EndpointIndependent;
        let mut nat =
            Nat::with_behaviour(NatBehaviour { mapping, ..behaviour }, external(), seed);
        let mut seen = Vec::new();
        for remote in remotes {
            if let Ok(Outbound::Forward(sent)) = nat.outbound(flow(inside(2, 5000), remote), now) {
                seen.push(sent.src);
            }
        }
        seen.dedup();
        prop_assert_eq!(seen.len(), 1);
    }

    /// Whatever happened before: the answer to a packet that was just sent comes back to its
    /// sender.
    #[test]
    fn an_answer_always_comes_back(
        behaviour in behaviour(),
        events in prop::collection::vec(event(), 1..200),
        seed: u64,
    ) {
        let mut now = crate::testing::epoch();
        let mut nat = Nat::with_behaviour(behaviour, external(), seed);
        for event in events {
            match event {
                Event::Send { host, port, remote } => {
                    let src = inside(host, port);
                    if let Ok(Outbound::Forward(sent)) = nat.outbound(flow(src, remote), now) {
                        let answer = nat.inbound(sent.reversed(), now);
                        prop_assert_eq!(answer, Ok(flow(remote, src)));
                        prop_assert_eq!(nat.inbound_error(sent, now), Ok(flow(src, remote)));
                    }
                }
                Event::Receive { remote, port } => {
                    let _ = nat.inbound(flow(remote, (external(), port).into()), now);
                }
                Event::Wait { seconds } => now += Duration::from_secs(seconds),
            }
        }
    }

    /// A filter by address and port lets in nobody who was not sent to within the timeout.
    #[test]
    fn the_strictest_filter_admits_only_who_was_asked(
        behaviour in behaviour(),
        events in prop::collection::vec(event(), 1..200),
        seed: u64,
    ) {
        let mut now = crate::testing::epoch();
        let filtering = Dependence::AddressAndPort;
        let behaviour = NatBehaviour { filtering, inbound_refresh: false, ..behaviour };
        let timeout = behaviour.mapping_timeout;
        let mut nat = Nat::with_behaviour(behaviour, external(), seed);
        let mut asked: BTreeMap<(SocketAddr, SocketAddr), Instant> = BTreeMap::new();
        for event in events {
            match event {
                Event::Send { host, port, remote } => {
                    let src = inside(host, port);
                    if nat.outbound(flow(src, remote), now).is_ok() {
                        asked.insert((src, remote), now);
                    }
                }
                Event::Receive { remote, port } => {
                    let inbound = flow(remote, (external(), port).into());
                    if let Ok(admitted) = nat.inbound(inbound, now) {
                        let at = asked.get(&(admitted.dst, remote));
                        prop_assert!(at.is_some_and(|at| now - *at < timeout), "{admitted:?}");
                    }
                }
                Event::Wait { seconds } => now += Duration::from_secs(seconds),
            }
        }
    }
}
