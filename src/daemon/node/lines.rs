//! The uplinks beside the preferred one: what the core and the control connection are told of them,
//! and what people are.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Daemon;
use super::report::{UplinkReport, millis};
use crate::io::os::Underlay;
use crate::io::udp::source_towards;
use crate::node::UplinkStatus;
use crate::path::Via;
use crate::types::Uplink;

/// Addresses that are nobody's (RFC 5737, RFC 3849): where would packets to strangers leave by?
const NOBODY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));
const NOBODY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0xffff, 0, 0, 0, 1));

impl Daemon {
    /// Takes the uplinks that a look at the network has found.
    pub(super) fn take_uplinks(&mut self, underlay: &Underlay) {
        let mut uplinks = underlay.uplinks.clone();
        uplinks.retain(|uplink| self.options.all_uplinks && !is_overruled(uplink, underlay));
        let preferred =
            |it: &Uplink| uplinks.iter().find(|other| other.ipv6 == it.ipv6) == Some(it);
        let further: BTreeSet<String> =
            uplinks.iter().filter(|it| !preferred(it)).map(|it| it.device.clone()).collect();
        self.control_link.set_devices(further.into_iter().collect());
        self.node.handle_uplinks(uplinks, crate::io::clock::now());
    }

    /// The relay goes by another uplink: so should the control connection.
    pub(super) fn note_uplink(&mut self, by: Option<&Uplink>) {
        let device = by.map(|uplink| uplink.device.as_str());
        tracing::info!(
            by = device.unwrap_or("the preferred one"),
            "the relay goes by another uplink"
        );
        self.control_link.favour(device);
        if self.server.is_some() && self.link_device.as_deref() != device {
            self.control_link.improve(device);
        }
    }

    /// The further uplink that the control connection goes by, if it does. The interface that it is bound
    /// to may have become the preferred one since, or no uplink at all.
    pub(super) fn further_uplink_of_link(&self) -> Option<String> {
        let server = self.server?;
        let by = self.link_device.as_ref()?;
        let statuses = self.node.uplink_statuses();
        let further = statuses.iter().filter(|it| !it.preferred).map(|it| &it.uplink);
        let mut same = further.filter(|it| it.device == *by && it.ipv6 == server.is_ipv6());
        same.next().map(|uplink| uplink.device.clone())
    }

    /// A path in words, with the uplink when it is not the preferred one.
    pub(super) fn show_path(&self, via: Option<Via>) -> String {
        let Some(via) = via else { return "none".into() };
        match self.device_of(via) {
            Some(device) => format!("{via} by {device}"),
            None => via.to_string(),
        }
    }

    fn device_of(&self, via: Via) -> Option<&str> {
        let Via::Direct { socket, .. } = via else { return None };
        self.node.uplink_of(socket).map(|uplink| uplink.device.as_str())
    }

    pub(super) fn uplink_reports(&self) -> Vec<UplinkReport> {
        self.node.uplink_statuses().into_iter().map(report).collect()
    }

    /// What keeps a further uplink from being of use, and what to do about it.
    pub(super) fn uplink_warnings(&self) -> Vec<String> {
        let silent = |status: &UplinkStatus| !status.preferred && status.answers == Some(false);
        let statuses = self.node.uplink_statuses();
        let strict = statuses.iter().filter(|it| silent(it) && filters_strictly(&it.uplink));
        strict
            .map(|status| {
                let device = &status.uplink.device;
                let setting = filter_setting(device);
                format!(
                    "the kernel drops what comes by {device} from places that it sends to by \
                     another uplink (strict reverse path filter), so {device} is of no use when that \
                     fails; allow it: sudo sysctl {setting}=2"
                )
            })
            .collect()
    }
}

/// Whether policy routes send packets somewhere else than the main table says: who has made them (a
/// VPN for everything, mostly) wants nothing to leave beside them.
fn is_overruled(uplink: &Uplink, underlay: &Underlay) -> bool {
    let nobody = if uplink.ipv6 { NOBODY_V6 } else { NOBODY_V4 };
    let source = source_towards(SocketAddr::new(nobody, 9));
    !source.is_ok_and(|source| underlay.sources.contains(&source))
}

/// Whether the kernel takes packets by this interface only from where it would send to by it: RFC 3704
/// section 2.2. The stricter of the two settings counts.
pub(super) fn filters_strictly(uplink: &Uplink) -> bool {
    let setting = |name: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().parse::<u8>().unwrap_or_default()
    };
    !uplink.ipv6 && setting("all").max(setting(&uplink.device)) == 1
}

/// The name by which `sysctl` sets that: a dot in the name of an interface, a VLAN's as a rule, is a
/// slash there.
fn filter_setting(device: &str) -> String {
    format!("net.ipv4.conf.{}.rp_filter", device.replace('.', "/"))
}

fn report(status: UplinkStatus) -> UplinkReport {
    UplinkReport {
        interface: status.uplink.device,
        family: family(status.uplink.ipv6).into(),
        preferred: status.preferred,
        state: match status.answers {
            Some(true) => "answers",
            Some(false) => "silent",
            None => "unknown",
        }
        .into(),
        endpoint: status.reflexive.map(|endpoint| endpoint.to_string()),
        rtt_ms: status.rtt.map(millis),
        in_use: status.in_use,
    }
}

pub(super) fn family(ipv6: bool) -> &'static str {
    if ipv6 { "ipv6" } else { "ipv4" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_of_a_vlan_has_a_name_that_sysctl_knows() {
        assert_eq!(filter_setting("eth1"), "net.ipv4.conf.eth1.rp_filter");
        assert_eq!(filter_setting("eth0.100"), "net.ipv4.conf.eth0/100.rp_filter");
    }
}
