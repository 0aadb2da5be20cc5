//! How far an address means the same machine. Each question that is asked of an address has a function
//! of its own here, as the answers differ for what lies between a provider and its customers.

use std::net::{IpAddr, Ipv4Addr};

/// Of a private network: RFC 1918, RFC 4193. Between two such addresses is no provider's router.
#[must_use]
pub fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

/// Of one cable: RFC 3927, RFC 4291.
#[must_use]
pub fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// Of one site, a network or a cable: what goes there leaves by no NAT towards a provider.
#[must_use]
pub fn is_of_one_site(ip: IpAddr) -> bool {
    is_private(ip) || is_link_local(ip)
}

/// Of the addresses that a provider and its customers share, 100.64.0.0/10 (RFC 6598).
fn is_shared(ip: Ipv4Addr) -> bool {
    let [a, b, ..] = ip.octets();
    a == 100 && b & 0xc0 == 64
}

/// Of a private network or one of a provider with its customers: routed, but not in the internet.
#[must_use]
pub fn is_inside(ip: IpAddr) -> bool {
    is_private(ip) || matches!(ip, IpAddr::V4(ip) if is_shared(ip))
}

/// Not of the internet in any way. For what is said of a path: an opener goes to a provider's own like
/// into the internet, as NATs are on the way.
#[must_use]
pub fn is_internal(ip: IpAddr) -> bool {
    is_inside(ip) || is_link_local(ip)
}

/// Whether the internet may know this address: no private, shared, link-local or loopback one.
#[must_use]
pub fn is_global_v4(ip: Ipv4Addr) -> bool {
    !(is_internal(ip.into()) || ip.is_loopback() || ip.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_address_reaches_as_far_as_its_rfc_says() {
        // Private, link-local, of one site, inside, internal.
        for (text, expected) in [
            ("192.168.1.2", [true, false, true, true, true]),
            ("fd00::1", [true, false, true, true, true]),
            ("169.254.3.4", [false, true, true, false, true]),
            ("fe80::1", [false, true, true, false, true]),
            ("100.64.0.1", [false, false, false, true, true]),
            ("100.128.0.1", [false; 5]),
            ("203.0.113.1", [false; 5]),
            ("2001:db8::1", [false; 5]),
        ] {
            let ip: IpAddr = text.parse().unwrap();
            let near = [is_private(ip), is_link_local(ip), is_of_one_site(ip)];
            let told = [near[0], near[1], near[2], is_inside(ip), is_internal(ip)];
            assert_eq!(told, expected, "{text}");
            if let IpAddr::V4(ip) = ip {
                assert_eq!(is_global_v4(ip), expected == [false; 5], "{text}");
            }
        }
        assert!(!is_global_v4(Ipv4Addr::LOCALHOST) && !is_global_v4(Ipv4Addr::UNSPECIFIED));
    }
}
