//! The lab's internet: sites, their routers with NATs, their links, and one router between them.
//!
//! ```text
//! host -> home router (TTL, NAT) -> link (delay, loss) -> internet router (TTL, route)
//!      -> link (delay, loss) -> home router (NAT, TTL) -> host
//! ```
//!
//! Pure: packets and the time come in as arguments, [`Internet::poll_delivery`] gives packets out.
//! Packets between the same two sites are never reordered.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::nat::{Nat, NatDrop, Outbound, Protocol};
use super::packet::{self, Content, PacketError, Summary, Ttl};

/// One place that is connected to the internet.
#[derive(Debug)]
pub struct Site {
    /// Its address on the internet.
    pub public: Ipv4Addr,
    /// The router before its host; none if the host has the public address itself.
    pub router: Option<Router>,
    /// Its line.
    pub link: Link,
}

/// A home router.
#[derive(Debug)]
pub struct Router {
    /// Its address on the inside.
    pub lan_address: Ipv4Addr,
    /// What it does to packets.
    pub nat: Nat,
}

/// The line between a site and the internet, the same in both directions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// How long a packet takes, one way.
    pub delay: Duration,
    /// The part of the packets that is lost, from 0 to 1.
    pub loss: f64,
    /// Whether UDP passes.
    pub udp: UdpPolicy,
}

/// What a line does with UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UdpPolicy {
    /// It passes.
    Allowed,
    /// It is dropped, as in networks that let only the web out.
    Blocked,
}

/// A line that changes nothing.
impl Default for Link {
    fn default() -> Self {
        Self { delay: Duration::ZERO, loss: 0.0, udp: UdpPolicy::Allowed }
    }
}

/// Why a packet did not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum InternetDrop {
    /// Nothing that this internet carries.
    #[error("{0}")]
    Packet(#[from] PacketError),
    /// A NAT dropped it.
    #[error("{0}")]
    Nat(#[from] NatDrop),
    /// A link lost it.
    #[error("lost on a link")]
    Loss,
    /// UDP is blocked there.
    #[error("UDP is blocked")]
    UdpBlocked,
    /// It has passed too many routers.
    #[error("TTL expired")]
    TtlExpired,
    /// Nobody has the address.
    #[error("no route")]
    NoRoute,
    /// Too many packets are under way.
    #[error("too many packets in flight")]
    QueueFull,
}

/// Sites and everything between them.
#[derive(Debug)]
pub struct Internet {
    sites: Vec<Site>,
    in_flight: BTreeMap<(Instant, u64), InFlight>,
    sent: u64,
    rng: StdRng,
    drops: BTreeMap<InternetDrop, u64>,
}

#[derive(Debug)]
struct InFlight {
    site: usize,
    segment: Segment,
    packet: Vec<u8>,
}

/// Where a packet in flight will come out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Segment {
    /// Before the site's router.
    Wan,
    /// At the host.
    Lan,
}

impl Internet {
    /// An internet of these sites; they are known by their place in the list.
    pub fn new(sites: Vec<Site>, seed: u64) -> Self {
        Self {
            sites,
            in_flight: BTreeMap::new(),
            sent: 0,
            rng: StdRng::seed_from_u64(seed),
            drops: BTreeMap::new(),
        }
    }

    /// Takes a packet that the host of `site` has sent.
    pub fn handle_packet(&mut self, site: usize, mut packet: Vec<u8>, now: Instant) {
        if let Err(reason) = self.leave(site, &mut packet, now) {
            self.count_drop(reason);
        }
    }

    /// Returns the next packet that reaches the host of a site by `now`.
    pub fn poll_delivery(&mut self, now: Instant) -> Option<(usize, Vec<u8>)> {
        loop {
            let (due, _) = *self.in_flight.first_key_value()?.0;
            if due > now {
                return None;
            }
            let (_, InFlight { site, segment, mut packet }) = self.in_flight.pop_first()?;
            let arrived = match segment {
                Segment::Wan => self.arrive(site, &mut packet, now),
                Segment::Lan => Ok(()),
            };
            match arrived {
                Ok(()) => return Some((site, packet)),
                Err(reason) => self.count_drop(reason),
            }
        }
    }

    /// When the next packet is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.in_flight.first_key_value().map(|((due, _), _)| *due)
    }

    /// How many packets died, by reason.
    pub fn drops(&self) -> &BTreeMap<InternetDrop, u64> {
        &self.drops
    }

    fn leave(
        &mut self,
        from: usize,
        packet: &mut Vec<u8>,
        now: Instant,
    ) -> Result<(), InternetDrop> {
        let summary = packet::summarize(packet)?;
        if summary.dst.is_multicast() || summary.dst.is_broadcast() {
            return Err(InternetDrop::NoRoute);
        }
        let site = self.sites.get_mut(from).ok_or(InternetDrop::NoRoute)?;
        let link = site.link;
        if let Some(router) = &mut site.router {
            let lan_address = router.lan_address;
            if summary.dst == lan_address {
                let answer = packet::echo_reply(packet)
                    .or_else(|| packet::destination_unreachable(packet, lan_address, PORT));
                return self.put(from, Segment::Lan, answer, now);
            }
            if packet::decrement_ttl(packet)? == Ttl::Expired {
                let error = packet::time_exceeded(packet, lan_address);
                self.put(from, Segment::Lan, error, now)?;
                return Err(InternetDrop::TtlExpired);
            }
            let public = site.public;
            if translate_out(&mut router.nat, public, &summary, packet, now)? == Way::TurnedAround {
                return self.put(from, Segment::Lan, Some(std::mem::take(packet)), now);
            }
        }
        self.cross(link, &summary)?;

        let back = now + link.delay * 2;
        if packet::decrement_ttl(packet)? == Ttl::Expired {
            let error = packet::time_exceeded(packet, INTERNET_ROUTER);
            self.put(from, Segment::Wan, error, back)?;
            return Err(InternetDrop::TtlExpired);
        }
        let Some(to) = self.sites.iter().position(|site| site.public == summary.dst) else {
            let error = packet::destination_unreachable(packet, INTERNET_ROUTER, NET);
            self.put(from, Segment::Wan, error, back)?;
            return Err(InternetDrop::NoRoute);
        };
        let far = self.sites.get(to).map(|site| site.link).unwrap_or_default();
        self.cross(far, &summary)?;
        let due = now + link.delay + far.delay;
        self.put(to, Segment::Wan, Some(std::mem::take(packet)), due)
    }

    fn arrive(&mut self, at: usize, packet: &mut [u8], now: Instant) -> Result<(), InternetDrop> {
        let site = self.sites.get_mut(at).ok_or(InternetDrop::NoRoute)?;
        let Some(router) = &mut site.router else {
            return Ok(());
        };
        let summary = packet::summarize(packet)?;
        match summary.content {
            Content::Flow(flow) => packet::rewrite(packet, router.nat.inbound(flow, now)?)?,
            Content::Error { quoted } => {
                let quoted = router.nat.inbound_error(quoted, now)?;
                let std::net::IpAddr::V4(inside) = quoted.src.ip() else {
                    return Err(InternetDrop::NoRoute);
                };
                packet::rewrite_error(packet, summary.src, inside, quoted)?;
            }
        }
        match packet::decrement_ttl(packet)? {
            Ttl::Alive => Ok(()),
            Ttl::Expired => Err(InternetDrop::TtlExpired),
        }
    }

    fn cross(&mut self, link: Link, summary: &Summary) -> Result<(), InternetDrop> {
        let is_udp =
            matches!(summary.content, Content::Flow(flow) if flow.protocol == Protocol::Udp);
        if is_udp && link.udp == UdpPolicy::Blocked {
            return Err(InternetDrop::UdpBlocked);
        }
        if link.loss > 0.0 && self.rng.random::<f64>() < link.loss {
            return Err(InternetDrop::Loss);
        }
        Ok(())
    }

    fn put(
        &mut self,
        site: usize,
        segment: Segment,
        packet: Option<Vec<u8>>,
        due: Instant,
    ) -> Result<(), InternetDrop> {
        let Some(packet) = packet else {
            return Ok(());
        };
        if self.in_flight.len() >= IN_FLIGHT_PACKETS {
            return Err(InternetDrop::QueueFull);
        }
        self.sent += 1;
        self.in_flight.insert((due, self.sent), InFlight { site, segment, packet });
        Ok(())
    }

    fn count_drop(&mut self, reason: InternetDrop) {
        *self.drops.entry(reason).or_default() += 1;
    }
}

#[derive(PartialEq, Eq)]
enum Way {
    Out,
    TurnedAround,
}

fn translate_out(
    nat: &mut Nat,
    public: Ipv4Addr,
    summary: &Summary,
    packet: &mut [u8],
    now: Instant,
) -> Result<Way, InternetDrop> {
    match summary.content {
        Content::Flow(flow) => match nat.outbound(flow, now)? {
            Outbound::Forward(flow) => {
                packet::rewrite(packet, flow)?;
                Ok(Way::Out)
            }
            Outbound::Hairpin(flow) => {
                packet::rewrite(packet, flow)?;
                Ok(Way::TurnedAround)
            }
        },
        Content::Error { quoted } => {
            let quoted = nat.outbound_error(quoted, now)?;
            packet::rewrite_error(packet, public, summary.dst, quoted)?;
            Ok(Way::Out)
        }
    }
}

/// The address of the router in the middle, as errors and traces show it.
pub const INTERNET_ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 254);

/// ICMP code "net unreachable" (RFC 792).
const NET: u8 = 0;

/// ICMP code "port unreachable" (RFC 792).
const PORT: u8 = 3;

/// A second of full-sized packets at 400 Mb/s: bounds memory, not a realistic buffer.
const IN_FLIGHT_PACKETS: usize = 32_768;

#[cfg(test)]
mod tests;
