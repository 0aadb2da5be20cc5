//! Which TUN device the interface is: one of an earlier run, one that somebody else has made for us,
//! or a new one.

use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;

use super::interface::InterfaceError;
use super::startup::NodeOptions;
use crate::io::os::{InterfaceAddress, LinkState, Netlink, NetlinkError};
use crate::io::tun::{Tun, TunError, TunOptions};

/// Makes the device that [`super::interface::Interface::create`] will take, unless one of `kept` has its name: a missing
/// right or a taken name is found before the network is joined, which cannot be undone from here.
///
/// # Errors
/// Those of the making, later.
pub(super) async fn reserve(
    options: &NodeOptions,
    kept: &mut Vec<Tun>,
) -> Result<(), InterfaceError> {
    if kept.iter().any(|tun| tun.name() == options.interface) {
        return Ok(());
    }
    let wanted = TunOptions::named(&options.interface).with_offloads(options.offloads.tun);
    let (netlink, mtu) = (Netlink::connect()?, options.interface_mtu());
    let tun = open(&netlink, &wanted, &[]).await?;
    // One that was made for its user opens without the right to configure it.
    netlink.set_link(tun.index(), Some(u32::from(mtu)), LinkState::Down).await?;
    kept.push(tun);
    Ok(())
}

/// Whether an interface of this name can be made here: makes it, and lets it go.
///
/// # Errors
/// Those of the making.
pub async fn try_interface(name: &str) -> Result<(), InterfaceError> {
    open(&Netlink::connect()?, &TunOptions::named(name), &[]).await.map(drop)
}

/// Opens the device. One that is there already and has addresses beside `own` belongs to somebody
/// else, who wants it for something else.
pub(super) async fn open(
    netlink: &Netlink,
    wanted: &TunOptions,
    own: &[IpNet],
) -> Result<Tun, InterfaceError> {
    let tun = Tun::open(wanted)?;
    if tun.is_persistent() && !fits(&netlink.addresses().await?, tun.index(), own) {
        return Err(TunError::NameTaken { name: tun.name().to_owned() }.into());
    }
    Ok(tun)
}

/// Whether an interface has no addresses but `own`.
fn fits(addresses: &[InterfaceAddress], index: u32, own: &[IpNet]) -> bool {
    addresses.iter().filter(|it| it.index == index).all(|it| {
        // The kernel's own are link-local.
        let link_local = matches!(it.addr.addr(), IpAddr::V6(ip) if ip.is_unicast_link_local());
        link_local || own.contains(&it.addr)
    })
}

/// The one of `kept` that can go on. What cannot is removed: two could not have one name, and
/// nobody shall find an interface with addresses of a network that we have left. One that somebody
/// else has made is let go as it is.
pub(super) async fn choose(
    netlink: &Netlink,
    wanted: &TunOptions,
    own: &[IpNet],
    kept: Vec<Tun>,
) -> Result<Option<Tun>, NetlinkError> {
    let addresses = netlink.addresses().await?;
    let mut chosen = None;
    for tun in kept {
        let fits = fits(&addresses, tun.index(), own);
        if fits && tun.is(wanted) && chosen.is_none() {
            chosen = Some(tun);
        } else if !tun.is_persistent() {
            tracing::info!(interface = tun.name(), "the interface of before is not what is wanted");
            delete(netlink, &tun).await;
        }
    }
    Ok(chosen)
}

/// Takes the addresses away. What fails here goes with the interface.
pub(super) async fn withdraw(netlink: &Netlink, tun: &Tun) {
    if let Err(error) = netlink.del_addresses(tun.index()).await {
        tracing::debug!(%error, "the addresses go with the interface");
    }
}

/// Addresses first, as in [`super::interface::Interface::withdraw`].
pub(super) async fn delete(netlink: &Netlink, tun: &Tun) {
    withdraw(netlink, tun).await;
    match netlink.delete_link(tun.index()).await {
        // Somebody was faster.
        Err(error) if error.kernel_error() == Some(Errno::ENODEV) => {}
        Err(error) => {
            tracing::warn!(%error, interface = tun.name(), "the interface could not be removed");
        }
        Ok(()) => {}
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::testing::in_namespace;

    fn ip(arguments: &str) {
        let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}");
    }

    #[test]
    fn an_interface_that_somebody_else_uses_is_taken_and_stays() {
        in_namespace(|| async {
            let netlink = Netlink::connect().unwrap();
            let (theirs, ours) = ("10.9.0.1/24", "10.83.16.1/20".parse().unwrap());
            let wanted = TunOptions::named("ovl-test");
            ip("tuntap add ovl-test mode tun");
            try_interface("ovl-test").await.expect("one that was made for us");
            netlink
                .add_address(netlink.link_index("ovl-test").await.unwrap().unwrap(), ours)
                .await
                .unwrap();
            open(&netlink, &wanted, &[ours]).await.expect("one that we have used before");
            ip(&format!("address add {theirs} dev ovl-test"));
            let refused = open(&netlink, &wanted, &[ours]).await.unwrap_err();
            assert_eq!(refused.to_string(), "interface name ovl-test is taken");
            // One that they have taken since it was opened.
            let kept = vec![Tun::open(&wanted).unwrap()];
            assert!(choose(&netlink, &wanted, &[ours], kept).await.unwrap().is_none());
            let addresses = netlink.addresses().await.unwrap();
            assert!(addresses.iter().any(|it| it.addr == theirs.parse().unwrap()), "it stays");
            // Of our own kind, what is not wanted goes.
            let old = Tun::open(&TunOptions::named("ovl-old")).unwrap();
            netlink.add_address(old.index(), "10.9.1.1/24".parse().unwrap()).await.unwrap();
            assert!(choose(&netlink, &wanted, &[ours], vec![old]).await.unwrap().is_none());
            assert_eq!(netlink.link_index("ovl-old").await.unwrap(), None);
        });
    }
}
