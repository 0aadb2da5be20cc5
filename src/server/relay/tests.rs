//! Who may sign on, who is sent to and how, and what everybody else gets: nothing.

use super::*;
use crate::testing::epoch;

fn node(number: u32) -> NodeId {
    NodeId::new(number).unwrap()
}

fn arrival(port: u16) -> Arrival {
    Arrival {
        socket: SocketId(0),
        source: SocketAddr::new("203.0.113.9".parse().unwrap(), port),
        local: Some("192.0.2.1".parse().unwrap()),
    }
}

fn online(table: &mut RelayTable, number: u32) -> RelayKey {
    let key = RelayKey([u8::try_from(number).unwrap(); 32]);
    let connection = ConnectionId(u64::from(number));
    table.apply(RelayChange::Online { node: node(number), key: key.clone(), connection });
    key
}

/// A bind of who has shown that it receives there.
fn bind(
    table: &mut RelayTable,
    number: u32,
    key: &RelayKey,
    counter: u64,
    port: u16,
    now: Instant,
) -> Verdict {
    let proof = Some(table.prover.tell(node(number), arrival(port), now));
    bind_with(table, (number, key, counter), proof, port, now)
}

fn bind_with(
    table: &mut RelayTable,
    (number, key, counter): (u32, &RelayKey, u64),
    proof: Option<AddressProof>,
    port: u16,
    now: Instant,
) -> Verdict {
    let mut datagram = Control::Bind { node: node(number), counter, proof }.encode(Some(key));
    table.handle_datagram(&mut datagram, arrival(port), now)
}

fn data(target: u32) -> Vec<u8> {
    let mut datagram = data_header(node(target)).to_vec();
    datagram.extend_from_slice(b"sealed");
    datagram
}

const BAD: Verdict = Verdict::Drop(DropReason::BadRelayFrame);

#[test]
fn a_bind_from_somewhere_else_is_a_sighting_once_a_second() {
    let start = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    let mut sighted = |counter, port, ms| {
        let now = start + Duration::from_millis(ms);
        let _ = bind(&mut table, 1, &key, counter, port, now);
        table.poll_sighting().map(|(node, endpoint)| (node.number(), endpoint.port()))
    };
    assert_eq!(sighted(1, 1001, 0), Some((1, 1001)));
    assert_eq!(sighted(2, 1001, 5_000), None, "the same place");
    assert_eq!(sighted(3, 1002, 6_000), Some((1, 1002)));
    assert_eq!(sighted(4, 1003, 6_500), None, "too soon");
    assert_eq!(sighted(4, 1004, 9_000), None, "a replayed bind");
}

#[test]
fn members_reach_each_other_by_udp_and_by_link() {
    let now = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    online(&mut table, 2);
    assert!(matches!(bind(&mut table, 1, &key, 1, 1001, now), Verdict::Reply { .. }));

    let mut datagram = data(2);
    let verdict = table.handle_datagram(&mut datagram, arrival(1001), now);
    assert_eq!(verdict, Verdict::Forward(Way::Link(ConnectionId(2))), "2 has no UDP");
    assert_eq!(
        parse_data(&datagram),
        Ok((node(1), b"sealed".as_slice())),
        "it says whom it is from"
    );

    let verdict = table.handle_from(node(2), &mut data(1), now);
    assert_eq!(verdict, Verdict::Forward(Way::Udp(arrival(1001))));
    let later = now + BIND_LIFETIME;
    let verdict = table.handle_from(node(2), &mut data(1), later);
    assert_eq!(verdict, Verdict::Forward(Way::Link(ConnectionId(1))), "the bind is too old");
    assert_eq!(table.handle_datagram(&mut data(2), arrival(1001), later), BAD);

    table.apply(RelayChange::Offline { node: node(1), connection: ConnectionId(1) });
    let verdict = table.handle_from(node(2), &mut data(1), later);
    assert_eq!(verdict, Verdict::Drop(DropReason::RelayPeerAbsent));
}

#[test]
fn what_is_too_long_for_udp_is_handed_on_by_the_connection_and_says_nothing_else() {
    let now = epoch();
    let mut table = RelayTable::default();
    let keys = [1, 2].map(|number| online(&mut table, number));
    bind(&mut table, 1, &keys[0], 1, 1001, now);
    bind(&mut table, 2, &keys[1], 1, 1002, now);
    let later = now + BIND_ANSWERED * 2;
    let mut long = data(1);
    long[..DATA_HEADER_LEN].copy_from_slice(&wire::data_header_by_link(node(1)));
    for _ in 0..2 {
        let verdict = table.handle_from(node(2), &mut long.clone(), later);
        assert_eq!(verdict, Verdict::Forward(Way::Link(ConnectionId(1))));
    }
    let _ = table.handle_from(node(2), &mut long, later);
    assert_eq!(long, data(2), "the receiver is told nothing of it");
    // Both receive by UDP as before.
    for (sender, receiver, port) in [(1, 2, 1002), (2, 1, 1001)] {
        let source = if sender == 1 { 1001 } else { 1002 };
        let verdict = table.handle_datagram(&mut data(receiver), arrival(source), later);
        assert_eq!(verdict, Verdict::Forward(Way::Udp(arrival(port))));
    }
    table.apply(RelayChange::Offline { node: node(1), connection: ConnectionId(1) });
    long[..DATA_HEADER_LEN].copy_from_slice(&wire::data_header_by_link(node(1)));
    let verdict = table.handle_from(node(2), &mut long, later);
    assert_eq!(verdict, Verdict::Forward(Way::Udp(arrival(1001))), "there is nothing better");
}

#[test]
fn nothing_goes_out_of_the_network_or_comes_from_outside() {
    let now = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    let other = online(&mut table, 2);
    bind(&mut table, 1, &key, 1, 1001, now);
    bind(&mut table, 2, &other, 1, 1002, now);
    assert_eq!(table.handle_datagram(&mut data(2), arrival(9), now), BAD, "from a stranger");
    assert_eq!(table.handle_datagram(&mut data(7), arrival(1001), now), BAD, "to a stranger");
    assert_eq!(table.handle_datagram(&mut data(1), arrival(1001), now), BAD, "to itself");
    table.apply(RelayChange::Removed(node(2)));
    assert_eq!(table.handle_datagram(&mut data(2), arrival(1001), now), BAD, "to a removed node");
    assert_eq!(table.handle_datagram(&mut data(1), arrival(1002), now), BAD, "from a removed one");
    assert_eq!(bind(&mut table, 2, &other, 9, 1002, now), BAD, "its key is of no use");
}

#[test]
fn a_bind_counts_once_and_only_with_its_key() {
    let now = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    assert_eq!(bind(&mut table, 1, &RelayKey([9; 32]), 1, 1001, now), BAD, "another key");
    assert!(matches!(bind(&mut table, 1, &key, 5, 1001, now), Verdict::Reply { .. }));
    assert_eq!(bind(&mut table, 1, &key, 5, 6666, now), BAD, "a replay from elsewhere");
    assert_eq!(bind(&mut table, 1, &key, 4, 6666, now), BAD, "an old one");
    let Verdict::Reply { bytes, from } = bind(&mut table, 1, &key, 6, 1002, now) else {
        panic!("a newer bind moves the node");
    };
    assert_eq!(from, SocketId(0));
    assert_eq!(wire::verify(&bytes, &key), Ok(()));
    let observed = arrival(1002).source;
    let bound = Control::parse(&bytes);
    assert!(
        matches!(bound, Ok(Control::Bound { node: id, counter: 6, observed: at, proof: Some(_) })
            if id == node(1) && at == observed),
        "{bound:?}"
    );
    online(&mut table, 2);
    assert_eq!(table.handle_datagram(&mut data(2), arrival(1001), now), BAD, "it has moved");
    let new_key = RelayKey([77; 32]);
    let connection = ConnectionId(9);
    table.apply(RelayChange::Online { node: node(1), key: new_key.clone(), connection });
    assert_eq!(bind(&mut table, 1, &key, 7, 1001, now), BAD, "the key of an older connection");
    assert!(matches!(bind(&mut table, 1, &new_key, 0, 1001, now), Verdict::Reply { .. }));
}

/// What a table says to a bind: whether it wants a proof, and which.
fn told(verdict: &Verdict) -> Option<Proving> {
    let Verdict::Reply { bytes, .. } = verdict else { panic!("a bind is answered: {verdict:?}") };
    match Control::parse(bytes) {
        Ok(Control::Bound { proof, .. }) => proof,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_bind_with_a_forged_source_turns_a_trickle_of_others_data_there_and_no_more() {
    let start = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    online(&mut table, 2);
    let (mut bytes, mut datagrams, mut by_link) = (0, 0, 0);
    // A minute of binds from the address of a victim, each with another port, and a flood for it.
    for (ms, counter) in (0..60_000).step_by(20).zip(1..) {
        let now = start + Duration::from_millis(ms);
        let port = 1_000 + u16::try_from(counter % 50_000).unwrap();
        let forged = Some(AddressProof([counter as u8; 8]));
        let answer = bind_with(&mut table, (1, &key, counter), forged, port, now);
        assert!(told(&answer).is_some_and(|proving| proving.wanted));
        for _ in 0..10 {
            let mut datagram = [data(1), vec![0; 1_300]].concat();
            match table.handle_from(node(2), &mut datagram, now) {
                Verdict::Forward(Way::Unproved(to)) if to == arrival(port) => {
                    bytes += datagram.len() + 28;
                    datagrams += 1;
                }
                Verdict::Forward(Way::Link(ConnectionId(1))) => by_link += 1,
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(datagrams > 0 && bytes < 60_000, "{bytes} bytes in a minute, in {datagrams}");
    assert_eq!(datagrams + by_link, 30_000, "the node itself loses nothing");
}

#[test]
fn who_says_what_it_was_told_is_sent_all_from_then_on() {
    let now = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    online(&mut table, 2);
    let none = Some(AddressProof::default());
    let first = told(&bind_with(&mut table, (1, &key, 1), none, 1001, now)).unwrap();
    assert!(first.wanted);
    // At once, before any proof.
    let verdict = table.handle_from(node(2), &mut data(1), now);
    assert_eq!(verdict, Verdict::Forward(Way::Unproved(arrival(1001))));
    let elsewhere = bind_with(&mut table, (1, &key, 2), Some(first.proof), 1002, now);
    assert!(told(&elsewhere).unwrap().wanted, "it is good for one address");
    let second = bind_with(&mut table, (1, &key, 3), Some(first.proof), 1001, now);
    assert!(!told(&second).unwrap().wanted);
    for _ in 0..1_000 {
        let mut large = [data(1), vec![0; 1_300]].concat();
        let verdict = table.handle_from(node(2), &mut large, now);
        assert_eq!(verdict, Verdict::Forward(Way::Udp(arrival(1001))));
    }
}

#[test]
fn a_member_cannot_take_the_address_of_another_by_forging_it() {
    let now = epoch();
    let mut table = RelayTable::default();
    let (victim, thief) = (online(&mut table, 1), online(&mut table, 2));
    online(&mut table, 3);
    bind(&mut table, 1, &victim, 1, 1001, now);
    let none = Some(AddressProof::default());
    for counter in 1..100 {
        let forged = bind_with(&mut table, (2, &thief, counter), none, 1001, now);
        assert!(told(&forged).unwrap().wanted);
        let verdict = table.handle_from(node(3), &mut data(1), now);
        assert_eq!(verdict, Verdict::Forward(Way::Udp(arrival(1001))), "it is sent to as before");
        let mut sent = data(3);
        let verdict = table.handle_datagram(&mut sent, arrival(1001), now);
        assert_eq!(verdict, Verdict::Forward(Way::Link(ConnectionId(3))));
        assert_eq!(parse_data(&sent).map(|(from, _)| from), Ok(node(1)), "in its own name");
    }
    // Gone again: what the thief never had is not taken from its owner with it.
    table.apply(RelayChange::Removed(node(2)));
    let verdict = table.handle_datagram(&mut data(3), arrival(1001), now);
    assert_eq!(verdict, Verdict::Forward(Way::Link(ConnectionId(3))));
}

#[test]
fn a_node_that_cannot_prove_its_address_is_sent_what_it_sends_and_the_rest_by_its_link() {
    let now = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    online(&mut table, 2);
    let old = bind_with(&mut table, (1, &key, 1), None, 1001, now);
    assert_eq!(told(&old), None, "an answer that it can read");
    let large = |target| [data(target), vec![0; 1_300]].concat();
    while table.handle_from(node(2), &mut large(1), now)
        == Verdict::Forward(Way::Unproved(arrival(1001)))
    {}
    let by_link = Verdict::Forward(Way::Link(ConnectionId(1)));
    assert_eq!(table.handle_from(node(2), &mut large(1), now), by_link);
    table.handle_datagram(&mut large(2), arrival(1001), now);
    let as_much = Verdict::Forward(Way::Unproved(arrival(1001)));
    assert_eq!(table.handle_from(node(2), &mut large(1), now), as_much);
    assert_eq!(table.handle_from(node(2), &mut large(1), now), by_link);
    // It answers what came by the link there, and may go on by UDP all the same.
    let later = now + BIND_ANSWERED * 2;
    table.handle_from(node(1), &mut data(2), later);
    let verdict = table.handle_datagram(&mut data(2), arrival(1001), later);
    assert_eq!(verdict, Verdict::Forward(Way::Link(ConnectionId(2))));
    let small = table.handle_from(node(2), &mut data(1), later);
    assert_eq!(small, as_much, "it is answered where it sends from");
}

#[test]
fn who_binds_and_sends_by_its_link_alone_is_sent_nothing_by_udp() {
    let start = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    online(&mut table, 2);
    let by_link = Verdict::Forward(Way::Link(ConnectionId(1)));
    let by_udp = Verdict::Forward(Way::Unproved(arrival(1001)));
    // No answer arrives: it says no proof, and binds on as such a node does.
    for (none, port) in [(Some(AddressProof::default()), 1001), (None, 1001)] {
        let key = if none.is_none() { online(&mut table, 1) } else { key.clone() };
        let seconds = [0, 1, 3, 8].into_iter().chain((28..120).step_by(20));
        for (second, counter) in seconds.zip(1..) {
            let now = start + Duration::from_secs(second);
            let answer = bind_with(&mut table, (1, &key, counter), none, port, now);
            assert_eq!(told(&answer).is_some(), none.is_some());
            table.handle_from(node(1), &mut data(2), now + Duration::from_millis(10));
            for ms in [20, 500, 900, 1_900] {
                let at = now + Duration::from_millis(ms);
                let known = at >= start + BIND_ANSWERED;
                let verdict = table.handle_from(node(2), &mut data(1), at);
                assert_eq!(&verdict, if known { &by_link } else { &by_udp }, "{at:?}");
            }
        }
    }
    // It receives by UDP again, and sends by it.
    let now = start + Duration::from_secs(110);
    assert_eq!(table.handle_from(node(2), &mut data(1), now), by_link);
    table.handle_datagram(&mut data(2), arrival(1001), now);
    assert_eq!(table.handle_from(node(2), &mut data(1), now + BIND_ANSWERED), by_udp);
    // Without the connection there is no other way.
    table.handle_from(node(1), &mut data(2), now + BIND_ANSWERED);
    assert_eq!(table.handle_from(node(2), &mut data(1), now + BIND_ANSWERED), by_link);
    table.apply(RelayChange::Offline { node: node(1), connection: ConnectionId(1) });
    assert_eq!(table.handle_from(node(2), &mut data(1), now + BIND_ANSWERED), by_udp);
}

#[test]
fn a_proof_of_before_does_not_turn_data_to_where_the_node_receives_nothing_now() {
    let start = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    online(&mut table, 2);
    let old = Some(table.prover.tell(node(1), arrival(1001), start));
    for (second, counter) in (0..1_200).step_by(20).zip(1..) {
        let now = start + Duration::from_secs(second);
        bind_with(&mut table, (1, &key, counter), old, 1001, now);
        let silent = now + BIND_ANSWERED;
        table.handle_from(node(1), &mut data(2), silent);
        for at in [now + Duration::from_secs(1), silent].into_iter().skip(usize::from(second == 0))
        {
            let verdict = table.handle_from(node(2), &mut data(1), at);
            assert_eq!(verdict, Verdict::Forward(Way::Link(ConnectionId(1))), "{second} s");
        }
    }
    // One that was told since then shows that answers arrive again.
    let now = start + Duration::from_secs(1_200);
    bind(&mut table, 1, &key, 1_000, 1001, now);
    let verdict = table.handle_from(node(2), &mut data(1), now + BIND_ANSWERED);
    assert_eq!(verdict, Verdict::Forward(Way::Udp(arrival(1001))));
}

#[test]
fn a_node_that_receives_by_udp_is_sent_to_by_udp_whatever_was_late_by_its_link() {
    let start = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    online(&mut table, 2);
    let by_udp = Verdict::Forward(Way::Udp(arrival(1001)));
    let ms = |ms| start + Duration::from_millis(ms);
    // It sends by its link until its first answer, which is late, and then says the proof.
    table.handle_from(node(1), &mut data(2), start);
    let none = Some(AddressProof::default());
    let first = told(&bind_with(&mut table, (1, &key, 1), none, 1001, ms(1))).unwrap();
    table.handle_from(node(1), &mut data(2), ms(2_500));
    bind_with(&mut table, (1, &key, 2), Some(first.proof), 1001, ms(2_600));
    table.handle_from(node(1), &mut data(2), ms(2_700));
    // It only receives from now on, and never loses UDP.
    for (second, counter) in (20..290).step_by(20).zip(3..) {
        bind_with(&mut table, (1, &key, counter), Some(first.proof), 1001, ms(second * 1_000));
        for late in [10, 3_000, 19_000] {
            let at = ms(second * 1_000 + late);
            assert_eq!(table.handle_from(node(2), &mut data(1), at), by_udp);
        }
    }
    // While it sends by UDP, what comes by its link says nothing.
    for second in 300..320 {
        table.handle_datagram(&mut data(2), arrival(1001), ms(second * 1_000));
        table.handle_from(node(1), &mut data(2), ms(second * 1_000 + 900));
        bind(&mut table, 1, &key, second, 1001, ms(second * 1_000 + 900));
        assert_eq!(table.handle_from(node(2), &mut data(1), ms(second * 1_000 + 950)), by_udp);
    }
}

#[test]
fn who_forges_its_source_gets_no_more_sent_there_by_changing_its_way() {
    let start = epoch();
    let mut table = RelayTable::default();
    let key = online(&mut table, 1);
    online(&mut table, 2);
    let (mut sent, mut received) = (0, 0);
    for (ms, counter) in (0..60_000).step_by(100).zip(1..) {
        let now = start + Duration::from_millis(ms);
        let forged = Some(AddressProof([counter as u8; 8]));
        bind_with(&mut table, (1, &key, counter), forged, 1001, now);
        // By its link, and with the forged source, in turn.
        table.handle_from(node(1), &mut data(2), now);
        if counter % 30 == 0 {
            table.handle_datagram(&mut data(2), arrival(1001), now);
            sent += data(2).len() + 28;
        }
        for _ in 0..10 {
            let mut datagram = [data(1), vec![0; 300]].concat();
            match table.handle_from(node(2), &mut datagram, now) {
                Verdict::Forward(Way::Unproved(_)) => received += datagram.len() + 28,
                Verdict::Forward(Way::Link(ConnectionId(1))) => {}
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(received > 10_000 && received < 60_000 + sent, "{received} bytes for {sent}");
}

#[test]
fn an_address_that_a_nat_gives_to_another_node_is_that_nodes() {
    let now = epoch();
    let mut table = RelayTable::default();
    let (key, other) = (online(&mut table, 1), online(&mut table, 2));
    bind(&mut table, 1, &key, 1, 1001, now);
    bind(&mut table, 2, &other, 1, 1001, now);
    let verdict = table.handle_from(node(2), &mut data(1), now);
    assert_eq!(verdict, Verdict::Forward(Way::Link(ConnectionId(1))));
}

#[test]
fn anybody_is_told_where_they_are_seen_from_either_port() {
    let now = epoch();
    let mut table = RelayTable::default();
    let tx = crate::types::TxId([1; 12]);
    for (from_other_port, socket) in [(false, SocketId(0)), (true, SocketId(1))] {
        let mut question = Control::Reflect { tx, from_other_port }.encode(None);
        let verdict = table.handle_datagram(&mut question, arrival(7), now);
        let bytes =
            Control::Reflected { tx, observed: arrival(7).source, token: None }.encode(None);
        assert_eq!(verdict, Verdict::Reply { bytes, from: socket });
    }
}

#[test]
fn who_cannot_be_answered_is_not() {
    let (now, mut table) = (epoch(), RelayTable::default());
    let key = online(&mut table, 1);
    let malformed = Verdict::Drop(DropReason::Malformed);
    assert_eq!(bind(&mut table, 1, &key, 1, 0, now), malformed);
    let tx = crate::types::TxId([1; 12]);
    let mut question = Control::Reflect { tx, from_other_port: false }.encode(None);
    assert_eq!(table.handle_datagram(&mut question, arrival(0), now), malformed);
}

#[test]
fn a_knock_is_sent_to_the_port_that_was_asked_for() {
    let now = epoch();
    let mut table = RelayTable::default();
    let tx = crate::types::TxId([1; 12]);
    let to = SocketAddr::new(arrival(7).source.ip(), 4711);
    let mut question = Control::Knock { tx, port: 4711 }.encode(None);
    let bytes = Control::Knocked { tx, at: to }.encode(None);
    let verdict = table.handle_datagram(&mut question, arrival(7), now);
    assert_eq!(verdict, Verdict::Knock { bytes, to });
    let mut nowhere = Control::Knock { tx, port: 0 }.encode(None);
    let verdict = table.handle_datagram(&mut nowhere, arrival(7), now);
    assert_eq!(verdict, Verdict::Drop(DropReason::Malformed));
}

proptest::proptest! {
    #[test]
    fn garbage_is_dropped(mut bytes in proptest::collection::vec(0u8.., 0..80), first in 0xb0u8..0xb5) {
        let mut table = RelayTable::default();
        online(&mut table, 1);
        if let Some(byte) = bytes.first_mut() {
            *byte = first;
        }
        let verdict = table.handle_datagram(&mut bytes, arrival(1), epoch());
        proptest::prop_assert!(!matches!(verdict, Verdict::Forward(_)));
    }
}
