//! Where the access rules meet the packets: what comes in is asked about, what is refused is told.

use std::time::Instant;

use super::icmp::{self, Trouble};
use super::peer::Records;
use crate::policy::{Filter, Verdict};
use crate::types::NodeId;
use crate::wire::ip::IpView;

/// Whether a packet of `peer` comes in; if not, perhaps with an answer to it.
pub(super) fn admit(
    filter: &Filter,
    peer: NodeId,
    packet: &[u8],
    records: &mut Records,
    now: Instant,
) -> Result<(), Option<Vec<u8>>> {
    match filter.inbound(peer, packet, &mut records.flows, now) {
        Verdict::Allow => Ok(()),
        Verdict::Refuse if records.may_answer(now) => {
            let from = IpView::parse(packet).ok().map(|view| view.dst);
            Err(from.and_then(|from| icmp::answer(packet, from, Trouble::Prohibited)))
        }
        Verdict::Refuse | Verdict::Drop => Err(None),
    }
}
