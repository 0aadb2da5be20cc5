//! Why a pair is joined as it is: from both sides' views to a word, a sentence and a remedy.
//!
//! A pure function. The words are part of the JSON contract; the sentences are for people. What the
//! other side sees may be missing (an older version, or it does not answer): then the verdict rests
//! on our own half and says so.

use std::net::SocketAddr;
use std::time::Duration;

use super::side::{Edge, Outlook, Side};
use super::{Filtering, Mapping, ProbeOutcome, Via};
use crate::types::{CandidateKind, is_internal};

/// What the server says of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It is connected.
    Online,
    /// It is not, for so long as far as we know.
    Offline(Option<Duration>),
    /// Nobody knows: we have no connection to the server.
    Unknown,
    /// It was taken out of the network so long ago.
    Removed(Duration),
    /// Its membership ended so long ago.
    Expired(Duration),
}

/// What a verdict is about.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    /// This node's name.
    pub own_name: &'a str,
    /// The peer's name.
    pub peer_name: &'a str,
    /// Our view.
    pub own: &'a Side,
    /// The peer's view, if it told us.
    pub peer: Option<&'a Side>,
    /// What the server says.
    pub presence: Presence,
    /// Since when the path is what it is.
    pub since: Duration,
}

/// The verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The word for programs.
    pub word: Word,
    /// What it means, in a sentence.
    pub sentence: String,
    /// The one thing to do about it.
    pub remedy: String,
}

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// Why a pair is joined as it is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Word { $($(#[$doc])* $name,)* }

        impl Word {
            /// All words.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The word in `verdict.word` of the JSON contract.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

words! {
    /// Direct, inside one private network.
    DirectLan => "direct-lan",
    /// Direct over IPv6.
    DirectIpv6 => "direct-ipv6",
    /// Direct to a side that anybody can reach.
    DirectPublic => "direct-public",
    /// Direct through a port that a router maps or a person forwarded.
    DirectPortMapped => "direct-port-mapped",
    /// Direct through a port that was guessed.
    DirectPredicted => "direct-predicted",
    /// Direct through two NATs opened at the same time.
    DirectPunched => "direct-punched",
    /// No member any more.
    Removed => "removed",
    /// The server does not see it, and nothing answers.
    Offline => "offline",
    /// We have no server, and nothing answers.
    NoServer => "no-server",
    /// UDP is blocked on both sides.
    UdpBlockedBoth => "udp-blocked-both",
    /// UDP is blocked on our side.
    UdpBlockedHere => "udp-blocked-here",
    /// UDP is blocked on the peer's side.
    UdpBlockedThere => "udp-blocked-there",
    /// The peer says nowhere that it could be reached.
    NoCandidates => "no-candidates",
    /// Nothing was tried yet.
    NotTried => "not-tried",
    /// Probes are under way.
    Trying => "trying",
    /// Guesses of a port that can be guessed are under way.
    Predicting => "predicting",
    /// This machine has no route to any candidate.
    NoRouteHere => "no-route-here",
    /// One side has only IPv6, the other one only IPv4.
    NoCommonFamily => "no-common-family",
    /// One router that does not turn packets around, and no way inside.
    SameNat => "same-nat-no-hairpin",
    /// Two NATs with another port for each destination.
    SymmetricBoth => "symmetric-both",
    /// A NAT with a random port for each destination, and one that only lets answers in.
    SymmetricPortRestricted => "symmetric-port-restricted",
    /// Something on our side drops what comes in.
    FirewallHere => "firewall-here",
    /// Something on the peer's side drops what comes in.
    FirewallThere => "firewall-there",
    /// Something between the two drops datagrams, and nobody can tell where.
    Firewall => "firewall",
    /// Probes pass on a direct path and data does not.
    DataLost => "data-lost",
    /// Relayed, and the peer does not tell its half.
    PeerSilent => "peer-tells-nothing",
}

/// Gives the verdict.
#[must_use]
pub fn verdict(pair: &Pair<'_>) -> Verdict {
    let (word, sentence, remedy) = judge(pair);
    Verdict { word, sentence, remedy }
}

type Judged = (Word, String, String);

fn judge(pair: &Pair<'_>) -> Judged {
    if let Presence::Removed(ago) = pair.presence {
        return removed(pair, ago);
    }
    if let Presence::Expired(ago) = pair.presence {
        return expired(pair, ago);
    }
    if let Some(Via::Direct { remote, .. }) = pair.own.path {
        return direct(pair, remote);
    }
    if pair.own.path.is_none()
        && let Some(judged) = absent(pair)
    {
        return judged;
    }
    no_route(pair)
        .or_else(|| blocked(pair))
        .or_else(|| by_networks(pair))
        .unwrap_or_else(|| by_probes(pair))
}

fn removed(pair: &Pair<'_>, ago: Duration) -> Judged {
    let Pair { peer_name, .. } = pair;
    (
        Word::Removed,
        format!("{peer_name} was removed from the network {} ago", span(ago)),
        format!("to take it back: overlay server invite, then on {peer_name}: overlay up JOINLINE"),
    )
}

fn expired(pair: &Pair<'_>, ago: Duration) -> Judged {
    let Pair { peer_name, .. } = pair;
    (
        Word::Removed,
        format!("the membership of {peer_name} ended {} ago", span(ago)),
        format!("with more time it is back at once: overlay server expire {peer_name} --in 180d"),
    )
}

fn absent(pair: &Pair<'_>) -> Option<Judged> {
    let Pair { own_name, peer_name, .. } = pair;
    match pair.presence {
        Presence::Offline(since) => {
            let since = since.map(|since| format!(" for {}", span(since))).unwrap_or_default();
            let sentence = format!(
                "{peer_name} is offline{since}: the server does not see it, and it does not answer"
            );
            Some((
                Word::Offline,
                sentence,
                format!(
                    "start it on {peer_name}: sudo overlay up (as a service: sudo systemctl start overlay)"
                ),
            ))
        }
        Presence::Unknown => Some((
            Word::NoServer,
            format!("{own_name} cannot reach the server, and {peer_name} does not answer directly"),
            format!("check {own_name}'s network and the server (on it: overlay server nodes)"),
        )),
        Presence::Online | Presence::Removed(_) | Presence::Expired(_) => None,
    }
}

fn direct(pair: &Pair<'_>, remote: SocketAddr) -> Judged {
    let (word, how) = direct_kind(pair, remote);
    let since = span(pair.since);
    (word, format!("direct since {since} {how} ({remote})"), "nothing to do".into())
}

fn direct_kind(pair: &Pair<'_>, remote: SocketAddr) -> (Word, &'static str) {
    let kinds = [pair.own.path_kind(), pair.peer.and_then(Side::path_kind)];
    let either = |kind| kinds.contains(&Some(kind));
    if is_internal(remote.ip()) {
        return (Word::DirectLan, "inside one private network");
    }
    if remote.is_ipv6() {
        return (Word::DirectIpv6, "over IPv6");
    }
    if either(CandidateKind::PortMapped) || either(CandidateKind::Static) {
        return (Word::DirectPortMapped, "through a port that a router forwards");
    }
    let public = |side: &Side| {
        let open = side.facts.filtering != Some(Filtering::AddressAndPortDependent);
        side.facts.mapping == Some(Mapping::None) && open
    };
    // An address that stands on the peer's own interface needs no NAT.
    let host = pair.peer.is_none() && pair.own.path_kind() == Some(CandidateKind::Host);
    if public(pair.own) || pair.peer.is_some_and(public) || host {
        return (Word::DirectPublic, "to a public address");
    }
    let outlook =
        pair.peer.map_or(Outlook::Unknown, |peer| pair.own.facts.outlook_ipv4(&peer.facts));
    match outlook {
        Outlook::AfterPrediction | Outlook::IfGuessed | Outlook::RelayOnly => {
            (Word::DirectPredicted, "through a NAT port that was guessed")
        }
        Outlook::Unknown if either(CandidateKind::Predicted) => {
            (Word::DirectPredicted, "through a NAT port that was guessed")
        }
        _ => (Word::DirectPunched, "through NATs that both sides opened at the same time"),
    }
}

/// Nothing has left this machine, so nobody's silence says anything.
fn no_route(pair: &Pair<'_>) -> Option<Judged> {
    let Pair { own_name, peer_name, own, peer, .. } = pair;
    let first = own.tried.first()?;
    let apart = peer.is_some_and(|peer| own.facts.no_common_family(&peer.facts));
    if apart || !own.tried.iter().all(|tried| tried.no_route) {
        return None;
    }
    let total = own.tried.len();
    Some((
        Word::NoRouteHere,
        format!(
            "{own_name} itself has no route to any of {peer_name}'s {total} candidates: the kernel \
             sends nothing there"
        ),
        format!(
            "on {own_name}, add the missing route (often the default route): ip route; ip route get {}",
            first.endpoint.ip()
        ),
    ))
}

fn blocked(pair: &Pair<'_>) -> Option<Judged> {
    let Pair { own_name, peer_name, .. } = pair;
    let here = pair.own.facts.udp == Some(false);
    let there = pair.peer.is_some_and(|peer| peer.facts.udp == Some(false));
    let (word, place) = match (here, there) {
        (true, true) => {
            (Word::UdpBlockedBoth, format!("on {own_name}'s and on {peer_name}'s side"))
        }
        (true, false) => (Word::UdpBlockedHere, format!("on {own_name}'s side")),
        (false, true) => (Word::UdpBlockedThere, format!("on {peer_name}'s side")),
        (false, false) => return None,
    };
    Some((
        word,
        format!("UDP is blocked {place}: data goes by the server's relay, over TCP there"),
        format!("allow outgoing UDP {place} (any port; at least to the server)"),
    ))
}

/// What the two networks explain, whatever the probes do at this moment.
fn by_networks(pair: &Pair<'_>) -> Option<Judged> {
    let Pair { own_name, peer_name, own, .. } = pair;
    let peer = pair.peer?;
    if own.facts.same_nat(&peer.facts) {
        if is_probing(own) || is_probing(peer) || own.count(ProbeOutcome::Silent) == 0 {
            return None;
        }
        return Some((
            Word::SameNat,
            format!(
                "{own_name} and {peer_name} are behind one public address, whose router does not \
                 turn packets around (hairpin), and their local addresses do not reach each other"
            ),
            "let the two talk inside: switch off client isolation (guest network) on the router \
             or access point, or route between the two subnets"
                .into(),
        ));
    }
    if own.facts.no_common_family(&peer.facts) {
        return Some(no_common_family(pair));
    }
    let relayed = "data is relayed";
    match own.facts.outlook_ipv4(&peer.facts) {
        Outlook::RelayOnly => Some((
            Word::SymmetricBoth,
            format!(
                "both sides are behind a NAT that picks another port for each destination, at \
                 least one of them at random; nothing can predict that, so {relayed}"
            ),
            forward(pair, peer),
        )),
        Outlook::IfGuessed => {
            let (random, strict) = if own.facts.edge() == Some(Edge::Random) {
                (own_name, peer_name)
            } else {
                (peer_name, own_name)
            };
            Some((
                Word::SymmetricPortRestricted,
                format!(
                    "{random}'s NAT picks a random port for each destination and {strict}'s only \
                     lets answers in; {relayed} and may become direct within seconds if a guess \
                     hits"
                ),
                forward(pair, peer),
            ))
        }
        Outlook::AfterPrediction => {
            let guesser = if own.facts.counts { own_name } else { peer_name };
            Some((
                Word::Predicting,
                format!(
                    "{guesser}'s NAT picks another port for each destination, in order; the next \
                     ones are being guessed, {relayed} until one is hit"
                ),
                forward(pair, peer),
            ))
        }
        Outlook::Direct | Outlook::NoUdp | Outlook::NoFamily | Outlook::Unknown => None,
    }
}

fn no_common_family(pair: &Pair<'_>) -> Judged {
    let Pair { own_name, peer_name, own, .. } = pair;
    let (six, four) = match own.facts.is_ipv6_only() {
        true => (own_name, peer_name),
        false => (peer_name, own_name),
    };
    (
        Word::NoCommonFamily,
        format!(
            "{six} has only IPv6 and {four} has only IPv4: no datagram gets from one to the other, so \
             data is relayed"
        ),
        format!("switch on IPv6 in {four}'s network, or IPv4 in {six}'s; one of them is enough"),
    )
}

/// Forward a port on the side where one is enough; the stricter one if there is a difference.
fn forward(pair: &Pair<'_>, peer: &Side) -> String {
    let harder_there =
        peer.facts.edge() == Some(Edge::Random) && pair.own.facts.edge() != Some(Edge::Random);
    let (name, side) =
        if harder_there { (pair.peer_name, peer) } else { (pair.own_name, pair.own) };
    let port = side
        .facts
        .port
        .map_or_else(|| "its UDP port".to_string(), |port| format!("UDP port {port}"));
    format!(
        "on {name}'s router, switch on UPnP or NAT-PMP, or forward {port} to {name}; one side is enough"
    )
}

fn by_probes(pair: &Pair<'_>) -> Judged {
    let Pair { own_name, peer_name, own, .. } = pair;
    let total = own.tried.len();
    if total == 0 {
        return (
            Word::NoCandidates,
            format!("{peer_name} has not told yet where it may be reached"),
            format!("wait a moment; if it stays, on {peer_name}: overlay netcheck"),
        );
    }
    if own.count(ProbeOutcome::Untried) == total && !pair.peer.is_some_and(is_probing) {
        return (
            Word::NotTried,
            format!("none of {peer_name}'s {total} candidates was tried yet: nobody sent anything"),
            format!("overlay ping {peer_name}"),
        );
    }
    if own.path.is_some() && own.hears_now() && pair.peer.is_some_and(Side::hears_now) {
        return (
            Word::DataLost,
            format!(
                "{own_name} and {peer_name} hear each other directly, but data was lost on that way: \
                 it is relayed until the direct way has carried it for a while"
            ),
            format!(
                "look for what drops long datagrams or many of them between the two, such as a link \
                 with a smaller MTU; what was lost: overlay history {peer_name}"
            ),
        );
    }
    if is_probing(own) || pair.peer.is_some_and(is_probing) {
        let open = own.count(ProbeOutcome::Probing) + own.count(ProbeOutcome::Untried);
        return (
            Word::Trying,
            format!("still trying: {open} of {total} candidates open"),
            format!("wait a few seconds, then: overlay why {peer_name}"),
        );
    }
    let Some(peer) = pair.peer else {
        let nat = own.facts.kind();
        return (
            Word::PeerSilent,
            format!(
                "none of {peer_name}'s {total} candidates answered {own_name} (NAT: {nat}), and \
                 {peer_name} does not tell its half"
            ),
            format!(
                "on {peer_name}: overlay why {own_name}; and the same version on both: overlay version"
            ),
        );
    };
    let port = |side: &Side| {
        side.facts.port.map_or_else(|| "its UDP port".into(), |port| format!("UDP port {port}"))
    };
    match (own.hears(), peer.hears()) {
        (false, true) => (
            Word::FirewallHere,
            format!(
                "{peer_name} hears {own_name} and answers, but nothing arrives: a firewall on {own_name}'s side drops it"
            ),
            format!(
                "let {} in on {own_name} and its router: sudo nft list ruleset shows what drops it",
                port(own)
            ),
        ),
        (true, false) => (
            Word::FirewallThere,
            format!(
                "{own_name} hears {peer_name} and answers, but nothing arrives there: a firewall on {peer_name}'s side drops it"
            ),
            format!(
                "let {} in on {peer_name} and its router: sudo nft list ruleset shows what drops it",
                port(peer)
            ),
        ),
        (false, false) | (true, true) => (
            Word::Firewall,
            format!(
                "no NAT explains it: all of {total} candidates are silent, so a firewall between {own_name} and {peer_name} drops their datagrams"
            ),
            format!(
                "let {} in on {own_name}, or {} on {peer_name}, in the firewalls of machine and router",
                port(own),
                port(peer)
            ),
        ),
    }
}

fn is_probing(side: &Side) -> bool {
    side.count(ProbeOutcome::Probing) > 0
}

/// A duration for people: its largest unit.
fn span(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests;
