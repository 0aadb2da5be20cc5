//! Places of the lab that are more than one home with one router: providers that translate
//! addresses themselves, homes without IPv4, and machines with several networks.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::lab::{Host, Namespace, Net, Router, ip};
use crate::nat::Nat;

impl Net {
    /// A provider that gives its customers addresses of 100.64.0.0/24 and translates them (CGN);
    /// `hairpin` joins two customers by their outer addresses.
    pub(crate) fn provider(&self, name: &str, nat: Nat, hairpin: bool) -> Router {
        let number = self.next_number();
        let wan = Ipv4Addr::new(203, 0, 113, 20 + number);
        let ns = self.make_namespace(name);
        self.plug(&ns, "wan", wan, number);
        ns.ip("link add lan type bridge");
        ns.ip("addr add 100.64.0.1/24 dev lan");
        ns.ip("link set lan up");
        ns.sysctl("net/ipv4/ip_forward", "1");
        // Customers meet in the provider's network, and are let through to each other there.
        ns.nft(&if hairpin { nat.hairpin_rules(wan) } else { nat.rules(wan) });
        self.draw(format!(" +- [provider, {nat}, hairpin {hairpin}] {wan}, 100.64.0.0/24"));
        Router { ns, wan }
    }

    /// A machine at a customer of a provider: behind a home router of this kind, or with the
    /// provider's address itself.
    pub(crate) fn customer(&self, name: &str, nat: Nat, provider: &Router) -> Host {
        let number = self.next_number();
        let wan = Ipv4Addr::new(100, 64, 0, 20 + number);
        let port = format!("c{number}");
        let join = |ns: &Namespace, interface: &str| {
            let lan = &provider.ns;
            ip(&format!("link add {port} netns {lan} type veth peer name {interface} netns {ns}"));
            lan.ip(&format!("link set {port} master lan up"));
            ns.ip(&format!("addr add {wan}/24 dev {interface}"));
            ns.ip(&format!("link set {interface} up"));
            ns.ip("route add default via 100.64.0.1");
        };
        if nat == Nat::None {
            let ns = self.make_namespace(name);
            join(&ns, "eth0");
            self.draw(format!(" |    +- {name} {wan}"));
            return Host { name: name.to_owned(), ns, address: wan, router: None };
        }
        let ns = self.make_namespace(&format!("{name}-router"));
        join(&ns, "wan");
        self.draw(format!(" |    +- [{nat}] {wan}"));
        self.home(name, ns, wan, nat, number)
    }

    /// A home whose router translates with hairpin.
    pub(crate) fn hairpin_machine(&self, name: &str, nat: Nat) -> Host {
        let number = self.next_number();
        let wan = Ipv4Addr::new(203, 0, 113, 20 + number);
        let ns = self.make_namespace(&format!("{name}-router"));
        self.plug(&ns, "wan", wan, number);
        self.draw(format!(" +- [{nat}, hairpin] {wan}, home 192.168.1.0/24"));
        let host = self.home(name, ns.clone(), wan, Nat::None, number);
        ns.nft(&nat.hairpin_rules(wan));
        host
    }

    /// Takes IPv4 away from a machine at home and its router.
    pub(crate) fn remove_ipv4(&self, host: &Host) {
        host.ns.ip("-4 addr flush dev eth0");
        if let Some(router) = &host.router {
            router.ns.ip("-4 addr flush dev wan");
            router.ns.ip("-4 addr flush dev lan");
        }
    }

    /// One more interface of a public machine, in the same internet, with this address and without
    /// a default route.
    pub(crate) fn second_uplink(&self, host: &Host, interface: &str) -> Ipv4Addr {
        let number = self.next_number();
        let address = Ipv4Addr::new(203, 0, 113, 20 + number);
        self.plug_without_route(&host.ns, interface, address, number);
        // Two interfaces in one net: each answers for its own address only.
        for key in ["arp_ignore", "arp_announce"] {
            host.ns.sysctl(&format!("net/ipv4/conf/all/{key}"), "2");
        }
        self.draw(format!(" +- ({} also has {address})", host.name));
        address
    }

    /// Joins a machine at home to a second home's network by `interface`, without a default route.
    pub(crate) fn second_home(&self, host: &Host, other: &Router, interface: &str) -> Ipv4Addr {
        let address = Ipv4Addr::new(192, 168, 1, 210);
        let lan = &other.ns;
        ip(&format!("link add s210 netns {lan} type veth peer name {interface} netns {}", host.ns));
        lan.ip("link set s210 master lan up");
        host.ns.ip(&format!("addr add {address}/24 dev {interface}"));
        host.ns.ip(&format!("link set {interface} up"));
        address
    }
}

/// The addresses of a host that has IPv4 and IPv6, as a server listens on them.
pub(crate) fn server_endpoints(ipv4: Option<Ipv4Addr>, ipv6: Ipv6Addr, port: u16) -> Vec<String> {
    let mut endpoints: Vec<String> = ipv4.map(|ip| format!("{ip}:{port}")).into_iter().collect();
    endpoints.push(format!("[{ipv6}]:{port}"));
    endpoints
}
