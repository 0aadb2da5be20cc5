//! The TUN interface with its addresses and routes, and the addresses of the other interfaces.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::io::os::{Conflict, LinkState, Netlink, NetlinkError, Overlap, Route, conflicts};
use crate::io::tun::{Tun, TunError, TunOptions};
use crate::node::Identity;

use super::startup::NodeOptions;
use super::threads::Ports;

/// Why the interface could not be made.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// The TUN device.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// Addresses or routes.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The overlay's range is in use here.
    #[error("{0}")]
    Conflict(Conflict),
}

/// The overlay's interface. It disappears, with addresses and routes, when this is dropped.
#[derive(Debug)]
pub(super) struct Interface {
    tun: Arc<Tun>,
    identity: Identity,
}

impl Interface {
    /// Makes and configures it; when this returns, the overlay address is usable.
    pub(super) async fn create(
        options: &NodeOptions,
        identity: Identity,
    ) -> Result<Self, InterfaceError> {
        let netlink = Netlink::connect()?;
        let ranges = identity.range.prefixes();
        let (routes, addresses) = (netlink.routes().await?, netlink.addresses().await?);
        let ours = netlink.link_index(&options.interface).await?;
        for conflict in conflicts(&routes, &addresses, &ranges, ours) {
            if conflict.overlap == Overlap::Inside {
                return Err(InterfaceError::Conflict(conflict));
            }
            tracing::warn!(%conflict, "a part of a local network is hidden by the overlay");
        }
        let tun =
            Tun::open(&TunOptions::named(&options.interface).with_offloads(options.offloads.tun))?;
        let index = tun.index();
        for prefix in identity.addrs.prefixes() {
            netlink.add_address(index, prefix).await?;
        }
        netlink.set_link(index, Some(u32::from(options.mtu)), LinkState::Up).await?;
        for (range, address) in ranges.iter().zip(identity.addrs.prefixes()) {
            let route = Route { pref_src: Some(address.addr()), ..Route::direct(*range, index) };
            netlink.add_route(&route).await?;
        }
        tracing::info!(interface = options.interface, ipv4 = %identity.addrs.v4,
            ipv6 = %identity.addrs.v6, mtu = options.mtu, "interface is up");
        Ok(Self { tun: Arc::new(tun), identity })
    }

    pub(super) fn tun(&self) -> Arc<Tun> {
        Arc::clone(&self.tun)
    }

    pub(super) fn index(&self) -> u32 {
        self.tun.index()
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }
}

/// The endpoints of our sockets on every interface but the overlay's own.
pub(super) async fn host_endpoints(
    ports: &Ports,
    own_index: Option<u32>,
) -> Result<Vec<SocketAddr>, NetlinkError> {
    let port = |ip: IpAddr| {
        let socket = if ip.is_ipv4() { &ports.udp_v4 } else { &ports.udp_v6 };
        socket.as_ref().and_then(|socket| socket.local_addr().ok()).map(|addr| addr.port())
    };
    let netlink = Netlink::connect()?;
    let addresses = netlink.addresses().await?;
    Ok(addresses
        .iter()
        .filter(|address| Some(address.index) != own_index && address.up && !address.loopback)
        .filter(|address| !address.deprecated && !address.tentative)
        .filter_map(|address| {
            let ip = address.addr.addr();
            Some(SocketAddr::new(ip, port(ip)?))
        })
        .collect())
}
