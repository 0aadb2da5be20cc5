//! The TUN interface with its addresses and routes.
//!
//! Other programs have their hands on the same table: a network manager that is restarted may drop
//! every route and address that it does not know. What is missing is put back.

mod unrouted;
mod widest;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::errno::Errno;

use crate::io::clock;
use crate::io::os::{
    Conflict, InterfaceAddress, LinkState, Netlink, NetlinkError, Overlap, Route, conflicts,
};
use crate::io::service::{forget_tun, store_tun};
use crate::io::tun::{Tun, TunError, TunOptions};
use crate::node::Identity;
use crate::types::{BASE_MTU, OverlayAddrs};

use super::Daemon;
use super::device::{choose, delete, open, withdraw};
use super::startup::NodeOptions;
use super::warnings::off_warning;
pub(super) use unrouted::Unrouted;
pub(super) use widest::widest_mtu;

/// When an interface that could not be made anew is tried again.
const RETRY: Duration = Duration::from_secs(5);

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

/// The overlay's interface. It disappears, with addresses and routes, when this is dropped; under a
/// service manager, when this is [removed](Self::remove) or the service is stopped.
#[derive(Debug)]
pub(super) struct Interface {
    tun: Arc<Tun>,
    identity: Identity,
    mtu: u16,
    /// Somebody has switched it off; told once.
    off: bool,
    /// The service manager has a copy of its descriptor.
    is_kept: bool,
}

/// What the kernel still had of the interface.
#[derive(Debug, PartialEq, Eq)]
enum Condition {
    /// All of it, or all of it again: what was put back.
    Whole(Vec<String>),
    /// It is switched off, which only a person or a network manager does.
    Off,
    /// Nothing.
    Gone,
}

impl Interface {
    /// Makes and configures it; when this returns, the overlay address is usable. If one of `kept`,
    /// the devices of an earlier run and a [reserved](super::device::reserve) one, is what is wanted, that one goes
    /// on as it is.
    async fn create(
        options: &NodeOptions,
        identity: Identity,
        kept: Vec<Tun>,
    ) -> Result<Self, InterfaceError> {
        let netlink = Netlink::connect()?;
        let (ranges, own) = (identity.range.prefixes(), identity.addrs.prefixes());
        let wanted = TunOptions::named(&options.interface).with_offloads(options.offloads.tun);
        let kept = choose(&netlink, &wanted, &own, kept).await?;
        let (routes, addresses) = (netlink.routes().await?, netlink.addresses().await?);
        let ours = netlink.link_index(&options.interface).await?;
        // The worst is first; `roam` tells of the others, and of those that come later.
        let worst = conflicts(&routes, &addresses, &ranges, ours).into_iter().next();
        if let Some(conflict) = worst.filter(|conflict| conflict.overlap == Overlap::Inside) {
            return Err(InterfaceError::Conflict(conflict));
        }
        let tun = match kept {
            Some(tun) => {
                if addresses.iter().any(|it| it.index == tun.index()) {
                    tracing::info!(interface = tun.name(), "going on with the interface of before");
                }
                forget_peers(&netlink, &identity, &routes, tun.index()).await;
                tun
            }
            None => open(&netlink, &wanted, &own).await?,
        };
        let index = tun.index();
        let mtu = options.interface_mtu();
        netlink.set_link(index, Some(u32::from(mtu)), LinkState::Up).await?;
        for way in routes_of(&identity, index, mtu) {
            lead_in(&netlink, way).await;
        }
        let mut left_out = Vec::new();
        for prefix in identity.addrs.prefixes() {
            if !add_address(&netlink, index, prefix).await? {
                tracing::warn!(address = %prefix, "IPv6 is disabled on this machine, going on \
                    without (sysctl net.ipv6.conf.all.disable_ipv6)");
                left_out.push(prefix.addr());
            }
        }
        for route in routes_of(&identity, index, mtu) {
            if route.pref_src.is_none_or(|source| !left_out.contains(&source)) {
                netlink.add_route(&route).await?;
            }
        }
        guard(&netlink, &identity).await;
        tracing::info!(interface = options.interface, ipv4 = %identity.addrs.v4,
            ipv6 = %identity.addrs.v6, mtu, "interface is up");
        let is_kept = store_tun(&tun);
        Ok(Self { tun: Arc::new(tun), identity, mtu, off: false, is_kept })
    }

    /// Removes it at once, whoever else has a copy of its descriptor.
    pub(super) async fn remove(self) {
        forget_tun();
        if let Ok(netlink) = Netlink::connect() {
            delete(&netlink, &self.tun).await;
        }
    }

    /// Puts back the addresses and routes that are missing.
    async fn mend(
        &self,
        peers: &BTreeMap<Ipv4Addr, (OverlayAddrs, u16)>,
    ) -> Result<Condition, NetlinkError> {
        let netlink = Netlink::connect()?;
        let index = self.tun.index();
        let links = netlink.links().await?;
        match links.iter().find(|link| link.index == index) {
            None => return Ok(Condition::Gone),
            Some(link) if !link.up => return Ok(Condition::Off),
            Some(_) => {}
        }
        let mut mended = Vec::new();
        let mut left_out = Vec::new();
        let addresses = netlink.addresses().await?;
        let mut restored = Vec::new();
        let ways = routes_of(&self.identity, index, self.mtu);
        for (prefix, way) in self.identity.addrs.prefixes().into_iter().zip(ways) {
            let there = |it: &InterfaceAddress| it.index == index && it.addr == prefix;
            if addresses.iter().any(there) {
                continue;
            }
            lead_in(&netlink, way).await;
            if add_address(&netlink, index, prefix).await? {
                mended.push(prefix.to_string());
                restored.push(prefix.addr());
            } else {
                left_out.push(prefix.addr());
            }
        }
        guard(&netlink, &self.identity).await;
        // Read after the addresses are back: the kernel drops routes with their source address.
        let routes = netlink.routes().await?;
        let to_peers = peers.values().flat_map(|(addrs, mtu)| self.routes_to(*addrs, *mtu));
        for route in routes_of(&self.identity, index, self.mtu).chain(to_peers) {
            // One that led in before the address was back does not name it.
            let old = route.pref_src.is_none_or(|source| !restored.contains(&source));
            let there = |it: &Route| it.index == index && it.dst == route.dst && old;
            let possible = route.pref_src.is_none_or(|source| !left_out.contains(&source));
            if possible && !routes.iter().any(there) {
                netlink.add_route(&route).await?;
                mended.push(format!("route to {}", route.dst));
            }
        }
        Ok(Condition::Whole(mended))
    }

    /// The routes to one peer, whose path carries packets of up to `mtu` bytes.
    fn routes_to(&self, addrs: OverlayAddrs, mtu: u16) -> impl Iterator<Item = Route> {
        let (index, limit) = (self.tun.index(), self.mtu);
        let sources = self.identity.addrs.prefixes().map(|own| own.addr());
        let hosts = [IpAddr::from(addrs.v4), IpAddr::from(addrs.v6)];
        hosts.into_iter().zip(sources).map(move |(host, source)| Route {
            pref_src: Some(source),
            ..sized_route(IpNet::from(host), index, mtu, limit)
        })
    }

    /// Routes to one peer by what its path carries, or no more.
    async fn route_peer(&self, addrs: OverlayAddrs, mtu: u16) -> Result<(), NetlinkError> {
        let netlink = Netlink::connect()?;
        for route in self.routes_to(addrs, mtu) {
            let changed = if mtu == BASE_MTU {
                netlink.del_route(&Route::direct(route.dst, route.index)).await
            } else {
                netlink.add_route(&route).await
            };
            match changed {
                // Not there, or not possible: IPv6 is off.
                Err(error) if mtu == BASE_MTU || route.dst.addr().is_ipv6() => {
                    tracing::debug!(%error, "route to a peer not changed");
                }
                result => result?,
            }
        }
        Ok(())
    }

    /// Takes the addresses away, before the interface goes: the kernel would take the routes first,
    /// and what programs send in between would leave by the default route, in the open.
    /// One that the service manager keeps stays as it is.
    async fn withdraw(&self) -> Result<(), NetlinkError> {
        if self.is_kept {
            return Ok(());
        }
        withdraw(&Netlink::connect()?, &self.tun).await;
        Ok(())
    }

    pub(super) fn tun(&self) -> Arc<Tun> {
        Arc::clone(&self.tun)
    }

    pub(super) fn index(&self) -> u32 {
        self.tun.index()
    }

    /// Whether somebody has switched it off.
    pub(super) fn is_off(&self) -> bool {
        self.off
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }
}

/// Removes the routes to single peers: what their paths carry has to be found out anew.
async fn forget_peers(netlink: &Netlink, identity: &Identity, routes: &[Route], index: u32) {
    let (ranges, own) = (identity.range.prefixes(), identity.addrs.prefixes());
    let to_peer = |route: &&Route| {
        let is_host = route.dst.prefix_len() == route.dst.max_prefix_len();
        let inside = ranges.iter().any(|range| range.contains(&route.dst));
        route.index == index && is_host && inside && !own.contains(&route.dst)
    };
    for route in routes.iter().filter(to_peer) {
        if let Err(error) = netlink.del_route(&Route::direct(route.dst, index)).await {
            tracing::debug!(%error, "the route to a peer of before stays");
        }
    }
}

/// A route into the interface before it has its address. Connections of before have that as their
/// source: with an address and no route, their packets would leave by the default route, in the open.
async fn lead_in(netlink: &Netlink, way: Route) {
    // Where the kernel has no IPv6, there is nothing to lead in.
    if let Err(error) = netlink.add_route(&Route { pref_src: None, ..way }).await {
        tracing::debug!(%error, "no route before the address");
    }
}

/// Keeps what is for IPv4 addresses of the network from the default route while the interface is off: its
/// address stays then, and its routes go. This one is bound to the address alone, and goes with it.
async fn guard(netlink: &Netlink, identity: &Identity) {
    if let Err(error) = netlink.guard(identity.range.v4(), identity.addrs.v4).await {
        tracing::warn!(%error, "what is sent while the interface is off leaves in the open");
    }
}

/// Adds an address; `false` where the kernel has no IPv6, as in most containers.
async fn add_address(netlink: &Netlink, index: u32, prefix: IpNet) -> Result<bool, NetlinkError> {
    let Err(error) = netlink.add_address(index, prefix).await else { return Ok(true) };
    // Switched off by sysctl, or by a parameter of the kernel. A missing right is EPERM.
    let absent = matches!(
        error.kernel_error(),
        Some(Errno::EACCES | Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT)
    );
    if absent && prefix.addr().is_ipv6() { Ok(false) } else { Err(error) }
}

/// The routes to all peers, by what every path carries.
fn routes_of(identity: &Identity, index: u32, limit: u16) -> impl Iterator<Item = Route> {
    let ranges = identity.range.prefixes().into_iter().zip(identity.addrs.prefixes());
    ranges.map(move |(range, address)| Route {
        pref_src: Some(address.addr()),
        ..sized_route(range, index, BASE_MTU, limit)
    })
}

/// A route for packets of up to `mtu` bytes. What comes back may have up to `limit`: the path may
/// get wider while a TCP connection lasts, and its largest segment is agreed on once.
fn sized_route(dst: IpNet, index: u32, mtu: u16, limit: u16) -> Route {
    let (mtu, headers) = if dst.addr().is_ipv4() { (mtu, 40) } else { (mtu.max(BASE_MTU), 60) };
    Route {
        mtu_bytes: Some(u32::from(mtu.min(limit))),
        advmss_bytes: Some(u32::from(limit - headers)),
        ..Route::direct(dst, index)
    }
}

impl Daemon {
    /// The path to a peer carries packets of up to `mtu` bytes now.
    pub(super) async fn set_peer_mtu(&mut self, addrs: OverlayAddrs, mtu: u16) {
        if mtu == BASE_MTU {
            self.peer_mtus.remove(&addrs.v4);
        } else {
            self.peer_mtus.insert(addrs.v4, (addrs, mtu));
        }
        let Some(interface) = &self.interface else { return };
        tracing::debug!(peer = %addrs.v4, mtu, "the path's MTU");
        let changed = interface.route_peer(addrs, mtu).await;
        self.unrouted.note(addrs, mtu, changed, clock::now());
    }

    /// Tries again what the kernel has refused.
    pub(super) async fn retry_routes(&mut self, now: Instant) {
        for (addrs, mtu) in self.unrouted.take_due(now) {
            self.set_peer_mtu(addrs, mtu).await;
        }
    }

    /// Makes the routes to the peers in a new interface.
    pub(super) async fn route_peers(&mut self) {
        for (addrs, mtu) in self.peer_mtus.clone().into_values() {
            self.set_peer_mtu(addrs, mtu).await;
        }
    }

    /// The process is about to end; `for_good` when no other run is to follow.
    pub(super) async fn end_interface(&mut self, for_good: bool) {
        if for_good {
            return self.remove_interface().await;
        }
        let Some(interface) = &self.interface else { return };
        if let Err(error) = interface.withdraw().await {
            tracing::debug!(%error, "the addresses stay until the interface goes");
        }
    }

    /// Looks after the interface when something about the network has changed.
    pub(super) async fn mend_interface(&mut self, now: Instant) {
        let condition = match &self.interface {
            Some(interface) => interface.mend(&self.peer_mtus).await,
            None => Ok(Condition::Gone),
        };
        let off = condition.as_ref().is_ok_and(|condition| *condition == Condition::Off);
        let name = self.options.interface.clone();
        match condition {
            Ok(Condition::Whole(mended)) if mended.is_empty() => {}
            Ok(Condition::Whole(mended)) => {
                let what = mended.join(", ");
                tracing::warn!(interface = name, what, "put back what was missing");
            }
            Ok(Condition::Off) => {
                if self.interface.as_ref().is_some_and(|interface| !interface.off) {
                    tracing::warn!(interface = name, "{}", off_warning(&name));
                }
            }
            Ok(Condition::Gone) => self.remake_interface(now).await,
            Err(error) => {
                tracing::warn!(%error, interface = name, "the interface could not be mended");
                self.surroundings.rescan_at = Some(now + RETRY);
            }
        }
        if let Some(interface) = &mut self.interface {
            interface.off = off;
        }
    }

    /// Makes the interface, in place of the one that there is. That takes the kernel some
    /// milliseconds, and peers hear of us meanwhile: what paths need is served all the time, or a
    /// peer would knock before our NAT is open.
    pub(super) async fn make_interface(
        &mut self,
        identity: Identity,
    ) -> Result<(), InterfaceError> {
        self.remove_interface().await;
        let (kept, options) = (std::mem::take(&mut self.kept), self.options.clone());
        self.ports.expect_tun();
        let runtime = tokio::runtime::Handle::current();
        let mut making = tokio::task::spawn_blocking(move || {
            runtime.block_on(Interface::create(&options, identity, kept))
        });
        let made = loop {
            self.flush();
            tokio::select! {
                biased;
                made = &mut making => break made,
                () = self.path_turn() => {}
            }
        };
        let made = made.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        let interface = made.inspect_err(|_| self.ports.set_tun(None))?;
        self.ports.set_tun(Some(interface.tun()));
        self.interface = Some(interface);
        self.route_peers().await;
        Ok(())
    }

    /// Removes the interface, which a service manager would keep for the next run.
    pub(super) async fn remove_interface(&mut self) {
        self.unrouted.clear();
        self.ports.set_tun(None);
        if let Some(interface) = self.interface.take() {
            interface.remove().await;
        }
    }

    async fn remake_interface(&mut self, now: Instant) {
        // Before a first enrolment there is none to remake.
        let Some(identity) = self.node.netmap().identity.clone() else { return };
        if self.interface.is_some() {
            tracing::warn!(interface = self.options.interface, "the interface was removed");
        }
        match self.make_interface(identity).await {
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(%error, "the interface could not be made anew");
                self.surroundings.rescan_at = Some(now + RETRY);
            }
        }
    }
}
