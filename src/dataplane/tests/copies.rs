//! What goes by two ways: it arrives once, and it has a measure.

use super::*;

#[test]
fn a_doubled_packet_arrives_once() {
    let now = epoch();
    let (a, b) = pair(now);
    let direct = a.peer.choice().primary;
    a.peer.set_choice(Choice {
        primary: direct,
        duplicate: Some(Via::RelayTcp),
        ..Choice::default()
    });
    let (out, _) = send(&a, &packet(a.addrs.v4, b.addrs.v4, b"twice"), now);
    let datagrams: Vec<Vec<u8>> = out.datagrams().map(|(_, bytes)| bytes.to_vec()).collect();
    assert_eq!(datagrams.len(), 2);
    assert_eq!(deliver(&b, &a, &datagrams[0], now).0.len(), 1);
    assert_eq!(deliver(&b, &a, &datagrams[1][relay::DATA_HEADER_LEN..], now).0.len(), 0);
}

#[test]
fn of_a_fast_flow_some_is_doubled_and_what_somebody_waits_for() {
    let (a, b) = pair(epoch());
    let Choice { primary, .. } = a.peer.choice();
    a.peer.set_choice(Choice { primary, duplicate: Some(Via::RelayTcp), ..Choice::default() });
    let copies = |len: usize, now| {
        let (out, _) = send(&a, &packet(a.addrs.v4, b.addrs.v4, &vec![7; len]), now);
        out.datagrams().count() - 1
    };
    // A second with 50,000 long packets, and a short one every 10 ms.
    let (mut long, mut short) = (0, 0);
    for number in 0..50_000u32 {
        let now = epoch() + Duration::from_micros(20) * number;
        long += copies(1000, now);
        if number % 500 == 0 {
            short += copies(64, now);
        }
    }
    assert_eq!(short, 100, "all of these");
    assert!((10_000..10_600).contains(&long), "{long} of these");
    let sent = a.peer.records().sent.of(Via::RelayTcp).total();
    assert_eq!(sent as usize, long + short, "only what was doubled counts");
}

#[test]
fn who_has_not_answered_gets_few_copies_and_only_those_count_as_sent() {
    let now = epoch();
    let (a, b) = pair(now);
    let direct = a.peer.choice().primary;
    let early = Choice { primary: Some(Via::RelayTcp), duplicate: direct, early: true };
    let before = a.peer.records().sent.of(direct.unwrap()).total();
    let mut copies = 0;
    for round in 0..3 {
        a.peer.set_choice(early);
        for _ in 0..50 {
            let (out, _) = send(&a, &packet(a.addrs.v4, b.addrs.v4, &[7; 1000]), now);
            copies += out.datagrams().count() - 1;
        }
        // 1000 bytes, an IP header of 20, 32 of the seal, 48 of IPv6 and UDP.
        let allowed = crate::path::EARLY_BYTES as usize / 1100;
        assert_eq!(copies, allowed, "round {round}: the same choice again gives no more");
    }
    let sent = a.peer.records().sent.of(direct.unwrap()).total() - before;
    assert_eq!(sent as usize, copies);
}

#[test]
fn what_comes_by_another_way_is_news_now_and_then_and_our_address_makes_no_other_way() {
    let now = epoch();
    let (a, b) = pair(now);
    let news = |local: Option<&str>, from: &str, now| {
        let (out, _) = send(&b, &packet(b.addrs.v4, a.addrs.v4, b"1"), now);
        let (mut tun, mut notes) = (TunBatch::default(), Vec::new());
        let local = local.map(|ip| ip.parse().unwrap());
        let source = Source::udp(from.parse().unwrap(), local);
        let (table, datagram) = (a.shared.table(), only_datagram(&out));
        inbound(&a.shared, &table, source, &datagram, now, &mut tun, &mut notes);
        assert_eq!(tun.packets().count(), 1);
        notes.len()
    };
    let primary = b.endpoint.to_string();
    for local in [None, Some("203.0.113.1"), Some("203.0.113.77")] {
        assert_eq!(news(local, &primary, now), 0, "{local:?}");
    }
    let later = |ms: u32| now + Duration::from_millis(1) * ms;
    let count = |from: &'static str, ms: std::ops::Range<u32>| {
        ms.map(|ms| news(None, from, later(ms))).sum::<usize>()
    };
    assert_eq!(count("198.51.100.1:1", 0..100), 5);
    assert_eq!(count("198.51.100.1:2", 100..101), 1, "at once");
}
