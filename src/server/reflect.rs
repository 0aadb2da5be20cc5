//! Where do you see me? The answer to anybody, no larger than the question.

use std::net::SocketAddr;

use crate::types::TxId;
use crate::wire::relay::{CONTROL_LEN, Control, Token};

/// The answer to a reflect question that came from `source`.
pub(super) fn answer(tx: TxId, source: SocketAddr, token: Option<Token>) -> [u8; CONTROL_LEN] {
    Control::Reflected { tx, observed: source, token }.encode(None)
}

/// What goes to `port` of the address that a knock question came from, and where that is.
///
/// Never to another address than the one that asked: a forged question sends one datagram of its
/// own length to where its answer would have gone anyway.
pub(super) fn knock(
    tx: TxId,
    source: SocketAddr,
    port: u16,
) -> Option<([u8; CONTROL_LEN], SocketAddr)> {
    let at = SocketAddr::new(source.ip(), port);
    (port != 0).then(|| (Control::Knocked { tx, at }.encode(None), at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::relay::TOKEN_LEN;

    #[test]
    fn the_answer_names_the_source_and_is_as_long_as_the_question() {
        let source = "203.0.113.9:1234".parse().unwrap();
        let tx = TxId([3; 12]);
        let question = Control::Reflect { tx, from_other_port: false }.encode(None);
        for token in [None, Some(Token([7; TOKEN_LEN]))] {
            let answer = answer(tx, source, token);
            assert_eq!(answer.len(), question.len());
            let read = Control::Reflected { tx, observed: source, token };
            assert_eq!(Control::parse(&answer), Ok(read));
        }
    }

    #[test]
    fn a_knock_goes_to_a_port_of_who_asked_and_nowhere_else() {
        let source = "203.0.113.9:1234".parse().unwrap();
        let tx = TxId([3; 12]);
        let (bytes, at) = knock(tx, source, 80).unwrap();
        assert_eq!(at, "203.0.113.9:80".parse().unwrap());
        assert_eq!(Control::parse(&bytes), Ok(Control::Knocked { tx, at }));
        assert_eq!(knock(tx, source, 0), None);
    }
}
