//! The verdict of every cell of the matrix of NATs, and of all that lies beside it.

use super::*;
use crate::path::side::{Facts, Tried};

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The networks of the matrix of tests, and what is known of each.
fn network(name: &str) -> Facts {
    let open = Some(Filtering::EndpointIndependentOrAddressDependent);
    let closed = Some(Filtering::AddressAndPortDependent);
    let (mapping, filtering, counts) = match name {
        "none" => (Mapping::None, open, false),
        "full-cone" | "address-restricted" => (Mapping::EndpointIndependent, open, false),
        "port-restricted" | "open-input" => (Mapping::EndpointIndependent, closed, false),
        "untested" => (Mapping::EndpointIndependent, None, false),
        "symmetric" => (Mapping::AddressAndPortDependent, None, false),
        "sequential" => (Mapping::AddressAndPortDependent, None, true),
        _ => panic!("no network is called {name}"),
    };
    Facts {
        udp: Some(true),
        mapping: Some(mapping),
        filtering,
        counts,
        port: Some(41_000),
        ..Facts::default()
    }
}

fn tried(endpoint: &str, outcome: ProbeOutcome) -> Tried {
    Tried {
        endpoint: at(endpoint),
        kind: CandidateKind::Reflexive,
        outcome,
        pings: 10,
        rtt: None,
        heard: None,
        no_route: false,
    }
}

fn side(facts: Facts, reflexive: &str, path: Option<Via>, outcome: ProbeOutcome) -> Side {
    let facts = Facts { reflexive: Some(at(reflexive)), ..facts };
    Side { facts, path, tried: vec![tried("198.51.100.7:7000", outcome)] }
}

fn relayed(name: &str, reflexive: &str) -> Side {
    side(network(name), reflexive, Some(Via::RelayUdp), ProbeOutcome::Silent)
}

fn direct_side(name: &str, reflexive: &str) -> Side {
    let via = Via::direct(at("198.51.100.7:7000"));
    side(network(name), reflexive, Some(via), ProbeOutcome::Answered)
}

const HERE: &str = "203.0.113.1:5000";
const THERE: &str = "203.0.113.2:5000";

fn judged(own: &Side, peer: Option<&Side>, presence: Presence) -> Verdict {
    let since = Duration::from_secs(3);
    let verdict =
        verdict(&Pair { own_name: "alice", peer_name: "bob", own, peer, presence, since });
    assert!(verdict.sentence.split(' ').count() > 3, "a sentence: {verdict:?}");
    assert!(!verdict.remedy.is_empty() && !verdict.sentence.ends_with('.'), "{verdict:?}");
    verdict
}

fn word(own: &Side, peer: &Side) -> Word {
    let there = judged(peer, Some(own), Presence::Online).word;
    let here = judged(own, Some(peer), Presence::Online).word;
    assert_eq!(here, there, "both sides say the same");
    here
}

const NETWORKS: [&str; 7] = [
    "none",
    "full-cone",
    "address-restricted",
    "port-restricted",
    "open-input",
    "sequential",
    "symmetric",
];

#[test]
fn every_cell_of_the_matrix_has_its_verdict_when_it_is_direct() {
    for a in NETWORKS {
        for b in NETWORKS {
            let strict = |name| matches!(name, "port-restricted" | "open-input");
            let hard = |name| matches!(name, "sequential" | "symmetric");
            let expected = if a == "none" || b == "none" {
                Word::DirectPublic
            } else if hard(a) && (hard(b) || strict(b)) || hard(b) && strict(a) {
                Word::DirectPredicted
            } else {
                Word::DirectPunched
            };
            assert_eq!(word(&direct_side(a, HERE), &direct_side(b, THERE)), expected, "{a}, {b}");
        }
    }
}

#[test]
fn every_cell_of_the_matrix_has_its_verdict_when_it_is_relayed() {
    for a in NETWORKS {
        for b in NETWORKS {
            let strict = |name| matches!(name, "port-restricted" | "open-input");
            let expected = match (a, b) {
                ("symmetric", "symmetric" | "sequential") | ("sequential", "symmetric") => {
                    Word::SymmetricBoth
                }
                ("symmetric", other) | (other, "symmetric") if strict(other) => {
                    Word::SymmetricPortRestricted
                }
                ("sequential", "sequential") => Word::Predicting,
                ("sequential", other) | (other, "sequential") if strict(other) => Word::Predicting,
                // No NAT explains it.
                _ => Word::Firewall,
            };
            assert_eq!(word(&relayed(a, HERE), &relayed(b, THERE)), expected, "{a} with {b}");
        }
    }
}

#[test]
fn an_untested_filter_counts_as_the_stricter() {
    let pair = (relayed("untested", HERE), relayed("symmetric", THERE));
    assert_eq!(word(&pair.0, &pair.1), Word::SymmetricPortRestricted);
}

#[test]
fn a_hard_pair_is_told_whose_router_can_help() {
    let (own, peer) = (relayed("port-restricted", HERE), relayed("symmetric", THERE));
    let verdict = judged(&own, Some(&peer), Presence::Online);
    assert!(verdict.remedy.contains("bob's router"), "{}", verdict.remedy);
    assert!(verdict.remedy.contains("41000"), "{}", verdict.remedy);
    assert!(verdict.sentence.contains("within seconds"), "{}", verdict.sentence);
}

#[test]
fn direct_paths_are_told_by_where_they_lead() {
    let of = |remote: &str, kind| {
        let mut own = direct_side("symmetric", HERE);
        own.path = Some(Via::direct(at(remote)));
        own.tried[0] =
            Tried { kind, endpoint: at(remote), ..tried(remote, ProbeOutcome::Answered) };
        judged(&own, None, Presence::Online).word
    };
    assert_eq!(of("192.168.1.9:1", CandidateKind::Host), Word::DirectLan);
    assert_eq!(of("[fd00::9]:1", CandidateKind::Host), Word::DirectLan);
    assert_eq!(of("[2001:db8::9]:1", CandidateKind::Host), Word::DirectIpv6);
    assert_eq!(of("198.51.100.7:1", CandidateKind::Host), Word::DirectPublic);
    assert_eq!(of("198.51.100.7:1", CandidateKind::PortMapped), Word::DirectPortMapped);
    assert_eq!(of("198.51.100.7:1", CandidateKind::Static), Word::DirectPortMapped);
    assert_eq!(of("198.51.100.7:1", CandidateKind::Predicted), Word::DirectPredicted);
    assert_eq!(of("198.51.100.7:1", CandidateKind::PeerReflexive), Word::DirectPunched);
    let sentence = judged(&direct_side("none", HERE), None, Presence::Online).sentence;
    assert!(sentence.starts_with("direct since 3 s "), "{sentence}");
}

#[test]
fn blocked_udp_is_told_from_the_speakers_side() {
    let free = relayed("port-restricted", HERE);
    let mut blocked = relayed("port-restricted", THERE);
    blocked.facts.udp = Some(false);
    blocked.path = Some(Via::RelayTcp);
    let of = |own: &Side, peer: &Side| judged(own, Some(peer), Presence::Online);
    assert_eq!(of(&free, &blocked).word, Word::UdpBlockedThere);
    assert_eq!(of(&blocked, &free).word, Word::UdpBlockedHere);
    assert_eq!(of(&blocked, &blocked).word, Word::UdpBlockedBoth);
    assert!(of(&free, &blocked).remedy.contains("bob's side"));
}

#[test]
fn who_is_not_there_is_told_apart() {
    let none = Side { path: None, ..relayed("none", HERE) };
    let of = |presence| judged(&none, None, presence);
    let offline = of(Presence::Offline(Some(Duration::from_secs(300))));
    assert_eq!(offline.word, Word::Offline);
    assert!(offline.sentence.contains("for 5 min"), "{}", offline.sentence);
    assert_eq!(of(Presence::Offline(None)).word, Word::Offline);
    assert_eq!(of(Presence::Unknown).word, Word::NoServer);
    assert_eq!(of(Presence::Removed(Duration::from_secs(7))).word, Word::Removed);
    let expired = of(Presence::Expired(Duration::from_secs(7)));
    assert_eq!(expired.word, Word::Removed);
    assert!(expired.remedy.contains("overlay server expire"), "{}", expired.remedy);
    // A direct path outlives the server's knowledge.
    let direct = direct_side("none", HERE);
    assert_eq!(judged(&direct, None, Presence::Offline(None)).word, Word::DirectPublic);
}

#[test]
fn what_is_under_way_is_no_verdict_yet() {
    let mut own = relayed("port-restricted", HERE);
    let peer = relayed("port-restricted", THERE);
    own.tried = Vec::new();
    assert_eq!(judged(&own, Some(&peer), Presence::Online).word, Word::NoCandidates);
    own.tried = vec![tried("198.51.100.7:1", ProbeOutcome::Untried)];
    assert_eq!(judged(&own, Some(&peer), Presence::Online).word, Word::NotTried);
    own.tried.push(tried("198.51.100.7:2", ProbeOutcome::Probing));
    own.tried.push(tried("198.51.100.7:3", ProbeOutcome::Silent));
    let trying = judged(&own, Some(&peer), Presence::Online);
    assert_eq!(trying.word, Word::Trying);
    assert!(trying.sentence.contains("2 of 3"), "{}", trying.sentence);
}

#[test]
fn one_router_that_does_not_turn_packets_around() {
    let (own, peer) = (relayed("port-restricted", HERE), relayed("port-restricted", HERE));
    assert_eq!(word(&own, &peer), Word::SameNat);
    let (own, peer) = (relayed("symmetric", HERE), relayed("symmetric", HERE));
    assert_eq!(word(&own, &peer), Word::SameNat);
}

#[test]
fn no_common_family_is_no_firewall() {
    let (mut own, mut peer) = (relayed("none", HERE), relayed("port-restricted", THERE));
    (own.facts.ipv4, own.facts.ipv6) = (Some(false), true);
    peer.facts.ipv4 = Some(true);
    assert_eq!(word(&own, &peer), Word::NoCommonFamily);
    let of = |own: &Side, peer: &Side| judged(own, Some(peer), Presence::Online);
    assert!(of(&own, &peer).sentence.starts_with("alice has only IPv6 and bob has only IPv4"));
    assert!(of(&peer, &own).sentence.starts_with("bob has only IPv6 and alice has only IPv4"));
    peer.facts.ipv6 = true;
    assert_eq!(word(&own, &peer), Word::Firewall, "by IPv6 it should work");
}

#[test]
fn a_firewall_is_found_by_who_hears_whom() {
    let deaf = relayed("none", HERE);
    let mut hearing = relayed("none", THERE);
    hearing.tried[0].heard = Some(Duration::from_secs(1));
    let of = |own: &Side, peer: &Side| judged(own, Some(peer), Presence::Online).word;
    assert_eq!(of(&deaf, &hearing), Word::FirewallHere);
    assert_eq!(of(&hearing, &deaf), Word::FirewallThere);
    assert_eq!(of(&deaf, &deaf), Word::Firewall);
}

#[test]
fn probes_that_pass_where_data_does_not_are_no_firewall() {
    let heard = |seconds| {
        let mut side = relayed("none", HERE);
        side.tried[0].outcome = ProbeOutcome::Answered;
        side.tried[0].heard = Some(Duration::from_secs(seconds));
        side.tried.push(tried("198.51.100.7:2", ProbeOutcome::Probing));
        side
    };
    assert_eq!(word(&heard(0), &heard(1)), Word::DataLost);
    assert_eq!(word(&heard(0), &heard(60)), Word::Trying, "it was so once");
}

/// What the kernel did not send nobody could answer.
#[test]
fn silence_of_whom_nothing_was_sent_to_is_for_want_of_a_route() {
    let mut own = relayed("none", HERE);
    own.tried.push(tried("203.0.113.9:2", ProbeOutcome::Probing));
    let peer = relayed("none", THERE);
    own.tried[0].no_route = true;
    assert_eq!(word(&own, &peer), Word::Trying, "to the other one there is a route");
    own.tried[1].no_route = true;
    let verdict = judged(&own, Some(&peer), Presence::Online);
    assert_eq!(verdict.word, Word::NoRouteHere);
    assert!(verdict.sentence.contains("itself has no route"), "{}", verdict.sentence);
    assert!(verdict.remedy.contains("ip route get 198.51.100.7"), "{}", verdict.remedy);
    let udp = Some(false);
    own.facts.udp = udp;
    assert_eq!(judged(&own, None, Presence::Online).word, Word::NoRouteHere, "that is why");
    own.facts = Facts { ipv4: Some(false), ipv6: true, ..own.facts };
    let apart = judged(&own, Some(&peer), Presence::Online).word;
    assert_eq!(apart, Word::UdpBlockedHere, "no common family, and that is said elsewhere");
}

#[test]
fn a_peer_that_tells_nothing_is_said_to() {
    let own = relayed("symmetric", HERE);
    let verdict = judged(&own, None, Presence::Online);
    assert_eq!(verdict.word, Word::PeerSilent);
    assert!(verdict.sentence.contains("symmetric"), "{}", verdict.sentence);
}

#[test]
fn no_two_verdicts_share_a_word() {
    let words: std::collections::BTreeSet<_> = Word::ALL.iter().map(|word| word.as_str()).collect();
    assert_eq!(words.len(), Word::ALL.len());
}
