//! Packets before and after, judged by full checksums.

use proptest::prelude::*;

use super::*;

/// Whether the IPv4 header checksum and, for ICMP, the message checksum are right.
fn checksums_hold(packet: &[u8]) -> Result<bool, PacketError> {
    let header = Header::read(packet, Extent::Whole)?;
    let head = packet.get(..header.payload).ok_or(PacketError::Truncated)?;
    let body = packet.get(header.payload..header.end).ok_or(PacketError::Truncated)?;
    if internet_checksum(head) != 0 {
        return Ok(false);
    }
    if header.protocol == ICMP {
        return Ok(internet_checksum(body) == 0);
    }
    if header.protocol == UDP && get16(body, 6)? == 0 {
        return Ok(true);
    }
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    let mut covered = Vec::new();
    covered.extend_from_slice(&header.src.octets());
    covered.extend_from_slice(&header.dst.octets());
    covered.extend_from_slice(&[0, header.protocol]);
    covered.extend_from_slice(&length.to_be_bytes());
    covered.extend_from_slice(body);
    Ok(internet_checksum(&covered) == 0)
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn flow(protocol: Protocol, src: &str, dst: &str) -> Flow {
    Flow { protocol, src: at(src), dst: at(dst) }
}

/// A packet of `flow` with right checksums, made from a header and nothing else.
fn packet(flow: Flow, payload: &[u8]) -> Vec<u8> {
    let (number, checksum_at, mut body) = match flow.protocol {
        Protocol::Udp => (UDP, 6, vec![0; 8]),
        Protocol::Tcp => (TCP, 16, vec![0; 20]),
        Protocol::IcmpEcho => (ICMP, 2, vec![0; 8]),
    };
    body.extend_from_slice(payload);
    match flow.protocol {
        Protocol::IcmpEcho if flow.dst.port() == 0 => {
            body[0] = ECHO_REQUEST;
            set16(&mut body, 4, flow.src.port()).unwrap();
        }
        Protocol::IcmpEcho => set16(&mut body, 4, flow.dst.port()).unwrap(),
        Protocol::Udp | Protocol::Tcp => {
            set16(&mut body, 0, flow.src.port()).unwrap();
            set16(&mut body, 2, flow.dst.port()).unwrap();
        }
    }
    if flow.protocol == Protocol::Udp {
        let length = u16::try_from(body.len()).unwrap();
        set16(&mut body, 4, length).unwrap();
    }
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (flow.src.ip(), flow.dst.ip()) else {
        panic!("IPv4 only");
    };
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, number, 0, 0];
    packet.extend_from_slice(&src.octets());
    packet.extend_from_slice(&dst.octets());
    let total = u16::try_from(packet.len() + body.len()).unwrap();
    set16(&mut packet, 2, total).unwrap();
    let head = internet_checksum(&packet);
    set16(&mut packet, 10, head).unwrap();
    let mut covered = Vec::new();
    if flow.protocol != Protocol::IcmpEcho {
        covered.extend_from_slice(&packet[12..20]);
        covered.extend_from_slice(&[0, number]);
        covered.extend_from_slice(&u16::try_from(body.len()).unwrap().to_be_bytes());
    }
    covered.extend_from_slice(&body);
    let sum = match internet_checksum(&covered) {
        0 => 0xffff,
        sum => sum,
    };
    set16(&mut body, checksum_at, sum).unwrap();
    packet.extend(body);
    assert_eq!(checksums_hold(&packet), Ok(true), "the test's own packet is right");
    packet
}

#[test]
fn a_rewritten_packet_has_the_new_flow_and_right_checksums() {
    for (protocol, src, dst, new_src, new_dst) in [
        (Protocol::Udp, "192.168.1.2:5000", "203.0.113.1:41820", "203.0.113.10:6000", ""),
        (Protocol::Tcp, "192.168.1.2:5000", "203.0.113.1:41820", "203.0.113.10:6000", ""),
        (Protocol::IcmpEcho, "192.168.1.2:77", "203.0.113.1:0", "203.0.113.10:78", ""),
        (Protocol::IcmpEcho, "203.0.113.1:0", "203.0.113.10:78", "", "192.168.1.2:77"),
        (Protocol::Udp, "203.0.113.1:41820", "203.0.113.10:6000", "", "192.168.1.2:5000"),
    ] {
        let before = flow(protocol, src, dst);
        let after = Flow {
            src: if new_src.is_empty() { before.src } else { at(new_src) },
            dst: if new_dst.is_empty() { before.dst } else { at(new_dst) },
            ..before
        };
        let mut packet = packet(before, b"odd sized");
        assert_eq!(summarize(&packet).unwrap().content, Content::Flow(before));
        rewrite(&mut packet, after).unwrap();
        assert_eq!(summarize(&packet).unwrap().content, Content::Flow(after));
        assert_eq!(checksums_hold(&packet), Ok(true), "{before:?} to {after:?}");
    }
}

#[test]
fn a_udp_packet_without_checksum_stays_without() {
    let before = flow(Protocol::Udp, "192.168.1.2:5000", "203.0.113.1:41820");
    let mut packet = packet(before, b"x");
    set16(&mut packet, 26, 0).unwrap();
    rewrite(&mut packet, Flow { src: at("203.0.113.10:6000"), ..before }).unwrap();
    assert_eq!(get16(&packet, 26), Ok(0), "zero means: not computed");
}

#[test]
fn a_broken_checksum_is_not_repaired_on_the_way() {
    let before = flow(Protocol::Udp, "192.168.1.2:5000", "203.0.113.1:41820");
    let mut packet = packet(before, b"payload");
    *packet.last_mut().unwrap() ^= 0x55;
    rewrite(&mut packet, Flow { src: at("203.0.113.10:6000"), ..before }).unwrap();
    assert_eq!(checksums_hold(&packet), Ok(false), "the receiver must still see the damage");
}

#[test]
fn an_error_is_translated_with_the_packet_that_it_quotes() {
    for protocol in [Protocol::Udp, Protocol::Tcp] {
        let sent = flow(protocol, "203.0.113.10:6000", "203.0.113.20:7000");
        let router = Ipv4Addr::new(203, 0, 113, 254);
        let mut error = time_exceeded(&packet(sent, &[7; 100]), router).unwrap();
        let summary = summarize(&error).unwrap();
        assert_eq!(summary.content, Content::Error { quoted: sent });
        assert_eq!((summary.src, summary.dst), (router, Ipv4Addr::new(203, 0, 113, 10)));

        let inside = Ipv4Addr::new(192, 168, 1, 2);
        let quoted = Flow { src: at("192.168.1.2:5000"), ..sent };
        rewrite_error(&mut error, router, inside, quoted).unwrap();
        let summary = summarize(&error).unwrap();
        assert_eq!(summary.content, Content::Error { quoted });
        assert_eq!((summary.src, summary.dst), (router, inside));
        assert_eq!(checksums_hold(&error), Ok(true), "outer header and ICMP message");
        assert_eq!(checksums_hold(&error[28..]), Ok(true), "the quoted packet itself");
    }
}

#[test]
fn a_quote_may_end_after_eight_bytes() {
    let sent = flow(Protocol::Tcp, "203.0.113.10:6000", "203.0.113.20:7000");
    let mut error =
        destination_unreachable(&packet(sent, &[]), Ipv4Addr::new(203, 0, 113, 20), 3).unwrap();
    error.truncate(20 + 8 + 20 + 8);
    let total = u16::try_from(error.len()).unwrap();
    set16(&mut error, 2, total).unwrap();
    assert_eq!(summarize(&error).unwrap().content, Content::Error { quoted: sent });
    let quoted = Flow { src: at("192.168.1.2:5000"), ..sent };
    let to = Ipv4Addr::new(192, 168, 1, 2);
    rewrite_error(&mut error, Ipv4Addr::new(203, 0, 113, 20), to, quoted).unwrap();
    assert_eq!(summarize(&error).unwrap().content, Content::Error { quoted });
}

#[test]
fn a_router_takes_one_from_the_ttl_and_says_when_it_is_used_up() {
    let mut packet = packet(flow(Protocol::Udp, "10.0.0.1:1", "10.0.0.2:2"), b"");
    for left in (1..64).rev() {
        assert_eq!(decrement_ttl(&mut packet), Ok(Ttl::Alive));
        assert_eq!(summarize(&packet).unwrap().ttl, left);
        assert_eq!(checksums_hold(&packet), Ok(true));
    }
    assert_eq!(decrement_ttl(&mut packet), Ok(Ttl::Expired), "a packet with TTL 1 dies");
}

#[test]
fn no_error_is_sent_about_an_error() {
    let sent = flow(Protocol::Udp, "10.0.0.1:1", "10.0.0.2:2");
    let error = time_exceeded(&packet(sent, b""), Ipv4Addr::new(10, 0, 0, 9)).unwrap();
    assert_eq!(time_exceeded(&error, Ipv4Addr::new(10, 0, 0, 8)), None);
}

#[test]
fn an_echo_request_is_answered_with_its_own_words() {
    let request = packet(flow(Protocol::IcmpEcho, "10.0.0.1:77", "10.0.0.2:0"), b"hello");
    let reply = echo_reply(&request).unwrap();
    assert_eq!(checksums_hold(&reply), Ok(true));
    let expected = EchoReply { from: Ipv4Addr::new(10, 0, 0, 2), id: 77, seq: 0 };
    assert_eq!(parse_echo_reply(&reply), Some(expected));
    assert_eq!(&reply[28..], b"hello");
    assert_eq!(echo_reply(&reply), None, "a reply is not answered");
    assert_eq!(internet_checksum(&echo_request(1, 2, b"abc")), 0, "its checksum is right");
}

#[test]
fn what_a_nat_cannot_translate_is_refused_with_the_reason() {
    let good = packet(flow(Protocol::Udp, "10.0.0.1:1", "10.0.0.2:2"), b"");
    let with = |offset: usize, value: u8| {
        let mut packet = good.clone();
        packet[offset] = value;
        summarize(&packet).unwrap_err()
    };
    assert_eq!(with(0, 0x60), PacketError::NotIpv4);
    assert_eq!(with(0, 0x44), PacketError::Truncated, "a header of 16 bytes is none");
    assert_eq!(with(2, 0xff), PacketError::Truncated, "longer than the buffer");
    assert_eq!(with(7, 1), PacketError::Fragment);
    assert_eq!(with(9, 2), PacketError::UnknownProtocol, "IGMP");
    assert_eq!(summarize(&[]).unwrap_err(), PacketError::Truncated);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..128)) {
        everything(&mut bytes);
    }

    #[test]
    fn no_damage_to_a_good_packet_makes_it_panic(
        protocol in prop_oneof![Just(Protocol::Udp), Just(Protocol::Tcp), Just(Protocol::IcmpEcho)],
        as_error: bool,
        damage in prop::collection::vec((0..120_usize, any::<u8>()), 0..6),
        length in 0..160_usize,
    ) {
        let mut bytes = packet(flow(protocol, "10.0.0.1:1", "10.0.0.2:0"), &[9; 40]);
        if as_error {
            bytes = time_exceeded(&bytes, Ipv4Addr::new(10, 0, 0, 9)).unwrap();
        }
        for (place, value) in damage {
            if let Some(byte) = bytes.get_mut(place) {
                *byte = value;
            }
        }
        bytes.truncate(length);
        everything(&mut bytes);
    }

    #[test]
    fn checksums_hold_after_any_rewriting(
        protocol in prop_oneof![Just(Protocol::Udp), Just(Protocol::Tcp)],
        from: (u32, u16, u32, u16),
        to: (u32, u16, u32, u16),
        payload in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let flow = |(src, src_port, dst, dst_port): (u32, u16, u32, u16)| Flow {
            protocol,
            src: SocketAddr::new(Ipv4Addr::from(src).into(), src_port),
            dst: SocketAddr::new(Ipv4Addr::from(dst).into(), dst_port),
        };
        let mut packet = packet(flow(from), &payload);
        rewrite(&mut packet, flow(to)).unwrap();
        prop_assert_eq!(summarize(&packet).unwrap().content, Content::Flow(flow(to)));
        prop_assert_eq!(checksums_hold(&packet), Ok(true));
    }
}

fn everything(bytes: &mut [u8]) {
    let to = flow(Protocol::Udp, "1.2.3.4:5", "6.7.8.9:10");
    let router = Ipv4Addr::new(10, 0, 0, 9);
    let _ = (summarize(bytes), addresses(bytes), echo_reply(bytes), parse_echo_reply(bytes));
    let _ = (time_exceeded(bytes, router), destination_unreachable(bytes, router, 3));
    let _ = decrement_ttl(bytes);
    let _ = rewrite_error(bytes, router, router, to);
    let _ = rewrite(bytes, to);
}
