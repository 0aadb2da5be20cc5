//! A [`NetmapUpdate`](crate::wire::control::NetmapUpdate) whose peers are encoded already: each
//! description is encoded when it changes, and then sent to many.

use std::collections::BTreeSet;

use minicbor::Encoder;

use crate::types::NodeId;

/// What one node is told of the others.
#[derive(Debug, Default)]
pub(super) struct Update<'a> {
    /// The epoch that it is a change to; none when it is the whole of what the node is told.
    pub(super) from: Option<u64>,
    /// The epoch after it.
    pub(super) to: u64,
    /// Encoded [`WirePeer`](crate::wire::control::WirePeer)s.
    pub(super) peers: Vec<&'a [u8]>,
    /// Members no more.
    pub(super) removed: &'a [NodeId],
    /// The receiver's own name, when it is a new one.
    pub(super) own_name: Option<&'a str>,
    /// What the receiver lets in, encoded.
    pub(super) filter: Option<&'a [u8]>,
    /// How many nodes there are, when the receiver is told of a part of them.
    pub(super) members: Option<u32>,
    /// Members that the receiver is no longer told of.
    pub(super) forgotten: &'a [NodeId],
}

impl Update<'_> {
    /// The whole `ServerMessage`, with the field numbers of [`crate::wire::control`].
    pub(super) fn encode(&self) -> Vec<u8> {
        let peers_len: usize = self.peers.iter().map(|peer| peer.len()).sum();
        let mut encoder = Encoder::new(Vec::with_capacity(peers_len + 64));
        // Writing into a vector cannot fail, so there is no error to look at.
        let _: Result<(), minicbor::encode::Error<std::convert::Infallible>> = (|| {
            let optional = [
                self.from.is_some(),
                self.own_name.is_some(),
                self.filter.is_some(),
                self.members.is_some(),
                !self.forgotten.is_empty(),
            ];
            let fields = 3 + optional.into_iter().map(u64::from).sum::<u64>();
            encoder.map(1)?.u8(2)?.map(fields)?;
            if let Some(from) = self.from {
                encoder.u8(0)?.u64(from)?;
            }
            encoder.u8(1)?.u64(self.to)?;
            encoder.u8(2)?.array(self.peers.len() as u64)?;
            for peer in &self.peers {
                encoder.writer_mut().extend_from_slice(peer);
            }
            encoder.u8(3)?;
            numbers(&mut encoder, self.removed)?;
            if let Some(name) = self.own_name {
                encoder.u8(4)?.str(name)?;
            }
            if let Some(filter) = self.filter {
                encoder.u8(5)?.writer_mut().extend_from_slice(filter);
            }
            if let Some(members) = self.members {
                encoder.u8(10)?.u32(members)?;
            }
            if !self.forgotten.is_empty() {
                encoder.u8(11)?;
                numbers(&mut encoder, self.forgotten)?;
            }
            Ok(())
        })();
        encoder.into_writer()
    }
}

fn numbers(
    encoder: &mut Encoder<Vec<u8>>,
    nodes: &[NodeId],
) -> Result<(), minicbor::encode::Error<std::convert::Infallible>> {
    encoder.array(nodes.len() as u64)?;
    for node in nodes {
        encoder.u32(node.number())?;
    }
    Ok(())
}

/// For [`Update`], which names nodes in order.
pub(super) fn in_order(nodes: &BTreeSet<NodeId>) -> Vec<NodeId> {
    nodes.iter().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::control::{
        NetmapUpdate, ServerMessage, WireCandidate, WirePeer, decode, encode,
    };
    use crate::wire::filter::WireFilter;

    #[test]
    fn the_bytes_are_those_of_the_derived_encoder() {
        let peer = WirePeer {
            id: 7,
            name: "bob".into(),
            node_key: [1; 32],
            ipv4: "10.77.0.7".parse().unwrap(),
            ipv6: "fd12::7".parse().unwrap(),
            online: true,
            candidates: vec![WireCandidate { kind: 1, endpoint: "192.0.2.1:5".parse().unwrap() }],
            expires: Some(1_800_000_000),
        };
        let encoded = encode(&peer);
        let gone = [NodeId::new(300).unwrap()];
        let rules = WireFilter { rules: Some(Vec::new()) };
        let filter = encode(&rules);
        for (from, own_name, filter, members, forgotten) in [
            (None, None, None, None, &gone[..0]),
            (Some(5), Some("carol"), Some(filter.as_slice()), Some(70_000), &gone[..]),
        ] {
            let peers = vec![encoded.as_slice(), &encoded];
            let update =
                Update { from, to: 6, peers, removed: &gone, own_name, filter, members, forgotten };
            let netmap = NetmapUpdate {
                from,
                to: 6,
                peers: vec![peer.clone(), peer.clone()],
                removed: vec![300],
                own_name: own_name.map(str::to_string),
                filter: filter.map(|_| rules.clone()),
                members,
                forgotten: (!forgotten.is_empty()).then(|| vec![300]),
            };
            let message = ServerMessage { netmap: Some(netmap), ..Default::default() };
            assert_eq!(decode::<ServerMessage>(&update.encode()).unwrap(), message);
            assert_eq!(update.encode(), encode(&message));
        }
    }
}
