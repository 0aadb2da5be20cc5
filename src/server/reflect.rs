//! Where do you see me? The answer to anybody, no larger than the question.

use std::net::SocketAddr;

use crate::types::TxId;
use crate::wire::relay::{CONTROL_LEN, Control};

/// The answer to a reflect question that came from `source`.
pub(super) fn answer(tx: TxId, source: SocketAddr) -> [u8; CONTROL_LEN] {
    Control::Reflected { tx, observed: source }.encode(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_names_the_source_and_is_as_long_as_the_question() {
        let source = "203.0.113.9:1234".parse().unwrap();
        let tx = TxId([3; 12]);
        let question = Control::Reflect { tx, from_other_port: false }.encode(None);
        let answer = answer(tx, source);
        assert_eq!(answer.len(), question.len());
        assert_eq!(Control::parse(&answer), Ok(Control::Reflected { tx, observed: source }));
    }
}
