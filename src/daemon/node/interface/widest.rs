//! How wide the interface is: as the widest link, at the start and when a wider one comes.

use super::{Interface, routes_of};
use crate::daemon::node::Daemon;
use crate::io::os::{Link, LinkState, Netlink, NetlinkError};
use crate::path::OVERHEAD_V4;
use crate::types::BASE_MTU;

/// Bytes of a jumbo frame; what is wider is no network, or no use.
const WIDEST_LINK: u16 = 9_000;

/// The MTU for an interface that shall use what the paths have: the widest link's, less what goes
/// around a packet.
pub(in super::super) fn widest_mtu(links: &[Link], own: &str) -> u16 {
    let usable = links.iter().filter(|link| link.up && !link.loopback && link.name != own);
    let widest = usable.map(|link| link.mtu_bytes).max().unwrap_or_default();
    let widest = u16::try_from(widest).unwrap_or(u16::MAX).min(WIDEST_LINK);
    widest.saturating_sub(OVERHEAD_V4).max(BASE_MTU)
}

impl Interface {
    /// Takes packets of up to `mtu` bytes from now on; the routes to single peers are the caller's.
    async fn widen(&mut self, mtu: u16) -> Result<(), NetlinkError> {
        let netlink = Netlink::connect()?;
        netlink.set_link(self.index(), Some(u32::from(mtu)), LinkState::Up).await?;
        self.mtu = mtu;
        for route in routes_of(&self.identity, self.index(), mtu) {
            match netlink.add_route(&route).await {
                Err(error) if route.dst.addr().is_ipv6() => {
                    tracing::debug!(%error, "no IPv6 here");
                }
                result => result?,
            }
        }
        Ok(())
    }
}

impl Daemon {
    /// With `mtu = "auto"` a link that is wider than all at the start counts when it comes: at boot
    /// there may be none yet.
    pub(in super::super) async fn take_widest(&mut self, widest: u16) {
        let is_auto = self.configured.mtu.is_none();
        if !is_auto || widest <= self.options.interface_mtu() {
            return;
        }
        if let Some(interface) = &mut self.interface {
            if interface.off {
                // Who has switched it off does not want it on.
                return;
            }
            if let Err(error) = interface.widen(widest).await {
                tracing::warn!(%error, mtu = widest, "the interface could not be widened");
                return;
            }
        }
        tracing::info!(mtu = widest, "a wider link has come, and so have wider packets");
        self.options.mtu = Some(widest);
        self.options.settings.max_mtu = widest;
        self.node.set_mtu_limit(widest);
        self.route_peers().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::os::LinkKind;

    #[test]
    fn the_widest_link_that_is_up_counts_and_none_is_as_narrow_as_every_path() {
        let link = |name: &str, mtu_bytes| Link {
            index: 1,
            name: name.to_owned(),
            up: true,
            loopback: false,
            mtu_bytes,
            kind: LinkKind::Device,
            carrier: true,
            controller: None,
        };
        let off = Link { up: false, ..link("eth1", 9_000) };
        let loopback = Link { loopback: true, ..link("lo", 65_536) };
        let mut links = vec![off, loopback, link("overlay0", 8_940)];
        assert_eq!(widest_mtu(&links, "overlay0"), BASE_MTU, "at boot");
        links.push(link("eth0", 1_500));
        assert_eq!(widest_mtu(&links, "overlay0"), 1_500 - OVERHEAD_V4);
        links[0].up = true;
        assert_eq!(widest_mtu(&links, "overlay0"), 9_000 - OVERHEAD_V4);
    }
}
