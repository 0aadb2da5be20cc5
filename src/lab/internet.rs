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
    delivered: u64,
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
            delivered: 0,
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
                Ok(()) => {
                    self.delivered += 1;
                    return Some((site, packet));
                }
                Err(reason) => self.count_drop(reason),
            }
        }
    }

    /// When the next packet is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.in_flight.first_key_value().map(|((due, _), _)| *due)
    }

    /// How many packets reached a host.
    pub fn delivered(&self) -> u64 {
        self.delivered
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
mod tests {
    use std::net::SocketAddr;

    use super::super::nat::{Flow, NatKind};
    use super::*;

    const SERVER: usize = 0;
    const ALICE: usize = 1;
    const BOB: usize = 2;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn internet(kinds: [NatKind; 2], link: Link) -> Internet {
        let home = |host: u8, kind: NatKind, link: Link| {
            let public = Ipv4Addr::new(203, 0, 113, host);
            let nat = Nat::new(kind, public.into(), u64::from(host));
            let lan_address = Ipv4Addr::new(192, 168, 1, 1);
            let router = (kind != NatKind::None).then_some(Router { lan_address, nat });
            Site { public, router, link }
        };
        let server = home(1, NatKind::None, Link::default());
        let [alice, bob] = kinds;
        let far = Link { udp: UdpPolicy::Allowed, ..link };
        Internet::new(vec![server, home(10, alice, link), home(20, bob, far)], 1)
    }

    /// An empty UDP packet without checksum.
    fn udp(src: &str, dst: &str, ttl: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, ttl, 17, 0, 0];
        packet.resize(28, 0);
        packet[25] = 8;
        let flow = Flow { protocol: Protocol::Udp, src: at(src), dst: at(dst) };
        packet::rewrite(&mut packet, flow).unwrap();
        packet
    }

    fn flow(packet: &[u8]) -> (String, String) {
        match packet::summarize(packet).unwrap().content {
            Content::Flow(flow) => (flow.src.to_string(), flow.dst.to_string()),
            Content::Error { quoted } => {
                (format!("about {}", quoted.src), format!("about {}", quoted.dst))
            }
        }
    }

    fn arrivals(internet: &mut Internet, now: Instant) -> Vec<(usize, (String, String))> {
        std::iter::from_fn(|| internet.poll_delivery(now))
            .map(|(site, packet)| (site, flow(&packet)))
            .collect()
    }

    fn pair(src: &str, dst: &str) -> (String, String) {
        (src.to_owned(), dst.to_owned())
    }

    #[test]
    fn two_hosts_of_the_same_private_address_punch_through_their_nats() {
        let mut internet = internet([NatKind::PortRestricted; 2], Link::default());
        let now = crate::testing::epoch();
        internet.handle_packet(ALICE, udp("192.168.1.2:5000", "203.0.113.20:6000", 64), now);
        assert_eq!(arrivals(&mut internet, now), [], "bob's NAT does not know alice");
        internet.handle_packet(BOB, udp("192.168.1.2:6000", "203.0.113.10:5000", 64), now);
        let expected = (ALICE, pair("203.0.113.20:6000", "192.168.1.2:5000"));
        assert_eq!(arrivals(&mut internet, now), [expected], "alice has opened hers");
        internet.handle_packet(ALICE, udp("192.168.1.2:5000", "203.0.113.20:6000", 64), now);
        let expected = (BOB, pair("203.0.113.10:5000", "192.168.1.2:6000"));
        assert_eq!(arrivals(&mut internet, now), [expected], "and now both are open");
        assert_eq!(internet.drops()[&InternetDrop::Nat(NatDrop::NoMapping)], 1);
    }

    #[test]
    fn a_host_without_nat_is_reached_and_seen_by_its_own_address() {
        let mut internet = internet([NatKind::None; 2], Link::default());
        let now = crate::testing::epoch();
        internet.handle_packet(ALICE, udp("203.0.113.10:5000", "203.0.113.20:6000", 64), now);
        let expected = (BOB, pair("203.0.113.10:5000", "203.0.113.20:6000"));
        assert_eq!(arrivals(&mut internet, now), [expected]);
    }

    #[test]
    fn each_link_delays_and_order_is_kept() {
        let delay = Duration::from_millis(20);
        let mut internet = internet([NatKind::None; 2], Link { delay, ..Link::default() });
        let now = crate::testing::epoch();
        for port in 1..=9 {
            let dst = format!("203.0.113.20:{port}");
            internet.handle_packet(ALICE, udp("203.0.113.10:5000", &dst, 64), now);
        }
        internet.handle_packet(ALICE, udp("203.0.113.10:5000", "203.0.113.1:1", 64), now);
        assert_eq!(internet.poll_timeout(), Some(now + delay), "the server has no delay");
        assert_eq!(arrivals(&mut internet, now + delay).len(), 1);
        assert_eq!(arrivals(&mut internet, now + delay * 2 - Duration::from_nanos(1)), []);
        let ports: Vec<String> =
            arrivals(&mut internet, now + delay * 2).into_iter().map(|it| it.1.1).collect();
        let expected: Vec<String> = (1..=9).map(|port| format!("203.0.113.20:{port}")).collect();
        assert_eq!(ports, expected);
    }

    #[test]
    fn a_packet_with_ttl_two_opens_its_nat_and_dies_before_the_other() {
        let mut internet = internet([NatKind::PortRestricted; 2], Link::default());
        let now = crate::testing::epoch();
        internet.handle_packet(ALICE, udp("192.168.1.2:5000", "203.0.113.20:6000", 2), now);
        let error = (ALICE, pair("about 192.168.1.2:5000", "about 203.0.113.20:6000"));
        assert_eq!(arrivals(&mut internet, now), [error], "the internet's router says so");
        internet.handle_packet(BOB, udp("192.168.1.2:6000", "203.0.113.10:5000", 64), now);
        assert_eq!(arrivals(&mut internet, now).len(), 1, "alice's NAT was opened");
    }

    #[test]
    fn blocked_udp_is_dropped_in_both_directions_and_only_there() {
        let link = Link { udp: UdpPolicy::Blocked, ..Link::default() };
        let mut internet = internet([NatKind::None; 2], link);
        let now = crate::testing::epoch();
        internet.handle_packet(ALICE, udp("203.0.113.10:1", "203.0.113.1:2", 64), now);
        internet.handle_packet(SERVER, udp("203.0.113.1:2", "203.0.113.10:1", 64), now);
        assert_eq!(arrivals(&mut internet, now), []);
        assert_eq!(internet.drops()[&InternetDrop::UdpBlocked], 2);
        internet.handle_packet(BOB, udp("203.0.113.20:1", "203.0.113.1:2", 64), now);
        assert_eq!(arrivals(&mut internet, now).len(), 1, "bob's line is another one");
    }

    #[test]
    fn loss_takes_its_part_of_the_packets() {
        let mut internet = internet([NatKind::None; 2], Link { loss: 0.25, ..Link::default() });
        let now = crate::testing::epoch();
        for _ in 0..1000 {
            internet.handle_packet(ALICE, udp("203.0.113.10:1", "203.0.113.1:2", 64), now);
        }
        let arrived = arrivals(&mut internet, now).len();
        assert!((700..800).contains(&arrived), "a quarter of 1000 is lost, {arrived} arrived");
    }

    #[test]
    fn the_home_router_answers_for_itself_and_nobody_else_does() {
        let mut internet = internet([NatKind::FullCone; 2], Link::default());
        let now = crate::testing::epoch();
        internet.handle_packet(ALICE, udp("192.168.1.2:5000", "192.168.1.1:5351", 64), now);
        let error = (ALICE, pair("about 192.168.1.2:5000", "about 192.168.1.1:5351"));
        assert_eq!(arrivals(&mut internet, now), [error], "no port mapping service there");
        internet.handle_packet(ALICE, udp("192.168.1.2:5000", "198.51.100.1:7", 64), now);
        let error = (ALICE, pair("about 192.168.1.2:5000", "about 198.51.100.1:7"));
        assert_eq!(arrivals(&mut internet, now), [error], "no such network");
        assert_eq!(internet.drops()[&InternetDrop::NoRoute], 1);
    }
}
