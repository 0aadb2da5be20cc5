//! NAT recipes for the kernel's nftables: the four classical kinds, a router with an open input,
//! hairpin, a reboot, and a firewall without UDP.
//!
//! Every recipe but one drops unasked-for UDP to the router itself. A router that accepts it makes
//! connection tracking remember the stranger's packet, and then moves the inside host to another
//! port. All routers stand two hops into the internet, so what lives for two hops ends before them.

use std::fmt;
use std::net::Ipv4Addr;

/// What stands between a host and the internet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nat {
    /// Nothing: the host has a public address.
    None,
    FullCone,
    AddressRestricted,
    /// What Linux does by itself: keeps the port, and admits answers only.
    PortRestricted,
    /// A random port for every destination.
    Symmetric,
    /// The next port for every destination.
    Sequential,
    /// The one before.
    Decrementing,
    /// The next but one.
    ByTwo,
    /// Port-restricted, and the router takes what is sent to itself.
    OpenInput,
}

impl Nat {
    pub(crate) const ALL: [Self; 5] = [
        Self::None,
        Self::FullCone,
        Self::AddressRestricted,
        Self::PortRestricted,
        Self::Symmetric,
    ];

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::FullCone => "full-cone",
            Self::AddressRestricted => "address-restricted",
            Self::PortRestricted => "port-restricted",
            Self::Symmetric => "symmetric",
            Self::Sequential => "sequential",
            Self::Decrementing => "decrementing",
            Self::ByTwo => "by-two",
            Self::OpenInput => "open-input",
        }
    }

    /// Whether plain punching, with answers to the observed source, joins the two kinds.
    pub(crate) fn can_be_punched(self, other: Self) -> bool {
        let hard = |a, b| {
            use Nat::{ByTwo, Decrementing, OpenInput, PortRestricted, Sequential, Symmetric};
            // What a sequential one does next can be guessed, and nothing of the other's.
            let counts = matches!(b, Sequential | Decrementing | ByTwo);
            a == Symmetric && (counts || matches!(b, Symmetric | PortRestricted | OpenInput))
        };
        !hard(self, other) && !hard(other, self)
    }

    /// The words of `overlay why` that fit a settled pair with this kind of path.
    pub(crate) fn verdict(self, other: Self, path: &str) -> &'static str {
        use Nat::{ByTwo, Decrementing, None, OpenInput, PortRestricted, Sequential, Symmetric};
        let hard = |nat| matches!(nat, Symmetric | Sequential | Decrementing | ByTwo);
        let strict = |nat| matches!(nat, PortRestricted | OpenInput);
        let guess = hard(self) && (hard(other) || strict(other)) || strict(self) && hard(other);
        match (path, guess) {
            ("direct", _) if self == None || other == None => "direct-public",
            ("direct", true) => "direct-predicted",
            ("direct", false) => "direct-punched",
            _ if hard(self) && hard(other) => "symmetric-both",
            _ if guess => "symmetric-port-restricted",
            _ => panic!("{self} with {other} is never {path}"),
        }
    }

    /// The rules of a router with interfaces `wan` and `lan`.
    pub(crate) fn rules(self, wan: Ipv4Addr) -> String {
        let kind = match self {
            Self::None => String::new(),
            Self::FullCone => full_cone(wan),
            Self::AddressRestricted => format!("{}{ADDRESS_FILTER}", full_cone(wan)),
            Self::PortRestricted => masquerade(""),
            Self::Symmetric => masquerade("fully-random"),
            Self::Sequential => counting(wan, 40_000, 1),
            Self::Decrementing => counting(wan, 60_000, -1),
            Self::ByTwo => counting(wan, 40_000, 2),
            Self::OpenInput => masquerade(""),
        };
        let input = if self == Self::OpenInput { "" } else { ROUTER_INPUT };
        format!("{HOPS}{input}{kind}")
    }
}

impl Nat {
    /// The rules of a router that also joins two inside hosts by their outer endpoints.
    ///
    /// # Panics
    /// For a kind that keeps no map of its own, which the kernel gives no hairpin.
    pub(crate) fn hairpin_rules(self, wan: Ipv4Addr) -> String {
        assert_eq!(self, Self::FullCone, "hairpin needs the map of a full cone");
        let cone = full_cone(wan);
        let anywhere = cone.replace(
            "iifname \"wan\" meta l4proto udp dnat",
            &format!("ip daddr {wan} meta l4proto udp dnat"),
        );
        let both = anywhere.replace(
            "priority srcnat;\n",
            &format!("priority srcnat;\n  oifname \"lan\" ct status dnat snat to {wan}\n"),
        );
        assert!(both.len() > cone.len() + 40, "both rules were found");
        format!("{HOPS}{ROUTER_INPUT}{both}")
    }

    /// Port-restricted as before, with the thousand ports from `first`: the same inside endpoint
    /// gets the same port to everywhere, and not its own. Replaces what is there.
    pub(crate) fn rules_with_ports(first: u16) -> String {
        let last = first + 999;
        format!(
            r#"
flush table ip nat
table ip nat {{
 chain post {{ type nat hook postrouting priority srcnat;
  oifname "wan" meta l4proto {{ tcp, udp }} masquerade to :{first}-{last}
  oifname "wan" masquerade
 }}
}}
"#
        )
    }
}

impl fmt::Display for Nat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Before connection tracking sees it.
const HOPS: &str = r#"
table ip hops {
 chain pre { type filter hook prerouting priority -350; policy accept;
  iifname "wan" ip ttl < 3 drop
 }
}
"#;

const ROUTER_INPUT: &str = r#"
table inet fw {
 chain input { type filter hook input priority 0; policy accept;
  iifname "wan" ct state established,related accept
  iifname "wan" meta l4proto udp drop
 }
}
"#;

fn masquerade(flags: &str) -> String {
    format!(
        r#"
table ip nat {{
 chain pre {{ type nat hook prerouting priority dstnat;
 }}
 chain post {{ type nat hook postrouting priority srcnat;
  oifname "wan" masquerade {flags}
 }}
}}
"#
    )
}

/// Every flow gets the next port, `step` from the last one. The map is written out: an offset to `numgen` counts in steps of
/// 256.
fn counting(wan: Ipv4Addr, first: i32, step: i32) -> String {
    let ports: Vec<String> =
        (0..2048).map(|number| format!("{number} : {}", first + number * step)).collect();
    let ports = ports.join(", ");
    format!(
        r#"
table ip nat {{
 chain pre {{ type nat hook prerouting priority dstnat;
 }}
 chain post {{ type nat hook postrouting priority srcnat;
  oifname "wan" meta l4proto udp snat to {wan}:numgen inc mod 2048 map {{ {ports} }}
  oifname "wan" masquerade
 }}
}}
"#
    )
}

/// The mapping is written down by hand, and whoever sends to the outer port is let through.
fn full_cone(wan: Ipv4Addr) -> String {
    format!(
        r#"
table ip nat {{
 map eim {{ type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 120s; size 65535; }}
 chain pre {{ type nat hook prerouting priority dstnat;
  iifname "wan" meta l4proto udp dnat to udp dport map @eim
 }}
 chain post {{ type nat hook postrouting priority srcnat;
  oifname "wan" meta l4proto udp update @eim {{ udp sport timeout 120s : ip saddr . udp sport }}
  oifname "wan" snat to {wan}
 }}
}}
"#
    )
}

/// Added to a full cone: only addresses that the inside host has sent to may send in.
const ADDRESS_FILTER: &str = r#"
table ip flt {
 set seen { type ipv4_addr . inet_service . ipv4_addr; flags dynamic,timeout; timeout 120s; size 65535; }
 chain forward { type filter hook forward priority 0; policy accept;
  oifname "wan" meta l4proto udp update @seen { ip saddr . udp sport . ip daddr timeout 120s }
  ct state established,related accept
  iifname "wan" meta l4proto udp ip daddr . udp dport . ip saddr @seen accept
  iifname "wan" meta l4proto udp drop
 }
}
"#;

/// Added to any router: no UDP passes, names excepted.
pub(crate) const UDP_BLOCKED: &str = "
table inet noudp {
 chain forward { type filter hook forward priority -5; policy accept;
  meta l4proto udp udp dport != 53 drop
 }
}
";

/// Added to a router with IPv6: answers pass, calls from outside do not.
pub(crate) const IPV6_FIREWALL: &str = r#"
table ip6 fw6 {
 chain forward { type filter hook forward priority 0; policy accept;
  iifname "wan" ct state established,related accept
  iifname "wan" drop
 }
}
"#;
