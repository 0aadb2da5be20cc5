//! Where this machine is, and what of that stands in a join line.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;
use tracing::warn;

use super::sockets::Bound;
use crate::types::{OverlayRange, is_global_v4};
use crate::wire::join::{MAX_ADDRESSES, ServerAddr};

/// A machine gets and loses addresses rarely; asking for them costs some system calls.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
const NO_ADDRESS: &str = "this machine has no address that a join line could name; say how nodes \
                          reach it: --public-addr HOST, or for the service public-addr = \
                          [\"HOST\"] in server.toml and a reload; or when its network is up: \
                          overlay server invite";
const ONLY_LOOPBACK: &str =
    "only this machine itself can reach the server: it listens on loopback alone";
const ONLY_PRIVATE: &str = "join lines name only private addresses, which nodes in other networks \
                            cannot reach; name a better one: --public-addr HOST, or for the \
                            service public-addr = [\"HOST\"] in server.toml and a reload; then a \
                            new line: overlay server invite";

/// How the server is found: what it was told, or where it listens.
#[derive(Debug)]
pub(super) struct Advertised {
    told: Vec<ServerAddr>,
    /// Bound to one address each.
    fixed: Vec<SocketAddr>,
    /// The ports of the sockets on all addresses, the usual one first.
    wildcard_ports: Vec<u16>,
    /// All TCP ports.
    ports: Vec<u16>,
    /// Port of the first listener, and another one that every address has too.
    main_port: u16,
    extra_port: Option<u16>,
    /// The server's own overlay: no way to it leads through itself.
    overlay: OverlayRange,
    /// What was seen last, and when it was looked for.
    seen: Vec<ServerAddr>,
    looked: Option<Instant>,
}

impl Advertised {
    pub(super) fn new(told: &[ServerAddr], bound: &Bound, overlay: OverlayRange) -> Self {
        let (wildcard, fixed): (Vec<SocketAddr>, Vec<SocketAddr>) = bound
            .tcp
            .iter()
            .map(|listener| listener.address)
            .partition(|address| address.ip().is_unspecified());
        let wildcard_ports: Vec<u16> = wildcard.iter().map(SocketAddr::port).collect();
        Self {
            told: told.to_vec(),
            fixed,
            ports: bound.tcp.iter().map(|listener| listener.address.port()).collect(),
            main_port: bound.tcp.first().map_or(0, |listener| listener.address.port()),
            extra_port: wildcard_ports.get(1).copied(),
            wildcard_ports,
            overlay,
            seen: Vec::new(),
            looked: None,
        }
    }

    /// Is told other addresses.
    pub(super) fn tell(&mut self, told: Vec<ServerAddr>) {
        self.told = told;
        self.look_again();
    }

    /// Has the next [`Self::news`] look, however soon that is.
    pub(super) fn look_again(&mut self) {
        self.looked = None;
    }

    /// The addresses if they are others than the last time; looked for now and then only, so that it
    /// may be asked at any occasion.
    pub(super) fn news(&mut self, now: Instant) -> Option<Vec<ServerAddr>> {
        if self.looked.is_some_and(|at| now < at + LOOK_INTERVAL) {
            return None;
        }
        self.looked = Some(now);
        let seen = self.look();
        if seen == self.seen {
            return None;
        }
        self.seen.clone_from(&seen);
        Some(seen)
    }

    /// What is wrong with the addresses that a join line names just now, and what to do about it.
    pub(super) fn trouble(&self) -> Option<&'static str> {
        let addresses = self.look();
        let all = |is: fn(IpAddr) -> bool| {
            addresses.iter().all(|address| address.literal().is_some_and(|at| is(at.ip())))
        };
        if addresses.is_empty() {
            Some(NO_ADDRESS)
        } else if all(|ip| ip.is_loopback()) {
            Some(ONLY_LOOPBACK)
        } else if all(|ip| !is_global(ip)) {
            Some(ONLY_PRIVATE)
        } else {
            None
        }
    }

    /// Tells the administrator what will not work.
    pub(super) fn warn(&self) {
        if let Some(trouble) = self.trouble() {
            warn!("{trouble}");
        }
        let ports = &self.ports;
        for address in self.told.iter().filter(|address| !ports.contains(&address.port)) {
            warn!(
                %address,
                "the public address has a port on which the server does not listen; it works only \
                 if a router forwards it"
            );
        }
    }

    /// The addresses for a join line as they are just now, best first.
    fn look(&self) -> Vec<ServerAddr> {
        let mut addresses = self.told.clone();
        if addresses.is_empty() {
            let mut all: Vec<SocketAddr> = self.fixed.clone();
            if let Some(port) = self.wildcard_ports.first() {
                let interfaces = interface_addresses().into_iter().map(|net| net.addr());
                let outside = interfaces.filter(|ip| !self.overlay.contains(*ip));
                all.extend(outside.map(|ip| SocketAddr::new(ip, *port)));
            }
            all.sort_by_key(|address| rank(address.ip()));
            if all.iter().any(|address| is_global(address.ip())) {
                all.retain(|address| is_global(address.ip()));
            }
            addresses = all.into_iter().map(ServerAddr::from).collect();
        }
        if let Some(port) = self.extra_port {
            let main = addresses.clone().into_iter().filter(|addr| addr.port == self.main_port);
            addresses.extend(main.map(|addr| ServerAddr { port, ..addr }));
        }
        addresses.dedup();
        addresses.truncate(MAX_ADDRESSES);
        addresses
    }
}

/// Global before private, IPv4 before IPv6, as most networks can use them.
fn rank(ip: IpAddr) -> (bool, bool) {
    (!is_global(ip), ip.is_ipv6())
}

fn is_global(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_global_v4(ip),
        // Global unicast is 2000::/3 (RFC 4291 section 2.4 and the IANA registry).
        IpAddr::V6(ip) => (ip.segments()[0] & 0xe000) == 0x2000,
    }
}

/// The networks that this machine is in; a new overlay must not meet them.
pub(super) fn local_prefixes() -> Vec<IpNet> {
    interface_addresses().into_iter().map(|net| net.trunc()).collect()
}

/// The addresses of all interfaces that are up, without loopback and link-local ones.
fn interface_addresses() -> Vec<IpNet> {
    let interfaces = match getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            warn!(%error, "cannot list the interfaces of this machine");
            return Vec::new();
        }
    };
    let mut addresses: Vec<IpNet> = interfaces
        .filter(|interface| {
            interface.flags.contains(InterfaceFlags::IFF_UP)
                && !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK)
        })
        .filter_map(|interface| net_of(&interface.address?, &interface.netmask?))
        .filter(|net| match net.addr() {
            IpAddr::V4(ip) => !ip.is_link_local(),
            IpAddr::V6(ip) => (ip.segments()[0] & 0xffc0) != 0xfe80,
        })
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn net_of(address: &SockaddrStorage, mask: &SockaddrStorage) -> Option<IpNet> {
    if let (Some(address), Some(mask)) = (address.as_sockaddr_in(), mask.as_sockaddr_in()) {
        return Ipv4Net::with_netmask(address.ip(), mask.ip()).ok().map(IpNet::V4);
    }
    let (address, mask) = (address.as_sockaddr_in6()?, mask.as_sockaddr_in6()?);
    Ipv6Net::with_netmask(address.ip(), mask.ip()).ok().map(IpNet::V6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    fn advertised(told: &[&str], fixed: &[&str]) -> Advertised {
        Advertised {
            told: told.iter().map(|text| text.parse().unwrap()).collect(),
            fixed: fixed.iter().map(|text| text.parse().unwrap()).collect(),
            wildcard_ports: Vec::new(),
            ports: vec![41820],
            main_port: 41820,
            extra_port: None,
            overlay: OverlayRange::new(
                "10.77.0.0/20".parse().unwrap(),
                "fd12:3456:789a::/48".parse().unwrap(),
            )
            .unwrap(),
            seen: Vec::new(),
            looked: None,
        }
    }

    fn texts(addresses: &[ServerAddr]) -> Vec<String> {
        addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_it_was_told_goes_before_what_it_sees() {
        let mut told = advertised(&["vpn.example.org"], &["192.0.2.1:41820"]);
        assert_eq!(texts(&told.look()), ["vpn.example.org:41820"]);
        told.extra_port = Some(443);
        assert_eq!(texts(&told.look()), ["vpn.example.org:41820", "vpn.example.org:443"]);
    }

    #[test]
    fn private_addresses_are_named_only_where_there_is_no_better() {
        let fixed = ["10.0.0.1:41820", "[2001:db8::1]:41820", "203.0.113.1:41820"];
        let both = advertised(&[], &fixed);
        assert_eq!(texts(&both.look()), ["203.0.113.1:41820", "[2001:db8::1]:41820"]);
        let private = advertised(&[], &fixed[..1]);
        assert_eq!(texts(&private.look()), ["10.0.0.1:41820"]);
    }

    #[test]
    fn other_addresses_are_noticed_within_the_interval() {
        let mut own = advertised(&[], &["203.0.113.1:41820"]);
        let start = epoch();
        let at = |s| start + Duration::from_secs(s);
        assert_eq!(texts(&own.news(start).unwrap()), ["203.0.113.1:41820"]);
        own.fixed = vec!["203.0.113.2:41820".parse().unwrap()];
        assert_eq!(own.news(at(9)), None, "not yet looked for");
        assert_eq!(texts(&own.news(at(10)).unwrap()), ["203.0.113.2:41820"]);
        assert_eq!(own.news(at(60)), None, "nothing new");
        own.tell(vec!["vpn.example.org".parse().unwrap()]);
        assert_eq!(texts(&own.news(at(61)).unwrap()), ["vpn.example.org:41820"], "at once");
    }

    #[test]
    fn who_can_be_reached_from_nowhere_else_is_told_the_flag_and_the_key() {
        for (told, fixed, trouble) in [
            (&[][..], &["203.0.113.1:41820"][..], None),
            (&["vpn.example.org"], &["10.0.0.1:41820"], None),
            (&["192.168.1.2", "203.0.113.1"], &[], None),
            (&[], &["10.0.0.1:41820", "[fd00::1]:41820"], Some(ONLY_PRIVATE)),
            (&["192.168.1.2"], &["10.0.0.1:41820"], Some(ONLY_PRIVATE)),
            (&[], &["127.0.0.1:41820"], Some(ONLY_LOOPBACK)),
            (&[], &[], Some(NO_ADDRESS)),
        ] {
            assert_eq!(advertised(told, fixed).trouble(), trouble, "{told:?} {fixed:?}");
        }
        for trouble in [ONLY_PRIVATE, NO_ADDRESS] {
            assert!(trouble.contains("--public-addr HOST"), "{trouble}");
            assert!(trouble.contains("public-addr = [\"HOST\"] in server.toml"), "{trouble}");
        }
    }
}
