//! What each kind of NAT does, one sentence per test.

use std::time::Duration;

use super::*;
use crate::testing::epoch;

const EXTERNAL: &str = "203.0.113.10";

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn udp(src: &str, dst: &str) -> Flow {
    Flow { protocol: Protocol::Udp, src: at(src), dst: at(dst) }
}

fn nat(behaviour: NatBehaviour) -> Nat {
    Nat::with_behaviour(behaviour, EXTERNAL.parse().unwrap(), 7)
}

fn of_kind(kind: NatKind) -> Nat {
    Nat::new(kind, EXTERNAL.parse().unwrap(), 7)
}

/// Sends from the inside and returns the external endpoint.
fn send(nat: &mut Nat, src: &str, dst: &str, now: Instant) -> SocketAddr {
    match nat.outbound(udp(src, dst), now) {
        Ok(Outbound::Forward(flow)) => flow.src,
        other => panic!("{src} to {dst} gave {other:?}"),
    }
}

const HOST: &str = "192.168.1.2:5000";
const ALL: [Dependence; 3] =
    [Dependence::EndpointIndependent, Dependence::Address, Dependence::AddressAndPort];

#[test]
fn no_nat_passes_everything_unchanged_both_ways() {
    let mut nat = of_kind(NatKind::None);
    let now = epoch();
    let flow = udp("203.0.113.10:5000", "198.51.100.7:7000");
    assert_eq!(nat.outbound(flow, now), Ok(Outbound::Forward(flow)));
    let stranger = udp("198.51.100.99:1", "203.0.113.10:9");
    assert_eq!(nat.inbound(stranger, now), Ok(stranger), "a public host hears strangers");
    assert_eq!(nat.inbound_error(flow, now), Ok(flow));
    assert_eq!(nat.outbound_error(flow, now), Ok(flow));
}

#[test]
fn an_answer_comes_back_to_the_inside_endpoint_under_every_behaviour() {
    for mapping in ALL {
        for filtering in ALL {
            let mut nat = nat(NatBehaviour { mapping, filtering, ..NatBehaviour::default() });
            let now = epoch();
            let external = send(&mut nat, HOST, "198.51.100.7:7000", now);
            let answer = Flow { dst: external, ..udp("198.51.100.7:7000", "0.0.0.0:0") };
            let inside = nat.inbound(answer, now);
            assert_eq!(inside, Ok(Flow { dst: at(HOST), ..answer }), "{mapping:?} {filtering:?}");
        }
    }
}

#[test]
fn mapping_decides_which_remotes_share_an_external_endpoint() {
    for (mapping, same_address_shares, other_address_shares) in [
        (Dependence::EndpointIndependent, true, true),
        (Dependence::Address, true, false),
        (Dependence::AddressAndPort, false, false),
    ] {
        let mut nat = nat(NatBehaviour { mapping, ..NatBehaviour::default() });
        let now = epoch();
        let first = send(&mut nat, HOST, "198.51.100.7:7000", now);
        let same_address = send(&mut nat, HOST, "198.51.100.7:7001", now);
        let other_address = send(&mut nat, HOST, "198.51.100.8:7000", now);
        assert_eq!(first == same_address, same_address_shares, "{mapping:?}: other port");
        assert_eq!(first == other_address, other_address_shares, "{mapping:?}: other address");
        assert_eq!(send(&mut nat, HOST, "198.51.100.7:7000", now), first, "a mapping is stable");
    }
}

#[test]
fn filtering_decides_who_may_send_to_an_external_endpoint() {
    for mapping in ALL {
        for (filtering, other_port, other_address) in [
            (Dependence::EndpointIndependent, true, true),
            (Dependence::Address, true, false),
            (Dependence::AddressAndPort, false, false),
        ] {
            let mut nat = nat(NatBehaviour { mapping, filtering, ..NatBehaviour::default() });
            let now = epoch();
            let external = send(&mut nat, HOST, "198.51.100.7:7000", now);
            let mut passes = |src: &str| {
                let flow = Flow { dst: external, ..udp(src, "0.0.0.0:0") };
                match nat.inbound(flow, now) {
                    Ok(inside) => {
                        assert_eq!(inside.dst, at(HOST), "it goes to the host that has the port");
                        true
                    }
                    Err(reason) => {
                        assert_eq!(reason, NatDrop::Filtered);
                        false
                    }
                }
            };
            let which = format!("{mapping:?} {filtering:?}");
            assert!(passes("198.51.100.7:7000"), "{which}: the remote itself");
            assert_eq!(passes("198.51.100.7:7001"), other_port, "{which}: its other port");
            assert_eq!(passes("198.51.100.8:7000"), other_address, "{which}: another address");
        }
    }
}

#[test]
fn the_classical_kinds_are_their_points_on_the_grid() {
    let grid = |kind: NatKind| kind.behaviour().map(|it| (it.mapping, it.filtering));
    let [independent, address, both] = ALL;
    assert_eq!(grid(NatKind::None), None);
    assert_eq!(grid(NatKind::FullCone), Some((independent, independent)));
    assert_eq!(grid(NatKind::AddressRestricted), Some((independent, address)));
    assert_eq!(grid(NatKind::PortRestricted), Some((independent, both)));
    assert_eq!(grid(NatKind::Symmetric), Some((both, both)));
    for kind in NatKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind), "the word and the kind are the same");
    }
    let error = "cone".parse::<NatKind>().unwrap_err();
    assert!(error.to_string().starts_with("\"cone\" is not a NAT kind"), "{error}");
}

#[test]
fn a_packet_to_an_endpoint_that_nobody_has_is_dropped_and_counted() {
    let mut nat = of_kind(NatKind::FullCone);
    let dropped = nat.inbound(udp("198.51.100.7:7000", "203.0.113.10:5000"), epoch());
    assert_eq!(dropped, Err(NatDrop::NoMapping));
    assert_eq!(nat.counters().drops[&NatDrop::NoMapping], 1);
}

#[test]
fn a_cone_keeps_the_port_and_gives_the_second_host_another_stable_one() {
    let mut nat = of_kind(NatKind::PortRestricted);
    let now = epoch();
    let first = send(&mut nat, "192.168.1.2:5000", "198.51.100.7:7000", now);
    let second = send(&mut nat, "192.168.1.3:5000", "198.51.100.7:7000", now);
    assert_eq!(first, at("203.0.113.10:5000"), "the port is free");
    assert_ne!(second, first, "the port is taken");
    assert_eq!(send(&mut nat, "192.168.1.3:5000", "198.51.100.8:1", now), second, "stable");
}

#[test]
fn a_port_is_free_again_after_its_mapping_has_timed_out() {
    let mut nat = of_kind(NatKind::PortRestricted);
    let now = epoch();
    send(&mut nat, "192.168.1.2:5000", "198.51.100.7:7000", now);
    let later = now + Duration::from_secs(121);
    let second = send(&mut nat, "192.168.1.3:5000", "198.51.100.7:7000", later);
    assert_eq!(second, at("203.0.113.10:5000"), "the first host's mapping is gone");
    assert_eq!(nat.mappings(later), 1);
}

#[test]
fn sequential_ports_follow_each_other_and_random_ones_do_not() {
    let ports = |port_allocation| {
        let mapping = Dependence::AddressAndPort;
        let mut nat = nat(NatBehaviour { mapping, port_allocation, ..NatBehaviour::default() });
        let now = epoch();
        (1..20_u16)
            .map(|port| send(&mut nat, HOST, &format!("198.51.100.7:{port}"), now).port())
            .collect::<Vec<_>>()
    };
    let follows = |pair: &[u16]| pair[1] == pair[0].checked_add(1).unwrap_or(1024);
    assert!(ports(PortAllocation::Sequential).windows(2).all(follows), "each is one more");
    assert!(!ports(PortAllocation::Random).windows(2).any(follows), "seed 7 has no such pair");
    assert_eq!(ports(PortAllocation::Random), ports(PortAllocation::Random), "a seed is a fate");
}

#[test]
fn ports_run_out_with_a_reason_and_not_with_a_loop() {
    let mut nat = of_kind(NatKind::PortRestricted);
    let now = epoch();
    let flow = |host: u32, port: u16| Flow {
        src: SocketAddr::new(std::net::Ipv4Addr::from(0x0a00_0000 + host).into(), port),
        ..udp(HOST, "198.51.100.7:7000")
    };
    for port in 1..=u16::MAX {
        assert!(nat.outbound(flow(1, port), now).is_ok(), "port {port} is free");
    }
    assert_eq!(nat.outbound(flow(2, 5000), now), Err(NatDrop::PortsExhausted));
    let later = now + Duration::from_secs(120);
    assert!(nat.outbound(flow(2, 5000), later).is_ok(), "time makes room");
}

#[test]
fn an_idle_mapping_times_out_and_a_used_one_lives() {
    let mut nat = of_kind(NatKind::FullCone);
    let start = epoch();
    let external = send(&mut nat, HOST, "198.51.100.7:7000", start);
    let inbound = Flow { dst: external, ..udp("198.51.100.99:1", "0.0.0.0:0") };
    for minute in 1..10 {
        let now = start + Duration::from_secs(60 * minute);
        assert_eq!(send(&mut nat, HOST, "198.51.100.7:7000", now), external, "kept alive");
    }
    let last = start + Duration::from_secs(540);
    assert!(nat.inbound(inbound, last + Duration::from_millis(119_999)).is_ok(), "just in time");
    let quiet = last + Duration::from_millis(119_999) + Duration::from_secs(120);
    assert_eq!(nat.inbound(inbound, quiet), Err(NatDrop::NoMapping), "120 s after the last use");
}

#[test]
fn inbound_packets_keep_a_mapping_alive_only_where_the_nat_says_so() {
    for (inbound_refresh, survives) in [(true, true), (false, false)] {
        let mut nat = nat(NatBehaviour { inbound_refresh, ..NatBehaviour::default() });
        let start = epoch();
        let external = send(&mut nat, HOST, "198.51.100.7:7000", start);
        let inbound = Flow { dst: external, ..udp("198.51.100.7:7000", "0.0.0.0:0") };
        assert!(nat.inbound(inbound, start + Duration::from_secs(100)).is_ok());
        let result = nat.inbound(inbound, start + Duration::from_secs(150));
        assert_eq!(result.is_ok(), survives, "inbound_refresh: {inbound_refresh}");
    }
}

#[test]
fn a_permission_times_out_while_the_mapping_lives_by_other_remotes() {
    let mut nat = of_kind(NatKind::PortRestricted);
    let start = epoch();
    let external = send(&mut nat, HOST, "198.51.100.7:7000", start);
    let later = start + Duration::from_secs(119);
    send(&mut nat, HOST, "198.51.100.8:8000", later);
    let now = start + Duration::from_secs(121);
    let from = |src| Flow { dst: external, ..udp(src, "0.0.0.0:0") };
    assert_eq!(nat.inbound(from("198.51.100.7:7000"), now), Err(NatDrop::Filtered));
    assert!(nat.inbound(from("198.51.100.8:8000"), now).is_ok());
}

#[test]
fn each_protocol_has_its_own_ports_and_its_own_timeout() {
    let mut nat = of_kind(NatKind::PortRestricted);
    let start = epoch();
    let later = start + Duration::from_secs(3600);
    for (protocol, lives_an_hour) in
        [(Protocol::Udp, false), (Protocol::Tcp, true), (Protocol::IcmpEcho, false)]
    {
        let flow = Flow { protocol, ..udp(HOST, "198.51.100.7:0") };
        let sent = nat.outbound(flow, start);
        let expected = Flow { src: at("203.0.113.10:5000"), ..flow };
        assert_eq!(sent, Ok(Outbound::Forward(expected)), "{protocol:?} has the port for itself");
        let answer = nat.inbound(expected.reversed(), later);
        assert_eq!(answer.is_ok(), lives_an_hour, "{protocol:?}");
    }
}

#[test]
fn hairpinning_shows_the_neighbour_by_its_external_endpoint() {
    let mut nat = nat(NatBehaviour {
        hairpinning: true,
        filtering: Dependence::EndpointIndependent,
        ..NatBehaviour::default()
    });
    let now = epoch();
    let alice = send(&mut nat, "192.168.1.2:5000", "198.51.100.7:7000", now);
    let bob = send(&mut nat, "192.168.1.3:6000", "198.51.100.7:7000", now);
    let flow = Flow { dst: bob, ..udp("192.168.1.2:5000", "0.0.0.0:0") };
    let expected = Flow { src: alice, dst: at("192.168.1.3:6000"), ..flow };
    assert_eq!(nat.outbound(flow, now), Ok(Outbound::Hairpin(expected)));
    assert_eq!(nat.counters().hairpinned, 1);
}

#[test]
fn a_hairpinned_packet_meets_the_same_filter_as_one_from_outside() {
    let mut nat = nat(NatBehaviour { hairpinning: true, ..NatBehaviour::default() });
    let now = epoch();
    let alice = send(&mut nat, "192.168.1.2:5000", "198.51.100.7:7000", now);
    let bob = send(&mut nat, "192.168.1.3:6000", "198.51.100.7:7000", now);
    let to_bob = Flow { dst: bob, ..udp("192.168.1.2:5000", "0.0.0.0:0") };
    let to_alice = Flow { dst: alice, ..udp("192.168.1.3:6000", "0.0.0.0:0") };
    assert_eq!(nat.outbound(to_bob, now), Err(NatDrop::Filtered), "bob has not sent yet");
    assert!(matches!(nat.outbound(to_alice, now), Ok(Outbound::Hairpin(_))), "alice has");
    assert!(matches!(nat.outbound(to_bob, now), Ok(Outbound::Hairpin(_))), "now both have");
}

#[test]
fn without_hairpinning_the_packet_is_dropped_with_that_reason() {
    let mut nat = of_kind(NatKind::FullCone);
    let now = epoch();
    let bob = send(&mut nat, "192.168.1.3:6000", "198.51.100.7:7000", now);
    let flow = Flow { dst: bob, ..udp("192.168.1.2:5000", "0.0.0.0:0") };
    assert_eq!(nat.outbound(flow, now), Err(NatDrop::NoHairpinning));
}

#[test]
fn a_flush_forgets_mappings_and_a_new_address_is_used_after_renumbering() {
    let mut nat = of_kind(NatKind::FullCone);
    let now = epoch();
    let external = send(&mut nat, HOST, "198.51.100.7:7000", now);
    nat.flush();
    let answer = Flow { dst: external, ..udp("198.51.100.7:7000", "0.0.0.0:0") };
    assert_eq!(nat.inbound(answer, now), Err(NatDrop::NoMapping), "rebooted");
    nat.renumber("203.0.113.77".parse().unwrap());
    assert_eq!(send(&mut nat, HOST, "198.51.100.7:7000", now), at("203.0.113.77:5000"));
}

#[test]
fn a_firewall_filters_and_changes_no_address() {
    let mut firewall = Nat::firewall(NatBehaviour::default());
    let now = epoch();
    let flow = udp("[2001:db8:1::2]:5000", "[2001:db8:2::2]:7000");
    assert_eq!(firewall.inbound(flow.reversed(), now), Err(NatDrop::NoMapping), "unasked");
    assert_eq!(firewall.outbound(flow, now), Ok(Outbound::Forward(flow)), "unchanged");
    assert_eq!(firewall.inbound(flow.reversed(), now), Ok(flow.reversed()), "asked");
}

#[test]
fn an_error_about_a_packet_that_went_out_finds_its_sender() {
    let mut nat = of_kind(NatKind::Symmetric);
    let now = epoch();
    let external = send(&mut nat, HOST, "198.51.100.7:7000", now);
    let quoted = Flow { src: external, ..udp(HOST, "198.51.100.7:7000") };
    assert_eq!(nat.inbound_error(quoted, now), Ok(udp(HOST, "198.51.100.7:7000")));
    let unknown = Flow { src: at("203.0.113.10:9"), ..quoted };
    assert_eq!(nat.inbound_error(unknown, now), Err(NatDrop::NoMapping));
    let came_in = udp("198.51.100.7:7000", HOST);
    assert_eq!(nat.outbound_error(came_in, now), Ok(Flow { dst: external, ..came_in }));
    let never_came = udp("198.51.100.8:7000", HOST);
    assert_eq!(nat.outbound_error(never_came, now), Err(NatDrop::NoMapping));
}

#[test]
fn an_unsolicited_packet_that_claims_the_port_makes_the_later_flow_leave_by_another() {
    let timeout = Duration::from_secs(30);
    let mut nat = nat(NatBehaviour {
        unsolicited: Unsolicited::Claims { timeout },
        ..NatBehaviour::default()
    });
    let start = epoch();
    let early = udp("198.51.100.7:7000", "203.0.113.10:5000");
    assert_eq!(nat.inbound(early, start), Err(NatDrop::NoMapping));

    let now = start + Duration::from_secs(1);
    let other = send(&mut nat, HOST, "198.51.100.8:8000", now);
    assert_eq!(other, at("203.0.113.10:5000"), "towards others the port is free");
    let poisoned = send(&mut nat, HOST, "198.51.100.7:7000", now);
    assert_ne!(poisoned, other, "the early bird holds the port towards itself");
    assert_eq!(nat.inbound(early, now), Err(NatDrop::Filtered), "and goes on to be dropped");

    nat.flush();
    assert_eq!(send(&mut nat, HOST, "198.51.100.7:7000", now), other, "a flush heals");
}

#[test]
fn a_claim_ends_after_silence() {
    let timeout = Duration::from_secs(30);
    let mut nat = nat(NatBehaviour {
        unsolicited: Unsolicited::Claims { timeout },
        ..NatBehaviour::default()
    });
    let start = epoch();
    let early = udp("198.51.100.7:7000", "203.0.113.10:5000");
    assert_eq!(nat.inbound(early, start), Err(NatDrop::NoMapping));
    let external = send(&mut nat, HOST, "198.51.100.7:7000", start + timeout);
    assert_eq!(external, at("203.0.113.10:5000"));
}
