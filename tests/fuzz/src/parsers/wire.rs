//! What nodes, the server and strangers say to each other.

use std::sync::OnceLock;

use overlay::types::SecretKey;
use overlay::wire::control::{self, ClientMessage, ServerMessage};
use overlay::wire::disco::{self, DiscoKeys};
use overlay::wire::frame::{Assembler, Frame, split_control};
use overlay::wire::join::{JoinLine, ServerAddr};
use overlay::wire::relay::{self, Control, RelayKey};
use overlay::wire::report::Report;
use overlay::wire::{PacketKind, control::usable_candidates};

/// The first look at a datagram.
pub(crate) fn classify(bytes: &[u8]) {
    let _ = PacketKind::classify(bytes);
}

/// Disco messages: sealed ones of strangers, and what a peer may seal.
pub(crate) fn disco(bytes: &[u8]) {
    static KEYS: OnceLock<[DiscoKeys; 2]> = OnceLock::new();
    let [ours, theirs] = KEYS.get_or_init(|| {
        let (own, peer) = (SecretKey::from_bytes([1; 32]), SecretKey::from_bytes([2; 32]));
        [DiscoKeys::derive(&own, &peer.public()), DiscoKeys::derive(&peer, &own.public())]
    });
    let _ = disco::peek_tag(bytes);
    let _ = ours.open(bytes);
    // Behind the seal, where only a peer gets.
    if let Ok(message) = disco::Message::decode(bytes) {
        let sealed = theirs.seal(&message, [7; 24]);
        let opened = ours.open(&sealed).expect("what was sealed can be opened");
        assert_eq!(opened, message, "and says the same");
    }
}

/// Relay headers and control datagrams.
pub(crate) fn relay(bytes: &[u8]) {
    if let Ok((node, payload)) = relay::parse_data(bytes) {
        let mut again = relay::data_header(node).to_vec();
        again.extend_from_slice(payload);
        assert_eq!(relay::parse_data(&again), Ok((node, payload)));
    }
    let key = RelayKey([3; 32]);
    let _ = relay::verify(bytes, &key);
    if let Ok(message) = Control::parse(bytes) {
        // What is said to and by the reflector has no key.
        let signed = matches!(message, Control::Bind { .. } | Control::Bound { .. });
        let again = message.encode(signed.then_some(&key));
        assert!(!signed || relay::verify(&again, &key).is_ok());
        assert_eq!(Control::parse(&again), Ok(message));
    }
}

/// What a node says to the server.
pub(crate) fn control_client(bytes: &[u8]) {
    if let Ok(message) = control::decode::<ClientMessage>(bytes) {
        let again: ClientMessage =
            control::decode(&control::encode(&message)).expect("what was written can be read");
        assert_eq!(again, message);
        let _ = message.candidates.as_deref().map(usable_candidates);
    }
}

/// What the server says to a node.
pub(crate) fn control_server(bytes: &[u8]) {
    if let Ok(message) = control::decode::<ServerMessage>(bytes) {
        let again: ServerMessage =
            control::decode(&control::encode(&message)).expect("what was written can be read");
        assert_eq!(again, message);
    }
}

/// Join lines and server addresses, as somebody pastes them.
pub(crate) fn join(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(line) = text.parse::<JoinLine>() {
        let again: JoinLine = line.expose().parse().expect("what was written can be read");
        assert_eq!(again, line);
    }
    if let Ok(address) = ServerAddr::parse(text, 41820) {
        let again: ServerAddr = address.to_string().parse().expect("and this too");
        assert_eq!(again, address);
        let _ = address.literal();
    }
}

/// Frames of a control connection: each in its length, put together, cut again.
pub(crate) fn frame(bytes: &[u8]) {
    let mut assembler = Assembler::default();
    let mut rest = bytes;
    while let Some((len, tail)) = rest.split_first() {
        let (plain, tail) = tail.split_at(usize::from(*len).min(tail.len()));
        rest = tail;
        let whole = match Frame::parse(plain) {
            Ok(Some(Frame::ControlLast(body))) => assembler.push(body, true),
            Ok(Some(Frame::ControlMore(body))) => assembler.push(body, false),
            Ok(Some(Frame::Relay(_)) | None) | Err(_) => continue,
        };
        if let Ok(Some(message)) = whole {
            let parts: Vec<Frame<'_>> = split_control(&message).collect();
            assert!(matches!(parts.last(), Some(Frame::ControlLast(_))), "{parts:?}");
        }
    }
}

/// A peer's half of `overlay why`.
pub(crate) fn report(bytes: &[u8]) {
    if let Some(report) = Report::decode(bytes) {
        let again = Report::decode(&report.clone().encode()).expect("what was written can be read");
        assert!(report.tried.starts_with(&again.tried), "at most the end is missing");
    }
}
