//! Netlink against the real kernel, in a network namespace of the test's own.

use std::time::Duration;

use super::*;
use crate::io::tun::{Tun, TunOptions};
use crate::testing::in_namespace;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

#[test]
fn a_tun_gets_addresses_mtu_and_routes_and_they_are_listed_again() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let tun = Tun::open(&TunOptions::named("ovl-test")).unwrap();
        let index = tun.index();
        assert_eq!(netlink.link_index("ovl-test").await.unwrap(), Some(index), "same index");

        netlink.set_link(index, Some(1280), LinkState::Up).await.unwrap();
        for addr in ["10.83.16.1/20", "fd12:3456:789a::1/64"] {
            netlink.add_address(index, net(addr)).await.unwrap();
            netlink.add_address(index, net(addr)).await.unwrap();
        }
        let links = netlink.links().await.unwrap();
        let link = links.iter().find(|link| link.index == index).unwrap();
        assert!(link.up && !link.loopback && link.mtu_bytes == 1280, "{link:?}");
        let addresses = netlink.addresses().await.unwrap();
        let of_tun: Vec<_> = addresses.iter().filter(|address| address.index == index).collect();
        for addr in ["10.83.16.1/20", "fd12:3456:789a::1/64"] {
            let found = of_tun.iter().find(|address| address.addr == net(addr)).unwrap();
            assert!(!found.tentative && !found.deprecated && !found.temporary, "{found:?}");
        }

        let extra = Route {
            pref_src: Some("10.83.16.1".parse().unwrap()),
            ..Route::direct(net("10.99.0.0/16"), index)
        };
        let default =
            Route { gateway: "10.83.16.9".parse().ok(), ..Route::direct(net("0.0.0.0/0"), index) };
        let six = Route { metric: Some(1024), ..Route::direct(net("fd99::/64"), index) };
        for route in [&extra, &default, &six] {
            netlink.add_route(route).await.unwrap();
            netlink.add_route(route).await.unwrap();
            assert!(netlink.routes().await.unwrap().contains(route), "{route:?} is listed");
        }
        assert!(netlink.routes().await.unwrap().iter().any(Route::is_default));
        for route in [&extra, &default, &six] {
            netlink.del_route(route).await.unwrap();
            assert!(!netlink.routes().await.unwrap().contains(route), "{route:?} is gone");
        }
        let error = netlink.del_route(&extra).await.unwrap_err();
        assert_eq!(error.kernel_error(), Some(nix::errno::Errno::ESRCH), "{error}");

        netlink.delete_link(index).await.unwrap();
        assert_eq!(netlink.link_index("ovl-test").await.unwrap(), None, "the link is gone");
    });
}

#[test]
fn a_guard_stays_while_the_link_is_off_and_goes_with_the_address() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let [tun, wide] = ["ovl-test", "ovl-wide"].map(|name| {
            let tun = Tun::open(&TunOptions::named(name)).unwrap();
            (tun.index(), tun)
        });
        for (index, _) in [&tun, &wide] {
            netlink.set_link(*index, None, LinkState::Up).await.unwrap();
        }
        let own = "10.83.16.1".parse().unwrap();
        let range: Ipv4Net = "10.83.16.0/20".parse().unwrap();
        netlink.add_address(wide.0, net("192.0.2.1/24")).await.unwrap();
        netlink.add_address(tun.0, net("10.83.16.1/32")).await.unwrap();
        netlink.add_route(&Route::direct(net("0.0.0.0/0"), wide.0)).await.unwrap();
        let inside = Route::direct(range.into(), tun.0);
        netlink.add_route(&inside).await.unwrap();
        let leads = |ip: &str| crate::io::udp::has_route(format!("{ip}:9").parse().unwrap());
        for _ in 0..2 {
            netlink.guard(range, own).await.unwrap();
        }
        assert!(leads("10.83.16.5") && leads("10.83.16.1") && leads("10.83.32.1"));
        assert!(netlink.routes().await.unwrap().contains(&inside), "it is no other route");
        netlink.set_link(tun.0, None, LinkState::Down).await.unwrap();
        assert!(!leads("10.83.16.5") && leads("10.83.32.1"), "not by the default route");
        let local = Route::direct(net("10.83.17.0/24"), wide.0);
        netlink.add_route(&local).await.unwrap();
        assert!(leads("10.83.17.5") && !leads("10.83.16.5"), "a narrower route counts");
        netlink.set_link(tun.0, None, LinkState::Up).await.unwrap();
        netlink.add_route(&inside).await.unwrap();
        assert!(leads("10.83.16.5"));
        drop(tun);
        assert!(leads("10.83.16.5"), "nothing is left of it: the default route leads there");
    });
}

#[test]
fn a_second_tun_of_the_same_name_is_refused_as_taken() {
    in_namespace(|| async {
        let first = Tun::open(&TunOptions::named("ovl-test")).unwrap();
        let error = Tun::open(&TunOptions::named("ovl-test")).unwrap_err();
        assert!(matches!(error, crate::io::tun::TunError::NameTaken { .. }), "{error}");
        let empty = first.read(&mut [0; 64]).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock, "reads never block");
        let down = first.write(&[0x45; 20]).unwrap_err();
        assert_eq!(down.raw_os_error(), Some(libc::EIO), "the interface is down");
    });
}

#[test]
fn changes_are_told_once_for_many() {
    in_namespace(|| async {
        let netlink = Netlink::connect().unwrap();
        let mut changes = Netlink::changes().unwrap();
        let tun = Tun::open(&TunOptions::named("ovl-test")).unwrap();
        netlink.set_link(tun.index(), None, LinkState::Up).await.unwrap();
        netlink.add_address(tun.index(), net("10.83.16.1/20")).await.unwrap();

        let mut seen = ChangeSet::default();
        while !(seen.links && seen.addresses && seen.routes) {
            let wait = tokio::time::timeout(Duration::from_secs(5), changes.changed());
            let change = wait.await.expect("the kernel tells of a new link, address and route");
            seen.links |= change.links;
            seen.addresses |= change.addresses;
            seen.routes |= change.routes;
        }
    });
}

#[test]
fn a_route_of_two_families_is_refused_before_the_kernel_is_asked() {
    let route = Route { gateway: "10.0.0.1".parse().ok(), ..Route::direct(net("fd99::/64"), 1) };
    let error = messages::route_message(&route).unwrap_err();
    assert_eq!(error.to_string(), "route to fd99::/64 mixes IPv4 and IPv6");
}
