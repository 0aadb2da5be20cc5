//! What becomes of the datagrams of one batch, while the table is locked.

use std::ops::Range;
use std::time::Instant;

use quinn_udp::RecvMeta;

use crate::server::relay::{Arrival, RelayTable, SocketId, Verdict, Way};
use crate::types::DropCounters;
use crate::wire::relay::{DATA_HEADER_LEN, parse_data, travels_alone};

/// Part of a received buffer, and what becomes of it.
pub(super) struct Decided {
    pub(super) buffer: usize,
    pub(super) bytes: Range<usize>,
    pub(super) segment_bytes: usize,
    pub(super) verdict: Verdict,
}

/// Decides about the datagrams of one train. Neighbours that go one way stay together, but for one whose
/// length is a question.
pub(super) fn decide(
    table: &mut RelayTable,
    id: SocketId,
    number: usize,
    buffer: &mut [u8],
    meta: &RecvMeta,
    now: Instant,
    decided: &mut Vec<Decided>,
) {
    let arrival = Arrival { socket: id, source: meta.addr, local: meta.dst_ip };
    let stride = meta.stride.max(1);
    // The header of the last datagram as it came, and as it goes on.
    let mut last_headers: Option<([u8; DATA_HEADER_LEN], [u8; DATA_HEADER_LEN])> = None;
    let mut last_alone = false;
    for start in (0..meta.len).step_by(stride) {
        let end = (start + stride).min(meta.len);
        let Some(datagram) = buffer.get_mut(start..end) else {
            break;
        };
        let alone = travels_alone(datagram);
        let joins = !std::mem::replace(&mut last_alone, alone) && !alone;
        let came = datagram.first_chunk::<DATA_HEADER_LEN>().copied();
        // Only the header and the arrival decide, and a train is mostly for one node.
        if let (Some(came), Some((last_came, goes)), Some(last)) =
            (came, last_headers, decided.last_mut())
            && came == last_came
            && joins
        {
            datagram[..DATA_HEADER_LEN].copy_from_slice(&goes);
            last.bytes.end = end;
            continue;
        }
        let verdict = table.handle_datagram(datagram, arrival, now);
        let goes = datagram.first_chunk::<DATA_HEADER_LEN>().copied();
        // What goes to an address that has proved nothing is asked for one by one.
        let forwards = matches!(verdict, Verdict::Forward(Way::Udp(_) | Way::Link(_)));
        last_headers = came.zip(goes).filter(|_| forwards);
        match decided.last_mut() {
            Some(last) if forwards && joins && last.buffer == number && last.verdict == verdict => {
                last.bytes.end = end;
            }
            _ => {
                let (bytes, segment_bytes) = (start..end, end - start);
                decided.push(Decided { buffer: number, bytes, segment_bytes, verdict });
            }
        }
    }
}

/// Cuts off what its sender, whom the header now names, may not send any more.
pub(super) fn keep_within_limits(
    table: &mut RelayTable,
    buffer: &[u8],
    part: &mut Decided,
    now: Instant,
    drops: &DropCounters,
) {
    let bytes = buffer.get(part.bytes.clone()).unwrap_or_default();
    let (Verdict::Forward(_), Ok((sender, _))) = (&part.verdict, parse_data(bytes)) else {
        return;
    };
    let wanted = bytes.len().div_ceil(part.segment_bytes.max(1));
    let admitted = table.admit(sender, wanted, part.segment_bytes, now);
    if admitted.datagrams < wanted {
        let refused = wanted - admitted.datagrams;
        drops.count_many(admitted.refused, refused as u64);
        part.bytes.end = part.bytes.start + admitted.datagrams * part.segment_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::ConnectionId;
    use crate::server::relay::RelayChange;
    use crate::testing::epoch;
    use crate::types::NodeId;
    use crate::wire::relay::{Control, RelayKey, data_header};

    const LEN: usize = 1_320;

    /// How long the parts are that a train of these first bytes falls into, between two members.
    fn parts(firsts: &[u8]) -> Vec<usize> {
        let [from, to] = [1, 2].map(|number| NodeId::new(number).unwrap());
        let (mut table, key, now) = (RelayTable::default(), RelayKey([1; 32]), epoch());
        for node in [from, to] {
            let connection = ConnectionId(u64::from(node.number()));
            table.apply(RelayChange::Online { node, key: key.clone(), connection });
        }
        let mut take = |buffer: &mut [u8], stride: usize| {
            let (mut meta, mut decided) = (RecvMeta::default(), Vec::new());
            meta.addr = "203.0.113.9:1001".parse().unwrap();
            (meta.len, meta.stride) = (buffer.len(), stride);
            decide(&mut table, SocketId(0), 0, buffer, &meta, now, &mut decided);
            decided
        };
        let mut bind = Control::Bind { node: from, counter: 1, proof: None }.encode(Some(&key));
        assert!(matches!(take(&mut bind, 50)[0].verdict, Verdict::Reply { .. }));

        let datagram = |first: &u8| [data_header(to).as_slice(), &[*first; LEN - 8]].concat();
        let mut train: Vec<u8> = firsts.iter().flat_map(datagram).collect();
        let decided = take(&mut train, LEN);
        for part in &decided {
            assert!(matches!(part.verdict, Verdict::Forward(_)) && part.segment_bytes == LEN);
            let first = parse_data(&train[part.bytes.clone()]).unwrap();
            assert_eq!(first.0, from, "it says whom it is from");
        }
        decided.iter().map(|part| part.bytes.len() / LEN).collect()
    }

    #[test]
    fn a_question_of_its_length_is_sent_on_by_itself_and_data_stays_together() {
        assert_eq!(parts(&[4, 4, 4, 4]), [4]);
        assert_eq!(parts(&[4, 4, 0xb1, 4, 4]), [2, 1, 2]);
        assert_eq!(parts(&[0xb1, 0xb1, 4]), [1, 1, 1]);
        assert_eq!(parts(&[4, 0xb1]), [1, 1]);
    }
}
