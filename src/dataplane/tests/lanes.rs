//! Two lanes: neither direction waits for the other, and whatever becomes of the second, data arrives.

use std::sync::mpsc;

use super::super::peer::PeerState;
use super::*;

/// Far more than a packet takes on the busiest machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn engine(host: u32) -> EngineKeys {
    EngineKeys::new(&SecretKey::from_bytes([u8::try_from(host).unwrap(); 32]))
}

fn prepare(side: &Side, own: u32, other: u32, now: Instant) {
    let (engine, other) = (engine(own), engine(other).public());
    let make = |index| Session::new(&engine, &other, index, SessionSettings::default());
    side.peer.prepare_second(engine.public(), other, make, now);
}

/// Two sides with both lanes; `b` made the second one, and seals on it.
fn pair_with_lanes(now: Instant) -> (Side, Side) {
    let (a, b) = pair(now);
    prepare(&b, 2, 1, now);
    let (mut to_a, mut to_b) = ([0; MIN_SEAL_BUFFER], [0; MIN_SEAL_BUFFER]);
    let len = b.peer.lock_second().unwrap().session.initiate(&mut to_a, now).unwrap();
    let sender = sender_index(&to_a[..len]).unwrap();
    assert!(a.peer.calls_second(engine(1).public(), engine(2).public(), sender));
    prepare(&a, 1, 2, now);
    let mut second = a.peer.lock_second().unwrap();
    let reply = second.session.handle_handshake(&to_a[..len], b.endpoint.ip(), &mut to_b, now);
    drop(second);
    let receiver = u32::from_le_bytes(to_b[8..12].try_into().unwrap());
    assert!(b.peer.is_second(receiver));
    let len = reply.unwrap().reply.unwrap();
    let mut second = b.peer.lock_second().unwrap();
    let done = second.session.handle_handshake(&to_b[..len], a.endpoint.ip(), &mut to_a, now);
    drop(second);
    let done = done.unwrap();
    assert!(done.established);
    let notes = deliver(&a, &b, &to_a[..done.reply.unwrap()], now).1;
    assert!(notes.is_empty(), "the control plane waits for first lanes only: {notes:?}");
    b.peer.seal_on_second(true);
    (a, b)
}

fn greeting(from: &Side, to: &Side) -> Vec<u8> {
    packet(from.addrs.v4, to.addrs.v4, b"hello")
}

/// Whether `work` comes to an end while this thread holds `lock`.
fn ends_beside<L>(lock: L, patience: Duration, work: impl FnOnce() + Send) -> bool {
    std::thread::scope(|scope| {
        let (done, ended) = mpsc::channel();
        scope.spawn(move || {
            work();
            let _ = done.send(());
        });
        let in_time = ended.recv_timeout(patience).is_ok();
        drop(lock);
        in_time
    })
}

#[test]
fn sealing_and_opening_for_one_peer_do_not_wait_for_one_another() {
    let now = epoch();
    let (a, b) = pair_with_lanes(now);
    for (side, other) in [(&a, &b), (&b, &a)] {
        let sealed = only_datagram(&send(other, &greeting(other, side), now).0);
        // As a thread that is in the middle of a train for this peer.
        let (sealing, _) = side.peer.lock_to_seal(now);
        let opens = || assert_eq!(deliver(side, other, &sealed, now).0.len(), 1);
        assert!(ends_beside(sealing, PATIENCE, opens), "opening waits for sealing");

        let again = only_datagram(&send(other, &greeting(other, side), now).0);
        let receiver = u32::from_le_bytes(again[4..8].try_into().unwrap());
        let opening = side.peer.lock_lane(receiver).unwrap();
        let seals = || assert!(!send(side, &greeting(side, other), now).0.is_empty());
        assert!(ends_beside(opening, PATIENCE, seals), "sealing waits for opening");
    }

    // With one session the same waits, so the above can tell.
    let (a, b) = pair(now);
    let sealed = only_datagram(&send(&b, &greeting(&b, &a), now).0);
    let opens = || assert_eq!(deliver(&a, &b, &sealed, now).0.len(), 1);
    assert!(!ends_beside(a.peer.lock(), Duration::from_millis(50), opens));
}

#[test]
fn without_a_path_packets_wait_where_they_are_looked_for() {
    let now = epoch();
    let (a, b) = pair_with_lanes(now);
    let choice = b.peer.choice();
    b.peer.set_choice(Choice::default());
    assert!(send(&b, &greeting(&b, &a), now).0.is_empty());
    assert_eq!((b.peer.lock().waiting(), b.peer.lock_second().unwrap().waiting()), (1, 0));
    b.peer.set_choice(choice);
    let mut out = UdpBatch::default();
    flush_pending(&b.shared, &b.shared.table(), &b.peer, now, &mut out);
    assert_eq!(deliver(&a, &b, &only_datagram(&out), now).0, [greeting(&b, &a)]);
}

#[test]
fn both_threads_of_both_sides_at_once_lose_and_swap_nothing() {
    let now = epoch();
    let (a, b) = pair_with_lanes(now);
    let count = 2_000u32;
    let [mut to_a, mut to_b] = [Vec::new(), Vec::new()];
    std::thread::scope(|scope| {
        for (from, to, arrived) in [(&a, &b, &mut to_b), (&b, &a, &mut to_a)] {
            let (wire, socket) = mpsc::channel();
            scope.spawn(move || {
                for number in 0..count {
                    let sent = packet(from.addrs.v4, to.addrs.v4, &number.to_be_bytes());
                    wire.send(only_datagram(&send(from, &sent, now).0)).unwrap();
                }
            });
            scope.spawn(move || {
                for datagram in socket {
                    let packets = deliver(to, from, &datagram, now).0;
                    arrived.extend(packets.iter().map(|packet| packet[20..24].to_vec()));
                }
            });
        }
    });
    let expected: Vec<Vec<u8>> = (0..count).map(|number| number.to_be_bytes().to_vec()).collect();
    assert!(to_a == expected && to_b == expected, "all of it, in order");
    for (from, to) in [(&a, &b), (&b, &a)] {
        let via = Via::direct(to.endpoint);
        assert_eq!(from.peer.records().sent.of(via).total(), count);
        assert!(to.peer.records().arrived.of(Via::direct(from.endpoint)).total() >= count);
        assert_eq!(from.shared.drops().snapshot().iter().map(|(_, lost)| lost).sum::<u64>(), 0);
    }
}

#[test]
fn new_keys_on_the_first_lane_end_the_second_and_what_is_under_way_still_opens() {
    let now = epoch();
    let (a, b) = pair_with_lanes(now);
    let under_way = only_datagram(&send(&b, &greeting(&b, &a), now).0);
    assert!(a.peer.is_second(u32::from_le_bytes(under_way[4..8].try_into().unwrap())));

    let (mut to_b, mut to_a) = ([0; MIN_SEAL_BUFFER], [0; MIN_SEAL_BUFFER]);
    let len = a.peer.lock().session.initiate(&mut to_b, now).unwrap();
    let (own, other) = (engine(2).public(), engine(1).public());
    let sender = sender_index(&to_b[..len]).unwrap();
    assert!(!b.peer.calls_second(own, other, sender), "a renewal of the first lane");
    let reply =
        b.peer.lock().session.handle_handshake(&to_b[..len], a.endpoint.ip(), &mut to_a, now);
    let len = reply.unwrap().reply.unwrap();
    assert!(b.peer.seals_second(), "nobody has shown yet that it is a");
    let done =
        a.peer.lock().session.handle_handshake(&to_a[..len], b.endpoint.ip(), &mut to_b, now);
    deliver(&b, &a, &to_b[..done.unwrap().reply.unwrap()], now);
    assert!(!b.peer.seals_second());

    let next = only_datagram(&send(&b, &greeting(&b, &a), now).0);
    assert!(!a.peer.is_second(u32::from_le_bytes(next[4..8].try_into().unwrap())));
    assert_eq!(deliver(&a, &b, &next, now).0.len(), 1);
    assert_eq!(deliver(&a, &b, &under_way, now).0.len(), 1);
    assert_eq!(deliver(&a, &b, &under_way, now).0.len(), 0, "once");
}

#[test]
fn a_second_lane_that_is_over_gives_way_to_the_first() {
    let now = epoch();
    let (a, b) = pair_with_lanes(now);
    let later = now + Duration::from_secs(174);
    // The first lane is renewed, and nobody has told the data plane that the second is over.
    let (mut to_b, mut to_a) = ([0; MIN_SEAL_BUFFER], [0; MIN_SEAL_BUFFER]);
    let len = b.peer.lock().session.initiate(&mut to_a, later).unwrap();
    let reply =
        a.peer.lock().session.handle_handshake(&to_a[..len], b.endpoint.ip(), &mut to_b, later);
    let len = reply.unwrap().reply.unwrap();
    let done =
        b.peer.lock().session.handle_handshake(&to_b[..len], a.endpoint.ip(), &mut to_a, later);
    deliver(&a, &b, &to_a[..done.unwrap().reply.unwrap()], later);
    for seconds in [174, 176] {
        let now = now + Duration::from_secs(seconds);
        let sealed = only_datagram(&send(&b, &greeting(&b, &a), now).0);
        assert_eq!(deliver(&a, &b, &sealed, now).0.len(), 1, "{seconds}");
        assert_eq!(b.peer.seals_second(), seconds < 175, "{seconds}");
    }
}

#[test]
fn a_second_lane_costs_no_more_than_it_is_said_to() {
    let bytes = size_of::<PeerState>();
    assert!(
        (4_000..12_000).contains(&bytes),
        "{bytes} bytes of keys and timers for each busy peer"
    );
}

#[test]
fn an_older_peer_never_seems_to_call_the_second_lane() {
    let now = epoch();
    let (a, _) = pair(now);
    let (own, other) = (engine(1).public(), engine(2).public());
    let first = a.peer.lock().session.peer_index().unwrap();
    for sender in 0..1 << 12 {
        // Older nodes tell sessions of different keys apart by two bits, and have no others.
        let slot = (first & !3 | sender & 3) << 8 | sender >> 4;
        assert!(!a.peer.calls_second(own, other, slot & 0xffff_ff00 | sender & 0xff));
    }
    assert!(a.peer.calls_second(own, other, (first ^ 4) << 8));
    assert!(!a.peer.calls_second(own, other, (first ^ 12) << 8), "somebody else");
    assert!(!a.peer.calls_second(other, own, (first ^ 4) << 8), "other keys");
}
