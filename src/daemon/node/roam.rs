//! The network around this machine: read again when the kernel says that something about it has
//! changed, or when we wake up. The core is told what is new, a control connection that cannot lead
//! anywhere any more is made anew, and people are told of a local network that collides with the overlay.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::Daemon;
use super::interface::{Interface, widest_mtu};
use super::threads::Ports;
use crate::io::clock;
use crate::io::link::GIVEN_UP_AFTER;
use crate::io::os::{
    Changes, Conflict, InterfaceAddress, Netlink, NetlinkError, Overlap, Route, Underlay, conflicts,
};
use crate::io::udp::source_towards;
use crate::io::wake::{WakeWatch, Woke};

/// Changes come in groups: a moment after the first one all of it is read.
const SETTLE: Duration = Duration::from_millis(5);
/// The shortest time between two looks,
const SPACING: Duration = Duration::from_millis(20);
/// as long as these are not used up: in a storm of changes, one look comes back with each
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// up to so many at once.
const LOOKS: u32 = 8;
/// A look that has failed is repeated after this.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A sign of life that was asked for on the control connection comes within this, or within
/// several round trips: the segment that asks may be lost and sent again.
const PROOF_LIMIT: Duration = Duration::from_millis(1_500);

/// What is known of the network around us, and what is watched.
pub(super) struct Surroundings {
    changes: Option<Changes>,
    wake: Option<WakeWatch>,
    underlay: Option<Underlay>,
    /// How long a packet of each link may be, by index, in bytes.
    link_mtus: BTreeMap<u32, u32>,
    /// The local networks that collide with the overlay's range, in sentences.
    collisions: Vec<String>,
    pub(super) rescan_at: Option<Instant>,
    looked_at: Option<Instant>,
    /// As if this time had been without changes: what is older than the looks that are left.
    quiet_since: Option<Instant>,
    /// The last look has failed.
    is_blind: bool,
    /// When the server was asked for a sign of life, and until when it is waited for.
    asked: Option<(Instant, Instant)>,
}

/// What the surroundings did.
pub(super) enum Surprise {
    /// Something about links, addresses or routes.
    Changed,
    /// We were away.
    Woke(Woke),
}

impl Surroundings {
    /// Starts watching.
    pub(super) fn watch() -> Self {
        let changes = Netlink::changes()
            .inspect_err(|error| tracing::warn!(%error, "changes of the network are not noticed"));
        let wake = WakeWatch::start()
            .inspect_err(|error| tracing::warn!(%error, "waking from sleep is not noticed"));
        Self {
            changes: changes.ok(),
            wake: wake.ok(),
            underlay: None,
            link_mtus: BTreeMap::new(),
            collisions: Vec::new(),
            rescan_at: None,
            looked_at: None,
            quiet_since: None,
            is_blind: false,
            asked: None,
        }
    }

    /// The next surprise. Cancel-safe.
    pub(super) async fn next(&mut self) -> Surprise {
        let (changes, wake) = (self.changes.as_mut(), self.wake.as_mut());
        let changed = async {
            match changes {
                Some(changes) => changes.changed().await,
                None => std::future::pending().await,
            }
        };
        let woke = async {
            match wake {
                Some(wake) => wake.woke().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            woke = woke => Surprise::Woke(woke),
            _ = changed => Surprise::Changed,
        }
    }

    /// Plans a look; one that is planned already takes in this change, too.
    fn plan_look(&mut self, now: Instant) {
        let spaced = self.looked_at.map_or(now, |at| at + SPACING);
        let earned = self.quiet_since.map_or(now, |since| since + LOOK_EVERY);
        self.rescan_at.get_or_insert(earned.max(spaced).max(now + SETTLE));
    }

    /// Takes what collides now. Returns what did not before, to be told once.
    fn note_collisions(&mut self, found: Vec<String>) -> Vec<String> {
        let before = std::mem::replace(&mut self.collisions, found);
        self.collisions.iter().filter(|it| !before.contains(it)).cloned().collect()
    }

    /// The default route in use of each family, as the last look has found them.
    pub(super) fn ways_out(&self) -> Vec<Route> {
        self.underlay.as_ref().map(|underlay| underlay.gateways.clone()).unwrap_or_default()
    }

    /// What the user should do something about.
    pub(super) fn warnings(&self) -> Vec<String> {
        self.collisions.clone()
    }

    /// Keeps the lengths of packets that the links take; whether one has another than before.
    fn note_link_mtus(&mut self, now: BTreeMap<u32, u32>) -> bool {
        let before = std::mem::replace(&mut self.link_mtus, now);
        let other = |(index, mtu)| before.get(index).is_some_and(|before| before != mtu);
        self.link_mtus.iter().any(other)
    }

    /// A look has failed: what it should have seen is still unknown.
    fn note_failed_look(&mut self, error: &NetlinkError, now: Instant) {
        if !std::mem::replace(&mut self.is_blind, true) {
            tracing::warn!(%error, "the local addresses could not be read, trying again");
        }
        self.rescan_at.get_or_insert(now + LOOK_AGAIN);
    }

    /// A look costs one of those that are left.
    fn note_look(&mut self, now: Instant) {
        let full = now.checked_sub(LOOK_EVERY * LOOKS);
        self.quiet_since = self.quiet_since.max(full).map(|since| since + LOOK_EVERY);
        self.looked_at = Some(now);
    }

    /// When a sign of life of the server is overdue.
    pub(super) fn proof_due(&self) -> Option<Instant> {
        self.asked.map(|(_, until)| until)
    }
}

impl Daemon {
    pub(super) fn handle_surprise(&mut self, surprise: Surprise, now: Instant) {
        match surprise {
            Surprise::Changed => self.surroundings.plan_look(now),
            Surprise::Woke(Woke { away, suspended }) => {
                tracing::info!(away_s = away.as_secs(), suspended, "awake again");
                self.surroundings.rescan_at = Some(now);
                // After a long sleep nobody is at the other end, and TCP does not know that yet.
                let given_up = suspended && away >= GIVEN_UP_AFTER;
                if self.server.is_none() || given_up {
                    self.control_link.try_now();
                }
                if self.server.is_some() && given_up {
                    self.handle_link_down();
                }
                // It may have said something that was not read yet.
                self.heard_server = now;
                if suspended {
                    self.handle_portmap_sleep(now);
                    self.node.handle_sleep(away, now);
                }
                self.node.handle_wake(suspended, now);
            }
        }
    }

    /// The core asks the server for a sign of life.
    pub(super) fn note_asked(&mut self, now: Instant) {
        let round_trips = self.node.relay_rtt().unwrap_or_default() * 4;
        self.surroundings
            .asked
            .get_or_insert((now, now + PROOF_LIMIT.max(PROOF_LIMIT / 2 + round_trips)));
    }

    /// Makes another control connection when the one there is owes a sign of life.
    pub(super) fn check_proof(&mut self, now: Instant) {
        let Some((asked_at, until)) = self.surroundings.asked else { return };
        if self.heard_server > asked_at || self.server.is_none() {
            self.surroundings.asked = None;
        } else if until <= now {
            self.surroundings.asked = None;
            tracing::info!("the server does not answer on the control connection");
            self.control_link.try_now();
            self.handle_link_down();
        }
    }

    /// Tells the core at which addresses our sockets can be reached, and by which way packets
    /// leave.
    pub(super) async fn scan_interfaces(&mut self) {
        self.surroundings.note_look(clock::now());
        let seen = look(self.interface.as_ref(), &self.options.interface).await;
        let Seen { underlay, collisions, widest, link_mtus } = match seen {
            Ok(seen) => seen,
            Err(error) => {
                self.surroundings.note_failed_look(&error, clock::now());
                return;
            }
        };
        self.surroundings.is_blind = false;
        for collision in self.surroundings.note_collisions(collisions) {
            tracing::warn!("{collision}");
        }
        self.take_widest(widest).await;
        let now = clock::now();
        if self.surroundings.note_link_mtus(link_mtus) {
            tracing::info!("a link takes packets of another length now");
            self.node.handle_link_mtu(now);
        }
        let before = self.surroundings.underlay.replace(underlay.clone());
        let same = before.as_ref().is_some_and(|before| before.leads_out_like(&underlay));
        if !same {
            self.handle_ways_out(&underlay.gateways, now);
        }
        let rerouted = before.as_ref().is_some_and(|before| before.gateways != underlay.gateways);
        self.take_uplinks(&underlay);
        self.check_link(&underlay, rerouted);
        if before.is_some() && !same && self.server.is_none() {
            // The attempt under way may be one into a network that is gone.
            self.control_link.try_now();
        }
        let ports = &self.ports;
        let endpoints: Vec<SocketAddr> =
            underlay.addresses.iter().filter_map(|address| endpoint(ports, *address)).collect();
        let known = self.node.host_endpoints().to_vec();
        self.node.handle_host_endpoints(endpoints, now);
        let told = known.iter().any(|endpoint| !self.node.host_endpoints().contains(endpoint));
        if rerouted && !told {
            tracing::info!("the default route has changed");
            self.node.handle_network_change(now);
        }
    }

    /// A connection from an address that is gone, or that packets to the server do not leave from
    /// any more, cannot answer, and TCP would take its time to say so.
    fn check_link(&mut self, underlay: &Underlay, rerouted: bool) {
        let (Some(server), Some(local)) = (self.server, self.link_local) else { return };
        if local.is_loopback() {
            return;
        }
        let gone = !underlay.present.contains(&local);
        let lost = self.link_device.as_ref().map(|by| {
            // Bound to its interface, it goes on for as long as that is an uplink that we may use.
            !self.node.has_uplink(by, server.is_ipv6())
        });
        let elsewhere = || {
            lost.unwrap_or(rerouted) && source_towards(server).is_ok_and(|source| source != local)
        };
        if gone || elsewhere() {
            let why = if gone { "its address is gone" } else { "packets leave another way" };
            tracing::info!(why, "the control connection is made anew");
            self.control_link.try_now();
            self.handle_link_down();
        }
    }
}

/// What a look has found.
struct Seen {
    underlay: Underlay,
    collisions: Vec<String>,
    /// MTU of an interface that uses what the widest link has, in bytes.
    widest: u16,
    /// Of each link that packets may leave by, by index, in bytes.
    link_mtus: BTreeMap<u32, u32>,
}

/// `name` is the overlay's interface, whether or not it is there.
async fn look(interface: Option<&Interface>, name: &str) -> Result<Seen, NetlinkError> {
    let netlink = Netlink::connect()?;
    let (links, addresses) = (netlink.links().await?, netlink.addresses().await?);
    let (routes, own) = (netlink.routes().await?, interface.map(Interface::index));
    let collide = |it: &Interface| {
        let ranges = it.identity().range.prefixes();
        collisions(&conflicts(&routes, &working(&addresses), &ranges, own))
    };
    Ok(Seen {
        collisions: interface.map(collide).unwrap_or_default(),
        underlay: Underlay::of(&links, &addresses, &routes, own),
        widest: widest_mtu(&links, name),
        link_mtus: (links.iter().filter(|link| !link.loopback && link.name != name))
            .map(|link| (link.index, link.mtu_bytes))
            .collect(),
    })
}

/// What is switched off has no routes.
fn working(addresses: &[InterfaceAddress]) -> Vec<InterfaceAddress> {
    addresses.iter().filter(|address| address.up).cloned().collect()
}

/// What each collision costs, and what to do about it, the worst first.
fn collisions(found: &[Conflict]) -> Vec<String> {
    let tell = |conflict: &Conflict| match conflict.overlap {
        Overlap::Inside => format!(
            "{conflict}: what is sent to overlay addresses in there leaves by that network, in the \
             open, and reaches no peer; leave that network, or remove its route or address"
        ),
        Overlap::Around => format!(
            "{conflict}: machines of that network whose addresses are in the range cannot be reached \
             from here; nothing else is affected"
        ),
    };
    found.iter().map(tell).collect()
}

/// The endpoint of our socket at an address of ours.
fn endpoint(ports: &Ports, ip: IpAddr) -> Option<SocketAddr> {
    let socket = if ip.is_ipv4() { &ports.udp_v4 } else { &ports.udp_v6 };
    let bound = socket.as_ref()?.local_addr().ok()?;
    Some(SocketAddr::new(ip, bound.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unwatched() -> Surroundings {
        Surroundings {
            changes: None,
            wake: None,
            underlay: None,
            link_mtus: BTreeMap::new(),
            collisions: Vec::new(),
            rescan_at: None,
            looked_at: None,
            quiet_since: None,
            is_blind: false,
            asked: None,
        }
    }

    #[test]
    fn only_another_length_of_a_link_that_was_there_is_news() {
        let mut surroundings = unwatched();
        let mut note =
            |links: &[(u32, u32)]| surroundings.note_link_mtus(links.iter().copied().collect());
        assert!(!note(&[(2, 1_500)]), "at the start");
        assert!(!note(&[(2, 1_500), (3, 9_000)]), "another link is another way out, or none");
        assert!(note(&[(2, 1_280), (3, 9_000)]));
        assert!(!note(&[(2, 1_280)]) && note(&[(2, 1_500)]));
    }

    #[test]
    fn a_look_that_failed_is_repeated_whether_or_not_there_is_other_news() {
        let now = crate::testing::epoch();
        let mut surroundings = unwatched();
        let error = NetlinkError::Connect(std::io::ErrorKind::OutOfMemory.into());
        surroundings.note_failed_look(&error, now);
        assert_eq!(surroundings.rescan_at, Some(now + LOOK_AGAIN));
        surroundings.rescan_at = None;
        surroundings.plan_look(now);
        surroundings.note_failed_look(&error, now);
        assert_eq!(surroundings.rescan_at, Some(now + SETTLE), "what comes sooner stays");
    }

    #[test]
    fn a_network_that_collides_is_told_once_and_forgotten_when_it_is_gone() {
        let address = |index: u32, name: &str, addr: &str, up| InterfaceAddress {
            index,
            name: name.to_owned(),
            up,
            loopback: false,
            addr: addr.parse().unwrap(),
            deprecated: false,
            tentative: false,
            temporary: false,
        };
        let range = ["10.83.16.0/20".parse().unwrap()];
        let look = |addresses: &[InterfaceAddress], routes: &[Route]| {
            collisions(&conflicts(routes, &working(addresses), &range, Some(7)))
        };
        let mut surroundings = unwatched();
        let own = address(7, "overlay0", "10.83.16.1/32", true);
        assert!(surroundings.note_collisions(look(std::slice::from_ref(&own), &[])).is_empty());
        let off = address(2, "wlan0", "10.83.17.5/24", false);
        assert!(surroundings.note_collisions(look(&[own.clone(), off], &[])).is_empty());
        let wifi = address(2, "wlan0", "10.83.17.5/24", true);
        let told = surroundings.note_collisions(look(&[own.clone(), wifi.clone()], &[]));
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains("10.83.17.5/24 on wlan0") && told[0].contains("in the open"));
        assert_eq!(surroundings.warnings(), told);
        let wide = [Route::direct("10.0.0.0/8".parse().unwrap(), 3)];
        let more = surroundings.note_collisions(look(&[own.clone(), wifi], &wide));
        assert_eq!(more.len(), 1, "only what is new: {more:?}");
        assert!(more[0].contains("10.0.0.0/8") && more[0].contains("cannot be reached"));
        assert_eq!(surroundings.warnings(), [told, more].concat(), "the worst first");
        assert!(surroundings.note_collisions(look(&[own], &[])).is_empty());
        assert!(surroundings.warnings().is_empty());
    }

    #[test]
    fn a_storm_of_changes_is_looked_at_ever_more_rarely() {
        let start = crate::testing::epoch();
        let mut surroundings = unwatched();
        let mut looks = Vec::new();
        for ms in 0..20_000 {
            let now = start + Duration::from_millis(ms);
            surroundings.plan_look(now);
            if surroundings.rescan_at.is_some_and(|at| at <= now) {
                surroundings.rescan_at = None;
                surroundings.note_look(now);
                looks.push(ms);
            }
        }
        assert_eq!(looks[0], 5, "the first change is looked at at once");
        assert!(looks[5] < 150, "and some more: {looks:?}");
        assert!(looks.len() < 20 + 10, "{looks:?}");
        let later = start + Duration::from_secs(40);
        surroundings.rescan_at = None;
        surroundings.plan_look(later);
        assert_eq!(surroundings.rescan_at, Some(later + SETTLE), "and so is one after a pause");
    }
}
