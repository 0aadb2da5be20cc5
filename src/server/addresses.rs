//! Which addresses the network has, and which a node gets.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rand::Rng;
use rand::rngs::StdRng;

use crate::types::{NodeId, OverlayRange, RangeError};

/// Room for 4094 nodes, and small enough to miss most other networks.
const PREFIX_LEN: u8 = 20;
/// Private ranges that common software uses by default: a laptop may meet them tomorrow.
const USED_BY_OTHERS: [(Ipv4Addr, u8); 9] = [
    (Ipv4Addr::new(10, 0, 0, 0), 15),   // home routers, cloud networks
    (Ipv4Addr::new(10, 8, 0, 0), 16),   // OpenVPN
    (Ipv4Addr::new(10, 10, 0, 0), 16),  // offices
    (Ipv4Addr::new(10, 42, 0, 0), 15),  // k3s pods and services
    (Ipv4Addr::new(10, 88, 0, 0), 16),  // podman
    (Ipv4Addr::new(10, 96, 0, 0), 12),  // Kubernetes services
    (Ipv4Addr::new(10, 126, 0, 0), 16), // EasyTier
    (Ipv4Addr::new(10, 147, 0, 0), 16), // ZeroTier
    (Ipv4Addr::new(10, 244, 0, 0), 16), // flannel
];

/// Makes the range of a new network: what was asked for, else a random 10.x.y.0/20 that meets none
/// of the `local` prefixes, and a random /48 (RFC 4193 section 3.2.2).
///
/// # Errors
/// When a prefix that was asked for cannot be one of a network.
pub fn choose_range(
    v4: Option<Ipv4Net>,
    v6: Option<Ipv6Net>,
    local: &[IpNet],
    rng: &mut StdRng,
) -> Result<OverlayRange, RangeError> {
    let v4 = v4.unwrap_or_else(|| random_v4(local, rng));
    let v6 = v6.unwrap_or_else(|| random_v6(rng));
    OverlayRange::new(v4, v6)
}

fn random_v4(local: &[IpNet], rng: &mut StdRng) -> Ipv4Net {
    let others: Vec<Ipv4Net> =
        USED_BY_OTHERS.iter().map(|(ip, len)| Ipv4Net::new_assert(*ip, *len)).collect();
    // Where every 10.x.y.0/20 is taken, one that meets something is still the best there is: the
    // nodes say so when they meet it.
    let mut chosen = Ipv4Net::new_assert(Ipv4Addr::new(10, 77, 0, 0), PREFIX_LEN);
    for _ in 0..10_000 {
        let ip = Ipv4Addr::new(10, rng.random(), rng.random(), 0);
        chosen = Ipv4Net::new_assert(ip, PREFIX_LEN).trunc();
        let is_free = |net: &Ipv4Net| !meets(net, &chosen);
        let local_free = local.iter().all(|net| match net {
            IpNet::V4(net) => is_free(net),
            IpNet::V6(_) => true,
        });
        if local_free && others.iter().all(is_free) {
            break;
        }
    }
    chosen
}

fn meets(a: &Ipv4Net, b: &Ipv4Net) -> bool {
    a.contains(b) || b.contains(a)
}

fn random_v6(rng: &mut StdRng) -> Ipv6Net {
    let mut octets = [0; 16];
    rng.fill(&mut octets[1..6]);
    octets[0] = 0xfd;
    Ipv6Net::new_assert(Ipv6Addr::from(octets), 48)
}

/// The lowest host number that no member has.
pub(super) fn free_host(range: &OverlayRange, taken: &BTreeMap<u32, NodeId>) -> Option<u32> {
    let gap = (1u32..).zip(taken.keys()).find(|(number, host)| number != *host);
    let host = match gap {
        Some((number, _)) => number,
        None => u32::try_from(taken.len()).ok()?.checked_add(1)?,
    };
    (host <= range.capacity()).then_some(host)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn a_random_range_meets_no_local_network_and_no_usual_default() {
        // All of 10/8 is taken but one eighth.
        let local: Vec<IpNet> = ["10.0.0.0/9", "10.128.0.0/10", "10.224.0.0/11", "fd00::/8"]
            .iter()
            .map(|net| net.parse().unwrap())
            .collect();
        for seed in 0..50 {
            let mut rng = StdRng::seed_from_u64(seed);
            let range = choose_range(None, None, &local, &mut rng).unwrap();
            assert_eq!(range.v4().prefix_len(), 20);
            assert_eq!(range.v4().network().octets()[1] & 0xe0, 192, "{:?}", range.v4());
            assert_eq!(range.v6().prefix_len(), 48);
        }
        let full = ["10.0.0.0/8".parse().unwrap()];
        assert!(choose_range(None, None, &full, &mut StdRng::seed_from_u64(1)).is_ok());
    }

    #[test]
    fn what_was_asked_for_is_taken_or_refused() {
        let mut rng = StdRng::seed_from_u64(1);
        let v4 = "10.77.0.0/20".parse().unwrap();
        assert_eq!(choose_range(Some(v4), None, &[], &mut rng).unwrap().v4(), v4);
        let public = Some("8.8.8.0/24".parse().unwrap());
        assert!(choose_range(public, None, &[], &mut rng).is_err());
    }

    #[test]
    fn the_lowest_free_number_is_given() {
        let range = OverlayRange::new(
            "10.77.0.0/29".parse().unwrap(),
            "fd12:3456:789a::/48".parse().unwrap(),
        )
        .unwrap();
        let node = NodeId::new(1).unwrap();
        let taken = |hosts: &[u32]| hosts.iter().map(|host| (*host, node)).collect();
        assert_eq!(free_host(&range, &taken(&[])), Some(1));
        assert_eq!(free_host(&range, &taken(&[1, 2, 4])), Some(3));
        assert_eq!(free_host(&range, &taken(&[2, 3])), Some(1));
        assert_eq!(free_host(&range, &taken(&[1, 2, 3, 4, 5, 6])), None);
    }
}
